"GFL and GFLV2: the parts of the head, each from its definition; GFLV2's losses by plain formulas over all locations; conversion of its checkpoints. (The contract: test_contract; mmdetection's numbers of GFL: test_convert.)"
import pytest, torch
import torch.nn.functional as F
from ala_nb.detector import Detector, Head, HeadSpec, Level, Plan, load_detector, our_names, save_weights
from ala_nb.geometry import InputError, distance_iou, distance_giou
from ala_nb.gfl import GFL, GFLV2, Distribution, Statistics, bin_mean, dense_gfl, dense_gflv2, distribution_loss, distribution_statistics, joint_quality_focal
from ala_nb.methods import build
from ala_nb.pairs import Objects

def plan(**spec): return Plan(HeadSpec(**spec), 5, 16, 1, (8,))

@pytest.mark.parametrize('n', [2, 7, 16])
def test_distribution_loss_is_two_cross_entropies(n):
    torch.manual_seed(n); z = torch.randn(40, 4*(n+1), dtype=torch.float64); y = torch.rand(40, 4, dtype=torch.float64)*(n+4)-2
    t, flat = y.clamp(0, n-.1).flatten(), z.view(-1, n+1); i = t.long()
    want = (F.cross_entropy(flat, i, reduction='none')*(i+1-t) + F.cross_entropy(flat, i+1, reduction='none')*(t-i)).view(40, 4).mean(1)
    torch.testing.assert_close(distribution_loss(z, y), want)

def test_exact_distances_and_no_pairs():
    z = torch.zeros(1, 68, requires_grad=True)
    for y in (0., 3., 15.9, 1e6, -1e6): assert distribution_loss(z, torch.full((1, 4), y)).isfinite().all()
    assert distribution_loss(z[:0], torch.zeros(0, 4)).shape == (0,) and bin_mean(z[:0]).shape == (0, 4)

@pytest.mark.parametrize('bins', [4, 16])
def test_parts_by_hand(bins):
    at = Level(0, 8., torch.randn(2, 16, 5, 3)); at.where = at.x; p = Distribution(plan(), bins); p.level(at)
    prob = p.box(at.x).view(2, 4, bins+1, 5, 3).softmax(2)
    torch.testing.assert_close(at.distances, 8*sum(i*prob[:, :, i] for i in range(bins+1)))
    s = Statistics(plan(third='quality', third_part='statistics'), topk=3, hidden=8); s.level(at)
    best = prob.sort(2, descending=True)[0][:, :, :3]; numbers = torch.cat([best, best.mean(2, keepdim=True)], 2).reshape(2, 16, 5, 3)
    torch.testing.assert_close(at.third, s.quality(numbers)); torch.testing.assert_close(distribution_statistics(at.extras['bins'], 3), numbers)

def test_level_scale_multiplies_the_logits():
    head = Head(HeadSpec(box='distribution'), 5, 16, 0, (8,)); x = [torch.randn(1, 16, 3, 3)]
    with torch.no_grad(): a = head(x).extras['bins']; head.scales[0] = 2.; b = head(x).extras['bins']
    torch.testing.assert_close(b, 2*a)

def by_table(m, preds, objects):
    "GFLV2's losses with binary_cross_entropy of products over (P, K) tables; positives are given by the method."
    out = m(preds, objects); p = out.pairs; pos = out.weights['pos'] > 0
    score = preds.cls_logits.sigmoid()*preds.obj_logits.sigmoid()[..., None]; target = torch.zeros_like(score)
    i, l, s = p.image[pos], p.loc[pos], p.stride[pos][:, None]
    d, t = preds.distances[i, l]/s, p.targets[pos]/s; iou = distance_iou(d, t).detach()
    target[i, l, p.labels[pos]] = iou
    n = torch.stack([(i == k).sum().clamp(min=1) for k in range(preds.n_images)]).sum()
    w = score.detach().amax(2)[i, l]
    cls = ((target-score)**2*F.binary_cross_entropy(score, target, reduction='none')).sum()/n
    box = 2*(w*(1-distance_giou(d, t))).sum()/w.sum().clamp(min=1)
    z, y = preds.extras['bins'][i, l].view(-1, 17), t.clamp(0, 15.9).flatten(); k = y.long()
    dfl = F.cross_entropy(z, k, reduction='none')*(k+1-y) + F.cross_entropy(z, k+1, reduction='none')*(y-k)
    return out, dict(loss_cls=cls, loss_reg=box, loss_dfl=.25*(w*dfl.view(-1, 4).mean(1)).sum()/w.sum().clamp(min=1))

@pytest.mark.parametrize('pred_weight', [0., 1.])
def test_losses_of_gflv2_by_plain_formulas(pred_weight):
    torch.manual_seed(0); head = Head(GFLV2(5).head, 5, 16, 1, (8, 16, 32)).double()
    torch.nn.init.constant_(head.cls.bias, -1.); torch.nn.init.normal_(head.box.weight, std=.2)
    x = [torch.randn(3, 16, s, s, dtype=torch.float64) for s in (12, 6, 3)]
    boxes = torch.rand(7, 2, dtype=torch.float64)*50; boxes = torch.cat([boxes, boxes+8+torch.rand(7, 2, dtype=torch.float64)*38], 1)
    objects = Objects.from_targets([dict(boxes=boxes[a:b], labels=torch.arange(7)[a:b] % 5) for a, b in ((0, 4), (4, 4), (4, 7))])
    m = GFLV2(5, anchor_scale=4., pred_weight=pred_weight).double(); out, want = by_table(m, head(x), objects)
    assert out.weights['pos'].sum() > 5
    for k, v in want.items(): torch.testing.assert_close(out.losses[k], v, rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(sum(l.values()), list(head.parameters())) for l in (out.losses, by_table(m, head(x), objects)[1])]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)

def test_forms_share_one_reference(): assert dense_gfl is dense_gflv2

def test_joint_score_near_its_ends():
    x = torch.tensor([-90., 0., 90.]).repeat(3).requires_grad_(); o = torch.tensor([-90., 0., 90.]).repeat_interleave(3).requires_grad_()
    for y in (0., .5, 1.):
        loss = joint_quality_focal(x, torch.full((9,), y), o); loss.sum().backward()
        assert loss.isfinite().all() and x.grad.isfinite().all() and o.grad.isfinite().all()

@pytest.mark.parametrize('name,options,says', [('gfl', dict(bins=1), 'bins'), ('gfl', dict(bins=2.5), 'bins'), ('gfl', dict(topk=4), "'topk'"), ('gflv2', dict(pred_weight='raising'), "'rising'"),
    ('gfl', dict(dfl_weight=-1.), 'dfl_weight'), ('gflv2', dict(anchor_weight=0.), 'both 0'), ('gflv2', dict(topk=0), 'topk')])
def test_bad_options(name, options, says):
    with pytest.raises(InputError, match=says): Detector(name, 'tiny', 5, method_options=options)

def test_a_file_of_it_comes_back(tmp_path):
    torch.manual_seed(0); model = Detector('gflv2', 'tiny', 3, method_options=dict(bins=8, topk=2, hidden=12, pred_weight=1.)).eval()
    assert model.head.box.out_channels == 36 and model.head.quality[0].weight.shape == (12, 12, 1, 1) and type(model.method).__name__ == 'GFLV2'
    again = load_detector(save_weights(model, tmp_path/'x.safetensors')); x = [torch.rand(3, 96, 64)]
    with torch.no_grad(): a, b = model.predict_maps(x)[0], again.predict_maps(x)[0]
    assert again.method.options == model.method.options and torch.equal(a.obj_logits, b.obj_logits) and isinstance(build('gfl', 3), GFL)
    torch.testing.assert_close(model.method.scores(a), a.cls_logits.sigmoid()*a.obj_logits.sigmoid()[..., None])

def test_checkpoint_of_the_authors_has_a_place(tmp_path):
    "GFLV2's release has mmdetection's names: `reg_conf` is our `quality`."
    from ala_nb.convert import convert_state
    model = Detector('gflv2', 'resnet18', 3, channels=32, head_convs=1, p7_relu=False, head_options=dict(tower_bias=False))
    theirs = dict(cls='bbox_head.gfl_cls', box='bbox_head.gfl_reg', cls_tower='bbox_head.cls_convs', box_tower='bbox_head.reg_convs')
    state = {'bbox_head.integral.project': torch.arange(17.)}
    for k, v in model.state_dict().items():
        part, *rest = k.split('.')
        if part == 'body': state['backbone.'+'.'.join(rest)] = v
        elif part == 'pyramid':
            kind, i, *end = rest[1:]
            if kind == 'extra_blocks': i, end = str(int(end[0])+3), ['0', *end[1:]]; kind = 'layer_blocks'
            state[f"neck.{dict(inner_blocks='lateral', layer_blocks='fpn')[kind]}_convs.{i}.conv.{end[-1]}"] = v
        elif rest[0] == 'scales': state |= {f'bbox_head.scales.{i}.scale': s for i, s in enumerate(v)}
        elif rest[0].endswith('tower'): state[f"{theirs[rest[0]]}.{int(rest[1])//3}.{'gn' if int(rest[1]) % 3 else 'conv'}.{rest[2]}"] = v
        elif rest[0] == 'quality': state['bbox_head.reg_conf.'+'.'.join(rest[1:])] = v
        else: state[f'{theirs[rest[0]]}.{rest[1]}'] = v
    assert not our_names(state, 'mmdet')[1]
    again, left = convert_state(state, style='pytorch')
    assert not left and again.config['method'] == 'gflv2'
    for k, v in again.state_dict().items(): torch.testing.assert_close(v, model.state_dict()[k])
