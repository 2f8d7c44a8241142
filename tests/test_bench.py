"Batches as promised, references that compute the method's own number, files that resume, and every subcommand on tiny cases. Nothing here depends on a time."
import argparse, contextlib, dataclasses, io, json, os, shutil, subprocess, sys, types
from pathlib import Path
import pytest, torch
from conftest import ROOT, golden_case
from golden_util import case_inputs, golden_cases
from ala_nb import bench as B, kernels      # loaded before anything is measured
from ala_nb.geometry import InputError
from ala_nb.losses import ClassTable, dense_negative
from ala_nb.methods import HeadSpec, available, build
from ala_nb.pairs import Objects, Predictions, inside_pairs

TINY = ['--image', '64x96', '--classes', '4', '--rounds', '1', '--no-isolate', '--no-memory', '--backbone', 'tiny']
def command(*argv):
    "Exit code, what was printed, what was complained about."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err: code = B.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()

def there(name):
    try: build(name, 3); return True
    except ImportError: return False

# ---- batches

def test_batches_repeat_and_are_valid():
    for make in (lambda seed: B.coco_like(3, size=(100, 150), classes=6, seed=seed), lambda seed: B.xview_like(2, (64, 64), 6, seed=seed)):
        a, b, c = make(0), make(0), make(1)
        assert all(torch.equal(x, y) for x, y in zip(a.cls+a.distances+a.third, b.cls+b.distances+b.third)) and not torch.equal(a.cls[0], c.cls[0])
        assert all(m.is_leaf and m.requires_grad and m.is_contiguous() for m in a.cls+a.distances+a.third)
        h, w = a.size
        for t in a.targets:
            assert (t['boxes'][:, 2:] > t['boxes'][:, :2]).all() and (t['boxes'] >= 0).all() and (t['boxes'] <= torch.tensor([w, h, w, h])).all()
            assert ((t['labels'] >= 0) & (t['labels'] < 6)).all()
        assert all((m >= 0).all() for m in a.distances)

def test_sizes_of_the_known_batches():
    counts = B.xview_counts(g=torch.Generator().manual_seed(0))
    assert (len(counts), sum(counts), max(counts)) == (128, 75_357, 4_967)
    for n in (1, 2, 3, 7): assert len(B.xview_counts(n)) == n and sum(B.xview_counts(n)) == round(75_357*n/128)
    c = B.Case()
    assert sum(h*w for h, w in B.level_sizes(c.height, c.width, c.strides)) == 20_267

# ---- references

@pytest.mark.parametrize('case', golden_cases('autoassign'))
def test_dense_autoassign_is_the_released_loss(case):
    check_golden(B.dense_autoassign, 'autoassign', case, lambda z: types.SimpleNamespace(mu=z['mu'], sigma=z['sigma']))

@pytest.mark.parametrize('case', golden_cases('dw_released'))
def test_dense_dw_is_the_released_loss(case): check_golden(B.dense_dw, 'dw_released', case, lambda z: None)

def check_golden(dense, file, case, method):
    preds, objects, leaves, z = case_inputs(case)
    g = golden_case(file, case)
    total = dense(method(z), preds, objects); want = sum(float(v) for k, v in g.items() if k.startswith('loss_'))
    assert abs(total.item()-want) <= 1e-9*max(abs(want), 1e-6)
    if bool(g.get('values_only', False)): return
    grad, = torch.autograd.grad(total, leaves['cls_logits'])
    assert abs(grad.norm().item() - float(g['grad_norm/cls_logits'])) <= 1e-8*max(float(g['grad_norm/cls_logits']), 1e-9)

@pytest.mark.parametrize('name', available())
@pytest.mark.parametrize('counts', [(5, 0, 3), (1, 1, 1), (0, 0, 0), (40, 2, 0)], ids=str)
def test_dense_forms_equal_their_methods(name, counts):
    if not there(name): pytest.skip(f'{name} is not there yet')
    g = torch.Generator().manual_seed(sum(counts))
    b = B.draw_batch(counts, (128, 192), 3, g, 40., .8)
    leaf = lambda t: t.detach().double().requires_grad_()
    b = dataclasses.replace(b, **{k: [*map(leaf, getattr(b, k))] for k in ('cls', 'distances', 'third')}, property_logits=leaf(b.property_logits), pooled=leaf(b.pooled))
    for t in b.targets: t['boxes'] = t['boxes'].double()
    method, objects = build(name, 3).double(), Objects.from_targets(b.targets)
    leaves = b.leaves(method.head)
    a, r = method(b.predictions(method.head), objects, .5).total, B.DENSE[name](method, b.predictions(method.head), objects)
    assert abs(a.item()-r.item()) <= 1e-5*abs(r.item())
    for x, y in zip(torch.autograd.grad(a, leaves, allow_unused=True), torch.autograd.grad(r, leaves, allow_unused=True)):
        x, y = (torch.zeros(()) if v is None else v for v in (x, y))
        assert (x-y).norm() <= 1e-4*y.norm() + 1e-12

def test_every_name_runs_or_says_why():
    b = B.coco_like(2, 3, (96, 160), 4)
    for loss in [*available(), 'atss assign']:
        for name in [loss, *B.peers_of(loss)] + ([f'empty {loss}'] if not loss.endswith(' assign') else []):
            try: B.make_run(name, b)()
            except B.Unavailable as e: assert 'mmdet' in str(e) or 'imported' in str(e), name
    assert torch.equal(B.make_run('atss assign', b)(), B.make_run('dense atss assign', b)())

def test_a_method_that_cannot_be_imported_is_left_out(monkeypatch):
    monkeypatch.setitem(B.METHODS, 'dw', 'no_such_module:DW')
    said = []
    assert B.pick_methods(['fcos', 'dw'], say=said.append) == ['fcos'] and 'dw: left out' in said[0]
    with pytest.raises(B.Unavailable, match='dw cannot be imported'): B.method_loss('dw', B.coco_like(1, 1, (64, 64), 3))

# ---- memory

def test_references_are_refused_before_they_fill_the_memory():
    b = B.coco_like(1, 20, (96, 160), 4)
    with pytest.raises(B.Unavailable, match='refused'): B.check_memory('dense dw', b, 1e6)
    B.check_memory('dw', b, 1e6)
    r = B.time_losses(B.Case(20, 1, 96, 160, 4), 'fcos', ['dense fcos', 'floor'], 1, limit=2e5)
    assert 'refused' in r['left_out']['dense fcos'] and 'floor' in r['times']

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='high-water marks are reset on Linux only')
def test_peak_is_that_of_the_call():
    torch.empty(30_000_000).fill_(1.)                                # 120 MB, gone again
    assert 70 < B.peak_growth(lambda: torch.empty(20_000_000).fill_(1.)) < 110

# ---- files

def test_rows_survive_being_cut_off(tmp_path):
    f = tmp_path/'b.csv'
    row = lambda **k: dict(what='losses', **dataclasses.asdict(B.Case()), loss='dw', machine='m') | k
    B.append_rows(f, [row(ms=1.25), row(loss='o2f', note='a, "b"')])
    whole = f.read_text()
    for cut in (10, 40, 100):
        f.write_text(whole[:-cut]); B.append_rows(f, [row(loss='ala', ms=3)])
        got = B.read_rows(f)
        assert [r['loss'] for r in got] == ['dw', 'ala'] and got[0]['ms'] == 1.25 and got[0]['note'] is None
    f.write_text(whole); assert B.read_rows(f)[1]['note'] == 'a, "b"'
    assert B.key(row()) == B.key(B.read_rows(f)[0])
    f.write_text('x,y\n1,2\n')
    with pytest.raises(InputError, match='b.csv'): B.read_rows(f)

def test_committed_rows_can_be_read():
    rows = B.read_rows(*(ROOT/'nbs'/'results').glob('bench_*.csv'))
    for r in rows:
        assert r['what'] in B.WHATS and (r['ms'] or 0) > 0 and r['machine'] and 'torch' in r['versions']
        assert r['ratio'] is None or r['ratio_low'] <= r['ratio'] <= r['ratio_high']
    if rows: B.table(rows), B.plot_costs(rows)

# ---- the command

@pytest.mark.parametrize('what, more', [('losses', []), ('objects', ['--objects', '1', '7']), ('batch', ['--batch', '1', '3']), ('xview', ['--batch', '2']), ('step', []), ('inference', [])])
def test_subcommands(what, more, tmp_path):
    out = tmp_path/'deep'/'out'
    code, said, complaints = command(what, '--methods', 'fcos', 'o2f', 'atss assign', *TINY, *more, '--out', out)
    assert code == 0, complaints
    rows = B.read_rows(out/f'bench_{what}.csv')
    assert {r['loss'] for r in rows} >= {'fcos', 'o2f'} and all(r['ms'] > 0 and r['versions'] and r['what'] == what for r in rows)
    if what in ('step', 'inference'): assert all(0 < r['share'] and r['images_per_s'] > 0 for r in rows)
    else: assert any(r['ratio'] for r in rows if r['peer'].startswith('dense')) and (out/'bench.png').stat().st_size > 1000
    if what == 'objects': assert {r['objects'] for r in rows} == {1, 7} and len({r['pairs'] for r in rows}) == 2
    assert 'ms' in said and 'torch' in said and str(tmp_path) not in (out/f'bench_{what}.csv').read_text()
    before = (out/f'bench_{what}.csv').read_text()
    code, said, _ = command(what, '--methods', 'fcos', 'o2f', 'atss assign', *TINY, *more, '--out', out)
    assert code == 0 and (out/f'bench_{what}.csv').read_text() == before and 'ms' in said        # nothing twice, and the table is there
    command(what, '--methods', 'fcos', *TINY, *more, '--out', out, '--again')
    assert len((out/f'bench_{what}.csv').read_text()) > len(before) and len(B.read_rows(out/f'bench_{what}.csv')) == len(rows)

def test_a_process_of_its_own_tells_time_and_memory(tmp_path):
    code, said, complaints = command('losses', '--methods', 'fcos', '--peers', 'floor', '--batch', 1, '--image', '64x96', '--classes', 4, '--rounds', 1, '--allocator', 'raised', '--out', tmp_path)
    row, = B.read_rows(tmp_path/'bench_losses.csv')
    assert code == 0 and row['allocator'] == 'raised' and row['ms'] > 0 and row['mb'] is not None and row['peer'] == 'floor', complaints

def test_all_methods_and_no_peers(tmp_path):
    code, said, complaints = command('losses', *TINY, '--batch', 1, '--peers', '--out', tmp_path)
    assert code == 0 and {r['loss'] for r in B.read_rows(tmp_path/'bench_losses.csv')} == {*filter(there, available()), 'atss assign'}, complaints

def test_what_fails_is_said_and_the_rest_goes_on(tmp_path, monkeypatch):
    real = B.TASKS['losses']
    monkeypatch.setitem(B.TASKS, 'losses', lambda case, loss, **k: 1/0 if loss == 'fcos' else real(case, loss, **k))
    code, said, complaints = command('losses', '--methods', 'fcos', 'o2f', *TINY, '--batch', 1, '--out', tmp_path)
    assert code == 1 and 'ZeroDivisionError' in complaints and {r['loss'] for r in B.read_rows(tmp_path/'bench_losses.csv')} == {'o2f'}

def test_a_killed_process_costs_its_references_only(tmp_path, monkeypatch):
    real = B.work
    monkeypatch.setattr(B, 'work', lambda spec: dict(error='killed, probably for its memory') if spec['arguments'].get('peers') else real(spec))
    code, said, _ = command('losses', '--methods', 'fcos', *TINY, '--batch', 1, '--peers', 'dense', '--out', tmp_path)
    row, = B.read_rows(tmp_path/'bench_losses.csv')
    assert code == 0 and row['ms'] > 0 and row['ratio'] is None and 'killed' in row['note']

@pytest.mark.parametrize('argv, names', [(['--image', '800'], '800'), (['--image', '0x800'], '0x800'), (['--methods', 'fcoss'], "'fcos'"), (['xview', '--objects', '3'], '--objects'),
    (['--objects', 'many'], 'many'), (['--objects', '-3'], '-3'), (['--no-isolate', '--allocator', 'raised'], '--allocator'), (['--batch', '0'], '0'), (['speed'], 'speed'),
    (['--device', 'abacus'], 'abacus'), (['--rounds', 'x'], 'rounds')])
def test_bad_input_is_one_line(argv, names, tmp_path):
    code, _, complaint = command(*argv, '--out', tmp_path/'o')
    assert code == 2 and complaint.startswith('error: ') and complaint.count('\n') == 1 and names in complaint
    assert not (tmp_path/'o').exists()

def test_out_must_be_a_folder_of_this_version(tmp_path):
    (tmp_path/'f').write_text('')
    assert command('--out', tmp_path/'f')[0] == 2
    (tmp_path/'bench_losses.csv').write_text('a,b\n')
    code, _, complaint = command('--out', tmp_path)
    assert code == 2 and 'bench_losses.csv' in complaint

def test_help():
    p = subprocess.run([sys.executable, '-m', 'ala_nb.bench', '--help'], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == 0 and all(w in p.stdout for w in B.WHATS)

# ---- what a loss may do to the machine

def gradients(name, b, progress=.5, **options):
    "Loss and gradients of a method, its parameters' too."
    torch.manual_seed(0)
    method = build(name, b.n_classes, **options).to(b.device); objects = Objects.from_targets(b.targets)
    total = method(b.predictions(method.head), objects, progress).total
    return [total.detach(), *torch.autograd.grad(total, b.leaves(method.head)+list(method.parameters()), allow_unused=True)]

def same(a, b): return len(a) == len(b) and all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b))

@pytest.mark.parametrize('name', available())
def test_deterministic(name):
    b = B.draw_batch((60, 0, 9), (160, 224), 4, torch.Generator().manual_seed(0), 40., .8)
    try:
        torch.use_deterministic_algorithms(True)                     # raises where an operation has no deterministic form
        first = gradients(name, b)
        assert same(first, gradients(name, b)) and same(first, gradients(name, b))
    finally: torch.use_deterministic_algorithms(False)

def compiled_dense(b, joint, backend):
    "Dense term, value and gradients, as it is and compiled; a graph break raises."
    obj = b.predictions(HeadSpec(third='objectness')).obj_logits.detach() if joint else None
    def dense(*maps): return dense_negative(Predictions.from_maps(maps, b.distances, strides=b.strides), obj)
    torch._dynamo.reset()
    results = [f(*b.cls) for f in (dense, torch.compile(dense, fullgraph=True, backend=backend))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(v, b.cls) for v in results)): torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('joint', [False, True])
def test_dense_term_is_one_graph(joint): compiled_dense(B.coco_like(2, 3, (96, 160), 5), joint, 'eager')

def test_dense_term_compiles():
    if not any(map(shutil.which, filter(None, (os.environ.get('CXX'), 'g++', 'clang++')))): pytest.skip("torch's compiler needs a C++ compiler and there is none")
    compiled_dense(B.coco_like(2, 3, (32, 48), 5, strides=(8,)), True, 'inductor')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_dense_term_never_waits_for_a_gpu():
    b = B.coco_like(2, 5, (96, 160), 4, device='cuda')
    preds, objects = b.predictions(HeadSpec(third='objectness')), Objects.from_targets(b.targets)
    pairs = inside_pairs(preds, objects); pairs.by_level, pairs.cell
    scale, ones = torch.full((), .5, device='cuda'), torch.ones((), device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        table = ClassTable(preds, pairs)
        total = table.negatives(preds.obj_logits, scale) + table.logits.sum()
        torch.autograd.grad(total, b.cls+b.third, ones)
    finally: torch.cuda.set_sync_debug_mode('default')

CROWD = lambda: B.draw_batch((400, 3), (320, 480), 4, torch.Generator().manual_seed(0), 60., .6)   # about 150,000 pairs

@pytest.mark.parametrize('name', ('ala', 'autoassign', 'dw'))
def test_chunks_change_no_result(name):
    b = CROWD()
    whole, cut = gradients(name, b, chunk=1<<30), gradients(name, b, chunk=1<<12)
    for x, y in zip(whole, cut):
        if x is not None: assert (x-y).norm() <= 1e-5*x.norm()

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='high-water marks are reset on Linux only')
@pytest.mark.parametrize('name, size, share', (('ala', 160., .7), ('autoassign', 90., .5), ('dw', 90., .6)))   # px: ala keeps more of what does not depend on chunks, and needs more pairs to outweigh it
def test_chunks_bound_the_memory(name, size, share):
    """Small chunks of a crowd against one chunk.
    Each allocation above 64 KiB goes back to the system at once, so that the peak is that of the tensors alive and
    repeats within 1 %: the allocator's own cache moves it by 5 %."""
    spec = lambda chunk: [sys.executable, '-c', f"""
import torch
from ala_nb import bench as B, kernels      # loaded before anything is measured
from ala_nb.methods import build
from ala_nb.pairs import Objects
torch.set_num_threads(1)
b = B.draw_batch((2000,), (800, 1216), 2, torch.Generator().manual_seed(0), {size}, .5)   # enough pairs to outweigh what does not depend on chunks
m = build('{name}', 2, chunk={chunk}); leaves = b.leaves(m.head)
print(B.peak_growth(lambda: torch.autograd.grad(m(b.predictions(m.head), Objects.from_targets(b.targets), .5).total, leaves, allow_unused=True)))"""]
    grown = lambda c, **env: float(subprocess.run(spec(c), capture_output=True, text=True, cwd=ROOT, check=True, env=os.environ | dict(MALLOC_MMAP_THRESHOLD_='65536') | env).stdout.split()[-1])
    small, large = (grown(c) for c in (1<<15, 1<<30))
    assert small < share*large, (small, large)
