"Masks in data: what files hold, what reaches the training, and what is said of files that are wrong."
import json
import numpy as np, pytest, torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.transforms import v2
from ala_nb import data
from ala_nb.data import Items, Transforms, load_dataset, make_loader, save_coco, train_transforms
from ala_nb.geometry import InputError
from ala_nb.masks import decode_masks, encode_masks, mask_polygons, pack_mask

def write(folder, annotations, size=(40,60), sizes=True, n=2):
    "A COCO folder of `n` grey pictures."
    h,w = size; (folder/'train').mkdir(parents=True); (folder/'annotations').mkdir()
    for i in range(n): Image.new('RGB', (w,h), (90,)*3).save(folder/'train'/f'{i}.png')
    images = [dict(id=i+1, file_name=f'{i}.png', **(dict(height=h, width=w) if sizes else {})) for i in range(n)]
    rows = [dict(dict(id=k+11, image_id=1, category_id=1, bbox=[1,1,20,20], area=9, iscrowd=0), **a) for k,a in enumerate(annotations)]
    file = folder/'annotations'/'instances_train.json'
    file.write_text(json.dumps(dict(images=images, annotations=rows, categories=[dict(id=1, name='thing')])))
    return file

triangle = [[3.3,2.1, 50.7,9.5, 20.2,33.3]]
rle = dict(size=[40,60], counts=[50,7,40*60-57])

def test_the_masks_are_cocos_own(tmp_path):
    file = write(tmp_path, [dict(segmentation=triangle), dict(segmentation=triangle+[[1,1,9,1,9,9,1,9]], image_id=2), dict(segmentation=rle, iscrowd=1),
                            dict(segmentation=encode_masks(torch.rand(1,40,60) > .5)[0], image_id=2)])
    ds, coco = load_dataset(tmp_path, masks=True), COCO(str(file))
    for i in range(2):
        image, t = ds[i]
        want = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=[i+1]))]
        assert t['masks'].shape==(len(want),40,60) and (t['masks'].numpy()==np.stack(want)).all()
    assert 'masks' not in load_dataset(tmp_path)[0][1]                                        # off unless asked for
    again = tmp_path/'again'; save_coco(ds, again); back = load_dataset(again, masks=True)
    assert all((a['masks']==b['masks']).all() for (_,a),(_,b) in zip(ds, back))

def test_crowds_go_with_their_masks_and_nothing_gets_out_of_step(tmp_path):
    write(tmp_path, [dict(segmentation=rle, iscrowd=1), dict(segmentation=triangle, bbox=[3.3,2.1,47.4,31.2]), dict(segmentation=[[1,1,1.2,1,1.2,1.2,1,1.2]], bbox=[1,1,.2,.2])])
    ds = load_dataset(tmp_path, masks=True)
    items = Items(ds, train_transforms(30, 60), train=True)
    for epoch in range(4):
        image, t = items[epoch,0]
        assert t['masks'].shape==(1,30,45) and t['masks'].dtype==torch.bool and len(t['labels'])==1 and len(t['ignore'])==1
        ys,xs = t['masks'][0].nonzero().T; x1,y1,x2,y2 = t['boxes'][0].tolist()
        assert abs(xs.min()-x1)<=1.5 and abs(xs.max()+1-x2)<=1.5 and abs(ys.min()-y1)<=1.5 and abs(ys.max()+1-y2)<=1.5
    assert items[0,1][1]['masks'].shape==(0,30,45)                                           # an image without objects

@pytest.mark.parametrize('step', [v2.RandomCrop(24), v2.RandomHorizontalFlip(1.), v2.RandomVerticalFlip(1.), v2.Pad(5), data.ShortSide(77, 200), data.ShortSide(19)])
def test_transforms_move_masks_as_boxes(step):
    ds = load_dataset('shapes', 'val', n=6, masks=True, max_iou=0., min_visible=1., clutter=0, image_size=(96,128))
    for image,t in ds:
        torch.manual_seed(1); im, s = Transforms([step])(image, t)
        assert s['masks'].shape==(len(s['labels']), *im.shape[1:])
        r = im.shape[1]/96 if isinstance(step, data.ShortSide) else 1
        for m,(x1,y1,x2,y2) in zip(s['masks'], s['boxes'].tolist()):
            if not m.any(): continue
            ys,xs = m.nonzero().T; slack = 1+max(1, r)                                       # a pixel of the drawing, one of the resizing
            assert xs.min()>=x1-slack and xs.max()+1<=x2+slack and ys.min()>=y1-slack and ys.max()+1<=y2+slack
            if r<1 or isinstance(step, v2.RandomCrop): continue                              # thin parts may vanish, or lie outside
            assert xs.max()+1-xs.min()>=x2-x1-2*slack and ys.max()+1-ys.min()>=y2-y1-2*slack

@pytest.mark.parametrize('segmentation, words', [
    ([[1,1,5,1,5]], 'segmentation[0] has 5 numbers'), ([], 'is empty'), ([[]], 'no polygon'), ([[1,1,2,2]], 'no polygon'), ('x', "is 'x'"),
    ([[1,1,5,1,5,'y']], 'must be numbers'), ([[1,1,5,1,1e308,4]], 'must be numbers'), ([[1,1,5,True,5,4]], 'must be numbers'), ([1,1,5,1,5,4], 'not a list'), ({}, 'height and width'),
    (dict(size=[60,40], counts=[2400]), 'a mask of 40x60 px, but the image is 60x40'), (dict(size=[40,60], counts=[5,5]), 'add up to 10'),
    (dict(size=[40,60], counts='52'), 'add up to'), (dict(size=[40,60], counts='o'*40), 'no text of run lengths'), (dict(size=[40,60], counts=[2401,-1]), 'whole numbers'),
    (dict(size=[40,60], counts=None), 'a list of run lengths'), (dict(size=[40,60.5], counts=[1]), 'height and width')])
def test_a_hostile_mask_is_one_line_that_names_file_and_annotation(tmp_path, segmentation, words):
    file = write(tmp_path, [dict(segmentation=triangle), dict(segmentation=segmentation)])
    load_dataset(tmp_path)                                                                   # its boxes are as good as ever
    with pytest.raises(InputError) as e: load_dataset(tmp_path, masks=True)
    text = str(e.value); assert words in text and str(file) in text and 'annotations[1] (id 12)' in text and '\n' not in text and len(text)<400+len(str(file))

def test_what_is_missing_is_said(tmp_path):
    write(tmp_path/'a', [dict(), dict(segmentation=None)])
    with pytest.raises(InputError) as e: load_dataset(tmp_path/'a', masks=True)
    assert e.value.count==2 and 'no segmentation, and masks are asked for' in str(e.value)
    write(tmp_path/'b', [dict(segmentation=dict(size=[41,60], counts=[41*60]))], sizes=False)       # the picture says its size
    with pytest.raises(InputError, match='0.png: has a mask of 60x41 px, but the image is 60x40'): load_dataset(tmp_path/'b', masks=True)
    for bad in ('yes', 1, None):
        with pytest.raises(InputError, match='masks: .* true or false'): load_dataset(tmp_path/'a', masks=bad)
    with pytest.raises(InputError, match='VOC XML is read for its boxes'): load_dataset('tests/data/bccd', format='voc', masks=True)

def test_strokes_are_counted_and_said(tmp_path):
    write(tmp_path, [dict(segmentation=triangle+[[1,1,2,2],[5,5]])])
    ds = load_dataset(tmp_path, masks=True); assert ds.notes['stroke']==2
    assert any('2 polygons of one or two points' in w for w in data.report(ds).warnings)

def test_shares_and_cuts_keep_masks_with_their_objects(tmp_path):
    ds = load_dataset('shapes', 'train', n=12, masks=True, image_size=64); save_coco(ds, tmp_path)
    whole = {t['file'].split('/')[-1]:t for _,t in load_dataset(tmp_path, 'train', masks=True)}
    for split in ('train','val'):
        for _,t in load_dataset(tmp_path, split, masks=True, val_share=.4):
            w = whole[t['file'].split('/')[-1]]; assert (w['masks']==t['masks']).all() and (w['boxes']==t['boxes']).all()

def test_two_workers_bring_the_same_masks(tmp_path):
    save_coco(load_dataset('shapes', 'train', n=9, masks=True, image_size=(48,64)), tmp_path); ds = load_dataset(tmp_path, masks=True)
    batches = lambda workers: list(make_loader(ds, 4, True, train_transforms(40), workers=workers))
    for (_,a),(_,b) in zip(batches(0), batches(2), strict=True):
        for s,t in zip(a, b, strict=True): assert s['masks'].dtype==torch.bool and torch.equal(s['masks'], t['masks'])

def test_polygons_of_the_masks_of_shapes_are_the_masks():
    ds = load_dataset('shapes', 'val', n=12, masks=True)
    for _,t in ds:
        back = decode_masks([pack_mask(mask_polygons(m)) for m in t['masks'] if m.any()], (128,128))
        assert torch.equal(back, t['masks'][t['masks'].flatten(1).any(1)].as_subclass(torch.Tensor))
