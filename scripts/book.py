"""The notebooks as a web site: `python scripts/book.py --out _site` writes it, `--check DIR` looks at the links of one.

nbconvert makes the pages; formulas become MathML while they are made, so that no page needs a script or a network for them. The first page is the
microscope, `contents.html` the notebooks' index. Cells marked `hide` are left out. A link to another file of the project goes to the repository
(`git_url` in settings.ini).
"""
import argparse, html, json, re, shutil, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parent))
from nav import NBS, ROOT, order, settings

CSS = '''
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #5a5a66; --line: #d5d5dd; --panel: #f5f5f8; --mark: #0062a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --paper: #17171b; --soft: #a9a9b6; --line: #44444f; --panel: #222228; --mark: #7cc4f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 0 1rem 3rem; background: var(--paper); color: var(--ink); font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.ways { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: .7rem 0; border-bottom: 1px solid var(--line); font-size: 15px; }
a { color: var(--mark); } h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.2rem; } h3 { font-size: 1.1rem; }
.anchor-link { display: none; } blockquote { margin: 0; padding-left: 1rem; border-left: 4px solid var(--line); color: var(--soft); }
pre { font: 13.5px/1.45 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; overflow-x: auto; margin: 0; }
:not(pre) > code { font-size: .87em; background: var(--panel); padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.input pre, .jp-InputArea pre, .text > pre { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; margin: .7rem 0; }
.output pre { padding: 0 .8rem; color: var(--soft); } .output { margin: .7rem 0; overflow-x: auto; } .output img { max-width: 100%; height: auto; background: #fff; }
.text table, .output table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 15px; margin: .8rem 0; } th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
.callout { border: 1px solid var(--line); border-left: 4px solid var(--mark); border-radius: 4px; padding: .2rem .9rem; margin: 1rem 0; overflow-x: auto; }
math { font-size: 1.08em; } math[display="block"] { margin: .8rem 0; max-width: 100%; overflow-x: auto; overflow-y: hidden; } .text img { max-width: 100%; height: auto; }
iframe { max-width: 100%; }
'''

PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<link rel="stylesheet" href="book.css"></head>
<body><nav class="ways" aria-label="site">{ways}</nav><main>
{body}
</main></body></html>
'''

def target(link, name, cfg):
    "Where a link of a notebook leads on the site."
    if re.match(r'[a-z]+:|#', link): return link
    path, _, part = link.partition('#'); path = unquote(path); end = f'#{part}' if part else ''
    if path.endswith('.ipynb') and '/' not in path: return ('contents.html' if path == 'index.ipynb' else path[:-6]+'.html') + end
    if path == '../microscope.html': return 'index.html' + end
    file = (NBS/path).resolve()
    if not file.exists(): raise SystemExit(f'{name}.ipynb: links to {link}, which is not there')
    if file.suffix in ('.png', '.jpg', '.svg'): return path
    return f'{cfg["git_url"]}/{"tree" if file.is_dir() else "blob"}/{cfg["branch"]}/{file.relative_to(ROOT).as_posix()}{end}'

def as_mathml(tex, display):
    "A formula as MathML, which browsers draw by themselves."
    from latex2mathml.converter import convert
    return convert(html.unescape(tex), display=display)

def exporter():
    "nbconvert's, but for its formulas."
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    class Renderer(IPythonRenderer):
        def inline_math(self, body): return as_mathml(body, 'inline')
        def block_math(self, body): return as_mathml(body, 'block')
        def multiline_math(self, text): return as_mathml(text.strip().strip('$'), 'block')
        def latex_environment(self, name, body): return as_mathml(rf'\\begin{{{name}}}{body}\\end{{{name}}}', 'block')
    class Book(HTMLExporter):
        @pass_context
        def markdown2html(self, context, source): return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)
    return Book(template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True)

def prepared(nb, name, cfg):
    "A notebook without hidden cells and directives, its links and boxes as the site needs them."
    cells = []
    for c in nb.cells:
        if c.cell_type == 'code':
            if re.search(r'^#\s*\|\s*(hide|default_exp)\b', c.source, re.M): continue
            c.source = re.sub(r'^#\s*\|.*\n?', '', c.source, flags=re.M)
            for o in c.get('outputs', []): (o.get('data') or {}).pop('application/vnd.jupyter.widget-view+json', None)
            if not c.source.strip() and not c.get('outputs'): continue
        else:
            c.source = re.sub(r'^::: *\{\.callout-\w+\}.*$', '<div class="callout">\n', c.source, flags=re.M)
            c.source = re.sub(r'^::: *$', '\n</div>', c.source, flags=re.M)
            c.source = re.sub(r'(\]\()([^)\s]+)(\))', lambda m: m[1] + target(m[2], name, cfg) + m[3], c.source)
        cells.append(c)
    nb.cells = cells
    return nb

def write(out):
    "The site, into a folder that is emptied first if a site lies in it."
    import nbformat
    from nbconvert.filters.highlight import Highlight2HTML                                # noqa: F401: the pages' code
    from pygments.formatters import HtmlFormatter
    out = Path(out); cfg, names, make = settings(), order(), exporter()
    if out.is_dir() and any(out.iterdir()) and not (out/'book.css').exists(): raise SystemExit(f'{out}: holds something else than a site; name another folder')
    shutil.rmtree(out, ignore_errors=True); out.mkdir(parents=True)
    light, dark = (HtmlFormatter(style=s).get_style_defs('.highlight') for s in ('default', 'github-dark'))
    plain = lambda css: re.sub(r'background(-color)?:[^;}]+;?', '', css)
    (out/'book.css').write_text(f'{CSS}{plain(light)}\n@media (prefers-color-scheme: dark) {{\n{plain(dark)}\n}}\n', encoding='utf-8')
    if (NBS/'images').is_dir(): shutil.copytree(NBS/'images', out/'images')
    for name in ('index', *names):
        nb = prepared(nbformat.read(NBS/f'{name}.ipynb', as_version=4), name, cfg); body, _ = make.from_notebook_node(nb)
        body = re.sub(r'<div class="(?:[^"]*\b)?(?:jp-RenderedMarkdown|text_cell_render)[^"]*"', '<div class="text"', body)
        i = names.index(name) if name in names else -1
        ways = [('index.html', 'microscope'), ('contents.html', 'contents')] + [(f'{names[j]}.html', f'{arrow} {names[j]}') for j, arrow in ((i-1, '←'), (i+1, '→')) if 0 <= j < len(names) and name != 'index']
        title = re.search(r'^# (.+)$', nb.cells[0].source, re.M)
        page = PAGE.replace('{ways}', ' '.join(f'<a href="{u}">{t}</a>' for u, t in ways)).replace('{title}', html.escape(title[1] if title else name)).replace('{body}', body)
        (out/('contents.html' if name == 'index' else f'{name}.html')).write_text(page, encoding='utf-8')
    first = (ROOT/'microscope.html').read_text(encoding='utf-8')
    way = '<p class="intro"><a href="contents.html">The notebooks: contents</a></p>'
    (out/'index.html').write_text(first.replace('<div id="microscope">', f'{way}<div id="microscope">', 1), encoding='utf-8')
    return out

class Page(HTMLParser):
    "Where a page's links go, what it loads, and the names that can be linked to."
    def __init__(self): super().__init__(); self.links, self.loads, self.ids = [], [], set()
    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        elif tag == 'link' and a.get('href'): self.loads.append(a['href'])
        if a.get('src'): self.loads.append(a['src'])

def check(folder):
    "What is wrong with a site: links and pictures that lead nowhere, things that would be fetched from elsewhere."
    pages, wrong = {}, []
    for file in sorted(Path(folder).glob('*.html')): pages[file.name] = Page(); pages[file.name].feed(file.read_text(encoding='utf-8'))
    for name, page in pages.items():
        wrong += [f'{name}: loads {u[:80]} from elsewhere' for u in page.loads if re.match(r'(https?:)?//', u)]
        for u in page.links + [u for u in page.loads if not u.startswith('data:')]:
            if re.match(r'[a-z]+:|//', u): continue
            path, _, part = u.partition('#'); path = unquote(path) or name
            if not (Path(folder)/path).exists(): wrong.append(f'{name}: {u} is not there')
            elif part and path in pages and unquote(part) not in pages[path].ids: wrong.append(f'{name}: {u}: the page has no such place')
    return wrong

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='_site', help='folder of the site [_site]'); p.add_argument('--check', metavar='DIR', help='only check this site')
    a = p.parse_args(); out = Path(a.check) if a.check else write(a.out); wrong = check(out)
    print('\n'.join(wrong) or f'{out}: {len(list(out.glob("*.html")))} pages, every link leads somewhere')
    sys.exit(bool(wrong))

if __name__ == '__main__': main()
