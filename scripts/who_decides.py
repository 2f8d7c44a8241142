"""Whose boxes decide in Combined IoUs? VFNet in the short recipe (`sweep.py heads`), three ways.

    python scripts/sweep.py heads_long --seeds 0 --rows "vfnet star_norm=True$"      # a finished network, for the third
    python scripts/who_decides.py --seeds 0 1 2 3 4 --finished runs/sweep/heads_long/vfnet-star_norm_True-0

The rule adds the IoU of the predicted box to that of the anchor. The box is predicted by: `own`, the network that
learns, as in the paper; `average`, a running average of its weights (0.99 a step); `finished`, a network that was
trained with ATSS's positives before and does not change. What is learned from the positives is the same.
`--epochs 12` trains three times as long. A row of `nbs/results/who_decides.csv` holds AP and the flips: of the
positives of 24 pictures, which share is none a step later? (Mean over each third of training.)
"""
import argparse, copy, csv, statistics
from pathlib import Path
import torch
import sweep
from ala_nb import train as T, vfnet
from ala_nb.ciou_atss import predicted_iou
from ala_nb.detector import load_detector

FIELDS = 'decides epochs seed AP AP_nms AP_no_nms flips_1 flips_2 flips_3 command'.split()

class Decider:
    "Puts another network's boxes where VFNet's assignment takes the predicted IoU; `network` None changes nothing."
    def __init__(self, network): self.network = None if network is None else network.requires_grad_(False)
    def __enter__(self):
        self.nearest, self.weighted = vfnet.nearest_pairs, vfnet.weighted_overlaps
        vfnet.nearest_pairs, vfnet.weighted_overlaps = self.pairs_of, self.overlaps
        return self
    def __exit__(self, *error): vfnet.nearest_pairs, vfnet.weighted_overlaps = self.nearest, self.weighted
    @torch.no_grad()
    def look(self, images):
        "Before an assignment on these images."
        if self.network: self.preds = self.network.predict_maps(images)[0].full_precision()
    def pairs_of(self, *a): self.pairs = self.nearest(*a); return self.pairs
    def overlaps(self, method, anchor, pred, progress):
        if self.network: pred = predicted_iou(self.pairs.distances(self.preds), self.pairs.targets)
        return self.weighted(method, anchor, pred, progress)

def train(decides, epochs, seed, out, finished):
    "A row: trains, and counts flips at every fiftieth step."
    options = ['--method_options', 'star_norm=True', 'pred_weight=1.0']
    args = ['--method', 'vfnet', '--seed', str(seed), '--threads', '1', *options, *sweep.SMALL]
    args += ['--epochs', str(epochs), '--eval_every', str(epochs), '--out', str(out)]
    run = T.start(T.parse(args)[0]); model = run.model
    own = dict(own=lambda: None, average=lambda: copy.deepcopy(model), finished=lambda: load_detector(finished))
    flips, before = [], set()
    shown = [(torch.as_tensor(x).float()/255, dict(boxes=torch.as_tensor(t['boxes']).float(),
                                                   labels=torch.as_tensor(t['labels'])))
             for x,t in (run.train_set[i] for i in range(24))]
    images, targets = zip(*shown)
    with Decider(own[decides]()) as decider:
        @torch.no_grad()
        def positives():
            decider.look(images); a, _ = model.assign(images, targets); at = a.weights['pos'] > 0
            return set(zip(a.pairs.loc[at].tolist(), a.pairs.obj[at].tolist()))
        @torch.no_grad()
        def after_step(run, losses):
            nonlocal before
            if decides == 'average':
                for a,b in zip(decider.network.parameters(), model.parameters()):
                    a.lerp_(b, 1-min(.99, run.step/(run.step+10)))         # at first the average of few
            if run.step > 1 and run.step%50 == 1: flips.append(len(before-positives())/len(before))
            if run.step%50 == 0: before = positives()
        model.register_forward_pre_hook(lambda _, given: decider.look(given[0]) if model.training else None)
        T.train(run=run, log=None, on_step=after_step)
    last, n = sweep.last_line(out), len(flips)
    thirds = [round(statistics.fmean(flips[k*n//3:(k+1)*n//3]), 4) for k in range(3)]
    return [decides, epochs, seed, *(round(float(last[k]), 4) for k in FIELDS[3:6]), *thirds,
            f'python scripts/who_decides.py --epochs {epochs} --seeds {seed} --only {decides}']

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--epochs', type=int, default=4, help='[4]')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--only', nargs='+', default=['own', 'average', 'finished'], choices=('own', 'average', 'finished'))
    p.add_argument('--finished', default='runs/sweep/heads_long/vfnet-star_norm_True-0', help='its run folder')
    p.add_argument('--results', default='nbs/results', help='folder of who_decides.csv')
    p.add_argument('--runs', default='runs/who_decides', help='folder of the runs')
    a = p.parse_args(); file = Path(a.results)/'who_decides.csv'; torch.set_num_threads(1)
    for seed in a.seeds:
        for decides in a.only:
            new, out = not file.exists(), Path(a.runs)/f'{decides}-{a.epochs}-{seed}'
            row = train(decides, a.epochs, seed, out, a.finished)
            with file.open('a', newline='') as f:
                w = csv.writer(f, lineterminator='\n'); new and w.writerow(FIELDS); w.writerow(row)
            print(*row[:9], flush=True)
