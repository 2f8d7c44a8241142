"The microscope in a real browser: it computes the loss's weights, every control does something, nothing is fetched and nothing complains."
import os, shutil
from pathlib import Path
import numpy as np, pytest
from ala_nb import microscope as M, snapshots as S

api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
BROWSER = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
IMAGES, MOMENTS = (0, 3), (0, -1)

@pytest.fixture(scope='module')
def browser():
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return M.write_page(tmp_path_factory.mktemp('page')/'all.html', M.page(M.snapshot_data(images=IMAGES, moments=MOMENTS)))

def test_the_committed_page_is_up_to_date():
    page = Path(__file__).parent.parent/'microscope.html'
    for name in ('microscope.js', 'microscope.css'):
        assert (S.FOLDER/name).read_text(encoding='utf-8') in page.read_text(encoding='utf-8'), 'run: python -m ala_nb.microscope --out microscope.html'
    assert page.stat().st_size < M.LIMIT

def opened(browser, file, width=1366, height=768, scheme='light'):
    "A page without a network; what it said and asked for is in `said`."
    context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme, offline=True)
    page = context.new_page(); page.said = []
    page.on('console', lambda m: page.said.append(m.text)); page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('request', lambda r: None if r.url.startswith(('file:', 'data:')) else page.said.append(f'asked for {r.url}'))
    page.goto(file.as_uri())
    return page

@pytest.fixture
def page(browser, file, request):
    p = opened(browser, file); before = request.session.testsfailed
    yield p
    if (folder := os.environ.get('SCREENSHOTS')) and request.session.testsfailed > before: p.screenshot(path=f'{folder}/{request.node.name}.png', full_page=True)
    said = p.said; p.context.close()
    assert not said

def picture(page): return page.evaluate("document.querySelector('.pictures').innerHTML + document.querySelector('.bars').innerHTML + document.querySelector('.sentence').textContent")
def choose(page, method, moment=1): page.evaluate(f"microscope.method = {S.names().index(method)}; microscope.moment = {moment}; microscope.draw()")

@pytest.mark.parametrize('name', S.names())
def test_the_page_computes_the_weights_of_the_loss(page, name):
    k = S.names().index(name)
    for t, moment in enumerate(MOMENTS):
        s = S.load(name, moment); out = M.explained(s.method, s.preds, s.objects, s.progress)
        for i, image in enumerate(IMAGES):
            mine = (out.pairs.image == image).numpy()
            got = page.evaluate(f"(() => {{ const n = microscope.data.names({k}, {t}, {i}); return {{pos: Array.from(n.pos), neg: Array.from(n.neg)}}; }})()")
            for w in ('pos', 'neg'): np.testing.assert_allclose(got[w], out.weights[w].double().numpy()[mine], rtol=2e-4, atol=2e-5, err_msg=f'{w} at moment {t} of image {image}')

def test_objects_are_called_alike_in_page_and_notebook(page):
    said = page.evaluate("[...document.querySelectorAll('#object option')].map(x => x.textContent)")
    assert said == [k.split(': ')[1] for k, (image, _) in S.things().items() if image in IMAGES]      # 74.5 px is 75 in both
    s = S.load('fcos'); boxes = [o['box'] for i, x in enumerate(s.images) for o in M.image_data('', x, s.preds, i, s.objects)['objects']]
    said = page.evaluate('boxes => boxes.map(b => `${(b[2]-b[0]).toFixed(0)} × ${(b[3]-b[1]).toFixed(0)} px`)', boxes)
    assert said == [k.split(', ')[-1] for k in S.things()]

def test_matching_and_language_agree_with_numpy(page):
    from formulas import language
    g = np.random.default_rng(0)
    for n, per, locations in ((1, 1, 1), (4, 6, 9), (6, 3, 4)):
        obj = np.repeat(np.arange(n), per)[:n*min(per, locations)]; loc = np.concatenate([g.permutation(locations)[:min(per, locations)] for _ in range(n)])
        obj = np.repeat(np.arange(n), min(per, locations)); x = g.random(len(obj))
        f = language(obj, loc, np.zeros(len(obj), int)) | dict(x=x)
        for text in ('match(x)', 'wins(x)', 'rank(x)', 'share(x) + std(x, 1)*mean(x) - best(x)/(1 + least(x))', 'where((x > .5) | (x <= .1), -x**2*3, to_best(x)) & (x < .9)', '2**-x - total(x)', 'min(exp(-x), .5)*max(sqrt(x), log(1 + x))'):
            if '&' in text: text = text.replace(' & (x < .9)', '')
            bags = [[int(np.flatnonzero(obj == b)[0]), int(np.flatnonzero(obj == b)[-1])+1] for b in np.unique(obj)]
            got = page.evaluate('([text, x, obj, loc, bags]) => Array.from(evaluate(parse(text), {x: Float64Array.from(x)}, {obj, loc, bags}))', [text, x.tolist(), obj.tolist(), loc.tolist(), bags])
            want = eval(text, {'__builtins__': {}}, f)
            if text.startswith('match'): np.testing.assert_allclose(np.dot(got, x), np.dot(want, x), err_msg=text); assert sum(got) == want.sum()
            else: np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=text)

def test_every_control_by_keyboard_changes_the_picture_or_is_disabled(page):
    for method in S.names():
        choose(page, method); page.evaluate("document.querySelector('#turn').open = true; microscope.draw()")
        for name in page.evaluate("[...document.querySelectorAll('input[type=range]')].map(x => x.id)"):
            if not page.is_enabled(f'#{name}'): assert page.evaluate("id => document.getElementById(id).closest('label')?.textContent.includes('moves no weight') || document.getElementById(id).title", name); continue
            seen = set()
            for key in ('Home', 'End'):
                page.focus(f'#{name}'); page.keyboard.press(key); seen.add(picture(page))
            assert len(seen) == 2, f'{method}: {name}'
            if name.startswith('knob'): page.click('#reset')
    for menu in ('object', 'method', 'level', 'second'):
        seen = set()
        for key in ('Home', 'End'):
            page.focus(f'#{menu}'); page.keyboard.press(key); seen.add(picture(page))
        assert len(seen) == 2, menu

def test_at_most_five_controls_in_sight(page):
    visible = [c for c in page.query_selector_all('.control') if c.is_visible()]
    assert len(visible) == 5 and page.query_selector('#knob-beta') is None or not page.query_selector('#knob-beta').is_visible()

def test_threshold_is_dragged_and_moved_by_keys(page):
    choose(page, 'ala'); positives = lambda: page.evaluate("document.querySelectorAll('#picture .disc').length")
    before = positives()
    page.focus('#threshold'); page.keyboard.press('End'); top = positives()
    page.keyboard.press('Home'); bottom = positives()
    assert top < before < bottom and page.evaluate("document.activeElement.id") == 'threshold'
    page.click('#back'); assert positives() == before
    box = page.query_selector('.threshold .grip').bounding_box(); bars = page.query_selector('.bars svg').bounding_box()
    page.mouse.move(box['x']+50, box['y']+box['height']/2); page.mouse.down(); page.mouse.move(box['x']+50, bars['y']+4, steps=4); page.mouse.up()
    assert positives() < before

def test_hover_and_arrows_tell_the_sum(page):
    choose(page, 'ala'); ring = page.query_selector_all('#picture .ring')[-1]; ring.hover()
    said = page.inner_text('#sentence'); assert said.startswith('This location') and 'IoU' in said and 'threshold' in said
    page.focus('#picture'); page.keyboard.press('ArrowUp'); assert page.inner_text('#sentence') != said
    assert page.query_selector_all('.bar.looked') and float(page.get_attribute('.here', 'r')) > 0 and float(page.get_attribute('.predicted', 'width')) > 0
    sums = page.evaluate("[...document.querySelectorAll('.lines p')].map(p => p.textContent)")
    assert any(s.startswith('quality = ') for s in sums)

def test_click_chooses_an_object(page):
    choose(page, 'fcos'); before = page.input_value('#object')
    page.evaluate("microscope.image = 1; microscope.obj = 0; microscope.draw()"); svg = page.query_selector('#picture')
    x, y = page.evaluate("(() => { const [a, b] = [microscope.data.images[1].objects[1].box, document.querySelector('#picture').getScreenCTM()]; return [b.a*(a[0]+1)+b.e, b.d*(a[1]+1)+b.f]; })()")
    inside = svg.bounding_box()
    if inside['x'] < x < inside['x']+inside['width'] and inside['y'] < y < inside['y']+inside['height']:
        page.mouse.click(x, y); assert page.input_value('#object') not in (before, '1 0')

def test_the_scrubber_plays(page):
    page.clock.install(); choose(page, 'autoassign'); page.click('#play')
    assert page.evaluate('microscope.moment') == 0 and page.inner_text('#play') == 'Pause'
    first = picture(page); page.clock.run_for(1000); assert page.evaluate('microscope.moment') == 1 and picture(page) != first
    page.clock.run_for(1000); assert page.inner_text('#play') == 'Play'

def test_a_second_method_and_what_was_won(page):
    choose(page, 'fcos'); page.select_option('#second', str(S.names().index('ala')))
    captions = [c.inner_text() for c in page.query_selector_all('.pictures figcaption')]
    assert len(captions) == 3 and 'won' in captions[2]
    w = page.evaluate(f"(() => {{ const M = microscope, other = M.computed({S.names().index('ala')}).pos; return M.mine({S.names().index('ala')}).reduce((a, e) => a+other[e], 0)-M.mine().reduce((a, e) => a+M.names.pos[e], 0); }})()")
    won, lost = (float(captions[2].split(f'{k} ')[1].split()[0]) for k in ('won', 'lost')); assert abs(won-lost-w) < .6

@pytest.mark.parametrize('width,height,scheme', [(390, 844, 'dark'), (1366, 768, 'dark'), (1920, 1080, 'light')])
def test_it_fits_any_screen(browser, file, width, height, scheme):
    p = opened(browser, file, width, height, scheme)
    for second in (-1, 0):
        p.evaluate(f"microscope.second = {second}; microscope.draw()")
        assert p.evaluate('document.documentElement.scrollWidth') <= width
        if width > 1000 and second < 0: assert p.query_selector('#picture').bounding_box()['width'] >= 500
    assert p.evaluate("getComputedStyle(document.body).backgroundColor") == ('rgb(23, 23, 27)' if scheme == 'dark' else 'rgb(255, 255, 255)')
    print('redraw', p.evaluate('microscope.took'), 'ms'); assert not p.said; p.context.close()

def test_hostile_names_stay_text(browser, tmp_path):
    evil = '</script><img src=x onerror="document.title=1"><script>alert(1)</script>'
    data = M.snapshot_data(['fcos', 'ala'], images=(0,), moments=(-1,))
    data['classes'] = [evil]*8; data['images'][0]['name'] = evil; data['methods'][0]['name'] = evil; data['methods'][0]['moments'][0]['label'] = evil
    p = opened(browser, M.write_page(tmp_path/'evil.html', M.page(data, title=evil, intro=evil)))
    p.evaluate("microscope.second = 1; microscope.method = 0; microscope.draw()")
    assert p.title() == evil and not p.query_selector_all('img') and evil in p.inner_text('figcaption') and not p.said
    p.context.close()

def test_a_method_without_factors_and_an_object_without_candidates(browser, tmp_path):
    import torch
    from ala_nb.methods import Assignment
    from ala_nb.pairs import Objects
    s = S.load('fcos'); images = S.shown()[0]
    objects = Objects.from_targets([dict(boxes=torch.tensor([[1., 1, 1.5, 1.5], [20, 20, 90, 90]]), labels=torch.tensor([0, 1]))] + [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]*7)
    out = s.method(s.preds, objects, 1.); bare = Assignment({}, out.pairs, dict(pos=out.weights['pos']))
    made = M.method_data('bare', [M.moment_data('now', bare, s.preds)], [0])
    p = opened(browser, M.write_page(tmp_path/'bare.html', M.page(M.page_data([made], [M.image_data('a', images[0], s.preds, 0, objects)], S.shown()[2]))))
    assert 'no candidate' in p.inner_text('.bars') and p.is_disabled('#moment') and p.get_attribute('#moment', 'title')
    p.evaluate("microscope.obj = 1; microscope.draw()"); assert p.query_selector_all('#picture .disc') and not p.said
    p.context.close()

def test_a_location_that_is_no_candidate_has_its_reason(page):
    for method, why in (('fcos', '1.5 strides'), ('o2f', '1.5 strides'), ('atss', 'the 9 locations'), ('ala', 'inside the box')):
        choose(page, method); box = page.query_selector('#picture').bounding_box()
        page.mouse.move(box['x']+4, box['y']+4); said = page.inner_text('#sentence')
        assert 'no candidate of the' in said and why in said and 'outside its box' in said, said
        assert float(page.get_attribute('#picture .here', 'r')) > 0
    choose(page, 'fcos'); page.evaluate("microscope.level = 0; microscope.draw()")
    x, y = page.evaluate("(() => { const [a, b] = [microscope.data.images[microscope.image].objects[microscope.obj].box, document.querySelector('#picture').getScreenCTM()]; return [b.a*(a[0]+2)+b.e, b.d*(a[3]-2)+b.f]; })()")
    page.mouse.move(x, y); assert 'inside its box' in page.inner_text('#sentence')
    page.mouse.move(box['x']-5, box['y']-5); assert page.inner_text('#sentence').startswith('The heaviest')
