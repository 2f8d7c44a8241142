"Batches as promised, references that compute the method's own number, files, and every subcommand on tiny cases."
import contextlib, csv, dataclasses, io, os, shutil, subprocess, sys, types
import pytest, torch
from conftest import ROOT, golden_case
from golden_util import case_inputs, golden_cases
from ala_nb import bench as B
from ala_nb import dense as D
from ala_nb.geometry import InputError, level_sizes
from ala_nb.losses import ClassTable, dense_negative
from ala_nb.methods import HeadSpec, box_methods, build
from ala_nb.pairs import Objects, Predictions, inside_pairs

TINY = ['--image', '64x96', '--classes', '4', '--rounds', '1', '--backbone', 'tiny', '--batch', '1']
def command(*argv):
    "Exit code, what was printed, what was complained about."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = B.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()

# ---- batches

def test_batches_repeat_and_are_valid():
    for make in (lambda seed: D.coco_like(3, size=(100, 150), classes=6, seed=seed), lambda seed: D.xview_like(2, (64, 64), 6, seed=seed)):
        a, b, c = make(0), make(0), make(1)
        assert all(torch.equal(x, y) for x, y in zip(a.cls+a.distances+a.third, b.cls+b.distances+b.third))
        assert not torch.equal(a.cls[0], c.cls[0])
        assert all(m.is_leaf and m.requires_grad and m.is_contiguous() for m in a.cls+a.distances+a.third)
        h, w = a.size
        for t in a.targets:
            assert (t['boxes'][:, 2:] > t['boxes'][:, :2]).all()
            assert (t['boxes'] >= 0).all() and (t['boxes'] <= torch.tensor([w, h, w, h])).all()
            assert ((t['labels'] >= 0) & (t['labels'] < 6)).all()
        assert all((m >= 0).all() for m in a.distances)

def test_sizes_of_the_known_batches():
    counts = D.xview_counts(g=torch.Generator().manual_seed(0))
    assert (len(counts), sum(counts), max(counts)) == (128, 75_357, 4_967)
    for n in (1, 2, 3, 7): assert len(D.xview_counts(n)) == n and sum(D.xview_counts(n)) == round(75_357*n/128)
    assert sum(h*w for h, w in level_sizes(800, 1216, D.STRIDES)) == 20_267

# ---- dense forms

@pytest.mark.parametrize('case', golden_cases('autoassign'))
def test_dense_autoassign_is_the_released_loss(case):
    check_golden(D.dense_autoassign, 'autoassign', case, lambda z: types.SimpleNamespace(mu=z['mu'], sigma=z['sigma']))

@pytest.mark.parametrize('case', golden_cases('dw_released'))
def test_dense_dw_is_the_released_loss(case): check_golden(D.dense_dw, 'dw_released', case, lambda z: None)

def check_golden(dense, file, case, method):
    preds, objects, leaves, z = case_inputs(case)
    g = golden_case(file, case)
    total = dense(method(z), preds, objects); want = sum(float(v) for k, v in g.items() if k.startswith('loss_'))
    assert abs(total.item()-want) <= 1e-9*max(abs(want), 1e-6)
    if bool(g.get('values_only', False)): return
    grad, = torch.autograd.grad(total, leaves['cls_logits'])
    assert abs(grad.norm().item() - float(g['grad_norm/cls_logits'])) <= 1e-8*max(float(g['grad_norm/cls_logits']), 1e-9)

def equal_forms(name, b, progress=.5):
    "A method beside its dense form in float64."
    b = b.map(lambda t: t.detach().double().requires_grad_())
    for t in b.targets: t['boxes'] = t['boxes'].double()
    torch.manual_seed(0); method, objects = build(name, b.n_classes).double(), Objects.from_targets(b.targets)
    leaves = b.leaves(method.head) + list(method.parameters())
    a = method(b.predictions(method.head), objects, progress).total
    r = D.DENSE[name](method, b.predictions(method.head), objects, progress)
    assert abs(a.item()-r.item()) <= 1e-6*abs(r.item())
    grads = zip(*(torch.autograd.grad(v, leaves, allow_unused=True) for v in (a, r)))
    for x, y in grads:
        x, y = (torch.zeros(()) if v is None else v for v in (x, y))
        assert (x-y).norm() <= 1e-5*y.norm() + 1e-12

@pytest.mark.parametrize('name', D.DENSE)
@pytest.mark.parametrize('counts', [(5, 0, 3), (1, 1, 1), (0, 0, 0), (40, 2, 0)], ids=str)
def test_dense_forms_equal_their_methods(name, counts):
    equal_forms(name, D.draw_batch(counts, (128, 192), 3, torch.Generator().manual_seed(sum(counts)), 40., .8))

@pytest.mark.parametrize('name', ('o2f', 'ala'))
@pytest.mark.parametrize('progress', (0., .2, 1.))
def test_dense_forms_equal_their_methods_all_through_training(name, progress):
    equal_forms(name, D.coco_like(2, 6, (160, 224), 4, seed=3), progress)

# ---- peers

def test_every_name_runs_or_says_why():
    b = D.coco_like(2, 3, (96, 160), 4)
    for loss in box_methods():
        for name in [loss, *B.peers_of(loss)]:
            try: B.make_run(name, b)()
            except B.Unavailable as e: assert 'mmdet' in str(e) or 'imported' in str(e), name

def test_torchvision_agrees_with_fcos():
    "Its classification and centre-ness losses are ours; its boxes' loss is not weighted by centre-ness."
    b = D.coco_like(2, 6, (160, 224), 4, seed=1)
    method = build('fcos', 4)
    losses = method(b.predictions(method.head), Objects.from_targets(b.targets), .5).losses
    flat, grads = lambda xs: torch.cat([x.flatten() for x in xs]), B.torchvision_fcos(b)()
    for maps, theirs in ((b.cls, grads[:5]), (b.third, grads[10:])):
        x, y = flat(torch.autograd.grad(sum(losses.values()), maps, retain_graph=True)), flat(theirs)
        assert y.norm() > 1e-3 and (x-y).norm() <= 1e-5*y.norm()

# ---- memory

def test_peak_is_that_of_the_call():
    torch.empty(30_000_000).fill_(1.)                                # 120 MB, gone again
    assert B.peak_memory(lambda: torch.empty(20_000_000).fill_(1.)) == pytest.approx(80, rel=.01)
    assert B.peak_memory(lambda: [torch.empty(1_000_000) for _ in range(5)]) == pytest.approx(20, rel=.01)
    assert B.peak_memory(lambda: None) == 0

def test_peers_are_refused_before_they_fill_the_memory():
    said = []
    rows = B.loss_rows(B.Case(20, 1, '96x160', 4), 'fcos', ('dense', 'torchvision'), 2e-4, said.append, rounds=1)
    assert [r['peer'] for r in rows] == ['torchvision fcos'] and 'dense fcos left out' in said[0] and 'limit' in said[0]

CROWD = lambda: D.draw_batch((400, 3), (320, 480), 4, torch.Generator().manual_seed(0), 60., .6)   # about 150,000 pairs

@pytest.mark.parametrize('name', ('ala', 'autoassign', 'dw'))
def test_chunks_change_no_result(name):
    b = CROWD()
    whole, cut = gradients(name, b, chunk=1<<30), gradients(name, b, chunk=1<<12)
    for x, y in zip(whole, cut):
        if x is not None: assert (x-y).norm() <= 1e-5*x.norm()

@pytest.mark.parametrize('name', ('ala', 'autoassign', 'dw'))
def test_chunks_bound_the_memory(name):
    b = D.draw_batch((700,), (480, 640), 2, torch.Generator().manual_seed(0), 140., .5)     # a million pairs
    def peak(chunk):
        method = build(name, 2, chunk=chunk); leaves = b.leaves(method.head)
        run = lambda: torch.autograd.grad(method(b.predictions(method.head), Objects.from_targets(b.targets), .5).total, leaves, allow_unused=True)
        run(); return B.peak_memory(run)
    assert peak(1<<14) < .7*peak(1<<30)

# ---- files

def row(**k): return dict(what='losses', **dataclasses.asdict(B.Case()), clock='cpu', method='dw', machine='m') | k

def test_rows_replace_their_like_and_nothing_else(tmp_path):
    f = tmp_path/'b.csv'
    B.write_rows(f, [row(ms=1.25, peer='dense dw'), row(method='o2f', command='a, "b"')])
    B.write_rows(f, [row(ms=2.5, peer='mmdet autoassign'), row(ms=7, peer='dense dw'), row(machine='n', peer='dense dw', ms=3)])
    got = B.read_rows(f)
    assert [(r['method'], r['peer'], r['ms'], r['machine']) for r in got] == [('dw', 'dense dw', 7, 'm'), ('o2f', None, None, 'm'),
        ('dw', 'mmdet autoassign', 2.5, 'm'), ('dw', 'dense dw', 3, 'n')]
    assert got[1]['command'] == 'a, "b"' and [p.name for p in tmp_path.iterdir()] == ['b.csv']
    B.write_rows(f, []); assert B.read_rows(f) == got                    # what is read is what was written
    f.write_text('x,y\n1,2\n')
    with pytest.raises(InputError, match='b.csv'): B.read_rows(f)
    with pytest.raises(InputError, match='b.csv'): B.write_rows(f, [])
    assert f.read_text() == 'x,y\n1,2\n'

def test_committed_rows_can_be_read():
    files = sorted((ROOT/'nbs'/'results').glob('bench_*.csv'))
    rows = B.read_rows(*files)
    assert {r['what'] for r in rows} >= {'step', 'losses', 'objects'}
    for r in rows:
        assert r['what'] in B.WHATS and r['ms'] > 0 and r['machine'] and 'torch' in r['versions']
        assert r['command'].startswith('python -m ala_nb.bench') and '/' not in r['command']
        assert r['ratio'] is None or r['ratio_low'] <= r['ratio'] <= r['ratio_high']
    B.table(rows)
    assert B.costs_table(rows, 'autoassign', 'mmdet autoassign').count('\n') > 3

# ---- the command

@pytest.mark.parametrize('what, more', [('losses', []), ('objects', ['--objects', '1', '7']), ('batch', ['--batch', '1', '3']),
    ('losses', ['--objects', 'xview', '--batch', '2']), ('step', ['--precision', 'float32', 'bf16', 'bf16_channels_last'])])
def test_subcommands(what, more, tmp_path):
    out = tmp_path/'deep'/'out'
    code, said, complaints = command(what, '--methods', 'fcos', 'o2f', *TINY, *more, '--out', out)
    assert code == 0, complaints
    rows = B.read_rows(out/f'bench_{what}.csv')
    assert {r['method'] for r in rows} == {'fcos', 'o2f'} and all(r['ms'] > 0 and r['mb'] > 0 and r['versions'] and r['what'] == what for r in rows)
    if what == 'step':
        assert all(r['share'] > 0 for r in rows)
        assert [(r['setting'], r['peer']) for r in rows[:3]] == [('tiny float32', None), ('tiny bf16', 'float32'), ('tiny bf16_channels_last', 'float32')]
    else: assert {'dense fcos', 'torchvision fcos', 'dense o2f'} <= {r['peer'] for r in rows} and all(r['ratio'] > 0 and r['pairs'] > 0 for r in rows)
    if what == 'objects': assert {r['objects'] for r in rows} == {1, 7} and len({r['pairs'] for r in rows}) == 2
    assert 'ms' in said and 'torch' in said and str(tmp_path) not in (out/f'bench_{what}.csv').read_text()
    command(what, '--methods', 'fcos', *TINY, *more, '--out', out)
    assert len(B.read_rows(out/f'bench_{what}.csv')) == len(rows) == sum(1 for _ in csv.reader((out/f'bench_{what}.csv').open())) - 1

def test_all_methods_several_measurements_and_no_peers(tmp_path):
    code, said, complaints = command('losses', 'step', *TINY, '--peers', '--out', tmp_path)
    assert code == 0, complaints
    for what in ('losses', 'step'): assert {r['method'] for r in B.read_rows(tmp_path/f'bench_{what}.csv')} == {*box_methods()}

@pytest.mark.parametrize('argv, names', [(['--image', '800'], '800'), (['--image', '0x800'], '0x800'), (['--methods', 'fcoss'], "'fcos'"),
    (['--objects', 'many'], 'many'), (['--objects', '-3'], '-3'), (['--batch', '0'], '0'), (['speed'], 'speed'),
    (['--device', 'abacus'], 'abacus'), (['--rounds', 'x'], 'rounds')])
def test_bad_input_is_one_line(argv, names, tmp_path):
    code, _, complaint = command(*argv, '--out', tmp_path/'o')
    assert code == 2 and complaint.startswith('error: ') and complaint.count('\n') == 1 and names in complaint
    assert not (tmp_path/'o').exists()

def test_out_must_be_a_folder_of_this_version(tmp_path):
    (tmp_path/'f').write_text('')
    assert command('--out', tmp_path/'f')[0] == 2
    (tmp_path/'bench_losses.csv').write_text('a,b\n')
    code, _, complaint = command('losses', '--out', tmp_path)
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

@pytest.mark.parametrize('name', box_methods())
def test_deterministic(name):
    b = D.draw_batch((60, 0, 9), (160, 224), 4, torch.Generator().manual_seed(0), 40., .8)
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
    for x, y in zip(*(torch.autograd.grad(v, b.cls) for v in results)):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('joint', [False, True])
def test_dense_term_is_one_graph(joint): compiled_dense(D.coco_like(2, 3, (96, 160), 5), joint, 'eager')

def test_dense_term_compiles():
    if not any(map(shutil.which, filter(None, (os.environ.get('CXX'), 'g++', 'clang++')))): pytest.skip("torch's compiler needs a C++ compiler and there is none")
    compiled_dense(D.coco_like(2, 3, (32, 48), 5, strides=(8,)), True, 'inductor')

@pytest.mark.cuda
def test_dense_term_never_waits_for_a_gpu():
    b = D.coco_like(2, 5, (96, 160), 4, device='cuda')
    preds, objects = b.predictions(HeadSpec(third='objectness')), Objects.from_targets(b.targets)
    pairs = inside_pairs(preds, objects); pairs.by_level, pairs.cell
    scale, ones = torch.full((), .5, device='cuda'), torch.ones((), device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        table = ClassTable(preds, pairs)
        total = table.negatives(preds.obj_logits, scale) + table.logits.sum()
        torch.autograd.grad(total, b.cls+b.third, ones)
    finally: torch.cuda.set_sync_debug_mode('default')
