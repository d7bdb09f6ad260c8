"Rows of the losses for dense prediction."

from math import exp, log, sqrt
import torch
from cases import Case, Golden, maps
from fastdistill.losses import cwd, ifvd, pairwise


def mean(xs):
    return sum(xs) / len(xs)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def cosine(a, b):
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def softmax(x, T):
    e = [exp((o - max(x)) / T) for o in x]
    return [o / sum(e) for o in e]


def cwd_loop(s, t, T=4.0, axis=1):
    out = []
    for a, b in zip(
        s.movedim(axis, 1).flatten(2).flatten(0, 1).tolist(),
        t.movedim(axis, 1).flatten(2).flatten(0, 1).tolist(),
    ):
        q, p = softmax(a, T), softmax(b, T)
        out.append(T * T * sum(y * log(y / x) for x, y in zip(q, p)))
    return mean(out)


def cells_of(x, h, w):
    "Of one (C, H, W) map: the largest number of each channel in each cell of h x w, the last ones cut"
    C, H, W = x.shape
    return [
        [
            max(x[c, i, j].item() for i in range(a, min(a + h, H)) for j in range(b, min(b + w, W)))
            for c in range(C)
        ]
        for a in range(0, H, h)
        for b in range(0, W, w)
    ]


def pairwise_loop(s, t, pool=2):
    out = []
    for a, b in zip(s, t):
        A, B = [
            cells_of(x, *[pool if isinstance(pool, int) else int(n * pool) for n in x.shape[1:]])
            for x in (a, b)
        ]
        out.append(
            mean(
                [
                    (cosine(A[i], A[j]) - cosine(B[i], B[j])) ** 2
                    for i in range(len(A))
                    for j in range(len(A))
                ]
            )
        )
    return mean(out)


def pairwise_tokens_loop(s, t, pool=2, axis=-1):
    return pairwise_loop(s.mT[:, :, :, None], t.mT[:, :, :, None], pool)


def resized(y, h, w):
    return [
        [
            [y[n, i * y.shape[1] // h, j * y.shape[2] // w].item() for j in range(w)]
            for i in range(h)
        ]
        for n in range(len(y))
    ]


def ifvd_loop(s, t, y, classes=None, ignore_index=-100):
    out = []
    H, W = s.shape[2:]
    for n, lab in enumerate(resized(y, H, W)):
        at = [(i, j) for i in range(H) for j in range(W) if lab[i][j] != ignore_index]
        m = []
        for x in (s[n], t[n]):
            f = {p: x[:, p[0], p[1]].tolist() for p in at}
            proto = {
                k: [mean(c) for c in zip(*[f[p] for p in at if lab[p[0]][p[1]] == k])]
                for k in {lab[i][j] for i, j in at}
            }
            m.append([cosine(f[p], proto[lab[p[0]][p[1]]]) for p in at])
        out += [(x - y) ** 2 for x, y in zip(*m)]
    return mean(out)


def labeled(s_shape, t_shape, y_shape, classes=3, ignore=None, axis=1):
    def make(dtype=torch.float64):
        g = torch.Generator().manual_seed(5)
        y = torch.randint(classes, y_shape, generator=g)
        if ignore is not None:
            y[:, 0] = ignore
        return *maps(s_shape, t_shape)(dtype), y

    return make


def counted(g, o):
    "The authors' mean has the ignored positions in it, as zeros"
    y = resized(g['target'], *g['student'].shape[2:])
    on = [v != o['ignore'] for n in y for row in n for v in row]
    return len(on) / sum(on)


ROWS = [
    # its mask is inside the softmax: a test of its own
    Case(
        cwd,
        dict(T=4.0),
        maps((3, 4, 2, 3), scale=3.0),
        cwd_loop,
        mask=False,
        golden=[
            Golden('cwd', lambda o: dict(T=o['tau'])),
            Golden('cwd_mmrazor', lambda o: dict(T=o['tau'])),
        ],
    ),
    Case(cwd, dict(T=1.0, axis=-1), maps((2, 5, 3)), cwd_loop, mask=False),
    Case(
        pairwise,
        {},
        maps((2, 4, 4, 5), (2, 3, 4, 5)),
        pairwise_loop,
        golden=[
            # the authors add 1e-8 to the lengths
            Golden('pairwise_cirkd', lambda o: dict(pool=2), tol=1e-7)
        ],
    ),
    Case(
        pairwise,
        dict(pool=0.5),
        maps((2, 4, 4, 6), (2, 3, 2, 4)),
        pairwise_loop,
        golden=[
            # the value is the same; the released gradient lacks that of the lengths
            Golden(
                'pairwise_skd', lambda o: dict(pool=o['scale']), value='expected_paper', tol=1e-7
            )
        ],
    ),
    Case(pairwise, dict(pool=2, axis=-1), maps((2, 5, 3), (2, 5, 4)), pairwise_tokens_loop),
    Case(pairwise, dict(pool=1), maps((2, 4, 3, 2), (2, 6, 3, 2)), pairwise_loop),
    Case(
        ifvd,
        dict(classes=3),
        labeled((2, 4, 3, 3), (2, 5, 3, 3), (2, 6, 9)),
        ifvd_loop,
        golden=[
            Golden(
                'ifvd',
                lambda o: dict(classes=o['classes'], ignore_index=o['ignore']),
                args=lambda g: (g['student'], g['teacher'], g['target']),
                scale=counted,
            )
        ],
    ),
    # ignored positions are no part of the mean, so 'none' holds more numbers than count: its mask has a test of its own
    Case(
        ifvd,
        dict(classes=3, ignore_index=255),
        labeled((2, 4, 3, 3), (2, 4, 3, 3), (2, 3, 3), ignore=255),
        ifvd_loop,
        mask=False,
    ),
]
