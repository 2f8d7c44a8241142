"Every preset is a detector that can be built and trained; the command takes, lists and shows them."
import csv, json
import pytest, torch
from ala_nb import presets as P, train as T
from ala_nb.data import load_dataset, save_coco
from ala_nb.detector import Detector
from ala_nb.geometry import InputError

SMALL = dict(resnet50='resnet18', resnet101='resnet18', resnext101_64x4d='resnet18')
def network(p, **change): # what makes the detector, as a hashable word
    k = p.knobs
    return json.dumps([k['method'], k['method_options'], change.get(k['backbone'], k['backbone']), k['detector_options']], sort_keys=True)
LARGE = [p for p in P.PRESETS.values() if p.knobs.get('data') != 'shapes']
DETECTORS = {network(p): p.name for p in LARGE}
TRAINED = {network(p, **SMALL): p.name for p in LARGE}

@pytest.mark.parametrize('name', sorted(DETECTORS.values()))
def test_every_preset_builds_at_full_size(name):
    "All layers, without their numbers."
    c = T.as_config(P.PRESETS[name].knobs)
    with torch.device('meta'): model = Detector(c.method, c.backbone, 80, method_options=c.method_options, **c.detector_options)
    assert 30e6 < sum(p.numel() for p in model.parameters()) < 130e6
    assert ('DeformConv' in {type(m).__name__ for m in model.body.modules()}) == ('_dcn' in name)
    assert len(model.strides) == 5 and not next(model.body.parameters()).requires_grad

@pytest.mark.parametrize('name', sorted(TRAINED.values()))
def test_every_preset_takes_two_steps(name):
    "Its method, head and backbone's options, narrow and shallow, with its optimiser."
    torch.manual_seed(0)
    c = T.as_config(P.PRESETS[name].knobs)
    model = Detector(c.method, SMALL.get(c.backbone, c.backbone), 3, method_options=c.method_options, **{**c.detector_options, 'channels': 16, 'head_convs': 1}).train()
    optimizer = T.make_optimizer(model, c)
    images = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
    targets = [dict(boxes=torch.tensor([[4., 4, 60, 50], [30, 10, 90, 60]]), labels=torch.tensor([0, 2])), dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    if model.method.masks: targets[0]['masks'] = torch.rand(2, 64, 96) > .5
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for step in range(2):
        losses = model(images, targets, progress=step/2)
        sum(losses.values()).backward(); optimizer.step(); optimizer.zero_grad()
        assert all(v.isfinite() for v in losses.values())
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in after) and sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(after)/2

def test_every_own_row_has_a_preset():
    "Rows of the papers' final tables, by what is printed."
    rows = {(p.paper, p.ap.split()[0] if p.ap[0].isdigit() else p.ap.split()[1].rstrip(',')) for p in P.PRESETS.values()}
    have = lambda table: {ap for paper, ap in rows if paper.startswith(table)}
    assert have('ALA, Table XIII') == {'48.4', '47.9', '48.0', '49.3'} and have('ALA, Table XIV') == {'48.9', '52.3'}
    assert have('ALA, Table XVII') == {'44.4', '45.4'} and have('ALA, Table XVI') >= {'90.1', '87.4'}
    assert have('AutoAssign, Table 6') == {'44.5', '46.5', '48.3', '49.5', '52.1'} and have('AutoAssign, Table 7') == {'57.9', '21.6', '49.5'}
    assert have('Combined IoUs, Table IV') == {'40.3', '44.4', '44.7', '47.3'}
    assert have('Combined IoUs, Table V') == {'40.6', '41.1', '41.3', '41.6'} and have('GFL, in Combined IoUs, Table IV') == {'45.0', '47.3'}
    assert have('DW, Table 7') == {'46.2', '46.8', '49.3', '49.5', '48.2', '48.7', '49.8'}
    assert have('o2f, Table 5') == {'38.4', '38.7', '39.0', '41.6', '42.0', '42.2'} and have('o2f, Table 6') == {'40.9', '43.8'} and have('o2f, Table 7') == {'42.9', '46.1'}
    assert have('o2f, Table 4') == {'35.3', '37.9', '36.7', '10.6', '35.5', '38.1', '39.0', '10.4'} and have('o2f, Table 8') == {'90.9'}
    assert have('o2f, Table 9') == {'35.4', '32.8', '35.9', '38.1', '36.1', '38.0'}

def test_rates_follow_the_batch_and_drops_are_the_papers():
    knobs, said = P.preset_knobs('dw_r50_1x', dict(batch_size=32))
    assert knobs['lr'] == pytest.approx(.02) and any('32' in s for s in said)
    for name, epochs, drops in (('dw_r50_1x', 12, (8, 11)), ('ala_r101_2x_ms', 24, (16, 22)), ('o2f_r50_3x_ms', 36, (24, 33)), ('o2f_crowdhuman', 50, (40,))):
        c = T.as_config(P.PRESETS[name].knobs); total = epochs*1000
        at = [s for s in range(1, total) if T.lr_factor(s, total, 0, c.schedule, c.milestones, c.gamma) < .5*T.lr_factor(s-1, total, 0, c.schedule, c.milestones, c.gamma)]
        assert c.epochs == epochs and at == [1000*d for d in drops]

def test_command_lists_and_shows(capsys, monkeypatch):
    monkeypatch.setitem(P.PRESETS, 'half', P.Preset('half', 'a table', '1', P.PRESETS['dw_r50_1x'].knobs, missing='its head'))
    assert T.main(['--list_presets']) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in P.PRESETS) and 'NOT HERE: its head' in out
    assert T.main(['--preset', 'dw_r50_1x', '--show', '--batch_size', '4']) == 0
    out = capsys.readouterr().out
    shown = json.loads(out[out.index('{\n'):])
    assert shown['lr'] == .0025 and shown['milestones'] == [8/12, 11/12] and set(shown) == {f.name for f in T.dataclasses.fields(T.Config)}

@pytest.mark.parametrize('argv,words', [(['--preset', 'dw_r50_x1', '--data', 'x'], 'dw_r50_1x'), (['--preset', 'dw_r50_1x'], '--data'), (['--preset', 'dw_r50_1x', '--resume', 'x'], '--preset'),
                                        (['--preset', 'dw_r50_1x', '--data', 'nowhere'], 'nowhere')])
def test_bad_presets_end_in_a_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert T.main(argv) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and not list(tmp_path.iterdir())

def test_a_preset_trains_by_the_command(tmp_path, capsys):
    "A small copy of a row on a folder in COCO's form: everything but network and sizes is the preset's."
    for split in ('train', 'val'): save_coco(load_dataset('shapes', split, n=4), tmp_path/'data')
    argv = ['--preset', 'dw_r50_1x', '--data', tmp_path/'data', '--train_split', 'train', '--val_split', 'val', '--backbone', 'tiny', '--weights', 'none', '--size', '64', '--max_size', '96',
            '--batch_size', '2', '--steps', '2', '--eval_every', '0', '--threads', '1', '--out', tmp_path/'run']
    assert T.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert 'DW, Tables 4' in out and 'learning rate 0.00125' in out
    stored = json.loads((tmp_path/'run'/'config.json').read_text())['train']
    assert stored['method'] == 'dw' and stored['lr'] == .00125 and stored['warmup'] == 1000 and stored['clip'] == 0
    assert [r['step'] for r in csv.DictReader(open(tmp_path/'run'/'metrics.csv'))] == ['2']

def test_rates_and_decay_are_the_releases():
    "Rate, decay and warm-up by kind of parameter, in the optimiser that a preset makes and in the steps that it takes."
    def groups(name):
        c = T.as_config(P.PRESETS[name].knobs)
        model = Detector(c.method, 'resnet18', 3, method_options=c.method_options, channels=16, head_convs=1, **c.detector_options)
        kinds = {id(p): T.kind_of(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)}
        optimizer = T.make_optimizer(model, c)
        found = {(kinds[id(p)], g.get('lr_factor', 1.), g['weight_decay']) for g in optimizer.param_groups for p in g['params']}
        assert sum(len(g['params']) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())
        return c, found
    for name in ('autoassign_r50_1x', 'dw_r50_1x', 'o2f_r50_1x'):
        c, found = groups(name)
        assert found == {('weight', 1., 1e-4), ('bias', 1., 1e-4), ('norm', 1., 0.), ('other', 1., 1e-4)}
        assert (c.warmup, c.warmup_shape, c.warmup_start, c.clip) == (1000, 'linear', .001, 0.)
    for name in ('fcos_r101_2x_ms', 'atss_r50_1x', 'dynamic_atss_r50_1x'):
        c, found = groups(name)
        assert found == {('weight', 1., 1e-4), ('bias', 2., 0.), ('norm', 1., 1e-4), ('other', 1., 1e-4)}
        assert (c.warmup, c.warmup_shape, c.warmup_start, c.clip) == (500, 'constant', 1/3, 0.)

# ---- the values, beside the files of the releases -------------------------------------------------------------------
# Read there, and written in this project's names: a number of steps or epochs, shares of a rate, decays as multiples of weight_decay.
COCO = dict(size=800, max_size=1333, flip=.5, batch_size=16, momentum=.9, weight_decay=1e-4, gamma=.1, clip=0., filter_empty=True, trainable_layers=3)
SGD = dict(COCO, optimizer='sgd', lr=.01, bias_lr=1., bias_decay=1., other_decay=1., warmup_shape='linear', warmup_start=.001)
NO_NORM_DECAY = dict(SGD, norm_decay=0., warmup=1000)
MMDET = dict(SGD, norm_decay=1., warmup=500)                     # its schedule_1x.py, and lr=0.01 of each method's file
MASKRCNN = dict(SGD, norm_decay=1., bias_lr=2., bias_decay=0., warmup=500, warmup_shape='constant', warmup_start=1/3, norm='frozen')   # maskrcnn-benchmark
ONE, TWO, THREE = dict(epochs=12, drops=(8, 11), scales=None), dict(epochs=24, drops=(16, 22)), dict(epochs=36, drops=(24, 33))
DEFORMED = dict(deform_last=True, deformable=(3, 4, 5))
ANCHOR = dict(p7_relu=None, box_activation='anchor', box_bias=0., p6_from=None, select_by='class', method_options=dict(variant='released'))
IMPROVED = dict(box_activation='relu', box_bias=None, select_by='class', method='fcos', method_options={}, p6_from=None)   # centre sampling 1.5, GIoU, centre-ness on the box tower: our defaults
RELEASES = [
    ('dw_r50_1x', 'strongwolf/DW configs/dw_r50_fpn_worefine_1x_coco.py', dict(NO_NORM_DECAY, **ONE, norm='eval', method_options={})),
    ('dw_refine_r50_1x', 'strongwolf/DW configs/dw_r50_fpn_1x_coco.py', dict(NO_NORM_DECAY, **ONE, norm='eval', method_options=dict(refine='deform'), options=dict(refine=dict(outside='zero')))),
    ('dw_r101_2x_ms', 'strongwolf/DW configs/dw_r101_fpn_worefine_mstrain_2x_coco.py', dict(NO_NORM_DECAY, **TWO, scales=(480, 960), deform_last=None)),
    ('dw_refine_r101_dcn_2x_ms', 'strongwolf/DW configs/dw_r50_fpn_dconv_c3-c5_mstrain_2x_coco.py', dict(NO_NORM_DECAY, **TWO, scales=(480, 960), **DEFORMED)),
    ('o2f_r50_1x', 'strongwolf/o2f configs/r50_1x.py', dict(NO_NORM_DECAY, **ONE, norm='eval', method_options=dict(third_convs=3))),
    ('o2f_r101_3x_ms', 'strongwolf/o2f configs/r101_3x_ms.py', dict(NO_NORM_DECAY, **THREE, scales=(640, 800))),
    ('o2f_swin_t_1x', 'strongwolf/o2f configs/swin_1x.py', dict(COCO, **ONE, optimizer='adamw', lr=1e-4, weight_decay=.05, norm_decay=0., bias_decay=1., warmup=1000, drop_path=.2)),
    ('o2f_crowdhuman', 'strongwolf/o2f configs/crowdhuman.py', dict(COCO, optimizer='adamw', lr=4e-5, norm_decay=1., bias_decay=1., other_decay=1., warmup=1000, warmup_start=.001,
        epochs=50, drops=(40,), max_size=1400, scales=(480, 960), topk=5000, max_detections=500, method_options=dict(K=4))),
    ('condinst_o2f_r50_1x', 'strongwolf/o2f configs/condinst_r50_1x.py', dict(SGD, **ONE, norm_decay=1., bias_lr=2., bias_decay=0., warmup=500)),
    ('condinst_o2f_r50_3x_ms', 'strongwolf/o2f configs/condinst_r50_3x.py', dict(SGD, **THREE, norm_decay=1., bias_lr=2., bias_decay=0., warmup=500, scales=(640, 800))),
    ('autoassign_r50_1x', 'mmdet 3.3.0 autoassign/autoassign_r50-caffe_fpn_1x_coco.py', dict(NO_NORM_DECAY, **ONE, norm='frozen', p6_from='c5')),
    ('fcos_r101_2x_ms', 'tianzhi0549/FCOS configs/fcos/fcos_imprv_R_101_FPN_2x.yaml', dict(MASKRCNN, **TWO, scales=(640, 800), **IMPROVED)),
    ('fcos_x101_2x_ms', 'tianzhi0549/FCOS configs/fcos/fcos_imprv_X_101_64x4d_FPN_2x.yaml', dict(MASKRCNN, **TWO, scales=(640, 800), **IMPROVED)),
    ('atss_r50_1x', 'sfzhang15/ATSS configs/atss/atss_R_50_FPN_1x.yaml', dict(MASKRCNN, **ONE, **ANCHOR, deform_last=None)),
    ('atss_r50_dcn_1x', 'sfzhang15/ATSS configs/atss/atss_dcnv2_R_50_FPN_1x.yaml', dict(MASKRCNN, **ONE, **ANCHOR, **DEFORMED)),
    ('atss_r101_dcn_2x_ms', 'sfzhang15/ATSS configs/atss/atss_dcnv2_R_101_FPN_2x.yaml', dict(MASKRCNN, **TWO, **ANCHOR, scales=(640, 800), **DEFORMED)),
    ('atss_x101_2x_ms', 'sfzhang15/ATSS configs/atss/atss_X_101_64x4d_FPN_2x.yaml', dict(MASKRCNN, **TWO, **ANCHOR, scales=(640, 800), deform_last=None)),
    ('atss_x101_dcn_2x_ms', 'sfzhang15/ATSS configs/atss/atss_dcnv2_X_101_64x4d_FPN_2x.yaml', dict(MASKRCNN, **TWO, **ANCHOR, scales=(640, 800), deform_last=True, deformable=(4, 5))),
    ('gfl_r101_2x_ms', 'mmdet 3.3.0 gfl/gfl_r101_fpn_ms-2x_coco.py', dict(MMDET, **TWO, scales=(480, 800), norm='eval', p7_relu=False, tower_bias=False)),
    ('gfl_r101_dcn_2x_ms', 'mmdet 3.3.0 gfl/gfl_r101-dconv-c3-c5_fpn_ms-2x_coco.py', dict(MMDET, **TWO, scales=(480, 800), deformable=(3, 4, 5), deform_last=None)),
    ('gflv2_r50_1x', 'implus/GFocalV2 configs/gfocal/gfocal_r50_fpn_1x.py', dict(MMDET, **ONE, norm='eval', p7_relu=False, tower_bias=False)),
    ('vfnet_r50_1x', 'mmdet 3.3.0 vfnet/vfnet_r50_fpn_1x_coco.py', dict(MMDET, **ONE, bias_lr=2., bias_decay=0., warmup_start=.1, norm='eval', p7_relu=None, head_convs=3, tower_bias=False)),
    ('tood_x101_2x_ms', 'mmdet 3.3.0 tood/tood_x101-64x4d_fpn_ms-2x_coco.py', dict(MMDET, **TWO, scales=(480, 800), norm='eval', p7_relu=False))]

@pytest.mark.parametrize('name, source, values', [pytest.param(*r, id=r[0]) for r in RELEASES])
def test_values_are_those_of_the_releases(name, source, values):
    "Each value where the file has it; None: not set, so the default, which is the release's."
    knobs = dict(P.PRESETS[name].knobs)
    c = T.as_config(knobs); d = dict(c.detector_options)
    have = {f.name: getattr(c, f.name) for f in T.dataclasses.fields(T.Config)} | d | d.get('head_options', {}) | d.get('backbone_options', {})
    have['drops'] = tuple(round(m*c.epochs, 9) for m in c.milestones)
    have['scales'] = (min(c.scales), max(c.scales)) if c.scales else None
    assert {k: have.get(k) for k in values} == values, source
