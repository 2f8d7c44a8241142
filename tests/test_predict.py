"Pictures of every kind in, annotated pictures and COCO's JSON out, all or nothing."
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT
from ala_nb.geometry import InputError
from ala_nb import predict as P

class Spots(torch.nn.Module):
    "Finds the bright part of a dark image: a box around it, class 1, score 0.75; and one over the whole image, class 0, score 0.1."
    def __init__(self):
        super().__init__(); self.w = torch.nn.Parameter(torch.zeros(()))
        self.classes, self.how, self.batches, self.fail = ['all', 'spot'], {}, [], None
    def detect(self, images, **how): self.how = how; return self(images)
    def forward(self, images):
        assert not self.training; self.batches.append([tuple(x.shape) for x in images]); out = []
        if self.fail is not None and len(self.batches) > self.fail: raise OSError(28, 'No space left on device')
        for x in images:
            assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
            ys, xs = torch.nonzero(x.mean(0) > .5, as_tuple=True); b = [torch.tensor([0., 0, x.shape[2], x.shape[1]])]
            if len(ys): b.append(torch.stack([xs.min(), ys.min(), xs.max()+1, ys.max()+1]).float())
            keep = torch.tensor([.1, .75][:len(b)]) >= self.how.get('score_threshold', 0)
            out.append(dict(boxes=torch.stack(b)[keep], labels=torch.arange(len(b))[keep], scores=torch.tensor([.1, .75][:len(b)])[keep]))
        return out

SPOT = 30, 20, 50, 60                                                            # in an image of 120 x 80
def spot(turn=0):
    a = np.zeros((80, 120), np.uint8); a[SPOT[1]:SPOT[3], SPOT[0]:SPOT[2]] = 255
    return a

@pytest.fixture
def model(monkeypatch):
    m = Spots(); monkeypatch.setattr(P, 'load_detector', lambda run, checkpoint='best': m.eval()); return m

@pytest.fixture
def run(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'config.json').write_text(json.dumps(dict(train=dict(size=0, max_size=0), classes=['all', 'spot'], detector={})))
    return tmp_path/'run'

@pytest.fixture
def folder(tmp_path):
    d = tmp_path/'images'; d.mkdir(); a = spot()
    for n in ('b.png', 'a.png', 'c.jpg'): Image.fromarray(a).convert('RGB').save(d/n)
    (d/'notes.txt').write_text('no image'); return d

def files(d): return sorted(p.relative_to(d).as_posix() for p in Path(d).rglob('*'))

# ---- images of every kind

def kinds(d):
    "File name and image of every kind that is to be read as the same picture."
    a = spot(); rgb = np.stack([a]*3, -1); rgba = np.dstack([rgb, np.full_like(a, 128)])
    yield 'grey.png', Image.fromarray(a), {}
    yield 'deep.png', Image.fromarray(a.astype(np.uint16)*257), {}
    yield 'rgba.png', Image.fromarray(rgba), {}
    yield 'la.png', Image.fromarray(np.dstack([a, a])), {}
    yield 'one.png', Image.fromarray(a > 0), {}
    yield 'palette.gif', Image.fromarray(a).convert('P'), {}
    yield 'cmyk.jpg', Image.fromarray(rgb).convert('CMYK'), dict(quality=100)
    yield 'float.tif', Image.fromarray(a.astype(np.float32)), {}
    yield 'lossless.webp', Image.fromarray(rgb), dict(lossless=True)
    exif = Image.Exif(); exif[0x112] = 6                                         # stored lying on its side: turn by 90 degrees clockwise
    yield 'turned.jpg', Image.fromarray(np.rot90(rgb).copy()), dict(quality=100, exif=exif)

def test_every_kind_of_image(model, run, tmp_path):
    d = tmp_path/'kinds'; d.mkdir(); names = []
    for n, im, how in kinds(d): im.save(d/n, **how); names.append(n)
    said = P.predict_files(run, [d], tmp_path/'out')
    assert [Path(i['file_name']).name for i in said['images']] == sorted(names)
    for i in said['images']:
        assert (i['width'], i['height']) == (120, 80), i
        (r,) = [a for a in said['annotations'] if a['image_id'] == i['id']]
        np.testing.assert_allclose(r['bbox'], [30, 20, 20, 40], atol=1.1, err_msg=i['file_name'])         # JPEG bleeds
        with Image.open(tmp_path/'out'/i['picture']) as im: assert im.size == (480, 320) and im.mode == 'RGB'

@pytest.mark.parametrize('x',
    [spot(), np.stack([spot()]*3, -1), torch.from_numpy(np.stack([spot()]*3)), torch.from_numpy(np.stack([spot()]*3))/255,
    Image.fromarray(spot()),
    Image.fromarray(spot().astype(np.uint16)*257), Image.fromarray(spot().astype(np.float32)), Image.fromarray(spot()).convert('RGBA')])
def test_api_takes_arrays_tensors_and_pil(x):
    (out,) = P.predict(Spots(), x, score_threshold=.5)
    assert out['boxes'].tolist() == [list(SPOT)] and out['names'] == ['spot'] and out['scores'].tolist() == [.75]

@pytest.mark.parametrize('mode', ['CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'PA', 'RGBX', 'P', 'LA', '1', 'La', 'RGBa'])
def test_api_takes_pil_images_of_every_mode(mode):
    grey = Image.fromarray(spot())
    how = dict(LAB='RGB', HSV='RGB', La='LA', RGBa='RGBA', PA='P').get(mode)
    x = Image.fromarray(spot().astype(np.int32)*257) if mode == 'I' else (grey.convert(how) if how else grey).convert(mode)
    (out,) = P.predict(Spots(), x, score_threshold=.5)
    assert out['boxes'].tolist() == [list(SPOT)]

def test_api_takes_views():
    a = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert torch.equal(P.as_image(a[:,:,::-1]), P.as_image(a).flip(0)) and torch.equal(P.as_image(a[::-1,::2]), P.as_image(a).flip(1)[...,::2])

@pytest.mark.parametrize('bad',
    [np.zeros((4, 5, 4), np.uint8), np.zeros((0, 5, 3), np.uint8), torch.zeros(1, 4, 5), torch.full((3, 4, 5), 2.),
    torch.full((3, 4, 5), torch.nan),
                                 torch.zeros(3, 4, 5, dtype=torch.int64), np.zeros(7)])
def test_api_refuses_what_is_no_image(bad):
    with pytest.raises(InputError): P.predict(Spots(), [bad])

# ---- the API

def test_batches_sizes_and_original_pixels(model, run, folder):
    found = P.predict(model, [folder/n for n in ('a.png', 'b.png', 'c.jpg')], size=40, batch_size=2, score_threshold=.5)
    assert model.batches == [[(3, 40, 60)]*2, [(3, 40, 60)]] and len(found) == 3
    for o in found: np.testing.assert_allclose(o['boxes'], [SPOT], atol=2.1)
    model.train(); P.predict(model, spot()); assert model.training and P.predict(model, []) == []

def test_run_directory_gives_the_size(model, run, folder):
    (run/'config.json').write_text(json.dumps(dict(train=dict(size=40, max_size=50), classes=['all', 'spot'])))
    P.predict(run, folder/'a.png', device='cpu'); assert model.batches[-1] == [(3, 33, 50)]
    P.predict(run, folder/'a.png', device='cpu', size=20, max_size=0); assert model.batches[-1] == [(3, 20, 30)]
    P.predict(run, folder/'a.png', device='cpu', nms=False, score_threshold=None); assert model.how == dict(nms=False)

# ---- files

def test_json_and_pictures(model, run, folder, tmp_path):
    said = P.predict_files(run, [folder], tmp_path/'new'/'out', score_threshold=.05)
    assert files(tmp_path/'new') == ['out', 'out/a.png', 'out/b.png', 'out/c.jpg', 'out/predictions.json']
    assert json.loads((tmp_path/'new'/'out'/'predictions.json').read_text()) == said
    assert [i['id'] for i in said['images']] == [1, 2, 3] and said['categories'] == [dict(id=1, name='all'), dict(id=2, name='spot')]
    first = [a for a in said['annotations'] if a['image_id'] == 1]
    assert [(a['category_id'], a['bbox']) for a in first] == [(1, [0, 0, 120, 80]), (2, [30, 20, 20, 40])]
    assert len({a['id'] for a in said['annotations']}) == len(said['annotations']) == 6
    with contextlib.redirect_stdout(io.StringIO()):
        from pycocotools.coco import COCO
        coco = COCO(str(tmp_path/'new'/'out'/'predictions.json')); assert len(coco.loadRes(said['annotations']).anns) == 6
    plain = np.asarray(Image.open(folder/'a.png').convert('RGB')); drawn = np.asarray(Image.open(tmp_path/'new'/'out'/'a.png'))
    assert drawn.shape == (320, 480, 3) and (drawn != plain.repeat(4, 0).repeat(4, 1)).any()

def test_ids_of_a_data_set(model, run, tmp_path):
    from ala_nb.evaluate import evaluate_coco
    from ala_nb.data import load_dataset
    d = tmp_path/'set'; (d/'val').mkdir(parents=True); (d/'annotations').mkdir()
    for n in ('x.png', 'y.png'): Image.fromarray(spot()).save(d/'val'/n)
    gt = dict(images=[dict(id=70, file_name='y.png', width=120, height=80), dict(id=9, file_name='x.png', width=120, height=80)],
        categories=[dict(id=4, name='spot'), dict(id=2, name='all')],
              annotations=[dict(id=i+1, image_id=k, category_id=4, bbox=[30, 20, 20, 40], area=800, iscrowd=0) for i,
                  k in enumerate((70, 9))])
    file = d/'annotations'/'instances_val.json'; file.write_text(json.dumps(gt))
    said = P.predict_files(run, [d/'val'], tmp_path/'out', annotations=file)
    assert [(i['id'], Path(i['file_name']).name) for i in said['images']] == [(9, 'x.png'), (70, 'y.png')] and {a['category_id']
        for a in said['annotations']} == {4}
    assert evaluate_coco(load_dataset(d, 'val').ground_truth(), said['annotations'])['AP'] == pytest.approx(1)
    file.write_text(json.dumps(gt), encoding='utf-8-sig')                             # as some Windows programs write it
    assert P.data_set_ids(file, [d/'val'/'x.png'], ['spot']) == ([9], [4])
    file.write_bytes(json.dumps(gt | dict(note='f\xfcr'), ensure_ascii=False).encode('latin-1'))
    with pytest.raises(InputError, match='instances_val.json: cannot be read as text'): P.data_set_ids(file, [d/'val'/'x.png'], ['spot'])
    for change, says in ((dict(images=[]), 'no image x.png'), (dict(categories=[dict(id=4, name='spot')]), "no class 'all'"),
            (dict(images=3), 'not a COCO'), (dict(images=[{}]), 'file_name')):
        file.write_text(json.dumps(gt | change))
        with pytest.raises(InputError, match=says): P.predict_files(run, [d/'val'], tmp_path/'out2', annotations=file)
    assert not (tmp_path/'out2').exists()

def test_same_names_do_not_meet(model, run, folder, tmp_path):
    other = tmp_path/'other'; other.mkdir(); Image.fromarray(spot()).save(other/'a.png')
    said = P.predict_files(run, [folder/'a.png', other, folder], tmp_path/'out')
    assert [i['picture'] for i in said['images']] == ['a.png', 'a_2.png', 'b.png', 'c.jpg']

def test_overwrite_and_inputs_that_must_stay(model, run, folder, tmp_path):
    out = tmp_path/'out'; P.predict_files(run, [folder], out); before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match='--overwrite'): P.predict_files(run, [folder], out)
    P.predict_files(run, [folder/'a.png'], out, overwrite=True); assert files(out) == ['a.png', 'b.png', 'c.jpg', 'predictions.json'] # the others stay
    assert len(json.loads((out/'predictions.json').read_text())['images']) == 1
    for over in (False, True):
        with pytest.raises(InputError, match='is an input'): P.predict_files(run, [folder], folder, overwrite=over)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    P.predict_files(run, [folder], folder, pictures=False); assert 'predictions.json' in files(folder)  # the JSON beside the images is fine

@pytest.mark.parametrize('existed', [False, True])
def test_all_or_nothing(model, run, folder, tmp_path, existed):
    out = tmp_path/'deep'/'out'
    if existed: out.mkdir(parents=True); (out/'mine.txt').write_text('mine')
    model.fail = 2
    with pytest.raises(OSError): P.predict_files(run, [folder], out, batch_size=1)
    assert len(model.batches) == 3                                               # two pictures were drawn, and are gone
    assert files(out) == ['mine.txt'] if existed else not (tmp_path/'deep').exists()
    model.fail = None; P.predict_files(run, [folder], out)
    assert 'predictions.json' in files(out) and not any(f.startswith('.') for f in files(out))

def test_broken_files_are_found_first(model, run, folder, tmp_path, capsys):
    whole = (folder/'c.jpg').read_bytes()
    for name, data in (('z.jpg', whole[:len(whole)//2]), ('z.png', b'not an image'), ('y.png', b'')):
        (folder/name).write_bytes(data)
        with pytest.raises(InputError, match=name): P.predict_files(run, [folder], tmp_path/'out')
        assert not (tmp_path/'out').exists() and model.batches == []
        if name != 'y.png': (folder/name).unlink()
    said = P.predict_files(run, [folder], tmp_path/'out', skip_unreadable=True)
    assert len(said['images']) == 3 and 'y.png' in capsys.readouterr().err
    with pytest.raises(InputError, match='none'): P.predict_files(run, [folder/'y.png'], tmp_path/'out2', skip_unreadable=True)

def test_a_folder_of_one_size_after_another_and_tiny_images(model, run, tmp_path):
    d = tmp_path/'d'; d.mkdir()
    for i, (w, h) in enumerate(((1, 1), (2, 300), (300, 2), (37, 91))): Image.new('RGB', (w, h), 'white').save(d/f'{i}.png')
    said = P.predict_files(run, [d], tmp_path/'out', score_threshold=0.)
    assert [(i['width'], i['height']) for i in said['images']] == [(1, 1), (2, 300), (300, 2), (37, 91)] and len(said['annotations']) == 8

# ---- the command

@pytest.mark.parametrize('argv, says', [
    (['{tmp}/none', '{d}', '--out', '{tmp}/o'], 'none'), (['{run}', '{tmp}/none.jpg', '--out', '{tmp}/o'], 'none.jpg'), (['{run}', '{d}'],
        '--out'), (['{run}', '--out', '{tmp}/o'], 'IMAGE_OR_DIR'),
    (['{run}', '{tmp}/empty', '--out', '{tmp}/o'], 'empty'), (['{run}', '{d}', '--out', '{d}/a.png'],
        'is a file'), (['{run}', '{d}', '--out', '{tmp}/o', '--score_threshold', '2'], 'score_threshold'),
    (['{run}', '{d}/notes.txt', '--out', '{tmp}/o'], 'notes.txt'), (['{run}', '{d}', '--out', '{tmp}/o', '--device', 'abacus'],
        'abacus'), (['{run}', '{d}', '--out', '{tmp}/o', '--batch-size', 'x'], 'batch_size')])
def test_bad_input_is_one_line_and_nothing_is_written(model, run, folder, tmp_path, capsys, argv, says):
    (tmp_path/'empty').mkdir(); before = files(tmp_path)
    assert P.main([a.format(tmp=tmp_path, d=folder, run=run) for a in argv]) == 2
    out = capsys.readouterr()
    assert out.out == '' and out.err.startswith('error: ') and out.err.count('\n') == 1 and says in out.err and files(tmp_path) == before

def test_command(model, run, folder, tmp_path, capsys):
    assert P.main([run, folder, '--out', tmp_path/'o', '--score-threshold', '.05', '--no-nms', '--device', 'cpu', '--batch_size', '2',
        '--no-pictures']) == 0
    out = capsys.readouterr().out
    assert '3 images, 6 boxes' in out and '3 all, 3 spot' in out and files(tmp_path/'o') == ['predictions.json']
    assert model.how == dict(nms=False, score_threshold=.05)
    model.fail = 0
    assert P.main([run, folder, '--out', tmp_path/'o2']) == 1 and 'No space' in capsys.readouterr().err and not (tmp_path/'o2').exists()

def test_in_a_process_of_its_own(tmp_path, folder):
    from ala_nb.detector import Detector, save_weights
    torch.manual_seed(0); m = Detector('fcos', backbone='tiny', num_classes=2); run = tmp_path/'real'; run.mkdir()
    save_weights(m, run/'best.safetensors')
    (run/'config.json').write_text(json.dumps(dict(train=dict(size=64, max_size=0), detector=m.config, classes=['all', 'spot'])))
    r = subprocess.run([sys.executable, '-m', 'ala_nb.predict', str(run), str(folder), '--out', 'out', '--score_threshold', '0',
        '--max_detections', '5', '--device', 'cpu'],
                       cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert r.returncode == 0, r.stderr
    assert files(tmp_path/'out') == ['a.png', 'b.png', 'c.jpg',
        'predictions.json'] and len(json.loads((tmp_path/'out'/'predictions.json').read_text())['annotations']) == 15

# ---- days that go wrong

def test_what_a_killed_run_left_is_removed(model, run, folder, tmp_path):
    import fcntl, signal, time
    code = f'''import time, sys
from ala_nb.predict import staging
from ala_nb.files import exit_code
def work():
    with staging({str(tmp_path/"out")!r}) as s: (s/"half.png").write_text("x"); print(s, flush=True); time.sleep(60)
sys.exit(exit_code(work))'''
    def start():
        p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT))); return p, Path(p.stdout.readline().strip())
    (killed, old), (alive, mine) = start(), start()
    killed.kill(); killed.wait(); assert (old/'half.png').exists()
    P.predict_files(run, [folder], tmp_path/'out')
    assert not old.exists() and (mine/'half.png').exists() and (tmp_path/'out'/'predictions.json').exists()      # one that is at work is left alone
    alive.terminate(); assert alive.wait(30)==143 and alive.stderr.read()=='stopped by SIGTERM\n' and not mine.exists()

@pytest.mark.parametrize('suffix', ['jpg','png','tif'])
def test_one_rule_of_orientation(model, run, tmp_path, suffix):
    "A JSON whose sizes are those of the stored frame: predictions are in that frame too, inside the picture."
    d = tmp_path/'pictures'; d.mkdir(); exif = Image.Exif(); exif[0x112] = 6; f = d/f'x.{suffix}'
    Image.fromarray(np.stack([spot()]*3, -1)).save(f, exif=exif, **(dict(quality=100) if suffix=='jpg' else {}))
    gt = dict(images=[dict(id=5, file_name=f.name, width=120, height=80)], categories=[dict(id=1, name='all'), dict(id=2, name='spot')], annotations=[])
    (tmp_path/'gt.json').write_text(json.dumps(gt))
    told = P.predict_files(run, [d], tmp_path/'a', annotations=tmp_path/'gt.json'); (a,) = told['annotations']
    assert (told['images'][0]['width'], told['images'][0]['height'])==(120, 80); np.testing.assert_allclose(a['bbox'], [30,20,20,40], atol=1.1)
    told = P.predict_files(run, [d], tmp_path/'b'); (a,) = told['annotations']                                    # without annotations: as a viewer shows it
    assert (told['images'][0]['width'], told['images'][0]['height'])==(80, 120); np.testing.assert_allclose(a['bbox'], [20,30,40,20], atol=1.1)
    gt['images'][0].update(width=50); (tmp_path/'gt.json').write_text(json.dumps(gt))
    with pytest.raises(InputError, match=f'x.{suffix}: is 80x120 px, its annotation says 50x80'): P.predict_files(run, [d], tmp_path/'c', annotations=tmp_path/'gt.json')

def test_ids_where_names_repeat(tmp_path):
    gt = dict(images=[dict(id=1, file_name='camA/0.png'), dict(id=2, file_name='camB\\0.png')], categories=[dict(id=0, name='cell'), dict(id=1, name='cell')], annotations=[dict(category_id=1)])
    (tmp_path/'gt.json').write_text(json.dumps(gt)); look = lambda *f: P.data_set_ids(tmp_path/'gt.json', [tmp_path/x for x in f], ['cell'])
    assert look('camB/0.png', 'camA/0.png')==([2,1], [1])
    with pytest.raises(InputError, match='2 images are called 0.png'): look('0.png')

@pytest.mark.parametrize('mode', ['I;16','I;16B','I;16L','I;16N'])
def test_pil_images_of_sixteen_bits(mode):
    x = Image.new(mode, (5,4), 65535); assert (P.as_image(x)==255).all() and P.as_image(x).shape==(3,4,5)

def test_names_of_files_and_classes_reach_the_terminal_escaped(model, run, tmp_path, capsys):
    d = tmp_path/'in'; d.mkdir(); Image.fromarray(spot()).save(d/'a.png'); (d/'b\x1b[2J\n.png').write_bytes(b'no')
    (run/'config.json').write_text(json.dumps(dict(train=dict(size=0, max_size=0), classes=['all', '\x1b[31mspot\n'], detector={})))
    assert P.main([run, d, '--out', tmp_path/'o'])==2; err = capsys.readouterr().err; assert '\x1b' not in err and err.count('\n')==1
    assert P.main([run, d, '--out', tmp_path/'o', '--skip_unreadable'])==0
    out = capsys.readouterr(); assert '\x1b' not in out.out+out.err and '1 \\x1b[31mspot\\n' in out.out and out.err.count('\n')==1

@pytest.mark.filterwarnings('error')
def test_class_names_that_few_fonts_have():
    found = dict(boxes=torch.tensor([[2.,2,90,60]]), labels=torch.tensor([0]), scores=torch.tensor([.5]))
    for name in ('血小板', '\U00017000', '\x1b[2J'):
        im = np.asarray(P.draw_detections(torch.zeros(3,80,120, dtype=torch.uint8), found, [name])); assert (im.reshape(-1,3).max(0)>0).any()
