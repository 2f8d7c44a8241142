"Days that go wrong: loaders that die, full and deleted disks, signals, two trainings in one folder, checkpoints that were edited."
import errno, json, math, os, re, shutil, signal, stat, subprocess, sys, threading, time
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from ala_nb import data as D, runs, train as T
from ala_nb.data import load_dataset, save_coco
from ala_nb.geometry import InputError
from test_train import TINY, assert_same_run, environment, fails, forked, weights, words

needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, 'save_pictures', lambda run: None)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that nothing disturbed."
    path = tmp_path_factory.mktemp('whole')/'run'
    mp = pytest.MonkeyPatch(); mp.setattr(T, 'save_pictures', lambda run: None)
    T.train(T.recipe(**TINY, out=str(path)), log=None); mp.undo()
    return path

def ended(pid, seconds=60):
    "The exit code of a forked process; negative for a signal. It must end by itself."
    for _ in range(seconds*100):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(.01)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    raise AssertionError(f'still running after {seconds} s: {Path("log").read_text()}')

def branch(work):
    "`work()` in a forked process with a group of its own, its output in `log`; its id."
    pid = os.fork()
    if pid: return pid
    code = 70
    try:
        os.setsid(); signal.signal(signal.SIGHUP, signal.SIG_DFL)              # where pytest runs under nohup it is ignored
        fd = os.open('log', os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.dup2(fd, 1); os.dup2(fd, 2)
        sys.stdout = sys.stderr = open('log', 'a', buffering=1)            # not those of pytest
        code = work()
    finally: sys.stdout.flush(); sys.stderr.flush(); D.multiprocessing.util._exit_function(); os._exit(code or 0)

def until(true, seconds=60):
    for _ in range(seconds*200):
        if true(): return
        time.sleep(.005)
    raise AssertionError('waited in vain')

def one_error(text):
    "The line of an error, which must be the only one."
    lines = [l for l in text.splitlines() if l.startswith('error: ')]
    assert len(lines) == 1 and 'Traceback' not in text, text
    return lines[0]

# ---- loading processes ------------------------------------------------------------------------------------------------------------

def can_mount():
    r = subprocess.run(['unshare', '-m', 'mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', '/mnt'], capture_output=True) if shutil.which('unshare') else None
    return r is not None and r.returncode == 0
needs_mount = pytest.mark.skipif(not can_mount(), reason='needs the right to mount a tmpfs')

def under(mount, *args, code=0, **knobs):
    "The command after some mounts that only it sees."
    line = ' '.join([mount, '&&', 'exec', sys.executable, '-m', 'ala_nb.train', *map(str, args), *words(**knobs)])
    r = subprocess.run(['unshare', '-m', 'sh', '-c', line], capture_output=True, text=True, timeout=120, env=environment())
    assert r.returncode == code, r.stdout + r.stderr
    return r.stdout + r.stderr

@needs_mount
def test_little_shared_memory(whole):
    "A batch is larger than all of /dev/shm: it goes another way."
    under('mount -t tmpfs -o size=256k tmpfs /dev/shm', **TINY, workers=2, out='run')
    assert_same_run(Path('run'), whole)

@needs_fork
def test_few_open_files(whole):
    def work():
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        return T.main(words(**TINY, workers=2, out='run'))
    assert ended(branch(work)) == 0, Path('log').read_text()
    assert_same_run(Path('run'), whole)

@needs_fork
@pytest.mark.parametrize('how,why', [(signal.SIGKILL, 'memory'), (signal.SIGBUS, '/dev/shm')])
def test_loading_process_is_killed(whole, how, why):
    def kill(run, losses):
        if run.step == 2: os.kill(run.loader.processes[0].pid, how)
    with pytest.raises(D.LoaderDied) as e: T.train(T.recipe(**TINY, workers=1, out='run'), log=None, on_step=kill)
    text = str(e.value)
    for word in (how.name, why, '--workers', '--resume run'): assert word in text
    assert '\n' not in text and 2 <= T.load_state('run')['step'] <= 6
    assert T.main(['--resume', 'run']) == 0
    assert_same_run(Path('run'), whole)

@needs_fork
def test_loading_process_is_killed_through_the_command(monkeypatch, capsys):
    real = T.note
    def note(run, *args): real(run, *args); run.step == 2 and os.kill(run.loader.processes[0].pid, signal.SIGKILL)
    monkeypatch.setattr(T, 'note', note)
    assert T.main(words(**TINY, workers=1, out='run')) == 1
    assert 'SIGKILL' in one_error(capsys.readouterr().err)

@needs_fork
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_to_the_whole_group(whole, monkeypatch, number):
    "As schedulers send them: to every process, and to some of them twice. The last epoch waits for them."
    real = D.Items.__getitem__
    def later(self, key):
        if self.train and key[0] == 2: until(Path('sent').exists)
        return real(self, key)
    monkeypatch.setattr(D.Items, '__getitem__', later)
    pid = branch(lambda: T.main(words(**TINY, workers=2, out='run')))
    until(lambda: len(runs.Table('run/metrics.csv').rows()) > 1)
    os.kill(pid, number); os.killpg(pid, number); Path('sent').touch()
    assert ended(pid) == 130
    text = Path('log').read_text().splitlines()
    assert text[-1].startswith('stopped at step') and '--resume run' in text[-1] and 'Traceback' not in '\n'.join(text)
    assert T.load_state('run')['step'] == int(re.search(r'step (\d+)', text[-1])[1]) >= 4
    assert T.main(['--resume', 'run']) == 0
    assert_same_run(Path('run'), whole)

@pytest.mark.parametrize('workers', [0, 1])
def test_first_ctrl_c_while_waiting_for_data(whole, monkeypatch, workers):
    real = D.Items.__getitem__
    def slow(self, key):
        if self.train and key[0] == 1: time.sleep(60)
        return real(self, key)
    monkeypatch.setattr(D.Items, '__getitem__', slow)
    run = T.start(T.recipe(**TINY, workers=workers, out='run'))
    def soon(run, losses):
        if run.step == 6: threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    t0 = time.monotonic()
    with pytest.raises(T.Interrupted, match='step 6'): T.train(run=run, log=None, on_step=soon)
    assert time.monotonic() - t0 < 30                                  # not the minute that a picture takes
    assert T.load_state('run')['step'] == 6
    monkeypatch.setattr(D.Items, '__getitem__', real)
    T.train(run=T.resume('run', log=None), log=None)
    assert_same_run(Path('run'), whole)

def test_a_bad_image_on_the_way_leaves_a_checkpoint():
    for split,n in ('train',6), ('val',2): save_coco(load_dataset('shapes', split, n=n), 'photos')
    run = T.start(T.recipe('photos', backbone='tiny', batch_size=1, epochs=2, eval_every=0, threads=1, out='run'))
    def spoil(run, losses):
        if run.step == 4: [p.write_bytes(p.read_bytes()[:300]) for p in Path('photos/train').iterdir()]
    with pytest.raises(InputError, match='photos'): T.train(run=run, log=None, on_step=spoil)
    assert T.load_state('run')['step'] == 4

# ---- one owner --------------------------------------------------------------------------------------------------------------------

@needs_fork
def test_second_training_is_refused(capsys):
    pid = branch(lambda: T.main(words(**{**TINY, 'epochs':200}, workers=1, out='run')))
    until(lambda: Path('run/state.pt').exists())
    fails(['--resume', 'run'], 2, 'run', 'another training', capsys=capsys)
    before = Path('run/config.json').read_bytes()
    fails(words(**TINY, seed=2, out='run'), 2, 'run', capsys=capsys)
    assert Path('run/config.json').read_bytes() == before
    os.kill(pid, signal.SIGKILL)                                   # its loading process lives on for some seconds
    os.waitpid(pid, 0)
    assert T.resume('run', log=None).step >= 0

@needs_fork
def test_two_at_once_take_two_folders():
    go = time.monotonic() + 1
    def work():
        while time.monotonic() < go: pass
        return T.main(words(**{**TINY, 'steps':1, 'eval_every':0}))
    pids = [branch(work) for _ in range(3)]
    assert [ended(p) for p in pids] == [0,0,0], Path('log').read_text()
    assert sorted(p.name for p in Path('runs').iterdir()) == ['shapes-autoassign', 'shapes-autoassign-2', 'shapes-autoassign-3']

@needs_fork
def test_two_at_once_with_one_name():
    go = time.monotonic() + 1
    def work(seed):
        while time.monotonic() < go: pass
        return T.main(words(**{**TINY, 'steps':1, 'eval_every':0}, seed=seed, out='run'))
    codes = [ended(p) for p in [branch(lambda s=s: work(s)) for s in range(3)]]
    assert sorted(codes) == [0,2,2], Path('log').read_text()
    assert json.loads(Path('run/config.json').read_text())['train']['seed'] == codes.index(0)

def test_no_locks_on_folders(monkeypatch):
    "NFS locks files that are open for writing, and no folders."
    import fcntl
    real = fcntl.flock
    def nfs(fd, how):
        if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(errno.EBADF, 'Bad file descriptor')
        real(fd, how)
    monkeypatch.setattr(fcntl, 'flock', nfs)
    Path('run').mkdir()
    with runs.owning('run'):
        def work():
            try: runs.own_folder('run'); return 0
            except InputError: return 2
        assert ended(branch(work)) == 2
    assert ended(branch(work)) == 0

# ---- the disk ---------------------------------------------------------------------------------------------------------------------

@needs_mount
def test_full_disk_and_read_only_disk(whole):
    Path('disk').mkdir()
    text = under('mount -t tmpfs -o size=12m tmpfs disk', code=1, **TINY, out='disk/run')
    assert 'No space left on device' in one_error(text) and 'make room' in text and '--resume disk/run' in text
    text = under('mount -t tmpfs tmpfs disk && mount -o remount,ro disk', code=2, **TINY, out='disk/run')
    assert 'disk' in one_error(text) and 'make room' not in text

def test_folder_is_deleted(capsys, monkeypatch):
    real = T.note
    monkeypatch.setattr(T, 'note', lambda run, *a: (real(run, *a), run.step == 2 and shutil.rmtree(run.path)))
    assert T.main(words(**TINY, out='run')) == 1
    text = one_error(capsys.readouterr().err)
    assert 'the folder is gone' in text and 'make room' not in text

def test_remedies_of_every_writer(tmp_path):
    "Python, torch and safetensors, each on a real file system without room, where there is one."
    if not os.path.exists('/dev/full'): pytest.skip('needs /dev/full')
    from safetensors.torch import save_file
    for write in (lambda p: Path(p).write_text('x'), lambda p: runs.save_tensors(dict(w=torch.zeros(9)), p)):
        with pytest.raises(OSError, match='No space left.*make room'), runs.writing(tmp_path/'a.bin'): write('/dev/full')
    with pytest.raises(OSError, match='No such file.*the folder is gone'), runs.writing(tmp_path/'a.bin'):
        save_file(dict(w=torch.zeros(9)), tmp_path/'no'/'a.safetensors')

# ---- files that are whole but wrong -----------------------------------------------------------------------------------------------

def copied(whole): shutil.copytree(whole, 'run'); return Path('run')

def put(d, path, value):
    for k in path[:-1]: d = d[k]
    d[path[-1]] = value(d.get(path[-1]) if isinstance(d, dict) else d[path[-1]]) if callable(value) else value

NAN = float('nan')
FIRST = 'body.stage0.0.0.weight'
STATES = {
    'step -1': (['step'], -1), 'step text': (['step'], '7'), 'step past the end': (['step'], 10**6), 'step a tensor': (['step'], torch.tensor(3)),
    'pending': (['pending'], 'yes'), 'lr': (['lr'], NAN), 'seconds': (['seconds'], -1.), 'best': (['best'], dict(AP='high')), 'last': (['last'], 3),
    'sums': (['sums'], dict(loss='x')), 'rng': (['rng'], dict(python=1)), 'rng.torch': (['rng','torch'], torch.zeros(3)),
    'model': (['model'], []), 'shape': (['model',FIRST], torch.zeros(3)), 'dtype': (['model',FIRST], lambda w: w.double()),
    'nan': (['model',FIRST], lambda w: w*NAN), 'sparse': (['model',FIRST], lambda w: w.to_sparse()), 'extra': (['model','foo'], torch.zeros(1)),
    'optimizer': (['optimizer'], None), 'groups': (['optimizer','param_groups'], []), 'decay': (['optimizer','param_groups'], lambda g: [dict(g[0], weight_decay=9.), g[1]]),
    'slot': (['optimizer','state',0,'exp_avg'], torch.zeros(2)), 'slot nan': (['optimizer','state',0,'exp_avg_sq'], lambda v: v*NAN),
    'index': (['optimizer','state',10**6], {}), 'ema': (['ema'], {}), 'scaler': (['scaler'], dict(scale=1.)), 'made': (['made'], None),
    'made.train': (['made','train','method'], 'dw')}

@pytest.mark.parametrize('case', STATES)
def test_edited_checkpoint(whole, case, capsys):
    run, (path, value) = copied(whole), STATES[case]
    state = runs.read_state(run/'state.pt'); put(state, path, value)
    torch.save(state, run/'state.pt')
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    fails(['--resume', 'run'], 2, 'run', str(path[0]) if path[0] != 'made' else 'checkpoint', capsys=capsys)
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}

@pytest.mark.parametrize('key', ['step','model','optimizer','rng','best','made'])
def test_checkpoint_without_a_part(whole, key, capsys):
    run = copied(whole); state = runs.read_state(run/'state.pt'); del state[key]
    torch.save(state, run/'state.pt')
    fails(['--resume', 'run'], 2, 'state.pt', capsys=capsys)

def test_checkpoint_that_is_no_dict(whole, capsys):
    run = copied(whole); torch.save([1,2], run/'state.pt')
    fails(['--resume', 'run'], 2, 'state.pt', capsys=capsys)

def nested(n): return json.loads('['*n + ']'*n)
CONFIGS = {
    'no detector': (['detector'], None, 'detector'), 'no train': (['train'], None, 'train'), 'classes': (['classes'], [1,2], 'classes'),
    'classes nested': (['classes'], [['a']], 'classes'), 'images': (['images'], 'many', 'images'),
    'channels': (['detector','channels'], 10**9, 'detector.channels'), 'channels a list': (['detector','channels'], [[[1]]], 'detector.channels'),
    'strides': (['detector','strides'], nested(50), 'detector.strides'), 'backbone': (['detector','backbone'], 'resnet50', 'detector.backbone'),
    'method': (['train','method'], 'dw', 'train.method'), 'its method': (['detector','method'], 'atss', 'detector.method'),
    'lr': (['train','lr'], .5, 'train.lr'), 'seed': (['train','seed'], 5, 'train.seed'), 'lr text': (['train','lr'], 'fast', 'lr'),
    'unknown': (['train','foo'], 1, 'foo'), 'options': (['train','method_options'], dict(ranges=nested(20)), 'train.method_options')}

@pytest.mark.parametrize('case', CONFIGS)
def test_edited_config(whole, case, capsys):
    run, (path, value, name) = copied(whole), CONFIGS[case]
    config = json.loads((run/'config.json').read_text()); put(config, path, value)
    (run/'config.json').write_text(json.dumps(config))
    state = (run/'state.pt').read_bytes()
    fails(['--resume', 'run'], 2, 'config.json' if '.' in name or case[:2] == 'no' else name, name, capsys=capsys)
    assert (run/'state.pt').read_bytes() == state

@pytest.mark.parametrize('key,value', [('channels', 10**9), ('strides', nested(300)), ('head_convs', 10**7), ('num_classes', 10**12), ('method', 'dw'),
    ('backbone', 'resnet50'), ('mean', ['a']), ('norm', ['x']), ('method_options', dict(ranges=nested(99))), ('pad_to', 'x'), ('zz', 1)])
def test_edited_config_in_other_commands(whole, key, value, capsys):
    "Before a network of a billion channels is made."
    from ala_nb import evaluate
    run = copied(whole)
    config = json.loads((run/'config.json').read_text()); config['detector'][key] = value
    (run/'config.json').write_text(json.dumps(config))
    assert evaluate.main(['run']) == 2
    line = one_error(capsys.readouterr().err)
    assert key in line and len(line) < 500

@pytest.mark.parametrize('text', ['', '[]', '3', 'null', '{"train":', '['*100000, '{"train":{}}'])
def test_config_that_is_none(whole, text, capsys):
    run = copied(whole); (run/'config.json').write_text(text)
    fails(['--resume', 'run'], 2, 'config.json', capsys=capsys)

def places(d, at=()):
    "Every path in nested dicts and lists."
    yield at
    for k in (d if isinstance(d, dict) else range(min(len(d), 3)) if isinstance(d, (list,tuple)) else ()): yield from places(d[k], (*at, k))

ODD = [None, True, -1, 0, 10**30, NAN, math.inf, 'x', '', [], {}, [[[]]], {'a':{}}, 'fcos', torch.zeros(0), torch.full((2,), NAN), torch.zeros((), dtype=torch.int8)]

@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_edit_resumes_or_is_one_line(whole, tmp_path_factory, data):
    run = tmp_path_factory.mktemp('any')/'run'; shutil.copytree(whole, run)
    which = data.draw(st.sampled_from(['state','config']))
    if which == 'state':
        state = runs.read_state(run/'state.pt'); path = data.draw(st.sampled_from(sorted(places(state), key=str)[1:]))
        value = data.draw(st.sampled_from(ODD))
        parent = state
        for k in path[:-1]: parent = parent[k]
        if isinstance(parent, tuple): return
        parent[path[-1]] = value; torch.save(state, run/'state.pt')
    else:
        config = json.loads((run/'config.json').read_text()); path = data.draw(st.sampled_from(sorted(places(config), key=str)[1:]))
        put(config, path, data.draw(st.sampled_from([v for v in ODD if not torch.is_tensor(v)]))) ; (run/'config.json').write_text(json.dumps(config))
    try: T.resume(run, log=None)
    except InputError as e: assert '\n' not in str(e) and len(str(e)) < 400, str(e)
    finally: runs.free_folder(run); shutil.rmtree(run)

# ---- small things -----------------------------------------------------------------------------------------------------------------

def test_one_image_with_a_map_of_one_cell(capsys):
    for split,n in ('train',3), ('val',1): save_coco(load_dataset('shapes', split, n=n), 'photos')
    fails(words(data='photos', size=32, max_size=32, batch_size=1, epochs=1, threads=1, out='run'), 2, 'batch normalisation', '--size', capsys=capsys)
    assert T.main(words(data='photos', size=32, max_size=32, batch_size=1, epochs=1, threads=1, eval_every=0, out='other') +
                  ['--detector_options', 'norm=group']) == 0

@pytest.mark.parametrize('odd', [lambda w: w.to_sparse(), lambda w: torch.empty_like(w, device='meta'), lambda w: w.to(torch.complex64)])
def test_odd_tensors_in_weights(odd, capsys):
    state = T.make_model(T.recipe(), 8).state_dict()
    torch.save(dict(state, **{FIRST: odd(state[FIRST])}), 'odd.pth')
    fails([*words(**TINY, out='run'), '--weights', 'odd.pth'], 2, 'odd.pth', FIRST, capsys=capsys)
    assert not Path('run').exists()

def test_float16_on_a_cpu_is_said():
    lines = []
    T.train(T.recipe(train_images=8, batch_size=4, steps=1, eval_every=0, threads=1, amp='fp16', device='cpu', out='run'), log=lines.append)
    assert any('float16 is slow' in l for l in lines)
