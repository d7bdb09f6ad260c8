"Rows of the response losses."

from math import exp, log, sqrt
import torch
import torch.nn.functional as F
from cases import Case, Golden, logits, maps
from fastdistill.losses import (
    abkd,
    binary_kl,
    dist,
    dkd,
    hard,
    jsd,
    kl,
    mse,
    nkd,
    regression,
    reverse_kl,
    rld,
    skewed_kl,
    soft_ce,
    soft_targets,
    standardized,
    taid,
    ttm,
    tvd,
    uld,
    wttm,
)


# plain loops: one position and one class at a time


def softmax(x, T=1.0):
    "Of one list of numbers"
    m = max(x)
    e = [exp((o - m) / T) for o in x]
    return [o / sum(e) for o in e]


def rows_of(x, axis=1):
    return x.movedim(axis, -1).flatten(0, -2).tolist()


def mean(xs):
    return sum(xs) / len(xs)


def div(p, q):
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q))


def entropy(p):
    return -sum(a * log(a) for a in p)


def pairs(s, t, T=1.0, axis=1):
    return [(softmax(a, T), softmax(b, T)) for a, b in zip(rows_of(s, axis), rows_of(t, axis))]


def kl_loop(s, t, T=4.0, axis=1):
    return mean([T * T * div(p, q) for q, p in pairs(s, t, T, axis)])


def reverse_kl_loop(s, t, T=1.0, axis=1):
    return mean([T * T * div(q, p) for q, p in pairs(s, t, T, axis)])


def jsd_loop(s, t, beta=0.5, T=1.0, axis=1):
    if beta == 0:
        return kl_loop(s, t, T, axis)
    if beta == 1:
        return reverse_kl_loop(s, t, T, axis)
    out = []
    for q, p in pairs(s, t, T, axis):
        m = [beta * b + (1 - beta) * a for a, b in zip(q, p)]
        out.append(T * T * (beta * div(p, m) + (1 - beta) * div(q, m)))
    return mean(out)


def tvd_loop(s, t, T=1.0, axis=1):
    return mean(
        [T * T * sum(abs(a - b) for a, b in zip(q, p)) / 2 for q, p in pairs(s, t, T, axis)]
    )


def soft_ce_loop(s, t, T=4.0, axis=1):
    return mean([-T * T * sum(b * log(a) for a, b in zip(q, p)) for q, p in pairs(s, t, T, axis)])


def mse_loop(s, t, axis=1):
    return mean(
        [
            sum((a - b) ** 2 for a, b in zip(x, y))
            for x, y in zip(rows_of(s, axis), rows_of(t, axis))
        ]
    )


def uld_loop(s, t, T=1.0, axis=1):
    out = []
    for a, b in zip(rows_of(s, axis), rows_of(t, axis)):
        q, p = [sorted(softmax(x, T), reverse=True) + [0.0] * 99 for x in (a, b)]
        out.append(T * T * sum(abs(u - v) for u, v in zip(q, p)))
    return mean(out)


def hard_loop(s, t, axis=1):
    return mean([-log(q[p.index(max(p))]) for q, p in pairs(s, t, axis=axis)])


def binary_kl_loop(s, t, T=4.0):
    def bce(x, p):
        return -p * log(1 / (1 + exp(-x))) - (1 - p) * log(1 / (1 + exp(x)))

    out = []
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist()):
        p = 1 / (1 + exp(-b / T))
        out.append(T * T * (bce(a / T, p) - bce(b / T, p)))
    return mean(out)


def regression_loop(s, t, distance='mse'):
    d = dict(
        mse=lambda x: x * x, l1=abs, huber=lambda x: x * x / 2 if abs(x) < 1 else abs(x) - 0.5
    )[distance]
    return mean(
        [
            mean([d(a - b) for a, b in zip(x, y)])
            for x, y in zip(s.reshape(len(s), -1).tolist(), t.reshape(len(t), -1).tolist())
        ]
    )


def soft_targets_loop(s, t, kind='softmax', T=4.0):
    return dict(
        softmax=lambda: kl_loop(s, t, T),
        sigmoid=lambda: binary_kl_loop(s, t, T),
        regression=lambda: regression_loop(s, t),
    )[kind]()


def without(x, k):
    return [o for i, o in enumerate(x) if i != k]


def dkd_loop(s, t, y, alpha=1.0, beta=8.0, T=4.0, axis=1):
    out = []
    for a, b, k in zip(rows_of(s, axis), rows_of(t, axis), y.flatten().tolist()):
        q, p = softmax(a, T), softmax(b, T)
        target = div([p[k], sum(without(p, k))], [q[k], sum(without(q, k))])
        out.append(
            T
            * T
            * (alpha * target + beta * div(softmax(without(b, k), T), softmax(without(a, k), T)))
        )
    return mean(out)


def nkd_loop(s, t, y, gamma=1.5, T=1.0, axis=1):
    out = []
    for a, b, k in zip(rows_of(s, axis), rows_of(t, axis), y.flatten().tolist()):
        q, p = softmax(without(a, k), T), softmax(without(b, k), T)
        out.append(
            -softmax(b)[k] * log(softmax(a)[k])
            - gamma * T * T * sum(v * log(u) for u, v in zip(q, p))
        )
    return mean(out)


def ttm_loop(s, t, T=4.0, axis=1):
    return mean(
        [div(softmax(b, T), softmax(a)) for a, b in zip(rows_of(s, axis), rows_of(t, axis))]
    )


def wttm_loop(s, t, T=4.0, axis=1):
    return mean(
        [
            sum(p ** (1 / T) for p in softmax(b)) * div(softmax(b, T), softmax(a))
            for a, b in zip(rows_of(s, axis), rows_of(t, axis))
        ]
    )


def skewed_kl_loop(s, t, lam=0.1, reverse=False, T=1.0, axis=1):
    return mean(
        [
            T
            * T
            * div(
                *(
                    (q, [lam * a + (1 - lam) * b for a, b in zip(q, p)])
                    if reverse
                    else (p, [lam * b + (1 - lam) * a for a, b in zip(q, p)])
                )
            )
            for q, p in pairs(s, t, T, axis)
        ]
    )


def taid_loop(s, t, lam=1.0, T=1.0, axis=1):
    target = lambda a, b: [(1 - lam) * u + lam * v for u, v in zip(a, b)]
    return mean(
        [
            T * T * div(softmax(target(a, b), T), softmax(a, T))
            for a, b in zip(rows_of(s, axis), rows_of(t, axis))
        ]
    )


def ab_of(p, q, a, b):
    "One summand; the limits have formulas of their own"
    if b == 0:
        return p**a * log((p / q) ** a) / a**2 - (p**a - q**a) / a**2
    if a == 0:
        return ab_of(q, p, b, 0)
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


def abkd_loop(s, t, alpha=0.8, beta=0.3, T=4.0, axis=1):
    return mean(
        [
            T * T * sum(ab_of(v, u, alpha, beta) for u, v in zip(q, p))
            for q, p in pairs(s, t, T, axis)
        ]
    )


def rld_loop(s, t, y, alpha=1.0, beta=8.0, T=4.0, alpha_T=None, axis=1):
    A, out = alpha_T or T, []
    for a, b, k in zip(rows_of(s, axis), rows_of(t, axis), y.flatten().tolist()):
        q, p = softmax(a, A)[k], max(softmax(b, A))
        below = [i for i in range(len(a)) if b[i] < b[k]]
        rest = div(*[softmax([x[i] for i in below], T) for x in (b, a)]) if below else 0.0
        out.append(alpha * A * A * div([p, 1 - p], [q, 1 - q]) + beta * T * T * rest)
    return mean(out)


def pearson(a, b, eps=1e-8):
    a, b = [o - mean(a) for o in a], [o - mean(b) for o in b]
    return sum(u * v for u, v in zip(a, b)) / (
        sqrt(sum(u * u for u in a)) * sqrt(sum(v * v for v in b)) + eps
    )


def dist_loop(s, t, beta=1.0, gamma=1.0, T=1.0, axis=1):
    q, p = zip(*pairs(s, t, T, axis))
    between, within = [
        mean([pearson(a, b) for a, b in zip(x, y)]) for x, y in ((q, p), (zip(*q), zip(*p)))
    ]
    return T * T * (beta * (1 - between) + gamma * (1 - within))


def z_scores(x, eps=1e-7, correction=1):
    out = []
    for a in rows_of(x):
        std = sqrt(sum((o - mean(a)) ** 2 for o in a) / (len(a) - correction))
        out.append([(o - mean(a)) / (eps + std) for o in a])
    return torch.tensor(out, dtype=torch.float64)


def standardized_loop(loop, **std):
    return lambda s, t, *y, **options: loop(z_scores(s, **std), z_scores(t, **std), *y, **options)


# what stands at s == t where that is not 0


def soft_ce_least(t, T=4.0, axis=1):
    return mean([T * T * entropy(p) for p, _ in pairs(t, t, T, axis)])


def hard_least(t, axis=1):
    return mean([-log(max(p)) for p, _ in pairs(t, t, axis=axis)])


def dist_least(t, **options):
    return dist_loop(t, t, **options)


def nkd_at_teacher(t, y, **options):
    return nkd_loop(t, t, y, **options)


def ttm_at_teacher(t, **options):
    return ttm_loop(t, t, **options)


def wttm_at_teacher(t, **options):
    return wttm_loop(t, t, **options)


def rld_at_teacher(t, y, **options):
    return rld_loop(t, t, y, **options)


# what the stored numbers hold beside ours


def ce(g, k='student'):
    return F.cross_entropy(g[k], g['target'])


def labels_rest(g, o):
    return (1 - o['alpha']) * ce(g)


def n_classes(g):
    return g['student'].shape[1]


def with_labels(g):
    return g['student'], g['teacher'], g['target']


def dist_head(g):
    return g['student_dist'], g['teacher']


def tokens(g):
    return dict(axis=-1, mask=g['labels'] != -100)


def T_of(o):
    return dict(T=o['T'])


def tau_of(o):
    return dict(T=o['tau'])


def T1(o):
    return dict(T=1.0)


def one_over_l(o):
    return dict(T=1 / o['l'])


def rld_options(o):
    return {k: v for k, v in o.items() if k != 'stand'}


def forward_share(o):
    return 1 - o['lam'] if 'lam' in o else o['ratio']


def ce_part(g, o):
    p, q = [g[k][g['labels'] != -100].softmax(-1) for k in ('teacher', 'student')]
    return -forward_share(o) * (p * q.log()).sum(-1).mean()


def kl_part(g, o):
    p = g['teacher'][g['labels'] != -100].softmax(-1)
    return ce_part(g, o) + forward_share(o) * (p * p.log()).sum(-1).mean()


def answers(g, T):
    "Logits of the answers, from the position that predicts the first token, and 1/length: a text's mean, then the mean over texts"

    def answer(k, i, T):
        y = g[f'labels_{k}'][i] != -100
        return g[k][i][y.int().argmax() - 1 :][: y.sum()] / T

    both = [(answer('student', i, T), answer('teacher', i, 1.0)) for i in range(len(g['student']))]
    n = [min(map(len, o)) for o in both]
    return *(torch.cat([o[k][:m] for o, m in zip(both, n)]) for k in (0, 1)), torch.cat(
        [torch.full((m,), 1 / m, dtype=torch.float64) for m in n]
    )


paper = dict(eps=0.0, correction=0)


ROWS = [
    Case(
        kl,
        dict(T=4.0),
        logits(5, 7),
        kl_loop,
        golden=[
            Golden('kd_hinton', T_of, scale=lambda g, o: 1 / o['alpha'], rest=labels_rest),
            # the form with the mean over classes too: C times smaller
            Golden(
                'kd_haitongli', T_of, scale=lambda g, o: n_classes(g) / o['alpha'], rest=labels_rest
            ),
            Golden(
                'kd_haitongli',
                T_of,
                value='expected_paper',
                scale=lambda g, o: 1 / o['alpha'],
                rest=labels_rest,
            ),
            Golden(
                'deit_soft',
                tau_of,
                dist_head,
                scale=lambda g, o: n_classes(g) / o['alpha'],
                rest=labels_rest,
            ),
            Golden(
                'deit_soft',
                tau_of,
                dist_head,
                value='expected_paper',
                scale=lambda g, o: 1 / o['alpha'],
                rest=labels_rest,
            ),
            Golden('mlkd_terms', T_of, only=lambda o: o['term'] == 'kd'),
        ],
    ),
    Case(
        kl,
        dict(T=1.0),
        logits(3, 4, 2, 3),
        kl_loop,
        golden=[
            Golden('cwd_spatial', tau_of),
            Golden('pixel_kd_cirkd', T_of),
            Golden(
                'pixel_kd_ifvd', T_of, scale=lambda g, o: n_classes(g) * o['T'] ** 2
            ),  # mean over classes too, no T^2
            Golden('pixelwise_skd', T1, value='expected_paper'),
        ],
    ),
    Case(
        kl,
        dict(T=2.0, axis=-1),
        logits(2, 3, 6, axis=-1),
        kl_loop,
        golden=[
            Golden('distillm_forward_kl', T1, value='expected_paper', more=tokens),
            Golden('torchtune_forward_kl', T1, value='expected_paper', more=tokens),
        ],
    ),
    Case(reverse_kl, dict(T=2.0), logits(5, 7), reverse_kl_loop),
    Case(
        reverse_kl,
        dict(axis=-1),
        logits(2, 3, 6, axis=-1),
        reverse_kl_loop,
        golden=[
            Golden('distillm_reverse_kl', T1, more=tokens),
            Golden('torchtune_reverse_kl', T1, more=tokens),
            # a share of forward KL; the releases call the cross-entropy by that name
            *[
                Golden(
                    name,
                    T1,
                    more=tokens,
                    value=value,
                    scale=lambda g, o: 1 / (1 - forward_share(o)),
                    rest=rest,
                )
                for name in ('distillm_symmetric_kl', 'torchtune_symmetric_kl')
                for value, rest in (('expected', ce_part), ('expected_paper', kl_part))
            ],
        ],
    ),
    Case(jsd, dict(beta=0.5), logits(5, 7), jsd_loop),
    Case(jsd, dict(beta=0.1, T=2.0), logits(3, 4, 2, 3), jsd_loop),
    Case(jsd, dict(beta=0, T=2.0), logits(5, 7), jsd_loop),
    Case(jsd, dict(beta=1.0), logits(5, 7), jsd_loop),
    Case(
        jsd,
        dict(beta=0.7, axis=-1),
        logits(2, 3, 6, axis=-1),
        jsd_loop,
        golden=[
            Golden('gkd_jsd', lambda o: dict(beta=o['beta'], T=o['T']), more=tokens),
            Golden('distillm_js_distance', lambda o: dict(beta=1 - o['lam']), more=tokens),
        ],
    ),
    Case(tvd, dict(T=2.0), logits(5, 7), tvd_loop),
    Case(
        tvd,
        dict(axis=-1),
        logits(2, 3, 6, axis=-1),
        tvd_loop,
        golden=[Golden('distillm_tv_distance', T1, more=tokens)],
    ),
    Case(uld, dict(), maps((5, 7), (5, 11), scale=3.0), uld_loop),
    Case(uld, dict(T=2.0), maps((3, 6, 2, 3), (3, 4, 2, 3), scale=3.0), uld_loop),
    # the stored one softens the student alone
    Case(
        uld,
        dict(axis=-1),
        maps((2, 3, 6), (2, 3, 9), scale=3.0),
        uld_loop,
        golden=[
            Golden(
                'uld',
                lambda o: dict(axis=-1),
                lambda g, T=T: answers(g, T)[:2],
                more=lambda g, T=T: dict(mask=answers(g, T)[2]),
                only=lambda o, T=T: o['T_s'] == T,
                scale=lambda g, o: 1 / o['weight'],
            )
            for T in (1.0, 2.0)
        ],
    ),
    # the stored cross-entropies have no T^2
    Case(
        soft_ce,
        dict(T=4.0),
        logits(5, 7),
        soft_ce_loop,
        soft_ce_least,
        golden=[
            Golden('soft_ce', T_of, scale=lambda g, o: o['T'] ** 2),
            Golden(
                'tinybert_soft_ce', T_of, scale=lambda g, o: n_classes(g) * o['T'] ** 2
            ),  # mean over classes too
            Golden(
                'tinybert_soft_ce', T_of, value='expected_paper', scale=lambda g, o: o['T'] ** 2
            ),
        ],
    ),
    Case(
        soft_ce,
        dict(T=1.0),
        logits(3, 4, 2, 3),
        soft_ce_loop,
        soft_ce_least,
        golden=[Golden('pixelwise_skd', T1, scale=lambda g, o: 1 / len(g['student']))],
    ),  # summed over the batch
    Case(
        soft_ce,
        dict(T=1.0, axis=-1),
        logits(2, 3, 6, axis=-1),
        soft_ce_loop,
        soft_ce_least,
        golden=[
            Golden('distillm_forward_kl', T1, more=tokens),
            Golden('torchtune_forward_kl', T1, more=tokens),
        ],
    ),
    # the stored ones are means over classes; a temperature without T^2 shrinks the second
    Case(
        mse,
        dict(),
        logits(5, 7),
        mse_loop,
        golden=[
            Golden('logit_mse', lambda o: {}, scale=lambda g, o: n_classes(g)),
            Golden(
                'logit_mse_temperature', lambda o: {}, scale=lambda g, o: n_classes(g) * o['T'] ** 2
            ),
        ],
    ),
    Case(mse, dict(axis=-1), logits(2, 3, 6, axis=-1), mse_loop),
    Case(
        hard,
        dict(),
        logits(5, 7),
        hard_loop,
        hard_least,
        least=False,
        golden=[
            Golden(
                'deit_hard',
                lambda o: {},
                dist_head,
                scale=lambda g, o: 1 / o['alpha'],
                rest=labels_rest,
            )
        ],
    ),
    Case(hard, dict(axis=1), logits(3, 4, 2, 3), hard_loop, hard_least, least=False),
    Case(binary_kl, dict(T=4.0), logits(5, 7), binary_kl_loop),
    Case(binary_kl, dict(T=1.0), logits(3, 2, 2, 3), binary_kl_loop),
    Case(regression, dict(), maps((6, 3, 2), (6, 6)), regression_loop),
    Case(regression, dict(distance='l1'), maps((6,), (6, 1)), regression_loop),
    Case(
        regression,
        dict(distance='huber'),
        maps((4, 2, 3), (4, 2, 3), scale=2.0),
        regression_loop,
    ),
    Case(soft_targets, dict(T=2.0), logits(5, 7), soft_targets_loop),
    Case(soft_targets, dict(kind='sigmoid', T=2.0), logits(5, 7), soft_targets_loop),
    Case(soft_targets, dict(kind='regression'), maps((6, 1), (6,)), soft_targets_loop),
    Case(dkd, dict(), logits(5, 7, y=True), dkd_loop, golden=[Golden('dkd', args=with_labels)]),
    Case(dkd, dict(alpha=0.5, beta=2.0, T=1.0), logits(3, 4, 2, 3, y=True), dkd_loop),
    Case(dkd, dict(beta=1.0, T=2.0, axis=-1), logits(2, 3, 6, y=True, axis=-1), dkd_loop),
    Case(
        nkd,
        dict(),
        logits(5, 7, y=True),
        nkd_loop,
        nkd_at_teacher,
        least=False,
        golden=[Golden('nkd', lambda o: dict(gamma=o['gamma'], T=o['temp']), with_labels)],
    ),
    Case(
        nkd,
        dict(gamma=1.0, T=2.0),
        logits(3, 4, 2, 3, y=True),
        nkd_loop,
        nkd_at_teacher,
        least=False,
    ),
    # the student's softmax has no temperature: not 0 at the teacher's own logits
    Case(
        ttm,
        dict(),
        logits(5, 7),
        ttm_loop,
        ttm_at_teacher,
        least=False,
        golden=[Golden('ttm', one_over_l)],
    ),
    Case(
        ttm,
        dict(T=2.0, axis=-1),
        logits(2, 3, 6, axis=-1),
        ttm_loop,
        ttm_at_teacher,
        least=False,
    ),
    Case(
        wttm,
        dict(),
        logits(5, 7),
        wttm_loop,
        wttm_at_teacher,
        least=False,
        golden=[Golden('wttm', one_over_l)],
    ),
    Case(wttm, dict(T=2.0), logits(3, 4, 2, 3), wttm_loop, wttm_at_teacher, least=False),
    Case(skewed_kl, dict(), logits(5, 7), skewed_kl_loop),
    Case(skewed_kl, dict(lam=0.5, reverse=True, T=2.0), logits(3, 4, 2, 3), skewed_kl_loop),
    Case(skewed_kl, dict(lam=0, T=2.0), logits(5, 7), skewed_kl_loop),
    Case(skewed_kl, dict(lam=0, reverse=True), logits(5, 7), skewed_kl_loop),
    Case(
        skewed_kl,
        dict(lam=0.3, axis=-1),
        logits(2, 3, 6, axis=-1),
        skewed_kl_loop,
        golden=[
            Golden(
                'distillm_skewed_forward_kl',
                lambda o: dict(lam=o['lam']),
                value='expected_paper',
                more=tokens,
            ),
            Golden(
                'distillm_skewed_reverse_kl',
                lambda o: dict(lam=o['lam'], reverse=True),
                more=tokens,
            ),
        ],
    ),
    Case(taid, dict(T=2.0), logits(5, 7), taid_loop),
    Case(taid, dict(lam=0.4), logits(5, 7), taid_loop, gradcheck=False),
    Case(taid, dict(lam=0.7, axis=-1), logits(2, 3, 6, axis=-1), taid_loop, gradcheck=False),
    Case(taid, dict(lam=0.0), logits(5, 7), taid_loop, gradcheck=False),
    Case(abkd, dict(), logits(5, 7), abkd_loop),
    Case(abkd, dict(alpha=0.5, beta=0.5, T=1.0, axis=-1), logits(2, 3, 6, axis=-1), abkd_loop),
    Case(abkd, dict(alpha=1.0, beta=0.0, T=2.0), logits(3, 4, 2, 3), abkd_loop),
    Case(abkd, dict(alpha=0.0, beta=1.0, T=2.0), logits(5, 7), abkd_loop),
    Case(abkd, dict(alpha=0.7, beta=0.0, T=1.0), logits(5, 7), abkd_loop),
    Case(
        rld,
        dict(),
        logits(5, 7, y=True),
        rld_loop,
        rld_at_teacher,
        least=False,
        golden=[Golden('rld', rld_options, with_labels, only=lambda o: not o['stand'])],
    ),
    Case(
        rld,
        dict(alpha=0.5, beta=2.0, T=1.0, alpha_T=3.0),
        logits(3, 4, 2, 3, y=True),
        rld_loop,
        rld_at_teacher,
        least=False,
    ),
    Case(
        rld,
        dict(beta=1.0, T=2.0, axis=-1),
        logits(2, 3, 6, y=True, axis=-1),
        rld_loop,
        rld_at_teacher,
        least=False,
    ),
    Case(
        standardized(rld),
        dict(T=2.0),
        logits(5, 7, y=True),
        standardized_loop(rld_loop),
        lambda t, y, **o: rld_at_teacher(z_scores(t), y, **o),
        least=False,
        name='rld-standardized',
        golden=[Golden('rld', rld_options, with_labels, only=lambda o: o['stand'])],
    ),
    Case(
        dist,
        dict(),
        logits(5, 7),
        dist_loop,
        dist_least,
        shared=True,
        golden=[
            Golden('dist', lambda o: dict(beta=o['beta'], gamma=o['gamma'], T=o['tau'])),
            Golden('dist_seg', lambda o: dict(beta=o['beta'], gamma=o['gamma'])),
        ],
    ),
    Case(
        dist,
        dict(beta=2.0, gamma=0.5, T=4.0),
        logits(2, 4, 2, 3),
        dist_loop,
        dist_least,
        shared=True,
    ),
    Case(dist, dict(axis=-1), logits(2, 3, 6, axis=-1), dist_loop, dist_least, shared=True),
    Case(
        standardized(kl),
        dict(T=2.0),
        logits(5, 7),
        standardized_loop(kl_loop),
        name='kl-standardized',
        golden=[Golden('logit_std_kd', T_of)],
    ),
    Case(
        standardized(kl, **paper),
        dict(T=2.0),
        logits(5, 7),
        standardized_loop(kl_loop, **paper),
        name='kl-standardized-paper',
        golden=[Golden('logit_std_kd', T_of, value='expected_paper')],
    ),
    Case(
        standardized(dkd),
        dict(T=2.0),
        logits(5, 7, y=True),
        standardized_loop(dkd_loop),
        name='dkd-standardized',
        golden=[Golden('logit_std_dkd', args=with_labels)],
    ),
    Case(
        standardized(dkd, **paper),
        dict(T=2.0),
        logits(5, 7, y=True),
        standardized_loop(dkd_loop, **paper),
        name='dkd-standardized-paper',
        golden=[Golden('logit_std_dkd', args=with_labels, value='expected_paper')],
    ),
    Case(
        standardized(dist),
        dict(),
        logits(5, 7),
        standardized_loop(dist_loop),
        lambda t: dist_least(z_scores(t)),
        shared=True,
        name='dist-standardized',
    ),
]
