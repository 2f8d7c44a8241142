"""Is a training step slower or faster than it was? Two checkouts of this project, their steps in alternation.

    git worktree add ../before REVISION
    python scripts/compare_steps.py ../before . --rounds 9
    python scripts/compare_steps.py ../before . --cases shapes resnet18 --methods fcos autoassign dw

Each checkout runs in a process of its own, which takes a step when it is told to: both feel the same neighbours.
Printed are the CPU time of a step of each (median) and the ratio of second to first, round by round (median, lowest,
highest): below 1 the second is faster. Cases: `shapes`, the tiny network on 16 images of the embedded set; `resnet18`,
ResNet-18 on two images of 240 x 320 px with COCO-like objects.
"""
import argparse, json, os, statistics, subprocess, sys
from pathlib import Path

CASES, METHODS = ('shapes', 'resnet18'), ('fcos', 'autoassign', 'dw', 'ala')

WORKER = '''
import json, sys, time, torch
from ala_nb.data import load_dataset
from ala_nb.detector import Detector
case, method, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads); torch.manual_seed(0)
if case == 'shapes':
    data = load_dataset('shapes', 'train', n=16)
    items, classes, backbone = [data[i] for i in range(16)], len(data.classes), 'tiny'
    images = [x.float()/255 for x,_ in items]
    targets = [dict(boxes=torch.as_tensor(t['boxes']).float(), labels=torch.as_tensor(t['labels'])) for _,t in items]
else:
    from ala_nb.bench import coco_like
    batch, classes, backbone = coco_like(2, size=(240, 320)), 80, 'resnet18'
    images, targets = list(torch.rand(2, 3, 240, 320)), batch.targets
model = Detector(method, backbone, classes).train()
optimizer = torch.optim.SGD(model.parameters(), 1e-6, momentum=.9)
def step():
    optimizer.zero_grad(); losses = model(images, targets, .5)
    total = sum(losses.values()); total.backward(); optimizer.step()
    return total.item()
print(json.dumps(step()), flush=True)
for _ in sys.stdin:
    start = time.process_time(); step(); print(json.dumps(time.process_time()-start), flush=True)
'''

class Checkout:
    "A process with one checkout's code that takes a step when it is asked to."
    def __init__(self, root, case, method, threads):
        env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS=str(threads))
        self.name, pipe = f'{root}, {case}, {method}', subprocess.PIPE
        args = [sys.executable, '-c', WORKER, case, method, str(threads)]
        self.process = subprocess.Popen(args, cwd=root, env=env, text=True, stdin=pipe, stdout=pipe)
        self.loss = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line: raise SystemExit(f'{self.name}: the process ended with exit code {self.process.wait()}')
        return json.loads(line)

    def step(self):
        "CPU seconds of one step."
        self.process.stdin.write('\n'); self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close(); self.process.wait()

def compare(roots, case, method, rounds, threads):
    "Steps of two checkouts in alternation; prints one line."
    both = [Checkout(root, case, method, threads) for root in roots]
    try:
        for c in both: c.step()
        times = [[c.step() for c in both] for _ in range(rounds)]
    finally:
        for c in both: c.close()
    first, second = (1e3*statistics.median(t[i] for t in times) for i in (0, 1))
    ratios = sorted(t[1]/t[0] for t in times)
    print(f'{case:9s} {method:11s} first {first:7.1f} ms  second {second:7.1f} ms  second / first '
          f'{statistics.median(ratios):.3f} ({ratios[0]:.3f} - {ratios[-1]:.3f})  '
          f'losses {both[0].loss:.6g} {both[1].loss:.6g}', flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('roots', nargs=2, metavar='CHECKOUT', help='folders that hold ala_nb; before, after')
    p.add_argument('--cases', nargs='+', choices=CASES, default=CASES)
    p.add_argument('--methods', nargs='+', default=METHODS)
    p.add_argument('--rounds', type=int, default=9, help='steps of each [9]')
    p.add_argument('--threads', type=int, default=1, help='of the CPU [1]')
    a = p.parse_args()
    roots = [Path(r).resolve() for r in a.roots]
    for r in roots:
        if not (r/'ala_nb'/'__init__.py').is_file(): p.error(f'{r}: no checkout, ala_nb is not in it')
    for case in a.cases:
        for method in a.methods: compare(roots, case, method, a.rounds, a.threads)

if __name__ == '__main__': main()
