"""On a GPU everything is as on a CPU: losses, gradients, detectors, commands. `ALA_TEST_DEVICE=cpu` runs the same
against the CPU itself, to debug this file without a GPU; `python tests/test_gpu.py` prints how often a loss waits."""
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')            # before CUDA starts: `--deterministic` needs it
import contextlib, copy, csv, json, math, re, shutil, socket, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from PIL import Image
import torch.distributed as dist
from ala_nb import bench as B, evaluate as E, predict as P, show as S, train as T
from ala_nb.condinst import mask_targets
from ala_nb.detector import Detector, load_detector
from ala_nb.methods import available, box_methods, build
from ala_nb.pairs import Objects, Predictions, inside_pairs
from conftest import golden_cases, golden_inputs
from test_condinst import SMALL, batch as batch_with_masks
from test_contract import METHODS, changed, draw, images as images_of, inputs, made, run, title
from test_train import environment, fails, rows, words

DEVICE = os.environ.get('ALA_TEST_DEVICE', 'cuda')
GPU = torch.device(DEVICE).type == 'cuda'
if GPU and not torch.cuda.is_available(): pytest.skip('no GPU', allow_module_level=True)     # one line, not 1,500
pytestmark = pytest.mark.cuda
on_gpu = pytest.mark.skipif(not GPU, reason='needs a real GPU')

CASES = METHODS + [('o2f', dict(match='add')), ('poto', dict(max_filter=True, aux='atss')), ('poto', dict(aux='topk')),
                   ('poto', dict(aux='fcos')), ('poto', dict(aux='anchor_atss')), ('poto', dict(use_objectness=False)),
                   ('hybrid', dict(share=.1)), ('fcos', dict(reg_loss='iou')), ('atss', dict(ignore_padding=True)),
                   ('dw', dict(weighting='tood')), ('dw', dict(bag=('topk', 9))), ('dw', dict(chunk=50)),
                   ('ala', dict(chunk=50)), ('ala', dict(strategy='pnlp')), ('ala', dict(strategy='latent'))]
def named(name, options):
    return title(name, options) + ''.join(f'={v}' for v in options.values() if not isinstance(v, (str, bool)))
each = pytest.mark.parametrize('name,options', CASES, ids=[named(*c).replace(' ', '-') for c in CASES])

@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    "Files go to a folder of the test's own, and nothing stays deterministic."
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)

def there(x):
    "Tensors on the device under test, at every depth; a leaf stays a leaf."
    if isinstance(x, torch.Tensor): return x.detach().to(DEVICE).requires_grad_(x.requires_grad)
    if isinstance(x, dict): return {k: there(v) for k, v in x.items()}
    return [there(v) for v in x] if isinstance(x, (list, tuple)) else x

def close(a, b, tol, why=''):
    "Equal up to `tol` of the largest number; None is 0."
    a, b = (torch.zeros(()) if x is None else torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), f'{why} is not finite'
    if not (a.numel() or b.numel()): return
    off, most = float((a-b).abs().max()), float(b.abs().max())
    assert off <= tol*most + 1e-13, f'{why}: differs by {off:.3g} where the largest is {most:.3g}'

def taken(out):
    "The pairs that count as positives, in an order that does not depend on that of the list: keys and weights."
    p = out.pairs; key = (p.obj*p.n_locations + p.loc).cpu(); at = key.argsort()
    at = at[out.weights['pos'].detach().cpu()[at] != 0]
    return key[at], {k: w.detach().cpu()[at] for k, w in out.weights.items()}

def same(here, away, leaves, others, tol=(1e-9, 1e-8), ties=False):
    """Losses, gradients, positives and weights of two assignments. `ties`: some locations serve an object equally well,
    and each device may take another one of them; if it does, that is said and the losses alone are compared."""
    assert list(here.losses) == list(away.losses)
    for k, v in here.losses.items():
        assert away.losses[k].device.type == torch.device(DEVICE).type, k
        close(away.losses[k], v, tol[0], k)
    (a, wa), (b, wb) = taken(here), taken(away)
    if ties and not torch.equal(a, b):
        assert len(a) == len(b)
        return warnings.warn('other ones of equal locations: losses alone were compared')
    assert torch.equal(a, b), f'{len(a)} positives here, {len(b)} there'
    for k in wa: close(wb[k], wa[k], tol[1], f'weight {k}')
    slopes = lambda out, xs: torch.autograd.grad(out.total, xs, allow_unused=True)
    for i, (x, y) in enumerate(zip(slopes(here, leaves), slopes(away, others), strict=True)):
        close(y, x, tol[1], f'gradient {i}')

# ---- commands in processes of their own: slow, so they begin first (-n 8 --dist worksteal) ---------------------------

FEW = dict(train_images=8, val_images=4, batch_size=4, epochs=2, log_every=1, threads=1, device=DEVICE)
def train(**knobs): return T.main(words(**{**FEW, **knobs}))
def finite(path):
    found = rows(Path(path))
    assert found and all(math.isfinite(float(r['loss'])) for r in found)
    return found

def test_own_process_and_compile():
    "The real command, compiled; it needs a C compiler."
    if not any(map(shutil.which, ('cc', 'gcc', 'clang'))): pytest.skip('there is no C compiler')
    argv = words(**FEW, steps=2, eval_every=0, compile='true', out='run')
    r = subprocess.run([sys.executable, '-m', 'ala_nb.train', *argv], env=environment(), text=True, capture_output=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert len(finite('run')) == 2

def torchrun(n, *argv, **more):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), '-m',
               'ala_nb.train', *argv]
    env = {k: v for k, v in environment().items() if k != 'RANK'}
    return subprocess.run(command, env=env | more, text=True, capture_output=True, timeout=150)

NORMED = dict(FEW, backbone='resnet18', size=64, detector_options=['channels=16', 'head_convs=1'],
              steps=2, eval_every=0)

@on_gpu
def test_torchrun_with_one_process():
    r = torchrun(1, *words(**NORMED, out='run'))
    assert r.returncode == 0, r.stderr[-2000:]
    assert len(finite('run')) == 2

@on_gpu
@pytest.mark.parametrize('sync', ('false', 'true'))
def test_two_processes_on_one_gpu_are_refused(sync):
    "By every process, so that somebody says it; torchrun itself ends with 1."
    if torch.cuda.device_count() > 1: pytest.skip('there are two')
    r = torchrun(2, *words(**NORMED, sync_bn=sync, out='run'))
    lines = [l for l in r.stderr.splitlines() if 'error: ' in l and '--nproc_per_node' in l]
    assert r.returncode and len(lines) == 1, r.stderr[-3000:]
    assert 'exitcode  : 2' in r.stderr and not Path('run').exists() and 'ala_nb/train.py", line' not in r.stderr

# ---- methods: losses and gradients -----------------------------------------------------------------------------------

def golden_preds(case, m, device):
    "Predictions, objects, leaves of a golden batch; what a head gives besides is drawn."
    z, g = golden_inputs(case, device=device), torch.Generator().manual_seed(1)
    leaves = [z[k].requires_grad_() for k in ('cls_logits', 'distances', 'obj_logits')]
    b, p, _ = z['cls_logits'].shape; extras = {}
    for name, n in m.head.reads:
        x = torch.randn(b, p, n, generator=g, dtype=torch.float64)
        if name == 'coarse': x = z['distances'].detach().cpu()*(.1*x).exp()
        extras[name] = x.to(device).requires_grad_(); leaves.append(extras[name])
    third = z['obj_logits'] if m.head.third else None
    preds = Predictions(z['cls_logits'], z['distances'], z['points'], z['strides'], third, extras=extras)
    return preds, Objects.from_targets(z['targets']), leaves

@each
@pytest.mark.parametrize('case', golden_cases())
def test_golden_batches(name, options, case):
    K, out = golden_inputs(case)['n_class'], []
    for device in ('cpu', DEVICE):
        m = made(name, options, K).to(device)
        preds, objects, leaves = golden_preds(case, m, device)
        out.append((m(preds, objects, .3), leaves + list(m.parameters())))
    (here, a), (away, b) = out
    same(here, away, a, b, ties=True)

@each
@pytest.mark.parametrize('kind', ('any', 'tiny', 'twins', 'rivals', 'crowd', 'none'))
def test_drawn_batches(name, options, kind):
    "Only twins and tiny boxes have equal locations. One image is empty, or all are; a crowd is 60 objects."
    b = draw(1, (0, 0) if kind == 'none' else (4, 0, 5), kind='any' if kind == 'none' else kind)
    m = made(name, options); far = there_batch(b); n = copy.deepcopy(m).to(DEVICE)
    same(run(m, b), run(n, far), inputs(m, b), inputs(n, far), ties=kind in ('twins', 'tiny'))

def there_batch(b): return changed(b, there, targets=there(b.targets))

@each
def test_a_crowd_of_a_thousand(name, options, monkeypatch):
    "1,000 objects in float32: finite, and near the CPU's, with its kernel and without."
    b = B.draw_batch([1000, 3], (192, 256), 5, torch.Generator().manual_seed(2), 20., .5, (8, 16, 32))
    far, m = there_batch(b), build(name, 5, **options); n = copy.deepcopy(m).to(DEVICE)
    away = run(n, far); away.total.backward()
    assert all(v.isfinite() and v.dtype == torch.float32 for v in away.losses.values())
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs(n, far))
    for kernels in ('1', '0'):
        monkeypatch.setenv('ALA_KERNELS', kernels)
        close(away.total, run(m, b).total, 2e-3, 'total')
        again = run(n, far).total                                  # and on the device the switch changes nothing
        close(again, away.total, 1e-5, 'total again')

@each
def test_deterministic_algorithms(name, options):
    "What `--deterministic` switches on: no operation refuses, and twice is the same to the last bit."
    b = there_batch(draw(4, kind='crowd', dtype=torch.float32)); m = made(name, options, dtype=torch.float32).to(DEVICE)
    torch.use_deterministic_algorithms(True)
    first, second = (torch.autograd.grad(run(m, b).total, inputs(m, b), allow_unused=True) for _ in range(2))
    for x, y in zip(first, second): assert x is y or torch.equal(x, y)

@each
def test_why(name, options):
    "The factors of the explanation are made where the pairs are."
    b = there_batch(draw(5)); m = made(name, options).to(DEVICE); out = run(m, b)
    p = out.pairs.loc
    for k, v in out.factors.items(): assert not v.isnan().any() and (v.device, v.shape) == (p.device, p.shape), k
    assert out.dense('pos', 0).shape == (out.pairs.n_locations, 4)

@pytest.mark.parametrize('name', [n for n in box_methods() if n in B.DENSE])
def test_dense_forms(name):
    "What `bench` compares with, on the device."
    b = there_batch(draw(6)); m = build(name, 3).double().to(DEVICE)
    want = B.DENSE[name](m, b.predictions(m.head), Objects.from_targets(b.targets))
    close(run(m, b, .5).total, want, 1e-6, name)

# ---- detectors -------------------------------------------------------------------------------------------------------

DEFORM = dict(backbone='resnet18', backbone_options=dict(deformable=(4, 5)))
NETS = {n: (n, {}, {}) for n in available() if not n.startswith('condinst')}
NETS |= {n: (n, SMALL, {}) for n in available() if n.startswith('condinst')}
NETS |= dict(dw_task_head=('dw', dict(task_head=True), {}), dw_deform=('dw', dict(refine='deform'), {}),
             dw_bilinear=('dw', dict(refine='bilinear'), {}), vfnet_star_norm=('vfnet', dict(star_norm=True), {}),
             max3d=('poto', dict(max_filter=True, aux='atss'), {}),
             condinst_batch=('condinst', dict(mask_channels=8), {}),
             deformable=('fcos', {}, DEFORM), swin=('fcos', {}, dict(backbone='swin_t')),
             convnext=('fcos', {}, dict(backbone='convnext_tiny')), frozen=('fcos', {}, dict(DEFORM, norm='frozen')))
HEAVY = ('deformable', 'swin', 'convnext', 'frozen')

def net(key, **more):
    name, options, net = NETS[key]
    torch.manual_seed(0)
    return Detector(name, num_classes=3, method_options=options,
                    **{**dict(backbone='tiny', channels=16, head_convs=1), **net, **more})

def loud(model):
    "Untrained scores pass the threshold, and boxes differ."
    with torch.no_grad(): model.head.cls.bias.fill_(0.); model.head.cls.weight.mul_(10.)
    return model.eval()

@pytest.mark.parametrize('key', NETS)
def test_detector_is_the_cpus(key):
    "Float64: losses, gradients of all parameters, detections and masks."
    images, targets = batch_with_masks(((64, 96), (64, 64)))
    images = [im.double() for im in images]
    here = net(key).double(); away = copy.deepcopy(here).to(DEVICE)
    for model in (here, away):                                      # Swin's paths are dropped by chance
        for m in model.modules():
            if type(m).__name__ == 'StochasticDepth': m.p = 0.
    a, b = here.train()(images, targets, .5), away.train()(there(images), there(targets), .5)
    for k in a: close(b[k], a[k], 1e-8, k)
    sum(a.values()).backward(); sum(b.values()).backward()
    scale = max(float(p.grad.abs().max()) for p in here.parameters() if p.grad is not None)
    for (k, p), q in zip(here.named_parameters(), away.parameters()):
        assert (p.grad is None) == (q.grad is None), k
        if p.grad is not None: assert float((p.grad-q.grad.cpu()).abs().max()) <= 1e-8*scale, k
    here.load_state_dict({k: v.cpu() for k, v in away.state_dict().items()})          # the same running statistics
    with torch.no_grad(): found, other = loud(here)(images), loud(away)(there(images))
    for x, y in zip(found, other):
        assert len(x['scores']) and all(v.device.type == torch.device(DEVICE).type for v in y.values())
        order, where = ((d['scores'].cpu()*1e6).round().long()*3 + d['labels'].cpu() for d in (x, y))
        assert sorted(order.tolist()) == sorted(where.tolist())
        close(y['scores'], x['scores'], 1e-8, 'scores'); close(y['boxes'].sum(0), x['boxes'].sum(0), 1e-8, 'boxes')
        if 'masks' in x: assert abs(int(x['masks'].sum()) - int(y['masks'].sum())) <= 4

PRECISIONS = dict(float32=None, bf16=torch.bfloat16, fp16=torch.float16)

@pytest.mark.parametrize('last', (False, True), ids=('plain', 'channels_last'))
@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('key', NETS)
def test_a_step_of_training(key, precision, last):
    "Two steps, pictures on the device and targets with an empty image; then detections."
    dtype = PRECISIONS[precision]
    if not GPU and dtype and key in HEAVY: pytest.skip('half precision of these is slow or missing on a CPU')
    images, targets = batch_with_masks(((64, 96), (96, 64)), (3, 0))
    images, targets = there(images), there(targets)
    model = net(key, channels_last=last).to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    scaler = torch.amp.GradScaler(torch.device(DEVICE).type, enabled=dtype == torch.float16, init_scale=2.**8)
    for progress in (0., .9):
        with torch.autocast(torch.device(DEVICE).type, dtype, enabled=dtype is not None):
            losses = model(images, targets, progress)
        assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values()), losses
        scaler.scale(sum(losses.values())).backward(); scaler.unscale_(optimizer)
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, bad
        scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
    with torch.no_grad(), torch.autocast(torch.device(DEVICE).type, dtype, enabled=dtype is not None):
        for found in loud(model)(images): assert len(found['scores']) and found['boxes'].isfinite().all()

# torch and torchvision have no deterministic backward pass of these on a GPU: grid_sample, max_pool3d, deform_conv2d
REFUSED = 'tood', 'dw_task_head', 'dw_deform', 'dw_bilinear', 'max3d', 'vfnet', 'vfnet_star_norm', 'deformable', \
          'frozen'

@pytest.mark.parametrize('key', NETS)
def test_deterministic_detectors(key):
    "A whole step with `--deterministic` switched on; what refuses is printed, and must be in the list."
    images, targets = batch_with_masks(((64, 96), (64, 64)))
    model = net(key).to(DEVICE).train(); torch.use_deterministic_algorithms(True)
    try: sum(model(there(images), there(targets), .9).values()).backward()
    except RuntimeError as e:
        print(f'{key}: {str(e)[:100]}')
        assert GPU and key in REFUSED and 'deterministic' in str(e), e
        return
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('how', (dict(nms=True), dict(nms=False), dict(soft_nms='linear'), dict(soft_nms='gaussian'),
                                 dict(scales=(48, 64), flip=True)),
                         ids=('nms', 'no-nms', 'linear', 'gaussian', 'scales'))
def test_ways_to_detect(how):
    images = [im.double() for im in batch_with_masks(((64, 96), (50, 64)))[0]]
    here = loud(net('fcos').double()); away = copy.deepcopy(here).to(DEVICE)
    with torch.no_grad(): found = here.detect(images, **how), away.detect(there(images), **how)
    for x, y in zip(*found):
        close(y['scores'], x['scores'], 1e-8, 'scores'); close(y['boxes'].sum(0), x['boxes'].sum(0), 1e-8, 'boxes')

def test_pictures_may_stay_on_the_host():
    images, targets = batch_with_masks()
    model = net('fcos').double().to(DEVICE).train(); images = [im.double() for im in images]
    a, b = model(images, targets), model(there(images), there(targets))
    for k in a: close(a[k], b[k], 1e-9, k)

def test_bad_target_on_the_device():
    images, targets = batch_with_masks(); targets[1]['labels'][1] = 7
    with pytest.raises(T.InputError, match=r'targets\[1\]: box 1 has label 7'):
        net('fcos').to(DEVICE).train()(there(images), there(targets))

def test_mask_targets_on_the_device():
    _, targets = batch_with_masks()
    a, b = (mask_targets(Objects.from_targets(t), o, (32, 32), 4)
            for t, o in ((targets, torch.arange(5)), (there(targets), torch.arange(5, device=DEVICE))))
    assert a.any() and torch.equal(a, b.cpu())

# ---- commands --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('knobs', [
    dict(amp='auto'), dict(amp='off'), dict(amp='bf16'), dict(amp='fp16'), dict(ema=.9), dict(deterministic='true'),
    dict(amp='bf16', channels_last='true'), dict(accumulate=2), dict(optimizer='sgd', clip=0), dict(workers=2),
    dict(scales=[96, 112], size=128, photometric='true', workers=2), dict(eval_both='true'), dict(keep=1),
    dict(method='condinst', method_options=['mask_channels=8', 'masks_per_image=8']), dict(method='poto', amp='fp16'),
    dict(backbone='resnet18', size=64, detector_options=['channels=16', 'head_convs=1'])],
    ids=lambda k: '-'.join(f'{a}={b}' for a, b in k.items())[:50])
def test_command_trains(knobs, capsys):
    assert train(**knobs, out='run') == 0, capsys.readouterr().err
    found = finite('run'); stored = T.read_run('run')['train']
    assert found[-1]['AP'] and (Path('run')/'assignment.png').stat().st_size
    assert len(found) == (2 if 'accumulate' in knobs else 4)
    if knobs.get('amp') == 'auto' and GPU: assert stored.amp == 'bf16'
    assert str(torch.device(DEVICE)) in capsys.readouterr().out
    state = torch.load('run/state.pt', weights_only=True, map_location='cpu')
    assert all(v.isfinite().all() for v in state['model'].values() if v.is_floating_point())
    assert len(state['rng']['cuda']) == torch.cuda.device_count()

@pytest.mark.parametrize('workers', (0, 2))
def test_pinned_batches(workers):
    "Page-locked where there is a GPU, the same as others, and whole when they have been moved without waiting."
    from ala_nb.data import load_dataset, make_loader
    ds, out = load_dataset('shapes', 'train', n=12), []
    for pin in (False, GPU):
        loader = make_loader(ds, 4, train=True, workers=workers, pin_memory=pin)
        batches = list(loader)
        if pin: assert all(im.is_pinned() for images, _ in batches for im in images)
        if pin: assert all(t['boxes'].is_pinned() for _, targets in batches for t in targets if len(t['boxes']))
        out.append([T.to_device(*b, DEVICE if pin else 'cpu') for b in batches])
    for (a, s), (b, t) in zip(*out, strict=True):
        assert all(torch.equal(x, y.cpu()) for x, y in zip(a, b, strict=True))
        assert all(torch.equal(x['boxes'], y['boxes'].cpu()) for x, y in zip(s, t, strict=True))

def cut(at=2, **knobs):
    "A run whose first steps alone are done; it says where it stopped."
    run = T.start(T.recipe(**{**FEW, 'out': 'run', **knobs}))
    def stopping(run, losses):
        if run.step == at: T.save_checkpoint(run); raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'): T.train(run=run, log=None, on_step=stopping)
    return run

@pytest.mark.parametrize('amp', ('off', 'bf16', 'fp16'))
def test_resume_ends_the_same(amp):
    "Deterministic, so bit for bit; the generators of the device go on as well."
    knobs = dict(FEW, amp=amp, deterministic=True, ema=.5)
    T.train(T.recipe(**knobs, out='whole'), log=None); cut(**knobs)
    T.train(run=T.resume('run', log=None), log=None)
    a, b = (torch.load(f'{p}/state.pt', weights_only=True, map_location='cpu') for p in ('whole', 'run'))
    for part in ('model', 'ema'):
        for k, v in a[part].items(): assert torch.equal(v, b[part][k]), k
    assert a['scaler'] == b['scaler'] and rows(Path('whole')) == rows(Path('run'))

@pytest.mark.parametrize('first,then', [(DEVICE, 'cpu'), ('cpu', DEVICE)], ids=['there-here', 'here-there'])
@pytest.mark.parametrize('amp', ('off', 'bf16', 'fp16'))
def test_resume_on_another_device(first, then, amp, capsys):
    cut(device=first, amp=amp)
    assert T.main(['--resume', 'run', '--device', then]) == 0, capsys.readouterr().err
    assert len(finite('run')) == 4 and T.load_state('run')['step'] == 4

def test_overflow_of_float16_does_not_spoil_the_checkpoint(capsys):
    "A step that the scaler skips has a gradient without end; the run is resumed all the same, and the table is finite."
    run = T.start(T.recipe(**{**FEW, 'amp': 'fp16', 'log_every': 4, 'eval_every': 0, 'out': 'run'}))
    run.scaler = torch.amp.GradScaler(run.device.type, init_scale=2.**127)
    def stop(run, losses):
        if run.step == 2: T.save_checkpoint(run); raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'): T.train(run=run, log=None, on_step=stop)
    assert run.scaler.get_scale() < 2.**127                           # it did happen
    assert T.main(['--resume', 'run', '--device', DEVICE]) == 0, capsys.readouterr().err
    assert all(math.isfinite(float(r['grad_norm'])) for r in finite('run'))

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of the device that has learnt something."
    path = tmp_path_factory.mktemp('trained')/'run'
    T.train(T.recipe(**{**FEW, 'train_images': 64, 'val_images': 16, 'epochs': 6, 'batch_size': 8, 'eval_every': 6},
                     out=str(path)), log=None)
    return path

def test_evaluation_is_the_cpus(trained, capsys):
    ap = {}
    for device in ('cpu', DEVICE):
        argv = [str(trained), '--device', device, '--score_threshold', '.01', '--out', f'{device}.json']
        assert E.main(argv) == 0, capsys.readouterr().err
        text = json.loads(Path(f'{device}.json').read_text())
        ap[device] = next(v for k, v in flat(text) if k.endswith('AP'))
    assert ap['cpu'] > 0 and ap['cpu'] == pytest.approx(ap[DEVICE], abs=.02)

def flat(d, at=''):
    "(name, number) of nested dicts."
    return [x for k, v in d.items() for x in (flat(v, f'{at}{k}.') if isinstance(v, dict) else [(at+k, v)])]

@pytest.mark.parametrize('more', ([], ['--workers', '2'], ['--soft_nms', 'gaussian'], ['--scales', '96', '128'],
                                  ['--flip'], ['--no-nms']), ids=lambda m: '-'.join(m) or 'plain')
def test_evaluate_command(trained, more, capsys):
    few = '--data_options', 'n=8'
    assert E.main([str(trained), '--device', DEVICE, *few, *more]) == 0, capsys.readouterr().err
    assert 'AP' in capsys.readouterr().out

@pytest.fixture
def picture():
    from ala_nb.data import load_dataset
    image = load_dataset('shapes', 'val', n=1)[0][0]
    image = (image*255 if image.is_floating_point() else image).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(image).save('a.png'); return 'a.png'

def test_predict_command(trained, picture, capsys):
    argv = [str(trained), picture, '--out', 'found', '--device', DEVICE, '--score_threshold', '0.01']
    assert P.main(argv) == 0, capsys.readouterr().err
    assert json.loads(Path('found/predictions.json').read_text())['annotations'] and Path('found/a.png').exists()

@pytest.mark.parametrize('method', ('trained', 'poto', 'ala', 'tood', 'condinst_o2f'))
def test_show_command(trained, method, capsys):
    more = dict(method_options=['mask_channels=8']) if method == 'condinst_o2f' else {}
    if method != 'trained': assert train(method=method, steps=1, eval_every=0, **more, out='run') == 0
    argv = ['run' if method != 'trained' else str(trained), '0', '1', '--out', 'report.html', '--device', DEVICE]
    assert S.main(argv) == 0, capsys.readouterr().err
    assert '<html' in Path('report.html').read_text()

def test_commands_with_masks(picture, capsys):
    knobs = dict(method='condinst_o2f', method_options=['mask_channels=8', 'masks_per_image=8'], score_threshold=.001)
    assert train(**knobs, out='run') == 0, capsys.readouterr().err
    argv = ['run', picture, '--out', 'found', '--device', DEVICE, '--score_threshold', '0.001']
    assert P.main(argv) == 0, capsys.readouterr().err
    found = json.loads(Path('found/predictions.json').read_text())['annotations']
    assert found and all('segmentation' in a for a in found)

# ---- several processes, and bad days ---------------------------------------------------------------------------------

def test_a_process_without_gpu_says_so(monkeypatch, capsys):
    "The same without a first process: this is the second one, and there is one GPU."
    for k, v in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=1).items():
        monkeypatch.setenv(k, str(v))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    fails(words(**{**FEW, 'device': 'auto'}, out='run'), 2, 'process 1', '--nproc_per_node', capsys=capsys)

@contextlib.contextmanager
def group(backend):
    "A process group of this process alone."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    dist.init_process_group(backend, init_method=f'tcp://127.0.0.1:{port}', rank=0, world_size=1)
    try: yield
    finally: dist.destroy_process_group()

@pytest.mark.parametrize('name', box_methods())
def test_a_group_of_one_changes_nothing(name):
    "The divisors go through the group; losses and gradients stay."
    b = there_batch(draw(7)); m = made(name, {}).to(DEVICE)
    alone = run(m, b); slopes = torch.autograd.grad(alone.total, inputs(m, b), allow_unused=True)
    with group('cpu:gloo,cuda:nccl' if GPU else 'gloo'):
        out = run(m, b); after = torch.autograd.grad(out.total, inputs(m, b), allow_unused=True)
    for k in alone.losses: close(out.losses[k], alone.losses[k], 1e-9, k)
    for i, (x, y) in enumerate(zip(slopes, after)): close(y, x, 1e-8, f'gradient {i}')

@pytest.mark.parametrize('key', ('fcos', 'gfl', 'deformable'))
def test_parallel_of_one_changes_nothing(key):
    "torch's wrapper around the detector, and what processes say to each other."
    from ala_nb import processes
    images, targets = map(there, batch_with_masks(((64, 96), (64, 64))))
    grads = []
    for wrapped in (False, True):
        model = net(key).double().to(DEVICE).train(); x = [im.double() for im in images]
        with group('cpu:gloo,cuda:nccl' if GPU else 'gloo') if wrapped else contextlib.nullcontext():
            f = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
            sum(f(x, targets, progress=.5).values()).backward()
            if wrapped:
                with pytest.MonkeyPatch.context() as mp:                # as if there were another one
                    mp.setattr(processes, 'world_size', lambda: 2)
                    box = [dict(a=1)]; dist.broadcast_object_list(box, 0); out = [None]; dist.all_gather_object(out, 3)
                    assert box == [dict(a=1)] and out == [3] and processes.anyone(True)
                    processes.average(torch.tensor([1., 2.])); processes.same_buffers(model); dist.barrier()
        grads.append([p.grad for p in model.parameters()])
    for i, (a, b) in enumerate(zip(*grads)): close(b, a, 1e-9, f'gradient {i}')

@pytest.mark.parametrize('norm', ('batch', 'eval', 'frozen', 'group'))
def test_synchronised_norms(norm):
    "Those that learn their statistics are converted; in a group of one the step is the same, others stay as they were."
    images, targets = map(there, batch_with_masks(((64, 96), (64, 64))))
    model = net('fcos', backbone='resnet18', norm=norm).to(DEVICE); other = T.sync_norms(copy.deepcopy(model))
    changed_ = sum(isinstance(m, nn.SyncBatchNorm) for m in other.modules())
    assert (changed_ > 0) == (norm == 'batch') and other.state_dict().keys() == model.state_dict().keys()
    if not GPU: return
    with group('nccl'):
        a, b = (m.train()(images, targets) for m in (model, other))
    for k in a: close(b[k], a[k], 2e-3, k)

@on_gpu
def test_out_of_memory_is_a_line(capsys):
    torch.cuda.empty_cache(); torch.cuda.set_per_process_memory_fraction(.0015)            # 0.2 GB of an H200
    big = words(**{**FEW, 'batch_size': 8}, size=1024, out='run', eval_every=0)
    try: fails(big, 1, 'out of memory', '--batch_size', capsys=capsys)
    finally: torch.cuda.set_per_process_memory_fraction(1.); torch.cuda.empty_cache()

def test_out_of_memory_said_by_torch(monkeypatch, capsys):
    "The same with an error that torch would raise: train, evaluate."
    def full(*args, **kw): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')
    monkeypatch.setattr(T, 'forward_backward', full)
    fails(words(**FEW, out='run'), 1, 'out of memory', '--batch_size', capsys=capsys)

@on_gpu
def test_out_of_memory_in_an_evaluation(trained, capsys):
    torch.cuda.empty_cache(); torch.cuda.set_per_process_memory_fraction(.0015)
    try: code = E.main([str(trained), '--device', DEVICE, '--size', '2048', '--batch_size', '16'])
    finally: torch.cuda.set_per_process_memory_fraction(1.); torch.cuda.empty_cache()
    err = capsys.readouterr().err
    assert code == 1 and err.startswith('error: ') and err.count('\n') == 1 and '--batch_size' in err, err

@pytest.mark.parametrize('device', ('cuda:7', 'cuda:x', 'cud'))
def test_no_such_device(device, capsys):
    fails(words(**{**FEW, 'device': device}, out='run'), 2, f'--device {device}', '--device cpu', capsys=capsys)
    assert not Path('run').exists()

def test_refusal_of_torch_is_a_line(monkeypatch, capsys):
    "An operation without a deterministic form ends the run with a line that says what to leave out."
    def refuse(*args, **kw): raise RuntimeError("x_cuda does not have a deterministic implementation, but you set "
                                                "'torch.use_deterministic_algorithms(True)'. You can turn off ...")
    monkeypatch.setattr(T, 'forward_backward', refuse)
    fails(words(**FEW, deterministic='true', out='run'), 2, 'x_cuda', '--deterministic', capsys=capsys)

# ---- bench, pictures, waits ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('what', ('step', 'losses'))
def test_bench_command(what, capsys):
    argv = [what, '--device', DEVICE, '--image', '64x96', '--classes', '4', '--rounds', '1', '--backbone', 'tiny',
            '--batch', '1', '--peers', 'dense', '--out', 'bench']
    if what == 'step': argv += ['--precision', 'float32', 'bf16']
    assert B.main(argv) == 0, capsys.readouterr().err
    with open(f'bench/bench_{what}.csv', newline='') as f: found = list(csv.DictReader(f))
    assert {r['method'] for r in found} == set(box_methods()) and {r['device'] for r in found} == {DEVICE}
    assert all(float(r['ms']) > 0 and float(r['mb']) >= 0 for r in found)
    if GPU: assert torch.cuda.get_device_name() in found[0]['machine']

def test_pairs_lists():
    "Positions, ranks and winners of the lists, made on the device."
    b = draw(8, kind='crowd'); far = there_batch(b); found = []
    for x in (b, far):
        p = inside_pairs(x.predictions(build('fcos', 3).head), Objects.from_targets(x.targets))
        g = torch.Generator().manual_seed(0); v = torch.rand(len(p), generator=g, dtype=torch.float64).to(p.loc.device)
        found.append([p.loc, p.obj, p.rank(v), p.topk(v, 5), p.winners(v), p.best_of_class(v), p.last_of_class(),
                      p.max(v), p.min(v), p.sum(v), p.softmax(v), p.cell, *p.by_level, *p.select(v > .5).lengths[None],
                      *(c.loc for _, c in p.chunks(40))])
    for i, (x, y) in enumerate(zip(*found, strict=True)): close(y, x, 1e-12, f'list {i}')

def waits(name, options=None, train=True):
    "How often one loss (and its backward pass) waits for the GPU, and the lines of code that do."
    b = there_batch(draw(9, (5, 0, 8), (128, 192), dtype=torch.float32))
    m = made(name, options or {}, dtype=torch.float32).to(DEVICE)
    def once():
        total = run(m, b, .5).total
        torch.autograd.grad(total, inputs(m, b), allow_unused=True)
    once(); torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always'); once()
    finally: torch.cuda.set_sync_debug_mode('default')
    seen = [w for w in seen if 'synchroniz' in str(w.message)]
    lines = {}
    for w in seen: at = f'{Path(w.filename).name}:{w.lineno}'; lines[at] = lines.get(at, 0) + 1
    return len(seen), lines

def table_of_waits(cases=CASES):
    "Printed: a line a method."
    for name, options in cases:
        n, lines = waits(name, options)
        where = ', '.join(f'{k} {v}' for k, v in sorted(lines.items()))
        print(f'{named(name, options):32s} {n:3d}  {where}', flush=True)

@on_gpu
@pytest.mark.parametrize('name', box_methods())
def test_waits_are_counted(name):
    "No number is asked for, but that counting works: the pairs' list always needs one."
    n, lines = waits(name)
    print(f'{name}: {n} {lines}')
    assert n >= 1

if __name__ == '__main__': table_of_waits()
