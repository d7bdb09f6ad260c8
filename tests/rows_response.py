"Rows of the response losses."
from math import exp, log
import torch
from cases import Case, Golden, logits
from fastdistill.losses import KL, kl


def softmax(x, T=1.):
    "Of one list of numbers"
    m = max(x)
    e = [exp((o-m)/T) for o in x]
    return [o/sum(e) for o in e]

def rows_of(x, axis=1): return x.movedim(axis, -1).flatten(0, -2).tolist()

def mean(xs): return sum(xs)/len(xs)

def kl_loop(s, t, T=4., axis=1):
    out = []
    for a,b in zip(rows_of(s, axis), rows_of(t, axis)):
        q,p = softmax(a, T), softmax(b, T)
        out.append(T*T*sum(pi*(log(pi)-log(qi)) for pi,qi in zip(p, q)))
    return mean(out)

def hinton_rest(g, o):
    "The golden number is the whole loss: the labels' part is (1-alpha) CE"
    return (1-o['alpha'])*torch.nn.functional.cross_entropy(g['student'], g['target'])

ROWS = [
    Case(kl, KL, dict(T=4.), logits(5, 7), kl_loop, golden=[
        Golden('kd_hinton', lambda o: dict(T=o['T']), scale=lambda g,o: 1/o['alpha'], rest=hinton_rest),
        Golden('cwd_spatial', lambda o: dict(T=o['tau']))]),
    Case(kl, KL, dict(T=1.), logits(3, 4, 2, 3), kl_loop),
    Case(kl, KL, dict(T=2., axis=-1), logits(2, 3, 6, axis=-1), kl_loop),
]
