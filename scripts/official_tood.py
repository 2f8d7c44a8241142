"""mmdetection's TOOD beside ours, end to end in float64: same weights, same images; in its first epochs (ATSS) and after (task alignment learning).

    python scripts/official_tood.py check   # features, head, losses, gradients, twenty SGD steps, detections
    python scripts/official_tood.py write   # tests/golden/official/tood_early.npz, tood.npz, what tests/test_tood.py compares with

Needs what scripts/official.py needs; weights, images and objects are that script's.
"""
import argparse, functools, sys
from pathlib import Path
import numpy as np
import torch, torchvision
sys.path.insert(0, str(Path(__file__).resolve().parent))
import official as O

LAYERS = 3
EPSILON = torch.finfo(torch.float32).eps   # mmdetection divides these losses by 1 and this; taken out here
EPOCHS = dict(tood_early=0, tood=4)   # of 12; ATSS's are the first 4
PROGRESS = dict(tood_early=0., tood=.5)

def settings(name:str)->dict:
    "mmdetection's TOOD, its published settings but for depth and width."
    prob = dict(use_sigmoid=True, activated=True, loss_weight=1.)
    head = dict(O.settings('atss')['bbox_head'], type='TOODHead', stacked_convs=LAYERS, anchor_type='anchor_free', initial_loss_cls=dict(type='FocalLoss', gamma=2., alpha=.25, **prob),
                loss_cls=dict(type='QualityFocalLoss', beta=2., **prob))
    head.pop('loss_centerness')
    train = dict(initial_epoch=4, initial_assigner=dict(type='ATSSAssigner', topk=9), assigner=dict(type='TaskAlignedAssigner', topk=13), alpha=1, beta=6,
                 allowed_border=-1, pos_weight=-1, debug=False)
    return dict(O.settings('atss'), type='TOOD', train_cfg=train, bbox_head=head)

class InDouble:
    "torch whose `float` is float64, for a module that keeps its targets in `torch.float`."
    float = torch.float64
    def __getattr__(self, name): return getattr(torch, name)

def sampled(x, offset, weight, stride, padding, dilation, groups, deform_groups):
    "mmcv's deformable convolution by torchvision's."
    return torchvision.ops.deform_conv2d(x, offset, weight, stride=stride, padding=padding, dilation=dilation)

def clipped(then, results, img_meta=None, **kw):
    "mmdetection's TOOD leaves boxes that reach beyond the image as they are, also for NMS; its other detectors and ours cut them first."
    h, w = img_meta['img_shape'][:2]
    results.bboxes = results.bboxes.clamp(min=0).minimum(results.bboxes.new_tensor((w, h, w, h)))
    return then(results, img_meta=img_meta, **kw)

class TOOD(O.MMDet):
    "mmdetection's TOOD in float64, in one of its two phases."
    def __init__(self, name:str):
        O.import_mmdet()
        from mmdet.models.dense_heads import tood_head
        from mmdet.registry import MODELS
        from mmengine.config import ConfigDict
        tood_head.deform_conv2d, tood_head.torch = sampled, InDouble()
        self.epoch, self.feature, self.outs = EPOCHS[name], {}, {}
        self.model = MODELS.build(ConfigDict(settings(name))).double()
        prior = self.model.bbox_head.prior_generator; one = prior.single_level_grid_priors
        prior.single_level_grid_priors = lambda *a, **k: one(*a, **{**k, 'dtype': torch.float64})
        for k, v in settings(name)['data_preprocessor'].items():
            if k in ('mean', 'std'): setattr(self.model.data_preprocessor, k, torch.tensor(v, dtype=torch.float64).view(3, 1, 1))
        self.model.bbox_head._bbox_post_process = functools.partial(clipped, self.model.bbox_head._bbox_post_process)
        self.state = O.fill(self.model)
        self.model.neck.register_forward_hook(lambda m, i, o: self.feature.__setitem__('p', o))
        self.model.bbox_head.register_forward_hook(lambda m, i, o: self.outs.__setitem__('o', o))

    def losses(self):
        from mmengine import MessageHub
        MessageHub.get_current_instance().update_info('epoch', self.epoch)
        return {k: [x*(1+EPSILON) for x in v] for k, v in super().losses().items()}

def our_losses(name, model):
    losses = model.train()([im/255 for im in O.images()], O.targets(), progress=PROGRESS[name])
    return {dict(loss_reg='loss_bbox').get(k, k): v for k, v in losses.items()}

def ours(state):
    from ala_nb.convert import convert_state
    model, left = convert_state(state, form='tood', style='pytorch')
    assert not left, left
    return model

def head_maps(preds):
    "Scores and boxes (x1, y1, x2, y2, px) of the head, a map a level."
    from ala_nb.tood import aligned_scores
    from ala_nb.geometry import distances_to_boxes
    s = aligned_scores(preds.cls_logits, preds.obj_logits[..., None])[0]
    return [O.maps_of(preds, x.transpose(1, 2)) for x in (s, distances_to_boxes(preds.points, preds.distances))]

def their_maps(model):
    cls, boxes = model.outs['o']
    return [list(cls), [b*s[0] for b, s in zip(boxes, model.model.bbox_head.prior_generator.strides)]]

def check(name:str, steps:int=20)->dict:
    from ala_nb.detector import our_names
    theirs = TOOD(name); model = ours(theirs.state); seen, out = O.watched(model), {}
    a, b = theirs.losses(), our_losses(name, model)
    out['features'] = max(O.apart(x, y) for x, y in zip(seen['p'], theirs.feature['p']))
    out['class'], out['boxes'] = (max(O.apart(x, y) for x, y in zip(p, q)) for p, q in zip(head_maps(seen['preds']), their_maps(theirs)))
    out['losses'] = max(O.apart(b[k].detach(), O.total({'loss_'+k: v}).detach()) for k, v in a.items())
    O.total(a).backward(); O.total(b).backward()
    want = our_names({k: p.grad for k, p in theirs.model.named_parameters() if p.grad is not None}, 'mmdet')[0]
    got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    out['gradients'] = max(O.apart(got[k], g) for k, g in want.items() if k in got)
    out['without gradient in one'] = len(set(want) ^ set(got))
    found, truth = model.eval().detect([im/255 for im in O.images()]), theirs.detections()
    same = all(len(f['scores']) == len(t['scores']) and torch.equal(f['labels'], t['labels']) for f, t in zip(found, truth))
    out['detections'] = max(max(O.apart(f[k], t[k]) for k in ('boxes', 'scores')) for f, t in zip(found, truth)) if same else float('inf')
    sgd = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-3, .9) for m in (theirs.model, model)]
    for _ in range(steps):
        for o, losses in zip(sgd, (theirs.losses, lambda: our_losses(name, model))): o.zero_grad(); O.total(losses()).backward(); o.step()
    after = our_names(theirs.model.state_dict(), 'mmdet')[0]
    out[f'{steps} steps'] = max(O.apart(v, after[k]) for k, v in model.state_dict().items() if k in after and v.is_floating_point())
    return out | dict(detected=sum(len(t['scores']) for t in truth))

def our_record(name:str, state:dict)->dict:
    "What our detector makes of an official state."
    model = ours(state); seen = O.watched(model)
    losses = our_losses(name, model); O.total(losses).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    out = O.record(losses, seen['p'], *head_maps(seen['preds']), grads, [])
    return out | O.record({}, [], [], [], {}, model.eval().detect([im/255 for im in O.images()]))

def their_record(name:str)->dict:
    import json
    from ala_nb.detector import our_names
    theirs = TOOD(name); losses = theirs.losses(); O.total(losses).backward()
    grads = our_names({k: p.grad for k, p in theirs.model.named_parameters() if p.grad is not None}, 'mmdet')[0]
    out = O.record(losses, theirs.feature['p'], *their_maps(theirs), grads, []) | O.record({}, [], [], [], {}, theirs.detections())
    shapes = json.dumps({k: [list(v.shape), str(v.dtype)] for k, v in theirs.state.items()})
    return out | dict(state=np.frombuffer(shapes.encode(), np.uint8))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('check', 'write')); p.add_argument('--cases', nargs='*', default=list(EPOCHS), choices=list(EPOCHS)); p.add_argument('--steps', type=int, default=20)
    a = p.parse_args(); bad = 0
    for name in a.cases:
        if a.what == 'write': np.savez_compressed(O.ROOT/'tests'/'golden'/'official'/f'{name}.npz', **their_record(name)); print(name, 'written'); continue
        found = check(name, a.steps); wrong = [k for k, v in found.items() if k != 'detected' and not v <= (O.LIMITS | dict(boxes=1e-9)).get(k, 1e-7)]
        print(f'{name:12}', '  '.join(f'{k} {v:.1e}' for k, v in found.items()), f'TOO LARGE: {wrong}' if wrong else 'equal', flush=True); bad += bool(wrong)
    return int(bad > 0)

if __name__ == '__main__': sys.exit(main())
