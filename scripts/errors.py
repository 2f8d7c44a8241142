"""What is wrong with the detections of trained runs? One line a run, numbers an object of the validation set.

    python scripts/errors.py runs/sweep/heads/gflv2-0 runs/sweep/heads/gflv2-pred_weight_1_0-0

A detection is right if it is the best-scored one of its class with IoU 0.5 on its object; the next are duplicates;
with another class it is of the wrong class; IoU 0.1 to 0.5 is a poor box, less is background.
"""
import argparse, collections, json
from pathlib import Path
import torch
from torchvision.ops import box_iou
from ala_nb.data import load_dataset
from ala_nb.detector import load_detector

KINDS = 'right', 'duplicate', 'wrong class', 'poor box', 'background'

def kinds(found, boxes, labels):
    "Kind of each detection, best score first."
    order, taken, out = found['scores'].argsort(descending=True), set(), []
    overlaps = box_iou(found['boxes'][order], boxes) if len(boxes) else torch.zeros(len(order), 1)
    best, which = overlaps.max(1)
    for iou,n,label in zip(best.tolist(), which.tolist(), found['labels'][order].tolist()):
        if iou < .1: out.append('background')
        elif iou < .5: out.append('poor box')
        elif label != int(labels[n]): out.append('wrong class')
        else: out.append('duplicate' if n in taken else 'right'); taken.add(n)
    return out

def errors(run, images, threshold):
    "Detections of each kind, an object."
    options = json.loads((Path(run)/'config.json').read_text())['train']['data_options']
    data, model = load_dataset('shapes', 'val', n=images, **options), load_detector(run)
    count, objects = collections.Counter(), 0
    for image,target in data:
        boxes, labels = torch.as_tensor(target['boxes']).float(), torch.as_tensor(target['labels'])
        with torch.no_grad(): found = model.detect([torch.as_tensor(image).float()/255], score_threshold=threshold)[0]
        count.update(kinds(found, boxes, labels)); objects += len(boxes)
    return {k: count[k]/objects for k in KINDS}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+'); p.add_argument('--images', type=int, default=100)
    p.add_argument('--threshold', type=float, default=.2, help='least score of a detection that is counted')
    a = p.parse_args(); torch.set_num_threads(1)
    for run in a.runs:
        print(Path(run).name, *(f'{k} {v:.2f}' for k,v in errors(run, a.images, a.threshold).items()), sep='  ')
