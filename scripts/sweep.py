"""Train a table of methods, seeds and switches, one row of CSV for each finished run.

    python scripts/sweep.py methods  --seeds 0 1 2       # every method on `shapes`, 14 epochs of 3,000 images
    python scripts/sweep.py default  --seeds 0 1 2       # what `python -m ala_nb.train` does, in float32
    python scripts/sweep.py default16 --seeds 0 1 2      # the same with the network in bfloat16
    python scripts/sweep.py claims   --seeds 0 1         # the papers' claims (ala_nb.tables), 6 epochs
    python scripts/sweep.py short    --seeds 0 1 2 3 4   # the same in a minute a run: a smaller network, an easier set
    python scripts/sweep.py parts    --seeds 0 1 2       # AutoAssign's Tables 2 to 5, DW's 5: as `short`
    python scripts/sweep.py tood     --seeds 0 1 2       # DW, DW on TOOD's head, TOOD: the minute's runs of `short`
    python scripts/sweep.py readings --seeds 0 1         # readings of ALA's equations, o2f's duplicates; 6 epochs
    python scripts/sweep.py one_to_one --seeds 0 1 2     # POTO with its parts, Hybrid-Epoch, o2f: short, too
    python scripts/sweep.py heads --seeds 0 1 2          # GFL, GFLV2 and VFNet without and with Combined IoUs: short, too
    python scripts/sweep.py heads_long --seeds 0 1 2     # VFNet's of them for three times as long
    python scripts/sweep.py heads_large --seeds 0 1 2    # VFNet's of them on objects of 32 px and more, twice as long
    python scripts/sweep.py heads_sgd --seeds 0 1 2      # VFNet's of them by SGD, for twice as long
    python scripts/sweep.py heads_large_sgd --seeds 0 1 2 3 4  # by SGD on objects of 32 px and more, as long
    python scripts/sweep.py heads_sgd_long --seeds 0 1 2 # for four times as long
    python scripts/sweep.py heads_full --seeds 0         # VFNet's of them as `python -m ala_nb.train` trains, in bfloat16
    python scripts/sweep.py bccd --data DIR --seeds 0    # every method on a real set, ResNet-18 from scratch
    python scripts/sweep.py bccd16 --data DIR --seeds 0  # the same with the network in bfloat16

Each row holds the command that made it. An interrupted sweep goes on where its rows end, and an interrupted run where
its checkpoint is. Rows are trained in the order of the table, seed by seed, so that a stopped sweep has compared
everything it has begun.
"""
import argparse, csv, json, re, shlex, subprocess, sys
from pathlib import Path
from ala_nb.data import load_dataset
from ala_nb.detector import load_detector
from ala_nb.tables import CLAIMS, property_iou

BCCD = ('--backbone resnet18 --size 240 --max_size 320 --epochs 12 --batch_size 8 --optimizer sgd --lr 0.005 '
        '--weight_decay 1e-4 --schedule cosine --warmup 50 --clip 0 --eval_every 12').split()
BF16 = '--amp bf16 --channels_last True'.split()
# torchvision's recipe for FCOS does not clip the gradient; without clipping the losses of the first three jumped
CLIP = dict.fromkeys(('ala', 'ciou_atss', 'dw', 'o2f', 'poto'), '10')
ALL = [('fcos', ''), ('autoassign', ''), ('ala', ''), ('atss', ''), ('ciou_atss', ''), ('dw', ''), ('o2f', ''),
       ('ala', 'one_to_one=True'), ('poto', '')]
ALA_READINGS = ('', "variant='paper' blur_radius=3", "variant='paper' loc='exp' blur_radius=3", 'blur_radius=3',
    "centre='none'", "centre='fixed'", 'centre_gradient=True', "property='none'", 'lam=8.0', "loc='exp_giou'",
    "loc='power'", "coupling='sigmoid'", "negatives='joint'", "negatives='weight'", "inner='mean'",
    'background_weight=1.0', 'score_gamma=0.5', 'width=1.5')
O2F_READINGS = ('', 'K=3', 't_min=0.0', 'ambiguous_weight=1.0', 'ambiguous_weight=1.0 t_min=0.1', 'alpha=0.5',
    'alpha=0.2', 'alpha=0.5 t_min=0.0', 'third_convs=0')
NO_NMS = 'poto', 'o2f', 'hybrid'
AUX = [f'aux={rule!r}' for rule in ('atss', 'topk')] + ["aux='fcos' aux_options={'ranges':(24,48)}"]
FEW = "aux='topk' aux_options={'k':3}"        # objects of 10 - 60 px have some 12 locations near their center
ONE_TO_ONE = [('poto', ''), ('poto', 'max_filter=True'), *(('poto', f'max_filter=True {aux}') for aux in (*AUX, FEW)),
    ('poto', AUX[0]), ('hybrid', ''), ('hybrid', 'share=0.3'), ('o2f', '')]            # rows of o2f's Table 5
TABLES = dict(
    one_to_one = ONE_TO_ONE,
    # Combined IoUs' Table V; without a norm VFNet's stars die at this rate (26_vfnet)
    heads = [(name, f'{own} {o}'.strip()) for name,own in (('gflv2',''), ('vfnet','star_norm=True'), ('gfl',''))
             for o in ('', 'pred_weight=1.0', "pred_weight='rising'")]
          + [('vfnet', ''), ('vfnet', 'pred_weight=1.0'), ('retina', '')]
          + [('ciou_atss', f"{o}cls_loss='{loss}' third_branch='centerness'")
             for loss in ('focal', 'qfl') for o in ('pred_weight=0 ', '')],
    methods = ALL + [('ala', "parts='confidence'"), ('o2f', 't_min=0.0'), ('o2f', 'alpha=0.5 t_min=0.0'),
        ('poto', "max_filter=True aux='atss'"), ('gflv2', ''), ('gflv2', 'pred_weight=1.0')],
    claims = list(dict.fromkeys(side for c in CLAIMS for side in (c.before, c.after))),
    readings = [('ala', o) for o in ALA_READINGS] + [('o2f', o) for o in O2F_READINGS]
             + [('fcos', ''), ('fcos', 'ranges=None'), ('ciou_atss', ''), ('ciou_atss', 'anchor_weight=0')],
    bccd = ALL, bccd16 = ALL + [('ala', "parts='confidence'")])
TABLES['short'] = TABLES['claims'] + [('ala', f"losses='HN' without_soft='{x}'") for x in ('silent', 'positive')]
HEADS = [f'heads{x}' for x in ('_long', '_large', '_sgd', '_sgd_long', '_large_sgd', '_full')]
TABLES |= dict.fromkeys(HEADS, TABLES['heads'][3:5])
TABLES['default'] = TABLES['default16'] = [('autoassign', '')]
PARTS = dict(autoassign="centre='none' confidence='none' centre='fixed' centre='shared' confidence='cls' "
    "confidence='loc' objectness='none' objectness='explicit'", dw="negative='none' negative='probability' negative='importance' "
    "negative='complement'", retina="third_branch='objectness'")
TABLES['parts'] = [(m, o) for m,options in PARTS.items() for o in options.split()] + [
    (m, o) for m in ('fcos', 'atss') for o in ('', "third_branch='objectness'")]
TABLES['tood'] = [('dw', ''), ('dw', 'task_head=True'), ('tood', '')]
FILES = dict(methods='shapes.csv', default='default.csv', default16='default_bf16.csv', claims='claims.csv',
             readings='claims.csv', bccd='bccd.csv', bccd16='bccd_bf16.csv', short='short.csv',
             one_to_one='one_to_one.csv', tood='tood.csv', parts='parts.csv',
             **{x: f'{x}.csv' for x in ('heads', *HEADS)})
FLOAT32 = '--amp off'.split()        # the same rows on every machine
STANDARD = FLOAT32 + '--train_images 3000 --epochs 14 --eval_every 2'.split()
SHORT = FLOAT32 + '--train_images 3000 --epochs 6 --eval_every 2'.split()
# 1,500 steps of four images: three of the shapes, plain, on 96 px, and the network of the snapshots
SMALL = FLOAT32 + (
    "--train_images 1500 --val_images 300 --epochs 4 --batch_size 4 --lr 0.006 --eval_every 4 --eval_both true "
    "--data_options image_size=96 objects=(1,6) clutter=0 texture=0. contrast=(90.,150.) classes=('disc','cross','ring') "
    "--detector_options channels=24 head_convs=1 backbone_options={'widths':(8,16,24,32,48)}").split()
LARGE = [y for x in SMALL for y in (('sides=(32,.75)', 'objects=(1,3)') if x == 'objects=(1,6)' else (x,))]
SGD = SMALL + '--optimizer sgd --lr 0.02 --weight_decay 1e-4'.split()
# of each table; the others have `SMALL`
BUDGETS = dict(default=FLOAT32, default16=BF16[:2], heads_full=BF16[:2], methods=STANDARD, claims=SHORT, readings=SHORT,
               bccd=BCCD+FLOAT32, bccd16=BCCD+BF16, heads_long=SMALL+'--epochs 12 --eval_every 12'.split(),
               heads_large=LARGE+'--epochs 8 --eval_every 8'.split(),
               heads_large_sgd=LARGE+SGD[len(SMALL):]+'--epochs 8 --eval_every 8'.split(),
               heads_sgd=SGD+'--epochs 8 --eval_every 8'.split(), heads_sgd_long=SGD+'--epochs 16 --eval_every 16'.split())
FIELDS = 'method options seed AP AP50 AP75 AP_no_nms AP_nms map_iou seconds command versions'.split()

def done(path):
    "Rows that stand in the file already."
    return {(r['method'], r['options'], r['seed']) for r in csv.DictReader(path.open())} if path.exists() else set()

def run_row(method, options, seed, base, folder, threads):
    "Train (or resume) one row and measure it with and without NMS; returns the row."
    name = '-'.join(filter(None, [method, ''.join(c if c.isalnum() else '_' for c in options), str(seed)]))
    out = folder/name
    given = ['--method_options', *shlex.split(options, posix=False)] if options else []
    args = ['--method', method, '--seed', str(seed), '--threads', str(threads)] + given + base
    shown = 'python -m ala_nb.train ' + ' '.join(a if a[:1] != '/' else 'DIR' for a in args)
    train = [sys.executable, '-m', 'ala_nb.train']
    more = ['--resume', str(out)] if (out/'state.pt').exists() else [*args, '--out', str(out)]
    code = subprocess.call([*train, *more], stdout=subprocess.DEVNULL)
    if code: raise SystemExit(f'{name}: training ended with exit code {code}; the rows so far are kept')
    stored, last = json.loads((out/'config.json').read_text()), last_line(out)      # its seconds count what was resumed, too
    plain = {k: float(last[k]) for k in FIELDS[3:8]} if '--eval_both' in base else evaluated(out, method, options)
    map_iou, model = '', load_detector(out) if method == 'ala' and '--data' not in base else None
    if model and model.method.head.property_branch:
        drawn = stored['train']['data_options']
        map_iou = round(property_iou(model, load_dataset('shapes', 'val', masks=True, **drawn))[0], 4)
    row = dict(method=method, options=options, seed=seed) | {k: round(plain[k], 4) for k in FIELDS[3:8]}
    return row | dict(map_iou=map_iou, seconds=round(float(last['seconds'])), command=shown,
                      versions=f"torch {stored.get('versions', {}).get('torch', '?')}")

def last_line(out):
    "What the training wrote at its end; with `--eval_both true` AP with and without NMS is there."
    with (out/'metrics.csv').open() as f: *_, last = csv.DictReader(f)
    return last

def evaluated(out, method, options):
    "AP as the method asks for it, with and without NMS, measured afterwards."
    metrics = {}
    for nms in ('nms', 'no-nms'):
        file = out/f'{nms}.json'
        measure = [sys.executable, '-m', 'ala_nb.evaluate', str(out), f'--{nms}', '--out', str(file)]
        subprocess.check_call(measure, stdout=subprocess.DEVNULL)
        metrics[nms] = json.loads(file.read_text())['coco']
    plain = metrics['no-nms' if method in NO_NMS or 'one_to_one=True' in options else 'nms']
    return plain | dict(AP_no_nms=metrics['no-nms']['AP'], AP_nms=metrics['nms']['AP'])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('table', choices=TABLES)
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--data', help='folder of the bccd tables')
    p.add_argument('--split', default='test', help='split it is measured on')
    p.add_argument('--results', default='nbs/results', help='folder of the CSV files')
    p.add_argument('--runs', default='runs/sweep', help='folder of the runs')
    p.add_argument('--threads', type=int, default=1,
                   help='of the CPU, for one run; start the command twice, with other seeds, to use two cores')
    p.add_argument('--only', nargs='*', help='these methods only')
    p.add_argument('--rows', default='', help='only rows whose "method options" this regular expression is found in')
    p.epilog = 'What follows -- goes to ala_nb.train: python scripts/sweep.py methods -- --epochs 1'
    given = sys.argv[1:]; cut = given.index('--') if '--' in given else len(given)
    a, extra = p.parse_args(given[:cut]), given[cut+1:]
    real = a.table.startswith('bccd')
    if real and not a.data: p.error(f'{a.table}: --data DIR is needed')
    results = Path(a.results)/FILES[a.table]
    results.parent.mkdir(parents=True, exist_ok=True)
    base = (['--data', a.data, '--val_split', a.split] if real else []) + BUDGETS.get(a.table, SMALL) + extra
    for seed in a.seeds:
        for method, options in TABLES[a.table]:
            if a.only and method not in a.only or not re.search(a.rows, f'{method} {options}'): continue
            if (method, options, str(seed)) in done(results): continue
            clip = CLIP.get(method) if real else None
            args = [clip if clip and before == '--clip' else x for before,x in zip(['', *base], base)]
            row = run_row(method, options, seed, args, Path(a.runs)/results.stem, a.threads)
            new = not results.exists()
            with results.open('a', newline='') as f:
                w = csv.DictWriter(f, FIELDS, lineterminator='\n'); new and w.writeheader(); w.writerow(row)
            print({k: row[k] for k in FIELDS[:8]}, flush=True)

if __name__ == '__main__': main()
