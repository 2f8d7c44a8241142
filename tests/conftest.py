"Fixtures that every test file shares."
import os
# before torch and matplotlib are imported: a few workers, one thread each, no window
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
import json, random
from pathlib import Path
import numpy as np, pytest, torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'golden'
SKIP_FLAGS = 'notest', 'slow'  # tst_flags of settings.ini

def golden_cases():
    "Names of the golden batches, for `pytest.mark.parametrize`."
    return sorted(p.stem.removeprefix('inputs_') for p in GOLDEN.glob('inputs_*.npz'))

def load_golden(name):
    "`tests/golden/<name>.npz` as a dict of arrays."
    with np.load(GOLDEN/f'{name}.npz') as f: return {k: f[k] for k in f.files}

def golden_inputs(case, dtype=torch.float64, device='cpu'):
    """A golden batch as tensors: `points, strides, cls_logits, distances, obj_logits, mu, sigma`, the numbers `height, width, n_class`
    and `targets`, a list of dicts with `boxes` and `labels`."""
    raw = load_golden(f'inputs_{case}')
    out = {k: torch.as_tensor(raw[k]).to(device, dtype) for k in
           ('points', 'strides', 'cls_logits', 'distances', 'obj_logits', 'mu', 'sigma')}
    out.update({k: int(raw[k]) for k in ('height', 'width', 'n_class')})
    out['targets'] = [dict(boxes=torch.as_tensor(raw[f'boxes_{i}']).to(device, dtype).reshape(-1, 4),
                           labels=torch.as_tensor(raw[f'labels_{i}']).to(device, torch.int64).reshape(-1))
                      for i in range(len(raw['cls_logits']))]
    return out

def golden_case(method, case):
    "What `tests/golden/<method>.npz` says of this case, without the prefix; an empty dict if it says nothing."
    return {k.split('/', 1)[1]: v for k, v in load_golden(method).items() if k.startswith(case + '/')}

def probes(name, shape):
    "The four arrays of ±1 that `grad_probe/<name>` was taken with."
    return torch.as_tensor(np.random.default_rng(1000 + len(name)).choice([-1., 1.], (4, *shape)))

@pytest.fixture
def golden(): return load_golden

@pytest.fixture(autouse=True)
def _same_every_time():
    "Every test starts from the same seeds, on one thread."
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    torch.set_num_threads(1)

@pytest.fixture
def rng(): return np.random.default_rng(0)

@pytest.fixture(scope='session')
def root(): return ROOT

def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason='no GPU')
    for item in items:
        if 'cuda' not in item.keywords or torch.cuda.is_available(): continue
        if os.environ.get('ALA_TEST_DEVICE') == 'cpu' and item.path.name == 'test_gpu.py': continue      # to debug it
        item.add_marker(no_gpu)

def pytest_terminal_summary(terminalreporter):
    "Says which notebook cells nbdev_test leaves out, so that nothing is skipped silently."
    left_out = []
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        for flag in SKIP_FLAGS:
            n = sum(any(line.split() == ['#|', flag] for line in src.splitlines()) for src in cells)
            if n: left_out.append(f'{path.stem}: {n} {flag}')
    if left_out: terminalreporter.write_line('notebook cells that nbdev_test leaves out: ' + '; '.join(left_out))
