"""Writes 'previous · contents · next' at the end of every notebook, in the order of the table in nbs/index.ipynb.

`python scripts/nav.py` writes them; with `--check` it only says which are out of step (exit code 1). The cell has the id `nav`,
and is written again, not added twice.
"""
import argparse, json, re, sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'

def order():
    "Names of the notebooks as the index lists them; those that it forgets come last, by name."
    index = ''.join(''.join(c['source']) for c in json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))['cells'])
    listed = [n for n in dict.fromkeys(re.findall(r'^\| \[\w+\]\((\w+)\.ipynb\)', index, re.M)) if (NBS/f'{n}.ipynb').exists()]
    return listed + sorted(p.stem for p in NBS.glob('*.ipynb') if p.stem not in (*listed, 'index') and not p.name.startswith('.'))

def line(names, i):
    "The text of one cell."
    parts = [f'← [{names[i-1]}]({names[i-1]}.ipynb)'] if i else []
    parts += ['[contents](index.ipynb)'] + ([f'[{names[i+1]}]({names[i+1]}.ipynb) →'] if i+1 < len(names) else [])
    return ' · '.join(parts)

def with_nav(nb, text):
    "The notebook's cells with the navigation last, but before a cell that only exports."
    cells = [c for c in nb['cells'] if c.get('id') != 'nav']
    exports = bool(cells) and 'nbdev_export()' in ''.join(cells[-1]['source'])
    cell = dict(cell_type='markdown', id='nav', metadata={}, source=[text])
    return {**nb, 'cells': cells[:-1] + [cell, cells[-1]] if exports else cells + [cell]}

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0]); p.add_argument('--check', action='store_true', help='write nothing')
    check, names, stale = p.parse_args().check, order(), []
    for i, n in enumerate(names):
        path = NBS/f'{n}.ipynb'; text = path.read_text(encoding='utf-8')
        new = json.dumps(with_nav(json.loads(text), line(names, i)), ensure_ascii=False, indent=1) + '\n'
        if new != text:
            stale.append(n)
            if not check: path.write_text(new, encoding='utf-8')
    print(f"{len(names)} notebooks, {'out of step' if check else 'written'}: {', '.join(stale) or 'none'}")
    if check and stale: sys.exit(1)

if __name__ == '__main__': main()
