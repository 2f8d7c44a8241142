"The project holds together: notebooks, modules, README and package say the same thing."
import ast, importlib.util, io, json, os, re, shutil, subprocess, sys, tokenize, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if not p.name.startswith('.'))
LIB = ROOT/'ala_nb'
MODULES = sorted(p.stem for p in LIB.glob('*.py') if not p.name.startswith('_'))
cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8'); cfg = cfg['DEFAULT']

def notebook(path): return json.loads(path.read_text(encoding='utf-8'))
def code_cells(path): return [(''.join(c['source']), c['outputs']) for c in notebook(path)['cells'] if c['cell_type'] == 'code']
def flags(src): return {line.split('|', 1)[1].split()[0].rstrip(':') for line in src.splitlines() if re.match(r'#\s*\|\s*\w', line)}
def is_export(src): return bool(flags(src) & {'export', 'exports', 'exporti'})
def exports_module(path): return any('default_exp' in flags(src) for src, _ in code_cells(path))
def number(path): return m[1] if (m := re.match(r'(\d\d[a-z]*)_', path.stem)) else None   # '03' < '03b' < '04'

def clean_env(**extra):
    "The environment without what would change how a child process imports or exports."
    return {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH', 'PYTHONSTARTUP')} | extra

def python(code, cwd, **extra):
    "Runs `code` in a new interpreter, returns what it printed."
    run = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=clean_env(**extra), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout

def copy_project(to):
    "The files that a clone has, without what tools leave in the working tree."
    ignore = shutil.ignore_patterns('.git', '.venv*', 'venv', 'env', 'build', 'dist', 'runs', 'out', '*.egg-info', '__pycache__',
                                    '.ipynb_checkpoints', '.pytest_cache', '.hypothesis', 'golden')
    shutil.copytree(ROOT, to, ignore=ignore)
    return to

def differences(here, there):
    "Files by name and content."
    a, b = ({p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob('*') if p.suffix in ('.py', '.ipynb')
             and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts} for d in (here, there))
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


# ---- notebooks and what is made from them

@pytest.fixture(scope='module')
def made_anew(tmp_path_factory):
    "A copy in which nbdev has exported all modules and cleaned all notebooks."
    to = copy_project(tmp_path_factory.mktemp('export')/'ala_nb')
    for p in (to/'ala_nb').glob('*.py'):
        if p.name != '__init__.py': p.unlink()
    python('from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()', to)
    return to

def test_modules_are_what_the_notebooks_export(made_anew):
    assert not differences(LIB, made_anew/'ala_nb'), 'run nbdev_export'

def test_notebooks_are_clean(made_anew):
    assert not differences(ROOT/'nbs', made_anew/'nbs'), 'run nbdev_clean'

def test_every_notebook_has_its_navigation_and_its_first_cell():
    nav = load_script('nav'); names, cfg = nav.order(), nav.settings()
    for i, n in enumerate(names):
        nb = notebook(ROOT/'nbs'/f'{n}.ipynb')
        assert nav.finished(nb, nav.line(names, i, cfg), nav.alone(cfg)) == nb, f'{n}: run python scripts/nav.py'

def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/'scripts'/f'{name}.py')
    spec.loader.exec_module(mod := importlib.util.module_from_spec(spec))
    return mod

def test_readme_is_made_from_the_index():
    want = load_script('readme').readme(ROOT/'nbs'/'index.ipynb')
    assert (ROOT/'README.md').read_text(encoding='utf-8') == want, 'run python scripts/readme.py'

def test_readme_script_keeps_links_and_hides_cells(tmp_path):
    md = lambda s: dict(cell_type='markdown', id='a', metadata={}, source=s)
    code = lambda s: dict(cell_type='code', id=f'c{len(s)}', metadata={}, source=s, execution_count=None, outputs=[])
    nb = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[
        md('# T\n\n[a](00_a.ipynb) [b](https://b) ![c](images/c.png) [d](../tests/x.py) [e](#e)\n\n<img src="images/f.png">'),
        code('#| hide\nsecret()'), code('#| eval: true\nshown()')])
    (p := tmp_path/'index.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    got = load_script('readme').readme(p)
    for want in ('[a](nbs/00_a.ipynb)', '[b](https://b)', '![c](nbs/images/c.png)', '[d](tests/x.py)', '[e](#e)'): assert want in got
    assert 'src="nbs/images/f.png"' in got and 'shown()' in got
    assert 'secret' not in got and '#|' not in got

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook_is_executed_and_small(path):
    nb = notebook(path)
    assert nb['metadata'].get('kernelspec', {}).get('language', 'python') == 'python'  # nbdev_test passes over other languages
    assert path.stat().st_size < 1.5e6, f'{path.stat().st_size/1e6:.1f} MB'
    outputs = [o for _, cell_outputs in code_cells(path) for o in cell_outputs]
    assert not [o for o in outputs if o['output_type'] == 'error']
    if code_cells(path): assert outputs, 'never executed'
    if exports_module(path):
        assert any(k.startswith('image/') for o in outputs for k in o.get('data', {})), 'no picture'

DIRECTIVES = set('''default_exp export exports exporti hide hide_input hide_output echo output label code-fold code-summary fig-cap
    fig-alt warning column'''.split()) | set(cfg['tst_flags'].split())

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_nothing_of_a_notebook_is_skipped_silently(path):
    nb = notebook(path)
    assert not re.search(r'^\s*skip_(exec|showdoc)\s*:\s*true', ''.join(nb['cells'][0]['source']), re.M | re.I)
    for src, _ in code_cells(path):
        assert 'eval' not in flags(src), f'use `#| slow`, which can be asked for:\n{src}'
        unknown = flags(src) - DIRECTIVES
        assert not unknown, f'misspelt directive {unknown}'
    assert not (path.parent/'.notest').exists() and not path.name.startswith('_')

is_test = re.compile(r'^\s*(assert\b|test_\w+\(|with expect_fail|ExceptionExpected)', re.M)
EXPORTING = [p for p in NBS if exports_module(p)]

@pytest.fixture(scope='module')
def reached():
    "Names of functions and classes that the notebooks' other cells and the test files use, and those that these use in turn."
    words = lambda text: set(re.findall(r'\w+', text))
    bodies = {}
    for path in LIB.glob('*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            name = getattr(node, 'name', None)
            if name: bodies.setdefault(name, set()).update(words(ast.unparse(node)))
    todo = words('\n'.join(src for p in NBS for src, _ in code_cells(p) if not is_export(src)))
    for path in (ROOT/'tests').glob('test_*.py'):
        if path.name != Path(__file__).name: todo |= words(path.read_text(encoding='utf-8'))
    found = set()
    while todo:
        found |= todo
        todo = set().union(*(bodies.get(name, set()) for name in todo)) - found
    return found

@pytest.mark.parametrize('path', EXPORTING, ids=lambda p: p.stem)
def test_exported_names_are_tested(path, reached):
    "A notebook has tests, and each function and class that it exports is reached by a test of the project."
    cells = [src for src, _ in code_cells(path)]
    assert any(is_test.search(src) for src in cells if not is_export(src)), 'no test'
    defined = [node.name for src in cells if flags(src) & {'export', 'exports'} for node in ast.parse(src).body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')]
    assert not [n for n in defined if n not in reached]

@pytest.mark.parametrize('path', EXPORTING, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    "A cell that needs scrolling is two cells; imports stand in a cell of their own."
    for src, _ in code_cells(path):
        if not is_export(src): continue
        assert src.count('\n') < 100, src[:200]
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(src).body
                 if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))}
        assert kinds != {True, False}, f'imports and code in one cell:\n{src[:200]}'

@pytest.mark.parametrize('path', EXPORTING, ids=lambda p: p.stem)
def test_exported_lines_are_short(path):
    "At most 120 characters, but for what stands inside of a text of several lines."
    for src, _ in code_cells(path):
        if not is_export(src): continue
        texts = {r for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type == tokenize.STRING
                 for r in range(t.start[0], t.end[0]+1) if t.start[0] != t.end[0]}
        assert not [l for r,l in enumerate(src.split('\n'), 1) if len(l) > 120 and r not in texts]

def unasked_sliders(source):
    "Arguments of interact's functions that are not given there: ipywidgets makes sliders of numbers, and takes a tuple for a slider's limits."
    tree = ast.parse('\n'.join('' if l.startswith(('%', '!')) else l for l in source.splitlines()))
    functions = {n.name: n.args for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'interact' and call.args): continue
        f = call.args[0]; args = f.args if isinstance(f, ast.Lambda) else functions.get(getattr(f, 'id', ''))
        if args is None: continue
        plain = lambda v: isinstance(v, (ast.Tuple, ast.List, ast.UnaryOp)) or isinstance(v, ast.Constant) and isinstance(v.value, (int, float)) and not isinstance(v.value, bool)
        defaults = zip(args.args[len(args.args)-len(args.defaults):], args.defaults)
        yield from (a.arg for a,v in defaults if plain(v) and a.arg not in {k.arg for k in call.keywords})

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_widgets_have_the_sliders_that_are_written(path): assert not list(unasked_sliders('\n'.join(s for s,_ in code_cells(path))))

@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_widgets_have_a_still(path):
    "Who has no kernel sees a picture where a widget is; a test does not stand in its cell."
    for src, outputs in code_cells(path):
        if not re.search(r'^(turn|Microscope)\(', src, re.M): continue
        assert any('image/png' in o.get('data', {}) for o in outputs) and not is_test.search(src), src[:200]

def test_unasked_sliders_are_found():
    assert list(unasked_sliders('def f(x=1., size=3, strides=(8,16), mark=None, on=True): pass\ninteract(f, x=2)')) == ['size', 'strides']

absolute = re.compile(r'(?<![\w.:/~<>$}\])])/(?!usr/|dev/|content/)[A-Za-z]+/[\w.-]+|site-packages/')
upward = re.compile(r'(?<![\w./])\.\./\w[\w./-]*\w')
FILES = ['*.md', '*.ini', '*.py', '*.toml', '*.in', 'Makefile', '.ci/*', '.github/*.txt', '.github/workflows/*', 'scripts/*.py',
         'ala_nb/*.py', 'tests/**/*.py', 'tests/**/*.md']

def texts():
    "Every text that goes into the repository, notebooks without their pictures."
    for path in NBS:
        nb = notebook(path)
        for i, c in enumerate(nb['cells']):
            yield path, f'cell {i}', ''.join(c['source'])
            for o in c.get('outputs', []):
                yield path, f'output of cell {i}', ''.join(o.get('text', []))
                for k, v in o.get('data', {}).items():
                    if k.startswith('text/'): yield path, f'output of cell {i}', re.sub(r'base64,[A-Za-z0-9+/=\s\\]+', '', ''.join(v))
    for path in (p for pattern in FILES for p in ROOT.glob(pattern)):
        if path.is_file() and path.name != Path(__file__).name: yield path, '', path.read_text(encoding='utf-8')

def test_no_path_of_a_machine():
    "What is committed names no folder of the machine that it was made on, and nothing outside the project."
    found = [f'{path.name} {where}: {text[max(0, m.start()-40):m.end()+40]!r}' for path, where, text in texts()
             for m in absolute.finditer(text)]
    found += [f'{path.name} {where}: {m[0]}' for path, where, text in texts() for m in upward.finditer(text)
              if path.suffix == '.ipynb' and not (path.parent/m[0]).exists()]
    assert not found, '\n'.join(found)


# ---- modules

def edits(module):
    "The notebook that a module is made from."
    return Path(re.search(r'File to edit: (\S+\.ipynb)', (LIB/f'{module}.py').read_text(encoding='utf-8'))[1])

def imports(tree, inside=False):
    "(module of this package, is it inside a function?) of every import under this node."
    for node in ast.iter_child_nodes(tree):
        lazy = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.ImportFrom):
            name = '.'.join(filter(None, ['ala_nb' if node.level else '', node.module]))
            full = [name] if name != 'ala_nb' else [f'ala_nb.{a.name}' for a in node.names]
            yield from ((f.split('.')[1], lazy) for f in full if f.startswith('ala_nb.'))
        elif isinstance(node, ast.Import):
            yield from ((a.name.split('.')[1], lazy) for a in node.names if a.name.startswith('ala_nb.'))
        else: yield from imports(node, lazy)

METHODS = {'fcos', 'ciou_atss', 'autoassign', 'dw', 'o2f', 'ala'}

@pytest.mark.parametrize('module', MODULES)
def test_imports_run_downhill(module):
    assert (LIB/edits(module)).resolve().exists()
    for other, lazy in imports(ast.parse((LIB/f'{module}.py').read_text(encoding='utf-8'))):
        if not (LIB/f'{other}.py').exists(): continue  # __version__ and the like
        if (module, other) in (('train', 'show'), ('show', 'microscope'), ('train', 'presets')): assert lazy, 'only where it draws or is asked for a preset'
        else: assert number(edits(other)) < number(edits(module)), f'{module} imports {other}'
        assert not {module, other} <= METHODS, f'a method imports no other method: {module}, {other}'

BLOCK = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in BLOCKED: raise ModuleNotFoundError(f'{name} is blocked', name=name)
sys.meta_path.insert(0, Block())
'''
DEV_ONLY = '''nbdev execnb fastgit ghapi IPython ipywidgets ipykernel jupyter_client jupyter_core jupyterlab notebook nbformat nbclient
    nbconvert traitlets pytest setuptools pkg_resources'''.split()
LAZY = ['matplotlib', 'pycocotools', 'faster_coco_eval', 'scipy']

def import_all(modules): return '\n'.join(f'import ala_nb.{m}' for m in modules)

def test_modules_import_without_notebook_tools_and_lazily():
    "Neither nbdev nor Jupyter is needed at run time, and what only some calls need is imported by those calls."
    modules = [m for m in MODULES if m != 'show']
    code = f'BLOCKED = {DEV_ONLY+LAZY}{BLOCK}{import_all(modules)}\n'
    python(code, ROOT)
    if 'show' in MODULES: python(f'BLOCKED = {DEV_ONLY}{BLOCK}import ala_nb.show\n', ROOT)

def test_version():
    assert f'__version__ = "{cfg["version"]}"' in (LIB/'__init__.py').read_text(encoding='utf-8')


# ---- package

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from the source distribution, so that both are known to be complete. Not isolated: that would need a package index."
    tmp = tmp_path_factory.mktemp('wheel')
    src = copy_project(tmp/'src')
    build = 'import setuptools.build_meta as b, sys; print(b.build_{}(sys.argv[1] if len(sys.argv) > 1 else {!r}))'
    sdist = python(build.format('sdist', str(tmp)), src).split()[-1]
    shutil.unpack_archive(tmp/sdist, tmp/'unpacked')
    (unpacked,) = (tmp/'unpacked').iterdir()
    return tmp/python(build.format('wheel', str(tmp)), unpacked).split()[-1]

def test_wheel_holds_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'ala_nb/{m}.py' for m in MODULES} | {'ala_nb/__init__.py', 'ala_nb/_modidx.py', 'ala_nb/py.typed'} <= names
    assert {f'ala_nb/shipped/{p.name}' for p in (LIB/'shipped').iterdir()} <= names
    assert all(n.startswith(('ala_nb/', 'ala_nb-')) for n in names) and any(n.endswith('LICENSE') for n in names)

def test_wheel_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    (meta,) = [z.read(n).decode() for n in z.namelist() if n.endswith('.dist-info/METADATA')]
    needed = [line.split(': ', 1)[1] for line in meta.splitlines() if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert {re.match(r'[\w-]+', r)[0] for r in needed} == {re.match(r'[\w-]+', r)[0] for r in cfg['requirements'].split()}
    assert not {re.match(r'[\w-]+', r)[0] for r in needed} & {'nbdev', 'jupyterlab', 'ipywidgets'}
    want = {f'Version: {cfg["version"]}', f'Requires-Python: >={cfg["min_python"]}', 'Provides-Extra: dev', 'Provides-Extra: notebooks'}
    assert want <= set(meta.splitlines())

def test_wheel_imports_by_itself(wheel, tmp_path):
    "Unpacked elsewhere, it finds all of itself."
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    check = f'import ala_nb, pathlib; assert pathlib.Path(ala_nb.__file__).is_relative_to({str(tmp_path)!r}), ala_nb.__file__\n'
    python(f'BLOCKED = {DEV_ONLY}{BLOCK}{check}{import_all(MODULES)}', tmp_path, PYTHONPATH=str(tmp_path/'site'))

def imports_only(src):
    body = ast.parse(re.sub(r'^[%!].*', '', src, flags=re.M)).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) or isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body)

def test_notebooks_work_alone_with_the_wheel(wheel, tmp_path):
    """In an empty folder, with the built package and no clone: every notebook's first cell and imports run, and the files that it reads are there."""
    zipfile.ZipFile(wheel).extractall(tmp_path/'site'); (tmp_path/'empty').mkdir()
    cells, files = {}, set()
    for path in (p for p in NBS if p.stem != 'index'):
        sources = [src for src, _ in code_cells(path)]
        assert sources[0].startswith('#| hide\n# Opened alone'), path.name
        cells[path.stem] = [sources[0], *filter(imports_only, sources)]
        read = {m for s in sources for m in re.findall(r"""(?<!shipped\()['"]((?:\.\./|nbs/|tests/|results/|images/|scripts/)\w[\w./-]*)['"]""", s)}
        assert not [x for x in read if (ROOT/'nbs'/x).exists()], f'{path.stem} reads {read}: use ala_nb.files.shipped'
        files |= {m for s in sources for m in re.findall(r"shipped\('([^']+)'\)", s) if 'test_fail' not in s.split(f"shipped('{m}')")[0].splitlines()[-1]}
    (tmp_path/'cells.json').write_text(json.dumps(cells), encoding='utf-8')
    python(f"""
BLOCKED = {['nbdev', 'execnb', 'ghapi', 'fastgit', 'pytest', 'nbclient', 'nbconvert', 'playwright', 'setuptools']}{BLOCK}
import json, warnings
warnings.simplefilter('ignore')
import ala_nb, pathlib; assert pathlib.Path(ala_nb.__file__).is_relative_to({str(tmp_path)!r}), ala_nb.__file__
from ala_nb.files import shipped
for f in {sorted(files)}: assert shipped(f).is_relative_to({str(tmp_path)!r}), f
for name, cells in json.load(open({str(tmp_path/'cells.json')!r}, encoding='utf-8')).items():
    names = {{'__name__': '__main__'}}
    for src in cells:
        try: exec(src, names)
        except Exception as e: raise SystemExit(f'{{name}}: {{src[:200]}}: {{e!r}}')
""", tmp_path/'empty', PYTHONPATH=str(tmp_path/'site'), MPLBACKEND='agg')
    assert len(files) > 4 and not list((tmp_path/'empty').iterdir())

def test_a_whole_notebook_works_alone_with_the_wheel(wheel, tmp_path):
    "Top to bottom in an empty folder, pictures and controls too; the kernel knows the built package and no clone."
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    zipfile.ZipFile(wheel).extractall(tmp_path/'site'); (tmp_path/'empty').mkdir()
    nb = nbformat.read(ROOT/'nbs'/'10_o2f.ipynb', 4); nb.cells.append(nbformat.v4.new_code_cell('import ala_nb; print(ala_nb.__file__)'))
    env = dict(os.environ, PYTHONPATH=str(tmp_path/'site'), OMP_NUM_THREADS='1')
    client = nbclient.NotebookClient(nb, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path/'empty'))))
    client.execute(env={k: v for k, v in env.items() if k not in ('IN_TEST', 'MPLBACKEND')})
    assert nb.cells[-1].outputs[0].text.startswith(str(tmp_path)) and not list((tmp_path/'empty').iterdir())
    turned = [c for c in nb.cells if c.cell_type == 'code' and c.source.startswith('turn(')]
    assert len(turned) > 1 and all(any('image/png' in o.get('data', {}) for o in c.outputs) for c in turned)


# ---- README and CI

def commands(): return re.findall(r'^```sh\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)

def test_readme_begins_with_the_two_commands():
    first, second = commands()[:2]
    assert 'venv' in first and 'pip install .' in first and 'ala_nb.train' in first
    assert 'venv' in second and "'.[dev]'" in second and 'nbdev_test' in second and 'pytest' in second
    assert (ROOT/'README.md').read_text(encoding='utf-8').index(second) < 1500

def test_ci_runs_the_readme_command(tmp_path):
    "`.ci/run` takes its command from README.md: with another README it runs another command."
    if not shutil.which('bash'): pytest.skip('no bash')
    (tmp_path/'.ci').mkdir(); shutil.copy(ROOT/'.ci'/'run', tmp_path/'.ci')
    def ci(*blocks):
        (tmp_path/'README.md').write_text('\n'.join(f'```sh\n{b}\n```\n' for b in blocks), encoding='utf-8')
        return subprocess.run(['bash', '.ci/run'], cwd=tmp_path, env=clean_env(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    run = ci('false', 'test ! -e "$VENV"; mkdir "$VENV"; echo "nbdev_test then pytest in $VENV"')
    assert run.returncode == 0, run.stderr
    venv = run.stdout.split()[-1]
    assert venv.endswith('/venv') and not Path(venv).parent.exists()  # removed afterwards
    assert ci('true', 'false && nbdev_test && pytest').returncode != 0
    assert ci('true').returncode == 2  # no test command in it
    assert os.access(ROOT/'.ci'/'run', os.X_OK)

def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    links = set(re.findall(r'\]\(([^)#\s]+)', text)) | set(re.findall(r'src="([^"]+)"', text))
    assert not sorted(l for l in links if not re.match(r'https?:', l) and not (ROOT/l).exists())
    assert not [p.name for p in NBS if p.stem != 'index' and f'(nbs/{p.name})' not in text], 'a notebook is missing from the table'

def test_readme_python_runs():
    "The two snippets, on two small images, one of them without an object."
    import torch
    if not all((LIB/f'{m}.py').exists() for m in ('detector', 'dw', 'ala')): pytest.skip('not all of it is there yet')
    from ala_nb.geometry import grid_points, level_sizes
    K, steps = 80, (8, 16, 32, 64, 128)
    points, strides = grid_points(level_sizes(128, 160, steps), steps)
    P = len(points)
    names = dict(K=K, points=points, strides=strides, images=[torch.rand(3, 128, 160), torch.rand(3, 96, 128)],
                 targets=[dict(boxes=torch.tensor([[10., 12, 70, 90]]), labels=torch.tensor([3])),
                          dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))],
                 cls_logits=torch.randn(2, P, K)-4, distances=torch.rand(2, P, 4)*64, obj_logits=torch.randn(2, P))
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT/'README.md').read_text(encoding='utf-8'), re.M | re.S)
    assert len(blocks) == 2
    for block in blocks: exec(block, names)
    assert sum(names['losses'].values()).isfinite() and names['loss'].isfinite()
    assert [sorted(f) for f in names['found']] == [['boxes', 'labels', 'scores']]*2
    assert all(len(w) == len(names['out'].pairs) for w in names['out'].weights.values())


# ---- golden numbers

def test_golden_files_load_and_are_described():
    from conftest import GOLDEN, golden_case, golden_cases, golden_inputs, load_golden, probes
    text = (GOLDEN/'README.md').read_text(encoding='utf-8')
    methods = sorted(p.stem for p in GOLDEN.glob('*.npz') if not p.name.startswith('inputs_'))
    described = re.sub(r'(\w+)_e0, _e(\d+)', r'\1_e0, \1_e\2', text)
    assert len(golden_cases()) >= 18 and not [m for m in [*golden_cases(), *methods] if not re.search(rf'\b{m}\b', described)]
    for case in golden_cases():
        g = golden_inputs(case)
        B, P, K = g['cls_logits'].shape
        assert K == g['n_class'] and g['distances'].shape == (B, P, 4) and g['points'].shape == (P, 2) and len(g['targets']) == B
        sizes = [(-(-g['height']//s), -(-g['width']//s)) for s in (8, 16, 32, 64, 128)]
        assert sum(h*w for h, w in sizes) == P
        assert all(len(t['boxes']) == len(t['labels']) and (t['labels'] < K).all() for t in g['targets'])
    for method in methods:
        prefixes = {k.split('/')[0] for k in load_golden(method)}
        assert prefixes <= set(golden_cases())
        assert any(k.startswith('loss_') for k in golden_case(method, min(prefixes)))
    assert probes('distances', (2, 3, 4)).shape == (4, 2, 3, 4) and probes('distances', (5,)).abs().eq(1).all()
