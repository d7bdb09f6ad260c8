"Rows of the feature losses."

from math import exp, log, log1p, sqrt
import torch
from cases import Case, Golden, maps
from fastdistill.losses import (
    OFD,
    VID,
    ab,
    at,
    cosine,
    fsp,
    hint,
    nst,
    ofd,
    pkd,
    vid,
)


def mean(xs):
    return sum(xs) / len(xs)


def samples(x, axis=1):
    "[sample][channel][position]"
    return x.movedim(axis, 1).flatten(2).tolist() if x.dim() > 2 else x.unsqueeze(2).tolist()


def unit(v):
    n = sqrt(sum(o * o for o in v))
    return [o / n for o in v] if n else v


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def elements(f, s, t, axis=1):
    "Mean of f(student's number, teacher's, channel) over everything"
    return mean(
        [
            f(x, y, c)
            for a, b in zip(samples(s, axis), samples(t, axis))
            for c, (p, q) in enumerate(zip(a, b))
            for x, y in zip(p, q)
        ]
    )


def hint_loop(s, t, axis=1):
    return elements(lambda x, y, c: (x - y) ** 2, s, t, axis)


def cosine_loop(s, t, axis=1):
    return mean(
        [
            1 - dot(unit(u), unit(v))
            for a, b in zip(samples(s, axis), samples(t, axis))
            for u, v in zip(zip(*a), zip(*b))
        ]
    )


def at_loop(s, t, p=2.0, axis=1):
    out = []
    for a, b in zip(samples(s, axis), samples(t, axis)):
        q, k = [unit([mean([abs(v) ** p for v in col]) for col in zip(*m)]) for m in (a, b)]
        out.append(mean([(x - y) ** 2 for x, y in zip(q, k)]))
    return mean(out)


def pool_loop(x, h, w):
    "(B, C, H, W) to (B, C, h, w) where these divide H and W"
    f, g = x.shape[2] // h, x.shape[3] // w
    y = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            y[:, :, i, j] = sum(
                x[:, :, f * i + a, g * j + b] for a in range(f) for b in range(g)
            ) / (f * g)
    return y


def at_pooled_loop(s, t, p=2.0):
    return at_loop(pool_loop(s, *t.shape[2:]), t, p)


def nst_loop(s, t, axis=1):
    out = []
    for a, b in zip(samples(s, axis), samples(t, axis)):
        a, b = [unit(v) for v in a], [unit(v) for v in b]
        k = lambda u, v: mean([dot(x, y) ** 2 for x in u for y in v])
        out.append(k(a, a) + k(b, b) - 2 * k(a, b))
    return mean(out)


def fsp_loop(s, t):
    out = 0.0
    for i in range(len(s) - 1):
        G = []
        for x in (s, t):
            a, b = x[i], x[i + 1]
            hw = [min(*o) for o in zip(a.shape[2:], b.shape[2:])]
            a, b = samples(pool_loop(a, *hw)), samples(pool_loop(b, *hw))
            G.append(
                [mean([p * q for p, q in zip(u, v)]) for m, n in zip(a, b) for u in m for v in n]
            )
        out += mean([(p - q) ** 2 for p, q in zip(*G)])
    return out


def ab_loop(s, t, margin=1.0):
    def f(x, y, c):
        if y > 0:
            return (x - margin) ** 2 if x <= margin else 0.0
        return (x + margin) ** 2 if x > -margin else 0.0

    return elements(f, s, t)


def ofd_loop(s, t, margin=None, axis=1):
    if margin is None:
        cols = [[v for m in samples(t, axis) for v in m[c] if v < 0] for c in range(t.shape[axis])]
        margin = [mean(c) if c else 0.0 for c in cols]
    else:
        margin = torch.as_tensor(margin).flatten().tolist() * (
            1 if torch.is_tensor(margin) else t.shape[axis]
        )

    def f(x, y, c):
        y = max(y, margin[c])
        return (x - y) ** 2 if x > y or y > 0 else 0.0

    return elements(f, s, t, axis)


def vid_loop(s, t, log_scale=None, var=5.0, eps=1e-5, axis=1):
    def f(x, y, c):
        v = var if log_scale is None else log1p(exp(log_scale[c].item())) + eps
        return ((x - y) ** 2 / v + log(v)) / 2

    return elements(f, s, t, axis)


def pkd_loop(s, t, axis=1):
    out = []
    for c in range(s.shape[axis]):
        a, b = [[v for m in samples(x, axis) for v in m[c]] for x in (s, t)]
        a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
        out.append(1 - dot(a, b) / sqrt(dot(a, a) * dot(b, b)))
    return mean(out)


def per_sample(g, name='student'):
    return g[name][0].numel()


def stacks(*names):
    "Several layers: what is stored is a sum over them"
    return lambda g: tuple([g[f'{n}_{i}'] for i in range(9) if f'{n}_{i}' in g] for n in names)


layers = stacks('student', 'teacher')


def last(g):
    return tuple(o[-1] for o in layers(g))


def at_rest(g, o):
    return sum(at(a, b, p=o['p']) for a, b in list(zip(*layers(g)))[:-1])


def ab_rest(g, o):
    s, t = layers(g)
    return sum(
        0.003 * 2.0 ** (i - len(s) + 1) * s[i][0].numel() * ab(s[i], t[i], margin=o['margin'])
        for i in range(len(s) - 1)
    )


def lists(shapes, t_shapes=None):
    def make(dtype=torch.float64):
        pairs = [
            maps(a, b, seed=i)(dtype) for i, (a, b) in enumerate(zip(shapes, t_shapes or shapes))
        ]
        return [s for s, _ in pairs], [t for _, t in pairs]

    return make


def scale_of(g):
    return dict(log_scale=g['log_scale'])


SCALE = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)

ROWS = [
    Case(
        hint,
        {},
        maps((3, 4, 2, 3)),
        hint_loop,
        golden=[
            Golden('fitnet_mse', lambda o: {}),
            Golden(
                'fitnet_mse',
                lambda o: {},
                value='expected_paper',
                scale=lambda g, o: 2 / per_sample(g),
            ),
        ],
    ),
    Case(hint, dict(axis=-1), maps((2, 5, 3), seed=1), hint_loop),
    Case(hint, {}, maps((4, 6)), hint_loop, name='hint-vectors'),
    Case(
        at,
        {},
        maps((3, 4, 2, 3), (3, 5, 2, 3)),
        at_loop,
        golden=[
            Golden('at', lambda o: {}),
            Golden('at_repdistiller', lambda o: dict(p=o['p']), args=last, rest=at_rest),
        ],
    ),
    Case(at, dict(p=1.0), maps((3, 4, 3, 3)), at_loop),
    Case(
        at,
        dict(p=4.0),
        maps((2, 3, 4, 6), (2, 5, 2, 3)),
        at_pooled_loop,
        name='at-pools-the-student',
    ),
    Case(at, dict(axis=-1), maps((2, 5, 3), (2, 5, 4)), at_loop),
    Case(
        nst,
        {},
        maps((3, 4, 2, 3), (3, 5, 2, 3)),
        nst_loop,
        golden=[Golden('nst', lambda o: {}, args=last)],
    ),
    Case(nst, {}, maps((2, 6, 2, 2)), nst_loop, name='nst-few-positions'),
    Case(nst, dict(axis=-1), maps((2, 5, 3), (2, 5, 2)), nst_loop),
    Case(
        fsp,
        {},
        lists([(2, 2, 4, 4), (2, 3, 4, 4), (2, 4, 2, 2)]),
        fsp_loop,
        golden=[
            Golden('fsp', lambda o: {}, args=layers),
            Golden(
                'fsp',
                lambda o: {},
                args=layers,
                value='expected_paper',
                scale=lambda g, o: 1 / (g['student_0'].shape[1] * g['student_1'].shape[1]),
            ),
        ],
    ),
    # not 0 at the teacher, whose numbers near 0 are within the margin: 0 where the signs agree by it (a test of its own)
    Case(
        ab,
        dict(margin=1.0),
        maps((3, 4, 2, 3)),
        ab_loop,
        at_teacher=None,
        golden=[
            Golden(
                n,
                lambda o: dict(margin=o['margin']),
                args=last,
                scale=lambda g, o: 1 / (0.003 * last(g)[0][0].numel()),
                rest=ab_rest,
            )
            for n in ('ab', 'ab_repdistiller')
        ],
    ),
    Case(
        ofd,
        {},
        maps((3, 4, 2, 3)),
        ofd_loop,
        golden=[
            Golden(
                'ofd',
                lambda o: {},
                more=lambda g: dict(margin=g['margin']),
                scale=lambda g, o: o['divide'] / g['student'].numel(),
            )
        ],
        module=OFD,
    ),
    Case(ofd, dict(margin=-0.25), maps((3, 4, 2, 3)), ofd_loop, module=OFD),
    Case(
        ofd,
        dict(margin=torch.tensor([-0.3, 0.0, -1.0]), axis=-1),
        maps((2, 4, 3)),
        ofd_loop,
        name='ofd-tokens',
        module=OFD,
    ),
    Case(
        vid,
        dict(log_scale=SCALE),
        maps((3, 3, 2, 4)),
        vid_loop,
        name='vid',
        at_teacher=lambda t, **o: vid_loop(t, t, **o),
        golden=[
            Golden('vid', lambda o: dict(eps=o['eps']), more=scale_of),
            Golden(
                'vid',
                lambda o: dict(eps=o['eps']),
                more=scale_of,
                value='expected_paper',
                scale=lambda g, o: 1 / per_sample(g),
            ),
        ],
        module=VID,
    ),
    Case(
        vid,
        dict(log_scale=SCALE, axis=-1, eps=0.1),
        maps((2, 4, 3)),
        vid_loop,
        name='vid-tokens',
        at_teacher=lambda t, **o: vid_loop(t, t, **o),
        module=VID,
    ),
    # one correlation for the whole batch: no value for each sample; its mask has a test of its own
    Case(cosine, {}, maps((3, 4, 2, 3)), cosine_loop),
    Case(
        cosine,
        dict(axis=-1),
        maps((2, 4, 3), seed=2),
        cosine_loop,
        golden=[
            Golden(
                'hidden_cosine',
                lambda o: dict(axis=-1),
                more=lambda g: dict(mask=g['mask']) if 'mask' in g else {},
            )
        ],
    ),
    Case(
        pkd,
        {},
        maps((3, 4, 2, 3)),
        pkd_loop,
        mask=False,
        golden=[
            Golden('pkd_pearson', lambda o: {}, value='expected_paper'),
            # the authors' code: (M-1)/M of it, and 1e-6 on the standard deviations
            Golden(
                'pkd_pearson',
                lambda o: {},
                scale=lambda g, o: 1 / (1 - g['student'].shape[1] / g['student'].numel()),
                tol=1e-5,
            ),
        ],
    ),
    Case(pkd, dict(axis=-1), maps((2, 4, 3), seed=2), pkd_loop, mask=False),
]
