"The contract, every method alike: a batch is its images, order is nothing, empty images, the dense forms, autocast, and which loss teaches which output."
import dataclasses
import pytest, torch
from ala_nb import bench as B
from ala_nb.geometry import centerness
from ala_nb.methods import box_methods, build
from ala_nb.pairs import Objects
from ala_nb.predictions import Predictions, from_maps

FORMS = dict(ala=[dict(variant='paper'), dict(one_to_one=True), dict(variant='paper', one_to_one=True)], atss=[dict(variant='released'), dict(variant='mmdet')],
             autoassign=[dict(variant='paper')], ciou_atss=[dict(variant='released')], dw=[dict(variant='paper')], o2f=[dict(variant='paper')],
             gfl=[dict(pred_weight=1.)], gflv2=[dict(pred_weight=1.)], vfnet=[dict(pred_weight=1.)], tood=[dict(warmup=0.), dict(warmup=0., task_head=False)], retina=[dict(third_branch='objectness')])
METHODS = [(name, options) for name in box_methods() for options in [{}, *FORMS.get(name, [])]]
title = lambda name, options: ' '.join([name, *(v if isinstance(v, str) else k for k, v in options.items())])
each = pytest.mark.parametrize('name,options', METHODS, ids=[title(*m) for m in METHODS])
def named(fields, cases):
    "Cases whose ids begin with the method."
    return pytest.mark.parametrize(fields, [pytest.param(*c, id='-'.join([title(*c[:2]), *map(str, c[2:])])) for c in cases])
KINDS = ('any', 'tiny', 'specks', 'whole', 'twins', 'rivals', 'crowd')
EPS = 1.1920929e-7                    # float32's, added to divisors by mmdetection and o2f

# ---- batches

def draw(seed, counts=(4, 0, 5), size=(64, 96), K=3, kind='any', dtype=torch.float64, once=False):
    """A batch with leaves of `dtype` and objects of a kind; predictions fit what `any` and `crowd` draw. `once`: no class twice in an image.
    tiny: boxes without any location inside, one a cell at most; specks: a dozen of them in one cell; whole: one over the whole image;
    twins: two identical objects; rivals: two identical boxes of two classes."""
    g = torch.Generator().manual_seed(seed); h, w = size
    counts = [dict(crowd=60, specks=12).get(kind, n)*(n > 0) for n in counts]
    b = B.draw_batch(counts, size, K, g, 14. if kind == 'crowd' else 35., .6, (8, 16, 32))
    for i, t in enumerate(b.targets):
        boxes, labels, n = t['boxes'], t['labels'], len(t['labels'])
        if once: labels = torch.randperm(K, generator=g)[:n+1]; labels, other = labels[:n], labels[n:]
        else: other = (labels[:1]+1) % K
        if n:
            if kind in ('tiny', 'specks'):                       # locations lie at 0 or 4 px of a cell of 8
                at = torch.randperm((h//8)*(w//8), generator=g)[:n]//(1 if kind == 'tiny' else n)
                xy = 8.*torch.stack([at % (w//8), at//(w//8)], 1) + .6 + .8*torch.rand(n, 2, generator=g)
                if kind == 'specks': xy = 8.*(xy[:1]//8) + xy % 8
                tiny = torch.cat([xy, xy+1+torch.rand(n, 2, generator=g)], 1)
                boxes = tiny if i == 0 else torch.cat([boxes[:n//2], tiny[n//2:]])
            if kind == 'whole': boxes = torch.cat([boxes[1:], torch.tensor([[-3.1, -2.3, w+1.7, h+.9]])])
            if kind in ('twins', 'rivals'): boxes, labels = boxes[[*range(n), 0]], torch.cat([labels, labels[:1] if kind == 'twins' else other])
        t['boxes'], t['labels'] = boxes.to(torch.promote_types(dtype, torch.float32)), labels
    return changed(b, lambda x: x.detach().to(dtype).requires_grad_())

def changed(b, f, **more):
    "The batch with every output of the head through `f`."
    return dataclasses.replace(b, **{k: [*map(f, getattr(b, k))] for k in ('cls', 'distances', 'third')}, property_logits=f(b.property_logits), pooled=f(b.pooled), **more)

def images(b, which):
    "These images of a batch; gradients reach the leaves of the whole."
    return changed(b, lambda x: x[which], targets=[b.targets[i] for i in which])

def made(name, options, K=3, dtype=torch.float64):
    "A method whose own parameters, if it has any, are not those of the start."
    m = build(name, K, **options).to(dtype); g = torch.Generator().manual_seed(K)
    with torch.no_grad():
        for p in m.parameters(): p += .2*torch.randn(p.shape, generator=g).to(p)
    return m

def run(m, b, progress=.3): return m(b.predictions(m.head), Objects.from_targets(b.targets), progress)
def inputs(m, b): return b.leaves(m.head) + list(m.parameters())
def slopes(value, leaves): return torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)

def close(a, b, tol, why=''):
    "Equal up to `tol` of the largest number; None is 0."
    a, b = (torch.zeros(()) if x is None else torch.as_tensor(x).detach() for x in (a, b))
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), why
    if a.numel() or b.numel(): assert float((a-b).abs().max()) <= tol*float(b.abs().max()) + 1e-14, (why, float((a-b).abs().max()), float(b.abs().max()))

def same(a, b, tol=1e-9):
    for i, (x, y) in enumerate(zip(a, b, strict=True)): close(x, y, tol, f'gradient {i}')

def divisors(name, m, out):
    "What each loss was divided by: counts and sums over the batch. Nothing else may depend on who shares it."
    p, w, variant = out.pairs, out.weights, getattr(m, 'variant', None)
    at_least = lambda x, least=1.: max(float(torch.as_tensor(x).detach()), least)
    if name == 'retina': return dict.fromkeys(out.losses, at_least(w['pos'].sum()))
    if name == 'tood': return dict(loss_cls=at_least(w['target'].sum()), loss_reg=at_least(w['quality'].sum()))
    if name in ('fcos', 'atss', 'ciou_atss', 'hybrid'):
        n, box = at_least(w['pos'].sum()), at_least(w['quality'].sum(), 1e-6)
        if variant == 'mmdet':
            per_image = torch.zeros(p.objects.n_images).index_add(0, p.image, w['pos'].float())
            n, box = float(per_image.clamp(min=1).sum()) + EPS, at_least(w['quality'].sum())
        return dict(loss_cls=n, loss_reg=box, **{'loss_centerness' if name == 'fcos' else 'loss_branch': n})
    if name == 'vfnet': return dict(loss_cls=at_least(w['pos'].sum()) + EPS, loss_coarse=at_least(w['coarse'].sum()) + EPS, loss_reg=at_least(w['quality'].sum()) + EPS)
    if name in ('gfl', 'gflv2'):
        n = float(torch.zeros(p.objects.n_images).index_add(0, p.image, w['pos'].float()).clamp(min=1).sum()) + EPS
        return dict(loss_cls=n, **dict.fromkeys(('loss_reg', 'loss_dfl'), at_least(w['quality'].sum())))
    n = at_least(len(p.objects))
    if name == 'ala': return dict.fromkeys(out.losses, n)
    if name == 'poto': return dict.fromkeys(out.losses, at_least(len(p)))
    if variant == 'paper' or getattr(m, 'paper', False): return dict.fromkeys(out.losses, 1.)
    if name == 'autoassign':
        prior = (((p.offsets-m.mu[p.labels])/m.sigma[p.labels]).square().sum(1)/-2).exp().sum()
        return dict(loss_pos=n, loss_neg=at_least(prior), loss_center=p.objects.n_images)
    if name == 'dw': return dict(loss_pos=n, loss_loc=n, loss_neg=at_least(((1-w['p_neg'])*p.last_of_class()).sum()))
    chosen = w['certain'] + w['ambiguous']
    return dict(loss_cls=at_least(chosen.sum()) + EPS, loss_reg=float((chosen*centerness(p.targets)).sum()) + EPS)

# ---- batches, order, empty images

kinds = named('name,options,kind', [(*m, kind) for m in METHODS for kind in KINDS])

@kinds
def test_a_batch_is_its_images(name, options, kind):
    b, m = draw(1, kind=kind), made(name, options)
    whole, parts = run(m, b), [run(m, images(b, [i])) for i in range(3)]
    sums = lambda o: {k: v*divisors(name, m, o)[k] for k, v in o.losses.items()}
    for k, v in sums(whole).items(): close(v, sum(sums(o)[k] for o in parts), 1e-9, k)
    for k, v in whole.weights.items(): close(v, torch.cat([o.weights[k] for o in parts]), 1e-9, k)
    same(slopes(sum(sums(whole).values()), inputs(m, b)), slopes(sum(sum(sums(o).values()) for o in parts), inputs(m, b)))

@kinds
def test_order_of_images(name, options, kind):
    b, m = draw(2, kind=kind), made(name, options)
    a, c = run(m, b), run(m, images(b, [2, 0, 1]))
    for k in a.losses: close(c.losses[k], a.losses[k], 1e-9, k)
    same(slopes(c.total, inputs(m, b)), slopes(a.total, inputs(m, b)))

def order_cases():
    "Where a location has one owner, the first of two rivals in the list takes it; AutoAssign and DW as released let the last of a class stand: each class once."
    for name, options in METHODS:
        once = name in ('autoassign', 'dw') and not options
        for kind in KINDS:
            if kind == 'rivals' and name not in ('ala', 'autoassign', 'dw', 'poto'): continue
            for K in (80,) if once else (3, 80) if kind == 'rivals' else (1, 3, 80):
                yield name, options, kind, K, once

@named('name,options,kind,K,once', order_cases())
def test_order_of_objects(name, options, kind, K, once):
    b, m = draw(3, K=K, kind=kind, once=once), made(name, options, K)
    mixed = [{k: v[order] for k, v in t.items()} for t in b.targets for order in [torch.randperm(len(t['labels']))]]
    a, c = run(m, b), run(m, dataclasses.replace(b, targets=mixed))
    for k in a.losses: close(c.losses[k], a.losses[k], 1e-9, k)
    same(slopes(c.total, inputs(m, b)), slopes(a.total, inputs(m, b)))

def joined(monkeypatch):
    "From here on, class maps become one block of all levels, as on a GPU."
    def make(cls, *maps, **more):
        preds = from_maps(cls.__new__(cls), *maps, joined=True, **more)
        assert len(preds.cls_blocks) == 1 and len(preds.level_sizes) > 1
        return preds
    monkeypatch.setattr(Predictions, 'from_maps', classmethod(make))

@kinds
def test_one_block_of_all_levels(name, options, kind, monkeypatch):
    "Class maps in one block change nothing: losses, pairs, weights, gradients."
    b, m = draw(4, kind=kind), made(name, options)
    a = run(m, b); joined(monkeypatch); c = run(m, b)
    assert torch.equal(a.pairs.loc, c.pairs.loc) and torch.equal(a.pairs.obj, c.pairs.obj)
    for k in a.losses: close(c.losses[k], a.losses[k], 1e-9, k)
    for k in a.weights: close(c.weights[k], a.weights[k], 1e-9, k)
    same(slopes(c.total, inputs(m, b)), slopes(a.total, inputs(m, b)))

@each
def test_identical_objects_in_float32(name, options):
    for seed in range(12):
        b, m = draw(seed, kind='twins', dtype=torch.float32), made(name, options, dtype=torch.float32)
        whole, parts = run(m, b), [run(m, images(b, [i])) for i in range(3)]
        for k, v in whole.losses.items(): close(v*divisors(name, m, whole)[k], sum(o.losses[k]*divisors(name, m, o)[k] for o in parts), 1e-3, k)

@each
@pytest.mark.parametrize('at', (0, 1, 3))
def test_an_empty_image_changes_only_its_divisors(name, options, at):
    "One that claims nothing adds no loss; AutoAssign's mean over images and mmdetection's `at least one positive an image` count it."
    b, m, none = draw(4), made(name, options), dict(boxes=torch.zeros(0, 4).double(), labels=torch.zeros(0).long())
    more = changed(b, lambda x: torch.cat([x[:at], torch.ones_like(x[:1]), x[at:]]), targets=[*b.targets[:at], none, *b.targets[at:]])
    here = 80*(torch.arange(4) == at).double().view(4, 1, 1, 1)
    more.cls, more.property_logits = [x-here for x in more.cls], more.property_logits - here*torch.tensor([1, 0])[:, None, None]
    a, c = run(m, b), run(m, more); old, new, counted = divisors(name, m, a), divisors(name, m, c), {}
    if name == 'autoassign': counted = dict(loss_center=3/4)
    if options.get('variant') == 'mmdet': counted = dict.fromkeys(('loss_cls', 'loss_branch'), old['loss_cls']/(old['loss_cls']+1))
    if name in ('gfl', 'gflv2'): counted = dict(loss_cls=old['loss_cls']/(old['loss_cls']+1))
    for k in a.losses:
        close(c.losses[k], a.losses[k]*counted.get(k, 1), 1e-9, k); close(new[k]*counted.get(k, 1), old[k], 1e-12, k)
    for k in a.weights: close(c.weights[k], a.weights[k], 1e-12, k)
    same(slopes(c.total, inputs(m, b)), slopes(sum(v*counted.get(k, 1) for k, v in a.losses.items()), inputs(m, b)))

# ---- the naive form over varied draws

def dense_cases():
    for name in box_methods():
        for kind in [*KINDS, 'none']:
            if (name, kind) == ('o2f', 'twins'): continue
            for K in (3, 365) if kind == 'rivals' else (1, 3, 365):
                for size in ((61, 99), (96, 160)): yield name, {}, kind, K, size

@named('name,options,kind,K,size', dense_cases())
def test_dense_form(name, options, kind, K, size):
    b, m = draw(K+size[0], (0, 0) if kind == 'none' else (4, 0, 5), size, K, kind), made(name, options, K)
    a, r = run(m, b, .5).total, B.DENSE[name](m, b.predictions(m.head), Objects.from_targets(b.targets))
    close(a, r, 1e-6)
    same(slopes(a, inputs(m, b)), slopes(r, inputs(m, b)), 1e-5)

# ---- precision

@each
def test_autocast_computes_in_float32(name, options):
    half, m = draw(5, dtype=torch.bfloat16), made(name, options, dtype=torch.float32)
    full = changed(half, lambda x: x.detach().float().requires_grad_())
    with torch.autocast('cpu', dtype=torch.bfloat16): a = run(m, half)
    b = run(m, full)
    assert all(v.dtype == torch.float32 for v in a.losses.values())
    for k in b.losses: assert torch.equal(a.losses[k], b.losses[k]), k
    for k in b.weights: assert torch.equal(a.weights[k], b.weights[k]), k
    same([g if g is None else g.float() for g in slopes(a.total, inputs(m, half))], slopes(b.total, inputs(m, full)), 2**-7 if m.head.reads else 2**-8)   # two ways to a distance, rounded on each

# ---- gradients, by name: what each loss teaches. `own`: the method's parameters

HARD, JOINT = dict(loss_cls={'cls'}, loss_reg={'reg'}), {'cls', 'obj'}
QUALITY = {'cls', 'reg', 'prop', 'own'}                            # S⁺ = P(cls)^β · P(loc)^(1-β) · C · P_F, of ALA's Eqs. 3 - 7
TEACHES = {
    'fcos': HARD | dict(loss_centerness={'obj'}),                   # weights and targets from geometry
    'atss': HARD | dict(loss_branch={'obj'}), 'atss released': HARD | dict(loss_branch={'obj'}), 'atss mmdet': HARD | dict(loss_branch={'obj'}),
    'ciou_atss': HARD | dict(loss_branch={'obj'}), 'ciou_atss released': HARD | dict(loss_branch={'obj'}),      # predicted IoUs are detached
    'autoassign': dict(loss_pos={'cls', 'reg', 'obj', 'own'}, loss_neg=JOINT, loss_center={'own'}),             # w⁺ carries gradient, w⁻ and the divisor do not
    'autoassign paper': dict(loss_pos={'cls', 'reg', 'obj', 'own'}, loss_neg=JOINT),
    'dw': dict(loss_pos=JOINT, loss_loc={'reg'}, loss_neg=JOINT),    # weights are constants
    'dw paper': dict(loss_cls_pos=JOINT, loss_cls_neg=JOINT, loss_cls_out=JOINT, loss_reg={'reg'}),
    'o2f': dict(loss_cls=JOINT, loss_reg={'reg'}), 'o2f paper': dict(loss_certain=JOINT, loss_soft=JOINT, loss_neg=JOINT, loss_reg={'reg'}),
    'poto': dict(loss_cls=JOINT, loss_reg={'reg'}), 'hybrid': dict(loss_cls=JOINT, loss_reg={'reg'}),
    **{k: HARD | dict(loss_dfl={'reg'}) for k in ('gfl', 'gfl pred_weight')}, **{k: dict(loss_cls=JOINT, loss_reg={'reg'}, loss_dfl={'reg'}) for k in ('gflv2', 'gflv2 pred_weight')},
    **{k: HARD | dict(loss_coarse={'reg'}) for k in ('vfnet', 'vfnet pred_weight')},                             # what they read besides is made from the distances
    'retina': HARD, 'retina objectness': dict(loss_cls=JOINT, loss_reg={'reg'}),
    'tood': dict(loss_cls=JOINT, loss_reg={'reg'}), 'tood warmup': dict(loss_cls=JOINT, loss_reg={'reg'}), 'tood warmup task_head': HARD,   # the metric is detached
    'ala': dict(loss_hard=QUALITY, loss_soft=QUALITY, loss_neg={'cls'}, loss_property={'prop'}),                 # μ's and σ's layer learns, the features it pools do not move
    'ala one_to_one': dict(loss_hard=QUALITY, loss_soft=set(), loss_neg={'cls'}, loss_property={'prop'}),       # no soft set
    'ala paper': dict.fromkeys(('loss_hard', 'loss_soft', 'loss_neg'), QUALITY | {'pooled'}),                    # inside, the negatives are of S⁺ too (Eq. 11)
    'ala paper one_to_one': dict(loss_hard=QUALITY | {'pooled'}, loss_soft=set(), loss_neg=QUALITY | {'pooled'})}

@each
def test_which_loss_teaches_what(name, options):
    "All of the head's outputs are there; a method uses its own."
    b, m = draw(6, (4, 5)), made(name, options)
    leaves = dict(cls=b.cls, reg=b.distances, obj=b.third, prop=[b.property_logits], pooled=[b.pooled], own=list(m.parameters()))
    everything = dataclasses.replace(m.head, third='objectness', property_branch=True, pooled=True)
    out = m(b.predictions(everything), Objects.from_targets(b.targets), .3)
    reached = lambda v: {k for k, x in leaves.items() if x and v.requires_grad and any(g is not None and g.any() for g in slopes(v, x))}
    assert {k: reached(v) for k, v in out.losses.items()} == TEACHES[title(name, options)]
    assert not any(w.requires_grad for w in out.weights.values())

# ---- a network that has broken down

@pytest.mark.parametrize('part', ('cls_blocks', '_distances'))
@each
def test_nan_is_never_a_number(name, options, part):
    b, m = draw(4), made(name, options)
    preds = b.predictions(m.head)
    with torch.no_grad():
        for x in (preds.cls_blocks if part == 'cls_blocks' else [preds._distances]): x.fill_(torch.nan)
    assert not m(preds, Objects.from_targets(b.targets), .5).total.isfinite()
