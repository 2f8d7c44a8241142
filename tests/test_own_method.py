"A method from outside the package: named by its address, by an entry point or by `register`; trained, resumed, evaluated and used by the commands."
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from ala_nb import methods as M, train as T, evaluate, predict
from ala_nb.data import load_dataset
from ala_nb.detector import Detector, load_detector, save_weights
from ala_nb.geometry import InputError

PYPROJECT = '''
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "toy-assigners"
version = "1.0"
[tool.setuptools]
packages = ["toy_assigners"]
[project.entry-points."ala_nb.methods"]
toy_near = "toy_assigners.near:Near"
fcos = "toy_assigners.near:Near"
'''
NEAR = '''
from __future__ import annotations
import torch
from ala_nb.geometry import distance_giou
from ala_nb.fcos import FCOS
from ala_nb.losses import ClassTable, focal_positive, focal_negative, normalizer
from ala_nb.methods import Method, HeadSpec, Assignment, in_range
from ala_nb.pairs import inside_pairs

class Near(Method):
    "The k locations nearest to the center of an object are positive."
    def __init__(self, num_classes, k: int = 4, weights: tuple = (1., 2.), power: float | None = None, in_channels=0):
        super().__init__(num_classes, HeadSpec())
        self.k, self.weights, self.channels = k, weights, in_channels
        in_range('power', 1. if power is None else power, 0, 10)
        self.scale = torch.nn.Parameter(torch.zeros(()))
    def assign(self, preds, objects, progress):
        pairs = inside_pairs(preds, objects)
        pos = pairs.topk(-pairs.offsets.square().sum(-1), self.k).to(preds.dtype)
        table, n = ClassTable(preds, pairs), normalizer(pos.sum())
        p = table.logits.sigmoid()
        cls = table.negatives(scale=.75/n) + (pos*(-(1-p)**2*p.log()*.25 + .75*p**2*(1-p).log())).sum()/n
        box = (pos*(1-distance_giou(pairs.distances(preds), pairs.targets))).sum()/n
        return Assignment(dict(loss_cls=self.weights[0]*cls, loss_reg=self.weights[1]*box*self.scale.exp()), pairs, dict(pos=pos))

class Heavier(FCOS):
    "FCOS with another weight of its box loss."
    def __init__(self, num_classes, box_weight: float = 1., **options):
        super().__init__(num_classes, **options)
        self.box_weight = box_weight
    def assign(self, preds, objects, progress):
        out = super().assign(preds, objects, progress)
        out.losses['loss_reg'] = self.box_weight*out.losses['loss_reg']
        return out

class Needy(Near):
    def __init__(self, num_classes, must): super().__init__(num_classes)
class Headless(Near):
    def __init__(self, num_classes): torch.nn.Module.__init__(self)
class Vector(Near):
    def assign(self, preds, objects, progress): return Assignment(dict(loss_cls=preds.cls_logits.sum(-1)), None)
class Nothing(Near):
    def assign(self, preds, objects, progress): return {}
class Bare(Method):
    def __init__(self, num_classes): super().__init__(num_classes, HeadSpec())
class Unsheeted(Near):
    def __init__(self, num_classes): Method.__init__(self, num_classes)
class Detached(Near):
    def assign(self, *given):
        out = super().assign(*given); out.losses = {k: v.detach() for k,v in out.losses.items()}; return out
class Short(Near):
    def assign(self, *given):
        out = super().assign(*given); out.weights['pos'] = torch.zeros(99); return out
class Thirdless(Near):
    def assign(self, preds, objects, progress): return Assignment(dict(loss=inside_pairs(preds, objects).third(preds).sum()), None)
class Other: pass
limit = 3
'''

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder with the toy package installed in it, as pip would: a wheel is built and unpacked."
    tmp = tmp_path_factory.mktemp('toy')
    (tmp/'src'/'toy_assigners').mkdir(parents=True); (tmp/'src'/'pyproject.toml').write_text(PYPROJECT)
    (tmp/'src'/'toy_assigners'/'__init__.py').touch(); (tmp/'src'/'toy_assigners'/'near.py').write_text(NEAR)
    (tmp/'src'/'toy_assigners'/'broken.py').write_text('import math\n\nmath.sqroot(2)\n')
    (tmp/'src'/'toy_assigners'/'needs.py').write_text('import no_such_library_at_all\n')
    (tmp/'src'/'toy_assigners'/'unfinished.py').write_text('import math\nx = (\n')
    code = 'import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))'
    out = subprocess.run([sys.executable, '-c', code, str(tmp)], cwd=tmp/'src', capture_output=True, text=True, check=True).stdout
    zipfile.ZipFile(tmp/out.split()[-1]).extractall(tmp/'site')
    return tmp/'site'

@pytest.fixture(autouse=True)
def _elsewhere(site, tmp_path, monkeypatch):
    "The package is importable, nothing of it stays imported or registered, and pictures are left out."
    monkeypatch.chdir(tmp_path); monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(T, 'save_pictures', lambda run: None); monkeypatch.setattr(M, 'METHODS', dict(M.METHODS)); M.installed.cache_clear()
    yield
    M.installed.cache_clear()
    for name in [n for n in sys.modules if n.startswith('toy_assigners')]: del sys.modules[name]

NEAR_AT, HEAVIER = 'toy_assigners.near:Near', 'toy_assigners.near:Heavier'
FEW = ['--train_images', '8', '--val_images', '3', '--batch_size', '4', '--epochs', '2', '--eval_every', '1', '--log_every', '1', '--threads', '1']

def command(module, *args, site=None, cwd='.'):
    root = Path(__file__).resolve().parent.parent
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=os.pathsep.join(map(str, filter(None, (root, site)))))
    run = subprocess.run([sys.executable, '-m', f'ala_nb.{module}', *map(str, args)], cwd=cwd, env=env, text=True, capture_output=True, timeout=240)
    return run.returncode, run.stdout, run.stderr


# ---- finding it

def test_three_ways_to_name_it():
    by_address, by_entry_point = M.build(NEAR_AT, 3, k=5), M.build('toy_near', 3, k=5)
    M.register('mine', type(by_address))
    for m in (by_address, by_entry_point, M.build('mine', 3, k=5)):
        assert type(m).__name__ == 'Near' and m.k == 5 and m.options == dict(k=5)
    M.register('by_address', NEAR_AT); assert M.build('by_address', 3).k == 4
    assert {'mine', 'toy_near', 'by_address', 'fcos', 'ala'} <= set(M.available())
    assert type(M.build('fcos', 3)).__module__ == 'ala_nb.fcos'                    # an entry point does not take over a name of ours

@pytest.mark.parametrize('name,texts', [
    ('toy_neer', ['toy_near', 'package.module:Class']), (NEAR_AT+'s', ["did you mean 'Near'"]), ('toy_assigners.nears:Near', ['toy_assigners.nears', 'PYTHONPATH']),
    ('toy_assigner.near:Near', ["no module 'toy_assigner'", 'PYTHONPATH']), ('toy_assigners.near:Other', ['Other is no subclass of Method']),
    ('toy_assigners.near:limit', ['no subclass']), ('toy_assigners.broken:Near', ['sqroot', 'broken.py, line 3']), ('toy_assigners:X', ['no subclass of Method']),
    ('toy_assigners.needs:Near', ['no_such_library_at_all', 'needs.py, line 1']), ('toy_assigners.near:', ['package.module:Class']), (':Near', ['package.module:Class']),
    ('a/b.py:Near', ['package.module:Class']), ('toy_assigners.near.py:Near', ["'toy_assigners.near:Near'"]), ('toy_assigners.unfinished:Near', ['never closed', 'line 2)']), ('toy_assigners.near:Near.more', ['does not exist there']), (7, ['did you mean'])])
def test_wrong_addresses(name, texts):
    with pytest.raises(InputError) as e: M.build(name, 3)
    assert '\n' not in str(e.value) and all(t in str(e.value) for t in texts), str(e.value)

@pytest.mark.parametrize('name,options,text', [
    (NEAR_AT, dict(kk=3), "'k'"), (NEAR_AT, dict(k=2.5), 'whole number'), (NEAR_AT, dict(power='2'), 'finite number or None'), (NEAR_AT, dict(power=11), 'power'),
    (NEAR_AT, dict(num_class=3), 'num_class'), (HEAVIER, dict(box_weight=True), 'finite'), (HEAVIER, dict(reg_los='iou'), "'reg_loss'"), (HEAVIER, dict(reg_loss='ciou'), "'giou'"),
    (HEAVIER, dict(boxweight=2.), "'box_weight'"), ('toy_assigners.near:Needy', {}, "'must' is missing"), ('toy_assigners.near:Headless', {}, 'no head sheet'), ('toy_assigners.near:Unsheeted', {}, 'no head sheet'),
    ('toy_assigners.near:Bare', dict(k=1), 'it has none')])
def test_wrong_options(name, options, text):
    with pytest.raises(InputError) as e: M.build(name, 3, **options)
    assert '\n' not in str(e.value) and text in str(e.value), str(e.value)

def test_right_options():
    m = M.build(HEAVIER, 3, box_weight=2, reg_loss='iou', ranges=(20,40))
    assert m.options == dict(box_weight=2, reg_loss='iou', ranges=(20,40)) and m.reg_loss == 'iou' and m.ranges == (20,40)
    assert M.build(NEAR_AT, 3, power=None).k == 4 and M.build('toy_assigners.near:Needy', 3, must=1).options == dict(must=1)

def test_names_that_cannot_be_registered():
    near = type(M.build(NEAR_AT, 3))
    for name in ('fcos', 'toy_near', 'a b', 'a:b', '', 3):
        with pytest.raises(InputError, match='name'): M.register(name, M.build(HEAVIER, 3).__class__)
    for cls in (near(3), dict, None, 'toy_assigners.near:Other'):
        with pytest.raises(InputError): M.register('mine', cls)
    M.register('mine', near); M.register('mine', near)                               # again is no other
    assert 'mine' in M.available()

@pytest.mark.parametrize('name,text', [('Vector', "loss 'loss_cls' is of shape (1, 84)"), ('Nothing', 'returned dict'), ('Bare', 'no `assign`'),
    ('Detached', 'no loss has a gradient'), ('Short', "weight 'pos' is of shape (99,)"), ('Thirdless', 'HeadSpec')])
def test_wrong_results(name, text):
    model = Detector(f'toy_assigners.near:{name}', 'tiny', 3)
    with pytest.raises(InputError, match=text.replace('(', r'\(').replace(')', r'\)')): model([torch.rand(3,64,64)], [dict(boxes=torch.zeros(0,4), labels=torch.zeros(0).long())])


# ---- in a detector

def test_an_instance_is_written_down_and_built_again(tmp_path):
    method = M.build(NEAR_AT, 3, k=2, weights=(1., .5))
    with torch.no_grad(): method.scale.fill_(.25)
    model = Detector(method, 'tiny', 3)
    assert model.config['method'] == NEAR_AT and model.config['method_options'] == dict(k=2, weights=[1., .5])
    again = Detector(**json.loads(json.dumps(model.config)))
    assert again.method.k == 2 and again.method.weights == (1., .5) and type(again.method) is type(method)
    save_weights(model, tmp_path/'model.safetensors')
    loaded = load_detector(tmp_path/'model.safetensors')
    assert loaded.method.scale.item() == .25 and loaded.config['method'] == NEAR_AT
    M.register('mine', type(method))
    assert Detector(M.build('mine', 3), 'tiny', 3).config['method'] == NEAR_AT     # an address is found where nobody has registered the name
    assert Detector(NEAR_AT, 'tiny', 3).method.channels == 48                       # asks for the pyramid's channels by an argument's name, as ALA does

def test_what_cannot_be_written_down(tmp_path):
    class Local(type(M.build(NEAR_AT, 3))): pass
    with pytest.raises(InputError, match='defined in a notebook'): Detector(Local(3), 'tiny', 3).config
    M.register('local', Local)
    assert Detector(Local(3, k=1), 'tiny', 3).config['method'] == 'local'
    with pytest.raises(InputError, match='JSON'): Detector(M.build('toy_assigners.near:Needy', 3, must=torch.zeros(2)), 'tiny', 3).config

def test_moved_class(tmp_path, site):
    model = Detector(NEAR_AT, 'tiny', 3, method_options=dict(k=7)); save_weights(model, tmp_path/'m.safetensors')
    (tmp_path/'elsewhere.py').write_text('from toy_assigners.near import Near as Moved\n'); sys.path.insert(0, str(tmp_path))
    try: loaded = load_detector(tmp_path/'m.safetensors', method='elsewhere:Moved')
    finally: sys.path.remove(str(tmp_path)); sys.modules.pop('elsewhere', None)
    assert loaded.method.k == 7


# ---- by the commands

def test_from_the_command_line(site, tmp_path):
    "Train, evaluate and predict, each in a process of its own; and the one line where the package is missing."
    code, out, err = command('train', *FEW, '--method', NEAR_AT, '--method_options', 'k=2', 'weights=(1.,.5)', site=site)
    assert code == 0, err
    run = Path('runs/shapes-Near'); config = json.loads((run/'config.json').read_text())
    assert config['detector']['method'] == NEAR_AT and config['detector']['method_options'] == dict(k=2, weights=[1., .5], in_channels=48)
    before, after = torch.zeros(()), load_file(run/'last.safetensors')['method.scale']
    assert not torch.equal(before, after)                                            # the method's own parameter has learned
    code, out, err = command('evaluate', run, '--out', 'numbers.json', site=site)
    assert code == 0 and 'coco' in json.loads(Path('numbers.json').read_text()), err
    from PIL import Image
    Image.new('RGB', (128, 128), 'white').save('picture.png')
    code, out, err = command('predict', run, 'picture.png', '--out', 'seen', site=site)
    assert code == 0 and Path('seen/predictions.json').exists(), err
    code, out, err = command('evaluate', run)                                        # without the package
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and 'toy_assigners' in err and 'PYTHONPATH' in err, err

def test_method_of_another_place_for_evaluation(tmp_path):
    assert T.main([*FEW, '--method', NEAR_AT, '--epochs', '1', '--out', 'run']) == 0
    Path('elsewhere.py').write_text('from toy_assigners.near import Near as Moved\n'); sys.path.insert(0, str(tmp_path))
    config = json.loads(Path('run/config.json').read_text()); config['detector']['method'] = 'gone.away:Near'; Path('run/config.json').write_text(json.dumps(config))
    try:
        assert evaluate.main(['run']) == 2
        assert evaluate.main(['run', '--method', 'elsewhere:Moved']) == 0
        from PIL import Image
        Image.new('RGB', (64, 64)).save('p.png')
        assert predict.main(['run', 'p.png', '--out', 'seen', '--method', 'elsewhere:Moved']) == 0
    finally: sys.path.remove(str(tmp_path)); sys.modules.pop('elsewhere', None)

@pytest.mark.parametrize('method', ['toy_near', HEAVIER])
def test_resumed_to_the_same_weights(method):
    few = [*FEW, '--method', method, '--method_options'] + (['k=3'] if method == 'toy_near' else ['ranges=(24,48)', 'box_weight=2.'])
    assert T.main([*few, '--out', 'whole']) == 0
    def stop(run, losses):
        if run.step == 3: raise T.Interrupted('enough')
    with pytest.raises(T.Interrupted): T.train(T.parse([*few, '--out', 'cut'])[0], log=None, on_step=stop)
    assert T.main(['--resume', 'cut']) == 0
    whole, cut = load_file('whole/last.safetensors'), load_file('cut/last.safetensors')
    assert whole.keys() == cut.keys() and all(torch.equal(v, cut[k]) for k,v in whole.items())

@pytest.mark.parametrize('args,text', [
    (['--method', 'toy_assigners.near:Nar'], "'Near'"), (['--method', 'toy_assigners.broken:Near'], 'broken.py, line 3'), (['--method', 'toy_neer'], 'toy_near'),
    (['--method', NEAR_AT, '--method_options', 'kk=3'], "'k'"), (['--method', NEAR_AT, '--method_options', 'k=x'], 'whole number'),
    (['--method', 'toy_assigners.near:Needy'], 'must'), (['--method', 'toy_assigners.near:Vector'], 'loss_cls'), (['--method', 'toy_assigners.near:Nothing'], 'Assignment')])
def test_mistakes_end_in_one_line(args, text, capsys):
    assert T.main([*FEW, *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and text in err, err
    assert not Path('runs').exists()
