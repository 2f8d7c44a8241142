"FCOS: golden parity, owners, and the corners."
import numpy as np, pytest, torch
from ala_nb.methods import build
from ala_nb.pairs import Objects
from conftest import golden_case, load_golden
from golden_util import case_inputs, compare, golden_cases

OPTIONS = dict(fcos_giou={}, fcos_iou=dict(reg_loss='iou'), fcos_nocentre=dict(centre_sampling=None))
ROWS = [(f, c) for f in OPTIONS for c in golden_cases(f)]

@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
@pytest.mark.parametrize('file,case', ROWS)
def test_golden(file, case, dtype):
    k = int(load_golden(f'inputs_{case}')['n_class'])
    for as_maps in (False, True):
        out = compare(file, case, build('fcos', k, **OPTIONS[file]), dtype=dtype, as_maps=as_maps)
    g = golden_case(file, case)
    if 'num_pos' in g: assert int(out.weights['pos'].sum()) == int(g['num_pos'])
    for i in range(out.pairs.objects.n_images):
        if f'owner_{i}' not in g: continue
        w = out.dense('pos', i)
        owner = torch.where(w.sum(1) > 0, w.argmax(1), -1) if w.shape[1] else torch.full((len(w),), -1)
        np.testing.assert_array_equal(owner.numpy(), g[f'owner_{i}'])

@pytest.mark.parametrize('option', ({}, dict(third_branch='objectness'), dict(third_branch=None), dict(centre_sampling=None, reg_loss='iou')))
@pytest.mark.parametrize('case', ('crowded', 'all_empty', 'tiny_only', 'saturated', 'duplicates'))
def test_finite_and_connected(case, option):
    preds, objects, leaves, z = case_inputs(case, torch.float32)
    out = build('fcos', z['n_class'], **option)(preds, objects)
    used = [leaves['cls_logits'], leaves['distances']] + ([leaves['obj_logits']] if option.get('third_branch', 1) else [])
    for g in torch.autograd.grad(out.total, used): assert torch.isfinite(g).all()

def test_order_of_objects_and_images():
    preds, objects, _, z = case_inputs('normal')
    a = build('fcos', z['n_class'])(preds, objects)
    flip = [dict(boxes=t['boxes'].flip(0), labels=t['labels'].flip(0)) for t in z['targets']]
    b = build('fcos', z['n_class'])(preds, Objects.from_targets(flip))
    for k in a.losses: assert torch.allclose(a.losses[k], b.losses[k], rtol=1e-12)
