"Folders as people have them: every tool's layout with its right values, what is ignored or guessed and said so, and files altered at random."
import contextlib, io, json, os, shutil, sys
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from ala_nb import data, files, formats
from ala_nb.data import FOLDER_SIZE, load_dataset, need_objects, report
from ala_nb.geometry import InputError
from test_data import complains, coco_dict, person, voc_xml, write_coco, write_crowdhuman, write_voc

def picture(path, shade=0, size=(60,80), **how):
    path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(np.full((*size,3), shade, np.uint8)).save(path, **how); return path

def text(path, s): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(s if isinstance(s, str) else json.dumps(s)); return path

def coco(names, boxes=((5,6,20,30),)):
    d = coco_dict(len(names), boxes=boxes); d['categories'].pop(0)
    for r,n in zip(d['images'], names): r['file_name'] = n
    return d

def found(root, split='train', **options):
    "Shade, class names and boxes (whole numbers) of every image."
    ds = load_dataset(root, split, **options)
    return [(int(im[0,0,0]), [ds.classes[l] for l in t['labels']], t['boxes'].round().int().tolist()) for im,t in ds]

CAT = [('cat', [5,6,25,36])]
RIGHT = [(0, ['cat'], [[5,6,25,36]]), (40, ['cat'], [[5,6,25,36]])]

# ---------------------------------------------------------------- layouts

def label_studio(r):
    text(r/'result.json', coco(['images\\9f8e7d6c-0.png', 'images\\1a2b3c4d-1.png'])); picture(r/'images/9f8e7d6c-0.png'); picture(r/'images/1.png', 40); return 'all'
def label_studio_voc(r):
    for i in range(2): picture(r/f'images/{i}.png', 40*i); text(r/f'Annotations/{i}.xml', voc_xml())
    return 'all'
def label_studio_yolo(r):
    for i in range(2): picture(r/f'images/{i}.png', 40*i); text(r/f'labels/{i}.txt', f'0 {15/80} {21/60} {20/80} {30/60}\n')
    text(r/'classes.txt', 'cat\ndog\n'); text(r/'notes.json', dict(categories=[], info={})); return 'all'
def fiftyone(r): text(r/'train/labels.json', coco(['0.png','1.png'])); [picture(r/f'train/data/{i}.png', 40*i) for i in range(2)]
def fiftyone_flat(r): text(r/'labels.json', coco(['0.png','1.png'])); [picture(r/f'data/{i}.png', 40*i) for i in range(2)]; return 'all'
def cvat(r): text(r/'annotations/instances_default.json', coco(['a/0.png','b/0.png'])); picture(r/'images/default/a/0.png'); picture(r/'images/default/b/0.png', 40); return 'default'
def cvat_voc(r):
    for i,d in enumerate('ab'): picture(r/f'JPEGImages/{d}/0.png', 40*i); text(r/f'Annotations/{d}/0.xml', voc_xml())
    text(r/'ImageSets/Main/default.txt', 'a/0\nb/0\n'); text(r/'labelmap.txt', '# label:color_rgb:parts:actions\nbackground:::\ncat:::\n'); return 'default'
def cvat_yolo(r):
    for i in range(2): picture(r/f'obj_train_data/{i}.png', 40*i); text(r/f'obj_train_data/{i}.txt', f'0 {15/80} {21/60} {20/80} {30/60}\n')
    text(r/'obj.data', 'classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n'); text(r/'obj.names', 'cat\n')
    text(r/'train.txt', 'data/obj_train_data/0.png\ndata/obj_train_data/1.png\n')
def labelimg(r):
    for i in range(2): picture(r/f'{i}.png', 40*i); text(r/f'{i}.xml', voc_xml())
    return 'all'
def labelimg_yolo(r):
    for i in range(2): picture(r/f'{i}.png', 40*i); text(r/f'{i}.txt', f'0 {15/80} {21/60} {20/80} {30/60}\n')
    text(r/'classes.txt', 'cat\n'); return 'all'
def roboflow(r): text(r/'train/_annotations.coco.json', coco(['0.png','1.png'])); [picture(r/f'train/{i}.png', 40*i) for i in range(2)]
def roboflow_voc(r):
    for i in range(2): picture(r/f'train/{i}_jpg.rf.abc.jpg', 40*i, quality=100); text(r/f'train/{i}_jpg.rf.abc.xml', voc_xml())
def roboflow_yolo(r):
    for i in range(2): picture(r/f'train/images/{i}.png', 40*i); text(r/f'train/labels/{i}.txt', f'0 {15/80} {21/60} {20/80} {30/60}\n')
    text(r/'data.yaml', "train: ../train/images\nval: ../valid/images\n\nnc: 1\nnames: ['cat']\nroboflow:\n  version: 1\n")
def ultralytics(r):
    for i in range(2): picture(r/f'images/train/{i}.png', 40*i); text(r/f'labels/train/{i}.txt', '0 ' + ' '.join(f'{x/80} {y/60}' for x,y in ((5,6),(25,6),(25,36),(5,36))))
    text(r/'data.yaml', 'path: /content/datasets/cats  # elsewhere\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n')
def yolo_list(r):
    for i in range(2): picture(r/f'images/{i}.png', 40*i); text(r/f'labels/{i}.txt', f'0 {15/80} {21/60} {20/80} {30/60}\n')
    text(r/'train.txt', './images/0.png\n./images/1.png\n'); text(r/'dataset.yml', 'train: train.txt\nnames: [cat]\n')
def kaggle_voc(r):
    for i in range(2): picture(r/f'images/{i}.png', 40*i); text(r/f'annotations/{i}.xml', voc_xml())
    return 'all'
def split_voc(r):
    for i in range(2): picture(r/f'train/images/{i}.png', 40*i); text(r/f'train/annotations/{i}.xml', voc_xml())
def split_voc_2(r):
    for i in range(2): picture(r/f'images/train/{i}.png', 40*i); text(r/f'annotations/train/{i}.xml', voc_xml())
def picture_list(r):
    for i in range(2): picture(r/f'JPEGImages/{i} a.png', 40*i); text(r/f'Annotations/{i} a.xml', voc_xml())
    text(r/'ImageSets/Main/train.txt', '0 a.png\n1 a.png\n')
def pair_list(r):
    for i in range(2): picture(r/f'pics/{i}.png', 40*i); text(r/f'annotations/{i}x.xml', voc_xml())
    text(r/'train_list.txt', './pics/0.png ./annotations/0x.xml\npics/1.png annotations/1x.xml\n')
def single_json(r): text(r/'annotations.json', coco(['0.png','1.png'])); [picture(r/f'images/{i}.png', 40*i) for i in range(2)]; return 'all'
def named_json(r): text(r/'my_train_coco.json', coco(['0.png','1.png'])); text(r/'my_val_coco.json', coco(['0.png'])); [picture(r/f'images/{i}.png', 40*i) for i in range(2)]
def percent(r): text(r/'train.json', coco(['my%20photo%200.png','sub\\1.PNG'])); picture(r/'images/my photo 0.png'); picture(r/'images/sub/1.png', 40)
def windows(r): text(r/'train.json', coco([r'C:\Users\me\set\images\0.png', r'D:\1.png'])); [picture(r/f'images/{i}.png', 40*i) for i in range(2)]
def odgt(r):
    for i in range(2): picture(r/f'Images/{i}.png', 40*i)
    text(r/'crowd_train.odgt', '\n'.join(json.dumps(dict(ID=str(i), gtboxes=[person()])) for i in range(2)))

LAYOUTS = [label_studio, label_studio_voc, label_studio_yolo, fiftyone, fiftyone_flat, cvat, cvat_voc, cvat_yolo, labelimg, labelimg_yolo, roboflow, roboflow_voc, roboflow_yolo, ultralytics,
           yolo_list, kaggle_voc, split_voc, split_voc_2, picture_list, pair_list, single_json, named_json, percent, windows, odgt]

@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_tools(tmp_path, layout):
    split = layout(tmp_path/'set') or 'train'; got = found(tmp_path/'set', split)
    assert got==([(s, ['person'], b) for s,_,b in RIGHT] if layout is odgt else RIGHT)
    if split!='train': complains(tmp_path/'set', f"no split 'train'; take one of {split}", '--train_split NAME', 'val_share')
    with contextlib.redirect_stdout(io.StringIO()) as out: assert data.main([str(tmp_path/'set'), '--split', split])==0
    assert f'set {split}: 2 images, 2 objects to learn from' in out.getvalue()

def test_a_share_for_val(tmp_path):
    r = tmp_path/'set'; text(r/'annotations.json', coco([f'{i}.png' for i in range(40)])); [picture(r/f'images/{i}.png', 5*i) for i in range(40)]
    a, b = (found(r, s, val_share=.25) for s in ('train','val'))
    assert sorted(x for x,*_ in a+b)==[5*i for i in range(40)] and 4<=len(b)<=16 and all(o==['cat'] for _,o,_ in a+b)
    (r/'images/3.png').rename(r/'images/3b.png'); text(r/'annotations.json', coco([f'{i}{"b"*(i==3)}.png' for i in range(40)]))
    assert {x for x,*_ in a}-{15}=={x for x,*_ in found(r, 'train', val_share=.25)}-{15}                   # one picture more or less moves no other
    complains(r, 'val_share', val_share=2)

@pytest.mark.parametrize('name, content, words', [
    ('images/0.json', dict(version='5', shapes=[], imagePath='0.png', imageData=None), ['labelme', 'labelme2coco']),
    ('annotations.csv', 'filename,width,height,class,xmin,ymin,xmax,ymax\n0.png,80,60,cat,1,1,2,2\n', ['CSV', 'COCO JSON']),
    ('_annotations.createml.json', [dict(image='0.png', annotations=[dict(label='cat', coordinates=dict(x=1,y=1,width=2,height=2))])], ['CreateML', 'COCO']),
    ('annotations.xml', '<annotations><version>1.1</version></annotations>', ['<annotations>', 'Pascal VOC']),
    ('project.json', [dict(id=1, annotations=[], data=dict(image='0.png'))], ['Label Studio', 'export it again as COCO']),
    ('via.json', {'0.png123':dict(filename='0.png', regions=[])}, ['VIA']),
    ('image_info.json', dict(images=[], categories=[]), ['without annotations']),
    ('broken.json', '{"images": [', ['broken.json', 'broken JSON'])])
def test_other_formats_are_named_with_the_step_that_helps(tmp_path, name, content, words):
    picture(tmp_path/'images/0.png'); text(tmp_path/name, content); complains(tmp_path, 'no data set', *words)

def test_only_pictures(tmp_path): picture(tmp_path/'cat/0.png'); complains(tmp_path, 'pictures but no annotations')

def test_labels_without_names(tmp_path):
    label_studio_yolo(tmp_path); (tmp_path/'classes.txt').unlink(); complains(tmp_path, 'classes.txt')

@pytest.mark.parametrize('yaml, words', [('names: [cat\ntrain: x', ['data.yaml', 'broken YAML']), ('names: 3\ntrain: images', ['names must be a list']), ('names: [cat]\nnc: 2\ntrain: images', ['nc is 2', '1 name']),
    ('names: [cat]\ntrain: pictures', ['pictures: no such folder']), ('names: [cat]\ntrain: 2001-99-99', ['data.yaml']), ('names: {cat: 0}\ntrain: images', ['names must be'])])
def test_yolo_yaml_faults(tmp_path, yaml, words):
    label_studio_yolo(tmp_path); (tmp_path/'classes.txt').unlink(); text(tmp_path/'data.yaml', yaml); complains(tmp_path, *words)

@pytest.mark.parametrize('line, words', [('7 .5 .5 .1 .1', ["class '7' has no name"]), ('0 .5 .5 .1', ['is no object']), ('0 50 50 10 10', ['no shares']), ('0 .5 .5 .1 .1 .9', ['predictions']),
    ('cat .5 .5 .1 .1', ["'cat .5"]), ('0 nan .5 .1 .1', ['is no object']), ('-1 .5 .5 .1 .1', ['no name']), ('0.5 .5 .5 .1 .1', ['no name'])])
def test_yolo_label_faults(tmp_path, line, words):
    label_studio_yolo(tmp_path); text(tmp_path/'labels/1.txt', f'0 .5 .5 .1 .1\n\n{line}\n'); complains(tmp_path, 'labels', '1.txt: line 3', *words, split='all')

def test_yolo_pictures_without_labels_are_said(tmp_path):
    roboflow_yolo(tmp_path); (tmp_path/'train/labels/1.txt').unlink(); ds = load_dataset(tmp_path)
    assert ds.report['empty']==1 and any('1 picture without a label file' in w for w in report(ds).warnings)
    (tmp_path/'train/labels/0.txt').unlink(); complains(tmp_path, 'no object to learn from', 'labels/*.txt')

def test_yolo_reads_only_its_folder(tmp_path):
    roboflow_yolo(tmp_path/'set'); picture(tmp_path/'other/0.png'); text(tmp_path/'set/data.yaml', f'train: ../other\nval: {tmp_path}/other\nnames: [cat]\n')
    complains(tmp_path/'set', 'other: no such folder')

# ---------------------------------------------------------------- the right picture for every annotation

def test_voc_sub_folders(tmp_path):
    for i,d in enumerate(('','camA/','camB/')): picture(tmp_path/f'JPEGImages/{d}0001.png', 40*i); text(tmp_path/f'Annotations/{d}0001.xml', voc_xml((('cat',(i+1,1,40,40),0),)))
    text(tmp_path/'ImageSets/Main/train.txt', 'camB/0001\n0001\ncamA/0001\n')
    assert found(tmp_path)==[(80, ['cat'], [[2,0,40,40]]), (0, ['cat'], [[0,0,40,40]]), (40, ['cat'], [[1,0,40,40]])]
    (tmp_path/'JPEGImages/camA/0001.png').unlink(); complains(tmp_path, 'camA/0001.xml', 'may be any of', 'camB/0001.png')  # never another camera's

def test_voc_same_name_two_suffixes(tmp_path):
    picture(tmp_path/'images/0.png', 40); picture(tmp_path/'images/0.bmp', 80); text(tmp_path/'annotations/0.xml', voc_xml().replace('<size>', '<filename>0.bmp</filename><size>'))
    assert found(tmp_path, 'all')[0][0]==80
    text(tmp_path/'annotations/0.xml', voc_xml()); complains(tmp_path, '0.xml', 'may be any of', '<filename>', split='all')

def test_one_picture_under_two_ids(tmp_path):
    root = write_coco(tmp_path, coco(['0.png','1.png','0.png'])); complains(root, 'images[2].file_name', 'is also the picture of images[0]')
    write_voc(tmp_path/'v'); (tmp_path/'v/ImageSets/Main/train.txt').write_text('0\n1\n0\n'); complains(tmp_path/'v', 'line 3', 'is also the picture of', 'line 1')

def test_the_search_does_not_depend_on_what_was_found_before(tmp_path):
    for i,d in enumerate(('train','images')): picture(tmp_path/d/'0.png', 40*i)
    picture(tmp_path/'images/1.png', 80); got = []
    for names in (['0.png','1.png'], ['1.png','0.png']): text(tmp_path/'annotations/instances_train.json', coco(names)); got.append(sorted(x for x,*_ in found(tmp_path)))
    assert got==[[0,80]]*2

def test_found_by_base_name_is_counted(tmp_path):
    r = tmp_path; windows(r); ds = load_dataset(r); assert any('1 picture not where' in w for w in report(ds).warnings), report(ds)
    picture(r/'more/0.png', 99); assert found(r)==RIGHT                                                    # it shares a folder with the name
    (r/'images').rename(r/'less'); complains(r, 'images[0].file_name', 'may be any of')

def turned(path, size=(60,80), orientation=6):
    e = Image.Exif(); e[0x112] = orientation; a = np.zeros((*size,3), np.uint8); a[:10] = 255; path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(a).save(path, exif=e, quality=95)

@pytest.mark.parametrize('suffix', ['jpg','png','tif'])
def test_annotated_as_stored_in_every_way(tmp_path, suffix):
    "Width and height are those of the stored frame; a square picture and a half turn follow it; all are said."
    d = coco([f'{i}.{suffix}' for i in range(3)])
    for r,(h,w) in zip(d['images'], ((60,80),(60,60),(60,80))): r.update(height=h, width=w)
    root = tmp_path/'set'; text(root/'train.json', d); turned(root/f'images/0.{suffix}'); turned(root/f'images/1.{suffix}', (60,60), 8); turned(root/f'images/2.{suffix}', (60,80), 3)
    ds = load_dataset(root)
    for im,_ in ds: assert im[:,:8].float().mean()>230 and im[:,30:].float().mean()<20
    assert any('3 pictures with an EXIF rotation' in w for w in report(ds).warnings)
    d['images'][0].update(height=80, width=60); text(root/'train.json', d); ds = load_dataset(root); im = ds[0][0]           # upright: all are turned
    assert im.shape==(3,80,60) and im[:,:,50:].float().mean()>150 and ds[2][0][:,52:].float().mean()>230 and not report(ds).warnings

def test_two_categories_of_one_name(tmp_path):
    d = coco_dict(); d['categories'] = [dict(id=0, name='cell'), dict(id=1, name='cell'), dict(id=5, name='dog')]
    for a in d['annotations'][:2]: a['category_id'] = 1
    ds = load_dataset(write_coco(tmp_path, d)); assert ds.classes==['cell','dog'] and ds.category_ids==[1,5] and ds.ground_truth()['annotations'][0]['category_id']==1

# ---------------------------------------------------------------- nothing vanishes without being said

def said(root, split='train', size=None, max_size=None, **options):
    r = report(load_dataset(root, split, **options), size, max_size); return r, '\n'.join(r.warnings)

def test_iscrowd_and_ignore(tmp_path):
    d = coco_dict(); d['annotations'][0]['iscrowd'] = 1; d['annotations'][1]['ignore'] = 1; root = write_coco(tmp_path, d)
    ds = load_dataset(root); r, w = said(root)
    assert [t['crowd'].tolist() for _,t in ds]==[[True],[True],[False]] and r.ignored=={'iscrowd':1,'ignore':1} and r.counts['objects']==1
    assert [(a['iscrowd'], a['ignore']) for a in ds.ground_truth()['annotations']]==[(1,1),(0,1),(0,0)]         # AP as pycocotools has it
    assert "COCO's AP" in w and '2 of 3 objects are marked' in w
    assert said(root, use_ignored=True)[0].counts['objects']==3
    for a in d['annotations']: a['iscrowd'] = 1
    write_coco(tmp_path, d); complains(root, 'no object to learn from', '3 are marked iscrowd', 'use_ignored=true')
    assert '\n' not in str(load_dataset(root, use_ignored=True)) and '{' not in str(pytest.raises(InputError, load_dataset, root).value)

@pytest.mark.parametrize('flag, crowd', [('Unspecified',False), ('False',False), ('0.0',False), ('',False), ('1',True), ('true',True), (' 0 ',False)])
def test_difficult_in_words(tmp_path, flag, crowd):
    ds = load_dataset(write_voc(tmp_path, voc_xml((('cat',(6,7,25,36),flag), ('cat',(1,1,9,9),0)))))
    assert ds[0][1]['crowd'].tolist()==[crowd,False]

def test_difficult_that_is_no_flag(tmp_path): complains(write_voc(tmp_path, voc_xml((('cat',(6,7,25,36),'perhaps'),))), "difficult is 'perhaps'", '0 or 1')

def test_objects_that_resizing_takes_away(tmp_path):
    d = coco(['0.png'], ((10,10,4,4),)); d['images'][0].update(width=4000, height=3000); text(tmp_path/'train.json', d); picture(tmp_path/'images/0.png', size=(3000,4000))
    r, w = said(tmp_path, **FOLDER_SIZE); assert r.counts['under_1px']==1 and 'thinner than 1 px' in w
    ds = load_dataset(tmp_path)
    with pytest.raises(InputError, match='all 1 object are thinner than 1 px.*--size'): need_objects(ds, **FOLDER_SIZE)
    need_objects(ds, 2000, 4000)
    d['images'][0].update(width=8000, height=8); d['annotations'][0]['bbox'] = [1,1,4000,6]; text(tmp_path/'train.json', d); picture(tmp_path/'images/0.png', size=(8,8000))
    with pytest.raises(InputError, match='no object to learn from'): need_objects(load_dataset(tmp_path), **FOLDER_SIZE)
    assert data.trained_sides(load_dataset(tmp_path), np.array([[0,0,8000,8]]), np.array([0]), **FOLDER_SIZE).tolist()==[[800,1]]    # as the transforms do it
    assert data.eval_transforms(**FOLDER_SIZE)(torch.zeros(3,8,8000)).shape==(3,1,800)

def test_corners_read_as_sizes(tmp_path):
    root = write_coco(tmp_path, coco_dict(boxes=((30,20,70,50), (10,10,60,55))))
    r, w = said(root); assert 'xyxy' in w and 'bbox=xyxy' in w and r.counts['clipped']==6
    assert load_dataset(root, bbox='xyxy')[0][1]['boxes'].tolist()==[[30,20,70,50],[10,10,60,55]] and 'xyxy' not in said(root, bbox='xyxy')[1]
    write_coco(tmp_path, coco_dict(boxes=((.25,.25,.5,.5), (.1,.1,.2,.2)))); assert 'bbox=xywhn' in said(root)[1]
    assert load_dataset(root, bbox='xywhn')[0][1]['boxes'][0].tolist()==[20,15,60,45]
    complains(root, "bbox: 'yx'", 'xyxy', bbox='yx')

def test_voc_that_counts_from_zero(tmp_path):
    root = write_voc(tmp_path, voc_xml((('cat',(0,7,25,36),0),))); assert 'one_based=false' in said(root)[1] and not said(root, one_based=False)[1]

@pytest.mark.parametrize('xml, right', [(voc_xml().replace('annotation>','Annotation>'), True), (voc_xml().replace('<annotation>','<annotation xmlns="http://x/y">'), True), (voc_xml().upper(), None),
    ('<html><body>404</body></html>', False), ('<?xml version="1.0"?><!DOCTYPE html><html/>', False), (voc_xml().replace('<object>','<objects><object>').replace('</object>','</object></objects>'), False)])
def test_xml_of_another_kind(tmp_path, xml, right):
    root = write_voc(tmp_path); (root/'Annotations/1.xml').write_text(xml)
    if right is False: complains(root, '1.xml')
    else: assert load_dataset(root, classes=['cat','CAT'])[1][1]['boxes'].tolist()==[[5,6,25,36]]

def test_the_same_picture_and_box_twice(tmp_path):
    d = coco(['0.png','1.png','2.png'], ((5,6,20,30),(5,6,20,30))); root = write_coco(tmp_path, d); shutil.copy(root/'train/0.png', root/'train/2.png'); text(root/'annotations/instances_val.json', coco(['0.png']))
    r, w = said(root); assert r.counts['same_picture']==1 and r.counts['same_box']==3 and '0.png and 2.png' in w and '3 objects given twice' in w
    sets = [load_dataset(root, s) for s in ('train','val')]; assert data.shared_pictures(sets)[0].startswith('2 pictures both in train and in val') or '1 picture both' in data.shared_pictures(sets)[0]

def test_report_of_a_cut_set_and_classes(tmp_path):
    d = coco_dict(); d['categories'].append(dict(id=11, name='Cat')); r, w = said(write_coco(tmp_path, d))
    assert r.classes=={'cat':3,'dog':0,'Cat':0} and 'dog' in w and 'capitals' in w
    from ala_nb.train import FOLDER, first
    assert {k:FOLDER[k] for k in FOLDER_SIZE}==FOLDER_SIZE
    assert report(first(load_dataset(tmp_path), 2)).counts['objects']==2

def test_report_page(tmp_path):
    root = write_coco(tmp_path/'set', coco_dict()); d = coco_dict(); d['categories'] = [dict(id=5, name='<b>血\x1b[2J$x'), dict(id=9, name='dog')]
    text(root/'annotations/instances_val.json', d)
    with contextlib.redirect_stdout(io.StringIO()) as out: code = data.main([str(root), '--out', str(tmp_path/'r.html')])
    assert code==2 and "val: " in out.getvalue() and '\x1b' not in out.getvalue()                           # classes differ: said, and train is still reported
    page = (tmp_path/'r.html').read_text(); assert page.count('<img')==1
    (root/'annotations/instances_train.json').unlink()
    with contextlib.redirect_stdout(io.StringIO()): assert data.main([str(root), '--out', str(tmp_path/'r.html')])==0 and data.main([str(root), '--out', str(tmp_path/'r.png')])==0
    page = (tmp_path/'r.html').read_text(); assert '&lt;b&gt;血' in page and '<b>' not in page and '\x1b' not in page
    with Image.open(tmp_path/'r.png') as im: assert im.width>800
    with contextlib.redirect_stderr(io.StringIO()) as err: assert data.main([str(root), '--out', str(tmp_path/'r.jpg')])==2
    assert '.html or .png' in err.getvalue()
