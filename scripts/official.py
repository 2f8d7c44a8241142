"""The official detectors beside ours, end to end in float64: same weights, same images.

    python scripts/official.py check            # every case: features, head, losses, gradients, twenty SGD steps, detections
    python scripts/official.py write            # tests/golden/official/*.npz, what the tests compare with

Needs torchvision and, for mmdetection's detectors, `mmdet==3.3.0 mmengine==0.10.7` with `mmcv==2.1.0` or `mmcv-lite==2.1.0` (whose
compiled operators get stand-ins here: NMS is torchvision's). Weights are drawn by name and shape, so that none need be kept.
"""
import argparse, functools, json, sys, zlib
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import torch, torchvision
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = (120, 150), (128, 160)     # H, W px: both are padded to 128 x 160
MIXED = (120, 150), (60, 90)       # the second ends early: padded to 64 x 96 by itself
K = 5
BOXES = [[[10, 12, 90, 100, 1], [60, 30, 140, 110, 3], [100, 5, 131, 40, 0], [20, 70, 36, 90, 1]], [[0, 0, 160, 128, 2], [40, 50, 70, 95, 4], [90, 60, 150, 120, 4]]]
FEW = 14                           # masks of an image where few are drawn
HEAD = dict(stacked_convs=2, feat_channels=64, in_channels=64)


# ---- the same for both

def drawn(name:str, like:torch.Tensor)->torch.Tensor:
    "Weights for a tensor of this name and shape; numpy's old generator gives the same everywhere."
    if not like.is_floating_point(): return torch.zeros_like(like)
    r = torch.from_numpy(np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(like.shape)))).to(torch.float64)
    end = name.rsplit('.', 1)[-1]
    if end == 'project': return torch.arange(like.numel(), dtype=torch.float64)      # GFL's 0 ... 16, a constant
    if like.ndim > 1 and end == 'weight': return r/np.sqrt(like[0].numel())
    if end == 'running_mean': return .1*r
    if end == 'running_var': return 1 + .2*r.abs()
    if end in ('scale', 'sigma') or end == 'weight': return (.3 if 'bn' in name and not name.endswith('bn1.weight') else 1)*(1 + .1*r)
    if 'vfnet_reg' in name and end == 'bias' and like.numel() == 4: return .1*r - (.2 if 'refine' in name else 1.5)
    if 'reg' in name and end == 'bias' and 'gn' not in name and like.numel() == 4: return 2 + .1*r
    if any(n in name for n in ('conv_cls', 'atss_cls', 'gfl_cls', 'vfnet_cls.', 'cls_logits')) and end == 'bias': return -2 + .5*r
    return .1*r

def fill(model:nn.Module)->dict:
    "Draw every tensor of a model, by name; the state."
    state = {k: drawn(k, v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return state

def sizes(name:str): return MIXED if name.endswith('_mixed') else SIZES

def images(name:str='')->list: # (3, H, W) each, RGB, 0 ... 255
    r = np.random.RandomState(7)
    return [torch.from_numpy(np.kron(r.uniform(0, 255, (3, -(-h//8), -(-w//8))), np.ones((8, 8)))[:, :h, :w] * .9 + r.uniform(0, 25, (3, h, w))) for h, w in sizes(name)]

def targets(name:str=''):
    scale = [.5 if name.endswith('_mixed') and i else 1. for i in range(len(BOXES))]       # into the smaller image
    return [dict(boxes=torch.tensor(b, dtype=torch.float64)[:, :4]*f, labels=torch.tensor(b)[:, 4]) for b, f in zip(BOXES, scale)]

def masks()->list: # (G, H, W) bool, rings in the boxes
    "A ring in every box; the last one of the second image is cut off on the right."
    out = []
    for t, (h, w) in zip(targets(), SIZES):
        y, x = torch.meshgrid(torch.arange(h)+.5, torch.arange(w)+.5, indexing='ij')
        x1, y1, x2, y2 = (v.view(-1, 1, 1) for v in t['boxes'].unbind(1))
        r2 = ((2*x-x1-x2)/(x2-x1))**2 + ((2*y-y1-y2)/(y2-y1))**2
        out.append((r2 <= 1) & (r2 > .2) & (x < .45*x1+.55*x2))
    return out

def total(losses): return sum(sum(v) if isinstance(v, (list, tuple)) else v for k, v in losses.items() if 'loss' in k or k in ('classification', 'bbox_regression', 'bbox_ctrness'))

@contextmanager
def no_float():
    "mmdetection casts to float32 here and there; here it casts to float64."
    old = torch.Tensor.float
    torch.Tensor.float = lambda self: self.double()
    try: yield
    finally: torch.Tensor.float = old


# ---- mmdetection

def import_mmdet():
    from ala_nb.bench import import_mmdet
    import_mmdet()
    from mmdet.models.dense_heads import base_dense_head, vfnet_head
    from mmdet.utils import register_all_modules
    register_all_modules()
    def batched_nms(boxes, scores, idxs, cfg, class_agnostic=False):
        keep = torchvision.ops.batched_nms(boxes, scores, idxs, cfg['iou_threshold'])
        return torch.cat([boxes[keep], scores[keep, None]], 1), keep
    base_dense_head.batched_nms = batched_nms
    vfnet_head.DeformConv2d = StarConv

class StarConv(nn.Conv2d):
    "mmcv's DeformConv2d by torchvision's operator."
    def __init__(self, into, out, kernel_size, stride, padding): super().__init__(into, out, kernel_size, stride, padding, bias=False)
    def forward(self, x, offset): return torchvision.ops.deform_conv2d(x, offset, self.weight, padding=self.padding)

@contextmanager
def no_sigmoid():
    "GFL's head takes the sigmoid of class maps; GFLV2's maps are scores already."
    old = torch.Tensor.sigmoid
    torch.Tensor.sigmoid = lambda self: self
    try: yield
    finally: torch.Tensor.sigmoid = old

def gflv2_head():
    "GFLV2's head on mmdetection's GFL: its release is not a part of mmdetection, but differs from GFL by these lines (GFocalHead)."
    from mmdet.models.dense_heads import GFLHead
    class GFLV2Head(GFLHead):
        def _init_layers(self):
            super()._init_layers()
            self.reg_conf = nn.Sequential(nn.Conv2d(4*5, 64, 1), nn.ReLU(), nn.Conv2d(64, 1, 1), nn.Sigmoid())
        def forward_single(self, x, scale):
            logits, z = super().forward_single(x, scale)
            if x.shape[-2:] == self.first: self.logits = []
            self.logits.append(logits)
            best = z.reshape(len(z), 4, self.reg_max+1, *z.shape[2:]).softmax(2).topk(4, 2)[0]
            numbers = torch.cat([best, best.mean(2, keepdim=True)], 2)
            return torch.sigmoid(logits)*self.reg_conf(numbers.reshape(len(z), -1, *z.shape[2:])), z
        def forward(self, x): self.first = x[0].shape[-2:]; return super().forward(x)
        def loss_by_feat_single(self, *args, **kwargs):
            with no_sigmoid(): return super().loss_by_feat_single(*args, **kwargs)
        def _predict_by_feat_single(self, *args, **kwargs):
            with no_sigmoid(): return super()._predict_by_feat_single(*args, **kwargs)
    return GFLV2Head

def settings(name:str)->dict:
    "mmdetection's model settings, its published ones but for depth and width."
    name = name.removesuffix('_mixed')
    caffe = name not in ('atss', 'gfl', 'gflv2', 'vfnet', 'condinst', 'condinst_few')
    focal = dict(type='FocalLoss', use_sigmoid=True, gamma=2., alpha=.25, loss_weight=1.)
    bce = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.)
    depth = 50 if name == 'autoassign' else 18
    c = dict(data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32, bgr_to_rgb=not caffe, **(
                 dict(mean=[102.9801, 115.9465, 122.7717] if name in ('fcos_v1', 'autoassign') else [103.53, 116.28, 123.675], std=[1.]*3) if caffe else dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]))),
             backbone=dict(type='ResNet', depth=depth, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1, norm_cfg=dict(type='BN', requires_grad=not caffe),
                           norm_eval=True, style='caffe' if depth == 50 else 'pytorch'),
             neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048] if depth == 50 else [64, 128, 256, 512], out_channels=64, start_level=1,
                       add_extra_convs='on_input' if name == 'autoassign' else 'on_output', num_outs=5, relu_before_extra_convs=name not in ('atss', 'gfl', 'gflv2')),
             test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=.05, nms=dict(type='nms', iou_threshold=.5 if name == 'fcos_v1' else .6), max_per_img=100))
    strides = [8, 16, 32, 64, 128]
    if name == 'autoassign':
        return dict(c, type='AutoAssign', bbox_head=dict(type='AutoAssignHead', num_classes=K, strides=strides, loss_bbox=dict(type='GIoULoss', loss_weight=5.), **HEAD))
    train = dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False)
    anchors = dict(type='AnchorGenerator', ratios=[1.], octave_base_scale=8, scales_per_octave=1, strides=strides)
    if name.startswith('gfl'):
        return dict(c, type='GFL', train_cfg=train, bbox_head=dict(type='GFLHead' if name == 'gfl' else 'GFLV2Head', num_classes=K, anchor_generator=anchors, reg_max=16, loss_bbox=dict(type='GIoULoss', loss_weight=2.),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, activated=name == 'gflv2', beta=2., loss_weight=1.), loss_dfl=dict(type='DistributionFocalLoss', loss_weight=.25), **HEAD))
    if name == 'vfnet':
        return dict(c, type='VFNet', train_cfg=train, bbox_head=dict(type='VFNetHead', num_classes=K, strides=strides, loss_bbox=dict(type='GIoULoss', loss_weight=1.5),
            loss_bbox_refine=dict(type='GIoULoss', loss_weight=2.), **HEAD))
    if name == 'atss':
        return dict(c, type='ATSS', train_cfg=train, bbox_head=dict(type='ATSSHead', num_classes=K, loss_cls=focal, loss_bbox=dict(type='GIoULoss', loss_weight=2.), loss_centerness=bce,
            anchor_generator=anchors,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.]*4, target_stds=[.1, .1, .2, .2]), **HEAD))
    if name.startswith('condinst'):
        mask = dict(type='CondInstMaskHead', num_layers=3, feat_channels=8, size_of_interest=8, mask_out_stride=4, max_masks_to_train=300,
            mask_feature_head=dict(in_channels=64, feat_channels=24, start_level=0, end_level=2, out_channels=8, mask_stride=8, num_stacked_convs=2, norm_cfg=dict(type='BN', requires_grad=True)),
            loss_mask=dict(type='DiceLoss', use_sigmoid=True, activate=True, eps=5e-6, loss_weight=1.))
        if name == 'condinst_few': mask.update(max_masks_to_train=-1, topk_masks_per_img=FEW)
        box = dict(type='CondInstBboxHead', num_params=169, num_classes=K, strides=strides, norm_on_bbox=True, centerness_on_reg=True, dcn_on_last_conv=False, center_sampling=True,
                   conv_bias=True, loss_cls=focal, loss_bbox=dict(type='GIoULoss', loss_weight=1.), loss_centerness=bce, **HEAD)
        c['test_cfg']['mask_thr'] = .5
        return dict(c, type='CondInst', bbox_head=box, mask_head=mask)
    improved = dict(norm_on_bbox=True, centerness_on_reg=True, dcn_on_last_conv=False, center_sampling=True, conv_bias=True, loss_bbox=dict(type='GIoULoss', loss_weight=1.))
    return dict(c, type='FCOS', bbox_head=dict(type='FCOSHead', num_classes=K, strides=strides, loss_cls=focal, loss_centerness=bce,
                                               **(improved if name == 'fcos' else dict(loss_bbox=dict(type='IoULoss', loss_weight=1.))), **HEAD))

class MMDet:
    "An official detector of mmdetection in float64."
    def __init__(self, name:str):
        import_mmdet(); self.name = name
        from mmdet.registry import MODELS
        if name == 'gflv2': MODELS.register_module(module=gflv2_head(), force=True)
        from mmengine.config import ConfigDict
        self.model = MODELS.build(ConfigDict(settings(name))).double()
        prior = getattr(self.model.bbox_head, 'atss_prior_generator', self.model.bbox_head.prior_generator)
        prior.grid_priors = functools.partial(prior.grid_priors, dtype=torch.float64)
        for k, v in settings(name)['data_preprocessor'].items():            # not rounded to float32
            if k in ('mean', 'std'): setattr(self.model.data_preprocessor, k, torch.tensor(v, dtype=torch.float64).view(3, 1, 1))
        if name.startswith('gfl'):                                          # its targets take the dtype of the weights, which are float32
            one, head = self.model.bbox_head.loss_by_feat_single, self.model.bbox_head
            head.loss_by_feat_single = lambda anchors, cls, box, labels, weights, *a, **k: one(anchors, cls, box, labels, weights.double(), *a, **k)
        self.state = fill(self.model)
        self.feature, self.outs = {}, {}
        self.model.neck.register_forward_hook(lambda m, i, o: self.feature.__setitem__('p', o))
        self.model.bbox_head.register_forward_hook(lambda m, i, o: self.outs.__setitem__('o', o))

    def batch(self):
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData
        samples = []
        for t, (h, w) in zip(our_targets(self.name), sizes(self.name)):
            s = DetDataSample(metainfo=dict(img_shape=(h, w), ori_shape=(h, w), scale_factor=(1., 1.)))
            s.gt_instances = InstanceData(bboxes=t['boxes'], labels=t['labels']); samples.append(s)
            if 'masks' in t: s.gt_instances.masks = BitmapMasks(t['masks'].numpy().astype(np.uint8), h, w)
        return self.model.data_preprocessor(dict(inputs=[im.flip(0).clone() for im in images(self.name)], data_samples=samples), True)

    def losses(self):
        self.model.train()
        with no_float():
            d = self.batch()
            return self.model.loss(d['inputs'], d['data_samples'])

    @torch.no_grad()
    def detections(self):
        self.model.eval()
        with no_float():
            d = self.batch()
            out = self.model.predict(d['inputs'], d['data_samples'], rescale=False)
        return [dict(boxes=o.pred_instances.bboxes, scores=o.pred_instances.scores, labels=o.pred_instances.labels,
                     **({'masks': o.pred_instances.masks} if 'masks' in o.pred_instances else {})) for o in out]

    def head(self): # class, box and third (GFL: distributions, VFNet: refined boxes) maps of the last call, in training
        o = [list(x) for x in self.outs['o']]
        if self.name == 'gflv2': o[0] = self.model.bbox_head.logits
        return o[0], o[1], o[min(2, len(o)-1)]


# ---- torchvision

class TorchVision:
    "torchvision's FCOS in float64; its labels count from 1."
    def __init__(self, name:str):
        from torchvision.models.detection import FCOS
        from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7
        body = torchvision.models.resnet18(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
        backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        self.model = FCOS(backbone, K + 1, min_size=120, max_size=160, fixed_size=None, score_thresh=.05).double()
        # pictures as they are, padded to multiples of 128: the strides of P6 and P7 are then those of ours
        self.model.transform.resize = lambda image, target=None: (image, target); self.model.transform.size_divisible = 128
        self.state = fill(self.model)
        self.feature, self.outs = {}, {}
        self.model.backbone.register_forward_hook(lambda m, i, o: self.feature.__setitem__('p', list(o.values())))
        self.model.head.register_forward_hook(lambda m, i, o: self.outs.__setitem__('o', o))

    def losses(self):
        self.model.train()
        return self.model([im/255 for im in images()], [dict(boxes=t['boxes'], labels=t['labels']+1) for t in targets()])

    @torch.no_grad()
    def detections(self): return self.model.eval()([im/255 for im in images()])

    def head(self):
        o, sizes = self.outs['o'], [f.shape[-2:] for f in self.feature['p']]
        cut = lambda x: [y.transpose(1, 2).reshape(len(y), -1, *s) for y, s in zip(x.split([h*w for h, w in sizes], 1), sizes)]
        return [cut(o[k]) for k in ('cls_logits', 'bbox_regression', 'bbox_ctrness')]

CASES = dict(autoassign=MMDet, fcos_v1=MMDet, fcos=MMDet, atss=MMDet, condinst=MMDet, condinst_few=MMDet, atss_mixed=MMDet, gfl=MMDet, gflv2=MMDet, vfnet=MMDet, torchvision=TorchVision)

# ---- ours beside them

STYLE = dict(autoassign='caffe', fcos_v1='caffe', fcos='caffe', atss='pytorch', condinst='pytorch', condinst_few='pytorch', atss_mixed='pytorch', gfl='pytorch', gflv2='pytorch', vfnet='pytorch', torchvision='pytorch')
LOSSES = dict(loss_reg='loss_bbox', loss_branch='loss_centerness') # ours -> theirs
VFNET = dict(loss_coarse='loss_bbox', loss_reg='loss_bbox_rf')

def ours(name:str, state:dict):
    "Our detector with an official state's weights."
    from ala_nb.convert import convert_state
    model, left = convert_state(state, form=name.removesuffix('_mixed').removesuffix('_few'), style=STYLE[name])
    assert not left, left
    if name == 'torchvision': model._config['score_threshold'] = .05
    if name == 'condinst_few': model.method.masks_per_image = FEW
    return model

def our_targets(name):
    out = [dict(t, labels=t['labels']+(name == 'torchvision')) for t in targets(name)]
    return [dict(t, masks=m) for t, m in zip(out, masks())] if name.startswith('condinst') else out

def our_losses(name, model):
    losses = model.train()([im/255 for im in images(name)], our_targets(name))
    if name == 'torchvision':
        return {dict(loss_cls='classification', loss_reg='bbox_regression', loss_centerness='bbox_ctrness')[k]: v for k, v in losses.items()}
    return {(VFNET if name == 'vfnet' else LOSSES).get(k, k): v for k, v in losses.items()}

def apart(a, b): # largest difference, relative to the largest value
    return float((a-b).abs().max()/b.abs().max().clamp(min=1e-12)) if a.shape == b.shape else float('inf')

def gradients(model, wanted): return {k: p.grad for k, p in model.named_parameters() if p.grad is not None and k in wanted}

def third(name, preds): # (B, C, P): what stands beside class and box
    if name.startswith('gfl'): return preds.extras['bins'].transpose(1, 2)
    return preds.distance_planes if name == 'vfnet' else preds.obj_logits[:, None]

def watched(model):
    "What our detector computes on the way: the pyramid's maps and the predictions."
    seen = {}
    model.pyramid.register_forward_hook(lambda m, i, o: seen.__setitem__('p', o))
    model.head.register_forward_hook(lambda m, i, o: seen.__setitem__('preds', o))
    return seen

def check(name:str, steps:int=20)->dict:
    "Largest relative differences of an official detector and ours."
    from ala_nb.detector import our_names, made_by
    theirs = CASES[name](name); model = ours(name, theirs.state); seen, out = watched(model), {}
    a, b = theirs.losses(), our_losses(name, model)
    out['features'] = max(apart(x, y) for x, y in zip(seen['p'], theirs.feature['p']))
    cls, _, other = theirs.head()
    preds = seen['preds']
    flat = lambda maps: torch.cat([m.flatten(2) for m in maps], 2)
    out['class'] = apart(preds.cls_logits.transpose(1, 2), flat(cls)); out['third'] = apart(third(name, preds), flat(other))
    out['losses'] = max(apart(b[k].detach(), total({'loss_'+k: v}).detach()) for k, v in a.items())
    total(a).backward(); total(b).backward()
    want = our_names({k: p.grad for k, p in theirs.model.named_parameters() if p.grad is not None}, made_by(theirs.state))[0]
    got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    out['gradients'] = max(apart(got[k], g) for k, g in want.items() if k in got)
    out['without gradient in one'] = len(set(want) ^ set(got))
    alone = [] if name.endswith('_mixed') else images(name)         # ours never pads one picture to another's size when it detects
    found, truth = (model.eval().detect([im/255 for im in alone]), theirs.detections()) if alone else ([], [])
    same = all(len(f['scores']) == len(t['scores']) and torch.equal(f['labels'], t['labels']) for f, t in zip(found, truth))
    out['detections'] = max(max(apart(f[k], t[k]) for k in ('boxes', 'scores')) for f, t in zip(found, truth)) if same and alone else 0. if same else float('inf')
    if 'masks' in truth[0]: out['mask pixels that differ'] = sum(int((f['masks'] != t['masks']).sum()) for f, t in zip(found, truth)) if same else float('inf')
    sgd = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-3, .9) for m in (theirs.model, model)]
    for _ in range(steps):
        for o, losses in zip(sgd, (theirs.losses, lambda: our_losses(name, model))): o.zero_grad(); total(losses()).backward(); o.step()
    after = our_names(theirs.model.state_dict(), made_by(theirs.state))[0]
    out[f'{steps} steps'] = max(apart(v, after[k]) for k, v in model.state_dict().items() if k in after and v.is_floating_point())
    return out


# ---- numbers to keep

def probe(name:str, x:torch.Tensor)->list:
    "Two numbers that say whether a tensor is the same: its length, and its product with a drawn one."
    return [float(x.norm()), float((x*drawn('probe.' + name, x)[..., :]).sum())]

def record(losses:dict, features:list, cls:list, third:list, grads:dict, found:list)->dict:
    "What is kept of a detector's work; `grads` by our names."
    out = {f'loss_{k}': float(total({'loss_'+k: v}).detach()) for k, v in losses.items()}
    for i, (f, c, t) in enumerate(zip(features, cls, third)):
        for kind, x in (('feature', f), ('class', c), ('third', t)): out[f'{kind}_{i}'] = probe(f'{kind}.weight', x.detach())
    out |= {f'grad_{k}': probe(k, g) for k, g in grads.items()}
    for i, d in enumerate(found): out |= {f'{k}_{i}': d[k].detach().numpy() for k in ('boxes', 'scores', 'labels')} | ({f'masks_{i}': np.packbits(d['masks'].numpy())} if 'masks' in d else {})
    return {k: np.asarray(v) for k, v in out.items()}

def maps_of(preds, what): # predictions (B, C, P) as maps of levels
    return [x.reshape(*x.shape[:2], *s) for x, s in zip(what.split([h*w for h, w in preds.level_sizes], 2), preds.level_sizes)]

def our_record(name:str, state:dict)->dict:
    "What our detector makes of an official state."
    model = ours(name, state); seen = watched(model)
    losses = our_losses(name, model); total(losses).backward()
    preds = seen['preds']
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    out = record(losses, seen['p'], maps_of(preds, preds.cls_logits.transpose(1, 2)), maps_of(preds, third(name, preds)), grads, [])
    return out | record({}, [], [], [], {}, [] if name.endswith('_mixed') else model.eval().detect([im/255 for im in images(name)]))

def their_record(name:str)->dict:
    "What is kept of an official detector."
    from ala_nb.detector import our_names, made_by
    theirs = CASES[name](name)
    losses = theirs.losses(); total(losses).backward(); cls, _, other = theirs.head()
    grads = our_names({k: p.grad for k, p in theirs.model.named_parameters() if p.grad is not None}, made_by(theirs.state))[0]
    out = record(losses, theirs.feature['p'], cls, other, grads, []) | record({}, [], [], [], {}, [] if name.endswith('_mixed') else theirs.detections())
    shapes = json.dumps({k: [list(v.shape), str(v.dtype)] for k, v in theirs.state.items()})
    return out | dict(state=np.frombuffer(shapes.encode(), np.uint8))

def state_of(kept)->dict:
    "The official weights that kept numbers belong to, drawn again."
    return {k: drawn(k, torch.zeros(shape, dtype=getattr(torch, dtype.split('.')[1]))) for k, (shape, dtype) in json.loads(bytes(kept['state'])).items()}

LIMITS = {'features': 1e-9, 'class': 1e-9, 'third': 1e-9, 'losses': 1e-9, 'gradients': 1e-9, 'without gradient in one': 0, 'detections': 1e-9, 'mask pixels that differ': 0}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('check', 'write')); p.add_argument('--cases', nargs='*', default=list(CASES), choices=list(CASES)); p.add_argument('--steps', type=int, default=20)
    a = p.parse_args(); bad = 0
    for name in a.cases:
        if a.what == 'write': np.savez_compressed(ROOT/'tests'/'golden'/'official'/f'{name}.npz', **their_record(name)); print(name, 'written'); continue
        found = check(name, a.steps); wrong = [k for k, v in found.items() if not v <= LIMITS.get(k, 1e-7)]
        print(f'{name:12}', '  '.join(f'{k} {v:.1e}' for k, v in found.items()), f'TOO LARGE: {wrong}' if wrong else 'equal', flush=True); bad += bool(wrong)
    return int(bad > 0)

if __name__ == '__main__': sys.exit(main())
