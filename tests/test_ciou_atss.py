"ATSS and Combined IoUs: golden parity, a brute-force assignment, a dense derivation of every loss, order, normalisers, gradients, corners."
import math
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from ala_nb.ciou_atss import ATSS, CombinedIoU, adaptive_threshold, anchor_iou, predicted_iou
from ala_nb.geometry import InputError, grid_points, level_sizes
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions, nearest_pairs
from conftest import golden_case, load_golden
from golden_util import case_inputs, compare

CIOU, STATIC = 'ciou_atss', 'atss'
FILES = dict(ciou_qfl_iou=(CIOU, {}), ciou_vfl_iou=(CIOU, dict(cls_loss='vfl')),
             ciou_qfl_centerness=(CIOU, dict(third_branch='centerness')),
             ciou_focal_centerness=(CIOU, dict(cls_loss='focal', third_branch='centerness')),
             ciou_released=(CIOU, dict(variant='released')),
             atss=(STATIC, {}), atss_mmdet=(STATIC, dict(variant='mmdet')), atss_released=(STATIC, dict(variant='released')))
# ties too: the lower index comes first here as there
ROWS = [(f, c) for f in FILES for c in sorted({k.split('/')[0] for k in load_golden(f)})]
OPTIONS = [(STATIC, {}), (STATIC, dict(variant='released')), (STATIC, dict(variant='mmdet')), (STATIC, dict(third_branch='objectness')),
           (STATIC, dict(third_branch=None)), (CIOU, {}), (CIOU, dict(variant='released', cls_loss='vfl')),
           (CIOU, dict(cls_loss='focal', third_branch='centerness')),
           (CIOU, dict(cls_loss='focal')), (CIOU, dict(third_branch=None)), (CIOU, dict(anchor_weight=0, third_branch='centerness')),
           (CIOU, dict(pred_weight='rising', anchor_weight='falling')), (CIOU, dict(pred_weight=0, cls_loss='vfl')),
           (CIOU, dict(pred_weight=1.5, k=5, anchor_scale=4.))]

# -- golden ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('file,case', ROWS)
def test_golden(file, case):
    name, options = FILES[file]
    k, g = int(load_golden(f'inputs_{case}')['n_class']), golden_case(file, case)
    for dtype in (torch.float32, torch.float64):       # saturated logits too: log-sigmoids agree with the float64 numbers in float32
        for as_maps in (False, True):
            out = compare(file, case, build(name, k, **options), dtype=dtype, as_maps=as_maps)
            assert int(out.weights['pos'].sum()) == int(g['num_pos'])
            for i in range(out.pairs.objects.n_images):
                w = out.dense('pos', i)
                owner = torch.where(w.sum(1) > 0, w.argmax(1), -1) if w.shape[1] else torch.full((len(w),), -1)
                if f'owner_{i}' in g: np.testing.assert_array_equal(owner.numpy(), g[f'owner_{i}'])
                if f'soft_target_{i}' in g:
                    atol = 1e-7 if dtype == torch.float64 else 1e-6
                    np.testing.assert_allclose(out.dense('target', i).sum(1), g[f'soft_target_{i}'], rtol=0, atol=atol)
                if f'threshold_{i}' in g and name == CIOU:
                    p, legacy = out.pairs, options.get('variant') == 'released'
                    anchor = anchor_iou(p, legacy=legacy)
                    t = adaptive_threshold(p, anchor, out.weights['overlap'] - anchor)[p.objects.image == i]
                    np.testing.assert_allclose(t, g[f'threshold_{i}'], rtol=0, atol=1e-6)

# -- random batches ----------------------------------------------------------------------------------------------------------------

def random_batch(seed, counts, size, strides=(8, 16, 32), K=3, offset=.5, kind='mixed', dtype=torch.float64):
    "Predictions whose leaves carry gradient, and objects of a kind."
    r = np.random.default_rng(seed); h, w = size; sizes = level_sizes(h, w, strides); n = sum(a*b for a, b in sizes)
    tensor = lambda x: torch.as_tensor(x, dtype=dtype).requires_grad_()
    points, steps = grid_points(sizes, strides, offset, dtype=dtype)
    B = len(counts)
    leaves = (tensor(r.normal(-2, 2, (B, n, K))), tensor(np.exp(r.normal(.8, .7, (B, n, 4)))*steps.numpy()[:, None]),
              tensor(r.normal(0, 2, (B, n))))
    targets = []
    for c in counts:
        centre = r.uniform(0, 1, (c, 2))*[w, h]
        side = dict(mixed=np.exp(r.uniform(np.log(2), np.log(1.5*max(h, w)), (c, 2))), tiny=r.uniform(.2, 3, (c, 2)),
                    whole=np.full((c, 2), [w, h], float), grid=4.*r.integers(1, 24, (c, 2)))[kind]
        if kind == 'whole': centre = np.full((c, 2), [w/2, h/2])
        if kind == 'grid': centre = 4.*r.integers(0, [w//4, h//4], (c, 2))                 # many exactly equal distances
        boxes = np.concatenate([centre-side/2, centre+side/2], 1)
        targets.append(dict(boxes=torch.as_tensor(boxes, dtype=dtype), labels=torch.as_tensor(r.integers(0, K, c))))
    return Predictions(leaves[0], leaves[1], points, steps, leaves[2], sizes), targets, leaves

def brute_force(preds, targets, weights, k=9, scale=8., plus=0., margin=.01):
    """For every image: owner of each location (-1: none) and PIoU (P, G); and how near the closest decision was.
    Plain numpy, one object and location after the other; `plus` 1 for legacy widths."""
    pts, st, dist = (x.detach().numpy() for x in (preds.points, preds.strides, preds.distances))
    out, gap = [], np.inf
    def iou(a, b):
        w, h = min(a[2], b[2])-max(a[0], b[0])+plus, min(a[3], b[3])-max(a[1], b[1])+plus
        inter = max(w, 0)*max(h, 0)
        return inter/((a[2]-a[0]+plus)*(a[3]-a[1]+plus)+(b[2]-b[0]+plus)*(b[3]-b[1]+plus)-inter)
    for i, t in enumerate(targets):
        boxes = t['boxes'].numpy(); best, owner = np.full(len(pts), -np.inf), np.full(len(pts), -1); piou = np.zeros((len(pts), len(boxes)))
        for g, b in enumerate(boxes):
            centre, cand = (b[:2]+b[2:])/2, []
            for a, e in zip(preds.level_starts, preds.level_starts[1:]):
                cand += [a+j for j in np.argsort(((pts[a:e]-centre)**2).sum(1), kind='stable')[:k]]
            half = (scale*st-plus)/2
            A = np.array([iou([*(pts[j]-half[j]), *(pts[j]+half[j])], b) for j in cand])
            P = np.array([iou([*(pts[j]-dist[i, j, :2]), *(pts[j]+dist[i, j, 2:])], b) for j in cand])
            dev = lambda x: x.std(ddof=1) if len(x) > 1 else 0.
            t_g = sum(w*(x.mean()+dev(x)) for w, x in zip(weights, (A, P)))
            for j, a, p in zip(cand, A, P):
                piou[j, g] = p; total = weights[0]*a+weights[1]*p
                inside = min(*(pts[j]-b[:2]), *(b[2:]-pts[j])) > margin
                if inside: gap = min(gap, abs(total-t_g))
                if inside and total >= t_g and total > best[j]: best[j], owner[j] = total, g
        out.append((owner, piou))
    return out, gap

def owners(out):
    for i in range(out.pairs.objects.n_images):
        w = out.dense('pos', i)
        yield torch.where(w.sum(1) > 0, w.argmax(1), -1).numpy() if w.shape[1] else np.full(len(w), -1)

CASES = dict(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
             size=st.tuples(st.integers(9, 120), st.integers(9, 120)),
             offset=st.sampled_from((.5, 0.)), kind=st.sampled_from(('mixed', 'mixed', 'grid', 'tiny', 'whole')))

@settings(max_examples=40, deadline=None)
@given(**CASES, weights=st.sampled_from(((1, 0), (1, 1), (0, 1), (.5, 1.5))), variant=st.sampled_from(('paper', 'released')))
def test_assignment_equals_brute_force(seed, counts, size, offset, kind, weights, variant):
    preds, targets, _ = random_batch(seed, counts, size, offset=offset, kind=kind)
    want, gap = brute_force(preds, targets, weights, plus=float(variant == 'released'))
    if gap < 1e-9: return                                  # equal up to rounding: either answer is right
    m = ATSS(3, variant) if weights == (1, 0) else CombinedIoU(3, variant, anchor_weight=weights[0], pred_weight=weights[1])
    for (owner, _), mine in zip(want, owners(m(preds, Objects.from_targets(targets)))): np.testing.assert_array_equal(mine, owner)

@pytest.mark.parametrize('offset', (.5, 0.))
def test_assignment_in_a_crowd(offset):
    preds, targets, _ = random_batch(3, (150, 0, 60), (96, 160), offset=offset, K=365)
    for weights, m in (((1, 0), ATSS(365)), ((1, 1), CombinedIoU(365))):
        want, gap = brute_force(preds, targets, weights); assert gap > 1e-9
        for (owner, _), mine in zip(want, owners(m(preds, Objects.from_targets(targets)))): np.testing.assert_array_equal(mine, owner)

def naive_losses(preds, targets, kind, third, assigned, plus, mmdet):
    "The losses by dense targets and torch's own functions."
    cls = reg = branch = total = n = 0.; per_image = 0
    for i, (t, (owner, piou)) in enumerate(zip(targets, assigned)):
        P = np.flatnonzero(owner >= 0); x, o = preds.cls_logits[i], preds.obj_logits[i]; y = torch.zeros_like(x); hot = torch.zeros_like(x)
        n += len(P); per_image += max(len(P), 1)
        if len(P):
            b = t['boxes'][owner[P]]; l = t['labels'][owner[P]]; p = preds.points[P]; d = preds.distances[i, P]
            box = torch.cat([p-d[:, :2], p+d[:, 2:]], 1)
            T = torch.cat([p-b[:, :2], b[:, 2:]-p], 1)
            ctr = ((T[:, 0].minimum(T[:, 2])/T[:, 0].maximum(T[:, 2]))*(T[:, 1].minimum(T[:, 3])/T[:, 1].maximum(T[:, 3]))).sqrt()
            iou = torch.as_tensor(piou[P, owner[P]])
            q = iou if third == 'iou' else ctr
            y[P, l], hot[P, l] = (iou if kind in ('qfl', 'vfl') else torch.ones_like(iou)), 1.
            wh = (torch.minimum(box[:, 2:], b[:, 2:])-torch.maximum(box[:, :2], b[:, :2])).clamp(min=0).prod(1)
            u = (box[:, 2:]-box[:, :2]).prod(1)+(b[:, 2:]-b[:, :2]).prod(1)-wh
            hull = (torch.maximum(box[:, 2:], b[:, 2:])-torch.minimum(box[:, :2], b[:, :2])).prod(1)
            reg = reg + (q*(1-wh/u+(hull-u)/hull)).sum(); total += q.sum().item()
            branch = branch + F.binary_cross_entropy_with_logits(o[P], q, reduction='sum')
        s = x.sigmoid(); bce = F.binary_cross_entropy_with_logits(x, y, reduction='none')
        if third == 'objectness':
            s = s*o.sigmoid()[:, None]; cls = cls + torch.where(hot > 0, -.25*(1-s)**2*s.log(), -.75*s**2*(1-s).log()).sum()
        else:
            weight = dict(focal=torch.where(hot > 0, .25*(1-s)**2, .75*s**2), qfl=(y-s)**2, vfl=torch.where(hot > 0, y, .75*s**2))[kind]
            cls = cls + (weight*bce).sum()
    n, total = (per_image, max(total, 1)) if mmdet else (max(n, 1), max(total, 1e-6))
    out = dict(loss_cls=cls/n, loss_reg=2*reg/total)
    if third in ('iou', 'centerness'): out['loss_branch'] = branch/n
    return out

@settings(max_examples=30, deadline=None)
@given(**CASES, K=st.sampled_from((1, 3)), options=st.sampled_from([
    (STATIC, {}), (STATIC, dict(variant='mmdet')), (STATIC, dict(third_branch='objectness')), (CIOU, {}),
    (CIOU, dict(cls_loss='vfl', variant='released')), (CIOU, dict(cls_loss='focal', third_branch='centerness'))]))
def test_losses_equal_a_dense_derivation(seed, counts, size, offset, kind, options, K):
    name, o = options; m = build(name, K, **o)
    preds, targets, leaves = random_batch(seed, counts, size, offset=offset, kind=kind, K=K)
    plus = float(o.get('variant') == 'released')
    assigned, gap = brute_force(preds, targets, (1, 0) if name == STATIC else (1, 1), plus=plus)
    if gap < 1e-9: return
    want = naive_losses(preds, targets, m.cls_loss, m.head.third, assigned, plus, m.variant == 'mmdet')
    out = m(preds, Objects.from_targets(targets))
    assert sorted(out.losses) == sorted(want)
    tol = 3e-6 if m.variant == 'mmdet' else 1e-6            # the releases' small numbers; boxes of 0.04 px² feel them most
    for k in want:
        w = float(torch.as_tensor(want[k]).detach())
        assert abs(float(out.losses[k].detach())-w) <= tol*max(w, 1e-3), k
    mine = torch.autograd.grad(out.total, leaves, allow_unused=True)
    ref = torch.autograd.grad(sum(v if torch.is_tensor(v) else preds.cls_logits.sum()*0 for v in want.values()), leaves, allow_unused=True)
    for a, b in zip(mine, ref):
        a, b = (torch.zeros(1) if x is None else x for x in (a, b))
        assert (a-b).abs().max() <= 1e-5*max(float(b.abs().max()), 1e-6)

@pytest.mark.parametrize('K', (1, 365))
def test_one_class_and_many(K):
    preds, targets, _ = random_batch(5, (4, 0, 9), (70, 130), K=K)
    assigned, _ = brute_force(preds, targets, (1, 1))
    want, out = naive_losses(preds, targets, 'qfl', 'iou', assigned, 0., False), CombinedIoU(K)(preds, Objects.from_targets(targets))
    for k in want: assert math.isclose(float(out.losses[k].detach()), float(want[k].detach()), rel_tol=1e-6)

# -- batches -----------------------------------------------------------------------------------------------------------------------

def with_images(preds, pick):
    "Predictions whose (B, ...) tensors went through `pick`."
    return Predictions(pick(preds.cls_logits), pick(preds.distances), preds.points, preds.strides, pick(preds.obj_logits))

@pytest.mark.parametrize('name,options', OPTIONS)
def test_batched_equals_one_by_one(name, options):
    "The assignment is equal; losses are sums over images divided by what `divisors` says of the whole batch."
    preds, objects, _, z = case_inputs('empty_in_batch')
    m = build(name, z['n_class'], **options); whole = m(preds, objects, .3)
    parts = [m(with_images(preds, lambda x: x[i:i+1]), Objects.from_targets(z['targets'][i:i+1]), .3) for i in range(preds.n_images)]
    for k in whole.weights: assert torch.equal(torch.cat([p.weights[k] for p in parts]), whole.weights[k]), k
    div = lambda o, k: m.divisors(o.pairs, o.weights['pos'], o.weights['quality'])[k == 'loss_reg']
    for k in whole.losses:
        assert torch.allclose(sum(p.losses[k]*div(p, k) for p in parts), whole.losses[k]*div(whole, k), rtol=1e-12), k

@pytest.mark.parametrize('name,options', OPTIONS)
def test_order_of_objects_and_images(name, options):
    preds, objects, _, z = case_inputs('normal')
    m = build(name, z['n_class'], **options); a = m(preds, objects, .3)
    b = m(preds, Objects.from_targets([dict(boxes=t['boxes'].flip(0), labels=t['labels'].flip(0)) for t in z['targets']]), .3)
    c = m(with_images(preds, lambda x: x.flip(0)), Objects.from_targets(z['targets'][::-1]), .3)
    for k in a.losses:
        for other in (b, c): assert torch.allclose(a.losses[k], other.losses[k], rtol=1e-12)

@pytest.mark.parametrize('name,options', [(STATIC, {}), (STATIC, dict(variant='mmdet')), (CIOU, {})])
def test_an_empty_image_changes_only_the_documented(name, options):
    "It adds background to the class loss and nothing to the others; in mmdetection's variant it also counts as one positive."
    preds, objects, _, z = case_inputs('normal')
    fill = lambda x: -60. if x is preds.cls_logits else 1.                # no class loss of its own
    more = with_images(preds, lambda x: torch.cat([x, torch.full_like(x[:1], fill(x))]))
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    m = build(name, z['n_class'], **options); a, b = m(preds, objects), m(more, Objects.from_targets([*z['targets'], none]))
    n = float(a.weights['pos'].sum()); share = n/(n+1) if options else 1.
    for k in a.losses: assert torch.allclose(b.losses[k], a.losses[k]*(1 if k == 'loss_reg' else share), rtol=1e-6), k
    for k in a.weights: assert torch.equal(a.weights[k], b.weights[k])

# -- gradients and precision -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,options', OPTIONS)
def test_what_each_loss_teaches(name, options):
    "Positives, targets, weights and thresholds come from predicted boxes but carry no gradient."
    preds, objects, leaves, z = case_inputs('normal')
    m = build(name, z['n_class'], **options); out = m(preds, objects, .5)
    assert not any(w.requires_grad for w in out.weights.values())
    joint = m.head.third == 'objectness'
    teaches = dict(loss_cls={'cls_logits', *(['obj_logits'] if joint else [])}, loss_reg={'distances'}, loss_branch={'obj_logits'})
    for k, v in out.losses.items():
        grads = dict(zip(leaves, torch.autograd.grad(v, list(leaves.values()), retain_graph=True, allow_unused=True)))
        assert {n for n, g in grads.items() if g is not None and g.any()} == teaches[k], k

@pytest.mark.parametrize('name,options', OPTIONS)
@pytest.mark.parametrize('case', ('crowded', 'all_empty', 'tiny_only', 'tiny_mixed', 'saturated', 'duplicates_same_class',
                                  'whole_image_exact'))
def test_finite_and_connected(name, options, case):
    preds, objects, leaves, z = case_inputs(case, torch.float32)
    m = build(name, z['n_class'], **options); out = m(preds, objects, .5)
    used = [leaves[k] for k in ('cls_logits', 'distances')] + ([leaves['obj_logits']] if m.head.third else [])
    for g in torch.autograd.grad(out.total, used): assert torch.isfinite(g).all()
    s = m.scores(preds); assert s.shape == preds.cls_logits.shape and m.nms and (s >= 0).all() and (s <= 1).all()
    assert (out.pairs.sum(out.weights['pos']) <= out.pairs.lengths).all()

def test_corners_of_the_inputs():
    "One-pixel boxes, empty boxes, predictions of no size, extreme logits, one cell in the pyramid."
    preds, _, leaves = random_batch(0, (1, 1), (60, 60), dtype=torch.float32)
    boxes = torch.tensor([[12., 12, 13, 13], [11.5, 11.5, 12.5, 12.5], [20, 20, 20, 20], [30, 30, 20, 20], [-500, -500, 600, 600]])
    labels = torch.tensor([0, 1, 2, 0, 1])
    objects = Objects.from_targets([dict(boxes=boxes, labels=labels), dict(boxes=boxes[:0], labels=labels[:0])])
    flat = Predictions(leaves[0]*100, leaves[1]*0, preds.points, preds.strides, leaves[2]*100)
    for name, options in OPTIONS:
        for p in (preds, flat):
            out = build(name, 3, **options)(p, objects, .5)
            for g in torch.autograd.grad(out.total, leaves[:2], retain_graph=True): assert torch.isfinite(g).all(), (name, options)
    one = Predictions.from_maps([torch.zeros(1, 2, 1, 1)], [torch.full((1, 4, 1, 1), 3.)], [torch.zeros(1, 1, 1, 1)], (8,))
    whole = Objects.from_targets([dict(boxes=torch.tensor([[0., 0, 8, 8]]), labels=torch.tensor([1]))])
    for m in (ATSS(2), CombinedIoU(2)): assert m(one, whole).weights['pos'].tolist() == [1.]

@pytest.mark.parametrize('m', (ATSS(3), ATSS(3, third_branch='objectness'), CombinedIoU(3)))
def test_float32_under_autocast(m):
    preds, targets, leaves = random_batch(1, (5, 0), (64, 96), dtype=torch.float32)
    low = Predictions(leaves[0].bfloat16(), leaves[1].bfloat16(), preds.points, preds.strides, leaves[2].bfloat16())
    objects, rounded = Objects.from_targets(targets), with_images(low, lambda x: x.float())
    want = m(rounded, objects)
    with torch.autocast('cpu', torch.bfloat16): out = m(low, objects)
    for k, v in out.losses.items(): assert v.dtype == torch.float32 and torch.equal(v, want.losses[k])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.total, leaves))

# -- options -----------------------------------------------------------------------------------------------------------------------

def test_special_cases_of_the_options():
    preds, objects, _, z = case_inputs('normal'); K = z['n_class']
    same = lambda a, b: all(torch.allclose(a.losses[k], b.losses[k], rtol=1e-12) for k in a.losses)
    for v in ('paper', 'released'):
        assert same(ATSS(K, v)(preds, objects), CombinedIoU(K, v, 'focal', 'centerness', pred_weight=0)(preds, objects))
    for p in (0., .25, 1.):
        moving, fixed = CombinedIoU(K, pred_weight='rising', anchor_weight='falling'), CombinedIoU(K, pred_weight=p, anchor_weight=1-p)
        assert same(moving(preds, objects, p), fixed(preds, objects))
    assert not same(CombinedIoU(K, anchor_weight='falling')(preds, objects, .9), CombinedIoU(K)(preds, objects, .9))
    a, b = CombinedIoU(K, anchor_weight=2., pred_weight=2.)(preds, objects), CombinedIoU(K)(preds, objects)
    assert torch.equal(a.weights['pos'], b.weights['pos'])                        # only the ratio counts

def test_better_predictions_become_positive():
    "What the method is for: of two locations with equal anchors, the one that predicts better."
    sizes = [(8, 8)]; points, steps = grid_points(sizes, (8,), dtype=torch.float64)
    box = torch.tensor([[4., 4, 60, 60]]).double(); exact = torch.cat([points-box[:, :2], box[:, 2:]-points], 1)
    dist = (exact*.5).clamp(min=1)[None].clone(); good = (points == torch.tensor([28., 36])).all(1); dist[0, good] = exact[good]
    preds = Predictions(torch.zeros(1, 64, 1).double(), dist, points, steps, torch.zeros(1, 64).double())
    out = CombinedIoU(1)(preds, Objects.from_targets([dict(boxes=box, labels=torch.tensor([0]))]))
    assert out.pairs.loc[out.weights['pos'] > 0].tolist() == good.nonzero().flatten().tolist()

def test_legacy_widths():
    preds, targets, _ = random_batch(2, (6,), (64, 64)); pairs = nearest_pairs(preds, Objects.from_targets(targets))
    d, t = pairs.distances(preds), pairs.targets
    area = lambda x: (x[:, :2]+x[:, 2:]+1).clamp(min=0).prod(1)
    iou = lambda a, b: (i := area(torch.minimum(a, b)))/(area(a)+area(b)-i)
    assert torch.allclose(predicted_iou(d, t, True), iou(d, t))
    assert torch.allclose(anchor_iou(pairs, 8, True), iou((4*pairs.stride-.5)[:, None].expand(-1, 4), t))

def test_scores():
    preds, *_ = random_batch(4, (1,), (40, 40)); p, o = preds.cls_logits.sigmoid(), preds.obj_logits.sigmoid()[..., None]
    assert torch.allclose(ATSS(3).scores(preds), (p*o).sqrt()) and torch.allclose(ATSS(3, third_branch='objectness').scores(preds), p*o)
    assert torch.allclose(ATSS(3, third_branch=None).scores(preds), p)
    assert torch.allclose(CombinedIoU(3).scores(preds), torch.where(p > .05, (p*o).sqrt(), 0.))
    c = CombinedIoU(3).combine(torch.linspace(0, 1, 101), torch.tensor(.5))
    assert (c.diff() >= 0).all() and (c[:6] == 0).all() and c[7] > 0

@pytest.mark.parametrize('name,options,says', [
    (STATIC, dict(variant='relased'), "'released'"), (STATIC, dict(third_branch='iou'), 'third_branch'), (STATIC, dict(k=0), 'k: 0'),
    (STATIC, dict(anchor_scale=-1), 'anchor_scale'), (CIOU, dict(variant='mmdet'), 'variant'), (CIOU, dict(cls_loss='gfl'), "'qfl'"),
    (CIOU, dict(third_branch='objectness'), 'third_branch'), (CIOU, dict(anchor_weight='up'), 'anchor_weight'),
    (CIOU, dict(pred_weight=-.5), 'pred_weight'), (CIOU, dict(anchor_weight=0, pred_weight=0), 'both 0'), (STATIC, dict(topk=9), 'topk')])
def test_bad_options(name, options, says):
    with pytest.raises(InputError) as e: build(name, 3, **options)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_missing_branch():
    preds, targets, leaves = random_batch(0, (1,), (32, 32)); bare = Predictions(*leaves[:2], preds.points, preds.strides)
    with pytest.raises(InputError, match='obj_logits'): ATSS(3)(bare, Objects.from_targets(targets))
    assert ATSS(3, third_branch=None)(bare, Objects.from_targets(targets)).total.isfinite()

def test_head():
    for m in (ATSS(3), CombinedIoU(3)):
        h = m.head; assert (h.offset, h.cls_prior, h.box_activation) == (.5, .01, 'exp')
        assert math.isclose(math.exp(h.box_bias), 4) and not list(m.parameters())          # starts at its anchors
    assert ATSS(3, 'mmdet').head.offset == 0 and ATSS(3).head.third == 'centerness' and CombinedIoU(3).head.third == 'iou'
