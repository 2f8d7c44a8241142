"CondInst: what the notebook would be bored by: empties, crowds, precision, processes, commands, mask AP."
import csv, json, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from ala_nb import evaluate as E, microscope as M, predict as P, train as T
from ala_nb import condinst
from ala_nb.condinst import CondInst, dice_loss, enlarge, mask_targets, share_out
from ala_nb.data import load_dataset, save_coco
from ala_nb.detector import Detector, load_detector, save_weights
from ala_nb.geometry import InputError
from ala_nb.masks import decode_masks, encode_masks, pack_mask
from ala_nb.methods import box_methods, available, build
from ala_nb.pairs import Objects, Pairs

NAMES = 'condinst', 'condinst_poto', 'condinst_o2f'
SMALL = dict(mask_channels=8, mask_convs=1, mask_norm='group', masks_per_image=8)
NET = dict(channels=16, head_convs=1, backbone_options=dict(widths=(8,8,16,16,16)))

def model(name='condinst_o2f', seed=0, **options):
    torch.manual_seed(seed)
    return Detector(name, 'tiny', 3, method_options=dict(SMALL, **options), **NET)

def batch(sizes=((96,128),(128,100)), objects=(3,2), seed=0):
    g = torch.Generator().manual_seed(seed); images, targets = [], []
    for (h,w),n in zip(sizes, objects):
        xy = torch.rand(n,2, generator=g)*torch.tensor([w*.6,h*.6]); wh = 8 + torch.rand(n,2, generator=g)*torch.tensor([w*.35,h*.35])
        b = torch.cat([xy, xy+wh], 1); m = torch.zeros(n,h,w, dtype=torch.bool)
        for k,(x1,y1,x2,y2) in enumerate(b.round().int().tolist()): m[k,y1:y2,x1:x2] = True
        images.append(torch.rand(3,h,w, generator=g)); targets.append(dict(boxes=b, labels=torch.arange(n)%3, masks=m))
    return images, targets

@pytest.mark.parametrize('name', NAMES)
def test_parts_and_names(name):
    assert name in available() and name not in box_methods() and build(name, 3).masks and not build('fcos', 3).masks
    m = model(name); assert [n for n,_ in m.head.named_children() if n.startswith('mask')] == ['mask_levels','mask_tower','mask_features']
    again = Detector(**m.config); assert again.state_dict().keys() == m.state_dict().keys()
    assert m.method.nms == (name == 'condinst')

@pytest.mark.parametrize('name', NAMES)
def test_empties(name):
    m = model(name).train(); images, targets = batch()
    none = [dict(boxes=torch.zeros(0,4), labels=torch.zeros(0, dtype=torch.long))]*2
    for t in ([targets[0], none[1]], none, [dict(none[0], masks=torch.zeros(0,96,128, dtype=torch.bool)), targets[1]]):
        losses = m(images, t); sum(losses.values()).backward()
        assert all(v.isfinite() for v in losses.values()) and all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
        m.zero_grad()
    for t in targets: t['masks'].zero_()                                    # nothing of any object is in sight
    losses = m(images, targets); assert all(v.isfinite() for v in losses.values())
    with torch.no_grad(): found = m.eval().detect(images, score_threshold=1.)
    assert [f['masks'].shape for f in found] == [(0,96,128), (0,128,100)]

@pytest.mark.parametrize('change, words', [(lambda t: t.pop('masks'), 'targets[0]: masks are missing'), (lambda t: t.update(masks=t['masks'][:1]), 'targets[0]: masks are (1, 96, 128)'),
    (lambda t: t.update(masks=t['masks'].float()), 'float32'), (lambda t: t.update(masks=torch.ones(3,300,128, dtype=torch.bool)), 'targets[0]: masks are (3, 300, 128), larger'), (lambda t: t.update(masks=5), 'masks are int')])
def test_wrong_masks_are_said(change, words):
    images, targets = batch(); change(targets[0])
    with pytest.raises(InputError) as e: model().train()(images, targets)
    assert words in str(e.value)

@pytest.mark.parametrize('options, words', [(dict(filters=(8,8)), 'filters'), (dict(filters=(8,0,3)), 'filters'), (dict(masks_per_image=0), 'masks_per_image'), (dict(finer=0), 'finer'), (dict(mask_weight=-1.), 'mask_weight'),
    (dict(mask_norm='layer'), 'norm'), (dict(mask_chanels=8), 'mask_channels')])
def test_wrong_options_are_said(options, words):
    with pytest.raises(InputError, match=words): model(**options)

def test_a_crowd_draws_no_more_than_was_said():
    "400 objects in an image: what is drawn, and the memory of it, stays bounded."
    m = model('condinst', masks_per_image=20).train(); images, targets = batch(((128,128),), (400,))
    out, preds = m.assign(images, targets)
    pairs = m.method.drawing_pairs(preds.full_precision(), out)
    assert int((out.weights['pos']>0).sum()) > 60 and len(pairs) == 20 and pairs.lengths.max() == 1
    assert out.losses['loss_mask'].isfinite()

@pytest.mark.parametrize('limit', [20, 10**6])
def test_targets_are_made_for_what_draws_only(limit, monkeypatch):
    "The loss is that of all objects' targets, gathered, but no tensor has a row for an object that does not draw."
    m = model('condinst', masks_per_image=limit).train(); images, targets = batch(((128,128),(96,64)), (300,3))
    seen, make = [], condinst.mask_targets
    def watched(objects, obj, size, step):
        out = make(objects, obj, size, step); every = make(objects, torch.arange(len(objects)), size, step)
        seen.append((out.shape[0], len(objects))); assert torch.equal(out, every[obj]); return out
    monkeypatch.setattr(condinst, 'mask_targets', watched)
    out, preds = m.assign(images, targets); drawn = len(m.method.drawing_pairs(preds.full_precision(), out))
    assert seen == [(drawn, 303)] and out.losses['loss_mask'].isfinite() and (drawn <= 2*limit)

def test_sharing_out_against_a_loop():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        n = int(torch.randint(1, 9, (), generator=g)); image = torch.randint(0, 3, (n,), generator=g).sort()[0]
        lengths = torch.randint(0, 6, (n,), generator=g); obj = torch.repeat_interleave(lengths)
        class Grid: points, strides, level_starts = torch.zeros(40,2), torch.ones(40), [0,40]
        pairs = Pairs(torch.arange(len(obj)), obj, lengths, Grid, Objects(torch.zeros(n,4), torch.zeros(n).long(), image, 3))
        score, limit = torch.rand(len(obj), generator=g), int(torch.randint(1, 9, (), generator=g)); want = torch.zeros(len(obj), dtype=torch.bool)
        for i in range(3):
            mine = [o for o in range(n) if image[o]==i and lengths[o]>0]; each = max(limit//max(len(mine),1), 1); found = []
            for o in mine:
                at = (obj==o).nonzero().flatten(); at = at[score[at].argsort(descending=True)][:each]
                found += [(k, -float(score[a]), int(a)) for k,a in enumerate(at)]
            for *_,a in sorted(found)[:limit]: want[a] = True
        assert torch.equal(share_out(pairs, score, limit), want)

@pytest.mark.parametrize('name', NAMES)
def test_a_batch_is_its_images(name):
    "Padding and neighbours change no mask of an image: the loss of two is the mean by the number that drew."
    m = model(name).double().eval(); images, targets = batch(((96,128),(96,128)))
    images = [i.double() for i in images]
    def loss(k):
        out, preds = m.assign([images[i] for i in k], [targets[i] for i in k]); return out.losses['loss_mask'], len(m.method.drawing_pairs(preds, out))
    (a,n), (b,k), (both,t) = loss([0]), loss([1]), loss([0,1])
    assert t == n+k; torch.testing.assert_close(both, (a*n + b*k)/t)

def test_gradients_and_the_tiny_case_by_finite_differences():
    m = model('condinst', upsample=2).double().train(); images, targets = batch(((64,64),), (1,)); images = [images[0].double()]
    w = m.head.controller.bias
    def loss(): return m(images, targets)['loss_mask']
    g, = torch.autograd.grad(loss(), w)
    for k in (0, 85, 168):
        with torch.no_grad():
            w[k] += 1e-5; a = loss(); w[k] -= 2e-5; b = loss(); w[k] += 1e-5
        assert abs(float((a-b)/2e-5 - g[k])) < 1e-7

@pytest.mark.parametrize('name', NAMES)
def test_autocast_keeps_the_arithmetic_in_float32(name):
    m = model(name).train(); images, targets = batch()
    with torch.autocast('cpu', torch.bfloat16): losses = m(images, targets)
    assert all(v.dtype==torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward(); assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): found = m.eval().detect(images, score_threshold=0., max_detections=3)
    assert found[0]['masks'].shape == (3,96,128)

def test_masks_in_other_sizes_and_without():
    m = model().eval(); images, _ = batch()
    with torch.no_grad():
        same, large = m.detect(images, score_threshold=0., max_detections=4), m.detect(images, score_threshold=0., max_detections=4, mask_sizes=[(192,256),(64,50)])
        none = m.detect(images, score_threshold=0., max_detections=4, masks=False); several = m.detect(images, scales=[64,96], max_size=200)
    assert [f['masks'].shape for f in large] == [(4,192,256),(4,64,50)] and 'masks' not in none[0] and 'masks' not in several[0]
    assert (same[0]['masks'] == large[0]['masks'][:,::2,::2]).float().mean() > .9

PROCESS = '''
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r}); import test_condinst as C
dist.init_process_group('gloo', rank=int(sys.argv[1]), world_size=2, init_method='file://'+sys.argv[2])
m = C.model('condinst').double().eval(); images, targets = C.batch(((96,128),(96,128)), (3,1))
i = int(sys.argv[1]); out, _ = m.assign([images[i].double()], [targets[i]]); x = out.losses['loss_mask'].detach().clone()
dist.all_reduce(x); print(float(x)/2) if i==0 else None
'''
def test_two_processes_divide_by_the_masks_of_both(tmp_path):
    m = model('condinst').double().eval(); images, targets = batch(((96,128),(96,128)), (3,1))
    one = float(m.assign([i.double() for i in images], targets)[0].losses['loss_mask'].detach())
    code = PROCESS.format(tests=str(Path(__file__).parent))
    both = [subprocess.Popen([sys.executable, '-c', code, str(r), str(tmp_path/'store')], stdout=subprocess.PIPE, text=True) for r in range(2)]
    out = [p.communicate(timeout=240)[0] for p in both]
    assert abs(float(out[0].split()[-1]) - one) < 1e-12

# ---- evaluation

def test_mask_ap_by_hand_and_both_backends():
    "Two squares; one mask is right, one covers half of its object with a box that fits."
    full = torch.zeros(2,40,40, dtype=torch.bool); full[0,:10,:10] = True; full[1,20:30,20:30] = True
    boxes = [[0,0,10,10],[20,20,10,10]]; half = full.clone(); half[1,25:] = False
    truth = dict(images=[dict(id=1, width=40, height=40)], categories=[dict(id=1, name='x')],
                 annotations=[dict(image_id=1, category_id=1, bbox=b, area=100, segmentation=m) for b,m in zip(boxes, encode_masks(full))])
    found = [dict(image_id=1, category_id=1, bbox=b, score=s, segmentation=m) for b,s,m in zip(boxes, (.9,.8), encode_masks(half))]
    for backend in ('faster','pycocotools'):
        assert E.evaluate_coco(truth, found, backend)['AP'] == pytest.approx(1)
        m = E.evaluate_coco(truth, found, backend, masks=True)
        assert m['AP50'] == pytest.approx(1) and m['AP75'] == pytest.approx(51/101) and m['AP'] == pytest.approx((1 + 9*51/101)/10)
    both = E.compute_metrics(truth, found); assert both['masks']['AP'] < both['coco']['AP'] and 'masks' in E.metrics_text(both)
    del found[0]['segmentation']; assert 'masks' not in E.compute_metrics(truth, found)
    with pytest.raises(InputError, match='results: number 0 has no segmentation'): E.evaluate_coco(truth, found, masks=True)

def test_an_objects_size_is_its_masks():
    m = torch.zeros(1,80,80, dtype=torch.bool); m[0,:30,:30] = True                               # 900 px²: small; its box is not
    code = encode_masks(m)[0]; row = dict(image_id=1, category_id=1, bbox=[0,0,70,70], segmentation=code)
    truth = dict(images=[dict(id=1, width=80, height=80)], categories=[dict(id=1, name='x')], annotations=[dict(row, area=900)])
    for backend in ('faster','pycocotools'): assert E.evaluate_coco(truth, [dict(row, score=.5)], backend, masks=True)['APs'] == pytest.approx(1)

def test_shares_of_processes_are_the_whole():
    ds = load_dataset('shapes', 'val', n=7, masks=True, image_size=64); m = model(seed=1); m = Detector('condinst_o2f', 'tiny', 8, method_options=SMALL, **NET).eval()
    one = E.predict_dataset(m, ds, batch_size=2, score_threshold=.0, max_detections=5)
    parts = [r for rank in range(2) for r in E.predict_dataset(m, ds, batch_size=2, rank=rank, world_size=2, score_threshold=.0, max_detections=5)]
    key = lambda r: (r['image_id'], -r['score'])
    assert sorted(one, key=key) == sorted(parts, key=key) and all('segmentation' in r for r in one)
    truth = ds.ground_truth(); assert E.evaluate_coco(truth, one, masks=True) == E.evaluate_coco(truth, parts, masks=True)

# ---- commands

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A short run on a folder of pictures of two sizes."
    tmp = tmp_path_factory.mktemp('run'); ds = load_dataset('shapes', 'train', n=8, masks=True, image_size=(64,96)); save_coco(ds, tmp/'data')
    val = load_dataset('shapes', 'val', n=3, masks=True, image_size=(96,64)); save_coco(val, tmp/'data')
    config = T.recipe(str(tmp/'data'), method='condinst_o2f', method_options=SMALL, backbone='tiny', detector_options=NET, size=48, max_size=80, steps=3, batch_size=4, warmup=0,
                      out=str(tmp/'run'), threads=1, amp='off', channels_last='false', eval_every=1, score_threshold=.0)
    T.train(config, log=None)
    return tmp/'run', tmp/'data'

def test_train_and_evaluate(run, capsys):
    rows = list(csv.DictReader(open(run[0]/'metrics.csv'))); assert float(rows[-1]['loss_mask']) > 0 and 0 <= float(rows[-1]['mask_AP']) <= 1
    assert E.main([str(run[0]), '--results', str(run[0]/'r.json'), '--out', str(run[0]/'m.json')]) == 0
    out = capsys.readouterr().out; assert 'boxes' in out and '\nmasks\n' in out and '100 masks' in out
    found = json.loads((run[0]/'r.json').read_text()); assert all(r['segmentation']['size'] == [96,64] for r in found)    # of the pictures, not of what was trained
    assert {'coco','masks'} <= set(json.loads((run[0]/'m.json').read_text()))
    assert E.main([str(run[0]), '--data_options', 'masks=false']) == 0 and 'masks' not in capsys.readouterr().out

def test_data_without_masks_is_one_line(run, tmp_path, capsys):
    save_coco(load_dataset('shapes', 'train', n=3, image_size=64), tmp_path/'boxes')
    assert T.main(['--data', str(tmp_path/'boxes'), '--method', 'condinst', '--backbone', 'tiny', '--eval_every', '0', '--out', str(tmp_path/'x')]) == 2
    err = capsys.readouterr().err; assert 'no segmentation, and masks are asked for' in err and 'instances_train.json' in err and not (tmp_path/'x').exists()

def test_predict_writes_masks(run, tmp_path, capsys):
    "Run lengths and polygons of the same pixels, in the pictures' own size; COCO's tools read both."
    from pycocotools.coco import COCO
    pictures, told = run[1]/'val', {}
    for name, more in (('runs', []), ('outlines', ['--polygons'])):
        assert P.main([str(run[0]), str(pictures), '--out', str(tmp_path/name), '--score_threshold', '0', '--max_detections', '6', *more]) == 0
        told[name] = COCO(str(tmp_path/name/'predictions.json')); assert len(list((tmp_path/name).glob('*.png'))) == 3
    capsys.readouterr()
    assert len(told['runs'].anns) == len(told['outlines'].anns) > 0
    for a,b in zip(told['runs'].anns.values(), told['outlines'].anns.values()):
        m = told['runs'].annToMask(a); assert m.shape == (96,64) and m.sum() == a['area'] == b['area']
        if m.any(): assert (told['outlines'].annToMask(b) == m).all()
        else: assert b['segmentation'] == []

def test_the_page_of_a_run_with_masks(tmp_path, capsys):
    "The microscope hands the masks of its images on; boxes of a file alone are refused, and what is no image is said to be none."
    model = Detector('condinst', 'tiny', 8); save_weights(model, tmp_path/'best.safetensors'); (tmp_path/'x.txt').write_text('x')
    (tmp_path/'config.json').write_text(json.dumps(dict(train=dict(data='shapes', val_split='val', data_options=dict(n=2)), detector=model.config, classes=list('abcdefgh'))))
    assert M.main([tmp_path, '0', '1', '--out', tmp_path/'page.html']) == 0 and 'best weights' in (tmp_path/'page.html').read_text(encoding='utf-8')
    save_coco(load_dataset('shapes', 'val', n=1), tmp_path/'coco'); capsys.readouterr()
    for argv, words in ((['coco/val/000000.png', '--annotations', 'coco/annotations/instances_val.json'], 'masks'), (['x.txt'], 'image')):
        assert M.main([tmp_path, *(tmp_path/a if '/' in a or '.' in a else a for a in argv), '--out', tmp_path/'no.html']) == 2
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1 and not (tmp_path/'no.html').exists()
