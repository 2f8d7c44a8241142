"""What a notebook teaches is what training calls: perturb any function of a method's module, or override any method of its class, and the losses
move, in float32 and in float64."""
import importlib, inspect, os, sys
import pytest, torch
from torch import nn
from ala_nb.dense import made_up
from ala_nb.geometry import boxes_to_distances, grid_points, level_sizes
from ala_nb.methods import build, Method
from ala_nb.pairs import Objects, Pairs, Predictions

MODULES = ['fcos', 'ciou_atss', 'autoassign', 'dw', 'o2f', 'ipb', 'opm', 'ps3', 'ala', 'defcn', 'gfl', 'vfnet', 'tood', 'retina']
K, STRIDES = 3, (8, 16, 32)

# what uses a function or a method: name of a method and options; without an entry, the module's first method as it is
BUILD = dict(fcos=('fcos', {}), ciou_atss=('ciou_atss', {}), autoassign=('autoassign', {}), dw=('dw', {}), o2f=('o2f', {}), ipb=('ala', {}), opm=('ala', {}), ps3=('ala', {}), ala=('ala', {}), defcn=('poto', dict(aux='atss')),
             gfl=('gflv2', dict(pred_weight=1.)), vfnet=('vfnet', dict(pred_weight=1.)), tood=('tood', dict(warmup=0.)), retina=('retina', dict(anchor_scale=4.)))
BUILD |= {
    'ciou_atss.weight_at': ('ciou_atss', dict(pred_weight='rising')),
    **{f'ciou_atss.{n}': ('atss', dict(ignore_padding=True)) for n in ('own_part', 'padding_cost')},
    'o2f.match_one_to_one': ('poto', {}), 'o2f.POTO': ('poto', dict(aux='atss')), 'o2f.auxiliary_rule': ('poto', dict(aux='fcos')),
    'defcn.quality_topk': ('poto', dict(aux='topk')), 'defcn.near_center': ('poto', dict(aux='fcos')), 'defcn.anchor_atss': ('poto', dict(aux='anchor_atss')),
    'defcn.HybridEpoch': ('hybrid', {}), 'ciou_atss.ATSS': ('atss', {}), 'gfl.GFL': ('gfl', dict(pred_weight=1.)),
    'ps3.propagated_label': ('ala', dict(strategy='pnlp')), 'ps3.latent_label': ('ala', dict(strategy='latent')), 'ps3.neighbors': ('ala', dict(strategy='pnlp')),
    'ala.ALA._paper': ('ala', dict(variant='paper')), 'autoassign.explicit_objectness': ('autoassign', dict(objectness='explicit')),
    **{f'dw.{n}': ('dw', dict(variant='paper')) for n in ('consistency', 'neg_probability')},
    'dw.aligned_target': ('dw', dict(weighting='tood')), 'dw.coupled_weights': ('dw', dict(weighting='gfl')), 'dw.autoassign_weights': ('dw', dict(weighting='autoassign'))}
# what moves no loss, and why
EXCEPT = {
    'fcos.ascending': 'checks an option', 'dw.read_bag': 'checks an option', 'ciou_atss.check_weight': 'checks an option', 'ciou_atss.overlap_formula': 'explains weights',
    'defcn.strongest': 'part of the head', 'defcn.dense_hybrid': 'the reference',
    **dict.fromkeys(('gfl.bin_mean', 'gfl.distribution_statistics', 'vfnet.star_shifts'), 'the head uses it'),
    **dict.fromkeys(('gfl.dense_gfl', 'gfl.dense_gflv2', 'vfnet.dense_vfnet'), 'the reference'),
    **dict.fromkeys(('tood.dense_tood', 'tood.tood_sets', 'retina.dense_retina'), 'the reference'), **dict.fromkeys(('tood.tower_layers', 'tood.joint', 'tood.read_sides'), 'part of the head'),
    'ipb.map_iou': "the measure of ALA's Table II, no part of a loss"}
UNREAD = 'location_scores', 'combine', 'scores', 'explain', 'over_candidates', 'dual_rule', 'coupled_rule'   # what ranks detections, and what explains weights: no loss reads them

HEAD_PARTS = 'MaxFilter3d', 'MaxFilter', 'Distribution', 'Statistics', 'StarConv', 'Scales', 'Star', 'Decomposition', 'TaskTower', 'AlignmentMap', 'ScaledExp', 'AlignedSides'      # they make predictions
CONSTRUCTION = '__init__', '_set', 'add_prior'           # called before there is a loss

def batch(dtype, seed=0):
    "Two images; objects that overlap, two of them of one class, one without a location; boxes near the truth, so that no weight is 0."
    g = torch.Generator().manual_seed(seed); sizes = level_sizes(96, 128, STRIDES)
    boxes = torch.tensor([[8., 6, 60, 50], [30, 20, 90, 60], [25, 25, 95, 75], [60.2, 60.2, 60.9, 60.9], [10, 10, 118, 90]])
    labels, image = torch.tensor([0, 0, 2, 1, 1]), torch.tensor([0, 0, 0, 0, 1])
    points, _ = grid_points(sizes, STRIDES)
    near = torch.stack([((points[:, None] - (boxes[image == i, :2] + boxes[image == i, 2:])/2)**2).sum(-1).argmin(1) + (i and 4) for i in (0, 1)])
    reach = torch.stack([boxes_to_distances(points, boxes[near[i]]) for i in (0, 1)]).clamp(min=4)
    reach = reach*(torch.randn(2, len(points), 4, generator=g)*.15).exp()
    maps, at = [], 0
    for h, w in sizes: maps.append(reach[:, at:at+h*w].transpose(1, 2).reshape(2, 4, h, w)); at += h*w
    r = lambda c: [torch.randn(2, c, *s, generator=g).to(dtype) for s in sizes]
    maps = [x.to(dtype) for x in maps]
    preds = Predictions.from_maps([x-1 for x in r(K)], maps, r(1), STRIDES, extras=made_up(maps, STRIDES, (('bins', 68), ('coarse', 4))),
        property_logits=torch.randn(2, 2, *sizes[0], generator=g).to(dtype), pooled=torch.randn(2, 3, 16, generator=g).to(dtype))
    preds.image_sizes = [(96, 128), (96, 64)]                                      # the second is padded on its right
    targets = [dict(boxes=boxes[image == i].to(dtype), labels=labels[image == i]) for i in (0, 1)]
    return preds, Objects.from_targets(targets)

def perturbed(x):
    "Another value of the same kind."
    if x is None: return None
    if isinstance(x, torch.Tensor):
        some = (torch.arange(x.numel()) % 3 == 0).reshape(x.shape)
        if x.is_floating_point(): return x*(1 - .25*some)                          # not one factor: some things are normalised
        return x & ~some if x.dtype == torch.bool else x.flip(0)
    if isinstance(x, Pairs): return x.select(torch.arange(len(x)) % 3 != 0)
    if isinstance(x, tuple):                                                         # the lists beside a `Pairs`, and the first of two lists of places
        whole = any(isinstance(v, Pairs) for v in x)
        return tuple(v if isinstance(v, Pairs) or not whole and i and getattr(v, 'dtype', None) == torch.int64 else perturbed(v) for i,v in enumerate(x))
    if isinstance(x, list): return [perturbed(v) for v in x]
    if callable(x): return lambda *a, **k: perturbed(x(*a, **k))
    if isinstance(x, (int, float)) and not isinstance(x, bool): return x*.75 + .05
    if isinstance(x, dict): return {k: perturbed(v) for k, v in x.items()}
    if hasattr(x, 'losses'): x.losses = perturbed(x.losses); return x
    raise TypeError(f'cannot perturb {type(x).__name__}')

def made(key, dtype):
    parts = key.split('.'); name, options = next(BUILD[k] for n in (3, 2, 1) if (k := '.'.join(parts[:n])) in BUILD)
    torch.manual_seed(0)
    method = build(name, K, **options, **(dict(in_channels=16) if name == 'ala' else {})).to(dtype)
    with torch.no_grad():
        for p in method.parameters(): p.add_(torch.randn(p.shape)*.1)              # a learned part that does something
    return method

def losses_of(method, dtype):
    return {k: v.item() for k, v in method(*batch(dtype), .3).losses.items()}

def moved(a, b): return any(abs(a[k]-b[k]) > 1e-4*abs(a[k]) for k in a)

def functions():
    for m in MODULES:
        module = importlib.import_module(f'ala_nb.{m}')
        yield from (f'{m}.{n}' for n in module.__all__ if inspect.isfunction(getattr(module, n)))

def own_methods():
    for m in MODULES:
        module = importlib.import_module(f'ala_nb.{m}')
        for c in (getattr(module, n) for n in module.__all__):
            if not (inspect.isclass(c) and issubclass(c, nn.Module)) or c.__name__ in HEAD_PARTS: continue
            yield from (f'{m}.{c.__name__}.{k}' for k, v in vars(c).items() if inspect.isfunction(v) and k not in CONSTRUCTION and not k.startswith('_orig_'))

each_dtype = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['f32', 'f64'])

@pytest.fixture(autouse=True)
def _kernels(monkeypatch): monkeypatch.delenv('ALA_KERNELS', raising=False)

@each_dtype
@pytest.mark.parametrize('key', [k for k in functions() if k not in EXCEPT])
def test_every_function_moves_the_losses(key, dtype, monkeypatch):
    module, name = key.split('.'); function = getattr(importlib.import_module(f'ala_nb.{module}'), name)
    before = losses_of(made(key, dtype), dtype); assert before == losses_of(made(key, dtype), dtype)
    other = lambda *a, **k: perturbed(function(*a, **k))
    for m in [m for n, m in sys.modules.items() if n.startswith('ala_nb.')]:
        if getattr(m, name, None) is function: monkeypatch.setattr(m, name, other)
    for table in vars(importlib.import_module(f'ala_nb.{module}')).values():          # a table of functions by name, such as CLS_LOSSES
        if isinstance(table, dict):
            for k, v in table.items():
                if v is function: monkeypatch.setitem(table, k, other)
    assert moved(before, losses_of(made(key, dtype), dtype))

@each_dtype
@pytest.mark.parametrize('key', [k for k in own_methods() if k.split('.')[-1] not in UNREAD])
def test_every_override_moves_the_losses(key, dtype, monkeypatch):
    module, owner, name = key.split('.'); cls = getattr(importlib.import_module(f'ala_nb.{module}'), owner)
    method = made(key, dtype); before = losses_of(method, dtype)
    inherited = getattr(cls, name)
    child = type('Child', (cls,), {name: lambda self, *a, **k: perturbed(inherited(self, *a, **k))})
    changed = made(key, dtype)
    for m in changed.modules():
        if type(m) is cls: m.__class__ = child                                       # the method itself, or a module within it
    assert any(type(m) is child for m in changed.modules())
    assert moved(before, losses_of(changed, dtype))

def test_exceptions_are_all_there():
    assert not set(EXCEPT) - set(functions())
    assert not {k for k in BUILD if '.' in k} - set(functions()) - {'.'.join(k.split('.')[:n]) for k in own_methods() for n in (2, 3)}

@each_dtype
def test_a_subclass_is_used_by_build_and_detector(dtype):
    "The class that a reader writes, by `Detector`: no shortcut knows its parent's formula."
    from ala_nb.detector import Detector
    from ala_nb.fcos import FCOS
    class Mine(FCOS):
        def assign(self, preds, objects, progress):
            out = super().assign(preds, objects, progress); out.losses['loss_reg'] = 3*out.losses['loss_reg']; return out
    torch.manual_seed(0); ours = Detector(Mine(K, ranges=(24, 48)), 'tiny', K).to(dtype)
    theirs = Detector('fcos', 'tiny', K, method_options=dict(ranges=(24, 48))).to(dtype); theirs.load_state_dict(ours.state_dict())
    images, target = [torch.rand(3, 64, 64, dtype=dtype)], [dict(boxes=torch.tensor([[8., 8, 40, 50]], dtype=dtype), labels=torch.tensor([1]))]
    a, b = ours(images, target), theirs(images, target)
    assert torch.allclose(a['loss_reg'], 3*b['loss_reg']) and torch.equal(a['loss_cls'], b['loss_cls'])
