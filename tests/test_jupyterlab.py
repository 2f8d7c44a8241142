"Notebooks in a real JupyterLab and a real browser: they run, controls answer to the keyboard, without a kernel there is a still, nothing complains."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytest.importorskip('jupyterlab', reason='JupyterLab is not installed'); pytest.importorskip('ipywidgets', reason='ipywidgets is not installed')
ROOT = Path(__file__).resolve().parent.parent
BROWSER = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
NOTEBOOKS = '23_microscope', '02_losses'
PATIENCE = 120_000  # ms: a busy machine is slow, not wrong

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of its own, with settings, keys and kernels of its own: its address and its folder."
    tmp = tmp_path_factory.mktemp('lab'); folder = tmp/'books'; folder.mkdir()
    for n in NOTEBOOKS: shutil.copy(ROOT/'nbs'/f'{n}.ipynb', folder)
    whole = tmp/'settings'/'@jupyterlab'/'notebook-extension'; whole.mkdir(parents=True)
    (whole/'tracker.jupyterlab-settings').write_text('{"windowingMode": "none"}')            # cells out of sight are drawn too
    quiet = tmp/'settings'/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, PYTHONPATH=str(ROOT), JUPYTERLAB_SETTINGS_DIR=str(tmp/'settings'), JUPYTER_CONFIG_DIR=str(tmp/'config'), JUPYTER_DATA_DIR=str(tmp/'data'),
               JUPYTER_RUNTIME_DIR=str(tmp/'runtime'), OMP_NUM_THREADS='1')
    env = {k: v for k, v in env.items() if k not in ('IN_TEST', 'MPLBACKEND')}
    with open(tmp/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root', f'--ServerApp.root_dir={folder}',
                                   '--IdentityProvider.token=t', '--LabApp.expose_app_in_browser=True'], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp/'log').read_text()
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token=t', timeout=5); break
            except OSError: time.sleep(.5)
        yield f'http://127.0.0.1:{port}', folder, env
    finally: server.terminate(); server.wait(60)

@pytest.fixture
def page(lab):
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox']); page = browser.new_page(viewport=dict(width=1366, height=768))
        page.set_default_timeout(PATIENCE); page.said = []
        page.on('console', lambda m: page.said.append(m.text) if m.type == 'error' else None); page.on('pageerror', lambda e: page.said.append(str(e)))
        yield page
        if folder := os.environ.get('SCREENSHOTS'): page.screenshot(path=f'{folder}/jupyterlab-{time.time():.0f}.png')
        browser.close()

def opened(page, lab, name):
    "A notebook, not run: every widget has a still, and only that is seen."
    page.goto(f'{lab[0]}/lab/tree/{name}.ipynb?token=t&reset'); page.wait_for_selector('.jp-Notebook .jp-CodeCell .jp-OutputArea-output', state='attached')
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')              # a widget is asked for when the kernel is there
    text = page.inner_text('.jp-Notebook'); assert 'interactive(' not in text and 'Error displaying widget' not in text
    cells = json.loads((lab[1]/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    for i in (i for i, c in enumerate(cells) if c['cell_type'] == 'code' and ''.join(c['source']).startswith(('turn(', 'Microscope('))):
        seen = page.locator('.jp-Notebook .jp-Cell').nth(i).locator('.jp-OutputArea-output img:visible'); api.expect(seen, ''.join(cells[i]['source'])).to_have_count(1, timeout=PATIENCE)
        assert seen.bounding_box()['width'] > 200, ''.join(cells[i]['source'])

def ran(page):
    "Every cell run, without an error."
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')              # without a kernel nothing would be run, and nothing said
    # nor as long as the notebook is not the one in front: the command would do nothing
    page.wait_for_function("""jupyterapp.commands.isEnabled('notebook:run-all-cells')
        && jupyterapp.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'""")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    assert not page.evaluate("[...document.querySelectorAll('[data-mime-type=\"application/vnd.jupyter.error\"], [data-mime-type=\"application/vnd.jupyter.stderr\"]')].map(x => x.textContent)")
    assert page.evaluate("[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].filter(x => /\\d/.test(x.textContent)).length") > 3

def test_the_microscope_runs_and_moves(page, lab):
    opened(page, lab, '23_microscope'); ran(page)
    frame = page.wait_for_selector('.jp-Notebook iframe'); frame.scroll_into_view_if_needed(); inside = frame.content_frame(); inside.wait_for_selector('#picture')
    shown = lambda: inside.evaluate("document.querySelector('.pictures').innerHTML")
    before = shown(); inside.focus('#moment'); page.keyboard.press('Home'); assert shown() != before
    before = inside.inner_text('#sentence'); inside.focus('#picture'); page.keyboard.press('ArrowDown'); assert inside.inner_text('#sentence') != before
    assert not page.said

def test_sliders_move_by_keyboard_and_a_saved_notebook_keeps_the_still(page, lab):
    opened(page, lab, '02_losses'); ran(page)
    box = page.locator('.jp-OutputArea-output .widget-hbox').first; box.scroll_into_view_if_needed()
    picture, handle = box.locator('img.widget-image'), box.locator('.noUi-handle').first
    before = picture.get_attribute('src'); handle.focus(); page.keyboard.press('ArrowRight')
    api.expect(picture).not_to_have_attribute('src', before, timeout=PATIENCE)
    assert box.locator('.noUi-handle:visible, select:visible').count() <= 5
    assert page.locator('.turn-still').count() and not page.locator('.turn-still img:visible').count() # not beside the living picture
    assert not page.said
    page.evaluate("jupyterapp.commands.execute('docmanager:save')"); saved = json.loads((lab[1]/'02_losses.ipynb').read_text(encoding='utf-8'))
    views = [o for c in saved['cells'] for o in c.get('outputs', []) if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]; assert views and all('image/png' in o['data'] for o in views)
    for name, words in (('strange', '# From a stranger'), ('trusted', '# From a friend')):  # others than the one that was run here: not trusted by themselves
        saved['cells'][0]['source'] = words; file = lab[1]/f'{name}.ipynb'; file.write_text(json.dumps(saved), encoding='utf-8')
        if name == 'trusted': subprocess.run([sys.executable, '-m', 'jupyter', 'trust', str(file)], env=lab[2], check=True)
        opened(page, lab, name)

def test_controls_that_are_folded_away_open_by_keyboard(page, lab):
    cell = lambda text, **more: dict(cell_type='code', id=f'c{len(text)}', metadata={}, source=text, outputs=[], execution_count=None)
    text = """turn(lambda **k: show_weights(s.assign(), None, 0, 0, 'pos', width=1+sum(k.values())/9), **{f'a{i}': Slider(f'number {i}', 0, 0, 1) for i in range(7)})"""
    cells = [cell('from ala_nb.show import Slider, show_weights, turn'), cell("from ala_nb.snapshots import load\ns = load('fcos')"), cell('1'), cell('22'), cell(text)]
    (lab[1]/'folded.ipynb').write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3')), nbformat=4, nbformat_minor=5)), encoding='utf-8')
    page.goto(f'{lab[0]}/lab/tree/folded.ipynb?token=t&reset'); ran(page)
    box = page.locator('.jp-OutputArea-output .turn-box'); picture, handles = box.locator('img.widget-image'), box.locator('.noUi-handle:visible')
    api.expect(handles).to_have_count(5, timeout=PATIENCE); handles.last.focus(); page.keyboard.press('Tab')
    if page.evaluate("document.activeElement.tagName") != 'BUTTON': page.keyboard.press('Tab')      # the slider's number is a stop of its own
    page.keyboard.press('Enter'); api.expect(handles).to_have_count(7, timeout=PATIENCE)
    before = picture.get_attribute('src'); handles.last.focus(); page.keyboard.press('End'); api.expect(picture).not_to_have_attribute('src', before, timeout=PATIENCE)
    assert not page.said
