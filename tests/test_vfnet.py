"VFNet: the star by plain interpolation, the part by its definition, what its gradient reaches. (The contract: test_contract; mmdetection's numbers: test_convert.)"
import pytest, torch
import torch.nn.functional as F
from ala_nb.detector import Detector, Head, HeadSpec, Level, Plan, load_detector, save_weights
from ala_nb.geometry import InputError
from ala_nb.methods import build
from ala_nb.vfnet import Scales, Star, StarConv, VFNet, dense_vfnet, quality_box_loss, star_shifts

def read(x, distances, weight):
    "What a star convolution gives, location by location: bilinear interpolation at nine points, 0 outside the map."
    b, c, h, w = x.shape; out = torch.zeros(b, weight.shape[0], h, w, dtype=x.dtype)
    def value(n, px, py):
        total = torch.zeros(c, dtype=x.dtype); i, j = int(px // 1), int(py // 1)
        for di in (0, 1):
            for dj in (0, 1):
                if 0 <= i+di < w and 0 <= j+dj < h: total = total + x[n, :, j+dj, i+di]*(1-abs(px-i-di))*(1-abs(py-j-dj))
        return total
    for n in range(b):
        for j in range(h):
            for i in range(w):
                l, t, r, d = distances[n, :, j, i].tolist()
                for k, (dx, dy) in enumerate((dx, dy) for dy in (-t, 0, d) for dx in (-l, 0, r)): out[n, :, j, i] += weight[:, :, k//3, k % 3] @ value(n, i+dx, j+dy)
    return F.relu(out)

def test_star_reads_at_nine_points_of_the_box():
    torch.manual_seed(0); x, d = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.rand(2, 4, 5, 6, dtype=torch.float64)*3
    conv = StarConv(3).double()
    torch.testing.assert_close(conv(x, star_shifts(d)), read(x, d, conv.weight.detach()))

def test_part_by_its_definition():
    torch.manual_seed(0); plan = Plan(HeadSpec(refine='star'), 5, 8, 1, (8, 16)); part = Star(plan)
    at = Level(1, 16., torch.randn(1, 8, 4, 4)); at.what, at.where, at.distances = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4), torch.rand(1, 4, 4, 4)*40
    what, where, coarse = at.what, at.where, at.distances; part.correct_scales.factor.data[1] = 1.5; part.level(at)
    f = read(where, coarse/16, part.box_star.weight.detach())
    torch.testing.assert_close(at.distances, (1.5*F.conv2d(f, part.correct.weight, part.correct.bias, padding=1)).exp()*coarse)
    torch.testing.assert_close(at.what, read(what, coarse/16, part.cls_star.weight.detach())); assert at.extras['coarse'] is coarse and at.where is where
    assert Scales(3).factor.tolist() == [1., 1., 1.]

@pytest.mark.parametrize('slope', [0., .1, 1.])
def test_share_of_the_gradient_through_the_points(slope):
    torch.manual_seed(0); plan = Plan(HeadSpec(refine='star'), 5, 8, 1, (8,)); grads = []
    for s in (slope, 1.):
        torch.manual_seed(1); part = Star(plan, s).double(); at = Level(0, 8., torch.randn(1, 8, 5, 5).double())
        at.what = at.where = at.x; coarse = at.distances = (torch.rand(1, 4, 5, 5).double()*20).requires_grad_(); part.level(at)
        grads.append(torch.autograd.grad(at.what.sum(), coarse)[0])            # the class features reach it by the points alone
    torch.testing.assert_close(grads[0], slope*grads[1]); assert grads[1].abs().sum() > 0

def test_huge_and_empty_boxes_stay_finite():
    head = Head(VFNet(5).head, 5, 16, 1, (8,))
    for bias in (1e4, -1e4):
        torch.nn.init.constant_(head.box.bias, bias); torch.nn.init.constant_(head.correct.bias, bias); preds = head([torch.randn(1, 16, 3, 3)])
        assert preds.distances.isfinite().all() and preds.cls_logits.isfinite().all()
    loss, iou = quality_box_loss(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4), torch.zeros(0))
    assert loss == 0 and iou.shape == (0,)

def test_coarse_and_corrected_box_learn_apart():
    "The loss of the corrected box does not reach the coarse one but by the points; that of the coarse box does not reach the correction."
    from ala_nb.pairs import Objects
    head, m = Head(VFNet(3, slope=0.).head, 3, 16, 1, (8, 16)), VFNet(3, anchor_scale=4., slope=0.)
    preds = head([torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)])
    out = m(preds, Objects.from_targets([dict(boxes=torch.tensor([[6., 6, 40, 42]]), labels=torch.tensor([1]))])); assert out.weights['pos'].sum() > 0
    slope = lambda loss, x: torch.autograd.grad(out.losses[loss], x, retain_graph=True, allow_unused=True)[0]
    reached = lambda loss, x: (g := slope(loss, x)) is not None and bool(g.any())
    assert {k: [reached(k, x) for x in (head.box.weight, head.correct.weight)] for k in ('loss_coarse', 'loss_reg')} == dict(loss_coarse=[True, False], loss_reg=[False, True])

@pytest.mark.parametrize('options,says', [(dict(alpha=-1.), 'alpha'), (dict(slope=2.), 'slope'), (dict(pred_weight='raising'), "'rising'"), (dict(anchor_weight=0.), 'both 0'), (dict(beta=2.), 'no option')])
def test_bad_options(options, says):
    with pytest.raises(InputError, match=says): Detector('vfnet', 'tiny', 5, method_options=options)

def test_a_file_of_it_comes_back_and_scores_are_the_classes(tmp_path):
    torch.manual_seed(0); model = Detector('vfnet', 'tiny', 3, method_options=dict(pred_weight=1., slope=.5)).eval()
    again = load_detector(save_weights(model, tmp_path/'x.safetensors')); x = [torch.rand(3, 96, 64)]
    with torch.no_grad(): a, b = model.predict_maps(x)[0], again.predict_maps(x)[0]
    assert torch.equal(a.distances, b.distances) and [p.slope for p in again.head.named.values() if isinstance(p, Star)] == [.5]
    torch.testing.assert_close(model.method.scores(a), a.cls_logits.sigmoid()); assert callable(dense_vfnet) and isinstance(build('vfnet', 3), VFNet)

def test_a_norm_in_the_stars_is_an_option(tmp_path):
    "The release's form has none; with it the shift that Adam gives to all weights of a channel changes nothing."
    torch.manual_seed(0); plain, normed = (Detector('vfnet', 'tiny', 3, method_options=o).eval() for o in ({}, dict(star_norm=True)))
    stars = {f'head.{k}_star.norm.{w}' for k in ('box', 'cls') for w in ('weight', 'bias')}
    assert set(normed.state_dict())-set(plain.state_dict()) == stars and not set(plain.state_dict())-set(normed.state_dict())
    again = load_detector(save_weights(normed, tmp_path/'x.safetensors')); assert stars <= set(again.state_dict())
    x, flat = torch.rand(1, 48, 12, 12), torch.zeros(1, 18, 12, 12); alive = {}
    for name,m in (('plain', plain), ('normed', normed)):
        star = m.head.box_star
        with torch.no_grad(): star.weight.sub_(1.); alive[name] = (star(x, flat) > 0).float().mean().item()
    assert alive['plain'] == 0. and alive['normed'] > .3

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('options', [{}, dict(star_norm=True)])
def test_autocast(dtype, options):
    model = Detector('vfnet', 'tiny', 3, method_options=options).train(); t = [dict(boxes=torch.tensor([[6., 6, 40, 42]]), labels=torch.tensor([1]))]
    with torch.autocast('cpu', dtype=dtype): losses = model([torch.rand(3, 64, 64)], t)
    sum(losses.values()).backward(); assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
