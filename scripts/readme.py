"""Makes README.md from nbs/index.ipynb, with nbconvert.

`python scripts/readme.py` writes it; `python scripts/readme.py --check` only says whether it is in step (exit code 1 if not).
nbdev's own nbdev_readme needs Quarto, which no package registry carries.
"""
import argparse, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
hidden = re.compile(r'^#\|\s*(hide|default_exp)\b', re.M)
directive = re.compile(r'^#\|.*\n?', re.M)
# A link or picture that is relative to nbs/ in the notebook is relative to the project in the README.
relative = re.compile(r'(\]\(|src="|href=")(?!https?:|#|/|\.\./|mailto:)')

def readme(notebook):
    "The text of README.md for the notebook at this path."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if c.source.strip() and not (c.cell_type == 'code' and hidden.search(c.source))]
    for c in nb.cells:
        if c.cell_type == 'code': c.source = directive.sub('', c.source)
        else: c.source = relative.sub(r'\1nbs/', c.source).replace('](../', '](')
    # pictures are files that the text refers to; an inline one would need a folder of its own beside README.md
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): raise ValueError(f'{notebook}: an output holds a picture; save it under nbs/images and refer to it')
    text = '\n'.join(line.rstrip() for line in text.splitlines())
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return f'<!-- Made from nbs/{Path(notebook).name} by scripts/readme.py: edit the notebook. -->\n\n{text}'

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit code 1 if README.md is out of step')
    check = parser.parse_args().check
    text, target = readme(root/'nbs'/'index.ipynb'), root/'README.md'
    if check and (not target.exists() or target.read_text(encoding='utf-8') != text):
        sys.exit('README.md is out of step with nbs/index.ipynb: run python scripts/readme.py')
    if not check: target.write_text(text, encoding='utf-8')

if __name__ == '__main__': main()
