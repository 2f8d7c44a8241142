"ALA and its parts: invariances, extremes, what carries no gradient, and that each switch does what its table says."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ala_nb.geometry import InputError, distance_iou, level_sizes
from ala_nb.ipb import blur, gaussian_taps, map_iou, property_scores, to_locations
from ala_nb.losses import focal_negative
from ala_nb.methods import build
from ala_nb.opm import CenterPrior, log_center_weight, log_confidence, log_loc_likelihood
from ala_nb.pairs import Objects, Predictions, inside_pairs
from ala_nb.ps3 import select_samples, soft_label

STRIDES = (8, 16, 32)

def batch(targets, size=(64, 96), K=3, C=16, seed=0, dtype=torch.float64, scale=1.):
    "Leaves, predictions and objects for a list of (boxes, labels)."
    g = torch.Generator().manual_seed(seed); B, s = len(targets), level_sizes(*size, STRIDES)
    maps = lambda c, k: [(torch.randn(B, c, *x, generator=g)*k).to(dtype) for x in s]
    cls, reg, obj = [x*scale-3 for x in maps(K, 1.)], [(x*.4).exp()*1.5*t for x, t in zip(maps(4, 1.), STRIDES)], maps(1, scale)
    prop, pooled = torch.randn(B, 2, *s[0], generator=g).to(dtype)*scale, torch.randn(B, len(s), C, generator=g).to(dtype)
    leaves = [x.requires_grad_() for x in cls+reg+obj+[prop, pooled]]
    preds = Predictions.from_maps(cls, reg, obj, STRIDES, property_logits=prop, pooled=pooled)
    return leaves, preds, Objects.from_targets([dict(boxes=torch.tensor(b, dtype=dtype).reshape(-1, 4), labels=torch.tensor(l).long()) for b, l in targets])

def one(preds, i):
    "Image i of a batch, alone."
    cut = lambda x: None if x is None else x[i:i+1]
    p = Predictions(preds.cls_logits[i:i+1], preds.distances[i:i+1], preds.points, preds.strides, cut(preds.obj_logits), preds.level_sizes, cut(preds.property_logits), cut(preds.pooled))
    return p

TARGETS = [([[8., 6, 60, 50], [30, 20, 90, 60], [31, 20, 91, 61]], [0, 0, 2]), ([], []), ([[0., 0, 96, 64]], [1])]
EXTREMES = dict(none=[([], []), ([], [])], tiny=[([[10., 10, 10.5, 10.5], [3, 3, 4, 4]], [0, 1])], twins=[([[8., 8, 50, 50]]*3, [1, 1, 1])], whole=[([[0., 0, 96, 64], [-20, -20, 200, 200]], [0, 2])],
                crowd=[([[x, y, x+14, y+12] for x in range(0, 90, 6) for y in range(0, 60, 6)], [0]*150)])
SWITCHES = [dict(), dict(variant='paper'), dict(property='impobj'), dict(property='centerness'), dict(property='none'), dict(coupling='sigmoid'), dict(confidence='add'), dict(loc='exp_giou'), dict(loc='power'), dict(parts='confidence'),
            dict(parts='weight'), dict(confidence_parts='cls'), dict(confidence_parts='loc'), dict(centre='shared'), dict(centre='fixed'), dict(centre='none'), dict(blur_radius=0), dict(threshold=.5), dict(threshold=None), dict(xi=.6),
            dict(losses='HS'), dict(losses='HN'), dict(losses='HN', without_soft='positive'), dict(losses='HN', without_soft='silent'), dict(losses='SN'), dict(strategy='pnlp'), dict(strategy='latent'), dict(one_to_one=True), dict(score_gamma=1.), dict(variant='paper', one_to_one=True)]

@pytest.mark.parametrize('options', SWITCHES, ids=str)
def test_images_do_not_hear_each_other(options):
    "Without the divisor (number of objects) the losses of a batch are the sums over its images; the weights are theirs."
    _, preds, objects = batch(TARGETS); m = build('ala', 3, in_channels=16, **options).double()
    if m.prior.mode in ('predicted', 'shared'): torch.nn.init.normal_(m.prior.fc.weight, std=.1)
    whole = m(preds, objects, .3)
    parts = [m(one(preds, i), Objects.from_targets([dict(boxes=objects.boxes[objects.image == i], labels=objects.labels[objects.image == i])]), .3) for i in range(3)]
    counts = [max(int((objects.image == i).sum()), 1) for i in range(3)]
    for k in whole.losses: assert torch.allclose(sum(p.losses[k]*c for p, c in zip(parts, counts)), whole.losses[k]*len(objects), rtol=1e-9), k
    for k in whole.weights: assert torch.allclose(torch.cat([p.weights[k] for p in parts]), whole.weights[k])

@pytest.mark.parametrize('options', SWITCHES, ids=str)
def test_order_of_objects_is_nothing(options):
    _, preds, objects = batch(TARGETS); m = build('ala', 3, in_channels=16, **options).double()
    a = m(preds, objects, .3)
    order = torch.tensor([2, 0, 1, 3])
    b = m(preds, Objects(objects.boxes[order], objects.labels[order], objects.image, 3), .3)
    for k in a.losses: assert torch.allclose(a.losses[k], b.losses[k], rtol=1e-10)

@pytest.mark.parametrize('case', EXTREMES)
@pytest.mark.parametrize('options', SWITCHES, ids=str)
@pytest.mark.parametrize('scale', (1., 30.))
def test_extremes_are_finite(case, options, scale):
    leaves, preds, objects = batch(EXTREMES[case], dtype=torch.float32, scale=scale)
    out = build('ala', 3, in_channels=16, **options)(preds, objects, .7)
    assert all(torch.isfinite(v) for v in out.losses.values())
    for g in torch.autograd.grad(out.total, leaves, allow_unused=True): assert g is None or torch.isfinite(g).all()

@pytest.mark.parametrize('variant', ('working', 'paper'))
def test_without_the_extra_outputs(variant):
    "Predictions that carry no property map and no pooled features are allowed: the weight is the centre's alone."
    _, preds, objects = batch(TARGETS)
    plain = Predictions(preds.cls_logits, preds.distances, preds.points, preds.strides)
    out = build('ala', 3, variant=variant).double()(plain, objects, .2)
    assert torch.isfinite(out.total) and 'loss_property' not in out.losses

def naive_working(m, preds, objects, progress):
    "The working reading by dense matrices and loops over images and objects."
    K, hard_loss, soft_loss, neg, prop = preds.n_classes, 0., 0., 0., 0.
    smooth = blur(property_scores(preds.property_logits))                  # read where each location stands, by another way
    at = preds.points/preds.points.new_tensor(smooth.shape[:1:-1])/preds.level_strides[0]*2-1
    maps = torch.nn.functional.grid_sample(smooth, at.expand(len(smooth), 1, -1, -1), padding_mode='border', align_corners=False)[:, :, 0]
    mu, ls = m.prior.parameters_of(preds.pooled)
    level = torch.bucketize(torch.arange(preds.n_locations), torch.tensor(preds.level_starts[1:-1]), right=True)
    for i in range(preds.n_images):
        positive = torch.zeros(preds.n_locations, K, dtype=preds.dtype); outside = torch.ones(preds.n_locations, dtype=torch.bool)
        for box, label in zip(objects.boxes[objects.image == i], objects.labels[objects.image == i]):
            t = torch.cat([preds.points-box[:2], box[2:]-preds.points], 1); at = (t.amin(1) > 0).nonzero().flatten()
            outside[at] = False
            if not len(at): continue
            d = (preds.points[at]-(box[:2]+box[2:])/2)/preds.strides[at][:, None]
            c = (-.5*((d-mu[i, level[at], label])/ls[i, level[at], label].exp())**2).sum(1).exp()
            iou = distance_iou(preds.distances[i, at], t[at])
            s = preds.cls_logits[i, at, label].sigmoid()**.6*(-5*(1-iou)**.8).exp()**.4*c*maps[i, 0, at]
            v, f = s.detach(), s.detach().std(unbiased=False)
            e = 1e-5*v.mean(); hard = (v >= v.mean()+f-e) | (v == v.max()); soft = ~hard & (v >= v.mean()-f-e)
            xi = .5*v/v.max()*(1+math.cos(math.pi*progress))
            hard_loss = hard_loss - s[hard].log().mean()
            if soft.any(): soft_loss = soft_loss - (xi*s.log())[soft].mean()
            positive[at, label] = torch.maximum(positive[at, label], hard.to(xi)+soft*xi)
        neg = neg + .75*((1-positive)*focal_negative(preds.cls_logits[i])).sum()
        n0 = preds.level_starts[1]; fg = preds.property_logits[i].softmax(0)[0].flatten()
        prop = prop - .75*(fg**2*(1-fg).log())[outside[:n0]].sum()
    n = max(len(objects), 1)
    return dict(loss_hard=hard_loss/n, loss_soft=soft_loss/n, loss_neg=neg/n, loss_property=.3*prop/n)

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 9), progress=st.floats(0, 1))
def test_equals_the_dense_derivation(seed, n, progress):
    g = torch.Generator().manual_seed(seed)
    xy, wh = torch.rand(n, 2, generator=g)*80-5, torch.rand(n, 2, generator=g)**2*70+1
    targets = [(torch.cat([xy, xy+wh], 1).tolist(), torch.randint(0, 3, (n,), generator=g).tolist()), ([[5., 5, 40, 40]], [1])]
    leaves, preds, objects = batch(targets, seed=seed)
    m = build('ala', 3, in_channels=16, centre_gradient=True).double(); torch.nn.init.normal_(m.prior.fc.weight, std=.1)
    out, ref = m(preds, objects, progress), naive_working(m, preds, objects, progress)
    for k in ref: assert torch.allclose(out.losses[k], torch.as_tensor(ref[k], dtype=torch.float64), rtol=1e-8, atol=1e-10), k
    slopes = lambda total: torch.autograd.grad(total, leaves, allow_unused=True)
    moved = slopes(out.total)
    for a, b in zip(moved, slopes(sum(ref.values()))): assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    m.centre_gradient = False; still = m(preds, objects, progress)             # the default: the same, but the pooled features feel nothing
    for a, b, x in zip(slopes(still.total), moved, leaves): assert a is None if x is preds.pooled or b is None else torch.equal(a, b)
    assert still.losses.keys() == ref.keys() and all(torch.equal(still.losses[k], out.losses[k]) for k in ref)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from((0., .5)), st.integers(0, 99))
def test_maps_are_read_bilinearly(h, w, offset, seed):
    "At every location of every level, borders replicated, whatever the sizes."
    maps = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes, strides = [(-(-h//2**k), -(-w//2**k)) for k in range(4)], (8, 16, 32, 64)
    got = to_locations(maps, sizes, strides, offset).split([a*b for a, b in sizes], 2)
    for (m, n), s, v in zip(sizes, strides, got):
        y, x = torch.meshgrid(*((torch.arange(k).double()+offset)*s/8-offset for k in (m, n)), indexing='ij')    # in cells, 0 the first's centre
        at = torch.stack([(x+.5)/w, (y+.5)/h], -1)*2-1
        want = torch.nn.functional.grid_sample(maps, at.expand(2, -1, -1, -1), padding_mode='border', align_corners=False)
        torch.testing.assert_close(v, want.flatten(2), rtol=1e-9, atol=1e-9)

def test_autocast_computes_in_float32():
    _, preds, objects = batch(TARGETS, dtype=torch.float32)
    half = Predictions.from_maps([b.unflatten(2, s).bfloat16() for b, s in zip(preds.cls_blocks, preds.level_sizes)], [x.unflatten(2, s).bfloat16() for x, s in zip(preds.distance_planes.split([h*w for h, w in preds.level_sizes], 2), preds.level_sizes)],
                                 None, STRIDES, property_logits=preds.property_logits.bfloat16(), pooled=preds.pooled.bfloat16())
    with torch.autocast('cpu', dtype=torch.bfloat16): out = build('ala', 3, in_channels=16)(half, objects, .3)
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in out.losses.values())

def test_one_to_one_has_one_positive_an_object():
    _, preds, objects = batch(TARGETS)
    out = build('ala', 3, in_channels=16, one_to_one=True).double()(preds, objects, .3)
    assert (out.pairs.sum(out.weights['pos']) == 1).all()

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=40), st.floats(0, 1), st.sampled_from(['statistics', .3, .7, None]))
def test_selection_is_a_partition(values, progress, threshold):
    n = len(values); q = torch.tensor(values, dtype=torch.float64)
    p = Predictions.from_maps([torch.zeros(1, 1, 1, n)], [torch.ones(1, 4, 1, n)], strides=(8,))
    pairs = inside_pairs(p, Objects.from_targets([dict(boxes=torch.tensor([[0., 0, 8.*n, 8]]), labels=torch.tensor([0]))]))
    hard, soft, low = select_samples(pairs, q, threshold); xi = soft_label(pairs, q, progress)
    assert (hard.int()+soft.int()+low.int() == 1).all() and hard[q.argmax()]
    assert xi.min() >= 0 and xi.max() <= 1
    if soft.any() and hard.any(): assert q[soft].max() <= q[hard].min()+1e-12
    if low.any() and soft.any(): assert q[low].max() <= q[soft].min()+1e-12


def test_parts_by_definition():
    assert math.isclose(float(gaussian_taps(3, 2.)[3]/gaussian_taps(3, 2.)[2]), math.exp(1/4))
    assert map_iou(torch.ones(1, 4, 4), torch.ones(1, 8, 8).bool()) == (1., 1.)
    assert float(log_center_weight(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))) == 0
    assert math.isclose(float(log_confidence(torch.tensor(0.), torch.tensor(0.), 1.)), math.log(.5), rel_tol=1e-6)
    assert float(log_loc_likelihood(torch.tensor(0.), reading='exp', lam=5.)) == -5
    with pytest.raises(InputError, match='predicted'): CenterPrior(3, 'learnt')
