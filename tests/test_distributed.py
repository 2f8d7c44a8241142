"Several processes train as one would: gloo on a CPU, two or three processes, tiny networks."
import json, math, os, re, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from ala_nb import processes, runs, train as T
from ala_nb.data import load_dataset, save_coco
from ala_nb.geometry import InputError
from test_train import TINY, environment, fails, rows, weights, words
from test_days import branch, ended, needs_fork, one_error, until

pytestmark = needs_fork

@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, 'save_pictures', lambda run: None)

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def started(work, n=2, **extra):
    "`work()` in n processes that are told what torchrun tells; their ids."
    port = free_port()
    def one(r):
        os.environ.update(RANK=str(r), WORLD_SIZE=str(n), LOCAL_RANK=str(r), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), **extra)
        return work()
    return [branch(lambda r=r: one(r)) for r in range(n)]

def together(work, n=2, **extra):
    "Their exit codes."
    return [ended(p) for p in started(work, n, **extra)]

def in_float64(mp):
    "Network and images in double precision: rounding then stays below what is asked for."
    make, again, move = T.make_model, T.model_of, T.to_device
    mp.setattr(T, 'model_of', lambda *a: again(*a).double())
    mp.setattr(T, 'make_model', lambda *a: make(*a).double())
    def moved(images, targets, device):
        images, targets = move(images, targets, device)
        return [i.double() for i in images], targets
    mp.setattr(T, 'to_device', moved)
    mp.setattr(T, 'dry_run', lambda model: None)

def assert_close(a, b, within=1e-9):
    A, B = weights(Path(a)), weights(Path(b))
    assert A.keys() == B.keys()
    for k in A:
        if A[k].is_floating_point(): torch.testing.assert_close(A[k], B[k], rtol=within, atol=within, msg=lambda m: f'{k}: {m}')

def losses_of(path): return [[float(v) for k,v in r.items() if k.startswith('loss')] for r in rows(Path(path))]

TWENTY = dict(amp='off', train_images=13, batch_size=4, steps=20, eval_every=0, log_every=1, threads=1, seed=3)

@pytest.mark.parametrize('knobs', [dict(method='fcos'), dict(method='autoassign'), dict(method='dw', accumulate=2),
                                   dict(method='poto', method_options=['max_filter=True', 'aux=atss']), dict(method='gflv2'), dict(method='vfnet'),
                                   dict(method='tood', method_options=['warmup=0.5']), dict(method='retina'), dict(method='hybrid', method_options=['share=0.5']),
                                   dict(method='condinst', method_options=['mask_channels=8', 'mask_norm=group', 'masks_per_image=8'])])
def test_two_processes_train_as_one(knobs, monkeypatch):
    "20 steps; 13 images in batches of 4, so that the last one has a single image and a process without any."
    in_float64(monkeypatch)
    run = lambda out: T.main(words(**{**TWENTY, **knobs}, out=out))
    assert run('one') == 0
    assert together(lambda: run('two')) == [0,0], Path('log').read_text()
    assert_close('one', 'two', 1e-7 if knobs['method'] in ('gflv2', 'vfnet') else 1e-9)      # as mmdetection: each process adds 1.2e-7 to its share of a divisor
    for a,b in zip(losses_of('one'), losses_of('two'), strict=True): assert a == pytest.approx(b, rel=1e-5)      # six digits in the table

def test_a_process_without_objects(monkeypatch):
    "Half of the images are empty, in a way that the second process often has none but such."
    save_coco(load_dataset('shapes', 'train', n=9), 'photos')
    file = Path('photos/annotations/instances_train.json'); d = json.loads(file.read_text())
    d['annotations'] = [a for a in d['annotations'] if a['image_id'] in (d['images'][0]['id'], d['images'][4]['id'])]
    file.write_text(json.dumps(d))
    in_float64(monkeypatch)
    run = lambda out: T.main(words(data='photos', backbone='tiny', size=64, max_size=64, batch_size=3, steps=20, optimizer='adamw', lr=.003, eval_every=0, threads=1, out=out))
    assert run('one') == 0 and together(lambda: run('two')) == [0,0], Path('log').read_text()
    assert_close('one', 'two')

def test_evaluation_in_shares_is_that_of_one(monkeypatch):
    "Same weights, 11 images over three processes: the same numbers to the last bit, and every image once."
    knobs = dict(TINY, train_images=8, val_images=11, steps=1, batch_size=4, epochs=1)
    T.train(T.recipe(**{**knobs, 'steps':30, 'eval_every':0}, out='start'), log=None)
    base = words(**{**knobs, 'lr':1e-20, 'warmup':0, 'weight_decay':0., 'eval_every':1}, weights='start/last.safetensors', score_threshold=.001)
    assert T.main([*base, '--out', 'one']) == 0
    assert together(lambda: T.main([*base, '--out', 'three']), 3) == [0,0,0], Path('log').read_text()
    one, three = (runs.read_state(Path(p)/'state.pt')['last'] for p in ('one','three'))
    assert one == three and one['AP50'] > 0

def test_resume_on_another_number_of_processes(monkeypatch):
    in_float64(monkeypatch)
    args = words(**TWENTY)
    assert T.main([*args, '--out', 'whole']) == 0
    def stop():
        real = T.note
        def note(run, *a):
            real(run, *a)
            if run.step == 7 and processes.rank() == 1: os.kill(os.getpid(), signal.SIGTERM)          # only one of them is asked
        T.note = note
        return T.main([*args, '--out', 'parts'])
    assert together(stop) == [130, 130]
    text = Path('log').read_text()
    assert text.count('stopped at step 7 of 20; go on with: python -m ala_nb.train --resume parts') == 1 and 'Traceback' not in text
    assert T.load_state('parts')['step'] == 7
    assert T.main(['--resume', 'parts']) == 0
    assert_close('parts', 'whole')

def test_numbers_that_are_none_stop_all():
    def work():
        real = T.share
        def poisoned(run, images, targets):
            images, targets, counts = real(run, images, targets)
            return ([i*math.nan for i in images] if run.step == 3 and processes.rank() == 1 else images), targets, counts
        T.share = poisoned
        return T.main(words(**TWENTY, out='run'))
    assert together(work) == [3,3]
    assert re.search(r'step 4: loss\w* is nan, images shapes/train/', one_error(Path('log').read_text()))

def test_a_bad_image_in_one_process_is_said():
    "By the process that met it; the other one ends as well, with a line and not with a traceback."
    save_coco(load_dataset('shapes', 'train', n=8), 'photos')
    def work():
        real = T.note
        def note(run, *a):
            real(run, *a)
            if run.step == 2 and processes.rank() == 1: run.loader.dataset.ds.files[:] = [Path('gone.png')]*8
        T.note = note
        return T.main(words(data='photos', backbone='tiny', batch_size=2, epochs=4, eval_every=0, threads=1, out='run'))
    assert sorted(together(work)) == [1,2], Path('log').read_text()
    text = Path('log').read_text()
    assert 'Traceback' not in text and 'gone.png' in text and 'another process of this training has ended' in text, text

def test_refusals(monkeypatch, capsys):
    assert together(lambda: T.main(words(**{**TWENTY, 'batch_size':1}, out='run'))) == [2,2]
    assert '--batch_size 1' in one_error(Path('log').read_text()) and not Path('run').exists()
    Path('log').unlink()
    assert together(lambda: T.main(words(**TWENTY, device='cuda:1', out='run'))) == [2,2] and '--device' in one_error(Path('log').read_text())
    Path('log').unlink()
    assert together(lambda: T.main(words(**TWENTY)), TORCHELASTIC_MAX_RESTARTS='2') == [2,2] and '--out' in one_error(Path('log').read_text())
    assert T.main(words(**{**TWENTY, 'steps':1}, out='taken')) == 0; capsys.readouterr()
    Path('log').unlink()
    assert together(lambda: T.main(words(**TWENTY, out='taken'))) == [2,2] and 'already holds a run' in one_error(Path('log').read_text())
    for given,what in ((dict(WORLD_SIZE='2'), 'RANK'), (dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0'), 'MASTER_ADDR'), (dict(WORLD_SIZE='x'), 'WORLD_SIZE')):
        for k in processes.TOLD: monkeypatch.delenv(k, raising=False)
        for k,v in given.items(): monkeypatch.setenv(k, v)
        fails(words(**TWENTY, out='run'), 2, what, 'torchrun', capsys=capsys)

def test_killed_process_is_restarted_by_torchrun(tmp_path):
    "The real thing: torchrun, one process killed, both started again, the same end as with one process that nobody disturbs."
    knobs = dict(TWENTY, steps=40, checkpoint_seconds=.001)
    assert T.main(words(**knobs, out='whole')) == 0
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--max_restarts', '2', '-m', 'ala_nb.train']
    p = subprocess.Popen([*torchrun, *words(**knobs, out='run')], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: len(runs.Table('run/metrics.csv').rows()) > 5, 90)
        children = subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        text, _ = p.communicate(timeout=120)
    finally: p.kill()
    assert p.returncode == 0 and 'goes on at step' in text, text
    assert T.load_state('run')['step'] == 40
    assert [r['step'] for r in rows(Path('run'))] == [r['step'] for r in rows(Path('whole'))]
    assert losses_of('run')[:5] == [pytest.approx(l, rel=1e-3) for l in losses_of('whole')[:5]]
