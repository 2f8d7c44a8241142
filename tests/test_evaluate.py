"COCO's numbers are pycocotools'; VOC's and CrowdHuman's are those of slow, literal versions of their benchmarks."
import builtins, contextlib, importlib.util, io, json, math, os, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb.geometry import InputError
from ala_nb import evaluate as E
from conftest import ROOT

KEYS = 'AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl'.split()

# ---- data

@st.composite
def data_sets(draw, classes=3, crowd=True, grid=True, images=5):
    "A COCO dictionary and results: empty images, crowds, duplicates, one-pixel and touching boxes, tied scores."
    g = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_images, n_objects, n_found = draw(st.integers(1, images)), draw(st.integers(0, 6)), draw(st.integers(0, 12))
    ids = sorted(g.choice(1000, n_images, replace=False).tolist()); cats = (np.arange(classes)*7+3).tolist()
    def box():
        wh = np.exp(g.uniform(0, np.log(150), 2)); xy = g.uniform(0, 200, 2)
        return np.round(np.r_[xy, wh], draw(st.sampled_from([0, 1, 6]))).tolist()
    truth, found = [], []
    for i in ids:
        mine = [(box(), int(g.choice(cats))) for _ in range(g.integers(0, n_objects+1))]
        truth += [dict(id=len(truth)+k+1, image_id=i, category_id=c, bbox=b, area=float(b[2]*b[3]*g.choice([1, .6])),
            iscrowd=int(crowd and g.random() < .25))
                  for k, (b, c) in enumerate(mine)]
        for _ in range(g.integers(0, n_found+1)):
            b, c = mine[g.integers(len(mine))] if mine and g.random() < .75 else (box(), int(g.choice(cats)))
            b = (np.array(b) + g.normal(0, 1, 4)*g.choice([0, .05, .2])*np.array([b[2], b[3], b[2], b[3]])).tolist()
            b[2:] = [max(v, 0) for v in b[2:]]
            found.append(dict(image_id=i, category_id=c, bbox=b, score=round(float(g.random()), 1 if grid else 8)))
    g.shuffle(found)
    return dict(images=[dict(id=i, width=240, height=260) for i in ids], annotations=truth,
        categories=[dict(id=c, name=f'c{c}') for c in cats]), found

def by_pycocotools(truth, found):
    "pycocotools used as its documentation says: twelve numbers and precision, or None where it cannot load an empty list."
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(); gt.dataset = json.loads(json.dumps({'info': {}, **truth})); gt.createIndex()
        if not found: return None
        e = COCOeval(gt, gt.loadRes(json.loads(json.dumps(found))), 'bbox'); e.evaluate(); e.accumulate(); e.summarize()
    return e.stats, e.eval['precision']

def xyxy(b): return b[0], b[1], b[0]+b[2], b[1]+b[3]
def inter(a, b):
    a, b = xyxy(a), xyxy(b)
    return max(0, min(a[2], b[2])-max(a[0], b[0]))*max(0, min(a[3], b[3])-max(a[1], b[1]))
def iou(a, b):
    i = inter(a, b); u = a[2]*a[3]+b[2]*b[3]-i
    return i/u if i > 0 else 0.
def ioa(a, b): return inter(a, b)/(a[2]*a[3]) if inter(a, b) > 0 else 0.

# ---- COCO

@given(data_sets())
@settings(max_examples=60, deadline=None)
def test_coco_equals_pycocotools_called_directly(data):
    truth, found = data
    ours = {b: E.evaluate_coco(truth, found, backend=b) for b in ('faster', 'pycocotools')}
    direct = by_pycocotools(truth, found)
    if direct is not None:
        stats, precision = direct
        assert [ours['pycocotools'][k] for k in KEYS] == stats.tolist()                         # to the last bit
        np.testing.assert_allclose([ours['faster'][k] for k in KEYS], stats, rtol=0, atol=1e-12)
        for k, c in enumerate(truth['categories']):
            for key, p in (('AP', precision[:, :, k, 0, -1]), ('AP50', precision[0, :, k, 0, -1])):
                want = p[p > -1].mean() if (p > -1).any() else -1
                for m in ours.values(): assert m['per_class'][c['name']][key] == pytest.approx(want, abs=1e-12)
    for k in KEYS: assert ours['faster'][k] == pytest.approx(ours['pycocotools'][k], abs=1e-12)

@given(data_sets(crowd=False))
@settings(max_examples=20, deadline=None)
def test_perfect_is_one_and_empty_is_zero(data):
    truth, _ = data
    perfect = [dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=.5) for a in truth['annotations']]
    for backend in ('faster', 'pycocotools'):
        one, zero = E.evaluate_coco(truth, perfect, backend), E.evaluate_coco(truth, [], backend)
        for k in KEYS:
            defined = zero[k] != -1
            assert zero[k] == (0 if defined else -1)
            if defined and k not in ('AR1', 'AR10'): assert one[k] == pytest.approx(1, abs=1e-12)
        assert (zero['AP'] == 0) == bool(truth['annotations'])

def two_objects(**more):
    ann = [dict(id=i, image_id=4, category_id=9, bbox=[60*i, 0, 40, 40], area=1600, iscrowd=0, **more) for i in range(2)]
    return dict(images=[dict(id=4, width=200, height=100)], annotations=ann, categories=[dict(id=9, name='cell')])

@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
def test_annotation_ids_from_zero_and_missing_fields(backend):
    truth = two_objects(); found = [dict(image_id=4, category_id=9, bbox=a['bbox'], score=.9) for a in truth['annotations']]
    assert E.evaluate_coco(truth, found, backend)['AP'] == pytest.approx(1)  # pycocotools alone takes id 0 for "no match"
    for a in truth['annotations']: del a['id'], a['area'], a['iscrowd']
    assert E.evaluate_coco(truth, found, backend)['AP'] == pytest.approx(1)

@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
def test_crowd_takes_any_number_of_detections(backend):
    truth = two_objects(); truth['annotations'][0].update(iscrowd=1, bbox=[0, 0, 50, 50], id=7)
    inside = [dict(image_id=4, category_id=9, bbox=[2*i, 2, 12, 12], score=.9) for i in range(6)]
    hit = dict(image_id=4, category_id=9, bbox=[60, 0, 40, 40], score=.5)
    assert E.evaluate_coco(truth, inside+[hit], backend)['AP'] == pytest.approx(1)
    outside = dict(image_id=4, category_id=9, bbox=[100, 50, 12, 12], score=.9)
    assert E.evaluate_coco(truth, [outside, hit], backend)['AP'] == pytest.approx(.5)

@pytest.mark.parametrize('backend', ['faster', 'pycocotools'])
def test_more_detections_an_image_for_crowds(backend):
    ann = [dict(id=i+1, image_id=1, category_id=1, bbox=[12*(i % 20), 12*(i//20), 10, 10], area=100, iscrowd=0) for i in range(160)]
    truth = dict(images=[dict(id=1, width=300, height=300)], annotations=ann, categories=[dict(id=1, name='a')])
    found = [dict(image_id=1, category_id=1, bbox=a['bbox'], score=.5) for a in ann]
    assert E.evaluate_coco(truth, found, backend)['AR100'] == pytest.approx(100/160)
    m = E.evaluate_coco(truth, found, backend, max_dets=(10, 300))
    assert m['AP'] == pytest.approx(1) and m['AR300'] == pytest.approx(1) and 'AR100' not in m
    assert '300 boxes' in E.coco_table(m)

def test_arguments_stay_as_they_are_and_nothing_is_printed(capfd):
    truth = two_objects(); found = [dict(image_id=4, category_id=9, bbox=[0, 0, 40, 40], score=.9)]
    before = json.dumps([truth, found])
    for backend in ('faster', 'pycocotools'): E.evaluate_coco(truth, found, backend)
    E.evaluate_voc(truth, found); E.evaluate_crowdhuman(truth, found)
    out = capfd.readouterr()
    assert json.dumps([truth, found]) == before and out.out == out.err == ''

def test_pycocotools_where_the_fast_one_is_missing(monkeypatch):
    truth = two_objects(); found = [dict(image_id=4, category_id=9, bbox=[0, 0, 40, 40], score=.9)]
    want = E.evaluate_coco(truth, found, 'pycocotools')
    real, spec = builtins.__import__, importlib.util.find_spec
    def no_fast(name, *a, **k):
        if name.startswith('faster_coco_eval'): raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', no_fast)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'faster_coco_eval' else spec(name, *a))
    assert E.evaluate_coco(truth, found) == want

@pytest.mark.parametrize('change, says', [
    (dict(image_id=5), 'image_id 5'), (dict(category_id=1), 'category_id 1'), (dict(score=math.nan),
        'finite'), (dict(bbox=[0, 0, math.inf, 1]), 'finite')])
def test_results_that_do_not_belong(change, says):
    bad = dict(image_id=4, category_id=9, bbox=[0, 0, 1, 1], score=.5) | change
    for f in (E.evaluate_coco, E.evaluate_voc, E.evaluate_crowdhuman):
        with pytest.raises(InputError, match=says) as e: f(two_objects(), [bad])
        assert '\n' not in str(e.value)

def test_empty_ground_truth():
    for truth in (dict(images=[], annotations=[], categories=[dict(id=1, name='a')]),
            dict(images=[dict(id=1, width=9, height=9)], annotations=[], categories=[])):
        with pytest.raises(InputError, match='no images or no categories'): E.evaluate_coco(truth, [])
    truth = dict(images=[dict(id=1, width=9, height=9)], annotations=[], categories=[dict(id=1, name='a')])
    m = E.evaluate_coco(truth, [dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=.5)])
    assert m['AP'] == m['per_class']['a']['AP'] == -1 and 'no object' in E.coco_table(m)
    assert E.evaluate_voc(truth, [])['mAP'] == -1
    with pytest.raises(InputError, match='no object'): E.evaluate_crowdhuman(truth, [])

def test_classes_of_one_name_both_stand_in_the_table():
    truth = two_objects(); truth['categories'].append(dict(id=10, name='cell'))
    assert list(E.evaluate_coco(truth, [])['per_class']) == ['cell (9)', 'cell (10)']

def test_results_from_outputs():
    outs = [dict(boxes=torch.tensor([[1., 2, 11, 32], [0, 0, 1, 1]], requires_grad=True), labels=torch.tensor([2, 0]),
        scores=torch.tensor([.25, .5])),
            dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))]
    want = [dict(image_id=5, category_id=30, bbox=[1., 2., 10., 30.], score=.25),
        dict(image_id=5, category_id=10, bbox=[0., 0., 1., 1.], score=.5)]
    for ids in ([10, 20, 30], {0: 10, 1: 20, 2: 30}): assert E.coco_results(outs, torch.tensor([5, 6]), ids) == want
    json.dumps(E.coco_results(outs, np.array([5, 6]), [10, 20, 30]))
    with pytest.raises(ValueError): E.coco_results(outs, [5], [10, 20, 30])

# ---- precision, recall, average precision

@given(st.lists(st.booleans(), max_size=30), st.integers(0, 10), st.sampled_from([11, 101, None]))
@settings(max_examples=150, deadline=None)
def test_average_precision_from_its_definition(hits, missed, points):
    n = sum(hits)+missed
    if not n: return
    p, r = E.precision_recall(np.array(hits, int), n)
    for k in range(len(hits)): assert p[k] == pytest.approx(sum(hits[:k+1])/(k+1)) and r[k] == pytest.approx(sum(hits[:k+1])/n)
    best = lambda t: max((p[k] for k in range(len(hits)) if r[k] >= t), default=0.)
    if points: want = sum(best(t) for t in np.linspace(0, 1, points))/points
    else: want = sum(best(k/n - 1e-9) for k in range(1, n+1))/n  # the envelope is flat between k-1 and k found
    assert E.average_precision(p, r, points) == pytest.approx(want, abs=1e-9)

def slow_verdicts(truth, found, category, thr, rule):
    "One verdict (1, 0, None) for each detection by falling score, literally as the benchmarks' text has it; and the number of objects."
    out, boxes = [], {}
    for a in truth['annotations']:
        if a['category_id'] == category: boxes.setdefault(a['image_id'], []).append([a['bbox'], a['iscrowd'], False])
    for image in truth['images']:
        mine = sorted((r for r in found if r['image_id'] == image['id'] and r['category_id'] == category), key=lambda r: -r['score'])
        for r in mine:
            regions, verdict = boxes.get(image['id'], []), 0
            if rule == 'voc':
                best = max(regions, key=lambda g: iou(r['bbox'], g[0]), default=None)
                if best and iou(r['bbox'], best[0]) >= thr:
                    verdict = None if best[1] else int(not best[2])
                    best[2] = True
            else:
                free = [g for g in regions if not g[1] and not g[2] and iou(r['bbox'], g[0]) > thr]
                if free: best = max(free, key=lambda g: iou(r['bbox'], g[0])); best[2] = True; verdict = 1
                elif any(g[1] and ioa(r['bbox'], g[0]) > thr for g in regions): verdict = None
            out.append((r['score'], verdict))
    out = [v for _, v in sorted(out, key=lambda x: -x[0]) if v is not None]
    return out, sum(not g[1] for gs in boxes.values() for g in gs)

@given(data_sets(classes=2, grid=False), st.sampled_from([11, None]), st.sampled_from([.3, .5, .7]))
@settings(max_examples=60, deadline=None)
def test_voc_against_the_rule_read_aloud(data, points, thr):
    truth, found = data; got = E.evaluate_voc(truth, found, thr, points); aps = []
    for c in truth['categories']:
        hits, n = slow_verdicts(truth, found, c['id'], thr, 'voc')
        if not n: assert got['per_class'][c['name']] == -1; continue
        tp, curve = 0, []
        for k, h in enumerate(hits): tp += h; curve.append((tp/n, tp/(k+1)))
        best = lambda t: max((p for r, p in curve if r >= t), default=0.)
        aps.append(sum(best(t) for t in np.linspace(0, 1, 11))/11 if points else sum(best(k/n-1e-9) for k in range(1, n+1))/n)
        assert got['per_class'][c['name']] == pytest.approx(aps[-1], abs=1e-9)
    assert got['mAP'] == pytest.approx(np.mean(aps) if aps else -1)

def test_voc_difficult_and_duplicates():
    truth = two_objects(); a, b = truth['annotations']; a['difficult'] = 1
    at = lambda x, s: dict(image_id=4, category_id=9, bbox=[x, 0, 40, 40], score=s)
    assert E.evaluate_voc(truth, [at(0, .9), at(1, .8), at(60, .5)])['mAP'] == 1                # both boxes on the difficult one drop out
    assert E.evaluate_voc(truth, [at(60, .9), at(61, .8)])['mAP'] == 1
    del a['difficult']
    assert E.evaluate_voc(truth, [at(0, .9), at(1, .8), at(60, .5)])['mAP'] == pytest.approx((1+2/3)/2)
    a['ignore'] = 1
    assert E.evaluate_voc(truth, [at(0, .9), at(1, .8), at(60, .5)])['mAP'] == 1

# ---- CrowdHuman

def cut(box, w, h):
    "Boxes cut to the image as CrowdHuman's benchmark cuts them."
    x1, y1, x2, y2 = xyxy(box)
    x1, y1, x2, y2 = min(max(x1, 0), w-1), min(max(y1, 0), h-1), max(min(x2, w), 0), max(min(y2, h), 0)
    return [x1, y1, max(x2-x1, 0), max(y2-y1, 0)]

def slow_crowdhuman(truth, found):
    clip = lambda rows: [r | dict(bbox=cut(r['bbox'], 240, 260)) for r in rows]
    truth, found = truth | dict(annotations=clip(truth['annotations'])), clip(found)
    hits, n = slow_verdicts(truth, found, truth['categories'][0]['id'], .5, 'caltech')
    if not n: return None
    points, tp, fp = [], 0, 0
    for h in hits: tp += h; fp += 1-h; points.append((tp/n, tp/(tp+fp), fp/len(truth['images'])))
    ap = points[0][0]*points[0][1] if points else 0.                                            # we begin at recall 0
    for (r0, p0, _), (r1, p1, _) in zip(points, points[1:]): ap += (r1-r0)*(p0+p1)/2
    logs = []
    for ref in (.01, .0178, .0316, .0562, .1, .1778, .3162, .5623, 1.):
        miss = 1-next((q[0] for q in points if q[2] >= ref), points[-1][0]) if points else 1.
        logs.append(math.log(miss) if miss > 0 else -math.inf)
    return dict(AP=ap, MR=math.exp(sum(logs)/9), recall=points[-1][0] if points else 0.,
        JI=max(slow_ji(truth, found, s/10) for s in range(10)))

def slow_ji(truth, found, score):
    "Jaccard index with the best pairing found by trying them all."
    ratios = []
    for image in truth['images']:
        mine = [a for a in truth['annotations'] if a['image_id'] == image['id']]
        G, I = [a['bbox'] for a in mine if not a['iscrowd']], [a['bbox'] for a in mine if a['iscrowd']]
        D = [r['bbox'] for r in found if r['image_id'] == image['id'] and r['score'] > score]
        def best(d, free):                                                                      # (summed IoU, pairs)
            if d == len(D): return 0., ()
            options = [best(d+1, free)]
            for g in free:
                if iou(D[d], G[g]) > .5: s, p = best(d+1, free-{g}); options.append((s+iou(D[d], G[g]), ((d, g), *p)))
            return max(options, key=lambda o: o[0])
        pairs = best(0, frozenset(range(len(G))))[1]; ds, gs = {d for d, _ in pairs}, {g for _, g in pairs}
        n = len(D)-sum(any(ioa(D[d], i) > .5 for i in I) for d in range(len(D)) if d not in ds)
        m = len(G)-sum(any(ioa(G[g], i) > .5 for i in I) for g in range(len(G)) if g not in gs)
        if n or m: ratios.append(len(pairs)/(n+m-len(pairs)))
    return sum(ratios)/len(ratios) if ratios else 0.

@given(data_sets(classes=1, grid=False, images=4))
@settings(max_examples=40, deadline=None)
def test_crowdhuman_against_the_benchmark_read_aloud(data):
    truth, found = data; want = slow_crowdhuman(truth, found)
    if want is None:
        with pytest.raises(InputError): E.evaluate_crowdhuman(truth, found)
    else:
        got = E.evaluate_crowdhuman(truth, found)
        for k in want: assert got[k] == pytest.approx(want[k], abs=1e-9), k

def test_miss_rate_by_hand():
    assert E.miss_rate(np.array([1, 0, 1]), 4, 100) == pytest.approx(math.exp((1*math.log(.75)+8*math.log(.5))/9))    # FPPI 0, .01, .01
    assert E.miss_rate(np.array([], int), 4, 100) == 1 and E.miss_rate(np.array([1, 1]), 2, 1) == 0

def test_ignore_region_by_the_detections_own_area():
    truth = two_objects(); truth['annotations'][0].update(ignore=1, bbox=[0, 0, 58, 100])
    at = lambda b, s: dict(image_id=4, category_id=9, bbox=b, score=s)
    person, small = at([60, 0, 40, 40], .5), at([5, 5, 8, 8], .9)  # the small box: IoU with the region 0.01, inside by all of its area
    m = E.evaluate_crowdhuman(truth, [person, small])
    assert (m['AP'], m['MR'], m['JI']) == (1, 0, 1)
    assert E.evaluate_crowdhuman(truth, [person, at([52, 60, 20, 20], .9)])['AP'] < .6           # mostly outside: false

def test_crowdhuman_cuts_boxes_to_the_image():
    # a body of which 40 px are in the image
    truth = two_objects(); truth['annotations'] = [truth['annotations'][0] | dict(bbox=[-100, 0, 140, 40])]
    seen = dict(image_id=4, category_id=9, bbox=[0, 0, 40, 40], score=.9)
    assert E.evaluate_crowdhuman(truth, [seen])['AP'] == 1 and E.evaluate_voc(truth, [seen])['mAP'] == 0

# ---- from a detector to the numbers

class Oracle(torch.nn.Module):
    "Knows the truth by each image's mean; boxes in the coordinates of the image it is given."
    def __init__(self, ds):
        super().__init__(); self.w = torch.nn.Parameter(torch.zeros(())); self.how = {}
        self.known = [(i.float().mean((1, 2))/255, t, tuple(i.shape[-2:])) for i, t in ds]
        self.modes, self.batches = [], []
    def detect(self, images, **how): self.how = how; return self(images)
    def forward(self, images):
        self.modes.append(self.training); self.batches.append(len(images)); out = []
        for x in images:
            assert x.dtype == torch.float32 and x.max() <= 1 and not torch.is_grad_enabled()
            _, t, (H, W) = min(self.known, key=lambda k: (k[0]-x.mean((1, 2))).abs().sum())
            b = torch.as_tensor(t['boxes']).as_subclass(torch.Tensor)*torch.tensor([x.shape[2]/W, x.shape[1]/H]*2)
            out.append(dict(boxes=b, labels=t['labels'], scores=torch.full((len(b),), .5)))
        return out

@pytest.fixture(scope='module')
def bccd(): return E.load_dataset(ROOT/'tests'/'data'/'bccd', 'test')

@pytest.mark.parametrize('size', [None, 123])
def test_predict_dataset_is_in_original_pixels(bccd, size):
    model = Oracle(bccd); model.train()
    found = E.predict_dataset(model, bccd, E.eval_transforms(size, size and 200), batch_size=3)
    assert model.training and not any(model.modes) and max(model.batches) <= 3
    m = E.evaluate_coco(bccd.ground_truth(), found)
    assert m['AP'] == pytest.approx(1, abs=1e-9) and set(m['per_class']) == set(bccd.classes)
    assert {r['image_id'] for r in found} == set(bccd.ids)

def test_predict_dataset_leaves_the_mode_after_an_error(bccd):
    model = Oracle(bccd); model.known = []
    with pytest.raises(ValueError): E.predict_dataset(model.train(), bccd)
    assert model.training

def fake_run(path, classes, **train):
    path.mkdir(); (path/'config.json').write_text(json.dumps(dict(train=train, classes=classes, detector={}))); return path

def test_command_with_the_runs_own_data(bccd, tmp_path, monkeypatch, capsys):
    run = fake_run(tmp_path/'run', list(bccd.classes), data=str(ROOT/'tests'/'data'/'bccd'), size=120, max_size=0, data_options={})
    made = []
    def load(run, checkpoint='best'): made.append((checkpoint, Oracle(bccd))); return made[-1][1]
    monkeypatch.setattr(E, 'load_detector', load)
    code = E.main([run, '--split', 'test', '--no-nms', '--checkpoint', 'last', '--score-threshold', '.2', '--device', 'cpu', '--metrics',
        *E.METRICS,
                   '--out', tmp_path/'m.json', '--results', tmp_path/'r.json', '--batch_size=2'])
    out = capsys.readouterr()
    assert code == 0, out.err
    (checkpoint, model), = made
    assert checkpoint == 'last' and model.how == dict(nms=False, score_threshold=.2) and max(model.batches) == 2
    assert 'IoU .50' in out.out and bccd.classes[0] in out.out and 'VOC mAP (area): 1.000' in out.out and 'MR^-2 0.000' in out.out
    m = json.loads((tmp_path/'m.json').read_text())
    assert m['coco']['AP'] == pytest.approx(1, abs=1e-9) and m['settings']['nms'] is False and m['voc']['mAP'] == pytest.approx(1)
    assert by_pycocotools(bccd.ground_truth(), json.loads((tmp_path/'r.json').read_text()))[0][0] == pytest.approx(1, abs=1e-9)
    assert E.main([run, '--split', 'test', '--device', 'cpu']) == 0 and made[-1][1].how == {}        # as the run has it
    (run/'config.json').write_text(json.dumps(json.loads((run/'config.json').read_text())
        | dict(train=dict(data=str(ROOT/'tests'/'data'/'bccd'), val_split='test'))))
    assert E.main([run, '--device', 'cpu']) == 0 and made[-1][1].batches                              # the split it was validated on

def test_command_matches_classes_by_name(bccd, tmp_path, monkeypatch, capsys):
    class Turned(Oracle):
        def forward(self, images): return [o | dict(labels=len(bccd.classes)-1-o['labels']) for o in super().forward(images)]
    monkeypatch.setattr(E, 'load_detector', lambda *a: Turned(bccd))
    data = ROOT/'tests'/'data'/'bccd'
    run = fake_run(tmp_path/'run', list(bccd.classes)[::-1])
    assert E.evaluate_run(run, data, 'test', device='cpu')[0]['coco']['AP'] == pytest.approx(1, abs=1e-9)
    other = fake_run(tmp_path/'other', ['RBC', 'cat'])
    assert E.main([other, '--data', data, '--split', 'test']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'RBC, cat' in err and ', '.join(bccd.classes) in err

@pytest.mark.parametrize('argv, says', [
    (['nowhere'], 'nowhere'), (['{tmp}'], 'config.json'), (['{run}', '--data', '{tmp}/none'], 'none'), (['{run}', '--split', 'vall'],
        'vall'),
    (['{run}', '--backend', 'x'], 'backend'), (['{run}', '--batch_size', '0'], 'batch_size'), (['{run}', '--device', 'abacus'], 'abacus'),
    (['{run}', '--out', '{tmp}/no/where.json'], 'where.json'), ([], 'RUN'), (['{run}', '--split', 'test', '--frobnicate'],
        'frobnicate'), (['{broken}'], 'config.json')])
def test_command_with_bad_input(bccd, tmp_path, monkeypatch, capsys, argv, says):
    run = fake_run(tmp_path/'run', list(bccd.classes), data=str(ROOT/'tests'/'data'/'bccd')); broken = tmp_path/'broken'; broken.mkdir()
    (broken/'config.json').write_text('{"a')
    monkeypatch.setattr(E, 'load_detector', lambda *a: Oracle(bccd))
    assert E.main([a.format(tmp=tmp_path, run=run, broken=broken) for a in argv]
        + (['--split', 'test'] if '{run}' in argv and '--split' not in argv else [])) == 2
    out = capsys.readouterr()
    assert out.out == '' and out.err.startswith('error: ') and out.err.count('\n') == 1 and says in out.err

def test_a_split_with_fewer_classes(bccd, tmp_path, monkeypatch):
    "The run's labels keep their meaning; a class that the split lacks is not measured."
    class Shifted(Oracle):
        def forward(self, images): return [o | dict(labels=o['labels']+1) for o in super().forward(images)]
    monkeypatch.setattr(E, 'load_detector', lambda *a: Shifted(bccd))
    run = fake_run(tmp_path/'run', ['unicorn', *bccd.classes], data=str(ROOT/'tests'/'data'/'bccd'), val_split='test')
    m, results = E.evaluate_run(run, device='cpu', metrics=E.METRICS)
    assert m['coco']['AP'] == pytest.approx(1, abs=1e-9) and m['coco']['per_class']['unicorn']['AP'] == -1
    assert {r['category_id'] for r in results} <= set(bccd.category_ids)

def test_one_parser_of_options():
    from ala_nb import train as T
    assert T.parse_pair is E.parse_pair
    options = ['one_based=False', 'box=fbox', 'n=3', 'classes=("a","b")', 'verify=FALSE', 'format=None']
    a = E.make_parser().parse_args(['run', '--data_options', *options])
    assert dict(a.data_options) == dict(one_based=False, box='fbox', n=3, classes=('a','b'), verify=False, format=None)
    assert T.parse(['--data_options', *options])[0].data_options == dict(a.data_options)

def test_two_outputs_are_two_files(tmp_path, capsys):
    assert E.main([tmp_path, '--out', tmp_path/'a.json', '--results', f'{tmp_path}/./a.json']) == 2
    assert 'a.json' in capsys.readouterr().err and not (tmp_path/'a.json').exists()

@pytest.mark.parametrize('name', ['cls', 'box'])
def test_weights_that_are_no_numbers(real_run, tmp_path, capsys, name):
    import shutil
    from ala_nb import predict as P
    from ala_nb.detector import load_detector, save_weights
    run, model = tmp_path/'run', load_detector(real_run); shutil.copytree(real_run, run)
    with torch.no_grad(): getattr(model.head, name).weight[0] = math.nan
    save_weights(model, run/'best.safetensors')
    for main, args in ((E.main, []), (P.main, [ROOT/'tests'/'data'/'bccd'/'JPEGImages', '--out', tmp_path/'out'])):
        assert main([run, *args, '--device', 'cpu']) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and 'best.safetensors' in err and 'finite' in err, err
    assert not (tmp_path/'out').exists()

def test_command_without_objects(bccd, tmp_path, monkeypatch, capsys):
    from PIL import Image
    (tmp_path/'d'/'val').mkdir(parents=True); (tmp_path/'d'/'annotations').mkdir()
    Image.new('RGB', (40, 30)).save(tmp_path/'d'/'val'/'a.png')
    gt = dict(images=[dict(id=1, file_name='a.png', width=40, height=30)], annotations=[], categories=[dict(id=1, name='a')])
    (tmp_path/'d'/'annotations'/'instances_val.json').write_text(json.dumps(gt))
    monkeypatch.setattr(E, 'load_detector', lambda *a: Oracle(bccd))
    assert E.main([fake_run(tmp_path/'run', ['a']), '--data', tmp_path/'d']) == 2
    assert 'no object' in capsys.readouterr().err

@pytest.fixture(scope='module')
def real_run(tmp_path_factory):
    "An untrained detector saved as a run."
    from ala_nb.detector import Detector, save_weights
    torch.manual_seed(0); run = tmp_path_factory.mktemp('runs')/'run'; run.mkdir()
    classes = list(E.load_dataset('shapes', 'val', n=1).classes)
    model = Detector('fcos', backbone='tiny', num_classes=len(classes)); save_weights(model, run/'best.safetensors')
    (run/'config.json').write_text(json.dumps(dict(train=dict(data='shapes', size=0, max_size=0, data_options=dict(n=6)),
        detector=model.config, classes=classes)))
    return run

@pytest.mark.parametrize('argv, says', [
    (['--soft_sigma', '.3'], '--soft_sigma: is the width of --soft_nms gaussian'), (['--soft_nms', 'linear', '--soft_sigma', '.3'], '--soft_sigma'), (['--soft_nms', 'gaussian', '--soft_sigma', '0'], "'0' is not a number between"),
    (['--soft_nms', 'linear', '--no-nms'], '--soft_nms: NMS is off here, by --no-nms'), (['--nms_threshold', '0', '--no-nms'], '--nms_threshold: NMS is off here, by --no-nms'), (['--scales', '64', '--no-nms'], '--no-nms: the detections of --scales'), (['--flip', '--no-nms'], '--flip'),
    (['--scales', '64', '--size', '96'], '--size: --scales takes its place'), (['--size', '-1'], 'size'), (['--workers', 'x'], "'x' is not a whole number from 0"), (['--checkpoint', 'last'], 'last.safetensors')])
def test_options_are_checked_before_the_data(real_run, monkeypatch, capsys, argv, says):
    monkeypatch.setattr(E, 'run_data', lambda *a: pytest.fail('the data was read'))
    assert E.main([real_run, '--device', 'cpu', *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1

def test_soft_nms_of_a_method_without_nms(real_run):
    from ala_nb.detector import Detector
    with pytest.raises(E.InputError, match='--soft_nms: NMS is off here, by the run'): E.check_inference(Detector('poto', 'tiny', 2), soft_nms='linear')
    E.check_inference(Detector('poto', 'tiny', 2), soft_nms='gaussian', soft_sigma=.3, nms=True)

def test_command_in_a_process_of_its_own(real_run, tmp_path):
    call = lambda *a: subprocess.run([sys.executable, '-m', 'ala_nb.evaluate', *map(str, a)], cwd=tmp_path, capture_output=True, text=True,
                                     env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    r = call(real_run, '--device', 'cpu', '--out', 'm.json', '--score_threshold', '0')
    assert r.returncode == 0, r.stderr
    assert 'IoU .50' in r.stdout and 0 <= json.loads((tmp_path/'m.json').read_text())['coco']['AP'] < .1
    r = call('nowhere')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr

def test_settings_reach_the_real_detector(real_run):
    seen = {}
    for nms in (True, False):
        _, found = E.evaluate_run(real_run, device='cpu', nms=nms, score_threshold=0., nms_threshold=.01 if nms else None, max_detections=2000)
        seen[nms] = len(found)
    assert seen[False] > seen[True]                                                              # without NMS more boxes stay
    _, found = E.evaluate_run(real_run, device='cpu', score_threshold=0., max_detections=7)
    assert len(found) == 6*7

# ---- results go back into pycocotools on the user's own file

def own_file(tmp_path, change):
    "BCCD's test split as somebody's COCO file, changed."
    import shutil
    root = tmp_path/'set'; (root/'annotations').mkdir(parents=True); shutil.copytree(ROOT/'tests'/'data'/'bccd'/'JPEGImages', root/'images')
    d = json.loads((ROOT/'tests'/'data'/'bccd'/'annotations'/'instances_test.json').read_text()); change(d)
    (root/'annotations'/'instances_test.json').write_text(json.dumps(d)); return root

def twins(d):                                                                     # two categories of one name; the second is used
    for c in d['categories']: c['id'] += 10
    for a in d['annotations']: a['category_id'] += 10
    d['categories'].insert(0, dict(id=0, name=d['categories'][0]['name'])); d['categories'].append(dict(id=99, name=d['categories'][1]['name']))
def hashed(d):
    for r in d['images']: r['id'] += 2**60
    for a in d['annotations']: a['image_id'] += 2**60
def as_text(d):
    for a in d['annotations']: a['category_id'] = str(a['category_id']); a['image_id'] = str(a['image_id'])
def flagged(d):
    for k,a in enumerate(d['annotations']): a['iscrowd'], a['ignore'] = int(k%7==0), int(k%5==0)

@pytest.mark.parametrize('change', [twins, hashed, as_text, flagged], ids=lambda f: f.__name__)
def test_results_are_for_the_users_own_file(tmp_path, monkeypatch, change):
    class Near(Oracle):
        def forward(self, images):
            out = super().forward(images)
            for n,o in enumerate(out): o['boxes'] = o['boxes']+torch.arange(len(o['boxes']))[:,None]%11; o['scores'] = torch.linspace(1, .1, len(o['boxes']))
            return out
    root = own_file(tmp_path, change); ds = E.load_dataset(root, 'test'); monkeypatch.setattr(E, 'load_detector', lambda *a: Near(ds))
    run = fake_run(tmp_path/'run', list(ds.classes)); out, file = tmp_path/'m.json', tmp_path/'r.json'
    with contextlib.redirect_stdout(io.StringIO()): assert E.main([run, '--data', root, '--split', 'test', '--device', 'cpu', '--out', out, '--results', file])==0
    truth = json.loads((root/'annotations'/'instances_test.json').read_text())
    if change is as_text:
        for a in truth['annotations']: a['category_id'], a['image_id'] = int(a['category_id']), int(a['image_id'])       # pycocotools knows numbers only
    if change is not hashed: assert by_pycocotools(truth, json.loads(file.read_text()))[0][0]==pytest.approx(json.loads(out.read_text())['coco']['AP'], abs=1e-9)
    assert {r['image_id'] for r in json.loads(file.read_text())}=={r['id'] for r in truth['images']} and 0<json.loads(out.read_text())['coco']['AP']<1
    from ala_nb.predict import data_set_ids
    ids, kinds = data_set_ids(root/'annotations'/'instances_test.json', ds.files, list(ds.classes))                  # predict says the same ids
    assert ids==[r['id'] for r in truth['images']] and {r['category_id'] for r in json.loads(file.read_text())}<=set(kinds) and len(kinds)==len(ds.classes)

# ---- days that go wrong

def process(code, cwd, **how):
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, stdin=subprocess.DEVNULL, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1') | how.pop('env', {}), text=True, timeout=120, **how)

def test_a_terminal_that_cannot_write_a_name(tmp_path):
    code = "import sys; from ala_nb.files import exit_code, write_json\ndef work(): write_json('a.json', 1); print('血小板 \\u2014')\nsys.exit(exit_code(work))"
    r = process(code, tmp_path, env=dict(PYTHONIOENCODING='ascii'), capture_output=True); assert (r.returncode, r.stderr)==(0, '') and '\\u8840' in r.stdout

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_output_that_is_full_or_closed(tmp_path):
    code = "import sys; from ala_nb.files import exit_code\nsys.exit(exit_code(lambda: print('x'*100000)))"
    with open('/dev/full', 'w') as full: r = process(code, tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert r.returncode==1 and r.stderr=='error: No space left on device; make room on the disk\n'
    r = subprocess.run(['sh', '-c', f'exec {sys.executable} -c "$1" >&-', 'sh', code], cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True, timeout=120)
    assert r.returncode==0 and r.stderr=='standard output is closed: what would stand there is lost\n'

def test_files_are_written_before_anything_is_printed(bccd, tmp_path, monkeypatch):
    run = fake_run(tmp_path/'run', list(bccd.classes), data=str(ROOT/'tests'/'data'/'bccd')); monkeypatch.setattr(E, 'load_detector', lambda *a: Oracle(bccd))
    def broken(found): raise OSError(5, 'the terminal is gone')
    monkeypatch.setattr(E, 'metrics_text', broken)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): assert E.main([run, '--split', 'test', '--device', 'cpu', '--out', tmp_path/'m.json'])==1
    assert 'coco' in json.loads((tmp_path/'m.json').read_text())

def test_names_of_classes_are_escaped(bccd, tmp_path, capsys):
    bad = '\x1b[2Jcat\n'; found = dict(coco=dict(AP=.5, per_class={bad:dict(AP=.5, AP50=.5)}), voc=dict(mAP=.5, per_class={bad:.5}))
    s = E.metrics_text(found); assert '\x1b' not in s and '\\x1b[2Jcat\\n' in s
    assert E.main([fake_run(tmp_path/'run', [bad]), '--data', ROOT/'tests'/'data'/'bccd', '--split', 'test'])==2
    err = capsys.readouterr().err; assert '\x1b' not in err and err.count('\n')==1

def test_outputs_that_are_no_numbers(real_run, tmp_path, capsys):
    "Finite weights, infinite outputs: said, not an AP of 0."
    import shutil
    from ala_nb import predict as P
    from ala_nb.detector import load_detector, save_weights
    run, model = tmp_path/'run', load_detector(real_run); shutil.copytree(real_run, run)
    with torch.no_grad(): model.head.cls.weight.fill_(3e38)
    save_weights(model, run/'best.safetensors')
    for main, args in ((E.main, []), (P.main, [ROOT/'tests'/'data'/'bccd'/'JPEGImages', '--out', tmp_path/'out'])):
        assert main([run, *args, '--device', 'cpu'])==2
        err = capsys.readouterr().err; assert err.count('\n')==1 and 'NaN or infinite' in err and '--checkpoint' in err, err
    assert not (tmp_path/'out').exists()

@pytest.fixture
def small_disk(tmp_path):
    "A real disk of 64 KiB."
    d = tmp_path/'disk'; d.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', d], capture_output=True).returncode: pytest.skip('no file system can be mounted here')
    yield d
    subprocess.run(['umount', d])

def test_a_full_disk_names_the_file(small_disk, real_run, tmp_path, capsys):
    from ala_nb import predict as P
    (small_disk/'filler').write_bytes(b'x'*60_000)
    assert E.main([real_run, '--device', 'cpu', '--score_threshold', '0', '--results', small_disk/'r.json'])==1
    err = capsys.readouterr().err; assert 'r.json: No space left on device; make room' in err and err.count('\n')==1 and os.listdir(small_disk)==['filler']
    assert P.main([real_run, ROOT/'tests'/'data'/'bccd'/'JPEGImages', '--out', small_disk/'out', '--device', 'cpu'])==1
    err = capsys.readouterr().err; assert 'BloodImage' in err and 'No space left on device' in err and '.partial' not in err and os.listdir(small_disk)==['filler']

def test_memory_that_is_not_there(capsys):
    "torch's error on a CPU and Python's own end in a line; another RuntimeError stays what it is."
    def none(): raise MemoryError
    for work in (lambda: torch.empty(2**60, dtype=torch.uint8), none):
        assert E.exit_code(work) == 1 and '--batch_size' in (err := capsys.readouterr().err) and err.count('\n') == 1
    with pytest.raises(RuntimeError, match='size'): E.exit_code(lambda: torch.zeros(2) + torch.zeros(3))
