"ALA against a dense derivation of its equations: image by image, object by object, (P, G) matrices over every location; no pairs, no sums over runs."
import math, random
import pytest, torch
import torch.nn.functional as F
from ala_nb.geometry import distance_giou, distance_iou, grid_points, level_sizes
from ala_nb.methods import build
from ala_nb.pairs import Objects, Predictions

SIZE, STRIDES, C = (64, 96), (8, 16, 32), 5
CROWD = [[8., 6, 60, 50], [30, 20, 90, 60], [31, 20, 91, 61], [28, 22, 70, 58]]
FEW = [[8*j+2., 2, 8*j+6, 22] for j in range(9)] + [[8*j+2., 34, 8*j+6, 46] for j in range(9)]      # three and two locations
BATCHES = dict(   # (boxes, labels) of every image, classes, offset, how the class logits come
    crowd=([(CROWD, [0, 0, 2, 0]), ([], []), ([[0., 0, 96, 64], [-9, 40, 30, 80], [10, 10, 10.5, 10.5]], [1, 1, 0])], 3, .5, 'maps'),       # the last box has no location inside
    single=([(CROWD[:3]+[CROWD[0]], [0]*4), ([[40., 30, 47, 37], [3, 3, 50, 20]], [0, 0])], 1, 0., 'flat'),                                # twins; a box with one location
    plain=([([], []), (CROWD+[[5., 5, 90, 60]], [2, 2, 1, 0, 2])], 3, .5, 'last'),                                                          # without a property map and pooled features
    few=([(FEW, [0, 1, 2]*6)], 3, .5, 'maps'),
    empty=([([], [])]*2, 3, .5, 'maps'))

def batch(name, seed=0):
    "Leaves (class logits, distances, third branch, property logits, pooled features), predictions and targets."
    targets, K, offset, form = BATCHES[name]
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    sizes, B = level_sizes(*SIZE, STRIDES), len(targets); points, strides = grid_points(sizes, STRIDES, offset, dtype=torch.float64)
    targets = [dict(boxes=torch.tensor(b, dtype=torch.float64).reshape(-1, 4), labels=torch.tensor(l).long()) for b, l in targets]
    dist = (r(B, len(points), 4)*.6+2.5).exp()
    for i, t in enumerate(targets):                                       # near the boxes, so that all of IoU's range occurs
        for b in t['boxes']:
            d = torch.cat([points-b[:2], b[2:]-points], 1); m = d.amin(1) > 0
            dist[i, m] = d[m]*(r(int(m.sum()), 4)*.4).exp()
    leaves = [x.requires_grad_() for x in (r(B, len(points), K)*1.5-1, dist, r(B, len(points)), r(B, 2, *sizes[0])*1.5, r(B, len(STRIDES), C))]
    cls, dist, third, prop, pooled = leaves
    extra = dict(property_logits=None, pooled=None) if name == 'plain' else dict(property_logits=prop, pooled=pooled)
    if form == 'flat': return leaves, Predictions(cls, dist, points, strides, third, **extra), targets
    maps = lambda x: [v.unflatten(1, s).permute(0, 3, 1, 2) for v, s in zip(x.split([h*w for h, w in sizes], 1), sizes)]
    return leaves, Predictions.from_maps([v.contiguous(memory_format=torch.channels_last if form == 'last' else torch.contiguous_format) for v in maps(cls)], maps(dist), maps(third[..., None]), STRIDES, offset, **extra), targets

def focal(p): return -.75*p**2*torch.log1p(-p)                            # FL(p, 0)

def coupled(logits, coupling):
    "P_F and P_B (Eq. 1; Eq. 5 as printed has one sigmoid more)."
    p = logits.softmax(0) if coupling == 'softmax' else logits.sigmoid()
    return p.sigmoid() if coupling == 'double_sigmoid' else p

def shape_weights(preds, i, coupling, radius, variance):
    "M⁺ and M⁻ (Eq. 5) where the locations stand: a two-dimensional Gaussian, borders repeated, then bilinear."
    p, t = coupled(preds.property_logits[i], coupling), torch.arange(-radius, radius+1).double()
    kernel = (-(t[:, None]**2+t**2)/(2*variance)).exp()
    p = F.conv2d(F.pad(p[:, None], [radius]*4, mode='replicate'), (kernel/kernel.sum())[None, None])[:, 0]
    at = (preds.points/STRIDES[0]-preds.offset+.5)/torch.tensor(p.shape[:0:-1])*2-1
    return F.grid_sample(p[None], at[None, None], padding_mode='border', align_corners=False)[0, :, 0]

def centre_weight(m, preds, i, boxes, labels, mode, learn, axes):
    "C (Eq. 4), (P, G): offsets in strides, μ and σ of the image, the level and the class; σ by tanh within e^±3."
    d = (preds.points[:, None]-(boxes[:, :2]+boxes[:, 2:])/2)/preds.strides[:, None, None]
    if mode in ('none', 'fixed'): return (-(d**2).sum(-1)/2*(mode == 'fixed')).exp()
    z = m.prior.fc.bias.expand(len(STRIDES), -1)
    if preds.pooled is not None: z = z + (preds.pooled if learn else preds.pooled.detach())[i] @ m.prior.fc.weight.t()
    level = (preds.strides[:, None] == torch.tensor(STRIDES)).long().argmax(1)
    z = z.view(len(STRIDES), -1, 2, axes)[level][:, labels if mode == 'predicted' else labels*0]
    return (-((d-z[..., 0, :])/(3*torch.tanh(z[..., 1, :]/3)).exp()).square().sum(-1)/2).exp()

def graph_label(strategy, q, hard, points, strides):
    "Soft labels of Table XII over the adjacency matrix of one object's locations."
    side = ((points[:, None]-points).abs().sum(-1)-strides[:, None]).abs() < 1e-6
    A = (side & (strides[:, None] == strides)).double(); tiny = torch.finfo(q.dtype).tiny
    if strategy == 'pnlp':                                                                  # (I - S/2)⁻¹ Y
        W = A*(-((q[:, None]-q)/q.std(unbiased=False).clamp(min=tiny)).square()/2).exp(); D = W.sum(1).clamp(min=tiny).rsqrt()
        F_ = torch.linalg.solve(torch.eye(len(q))-.5*D[:, None]*W*D, torch.stack([hard, ~hard & (q < q.mean())], 1).double())
        return F_[:, 0]/F_.sum(1).clamp(min=tiny)
    alone = (q/q.max()).clamp(.001, .999).logit(); x = alone
    for _ in range(60): x = alone+.25*A@(2*x.sigmoid()-1)
    return x.sigmoid()

def reference(m, preds, targets, progress, variant='working', property='ipb', coupling=None, alpha=.8, beta=.6, confidence='mul', loc=None, lam=5., parts='both', confidence_parts='both',
              centre='predicted', isotropic=False, blur_radius=3, blur_variance=2., threshold='statistics', width=1., xi=None, at_least_one=None, strategy='ps3', losses='HSN', without_soft='negative', one_to_one=False, negatives='class', inner='full',
              background_weight=.3, centre_gradient=None):
    paper, n = variant == 'paper', max(sum(len(t['labels']) for t in targets), 1)
    coupling, loc = coupling or ('double_sigmoid' if paper else 'softmax'), loc or ('printed' if paper else 'exp')
    beta, learn, at_least_one = dict(both=beta, cls=1., loc=0.)[confidence_parts], paper if centre_gradient is None else centre_gradient, not paper if at_least_one is None else at_least_one
    mapped = property == 'ipb' and preds.property_logits is not None
    hard_sum = soft_sum = neg_sum = map_sum = ctr_sum = preds.cls_logits.sum()*0
    for i, t in enumerate(targets):
        boxes, labels, cls = t['boxes'], t['labels'], preds.cls_logits[i].sigmoid()
        side = torch.cat([preds.points[:, None]-boxes[:, :2], boxes[:, 2:]-preds.points[:, None]], -1); inside = side.amin(-1) > 0
        plus = minus = None
        if property == 'impobj': plus = preds.obj_logits[i].sigmoid(); minus = 1-plus
        if mapped: plus, minus = shape_weights(preds, i, coupling, blur_radius, blur_variance)
        # Eqs. 2 - 7
        iou = (distance_giou if loc == 'exp_giou' else distance_iou)(preds.distances[i][:, None], side); s = torch.ones_like(iou)
        p_loc = (-iou.clamp(min=1e-6)**alpha).exp() if loc == 'printed' else iou.clamp(min=1e-6)**alpha if loc == 'power' else (-lam*(1-iou).clamp(min=1e-6)**alpha).exp()
        if parts != 'weight': s = s*(cls[:, labels]**beta*p_loc**(1-beta) if confidence == 'mul' else beta*cls[:, labels]+(1-beta)*p_loc)
        if parts != 'confidence': s = s*centre_weight(m, preds, i, boxes, labels, centre, learn, 1 if isotropic else 2)*(1. if plus is None else plus[:, None])
        s = s.clamp(min=math.exp(-100))
        # Alg. 1, Eqs. 8 - 11
        joint = plus if property == 'impobj' or negatives == 'joint' else None
        cost = focal(cls if joint is None else cls*joint[:, None])*(minus.detach()[:, None] if negatives == 'weight' and minus is not None else 1.)
        keep, covered = torch.zeros_like(cls), torch.zeros_like(cls, dtype=torch.bool)
        for g, k in enumerate(labels.tolist()):
            at = inside[:, g].nonzero().flatten()
            if not len(at): continue
            v = s[at, g]; q = v.detach(); mean, dev, top = q.mean(), q.std(unbiased=False)*width, q.max()
            upper, none = mean+dev if threshold == 'statistics' else 0 if threshold is None else threshold*top, torch.zeros(len(at), dtype=torch.bool)
            hard = (q >= upper-1e-5*mean) | ((q == top) & at_least_one)                     # rounding does not decide about the two of a pair at m ± v
            soft = ~hard & (q >= mean-dev-1e-5*mean)
            if 'S' not in losses and without_soft != 'silent': hard, soft = hard | (soft if without_soft == 'positive' else none), none      # Table XI: two parts
            if one_to_one: hard, soft = none.index_fill(0, q.argmax(), True), none
            low, degree = ~hard & ~soft, torch.full_like(q, xi) if xi is not None else q/top*(1+math.cos(math.pi*progress))/2
            if strategy != 'ps3': degree = graph_label(strategy, q, hard, preds.points[at], preds.strides[at])
            if property == 'centerness':
                l, u, r, b = side[at, g][hard].unbind(1); y = (torch.minimum(l, r)/torch.maximum(l, r)*torch.minimum(u, b)/torch.maximum(u, b)).sqrt()
                p = preds.obj_logits[i, at][hard].sigmoid(); ctr_sum = ctr_sum-(y*p.log()+(1-y)*(1-p).log()).sum()/max(int(hard.sum()), 1)
            covered[at, k] = True; log_not = torch.log1p(-v.clamp(max=1-1e-6))
            if paper:
                if 'H' in losses: hard_sum = hard_sum-v[hard].log().sum()
                if 'S' in losses: soft_sum = soft_sum-(degree*v.log()+(1-degree)*log_not)[soft].sum()
                if 'N' in losses: neg_sum = neg_sum-.75*(v**2*log_not)[low].sum()
                continue
            if 'H' in losses: hard_sum = hard_sum-v[hard].log().mean() if hard.any() else hard_sum
            if 'S' in losses: soft_sum = soft_sum-(degree*v.log())[soft].mean() if soft.any() else soft_sum
            share = torch.where(soft, 1-degree if 'S' in losses else torch.zeros_like(q), low.double())*cost[at, k]     # a set without a loss of its own is not negative either
            if inner == 'mean': neg_sum = neg_sum+sum(share[x].mean() for x in ((low, soft) if 'N' in losses else (soft,)) if x.any())
            elif 'N' not in losses: neg_sum = neg_sum+share[soft].sum()
            else: keep[at, k] = torch.maximum(keep[at, k], torch.where(hard, 1., torch.where(soft, degree if 'S' in losses else torch.ones_like(q), 0.)))
        if 'N' in losses:
            weight = torch.ones_like(cls[:, :1])*(1. if minus is None else minus[:, None])                     # Eq. 7; Table III keeps one of the two
            if paper and not (parts == 'weight' and minus is None): neg_sum = neg_sum+focal(cls if parts == 'confidence' else weight.expand_as(cls) if parts == 'weight' else cls*weight)[~covered].sum()
            if not paper: neg_sum = neg_sum+(cost*(~covered if inner == 'mean' else 1-keep)).sum()
        if mapped and not paper and negatives == 'class':                                          # the map itself: before Eq. 5's second sigmoid and the blur
            fg = coupled(preds.property_logits[i], 'softmax' if coupling == 'softmax' else 'sigmoid')[0].flatten()
            map_sum = map_sum+background_weight*focal(fg)[~inside[:fg.numel()].any(1)].sum()
    out = dict(loss_hard=hard_sum, loss_soft=soft_sum, loss_neg=neg_sum)
    if mapped and not paper and negatives == 'class': out['loss_property'] = map_sum
    if property == 'centerness': out['loss_centerness'] = ctr_sum
    return {k: v/n for k, v in out.items()}

def against_reference(name, options, progress=.3, seed=0):
    leaves, preds, targets = batch(name, seed); m = build('ala', preds.n_classes, in_channels=C, **options).double()
    if options.get('centre', 'predicted') in ('predicted', 'shared'):
        torch.nn.init.normal_(m.prior.fc.weight, std=.2); torch.nn.init.normal_(m.prior.fc.bias, std=.3)
    out, want = m(preds, Objects.from_targets(targets), progress), reference(m, preds, targets, progress, **options)
    assert out.losses.keys() == want.keys()
    for k in want: torch.testing.assert_close(out.losses[k], want[k], rtol=1e-9, atol=1e-13, msg=lambda s: f'{name} {options} {k}: {s}')
    slopes = [torch.autograd.grad(sum((1+.3*j)*losses[k] for j, k in enumerate(want)), [*leaves, *m.parameters()], allow_unused=True) for losses in (out.losses, want)]
    for x, a, b in zip(['class', 'distances', 'third', 'property', 'pooled', 'weight', 'bias'], *slopes):   # none and zero are the same
        if a is None or b is None: assert not any(v.any() for v in (a, b) if v is not None), f'{name} {options}: {x}'
        else: assert (a-b).abs().max() <= 1e-8*b.abs().max(), f'{name} {options}: {x} {(a-b).abs().max():.1e} of {b.abs().max():.1e}'
    return out

VARIANTS = 'working', 'paper'
VALUES = dict(property=['ipb', 'impobj', 'centerness', 'none'], coupling=['softmax', 'sigmoid', 'double_sigmoid'], alpha=[.3, 1.4], beta=[.2, .9], confidence=['add'], loc=['exp', 'exp_giou', 'power', 'printed'],
              lam=[2.], parts=['confidence', 'weight'], confidence_parts=['cls', 'loc'], centre=['shared', 'fixed', 'none'], blur_radius=[0, 1, 9], blur_variance=[.5], threshold=[.3, .7, 1, None], width=[.5, 2.],
              xi=[0., .6, 1.], losses=['HS', 'HN', 'SN', 'H', 'S', 'N'], strategy=['pnlp', 'latent'], without_soft=['positive', 'silent'], one_to_one=[True], isotropic=[True], at_least_one=[True, False], negatives=['joint', 'weight'], inner=['mean'], background_weight=[0., 1.], centre_gradient=[True, False])
SWITCHES = [dict()] + [{k: v} for k, values in VALUES.items() for v in values] + [dict(losses=x, without_soft=w) for x in ('HN', 'H', 'N') for w in VALUES['without_soft']]

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('options', SWITCHES, ids=str)
def test_every_switch(variant, options):
    for name in BATCHES: against_reference(name, dict(options, variant=variant))

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('progress', (0., .7, 1.))
def test_the_soft_label_over_training(variant, progress):
    for seed in range(1, 5): against_reference('crowd', dict(variant=variant), progress, seed)

@pytest.mark.parametrize('seed', range(100))
def test_switches_together(seed):
    r = random.Random(seed); options = {k: r.choice(VALUES[k]) for k in r.sample(sorted(VALUES), r.randint(2, 6))}
    if 'strategy' in options: options.pop('xi', None)                       # refused together
    against_reference(r.choice(['crowd', 'crowd', 'single', 'plain']), dict(options, variant=r.choice(VARIANTS)), r.random(), seed)

@pytest.mark.parametrize('losses', ('HS', 'S'))
def test_mean_of_the_soft_negatives_alone(losses): against_reference('crowd', dict(losses=losses, inner='mean'))

@pytest.mark.parametrize('variant', VARIANTS)
def test_the_batches_hold_every_set(variant):
    "Hard, soft and low pairs, locations that several objects of a class want, objects without a location, and without a hard pair unless there must be one."
    out = against_reference('crowd', dict(variant=variant)); w, p = out.weights, out.pairs
    assert all(v.sum() > 3 for v in (w['hard'], w['soft'], 1-w['hard']-w['soft'])) and not p.best_of_class(w['pos']).all() and (p.lengths == 0).any()
    few = [against_reference('few', dict(variant=variant, at_least_one=x)) for x in (True, False)]
    assert [bool((x.pairs.sum(x.weights['hard']) > 0).all()) for x in few] == [True, False]
