"The detector: every part on its own, the whole in training and evaluation, its files."
import json, re, warnings
import pytest, torch, torchvision
from torch import nn
from ala_nb import detector as D
from ala_nb.detector import Detector, Head, HeadSpec, Method, Predictions, load_detector, save_weights
from ala_nb.geometry import InputError, boxes_to_distances, grid_points, level_sizes
from ala_nb.methods import Assignment, available, build
from ala_nb.pairs import inside_pairs
from test_contract import joined

class Toy(Method):
    "Whatever head is asked for; a loss that reaches every output."
    def __init__(self, num_classes=3, **spec): super().__init__(num_classes, HeadSpec(**spec))
    def assign(self, preds, objects, progress):
        losses = dict(cls=preds.cls_logits.sigmoid().mean(), box=preds.distances.mean()*.01)
        for name in ('obj_logits', 'property_logits', 'pooled'):
            if getattr(preds, name) is not None: losses[name] = getattr(preds, name).sigmoid().mean()
        return Assignment(losses, inside_pairs(preds, objects))

EVERYTHING = dict(third='objectness', third_convs=3, property_branch=True, pooled=True, refine='deform', box_activation='relu', box_bias=4.)

def target(*rows, n=3):
    t = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return dict(boxes=t[:, :4], labels=t[:, 4].long())

def loud(model, bias=-1.):
    "An untrained detector whose scores pass the threshold."
    nn.init.constant_(model.head.cls.bias, bias)
    return model.eval()


# ---- parts

@pytest.mark.parametrize('name', ['tiny', 'resnet18', 'resnet34', 'resnet50', 'resnet101'])
def test_every_backbone_trains_and_detects(name):
    model = Detector(Toy(), name, 3, channels=16, head_convs=1)
    losses = model([torch.rand(3, 64, 64)]*2, [target((4, 4, 40, 50, 1)), target()])
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    out, = model.eval()([torch.rand(3, 64, 64)])
    assert set(out) == {'boxes', 'labels', 'scores'}

@pytest.mark.parametrize('name', ['resnext101_64x4d', 'resnext101_32x8d'])
def test_resnext_shapes(name):
    with torch.device('meta'):
        model = Detector(Toy(), name, 3)
        levels = model.pyramid(model.body(torch.empty(1, 3, 96, 128)))
    assert [tuple(m.shape) for m in levels] == [(1, 256, h, w) for h, w in level_sizes(96, 128)]
    reference = torchvision.models.get_model_builder(name)
    with torch.device('meta'): keys = set(reference(weights=None).state_dict())
    assert set(model.body.state_dict()) == {k for k in keys if not k.startswith('fc.')}

class Own(nn.Module):
    "A backbone as a user writes one; its options in `options`, so that a detector with it can be written down."
    stages = ('stem',), ('a',), ('b',), ('c',), ('d',)
    def __init__(self, width:int=8):
        super().__init__()
        self.options, self.widths = dict(width=width), (width,)*4
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        for n in 'abcd': setattr(self, n, nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()))
    def forward(self, x):
        x, out = self.stem(x), []
        for n in 'abcd': out.append(x := getattr(self, n)(x))
        return out

@pytest.mark.parametrize('name,options', [('resnet18', dict(deformable=(3, 4, 5))), ('resnet50', dict(style='caffe', deformable=[5])), ('swin_t', dict(drop_path=.5)),
                                          ('convnext_tiny', {}), ('test_detector:Own', dict(width=4))])
def test_backbones_with_options_train_detect_and_come_back(name, options, tmp_path):
    torch.manual_seed(0)
    model = Detector('fcos', name, 3, channels=16, head_convs=1, backbone_options=options)
    sum(model([torch.rand(3, 64, 64)]*2, [target((4, 4, 40, 50, 1)), target()]).values()).backward()
    dead = [n for n, p in model.body.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not dead
    again = load_detector(save_weights(model.eval(), tmp_path/'m.safetensors'))
    x = [torch.rand(3, 64, 80)]
    assert again.config == model.config and torch.equal(again.predict_maps(x)[0].cls_logits, model.predict_maps(x)[0].cls_logits)

def test_own_backbone_given_ready_made():
    model = Detector('fcos', Own(4), 3, channels=16, head_convs=1, trainable_layers=3, norm='eval')
    assert model.config['backbone'].endswith('test_detector:Own') and model.config['backbone_options'] == dict(width=4)
    again = Detector(**model.config)
    assert set(again.state_dict()) == set(model.state_dict())
    assert {n.split('.')[1] for n, p in again.body.named_parameters() if p.requires_grad} == set('bcd')
    assert not any(m.training for m in again.train().body.modules() if isinstance(m, nn.BatchNorm2d))
    unnamed = Own(4); del unnamed.options
    with pytest.raises(InputError, match='ready-made'): Detector('fcos', unnamed, 3, channels=16).config

@pytest.mark.parametrize('options,words', [(dict(backbone='nowhere:Net'), 'no module'), (dict(backbone='subprocess:Popen'), 'no subclass'),
    (dict(backbone='resnet50', backbone_options=dict(deformable=(1,))), 'from 2 to 5'), (dict(backbone='resnet50', backbone_options=dict(deform=(3,))), "'deformable'"),
    (dict(backbone='swin_t', backbone_options=dict(drop_path=2)), 'drop_path'), (dict(backbone='tiny', backbone_options=[1]), 'backbone_options'),
    (dict(backbone='swin_t', norm='batch'), 'norm'), (dict(backbone='resnet18', norm='own'), 'norm'), (dict(backbone='resnet50', backbone_options=dict(norm='batch')), "`norm`")])
def test_bad_backbones_are_refused_in_a_line(options, words):
    with pytest.raises(InputError, match=words) as e: Detector('fcos', num_classes=3, **options)
    assert '\n' not in str(e.value)

def test_timm_backbone():
    pytest.importorskip('timm')
    model = Detector('fcos', 'timm:resnet10t', 3, channels=16, head_convs=1, norm='eval')
    sum(model([torch.rand(3, 70, 64)], [target((4, 4, 40, 50, 1))]).values()).backward()
    assert model.body.widths == (64, 128, 256, 512) and Detector(**model.config).config == model.config
    for name, words in (('timm:resnet10tt', 'resnet10t'), ('timm:vit_tiny_patch16_224', 'strides')):
        with pytest.raises(InputError, match=words): Detector('fcos', name, 3)

def test_blue_green_red():
    torch.manual_seed(0)
    a = Detector('fcos', 'tiny', 3, mean=(.1, .2, .3), std=(1., 2., 3.)).eval()
    b = Detector('fcos', 'tiny', 3, mean=(.1, .2, .3), std=(1., 2., 3.), bgr=True).eval()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.body.stage0[0][0].weight.copy_(a.body.stage0[0][0].weight.flip(1))
        x = [torch.rand(3, 64, 64)]
        torch.testing.assert_close(a.predict_maps(x)[0].cls_logits, b.predict_maps(x)[0].cls_logits)

@pytest.mark.parametrize('norm', D.NORMS)
@pytest.mark.parametrize('name', ['tiny', 'resnet18'])
def test_norms_and_frozen_stages(name, norm):
    model = Detector(Toy(), name, 3, channels=16, head_convs=1, norm=norm, trainable_layers=2)
    kind = dict(batch=nn.BatchNorm2d, frozen=torchvision.ops.FrozenBatchNorm2d, eval=D.EvalBatchNorm, group=nn.GroupNorm)[norm]
    assert any(isinstance(m, kind) for m in model.body.modules())
    first = [p for n in model.body.frozen for p in getattr(model.body, n).parameters()]
    assert first and not any(p.requires_grad for p in first)
    buffers = {k: v.clone() for k, v in model.body.named_buffers()}
    sum(model.train()([torch.rand(3, 64, 64)], [target((1, 1, 9, 9, 0))]).values()).backward()
    moved = {k.split('.')[0] for k, v in model.body.named_buffers() if not torch.equal(v, buffers[k])}
    assert moved.isdisjoint(model.body.frozen) and bool(moved) == (norm == 'batch')
    assert not any(p.grad is not None for p in first)

@pytest.mark.parametrize('n', range(6))
def test_trainable_layers_counts_from_the_last(n):
    body = D.make_body('resnet18').freeze(n)
    trained = {k.split('.')[0] for k, p in body.named_parameters() if p.requires_grad}
    assert trained == {m for names in body.stages[5-n:] for m in names}

@pytest.mark.parametrize('size', [(32, 32), (33, 65), (100, 120), (31, 257)])
@pytest.mark.parametrize('name,strides', [('tiny', (8, 16, 32)), ('tiny', (4, 8, 16, 32, 64)), ('resnet18', (8, 16, 32, 64, 128)),
                                          ('resnet18', (16, 32))])
def test_levels_have_the_sizes_that_geometry_says(name, strides, size):
    model = Detector(Toy(), name, 3, channels=8, head_convs=0, strides=strides).eval()
    preds, sizes = model.predict_maps([torch.rand(3, *size)])
    assert sizes == [size] and preds.level_sizes == level_sizes(*D.padded(size, 32), strides)
    assert preds.cls_logits.shape == (1, preds.n_locations, 3) and preds.distances.shape == (1, preds.n_locations, 4)
    assert tuple(preds.level_strides) == strides

@pytest.mark.parametrize('third', [None, 'objectness', 'centerness', 'iou'])
@pytest.mark.parametrize('act,bias', [('exp', 0.), ('relu', 4.)])
def test_head_is_what_the_sheet_says(third, act, bias):
    spec = HeadSpec(third=third, third_convs=2 if third else 0, box_activation=act, box_bias=bias, cls_prior=.02, offset=0.)
    head = Head(spec, 5, 32, 2, (8, 16))
    preds = head([torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)])
    assert (preds.obj_logits is None) == (third is None)
    assert abs(preds.cls_logits.sigmoid().mean() - .02) < .004
    first = (preds.distances/preds.strides[:, None]).mean()
    assert abs(first - (1 if act == 'exp' else 4)) < .1
    assert preds.offset == 0 and preds.points[0].tolist() == [0, 0]
    # a scale of a level multiplies what the activation sees
    with torch.no_grad(): head.scales[1] = 0.
    after = head([torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)]).distances[:, 64:]
    assert torch.all(after == (16. if act == 'exp' else 0.))

def test_o2f_third_branch():
    head = Head(HeadSpec(third='objectness', third_convs=3), 5, 256, 1, (8,))
    convs = [m for m in head.third_tower if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in convs] == [(256, 64, (3, 3)), (64, 64, (3, 3)), (64, 64, (3, 3))]
    assert [m.num_groups for m in head.third_tower if isinstance(m, nn.GroupNorm)] == [32]*3
    assert head.third.in_channels == 64

def test_head_starts_with_small_weights():
    head = Head(HeadSpec(**EVERYTHING), 5, 256, 1, (8,))
    for conv in (head.cls, head.box, head.third, head.shift, head.cls_tower[0], head.property.mix):
        assert abs(float(conv.weight.detach().std()) - .01) < .002
    assert torch.all(head.shift.bias == 0) and torch.all(head.box.bias == 4.)

def test_huge_logits_stay_finite():
    head = Head(HeadSpec(), 2, 16, 1, (8,))
    nn.init.constant_(head.box.bias, 1e4)
    preds = head([torch.randn(1, 16, 2, 2)])
    assert preds.distances.isfinite().all()

def test_pooled_and_property():
    head = Head(HeadSpec(property_branch=True, pooled=True), 2, 16, 1, (8, 16))
    levels = [torch.randn(2, 16, 6, 4), torch.randn(2, 16, 3, 2)]
    preds = head(levels)
    assert preds.property_logits.shape == (2, 2, 6, 4)       # two levels: the last one is the coarse one
    torch.testing.assert_close(preds.pooled, torch.stack([m.mean((2, 3)) for m in levels], 1))
    p = head.property
    enlarged = nn.functional.interpolate(levels[1], size=(6, 4), mode='bilinear', align_corners=False)
    literal = p.mix(torch.cat([p.lateral(levels[0]), enlarged], 1))
    torch.testing.assert_close(preds.property_logits, literal, atol=1e-5, rtol=1e-4)


# ---- refinement

def slow_refine(d, z, stride, how):
    "Location by location, by the words of the notebook."
    _, _, h, w = d.shape
    out = torch.zeros_like(d)
    outward, axis = (-1, -1, 1, 1), (0, 1, 0, 1)
    for b in range(len(d)):
        for k in range(4):
            for j in range(h):
                for i in range(w):
                    here = (i, j)
                    at = [i + float(z[b, 2*k, j, i]), j + float(z[b, 2*k+1, j, i])]
                    at[axis[k]] += outward[k]*float(d[b, k, j, i])/stride
                    if how == 'bilinear': at = [min(max(at[0], 0), w-1), min(max(at[1], 0), h-1)]
                    x0, y0 = int(at[0]//1), int(at[1]//1)
                    side = 0.
                    for y in (y0, y0+1):
                        for x in (x0, x0+1):
                            weight = (1-abs(at[0]-x))*(1-abs(at[1]-y))
                            inside = 0 <= x < w and 0 <= y < h
                            cell, (cx, cy) = ((x, y), (x, y)) if inside else (here, here)  # outside: the location itself
                            said = float(d[b, k, cy, cx])/stride
                            if how == 'bilinear': side += weight*said if weight else 0.
                            else: side += weight*(cell[axis[k]] + outward[k]*said)
                    dist = outward[k]*(at[axis[k]]-here[axis[k]]) + side if how == 'bilinear' else outward[k]*(side-here[axis[k]])
                    out[b, k, j, i] = max(dist, 0)*stride
    return out

@pytest.mark.parametrize('how', ['deform', 'bilinear'])
@pytest.mark.parametrize('size', [(5, 4), (1, 3), (1, 1)])
def test_refinement_is_what_the_words_say(how, size):
    d, z = torch.rand(2, 4, *size, dtype=torch.float64)*30, torch.randn(2, 8, *size, dtype=torch.float64)*2
    torch.testing.assert_close(D.refine_distances(d, z, 8., how), slow_refine(d, z, 8., how), atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize('how', ['deform', 'bilinear'])
def test_refinement_keeps_an_agreed_box_even_outside_the_map(how):
    p = grid_points([(6, 7)], (8,))[0]
    for box in ((-30., -3., 200., 100.), (1., -60., 59., 44.5)):
        d = boxes_to_distances(p, torch.tensor(box)).t().reshape(1, 4, 6, 7)                # all locations are inside
        torch.testing.assert_close(D.refine_distances(d, torch.randn(1, 8, 6, 7)*3, 8., how), d, atol=1e-3, rtol=1e-4)

@pytest.mark.parametrize('how', ['deform', 'bilinear'])
def test_refinement_gradients(how):
    d, z = torch.rand(1, 4, 3, 3, dtype=torch.float64)*10+8, torch.rand(1, 8, 3, 3, dtype=torch.float64)*.3+.1
    refine = lambda a, b: D.refine_distances(a, b, 8., how)
    assert torch.autograd.gradcheck(refine, (d.requires_grad_(), z.requires_grad_()), eps=1e-5, atol=1e-4)

def test_refined_distances_are_what_the_detector_returns():
    for how in ('deform', 'bilinear'):
        model = Detector(Toy(refine=how, box_activation='relu', box_bias=4.), 'tiny', 3).train()
        losses = model([torch.rand(3, 64, 64)], [target((1, 1, 30, 30, 0))])
        sum(losses.values()).backward()
        assert model.head.shift.weight.grad.abs().sum() > 0
        assert (model.eval().predict_maps([torch.rand(3, 64, 64)])[0].distances >= 0).all()


# ---- in and out

@pytest.mark.parametrize('bad,words', [
    (dict(boxes=torch.tensor([[0., 0, float('nan'), 4]])), 'not finite'),
    (dict(boxes=torch.tensor([[0., 0, float('inf'), 4]])), 'not finite'),
    (dict(boxes=torch.tensor([[5., 0, 5, 4]])), 'positive width'), (dict(boxes=torch.tensor([[0., 4, 5, 3]])), 'positive width'),
    (dict(boxes=torch.zeros(1, 5)), r'\(G, 4\)'), (dict(boxes=torch.zeros(2, 4)), 'do not fit'), (dict(boxes=[[0, 0, 1, 1]]), 'a tensor'),
    (dict(labels=torch.tensor([3])), 'label 3'), (dict(labels=torch.tensor([-1])), 'label -1'), (dict(labels=torch.tensor([1.])), 'int64')])
def test_bad_targets_name_image_and_field(bad, words):
    model, good = Detector(Toy(), 'tiny', 3), target((1, 1, 5, 5, 0))
    for at in (0, 1):
        targets = [good, good]; targets[at] = {**good, **bad}
        with pytest.raises(InputError, match=rf'targets\[{at}\].*') as e: model([torch.rand(3, 32, 32)]*2, targets)
        assert re.search(words, str(e.value)) and '\n' not in str(e.value)

def test_the_faulty_box_is_counted_within_its_image():
    with pytest.raises(InputError, match=r'targets\[2\]: box 1'):
        D.check_targets([target((0, 0, 1, 1, 0)), target(), target((0, 0, 1, 1, 0), (3, 3, 2, 4, 0))], 3, 3)

def test_missing_and_mismatched_targets():
    model, im = Detector(Toy(), 'tiny', 3), torch.rand(3, 32, 32)
    for targets, words in ((None, 'eval'), ([], 'for 1 images'), ([dict(boxes=torch.zeros(0, 4))], "no 'labels'")):
        with pytest.raises(InputError, match=words): model([im], targets)

@pytest.mark.parametrize('images,words', [([torch.rand(1, 8, 8)], r'images\[0\]'), ([torch.zeros(3, 8, 8, dtype=torch.uint8)], '255'),
                                          ([torch.rand(3, 0, 8)], r'images\[0\]'), (['a.jpg'], 'str')])
def test_bad_images(images, words):
    with pytest.raises(InputError, match=words): Detector(Toy(), 'tiny', 3).eval()(images)

@pytest.mark.parametrize('empty', [target(), dict(boxes=torch.zeros(0), labels=torch.zeros(0))])
def test_images_without_objects(empty):
    model = Detector('fcos', 'tiny', 3)
    for targets in ([empty, target((1, 1, 20, 20, 2))], [empty, empty]):
        losses = model([torch.rand(3, 64, 64)]*2, targets); sum(losses.values()).backward()
        assert all(v.isfinite() for v in losses.values())

def test_no_images():
    model = Detector(Toy(), 'tiny', 3)
    assert model.eval()([]) == []
    with pytest.raises(InputError, match='an empty list'): model.train()([], [])

def test_a_picture_alone_and_in_company():
    for name, spec in (('tiny', {}), ('resnet18', {}), ('tiny', EVERYTHING)):
        model = loud(Detector(Toy(**spec), name, 3, channels=32, head_convs=1, score_threshold=.05))
        images = [torch.rand(3, 64, 90), torch.rand(3, 33, 20), torch.rand(3, 61, 70), torch.rand(3, 64, 90)]
        with torch.no_grad(): together, alone = model(images), [model([im])[0] for im in images]
        for im, a, b in zip(images, together, alone):
            assert len(a['scores']) == len(b['scores']) > 0
            for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-3 if k == 'boxes' else 1e-5, rtol=1e-5)
            h, w = im.shape[1:]
            assert a['boxes'].min() >= 0 and a['boxes'][:, 2].max() <= w and a['boxes'][:, 3].max() <= h
            assert (a['boxes'][:, 2:] > a['boxes'][:, :2]).all() and (a['scores'].diff() <= 0).all()

def dense_detections(preds, sizes, method, threshold, nms_threshold, topk, most, nms):
    "The slow way: every box of every location and class."
    out, scores = [], method.scores(preds)
    for b, (h, w) in enumerate(sizes):
        boxes, s, l = [], [], []
        for a, z in zip(preds.level_starts, preds.level_starts[1:]):
            flat = scores[b, a:z].reshape(-1)
            best = flat.argsort(descending=True)[:topk]
            best = best[flat[best] > threshold]
            at, k = best//preds.n_classes, best % preds.n_classes
            p, d = preds.points[a:z][at], preds.distances[b, a:z][at]
            corners = torch.cat([p-d[:, :2], p+d[:, 2:]], 1)
            boxes.append(torch.minimum(corners.clamp(min=0), torch.tensor([w, h, w, h])))
            s.append(flat[best]); l.append(k)
        boxes, s, l = map(torch.cat, (boxes, s, l))
        ok = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]); boxes, s, l = boxes[ok], s[ok], l[ok]
        kept = []
        for i in s.argsort(descending=True).tolist():
            apart = lambda j: l[j] != l[i] or torchvision.ops.box_iou(boxes[j][None], boxes[i][None]) <= nms_threshold
            if not nms or all(map(apart, kept)): kept.append(i)
        kept = kept[:most]
        out.append(dict(boxes=boxes[kept], labels=l[kept], scores=s[kept]))
    return out

@pytest.mark.parametrize('nms', [True, False])
@pytest.mark.parametrize('third', [None, 'objectness'])
@pytest.mark.parametrize('layout', ['maps', 'channels_last', 'flat'])
@pytest.mark.parametrize('mean', [-.5, -2.5])                             # many logits that can pass, or few
def test_detections_equal_the_slow_way(nms, third, layout, mean):
    sizes, strides = level_sizes(32, 48, (8, 16)), (8, 16)
    cls = [2*(torch.randn(2, 3, h, w)+mean) for h, w in sizes]; dist = [torch.rand(2, 4, h, w)*20 for h, w in sizes]
    obj = [torch.randn(2, 1, h, w) for h, w in sizes] if third else None
    if layout == 'channels_last': cls = [m.contiguous(memory_format=torch.channels_last) for m in cls]
    preds = Predictions.from_maps(cls, dist, obj, strides)
    if layout == 'flat': preds = Predictions(preds.cls_logits, preds.distances, preds.points, preds.strides, preds.obj_logits)
    method, how = Toy(third=third), ([(30, 48), (32, 41)], 3)
    a = D.detections(preds, how[0], method, nms, .1, .5, 20, 15)
    b = dense_detections(preds, how[0], method, .1, .5, 20, 15, nms)
    for x, y in zip(a, b):
        assert len(x['scores'])
        for k in x: torch.testing.assert_close(x[k], y[k])
        assert x['labels'].dtype == torch.int64 and x['boxes'].dtype == x['scores'].dtype == torch.float32

def test_nms_follows_method_then_config_then_call():
    images = [torch.rand(3, 64, 64)]
    model = loud(Detector(Toy(), 'tiny', 3, topk=50, max_detections=200, score_threshold=0., nms_threshold=.2))
    n = lambda **kw: len(model(images, **kw)[0]['scores'])
    assert n(nms=False) > n(nms=True) == n()
    model.method.nms = False; assert n() == n(nms=False)
    model._config['nms'] = True; assert n() == n(nms=True)
    assert len(model.detect(images, max_detections=7)[0]['scores']) == 7
    assert len(model.detect(images, score_threshold=1.)[0]['scores']) == 0
    with pytest.raises(InputError, match='max_detections'): model.detect(images, max_detection=7)

def test_no_detection_has_right_shapes_and_dtypes():
    out, = Detector(Toy(), 'tiny', 3).eval()([torch.rand(3, 40, 40)])
    assert out['boxes'].shape == (0, 4) and out['labels'].shape == out['scores'].shape == (0,)
    assert out['labels'].dtype == torch.int64 and out['boxes'].dtype == torch.float32

def test_diverged_weights_detect_nothing():
    model = Detector(Toy(), 'tiny', 3).eval()
    nn.init.constant_(model.head.cls.bias, float('nan'))
    assert len(model([torch.rand(3, 40, 40)])[0]['scores']) == 0

def test_targets_are_ignored_in_evaluation():
    assert isinstance(Detector(Toy(), 'tiny', 3).eval()([torch.rand(3, 32, 32)], [target()]), list)

def test_tv_tensors_are_welcome():
    from torchvision import tv_tensors
    im = tv_tensors.Image(torch.rand(3, 64, 64))
    t = dict(boxes=tv_tensors.BoundingBoxes(torch.tensor([[1., 2, 30, 40]]), format='XYXY', canvas_size=(64, 64)), labels=torch.tensor([1]))
    assert all(type(v) is torch.Tensor for v in Detector('fcos', 'tiny', 3)([im], [t]).values())


# ---- numbers

def test_same_every_time():
    images, targets = [torch.rand(3, 64, 96), torch.rand(3, 50, 64)], [target((3, 4, 40, 44, 0)), target((10, 10, 60, 40, 2))]
    grads = []
    for _ in range(2):
        torch.manual_seed(3); model = Detector('fcos', 'tiny', 3)
        sum(model(images, targets).values()).backward(); grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))

def test_channels_last_changes_nothing_but_the_layout():
    images, targets = [torch.rand(3, 64, 96)], [target((3, 4, 40, 44, 0))]
    a = Detector('fcos', 'tiny', 3); b = Detector('fcos', 'tiny', 3, channels_last=True); b.load_state_dict(a.state_dict())
    assert b.body.stage1[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    for k, v in a(images, targets).items(): torch.testing.assert_close(b(images, targets)[k], v, atol=1e-5, rtol=1e-4)

def test_float64_and_autocast():
    images, targets = [torch.rand(3, 64, 64)], [target((3, 4, 40, 44, 0))]
    model = Detector(Toy(**EVERYTHING), 'tiny', 3)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out, preds = model.assign(images, targets)
        assert preds.distances.dtype == torch.float32 and all(v.dtype == torch.float32 and v.isfinite() for v in out.losses.values())
        assert loud(model)(images)[0]['boxes'].dtype == torch.float32
    out.total.backward(); assert all(p.grad.isfinite().all() for p in model.parameters())
    double = model.double().train()
    out, preds = double.assign(images, targets)
    assert preds.distances.dtype == preds.cls_logits.dtype == out.total.dtype == torch.float64

@pytest.mark.parametrize('classes', [1, 3])
def test_parameters_of_torchvisions_fcos(classes):
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    theirs = FCOS(resnet_fpn_backbone(backbone_name='resnet18', weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5,
                                      returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)), num_classes=classes)
    count = lambda m: sum(p.numel() for p in m.parameters())
    ours = Detector('fcos', 'resnet18', classes)
    assert count(ours) == count(theirs) + 5 and 19.0e6 < count(ours) < 19.2e6
    # and the same network: with their weights, their logits
    def copy_convs(a, b):
        a, b = ([m for m in x.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))] for x in (a, b))
        for p, q in zip(a, b, strict=True): p.load_state_dict(q.state_dict())
    ours.body.load_state_dict(theirs.backbone.body.state_dict())
    for part in ('inner_blocks', 'layer_blocks', 'extra_blocks'):
        copy_convs(getattr(ours.pyramid.fpn, part), getattr(theirs.backbone.fpn, part))
    h, g = ours.head, theirs.head
    for a, b in ((h.cls_tower, g.classification_head.conv), (h.cls, g.classification_head.cls_logits),
                 (h.box_tower, g.regression_head.conv), (h.box, g.regression_head.bbox_reg),
                 (h.third, g.regression_head.bbox_ctrness)): copy_convs(a, b)
    ours.eval(), theirs.eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = list(theirs.backbone(x).values())
        preds, out = h(ours.pyramid(ours.body(x))), g(maps)
    torch.testing.assert_close(preds.cls_logits, out['cls_logits'], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(preds.obj_logits, out['bbox_ctrness'][..., 0], atol=1e-4, rtol=1e-4)


# ---- names and numbers in the configuration

@pytest.mark.parametrize('options,words', [
    (dict(method='fcosx'), "'fcos'"), (dict(backbone='resnet81'), "'resnet18'"), (dict(norm='bach'), "'batch'"),
    (dict(p6_from='c6'), "'c5'"),
    (dict(chanels=8), "'channels'"), (dict(num_classes=0), 'num_classes'), (dict(num_classes=2.5), 'num_classes'),
    (dict(channels='48'), 'channels'),
    (dict(head_convs=-1), 'head_convs'), (dict(trainable_layers=6), '0 to 5'), (dict(strides=(8, 32)), 'strides'), (dict(topk=0), 'topk'),
    (dict(score_threshold=-.1), 'score_threshold'), (dict(nms_threshold='x'), 'nms_threshold'), (dict(nms='no'), 'nms'),
    (dict(weights='nothere.pth'), 'nothere.pth'), (dict(weights='imagenet'), 'ImageNet'),
    (dict(method_options=dict(centre=1)), 'centre_sampling')])
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words) as e: Detector(**{**dict(method='fcos', backbone='tiny', num_classes=3), **options})
    assert '\n' not in str(e.value)

def test_built_method():
    method = Toy(3)
    assert Detector(method, 'tiny', 3).method is method
    with pytest.raises(InputError, match='num_classes'): Detector(method, 'tiny', 4)
    with pytest.raises(InputError, match='method_options'): Detector(method, 'tiny', 3, method_options=dict(a=1))
    class Local(Toy): pass
    with pytest.raises(InputError, match='cannot be written down'): Detector(Local(3), 'tiny', 3).config
    assert Detector(build('fcos', 3, reg_loss='iou'), 'tiny', 3).config == Detector('fcos', 'tiny', 3, method_options=dict(reg_loss='iou')).config

@pytest.mark.parametrize('options', [
    {}, dict(backbone='resnet18', norm='frozen', trainable_layers=2, p6_from='c5', channels=32),
    dict(strides=(4, 8, 16), nms=False, mean=(.5, .5, .5), pad_to=16), dict(method_options=dict(ranges=(20, 40)))])
def test_config_rebuilds(options):
    model = Detector(**{**dict(method='fcos', backbone='tiny', num_classes=3), **options})
    config = json.loads(json.dumps(model.config))
    again = Detector(**config)
    assert again.config == config == model.config
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}
    assert shapes(again) == shapes(model) and again.head.spec == model.head.spec
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]

def test_a_method_is_told_the_pyramids_channels():
    pytest.importorskip('ala_nb.ala')
    model = Detector('ala', 'tiny', 3)
    losses = model([torch.rand(3, 64, 64)], [target((4, 4, 40, 50, 1))])
    assert model.config['method_options']['in_channels'] == 48 and all(v.isfinite() for v in losses.values())


# ---- weights

def test_weights_from_files(tmp_path):
    donor = torchvision.models.resnet18(weights=None)
    state = donor.state_dict()
    forms = dict(plain=state, wrapped=dict(state_dict={f'module.{k}': v for k, v in state.items()}, epoch=3),
                 detector={**{f'backbone.body.{k}': v for k, v in state.items()}, 'head.x': torch.zeros(1)},
                 mmdet=dict(state_dict={f'backbone.{k}': v for k, v in state.items()}))
    for name, form in forms.items():
        torch.save(form, tmp_path/f'{name}.pth')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            model = Detector('fcos', 'resnet18', 3, weights=tmp_path/f'{name}.pth')
        c = model.config
        assert c['norm'] == 'frozen' and c['trainable_layers'] == 3 and c['weights'] == str(tmp_path/f'{name}.pth')
        ours = model.body.state_dict()
        assert all(torch.equal(ours[k], state[k]) for k in ours)
    # with frozen statistics it computes what torchvision's does in evaluation
    x = torch.rand(1, 3, 64, 64); donor.eval(); model.train()
    want = donor.layer2(donor.layer1(donor.maxpool(donor.relu(donor.bn1(donor.conv1(x))))))
    torch.testing.assert_close(model.body(x)[1], want, atol=1e-5, rtol=1e-4)

def test_part_of_a_backbone_is_taken_with_a_warning(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith('layer4')}, tmp_path/'part.pth')
    with pytest.warns(UserWarning, match='layer4'):
        model = Detector('fcos', 'resnet18', 3, weights=tmp_path/'part.pth', norm='batch', trainable_layers=5)
    assert torch.equal(model.body.layer3[0].conv1.weight, state['layer3.0.conv1.weight'])

def test_weights_that_do_not_fit(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path/'r18.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    (tmp_path/'broken.pth').write_bytes(b'PK\3\4 nothing'); (tmp_path/'broken.safetensors').write_bytes(b'\xff'*20)
    for name, file, norm, words in (('resnet50', 'r18.pth', None, 'another backbone'), ('tiny', 'r18.pth', None, 'no tensor'),
                                    ('resnet18', 'r18.pth', 'group', "norm='group'"), ('tiny', 'list.pth', None, 'no state dict'),
                                    ('tiny', 'broken.pth', None, 'cannot be read'), ('tiny', 'broken.safetensors', None, 'cannot be read')):
        with pytest.raises(InputError, match=words) as e: Detector('fcos', name, 3, weights=tmp_path/file, norm=norm)
        assert file in str(e.value) and '\n' not in str(e.value)

def test_imagenet_without_a_network(monkeypatch):
    from urllib.error import URLError
    def offline(*a, **kw): raise URLError('no network')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    with pytest.raises(InputError, match='put the file at .*checkpoints.*resnet18-.*pth'):
        Detector('fcos', 'resnet18', 3, weights='imagenet')
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda url, **kw: state)
    model = Detector('fcos', 'resnet18', 3, weights='imagenet')
    assert torch.equal(model.body.conv1.weight, state['conv1.weight']) and not model.body.conv1.weight.requires_grad

def test_own_weights_for_other_classes(tmp_path):
    a = Detector('fcos', 'tiny', 3); save_weights(a, tmp_path/'a.safetensors')
    with pytest.warns(UserWarning, match='2 of pyramid, head and method'): b = Detector('fcos', 'tiny', 9, weights=tmp_path/'a.safetensors')
    for k, v in a.state_dict().items(): assert k.startswith('head.cls.') or torch.equal(v, b.state_dict()[k])

def test_save_and_load(tmp_path):
    for options in (dict(backbone='tiny'), dict(backbone='resnet18', norm='batch', channels=16, channels_last=True)):
        model = Detector('fcos', num_classes=3, **options)
        for _ in range(2): model([torch.rand(3, 64, 64)], [target((4, 4, 40, 50, 1))])      # running statistics move
        model.classes = ['a', 'b', 'c']
        for name in ('best', 'last'): save_weights(model, tmp_path/f'{name}.safetensors')
        (tmp_path/'config.json').write_text(json.dumps(dict(detector=model.config, classes=model.classes, train={})))
        images = [torch.rand(3, 50, 64)]; loud(model); save_weights(model, tmp_path/'best.safetensors')
        want = model(images)[0]
        stored = dict(detector=model.config, classes=model.classes)
        for again in (load_detector(tmp_path), load_detector(str(tmp_path), 'best'), load_detector(tmp_path/'config.json'),
                      load_detector(tmp_path/'best.safetensors'), load_detector(stored, tmp_path/'best.safetensors')):
            assert again.config == model.config and again.classes == ['a', 'b', 'c'] and not again.training
            assert all(torch.equal(again(images)[0][k], want[k]) for k in want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best.safetensors', 'config.json', 'last.safetensors']

def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = Detector('fcos', 'tiny', 3); file = save_weights(model, tmp_path/'w.safetensors'); before = file.read_bytes()
    def fail(state, path, **kw):
        with open(path, 'wb') as f: f.write(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(D, 'save_file', fail)
    with pytest.raises(OSError): save_weights(model, file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['w.safetensors']

def test_loading_what_is_not_there(tmp_path):
    model = Detector('fcos', 'tiny', 3)
    with pytest.raises(InputError, match='config.json'): load_detector(tmp_path)
    (tmp_path/'config.json').write_text('{"detector": ')
    with pytest.raises(InputError, match='config.json.*complete'): load_detector(tmp_path)
    (tmp_path/'config.json').write_text('{"a": 1}')
    with pytest.raises(InputError, match='no detector'): load_detector(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(dict(detector=model.config)))
    with pytest.raises(InputError, match='best.safetensors'): load_detector(tmp_path)
    whole = save_weights(model, tmp_path/'best.safetensors').read_bytes()
    (tmp_path/'best.safetensors').write_bytes(whole[:len(whole)//2])
    with pytest.raises(InputError, match='best.safetensors.*complete'): load_detector(tmp_path)
    save_weights(Detector('fcos', 'tiny', 4), tmp_path/'best.safetensors')
    with pytest.raises(InputError, match='num_classes 4'): load_detector(tmp_path)

@pytest.mark.parametrize('name', ['swin_t', 'convnext_tiny'])
def test_blank_padding_has_a_gradient_of_usual_size(name):
    "Pictures of two shapes: what is blank has no variance to be divided by."
    torch.manual_seed(0)
    model = Detector('fcos', name, 3, channels=16, head_convs=1).train()
    images, targets = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)], [target((3, 4, 40, 44, 0)), target()]
    sum(model(images, targets, .5).values()).backward()
    assert 0 < max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e3

WHOLE = [(n, {}) for n in available()] + [('poto', dict(max_filter=True, aux='atss')), ('dw', dict(task_head=True)),
                                         ('vfnet', dict(star_norm=True, pred_weight=1.))]

@pytest.mark.parametrize('last', [False, True], ids=['plain', 'channels_last'])
@pytest.mark.parametrize('name,options', WHOLE, ids=['-'.join([n, *map(str, o)]) for n, o in WHOLE])
def test_one_block_of_all_levels(name, options, last, monkeypatch):
    "A GPU's form of the class maps, here on a CPU: the same losses, gradients and detections."
    torch.manual_seed(0)
    model = loud(Detector(name, 'tiny', 3, method_options=options, channels=16, head_convs=1, channels_last=last).double())
    images, targets = [torch.rand(3, 64, 96).double(), torch.rand(3, 50, 64).double()], [target((3, 4, 40, 44, 0)), target()]
    for t, im in zip(targets, images): t['masks'] = torch.ones(len(t['labels']), *im.shape[1:], dtype=torch.bool)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    def seen():
        model.load_state_dict(start)                                     # running statistics too
        losses = model.train()(images, targets, .5); model.zero_grad(); sum(losses.values()).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad(): return losses, grads, model.eval()(images)
    (a, g, found), _ = seen(), joined(monkeypatch)
    b, h, again = seen()
    torch.testing.assert_close(dict(b), dict(a), rtol=1e-9, atol=1e-12); assert (g-h).abs().max() <= 1e-9*g.abs().max()
    for x, y in zip(found, again, strict=True):
        assert len(x['scores'])
        for k in ('boxes', 'scores', 'labels'): torch.testing.assert_close(y[k], x[k], rtol=1e-9, atol=1e-9)
        if model.method.masks: assert x['masks'].any() and torch.equal(y['masks'], x['masks'])

@pytest.mark.cuda
def test_on_a_gpu():
    model = Detector('fcos', 'tiny', 3).cuda()
    images, targets = [torch.rand(3, 64, 96), torch.rand(3, 50, 64)], [target((3, 4, 40, 44, 0)), target()]
    here = model(images, targets)                          # pictures and targets may stay on the host
    there = model([im.cuda() for im in images], [{k: v.cuda() for k, v in t.items()} for t in targets])
    for k in here: torch.testing.assert_close(here[k], there[k])
    with torch.autocast('cuda', dtype=torch.float16): losses = model(images, targets)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    assert loud(model)(images)[0]['boxes'].device.type == 'cuda'


# ---- several sizes

def test_several_sizes_by_the_command(tmp_path, capsys):
    "evaluate --scales --flip: the images' own size without the mirror changes nothing; a run's limit of the long side holds."
    from ala_nb import evaluate as E
    from ala_nb.data import load_dataset
    torch.manual_seed(0)
    classes = list(load_dataset('shapes', 'val', n=1).classes)
    model = loud(Detector('fcos', 'tiny', len(classes), channels=16, head_convs=1), -2.)
    model.classes = classes
    save_weights(model, tmp_path/'best.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(dict(detector=model.config, classes=classes, train=dict(size=128, max_size=128))))
    found = {}
    for name, more in dict(plain=[], same=['--scales', '128'], many=['--scales', '64', '128', '400', '--flip']).items():
        argv = [tmp_path, '--data_options', 'n=3', '--device', 'cpu', '--results', tmp_path/f'{name}.json', *more]
        assert E.main([str(a) for a in argv]) == 0
        found[name] = json.loads((tmp_path/f'{name}.json').read_text())
    assert len(found['plain']) == len(found['same']) == len(found['many']) == 300
    a, b = (sorted(x['score'] for x in found[k]) for k in ('plain', 'same'))
    assert a == pytest.approx(b, abs=1e-5) and max(x['score'] for x in found['many']) >= max(a)-1e-5
    assert all(x['bbox'][0] >= -1e-3 and x['bbox'][0]+x['bbox'][2] <= 128.01 for x in found['many'])
    assert E.main([str(tmp_path), '--scales', '128', '--no-nms', '--data_options', 'n=3']) == 2
    assert 'joined by NMS' in capsys.readouterr().err


# ---- parts of the head

def test_weights_have_the_names_that_they_always_had():
    "Files of weights do not know that a head is made of parts."
    head = Head(HeadSpec(**EVERYTHING), 5, 32, 1, (8, 16))
    assert {k.rsplit('.', 1)[0] for k in head.state_dict()} - {'scales'} == {
        'cls_tower.0', 'cls_tower.1', 'box_tower.0', 'box_tower.1', 'cls', 'box', 'third', 'shift', 'property.lateral', 'property.mix',
        *(f'third_tower.{i}' for i in (0, 1, 3, 4, 6, 7))}

class Loose(D.Part):
    def __init__(self, plan): super().__init__(plan); self.x = nn.Parameter(torch.ones(1))

class Twice(D.Part):
    def __init__(self, plan): super().__init__(plan); self.box = nn.Conv2d(1, 1, 1)

class Extra(D.Part):
    "Looks at all levels; has a mode and a layer that must follow the head's."
    def __init__(self, plan, n:int=2): super().__init__(plan); self.mine = nn.Sequential(nn.Conv2d(plan.channels, n, 1), nn.Dropout())
    def forward(self, levels):
        for at in levels: at.extras['coefficients'] = self.mine(at.x)
        return dict(masks=self.mine(levels[0].x))

@pytest.mark.parametrize('spec,words', [(dict(refine=f'{__name__}:Loose'), "'x' outside of a layer"), (dict(refine=f'{__name__}:Twice'), "'box', a name"),
    (dict(tower='plane'), "tower: 'plane' does not exist; did you mean 'plain'"), (dict(box=None), 'box: None'), (dict(extra='pooled'), 'list of names'),
    (dict(refine=f'{__name__}:Tvice'), "'Twice'"), (dict(refine='torch.nn:Linear'), 'no subclass of Part'), (dict(refine='deform', options=dict(refine=dict(a=1))), "no option 'a'"),
    (dict(options=dict(refine=dict(a=1))), 'options'), (dict(box_convs=-1), 'box_convs')])
def test_wrong_parts_are_refused_in_a_line(spec, words):
    with pytest.raises(InputError) as e: Head(HeadSpec(**spec), 5, 32, 1, (8, 16))
    assert words in str(e.value) and '\n' not in str(e.value)

def test_a_part_of_ones_own_comes_back_from_a_file(tmp_path):
    own = dict(extra=[f'{__name__}:Extra'], options={f'{__name__}:Extra': dict(n=3)})
    model = Detector('fcos', 'tiny', 3, head_options=own).eval()
    preds, _ = model.predict_maps([torch.rand(3, 64, 64)])
    assert preds.maps['masks'].shape == (1, 3, 8, 8) and preds.extras['coefficients'].shape == (1, 64+16+4, 3)
    part, = (p for (slot, _), p in model.head.named.items() if slot == 'extra')
    assert not part.training and not part.mine.training
    model.train(); assert part.training and part.mine.training
    save_weights(model.eval(), tmp_path/'x.safetensors'); again = load_detector(tmp_path/'x.safetensors')
    torch.testing.assert_close(again.head.mine[0].weight, model.head.mine[0].weight)
    assert again.config == model.config and again.head.spec == model.head.spec
    half = model.to(torch.bfloat16).predict_maps([torch.rand(3, 64, 64)])[0].full_precision()
    assert half.maps['masks'].dtype == half.extras['coefficients'].dtype == torch.float32

def test_a_copy_computes_with_its_own_weights():
    import copy
    model = loud(Detector('dw', 'tiny', 3, method_options=dict(refine='deform'))); other = copy.deepcopy(model)
    for p in other.head.parameters(): nn.init.zeros_(p)
    x = [torch.rand(3, 64, 64)]
    assert other.predict_maps(x)[0].cls_logits.abs().max() == 0 and model.predict_maps(x)[0].cls_logits.abs().max() > 0

def test_distances_in_units_of_several_strides():
    one, eight = (Head(HeadSpec(box_unit=u), 2, 16, 1, (8, 16)) for u in (1., 8.)); eight.load_state_dict(one.state_dict())
    x = [torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 2)]
    torch.testing.assert_close(eight(x).distances, 8*one(x).distances)

class Reads(Toy):
    def __init__(self, num_classes=3, channels=4, **spec): super().__init__(num_classes, reads=(('coarse', channels),), **spec)

def test_what_a_method_reads_must_be_there():
    x, t = [torch.rand(3, 64, 64)], [target((4, 4, 40, 50, 1))]
    assert Detector(Reads(refine='deform'), 'tiny', 3)(x, t)
    for m, words in ((Reads(), 'missing'), (Reads(channels=8, refine='deform'), 'there are 4')):
        with pytest.raises(InputError, match=words): Detector(m, 'tiny', 3)(x, t)
