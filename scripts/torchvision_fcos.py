"""torchvision's own FCOS beside ours: the same data, recipe and machine.

    python scripts/torchvision_fcos.py --data DIR --rounds 7        # seconds of a training step, alternating, ratio pair by pair
    python scripts/torchvision_fcos.py --data DIR --train --seed 0  # train torchvision's, print its COCO numbers (about an hour on two cores)

The recipe is that of the comparison in nbs/16_train.ipynb: ResNet-18 from scratch, trainable BatchNorm, short side 240 (at most 320), batch 8, 12 epochs,
SGD lr 0.005, momentum 0.9, weight decay 1e-4, 50 steps of warm-up, cosine, no clipping, horizontal flips.
"""
import argparse, json, math, statistics, time
import torch, torchvision
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from ala_nb.data import eval_transforms, load_dataset, make_loader, train_transforms
from ala_nb.detector import Detector
from ala_nb.evaluate import coco_results, coco_table, evaluate_coco, rescale_boxes

def torchvision_fcos(num_classes):
    "FCOS with a ResNet-18 pyramid P3 - P7, from scratch; torchvision counts labels from 1."
    body = resnet_fpn_backbone(backbone_name='resnet18', weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5, returned_layers=[2, 3, 4],
                               extra_blocks=LastLevelP6P7(256, 256))
    return FCOS(body, num_classes=num_classes+1, min_size=240, max_size=320, score_thresh=.05, nms_thresh=.6, detections_per_img=100, topk_candidates=1000)

def from_one(targets): return [dict(boxes=t['boxes'].as_subclass(torch.Tensor), labels=t['labels']+1) for t in targets]

def step(model, optimizer, images, targets):
    "One training step; returns wall and CPU seconds."
    a, c = time.perf_counter(), time.process_time()
    optimizer.zero_grad(set_to_none=True); sum(model(images, targets).values()).backward(); optimizer.step()
    return time.perf_counter()-a, time.process_time()-c

def compare(train, loader, rounds):
    "Alternate steps of the two on the same batches."
    k = len(train.classes); torch.manual_seed(0)
    ours, theirs = Detector('fcos', 'resnet18', k), torchvision_fcos(k)
    for m in (ours, theirs): m.train()
    opts = [torch.optim.SGD(m.parameters(), .005/1000, momentum=.9, weight_decay=1e-4) for m in (ours, theirs)]
    ratios, rows = [], []
    batches = iter(loader)
    for i in range(rounds+1):
        images, targets = next(batches)
        a, b = step(ours, opts[0], images, targets), step(theirs, opts[1], images, from_one(targets))
        if i: ratios.append(a[1]/b[1]); rows.append((a, b)); print(f'ours {a[0]:.2f} s ({a[1]:.2f} CPU)   torchvision {b[0]:.2f} s ({b[1]:.2f} CPU)   ratio of CPU {ratios[-1]:.3f}', flush=True)
    print(json.dumps(dict(rounds=rounds, ratio_cpu_median=round(statistics.median(ratios), 3), ratio_wall_median=round(statistics.median(a[0]/b[0] for a, b in rows), 3), ratio_cpu_min=round(min(ratios), 3), ratio_cpu_max=round(max(ratios), 3),
                          threads=torch.get_num_threads(), torch=torch.__version__, torchvision=torchvision.__version__)))

def train_theirs(train, test, loader, epochs, seed):
    "Train torchvision's FCOS with the recipe and print its table."
    torch.manual_seed(seed); model = torchvision_fcos(len(train.classes)).train()
    optimizer = torch.optim.SGD(model.parameters(), .005, momentum=.9, weight_decay=1e-4)
    total, i = epochs*len(loader), 0
    for epoch in range(epochs):
        loader.set_epoch(epoch); t0 = time.time()
        for images, targets in loader:
            for g in optimizer.param_groups: g['lr'] = .005*min(1., .001+.999*i/50)*.5*(1+math.cos(math.pi*i/total))
            step(model, optimizer, images, from_one(targets)); i += 1
        print(f'epoch {epoch+1}: {time.time()-t0:.0f} s', flush=True)
    model.eval(); results = []
    with torch.no_grad():
        for images, targets in make_loader(test, 8, transforms=eval_transforms(240, 320)):
            for t, o in zip(targets, model(images)):
                o = dict(o, labels=o['labels']-1, boxes=rescale_boxes(o['boxes'], t['size'], t['orig_size']))
                results += coco_results([o], [t['image_id']], test.category_ids)
    print(coco_table(evaluate_coco(test.ground_truth(), results)))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--rounds', type=int, default=7); p.add_argument('--threads', type=int, default=0)
    p.add_argument('--train', action='store_true'); p.add_argument('--epochs', type=int, default=12); p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    if a.threads: torch.set_num_threads(a.threads)
    train = load_dataset(a.data, 'train')
    loader = make_loader(train, 8, train=True, transforms=train_transforms(240, 320), seed=a.seed)
    if a.train: train_theirs(train, load_dataset(a.data, 'test'), loader, a.epochs, a.seed)
    else: compare(train, loader, a.rounds)
