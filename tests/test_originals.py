"""The papers' authors' own detectors, which mmdetection does not have: DW, o2f, AutoAssign in cvpods, ATSS and Combined IoUs. Each is written down again from its published source, as functions
of a checkpoint with its names (strongwolf/DW 2f4ffac dw_head.py; strongwolf/o2f ca00753 o2f_head.py; Megvii-BaseDetection/AutoAssign de0a804 with cvpods' FPN and FrozenBatchNorm2d;
sfzhang15/ATSS 5f1c9fe and ZTX-100/DLA-Combined-IoUs 20f578f with maskrcnn-benchmark's). Random weights; ours must say the same in float64."""
import math
import pytest, torch, torchvision
import torch.nn.functional as F
from torchvision.ops import FrozenBatchNorm2d, batched_nms, deform_conv2d
from ala_nb import convert as C
from ala_nb.geometry import distances_to_boxes

K, STRIDES, SIZE = 5, (8, 16, 32, 64, 128), (128, 160)
PICTURE = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)*255      # RGB, 0 ... 255

class Weights(dict):
    "A checkpoint that draws what is asked of it, once, so that its names are those that the forward pass reads."
    def __init__(self): super().__init__(); self.g = torch.Generator().manual_seed(0)
    def draw(self, name, *shape):
        if name not in self: self[name] = torch.randn(shape, generator=self.g, dtype=torch.float64)/math.sqrt(max(1, math.prod(shape[1:])))
        return self[name]
    def conv(self, x, name, out, kernel=3, stride=1, bias=True, shift=0.):
        w = self.draw(f'{name}.weight', out, x.shape[1], kernel, kernel)
        if bias and f'{name}.bias' not in self: self[f'{name}.bias'] = .1*torch.randn(out, generator=self.g, dtype=torch.float64) + shift
        return F.conv2d(x, w, self[f'{name}.bias'] if bias else None, stride, kernel//2)
    def group(self, x, name):
        for k, one in ('weight', 1.), ('bias', 0.):
            if f'{name}.{k}' not in self: self[f'{name}.{k}'] = one + .1*torch.randn(x.shape[1], generator=self.g, dtype=torch.float64)
        return F.relu(F.group_norm(x, 32, self[f'{name}.weight'], self[f'{name}.bias']))
    def scale(self, name): return self.setdefault(name, 1 + .2*torch.rand((), generator=self.g, dtype=torch.float64))

def resnet(w, x, deep, rename, eps, first=False, var=None, deformed=None):
    "C3 ... C5 of torchvision's ResNet under other names; `first`: strides in the first 1x1, as the MSRA networks have them. `deformed`: stages with a DFConv2d."
    net = getattr(torchvision.models, f'resnet{deep}')(norm_layer=lambda n: FrozenBatchNorm2d(n, eps=eps)).double()
    g = torch.Generator().manual_seed(3)
    for k, v in net.state_dict().items():
        if k.startswith('fc.'): continue
        if 'running_var' in k: v.fill_(1.) if var is None else v.copy_(var + torch.rand(v.shape, generator=g, dtype=v.dtype))
        elif 'running_mean' in k: v.zero_() if var is None else v.copy_(.1*torch.randn(v.shape, generator=g, dtype=v.dtype))
        elif v.ndim == 1: v.copy_((.5 if k.endswith('weight') else 0) + .1*torch.randn(v.shape, generator=g, dtype=v.dtype))
        w[rename(k)] = v.clone()
    for stage in (net.layer2, net.layer3, net.layer4):
        if first: stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    for i in deformed or ():                                    # DFConv2d: `offset` says 18 shifts and 9 strengths, `conv` has the weights
        for j, block in enumerate(getattr(net, f'layer{i-1}')):
            c, name = block.conv2, rename(f'layer{i-1}.{j}.conv2.weight').removesuffix('.weight')
            w[f'{name}.conv.weight'] = w.pop(f'{name}.weight')
            def forward(x, c=c, name=name):
                z = w.conv(x, f'{name}.offset', 27, stride=c.stride[0])
                return deform_conv2d(x, z[:, :18], c.weight, None, c.stride, 1, mask=z[:, 18:].sigmoid())
            block.conv2.forward = forward
    with torch.no_grad():
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        out = [x := net.layer2(x)]; out.append(x := net.layer3(x)); out.append(net.layer4(x))
    return out

def pyramid(w, c, lateral, output, p6, p7, channels, from_c5=False, relu=True):
    x, maps = None, []
    for i in (2, 1, 0):
        y = w.conv(c[i], lateral(i), channels, 1)
        x = y if x is None else y + F.interpolate(x, scale_factor=2, mode='nearest')
        maps.insert(0, w.conv(x, output(i), channels))
    six = w.conv(c[2] if from_c5 else maps[2], p6, channels, stride=2)
    return [*maps, six, w.conv(F.relu(six) if relu else six, p7, channels, stride=2)]

def tower(w, x, names, norms, channels):
    for c, n in zip(names, norms): x = w.group(w.conv(x, c, channels), n)
    return x

def grid(x, stride, offset):
    h, w = x.shape[2:]
    yy, xx = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing='ij')
    return torch.stack([xx, yy], -1).reshape(-1, 2)*stride + offset*stride

flat = lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
def corners(points, d): return torch.cat([points - d[:, :2], points + d[:, 2:]], 1)

def mmdet_body(w, x, channels):
    c = resnet(w, x, 18, lambda k: f'backbone.{k}', 1e-5, var=.5)
    return pyramid(w, c, lambda i: f'neck.lateral_convs.{i}.conv', lambda i: f'neck.fpn_convs.{i}.conv', 'neck.fpn_convs.3.conv', 'neck.fpn_convs.4.conv', channels)

def mmdet_towers(w, x, channels, n=4):
    return [tower(w, x, [f'bbox_head.{t}_convs.{i}.conv' for i in range(n)], [f'bbox_head.{t}_convs.{i}.gn' for i in range(n)], channels) for t in ('cls', 'reg')]

def dw(w, x, refine):
    "DWHead.forward_single, a level at a time: class logits, distances, centre-ness logits."
    out = []
    for i, (f, s) in enumerate(zip(mmdet_body(w, x, 64), STRIDES)):
        cls, reg = mmdet_towers(w, f, 64)
        logits, third = w.conv(cls, 'bbox_head.conv_cls', K, shift=-2.), w.conv(reg, 'bbox_head.conv_centerness', 1, shift=1.)
        d, points = F.relu(w.scale(f'bbox_head.scales.{i}.scale')*w.conv(reg, 'bbox_head.conv_reg', 4, shift=2.))*s, grid(f, s, .5)
        if refine:
            z, (l, t, r, b) = w.conv(reg, 'bbox_head.reg_offset', 8), (d/s)[0]
            z = z + torch.stack([0*l, -l, -t, 0*l, 0*l, r, b, 0*l])[None]                 # y and x of where each side is read
            sides = corners(points, flat(d)).t().reshape(1, 4, *f.shape[2:])
            sides = flat(deform_conv2d(sides, z, torch.ones(4, 1, 1, 1).double()))
            d = F.relu(torch.cat([points - sides[:, :2], sides[:, 2:] - points], 1)).t().reshape(d.shape)
        out.append((logits, corners(points, flat(d)), third))
    w['bbox_head.center_prior.mean'], w['bbox_head.center_prior.sigma'] = torch.zeros(K, 2), torch.ones(K, 2) + .11
    return out

def o2f(w, x):
    out = []
    for i, (f, s) in enumerate(zip(mmdet_body(w, x, 256), STRIDES)):
        cls, reg = mmdet_towers(w, f, 256)
        small = tower(w, reg, [f'bbox_head.centerness_convs.{j}.conv' for j in range(3)], [f'bbox_head.centerness_convs.{j}.gn' for j in range(3)], 64)
        d = (w.scale(f'bbox_head.scales.{i}.scale')*w.conv(reg, 'bbox_head.conv_reg', 4, shift=2.)).clamp(min=0)*s
        out.append((w.conv(cls, 'bbox_head.conv_cls', K, shift=-2.), corners(grid(f, s, .5), flat(d)), w.conv(small, 'bbox_head.conv_centerness', 1, shift=1.)))
    return out

def detectron2_name(k):
    k = 'stem.' + k if k.startswith(('conv1', 'bn1')) else 'res' + str(int(k[5])+1) + k[6:]
    for a, b in ('.downsample.0.', '.shortcut.'), ('.downsample.1.', '.shortcut.norm.'), ('.bn1.', '.conv1.norm.'), ('.bn2.', '.conv2.norm.'), ('.bn3.', '.conv3.norm.'): k = k.replace(a, b)
    return 'backbone.bottom_up.' + k

def autoassign(w, x):
    "cvpods: FrozenBatchNorm2d adds 1e-5 to variances; P6 from C5; shifts at the cells' corners."
    c = resnet(w, x, 50, detectron2_name, 1e-5, first=True)
    maps = pyramid(w, c, lambda i: f'backbone.fpn_lateral{i+3}', lambda i: f'backbone.fpn_output{i+3}', 'backbone.top_block.p6', 'backbone.top_block.p7', 64, from_c5=True)
    out = []
    for i, (f, s) in enumerate(zip(maps, STRIDES)):
        cls, reg = (tower(w, f, [f'head.{t}_subnet.{3*j}' for j in range(4)], [f'head.{t}_subnet.{3*j+1}' for j in range(4)], 64) for t in ('cls', 'bbox'))
        d = F.relu(w.scale(f'head.scales.{i}.scale')*w.conv(reg, 'head.bbox_pred', 4, shift=2.))*s
        out.append((w.conv(cls, 'head.cls_score', K, shift=-2.), corners(grid(f, s, 0.), flat(d)), w.conv(reg, 'head.obj_score', 1, shift=1.)))
    w['mu'], w['sigma'] = .1*torch.randn(K, 2).double(), 1 + .1*torch.rand(K, 2).double()
    return out

def atss(w, x, deformed=()):
    "maskrcnn-benchmark: nothing is added to variances, ReLU before P7, boxes count pixels from their middles and end at the last one."
    name = lambda k: 'backbone.body.' + ('stem.' + k if k.startswith(('conv1', 'bn1')) else k)
    c = resnet(w, x, 50, name, 0., first=True, deformed=deformed)
    maps = pyramid(w, c, lambda i: f'backbone.fpn.fpn_inner{i+2}', lambda i: f'backbone.fpn.fpn_layer{i+2}', 'backbone.fpn.top_blocks.p6', 'backbone.fpn.top_blocks.p7', 64)
    out = []
    def one(f, t):
        f = tower(w, f, [f'rpn.head.{t}_tower.{3*j}' for j in range(3)], [f'rpn.head.{t}_tower.{3*j+1}' for j in range(3)], 64)
        last = f'rpn.head.{t}_tower.9'
        if not deformed: return w.group(w.conv(f, last, 64), f'rpn.head.{t}_tower.10')
        z = w.conv(f, f'{last}.offset', 27); w.conv(f, f'{last}.conv', 64)
        return w.group(deform_conv2d(f, z[:, :18], w[f'{last}.conv.weight'], w[f'{last}.conv.bias'], 1, 1, mask=z[:, 18:].sigmoid()), f'rpn.head.{t}_tower.10')
    for i, (f, s) in enumerate(zip(maps, STRIDES)):
        cls, reg = one(f, 'cls'), one(f, 'bbox')
        d = flat(w.scale(f'rpn.head.scales.{i}.scale')*w.conv(reg, 'rpn.head.bbox_pred', 4))
        mid, size = grid(f, s, .5) + d[:, :2]/10*8*s, 8*s*(d[:, 2:]/5).clamp(max=math.log(1000/16)).exp()
        out.append((w.conv(cls, 'rpn.head.cls_logits', K, shift=-2.), torch.cat([mid - (size-1)/2, mid + (size-1)/2], 1), w.conv(reg, 'rpn.head.centerness', 1, shift=1.)))
    return out

ImageNet = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
def fed(mean, std=(1., 1., 1.), bgr=True):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std)); x = (PICTURE - mean)/std
    return (x.flip(0) if bgr else x)[None]
BGR, MSRA = fed(ImageNet['mean']), fed((122.7717, 115.9465, 102.9801))
CASES = dict(dw=(lambda w: dw(w, fed(**ImageNet, bgr=False), True), 'dw', {}), dw_plain=(lambda w: dw(w, fed(**ImageNet, bgr=False), False), 'dw_plain', {}),
             o2f=(lambda w: o2f(w, fed(**ImageNet, bgr=False)), 'o2f', {}), autoassign_cvpods=(lambda w: autoassign(w, BGR), 'autoassign_cvpods', {}),
             atss_authors=(lambda w: atss(w, MSRA), 'atss_authors', {}), atss_deformable=(lambda w: atss(w, MSRA, (3, 4, 5)), 'atss_authors', {}),
             dynamic_atss=(lambda w: atss(w, MSRA), 'dynamic_atss', dict(form='dynamic_atss')))     # its third branch has the name of ATSS's

@pytest.mark.parametrize('name', CASES)
def test_original_and_converted_say_the_same(name):
    "The form is recognised, nothing is left over, and logits, boxes, scores and detections agree."
    official, form, given = CASES[name]
    torch.manual_seed(0); w = Weights()
    with torch.no_grad(): levels = official(w)
    if form == 'dw_plain': assert C.guess_form(w, 'mmdet') == form
    model, left = C.convert_state({f'{k}': v for k, v in w.items()}, **given)
    assert not left and model.config['method'] == dict(dw_plain='dw', atss_authors='atss', dynamic_atss='ciou_atss', autoassign_cvpods='autoassign').get(form, form)
    with torch.no_grad():
        preds, _ = model.predict_maps([PICTURE/255])
        boxes = distances_to_boxes(preds.points, preds.distances[0]); scores = model.method.scores(preds)[0]
    cls, box, third = (torch.cat([f(x) for x in kind]) for f, kind in zip((flat, lambda x: x, flat), zip(*levels)))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    close(preds.cls_logits[0], cls); close(preds.obj_logits[0], third[:, 0])
    half = torch.tensor([-.5, -.5, .5, .5]).double() if 'atss' in name else 0.
    close(boxes, box + half)
    product = cls.sigmoid()*third.sigmoid()
    if 'atss' in name:                                            # candidates: by class; ranks: by the root of the product
        likely = cls.sigmoid() > .05
        close(scores[likely], product[likely].sqrt()); assert model.config['select_by'] == 'class' and likely.sum() > 30
        return
    close(scores, product)
    h, x = SIZE; clipped = box.clamp(min=0).minimum(torch.tensor([x, h, x, h]).double())
    at, label = (product > .05).nonzero(as_tuple=True); s = product[at, label]
    keep = s.argsort(descending=True)[:100] if name == 'o2f' else batched_nms(clipped[at], s, label, .6)[:100]
    with torch.no_grad(): found, = model.detect([PICTURE/255])
    n = min(len(keep), len(found['scores'])); assert n == len(found['scores']) >= 20
    close(found['scores'], s[keep][:n]); assert found['labels'].tolist() == label[keep][:n].tolist(); close(found['boxes'], clipped[at][keep][:n])
