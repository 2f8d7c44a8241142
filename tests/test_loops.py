"The compiled loops of a CPU against the tensor operations that they stand for."
import functools, math, os, subprocess, sys
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb import geometry, losses
from ala_nb.geometry import InputError
from ala_nb.dw import class_terms
from ala_nb.losses import ClassTable, dense_negative
from ala_nb.methods import METHODS, available, build
from ala_nb.pairs import Objects, Predictions, center_pairs, inside_pairs, nearest_pairs, rectangle_pairs

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(geometry.numba is None, reason='numba is not installed')
K, SIZES, STRIDES = 4, [(9, 13), (5, 7), (3, 4)], (8, 16, 32)
METHODS_HERE = [n for n in available() if n != 'ala']                     # ala asks for a property branch as well, and shares the loops of the others
LOOPED = [('autoassign', {}), ('autoassign', dict(centre='shared')), ('autoassign', dict(centre='fixed', reg_weight=2.)), ('autoassign', dict(centre='none')),
          ('autoassign', dict(negative_weighting=False)), ('autoassign', dict(other_objects=False)), ('autoassign', dict(tau=1/60)), ('autoassign', dict(centre_loss=False)),
          ('dw', {}), ('dw', dict(beta=3., mu=7., mu_below=7.)), ('dw', dict(sigma=.3)), ('dw', dict(variant='paper')), ('dw', dict(weighting='gfl'))]

def batch(seed, counts, spread=3., last=False, cut=True):
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
    method = build(name, K, **options).to(dtype)
    leaves = [[x.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_() for x in m] for m in maps]
    preds = Predictions.from_maps(leaves[0], leaves[1], leaves[2] if method.head.third else None, STRIDES, method.head.offset)
    out = method(preds, Objects.from_targets([{k: v.to(dtype) if k == 'boxes' else v for k, v in t.items()} for t in targets]), .5)
    flat = [x for m in leaves for x in m] + list(method.parameters())
    grads = torch.autograd.grad(out.total, flat, allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads)]

def agree(a, b, rtol=3e-5, atol=2e-6):
    (x, gx), (y, gy) = a, b
    for k in y.losses: torch.testing.assert_close(x.losses[k].double(), y.losses[k].double(), rtol=rtol, atol=atol)
    for p, q in zip(gx, gy): assert (p.double()-q.double()).norm() <= rtol*q.double().norm() + atol
    for k in y.weights: torch.testing.assert_close(x.weights[k].double(), y.weights[k].double(), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('name,options', LOOPED, ids=str)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1<<30), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from((1., 4.)), st.booleans())
def test_loops_equal_tensors(name, options, seed, counts, spread, last):
    data = batch(seed, counts, spread, last)
    looped = results(name, options, *data)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(geometry, 'numba', None)
        assert not geometry.loops_on()
        agree(looped, results(name, options, *data))
        if name == 'autoassign' and 'tau' in options: return               # e⁶⁰ amplifies float32's rounding of P itself
        agree(looped, results(name, options, *data, dtype=torch.float64), rtol=2e-3, atol=1e-4)

def test_the_loops_are_what_runs(monkeypatch):
    from ala_nb import autoassign, dw, losses, pairs
    calls = []
    for module, names in ((losses, ('_dense_plain', '_dense_columns', '_dense_rows')), (autoassign, ('_positive_loop', '_negative_loop', '_best_iou_loop')), (dw, ('_weigh_loop', '_class_terms_loop')), (pairs, ('_overlap_loop', '_slope_loop'))):
        for n in names: monkeypatch.setattr(module, n, lambda *a, f=getattr(module, n), n=n: (calls.append(n), f(*a))[1])
    run = lambda *a, **k: (calls.clear(), results(*a, **k), set(calls))[2]
    maps, targets = batch(0, (3, 2))
    assert run('fcos', {}, maps, targets) == {'_dense_plain'}
    assert run('autoassign', {}, maps, targets) == {'_dense_columns', '_positive_loop', '_negative_loop', '_best_iou_loop'}
    assert run('dw', {}, maps, targets) == {'_dense_columns', '_weigh_loop', '_class_terms_loop'}
    assert run('dw', dict(bag='topk'), maps, targets) == {'_dense_columns', '_overlap_loop', '_slope_loop', '_class_terms_loop'}
    assert run('autoassign', {}, *batch(0, (3, 2), last=True)) >= {'_dense_rows'}
    for name in ('fcos', 'autoassign', 'dw'): assert not run(name, {}, maps, targets, dtype=torch.float64)

@pytest.mark.parametrize('name', METHODS_HERE)
def test_threads_change_nothing(name):
    data, before, found = batch(5, (9, 4, 0, 7)), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5): torch.set_num_threads(n); found.append(results(name, {}, *data))
    finally: torch.set_num_threads(before)
    for out, grads in found[1:]:
        assert all(torch.equal(out.losses[k], found[0][0].losses[k]) for k in out.losses)
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1]))

@pytest.mark.parametrize('part', (0, 1, 2))
@pytest.mark.parametrize('name', ('autoassign', 'dw', 'fcos', 'o2f'))
def test_a_nan_is_never_lost(name, part):
    maps, targets = batch(1, (6, 3))
    with torch.no_grad(): maps[part][0][0].fill_(math.nan)
    if part == 2 and not build(name, K).head.third: return
    assert results(name, {}, maps, targets)[0].total.isnan()

def test_dense_saturated_and_infinite():
    for scale in (1., 30., 60., 300.):
        c = torch.linspace(-1, 1, 41)*scale
        maps = [c.view(1, 1, 1, 41).expand(1, 2, 41, 41).contiguous()]; obj = c.view(1, 41, 1).expand(1, 41, 41).reshape(1, -1)
        preds = Predictions.from_maps(maps, [torch.ones(1, 4, 41, 41)], strides=(8,))
        for third in (None, obj):
            a, b = dense_negative(preds, third, .7), dense_negative(preds, third, .7, loop=False)
            torch.testing.assert_close(a[0], b[0], rtol=5e-3 if scale > 87 else 1e-5, atol=0)      # both give up at 1-q = 1e-38, not quite at the same number
            for x, y in zip(a[1]+[a[2]], b[1]+[b[2]]):
                if x is not None: assert x.isfinite().all()
                if x is not None and scale < 87: torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    for bad in (math.inf, math.nan):
        maps = [torch.full((1, 2, 3, 3), -4.)]; maps[0][0, 0, 1, 1] = bad
        assert not dense_negative(Predictions.from_maps(maps, [torch.ones(1, 4, 3, 3)], strides=(8,)))[0].isfinite()

@pytest.mark.parametrize('given_', [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0)])
def test_class_terms_with_weights_left_out(given_):
    g = torch.Generator().manual_seed(0); r = lambda: torch.rand(70000, generator=g)                 # more than one piece
    c, o, weights = r()*8-4, r()*8-4, [r() if w else None for w in given_]
    def run(dtype):
        x, y = (v.to(dtype).requires_grad_() for v in (c, o))
        sums = class_terms(x, y, *(None if w is None else w.to(dtype) for w in weights))
        return [v.detach().double() for v in sums], [v.double() for v in torch.autograd.grad(2*sums[0]+3*sums[1]-sums[2], (x, y))]
    for a, b in zip(run(torch.float32), run(torch.float64)):
        for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('images,classes,cells', [(1, 1, (70, 90)), (2, 3, (70, 90)), (3, 40, (20, 30)), (20, 5, (20, 30)), (1, 5, (0, 4)), (1, 300, (3, 3))])
def test_however_the_dense_term_is_cut(images, classes, cells, monkeypatch):
    g = torch.Generator().manual_seed(0); r = lambda c: [torch.randn(images, c, *hw, generator=g) for hw in (cells, (2, 3))]
    cls, obj = r(classes), torch.cat([x.flatten(2) for x in r(1)], 2)[:, 0]
    for last in (False, True):
        maps = [x.to(memory_format=torch.channels_last) for x in cls] if last else cls
        preds = Predictions.from_maps(maps, [x[:, :1].expand(-1, 4, -1, -1) for x in cls], strides=(8, 16))
        value, grads, slope = dense_negative(preds, obj, .7, loop=False)
        for job in (1 << 18, 64):
            monkeypatch.setattr(losses, 'JOB', job)
            a, b, c = dense_negative(preds, obj, .7)
            torch.testing.assert_close(a, value, rtol=1e-5, atol=0)
            for x, y in zip((*b, c), (*grads, slope)): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
            assert torch.equal(c, dense_negative(preds, obj, .7)[2])

edges = st.one_of(st.integers(-60, 300).map(lambda n: n/2), st.floats(-200, 400, width=32), st.sampled_from((-1e30, 1e30, 3e38)))
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(edges, edges, edges, edges), max_size=4), st.sampled_from((0., .5, .3)), st.booleans())
def test_the_same_rectangles(boxes, offset, in_box):
    preds = Predictions.from_maps([torch.zeros(1, 1, h, w) for h, w in SIZES], [torch.ones(1, 4, h, w) for h, w in SIZES], None, STRIDES, offset)
    objects = Objects.from_targets([dict(boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4), labels=torch.zeros(len(boxes)).long())])
    make = inside_pairs if in_box else functools.partial(center_pairs, clip=False)
    with pytest.MonkeyPatch.context() as m: m.setattr(geometry, 'numba', None); b = make(preds, objects)
    a = make(preds, objects)
    assert torch.equal(a.loc, b.loc) and torch.equal(a.obj, b.obj) and torch.equal(a.lengths, b.lengths) and a._per_level == b._per_level and torch.equal(a._level_counts, b._level_counts)

def test_a_box_that_is_not_finite():
    for bad in (math.nan, math.inf, -math.inf):
        for k in range(4):
            box = torch.tensor([[1., 2, 30, 40]]); box[0, k] = bad
            with pytest.raises(InputError, match=r'targets\[1\]: box 0 is .*not finite'): Objects.from_targets([dict(boxes=torch.ones(0, 4), labels=torch.ones(0).long()), dict(boxes=box, labels=torch.tensor([0]))])
            lo = torch.tensor([[[1., 2], [1, 2], [1, 2]]]); hi = lo+30; (lo if k < 2 else hi)[..., k % 2] = bad
            preds = Predictions.from_maps([torch.zeros(1, 1, h, w) for h, w in SIZES], [torch.ones(1, 4, h, w) for h, w in SIZES], None, STRIDES)
            pairs = rectangle_pairs(preds, Objects(torch.ones(1, 4), torch.zeros(1).long(), torch.zeros(1).long(), 1), lo, hi)   # no place is written that is not there
            assert len(pairs) <= preds.n_locations and (len(pairs) == 0 or not math.isnan(bad))

def test_jobs_end_with_the_error_of_one_of_them():
    before = torch.get_num_threads()
    def fail(e): raise e
    try:
        for n in (1, 2, 3, geometry.LARGE_TEAM+1):
            torch.set_num_threads(n)
            assert geometry.run_jobs([(pow, 2, i) for i in range(40)]) == [2**i for i in range(40)]
            for e in (InputError('no'), KeyboardInterrupt()):
                for at in (0, 39):
                    with pytest.raises(type(e)): geometry.run_jobs([(fail, e) if i == at else (pow, 2, i) for i in range(40)])
    finally: torch.set_num_threads(before)

TEAM = """import os, threading, torch
from pathlib import Path
from ala_nb import geometry
torch.set_num_threads(2); torch.ones(1 << 20).mul_(2)
there = {int(t.name) for t in (Path('/proc')/'self'/'task').iterdir()}   # torch's own threads among them
def who(barrier=threading.Barrier(2)): barrier.wait(60); return threading.get_native_id()
mine = {threading.get_native_id(), *geometry.run_jobs([(who,)]*2)}
assert len(mine) == 2 and mine <= there
if not (pid := os.fork()):                                               # the team stayed with the parent
    assert geometry.run_jobs([(pow, 2, i) for i in range(9)]) == [2**i for i in range(9)]
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print('fine')"""
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_jobs_in_the_team_of_torch_and_after_a_fork():
    r = subprocess.run([sys.executable, '-c', TEAM], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert r.stdout.strip() == 'fine', r.stderr

def test_bags_outside_their_boxes():
    maps, targets = batch(3, (4, 5)); planes = Predictions.from_maps(*maps[:2], strides=STRIDES)
    for pairs in (nearest_pairs(planes, Objects.from_targets(targets), 9), inside_pairs(planes, Objects.from_targets(targets)), inside_pairs(planes, Objects.from_targets([dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())]*2))):
        d, w = planes.distance_planes.detach(), torch.rand(len(pairs))
        found, out = pairs.overlaps(d), torch.zeros_like(d); pairs.add_giou_slopes(d, w, out)
        want, out64 = pairs.overlaps(d.double()), torch.zeros_like(d).double(); pairs.add_giou_slopes(d.double(), w.double(), out64)
        for x, y in zip(found, want): torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(out.double(), out64, rtol=1e-4, atol=2e-6)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1<<30), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from((0., .5)), st.booleans())
def test_the_same_lists(seed, counts, offset, last):
    maps, targets = batch(seed, counts, last=last); objects = Objects.from_targets(targets)
    for make in (inside_pairs, lambda p, o: center_pairs(p, o, 1.5, clip=False)):
        preds = Predictions.from_maps(*maps, STRIDES, offset); a = make(preds, objects)
        with pytest.MonkeyPatch.context() as m: m.setattr(geometry, 'numba', None); b = make(preds, objects)
        keep, at = a.last_of_class(), ClassTable(preds, a)._reader.at
        with pytest.MonkeyPatch.context() as m:
            m.setattr(geometry, 'numba', None)
            assert torch.equal(b.last_of_class(), keep)
            for x, y in zip(at, ClassTable(preds, b)._reader.at): assert all(torch.equal(u, v) for u, v in zip(x, y))
        assert torch.equal(a.loc, b.loc) and torch.equal(a.obj, b.obj) and torch.equal(a.lengths, b.lengths) and a._per_level == b._per_level

def test_without_numba_or_with_its_compiler_off():
    code = """import sys
if len(sys.argv) > 1: sys.modules['numba'] = None
from ala_nb import geometry
from ala_nb.methods import build
assert geometry.numba is None and not geometry.loops_on()
import torch
from ala_nb.pairs import Objects, Predictions
p = Predictions.from_maps([torch.zeros(1, 3, 4, 4, requires_grad=True)], [torch.ones(1, 4, 4, 4)], [torch.zeros(1, 1, 4, 4)], (8,))
o = Objects.from_targets([dict(boxes=torch.tensor([[1., 1, 30, 30]]), labels=torch.tensor([1]))])
for name in ('fcos', 'autoassign', 'dw'): build(name, 3)(p, o, .5).total.backward()
print('fine')"""
    for args, env in ((['blocked'], {}), ([], dict(NUMBA_DISABLE_JIT='1'))):
        r = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=ROOT, env=os.environ | env)
        assert r.stdout.strip() == 'fine', r.stderr

def test_what_is_kept_on_the_disk_goes_stale_with_any_module(tmp_path):
    "A loop of one module calls functions of another; numba by itself looks at one file only."
    package = tmp_path/'ala_nb'; package.mkdir()
    for f in ('__init__.py', 'geometry.py'): (package/f).write_bytes((ROOT/'ala_nb'/f).read_bytes())
    (package/'inner.py').write_text('from .geometry import number_function\n@number_function\ndef value(x): return x+1.\n')
    (package/'outer.py').write_text("from .geometry import number_loop\nfrom .inner import value\n@number_loop('f8(f8)')\ndef f(x): return value(x)\n")
    run = lambda: float(subprocess.run([sys.executable, '-c', 'from ala_nb.outer import f; print(f(1.))'], capture_output=True, text=True, cwd=tmp_path, check=True).stdout)
    assert run() == 2. and run() == 2.
    (package/'inner.py').write_text('from .geometry import number_function\n@number_function\ndef value(x): return x+2.\n')
    assert run() == 3.
