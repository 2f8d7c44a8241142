"""Exported lines of each notebook (blank lines and directives left out), and the longest exported cell.

python scripts/count_lines.py [notebook ...]
"""
import json, re, sys
from pathlib import Path

def exported(path):
    "Numbers of lines of the exported cells of a notebook."
    cells = [''.join(c['source']) for c in json.loads(Path(path).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    cells = [s for s in cells if re.search(r'^#\|\s*exports?i?\b', s, re.M)]
    return [sum(bool(l.strip()) and not l.startswith('#|') for l in s.splitlines()) for s in cells]

def main():
    root = Path(__file__).resolve().parent.parent/'nbs'
    for path in [Path(a) for a in sys.argv[1:]] or sorted(root.glob('[0-9]*.ipynb')):
        n = exported(path)
        print(f'{path.stem:<20} {sum(n):>5} lines, longest cell {max(n, default=0):>3}')

if __name__ == '__main__': main()
