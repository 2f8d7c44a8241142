"The kernel of the dense term against its readable form, in float64; numba present, absent, damaged."
import math, os, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb import kernels
from ala_nb.dense import made_up
from ala_nb.losses import ClassTable, dense_negative
from ala_nb.methods import box_methods, build
from ala_nb.pairs import Objects, Predictions, inside_pairs

ROOT = Path(__file__).resolve().parents[1]
needs_numba = pytest.mark.skipif(kernels.numba is None, reason='numba is not installed')
SIZES, STRIDES = [(9, 13), (5, 7), (3, 4)], (8, 16, 32)
METHODS_HERE = [n for n in box_methods() if n != 'ala']                     # ala asks for a property branch as well

def batch(seed, counts, K=4, spread=3., last=False):
    "Leaves (maps) and targets: some boxes hold no location, some one, some share a class."
    g = torch.Generator().manual_seed(seed); rand = lambda *s: torch.rand(*s, generator=g); B = len(counts)
    maps = lambda c: [((rand(B, c, h, w)*2-1.3)*spread).requires_grad_() for h, w in SIZES]
    cls, reg, third = maps(K), [(rand(B, 4, h, w)*2*s+1).requires_grad_() for (h, w), s in zip(SIZES, STRIDES)], maps(1)
    if last: cls = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in cls]
    targets = []
    for n in counts:
        xy = rand(n, 2)*torch.tensor([104., 72.]); wh = rand(n, 2)**3*80+2
        targets.append(dict(boxes=torch.cat([xy, xy+wh], 1), labels=torch.randint(0, K, (n,), generator=g)))
    return (cls, reg, third), targets

def results(name, options, maps, targets, dtype=torch.float32):
    "Losses, weights and gradients; of the leaves and of the method's parameters."
    method = build(name, maps[0][0].shape[1], **options).to(dtype)
    leaves = [[x.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_() for x in m] for m in maps]
    preds = Predictions.from_maps(leaves[0], leaves[1], leaves[2] if method.head.third else None, STRIDES, method.head.offset,
                                  extras=made_up(leaves[1], STRIDES, method.head.reads))
    out = method(preds, Objects.from_targets([{k: v.to(dtype) if k == 'boxes' else v for k, v in t.items()} for t in targets]), .5)
    flat = [x for m in leaves for x in m] + list(method.parameters())
    grads = torch.autograd.grad(out.total, flat, allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads)]

def agree(a, b, rtol=5e-5, atol=2e-6):
    (x, gx), (y, gy) = a, b
    for k in y.losses: torch.testing.assert_close(x.losses[k].double(), y.losses[k].double(), rtol=rtol, atol=atol)
    for p, q in zip(gx, gy): assert (p.double()-q.double()).norm() <= rtol*q.double().norm() + atol

@needs_numba
@pytest.mark.parametrize('name', METHODS_HERE)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1<<30), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from((1, 4)), st.sampled_from((1., 4.)), st.booleans())
def test_methods_with_and_without_the_kernel(name, seed, counts, K, spread, last):
    "float32 both ways: only the dense term differs. In float64 the switch changes nothing."
    maps, targets = batch(seed, counts, K, spread, last); before = os.environ.get('ALA_KERNELS')
    try:
        runs = {}
        for switch in '01':
            os.environ['ALA_KERNELS'] = switch
            for dtype in (torch.float32, torch.float64): runs[switch, dtype] = results(name, {}, maps, targets, dtype)
    finally: os.environ.pop('ALA_KERNELS', None) if before is None else os.environ.update(ALA_KERNELS=before)
    agree(runs['1', torch.float32], runs['0', torch.float32])
    for x, y in zip(runs['0', torch.float64][1], runs['1', torch.float64][1]): assert torch.equal(x, y)

def flat_value(preds, obj):
    "Value and gradients of the readable form in float64."
    blocks = [b.detach().double().requires_grad_() for b in preds.cls_blocks]; p = Predictions.__new__(Predictions)
    p.__dict__ |= preds.__dict__ | dict(cls_blocks=blocks); o = None if obj is None else obj.double().requires_grad_()
    v = dense_negative(p, o); return v.detach(), torch.autograd.grad(v, blocks + ([] if o is None else [o]))

@needs_numba
@pytest.mark.parametrize('images,classes,cells', [(1, 1, (70, 90)), (2, 3, (70, 90)), (3, 40, (20, 30)), (20, 5, (20, 30)), (1, 5, (0, 4)),
                                                  (1, 365, (3, 3)), (0, 3, (4, 4))])
def test_however_the_dense_term_is_cut(images, classes, cells, monkeypatch):
    g = torch.Generator().manual_seed(0); r = lambda c: [torch.randn(images, c, *hw, generator=g) for hw in (cells, (2, 3))]
    cls, obj = r(classes), torch.cat([x.flatten(2) for x in r(1)], 2)[:, 0]
    for last in (False, True):
        maps = [x.to(memory_format=torch.channels_last) for x in cls] if last else cls
        preds = Predictions.from_maps(maps, [x[:, :1].expand(-1, 4, -1, -1) for x in cls], strides=(8, 16))
        for third in (None, obj):
            want, slopes = flat_value(preds, third)
            for line in (4096, 64):
                monkeypatch.setattr(kernels, 'LINE', line)
                value, grads, by_obj = kernels.dense_pass(preds, third, .7)
                torch.testing.assert_close(value.double(), .7*want, rtol=1e-5, atol=0)
                for x, y in zip([*grads] + ([] if third is None else [by_obj]), slopes): torch.testing.assert_close(x.double(), .7*y, rtol=1e-4, atol=1e-6)

@needs_numba
def test_saturated():
    for scale in (1., 30., 60., 85.):
        c = torch.linspace(-1, 1, 41)*scale
        maps = [c.view(1, 1, 1, 41).expand(1, 2, 41, 41).contiguous()]; obj = c.view(1, 41, 1).expand(1, 41, 41).reshape(1, -1)
        preds = Predictions.from_maps(maps, [torch.ones(1, 4, 41, 41)], strides=(8,))
        for third in (None, obj):
            want, slopes = flat_value(preds, third); value, grads, by_obj = kernels.dense_pass(preds, third)
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
            for x, y in zip([*grads] + ([] if third is None else [by_obj]), slopes): torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('switch', '01')
def test_nan_and_infinity_stay(switch, monkeypatch):
    monkeypatch.setenv('ALA_KERNELS', switch)
    nothing = Objects.from_targets([dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())])
    for bad in (math.inf, math.nan):
        maps = [torch.full((1, 2, 3, 3), -4.)]; maps[0][0, 0, 1, 1] = bad
        p = Predictions.from_maps(maps, [torch.ones(1, 4, 3, 3)], strides=(8,))
        assert not ClassTable(p, inside_pairs(p, nothing)).negatives().isfinite()
    for bad in (1e4, 1e30):                                                # very large, finite
        maps = [torch.full((1, 2, 3, 3), bad, requires_grad=True)]; p = Predictions.from_maps(maps, [torch.ones(1, 4, 3, 3)], strides=(8,))
        v = ClassTable(p, inside_pairs(p, nothing)).negatives(torch.full((1, 9), bad))
        assert torch.autograd.grad(v, maps)[0].isfinite().all()

@pytest.mark.parametrize('switch', '01')
@pytest.mark.parametrize('part', (0, 1, 2))
@pytest.mark.parametrize('name', ('autoassign', 'dw', 'fcos', 'o2f'))
def test_a_nan_is_never_lost(name, part, switch, monkeypatch):
    monkeypatch.setenv('ALA_KERNELS', switch)
    maps, targets = batch(1, (6, 3))
    with torch.no_grad(): maps[part][0][0].fill_(math.nan)
    if part == 2 and not build(name, 4).head.third: return
    assert not results(name, {}, maps, targets)[0].total.isfinite()

@needs_numba
def test_threads_change_nothing():
    maps, targets = batch(3, (5, 2), K=30); n = torch.get_num_threads()
    try: runs = [(torch.set_num_threads(t), results('fcos', {}, maps, targets))[1] for t in (1, 3)]
    finally: torch.set_num_threads(n)
    assert torch.equal(runs[0][0].total, runs[1][0].total) and all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))

SCRIPT = '''
import sys
{before}
import torch
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions
c = torch.linspace(-3, 2, 2*6*4).view(1, 2, 6, 4).requires_grad_()
p = Predictions.from_maps([c], [torch.full((1, 4, 6, 4), 9.)], [torch.zeros(1, 1, 6, 4)], (8,))
out = build('dw', 2)(p, Objects.from_targets([dict(boxes=torch.tensor([[2., 2, 30, 40]]), labels=torch.tensor([1]))]))
out.total.backward()
from ala_nb import kernels
print(round(out.total.item(), 4), round(c.grad.abs().sum().item(), 4), {shown})
'''

def python(before='', shown='kernels.serves(p)', **env):
    "What the script prints in a new process."
    run = subprocess.run([sys.executable, '-c', SCRIPT.format(before=before, shown=shown)], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()

def test_without_numba_and_switched_off():
    absent = python("sys.modules['numba'] = None"); off = python(NUMBA_DISABLE_JIT='1'); on = python(); switched = python(ALA_KERNELS='0')
    assert absent[2] == off[2] == 'False' and on[2] == str(kernels.numba is not None)
    assert absent[:2] == off[:2] == on[:2] == switched[:2]

@needs_numba
def test_damaged_kept_code(tmp_path):
    "Truncated and unwritable files of numba's cache: compiled anew, the same numbers."
    env = dict(NUMBA_CACHE_DIR=str(tmp_path/'kept')); first = python(**env)
    files = [f for f in (tmp_path/'kept').rglob('*.nb*')]; assert files
    for content in (b'', b'\x80\x04nonsense'):
        for f in files: f.write_bytes(content)
        assert python(**env) == first
    (tmp_path/'file').write_text(''); assert python(NUMBA_CACHE_DIR=str(tmp_path/'file')) == first      # a file where the folder should be
