"Rows of the relation losses."

from math import exp, log, sqrt
import torch
from cases import Case, Golden, maps
from fastdistill.losses import SEED, cc, ickd, pkt, rkd, seed, sp


def mean(xs):
    return sum(xs) / len(xs)


def points(x):
    return x.flatten(1).tolist()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def unit(v):
    n = sqrt(dot(v, v))
    return [o / n for o in v] if n else v


def gram(rows):
    return [[dot(a, b) for b in rows] for a in rows]


def apart(a, b):
    return [x - y for x, y in zip(a, b)]


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def square(A, B):
    return mean([(x - y) ** 2 for a, b in zip(A, B) for x, y in zip(a, b)])


def rkd_loop(s, t, w_d=25.0, w_a=50.0):
    d, a = [], []
    for x in map(points, (s, t)):
        n = range(len(x))
        far = [[sqrt(dot(apart(x[i], x[j]), apart(x[i], x[j]))) for j in n] for i in n]
        mu = mean([v for row in far for v in row if v > 0])
        d.append([v / mu for row in far for v in row])
        a.append(
            [dot(unit(apart(x[j], x[i])), unit(apart(x[k], x[i]))) for i in n for j in n for k in n]
        )
    return w_d * mean([huber(x - y) for x, y in zip(*d)]) + w_a * mean(
        [huber(x - y) for x, y in zip(*a)]
    )


def sp_loop(s, t):
    return square(*[[unit(row) for row in gram(points(x))] for x in (s, t)])


def cc_loop(s, t, kernel='gaussian', gamma=0.4, degree=2, normalize=True):
    def k(v):
        if kernel == 'bilinear':
            return v
        out, term = 0.0, 1.0
        for p in range(degree + 1):
            out, term = out + term, term * 2 * gamma * v / (p + 1)
        return exp(-2 * gamma) * out

    return square(
        *[
            [[k(v) for v in row] for row in gram([unit(r) if normalize else r for r in points(x)])]
            for x in (s, t)
        ]
    )


def pkt_loop(s, t):
    out = []
    q, p = [gram([unit(r) for r in points(x)]) for x in (s, t)]
    for i in range(len(s)):
        a, b = [[(1 + x[i][j]) / 2 for j in range(len(s)) if j != i] for x in (q, p)]
        out.append(sum(y / sum(b) * log((y / sum(b)) / (x / sum(a))) for x, y in zip(a, b)))
    return mean(out)


def seed_loop(s, t, queue=None, T_s=0.2, T_t=0.01):
    "The paper's formula, for each sample: all embeddings of the batch stand in the queue"
    anchors = [
        unit(z)
        for z in points(t) + ([] if queue is None else [z for z in queue.tolist() if any(z)])
    ]
    out = []
    for a, b in zip(points(s), points(t)):
        q, p = [[exp((dot(unit(z), d) - 1) / T) for d in anchors] for z, T in ((a, T_s), (b, T_t))]
        out.append(-sum(y / sum(p) * log(x / sum(q)) for x, y in zip(q, p)))
    return mean(out)


def ickd_loop(s, t, axis=1):
    out = []
    for a, b in zip(s.movedim(axis, 1).flatten(2).tolist(), t.movedim(axis, 1).flatten(2).tolist()):
        A, B = [[unit(row) for row in gram(x)] for x in (a, b)]
        out.append(sum((x - y) ** 2 for u, v in zip(A, B) for x, y in zip(u, v)) / len(A))
    return mean(out)


def kernel(o):
    return dict(
        kernel=o['kernel'], gamma=o.get('gamma', 0.4), degree=o.get('max_p', 2), normalize=False
    )


# earlier embeddings; a part of the queue is still empty
QUEUE = torch.cat([maps((5, 4), seed=7)()[0], torch.zeros(3, 4, dtype=torch.float64)])

ROWS = [
    Case(
        rkd,
        {},
        maps((5, 6), (5, 4)),
        rkd_loop,
        golden=[Golden('rkd', lambda o: dict(w_d=o['w_d'], w_a=o['w_a']))],
    ),
    Case(
        rkd,
        dict(w_d=1.0, w_a=0.0),
        maps((4, 3, 2, 2), (4, 5, 3, 1)),
        rkd_loop,
        golden=[Golden('rkd_distance', lambda o: dict(w_d=1.0, w_a=0.0))],
    ),
    Case(
        rkd,
        dict(w_d=0.0, w_a=1.0),
        maps((4, 3, 2)),
        rkd_loop,
        golden=[Golden('rkd_angle', lambda o: dict(w_d=0.0, w_a=1.0))],
    ),
    Case(sp, {}, maps((4, 3, 2, 2), (4, 5, 3, 1)), sp_loop, golden=[Golden('sp', lambda o: {})]),
    Case(
        cc,
        {},
        maps((4, 3), (4, 5)),
        cc_loop,
        golden=[Golden('cc_kernel', kernel, value='expected_paper')],
    ),
    Case(cc, dict(degree=5, gamma=1.0), maps((3, 3)), cc_loop),
    Case(cc, dict(kernel='bilinear'), maps((4, 3, 2), (4, 5)), cc_loop),
    Case(cc, dict(kernel='bilinear', normalize=False), maps((4, 3), (4, 5)), cc_loop),
    # the paper's: a sum over samples, where ours is the mean
    Case(
        pkt,
        {},
        maps((4, 6), (4, 3)),
        pkt_loop,
        golden=[
            Golden(
                'pkt',
                lambda o: {},
                value='expected_paper',
                scale=lambda g, o: 1 / len(g['student']),
            )
        ],
    ),
    Case(seed, {}, maps((4, 6)), seed_loop, at_teacher=None, module=SEED),
    Case(
        seed,
        dict(queue=QUEUE, T_s=0.1, T_t=0.1),
        maps((3, 4)),
        seed_loop,
        at_teacher=lambda t, **o: seed_loop(t, t, **o),
        name='seed-queue',
        module=SEED,
    ),
    Case(
        ickd,
        {},
        maps((3, 4, 2, 3), (3, 4, 3, 3)),
        ickd_loop,
        golden=[
            Golden('ickd', lambda o: {}),
            Golden('ickd_imagenet', lambda o: {}, scale=lambda g, o: len(g['student'])),
        ],
    ),
    Case(ickd, dict(axis=-1), maps((2, 5, 3), (2, 4, 3)), ickd_loop),
]
