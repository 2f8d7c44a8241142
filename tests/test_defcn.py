"DeFCN's filter and auxiliary losses, and Hybrid-Epoch: golden parity with the released equations, batches, order, crowds, bad days."
import numpy as np, pytest, torch
from ala_nb.defcn import MaxFilter3d, best_of_levels, dense_hybrid
from ala_nb.detector import Detector, load_detector, save_weights
from ala_nb.geometry import InputError
from ala_nb.methods import build
from ala_nb.o2f import AUXILIARY
from ala_nb.pairs import Objects, Predictions
from conftest import golden_case, golden_cases, load_golden
from golden_util import case_inputs, compare

# ---- the released equations

@pytest.mark.parametrize('case', golden_cases())
def test_auxiliary_loss_is_the_released_one(case):
    "All three losses and their gradients; where an object has no location in its region POTO is left out, which matches it to another one."
    g = golden_case('defcn_aux', case); K = int(load_golden(f'inputs_{case}')['n_class'])
    if not g.get('aux_only', False):
        for as_maps in (False, True): compare('defcn_aux', case, build('poto', K, aux='atss'), as_maps=as_maps)
        if case != 'saturated': compare('defcn_aux', case, build('poto', K, aux='atss'), dtype=torch.float32)
    preds, objects, leaves, z = case_inputs(case)
    m = build('poto', K, aux='atss'); pairs, positive = m.aux(preds, objects)
    for i in range(preds.n_images):
        mine, got = positive & (pairs.image == i), torch.full((preds.n_locations,), K)
        got[pairs.loc[mine]] = pairs.labels[mine]
        np.testing.assert_array_equal(got.numpy(), g[f'aux_{i}'])
    assert m(preds, objects).losses['loss_aux'].item() == pytest.approx(float(g['loss_aux']), rel=1e-9, abs=1e-15)
    grad, = torch.autograd.grad(m(preds, objects).losses['loss_aux'], [leaves['cls_logits']])
    if g.get('aux_only', False): assert float(grad.norm()) == pytest.approx(float(g['grad_norm/cls_logits']), rel=1e-8)

@pytest.mark.parametrize('name', ('released', 'wide', 'flat'))
def test_filter_is_the_released_one(name):
    "Outputs, and gradients of a drawn sum with respect to maps and weights, on five levels down to a single cell."
    g = {k.split('/', 1)[1]: v for k, v in load_golden('parts/defcn_filter').items() if k.startswith(name)}
    r = np.random.RandomState(5); m = MaxFilter3d(64, int(g['kernel']), int(g['tau'])).double()
    drawn = lambda *shape: torch.from_numpy(np.asarray(r.standard_normal(shape)))
    with torch.no_grad():
        for key, v in m.state_dict().items(): v.copy_(drawn(*v.shape)*(1/24 if key == 'conv.weight' else .3))
    maps = [drawn(2, 64, h, w).requires_grad_() for h, w in ((15, 13), (8, 7), (4, 4), (2, 2), (1, 1))]
    out = m(maps)
    for i, y in enumerate(out):
        np.testing.assert_allclose(y.sum((2, 3)).detach(), g[f'sums_{i}'], atol=1e-10)
        np.testing.assert_allclose(y[0, :2].detach(), g[f'first_{i}'], atol=1e-12)
    grads = torch.autograd.grad(sum((y*drawn(*y.shape)).sum() for y in out), [*maps, *m.parameters()])
    for i, x in enumerate(grads):
        probe = torch.from_numpy(np.random.RandomState(i).standard_normal(tuple(x.shape)))
        np.testing.assert_allclose([x.norm(), (x*probe).sum()], [g[f'grad_norm_{i}'], g[f'grad_sum_{i}']], rtol=1e-9, atol=1e-9)

# ---- every rule: what POTO's tests ask of POTO

RULES = sorted(AUXILIARY)

@pytest.mark.parametrize('aux', RULES)
@pytest.mark.parametrize('case', ('crowded', 'all_empty', 'tiny_only', 'tiny_mixed', 'saturated', 'duplicates_same_class', 'whole_image_exact'))
def test_finite_and_connected(aux, case):
    preds, objects, leaves, z = case_inputs(case, torch.float32)
    m = build('poto', z['n_class'], aux=aux); out = m(preds, objects)
    for g in torch.autograd.grad(out.total, list(leaves.values())): assert torch.isfinite(g).all()
    g, = torch.autograd.grad(m(preds, objects).losses['loss_aux'], [leaves['cls_logits']]); assert g.any()
    pairs, positive = m.aux(preds, objects)
    assert pairs.cell[positive].unique().numel() == int(positive.sum())              # no location twice

@pytest.mark.parametrize('aux', RULES)
def test_batched_equals_one_by_one(aux):
    preds, objects, _, z = case_inputs('normal'); m = build('poto', z['n_class'], aux=aux)
    total = lambda p, o: m(p, o).losses['loss_aux']*m.aux(p, o)[1].sum().clamp(min=1)
    parts = [(Predictions(preds.cls_logits[i:i+1], preds.distances[i:i+1], preds.points, preds.strides, preds.obj_logits[i:i+1]),
              Objects.from_targets(z['targets'][i:i+1])) for i in range(preds.n_images)]
    assert torch.allclose(total(preds, objects), sum(total(*p) for p in parts), rtol=1e-12)

@pytest.mark.parametrize('aux', RULES)
def test_order_of_objects(aux):
    preds, objects, _, z = case_inputs('normal'); m = build('poto', z['n_class'], aux=aux)
    mixed = Objects.from_targets([dict(boxes=t['boxes'].flip(0), labels=t['labels'].flip(0)) for t in z['targets']])
    assert torch.allclose(m(preds, objects).losses['loss_aux'], m(preds, mixed).losses['loss_aux'], rtol=1e-12)

@pytest.mark.parametrize('aux', RULES)
@pytest.mark.parametrize('leaf', ('cls_logits', 'distances'))
def test_nan_gives_no_finite_loss(aux, leaf):
    preds, objects, leaves, z = case_inputs('normal'); leaves[leaf].data[0, :, 0] = torch.nan
    assert not build('poto', z['n_class'], aux=aux, max_filter=True)(preds, objects).total.isfinite()

@pytest.mark.parametrize('aux', RULES)
def test_half_precision_is_computed_in_float32(aux):
    preds, objects, leaves, z = case_inputs('normal'); m = build('poto', z['n_class'], aux=aux)
    half = [leaves[k].detach().bfloat16() for k in ('cls_logits', 'distances', 'obj_logits')]
    make = lambda c, d, o: Predictions(c, d, preds.points, preds.strides, o)
    with torch.autocast('cpu', dtype=torch.bfloat16): a = m(make(*half), objects)
    b = m(make(*(x.float() for x in half)), objects)
    assert a.losses['loss_aux'].dtype == torch.float32 and torch.equal(a.losses['loss_aux'], b.losses['loss_aux'])

def test_a_crowd_in_bounded_memory():
    "Some objects at a time: the same pairs and scores, whatever the size."
    preds, _, _, z = case_inputs('crowded')
    g = torch.Generator().manual_seed(0); xy = torch.rand(400, 2, generator=g)*200
    objects = Objects.from_targets([dict(boxes=torch.cat([xy, xy+4+torch.rand(400, 2, generator=g)*40], 1),
                                         labels=torch.randint(0, z['n_class'], (400,), generator=g))]*preds.n_images)
    (a, s), (b, t) = (best_of_levels(preds, objects, size=n) for n in (None, 5*preds.n_locations))
    assert torch.equal(a.loc, b.loc) and torch.allclose(s, t, rtol=1e-12) and len(a) == len(objects)*sum(min(9, h*w) for h, w in preds.level_sizes)

# ---- the filter in a detector

def small(method='poto', options=None, **more):
    torch.manual_seed(0)
    return Detector(method, 'tiny', 3, method_options=dict(max_filter=True, aux='atss') if options is None else options, **more)

def batch(n=2):
    g = torch.Generator().manual_seed(1)
    t = [dict(boxes=torch.tensor([[8., 8, 40, 50], [20, 4, 60, 30]]), labels=torch.tensor([1, 0])), dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())]
    return [torch.rand(3, 64, 96, generator=g) for _ in range(n)], t[:n]

def test_detector_trains_in_bfloat16_and_comes_back(tmp_path):
    model, (images, targets) = small(), batch()
    with torch.autocast('cpu', dtype=torch.bfloat16): losses = model(images, targets)
    assert list(losses) == ['loss_cls', 'loss_reg', 'loss_aux'] and all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.head.max3d.parameters())
    again = load_detector(save_weights(model, tmp_path/'m.safetensors'))
    for a, b in zip(again(images), model.eval()(images)): assert all(torch.equal(a[k], b[k]) for k in a)

def test_filter_sees_the_neighbouring_level_and_a_plain_branch_does_not():
    for on, moves in ((True, True), (False, False)):
        model = small(options=dict(max_filter=on)).eval(); images, _ = batch(1)
        with torch.no_grad():
            maps = model.pyramid(model.body(images[0][None]))
            one = model.head(maps).obj_logits; maps[1] = maps[1] + torch.randn_like(maps[1]); two = model.head(maps).obj_logits
        n = maps[0].shape[2]*maps[0].shape[3]
        assert bool((one[:, :n] != two[:, :n]).any()) == moves

def test_any_method_with_a_third_branch_takes_the_filter():
    for method in ('o2f', 'fcos', 'dw'):
        model = small(method, {}, head_options=dict(filter='max3d')); images, targets = batch()
        sum(model(images, targets).values()).backward(); assert model.head.max3d.conv.weight.grad.any()

# ---- Hybrid-Epoch

@pytest.mark.parametrize('progress', (0., .5, .6667, 1.))
@pytest.mark.parametrize('case', ('normal', 'crowded', 'all_empty', 'tiny_mixed', 'untrained'))
def test_hybrid_is_fcos_then_poto(case, progress):
    preds, objects, leaves, z = case_inputs(case); m = build('hybrid', z['n_class'])
    one = build(*(('fcos',) if progress < 2/3 else ('poto',)), z['n_class'], **(dict(third_branch='objectness') if progress < 2/3 else {}))
    a, b = m(preds, objects, progress), one(preds, objects, progress)
    for k in b.losses: assert torch.equal(a.losses[k], b.losses[k])
    assert torch.allclose(a.total, dense_hybrid(m, preds, objects, progress), rtol=1e-6)
    assert m.scores(preds).shape == preds.cls_logits.shape and not m.nms

def test_hybrid_options_are_written_down_and_checked(tmp_path):
    options = dict(share=.5, many='dw', one_options=dict(max_filter=True, aux='topk'))
    model = small('hybrid', options); again = load_detector(save_weights(model, tmp_path/'m.safetensors'))
    assert again.method.options == options and again.method.share == .5 and again.method.then.aux is not None
    for bad, words in ((dict(many='fcoss'), "'fcos'"), (dict(many='ala'), 'wants a head with'), (dict(share=-1.), 'share'), (dict(many_options=dict(rang=1)), "'ranges'")):
        with pytest.raises(InputError, match=words): build('hybrid', 3, **bad)

@pytest.mark.parametrize('options,words', [(dict(aux='ats'), "'atss'"), (dict(aux='no_such_module:f'), 'PYTHONPATH'), (dict(aux='math:pi'), 'no function'),
    (dict(aux='atss', aux_options=dict(radius=1)), "'k'|'alpha'"), (dict(aux_options=dict(k=3)), 'without aux'), (dict(max_filter=True, use_objectness=False), 'use_objectness')])
def test_bad_options_are_one_line(options, words):
    with pytest.raises(InputError, match=words) as e: build('poto', 3, **options)
    assert '\n' not in str(e.value)

def own_rule(preds, objects, k=1):
    "A rule of a stranger: the k nearest of each level."
    from ala_nb.pairs import nearest_pairs
    pairs = nearest_pairs(preds, objects, k)
    return pairs, pairs.winners(-pairs.offsets.square().sum(1))

def test_a_rule_of_ones_own_by_its_address():
    preds, objects, _, z = case_inputs('normal')
    out = build('poto', z['n_class'], aux='test_defcn:own_rule', aux_options=dict(k=2))(preds, objects)
    assert out.losses['loss_aux'].isfinite()
