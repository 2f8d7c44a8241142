"""Train a small detector of every method on `shapes` and keep what it says at six moments: the data of ala_nb.snapshots.

    python scripts/snapshots.py                   # all methods; each takes a few minutes on one core
    python scripts/snapshots.py fcos dw           # these only
    python scripts/snapshots.py vfnet --run DIR   # the weights of a finished run in half precision, as vfnet.safetensors

Stopped and started again it goes on where it was: a method whose file is newer than its run is not trained again.
"""
import argparse, json, shutil
from pathlib import Path
import numpy as np
from ala_nb import snapshots as S
from ala_nb.detector import load_detector, save_weights
from ala_nb.methods import choice
from ala_nb.train import recipe, resume, train

KNOBS = dict(detector_options=S.NETWORK, train_images=3000, epochs=8, eval_every=8, threads=1,
             amp='off', channels_last='false')                                 # the rest as for `shapes`

def make(name, runs, out, **changes):
    "Train one method, or go on with it, and write its file."
    method, options = S.RECIPES[name]
    folder, kept = runs/name, runs/f'{name}-moments'
    kept.mkdir(parents=True, exist_ok=True)
    config = recipe(method=method, method_options=options, out=str(folder), **{**KNOBS, **changes})
    total = 0
    def on_step(run, losses):
        if run.step in due(run.total):
            part = kept/'part.npz'; np.savez(part, **S.describe(run.model)); part.replace(kept/f'{run.step}.npz')
    run = train(run=resume(folder), on_step=on_step) if (folder/'state.pt').exists() else train(config, on_step=on_step)
    steps = due(run.total); moments = []
    for s in steps:
        with np.load(kept/f'{s}.npz') as f: moments.append(dict(f))
    model = load_detector(folder, 'last')
    info = dict(steps=steps, total=run.total, AP=round(run.last['AP'], 4), AP50=round(run.last['AP50'], 4),
                command=f'python scripts/snapshots.py {name}', seed=run.config.seed, epochs=run.config.epochs)
    file = S.pack(out/f'{name}.npz', moments, model, info)
    print(f"{name}: AP {info['AP']:.3f}, {file.stat().st_size/1e3:.0f} kB")

def due(total):
    "Steps after which a snapshot is taken."
    return [max(1, round(m*total)) for m in S.MOMENTS]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=f"of {', '.join(S.RECIPES)} [all]")
    p.add_argument('--runs', type=Path, default='runs/snapshots', help='folder of the runs')
    p.add_argument('--out', type=Path, default=S.FOLDER, help='folder of the files')
    p.add_argument('--again', action='store_true', help='train anew what is there already')
    p.add_argument('--run', help='a finished run whose last weights are kept; give one name, of the file')
    a = p.parse_args()
    if a.run:
        if len(a.names) != 1: p.error('--run: give one name, of the file')
        print(save_weights(load_detector(a.run, 'last').half(), a.out/f'{a.names[0]}.safetensors')); return
    for n in a.names: choice('name', n, list(S.RECIPES))
    for n in a.names or S.RECIPES:
        if (a.out/f'{n}.npz').exists() and not a.again: print(f'{n}: there already'); continue
        if a.again: shutil.rmtree(a.runs/n, ignore_errors=True)
        make(n, a.runs, a.out)

if __name__ == '__main__': main()
