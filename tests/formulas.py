"The language of `Assignment.formula`, in plain NumPy: what each function does with values of pairs, an object's bag at a time."
import numpy as np
from scipy.optimize import linear_sum_assignment

def language(obj, cell, image):
    "Names of a formula. obj, cell, image (E,): object, location of an image, and image of each pair; objects in ascending order."
    bags = [np.flatnonzero(obj == n) for n in np.unique(obj)]
    def by_bag(f):
        def of(x, *args):
            out = np.zeros(len(obj))
            for b in bags: out[b] = f(np.broadcast_to(np.asarray(x, float), len(obj))[b], *args)
            return out
        return of
    def divide(x, y): return x/y if y != 0 else 0*x
    def rank(x): return np.argsort(np.argsort(-x, kind='stable'), kind='stable')
    def wins(x):
        out = np.zeros(len(obj), int)
        for c in np.unique(cell):
            at = np.flatnonzero(cell == c); best = at[np.argmax(x[at])]
            if x[best] > -np.inf: out[best] = 1
        return out
    def match(x):
        out = np.zeros(len(obj), int)
        for i in np.unique(image):
            mine = np.flatnonzero(image == i)
            rows, cols = np.unique(obj[mine], return_inverse=True)[1], np.unique(cell[mine], return_inverse=True)[1]
            table = np.full((rows.max()+1, cols.max()+1), -1.); table[rows, cols] = x[mine]
            r, c = linear_sum_assignment(table, maximize=True)
            taken = {(a, b) for a,b in zip(r, c) if table[a,b] >= 0}
            out[mine] = [(a, b) in taken for a,b in zip(rows, cols)]
        return out
    return dict(exp=np.exp, log=np.log, sqrt=np.sqrt, min=np.minimum, max=np.maximum, where=np.where, inf=np.inf,
                total=by_bag(np.sum), mean=by_bag(np.mean), best=by_bag(np.max), least=by_bag(np.min),
                std=by_bag(lambda x, ddof=0: x.std(ddof=ddof) if len(x) > ddof else 0.),
                share=by_bag(lambda x: divide(x, x.sum())), to_best=by_bag(lambda x: divide(x, x.max())), rank=by_bag(rank), wins=wins, match=match)

def compute(out):
    "The weights that an assignment's formulas make of its factors: str -> (E,) array."
    p = out.pairs
    names = language(p.obj.numpy(), p.cell.numpy(), p.image.numpy()) | {k: v.numpy() for k,v in out.factors.items()} | out.constants
    with np.errstate(all='ignore'):
        for name, text in out.formula.items(): names[name] = eval(text, {'__builtins__': {}}, names)
    return {k: np.broadcast_to(np.asarray(names[k], float), len(p)) for k in out.formula}
