"The notebooks as a web site: every link leads somewhere, formulas need no network, the first page is the microscope."
import importlib.util, re, sys
from pathlib import Path
import pytest

pytest.importorskip('latex2mathml', reason='latex2mathml is not installed'); pytest.importorskip('nbconvert', reason='nbconvert is not installed')
ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def book():
    sys.path.insert(0, str(ROOT/'scripts'))                        # it imports its neighbour `nav`
    try:
        spec = importlib.util.spec_from_file_location('book', ROOT/'scripts'/'book.py'); spec.loader.exec_module(mod := importlib.util.module_from_spec(spec))
        yield mod
    finally: sys.path.remove(str(ROOT/'scripts'))

@pytest.fixture(scope='module')
def site(book, tmp_path_factory): return book.write(tmp_path_factory.mktemp('site')/'_site')

def test_every_link_leads_somewhere_and_nothing_is_fetched(book, site): assert not book.check(site)

def test_every_notebook_is_a_page_and_the_microscope_the_first(book, site):
    pages = {p.stem for p in site.glob('*.html')}
    assert pages == {'index', 'contents', *book.order()}
    first = (site/'index.html').read_text(encoding='utf-8')
    assert 'id="microscope"' in first and 'href="contents.html"' in first

def test_formulas_are_mathml_and_hidden_cells_are_not_shown(book, site):
    for name in book.order():
        text = (site/f'{name}.html').read_text(encoding='utf-8')
        said = re.sub(r'<(pre|code|script|style|iframe|math)\b.*?</\1>|<[^>]*>', ' ', text, flags=re.S)
        assert not re.search(r'\$[^$\n]*\\[a-z]+[^$\n]*\$', said), f'{name}: {re.search(r".{30}[$].{40}", said)}'
        assert 'Opened alone' not in text and '#|' not in said and ':::' not in said and 'MathJax' not in text, name
    assert (site/'08_autoassign.html').read_text(encoding='utf-8').count('<math') > 20

def test_what_is_wrong_is_found(book, tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="x">a</h1><a href="b.html">b</a><a href="#x">x</a><a href="#y">y</a><a href="https://b">far</a><img src="https://b/c.png"><img src="c.png">')
    assert [w.split(': ', 1)[1] for w in book.check(tmp_path)] == ['loads https://b/c.png from elsewhere', 'b.html is not there', '#y: the page has no such place', 'c.png is not there']
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(SystemExit, match='something else'): book.write(tmp_path/'mine')
    with pytest.raises(SystemExit, match='not there'): book.target('none.png', '00_geometry', book.settings())
