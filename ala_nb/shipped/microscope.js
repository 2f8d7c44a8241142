// The microscope: why this location is positive. One view, for the page and for the notebook: no library, no network.
'use strict';

// ---- small helpers

const SVG = 'http://www.w3.org/2000/svg';
function node(tag, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'circle', 'rect', 'line', 'image', 'path', 'text', 'title'].includes(tag);
  const out = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith('on')) out.addEventListener(k.slice(2), v);
    else if (v === true) out.setAttribute(k, ''); else if (v !== false && v != null) out.setAttribute(k, v);
  }
  out.append(...children.flat().filter(c => c != null));          // strings become text, whatever is in them
  return out;
}
const range = n => Array.from({length: n}, (_, i) => i);
function number(x) {
  if (!isFinite(x)) return x > 0 ? '∞' : x < 0 ? '−∞' : 'not a number';
  const a = Math.abs(x), s = Number.isInteger(x) && a < 1e6 ? String(x) : a >= 100 ? x.toFixed(0) : a >= 10 ? x.toFixed(1) : a >= .01 || a === 0 ? x.toFixed(2) : a >= .001 ? x.toFixed(3) : x.toExponential(0);
  return s.replace('-', '−');
}
const count = n => `${n} candidate${n === 1 ? '' : 's'}`;
const ordinal = n => ['first', 'second', 'third', 'fourth', 'fifth'][n-1] || n + (n % 100 > 10 && n % 100 < 14 ? 'th' : ['th', 'st', 'nd', 'rd'][n % 10] || 'th');
function bytes(text) { const s = atob(text.replaceAll('-', '+').replaceAll('_', '/')), out = new Uint8Array(s.length); for (let i = 0; i < s.length; i++) out[i] = s.charCodeAt(i); return out.buffer; }
const floats = text => new Float32Array(bytes(text)), shorts = text => new Int16Array(bytes(text)), longs = text => new Int32Array(bytes(text));

// ---- formulas: the expressions of `Assignment.formula`

function parse(text) {
  const tokens = text.match(/\*\*|>=|<=|[-+*/()<>&|,]|[A-Za-z_]\w*|\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?/g) || [];
  let i = 0;
  const left = (next, ops) => () => { let a = next(); while (ops.includes(tokens[i])) { const op = tokens[i++]; a = {op, args: [a, next()]}; } return a; };
  const primary = () => {
    const t = tokens[i++];
    if (t === '(') { const a = compare(); i++; return a; }
    if (/^[\d.]/.test(t)) return {number: +t};
    if (tokens[i] !== '(') return {name: t};
    const args = []; i++;
    while (tokens[i] !== ')') { args.push(compare()); if (tokens[i] === ',') i++; }
    i++; return {call: t, args};
  };
  const power = () => { const a = primary(); if (tokens[i] !== '**') return a; i++; return {op: '**', args: [a, unary()]}; };
  const unary = () => { if (tokens[i] !== '-') return power(); i++; return {op: 'neg', args: [unary()]}; };
  const times = left(unary, ['*', '/']), plus = left(times, ['+', '-']), and = left(plus, ['&']), or = left(and, ['|']);
  const compare = left(or, ['>=', '<=', '>', '<']);
  return compare();
}

const at = (x, i) => typeof x === 'number' ? x : x[i];
const each = (n, f) => { const out = new Float64Array(n); for (let i = 0; i < n; i++) out[i] = f(i); return out; };
const PLAIN = {
  '+': (a, b) => a+b, '-': (a, b) => a-b, '*': (a, b) => a*b, '/': (a, b) => a/b, '**': Math.pow, neg: a => -a, '>=': (a, b) => +(a >= b),
  '<=': (a, b) => +(a <= b), '>': (a, b) => +(a > b), '<': (a, b) => +(a < b), '&': (a, b) => +(a && b), '|': (a, b) => +(a || b),
  exp: Math.exp, log: Math.log, sqrt: Math.sqrt, min: Math.min, max: Math.max, where: (c, a, b) => c ? a : b};
const sum = x => x.reduce((a, b) => a+b, 0);
const over = (x, y) => x.map(v => y !== 0 ? v/y : 0);
function std(x, ddof = 0) { const m = sum(x)/x.length; return x.length > ddof ? Math.sqrt(sum(x.map(v => (v-m)**2))/(x.length-ddof)) : 0; }
function order(x) { return range(x.length).sort((a, b) => x[b] > x[a] ? 1 : x[b] < x[a] ? -1 : a-b); }     // largest first, ties as they come
const BAG = {
  total: sum, mean: x => sum(x)/x.length, best: x => Math.max(...x), least: x => Math.min(...x), std,
  share: x => over(x, sum(x)), to_best: x => over(x, Math.max(...x)),
  rank: x => { const out = new Float64Array(x.length); order(x).forEach((i, r) => out[i] = r); return out; }};

// Pairs of an image: obj and loc (E,), objects ascending; bags: [first, last+1] of each object's pairs.
function wins(x, pairs) {
  const best = new Map();
  pairs.loc.forEach((l, i) => { if (x[i] > -Infinity && !(best.has(l) && x[best.get(l)] >= x[i])) best.set(l, i); });
  const winners = new Set(best.values());
  return each(x.length, i => +winners.has(i));
}
// Kuhn and Munkres with potentials: rows are the objects that have pairs, columns the locations; a pair that does not exist costs 1 more than none.
function match(x, pairs) {
  const rows = [...new Set(pairs.obj)], cols = [...new Set(pairs.loc)], n = rows.length, m = Math.max(cols.length, n);
  const r = new Map(rows.map((v, i) => [v, i+1])), c = new Map(cols.map((v, i) => [v, i+1]));
  const cost = range(n+1).map(() => new Float64Array(m+1).fill(1));
  x.forEach((v, i) => cost[r.get(pairs.obj[i])][c.get(pairs.loc[i])] = -v);
  const u = new Float64Array(n+1), v = new Float64Array(m+1), p = new Int32Array(m+1), way = new Int32Array(m+1);
  for (let i = 1; i <= n; i++) {
    const least = new Float64Array(m+1).fill(Infinity), used = new Uint8Array(m+1); let j0 = 0; p[0] = i;
    do {
      used[j0] = 1; let delta = Infinity, j1 = 0;
      for (let j = 1; j <= m; j++) if (!used[j]) {
        const d = cost[p[j0]][j]-u[p[j0]]-v[j];
        if (d < least[j]) { least[j] = d; way[j] = j0; }
        if (least[j] < delta) { delta = least[j]; j1 = j; }
      }
      for (let j = 0; j <= m; j++) if (used[j]) { u[p[j]] += delta; v[j] -= delta; } else least[j] -= delta;
      j0 = j1;
    } while (p[j0]);
    do { const j1 = way[j0]; p[j0] = p[j1]; j0 = j1; } while (j0);
  }
  return each(x.length, i => +(p[c.get(pairs.loc[i])] === r.get(pairs.obj[i])));
}

function evaluate(tree, names, pairs) {
  if ('number' in tree) return tree.number;
  if ('name' in tree) return tree.name === 'inf' ? Infinity : names[tree.name];
  const args = tree.args.map(a => evaluate(a, names, pairs)), f = tree.call || tree.op, n = pairs.obj.length;
  if (f in PLAIN) return args.every(a => typeof a === 'number') ? PLAIN[f](...args) : each(n, i => PLAIN[f](...args.map(a => at(a, i))));
  const x = each(n, i => at(args[0], i));
  if (f === 'wins') return wins(x, pairs);
  if (f === 'match') return match(x, pairs);
  const out = new Float64Array(n);
  for (const [a, b] of pairs.bags) { const y = BAG[f](Array.from(x.subarray(a, b)), ...args.slice(1)); for (let i = a; i < b; i++) out[i] = typeof y === 'number' ? y : y[i-a]; }
  return out;
}
const isBag = tree => tree.call in BAG || tree.call === 'wins' || tree.call === 'match';
const namesIn = tree => 'name' in tree ? [tree.name] : (tree.args || []).flatMap(namesIn);

// ---- words

const WORDS = {score: 'score', iou: 'IoU', giou: 'GIoU', anchor_iou: 'anchor IoU', best_iou: 'best IoU with any object', prior: 'center prior', foreground: 'foreground',
  centerness: 'centerness', reach: 'largest distance, px', low: 'level takes from, px', high: 'level takes up to, px', area: 'area of the box, px²', inside: 'distance to the nearest side, px',
  loc: 'localization', confidence: 'confidence', quality: 'quality', overlap: 'overlap', threshold: 'threshold', lower: 'lower threshold', pos: 'positive weight', neg: 'negative weight',
  w_pos: 'positive weight', w_neg: 'negative weight', hard: 'hard positive', soft: 'soft positive', certain: 'certain', ambiguous: 'ambiguous', t: 'degree t', xi: 'degree ξ', fits: 'fits its level', mine: 'wins the location', ranked: 'ranked',
  consistency: 'consistency', p_neg: 'probability of a negative', last_of_class: 'no later object of its class here', odds: 'odds of the best IoU', near: 'nearness', cost: 'matching cost', target: 'class target', matched: 'matched', weight: 'weight'};
const SYMBOLS = {alpha: 'α', beta: 'β', mu: 'μ', tau: 'τ', lam: 'λ', xi: 'ξ', inf: '∞', gamma: 'γ', gamma1: 'γ₁', gamma2: 'γ₂', mu_below: 'μ′', p_neg: 'P⁻', last_of_class: 'last', best_iou: 'best IoU', anchor_iou: 'anchor IoU', iou: 'IoU', giou: 'GIoU'};
const KNOBS = {                                                  // constants: words, least, largest, step
  alpha: ['α, how much the box counts', 0, 1, .05], beta: ['β', 0, 1, .05], lam: ['λ, how fast a poor box loses', 0, 20, .5], width: ['width of the band, standard deviations', 0, 3, .1],
  fade: ['how far training has faded soft labels (1 start, 0 end)', 0, 1, .05], K: ['K, locations of an object', 1, 20, 1], T: ['T, degree of the best ambiguous location', 0, 1, .05], tau: ['τ, temperature', .05, 1, .05],
  mu: ['μ, sharpness', 0, 10, .5], margin: ['least distance inside the box, px', 0, 16, .5], anchor_weight: ['weight of the anchor IoU', 0, 2, .1], pred_weight: ['weight of the predicted IoU', 0, 2, .1],
  gamma1: ['γ1, curve of the negative probability', .5, 5, .1], gamma2: ['γ2, power of the score', 0, 5, .1], mu_below: ['μ in the divisor', 0, 10, .5],
  share: ['threshold, share of the best', 0, 1, .05]};
const word = k => WORDS[k] || k.replaceAll('_', ' ');
const label = k => SYMBOLS[k] || k.replaceAll('_', ' ');
function knob(k, value) {
  const [words, lo, hi, step] = KNOBS[k] || [label(k), 0, Math.max(1, 2*Math.abs(value)), null];
  const top = value > hi ? 2*value : hi;
  return {words, lo: Math.min(lo, value), hi: top, step: step || (top-lo)/40};
}

// A formula as HTML; `leaf(name)` and `bag(tree)` may give a node of their own.
const STRENGTH = {'>=': 1, '<=': 1, '>': 1, '<': 1, '|': 2, '&': 3, '+': 4, '-': 4, '*': 5, '/': 5, neg: 6, '**': 7};
const SIGN = {'*': ' × ', '/': ' / ', '+': ' + ', '-': ' − ', '>=': ' ≥ ', '<=': ' ≤ ', '>': ' > ', '<': ' < ', '&': ' and ', '|': ' or '};
const FUNCTION = {to_best: 'relative to the best', share: 'share', rank: 'rank', wins: 'wins', match: 'one-to-one match', where: 'where', best: 'best', least: 'least', total: 'sum', mean: 'mean', std: 'std'};
function written(tree, leaf, bag = () => null, above = 0) {
  if ('number' in tree) return [String(tree.number).replace('-', '−')];
  if ('name' in tree) return [leaf(tree.name) || node('i', {}, label(tree.name))];
  if (tree.call) {
    const own = isBag(tree) && bag(tree); if (own) return [own];
    if (tree.call === 'where') {
      const last = tree.args[2], none = last.op === 'neg' && last.args[0].name === 'inf';
      return [...written(tree.args[1], leaf, bag), ' where ', ...written(tree.args[0], leaf, bag, 4), ...(none ? [] : [', else ', ...written(last, leaf, bag)])];
    }
    return [FUNCTION[tree.call] || tree.call, '(', ...tree.args.flatMap((a, i) => [i ? ', ' : '', ...written(a, leaf, bag)]), ')'];
  }
  const s = STRENGTH[tree.op], [a, b] = tree.args;
  const inner = tree.op === 'neg' ? ['−', ...written(a, leaf, bag, s)] : tree.op === '**' ? [...written(a, leaf, bag, s+1), node('sup', {}, written(b, leaf, bag))]
    : [...written(a, leaf, bag, s), SIGN[tree.op], ...written(b, leaf, bag, s+1)];
  return s < above ? ['(', ...inner, ')'] : inner;
}

// ---- data: what a page holds, decoded when it is asked for

class Data {
  constructor(raw) {
    Object.assign(this, raw); this.cache = new Map();
    for (const m of this.methods) for (const x of [m, ...m.moments]) if (x.formula) x.trees = x.formula.map(([k, text]) => [k, parse(text)]);
  }
  // a method's formulas; a moment has its own where the rule changes over training
  trees(m, t) { return this.methods[m].moments[t].trees ?? this.methods[m].trees; }
  pairs(m, t, i) {
    const key = `${m} ${t} ${i}`;
    if (!this.cache.has(key)) {
      const raw = this.methods[m].moments[t].images[i], fixed = this.methods[m].fixed[i], both = {...fixed, ...raw};
      const obj = shorts(both.obj), loc = longs(both.loc), bags = [];
      for (let a = 0, b; a < obj.length; a = b) { for (b = a; b < obj.length && obj[b] === obj[a]; b++); bags.push([a, b]); }
      const order = this.methods[m].order, factors = Object.fromEntries(Object.entries({...fixed.factors, ...raw.factors}).sort(([a], [b]) => order.indexOf(a)-order.indexOf(b)).map(([k, v]) => [k, floats(v)]));
      this.cache.set(key, {obj, loc, bags, factors, sides: both.sides ? shorts(both.sides) : null});
    }
    return this.cache.get(key);
  }
  // every name of a method's formulas on an image; `turned` replaces constants, `line` the threshold of an object
  names(m, t, i, turned = {}, line = null) {
    const pairs = this.pairs(m, t, i), names = {...pairs.factors, ...this.methods[m].moments[t].constants, ...turned};
    for (const [k, tree] of this.trees(m, t)) {
      let v = evaluate(tree, names, pairs);
      if (typeof v === 'number') v = each(pairs.obj.length, () => v);
      if (k === 'threshold' && line) v = v.map((x, e) => pairs.obj[e] === line.obj ? line.value : x);
      names[k] = v;
    }
    return names;
  }
  // what the bars show: what the threshold is compared with, else the quality, else the weight
  measure(m, t) {
    const names = this.trees(m, t).map(([k]) => k), last = names.indexOf('pos');
    return ['overlap', 'quality', 'alignment'].find(k => names.includes(k) && names.indexOf(k) < last) || 'pos';
  }
  hasThreshold(m, t) { return this.trees(m, t).some(([k]) => k === 'threshold'); }
}

// ---- the view

class Microscope {
  constructor(root, raw) {
    this.data = new Data(raw); this.root = root; this.turned = {}; this.line = null; this.focus = null; this.timer = null;
    const first = this.data.start || {};
    this.image = first.image || 0; this.obj = first.obj || 0; this.method = first.method || 0; this.moment = this.data.methods[this.method].moments.length-1;
    this.level = -1; this.second = -1; this.show = 'pos';
    this.build(); this.draw();
    addEventListener('resize', () => this.drawBars());
  }

  get moments() { return this.data.methods[this.method].moments; }
  at(method) { return Math.min(this.moment, this.data.methods[method].moments.length-1); }
  computed(method = this.method) {
    const own = method === this.method;
    return this.data.names(method, this.at(method), this.image, own ? this.turned : {}, own ? this.line : null);
  }
  mine(method = this.method) {                                    // pairs of the chosen object
    const p = this.data.pairs(method, this.at(method), this.image);
    return range(p.obj.length).filter(e => p.obj[e] === this.obj);
  }
  place(loc) {                                                    // x, y, level of a location
    let l = 0; const im = this.data.images[this.image];
    while (l+1 < im.levels.length && loc >= im.levels[l+1].start) l++;
    const {start, columns, stride} = im.levels[l], k = loc-start, o = im.offset;
    return {x: (k % columns + o)*stride, y: (Math.floor(k/columns) + o)*stride, level: l, stride};
  }
  colour(w) {
    const s = this.data.scale, v = isNaN(w) ? NaN : Math.sqrt(Math.min(Math.max(w, 0), 1));
    return isNaN(v) ? this.data.alarm : s[Math.round(v*(s.length-1))];
  }

  // -- building

  build() {
    const {data} = this, choose = (id, text, options, on) => {
      const select = node('select', {id, onchange: e => on(e.target.value)}, options);
      return [node('label', {class: 'control'}, node('span', {}, text), select), select];
    };
    const objects = data.images.map((im, i) => node('optgroup', {label: im.name}, im.objects.map((o, j) => {
      const w = o.box[2]-o.box[0], h = o.box[3]-o.box[1];
      return node('option', {value: `${i} ${j}`}, `${data.classes[o.label] ?? o.label}, ${w.toFixed(0)} × ${h.toFixed(0)} px`);
    })));
    const methods = () => data.methods.map((m, i) => node('option', {value: i}, m.name));
    const [objectBox, objectMenu] = choose('object', 'Object', objects, v => { [this.image, this.obj] = v.split(' ').map(Number); this.line = null; this.focus = null; this.draw(); });
    const [methodBox, methodMenu] = choose('method', 'Method', methods(), v => { this.method = +v; this.turned = {}; this.line = null; this.focus = null; this.moment = Math.min(this.moment, this.moments.length-1); this.draw(); });
    const [secondBox, secondMenu] = choose('second', 'Beside it', [node('option', {value: -1}, 'no other'), ...methods()], v => { this.second = +v; this.draw(); });
    const [levelBox, levelMenu] = choose('level', 'Level', [], v => { this.level = +v; this.focus = null; this.draw(); });
    this.play = node('button', {id: 'play', type: 'button', onclick: () => this.toggle()}, 'Play');
    this.scrub = node('input', {id: 'moment', type: 'range', min: 0, step: 1, 'aria-label': 'Moment of training', oninput: e => { this.stop(); this.moment = +e.target.value; this.line = null; this.draw(); }});
    this.when = node('output', {for: 'moment'});
    const moment = node('div', {class: 'control moment'}, node('span', {}, 'Training'), this.play, this.scrub, this.when);
    Object.assign(this, {objectMenu, methodMenu, secondMenu, levelMenu});
    this.pictures = node('div', {class: 'pictures'});
    this.sentence = node('p', {class: 'sentence', 'aria-live': 'polite', id: 'sentence'});
    this.bars = node('div', {class: 'bars'});
    this.knobs = node('div', {class: 'knobs'});
    this.maps = node('div', {class: 'maps'});
    this.steps = node('div', {class: 'steps'});
    this.folded = node('details', {id: 'turn', ontoggle: () => this.drawKnobs()}, node('summary', {}, 'Turn the method’s numbers'), this.knobs);
    const bar = node('span', {class: 'scale', role: 'img', 'aria-label': 'colour scale of weights from 0 to 1'}, ['0', '0.05', '0.2', '0.5', '1'].map(t => {
      const tick = node('span', {}, t); tick.style.left = `${100*Math.sqrt(+t)}%`; return tick; }));
    bar.style.background = `linear-gradient(to right, ${data.scale.join(',')})`;
    this.root.replaceChildren(
      node('div', {class: 'controls'}, objectBox, methodBox, levelBox, moment, secondBox),
      node('div', {class: 'upper'}, this.pictures, node('div', {class: 'side'}, this.sentence, this.bars, this.folded,
        node('p', {class: 'legend'}, 'Weight ', bar, ' An empty ring is a candidate that weighs nothing. Rings have the size of their level’s cells.'))),
      node('h2', {}, 'What it is made of'), this.maps, this.steps);
  }

  toggle() { if (this.timer) this.stop(); else { if (this.moment === this.moments.length-1) this.moment = -1; this.play.textContent = 'Pause'; this.tick(); this.timer = setInterval(() => this.tick(), 900); } }
  tick() { if (this.moment+1 >= this.moments.length) return this.stop(); this.moment++; this.line = null; this.draw(); }
  stop() { clearInterval(this.timer); this.timer = null; this.play.textContent = 'Play'; }

  // -- drawing

  draw() {
    const began = performance.now(), {data} = this;
    this.names = this.computed(); this.bag = this.mine();
    this.objectMenu.value = `${this.image} ${this.obj}`; this.methodMenu.value = this.method; this.secondMenu.value = this.second;
    const im = data.images[this.image]; if (this.level >= im.levels.length) this.level = -1;
    this.levelMenu.replaceChildren(node('option', {value: -1}, 'all levels'), ...im.levels.map((l, i) => node('option', {value: i}, `stride ${l.stride} px`)));
    this.levelMenu.value = this.level;
    const single = this.moments.length < 2, why = single ? 'there is one moment only' : '';
    this.scrub.max = this.moments.length-1; this.scrub.value = this.moment; this.scrub.disabled = this.play.disabled = single; this.scrub.title = this.play.title = why;
    this.when.textContent = this.moments[this.moment].label;
    if (this.focus !== null && !this.bag.includes(this.focus)) this.focus = null;
    this.drawPictures(); this.drawBars(); this.drawKnobs(); this.drawMaps(); this.tell();
    this.took = performance.now()-began;
  }

  view(margin = .3) {
    const im = this.data.images[this.image], [x1, y1, x2, y2] = im.objects[this.obj].box;
    const side = Math.min(Math.max(Math.max(x2-x1, y2-y1)*(1+2*margin), Math.max(im.width, im.height)/4), Math.max(im.width, im.height));
    const cx = (x1+x2)/2, cy = (y1+y2)/2, clamp = (c, full) => side >= full ? (full-side)/2 : Math.min(Math.max(c-side/2, 0), full-side);
    return [clamp(cx, im.width), clamp(cy, im.height), side];
  }

  // one picture: `values` at pairs `bag` of a method, as discs in rings
  picture(method, values, options = {}) {
    const {data} = this, im = data.images[this.image], pairs = data.pairs(method, this.at(method), this.image);
    const [vx, vy, side] = options.whole ? [0, 0, Math.max(im.width, im.height)] : this.view();
    const svg = node('svg', {viewBox: `${vx} ${vy} ${side} ${side}`, class: options.small ? 'small' : 'large', role: 'img', 'aria-label': options.label || ''});
    svg.append(node('image', {href: im.src, x: 0, y: 0, width: im.width, height: im.height, style: 'image-rendering: pixelated'}), node('rect', {x: vx, y: vy, width: side, height: side, class: 'shade'}));
    const bag = this.mine(method).filter(e => this.level < 0 || this.place(pairs.loc[e]).level === this.level);
    bag.sort((a, b) => this.place(pairs.loc[b]).level - this.place(pairs.loc[a]).level);                              // fine levels on top
    const many = bag.length > 250, rings = node('g', {class: many ? 'many' : ''}), discs = node('g');
    for (const e of bag) {
      const {x, y, stride} = this.place(pairs.loc[e]), v = values[e], size = options.size ? options.size(v) : Math.sqrt(Math.sqrt(Math.min(Math.max(isNaN(v) ? 1 : v, 0), 1)));
      if (options.small && many && size < .2) continue;               // a map of a thousand candidates: what has no value is left out
      const ring = node('circle', {cx: x, cy: y, r: .44*stride, class: 'ring', 'data-pair': e});
      if (!options.small) {
        ring.addEventListener('pointerenter', () => this.look(method, e)); ring.addEventListener('pointerdown', ev => { ev.stopPropagation(); this.look(method, e); });
      }
      if (!options.small || !many) rings.append(ring);
      if (size > 0) discs.append(node('circle', {cx: x, cy: y, r: .44*stride*size, class: 'disc', fill: options.fill ? options.fill(v) : this.colour(v)}));
    }
    const [x1, y1, x2, y2] = im.objects[this.obj].box;
    svg.append(discs, rings, node('rect', {x: x1, y: y1, width: x2-x1, height: y2-y1, class: 'box'}));
    if (!options.small) svg.append(node('rect', {class: 'predicted', x: 0, y: 0, width: 0, height: 0}), node('circle', {class: 'here', r: 0}));
    return svg;
  }

  drawPictures() {
    const {data} = this, show = (method, main) => {
      const names = main ? this.names : this.computed(method), name = data.methods[method].name;
      const svg = this.picture(method, names.pos, {label: `${name}: positive weights of the candidates; arrow keys move between them, another object is chosen by click`});
      svg.addEventListener('click', ev => this.pick(ev, svg));
      for (const kind of ['pointermove', 'pointerdown']) svg.addEventListener(kind, ev => { if (main && !ev.target.classList.contains('ring')) this.aside(ev, svg); });
      svg.addEventListener('pointerleave', () => { if (main) { this.tell(); this.mark(); } });
      if (main) { svg.setAttribute('tabindex', 0); svg.setAttribute('role', 'application'); svg.id = 'picture'; svg.addEventListener('keydown', ev => this.key(ev)); svg.addEventListener('focus', () => { if (this.focus === null) this.look(this.method, this.best()); }); }
      const w = this.mine(method).map(e => names.pos[e]), total = sum(w);
      return node('figure', {}, svg, node('figcaption', {}, `${name}, ${data.methods[method].moments[this.at(method)].label}: ${w.filter(x => x > 0).length} of ${count(w.length)} with a weight, ${number(total)} in all`));
    };
    const figures = [show(this.method, true)];
    if (this.second >= 0) figures.push(show(this.second, false), this.difference());
    this.pictures.replaceChildren(...figures);
    this.pictures.classList.toggle('several', figures.length > 1);
  }

  // what the second method gives more or less than the first, by location
  difference() {
    const a = this.data.pairs(this.method, this.at(this.method), this.image), b = this.data.pairs(this.second, this.at(this.second), this.image), other = this.computed(this.second).pos;
    const had = new Map(this.mine().map(e => [a.loc[e], this.names.pos[e]])), has = new Map(this.mine(this.second).map(e => [b.loc[e], other[e]]));
    const im = this.data.images[this.image], [vx, vy, side] = this.view(), svg = node('svg', {viewBox: `${vx} ${vy} ${side} ${side}`, class: 'large', role: 'img', 'aria-label': 'locations won and lost'});
    svg.append(node('image', {href: im.src, x: 0, y: 0, width: im.width, height: im.height, style: 'image-rendering: pixelated'}), node('rect', {x: vx, y: vy, width: side, height: side, class: 'shade'}));
    let won = 0, lost = 0;
    for (const l of [...new Set([...had.keys(), ...has.keys()])].sort((p, q) => q-p)) {
      const p = this.place(l), d = (has.get(l) || 0)-(had.get(l) || 0); if (this.level >= 0 && p.level !== this.level) continue;
      if (d > 0) won += d; else lost -= d;
      const r = .44*p.stride*Math.sqrt(Math.sqrt(Math.min(Math.abs(d), 1))), s = .5*r;
      svg.append(node('circle', {cx: p.x, cy: p.y, r: .44*p.stride, class: 'ring'}));
      if (r > .05*p.stride) svg.append(node('circle', {cx: p.x, cy: p.y, r, class: 'disc', fill: d > 0 ? '#E69F00' : '#56B4E9'}),
        node('path', {d: `M${p.x-s} ${p.y}h${2*s}` + (d > 0 ? `M${p.x} ${p.y-s}v${2*s}` : ''), class: 'mark'}));
    }
    const [x1, y1, x2, y2] = im.objects[this.obj].box;
    svg.append(node('rect', {x: x1, y: y1, width: x2-x1, height: y2-y1, class: 'box'}));
    return node('figure', {}, svg, node('figcaption', {}, `${this.data.methods[this.second].name} against ${this.data.methods[this.method].name}: won ${number(won)} (+, orange), lost ${number(lost)} (−, blue)`));
  }

  pick(event, svg) {                                              // a click that hits no candidate chooses the smallest object there
    const m = svg.getScreenCTM(); if (!m || event.target.classList.contains('ring')) return;
    const x = (event.clientX-m.e)/m.a, y = (event.clientY-m.f)/m.d;
    const hit = this.data.images[this.image].objects.map((o, j) => [o.box, j]).filter(([b]) => b[0] <= x && x <= b[2] && b[1] <= y && y <= b[3])
      .sort(([a], [b]) => (a[2]-a[0])*(a[3]-a[1]) - (b[2]-b[0])*(b[3]-b[1]))[0];
    if (hit && hit[1] !== this.obj) { this.obj = hit[1]; this.line = null; this.focus = null; this.draw(); }
  }

  // a location that is no candidate of the object: the nearest one of the chosen level, or of the finest that has one here
  outside(x, y) {
    const im = this.data.images[this.image], p = this.data.pairs(this.method, this.at(this.method), this.image), taken = new Set(this.bag.map(e => p.loc[e])), o = im.offset;
    for (const [l, {start, columns, stride}] of im.levels.entries()) {
      if (this.level >= 0 && l !== this.level) continue;
      const rows = Math.ceil(im.height/stride), c = Math.min(Math.max(Math.round(x/stride-o), 0), columns-1), r = Math.min(Math.max(Math.round(y/stride-o), 0), rows-1), q = this.place(start+r*columns+c);
      if (!taken.has(start+r*columns+c)) return q;
    }
    return null;
  }
  aside(event, svg) {
    const m = svg.getScreenCTM(); if (!m) return;
    const q = this.outside((event.clientX-m.e)/m.a, (event.clientY-m.f)/m.d); if (!q) return;
    const method = this.data.methods[this.method], object = this.data.images[this.image].objects[this.obj], [x1, y1, x2, y2] = object.box, what = this.data.classes[object.label] ?? 'object';
    const inside = q.x > x1 && q.x < x2 && q.y > y1 && q.y < y2;
    this.sentence.textContent = `This location (x ${number(q.x)}, y ${number(q.y)}, stride ${q.stride} px) is no candidate of the ${what}: it lies ${inside ? 'inside' : 'outside'} its box`
      + (method.rule ? `, and ${method.name} looks only at ${method.rule}.` : '.') + ` For the ${what} it is background, with negative weight 1, unless another object takes it.`;
    this.focus = null; this.mark(); const here = svg.querySelector('.here');
    for (const [k, v] of Object.entries({cx: q.x, cy: q.y, r: .44*q.stride})) here?.setAttribute(k, v);
  }

  best() { const k = this.names[this.data.measure(this.method, this.moment)], b = this.visible(); return b.length ? b.reduce((a, e) => this.names.pos[e] > this.names.pos[a] || this.names.pos[e] === this.names.pos[a] && k[e] > k[a] ? e : a, b[0]) : null; }
  visible() { const p = this.data.pairs(this.method, this.moment, this.image); return this.bag.filter(e => this.level < 0 || this.place(p.loc[e]).level === this.level); }
  key(event) {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key]; if (!step) return;
    event.preventDefault();
    const p = this.data.pairs(this.method, this.moment, this.image), b = this.visible(); if (!b.length) return;
    if (this.focus === null) return this.look(this.method, this.best());
    const from = this.place(p.loc[this.focus]);
    let next = null, cost = Infinity;
    for (const e of b) {
      const q = this.place(p.loc[e]), along = (q.x-from.x)*step[0]+(q.y-from.y)*step[1], aside = Math.abs((q.x-from.x)*step[1])+Math.abs((q.y-from.y)*step[0]);
      const c = along+3*aside+(q.level === from.level ? 0 : from.stride*.01); if (along > 1e-6 && c < cost) { cost = c; next = e; }
    }
    if (next !== null) this.look(this.method, next);
  }

  look(method, e) {
    if (method !== this.method) {                                 // the same location in the first method, if it is a candidate there
      const l = this.data.pairs(method, this.at(method), this.image).loc[e], p = this.data.pairs(this.method, this.moment, this.image);
      e = this.bag.find(i => p.loc[i] === l) ?? null;
    }
    this.focus = e; this.tell(); this.mark();
  }

  // -- bars and the threshold to drag

  drawBars() {
    const key = this.data.measure(this.method, this.moment), v = this.names[key], W = Math.max(this.bars.clientWidth, 280), H = 150, bottom = H-18, sorted = [...this.bag].sort((a, b) => v[b]-v[a] || a-b);
    if (!sorted.length) return this.bars.replaceChildren(node('p', {}, 'This object has no candidate: no location of its levels lies where the method looks.'));
    const has = this.data.hasThreshold(this.method, this.moment), line = has ? this.names.threshold[sorted[0]] : null;
    const top = Math.max(...sorted.map(e => isFinite(v[e]) ? v[e] : 0), has ? line : 0, 1e-12)*1.08, y = x => bottom-(bottom-6)*Math.max(Math.min(x/top, 1), 0), w = W/sorted.length;
    const svg = node('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${word(key)} of the candidates, largest first`});
    sorted.forEach((e, i) => {
      const hit = node('rect', {x: i*w, y: 0, width: w, height: bottom, class: 'hit', 'data-pair': e});
      hit.addEventListener('pointerenter', () => this.look(this.method, e));
      svg.append(node('rect', {x: i*w+.1*w, y: y(v[e]), width: .8*w, height: Math.max(bottom-y(v[e]), .5), class: this.names.pos[e] > 0 ? 'bar' : 'bar none', fill: this.colour(this.names.pos[e]), 'data-bar': e}), hit);
    });
    svg.append(node('line', {x1: 0, x2: W, y1: bottom, y2: bottom, class: 'axis'}), node('text', {x: 0, y: H-4}, `${word(key)} of ${count(sorted.length)}, largest first`), node('text', {x: W, y: 12, 'text-anchor': 'end'}, `largest ${number(v[sorted[0]])}`));
    if (has) svg.append(this.threshold(svg, line, y, x => top*(bottom-x)/(bottom-6), top, W));
    const back = this.line ? node('button', {type: 'button', id: 'back', onclick: () => { this.line = null; this.draw(); }}, 'Back to the method’s threshold') : '';
    this.bars.replaceChildren(svg, back); this.mark();
  }

  threshold(svg, value, y, from, top, W) {
    const g = node('g', {class: 'threshold', tabindex: 0, role: 'slider', id: 'threshold', 'aria-label': 'threshold', 'aria-valuemin': 0, 'aria-valuemax': top.toPrecision(3), 'aria-valuenow': value.toPrecision(3)},
      node('rect', {x: 0, y: y(value)-9, width: W, height: 18, class: 'grip'}), node('line', {x1: 0, x2: W, y1: y(value), y2: y(value)}),
      // at the right, where bars are short; below the line where the other label stands above it
      node('text', {x: W, y: y(value) > 31 ? y(value)-5 : Math.max(y(value)+14, 26), 'text-anchor': 'end'}, `threshold ${number(value)}: drag`));
    const set = (v, keep) => { this.line = {obj: this.obj, value: Math.min(Math.max(v, 0), top)}; this.names = this.computed(); this.drawPictures(); this.drawMaps(); this.drawBars(); this.tell(); if (keep) this.bars.querySelector('#threshold')?.focus(); };
    const drag = ev => { const box = this.bars.querySelector('svg').getBoundingClientRect(); set(from((ev.clientY-box.top)*150/box.height)); };
    g.addEventListener('pointerdown', ev => { ev.preventDefault(); const end = () => { removeEventListener('pointermove', drag); removeEventListener('pointerup', end); removeEventListener('pointercancel', end); };
      addEventListener('pointermove', drag); addEventListener('pointerup', end); addEventListener('pointercancel', end); });
    g.addEventListener('keydown', ev => { const d = {ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10}[ev.key], v = ev.key === 'Home' ? 0 : ev.key === 'End' ? top : d ? value+d*top/50 : null;
      if (v !== null) { ev.preventDefault(); set(v, true); } });
    return g;
  }

  mark() {                                                        // the location that is looked at: in the picture, the bars, and its predicted box
    this.root.querySelectorAll('.looked').forEach(x => x.classList.remove('looked'));
    const p = this.data.pairs(this.method, this.moment, this.image), svg = this.pictures.querySelector('#picture'), e = this.focus;
    const here = svg?.querySelector('.here'), box = svg?.querySelector('.predicted'); if (!here) return;
    if (e === null) { here.setAttribute('r', 0); box.setAttribute('width', 0); return; }
    const q = this.place(p.loc[e]); here.setAttribute('cx', q.x); here.setAttribute('cy', q.y); here.setAttribute('r', .5*q.stride);
    if (p.sides) {
      const [l, t, r, b] = range(4).map(k => p.sides[4*e+k]/8);
      for (const [k, v] of Object.entries({x: q.x-l, y: q.y-t, width: Math.max(l+r, 0), height: Math.max(t+b, 0)})) box.setAttribute(k, v);
    }
    this.root.querySelectorAll(`[data-bar="${e}"]`).forEach(x => x.classList.add('looked'));
  }

  // -- the numbers to turn

  drawKnobs() {
    if (!this.folded.open) return this.knobs.replaceChildren();       // what has an effect is found out when it is asked for
    const now = {...this.moments[this.moment].constants, ...this.turned}, keys = Object.keys(now);
    if (!keys.length) return this.knobs.replaceChildren(node('p', {}, 'This method has no number to turn: a rule decides.'));
    const active = document.activeElement?.id;
    const effect = k => {                                         // does any value move a weight of this object?
      const {lo, hi} = knob(k, this.moments[this.moment].constants[k]), pos = v => { const n = this.data.names(this.method, this.moment, this.image, {...this.turned, [k]: v}, this.line).pos; return this.bag.map(e => n[e]); };
      const a = pos(now[k]); return [lo, (lo+hi)/2, hi].some(v => pos(v).some((x, i) => Math.abs(x-a[i]) > 1e-9));
    };
    this.knobs.replaceChildren(...keys.map(k => {
      const {words, lo, hi, step} = knob(k, this.moments[this.moment].constants[k]), alive = effect(k);
      const out = node('output', {}, number(now[k])), input = node('input', {type: 'range', id: `knob-${k}`, min: lo, max: hi, step, value: now[k], disabled: !alive, oninput: e => {
        this.turned[k] = +e.target.value; out.textContent = number(this.turned[k]); this.names = this.computed(); this.drawPictures(); this.drawBars(); this.drawMaps(); this.tell(); }});
      return node('label', {class: alive ? 'control' : 'control dead'}, node('span', {}, words + (alive ? '' : ' (moves no weight of this object)')), input, out);
    }), node('button', {type: 'button', id: 'reset', onclick: () => { this.turned = {}; this.draw(); }}, 'Back to the method’s numbers'));
    if (active?.startsWith('knob-')) document.getElementById(active)?.focus();
  }

  // -- factors as small maps, joined as the formula says

  drawMaps() {
    const {data} = this, trees = data.trees(this.method, this.moment), p = data.pairs(this.method, this.moment, this.image);
    const step = new Map(trees), keep = k => k in p.factors || step.has(k);
    const map = (k, name = word(k)) => {
      const v = this.names[k], all = this.bag.map(e => v[e]).filter(isFinite), lo = Math.min(0, ...all), hi = Math.max(...all, lo+1e-9), unit = hi <= 1.0001 && lo >= 0;
      const share = x => isNaN(x) ? NaN : unit ? x : (Math.min(Math.max(x, lo), hi)-lo)/(hi-lo);
      const svg = this.picture(this.method, v, {small: true, label: name, size: x => Math.sqrt(Math.sqrt(Math.max(share(x), 0))), fill: x => this.colour(share(x))});
      return node('figure', {class: 'map'}, svg, node('figcaption', {}, name + (unit ? '' : `, ${number(lo)} to ${number(hi)}`)));
    };
    const measure = data.measure(this.method, this.moment), shown = [], add = k => { if (keep(k) && !shown.includes(k)) shown.push(k); };
    let tree = step.get(measure);                                 // a name for another formula is opened, so that factors are seen
    const calls = t => 'call' in t || (t.args || []).some(calls), opened = t => 'name' in t && step.has(t.name) && !calls(step.get(t.name)) && t.name !== measure ? opened(step.get(t.name)) : t.args ? {...t, args: t.args.map(opened)} : t;
    if (namesIn(opened(tree)).length <= 6) tree = opened(tree);
    const chooses = t => t.call === 'where' || (t.args || []).some(chooses), once = k => keep(k) && !shown.includes(k) ? (add(k), map(k)) : null;
    const maps = chooses(tree) ? [...new Set(namesIn(step.get(measure)))].map(once) : written(tree, once);
    const rest = Object.keys(p.factors).filter(k => !shown.includes(k) && k in p.factors && !['low', 'high'].includes(k));
    const row = [...maps, chooses(tree) ? ' → ' : ' = ', map(measure)];
    const tail = measure === 'pos' ? [] : ['', map('pos')];
    this.maps.replaceChildren(node('div', {class: 'row'}, row.map(x => typeof x === 'string' ? node('span', {class: 'sign'}, x) : x), tail.length ? node('span', {class: 'sign'}, '→') : null, tail.slice(1)),
      rest.length ? node('div', {class: 'row other'}, node('span', {class: 'sign'}, 'also'), rest.map(k => map(k))) : '');
  }

  // -- the sentence, and the formulas with the numbers of the location that is looked at

  tell() {
    const {data} = this, trees = data.trees(this.method, this.moment), p = data.pairs(this.method, this.moment, this.image);
    const e = this.focus ?? this.best(), n = this.names, measure = data.measure(this.method, this.moment);
    if (e === null) { this.sentence.textContent = 'No candidate on this level.'; this.steps.replaceChildren(); return; }
    const q = this.place(p.loc[e]), parts = [];
    if ('reach' in p.factors) parts.push(`largest distance ${number(n.reach[e])} px, its level takes ${number(n.low[e])} to ${number(n.high[e])} px`);
    for (const k of Object.keys(p.factors)) if (!['reach', 'low', 'high', 'area'].includes(k)) parts.push(`${word(k)} ${number(n[k][e])}`);
    let text = `${this.focus === null ? 'The heaviest candidate' : 'This location'} (x ${number(q.x)}, y ${number(q.y)}, stride ${q.stride} px): ${parts.join(' · ')}.`;
    const w = n.pos[e], soft = w > 0 && w < 1-1e-9;
    if (measure !== 'pos' || soft) {
      const rank = this.bag.filter(i => n[measure][i] > n[measure][e]).length+1;
      text += ` Its ${word(measure)} is ${number(n[measure][e])}, ${ordinal(rank)} of ${this.bag.length}`;
      if (data.hasThreshold(this.method, this.moment)) text += `, ${n[measure][e] >= n.threshold[e] ? 'not below' : 'below'} the threshold ${number(n.threshold[e])}`;
      text += '.';
    }
    const rival = range(p.loc.length).find(i => p.loc[i] === p.loc[e] && p.obj[i] !== p.obj[e] && n.pos[i] > 0);
    const exclusive = trees.some(([, t]) => JSON.stringify(t).includes('"wins"') || JSON.stringify(t).includes('"match"'));
    const flag = k => n[k] && n[k][e] > 0;
    const kind = flag('certain') ? 'certain positive' : flag('ambiguous') ? 'ambiguous' : flag('hard') ? 'hard positive' : flag('soft') ? 'soft positive' : 'positive';
    if (measure !== 'pos' || !soft) text += w > 0 ? ` It is ${/ /.test(kind) ? 'a ' : ''}${kind}, with weight ${number(Math.min(w, 1) > 1-1e-9 ? 1 : w)}.` : ' It is not positive.';
    if (w <= 0 && exclusive && rival !== undefined) text += ` The location goes to the ${data.classes[data.images[this.image].objects[p.obj[rival]].label]}.`;
    this.sentence.textContent = text;
    const value = k => k in n && k !== 'inf' ? number(at(n[k], e)) : k === 'inf' ? '∞' : null;
    this.steps.replaceChildren(node('h2', {}, 'Its formulas, with its numbers'), node('div', {class: 'lines'}, trees.map(([k, tree]) => node('p', {},
      node('b', {}, word(k)), ' = ', written(tree, () => null), node('span', {class: 'numbers'}, ' = ', written(tree, k => node('span', {}, value(k) ?? k), t => node('span', {}, number(at(evaluate(t, n, p), e)))), ' = ', node('b', {}, value(k)))))));
  }
}

// ---- ways in: a page, or a cell of a notebook

function start(root = document.getElementById('microscope')) {
  const data = JSON.parse(document.getElementById('data').textContent);
  window.microscope = new Microscope(root, data);
}
