"The command `python -m ala_nb.train`: whole runs, bad input, and runs that are killed."
import csv, dataclasses, json, math, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from ala_nb import train as T
from ala_nb.data import load_dataset, report, save_coco
from ala_nb.geometry import InputError
from ala_nb.train import Table

PICTURES = T.save_pictures

TINY = dict(train_images=24, val_images=6, batch_size=4, epochs=3, eval_every=1, log_every=2, threads=1)

def words(**knobs): return [w for k,v in knobs.items() for w in (f'--{k}', *map(str, v if isinstance(v, (list,tuple)) else [v]))]

def environment():
    root = str(Path(__file__).resolve().parent.parent)
    return dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH','')]))

def command(*args, cwd):
    "A process that runs the command."
    return subprocess.Popen([sys.executable, '-m', 'ala_nb.train', *map(str, args)], cwd=cwd, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err

def weights(path): return torch.load(path/'state.pt', weights_only=True)['model']

def rows(path): # without the columns that depend on the machine
    with open(path/'metrics.csv', newline='') as f: return [{k: v for k,v in r.items() if k not in T.TIMES} for r in csv.DictReader(f)]

def assert_same_run(a, b):
    "Bit for bit: weights, best and last files, and the table."
    for read in weights, lambda p: load_file(p/'best.safetensors'), lambda p: load_file(p/'last.safetensors'):
        A, B = read(a), read(b)
        assert A.keys() == B.keys() and all(torch.equal(A[k], B[k]) for k in A)
    assert rows(a) == rows(b)

@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(T, 'save_pictures', lambda run: None)       # the runs through the command draw them

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "A whole run of the tiny recipe, through the command."
    path = tmp_path_factory.mktemp('reference')
    return path/'run', *finish(command(*words(**TINY, out='run'), cwd=path))

# ---- a whole run ------------------------------------------------------------------------------------------------------------------

def test_run_folder(reference):
    path, code, out, err = reference
    assert code == 0, err
    for f in ('config.json', 'metrics.csv', 'best.safetensors', 'last.safetensors', 'state.pt', 'curves.png', 'predictions.png',
              'assignment.png'):
        assert (path/f).stat().st_size > 0, f
    assert not list(path.glob('.*'))                                              # no temporary file is left
    assert 'IoU .50' in out and str(path.name) in out and 'AP ' in out

def test_config_is_complete(reference):
    from ala_nb.detector import load_detector
    path = reference[0]
    stored = json.loads((path/'config.json').read_text())
    c = T.as_config(stored['train'])
    assert dataclasses.asdict(c).keys() == stored['train'].keys() and c.train_images == 24
    for which in 'best', 'last':
        model = load_detector(path, which)
        assert not model.training
    saved, have = weights(path), model.state_dict()
    assert all(torch.equal(have[k], saved[k]) for k in saved)

def test_table(reference):
    found = rows(reference[0])
    assert [int(r['step']) for r in found] == [2,4,6,8,10,12,14,16,18]
    assert [bool(r['AP']) for r in found] == [s % 6 == 0 for s in range(2,20,2)]
    losses = [k for k in found[0] if k not in ('step','epoch','lr','loss','grad_norm',*T.METRICS)]
    assert losses
    for r in found: assert abs(sum(float(r[k]) for k in losses) - float(r['loss'])) < 1e-3*float(r['loss'])

def test_progress_runs_from_0_to_1():
    run, seen = T.start(T.recipe(**{**TINY, 'epochs':2, 'eval_every':0}, out='run')), []
    run.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw['progress']), with_kwargs=True)
    T.train(run=run, log=None)
    assert seen[0] == 0 and seen[-1] == 1 and len(seen) == 12
    assert all(math.isclose(b - a, 1/11) for a,b in zip(seen, seen[1:]))
    assert (Path('run')/'best.safetensors').exists() and run.best is None        # nothing to compare: the last weights

@pytest.mark.parametrize('knobs', [
    dict(accumulate=4), dict(ema=.9), dict(amp='bf16'), dict(channels_last=True), dict(optimizer='sgd', schedule='multistep'),
    dict(workers=1), dict(scales=[96,112], size=128, photometric=True), dict(clip=0., deterministic=True), dict(method='o2f')])
def test_knobs_train(knobs):
    try: run = T.train(T.recipe(**{**TINY, 'epochs':1, **knobs}, out='run'), log=None)
    finally: torch.use_deterministic_algorithms(False)
    assert run.step == run.total == math.ceil(6/knobs.get('accumulate', 1)) and math.isfinite(run.best['AP'])
    assert all(torch.isfinite(v).all() for v in run.weights.state_dict().values())

@pytest.mark.parametrize('data,device,asked,processes,n', [
    ('shapes', 'cpu', -1, 1, 0), ('shapes', 'cuda', -1, 1, 0), ('coco', 'cpu', -1, 1, 0), ('coco', 'cuda', -1, 1, 8),
    ('coco', 'cuda', -1, 4, 4), ('coco', 'cuda', -1, 1000, 1), ('coco', 'cuda', 0, 1, 0), ('coco', 'cpu', 3, 1, 3),
    ('coco', 'cuda', 12, 4, 12)])
def test_who_loads(monkeypatch, data, device, asked, processes, n):
    "With a GPU the cores, 16 here, have time to load a folder's images; the processes of a machine share them."
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(16)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    assert T.loading(asked, torch.device(device), data) == n

def test_workers_change_nothing():
    for n in 0, 2: T.train(T.recipe(**{**TINY, 'epochs':1}, workers=n, out=f'run{n}'), log=None)
    assert_same_run(Path('run0'), Path('run2'))

def test_folders_are_numbered():
    for _ in range(2): T.train(T.recipe(**{**TINY, 'steps':1, 'eval_every':0}), log=None)
    assert sorted(p.name for p in Path('runs').iterdir()) == ['shapes-autoassign', 'shapes-autoassign-2']

def test_settings_of_another_run(reference):
    config, run, _ = T.parse(['--config', str(reference[0]), '--lr', '0.5'])
    assert (config.train_images, config.lr, config.out, run) == (24, .5, '', None)
    other = json.loads((reference[0]/'config.json').read_text())
    other['train'] |= dict(method='fcos', method_options=dict(ranges=[24,48])); Path('config.json').write_text(json.dumps(other))
    assert T.parse(['--config', 'config.json'])[0].method_options == dict(ranges=(24,48))
    assert T.parse(['--config', 'config.json', '--method', 'o2f'])[0].method_options == {}    # not those of another method

@pytest.fixture
def folder():
    "A few shapes as a COCO folder."
    for split,n in ('train',6), ('val',2): save_coco(load_dataset('shapes', split, n=n), 'photos')
    return Path('photos')

def test_own_folder(folder, capsys):
    few = dict(epochs=1, size=64, max_size=80, batch_size=2, threads=1)
    assert T.main(words(data=folder, **few, out='run')) == 0, capsys.readouterr().err
    stored = json.loads(Path('run/config.json').read_text())
    assert stored['train']['data'] == str(folder.absolute()) and stored['detector']['backbone'] == 'resnet18'
    assert len(rows(Path('run'))) == 1
    assert T.main(words(data=folder, **few, weights='run/last.safetensors', steps=1, eval_every=0, out='tuned')) == 0
    os.rename(folder, 'elsewhere')
    fails(['--resume', 'tuned'], 2, 'photos', capsys=capsys)

def edited(folder, split, change):
    "The folder's annotations of a split, changed in place."
    file = folder/'annotations'/f'instances_{split}.json'; found = json.loads(file.read_text())
    change(found); file.write_text(json.dumps(found))

def test_validation_without_objects(folder, monkeypatch, capsys):
    monkeypatch.setattr(T, 'save_pictures', PICTURES)
    edited(folder, 'val', lambda d: d.update(annotations=[]))
    few = dict(data=folder, backbone='tiny', epochs=2, size=64, max_size=80, batch_size=2, threads=1)
    assert T.main(words(**few, out='run')) == 0 and 'nothing is measured' in capsys.readouterr().out
    assert {'curves.png', 'predictions.png', 'assignment.png'} <= {p.name for p in Path('run').iterdir()}
    best, last = load_file('run/best.safetensors'), load_file('run/last.safetensors')
    assert all(torch.equal(v, last[k]) for k,v in best.items())                       # nothing to compare: the newest
    assert T.main(['--resume', 'run']) == 0

def test_training_images_without_objects(folder, capsys):
    def empty(d): first = d['images'][0]['id']; d['annotations'] = [a for a in d['annotations'] if a['image_id'] != first]
    edited(folder, 'train', empty)
    few = words(data=folder, backbone='tiny', epochs=1, batch_size=2, eval_every=0, out='run')
    fails([*few, '--train_images', 1], 2, '--train_images 1', 'no object', capsys=capsys)
    assert not Path('run').exists()
    assert T.main([*few, '--train_images', '2']) == 0
    ds = load_dataset(folder, 'train'); cut = T.first(ds, 2)
    assert (cut.report['images'], cut.report['objects'], cut.report['empty']) == (2, len(ds.objects(1)['labels']), 1)
    assert ds.report['images'] == 6

def test_images_without_objects_are_left_out(folder):
    def empty(d): few = {i['id'] for i in d['images'][:2]}; d['annotations'] = [a for a in d['annotations'] if a['image_id'] not in few]
    edited(folder, 'train', empty)
    seen, lines = [], []
    c = T.recipe(folder, backbone='tiny', epochs=2, batch_size=3, eval_every=0, filter_empty=True, threads=1, out='run')
    run = T.start(c)
    run.model.register_forward_pre_hook(lambda m, args: seen.extend(t['image_id'] for t in args[1]))
    T.train(run=run, log=lines.append)
    assert sorted(seen) == sorted([i for i in run.train_set.ids[2:] for _ in range(2)]) and run.total == 4
    assert '4 images to train on' in lines[0]

def test_weights_of_the_newest_epochs_are_kept(tmp_path):
    run = T.train(T.recipe(**{**TINY, 'epochs':4, 'eval_every':0}, keep=2, out='run'), log=None)
    assert sorted(p.name for p in run.path.glob('epoch-*')) == ['epoch-3.safetensors', 'epoch-4.safetensors']
    a, b = load_file(run.path/'epoch-4.safetensors'), load_file(run.path/'last.safetensors')
    assert all(torch.equal(v, b[k]) for k,v in a.items()) and any(not torch.equal(v, b[k]) for k,v in load_file(run.path/'epoch-3.safetensors').items())

def test_evaluation_with_nms_and_without():
    run = T.train(T.recipe(**{**TINY, 'steps':40, 'epochs':1, 'eval_every':100}, score_threshold=.01, eval_both=True, out='run'), log=None)
    last = run.table.rows()[-1]
    assert last['AP_nms'] == pytest.approx(last['AP'], rel=1e-5) and 'AP_no_nms' in last and set(run.last) >= {'AP_nms', 'AP_no_nms'}
    one = T.train(T.recipe(**{**TINY, 'steps':2, 'epochs':1, 'eval_every':100}, method='o2f', eval_both=True, out='one'), log=None)
    assert one.last['AP_no_nms'] == one.last['AP']

@pytest.mark.parametrize('fast,amp,last', [(True,'bf16','true'), (False,'off','false')])
def test_precision_is_chosen_and_stored(folder, monkeypatch, fast, amp, last):
    monkeypatch.setattr(T, 'fast_bf16', lambda device: fast)
    run = T.start(T.recipe(folder, size=96, max_size=128, batch_size=2, epochs=1, threads=1, out='run'))
    assert (run.config.amp, run.config.channels_last) == (amp, last) == tuple(T.read_run('run')['train'].__getattribute__(k) for k in ('amp','channels_last'))
    monkeypatch.setattr(T, 'fast_bf16', lambda device: not fast)
    assert T.resume('run', log=None).config.amp == amp                              # what began in one precision goes on in it
    tiny = T.settle_precision(T.recipe(amp='auto', channels_last='auto', size=128), torch.device('cpu'))
    assert (tiny.amp, tiny.channels_last) == ('off' if fast else 'bf16', 'false')
    small = T.settle_precision(T.recipe('photos', size=64), torch.device('cpu'))
    assert (small.amp, small.channels_last) == ('off', 'false')      # a map of one cell: wrong gradients

def test_settings_from_toml(capsys):
    toml = lambda text: Path('mine.toml').write_text(text)
    toml('method = "dw"\nlr = 0.5\nscales = [96, 112]\nchannels_last = true\n[method_options]\nvariant = "paper"\n')
    c = T.parse(['--config', 'mine.toml', '--lr', '0.25'])[0]
    assert (c.method, c.lr, c.scales, c.channels_last, c.method_options) == ('dw', .25, (96,112), 'true', dict(variant='paper'))
    for text,words_ in (('metod = "dw"', ['metod','method']), ('lr = "fast"', ["mine.toml: lr must be a number, not 'fast'"]), ('lr = ', ['mine.toml']), ('lr = 1\nlr = 2', ['mine.toml']),
                        ('preset = "dw_r50"', ['mine.toml: preset','dw_r50_1x']), ('data = ["a", 3]', ['mine.toml: data']), ('steps = true', ['mine.toml: steps must be a whole number, not true'])):
        toml(text); fails(['--config', 'mine.toml'], 2, *words_, capsys=capsys)
    fails(['--config', 'no.toml'], 2, 'no.toml', capsys=capsys)
    Path('mine.txt').touch(); fails(['--config', 'mine.txt'], 2, 'ends in .toml', capsys=capsys)

def test_toml_on_a_preset(capsys):
    "The preset, over it the file, over both what is given; `--show` prints the sum."
    def shown(*argv):
        assert T.main([*argv, '--show']) == 0
        return json.loads((out := capsys.readouterr().out)[out.index('{\n'):])
    Path('mine.toml').write_text('\ufeffpreset = "dw_r50_1x"\nlr = 0.5\nbatch_size = 4\ndata = ["a", "b"]\n[detector_options]\nchannels = 64\n', encoding='utf-8')
    c = shown('--config', 'mine.toml', '--batch_size', '2')
    assert (c['method'], c['lr'], c['batch_size'], c['data'], c['train_split']) == ('dw', .5, 2, os.pathsep.join('ab'), 'train2017')
    assert c['detector_options'] == dict(norm='eval', trainable_layers=3, channels=64)
    assert shown('--config', 'mine.toml', '--preset', 'o2f_r50_1x')['method'] == 'o2f' and T.parse(['--config', 'mine.toml'])[0].lr == .5

def test_validation_without_objects_is_refused(folder, capsys):
    file = Path(folder)/'annotations'/'instances_val.json'; d = json.loads(file.read_text()); del d['annotations']
    (file.parent/'image_info_test.json').write_text(json.dumps(d)); (Path(folder)/'test').symlink_to('val')
    argv = words(data=folder, backbone='tiny', steps=1, size=64, max_size=80, batch_size=2, threads=1, val_split='test', out='run')
    fails(argv, 2, '--val_split test', '--eval_every 0', capsys=capsys)
    assert not Path('run').exists() and T.main([*argv, '--eval_every', '0']) == 0
    assert 'list without annotations' in str(report(load_dataset(folder, 'test'))) and 'background' not in str(report(load_dataset(folder, 'test')))

# ---- bad input --------------------------------------------------------------------------------------------------------------------

def fails(args, code, *texts, capsys):
    assert T.main([str(a) for a in args]) == code
    out, err = capsys.readouterr()
    assert err.startswith('error: ') and err.count('\n') == 1, err
    for t in texts: assert t in err, err

@pytest.mark.parametrize('args,texts', [
    (['--data','nowhere'], ['nowhere']),
    (['--method','fkos'], ['fkos','fcos']),
    (['--backbone','resnet51'], ['resnet51','resnet50']),
    (['--weights','nowhere.pth'], ['nowhere.pth']),
    (['--train_split','trian'], ['trian','train']),
    (['--val_split','vol'], ['vol','--eval_every']),
    (['--learning_rate','1'], ['learning_rate','did you mean lr']),
    (['--batchsize','1'], ['did you mean batch_size']),
    (['--lr'], ['--lr']), (['--lr','fast'], ['--lr','fast']), (['--lr','-1'], ['lr','above 0']), (['--lr','nan'], ['lr','finite']),
    (['--epochs','0'], ['epochs']), (['--epochs','1.5'], ['epochs']), (['--optimizer','adam'], ['adamw']),
    (['--amp','fp8'], ['amp']),
    (['--milestones','.5','2'], ['milestones','below 1']), (['--milestones','.9','.1'], ['milestones must rise']), (['--method','poto','--method_options','aux=true'], ['aux','atss']), (['--compile','perhaps'], ['compile']), (['word'], ['word']),
    (['--method_options','K'], ['key=value']), (['--method_options','kk=7'], ['kk']), (['--detector_options','chanels=7'], ['chanels']),
    (['--method','fcos','--method_options','ranges=(24,48,96,200)'], ['ranges','3 levels']), (['--method_options','name=x'], ['name']),
    (['--method_options','num_classes=3'], ['num_classes']), (['--data_options','split=val'], ['split']),
    (['--size','480','--max_size','100','--scales','40','56'], ['480','max_size 100']),
    (['--size','1'], ['size','2']), (['--lr','1e39'], ['lr','at most 1e+30']),
    (['--seed','9'*23], ['seed','below']), (['--threads','100000'], ['threads','1024']), (['--steps','1' + '0'*400], ['steps','below']),
    (['--epoch','3'], ['did you mean epochs']),
    (['--detector_options','weights=none'], ['weights']), (['--data_options','colour=7'], ['colour']),
    (['--device','toaster'], ['toaster']), (['--resume','nowhere'], ['nowhere','no run']), (['--config','nowhere'], ['nowhere']),
])
def test_bad_input_is_one_line_and_nothing_is_written(args, texts, capsys):
    fails(args, 2, *texts, capsys=capsys)
    assert not list(Path('.').iterdir())

def test_bad_input_through_the_command(tmp_path):
    code, out, err = finish(command('--data', 'nowhere', '--out', 'run', cwd=tmp_path))
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and 'nowhere' in err and not out
    assert not list(tmp_path.iterdir())

def test_truncated_image(folder, capsys):
    image = sorted((folder/'train').iterdir())[3]
    image.write_bytes(image.read_bytes()[:500])
    fails(['--data', folder, '--out', 'run'], 2, str(image), capsys=capsys)
    assert not Path('run').exists()

def test_image_that_breaks_on_the_way(folder, capsys):
    image = sorted((folder/'train').iterdir())[3]
    for workers in 0, 1:
        run = T.start(T.recipe(folder, backbone='tiny', batch_size=2, workers=workers, epochs=1, out=f'run{workers}'))
        whole = image.read_bytes(); image.write_bytes(whole[:500])
        with pytest.raises(InputError, match=image.name): T.train(run=run, log=None)
        image.write_bytes(whole)
        assert T.main(['--resume', f'run{workers}']) == 0
    assert_same_run(Path('run0'), Path('run1'))

def test_folder_taken(reference, capsys):
    before = {p: p.read_bytes() for p in reference[0].iterdir()}
    fails(words(**TINY, out=reference[0]), 2, '--resume', '--out', capsys=capsys)
    assert before == {p: p.read_bytes() for p in reference[0].iterdir()}

def test_folder_that_cannot_be_made(capsys):
    Path('file').write_text('x')
    fails(words(**TINY, out='file'), 2, '--out', capsys=capsys)
    fails(words(**TINY, out='file/run'), 2, '--out', capsys=capsys)
    assert Path('file').read_text() == 'x'

def test_resume_refuses(reference, capsys):
    fails(['--resume', reference[0], '--lr', 1], 2, 'lr', capsys=capsys)
    Path('broken').mkdir(); (Path('broken')/'config.json').write_text('{')
    fails(['--resume', 'broken'], 2, 'config.json', capsys=capsys)

def test_resume_with_moved_images(folder, capsys):
    few = words(data=folder, backbone='tiny', epochs=2, size=64, max_size=80, batch_size=2, threads=1, eval_every=0)
    assert T.main([*few, '--out', 'whole']) == 0
    def stop(run, losses):
        if run.step == 4: raise T.Interrupted('4 steps are enough')
    with pytest.raises(T.Interrupted): T.train(T.parse([*few, '--out', 'cut'])[0], log=None, on_step=stop)
    Path(folder).rename('moved')
    fails(['--resume', 'cut'], 2, 'photos', '--data', capsys=capsys)
    assert T.main(['--resume', 'cut', '--data', 'moved']) == 0
    whole, cut = load_file('whole/last.safetensors'), load_file('cut/last.safetensors')
    assert all(torch.equal(v, cut[k]) for k,v in whole.items())
    assert json.loads(Path('cut/config.json').read_text())['train']['data'] == str(Path('moved').absolute())

def test_resume_takes_no_other_settings(reference, capsys):
    fails(['--resume', reference[0], '--config', reference[0]], 2, '--config', capsys=capsys)

def test_resume_removes_its_own_litter_only(reference):
    shutil.copytree(reference[0], 'run'); mine = {'.mine', '.config.json.swp', '.ipynb_checkpoints', '.state.pt.tmp.old'}
    for name in mine - {'.ipynb_checkpoints'}: (Path('run')/name).touch()
    (Path('run')/'.ipynb_checkpoints').mkdir()
    for name in ('.state.pt.tmp', '.state.pt.tmp.keep', '.config.json.tmp', '.curves.png.tmp', '.best.safetensors.ab_12xyz'):
        (Path('run')/name).touch()
    T.resume('run', log=None)
    assert {p.name for p in Path('run').glob('.*')} == mine

def test_table_that_is_none(reference, capsys):
    shutil.copytree(reference[0], 'run')
    with open('run/metrics.csv', 'a') as f: f.write('note,to,myself\n')
    n = len(Path('run/metrics.csv').read_text().splitlines())
    fails(['--resume', 'run'], 2, 'metrics.csv', f'line {n}', capsys=capsys)

def test_dry_run_leaves_no_trace():
    from ala_nb.methods import available
    for method in available():
        model = T.make_model(T.recipe(method=method), 3).train()
        before, rng = {k: v.clone() for k,v in model.state_dict().items()}, T.rng_state()
        T.dry_run(model)
        assert model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
        assert torch.equal(T.rng_state()['torch'], rng['torch']) and T.rng_state()['python'] == rng['python']
        assert all(p.grad is None for p in model.parameters())

LIMITED = '''import resource, sys
from ala_nb.train import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),)*2)
sys.exit(main(sys.argv[2:]))'''

@pytest.mark.skipif(os.name != 'posix', reason='needs RLIMIT_FSIZE')
@pytest.mark.parametrize('limit,file', [(10**6, 'last.safetensors'), (5*10**6, 'state.pt')])
def test_disk_full(reference, tmp_path, limit, file):
    "No file can be larger than `limit` bytes: first the weights do not fit, then the optimiser's state."
    args = words(**TINY, out='run')
    r = subprocess.run([sys.executable, '-c', LIMITED, str(limit), *args], cwd=tmp_path, env=environment(), text=True, capture_output=True)
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and f'run/{file} cannot be written' in r.stderr and '--resume run' in r.stderr
    assert not list(Path('run').glob('.*'))
    assert T.main(['--resume', 'run']) == 0
    assert_same_run(Path('run'), reference[0])

def test_nobody_reads(tmp_path):
    process = command(*words(**TINY, out='run'), cwd=tmp_path)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(120)) == ('', 141)

def test_help(capsys):
    with pytest.raises(SystemExit) as e: T.main(['--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for f in dataclasses.fields(T.Config): assert f'--{f.name} ' in text and f.metadata['help'][:20] in ' '.join(text.split())
    for g in T.GROUPS.values(): assert f'\n{g}:' in text

def test_help_needs_no_torch(tmp_path):
    "Nothing heavy is imported for it, and it says the same."
    code = "import runpy, sys; sys.argv = ['train', '--help']\ntry: runpy.run_module('ala_nb.train', run_name='__main__')\nfinally: print(*{m.split('.')[0] for m in sys.modules}, file=sys.stderr)"
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment(), text=True, capture_output=True)
    assert not {'torch','torchvision','numpy','PIL','numba','scipy','matplotlib'} & set(r.stderr.split()) and 'argparse' in r.stderr
    assert r.returncode == 0 and ' '.join(r.stdout.split()) == ' '.join(T.make_parser().format_help().split())

def test_none_is_a_word_where_words_are_asked_for():
    options = lambda method, *pairs: T.parse(['--method', method, '--method_options', *pairs])[0].method_options
    assert options('ala', 'centre=none', 'loc=none', 'property=none')['centre'] == 'none'
    assert options('ala', 'loc=none')['loc'] is None and options('fcos', 'centre_sampling=none')['centre_sampling'] is None

def test_names_with_hyphens():
    a = T.parse(['--method','dw','--batch-size','4','--method-options','some_thing=a-b'])[0]
    b = T.parse(['--method=dw','--batch_size=4','--method_options','some_thing=a-b'])[0]
    assert a == b and a.batch_size == 4 and a.method_options == dict(some_thing='a-b')

def test_options_are_python_literals():
    c = T.parse(['--method', 'dw', '--method_options', 'K=7', "bag=('radius', 2.5)", 'variant=paper', 'soft=false', 'T=[.6,.2]'])[0]
    assert c.method_options == dict(K=7, bag=('radius',2.5), variant='paper', soft=False, T=(.6,.2))
    assert T.as_config(json.loads(json.dumps(dataclasses.asdict(c)))) == c

# ---- numbers that are none --------------------------------------------------------------------------------------------------------

def test_weights_gone_bad():
    def poison(run, losses):
        if run.step == 8:
            with torch.no_grad(): next(run.model.parameters()).fill_(math.nan)
    with pytest.raises(T.NonFinite, match=r'step 9: \w+ is nan, images shapes/train/.*last.safetensors \(step 6\)'):
        T.train(T.recipe(**TINY, out='run'), log=None, on_step=poison)
    assert T.load_state('run')['step'] == 6 and all(torch.isfinite(v).all() for v in weights(Path('run')).values())

def test_gradient_gone_bad():
    run = T.start(T.recipe(**TINY, out='run'))
    name, p = [(n,p) for n,p in run.model.named_parameters() if p.requires_grad][3]
    p.register_hook(lambda g: g*math.inf)
    with pytest.raises(T.NonFinite, match=f'step 1: the gradient of {name} is not finite'): T.train(run=run, log=None)

def test_diverged_run_ends_with_3(capsys):
    wild = dict(lr=1e30, warmup=0, clip=0, optimizer='sgd', schedule='constant')
    fails(words(**TINY, **wild, out='run'), 3, 'step ', 'shapes/train/', capsys=capsys)
    assert T.load_state('run')['step'] == 0                             # the last good one

# ---- killed and resumed -----------------------------------------------------------------------------------------------------------

def forked(args, log):
    "The command in a copy of this process, which spares it the imports: its id."
    pid = os.fork()
    if pid: return pid
    code = 70
    try:
        fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.dup2(fd, 1); os.dup2(fd, 2)
        code = T.main(args)
    finally: sys.stdout.flush(); sys.stderr.flush(); os._exit(code)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_at_random_moments(reference):
    "SIGKILL and SIGINT at moments drawn anew each time, with a checkpoint after every step: wherever it hits, the end is the same."
    path, draw, args, ends = Path('run'), random.Random(), words(**TINY, checkpoint_seconds=.001, out='run'), []
    for attempt in range(30):
        pid = forked(args, 'log')
        if attempt < 8:
            if attempt == 0:
                while not (path/'state.pt').exists(): time.sleep(.002)
            time.sleep(draw.uniform(0, 1.)); how = draw.choice([signal.SIGKILL, signal.SIGINT]); os.kill(pid, how)
        status = os.waitpid(pid, 0)[1]
        ends.append(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        assert ends[-1] in (0, -signal.SIGKILL, 130), (ends, Path('log').read_text())
        if ends[-1] == 0: break
        T.load_state(path, log=pytest.fail)                       # never a damaged one
        args = ['--resume', 'run']
    assert_same_run(path, reference[0])
    assert not [p for p in path.glob('.*')]                       # nor anything left lying

def test_ctrl_c_through_the_command(reference, tmp_path):
    process = command(*words(**TINY, out='run'), cwd=tmp_path)
    while process.poll() is None and len(Table(tmp_path/'run'/'metrics.csv').rows()) < 2: time.sleep(.005)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    if code: assert code == 130 and err.count('\n') == 1 and 'python -m ala_nb.train --resume run' in err        # or it was faster
    assert T.main(['--resume', 'run']) == 0
    assert_same_run(tmp_path/'run', reference[0])

def test_resume_from_every_kind_of_place(reference, monkeypatch):
    "Stopped before the first step, within an epoch, at its end, in an evaluation, while a file is written, and after the last step."
    def run_until(error, **hooks):
        try: T.train(run=T.resume('run', log=None) if Path('run').exists() else T.start(T.recipe(**TINY, out='run')), log=None, **hooks)
        except error: return
        raise AssertionError('was not stopped')
    def at(step, act): return lambda run, losses: act() if run.step == step else None
    def crash(): raise RuntimeError('crash')
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)

    run_until(RuntimeError, on_step=at(1, crash))                          # before any checkpoint but the one of step 0
    run_until(T.Interrupted, on_step=at(4, interrupt))                      # within an epoch
    assert T.load_state('run')['step'] == 4
    run_until(RuntimeError, on_step=at(6, crash))                           # after an epoch's last step, before its evaluation
    real = T.predict_dataset
    monkeypatch.setattr(T, 'predict_dataset', lambda *a, **k: (real(*a, **k), interrupt(), time.sleep(5)))
    run_until(T.Interrupted)                                               # in an evaluation, which is still due
    assert T.load_state('run')['step'] == 6 and T.load_state('run')['pending']
    monkeypatch.setattr(T, 'predict_dataset', real)
    run_until(T.Interrupted, on_step=at(12, interrupt))                     # at an epoch's end
    assert T.load_state('run')['step'] == 12
    save = torch.save
    def half(state, f): save(state, f); f.truncate(1000); crash()
    monkeypatch.setattr(torch, 'save', half)
    run_until(RuntimeError)                                                # while the checkpoint is written
    monkeypatch.setattr(torch, 'save', save)
    state = Path('run/state.pt').read_bytes()
    Path('run/state.pt').write_bytes(state[:-1000])                         # and the newest one is damaged afterwards
    monkeypatch.setattr(T, 'save_pictures', lambda run: crash())
    run_until(RuntimeError)                                                # trained, pictures missing
    monkeypatch.setattr(T, 'save_pictures', lambda run: None)
    T.train(run=T.resume(Path('run').absolute(), log=None), log=None)
    assert_same_run(Path('run'), reference[0])

def test_resume_a_finished_run(reference, capsys):
    before = weights(reference[0])
    assert T.main(['--resume', str(reference[0])]) == 0 and 'IoU .50' in capsys.readouterr().out
    assert all(torch.equal(v, before[k]) for k,v in weights(reference[0]).items())

def test_state_is_numbers_and_tensors(reference):
    state = torch.load(reference[0]/'state.pt', weights_only=True)
    assert state['step'] == 18 and {'model','optimizer','rng','best'} <= state.keys()

def test_averaged_weights_are_resumed():
    c = dict(TINY, ema=.8, accumulate=2)
    T.train(T.recipe(**c, out='whole'), log=None)
    def interrupt(run, losses):
        if run.step == 5: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(T.Interrupted): T.train(T.recipe(**c, out='parts'), log=None, on_step=interrupt)
    run = T.train(run=T.resume('parts', log=None), log=None)
    assert_same_run(Path('whole'), Path('parts'))
    assert any(not torch.equal(v, run.model.state_dict()[k]) for k,v in run.ema.state_dict().items())

# ---- small parts ------------------------------------------------------------------------------------------------------------------

@given(st.integers(1,5000), st.integers(0,6000), st.sampled_from(['constant','multistep','cosine']), st.data())
def test_learning_rate_stays_in_range(total, warmup, schedule, data):
    step = data.draw(st.integers(0, total-1))
    assert 0 < T.lr_factor(step, total, warmup, schedule) <= 1
    if step >= total//6 and schedule == 'constant': assert T.lr_factor(step, total, warmup, schedule) == 1

def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = tmp_path/'state.pt'
    torch.save(dict(step=3, w=torch.randn(200)), path)
    whole, good = path.read_bytes(), T.read_state(path)
    for i in range(0, len(whole), 37):
        broken = bytearray(whole); broken[i] ^= 4; path.write_bytes(broken)
        try: got = T.read_state(path)
        except InputError: continue
        assert got['step'] == good['step'] and torch.equal(got['w'], good['w'])      # a bit that says nothing (padding, a date)
    for n in 0, 1, 100, len(whole)//2, len(whole)-1:
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match='damaged'): T.read_state(path)

def test_errors_are_one_line():
    assert T.one_line(InputError('a.jpg:\n  truncated')) == 'a.jpg: truncated' and T.one_line(KeyError()) == 'KeyError'

def test_bias_rate_is_trained_and_resumed(tmp_path):
    "A run with rates and decay by kind of parameter: the factor reaches the optimiser at every step, and a resumed run ends the same."
    knobs = dict(train_images=8, val_images=0, eval_every=0, steps=12, batch_size=2, bias_lr=2., bias_decay=1., norm_decay=.5, other_decay=0.,
                 warmup=2, warmup_shape='constant', warmup_start=.5, optimizer='sgd', lr=1e-3, schedule='constant', checkpoint_epochs=0, checkpoint_seconds=0., weight_decay=1e-4)
    rates = []
    look = lambda run, losses: rates.append({(g['lr']/1e-3, g['weight_decay']) for g in run.optimizer.param_groups if g['params']})
    whole = T.train(T.recipe(**knobs, out=str(tmp_path/'whole')), log=None, on_step=look)
    assert {lr for lr, _ in rates[0]} == {.5, 1.}
    assert {lr for lr, _ in rates[-1]} == {1., 2.} and {d for _, d in rates[0]} >= {1e-4, 5e-5}
    def stop(run, losses):
        if run.step == 5: T.save_checkpoint(run); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train(T.recipe(**knobs, out=str(tmp_path/'cut')), log=None, on_step=stop)
    cut = T.train(run=T.resume(tmp_path/'cut', log=None), log=None)
    for a, b in zip(whole.model.parameters(), cut.model.parameters()): assert torch.equal(a, b)

def test_help_names_every_method_and_backbone():
    "The help is written before anything is imported, so the lists stand there as text."
    from ala_nb.detector import BACKBONES
    from ala_nb.methods import METHODS
    help_of = {f.name: f.metadata['help'] for f in dataclasses.fields(T.Config)}
    named = lambda k: set(re.split(r'[ ,]+', help_of[k]))
    assert not set(METHODS) - named('method') and not set(BACKBONES) - named('backbone')
