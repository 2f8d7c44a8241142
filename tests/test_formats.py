"Folders as people have them: every tool's layout with its right values, what is ignored or guessed and said so, and files altered at random."
import contextlib, copy, io, json, os, shutil, sys
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
    d = coco(['0.png','1.png','2.png'], ((5,6,20,30),(5,6,20,30))); root = write_coco(tmp_path, d); shutil.copy(root/'train/0.png', root/'train/2.png'); picture(root/'val/0.png'); text(root/'annotations/instances_val.json', coco(['0.png']))
    r, w = said(root); assert r.counts['same_picture']==1 and r.counts['same_box']==3 and '0.png and 2.png' in w and '3 objects given twice' in w
    sets = [load_dataset(root, s) for s in ('train','val')]; assert data.shared_pictures(sets)==['1 picture both in train and in val, as 0.png: an AP measured on them says nothing about new pictures']

def test_report_of_a_cut_set_and_classes(tmp_path):
    d = coco_dict(); d['categories'].append(dict(id=11, name='Cat')); r, w = said(write_coco(tmp_path, d))
    assert r.classes=={'cat':3,'dog':0,'Cat':0} and 'dog' in w and 'capitals' in w
    from ala_nb.train import FOLDER, first
    assert {k:FOLDER[k] for k in FOLDER_SIZE}==FOLDER_SIZE
    assert report(first(load_dataset(tmp_path), 2)).counts['objects']==2

def test_report_page(tmp_path):
    root = write_coco(tmp_path/'set', coco_dict()); d = coco_dict(); d['categories'] = [dict(id=5, name='<b>血\x1b[2J$x'), dict(id=9, name='dog')]
    text(root/'annotations/instances_val.json', d); shutil.copytree(root/'train', root/'val')
    with contextlib.redirect_stdout(io.StringIO()) as out: code = data.main([str(root), '--out', str(tmp_path/'r.html')])
    assert code==2 and "val: " in out.getvalue() and '\x1b' not in out.getvalue()                           # classes differ: said, and train is still reported
    page = (tmp_path/'r.html').read_text(); assert page.count('<img')==1
    (root/'annotations/instances_train.json').unlink(); shutil.rmtree(root/'train')
    with contextlib.redirect_stdout(io.StringIO()): assert data.main([str(root), '--out', str(tmp_path/'r.html')])==0 and data.main([str(root), '--out', str(tmp_path/'r.png')])==0
    page = (tmp_path/'r.html').read_text(); assert '&lt;b&gt;血' in page and '<b>' not in page and '\x1b' not in page
    with Image.open(tmp_path/'r.png') as im: assert im.width>800
    with contextlib.redirect_stderr(io.StringIO()) as err: assert data.main([str(root), '--out', str(tmp_path/'r.jpg')])==2
    assert '.html or .png' in err.getvalue()

# ---------------------------------------------------------------- files altered at random: a right data set, or one line

NASTY = [None, True, False, 0, -1, 1, 7, '7', 7.0, .5, 1e300, float('nan'), float('inf'), -float('inf'), 2**53, 2**64, 10**400, '9'*400, '', 'x', ' ', '\x1b[2J', 'a\0b', 'a\nb', '\udcff', '血', '../../x',
         '/', '.', '..', 'x'*300, [], [[]], {}, [1,2], [1,2,3,4], [-5,1,1e9,2], [0,0,0,0], ['1','2','3','4'], {'a':1}, [None]*4, 'train/0.png', '0.png', '%', '%00', '?d=', 'C:\\', 'http://x']

def paths(v, at=()):
    "Every place in a JSON value."
    yield at
    for k,x in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else (): yield from paths(x, (*at, k))

def altered(value, draw):
    "A JSON value with one to three of its places changed, taken away or doubled."
    v = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1,3))):
        *head, last = draw(st.sampled_from([p for p in paths(v) if p])) or [None]; d = v
        for k in head: d = d[k]
        what = draw(st.sampled_from(['set','set','set','take','double']))
        if what=='set': d[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif what=='take': del d[last]
        elif isinstance(d, list): d.append(json.loads(json.dumps(d[last], default=str)))
        else: d[str(last)+'2'] = d[last]
        if not any(paths(v)): break
    return v

def damaged(b, draw):
    "Bytes cut, changed, or with something put in."
    for _ in range(draw(st.integers(1,4))):
        at = draw(st.integers(0, max(0, len(b)-1))); what = draw(st.sampled_from(['cut','byte','put','drop']))
        if what=='cut': b = b[:at]
        elif what=='byte': b = b[:at]+bytes([draw(st.integers(0,255))])+b[at+1:]
        elif what=='put': b = b[:at]+draw(st.sampled_from([b'\xff', b'<', b'>', b'"', b'&x;', b'0', b'9'*400, b'-', b'nan', b'\0', b'\r', b'\n', b'{', b'[', b' ', b'1e999', '血'.encode()]))+b[at:]
        else: b = b[:at]+b[at+draw(st.integers(1,40)):]
    return b

def right_or_one_line(root, **options):
    "What every file must end in."
    before = sorted(p for p in root.parent.rglob('*'))
    try:
        ds = load_dataset(root, 'train', **options); str(report(ds, 480, 800)); ds.summary(); need_objects(ds, 480, 800)
        json.dumps(ds.ground_truth(), allow_nan=False)
        assert all(type(i) is int and abs(i)<2**53 for i in [*ds.ids, *ds.category_ids]) and len(set(ds.ids))==len(ds)==len(ds.files)==len(set(ds.files))
        for im,t in ds:
            b = t['boxes']; h,w = im.shape[1:]
            assert len(b)==len(t['labels'])==len(t['area']) and (not len(b) or b.isfinite().all() and (b[:,2:]>b[:,:2]).all() and b.min()>=0 and (b<=torch.tensor([w,h,w,h])).all() and t['labels'].max()<len(ds.classes))
            assert Path(t['file']).is_relative_to(root)
    except InputError as e:
        assert str(e).isprintable() and files.error_text(e).replace('\n','').isprintable() and 'Error' not in str(e).split(':')[0], str(e)
        assert any(w in str(e) for w in (str(root)[:60], root.name, 'classes')), str(e)
    assert sorted(p for p in root.parent.rglob('*'))==before

fuzz = settings(max_examples=int(os.environ.get('FUZZ', 60)), deadline=4000, suppress_health_check=list(HealthCheck))

@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    d = tmp_path_factory.mktemp('fuzz'); t = {}
    t['coco'] = write_coco(d/'coco'/'set', coco(['0.png','1.png','2.png'], ((5,6,20,30),(1,1,9,9)))); t['voc'] = write_voc(d/'voc'/'set', voc_xml((('cat',(6,7,25,36),0), ('dog',(1,1,9,9),1))))
    t['odgt'] = write_crowdhuman(d/'odgt'/'set'); roboflow_yolo(d/'yolo'/'set'); t['yolo'] = d/'yolo'/'set'
    return t

def with_content(file, b, check):
    old = file.read_bytes()
    try: file.write_bytes(b); check()
    finally: file.write_bytes(old)

@fuzz
@given(d=st.data())
def test_altered_coco(sets, d):
    f = sets['coco']/'annotations/instances_train.json'; v = altered(json.loads(f.read_text()), d.draw)
    with_content(f, json.dumps(v).encode(), lambda: right_or_one_line(sets['coco'], use_ignored=d.draw(st.booleans()), bbox=d.draw(st.sampled_from(['xywh','xyxy']))))

@fuzz
@given(d=st.data())
def test_altered_odgt(sets, d):
    f = sets['odgt']/'annotation_train.odgt'; lines = [altered(json.loads(l), d.draw) for l in f.read_text().splitlines()]
    with_content(f, '\n'.join(map(json.dumps, lines)).encode(), lambda: right_or_one_line(sets['odgt'], box=d.draw(st.sampled_from(['fbox','hbox']))))

@fuzz
@given(d=st.data())
def test_damaged_files_of_every_form(sets, d):
    form = d.draw(st.sampled_from(['coco','voc','voc','odgt','yolo','yolo','image']))
    name = dict(coco='annotations/instances_train.json', voc=d.draw(st.sampled_from(['Annotations/1.xml','Annotations/1.xml','ImageSets/Main/train.txt'])), odgt='annotation_train.odgt',
                yolo=d.draw(st.sampled_from(['data.yaml','train/labels/0.txt'])), image='train/1.png')[form]
    root = sets['coco' if form=='image' else form]; f = root/name
    with_content(f, damaged(f.read_bytes(), d.draw), lambda: right_or_one_line(root))

words_of_xml = st.sampled_from(['1', '0', '', 'x', 'nan', '1e999', '9'*400, '-3', '<a/>', '&#27;[2J', '血', ' 7 ', '0.0', '../1', 'Unspecified', '2.5'])
@fuzz
@given(d=st.data())
def test_altered_voc(sets, d):
    import re
    f = sets['voc']/'Annotations/1.xml'; s = f.read_text()
    for _ in range(d.draw(st.integers(1,3))):
        spans = list(re.finditer(r'<(\w+)>([^<>]*)</\1>', s)); m = d.draw(st.sampled_from(spans))
        s = s[:m.start(2)]+d.draw(words_of_xml)+s[m.end(2):] if d.draw(st.booleans()) else s[:m.start()]+s[m.end():]
        if not re.search(r'<(\w+)>([^<>]*)</\1>', s): break
    with_content(f, s.encode(), lambda: right_or_one_line(sets['voc'], one_based=d.draw(st.booleans())))

@fuzz
@given(d=st.data())
def test_altered_yolo(sets, d):
    root = sets['yolo']
    if d.draw(st.booleans()):
        f = root/'train/labels/0.txt'; w = st.sampled_from(['0','1','-1','.5','0.25','1.5','9'*400,'nan','inf','x','','1e-9','0,5','٣'])
        s = '\n'.join(' '.join(d.draw(st.lists(w, max_size=10))) for _ in range(d.draw(st.integers(1,3))))
    else:
        f = root/'data.yaml'; keys = st.sampled_from(['train','val','names','nc','path','kpt_shape','x']); value = st.sampled_from(['train/images','../train/images','/','.','..','[]','{}','[cat]','{0: cat}','{0: [1]}','3','null',
            '~','!!python/object:os.system x','&a [*a]','"\\0"','2024-99-99','1e999','[a, a]','- x','train/images/0.png','data.yaml','[2, 3]','["x"]','true'])
        s = '\n'.join(f'{d.draw(keys)}: {d.draw(value)}' for _ in range(d.draw(st.integers(1,6))))
    with_content(f, s.encode(), lambda: right_or_one_line(root))

# ---------------------------------------------------------------- lines that tell the cause

def test_all_faults_of_a_file_at_once(tmp_path):
    d = coco_dict(boxes=((5,6,20,30),)*8); root = write_coco(tmp_path, d)
    for a in d['annotations'][:17]: a['bbox'] = [1,2,None,4]
    d['images'][2]['file_name'] = 'gone.png'; d['annotations'][20]['category_id'] = '77'; text(root/'annotations/instances_train.json', d)
    with pytest.raises(InputError) as e: load_dataset(root)
    lines = files.error_text(e.value).splitlines()
    assert e.value.count==19 and len(lines)==12 and lines[0].endswith('instances_train.json: 19 faults') and 'gone.png' in lines[1] and lines[-1].strip()=='... and 9 more' and 'null' in lines[3]
    for n in range(3): (root/f'train/{n}.png').write_bytes(b'x')
    text(root/'annotations/instances_train.json', coco_dict())
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out: assert data.main([str(root)])==2
    assert out.getvalue().count('cannot be read as an image')==3 and err.getvalue().count('\n')==1

@pytest.mark.parametrize('change, ids, classes', [(lambda d: [a.update(category_id=str(a['category_id'])) for a in d['annotations']], [7,17,27], ['cat','dog']), (lambda d: [r.update(id=str(r['id'])) for r in d['images']], [7,17,27], ['cat','dog']),
    (lambda d: [r.update(width='80', height=60.) for r in d['images']], [7,17,27], ['cat','dog']), (lambda d: [a.update(area='300', bbox=['5','6',20,'3e1']) for a in d['annotations']], [7,17,27], ['cat','dog']),
    (lambda d: [r.update(id=float(r['id'])) for r in d['images']], [7,17,27], ['cat','dog']), (lambda d: [x.update({k:f'i{x[k]}'}) for l,k in (('images','id'),('annotations','image_id')) for x in d[l]], [1,2,3], ['cat','dog']),
    (lambda d: [x.update({k:x[k]+2**60}) for l,k in (('images','id'),('annotations','image_id')) for x in d[l]], [1,2,3], ['cat','dog'])])
def test_text_and_hashes_where_numbers_are(tmp_path, change, ids, classes):
    d = coco_dict(); change(d); ds = load_dataset(write_coco(tmp_path, d)); assert ds.ids==ids and ds.classes==classes and ds.category_ids==[5,9]
    assert [t['boxes'].tolist() for _,t in ds]==[[[5,6,25,36]]]*3 and ds.sizes==[(60,80)]*3 and ds[0][1]['area'].tolist()==[300]
    back = ds.source_ids or ds.ids; assert back==[r['id'] for r in d['images']] and (ds.source_categories or ds.category_ids)==[5,9]

def test_text_is_shown_in_quotes(tmp_path):
    d = coco_dict(); d['annotations'][0]['category_id'] = 'x'; d['annotations'][1]['image_id'] = '99'; d['images'][0]['width'] = 'wide'
    complains(write_coco(tmp_path, d), "category_id 'x'", "image_id '99'", "width 'wide'")
    d = coco_dict(); d['images'].append(dict(d['images'][1], id='7', file_name='2.png')); complains(write_coco(tmp_path, d), "id '7' is also that of images[0]")

@pytest.mark.parametrize('declared, encoded', [('gb2312','gb18030'), ('GBK','gbk'), ('utf-8','utf-8'), ('Big5','big5'), ('martian','utf-8'), ('utf-16','utf-16'), ('hex','utf-8')])
def test_xml_in_the_encoding_it_declares(tmp_path, declared, encoded):
    root = write_voc(tmp_path); s = f'<?xml version="1.0" encoding="{declared}"?>\n' + voc_xml((('血小板',(6,7,25,36),0),))
    for i in range(3): (root/f'Annotations/{i}.xml').write_bytes(s.encode(encoded, 'replace') if encoded!='big5' else s.replace('血小板','血').encode('big5'))
    assert load_dataset(root).classes==['血' if encoded=='big5' else '血小板']
    (root/'Annotations/1.xml').write_bytes(b'<?xml version="1.0" encoding="martian"?><annotation>\xff\xfe</annotation>'); complains(root, '1.xml', 'martian', 'UTF-8')

@pytest.mark.parametrize('tag', ['xmin','width','difficult'])
def test_numbers_of_400_digits(tmp_path, tag):
    import re
    root = write_voc(tmp_path); s = re.sub(f'<{tag}>[^<]*', f'<{tag}>{"9"*400}', voc_xml()); (root/'Annotations/1.xml').write_text(s)
    if tag=='width': assert load_dataset(root).sizes[1]==(60,80)                                           # no size that can be: the picture's
    else: complains(root, '1.xml')
    d = coco_dict(); d['annotations'][0]['bbox'][0] = 10**400; complains(write_coco(tmp_path/'c', d), 'NaN, infinite or absurd'); d['annotations'][0].update(bbox=[1,2,3,4], area=10**400)
    complains(write_coco(tmp_path/'c', d), '.area is')

# ---------------------------------------------------------------- pictures that are none, or more than one

def test_only_pictures_are_opened(tmp_path, monkeypatch):
    "PostScript named .jpg: Pillow would start Ghostscript."
    import subprocess
    def started(*a, **k): raise AssertionError('a program was started')
    monkeypatch.setattr(subprocess, 'Popen', started); monkeypatch.setattr(subprocess, 'check_call', started); monkeypatch.setattr(subprocess, 'run', started)
    root = write_coco(tmp_path, coco(['0.png','1.jpg'])); Image.new('RGB', (80,60)).save(root/'train/1.jpg', 'EPS'); complains(root, '1.jpg', 'PostScript', 'convert it')
    for name, head, word in (('a.jpg', b'%PDF-1.4', 'PDF'), ('b.jpg', b'\0\0\0\x18ftypheic', 'HEIC'), ('c.jpg', b'<!doctype html>', 'web page'), ('d.jpg', b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'), ('e.png', b'', 'cannot be read')):
        (tmp_path/name).write_bytes(head)
        with pytest.raises(InputError, match=word): files.image_info(tmp_path/name)

def test_a_picture_over_the_limit(tmp_path, monkeypatch):
    f = picture(tmp_path/'a.png', size=(100,100)); monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2000)
    for read in (files.read_image, files.image_info):
        with pytest.raises(InputError, match='million pixels; cut it into tiles'): read(f)

def test_several_pages_are_said(tmp_path):
    r = tmp_path; text(r/'train.json', coco(['0.gif','1.tif']))
    for n,suffix in enumerate(('gif','tif')):
        (r/'images').mkdir(exist_ok=True); Image.new('RGB', (80,60), (40*n,)*3).save(r/f'images/{n}.{suffix}', save_all=True, append_images=[Image.new('RGB', (80,60), 'white')])
    assert found(r)==RIGHT and '2 files with several pages' in said(r)[1]

def test_twelve_bits(tmp_path):
    "Stored as 16 they are dark, and that is said; declared as 12 in a TIFF they are not."
    import struct
    text(tmp_path/'train.json', coco(['0.png'])); (tmp_path/'images').mkdir(); Image.fromarray(np.full((60,80), 4095, np.uint16)).save(tmp_path/'images/0.png')
    assert int(load_dataset(tmp_path)[0][0].max())==16 or int(load_dataset(tmp_path)[0][0].max())<=16
    w, h = 4, 2; tags = [(256,3,1,w), (257,3,1,h), (258,3,1,12), (259,3,1,1), (262,3,1,1), (273,4,1,122), (277,3,1,1), (278,3,1,h), (279,4,1,12)]
    ifd = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', *t) for t in tags) + struct.pack('<I', 0)
    (tmp_path/'t.tif').write_bytes((b'II*\0' + struct.pack('<I', 8) + ifd).ljust(122, b'\0') + b'\xff\xff\xff'*2 + b'\0\0\0'*2)
    assert files.read_image(tmp_path/'t.tif')[0].tolist()==[[255]*4, [0]*4]

def test_another_splits_picture_is_never_guessed(tmp_path):
    root = write_coco(tmp_path, coco(['0.png','1.png'])); text(root/'annotations/instances_val.json', coco(['0.png'])); (root/'images').mkdir()
    complains(root, 'image 0.png is not in', 'train/0.png is in the folder of another split', split='val')
    picture(root/'images/more/0.png', 80); assert found(root, 'val')[0][0]==80 and [x for x,*_ in found(root)]==[0,40]

@pytest.mark.parametrize('layout', [label_studio_yolo, fiftyone, cvat, cvat_yolo, labelimg, roboflow_voc, roboflow_yolo, ultralytics, kaggle_voc, picture_list, single_json, odgt], ids=lambda f: f.__name__)
def test_hidden_files_are_nobodys(tmp_path, layout):
    "macOS leaves a `._x` beside every x, notebooks keep copies."
    split = layout(tmp_path) or 'train'
    for f in [p for p in tmp_path.rglob('*') if p.is_file()]:
        f.with_name(f'._{f.name}').write_bytes(b'\0\5\x16\7\xff'); (f.parent/'.ipynb_checkpoints').mkdir(exist_ok=True); (f.parent/'.ipynb_checkpoints'/f.name).write_bytes(f.read_bytes().replace(b'cat', b'old'))
    assert [b for *_,b in found(tmp_path, split)]==[b for *_,b in RIGHT] and load_dataset(tmp_path, split).classes[0] in ('cat','person')

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    root = write_coco(tmp_path/'set', coco_dict()); monkeypatch.chdir(root); assert len(load_dataset('.'))==3      # the folder itself, from within
    os.mkfifo(root/'pipe.json'); os.mkfifo(root/'train/9.png'); assert len(load_dataset(root))==3
    (root/'annotations/instances_train.json').unlink(); os.mkfifo(root/'annotations/instances_train.json'); complains(root, 'instances_train.json', 'it is no file')
    d = coco_dict(); d['images'][0]['file_name'] = '9.png'; (root/'annotations/instances_train.json').unlink(); text(root/'annotations/instances_train.json', d); complains(root, 'image 9.png is not in')
