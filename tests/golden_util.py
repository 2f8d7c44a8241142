"""Golden parity: inputs of tests/golden as Predictions and Objects, and the comparison of a method's losses and gradients."""
import os
from unittest import mock
import numpy as np, torch
from conftest import load_golden, golden_inputs, golden_case, probes
from ala_nb.pairs import Predictions, Objects

def case_inputs(case, dtype=torch.float64, as_maps=False):
    "Predictions, Objects, the leaves by name, and the raw inputs of a case."
    z = golden_inputs(case, dtype)
    leaves = {k: z[k].requires_grad_() for k in ('cls_logits', 'distances', 'obj_logits')}
    preds = Predictions(leaves['cls_logits'], leaves['distances'], z['points'], z['strides'], leaves['obj_logits'])
    if as_maps:
        flat, (b, _, k) = preds, leaves['cls_logits'].shape
        maps = lambda x, c: [x[:, a:a+h*w].reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous() for (h, w), a in zip(flat.level_sizes, flat.level_starts)]
        preds = Predictions.from_maps(maps(leaves['cls_logits'], k), maps(leaves['distances'], 4), maps(leaves['obj_logits'][..., None], 1),
                                      flat.level_strides, flat.offset)
    return preds, Objects.from_targets(z['targets']), leaves, z

def golden_cases(file):
    "Cases of a golden file whose result does not depend on how equal distances are ordered."
    g = load_golden(file)
    cases = sorted({k.split('/')[0] for k in g})
    return [c for c in cases if not bool(g.get(f'{c}/tie_sensitive', False))]

def compare(file, case, method, progress=0., dtype=torch.float64, names=None, as_maps=False, params=()):
    """Losses (and gradients of their sum) of `method` on `case` against the golden file; returns the Assignment. In float32 with the kernel, and without.
    `names`: golden loss name -> library's, where they differ. `params`: names of method parameters (mu, sigma) whose gradient is golden too."""
    g, double = golden_case(file, case), dtype == torch.float64
    if not double and os.environ.get('ALA_KERNELS') != '0':
        with mock.patch.dict(os.environ, ALA_KERNELS='0'): compare(file, case, method, progress, dtype, names, as_maps, params)
    preds, objects, leaves, z = case_inputs(case, dtype, as_maps)
    method = method.to(dtype)
    with torch.no_grad():
        for p in params: getattr(method, p).copy_(z[p])
    leaves |= {p: getattr(method, p) for p in params}
    out = method(preds, objects, progress)
    golden_losses = [k for k in g if k.startswith('loss_')]
    assert len(out.losses) == len(golden_losses), (sorted(out.losses), golden_losses)
    no_positive = bool(g.get('no_positive', False))
    for k in golden_losses:
        if no_positive and k == 'loss_reg': continue
        want, got = float(g[k]), float(out.losses[(names or {}).get(k, k)].detach())
        assert abs(got-want) <= (1e-9*max(abs(want), 1e-6) if double else 1e-5*max(abs(want), 1e-3)), (file, case, k, got, want)
    if bool(g.get('values_only', False)): return out
    grads = torch.autograd.grad(sum(out.losses.values()), list(leaves.values()), allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads):
        if f'grad_norm/{name}' not in g or (no_positive and name == 'distances'): continue
        a = (torch.zeros_like(leaf) if grad is None else grad).double()
        assert torch.isfinite(a).all(), (case, name)
        norm, biggest, tol = float(g[f'grad_norm/{name}']), max(float(a.abs().max()), 1e-12), 1e-8 if double else 1e-4
        assert abs(float(a.norm())-norm) <= tol*max(norm, 1e-9), (file, case, name, float(a.norm()), norm)
        if double:
            probe = (probes(name, a.shape)*a).flatten(1).sum(1)
            np.testing.assert_allclose(probe, g[f'grad_probe/{name}'], rtol=0, atol=tol*max(norm, biggest), err_msg=f'{file} {case} {name}')
        full = g.get(f'grad/{name}')
        if full is not None: np.testing.assert_allclose(a, full, rtol=0, atol=(1e-6 if double else 1e-4)*biggest, err_msg=f'{file} {case} {name}')
    return out

def same_record(found, kept):
    "What `official.py` recorded of an official detector, and what ours gives, in float64: the labels exactly, the rest to rounding."
    assert set(found) == set(kept) - {'state'}
    for k, v in found.items():
        want = kept[k]
        assert v.shape == want.shape, k
        if k.startswith('labels'): assert (v == want).all(), k
        else: np.testing.assert_allclose(v, want, rtol=1e-8, atol=1e-9*max(1., float(np.abs(want).max(initial=0.))), err_msg=k)
