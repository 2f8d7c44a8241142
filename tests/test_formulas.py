"What a method says of its weights: factors and formulas, joined in plain NumPy, are the weights that the loss used."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb.dense import made_up
from ala_nb.geometry import grid_points, level_sizes
from ala_nb.methods import Assignment, build
from ala_nb.pairs import Objects, Predictions
from formulas import compute, language

K, SIZE, STRIDES = 3, (96, 128), (8, 16, 32)
FITTED = dict(fcos=dict(ranges=(24,48)), atss=dict(anchor_scale=4.), ciou_atss=dict(anchor_scale=4.), gfl=dict(anchor_scale=4.), gflv2=dict(anchor_scale=4.), vfnet=dict(anchor_scale=4.))
CASES = [('fcos', {}), ('fcos', dict(centre_sampling=None)), ('atss', {}), ('atss', dict(variant='released')), ('ciou_atss', {}),
         ('ciou_atss', dict(cls_loss='focal', third_branch='centerness')), ('ciou_atss', dict(anchor_weight='falling', pred_weight='rising')),
         ('autoassign', {}), ('autoassign', dict(variant='paper', confidence='cls', centre='fixed')), ('autoassign', dict(confidence='none', negative_weighting=False)),
         ('autoassign', dict(confidence='loc', centre='none', other_objects=False, objectness='none')),
         ('dw', {}), ('dw', dict(variant='paper')), ('dw', dict(bag=('topk', 4), negative='complement')), ('dw', dict(bag='threshold', negative='importance', mu_below=5.)),
         ('dw', dict(weighting='autoassign')), ('dw', dict(weighting='gfl')), ('dw', dict(weighting='vfl', variant='paper')), ('dw', dict(weighting='tood', bag='radius')), ('dw', dict(weighting='musu')),
         ('gfl', {}), ('gflv2', dict(pred_weight=1.)), ('vfnet', {}), ('vfnet', dict(anchor_weight='falling', pred_weight='rising')),
         ('poto', {}), ('poto', dict(use_objectness=False, alpha=.5)), ('o2f', {}), ('o2f', dict(variant='paper', match='add', K=3)), ('o2f', dict(t=.3)),
         ('retina', dict(anchor_scale=4.)), ('retina', dict(anchor_scale=4., rescue=False, high=.6)), ('tood', dict(anchor_scale=4.)), ('tood', dict(warmup=0.)), ('tood', dict(warmup=0., inside_first=True, k=5)), ('tood', dict(warmup=0., task_head=False)),
         ('ala', {}), ('ala', dict(one_to_one=True)), ('ala', dict(variant='paper')), ('ala', dict(threshold=.7)), ('ala', dict(threshold=None)),
         ('ala', dict(parts='confidence', confidence='add', loc='exp_giou')), ('ala', dict(parts='weight', property='none')),
         ('ala', dict(loc='power', xi=.4, centre='fixed', at_least_one=False)), ('ala', dict(strategy='pnlp')), ('ala', dict(strategy='latent', threshold=.6)),
         ('ala', dict(losses='HN')), ('ala', dict(losses='HN', without_soft='positive')), ('ala', dict(losses='H', without_soft='silent', variant='paper'))]

def batch(seed=0, counts=(4, 0, 2), offset=.5):
    "Predictions in float64 that serve their objects here and there, and objects of which some coincide."
    g = torch.Generator().manual_seed(seed)
    points, per = grid_points(level_sizes(*SIZE, STRIDES), STRIDES, offset, dtype=torch.float64)
    B, P = len(counts), len(points)
    rand = lambda *s: torch.rand(*s, generator=g, dtype=torch.float64)
    xy = [rand(n, 2)*70 for n in counts]
    targets = [dict(boxes=torch.cat([p, p+6+rand(len(p), 2)*60], 1), labels=torch.randint(0, K, (len(p),), generator=g)) for p in xy]
    if counts[0] > 1: targets[0]['boxes'][1] = targets[0]['boxes'][0]
    cls, dist, third = rand(B, P, K)*6-3, rand(B, P, 4)*60, rand(B, P)*4-2
    more = made_up([dist.transpose(1, 2)[..., None]], [per[:, None]], (('bins', 68), ('coarse', 4)))   # one level of P rows, a stride a row
    preds = Predictions(cls, dist, points, per, third, extras={k: x[0][..., 0].transpose(1, 2) for k, x in more.items()},
                        property_logits=rand(B, 2, *level_sizes(*SIZE, STRIDES)[0])*4-2, pooled=rand(B, len(STRIDES), 8))
    return preds, Objects.from_targets(targets)

def made(name, options, seed=0, progress=.3, counts=(4, 0, 2)):
    torch.manual_seed(seed)
    options = {**FITTED.get(name, {}), **options, **(dict(in_channels=8) if name == 'ala' else {})}
    method = build(name, K, **options).double()
    for n, p in method.named_parameters(): torch.nn.init.normal_(p, mean=float(n == 'sigma'), std=.1 if n == 'sigma' else .3)
    preds, objects = batch(seed, counts, method.head.offset)
    return method(preds, objects, progress)

@pytest.mark.parametrize('name,options', CASES, ids=lambda x: str(x))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), progress=st.sampled_from((0., .3, 1.)))
def test_factors_joined_by_the_formula_are_the_weights(name, options, seed, progress):
    out = made(name, options, seed, progress)
    got = compute(out)
    assert {'pos', 'neg'} <= got.keys() and got.keys() & out.weights.keys() >= {'pos', 'neg'}
    for k in got.keys() & out.weights.keys():
        want = out.weights[k].double().numpy()
        assert got[k].shape == want.shape
        np.testing.assert_allclose(got[k], want, rtol=1e-8, atol=1e-10, err_msg=k)

@pytest.mark.parametrize('name,options', CASES[::3], ids=lambda x: str(x))
def test_no_object_has_no_factor(name, options):
    out = made(name, options, counts=(0, 0))
    assert all(v.shape == (0,) for v in out.factors.values()) and all(v.shape == (0,) for v in compute(out).values())

@pytest.mark.parametrize('name,options', CASES, ids=lambda x: str(x))
def test_factors_are_finite_numbers_without_gradient(name, options):
    out = made(name, options)
    for k, v in out.factors.items():
        assert v.shape == (len(out.pairs),) and not v.requires_grad and v.dtype == torch.float64, k
        assert k == 'high' or v.isfinite().all(), k
    assert all(type(v) is float for v in out.constants.values())

def test_a_method_that_says_nothing_has_no_factors():
    out = made('fcos', {}); bare = Assignment(out.losses, out.pairs, out.weights)
    assert bare.factors == bare.formula == bare.constants == {}

def test_factors_cost_nothing_until_they_are_asked_for():
    called = []
    out = Assignment({}, None, {}, lambda: called.append(1) or ({'a': torch.ones(2)}, dict(pos='a'), {}))
    assert not called and out.formula == dict(pos='a') and out.factors['a'].tolist() == [1., 1.] and called == [1]

def test_language_by_hand():
    f = language(np.array([0,0,0,2,2]), np.array([3,4,5,4,6]), np.zeros(5, int)); x = np.array([1.,3.,3.,5.,0.])
    for name, args, want in (('total', (x,), [7,7,7,5,5]), ('best', (x,), [3,3,3,5,5]), ('rank', (x,), [2,0,1,0,1]), ('wins', (x,), [1,0,1,1,1]),
                             ('to_best', (x,), [1/3,1,1,1,0]), ('share', (x,), [1/7,3/7,3/7,1,0]), ('match', (x,), [0,0,1,1,0])):
        np.testing.assert_allclose(f[name](*args), want, err_msg=name)
    np.testing.assert_allclose(f['std'](x, 1)[:3], np.std([1,3,3], ddof=1)); np.testing.assert_allclose(f['std'](np.ones(5)), 0)
