"Data: the shapes set, readers and their complaints, transforms, and the loader's promise to repeat itself."
import hashlib, json, math, os, pickle, shutil
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from ala_nb import data
from ala_nb.data import (BatchOrder, Bits, FolderDataset, Items, SHAPES, SHAPES_VERSION, ShapesConfig, ShapesDataset, ShortSide, Transforms,
                         clip_boxes, draw_scene, eval_transforms, load_dataset, make_loader, pair_iou, read_image, save_coco, train_transforms)
from ala_nb.geometry import InputError

BCCD = Path(__file__).parent/'data'/'bccd'
few = settings(max_examples=40, deadline=None)

# ---------------------------------------------------------------- shapes

# Pixels, boxes and labels of the first scenes of every split. A change here is a new SHAPES_VERSION.
DIGEST = {1: '9ae63c485adf6e3b16543ae9ecaaed9cddbacbb82bae82ffb0c74b6c3c96119e'}

def test_standard_set_is_what_it_was():
    h = hashlib.sha256()
    for split in range(3):
        for i in range(8):
            s = draw_scene(ShapesConfig(), 0, split, i)
            h.update(s['image'].tobytes()); h.update(s['boxes'].astype('<f4').tobytes()); h.update(s['labels'].astype('<i8').tobytes())
    assert h.hexdigest() == DIGEST[SHAPES_VERSION]
    assert [len(ShapesDataset(s)) for s in ('train','val','test')] == [3000,500,500]

configs = st.builds(ShapesConfig, image_size=st.one_of(st.integers(32,160), st.tuples(st.integers(32,96), st.integers(32,160))),
                    objects=st.tuples(st.integers(1,4), st.integers(4,30)), sides=st.tuples(st.floats(3,10), st.floats(.4,1.)),
                    aspect=st.floats(1,4), max_iou=st.floats(0,.9), min_visible=st.floats(0,.9), clutter=st.integers(0,9),
                    contrast=st.just((20.,60.)), rotate=st.booleans(), classes=st.sampled_from([SHAPES, SHAPES[4:], ('ell','disc')]))

@few
@given(cfg=configs, seed=st.integers(0,2**63), index=st.integers(0,10**6))
def test_every_scene_keeps_its_promises(cfg, seed, index):
    s = draw_scene(cfg, seed, 0, index); b = s['boxes']; h,w = cfg.hw
    assert s['image'].shape==(3,h,w) and s['image'].dtype==np.uint8 and 1<=len(b)<=cfg.objects[1] and len(b)==len(s['labels'])
    sides = b[:,2:]-b[:,:2]
    assert b.min()>=0 and (b<=[w,h,w,h]).all() and sides.min()>=cfg.sides[0]-.0625 and sides.max()<=cfg.sides[1]*min(h,w)+.0625
    assert (sides.max(1)/sides.min(1)).max() <= cfg.aspect*1.05 or sides.min()<4
    iou = pair_iou(b.astype(float), b.astype(float)); np.fill_diagonal(iou, 0); assert iou.max()<=cfg.max_iou+1e-9
    assert (s['visible']>=cfg.min_visible-1e-9).all() and s['labels'].max()<len(cfg.classes)
    for g in range(len(b)):
        ys,xs = np.nonzero(s['owner']==g)
        if len(xs): assert b[g,0]-1<=xs.min() and xs.max()<=b[g,2] and b[g,1]-1<=ys.min() and ys.max()<=b[g,3]
    again = draw_scene(cfg, seed, 0, index)
    assert all((s[k]==again[k]).all() for k in s)

def test_crowds_of_hundreds():
    s = draw_scene(ShapesConfig(image_size=512, objects=(400,400), sides=(8,.06)), 0, 0, 0)
    assert len(s['boxes'])>=380

def test_shapes_masks_sizes_and_pickle():
    ds = load_dataset('shapes', 'val', n=3, masks=True, image_size=(64,96), seed=5)
    image, t = ds[1]
    assert ds.sizes==[(64,96)]*3 and image.shape==(3,64,96) and t['masks'].shape==(len(t['labels']),64,96)
    copy = pickle.loads(pickle.dumps(ds))
    assert copy._images is None and (copy[1][0]==image).all() and (copy[1][1]['masks']==t['masks']).all()
    assert not (load_dataset('shapes', 'val', n=3, image_size=(64,96), seed=6)[1][0]==image).all()
    flipped, f = Transforms([v2.RandomHorizontalFlip(1.)])(*ds[1])
    assert (f['masks']==t['masks'].flip(-1)).all()

@pytest.mark.parametrize('options, word', [(dict(split='dev'), 'train, val, test'), (dict(n=0), 'n: 0'), (dict(seed=-1), 'seed'), (dict(image_size=4), 'image_size'),
    (dict(classes=('disk',)), 'disk'), (dict(classes=()), 'classes'), (dict(objects=(0,3)), 'objects'), (dict(sides=(50,.1)), 'sides'), (dict(aspect=.5), 'aspect'),
    (dict(noize=3), 'noise'), (dict(contrast=40.), 'two numbers'),
    (dict(n=10.5), 'n: 10.5'), (dict(seed='x'), "seed: 'x'"), (dict(seed=1.5), 'seed'), (dict(image_size='a'), 'image_size'), (dict(image_size=64.5), 'image_size'),
    (dict(image_size=(64,)), 'image_size'), (dict(objects=('a','b')), 'objects'), (dict(objects=(1.5,4)), 'objects'), (dict(sides=(10,'x')), 'sides'),
    (dict(aspect='x'), 'aspect'), (dict(noise='x'), 'noise'), (dict(noise=float('nan')), 'noise'), (dict(texture=True), 'texture'), (dict(clutter='x'), 'clutter'),
    (dict(clutter=1.5), 'clutter'), (dict(contrast=('a',1)), 'contrast'), (dict(max_iou='x'), 'max_iou'), (dict(min_visible=None), 'min_visible'), (dict(rotate='False'), 'rotate'),
    (dict(masks='no'), 'masks'), (dict(keep='x'), 'keep'), (dict(config=3), 'config'), (dict(classes='disc'), "classes: 'disc' must be a list"), (dict(classes=5), 'classes'),
    (dict(classes=['disc','disc']), 'classes'), (dict(source='x'), 'source')])
def test_shapes_bad_options(options, word):
    with pytest.raises(InputError, match=word): load_dataset('shapes', **options)

# ---------------------------------------------------------------- folders that are right

def coco_dict(n=3, size=(60,80), boxes=((5,6,20,30),)):
    return dict(images=[dict(id=10*i+7, file_name=f'{i}.png', height=size[0], width=size[1]) for i in range(n)],
                annotations=[dict(id=100+i*10+k, image_id=10*i+7, category_id=5, bbox=list(b), area=b[2]*b[3]/2, iscrowd=0)
                             for i in range(n) for k,b in enumerate(boxes)], categories=[dict(id=9, name='dog'), dict(id=5, name='cat')])

def write_coco(root, d, split='train', ann='annotations/instances_train.json', images='train', size=(60,80)):
    (root/ann).parent.mkdir(parents=True, exist_ok=True); (root/images).mkdir(parents=True, exist_ok=True)
    (root/ann).write_text(json.dumps(d))
    for i in range(3): Image.fromarray(np.full((*size,3), 40*i, np.uint8)).save(root/images/f'{i}.png')
    return root

def voc_xml(boxes=(('cat',(6,7,25,36),0),), size=(60,80)):
    objects = ''.join(f'<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox>'
                      '</object>' for n,b,d in boxes)
    return f'<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>{objects}</annotation>'

def write_voc(root, xml=None, images='JPEGImages', ann='Annotations', splits=('train',)):
    for d in (images, ann, 'ImageSets/Main'): (root/d).mkdir(parents=True, exist_ok=True)
    for i in range(3):
        Image.fromarray(np.full((60,80,3), 40*i, np.uint8)).save(root/images/f'{i}.jpg')
        (root/ann/f'{i}.xml').write_text(xml or voc_xml())
    for s in splits: (root/f'ImageSets/Main/{s}.txt').write_text('0\n1\n2 1\n\n')
    return root

def person(**kw): return dict(dict(tag='person', fbox=[5,6,20,30], vbox=[6,7,10,10], hbox=[7,8,3,3], extra=dict(box_id=0)), **kw)

def write_crowdhuman(root, boxes=None, lines=None):
    (root/'Images').mkdir(parents=True, exist_ok=True)
    for i in range(3): Image.fromarray(np.full((60,80,3), 40*i, np.uint8)).save(root/f'Images/27{i},a.jpg')
    (root/'annotation_train.odgt').write_text('\n'.join(lines or [json.dumps(dict(ID=f'27{i},a', gtboxes=[person()] if boxes is None else boxes)) for i in range(3)])+'\n')
    return root

@pytest.mark.parametrize('split', ['train','val','test'])
def test_bccd_is_the_same_in_both_forms(split):
    coco, voc = load_dataset(BCCD, split, format='coco'), load_dataset(BCCD, split, format='voc')
    assert load_dataset(BCCD, split).form=='coco' and len(coco)==len(voc)=={'train':4,'val':2,'test':2}[split]
    raw = json.loads((BCCD/f'annotations/instances_{split}.json').read_text())
    for (a,s),(b,t) in zip(coco, voc):
        assert (a==b).all() and s['boxes'].shape==t['boxes'].shape and (s['boxes']==t['boxes']).all() and (s['area']==t['area']).all()
        assert [coco.classes[l] for l in s['labels']] == [voc.classes[l] for l in t['labels']]
    gt = coco.ground_truth()
    assert gt['images'][0]['id']==raw['images'][0]['id'] and [c['name'] for c in gt['categories']]==['RBC','WBC','Platelets']
    key = lambda a: (a['image_id'], a['category_id'], tuple(a['bbox']))
    assert sorted(map(key, gt['annotations']))==sorted(map(key, raw['annotations']))

def test_bccd_by_hand():
    ds = load_dataset(BCCD, 'val'); t = ds[0][1]
    assert t['file'].endswith('BloodImage_00000.jpg') and t['image_id']==0 and t['boxes'][0].tolist()==[259,176,491,376]   # XML: 260 177 491 376
    assert ds.classes[t['labels'][0]]=='WBC' and ds.sizes[0]==(480,640)
    assert load_dataset(BCCD, 'val', classes=['WBC','Platelets','RBC'])[0][1]['labels'][0]==0
    assert load_dataset(BCCD, 'val', format='voc', classes=['WBC','Platelets','RBC'])[0][1]['labels'][0]==0

@pytest.mark.parametrize('ann, images, split', [('annotations/instances_train.json','train','train'), ('annotations/instances_train2017.json','train2017','train'),
    ('annotations/instances_train2017.json','train2017','train2017'), ('annotations/instances_train.json','images','train'),
    ('annotations/instances_val.json','images/val','val'), ('annotations/instances_train.json','JPEGImages','train'), ('annotations/instances_train.json','.','train'),
    ('train/_annotations.coco.json','train','train'), ('valid/_annotations.coco.json','valid','val'), ('annotations/train.json','train','train'), ('train.json','images','train'),
    ('annotations/instances_train.json','annotations','train')])
def test_coco_layouts(tmp_path, ann, images, split):
    ds = load_dataset(write_coco(tmp_path, coco_dict(), ann=ann, images=images), split)
    assert ds.form=='coco' and len(ds)==3 and ds.classes==['cat','dog'] and ds.category_ids==[5,9] and ds.ids==[7,17,27]
    image, t = ds[2]
    assert image[0,0,0]==80 and t['boxes'].tolist()==[[5,6,25,36]] and t['labels'].tolist()==[0] and t['area'].tolist()==[300]

def test_coco_crowd_empty_images_and_ground_truth(tmp_path):
    d = coco_dict(); d['annotations'][0]['iscrowd'] = 1; d['annotations'] = d['annotations'][:2]
    d['annotations'] += [dict(id=1, image_id=17, category_id=9, bbox=[70,50,20,20])]                      # leaves the image; no area, no iscrowd
    ds = load_dataset(write_coco(tmp_path, d))
    assert ds.report==dict(images=3, objects=3, crowd=1, clipped=1, dropped_size=0, dropped_outside=0, empty=1)
    assert ds[0][1]['crowd'].tolist()==[True] and ds[1][1]['boxes'].tolist()==[[5,6,25,36],[70,50,80,60]] and ds[2][1]['boxes'].shape==(0,4)
    gt = ds.ground_truth()
    assert [a['bbox'] for a in gt['annotations']]==[[5,6,20,30],[5,6,20,30],[70,50,20,20]] and [a['iscrowd'] for a in gt['annotations']]==[1,0,0]
    assert [a['area'] for a in gt['annotations']]==[300,300,400] and [a['id'] for a in gt['annotations']]==[1,2,3]
    from pycocotools.coco import COCO
    coco = COCO(); coco.dataset = gt; coco.createIndex(); assert len(coco.getAnnIds(iscrowd=False))==2
    items = Items(ds, train=True); assert items[0,0][1]['boxes'].shape==(0,4) and items[0,0][1]['ignore'].tolist()==[[5,6,25,36]]

def test_voc_difficult_parts_classes_and_offsets(tmp_path):
    root = write_voc(tmp_path, voc_xml((('dog',(6,7,25,36),1), ('cat',(1,1,80,60),0))), splits=('train','val'))
    ds = load_dataset(root); _,t = ds[0]
    assert ds.form=='voc' and ds.classes==['cat','dog'] and t['labels'].tolist()==[1,0] and t['crowd'].tolist()==[True,False]
    assert t['boxes'].tolist()==[[5,6,25,36],[0,0,80,60]] and ds.report['clipped']==0 and len(ds)==3
    assert [a.get('difficult') for a in ds.ground_truth()['annotations'][:2]]==[1,0]
    assert load_dataset(root, one_based=False)[0][1]['boxes'].tolist()==[[6,7,25,36],[1,1,80,60]]
    (root/'classes.txt').write_text('dog\ncat\n'); assert load_dataset(root, 'val').classes==['dog','cat']

def test_voc_xml_beside_images_and_missing_size(tmp_path):
    for s in ('train','valid'):
        (tmp_path/s).mkdir()
        for i in range(2):
            Image.fromarray(np.full((60,80,3), 40*i, np.uint8)).save(tmp_path/s/f'{i} b.jpg')
            (tmp_path/s/f'{i} b.xml').write_text(voc_xml(((('cat' if s=='train' else 'ant'),(6,7,25,36),0),), size=(0,0)))
    ds = load_dataset(tmp_path, 'val')
    assert ds.form=='voc' and ds.classes==['ant','cat'] and ds.sizes==[(60,80)]*2 and ds[1][1]['boxes'].tolist()==[[5,6,25,36]]

def test_crowdhuman(tmp_path):
    boxes = [person(), person(fbox=[60,-5,40,30]), person(extra=dict(ignore=1)), dict(tag='mask', fbox=[0,0,9,9], vbox=[0,0,9,9])]
    ds = load_dataset(write_crowdhuman(tmp_path, boxes)); t = ds[1][1]
    assert ds.form=='crowdhuman' and ds.classes==['person'] and ds.sizes==[(60,80)]*3 and t['crowd'].tolist()==[False,False,True,True]
    assert t['boxes'].tolist()==[[5,6,25,36],[60,0,80,25],[5,6,25,36],[0,0,9,9]] and ds.report['clipped']==3
    assert [a['bbox'] for a in ds.ground_truth()['annotations'][:2]]==[[5,6,20,30],[60,-5,40,30]]        # full boxes go beyond the border
    assert load_dataset(tmp_path, box='vbox')[0][1]['boxes'][0].tolist()==[6,7,16,17]
    assert load_dataset(tmp_path, box='hbox')[0][1]['boxes'].tolist()==[[7,8,10,11]]*3
    with pytest.raises(InputError, match='box'): load_dataset(tmp_path, box='bbox')

def test_round_trip_of_shapes_through_files(tmp_path):
    ds = load_dataset('shapes', 'train', n=5, image_size=64)
    save_coco(ds, tmp_path); save_coco(load_dataset('shapes', 'val', n=9, image_size=64), tmp_path, n=2)
    back = load_dataset(tmp_path); assert len(load_dataset(tmp_path, 'val'))==2 and back.category_ids==ds.category_ids
    for (a,s),(b,t) in zip(ds, back): assert (a==b).all() and all((s[k]==t[k]).all() for k in ('boxes','labels','area','crowd'))
    assert [a['bbox'] for a in ds.ground_truth()['annotations']]==[a['bbox'] for a in back.ground_truth()['annotations']]

# ---------------------------------------------------------------- folders that are wrong: one line, the file, the field

def complains(root, *words, split='train', **options):
    with pytest.raises(InputError) as e: load_dataset(root, split, **options)
    text = str(e.value)
    assert '\n' not in text and len(text)<600, text
    for w in words: assert w in text, (w, text)

def test_not_a_data_set(tmp_path):
    complains(tmp_path/'none', str(tmp_path/'none'), 'no such folder')
    complains(tmp_path, str(tmp_path), 'no data set', 'annotations/instances_')
    (tmp_path/'f').write_text(''); complains(tmp_path/'f', 'give the folder')
    write_coco(tmp_path/'inner', coco_dict()); complains(tmp_path, 'did you mean', 'inner')
    complains(tmp_path/'inner', "no split 'val'", 'train', split='val')
    complains(tmp_path/'inner', 'format', 'coco', format='voc'); complains(tmp_path/'inner', 'classes', 'option', clases=['a'])
    (tmp_path/'v/Annotations').mkdir(parents=True); (tmp_path/'v/JPEGImages').mkdir(); complains(tmp_path/'v', 'ImageSets/Main/train.txt')

@pytest.mark.parametrize('options, words', [(dict(one_based='False'), ['one_based', 'true or false']), (dict(one_based=0), ['one_based']), (dict(verify='no'), ['verify']),
    (dict(classes='person'), ["classes: 'person'", 'list']), (dict(classes=5), ['classes']), (dict(classes=['cat',1]), ['classes']), (dict(classes=['cat','cat']), ['classes']),
    (dict(root='x'), ['root']), (dict(source='x'), ['source']), (dict(split='val'), ['split: ', 'remove it from the options']), (dict(where='x'), ['where']), (dict(file='x'), ['file'])])
def test_bad_options_of_a_folder(options, words):
    with pytest.raises(InputError) as e: load_dataset(BCCD, 'train', **dict(dict(format='voc'), **options))
    assert all(w in str(e.value) for w in words) and '\n' not in str(e.value)

def test_the_split_by_name_or_place():
    assert load_dataset('shapes', split='val').split=='val' and load_dataset(BCCD, split='test').split=='test' and load_dataset(BCCD).split=='train'
    assert load_dataset(source='shapes', split='val').split=='val'
    with pytest.raises(InputError, match='split: .*remove it from the options'): load_dataset('shapes', 'val', **dict(split='train'))

def change(path, value):
    "A fault: set (or with KeyError delete) one entry of the COCO dict."
    def fault(d):
        *head, last = path
        for k in head: d = d[k]
        if value is KeyError: del d[last]
        else: d[last] = value
    return fault

nan, inf = float('nan'), float('inf')
@pytest.mark.parametrize('fault, words', [
    (change(['annotations'], KeyError), ["'annotations'"]), (change(['images'], {}), ["'images'"]), (change(['categories'], KeyError), ["'categories'"]),
    (change(['images'], []), ['annotations[0]', 'image_id 7']),
    (change(['annotations',1,'image_id'], 99), ['annotations[1] (id 110)', 'image_id 99']), (change(['annotations',1,'image_id'], [7]), ['annotations[1]', 'image_id']),
    (change(['annotations',2,'category_id'], 3), ['annotations[2]', 'category_id 3', "5: 'cat'"]), (change(['annotations',2,'category_id'], KeyError), ['annotations[2]', 'category_id']),
    (change(['annotations',0,'bbox'], [1,2,nan,4]), ['annotations[0]', 'bbox', 'NaN']), (change(['annotations',0,'bbox'], [1,2,inf,4]), ['bbox', 'infinite']),
    (change(['annotations',0,'bbox'], [1,2,3]), ['annotations[0]', 'bbox', 'four numbers']), (change(['annotations',0,'bbox'], '1 2 3 4'), ['four numbers']),
    (change(['annotations',0,'bbox'], KeyError), ['no bbox']), (change(['annotations',0], 3), ['annotations[0]']), (change(['annotations',0,'area'], nan), ['area']),
    (change(['images',1,'file_name'], 'gone.png'), ['images[1]', 'gone.png']), (change(['images',1,'id'], 7), ['images[1]', 'id 7', 'images[0]']),
    (change(['images',1,'id'], 'x'), ['annotations[1] (id 110)', 'image_id 17']), (change(['images',1,'id'], True), ['images[1].id is true', 'id']), (change(['images',1,'width'], -3), ['images[1]', 'width -3']), (change(['images',1,'width'], 81), ['1.png', '80x60', '81x60']),
    (change(['images',1,'file_name'], 'x'*300+'.png'), ['images[1].file_name', 'xxx']), (change(['images',1,'file_name'], os.sep+os.path.join('nowhere','9.png')), ['images[1].file_name', 'nowhere']),
    (change(['images',1,'file_name'], 'a\0b.png'), ['images[1].file_name']),
    *((change(['annotations',1,'iscrowd'], v), ['annotations[1] (id 110).iscrowd', 'write 0 or 1']) for v in ('maybe', 2, -1, nan, [1], {}, '2')),
    (change(['categories',0,'id'], 5), ['share an id']), (change(['categories',0], 'dog'), ['categories[0]']), (change(['annotations'], []), ['no object'])])
def test_coco_faults(tmp_path, fault, words):
    d = coco_dict(); fault(d); complains(write_coco(tmp_path, d), *words)

@pytest.mark.parametrize('value, crowd', [(0,False), (1,True), (False,False), (True,True), ('0',False), ('1',True), (None,False), ('false',False), ('',False), ('True',True), (0.,False)])
def test_coco_iscrowd_in_all_its_spellings(tmp_path, value, crowd):
    d = coco_dict(); d['annotations'][1]['iscrowd'] = value
    assert load_dataset(write_coco(tmp_path, d))[1][1]['crowd'].tolist()==[crowd]

def test_coco_absolute_file_names(tmp_path):
    d = coco_dict(); root = write_coco(tmp_path/'set', d); (root/'train/2.png').rename(tmp_path/'2.png')
    for r in d['images'][1:]: r['file_name'] = str((root/'train' if r['id']==17 else tmp_path)/r['file_name'])      # one within the set, one beside it
    (root/'annotations/instances_train.json').write_text(json.dumps(d)); ds = load_dataset(root)
    assert ds.files==[root/'train/0.png', root/'train/1.png', tmp_path/'2.png'] and [int(im[0,0,0]) for im,_ in ds]==[0,40,80]

def test_coco_broken_files(tmp_path):
    root = write_coco(tmp_path, coco_dict()); f = root/'annotations/instances_train.json'; text = f.read_text()
    f.write_text(text[:len(text)//2]); complains(root, str(f), 'broken JSON')
    f.write_text(''); complains(root, str(f), 'broken JSON')
    f.write_text('[1]'); complains(root, str(f), 'COCO')
    f.write_bytes(b'\xff\xfe{'); complains(root, str(f), 'text')
    f.write_text('\ufeff'+text); assert len(load_dataset(root))==3                                        # a byte-order mark is no fault
    f.write_text('['*100000); complains(root, str(f), 'broken JSON')

@pytest.mark.parametrize('box, key', [([70,50,20,20],'clipped'), ([-5,3,10,10],'clipped'), ([5,5,0,7],'dropped_size'), ([5,5,-4,7],'dropped_size'), ([90,5,4,7],'dropped_outside'),
    ([-9,5,4,7],'dropped_outside'), ([5,5,1e-9,7],'dropped_size')])
def test_odd_boxes_are_counted(tmp_path, box, key):
    ds = load_dataset(write_coco(tmp_path, coco_dict(boxes=((5,6,20,30),tuple(box)))))
    assert {k:v for k,v in ds.report.items() if v}=={'images':3, 'objects':6 if key=='clipped' else 3, key:3} and str(3) in ds.summary()
    for _,t in ds: assert (t['boxes'][:,2:]>t['boxes'][:,:2]).all() and t['boxes'].min()>=0 and (t['boxes']<=torch.tensor([80,60,80,60])).all()

def test_classes_must_agree(tmp_path):
    root = write_coco(tmp_path, coco_dict())
    complains(root, 'annotations[0]', "'cat'", 'dog', classes=['dog'])
    ds = load_dataset(root, classes=['bird','cat']); assert ds[0][1]['labels'].tolist()==[1] and ds.category_ids==[10,5]
    complains(write_voc(tmp_path/'v'), '0.xml', "'cat'", format='voc', classes=['dog'])

@pytest.mark.parametrize('xml, words', [(voc_xml()[:60], ['1.xml', 'broken XML']), ('', ['1.xml', 'broken XML']), (voc_xml((('cat',(6,7,'x',36),0),)), ['1.xml', 'object 0', 'bndbox']),
    (voc_xml((('cat',(6,7,'nan',36),0),)), ['1.xml', 'object 0', 'bndbox', 'NaN']), (voc_xml((('',(6,7,9,36),0),)), ['1.xml', 'no name']), (voc_xml(size=(9,9)), ['1.jpg', '80x60', '9x9']),
    (voc_xml().replace('bndbox','polygon'), ['1.xml', 'no bndbox'])])
def test_voc_faults(tmp_path, xml, words):
    root = write_voc(tmp_path); (root/'Annotations/1.xml').write_text(xml); complains(root, *words)

@pytest.mark.parametrize('old, new, classes', [('<name>cat', '<name>R&amp;B', ['R&B']), ('<object>', '<object id="1">', ['cat']), ('<name>cat', '<name><![CDATA[cat]]>', ['cat']),
    ('<object>', '<!-- <object><name>ghost</name></object> --><object>', ['cat']), ('<name>cat', '<part><name>head</name></part><name> cat\n', ['cat'])])
def test_voc_classes_are_those_that_the_reader_finds(tmp_path, old, new, classes):
    root = write_voc(tmp_path, voc_xml().replace(old, new)); ds = load_dataset(root)
    assert ds.classes==classes and ds.report['objects']==3 and all(t['labels'].tolist()==[0] for _,t in ds)

def test_voc_broken_file_of_another_split(tmp_path):
    root = write_voc(tmp_path); (root/'Annotations/9.xml').write_text('<annotation'); (root/'Annotations/8.xml').write_bytes(b'\xff\xfe')
    assert load_dataset(root).classes==['cat']
    (root/'ImageSets/Main/train.txt').write_text('0\n'+'x'*300+'\n'); complains(root, 'train.txt: line 2', 'xxx')

def test_voc_missing_files(tmp_path):
    root = write_voc(tmp_path)
    (root/'Annotations/2.xml').unlink(); complains(root, 'train.txt', 'line 3', '2.xml')
    (root/'JPEGImages/1.jpg').unlink(); complains(root, '1.xml', '1.jpg')
    shutil.rmtree(root/'JPEGImages'); complains(root, 'JPEGImages')
    root = write_voc(tmp_path/'b', voc_xml(())); complains(root, 'no object')
    (root/'ImageSets/Main/train.txt').write_text('\n'); complains(root, 'no image')

@pytest.mark.parametrize('line, words', [('{"ID": "270,a"', ['line 2', 'broken JSON']), ('{"ID": "270,a"}', ['line 2', 'gtboxes']), (json.dumps(dict(ID='zz', gtboxes=[])), ['line 2', 'zz.jpg']),
    (json.dumps(dict(ID='270,a', gtboxes=[person(fbox=[1,2,nan,3])])), ['line 2', 'gtboxes[0].fbox', 'NaN']), (json.dumps(dict(ID='270,a', gtboxes=[dict(tag='person')])), ['gtboxes[0].fbox'])])
def test_crowdhuman_faults(tmp_path, line, words):
    good = json.dumps(dict(ID='270,a', gtboxes=[person()])); complains(write_crowdhuman(tmp_path, lines=[good, line]), *words)

def test_train_split_without_objects(tmp_path):
    d = coco_dict(); d['annotations'] = []
    root = write_coco(tmp_path, d, ann='annotations/instances_val.json', images='val'); ds = load_dataset(root, 'val')   # fine for looking at
    assert ds.report['objects']==0
    with pytest.raises(InputError, match='no object'): make_loader(ds, 2, train=True)
    crowd = coco_dict()
    for a in crowd['annotations']: a['iscrowd'] = 1
    complains(write_coco(tmp_path/'c', crowd), 'no object')

# ---------------------------------------------------------------- image files

@pytest.mark.parametrize('kind', ['jpg','png','webp','text','empty'])
def test_damaged_images_are_found_at_the_door(tmp_path, kind):
    d = coco_dict(); name = dict(jpg='1.jpg', webp='1.webp').get(kind, '1.png'); d['images'][1]['file_name'] = name
    root = write_coco(tmp_path, d); f = root/'train'/name
    noise = Image.fromarray(np.random.default_rng(0).integers(0,255,(60,80,3)).astype(np.uint8)); noise.save(f)
    assert len(load_dataset(root))==3
    whole = f.read_bytes(); f.write_bytes({'text':b'not an image', 'empty':b''}.get(kind, whole[:len(whole)*2//3]))
    complains(root, str(f), 'cannot be read')
    ds = load_dataset(root, verify=False)                                                                # who does not look finds it later, with the same words
    with pytest.raises(InputError, match='cannot be read'): ds[1]

@pytest.mark.parametrize('damage', [lambda b: b[:3000]+b[9000:], lambda b: b[:3000]+bytes(255-x for x in b[3000:3004])+b[3004:], lambda b: b[:9000]+b[b.rindex(b'IEND')-4:]])
@pytest.mark.parametrize('exif', [False, True])
def test_png_damaged_in_the_middle_is_not_half_an_image(tmp_path, damage, exif):
    f = tmp_path/'a.png'; e = Image.Exif(); e[0x112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0,255,(200,200,3)).astype(np.uint8)).save(f, **(dict(exif=e) if exif else {}))
    f.write_bytes(damage(f.read_bytes()))
    with pytest.raises(InputError, match='a.png: cannot be read'): read_image(f)

def test_tiff_is_turned_once(tmp_path):
    e = Image.Exif(); e[0x112] = 6; a = np.zeros((20,40,3), np.uint8); a[:,:20] = 255
    Image.fromarray(a).save(tmp_path/'a.tif', exif=e); im = read_image(tmp_path/'a.tif')
    assert im.shape==(3,40,20) and (im[:,:20]==255).all() and (im[:,20:]==0).all()

def test_png_without_its_end_mark_has_all_its_pixels(tmp_path):
    f = write_coco(tmp_path, coco_dict())/'train/1.png'; f.write_bytes(f.read_bytes()[:-12])
    assert (load_dataset(tmp_path)[1][0]==40).all()

def test_jpeg_with_something_after_its_end_is_whole(tmp_path):
    f = tmp_path/'a.jpg'; Image.fromarray(np.zeros((20,30,3), np.uint8)).save(f); f.write_bytes(f.read_bytes()+b'maker note'*50)
    assert data.probe_image(f)==((20,30),(20,30))

def save(tmp_path, array, name, **kw):
    Image.fromarray(array).save(tmp_path/name, **kw); return read_image(tmp_path/name)

def test_image_kinds(tmp_path):
    rng = np.random.default_rng(0); grey = rng.integers(0,256,(8,12)).astype(np.uint8); rgb = rng.integers(0,256,(8,12,3)).astype(np.uint8)
    want = torch.from_numpy(grey)[None].expand(3,-1,-1)
    assert (save(tmp_path, grey, 'l.png')==want).all() and (save(tmp_path, grey.astype(np.uint16)*257, 'd.png')==want).all()
    assert (save(tmp_path, grey.astype(np.uint16)*257, 'd.tif')==want).all() and (save(tmp_path, grey.astype(np.float32)/255, 'f.tif')==want).all()
    assert (save(tmp_path, np.dstack([rgb, grey]), 'rgba.png')==torch.from_numpy(rgb).permute(2,0,1)).all()
    assert (save(tmp_path, np.dstack([grey, grey//2]), 'la.png')==want).all()
    assert (save(tmp_path, grey>99, 'bit.png')==255*(want>99)).all()
    few = rgb//128*128; Image.fromarray(few).quantize(8).save(tmp_path/'p.png', transparency=0)
    assert (read_image(tmp_path/'p.png')==torch.from_numpy(few).permute(2,0,1)).all()
    dim = np.full((4,4), 200, np.uint16); assert (save(tmp_path, dim, 'dim.png')==1).all()               # 200 of 65535 is nearly black

@pytest.mark.parametrize('orientation', range(1,9))
def test_exif_rotation_and_its_boxes(tmp_path, orientation):
    upright = np.zeros((40,60,3), np.uint8); upright[5:15,10:50] = 255                                    # what the viewer shows
    undo = {2:Image.Transpose.FLIP_LEFT_RIGHT, 3:Image.Transpose.ROTATE_180, 4:Image.Transpose.FLIP_TOP_BOTTOM, 5:Image.Transpose.TRANSPOSE,
            6:Image.Transpose.ROTATE_90, 7:Image.Transpose.TRANSVERSE, 8:Image.Transpose.ROTATE_270}
    im = Image.fromarray(upright); im = im.transpose(undo[orientation]) if orientation>1 else im
    exif = Image.Exif(); exif[0x112] = orientation
    (tmp_path/'train').mkdir(); im.save(tmp_path/'train/0.jpg', exif=exif, quality=95); im.save(tmp_path/'train/1.png', exif=exif)
    d = coco_dict(2, (40,60), ((10,5,40,10),)); d['images'][0]['file_name'] = '0.jpg'
    (tmp_path/'annotations').mkdir(); (tmp_path/'annotations/instances_train.json').write_text(json.dumps(d))
    for declared in (True, False):
        if not declared:
            for r in d['images']: del r['width'], r['height']
            (tmp_path/'annotations/instances_train.json').write_text(json.dumps(d))
        for image,t in load_dataset(tmp_path):
            x1,y1,x2,y2 = t['boxes'][0].int().tolist(); inner = image[:,y1+1:y2-1,x1+1:x2-1]
            assert image.shape==(3,40,60) and inner.float().mean()>245 and image[:,20:].float().mean()<10

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_unreadable_exif_is_none(tmp_path):
    f = tmp_path/'a.jpg'; Image.fromarray(np.zeros((20,30,3), np.uint8)).save(f, exif=b'Exif\0\0II*\0rubbish'*3)
    assert read_image(f).shape==(3,20,30) and data.probe_image(f)==((20,30),(20,30))

def test_annotated_as_stored(tmp_path):
    "Declared width and height are those of the pixels as stored: then the boxes are too."
    exif = Image.Exif(); exif[0x112] = 6; d = coco_dict(1); d['images'][0]['file_name'] = '0.jpg'
    root = write_coco(tmp_path, d); Image.fromarray(np.zeros((60,80,3), np.uint8)).save(root/'train/0.jpg', exif=exif)
    assert load_dataset(root)[0][0].shape==(3,60,80)

# ---------------------------------------------------------------- transforms

@st.composite
def scenes(draw, n=8):
    h,w = draw(st.integers(20,90)), draw(st.integers(20,90)); k = draw(st.integers(0,n))
    rng = np.random.default_rng(draw(st.integers(0,2**32)))
    c = rng.uniform(0,1,(k,2,2))*[w,h]; b = torch.from_numpy(np.concatenate([c.min(1), c.max(1)], 1).astype(np.float32)).reshape(-1,4)
    masks = torch.from_numpy(rng.integers(0,2,(k,h,w)).astype(np.uint8))
    t = dict(boxes=tv_tensors.BoundingBoxes(b, format='XYXY', canvas_size=(h,w)), labels=torch.arange(k), crowd=torch.arange(k)%3==1,
             area=data.box_area(b)*.5, masks=tv_tensors.Mask(masks), image_id=3, file='x')
    return tv_tensors.Image(torch.from_numpy(rng.integers(0,256,(3,h,w)).astype(np.uint8))), t

@few
@given(scene=scenes(), size=st.integers(8,120), slack=st.integers(0,100), seed=st.integers(0,99))
def test_everything_about_objects_stays_in_step(scene, size, slack, seed):
    image, t = scene; torch.manual_seed(seed); h,w = image.shape[-2:]
    out, s = train_transforms(size, size+slack, photometric=True)(image, t)
    H,W = out.shape[-2:]; kept = s['labels']; r = min(size/min(h,w), (size+slack)/max(h,w))
    assert out.dtype==torch.float32 and 0<=out.min() and out.max()<=1 and s['orig_size']==(h,w) and s['size']==(H,W)
    assert abs(H-h*r)<=1 and abs(W-w*r)<=1 and max(H,W)<=size+slack and (min(H,W)==size or max(H,W)==size+slack)
    assert len({len(s[k]) for k in ('boxes','labels','crowd','area','masks')})==1 and s['masks'].shape[1:]==(H,W) and s['boxes'].canvas_size==(H,W)
    assert (s['crowd']==t['crowd'][kept]).all() and len(t['labels'])==t['masks'].shape[0]                 # the input is as it was
    before = t['boxes'].as_subclass(torch.Tensor)*torch.tensor([W/w,H/h,W/w,H/h]); b = s['boxes'].as_subclass(torch.Tensor)
    flipped = torch.stack([W-before[:,2], before[:,1], W-before[:,0], before[:,3]], 1)
    assert torch.allclose(b, before[kept], atol=1e-3) or torch.allclose(b, flipped[kept], atol=1e-3)
    side = (before[:,2:]-before[:,:2]).min(1).values
    assert set(kept.tolist())>=set(torch.where(side>1.01)[0].tolist()) and not set(kept.tolist())&set(torch.where(side<.99)[0].tolist())
    assert torch.allclose(s['area'], data.box_area(b)*.5, rtol=2e-2, atol=.05) and b.numel()==0 or (b.min()>=0 and (b<=torch.tensor([W,H,W,H])+1e-3).all())

@few
@given(scene=scenes())
def test_two_flips_are_none(scene):
    flip = Transforms([v2.RandomHorizontalFlip(1.)], min_size=0); image, t = scene
    a,s = flip(*flip(image, t)); want = v2.functional.to_dtype(image, torch.float32, scale=True)
    assert (a==want).all() and torch.allclose(s['boxes'], t['boxes'], atol=1e-4) and (s['labels']==t['labels']).all() and (s['masks']==t['masks']).all()

@few
@given(scene=scenes(), seed=st.integers(0,99))
def test_a_users_own_steps(scene, seed):
    "Any v2 transform may be given: crops leave boxes outside, which are clipped or dropped with all that is theirs."
    image, t = scene; torch.manual_seed(seed)
    out, s = Transforms([v2.RandomCrop((16,16)), v2.RandomVerticalFlip()])(image, t); b = s['boxes']
    assert out.shape==(3,16,16) and len({len(s[k]) for k in ('boxes','labels','crowd','area','masks')})==1
    if len(b): assert b.min()>=0 and b.max()<=16 and ((b[:,2:]-b[:,:2])>=1).all()

@few
@given(scene=scenes(), limit=st.integers(2,100))
def test_a_limit_without_a_size(scene, limit):
    image, t = scene; h,w = image.shape[-2:]; r = min(1, limit/max(h,w))
    for tf in (eval_transforms(None, limit), train_transforms(0, limit, flip=0)):
        out, s = tf(image, t); H,W = out.shape[-2:]
        assert (H,W)==(max(1,round(h*r)), max(1,round(w*r))) and max(H,W)<=limit and s['boxes'].canvas_size==(H,W)
        if r==1: assert torch.equal(out, eval_transforms()(image))                                        # untouched, to the bit
    assert tf(image).shape==(3,H,W)

def test_plain_images_for_prediction():
    for im in (torch.zeros(3,40,80, dtype=torch.uint8), Image.new('RGB',(80,40)), tv_tensors.Image(torch.zeros(3,40,80, dtype=torch.uint8))):
        out = eval_transforms(20, 30)(im); assert out.shape==(3,15,30) and out.dtype==torch.float32
    assert eval_transforms()(torch.zeros(3,7,9)).shape==(3,7,9)
    with pytest.raises(InputError, match='max_size'): train_transforms(800, 600)
    with pytest.raises(InputError, match='max_size'): eval_transforms(None, -3)
    with pytest.raises(InputError, match='max_size'): ShortSide()

def test_multi_scale_uses_all_scales():
    image, t = ShapesDataset('val', n=1)[0]; tf = train_transforms(scales=(32,48,64))
    assert {min(tf(image,t)[0].shape[1:]) for _ in range(40)}=={32,48,64}

# ---------------------------------------------------------------- order and repeatability

@few
@given(n=st.integers(1,60), b=st.integers(1,9), seed=st.integers(0,2**32), epoch=st.integers(0,300), world=st.integers(1,4), group=st.booleans(), train=st.booleans(),
       drop=st.booleans())
def test_batch_order(n, b, seed, epoch, world, group, train, drop):
    rng = np.random.default_rng(seed); sizes = [(480,640) if x else (640,480) for x in rng.integers(0,2,n)]
    parts = [BatchOrder(sizes, b, train, seed, group, drop, r, world) for r in range(world)]
    lists = [p.batches(epoch) for p in parts]; flat = [i for l in lists for x in l for i in x]
    assert lists==[p.batches(epoch) for p in parts] and all(len(p)==len(l) for p,l in zip(parts, lists)) and all(len(x)<=b for l in lists for x in l)
    if not drop: assert set(flat)==set(range(n))                                                          # everything is seen
    assert len(flat)==len(set(flat))                                                                      # once
    if train: assert len({len(l) for l in lists})==1                                                      # equally many steps everywhere
    whole = BatchOrder(sizes, b, train, seed, group, drop).batches(epoch)
    if drop and len(flat)>=b and n>=2*b: assert all(len(x)==b for x in whole) or n-len(set(flat))==0
    if train: assert [sorted(i for l in lists for i in l[k]) for k in range(len(whole))]==[sorted(x) for x in whole]   # each batch is shared
    else: assert all(x in whole for l in lists for x in l)                                                # whole batches
    if group: assert sum(len({sizes[i] for i in x})>1 for x in whole)<=-(-2*b//b)                         # only left-over batches mix shapes
    start = int(rng.integers(0, len(whole)+1)); o = BatchOrder(sizes, b, train, seed, group, drop); o.set = o.start = start; o.epoch = epoch
    assert [[i for _,i in x] for x in o]==whole[start:] and len(list(o))==len(whole)

def same(a, b):
    for (x,s),(y,t) in zip(a, b, strict=True):
        assert len(x)==len(y) and all(torch.equal(p,q) for p,q in zip(x,y))
        for u,v in zip(s,t):
            assert u.keys()==v.keys()
            for k in u: assert torch.equal(u[k],v[k]) if isinstance(u[k],torch.Tensor) else u[k]==v[k]

@pytest.mark.parametrize('source', ['shapes','bccd'])
def test_workers_and_resume_change_nothing(source):
    ds = load_dataset('shapes', n=22, masks=True, image_size=64) if source=='shapes' else load_dataset(BCCD, 'train')
    tf = train_transforms(48, scales=(40,48,56), photometric=True)
    make = lambda workers: make_loader(ds, 4 if source=='shapes' else 1, train=True, transforms=tf, seed=3, workers=workers)
    here, there = make(0), make(2)
    for epoch in (0,5):
        here.set_epoch(epoch); there.set_epoch(epoch)
        torch.manual_seed(epoch); state = torch.get_rng_state(); a = list(here); assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7); same(a, there)                                                                     # persistent workers, another state of the global generator
        there.start_at(2); same(a[2:], there)
    here.set_epoch(6); assert not torch.equal(list(here)[0][0][0], a[0][0][0])
    assert len(here)==len(a)

@pytest.mark.parametrize('shared', [True, False])
def test_parcels_are_pinned_after_their_journey(monkeypatch, shared):
    "`DataLoader` pins for a GPU alone; here a copy stands for page-locked memory."
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: pinned.append(x.clone()) or pinned[-1])
    batch = ([torch.rand(3, 5, 7), torch.rand(3, 4, 4)], [dict(boxes=torch.rand(2, 4)), dict(boxes=torch.zeros(0, 4))])
    images, targets = pickle.loads(pickle.dumps(data.Parcel(batch, shared))).pin_memory().open()
    block, = pinned
    for a, b in zip(batch[0], images, strict=True):
        assert torch.equal(a, b) and b.untyped_storage().data_ptr() >= block.data_ptr()
    for a, b in zip(batch[1], targets, strict=True): assert torch.equal(a['boxes'], b['boxes'])

@pytest.mark.parametrize('workers', [0,1])
def test_a_damaged_image_is_one_line_from_any_process(tmp_path, workers):
    root = write_coco(tmp_path, coco_dict()); f = root/'train/1.png'; f.write_bytes(f.read_bytes()[:60])
    def first_error(loader):
        try: list(loader)
        except InputError as e: return str(e)                                                             # no traceback kept: it would keep the workers
    text = first_error(make_loader(load_dataset(root, verify=False), 3, workers=workers))
    assert '1.png' in text and '\n' not in text

def test_evaluation_order_and_targets():
    ds = load_dataset(BCCD, 'val'); (images, targets), = make_loader(ds, 8, transforms=eval_transforms(240, 320))
    assert [t['image_id'] for t in targets]==ds.ids and images[0].shape==(3,240,320) and targets[0]['orig_size']==(480,640)
    assert torch.allclose(targets[0]['boxes'][0], torch.tensor([259,176,491,376])/2) and type(images[0]) is torch.Tensor
    with pytest.raises(InputError, match='batch_size'): make_loader(ds, 0)

def test_a_scene_is_drawn_once(monkeypatch):
    ds, few = ShapesDataset('train', n=8), ShapesDataset('train', n=8, keep=1); ds.prepare()
    first = [ds.image(i) for i in range(8)]
    drawn = []; draw = data.draw_scene
    monkeypatch.setattr(data, 'draw_scene', lambda *a: drawn.append(a[-1]) or draw(*a))
    for _ in range(2): list(make_loader(ds, 4, train=True, transforms=train_transforms()))
    assert not drawn and all(torch.equal(x, ds.image(i)) for i,x in enumerate(first))                     # kept in memory
    assert all(torch.equal(x, few.image(i)) for i,x in enumerate(first)) and drawn==list(range(8))        # too large to keep: drawn when asked for

def test_the_splits_and_readers_of_a_folder():
    "What `load_folder` is made of, called by name: both forms of the small BCCD list the same splits and read the same number of objects."
    root = Path(__file__).parent/'data'/'bccd'
    assert set(data.coco_splits(root)) == set(data.voc_splits(root)) - {'trainval'}
    split = sorted(data.coco_splits(root))[0]
    found = data.read_voc(root, data.voc_splits(root)[split], split)
    assert len(FolderDataset('bccd', split, found)) == len(data.load_dataset(root, split))
