"Published detectors: our numbers are the official ones (kept by scripts/official.py), and what cannot be converted is refused in a line."
import importlib.util, re, sys, types
from pathlib import Path
import numpy as np, pytest, torch
from golden_util import same_record
from ala_nb import convert as C
from ala_nb.detector import Detector, load_detector, made_by, our_names, read_weights, save_weights
from ala_nb.geometry import InputError

spec = importlib.util.spec_from_file_location('official', Path(__file__).resolve().parent.parent/'scripts'/'official.py')
O = importlib.util.module_from_spec(spec); spec.loader.exec_module(O)
GOLDEN = Path(__file__).parent/'golden'/'official'

@pytest.fixture(scope='module', params=list(O.CASES))
def case(request):
    with np.load(GOLDEN/f'{request.param}.npz') as z: kept = dict(z)
    return request.param, kept, O.state_of(kept)

def test_official_numbers(case):
    "Features, head, losses, gradients and every detection, in float64."
    name, kept, state = case
    same_record(O.our_record(name, state), kept)
    assert name.endswith('_mixed') or all(len(kept[f'scores_{i}']) >= 20 for i in (0, 1))

def test_command_writes_a_run(case, tmp_path, capsys):
    name, kept, state = case
    if name in ('autoassign', 'atss_mixed'): pytest.skip('the others show it')
    torch.save(dict(state_dict={k: v.float() for k, v in state.items()}, meta=dict(dataset_meta=dict(classes=tuple('abcde')))), tmp_path/'x.pth')
    assert C.main([str(tmp_path/'x.pth'), '--form', name.removesuffix('_few'), '--style', 'pytorch', '--out', str(tmp_path/'run')]) == 0
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['best.safetensors', 'config.json', 'last.safetensors']
    model = load_detector(tmp_path/'run')
    assert model.classes == list('abcde') if name != 'torchvision' else model.classes[0] == 'background'
    with torch.no_grad(): d, = model.detect([O.images()[1].float()/255], score_threshold=.05)
    if name == 'torchvision': np.testing.assert_allclose(d['scores'][:10], kept['scores_1'][:10], atol=1e-2)
    capsys.readouterr()

@pytest.mark.parametrize('change,words', [
    (lambda s: {k: v for k, v in s.items() if 'conv_reg' not in k}, 'head.box'), (lambda s: {k: v for k, v in s.items() if 'neck' not in k}, 'pyramid'),
    (lambda s: {k: v for k, v in s.items() if k != 'bbox_head.conv_reg.weight'}, 'bbox_head.conv_reg.weight'), (lambda s: {k: v for k, v in s.items() if k != 'bbox_head.conv_cls.weight'}, 'no bbox_head.conv_cls.weight'),
    (lambda s: {k: v for k, v in s.items() if 'layer3' not in k}, 'blocks'), (lambda s: {k[9:]: v for k, v in s.items() if k.startswith('backbone.')}, '--weights'),
    (lambda s: {**s, 'bbox_head.conv_reg.bias': torch.full((4,), float('nan'))}, 'bbox_head.conv_reg.bias has values that are not finite'), (lambda s: {**s, 'bbox_head.conv_cls.weight': torch.zeros(5, 8, 3, 3)}, 'another --form')])
def test_bad_checkpoints_end_in_a_line(change, words, tmp_path, capsys):
    with np.load(GOLDEN/'fcos.npz') as z: state = O.state_of(dict(z))
    torch.save(change(state), tmp_path/'x.pth')
    assert C.main([str(tmp_path/'x.pth'), '--form', 'fcos', '--out', str(tmp_path/'run')]) == 2
    err = capsys.readouterr().err
    assert words in err and f"error: {tmp_path/'x.pth'}: " in err and err.count('\n') == 1 and not (tmp_path/'run').exists()

def test_form_is_asked_for_and_checked(tmp_path, capsys):
    with np.load(GOLDEN/'fcos.npz') as z: state = O.state_of(dict(z))
    torch.save(state, tmp_path/'x.pth')
    for more, words in (([], 'fcos_v1'), (['--form', 'fcoss'], 'fcos, '), (['--form', 'atss', '--from', 'mmdett'], 'mmdet, '), (['--form', 'fcos', '--style', 'cafe'], 'caffe'),
                        (['--from', 'torchvision'], "mmdet's names, not torchvision's"), (['--size', '-5'], 'size'), (['--size', '0', '--max_size', '-1'], 'max_size')):
        assert C.main([str(tmp_path/'x.pth'), '--out', str(tmp_path/'run'), *more]) == 2
        assert words in capsys.readouterr().err and not (tmp_path/'run').exists()
    torch.save(dict(state_dict=state, meta=dict(cfg="bbox_head=dict(type='FCOSHead', norm_on_bbox=True), backbone=dict(style='pytorch')")), tmp_path/'y.pth')
    assert C.main([str(tmp_path/'y.pth'), '--out', str(tmp_path/'run')]) == 0 and not load_detector(tmp_path/'run').config['bgr']

def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    "Other detectors, our own format, a folder, a file where the run should be; a file of torch before 1.6 is read."
    with np.load(GOLDEN/'torchvision.npz') as z: state = O.state_of(dict(z))
    model = Detector('fcos', 'tiny', 3); save_weights(model, tmp_path/'last.safetensors'); (tmp_path/'file').touch()
    torch.save({k: v for k, v in state.items() if 'ctrness' not in k}, tmp_path/'retina.pth'); torch.save({'bbox_head.retina_cls.weight': torch.ones(1)}, tmp_path/'mm.pth')
    torch.save(state, tmp_path/'tv.pth', _use_new_zipfile_serialization=False)
    for name, more, words in (('retina.pth', [], 'FCOS alone'), ('mm.pth', [], 'can be converted: fcos_v1'), ('last.safetensors', [], "ala_nb's own format"), ('', [], f'such as {tmp_path}/last.safetensors'),
                              ('tv.pth', ['--style', 'caffe'], 'leave --style caffe out'), ('tv.pth', ['--out', str(tmp_path/'file')], 'is a file'), ('tv.pth', ['--out', str(tmp_path/'file'/'run')], 'is a file')):
        assert C.main([str(tmp_path/name), '--out', str(tmp_path/'run'), *more]) == 2
        assert words in capsys.readouterr().err and not (tmp_path/'run').exists()
    assert C.main([str(tmp_path/'tv.pth'), '--out', str(tmp_path/'run')]) == 0 and load_detector(tmp_path/'run').config['method'] == 'fcos'

def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = Detector('fcos', 'tiny', 3); torch.nn.init.constant_(model.head.box.bias, float('nan')); save_weights(model, tmp_path/'last.safetensors')
    with pytest.raises(InputError, match='head.box.bias has values that are not finite'): Detector('fcos', 'tiny', 3, weights=str(tmp_path/'last.safetensors'))
    with pytest.raises(InputError, match='is a folder.*last.safetensors'): Detector('fcos', 'tiny', 3, weights=str(tmp_path))

def test_pickles_with_code_are_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self): return print, ('ran',)
    for name, x in (('a', Evil()), ('b', dict(state_dict=dict(w=torch.ones(1)), meta=[Evil()]))):
        torch.save(x, tmp_path/f'{name}.pth')
        assert C.main([str(tmp_path/f'{name}.pth'), '--out', str(tmp_path/'run')]) == 2
        out = capsys.readouterr()
        assert 'ran' not in out.out and 'nothing of it was run' in out.err and not (tmp_path/'run').exists()

def test_a_pickle_with_code_as_weights(tmp_path, capsys):
    class Evil:
        def __reduce__(self): return print, ('ran',)
    torch.save(dict(state_dict=dict(w=torch.ones(1)), meta=Evil()), tmp_path/'x.pth')
    with pytest.raises(InputError, match='print, which is neither a tensor nor a number; nothing of it was run.*ala_nb.convert'): read_weights(tmp_path/'x.pth')
    assert 'ran' not in capsys.readouterr().out

def test_log_of_mmengines_runner_is_passed_over(tmp_path, monkeypatch):
    "Its checkpoints hold objects of mmengine and NumPy beside the weights; neither is needed to read them."
    class HistoryBuffer:
        def __init__(self): self.log, self.functions = np.arange(3.), dict(mean=getattr(np.ndarray, 'mean'))
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = 'mmengine.logging.history_buffer', 'HistoryBuffer'
    for name in ('mmengine', 'mmengine.logging', 'mmengine.logging.history_buffer'): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules['mmengine.logging.history_buffer'].HistoryBuffer = HistoryBuffer
    torch.save(dict(state_dict={'module.a': torch.ones(1)}, meta=dict(cfg='x'), message_hub=dict(log_scalars={'train/loss': HistoryBuffer()})), tmp_path/'x.pth')
    monkeypatch.undo()
    state, notes = C.read_checkpoint(tmp_path/'x.pth')
    assert list(state) == ['a'] and notes == dict(cfg='x') and 'mmengine' not in sys.modules

def test_weights_option_takes_a_whole_official_detector(tmp_path):
    "Body, pyramid and towers; a head of other classes stays as drawn."
    with np.load(GOLDEN/'fcos.npz') as z: state = O.state_of(dict(z))
    torch.save(dict(state_dict=state), tmp_path/'x.pth')
    with pytest.warns(UserWarning, match='2 of pyramid, head and method do not fit'): model = Detector('fcos', 'resnet18', 3, channels=64, head_convs=2, weights=str(tmp_path/'x.pth'))
    for ours, theirs in (('body.layer4.1.conv2.weight', 'backbone.layer4.1.conv2.weight'), ('pyramid.fpn.extra_blocks.convs.1.bias', 'neck.fpn_convs.4.conv.bias'),
                         ('head.box_tower.3.weight', 'bbox_head.reg_convs.1.conv.weight')):
        torch.testing.assert_close(model.state_dict()[ours], state[theirs].float())
    assert model.head.cls.weight.shape[0] == 3

def test_names_of_other_programs():
    d2 = dict(zip(['backbone.bottom_up.stem.conv1.weight', 'backbone.bottom_up.stem.conv1.norm.weight', 'backbone.bottom_up.res4.2.conv3.norm.running_var', 'backbone.bottom_up.res3.0.shortcut.weight',
         'backbone.fpn_lateral3.weight', 'backbone.fpn_lateral4.weight', 'backbone.fpn_lateral5.weight', 'backbone.fpn_output5.bias', 'backbone.top_block.p7.weight', 'head.cls_subnet.3.weight',
         'head.bbox_pred.bias', 'head.obj_score.bias', 'mu'], [torch.zeros(1)]*13))
    found, left = our_names(d2, made_by(d2))
    assert not left and {'body.conv1.weight', 'body.bn1.weight', 'body.layer3.2.bn3.running_var', 'body.layer2.0.downsample.0.weight', 'pyramid.fpn.inner_blocks.2.0.weight',
        'pyramid.fpn.layer_blocks.2.0.bias', 'pyramid.fpn.extra_blocks.convs.1.weight', 'head.cls_tower.3.weight', 'head.box.bias', 'head.third.bias', 'method.mu'} <= set(found)
    atss = {k: torch.zeros(1) for k in ('backbone.body.stem.bn1.weight', 'backbone.body.layer2.0.downsample.1.weight', 'backbone.fpn.fpn_inner2.weight', 'backbone.fpn.top_blocks.p6.bias',
                                        'rpn.head.bbox_tower.0.weight', 'rpn.head.scales.0.scale', 'rpn.head.centerness.bias')}
    found, left = our_names(atss, made_by(atss))
    assert not left and {'body.bn1.weight', 'body.layer2.0.downsample.1.weight', 'pyramid.fpn.inner_blocks.0.0.weight', 'pyramid.fpn.extra_blocks.convs.0.bias', 'head.box_tower.0.weight',
                         'head.scales', 'head.third.bias'} == set(found)

def test_swin_checkpoint_of_mmdetection():
    "A detector with mmdetection's Swin names, merging weights in its order: what comes out has ours, and the first map's normalisation (not used by o2f) may be missing."
    from ala_nb.detector import StagedBody, swin_names
    torch.manual_seed(0)
    model = Detector('o2f', 'swin_t', 3, channels=64, head_convs=1); own = model.state_dict()
    def theirs(k, v):
        if not k.startswith('body.'): return None
        k = k[5:]
        if 'position_index' in k: return None
        for i in (2, 4, 6): k = k.replace(f'features.{i}.', f'stages.{i//2-1}.downsample.')
        for i in (1, 3, 5, 7): k = k.replace(f'features.{i}.', f'stages.{i//2}.blocks.')
        for a, b in (('features.0.0.', 'patch_embed.projection.'), ('features.0.2.', 'patch_embed.norm.'), ('.attn.', '.attn.w_msa.'), ('.mlp.0.', '.ffn.layers.0.0.'), ('.mlp.3.', '.ffn.layers.1.')): k = k.replace(a, b)
        for i in range(4): k = k.replace(f'norms.{i}.', f'norm{i}.')
        if 'downsample' in k: v = v.view(*v.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :].transpose(-1, -2).reshape(v.shape)
        return None if k.startswith('norm0') else (f'backbone.{k}', v)
    state = dict(filter(None, (theirs(k, v) for k, v in own.items())))
    for k, v in own.items():
        if m := re.match(r'pyramid\.fpn\.(inner|layer)_blocks\.(\d)\.0\.(.*)', k): state[f"neck.{dict(inner='lateral', layer='fpn')[m[1]]}_convs.{m[2]}.conv.{m[3]}"] = v
        elif m := re.match(r'pyramid\.fpn\.extra_blocks\.convs\.(\d)\.(.*)', k): state[f'neck.fpn_convs.{int(m[1])+3}.conv.{m[2]}'] = v
        elif m := re.match(r'head\.(cls|box|third)_tower\.(\d)\.(.*)', k):
            what, i = dict(cls='cls', box='reg', third='centerness')[m[1]], int(m[2]); state[f"bbox_head.{what}_convs.{i//3}.{'gn' if i%3 else 'conv'}.{m[3]}"] = v
        elif m := re.match(r'head\.(cls|box|third)\.(.*)', k): state[f"bbox_head.conv_{dict(cls='cls', box='reg', third='centerness')[m[1]]}.{m[2]}"] = v
        elif k == 'head.scales': state |= {f'bbox_head.scales.{i}.scale': s for i, s in enumerate(v)}
    again, left = C.convert_state(state)
    assert not left and again.config['method'] == 'o2f' and again.config['backbone'] == 'swin_t' and again.config['norm'] == 'own'
    for k, v in again.state_dict().items(): assert 'norms.0' in k or torch.equal(v, own[k]), k
