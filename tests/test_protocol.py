"The protocol of the papers: Soft-NMS, COCO's test sets without annotations, several folders as one data set."
import json, math, os, shutil
from pathlib import Path
import pytest, torch
from PIL import Image
from ala_nb import evaluate as E, train as T
from ala_nb.data import report, load_dataset, save_coco
from ala_nb.detector import Detector, soften
from ala_nb.geometry import InputError

def naive_soft(boxes, scores, labels, kind, threshold, sigma, least):
    "Soft-NMS class by class in plain Python, after its paper's pseudo code."
    area, out = lambda b: (b[2]-b[0])*(b[3]-b[1]), []
    def iou(a, b):
        w, h = (max(0., min(a[i+2], b[i+2]) - max(a[i], b[i])) for i in (0, 1))
        return w*h/(area(a) + area(b) - w*h)
    boxes, scores = boxes.tolist(), scores.tolist()
    for c in set(labels.tolist()):
        left = {i: scores[i] for i in range(len(boxes)) if labels[i] == c}
        while left:
            best = max(left, key=left.get); s = left.pop(best)
            if s <= least: break
            out.append((best, s))
            for i in left:
                u = iou(boxes[best], boxes[i])
                left[i] *= math.exp(-u*u/sigma) if kind == 'gaussian' else 1-u if u > threshold else 1
    return sorted(out, key=lambda x: -x[1])

@pytest.mark.parametrize('kind', ['linear', 'gaussian'])
@pytest.mark.parametrize('seed', range(3))
def test_soft_nms(kind, seed):
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(90, 2, generator=g).double()*60
    boxes = torch.cat([at, at + 5 + torch.rand(90, 2, generator=g).double()*40], 1)
    scores, labels = torch.rand(90, generator=g).double(), torch.randint(3, (90,), generator=g)
    keep, found = soften(boxes, scores, labels, kind, .3, .5, .05, 1000)
    want = naive_soft(boxes, scores, labels, kind, .3, .5, .05)
    assert keep.tolist() == [i for i, _ in want]
    torch.testing.assert_close(found, torch.tensor([s for _, s in want]).double())
    assert soften(boxes, scores, labels, kind, .3, .5, .05, 7)[0].tolist() == keep[:7].tolist()
    assert [len(x) for x in soften(boxes[:0], scores[:0], labels[:0], kind, .3, .5, .05, 7)] == [0, 0]

def test_soft_nms_of_a_detector():
    torch.manual_seed(0)
    model = Detector('fcos', 'tiny', 3).eval(); images = [torch.rand(3, 96, 96)]
    with torch.no_grad():
        hard, = model.detect(images, score_threshold=.001, max_detections=1000)
        soft, = model.detect(images, score_threshold=.001, max_detections=1000, soft_nms='gaussian')
        every, = model.detect(images, score_threshold=.001, max_detections=1000, scales=[64, 96], flip=True, soft_nms='linear')
    assert len(soft['scores']) > len(hard['scores']) > 0 and len(every['scores']) > 0
    assert (soft['scores'][:-1] >= soft['scores'][1:]).all() and soft['scores'][0] == hard['scores'][0]
    with pytest.raises(InputError, match='nothing to soften'): model.detect(images, nms=False, soft_nms='linear')
    with pytest.raises(InputError, match='gaussian'): model.detect(images, soft_nms='gauss')

@pytest.fixture
def coco(tmp_path):
    root = tmp_path/'coco'
    save_coco(load_dataset('shapes', 'train', n=6), root); save_coco(load_dataset('shapes', 'val', n=3), root)
    info = json.loads((root/'annotations'/'instances_val.json').read_text()); info.pop('annotations')
    (root/'annotations'/'image_info_test-dev2017.json').write_text(json.dumps(info))
    shutil.copytree(root/'val', root/'test2017')
    return root

def test_test_dev(coco, tmp_path, capsys, monkeypatch):
    "A split without annotations: nothing is measured, its detections are written with the file's own ids."
    monkeypatch.chdir(tmp_path)
    ds = load_dataset(coco, 'test-dev2017')
    assert len(ds) == 3 and ds.files[0].parent.name == 'test2017' and ds.report['objects'] == 0
    small = ['--size', '64', '--max_size', '64', '--backbone', 'tiny', '--steps', '1', '--batch_size', '2', '--eval_every', '0', '--amp', 'off']
    assert T.main(['--data', str(coco), '--train_split', 'train', '--val_split', 'val', '--out', 'run', *small]) == 0
    capsys.readouterr()
    assert E.main(['run', '--split', 'test-dev2017']) == 2
    err = capsys.readouterr().err; assert '--results' in err and err.count('\n') == 1
    assert E.main(['run', '--split', 'test-dev2017', '--results', 'r.json', '--score_threshold', '0', '--soft_nms', 'linear']) == 0
    found = json.loads(Path('r.json').read_text())
    ids = {r['id'] for r in json.loads((coco/'annotations'/'image_info_test-dev2017.json').read_text())['images']}
    assert found and {r['image_id'] for r in found} <= ids and set(found[0]) == {'image_id', 'category_id', 'bbox', 'score'}
    assert 'no objects to compare' in capsys.readouterr().out

def voc(root, year, names, n):
    "A folder in VOC's form with n pictures, its objects named in turn."
    for d in ('Annotations', 'JPEGImages', 'ImageSets/Main'): (root/d).mkdir(parents=True)
    for i in range(n):
        Image.new('RGB', (64, 48), (30*i, 80, 120)).save(root/'JPEGImages'/f'{year}_{i}.jpg')
        box = ''.join(f'<{k}>{v}</{k}>' for k, v in dict(xmin=5, ymin=5, xmax=40, ymax=30).items())
        (root/'Annotations'/f'{year}_{i}.xml').write_text(f'<annotation><filename>{year}_{i}.jpg</filename><size><width>64</width><height>48</height><depth>3</depth></size>'
            f'<object><name>{names[i%len(names)]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object></annotation>')
    (root/'ImageSets'/'Main'/'trainval.txt').write_text('\n'.join(f'{year}_{i}' for i in range(n)))

def test_several_folders(tmp_path, capsys, monkeypatch):
    "VOC 2007 + 2012: classes by name, images in order; trained by the command, resumed, and moved."
    monkeypatch.chdir(tmp_path)
    voc(Path('VOC2007'), 2007, ['cat', 'dog'], 4); voc(Path('VOC2012'), 2012, ['dog', 'person'], 3)
    both = load_dataset(os.pathsep.join(['VOC2007', 'VOC2012']), 'trainval')
    assert both.classes == ['cat', 'dog', 'person'] and len(both) == 7 and both.report['objects'] == 7
    assert [both.classes[int(both.objects(i)['labels'][0])] for i in range(7)] == ['cat', 'dog', 'cat', 'dog', 'dog', 'person', 'dog']
    assert len(set(both.ids)) == 7 and both.name == 'VOC2007+VOC2012'
    assert [f.name for f in both.files][3:5] == ['2007_3.jpg', '2012_0.jpg'] and both.image(6).shape == (3, 48, 64)
    one = load_dataset('VOC2007', 'trainval'); assert one.name == 'VOC2007' and len(one) == 4
    small = ['--train_split', 'trainval', '--val_split', 'trainval', '--size', '48', '--max_size', '64', '--backbone', 'tiny', '--steps', '2', '--batch_size', '2', '--eval_every', '1', '--amp', 'off']
    assert T.main(['--data', 'VOC2007', 'VOC2012', *small]) == 0
    run, = Path('runs').iterdir(); assert run.name.startswith('VOC2007+VOC2012-')
    data = json.loads((run/'config.json').read_text())['train']['data']
    assert data == os.pathsep.join(str((tmp_path/d).absolute()) for d in ('VOC2007', 'VOC2012'))
    assert T.main(['--resume', str(run)]) == 0
    assert E.main([str(run), '--voc_results', 'sent', '--results', 'r.json', '--score_threshold', '0', '--max_detections', '3']) == 0
    sent = {f.name: f.read_text().splitlines() for f in Path('sent').iterdir()}; boxes = json.loads(Path('r.json').read_text())
    assert set(sent) == {f'comp4_det_trainval_{c}.txt' for c in ('cat', 'dog', 'person')} and sum(map(len, sent.values())) == len(boxes) > 0
    name, score, *corners = next(iter(sent['comp4_det_trainval_cat.txt'] or sent['comp4_det_trainval_dog.txt'] or sent['comp4_det_trainval_person.txt'])).split()
    close = lambda b: abs(b['score']-float(score)) < 1e-5 and all(abs(float(c)-v) < .006 for c, v in zip(corners,
               (b['bbox'][0]+1, b['bbox'][1]+1, b['bbox'][0]+b['bbox'][2], b['bbox'][1]+b['bbox'][3])))
    assert any(map(close, boxes)) and name.startswith('20')
    assert E.main([str(run), '--data', 'VOC2007', 'VOC2012', '--split', 'trainval', '--out', 'm.json']) == 0 and 'VOC2007+VOC2012' in capsys.readouterr().out
    assert E.main([str(run), '--out', 'n.json']) == 0 and json.loads(Path('m.json').read_text())['coco'] == json.loads(Path('n.json').read_text())['coco']
    capsys.readouterr()
    assert T.main(['--data', 'VOC2007', 'VOC2021', *small]) == 2
    assert 'VOC2021: no such folder' in capsys.readouterr().err

def test_voc_test_list(tmp_path, capsys, monkeypatch):
    "Pictures of a list without annotations: trained beside, detected in, files for VOC's server; where no AP is possible a line says so."
    monkeypatch.chdir(tmp_path); voc(Path('VOC2012'), 2012, ['dog', 'cat'], 4); root = Path('VOC2012')
    for i in range(3): Image.new('RGB', (40+i, 48), (20, 90*i, 80)).save(root/'JPEGImages'/f'2012_t{i}.jpg')
    (root/'ImageSets'/'Main'/'test.txt').write_text(''.join(f'2012_t{i}\n' for i in range(3)))
    (root/'ImageSets'/'Main'/'dog_test.txt').write_text(''.join(f'2012_t{i}  1\n' for i in range(3)))
    small = ['--train_split', 'trainval', '--size', '48', '--max_size', '64', '--backbone', 'tiny', '--steps', '1', '--batch_size', '2', '--amp', 'off']
    assert T.main(['--data', 'VOC2012', *small, '--eval_every', '0', '--out', 'run']) == 0
    sent = lambda: {f.name: f.read_text().splitlines() for f in Path('sent').iterdir()}
    always = ['run', '--split', 'test', '--score_threshold', '0', '--max_detections', '2']
    capsys.readouterr(); assert E.main(always) == 2
    assert 'no object to find' in (err := capsys.readouterr().err) and '--voc_results' in err and err.count('\n') == 1
    assert E.main([*always, '--voc_results', 'sent']) == 0 and 'no objects to compare' in (out := capsys.readouterr().out) and 'list without annotations' in out
    assert set(sent()) == {'comp4_det_test_cat.txt', 'comp4_det_test_dog.txt'}
    assert {l.split()[0] for lines in sent().values() for l in lines} == {f'2012_t{i}' for i in range(3)}
    (root/'Annotations'/'2012_t1.xml').write_text((root/'Annotations'/'2012_0.xml').read_text().replace('2012_0', '2012_t1'))
    assert E.main([*always, '--voc_results', 'sent']) == 2 and 'annotations=false' in capsys.readouterr().err
    assert E.main([*always, '--voc_results', 'sent', '--data_options', 'annotations=false']) == 0 and len({l.split()[0] for lines in sent().values() for l in lines}) == 3
    capsys.readouterr(); assert T.main(['--data', 'VOC2012', *small, '--val_split', 'test', '--data_options', 'annotations=false']) == 2
    assert 'no object to learn from' in (err := capsys.readouterr().err) and 'Annotations/*.xml' in err
    for f in [*root.glob('Annotations/*')]: f.unlink()
    (root/'Annotations').rmdir()                                                   # the test set of VOC by itself
    assert E.main([*always, '--voc_results', 'sent']) == 0 and len({l.split()[0] for lines in sent().values() for l in lines}) == 3
    (root/'JPEGImages'/'2012_t2.jpg').unlink(); capsys.readouterr()
    assert E.main([*always, '--voc_results', 'sent']) == 2 and 'test.txt: line 3' in capsys.readouterr().err

def test_folders_without_the_split_to_measure_on(tmp_path, capsys, monkeypatch):
    "VOC 07 + 12: trained on both, measured on 2007's test set, whether 2012 has no list, or one without annotations."
    monkeypatch.chdir(tmp_path)
    voc(Path('VOC2007'), 2007, ['cat', 'dog'], 4); voc(Path('VOC2012'), 2012, ['dog', 'person'], 3)
    (Path('VOC2007')/'ImageSets'/'Main'/'test.txt').write_text('2007_1\n2007_2\n'); both = os.pathsep.join(['VOC2007', 'VOC2012'])
    def measured():
        ds = load_dataset(both, 'test', classes=['cat', 'dog', 'person'])
        assert (ds.name, len(ds), ds.classes) == ('VOC2007', 2, ['cat', 'dog', 'person']) and ds.left_out == ['VOC2012']
        assert 'VOC2012 has no annotated split test and is left out' in str(report(ds))
    measured()
    Image.new('RGB', (40, 48)).save('VOC2012/JPEGImages/2012_t.jpg'); (Path('VOC2012')/'ImageSets'/'Main'/'test.txt').write_text('2012_t\n'); measured()
    assert len(load_dataset('VOC2012', 'test')) == 1
    argv = ['--preset', 'autoassign_voc', '--data', 'VOC2007', 'VOC2012', '--backbone', 'tiny', '--weights', 'none', '--size', '48', '--max_size', '64', '--batch_size', '4', '--steps', '1', '--out', 'run']
    assert T.main(argv) == 0 and 'is left out' in capsys.readouterr().out
    (Path('VOC2007')/'ImageSets'/'Main'/'trainval.txt').unlink()
    with pytest.raises(InputError, match='trainval'): load_dataset(both, 'trainval')                 # never in training

def test_loader_alone(coco, capsys):
    "Images a second of the loader, by the command; every image is loaded, and what cannot be is one line."
    from ala_nb import data as D
    assert D.main([str(coco), '--split', 'train', '--speed', '--workers', '1', '--batch_size', '2', '--size', '32', '--max_size', '40']) == 0
    out = capsys.readouterr().out
    assert 'images a second' in out and 'batches of 2 by 1 loading process, short side 32 px, long side at most 40 px' in out
    ds = load_dataset(str(coco), 'train'); n, seconds, first = D.load_speed(ds, batch_size=2, images=11)
    assert 11 <= n <= 12 and seconds > 0 and first > 0
    assert D.load_speed(ds, batch_size=2, images=10**9, seconds=0.)[0] == min(2, len(ds))          # the time limit
    assert D.main([str(coco), '--speed', '--workers', '-1']) == 2 and '-1' in capsys.readouterr().err

def test_tensorboard(tmp_path, monkeypatch, capsys):
    "Every row of metrics.csv, at its step; a resumed run goes on in the same place; without the package a line, and nothing is made."
    import csv, sys, types
    said, made = [], []
    class Writer:
        def __init__(self, folder, purge_step): made.append((Path(folder).name, purge_step))
        def add_scalar(self, name, value, step): said.append((name, float(value), step))
        def close(self): made.append('closed')
    monkeypatch.chdir(tmp_path)
    args = ['--steps', '4', '--train_images', '8', '--batch_size', '2', '--eval_every', '0', '--log_every', '2', '--log', 'tensorboard', '--out', 'run']
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)                       # an import of it fails
    assert T.main(args) == 2 and not Path('run').exists()
    err = capsys.readouterr().err; assert 'ala_nb[log]' in err and err.count('\n') == 1
    fake = types.ModuleType('torch.utils.tensorboard'); fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', fake)
    assert T.main(args) == 0
    rows = list(csv.DictReader(Path('run/metrics.csv').open()))
    want = [(k, float(v), int(r['step'])) for r in rows for k, v in r.items() if k != 'step' and v != '']
    assert [(k, s) for k, _, s in said] == [(k, s) for k, _, s in want] and {s for *_, s in said} == {2, 4}
    assert all(a[1] == pytest.approx(b[1], rel=1e-3, abs=1e-3) for a, b in zip(said, want) if a[0] in ('loss', 'lr', 'epoch'))
    assert made == [('tensorboard', 1), 'closed']
    assert T.main(['--resume', 'run']) == 0 and made[2:] == [('tensorboard', 5), 'closed']

def test_resume_of_a_run_from_before_a_knob(tmp_path, monkeypatch, capsys):
    "A run whose files do not know an option goes on with its default; one with another value in the checkpoint does not."
    monkeypatch.chdir(tmp_path)
    assert T.main(['--steps', '4', '--train_images', '8', '--batch_size', '2', '--eval_every', '0', '--out', 'run']) == 0
    config = json.loads(Path('run/config.json').read_text()); state = torch.load('run/state.pt', weights_only=False)
    for d in (config['train'], state['made']['train']): del d['bias_lr'], d['log']
    Path('run/config.json').write_text(json.dumps(config)); torch.save(state, 'run/state.pt')
    assert T.main(['--resume', 'run']) == 0
    state['made']['train']['bias_lr'] = 2.; torch.save(state, 'run/state.pt'); capsys.readouterr()
    assert T.main(['--resume', 'run']) == 2 and 'bias_lr' in capsys.readouterr().err

def test_objects365(tmp_path):
    "Its files' names: zhiyuan_objv2_SPLIT.json, pictures in SPLIT/patchN while the file says images/v2/patchN."
    for split, patch in (('train', 'patch0'), ('val', 'patch16')):
        (tmp_path/split/patch).mkdir(parents=True); (tmp_path/'annotations').mkdir(exist_ok=True)
        names = [f'objects365_v2_{split}{i:06d}.jpg' for i in range(2)]
        for i, name in enumerate(names): Image.new('RGB', (40, 30), (9*i, 0, len(split))).save(tmp_path/split/patch/name)
        images = [dict(id=i, file_name=f'images/v2/{patch}/{name}', width=40, height=30) for i, name in enumerate(names)]
        found = [dict(id=1, image_id=0, category_id=2, bbox=[1, 1, 9, 9], area=81, iscrowd=0)]
        (tmp_path/'annotations'/f'zhiyuan_objv2_{split}.json').write_text(json.dumps(dict(images=images, annotations=found,
            categories=[dict(id=1, name='Person'), dict(id=2, name='Sneakers')])))
    for split in ('train', 'val'):
        ds = load_dataset(tmp_path, split)
        assert len(ds) == 2 and ds.classes == ['Person', 'Sneakers'] and all(split in f.parts for f in ds.files) and ds.report['objects'] == 1
