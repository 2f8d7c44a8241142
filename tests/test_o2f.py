"o2f and POTO: golden parity, owners, order, what carries no gradient."
import numpy as np, pytest, torch
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions
from conftest import golden_case, load_golden
from golden_util import case_inputs, compare, golden_cases

FILES = dict(o2f_released_e0=('o2f', dict(variant='released'), 0.), o2f_released_e7=('o2f', dict(variant='released'), 7/11),
             o2f_paper_e0=('o2f', dict(variant='paper'), 0.), o2f_paper_e11=('o2f', dict(variant='paper'), 1.),
             poto=('poto', dict(use_objectness=False), 0.), poto_objectness=('poto', dict(use_objectness=True), 0.))
ROWS = [(f, c) for f in FILES for c in golden_cases(f)]

def method_for(file, case):
    name, options, progress = FILES[file]
    return build(name, int(load_golden(f'inputs_{case}')['n_class']), **options), progress

@pytest.mark.parametrize('file,case', ROWS)
def test_golden(file, case):
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and case == 'saturated': continue   # the release itself is only comparable in float64 there
        for as_maps in (False, True):
            m, progress = method_for(file, case)
            out = compare(file, case, m, progress, dtype, as_maps=as_maps)
    g = golden_case(file, case)
    for i in range(out.pairs.objects.n_images):
        for key, name in ((f'owner_{i}', 'pos' if 'poto' in file else None), (f'certain_{i}', 'certain')):
            if key not in g or (name == 'certain' and 'certain' not in out.weights): continue
            w = out.dense(name, i) if name else out.dense('certain', i) + out.dense('ambiguous', i)
            if key.startswith('certain'): np.testing.assert_array_equal(w.sum(1).numpy() > 0, g[key] > 0)
            else:
                owner = torch.where(w.sum(1) > 0, w.argmax(1), -1) if w.shape[1] else torch.full((len(w),), -1)
                same = (lambda o: o >= 0) if 'poto' in file and case == 'duplicates_same_class' else (lambda o: o)  # identical objects may swap
                np.testing.assert_array_equal(same(owner.numpy()), same(g[key]))

METHODS = [('o2f', {}), ('o2f', dict(variant='paper')), ('o2f', dict(t=.2)), ('o2f', dict(match='add', K=3)), ('o2f', dict(K=0)), ('poto', {}), ('poto', dict(use_objectness=False))]

@pytest.mark.parametrize('name,options', METHODS)
@pytest.mark.parametrize('case', ('crowded', 'all_empty', 'tiny_only', 'tiny_mixed', 'saturated', 'duplicates_same_class', 'whole_image_exact'))
def test_finite_and_connected(name, options, case):
    preds, objects, leaves, z = case_inputs(case, torch.float32)
    m = build(name, z['n_class'], **options)
    out = m(preds, objects, .5)
    used = [leaves[k] for k in ('cls_logits', 'distances')] + ([leaves['obj_logits']] if m.head.third else [])
    for g in torch.autograd.grad(out.total, used): assert torch.isfinite(g).all()
    assert m.scores(preds).shape == preds.cls_logits.shape and not m.nms

@pytest.mark.parametrize('name,options', METHODS)
def test_batched_equals_one_by_one(name, options):
    """Sums are sums over images: the paper's o2f has no divisor at all; for the others the same holds for loss · number of positives."""
    preds, objects, _, z = case_inputs('normal')
    m = build(name, z['n_class'], **options)
    whole = m(preds, objects, .3)
    parts = []
    for i in range(preds.n_images):
        p = Predictions(preds.cls_logits[i:i+1], preds.distances[i:i+1], preds.points, preds.strides, preds.obj_logits[i:i+1])
        parts.append(m(p, Objects.from_targets(z['targets'][i:i+1]), .3))
    for k in whole.weights:
        assert torch.equal(torch.cat([p.weights[k] for p in parts]), whole.weights[k])
    if options.get('variant') == 'paper':
        for k in whole.losses: assert torch.allclose(sum(p.losses[k] for p in parts), whole.losses[k], rtol=1e-12)
    key = 'loss_cls'
    if key in whole.losses:
        count = lambda o: (o.weights['certain']+o.weights['ambiguous'] if 'certain' in o.weights else o.weights['pos']).sum()
        assert torch.allclose(sum(p.losses[key]*count(p) for p in parts), whole.losses[key]*count(whole), rtol=1e-6)

@pytest.mark.parametrize('name,options', METHODS)
def test_order_of_objects(name, options):
    preds, objects, _, z = case_inputs('normal')
    m = build(name, z['n_class'], **options)
    a = m(preds, objects, .3)
    b = m(preds, Objects.from_targets([dict(boxes=t['boxes'].flip(0), labels=t['labels'].flip(0)) for t in z['targets']]), .3)
    for k in a.losses: assert torch.allclose(a.losses[k], b.losses[k], rtol=1e-12)

def test_one_location_an_object_in_a_crowd():
    g = torch.Generator().manual_seed(0)
    preds, _, _, z = case_inputs('crowded')
    xy = torch.rand(300, 2, generator=g)*200
    objects = Objects.from_targets([dict(boxes=torch.cat([xy, xy+4+torch.rand(300, 2, generator=g)*40], 1), labels=torch.randint(0, z['n_class'], (300,), generator=g))]*preds.n_images)
    out = build('poto', z['n_class'])(preds, objects)
    assert (out.pairs.lengths == 1).all() and out.pairs.cell.unique().numel() == len(out.pairs)

def test_degree_and_choice_carry_no_gradient():
    preds, objects, leaves, z = case_inputs('normal')
    out = build('o2f', z['n_class'])(preds, objects, .2)
    assert not any(w.requires_grad for w in out.weights.values())
    for g in torch.autograd.grad(out.losses['loss_reg'], [leaves['cls_logits'], leaves['obj_logits']], allow_unused=True): assert g is None or not g.any()
    g, = torch.autograd.grad(out.losses['loss_cls'], [leaves['distances']], allow_unused=True); assert g is None or not g.any()
