"""Writes what every notebook has: a cell that makes it work alone, and 'previous · contents · next' with ways to open it elsewhere.

`python scripts/nav.py` writes them, in the order of the table in nbs/index.ipynb, and drops outputs that only a living kernel could show;
with `--check` it only says which notebooks are out of step (exit code 1). The cells have the ids `alone` and `nav`, and are written again,
not added twice. The repository's address is `git_url` in settings.ini.
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
WIDGET = 'application/vnd.jupyter.widget-view+json'

def settings():
    "What settings.ini says, with its %(names)s filled in."
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def order():
    "Names of the notebooks as the index lists them; those that it forgets come last, by name."
    index = ''.join(''.join(c['source']) for c in json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    listed = [n for n in dict.fromkeys(re.findall(r'^\| \[\w+\]\((\w+)\.ipynb\)', index, re.M)) if (NBS/f'{n}.ipynb').exists()]
    return listed + sorted(p.stem for p in NBS.glob('*.ipynb') if p.stem not in (*listed, 'index') and not p.name.startswith('.'))

def line(names, i, cfg):
    "The text of the last cell."
    parts = [f'← [{names[i-1]}]({names[i-1]}.ipynb)'] if i else []
    parts += ['[contents](index.ipynb)'] + ([f'[{names[i+1]}]({names[i+1]}.ipynb) →'] if i+1 < len(names) else [])
    repo, file = cfg['git_url'].removeprefix('https://github.com/'), f'nbs/{names[i]}.ipynb'
    parts.append(f'run it in [Colab](https://colab.research.google.com/github/{repo}/blob/{cfg["branch"]}/{file}) or '
                 f'[Binder](https://mybinder.org/v2/gh/{repo}/{cfg["branch"]}?urlpath=lab/tree/{file})')
    return ' · '.join(parts)

def alone(cfg):
    "The cell that installs the package where it is not: for a notebook that is opened by itself."
    wanted = f'{cfg["lib_name"]}[notebooks] @ git+{cfg["git_url"]}'
    return ('#| hide\n# Opened alone, as in Colab: fetches the package. In a clone or after `pip install` it does nothing.\n'
            f"import importlib.util\nif not importlib.util.find_spec('{cfg['lib_name']}'): get_ipython().run_line_magic('pip', 'install -q \"{wanted}\"')")

def finished(nb, text, first):
    "The notebook with both cells, and without outputs of widgets."
    cells = [c for c in nb['cells'] if c.get('id') not in ('nav', 'alone')]
    for c in (c for c in cells if c.get('outputs')):
        c['outputs'] = [o for o in c['outputs'] if 'turn-still' not in ''.join(o.get('data', {}).get('text/html', ''))]
        for o in c['outputs']: o.get('data', {}).pop(WIDGET, None)
    nav = dict(cell_type='markdown', id='nav', metadata={}, source=[text])
    setup = dict(cell_type='code', execution_count=None, id='alone', metadata={}, outputs=[], source=first.splitlines(keepends=True))
    return {**nb, 'metadata': {k: v for k,v in nb['metadata'].items() if k != 'widgets'}, 'cells': [cells[0], setup, *cells[1:], nav]}

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--check', action='store_true', help='write nothing')
    check, names, cfg, stale = p.parse_args().check, order(), settings(), []
    for i, n in enumerate(names):
        path = NBS/f'{n}.ipynb'; text = path.read_text(encoding='utf-8')
        new = json.dumps(finished(json.loads(text), line(names, i, cfg), alone(cfg)), ensure_ascii=False, indent=1) + '\n'
        if new != text:
            stale.append(n)
            if not check: path.write_text(new, encoding='utf-8')
    print(f"{len(names)} notebooks, {'out of step' if check else 'written'}: {', '.join(stale) or 'none'}")
    if check and stale: sys.exit(1)

if __name__ == '__main__': main()
