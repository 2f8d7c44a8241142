"DW: golden parity, the tables' options against a slow reference, order, batches, and what carries no gradient."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.ops import generalized_box_iou, box_iou
from ala_nb.dw import BAGS, NEGATIVES, WEIGHTINGS, DW
from ala_nb.geometry import InputError, distance_giou, grid_points, level_sizes
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions
from conftest import golden_case, load_golden
from golden_util import case_inputs, compare, golden_cases

FILES = dict(dw_released={}, dw_paper=dict(variant='paper'), dw_paper_radius=dict(variant='paper', bag=('radius', 1.7)),
             dw_paper_topk=dict(variant='paper', bag=('topk', 9)))
ROWS = [(f, c) for f in FILES for c in golden_cases(f)]

def method_for(file, case): return build('dw', int(load_golden(f'inputs_{case}')['n_class']), **FILES[file])

@pytest.mark.parametrize('file,case', ROWS)
def test_golden(file, case):
    for dtype in (torch.float32, torch.float64):
        for as_maps in (False, True): out = compare(file, case, method_for(file, case), dtype=dtype, as_maps=as_maps)
    g, pairs, ones = golden_case(file, case), out.pairs, torch.ones(len(out.pairs), dtype=torch.float64)
    out.weights |= dict(one=ones)
    for i in range(pairs.objects.n_images):
        same = lambda key, got, **kw: key not in g or np.testing.assert_allclose(got.numpy(), g[key], **kw)
        soft = dict(rtol=1e-6, atol=1e-7)                             # stored as float32
        same(f'inside_{i}', out.dense('one', i) > 0)
        same(f'pos_weight_{i}', out.dense('pos', i), **soft); same(f'neg_weight_{i}', out.dense('neg', i), **soft)
        mine = pairs.image == i
        k = int(load_golden(f'inputs_{case}')['n_class'])
        in_bag = torch.zeros(pairs.n_locations, k, dtype=torch.bool); in_bag[pairs.loc[mine], pairs.labels[mine]] = True
        same(f'in_bag_{i}', in_bag)
        stands = mine & pairs.last_of_class()
        p_neg = torch.ones(pairs.n_locations, k, dtype=torch.float64)
        p_neg[pairs.loc[stands], pairs.labels[stands]] = out.weights['p_neg'][stands]
        same(f'p_neg_{i}', p_neg, **soft)

# ---- a reference that knows no pairs: every location, one object at a time, boxes by their corners

def corners(points, d): return torch.cat([points-d[:, :2], points+d[:, 2:]], 1)

def bag_of(points, strides, box, kind, size, sigma):
    "Locations in the object's bag, and their prior."
    centre, n = (box[:2]+box[2:])/2, len(points)
    r = ((points-centre)/strides[:, None]).norm(dim=1)
    inside = ((points > box[:2]) & (points < box[2:])).all(1)
    if kind == 'radius': return inside & (r < size), torch.ones(n).to(r)
    if kind == 'topk':
        chosen = torch.zeros(n, dtype=torch.bool)
        for s in strides.unique():
            at = (strides == s).nonzero().flatten(); chosen[at[r[at].sort(stable=True)[1][:size]]] = True
        return chosen, torch.ones(n).to(r)
    prior = torch.exp(-r**2/(2*sigma**2))
    return inside, (prior if kind == 'soft' else (prior > size).to(r))

def slow(leaves, points, strides, targets, variant='released', bag='soft', sigma=None, beta=5., mu=5., mu_below=None, gamma1=2., gamma2=2.,
         negative='both', weighting='dw'):
    cls, dist, obj = leaves
    paper, coupled, zero = variant == 'paper', weighting in ('gfl', 'vfl', 'tood', 'musu'), cls.sum()*0 + dist.sum()*0 + obj.sum()*0
    kind, size = (bag, BAGS[bag]) if isinstance(bag, str) else bag
    sigma = sigma or (.5**.5 if paper else 1.11); below = (mu if paper else 3.) if mu_below is None else mu_below
    pos_sum = neg_sum = dense = box_sum = target_sum = zero; good_sum = 0.
    for i, t in enumerate(targets):
        s = cls[i].sigmoid()*obj[i].sigmoid()[:, None]
        anything = -s**2*torch.log1p(-s)                              # the term of a (location, class) in no bag
        cell, p_cell = anything.clone(), torch.ones_like(s)           # what stands in the end; the last object of a class writes last
        pred = corners(points, dist[i])
        for box, k in zip(t['boxes'], t['labels'].tolist()):
            m, prior = bag_of(points, strides, box, kind, size, sigma)
            if not m.any(): continue
            one = box.expand(int(m.sum()), 4); prior = prior[m]
            sk = s[m, k]; sd = sk.detach(); sf = sd if paper or coupled else sk   # sf: the score inside a weight
            iou = box_iou(pred[m], one).diagonal().detach(); bad = 1-generalized_box_iou(pred[m], one).diagonal()
            iou = iou.nan_to_num()
            if coupled:
                y = iou
                if weighting in ('tood', 'musu'):
                    a = sd*iou**beta; y = a/a.max().clamp(min=1e-300)*iou.max()
                w, n = {'gfl': ((sf-y)**2*y, (sf-y)**2*(1-y)), 'tood': ((sf-y)**2*y, (sf-y)**2*(1-y)),
                        'vfl': (y**2, y*(1-y)), 'musu': ((sf-y)**2*y, sf**2*(1-y)**4)}[weighting]
                w = w*prior; wb = w if paper else y*prior; target_sum = target_sum + (y*prior).sum(); p = None
            else:
                cons = sd*(iou**beta if paper and weighting == 'dw' else torch.exp(-beta*bad.detach()))
                if weighting == 'autoassign':
                    w = torch.exp(3*cons)*prior; w = w/w.sum()
                    f = 1/(1-iou).clamp(min=1e-12); p = 1-(f-f.min()+1e-12)/(f.max()-f.min()+1e-12)
                else:
                    lower = (torch.exp(below*cons)*cons*prior).sum()
                    w = torch.exp(mu*cons)*cons*prior/(lower.clamp(min=1e-300) if below == mu and paper else lower.clamp(min=1e-12))
                    if paper: p = ((.95**gamma1-iou**gamma1)/(.95**gamma1-.5**gamma1)).clamp(0, 1)
                    else:
                        x = (1-iou**gamma1)/(1-.5**gamma1); top = x.max().clamp(max=1)
                        p = (x-x.min()+1e-12)/(top-x.min()+1e-12); p[iou < .5] = 1
                n = {'both': p*sf**gamma2, 'probability': p, 'importance': sf**gamma2, 'none': 0*p,
                     'complement': (1-w).clamp(min=0)}[negative]
                wb = w; p_cell[m, k] = p
            pos_sum = pos_sum - (w*sk.log()).sum(); box_sum = box_sum + (wb*bad).sum()
            if paper: neg_sum = neg_sum - (n*torch.log1p(-sk)).sum(); cell = cell.index_put((m.nonzero().flatten(), torch.tensor(k)), zero)
            else: cell = cell.index_put((m.nonzero().flatten(), torch.tensor(k)), -n*torch.log1p(-sk))
        dense = dense + cell.sum(); good_sum = good_sum + (1-p_cell).sum()
    if paper: return dict(loss_cls_pos=pos_sum, loss_cls_neg=neg_sum, loss_cls_out=.75*dense, loss_reg=beta*box_sum)
    if coupled: a = b = max(float(target_sum.detach()), 1.); scale, box_scale = 1., 2.
    else: a, b = max(sum(len(t['labels']) for t in targets), 1), max(float(good_sum), 1.); scale, box_scale = .25, .25*beta
    return dict(loss_pos=scale*pos_sum/a, loss_loc=box_scale*box_sum/a, loss_neg=dense/b)

def random_batch(seed, counts, K=3, size=(64, 96), strides=(8, 16, 32), dtype=torch.float64, kinds=('any',), offset=.5):
    "Leaves, grid and targets: boxes of the given kinds, predictions near the boxes so that all of IoU's range occurs."
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.rand(*s, generator=g, dtype=dtype)
    h, w = size; points, per = grid_points(level_sizes(h, w, strides), strides, offset, dtype=dtype); P = len(points)
    targets = []
    for i, n in enumerate(counts):
        kind = kinds[i % len(kinds)]; xy = r(n, 2)*torch.tensor([w, h])
        wh = dict(any=2+r(n, 2)**2*torch.tensor([w, h]), tiny=torch.ones(n, 2).to(r(1)), crowd=4+12*r(n, 2),
                  whole=torch.tensor([[w, h]]).to(r(1)).expand(n, 2))[kind]
        xy = xy*0 if kind == 'whole' else xy
        targets.append(dict(boxes=torch.cat([xy, xy+wh], 1), labels=torch.randint(0, K, (n,), generator=g)))
    dist = (r(len(counts), P, 4)*2+2).exp()
    for i, t in enumerate(targets):
        for b in t['boxes']:
            d = torch.cat([points-b[:2], b[2:]-points], 1); m = d.amin(1) > 0
            dist[i, m] = d[m]*(.4*(r(int(m.sum()), 4)-.5)).exp()
    leaves = [(r(len(counts), P, K)*6-4), dist, (r(len(counts), P)*4-1)]
    return [x.requires_grad_() for x in leaves], points, per, targets

def against_slow(batch, options, rtol=1e-9, chunk=None):
    leaves, points, strides, targets = batch
    out = DW(leaves[0].shape[2], chunk=chunk, **options)(Predictions(*leaves[:2], points, strides, leaves[2]), Objects.from_targets(targets))
    want = slow(leaves, points, strides, targets, **options)
    assert list(out.losses) == list(want)
    for k in want: torch.testing.assert_close(out.losses[k], want[k], rtol=rtol, atol=1e-10, msg=lambda m: f'{options} {k}: {m}')
    for a, b in zip(torch.autograd.grad(out.total, leaves), torch.autograd.grad(sum(want.values()), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7*max(float(b.abs().max()), 1e-12), msg=lambda m: f'{options}: {m}')
    return out

SWITCHES = [dict(negative=n) for n in NEGATIVES] + [dict(weighting=w) for w in WEIGHTINGS[1:]] + [
    dict(bag='radius'), dict(bag=('radius', .6)), dict(bag=('topk', 3)), dict(bag='threshold'), dict(bag=('threshold', .8), sigma=.7),
    dict(beta=3., mu=8.), dict(beta=0., mu=0.), dict(mu_below=5.), dict(gamma1=1., gamma2=1.), dict(gamma1=5., gamma2=3.), dict(gamma2=0.),
    dict(bag=('topk', 4), weighting='tood'), dict(bag=('radius', 2), negative='complement')]

@pytest.mark.parametrize('variant', ('released', 'paper'))
@pytest.mark.parametrize('options', SWITCHES, ids=str)
def test_every_switch_against_the_slow_reference(variant, options):
    for chunk in (None, 50): against_slow(random_batch(3, (5, 0, 3)), dict(options, variant=variant), chunk=chunk)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 6), min_size=1, max_size=3), st.sampled_from((1, 2, 5)),
       st.permutations(('any', 'tiny', 'whole', 'crowd')), st.sampled_from(('released', 'paper')),
       st.sampled_from(('soft', ('radius', 1.3), ('topk', 5))), st.sampled_from(((64, 96), (40, 40), (17, 130))), st.sampled_from((0., .5)),
       st.sampled_from((None, 1, 37)))
def test_random_batches_against_the_slow_reference(seed, counts, K, kinds, variant, bag, size, offset, chunk):
    against_slow(random_batch(seed, counts, K, size, kinds=kinds, offset=offset), dict(variant=variant, bag=bag), chunk=chunk)

@pytest.mark.parametrize('variant', ('released', 'paper'))
def test_a_crowd_and_many_classes(variant):
    against_slow(random_batch(0, (40, 8), K=2, kinds=('crowd',)), dict(variant=variant))
    against_slow(random_batch(1, (4,), K=365), dict(variant=variant))

# ---- batches, order, empty images

def parts(leaves, points, strides, targets, which):
    pick = [x[which].detach() for x in leaves]
    return Predictions(*pick[:2], points, strides, pick[2]), Objects.from_targets([targets[i] for i in which])

@pytest.mark.parametrize('options', [dict(), dict(variant='paper'), dict(weighting='gfl'), dict(variant='paper', bag='topk')], ids=str)
def test_batched_equals_one_by_one(options):
    batch = random_batch(5, (6, 0, 4), K=3); m = DW(3, **options)
    whole = m(*parts(*batch, [0, 1, 2])); ones = [m(*parts(*batch, [i])) for i in range(3)]
    for k in whole.weights: torch.testing.assert_close(torch.cat([o.weights[k] for o in ones]), whole.weights[k], rtol=1e-12, atol=0)
    if options.get('variant') == 'paper':                             # plain sums
        for k in whole.losses: torch.testing.assert_close(sum(o.losses[k] for o in ones), whole.losses[k], rtol=1e-12, atol=0)
    elif not options:                                                 # sums over divisors, which are counted over the batch
        n_obj = lambda o: max(len(o.pairs.objects), 1)
        n_neg = lambda o: ((1-o.weights['p_neg'])*o.pairs.last_of_class()).sum().clamp(min=1)
        for k, n in dict(loss_pos=n_obj, loss_loc=n_obj, loss_neg=n_neg).items():
            torch.testing.assert_close(sum(o.losses[k]*n(o) for o in ones), whole.losses[k]*n(whole), rtol=1e-10, atol=0)

@pytest.mark.parametrize('variant', ('released', 'paper'))
def test_an_empty_image_changes_nothing_but_its_own_negatives(variant):
    batch = random_batch(6, (6, 0, 4), K=3); m = DW(3, variant)
    full, without, empty = (m(*parts(*batch, w)) for w in ([0, 1, 2], [0, 2], [1]))
    dense = 'loss_neg' if variant == 'released' else 'loss_cls_out'
    n = ((1-full.weights['p_neg'])*full.pairs.last_of_class()).sum().clamp(min=1) if variant == 'released' else 1.
    for k in full.losses:
        extra = empty.losses[k]/n if k == dense else 0.
        torch.testing.assert_close(full.losses[k], without.losses[k]+extra, rtol=1e-10, atol=1e-14)

@pytest.mark.parametrize('variant', ('released', 'paper'))
def test_order_of_images_and_objects(variant):
    leaves, points, strides, targets = random_batch(7, (5, 3, 4), K=5)
    m, losses = DW(5, variant), lambda ts, which: m(*parts(leaves, points, strides, ts, which)).losses
    a, b = losses(targets, [0, 1, 2]), losses(targets, [2, 0, 1])
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-12, atol=0)
    if variant == 'released':                                         # each class once in an image: nothing is overwritten
        targets = [dict(boxes=t['boxes'], labels=torch.arange(len(t['labels']))) for t in targets]
    a, b = losses(targets, [0, 1, 2]), losses([{k: v.flip(0) for k, v in t.items()} for t in targets], [0, 1, 2])
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-10, atol=0)

def test_released_the_last_object_of_a_class_stands():
    leaves, points, strides, targets = random_batch(8, (2,), K=1)
    t = targets[0]; t['boxes'] = torch.tensor([[4., 4, 60, 60], [10, 10, 80, 62]], dtype=torch.float64)
    preds, objects = parts(leaves, points, strides, targets, [0]); out = DW(1)(preds, objects)
    both = out.pairs.loc[out.pairs.obj == 0][torch.isin(out.pairs.loc[out.pairs.obj == 0], out.pairs.loc[out.pairs.obj == 1])]
    assert len(both) and not out.dense('neg', 0)[both, 0].any() and out.dense('neg', 0)[both, 1].any()
    assert out.dense('pos', 0)[both, 0].any()                         # only the negative is overwritten

# ---- gradients, by name

def test_where_gradients_flow_as_released():
    leaves, points, strides, targets = random_batch(9, (4, 2), K=3)
    objects = Objects.from_targets(targets); out = DW(3)(Predictions(*leaves[:2], points, strides, leaves[2]), objects)
    slope = lambda k, i: torch.autograd.grad(out.losses[k], leaves[i], retain_graph=True, allow_unused=True)[0]
    none = lambda g: g is None or not g.any()
    assert not any(w.requires_grad for w in out.weights.values())
    assert none(slope('loss_loc', 0)) and none(slope('loss_loc', 2)) and none(slope('loss_pos', 1)) and none(slope('loss_neg', 1))
    p_neg = torch.ones_like(leaves[0]); kept = out.pairs.last_of_class(); q = out.pairs      # P_neg is a constant, s² is not
    p_neg[q.image[kept], q.loc[kept], q.labels[kept]] = out.weights['p_neg'][kept]
    s = leaves[0].sigmoid()*leaves[2].sigmoid()[..., None]
    want = torch.autograd.grad((p_neg*s**2*-torch.log1p(-s)).sum()/(1-p_neg).sum().clamp(min=1), leaves[0], retain_graph=True)[0]
    torch.testing.assert_close(slope('loss_neg', 0), want, rtol=1e-8, atol=1e-14)
    w = torch.zeros_like(leaves[0]).index_put((q.image, q.loc, q.labels), out.weights['pos'], accumulate=True)
    want = torch.autograd.grad((w*-s.log()).sum()*.25/len(objects), leaves[0])[0]             # w_pos is a constant
    torch.testing.assert_close(slope('loss_pos', 0), want, rtol=1e-8, atol=1e-14)

def test_where_gradients_flow_as_printed():
    leaves, points, strides, targets = random_batch(10, (4, 2), K=3)
    for options in (dict(), dict(negative='importance'), dict(weighting='gfl'), dict(weighting='musu')):
        out = DW(3, 'paper', **options)(Predictions(*leaves[:2], points, strides, leaves[2]), Objects.from_targets(targets)); q = out.pairs
        slope = lambda k, i: torch.autograd.grad(out.losses[k], leaves[i], retain_graph=True, allow_unused=True)[0]
        assert not any(w.requires_grad for w in out.weights.values())
        for k in ('loss_cls_pos', 'loss_cls_neg', 'loss_cls_out'): assert slope(k, 1) is None or not slope(k, 1).any()
        for i in (0, 2): assert slope('loss_reg', i) is None or not slope('loss_reg', i).any()
        s = leaves[0].sigmoid()*leaves[2].sigmoid()[..., None]
        w = torch.zeros_like(leaves[0]).index_put((q.image, q.loc, q.labels), out.weights['neg'], accumulate=True)
        want = torch.autograd.grad((w*-torch.log1p(-s)).sum(), leaves[0])[0]                  # w_neg is a constant, s² included
        torch.testing.assert_close(slope('loss_cls_neg', 0), want, rtol=1e-8, atol=1e-14)

# ---- corners

SOME = [dict(), dict(variant='paper'), dict(bag='topk'), dict(bag='radius', variant='paper'), dict(bag='threshold'),
        dict(negative='probability'), dict(negative='complement'), dict(weighting='tood'), dict(weighting='vfl'),
        dict(weighting='musu', variant='paper'), dict(weighting='autoassign')]
CASES = 'crowded', 'all_empty', 'tiny_only', 'tiny_mixed', 'saturated', 'duplicates_same_class', 'perfect', 'untrained'

@pytest.mark.parametrize('options', SOME, ids=str)
@pytest.mark.parametrize('case', CASES)
def test_finite_and_connected(case, options):
    preds, objects, leaves, z = case_inputs(case, torch.float32)
    out = build('dw', z['n_class'], **options)(preds, objects)
    assert all(v.shape == () and v.isfinite() for v in out.losses.values()) and all(w.isfinite().all() for w in out.weights.values())
    for g in torch.autograd.grad(out.total, [leaves[k] for k in ('cls_logits', 'distances', 'obj_logits')]): assert g.isfinite().all()

@pytest.mark.parametrize('variant', ('released', 'paper'))
def test_hard_numbers(variant):
    "Saturated logits, boxes of no size, exact boxes, one-pixel objects, in float32."
    leaves, points, strides, targets = random_batch(11, (5, 4), kinds=('any', 'tiny'), dtype=torch.float32)
    with torch.no_grad():
        leaves[0][:, ::3] = 60.; leaves[0][:, 1::3] = -90.; leaves[2][:, ::3] = 60.; leaves[1][:, ::2] = 0.
        b = targets[0]['boxes'][0]; d = torch.cat([points-b[:2], b[2:]-points], 1); leaves[1][0, d.amin(1) > 0] = d[d.amin(1) > 0]
    out = DW(3, variant)(Predictions(*leaves[:2], points, strides, leaves[2]), Objects.from_targets(targets))
    for g in torch.autograd.grad(out.total*65536, leaves): assert g.isfinite().all()     # as a gradient scaler would
    assert out.total.isfinite()

def test_a_poor_box_still_has_a_best_location():
    "IoU^5 of an untrained network is far below 1e-12; the weights of the bag sum to 1 all the same, also in float32."
    leaves, points, strides, _ = random_batch(12, (1,), K=1, dtype=torch.float32)
    with torch.no_grad(): leaves[1].fill_(80.); leaves[0].fill_(-4.)
    targets = [dict(boxes=torch.tensor([[35., 35, 37, 37]]), labels=torch.tensor([0]))]
    out = DW(1, 'paper')(Predictions(*leaves[:2], points, strides, leaves[2]), Objects.from_targets(targets))
    assert out.weights['quality'].max() < 1e-3
    torch.testing.assert_close(out.pairs.sum(out.weights['pos']), torch.ones(1))

@pytest.mark.parametrize('variant', ('released', 'paper'))
def test_float32_inside_autocast(variant):
    leaves, points, strides, targets = random_batch(13, (4, 2), dtype=torch.float32)
    half = [x.detach().bfloat16() for x in leaves]; objects = Objects.from_targets(targets)
    with torch.autocast('cpu', dtype=torch.bfloat16): a = DW(3, variant)(Predictions(*half[:2], points, strides, half[2]), objects)
    full = [x.float() for x in half]; b = DW(3, variant)(Predictions(*full[:2], points, strides, full[2]), objects)
    for k in a.losses: assert a.losses[k].dtype == torch.float32 and torch.equal(a.losses[k], b.losses[k])

def test_options():
    m = build('dw', 7, refine='bilinear'); h = m.head
    assert (h.offset, h.cls_prior, h.box_bias, h.box_activation, h.third, h.refine) == (.5, .02, 4., 'relu', 'objectness', 'bilinear')
    assert m.nms
    for bad in (dict(variant='printed'), dict(bag='circle'), dict(bag=('radius',)*2), dict(bag=('topk', 2.5)), dict(beta='5'),
                dict(mu=float('nan')), dict(sigma=0), dict(gamma1=0), dict(negative='neg'), dict(weighting='dww'),
                dict(negative='none', weighting='vfl'), dict(refine='no'), dict(Beta=5)):
        with pytest.raises(InputError) as e: build('dw', 3, **bad)
        assert '\n' not in str(e.value)
    assert DW(3, bag=['radius', 2]).bag == ('radius', 2)              # as JSON gives it back

def test_scores():
    preds, *_ = case_inputs('normal'); m = build('dw', preds.n_classes)
    torch.testing.assert_close(m.scores(preds), preds.cls_logits.sigmoid()*preds.obj_logits.sigmoid()[..., None])
