"Pictures: they render, show what they should, survive extremes, and leave no trace."
import base64, functools, io, subprocess, sys
from pathlib import Path
import matplotlib, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection, PolyCollection
from matplotlib.figure import Figure
from ala_nb.geometry import InputError, grid_points, level_sizes
from ala_nb.methods import Assignment, build
from ala_nb.pairs import Objects, Predictions, inside_pairs, nearest_pairs
from ala_nb import show

ROOT = Path(__file__).resolve().parent.parent
K, SIZE = 3, (96, 128)

def png(fig):
    assert isinstance(fig, Figure)
    f = io.BytesIO(); fig.savefig(f, format='png', dpi=40)
    assert f.getvalue()[:8] == b'\x89PNG\r\n\x1a\n'
    return f.getvalue()

def batch(counts=(3, 0), strides=(8, 16, 32), offset=.5, dtype=torch.float32, seed=0):
    "Predictions, objects and images of a batch with so many objects an image."
    g = torch.Generator().manual_seed(seed)
    points, per = grid_points(level_sizes(*SIZE, strides), strides, offset)
    B, P = len(counts), len(points)
    preds = Predictions(torch.randn(B, P, K, generator=g).to(dtype), (torch.rand(B, P, 4, generator=g)*40).to(dtype), points, per,
                        torch.randn(B, P, generator=g).to(dtype))
    xy = [torch.rand(n, 2, generator=g)*60 for n in counts]
    targets = [dict(boxes=torch.cat([p, p+10+torch.rand(len(p), 2, generator=g)*50], 1), labels=torch.randint(0, K, (len(p),), generator=g)) for p in xy]
    return preds, Objects.from_targets(targets), list(torch.rand(B, 3, *SIZE, generator=g)), targets

def soft(preds, objects, pairs=inside_pairs):
    p = pairs(preds, objects)
    return Assignment({}, p, dict(pos=p.softmax(preds.points.new_tensor(range(len(p))).sin()*3), neg=torch.rand(len(p))))

def discs(fig): return [c for a in fig.axes for c in a.collections if isinstance(c, EllipseCollection)]
def boxes_in(ax): return [c for c in ax.collections if isinstance(c, PolyCollection)]


# ---- no trace

def test_import_needs_neither_pyplot_nor_widgets_nor_a_backend():
    code = ('import sys, ala_nb.show; import matplotlib as m; bad = {"matplotlib.pyplot", "ipywidgets", "IPython"} & set(sys.modules); '
            'assert not bad, bad; assert m.rcParams._get("backend") is m.rcsetup._auto_backend_sentinel')
    env = {k: v for k, v in __import__('os').environ.items() if k != 'MPLBACKEND'}
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

def every_picture():
    preds, objects, images, targets = batch()
    out, outputs = soft(preds, objects), [dict(t, scores=torch.rand(len(t['labels']))) for t in targets]
    yield show.draw_boxes(images[0], **targets[0])
    yield show.prediction_grid(images, targets, outputs, 'abc')
    yield show.curves([dict(step=i, epoch=i/3, loss=1/i, loss_cls=.5/i, AP=.1*i, lr=.1, grad_norm=i) for i in range(1, 9)])
    yield show.show_weights(out, preds, picture=images[0])
    yield show.compare_methods(dict(a=out, b=out), picture=images[0])
    yield show.show_assignment(out, preds, images)
    yield show.level_maps(preds.obj_logits[0].sigmoid(), preds, images[0], targets[0]['boxes'])
    yield show.show_options(functools.partial(build, 'fcos', K), preds, objects, images[0], centre_sampling=None)

def test_all_render_without_a_trace():
    import matplotlib.pyplot as plt
    before = plt.get_fignums(), dict(matplotlib.rcParams), matplotlib.get_backend()
    figures = list(every_picture())
    assert len({png(f) for f in figures}) == len(figures) == 8
    assert all(f.dpi <= 100 and not hasattr(f, 'number') for f in figures)      # pyplot numbers its figures
    assert (plt.get_fignums(), dict(matplotlib.rcParams), matplotlib.get_backend()) == before

def test_no_random_number_is_drawn_and_nothing_changed():
    preds, objects, images, targets = batch()
    out = soft(preds, objects)
    kept = [x.clone() for x in (preds.cls_logits, preds.distances, objects.boxes, images[0], out.weights['pos'])]
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()
    for f in (show.show_weights(out, preds, picture=images[0]), show.show_assignment(out, preds, images), show.draw_boxes(images[0], **targets[0])): png(f)
    assert torch.equal(state, torch.get_rng_state()) and (other == np.random.get_state()[1]).all()
    assert all(torch.equal(a, b) for a, b in zip(kept, (preds.cls_logits, preds.distances, objects.boxes, images[0], out.weights['pos'])))

def test_no_text_covers_another():
    for fig in every_picture():
        r = FigureCanvasAgg(fig).get_renderer(); fig.draw(r)
        texts = [t for a in fig.axes for t in (*a.texts, a.title) if t.get_text()]
        e = [t.get_window_extent(r) for t in texts]
        for i, a in enumerate(e):
            for j, b in enumerate(e[:i]): assert not a.shrunk(.98, .9).overlaps(b.shrunk(.98, .9)), (texts[i].get_text(), texts[j].get_text())
        w, h = fig.bbox.size
        assert all(a.x0 > -2 and a.y0 > -2 and a.x1 < w+2 and a.y1 < h+2 for a, t in zip(e, texts)), [t.get_text() for t in texts]

def test_notebook_shows_it():
    fig = show.panels(1, 1)[0]
    assert set(fig._repr_mimebundle_()) == {'image/png', 'text/plain'}
    ax = fig.axes[0]; ax.imshow(np.random.rand(200, 200, 3))
    full = io.BytesIO(); fig.savefig(full, format='png', dpi=fig.dpi)
    photo = fig._repr_mimebundle_()                                        # 256 colours
    assert set(photo) == {'image/png', 'text/plain'} and len(base64.b64decode(photo['image/png'])) < full.tell()/2


# ---- images and boxes

@pytest.mark.parametrize('x', [torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(1, 4, 6), torch.zeros(4, 6), torch.zeros(4, 4, 6), torch.zeros(3, 4, 6).bfloat16(),
                               torch.zeros(3, 4, 6, requires_grad=True), torch.full((3, 4, 6), torch.inf), np.zeros((4, 6)), np.zeros((4, 6, 4), np.uint16)])
def test_pixels(x):
    p = show.pixels(x)
    assert p.shape == (4, 6, 3) and p.dtype == np.float32 and np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1
    assert np.array_equal(show.pixels(p), p)

def test_pixels_of_pil_and_of_nothing():
    from PIL import Image
    for mode in ('L', 'RGBA', 'P', '1'): assert show.pixels(Image.new(mode, (6, 4))).shape == (4, 6, 3)
    for bad in (torch.zeros(3, 0, 4), torch.zeros(2, 3, 4, 5), np.zeros(5)):
        with pytest.raises(InputError, match='no picture'): show.pixels(bad)

def test_boxes_stand_where_they_are():
    "Pixel (j, i) covers i ... i+1: a box around one bright pixel encloses it."
    x = torch.zeros(3, 10, 10); x[:, 4, 6] = 1
    fig = show.draw_boxes(x, [[6, 4, 7, 5]], colours=['r'], width=.3, casing=0)
    canvas = FigureCanvasAgg(fig); canvas.draw()
    ax = fig.axes[0]; px = np.asarray(canvas.buffer_rgba()); h = len(px)
    at = lambda x, y: px[h-1-int(ax.transData.transform((x, y))[1]), int(ax.transData.transform((x, y))[0]), :3]
    assert (at(6.5, 4.5) == 255).all() and (at(5.5, 4.5) == 0).all() and (at(6.5, 5.5) == 0).all()
    corners = boxes_in(ax)[0].get_paths()[0].vertices
    assert corners.min(0).tolist() == [6, 4] and corners.max(0).tolist() == [7, 5]

def test_boxes_crowd_colours_and_scores():
    fig = show.draw_boxes(torch.rand(3, 60, 80), [[5, 15, 30, 50], [40, 15, 70, 50]], torch.tensor([0, 9]), ['cat'], torch.tensor([.5, .75]), torch.tensor([False, True]))
    casing, lines = boxes_in(fig.axes[0])
    assert {t.get_text() for t in fig.axes[0].texts} == {'cat 0.50', '9 0.75'}
    styles = [s[1] for s in lines.get_linestyle()]
    assert styles[0] is None and styles[1] is not None                      # drawn from the lowest score up; the crowd is dashed
    assert not np.allclose(lines.get_edgecolor()[0], lines.get_edgecolor()[1])
    ax = show.panels(1, 1)[1][0, 0]; show.show_image(ax, torch.rand(3, 9, 9))
    assert show.draw_boxes(ax, [[1, 1, 5, 5]]) is ax.figure                 # on axes that are there already

weird = st.sampled_from([0., 1., -1., 5., 64., 1e-9, 1e9, -1e30, float('nan'), float('inf')])

@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.lists(weird, min_size=4, max_size=4), st.integers(-3, 400), weird, st.booleans()), max_size=8))
def test_any_box_renders(rows):
    b, l, s, c = ([r[i] for r in rows] for i in range(4))
    fig = show.draw_boxes(torch.rand(3, 20, 30), torch.tensor(b).reshape(-1, 4), l, ['$x_{', 'é\n', '<b>'], torch.tensor(s), c)
    png(fig)
    assert len(boxes_in(fig.axes[0])[-1].get_paths()) == sum(np.isfinite(x).all() for x in b)

def test_thousands_of_boxes_are_one_collection():
    g = np.random.default_rng(0); b = g.random((5000, 4))*200
    fig = show.draw_boxes(torch.rand(3, 200, 200), b, g.integers(0, 80, 5000), [f'class {i}' for i in range(80)], g.random(5000))
    assert len(fig.axes[0].collections) == 2 and len(fig.axes[0].texts) <= 80
    png(fig)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 10**6))
def test_placed_texts_are_apart_and_inside(n, seed):
    g = np.random.default_rng(seed); p = g.random((n, 2))*80
    boxes, sizes = np.concatenate([p, p+g.random((n, 2))*40], 1), 1+g.random((n, 2))*25
    at = show.place_texts(boxes, sizes, (0, 0, 100, 100))
    r = [(x, y, x+w, y+h) for xy, (w, h) in zip(at, sizes) if xy is not None for x, y in [xy]]
    assert len(at) == n and all(0 <= a[0] and 0 <= a[1] and a[2] <= 100 and a[3] <= 100 for a in r)
    assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for i, a in enumerate(r) for b in r[:i])


# ---- truth and prediction

def test_prediction_grid_panels():
    preds, objects, images, targets = batch((3, 0, 2, 5, 1))
    outputs = [dict(t, scores=torch.linspace(.1, 1, len(t['labels']))) for t in targets]
    fig = show.prediction_grid(images, targets, outputs, ['a', 'b', 'c'], threshold=.3, columns=3)
    assert len(fig.axes) == 2*2*3                                            # two blocks of truth over found, three columns, one place free
    titles = [a.get_title() for a in fig.axes]
    assert titles[:6] == ['truth: 3', 'truth: 0', 'truth: 2', *(f'score ≥ 0.30: {int((o["scores"] >= .3).sum())}' for o in outputs[:3])] and titles[8] == titles[11] == ''
    assert [len(boxes_in(a)[-1].get_paths()) for a in fig.axes[:3]] == [3, 0, 2]
    assert len(show.prediction_grid(images, targets, None, n=2).axes) == 2 and len(show.prediction_grid(images, None, outputs, n=3).axes) == 3
    for f in (fig, show.prediction_grid(images, targets, outputs), show.prediction_grid(images, targets, outputs, [f'class {i}' for i in range(80)])): png(f)
    assert {t.get_text().split()[0] for t in f.axes[0].texts} == {'class'}   # many classes: names are written

def test_as_many_detections_as_objects():
    _, _, images, targets = batch((3, 0, 2))
    g = torch.Generator().manual_seed(0)
    many = [dict(boxes=torch.rand(9, 4, generator=g).cumsum(1), labels=torch.zeros(9).long(), scores=torch.rand(9, generator=g)) for _ in images]
    titles = [a.get_title() for a in show.prediction_grid(images, targets, many, 'abc', columns=3).axes[3:]]
    t = torch.cat([o['scores'] for o in many]).sort(descending=True)[0][4]
    assert sum(int(x.split(': ')[1]) for x in titles) == 5 and titles[0].startswith(f'score ≥ {t:.2f}')

def test_prediction_grid_extremes():
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
    bad = dict(boxes=torch.full((2, 4), torch.nan), labels=torch.zeros(2).long(), scores=torch.tensor([torch.nan, .9]))
    images = [torch.rand(3, 5, 200), torch.rand(3, 200, 5), torch.rand(1, 9, 9)]
    fig = show.prediction_grid(images, [nothing]*3, [nothing, bad, nothing], ['x'], threshold=.3)
    assert [a.get_title() for a in fig.axes[3:]] == ['score ≥ 0.30: 0', 'score ≥ 0.30: 1', 'score ≥ 0.30: 0']
    for f in (fig, show.prediction_grid(images, [nothing]*3, [nothing, bad, nothing]), show.prediction_grid([], [], []), show.prediction_grid(images, None, None)): png(f)


# ---- curves

def test_curves_of_a_file(tmp_path):
    p = tmp_path/'metrics.csv'
    p.write_text('step,epoch,lr,loss,loss_cls,loss_reg,grad_norm,AP,AP50,images_per_s\n' +
                 ''.join(f'{i},{i/10},{.01/i},{9/i},{5/i},{4/i},{i%7+1},{i/200 if i%10 == 0 else ""},{i/150 if i%10 == 0 else ""},30\n' for i in range(1, 101)) + '101,10.')
    fig = show.curves(p); png(fig)
    assert [a.get_title() for a in fig.axes] == ['loss', 'AP, best 0.500', 'learning rate', 'norm of the gradient']
    assert [len(a.lines) for a in fig.axes] == [6, 3, 1, 2]                  # many rows: raw and smoothed; AP: two lines and the ring
    assert len(fig.axes[1].lines[0].get_xdata()) == 10 and fig.axes[0].get_yscale() == 'log'
    assert show.curves(str(p), x='step').axes[0].get_xlabel() == 'step' and fig.axes[0].get_xlabel() == 'epoch'
    with pytest.raises(InputError, match="'time'"): show.curves(p, x='time')

@pytest.mark.parametrize('text', ['', '\n\n', 'step,loss\n', 'step,loss\n1,nan\n2,inf\n', 'a,b\n1,2\n', 'step,loss,AP\n1,-5,0\n2,0,\n', 'loss\n1\n,,,\n', 'step,loss\n1,1e300\n2,1e-300\n'])
def test_curves_of_odd_files(tmp_path, text):
    p = tmp_path/'metrics.csv'; p.write_text(text); png(show.curves(p))

def test_curves_of_no_file(tmp_path):
    (tmp_path/'x.csv').write_bytes(b'\xff\xfe\x00')
    for bad in (tmp_path/'none.csv', tmp_path, tmp_path/'x.csv'):
        with pytest.raises(InputError) as e: show.curves(bad)
        assert str(bad) in str(e.value) and '\n' not in str(e.value)

def test_running_mean_is_the_slow_one():
    y = np.random.default_rng(0).normal(size=57); y[[3, 20, 21, 22]] = np.nan, np.inf, np.nan, -np.inf
    for k in (1, 3, 9):
        with np.errstate(all='ignore'):
            ref = [(lambda w: w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan)(y[max(i-k//2, 0):i+k//2+1]) for i in range(len(y))]
        np.testing.assert_allclose(show.running_mean(y, k), ref, atol=1e-12)


# ---- weights

@pytest.mark.parametrize('pairs', (inside_pairs, functools.partial(nearest_pairs, k=9)))
def test_weights_are_those_of_the_assignment(pairs):
    preds, objects, images, _ = batch((2, 3))
    out = soft(preds, objects, pairs)
    for image, obj in ((0, 1), (1, 2)):
        n = obj if image == 0 else 2+obj
        xy, level, w, loc = show.bag(out, 'pos', image, obj)
        dense = out.dense('pos', image)[:, obj]
        assert torch.equal(dense[loc], torch.tensor(w, dtype=dense.dtype)) and len(w) == int(out.pairs.lengths[n])
        assert np.array_equal(xy, preds.points[loc].double().numpy()) and np.array_equal(level, out.pairs.level[out.pairs.obj == n].numpy())
        fig = show.show_weights(out, preds, image, obj, picture=images[image])
        levels = sorted(set(level.tolist()))
        assert len(fig.axes) == 2*len(levels)+1 and [a.get_ylabel() for a in fig.axes[:-1:len(levels)]] == ['positive weight', 'negative weight']
        turned = show.show_weights(out, preds, image, obj, picture=images[image], turned=True)
        assert [a.get_title().split('\n')[0] for a in turned.axes[:2]] == ['positive weight', 'negative weight']
        for a, b in zip(np.reshape(turned.axes[:-1], (len(levels), 2)).T.flat, fig.axes): assert len(a.lines) == len(b.lines) and a.get_title()[-4:] == b.get_title()[-4:]
        d = discs(fig)[:2*len(levels):2]                                         # every second: the rings follow the discs
        assert [len(c.get_offsets()) for c in d] == [int((level == l).sum()) for l in levels]
        for c, l in zip(d, levels): np.testing.assert_allclose(c.get_facecolors()[:, :3], show.weight_scale().to_rgba(w[level == l])[:, :3])

def test_one_scale_for_all():
    s = show.weight_scale()
    assert (s.norm.vmin, s.norm.vmax) == (0, 1)
    light = s.to_rgba(np.linspace(0, 1, 50))[:, :3] @ [.299, .587, .114]
    assert (np.diff(light) > 0).all()                                        # ordered for any eye, and in print
    c = show.glow(s, np.array([np.nan, np.inf, -np.inf, 2., -1, 0, 1]))
    assert np.isfinite(c).all() and np.allclose(c[1], c[6]) and np.allclose(c[3], c[6]) and np.allclose(c[2], c[5]) and np.allclose(c[4], c[5])

def test_palette_is_told_apart_without_red_or_green():
    "Under Viénot, Brettel and Mollon's (1999) simulations of the two common dichromacies all class colours stay apart."
    rgb = np.array([[int(c[i:i+2], 16)/255 for i in (1, 3, 5)] for c in show.PALETTE])**2.2
    lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [.0299566, .184309, 1.46709]])
    protan, deutan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]), np.array([[1, 0, 0], [.494207, 0, 1.24827], [0, 0, 1]])
    for m in (np.eye(3), protan, deutan):
        seen = np.clip(rgb @ (np.linalg.inv(lms) @ m @ lms).T, 0, 1)**(1/2.2)
        d = np.abs(seen[:, None]-seen[None]).max(-1) + np.eye(len(rgb))
        assert d.min() > .1

def test_compare_has_a_row_a_method_on_common_levels():
    preds, objects, images, _ = batch((2,))
    a = build('fcos', K)(preds, objects); b = soft(preds, objects)
    fig = show.compare_methods({'fcos': a, '$soft_{': b}, obj=1, picture=images[0]); png(fig)
    levels = sorted({*show.bag(a, 'pos', 0, 1)[1].tolist(), *show.bag(b, 'pos', 0, 1)[1].tolist()})
    assert len(fig.axes) == 2*len(levels)+1
    views = {(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes[:-1]}
    assert len(views) == 1
    png(show.compare_methods({}))

def test_assignment_picture():
    preds, objects, images, targets = batch((6, 0, 1))
    out = build('fcos', K)(preds, objects)
    fig = show.show_assignment(out, preds, images, objects_per_image=2); png(fig)
    assert len(fig.axes) == 3 and [a.get_title()[:6] for a in fig.axes] == ['2 of 6', '0 of 0', '1 of 1']
    chosen = show.pick_objects(targets[0]['boxes'], 2)
    want = sum(int((out.weights['pos'][out.pairs.obj == g] > 0).sum()) for g in chosen)
    assert sum(len(c.get_offsets()) for c in fig.axes[0].collections if isinstance(c, EllipseCollection)) == want
    area = (targets[0]['boxes'][:, 2:]-targets[0]['boxes'][:, :2]).prod(1)
    assert chosen == [int(area.argmax()), int(area.argmin())]
    assert len(show.show_assignment(out, preds, images, n=1).axes) == 1
    for p in (show.show_assignment(out), show.show_assignment(out, preds, images, 100)): png(p)
    lost = Assignment({}, out.pairs, dict(pos=out.weights['pos']*0))
    assert '2 without positives' in show.show_assignment(lost, preds, images, 2).axes[0].get_title()

@pytest.mark.parametrize('value', (0., -3., 1e30, float('nan'), float('inf')))
def test_any_weight_renders(value):
    preds, objects, images, _ = batch((2, 1))
    p = inside_pairs(preds, objects)
    out = Assignment({}, p, dict(pos=torch.full((len(p),), value)))
    for f in (show.show_weights(out, preds, 1, picture=images[1]), show.show_assignment(out, preds, images), show.compare_methods(dict(a=out))): png(f)
    far = Predictions(preds.cls_logits, preds.distances*0+abs(value), preds.points, preds.strides)
    png(show.show_weights(out, far, 0, 1))

def test_objects_without_candidates_images_without_objects():
    preds, objects, images, _ = batch((0, 0))
    out = build('fcos', K)(preds, objects)
    for f in (show.show_weights(out, preds, 1), show.show_assignment(out, preds, images), show.compare_methods(dict(a=out)),
              show.show_options(functools.partial(build, 'fcos', K), preds, objects, images[0])): png(f)
    tiny = Objects.from_targets([dict(boxes=torch.tensor([[1., 1, 1.5, 1.5], [-500, -500, -400, -400], [0, 0, 0, 0], [-1e4, -1e4, 1e4, 1e4]]), labels=torch.zeros(4).long())]*2)
    out = soft(preds, tiny)
    for obj in range(4):
        png(show.show_weights(out, preds, 0, obj, 'pos', images[0]))
    png(show.show_weights(out, preds, 1, 3, margin=None))
    png(show.show_assignment(out, preds, images))

def test_precision_gradients_and_offsets():
    for dtype, offset in ((torch.bfloat16, 0.), (torch.float64, .5), (torch.float16, .5)):
        preds, objects, images, _ = batch((2,), dtype=dtype, offset=offset)
        out = soft(preds, objects); out.weights['pos'] = out.weights['pos'].to(dtype).requires_grad_()
        for f in (show.show_weights(out, preds, picture=images[0].to(dtype)), show.show_assignment(out, preds, images), show.level_maps(preds.cls_logits[0, :, 0].requires_grad_(), preds)): png(f)
        assert show.image_size(preds) == SIZE

def test_errors_say_what_to_do():
    preds, objects, images, _ = batch((2, 0))
    out = soft(preds, objects)
    for f, word in ((lambda: show.show_weights(out, obj=2), 'obj: 2'), (lambda: show.show_weights(out, obj=-1), 'obj: -1'), (lambda: show.show_weights(out, image=2), 'image: 2'),
                    (lambda: show.show_weights(out, names=['quality']), 'it has pos, neg'), (lambda: show.show_assignment(out, name='x'), 'x: '),
                    (lambda: show.level_maps(torch.zeros(3), preds), 'values: 3')):
        with pytest.raises(InputError) as e: f()
        assert word in str(e.value) and '\n' not in str(e.value)
    png(show.show_weights(Assignment({}, out.pairs)))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-300, 300), min_size=4, max_size=4), st.integers(1, 300), st.integers(1, 300), st.sampled_from([None, 0., .25, 2.]))
def test_view_stays_in_the_image(box, h, w, margin):
    x1, y1, x2, y2 = show.around((min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])), (h, w), margin)
    assert -1e-9 <= x1 < x2 <= w+1e-9 and -1e-9 <= y1 < y2 <= h+1e-9


# ---- maps and sliders

def test_level_maps_show_each_value_at_its_location():
    preds, _, images, _ = batch((1,))
    v = torch.rand(preds.n_locations)
    fig = show.level_maps(v, preds); png(fig)
    assert len(fig.axes) == len(preds.level_sizes)+1
    scale = show.SCALE
    for ax, (h, w), a, s in zip(fig.axes, preds.level_sizes, preds.level_starts, preds.level_strides):
        m = ax.images[-1]; x0, x1, y1, y0 = m.get_extent()
        assert m.get_array().shape == (h, w, 4) and np.isclose((x1-x0)/w, s) and np.isclose((y1-y0)/h, s)
        np.testing.assert_allclose(m.get_array()[..., :3], scale(v[a:a+h*w].reshape(h, w).double().numpy())[..., :3], atol=.01)
        first = preds.points[a].tolist(); assert np.allclose((x0+s/2, y0+s/2), first)      # the first cell is centred on the first location
    for bad in (v*torch.nan, v*0-1, v*1e30, torch.where(v > .5, v, torch.inf)):
        png(show.level_maps(bad, preds, vmin=None, vmax=None))
    png(show.level_maps(bad, preds, images[0]))

@pytest.mark.cuda
def test_tensors_on_a_gpu():
    preds, objects, images, targets = batch((3, 1))
    gpu = Predictions(preds.cls_logits.cuda(), preds.distances.cuda(), preds.points.cuda(), preds.strides.cuda(), preds.obj_logits.cuda())
    images = [x.cuda() for x in images]; objects = objects.to(gpu.points)
    out = build('fcos', K).cuda()(gpu, objects)
    for f in (show.show_weights(out, gpu, picture=images[0]), show.show_assignment(out, gpu, images), show.level_maps(gpu.obj_logits[0], gpu, images[0]),
              show.show_options(functools.partial(build, 'fcos', K), gpu, objects, images[0])): png(f)
