"""Draws docs/img for losses of outputs, from the losses themselves:

    python docs/output_pictures.py          # all
    python docs/output_pictures.py dkd tvd  # only these

Most have three parts: what the loss compares, its value while one output of the student changes, and how a gradient step
moves the student's outputs. Both models look at one picture, which exists only as the logits below."""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from fastdistill import losses
from fastdistill.losses.decoupled import without_class
from make_pictures import save

CLASSES = 'cat lynx fox dog car ship'.split()
TEACHER = torch.tensor([5.0, 3.6, 2.2, 1.5, -2.0, -3.0])
STUDENT = torch.tensor([1.6, 0.4, 2.2, 0.0, 1.0, -1.0])
CAT, LYNX, FOX, DOG, CAR, SHIP = range(6)
LABELS = 'cat grass fence person car ship'.split()  # of a model that names all it sees
BLACK, RED, GREY, BLUE, ORANGE, GREEN = 'k', 'tab:red', '.6', '#2f6fc5', '#c05020', '#3a8a3a'
COLORS = BLUE, ORANGE, GREEN, RED
SMALL = 9


def value(loss, s, t):
    "Of one sample"
    return loss(s[None], t[None]).item()


def with_output(s, k, x):
    s = s.clone()
    s[k] = x
    return s


def step(loss, s, t):
    "By how much a gradient step moves each output of the student, compared with the others"
    with torch.enable_grad():
        s = s.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(s[None], t[None]), s)
    return -g / g.abs().sum()


def softened(x, T=1.0):
    return (x / T).softmax(-1)


# ---------------------------------------------------------------------------------------------------- parts


def panels(ratios=(1.25, 1.15, 1.0)):
    fig = Figure(figsize=(9.5, 2.6), layout='constrained')
    fig.get_layout_engine().set(w_pad=0.08)
    return fig, fig.subplots(1, len(ratios), width_ratios=ratios)


def plain(ax, title):
    ax.set_title(title, fontsize=10)
    ax.tick_params(labelsize=8)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)


def bars(ax, rows, names, title, legend='lower right'):
    "Horizontal bars: (name, values, color) for each model"
    n = len(rows)
    for i, (who, values, color) in enumerate(rows):
        at = torch.arange(len(names)) + (i - (n - 1) / 2) * 0.8 / n
        ax.barh(at.numpy(), values.numpy(), 0.76 / n, color=color, label=who)
    plain(ax, title)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if min(min(o[1]) for o in rows) < 0:
        ax.axvline(0, color='k', lw=0.8)
    ax.legend(fontsize=8, frameon=False, loc=legend)


def curves(ax, losses, x, make, title, xlabel, now=None, legend='best', lowest=True):
    "The value of each loss of (name, loss, color) for the student and the teacher that `make` returns"
    for name, loss, color in losses:
        y = np.array([value(loss, *make(o)) for o in x.tolist()])
        ax.plot(x.numpy(), y, color=color, lw=1.6, label=name, zorder=2 if color == GREY else 3)
        low = int(y.argmin())
        if lowest and 0 < low < len(x) - 1:
            ax.plot(x[low], y[low], 'o', ms=5, color=color, zorder=4)
    if now is not None:
        ax.axvline(now, color=RED, lw=0.9, ls=':')
        ax.text(
            now, 1.0, ' now', color=RED, fontsize=8, va='top', transform=ax.get_xaxis_transform()
        )
    plain(ax, title)
    ax.set_xlabel(xlabel, fontsize=SMALL)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.legend(fontsize=8, frameon=False, loc=legend)


def moves(ax, loss, s, t, names, beside=None, title='a step moves its logits'):
    "Blue bars to the right: raised; orange bars to the left: lowered. Grey marks: by another loss"
    d = step(loss, s, t).tolist()
    at = range(len(names))
    ax.barh(at, d, 0.6, color=[BLUE if o > 0 else ORANGE for o in d])
    if beside is not None:
        name, other = beside
        ax.plot(step(other, s, t).tolist(), at, 'D', ms=4.5, mfc='w', mec='.35', label=name)
        ax.legend(fontsize=8, frameon=False, loc='best', handletextpad=0.2)
    ax.axvline(0, color='k', lw=0.8)
    plain(ax, title)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_xlabel('← lowered     raised →', fontsize=SMALL)


@dataclass
class Plain:
    "A picture in the three usual parts"

    rows: list  # what is compared: (name, values, color)
    title: str
    curves: list  # (name, loss, color)
    moved: int  # the class whose logit changes
    span: tuple
    beside: tuple | None = None  # (name, loss): whose steps are marked
    names: list | None = None
    legend: str = 'lower right'
    curve_legend: str = 'best'
    s: torch.Tensor | None = None
    t: torch.Tensor | None = None
    loss: object = None  # whose steps are drawn; None for the first curve's
    outputs: list | None = None

    def draw(self, name):
        s, t = [a if b is None else b for a, b in ((STUDENT, self.s), (TEACHER, self.t))]
        outputs = self.outputs or CLASSES
        fig, (a, b, c) = panels()
        bars(a, self.rows, self.names or outputs, self.title, self.legend)
        curves(
            b,
            self.curves,
            torch.linspace(*self.span, 161),
            lambda x: (with_output(s, self.moved, x), t),
            'the loss while one logit changes',
            f"student's logit of {outputs[self.moved]}",
            s[self.moved].item(),
            self.curve_legend,
        )
        moves(c, self.loss or self.curves[0][1], s, t, outputs, self.beside)
        save(fig, name)


def both(T=1.0, s=STUDENT, t=TEACHER):
    return [('teacher', softened(t, T), BLACK), ('student', softened(s, T), RED)]


def of(loss, *labels, **options):
    "The loss with its options, and the labels of one sample"
    labels = [torch.tensor([o]) for o in labels]
    return lambda s, t: loss(s, t, *labels, **options)


def kl(T):
    return of(losses.kl, T=T)


def in_two_parts(T, sure_s, sure_t, kept, s=STUDENT, t=TEACHER):
    "Rows for losses that treat the label separately: sure or not, then the classes that are kept among themselves"
    out = torch.tensor([k not in kept for k in range(6)])
    rest = [softened(x.masked_fill(out, -torch.inf), T)[kept] for x in (t, s)]
    sure = [torch.tensor([p, 1 - p]) for p in (sure_t, sure_s)]
    values = [torch.cat(o) for o in zip(sure, rest)]
    return [('teacher', values[0], BLACK), ('student', values[1], RED)]


# ---------------------------------------------------------------------------------------------------- the usual three parts


def usual():
    "Pictures of losses of logits"
    p_s, p_t = softened(STUDENT), softened(TEACHER)
    mixed = lambda w: w * p_t + (1 - w) * p_s
    others = [k for k in range(6) if k != CAT]
    sure = {T: [softened(x, T)[CAT].item() for x in (STUDENT, TEACHER)] for T in (1.0, 4.0)}
    wrong_s, wrong_t = STUDENT, TEACHER
    below = [k for k in range(6) if wrong_t[k] < wrong_t[LYNX]]
    wrong = softened(wrong_s, 4.0)[LYNX].item(), softened(wrong_t, 4.0).max().item()
    first = without_class(TEACHER[None], torch.tensor([CAT]), 1)[0]
    assert [k for k in range(6) if first[k].isfinite()] == others
    return dict(
        reverse_kl=Plain(
            both(),
            'probabilities',
            [('reverse_kl', of(losses.reverse_kl), BLUE), ('kl, T=1', kl(1.0), GREY)],
            CAR,
            (-6, 6),
            ('kl, T=1', kl(1.0)),
        ),
        skewed_kl=Plain(
            [*both(), ('mixture', mixed(0.1), BLUE)],
            'teacher and mixture, lam=0.1',
            [('skewed_kl', of(losses.skewed_kl), BLUE), ('kl, T=1', kl(1.0), GREY)],
            CAT,
            (-10, 8),
            ('kl, T=1', kl(1.0)),
        ),
        jsd=Plain(
            [*both(), ('mixture', mixed(0.5), BLUE)],
            'both with their mixture, beta=0.5',
            [
                (f'beta={o}', of(losses.jsd, beta=o), c)
                for o, c in ((0.5, BLUE), (0.1, ORANGE), (0.9, GREEN))
            ],
            CAT,
            (-8, 10),
            ('kl, T=1', kl(1.0)),
        ),
        tvd=Plain(
            both(),
            'probabilities',
            [('tvd', of(losses.tvd), BLUE), ('kl, T=1', kl(1.0), GREY)],
            CAT,
            (-6, 10),
            ('kl, T=1', kl(1.0)),
        ),
        soft_ce=Plain(
            both(4.0),
            'probabilities at T=4',
            [('soft_ce', of(losses.soft_ce), BLUE), ('kl', kl(4.0), GREY)],
            CAT,
            (-6, 12),
            ('kl', kl(4.0)),
        ),
        mse=Plain(
            [('teacher', TEACHER, BLACK), ('student', STUDENT, RED)],
            'logits',
            [('mse', of(losses.mse), BLUE)],
            CAT,
            (-4, 14),
            ('kl, T=4', kl(4.0)),
        ),
        hard=Plain(
            [
                ("teacher's class", F.one_hot(TEACHER.argmax(), 6).float(), BLACK),
                ('student', p_s, RED),
            ],
            'one class, and probabilities',
            [('hard', of(losses.hard), BLUE), ('kl, T=1', kl(1.0), GREY)],
            CAT,
            (-6, 10),
            ('kl, T=1', kl(1.0)),
        ),
        dkd=Plain(
            in_two_parts(4.0, *sure[4.0], others),
            'cat or not; the others among themselves',
            [
                ('dkd, beta=8', of(losses.dkd, CAT), BLUE),
                ('beta=2', of(losses.dkd, CAT, beta=2.0), GREEN),
                ('kl', kl(4.0), GREY),
            ],
            LYNX,
            (-8, 14),
            ('kl', kl(4.0)),
            ['cat', 'not cat', *(CLASSES[k] for k in others)],
        ),
        nkd=Plain(
            in_two_parts(1.0, *sure[1.0], others),
            'cat or not; the others among themselves',
            [('nkd', of(losses.nkd, CAT), BLUE), ('kl, T=1', kl(1.0), GREY)],
            LYNX,
            (-8, 8),
            ('kl, T=1', kl(1.0)),
            ['cat', 'not cat', *(CLASSES[k] for k in others)],
        ),
        rld=Plain(
            in_two_parts(4.0, *wrong, below),
            'it is a lynx: sure or not; what is below it',
            [('rld', of(losses.rld, LYNX, beta=1.0), BLUE), ('kl', kl(4.0), GREY)],
            CAT,
            (-6, 14),
            ('kl', kl(4.0)),
            ['sure', 'not sure', *(CLASSES[k] for k in below)],
            loss=of(losses.rld, LYNX),
        ),
        ttm=Plain(
            [('teacher, T=4', softened(TEACHER, 4.0), BLACK), ('student, T=1', p_s, RED)],
            'only the teacher is softened',
            [('ttm', of(losses.ttm), BLUE), ('kl, T=4', kl(4.0), GREY)],
            CAT,
            (-4, 10),
            ('kl, T=4', kl(4.0)),
        ),
        abkd=Plain(
            both(),
            'probabilities at T=1',
            [
                (f'({a:g}, {b:g})', of(losses.abkd, alpha=a, beta=b, T=1.0), c)
                for a, b, c in ((0.8, 0.3, BLUE), (1, 0, GREY), (0, 1, ORANGE), (0.5, 0.5, GREEN))
            ],
            CAR,
            (-8, 6),
            ('kl: (1, 0)', kl(1.0)),
        ),
        binary_kl=Plain(
            [
                (who, (x / 4).sigmoid(), color)
                for who, x, color in (('teacher', TEACHER, BLACK), ('student', STUDENT, RED))
            ],
            'each label, sigmoid at T=4',
            [
                ('T=4', of(losses.binary_kl, T=4.0), BLUE),
                ('T=1', of(losses.binary_kl, T=1.0), GREEN),
            ],
            2,
            (-6, 10),
            outputs=LABELS,
        ),
    )


# ---------------------------------------------------------------------------------------------------- the others


def wttm():
    fig, (a, b, c) = panels()
    bars(
        a,
        [
            ('teacher, T=4', softened(TEACHER, 4.0), BLACK),
            ('student, T=1', softened(STUDENT), RED),
        ],
        CLASSES,
        'only the teacher is softened',
    )
    scales = torch.linspace(0, 4, 121)
    ratio = [
        value(of(losses.wttm), STUDENT, k * TEACHER) / value(of(losses.ttm), STUDENT, k * TEACHER)
        for k in scales
    ]
    certain = [softened(k * TEACHER).max().item() for k in scales]
    b.plot(certain, ratio, color=BLUE, lw=1.6)
    now = softened(TEACHER).max().item()
    b.axvline(now, color=BLACK, lw=0.9, ls=':')
    b.text(
        now,
        1.0,
        'this teacher ',
        fontsize=8,
        va='top',
        ha='right',
        transform=b.get_xaxis_transform(),
    )
    b.set_ylim(bottom=0)
    plain(b, 'the weight: wttm divided by ttm')
    b.set_xlabel("teacher's largest probability", fontsize=SMALL)
    moves(c, of(losses.wttm), STUDENT, TEACHER, CLASSES, ('kl, T=4', kl(4.0)))
    save(fig, 'wttm')


def taid():
    def target(lam):  # at T=1, the gradient is the student's probabilities minus the target's
        with torch.enable_grad():
            s = STUDENT.clone().requires_grad_()
            (g,) = torch.autograd.grad(losses.taid(s[None], TEACHER[None], lam=lam), s)
        return softened(STUDENT) - g

    fig, (a, b, c) = panels()
    half = ('target', target(0.5), BLUE)
    bars(a, [*both(), half], CLASSES, 'student and target, lam=0.5')
    lams = torch.linspace(0, 1, 41)
    paths = torch.stack([target(o) for o in lams.tolist()])
    for k in (CAT, LYNX, FOX, CAR):
        b.plot(lams.tolist(), paths[:, k].tolist(), color=BLUE, lw=1.6)
        b.text(1.02, paths[-1, k].item() - 0.02, CLASSES[k], fontsize=8, va='center')
    b.axvline(0.5, color='k', lw=0.9, ls=':')
    plain(b, "the target's probabilities")
    b.set(xlim=(0, 1.16), xticks=[0, 0.5, 1], xticklabels=['0\nstudent', '0.5', '1\nteacher'])
    b.set_xlabel('lam', fontsize=SMALL, labelpad=-8)
    moves(c, of(losses.taid, lam=0.5), STUDENT, TEACHER, CLASSES, ('kl, T=1', kl(1.0)))
    save(fig, 'taid')


def uld():
    words = ['The', 'A', 'This', 'It']
    s = torch.tensor([0.3, 1.8, 0.0, -0.8])
    t = TEACHER
    p, q = [softened(o).sort(descending=True).values for o in (s, t)]
    fig, (a, b, c) = panels()
    rows = [('teacher, 6 tokens', q, BLACK), ('student, 4 tokens', F.pad(p, (0, 2)), RED)]
    bars(a, rows, [f'{k}.' for k in range(1, 7)], 'probabilities, sorted')
    scale = torch.linspace(0, 6, 121)
    curves(
        b,
        [('uld', of(losses.uld), BLUE)],
        scale,
        lambda k: (k * s, t),
        'the loss while its certainty changes',
        "student's logits, times",
        1.0,
    )
    moves(c, of(losses.uld), s, t, words)
    save(fig, 'uld')


def regression():
    s, t = (
        torch.tensor([21.0, 34.0, 28.5, 45.0, 39.0]),
        torch.tensor([24.0, 33.0, 28.0, 39.5, 47.0]),
    )
    fig, (a, b, c) = panels()
    names = [f'face {k}' for k in range(1, 6)]
    rows = [('teacher', t, BLACK), ('student', s, RED)]
    bars(a, rows, names, 'the predicted numbers, here ages', 'center right')
    a.set_xlim(0, 68)
    x = torch.linspace(-3, 3, 121)
    kinds = (('mse', BLUE), ('l1', ORANGE), ('huber', GREEN))
    curves(
        b,
        [(f"'{o}'", of(losses.regression, distance=o), color) for o, color in kinds],
        x,
        lambda d: (torch.tensor([d]), torch.zeros(1)),
        'the loss of a sample, by distance',
        "student's number minus teacher's",
        legend='upper center',
    )
    b.set_ylim(0, 5)
    moves(
        c,
        lambda s, t: losses.regression(s[0], t[0]),
        s,
        t,
        names,
        title='a step moves its numbers',
    )
    save(fig, 'regression')


def soft_targets():
    fig, axs = panels((1, 1, 1))
    kinds = (
        ('softmax', 'kl', CAT, 'logit of the class cat'),
        ('sigmoid', 'binary_kl', 1, 'logit of the label grass'),
        ('regression', 'regression', 0, 'number'),
    )
    for ax, (kind, name, k, xlabel) in zip(axs, kinds):
        curves(
            ax,
            [(name, of(losses.soft_targets, kind=kind), BLUE)],
            torch.linspace(TEACHER[k] - 10, TEACHER[k] + 10, 161),
            lambda x, k=k: (with_output(TEACHER, k, x), TEACHER),
            f"kind='{kind}': {name}",
            f"student's {xlabel}",
        )
        ax.get_legend().remove()
        ax.axvline(TEACHER[k].item(), color=BLACK, lw=0.9, ls=':')
        ax.text(TEACHER[k].item(), 0.6, ' teacher', fontsize=8, transform=ax.get_xaxis_transform())
        ax.set_yticks([0])
    save(fig, 'soft_targets')


def standardize():
    fig, (a, b, c) = panels((1, 1, 1.1))
    models = (('teacher', TEACHER, BLACK), ('student', STUDENT, RED))
    bars(a, models, CLASSES, 'logits', 'lower right')
    rows = [(who, losses.standardize(x[None])[0], color) for who, x, color in models]
    bars(b, rows, CLASSES, 'standardized', 'lower right')
    curves(
        c,
        [
            ('standardized(kl), T=1', of(losses.standardized(losses.kl), T=1.0), BLUE),
            ('kl, T=1', kl(1.0), GREY),
        ],
        torch.linspace(0.1, 6, 120),
        lambda k: (k * STUDENT, TEACHER),
        'the loss while its scale changes',
        "student's logits, times",
        1.0,
        lowest=False,
    )
    save(fig, 'standardize')


def dist():
    g = torch.Generator().manual_seed(2)
    t = 2.5 * torch.randn(16, 6, generator=g)
    s = 0.5 * t + 0.8 * torch.randn(16, 6, generator=g)
    s[0], t[0] = STUDENT, TEACHER
    p, q = softened(s), softened(t)
    fig, (a, b, c) = panels((1, 1, 1.25))
    for ax, x, y, title in (
        (a, q[0], p[0], 'the classes of a sample'),
        (b, q[:, CAT], p[:, CAT], 'cat, in the samples of a batch'),
    ):
        ax.plot(x.tolist(), y.tolist(), 'o', ms=5, color=BLUE)
        m = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
        ax.axline((x.mean().item(), y.mean().item()), slope=m.item(), color=GREY, lw=1)
        r = torch.corrcoef(torch.stack([x, y]))[0, 1]
        plain(ax, f'{title}: r = {r:.2f}')
        ax.set_xlabel("teacher's probability", fontsize=SMALL)
        ax.set_ylabel("student's", fontsize=SMALL)
        ax.set(xlim=(-0.04, 1.04), ylim=(-0.03, max(0.5, 1.1 * y.max().item())))
    a.text(q[0, CAT].item() - 0.03, p[0, CAT].item(), 'cat', fontsize=8, ha='right')
    a.text(q[0, FOX].item() + 0.05, p[0, FOX].item(), 'fox', fontsize=8)
    lines = [('dist', losses.dist, BLUE), ('kl, T=1', partial(losses.kl, T=1.0), GREY)]
    shares = torch.linspace(0, 0.95, 60)
    for name, loss, color in lines:
        flat = [loss(((1 - o) * q + o / 6).log(), t).item() for o in shares]
        c.plot(shares.tolist(), flat, color=color, lw=1.6, label=name)
    plain(c, "the teacher's probabilities, made flatter")
    c.set_xlabel('share of equal probabilities in the student', fontsize=SMALL)
    c.legend(fontsize=8, frameon=False)
    save(fig, 'dist')


def at_angle(degrees, length=1.0):
    a = torch.deg2rad(torch.as_tensor(float(degrees)))
    return length * torch.stack([a.cos(), a.sin()])


def arrow(ax, v, color, name):
    ax.annotate('', v.tolist(), (0, 0), arrowprops=dict(arrowstyle='->', color=color, lw=1.8))
    ax.text(*(v * 1.08).tolist(), name, color=color, fontsize=SMALL)


def bare(ax, title):
    ax.set_aspect('equal')
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_title(title, fontsize=10)


def cosine():
    t, s = at_angle(60, 1.2), at_angle(15, 0.8)
    fig, (a, b, c) = panels((0.8, 1, 1))
    arrow(a, t, BLACK, 'teacher')
    arrow(a, s, RED, 'student')
    arc = torch.stack([at_angle(o, 0.35) for o in torch.linspace(15, 60, 30)])
    a.plot(*arc.T.tolist(), color=BLUE, lw=1.6)
    a.text(*at_angle(37, 0.42).tolist(), '45°', color=BLUE, fontsize=SMALL)
    a.set(xlim=(-0.05, 1.35), ylim=(-0.1, 1.25))
    bare(a, 'two vectors of features')
    own = ('cosine', of(losses.cosine), BLUE)
    curves(
        b,
        [own],
        torch.linspace(-180, 180, 145),
        lambda o: (at_angle(60 + o, 0.8), t),
        'the loss while it turns',
        'angle in degrees',
        -45.0,
    )
    b.set_xticks([-180, -90, 0, 90, 180])
    squared = ('hint: squared distance', of(losses.hint), GREY)
    curves(
        c,
        [own, squared],
        torch.linspace(0.1, 3, 117),
        lambda o: (at_angle(15, o), t),
        'the loss while it grows',
        "length of the student's vector",
        0.8,
        lowest=False,
    )
    save(fig, 'cosine')


def seed():
    anchors = torch.stack([at_angle(o) for o in (5, 40, 75, 110, 150, 200, 260, 310)])
    t, s = at_angle(60), at_angle(350)
    names = [f'{k}' for k in range(1, 9)]
    loss = of(losses.seed, queue=anchors, T_t=0.05)

    def neighbors(v, T):
        return softened(torch.cat([t[None], anchors]) @ v, T)

    fig, (a, b, c) = panels((0.85, 1.1, 1.1))
    for name, v in zip(names, anchors):
        a.plot(*v.tolist(), 'o', ms=5, color=GREY)
        a.text(*(1.16 * v).tolist(), name, fontsize=8, ha='center', va='center')
    arrow(a, 0.95 * t, BLACK, '')
    arrow(a, 0.95 * s, RED, '')
    a.text(0.1, 0.55, 'teacher', fontsize=8, ha='right')
    a.text(0.3, -0.42, 'student', fontsize=8, color=RED)
    a.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    bare(a, 'a sample, and 8 earlier ones')
    rows = [('teacher', neighbors(t, 0.05), BLACK), ('student', neighbors(s, 0.2), RED)]
    bars(b, rows, ['itself', *names], 'neighbors, T_t=0.05, T_s=0.2')
    curves(
        c,
        [('seed', loss, BLUE)],
        torch.linspace(-120, 240, 145),
        lambda o: (at_angle(o), t),
        "the loss while the student's vector turns",
        'its direction in degrees',
        -10.0,
    )
    c.axvline(60, color=BLACK, lw=0.9, ls=':')
    c.text(64, 0.9, 'teacher', fontsize=8, transform=c.get_xaxis_transform())
    save(fig, 'seed')


OTHERS = dict(
    wttm=wttm,
    taid=taid,
    uld=uld,
    regression=regression,
    soft_targets=soft_targets,
    standardize=standardize,
    dist=dist,
    cosine=cosine,
    seed=seed,
)


def drawings():
    "Name -> a function that draws it"
    return {name: partial(o.draw, name) for name, o in usual().items()} | OTHERS


if __name__ == '__main__':
    for name, draw in drawings().items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            draw()
