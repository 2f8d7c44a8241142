"TOOD and its head: mmdetection's numbers, the head's laws, and DW on this head."
import importlib.util, sys
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from golden_util import same_record
from ala_nb import tood as T
from ala_nb.convert import guess_form
from ala_nb.detector import Detector, load_detector, save_weights
from ala_nb.geometry import InputError, level_sizes
from ala_nb.methods import PARTS, TASK_HEAD, HeadSpec, build
from ala_nb.pairs import Objects, Predictions

SCRIPTS = Path(__file__).resolve().parent.parent/'scripts'
GOLDEN = Path(__file__).parent/'golden'/'official'
sys.path.insert(0, str(SCRIPTS))
spec = importlib.util.spec_from_file_location('official_tood', SCRIPTS/'official_tood.py')
OT = importlib.util.module_from_spec(spec); spec.loader.exec_module(OT)
TARGETS = [dict(boxes=tensor([[8., 8, 60, 50]]), labels=tensor([0])), dict(boxes=tensor([[5., 20, 40, 70], [10, 10, 30, 30]]), labels=tensor([1, 1]))]
NONE = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
HEADS = dict(tood=('tood', {}, {}), dw_star=('dw', dict(task_head=True), {}), any_method=('ciou_atss', {}, TASK_HEAD))

def tiny(name='tood', **more):
    method, options, head = HEADS[name]
    torch.manual_seed(0)
    return Detector(method=method, backbone='tiny', num_classes=2, method_options=options, head_options=head, **more)
def images(*sizes): return [torch.rand(3, h, w) for h, w in sizes or ((64, 96), (80, 64))]

# ---- the official numbers

@pytest.mark.parametrize('name', list(OT.EPOCHS))
def test_official_numbers(name):
    "Pyramid, scores, boxes, losses, gradients and detections of mmdetection's TOOD in both phases, in float64."
    with np.load(GOLDEN/f'{name}.npz') as z: kept = dict(z)
    same_record(OT.our_record(name, OT.O.state_of(kept)), kept)
    assert all(len(kept[f'scores_{i}']) >= 20 for i in (0, 1))

def test_a_checkpoint_says_that_it_is_toods():
    with np.load(GOLDEN/'tood.npz') as z: state = OT.O.state_of(z)
    assert guess_form(state, 'mmdet') == 'tood'
    model = OT.ours(state)
    assert model.head.spec.options == dict(tower=dict(layers=OT.LAYERS)) and len(model.head.inter) == OT.LAYERS

# ---- the assignment

def predictions(seed, B=2, K=3, size=(64, 96), strides=(8, 16, 32)):
    g = torch.Generator().manual_seed(seed); sizes = level_sizes(*size, strides)
    m = lambda c: [torch.randn(B, c, *s, generator=g, dtype=torch.float64) for s in sizes]
    return Predictions.from_maps([x-1 for x in m(K)], [(x*.5+2.8).exp() for x in m(4)], m(1), strides, offset=0.)

def objects(seed, counts, K=3, size=(64, 96)):
    g = torch.Generator().manual_seed(seed); side = tensor([size[1], size[0]]).double()
    def one(n):
        xy = torch.rand(n, 2, generator=g).double()*side*.8
        return dict(boxes=torch.cat([xy, xy + 2 + torch.rand(n, 2, generator=g).double()*40], 1), labels=torch.randint(0, K, (n,), generator=g))
    return Objects.from_targets([one(n) for n in counts])

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.tuples(st.integers(0, 8), st.integers(0, 8)), k=st.integers(1, 20), alpha=st.sampled_from((0., 1., 2.)), beta=st.sampled_from((1., 6.)))
def test_laws_of_the_assignment(seed, counts, k, alpha, beta):
    "At most k positives an object and one object a location; targets at most the best IoU, reached by the best; nothing outside a box."
    preds, o = predictions(seed), objects(seed+1, counts)
    out = build('tood', 3, k=k, alpha=alpha, beta=beta, warmup=0.)(preds, o)
    p, w = out.pairs, out.weights; pos = w['pos'].bool()
    assert (p.sum(w['pos']) <= k).all() and torch.bincount(p.cell[pos], minlength=1).max() <= 1
    assert (p.targets[pos] > 0).all() and not w['target'][~pos].any()
    best, t = p.max(w['iou']*w['pos']), p.max(out.factors['score']**alpha*out.factors['iou']**beta*w['pos'])
    assert torch.allclose(p.max(w['target']), best*t/(t+1e-7), rtol=1e-12) and all(v.isfinite() for v in out.losses.values())

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), size=st.sampled_from((1, 300, 1 << 18)))
def test_blocks_and_inside_first(seed, n, size):
    preds, o = predictions(seed), objects(seed+1, (n, 1))
    a, b = T.best_pairs(preds, o, preds.obj_logits), T.best_pairs(preds, o, preds.obj_logits, size=size)
    assert torch.equal(a.loc, b.loc) and torch.equal(a.obj, b.obj) and a.lengths.tolist() == [13]*(n+1)
    within = T.best_pairs(preds, o, preds.obj_logits, inside_first=True)
    inside = lambda p: p.sum((p.targets.amin(-1) > T.MARGIN).double())
    assert (inside(within) >= inside(a)).all()

def test_more_candidates_than_locations():
    preds = predictions(0, size=(16, 16), strides=(8,))
    out = build('tood', 3, warmup=0.)(preds, objects(1, (2, 0), size=(16, 16)))
    assert out.pairs.lengths.tolist() == [4, 4] and out.total.isfinite()

def test_phases():
    m, preds, o = build('tood', 3), predictions(0), objects(1, (3, 2))
    early, late = m(preds, o, .33), m(preds, o, .34)
    assert set(early.weights['target'].unique().tolist()) <= {0., 1.} and ((late.weights['target'] > 0) & (late.weights['target'] < 1)).any()
    assert early.pairs.lengths.tolist() != late.pairs.lengths.tolist()

def test_saturated_and_lost_scores_stay_finite():
    for value in (-200., 200.):
        x = torch.full((1, 4, 2), value, requires_grad=True); m = torch.full((1, 4), value, requires_grad=True)
        preds = Predictions(x, torch.full((1, 4, 4), 8.), tensor([[4., 4], [12, 4], [4, 12], [12, 12]]), torch.full((4,), 8.), m)
        for progress in (0., .5):
            out = build('tood', 2)(preds, Objects.from_targets([dict(boxes=tensor([[0., 0, 16, 16]]), labels=tensor([1]))]), progress)
            assert out.total.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(out.total, (x, m)))

# ---- the head

@pytest.mark.parametrize('name', list(HEADS))
def test_every_layer_learns(name):
    model = tiny(name).train()
    sum(model(images(), TARGETS, progress=.5).values()).backward()
    lazy = [n for n, p in model.head.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not lazy

@pytest.mark.parametrize('name', list(HEADS))
def test_a_batch_is_its_images(name):
    model, x = tiny(name).eval().double(), [im.double() for im in images((64, 96), (64, 96))]
    with torch.no_grad(): both, alone = model.predict_maps(x)[0], [model.predict_maps([im])[0] for im in x]
    for field in ('cls_logits', 'distances', 'obj_logits'):
        assert torch.allclose(getattr(both, field), torch.cat([getattr(p, field) for p in alone]), atol=1e-10), field

@pytest.mark.parametrize('name', list(HEADS))
def test_empty_and_crowded_images(name):
    model = tiny(name).train(); g = torch.Generator().manual_seed(0)
    xy = torch.rand(80, 2, generator=g)*60; crowd = dict(boxes=torch.cat([xy, xy+3+torch.rand(80, 2, generator=g)*20], 1), labels=torch.randint(0, 2, (80,), generator=g))
    for targets in ([NONE, NONE], [crowd, NONE], [crowd, TARGETS[1]]):
        for progress in (0., .9):
            model.zero_grad(); sum(losses := model(images(), targets, progress=progress).values()).backward()
            assert all(v.isfinite() for v in losses) and all(p.grad is None or p.grad.isfinite().all() for p in model.head.parameters())

@pytest.mark.parametrize('name', list(HEADS))
def test_autocast(name):
    "Boxes are computed in float32 from what half precision said; the losses are near those of float32."
    model = tiny(name).train(); x = images()
    with torch.no_grad():
        full = sum(model(x, TARGETS, progress=.5).values())
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert model.predict_maps(x)[0].distances.dtype == torch.float32
            half = sum(model(x, TARGETS, progress=.5).values())
    assert half.dtype == torch.float32 and abs(float(half-full)) < .05*float(full)

def test_order_of_objects():
    m, preds, o = build('tood', 3, warmup=0.).double(), predictions(3), objects(4, (6, 4))
    mixed = [dict(boxes=b[order], labels=l[order]) for b, l in zip(o.boxes.split([6, 4]), o.labels.split([6, 4])) for order in [torch.randperm(len(l))]]
    a, b = m(preds, o), m(preds, Objects.from_targets(mixed))
    for k in a.losses: assert torch.allclose(a.losses[k], b.losses[k], rtol=1e-12), k

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(1, 6), w=st.integers(1, 6), offset=st.sampled_from((0., .5)), outside=st.sampled_from(('zero', 'own')), far=st.sampled_from((0., .5, 3.)))
def test_sides_never_cross(seed, h, w, offset, outside, far):
    g = torch.Generator().manual_seed(seed); d = torch.rand(2, 4, h, w, generator=g, dtype=torch.float64)*60
    out = T.read_sides(d, torch.randn(2, 8, h, w, generator=g, dtype=torch.float64)*far, 8., offset, outside)
    assert out.isfinite().all() and (out[:, :2] + out[:, 2:] >= -1e-9).all()
    if far == 0: assert torch.allclose(out, d)

def test_shifted_by_whole_cells():
    "A shift of whole cells reads the neighbour's side."
    d = torch.rand(1, 4, 4, 5, dtype=torch.float64)*8; shift = torch.zeros(1, 8, 4, 5, dtype=torch.float64)
    shift[:, 2] = 1.                                       # y of the top side: one row down, whose top lies a stride lower
    out = T.read_sides(d, shift, 8., outside='own')
    crossed = d[:, 1, 1:] - 8 + d[:, 3, :-1] < 0
    assert torch.allclose(out[:, 1, :-1], torch.where(crossed, d[:, 1, :-1], d[:, 1, 1:] - 8)) and torch.allclose(out[:, 0], d[:, 0])

def test_layers_and_options():
    for convs, layers in ((1, 2), (2, 3), (4, 6)): assert len(tiny(head_convs=convs).head.inter) == layers
    model = Detector('tood', 'tiny', 2, head_options=dict(options=dict(tower=dict(layers=4), refine=dict(outside='own'))))
    assert len(model.head.inter) == 4
    with pytest.raises(InputError, match="'zero'|'own'"): Detector('tood', 'tiny', 2, head_options=dict(options=dict(refine=dict(outside='no'))))
    for slot in ('refine', 'third_part'):
        with pytest.raises(InputError, match="tower='tood'"): Detector('dw', 'tiny', 2, head_options={slot: 'tood'}).eval()(images())
    with pytest.raises(InputError, match='refine'): build('dw', 2, task_head=True, refine='deform')

@pytest.mark.parametrize('name', list(HEADS))
def test_kept_and_read_again(name, tmp_path):
    model = tiny(name).eval(); save_weights(model, tmp_path/'x.safetensors'); again = load_detector(tmp_path/'x.safetensors'); x = images()
    with torch.no_grad(): a, b = model.predict_maps(x)[0], again.eval().predict_maps(x)[0]
    assert torch.equal(a.cls_logits, b.cls_logits) and torch.equal(a.distances, b.distances) and again.head.spec == model.head.spec

def test_parts_are_those_of_the_module():
    own = {k: v['tood'] for k, v in PARTS.items() if 'tood' in v}
    assert own == dict(tower='ala_nb.tood:TaskTower', box='ala_nb.tood:ScaledExp', refine='ala_nb.tood:AlignedSides', third_part='ala_nb.tood:AlignmentMap')
    assert HeadSpec(**TASK_HEAD).tower == 'tood' and isinstance(T.Decomposition(8, 2), nn.Module)
