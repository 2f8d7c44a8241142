"AutoAssign: golden parity, an independent dense reference, chunks, order, what carries no gradient."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb.geometry import InputError, grid_points
from ala_nb.geometry import level_sizes as sizes_of
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions, inside_pairs
from conftest import golden_case, load_golden
from golden_util import case_inputs, compare, golden_cases

CASES = golden_cases('autoassign')
# In float32 the release is no reference for these: logits that saturate its probabilities, and boxes so exact that 1/(1-IoU) is all rounding.
ONLY_DOUBLE = {'saturated', 'perfect'}

@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
@pytest.mark.parametrize('case', CASES)
def test_golden(case, dtype):
    if dtype == torch.float32 and case in ONLY_DOUBLE: pytest.skip('the release itself is only comparable in float64')
    k = int(load_golden(f'inputs_{case}')['n_class'])
    for as_maps, chunk in ((False, 1<<17), (True, 1<<17), (True, 60)):
        out = compare('autoassign', case, build('autoassign', k, chunk=chunk), dtype=dtype, as_maps=as_maps, params=('mu', 'sigma'))
    g, p = golden_case('autoassign', case), out.pairs
    first = 0
    for i in range(p.objects.n_images):
        n = int(p.objects.counts[i])
        if f'inside_{i}' in g:
            inside = torch.zeros(p.n_locations, n, dtype=torch.bool); mine = p.image == i
            inside[p.loc[mine], p.obj[mine]-first] = True
            np.testing.assert_array_equal(inside.numpy(), g[f'inside_{i}'])
        tol = 1e-9 if dtype == torch.float64 else 1e-4
        if f'pos_weight_{i}' in g: np.testing.assert_allclose(out.dense('pos', i), g[f'pos_weight_{i}'], atol=tol)
        if f'neg_weight_{i}' in g:
            w = torch.ones(p.n_locations, k, dtype=dtype)
            for e in (p.image == i).nonzero().flatten().tolist(): w[p.loc[e], p.labels[e]] = out.weights['neg'][e]    # in order: the last of a class stays
            np.testing.assert_allclose(w, g[f'neg_weight_{i}'], atol=tol)
        first += n

# ---------------------------------------------------------------- dense reference
def dense(preds, targets, mu, sigma, variant='released', centre='category', confidence='joint', objectness='implicit', negative_weighting=True,
          other_objects=True, lam=5., tau=1/3):
    "The losses image by image, by P x G matrices and autograd, straight from the paper's and the release's formulas."
    cls, dist, pts, st_ = preds.cls_logits, preds.distances, preds.points, preds.strides
    obj = preds.obj_logits
    if objectness == 'explicit': obj = obj.detach()
    if objectness == 'none': obj = torch.full_like(preds.obj_logits, 60.)
    pos, neg, mass, cen, n_obj, inside_any, outs = 0., 0., 0., 0., 0, [], []
    k = cls.shape[-1]
    mu, sigma = mu.expand(k, 2), sigma.expand(k, 2)
    for i, t in enumerate(targets):
        b, lab = t['boxes'].to(cls), t['labels']
        d = torch.cat([pts[:, None]-b[None, :, :2], b[None, :, 2:]-pts[:, None]], -1)           # (P, G, 4)
        inside = (d > 0).all(-1)
        pred = torch.cat([pts-dist[i, :, :2], pts+dist[i, :, 2:]], -1)[:, None]
        wh = (torch.minimum(pred[..., 2:], b[:, 2:])-torch.maximum(pred[..., :2], b[:, :2])).clamp(min=0)
        inter = wh.prod(-1); area = (pred[..., 2:]-pred[..., :2]).prod(-1)
        union = area + (b[:, 2:]-b[:, :2]).prod(-1) - inter
        hull = (torch.maximum(pred[..., 2:], b[:, 2:])-torch.minimum(pred[..., :2], b[:, :2])).prod(-1)
        iou = inter/union; loc = torch.exp(-lam*(1-(iou-(hull-union)/hull)))
        z = ((pts[:, None]-(b[:, :2]+b[:, 2:])/2)/st_[:, None, None]-mu[lab])/sigma[lab]
        G = torch.exp(-(z**2).sum(-1)/2)*inside
        q_all = cls[i].sigmoid()*obj[i].sigmoid()[:, None]; q = q_all[:, lab]
        p = q*loc
        conf = dict(joint=p, cls=q, loc=loc, none=0*p)[confidence]
        e = torch.exp(conf/tau)*(inside if centre == 'none' else G)
        r = (e*p).sum(0)/e.sum(0).clamp(min=1e-12)
        pos = pos + torch.where(r > 0, -r.clamp(min=1e-300).log(), 100.).clamp(max=100).sum()
        w = torch.ones_like(q_all)
        if len(lab) and negative_weighting:
            best = (iou if other_objects else iou*inside).detach().amax(1)
            for g in range(len(lab)):
                m = inside[:, g]
                if m.any():
                    f = 1/(1-best[m]).clamp(min=1e-12)
                    own = 1-(f-f.min()+1e-12)/(f.max()-f.min()+1e-12)
                    w[m, lab[g]] = torch.minimum(w[m, lab[g]], own) if variant == 'paper' else own    # of one class: the smallest, or the last
        if variant == 'paper':
            pt = w*(1-q_all)
            neg = neg - ((1-pt)**2*pt.clamp(min=math.exp(-100)).log()).sum()
        else: neg = neg - ((w*q_all)**2*torch.log(1-w*q_all)).sum()
        mass = mass + G.sum().detach(); n_obj += len(lab)
        if inside.any(): cen = cen + len(lab)/G.sum()
        inside_any.append(inside.any(1))
    losses = dict(loss_pos=pos, loss_neg=.75*neg)
    if variant == 'released':
        losses = dict(loss_pos=.25*pos/max(n_obj, 1), loss_neg=.75*neg/mass.clamp(min=1), loss_center=.75*cen/len(targets))
    if objectness == 'explicit':
        y = torch.stack(inside_any).to(cls); o = preds.obj_logits.sigmoid()
        losses['loss_obj'] = (-.25*y*(1-o)**2*o.log()-.75*(1-y)*o**2*(1-o).log()).sum()/y.sum().clamp(min=1)
    return {k: torch.as_tensor(v, dtype=cls.dtype) for k, v in losses.items()}

def batch(seed, counts, K, size=(64, 96), strides=(8, 16, 32), offset=0., same=False, dtype=torch.float64, spread=1.5):
    "Flat predictions with leaves, and targets: tiny, ordinary, whole-image and duplicate boxes."
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.randn(*s, generator=g).to(dtype)
    sizes = sizes_of(*size, strides); pts, st_ = grid_points(sizes, strides, offset, dtype=dtype); P, B = len(pts), len(counts)
    leaves = [(r(B, P, K)*spread-2).requires_grad_(), ((r(B, P, 4)*.6+1.).exp()*st_[:, None]/2).requires_grad_(), (r(B, P)*spread).requires_grad_()]
    targets = []
    for n in counts:
        xy = torch.rand(n, 2, generator=g)*torch.tensor([size[1], size[0]])-4; wh = torch.rand(n, 2, generator=g)**3*90+1
        b = torch.cat([xy, xy+wh], -1).to(dtype)
        if n > 2: b[0] = torch.tensor([0., 0., size[1], size[0]]); b[1] = b[2]
        targets.append(dict(boxes=b, labels=torch.randint(0, 1 if same else K, (n,), generator=g)))
    return Predictions(*leaves[:2], pts, st_, leaves[2]), targets, leaves

def method_with_prior(K, seed=0, **options):
    m = build('autoassign', K, **options).double(); g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): m.mu += torch.randn(m.mu.shape, generator=g).double()*.3; m.sigma += torch.rand(m.sigma.shape, generator=g).double()
    return m

def same_as_dense(preds, targets, leaves, m, tol=1e-9, **options):
    out = m(preds, Objects.from_targets(targets)); ref = dense(preds, targets, m.mu, m.sigma, **options)
    assert set(out.losses) == set(ref)
    for k in ref: assert torch.allclose(out.losses[k], ref[k], rtol=tol, atol=tol), (k, out.losses[k].item(), ref[k].item())
    weights = dict(loss_pos=1., loss_neg=3.).get
    leaves = leaves + list(m.parameters())
    total = lambda l: sum(weights(k, 7.)*v for k, v in l.items())
    a, b = (torch.autograd.grad(total(x), leaves, allow_unused=True, retain_graph=True) for x in (out.losses, ref))
    for x, y in zip(a, b):
        x, y = (torch.zeros(()) if t is None else t for t in (x, y))
        assert torch.allclose(x, y.expand_as(x), rtol=0, atol=10*tol*max(1., float(y.abs().max()))), float((x-y).abs().max())

SWITCHES = [dict(), dict(variant='paper'), dict(centre='none', centre_loss=True), dict(confidence='cls'), dict(confidence='loc'), dict(confidence='none'),
            dict(objectness='none'), dict(objectness='explicit'), dict(negative_weighting=False), dict(other_objects=False), dict(centre='shared')]

@pytest.mark.parametrize('options', SWITCHES, ids=str)
@pytest.mark.parametrize('counts,K,same', (((4, 0, 9), 3, False), ((25,), 1, True), ((3, 2), 365, False), ((0, 0), 2, False)))
def test_dense_reference(options, counts, K, same):
    preds, targets, leaves = batch(1, counts, K, same=same)
    m = method_with_prior(K, chunk=300, **options)
    if options.get('centre') == 'none': m.mu.zero_(); m.sigma.fill_(1.)
    same_as_dense(preds, targets, leaves, m, **{k: v for k, v in options.items() if k != 'centre_loss'})

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 12), min_size=1, max_size=3), K=st.sampled_from((1, 2, 5)), same=st.booleans(),
       offset=st.sampled_from((0., .5)), chunk=st.sampled_from((1, 37, 10**6)))
def test_random_batches(seed, counts, K, same, offset, chunk):
    preds, targets, leaves = batch(seed, counts, K, offset=offset, same=same)
    same_as_dense(preds, targets, leaves, method_with_prior(K, seed, chunk=chunk))

def test_crowd():
    "Many more objects than `best_iou` takes at a time, most of one class, in chunks that cut the list everywhere."
    preds, targets, leaves = batch(3, (150, 40), 2, same=True)
    same_as_dense(preds, targets, leaves, method_with_prior(2, chunk=200))

# ---------------------------------------------------------------- corners
OPTIONS = [dict(), dict(variant='paper'), dict(objectness='none'), dict(objectness='explicit'), dict(centre='fixed'), dict(confidence='none', centre='none', negative_weighting=False)]

@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('case', ('crowded', 'all_empty', 'empty_in_batch', 'tiny_only', 'tiny_mixed', 'saturated', 'duplicates_same_class', 'perfect', 'whole_image_exact'))
def test_finite_and_connected(case, options):
    for as_maps in (False, True):
        preds, objects, leaves, z = case_inputs(case, torch.float32, as_maps)
        m = build('autoassign', z['n_class'], **options)
        out = m(preds, objects)
        used = [leaves[k] for k in ('cls_logits', 'distances')] + ([leaves['obj_logits']] if m.head.third else []) + list(m.parameters())
        for v in out.losses.values(): assert v.ndim == 0 and torch.isfinite(v) and v.requires_grad | (v == 0)
        for g in torch.autograd.grad(out.total, used): assert torch.isfinite(g).all()
    assert m.scores(preds).shape == preds.cls_logits.shape and m.nms

def test_extreme_logits_and_sigma():
    preds, targets, leaves = batch(0, (5, 3), 3, dtype=torch.float32, spread=60.)
    m = build('autoassign', 3)
    with torch.no_grad(): m.sigma.copy_(torch.tensor([[1e-3, 1.], [50., .1], [-1., 2.]])); m.mu[0] = 40.
    out = m(preds, Objects.from_targets(targets))
    for g in torch.autograd.grad(out.total, leaves + list(m.parameters())): assert torch.isfinite(g).all()

def test_batched_equals_one_by_one():
    "Sums over images times their divisors: objects, summed prior, images."
    preds, targets, _ = batch(5, (4, 0, 7), 3); m = method_with_prior(3)
    def prior(p, t): q = inside_pairs(p, Objects.from_targets(t)); return q.gaussian(m.mu[q.objects.labels], m.sigma[q.objects.labels]).sum()
    whole, n, mass = m(preds, Objects.from_targets(targets)), sum(len(t['labels']) for t in targets), prior(preds, targets)
    pos = neg = cen = 0; weights = []
    for i, t in enumerate(targets):
        p = Predictions(preds.cls_logits[i:i+1], preds.distances[i:i+1], preds.points, preds.strides, preds.obj_logits[i:i+1])
        o = m(p, Objects.from_targets([t])); weights.append(o.weights)
        pos, neg, cen = pos + o.losses['loss_pos']*len(t['labels']), neg + o.losses['loss_neg']*prior(p, [t]).clamp(min=1), cen + o.losses['loss_center']
    assert torch.allclose(whole.losses['loss_pos'], pos/n, rtol=1e-12) and torch.allclose(whole.losses['loss_neg'], neg/mass, rtol=1e-12)
    assert torch.allclose(whole.losses['loss_center'], cen/3, rtol=1e-12)
    for k in whole.weights: assert torch.allclose(torch.cat([w[k] for w in weights]), whole.weights[k], rtol=0, atol=1e-12)

def test_order_and_empty_images():
    preds, targets, _ = batch(6, (3, 6), 12); m = method_with_prior(12)
    for t in targets: t['labels'] = torch.randperm(12)[:len(t['labels'])]            # no class twice: order is then free
    a = m(preds, Objects.from_targets(targets)).losses
    flip = [dict(boxes=t['boxes'].flip(0), labels=t['labels'].flip(0)) for t in targets]
    b = m(preds, Objects.from_targets(flip)).losses
    swap = Predictions(preds.cls_logits.flip(0), preds.distances.flip(0), preds.points, preds.strides, preds.obj_logits.flip(0))
    c = m(swap, Objects.from_targets(targets[::-1])).losses
    for k in a: assert torch.allclose(a[k], b[k], rtol=1e-12) and torch.allclose(a[k], c[k], rtol=1e-12)
    none = dict(boxes=torch.zeros(0, 4).double(), labels=torch.zeros(0).long())
    more = Predictions(*(torch.cat([x, torch.full_like(x[:1], v)]) for x, v in ((preds.cls_logits, -80.), (preds.distances, 5.))), preds.points, preds.strides,
                       torch.cat([preds.obj_logits, torch.zeros_like(preds.obj_logits[:1])]))
    d = m(more, Objects.from_targets([*targets, none])).losses
    assert torch.allclose(a['loss_pos'], d['loss_pos'], rtol=1e-12) and torch.allclose(a['loss_neg'], d['loss_neg'], rtol=1e-12)
    assert torch.allclose(a['loss_center']*2/3, d['loss_center'], rtol=1e-12)           # a mean over images

def test_last_of_a_class_wins():
    "Two boxes of one class over the same locations: swapping them swaps whose negative weight counts (as released)."
    preds, _, _ = batch(7, (1,), 2)
    boxes = torch.tensor([[0., 0., 60., 60.], [10., 10., 80., 60.]]).double()
    for order in ([0, 1], [1, 0]):
        t = [dict(boxes=boxes[order], labels=torch.tensor([1, 1]))]
        ref = dense(preds, t, torch.zeros(2, 2).double(), torch.ones(2, 2).double())
        assert torch.allclose(build('autoassign', 2).double()(preds, Objects.from_targets(t)).losses['loss_neg'], ref['loss_neg'], rtol=1e-10)

# ---------------------------------------------------------------- gradients, by name
def gradients(options, loss):
    preds, targets, leaves = batch(8, (4, 5), 3); m = method_with_prior(3, **options)
    named = dict(zip(('cls', 'distances', 'obj'), leaves)) | dict(m.named_parameters())
    out = m(preds, Objects.from_targets(targets))
    got = torch.autograd.grad(out.losses[loss], list(named.values()), allow_unused=True)
    assert not any(w.requires_grad for w in out.weights.values())
    return {k for k, g in zip(named, got) if g is not None and g.abs().sum() > 0}

@pytest.mark.parametrize('options,loss,reached', (
    ({}, 'loss_pos', {'cls', 'distances', 'obj', 'mu', 'sigma'}),                      # w+ is not detached
    ({}, 'loss_neg', {'cls', 'obj'}),                                                  # w- and the divisor are
    ({}, 'loss_center', {'mu', 'sigma'}),
    (dict(objectness='explicit'), 'loss_pos', {'cls', 'distances', 'mu', 'sigma'}),    # the objectness hears of its own loss only
    (dict(objectness='explicit'), 'loss_neg', {'cls'}), (dict(objectness='explicit'), 'loss_obj', {'obj'}),
    (dict(centre='none'), 'loss_pos', {'cls', 'distances', 'obj'}), (dict(centre='fixed'), 'loss_pos', {'cls', 'distances', 'obj'}),
    (dict(confidence='none'), 'loss_pos', {'cls', 'distances', 'obj', 'mu', 'sigma'}),
    (dict(objectness='none'), 'loss_neg', {'cls'})), ids=lambda v: '-'.join(sorted(v)) if isinstance(v, set) else str(v))
def test_gradient_flow(options, loss, reached): assert gradients(options, loss) == reached

def test_each_loss_alone_equals_its_share():
    "Backwards through one loss at a time gives what it contributes to the sum; a second backward pass too."
    preds, targets, leaves = batch(9, (6, 3), 3); m = method_with_prior(3); leaves = leaves + list(m.parameters())
    out = m(preds, Objects.from_targets(targets))
    parts = [torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True) for v in out.losses.values()]
    for _ in range(2): whole = torch.autograd.grad(out.total, leaves, retain_graph=True)
    for i, g in enumerate(whole): assert torch.allclose(g, sum(p[i] for p in parts if p[i] is not None), rtol=1e-9, atol=1e-12)

def test_no_gradient_wanted():
    preds, targets, leaves = batch(9, (6, 3), 3); m = method_with_prior(3)
    with torch.no_grad(): a = m(preds, Objects.from_targets(targets)).losses
    b = m(preds, Objects.from_targets(targets)).losses
    for k in a: assert torch.equal(a[k], b[k]) and not a[k].requires_grad

def test_autocast_and_half():
    preds, targets, _ = batch(2, (4, 2), 3, dtype=torch.float32); objects = Objects.from_targets(targets); m = build('autoassign', 3)
    half = Predictions(preds.cls_logits.bfloat16(), preds.distances.bfloat16(), preds.points, preds.strides, preds.obj_logits.bfloat16())
    full = Predictions(*(x.bfloat16().float() for x in (preds.cls_logits, preds.distances)), preds.points, preds.strides, preds.obj_logits.bfloat16().float())
    with torch.autocast('cpu', dtype=torch.bfloat16): a = m(half, objects).losses
    b = m(full, objects).losses
    for k in a: assert a[k].dtype == torch.float32 and torch.allclose(a[k], b[k], rtol=1e-6)

# ---------------------------------------------------------------- what is printed, by hand
def test_printed_equation_by_hand():
    "One object over two locations, one class: Eq. 12 with pencil and paper."
    pts, st_ = grid_points([(1, 4)], (8,), 0.)
    c, o = torch.tensor([0., 1., -1., -20.]).double(), torch.tensor([2., 1., 0., 0.]).double()
    d = torch.tensor([[3., 4, 9, 4], [9., 4, 3, 4], [5., 5, 5, 5], [1., 1, 1, 1]]).double()      # location 0's box is 12 x 8, location 1's too
    preds = Predictions(c[None, :, None], d[None], pts.double(), st_.double(), o[None])
    objects = Objects.from_targets([dict(boxes=torch.tensor([[-4., -4., 12., 4.]]).double(), labels=torch.tensor([0]))])
    m = build('autoassign', 1, variant='paper').double(); out = m(preds, objects)
    q = (c.sigmoid()*o.sigmoid()).tolist()
    loc = math.exp(-5*(1-.75))                                                           # both boxes, 12 x 8, lie in the object, 16 x 8: IoU = GIoU = 3/4
    g = [math.exp(-.5*(4/8)**2)]*2                            # both half a stride from the centre at x = 4
    p = [q[i]*loc for i in (0, 1)]; e = [math.exp(3*p[i])*g[i] for i in (0, 1)]
    pos = -math.log(sum(e[i]*p[i] for i in (0, 1))/sum(e))
    neg = .75*(2*100 + sum(q[i]**2*-math.log(1-q[i]) for i in (2, 3)))                   # equal IoUs: w- = 0 at both, log floored at -100
    assert abs(out.losses['loss_pos'].item()-pos) < 1e-9 and abs(out.losses['loss_neg'].item()-neg) < 1e-9
    assert set(out.losses) == {'loss_pos', 'loss_neg'}

@pytest.mark.parametrize('options,words', ((dict(variant='mmdet'), 'variant'), (dict(centre='center'), 'centre'), (dict(confidence='box'), 'confidence'),
                                           (dict(objectness='imp'), 'objectness'), (dict(tau=0.), 'tau'), (dict(center='none'), 'centre')), ids=str)
def test_bad_options(options, words):
    with pytest.raises(InputError, match=words): build('autoassign', 3, **options)

def test_what_it_asks_of_the_head():
    m = build('autoassign', 7)
    assert (m.head.offset, m.head.cls_prior, m.head.box_bias, m.head.box_activation, m.head.third) == (0., .02, 4., 'relu', 'objectness')
    assert m.mu.shape == m.sigma.shape == (7, 2) and build('autoassign', 7, centre='shared').mu.shape == (1, 2)
    assert not list(build('autoassign', 7, centre='fixed').parameters()) and build('autoassign', 7, objectness='none').head.third is None
