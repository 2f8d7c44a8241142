"""Are VFNet's stars alive while it trains? Recipe by recipe, the share of their outputs above zero (26_vfnet).

    python scripts/stars.py --steps 250

The recipe of `sweep.py heads` but for what the row says; a row of nbs/results/stars.csv for every 25 steps.
"""
import argparse, csv, shutil, tempfile
from pathlib import Path
import torch
from ala_nb.train import parse, start, train
from sweep import SMALL

RECIPES = {'AdamW, rate 0.006': '', 'AdamW, rate 0.002': '--lr 0.002',
           'SGD, rate 0.01': '--optimizer sgd --lr 0.01 --weight_decay 1e-4',
           'AdamW, rate 0.006, GroupNorm': '--method_options star_norm=True'}
FIELDS = 'recipe step box_alive cls_alive input coarse_loss refined_loss arguments'.split()

class Enough(Exception): "Trained as long as was asked for."

def watch(name, words, steps, every=25):
    "Rows of one recipe: means over `every` steps."
    out, seen, rows = tempfile.mkdtemp(), {k: [] for k in FIELDS[2:7]}, []
    args = ['--method', 'vfnet', '--threads', '1', *SMALL, *words.split()]
    run = start(parse([*args, '--out', f'{out}/run', '--checkpoint_seconds', '0'])[0])
    share = lambda y: float((y > 0).float().mean())
    head = run.model.head                                            # a call for each level: means over the levels
    for k,star in dict(box=head.box_star, cls=head.cls_star).items():
        star.register_forward_hook(lambda m, x, y, k=k: seen[f'{k}_alive'].append(share(y)))
    head.box_star.register_forward_hook(lambda m, x, y: seen['input'].append(float(x[0].mean())))
    def note(run, losses):
        seen['coarse_loss'].append(float(losses['loss_coarse'])/run.model.method.coarse_weight)
        seen['refined_loss'].append(float(losses['loss_reg'])/run.model.method.box_weight)
        if run.step % every: return
        means = {k: round(sum(v)/len(v), 4) for k,v in seen.items()}
        rows.append(dict(recipe=name, step=run.step, arguments=' '.join(args), **means))
        for v in seen.values(): v.clear()
        if run.step >= steps: raise Enough
    try: train(run=run, log=None, on_step=note)
    except Enough: pass
    finally: shutil.rmtree(out)
    return rows

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=250); p.add_argument('--out', default='nbs/results/stars.csv')
    a = p.parse_args(); torch.set_num_threads(1)
    with open(a.out, 'w', newline='') as f:
        w = csv.DictWriter(f, FIELDS, lineterminator='\n'); w.writeheader()
        for name,words in RECIPES.items():
            rows = watch(name, words, a.steps); w.writerows(rows); f.flush(); print(rows[-1], flush=True)
