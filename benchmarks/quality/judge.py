"""What the runs of PROTOCOL.md say: the default against labels alone and against other recipes, in tables and a picture."""

from collections import Counter
from dataclasses import dataclass
import numpy as np
import protocol
from candidates import CANDIDATES
from measures import MAIN, score
from run import FOLDER
from stats import Arm, corrected, gain, overall, verdict
from stored import read, read_json
from tables import number, shown, table

DECIMALS = dict(nll=3, ece=3, bits=3)  # 2 for the others, which are in points
BETTER_IF_SMALLER = {'nll', 'ece', 'bits'}
SPOKEN = dict(
    accuracy='accuracy, points',
    miou='mean IoU, points',
    map='mean average precision, points',
    r2='R2, points',
    bits='bits per token, fewer',
    nll='NLL, decrease',
    ece='calibration error, decrease',
)


def value(measure, found):
    "So that more is better, in the units of `protocol.MARGINS`"
    v = found[measure]
    return -v if measure in BETTER_IF_SMALLER else 100 * v


@dataclass
class Cell:
    "The runs of one cell that count"

    name: str
    plan: dict
    runs: list

    def __post_init__(self):
        self.output, self.facts = self.plan['facts']['output'], self.plan['facts']
        valid = lambda r: score(self.output, r['valid'])
        own = {
            k: [r for r in self.runs if protocol.belongs(r, self.plan, k)]
            for k in self.plan['recipes']
        }
        self.finished = {
            k: runs
            for k, runs in own.items()
            if protocol.next_run(self.plan, k, runs, valid) is None
        }
        self.started = [k for k, runs in own.items() if runs and k not in self.finished]
        counted = {id(r) for runs in own.values() for r in runs}
        self.stale = sum(id(r) not in counted for r in self.runs)
        self.diverged = Counter(k for k, runs in own.items() for r in runs if r['diverged'])
        # the choices don't depend on the measure
        self.rates = {k: self._rates(runs, valid) for k, runs in self.finished.items()}

    @staticmethod
    def _rates(runs, valid):
        "Validation scores of each rate, the rate that each resample chooses, the rate that all seeds choose"
        chosen = {(r['lr'], r['seed']): valid(r) for r in runs if r['role'] == 'choosing'}
        scores = {lr: [chosen[lr, s] for s in protocol.CHOOSING] for lr in {lr for lr, _ in chosen}}
        # a first try has one rate and no choosing seeds
        scores = scores or {r['lr']: () for r in runs}
        best = protocol.best_rate(scores) if len(scores) > 1 else next(iter(scores))
        return scores, protocol.choices(scores), best

    @property
    def main(self):
        return MAIN[self.output]

    @property
    def measures(self):
        return [self.main] + ([] if self.output == 'numbers' else ['nll', 'ece'])

    @property
    def kind(self):
        if self.plan['sealed']:
            return 'new data'
        return 'first tries' if self.plan['first_try'] else 'other cells'

    def arm(self, name, measure):
        (scores, choices, best), test = self.rates[name], {}
        for r in self.finished[name]:
            if r['role'] == 'reported':
                test.setdefault(r['lr'], {})[r['seed']] = value(measure, r['test'])
        return Arm(scores, test, choices, best)

    def of_teacher(self):
        return abs(value(self.main, {self.main: self.facts['teacher_test']}))

    def of_labels_alone(self):
        arm = self.arm('labels', self.main)
        return abs(np.mean([*arm.test[arm.best].values()]))

    def has(self, *names):
        return all(k in self.finished for k in names)

    def gain(self, name, other='labels', measure=None):
        measure = measure or self.main
        return gain(self.arm(name, measure), self.arm(other, measure), len(protocol.CHOOSING))

    def same(self, name, other):
        "Do these two names mean the same recipe here?"
        return self.plan['recipes'][name]['text'] == self.plan['recipes'][other]['text']

    def at_the_same_rate(self, name, other='labels'):
        "rate -> mean gain of the choosing seeds, at the rates at which both ran"
        at = {}
        for k in (name, other):
            for r in self.finished[k]:
                if r['role'] == 'choosing':
                    at.setdefault(r['lr'], {}).setdefault(k, {})[r['seed']] = value(
                        self.main, r['test']
                    )
        return {
            lr: float(np.mean([o[name][s] - o[other][s] for s in protocol.CHOOSING]))
            for lr, o in sorted(at.items())
            if len(o) == 2
        }

    def best(self, role='choosing'):
        "The recipe with the best mean validation score of the seeds with this role, at its own rate; None where too few are finished"
        others = [k for k in self.finished if k != 'labels']
        if len({self.plan['recipes'][k]['text'] for k in others}) < protocol.ENOUGH_RECIPES:
            return None

        def mean(k):
            *_, rate = self.rates[k]
            own = [r for r in self.finished[k] if r['role'] == role and r['lr'] == rate]
            return np.mean([score(self.output, r['valid']) for r in own])

        return max(others, key=mean)


class Judged:
    "All stored runs of the protocol"

    def __init__(self, folder=FOLDER):
        plans = read_json(folder / 'plan.json')
        self.cells = {n: Cell(n, p, read(folder / f'{n}.jsonl')) for n, p in plans.items()}

    def gains(self, name, other, measure=None):
        "cell -> Effect, of the cells in which both recipes are finished and are not the same"
        return {
            n: c.gain(name, other, measure)
            for n, c in self.cells.items()
            if c.has(name, other)
            and not c.same(name, other)
            and (measure is None or measure in c.measures)
        }


def said(e, measure):
    d = DECIMALS.get(measure, 2)
    return f'{e.mean:+z.{d}f} [{e.low:+.{d}f}, {e.high:+.{d}f}]'


def of_default(j):
    "The default against labels alone, for each cell"
    main = j.gains('default', 'labels')
    q = corrected({n: e.p for n, e in main.items()})
    rows = []
    for n, e in sorted(main.items(), key=lambda o: (j.cells[o[0]].kind, o[0])):
        c = j.cells[n]
        rates = [c.arm(k, c.main).best for k in ('labels', 'default')]
        rest = [c.gain('default', measure=m) if m in c.measures else None for m in ('nll', 'ece')]
        same = [f'{lr:g}: {v:+z.2f}' for lr, v in c.at_the_same_rate('default').items()]
        rows.append(
            [
                n,
                c.kind,
                c.main,
                f'{c.of_teacher():.2f}, {c.of_labels_alone():.2f}',
                f'{rates[0]:g}, {rates[1]:g}',
                e.n,
                said(e, c.main),
                f'{q[n]:.3f}',
                verdict(e, protocol.MARGINS[c.main]),
                ', '.join(same),
                *(said(o, m) if o else '' for o, m in zip(rest, ('nll', 'ece'))),
                verdict(rest[0], protocol.MARGINS['nll']) if rest[0] else '',
            ]
        )
    return table(
        [
            'cell',
            'group',
            'measure',
            'teacher, labels alone',
            'rates: labels alone, default',
            'seeds',
            'gain',
            'p, corrected',
            'verdict',
            'gain at the same rate, choosing seeds',
            'NLL, decrease',
            'calibration error, decrease',
            'verdict by NLL',
        ],
        rows,
    )


def counts(j, measure, cells, q):
    "How many of these effects are better, and what they mean; q: their corrected p"
    margin = lambda n: protocol.MARGINS[measure or j.cells[n].main]
    verdicts = Counter(verdict(e, margin(n)) for n, e in cells.items())
    up = [n for n, e in cells.items() if e.mean > 0 and q.get(n, 1.0) < protocol.LEVEL]
    down = [n for n, e in cells.items() if e.mean < 0 and q.get(n, 1.0) < protocol.LEVEL]
    return [
        len(cells),
        sum(e.mean > 0 for e in cells.values()),
        len(up),
        len(down),
        *(verdicts[v] for v in ('safe', 'worse', 'too noisy to tell')),
        ', '.join(sorted(n for n, e in cells.items() if verdict(e, margin(n)) != 'safe')),
    ]


def calibration_errors(j):
    "(with the default, with labels alone) of each cell with probabilities, at the rates that were chosen"
    mean = lambda c, k: -np.mean([*(arm := c.arm(k, 'ece')).test[arm.best].values()])
    return [
        (mean(c, 'default'), mean(c, 'labels'))
        for c in j.cells.values()
        if 'ece' in c.measures and c.has('labels', 'default')
    ]


def of_counts(j):
    rows, errors = [], calibration_errors(j)
    for measure, words in (
        (None, 'the main measure'),
        ('nll', 'NLL'),
        ('ece', 'calibration error'),
    ):
        found = j.gains('default', 'labels', measure)
        q = corrected({n: e.p for n, e in found.items()})
        for kind in ('other cells', 'first tries', 'new data'):
            inside = {n: e for n, e in found.items() if j.cells[n].kind == kind}
            if inside:
                rows.append([words, kind, *counts(j, measure, inside, q)])
    counted = table(
        [
            'by',
            'group',
            'cells',
            'better on average',
            'significantly better',
            'significantly worse',
            'safe',
            'worse',
            'too noisy to tell',
            'not safe',
        ],
        rows,
    )
    if not errors:
        return counted
    ours, alone = np.median(errors, 0)
    return (
        f'{counted}\nMedian calibration error of {len(errors)} cells: {ours:.4f} with the default, '
        f'{alone:.4f} with labels alone.\n'
    )


def of_overall(j):
    "The effect over data sets of the default, against labels alone and other recipes"
    rows = []
    others = dict.fromkeys(k for c in j.cells.values() for k in c.finished if k != 'default')
    for k in others:
        for m in SPOKEN:
            found = j.gains('default', k, m)
            q = corrected({n: e.p for n, e in found.items()})
            for tries in (False, True):
                effects = {
                    n: e for n, e in found.items() if (j.cells[n].kind == 'first tries') == tries
                }
                sets = [(j.cells[n].facts['data_set'], e.mean) for n, e in effects.items()]
                if len({s for s, _ in sets}) < protocol.ENOUGH_DATA_SETS:
                    continue
                lost = [
                    n for n, e in effects.items() if e.mean < 0 and q.get(n, 1.0) < protocol.LEVEL
                ]
                o = overall(sets)
                rows.append(
                    [
                        spoken(k),
                        'first tries' if tries else 'all but first tries',
                        SPOKEN[m],
                        len(effects),
                        o.n,
                        said(o, m),
                        f'{o.p:.3f}',
                        ', '.join(lost),
                    ]
                )
    return table(
        [
            'the default against',
            'cells',
            'measure',
            'how many',
            'data sets',
            'effect',
            'p',
            'cells where the other is significantly better',
        ],
        rows,
    )


def spoken(k):
    return dict(labels='labels alone', default='the default').get(k) or f'`{shown(k)}`'


def of_peers(j):
    others = [k for k in CANDIDATES if any(c.has(k, 'default') for c in j.cells.values())]
    others = [k for k in others if k != 'labels']
    family = {k: j.gains('default', k) for k in others}
    q = {k: corrected({n: e.p for n, e in f.items()}) for k, f in family.items()}

    def cell(k, n):
        if n not in family[k]:
            return 'the same' if j.cells[n].has(k, 'default') else ''
        text = said(family[k][n], j.cells[n].main)
        return f'**{text}**' if q[k].get(n, 1.0) < protocol.LEVEL else text

    rows = [
        [n, *(cell(k, n) for k in others)] for n, c in j.cells.items() if 'default' in c.finished
    ]
    return table(['cell', *map(spoken, others)], [r for r in rows if any(r[1:])])


def against_best(j, role='choosing'):
    "cell -> (the best recipe on the validation split, its gain, that of the default), where enough recipes ran"
    return {
        n: (k, c.gain(k), c.gain('default'))
        for n, c in j.cells.items()
        if c.has('labels', 'default') and (k := c.best(role)) is not None
    }


def shares(j, found):
    "measure -> the default's shares of the best recipe's gain, of the cells in which that recipe gains"
    out = {}
    for n, (_, theirs, ours) in found.items():
        if theirs.mean > 0:
            out.setdefault(j.cells[n].main, []).append(ours.mean / theirs.mean)
    return out


def median_share(values, draws=10_000):
    "(median, low, high): its 95% interval, by a bootstrap of the cells"
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    return np.median(values), *np.quantile(np.median(drawn, 1), (0.025, 0.975))


def of_best(j):
    rows, found = [], against_best(j)
    for n, (k, theirs, ours) in found.items():
        c = j.cells[n]
        rows.append(
            [
                n,
                c.main,
                len(c.finished) - 1,
                spoken(k),
                said(theirs, c.main),
                said(ours, c.main),
                number(ours.mean / theirs.mean, '.0%') if theirs.mean > 0 else '',
            ]
        )
    if not rows:
        return f'No cell has {protocol.ENOUGH_RECIPES} finished recipes.\n'

    def medians(found):
        return ', '.join(
            '{} {:.0%} [{:.0%}, {:.0%}] ({} cells)'.format(m, *median_share(v), len(v))
            for m, v in shares(j, found).items()
        )

    return (
        f"Median share of the best recipe's gain, with its interval from a bootstrap of the cells: {medians(found)}. If the "
        f'reported seeds choose the best recipe, by their validation scores: {medians(against_best(j, "reported"))}.\n\n'
    ) + table(
        [
            'cell',
            'measure',
            'recipes',
            'best on the validation split',
            'its gain',
            'the default',
            'share',
        ],
        rows,
    )


def of_rest(j):
    "What is not in the tables, and why"
    started = [
        f'{n} ({", ".join(map(spoken, c.started))})' for n, c in j.cells.items() if c.started
    ]
    waiting = {
        n: [k for k in c.plan['recipes'] if k not in c.finished and k not in c.started]
        for n, c in j.cells.items()
    }
    diverged = [
        f'{spoken(k)} in {n} ({v})' for n, c in j.cells.items() for k, v in c.diverged.items()
    ]
    stale = sum(c.stale for c in j.cells.values())
    commits = Counter(r['commit'] for c in j.cells.values() for r in c.runs)
    lines = [
        f'- {sum(commits.values()):,} runs in {len(j.cells)} cells, of the commits {", ".join(f"{k} ({v:,})" for k, v in commits.items())}.',
        f'- Started, but not finished: {", ".join(started) or "none"}.',
        f'- Recipes of the protocol that have not run in one of these cells: {sum(map(len, waiting.values()))}, in {sum(map(bool, waiting.values()))} cells.',
        f'- Runs that diverged: {", ".join(diverged) or "none"}.',
        f'- Runs that no longer match a plan: {stale}.',
    ]
    return '\n'.join(lines) + '\n'


def picture(j, path):
    "The gain of the default in each cell, with its interval; in units of the margin"
    from matplotlib.figure import Figure

    found = j.gains('default', 'labels')
    order = sorted(found, key=lambda n: (j.cells[n].kind, n))
    fig = Figure(figsize=(8, 0.26 * len(order) + 1.2), layout='constrained')
    ax = fig.subplots()
    colors = {'first tries': 'tab:orange', 'new data': 'tab:green', 'other cells': 'tab:red'}
    for i, n in enumerate(order):
        e, c = found[n], j.cells[n]
        mean, low, high = (v / protocol.MARGINS[c.main] for v in (e.mean, e.low, e.high))
        ax.plot([low, high], [i, i], lw=1.2, color=colors[c.kind])
        ax.plot(mean, i, 'o', ms=5, color=colors[c.kind])
    for kind, color in colors.items():
        if any(c.kind == kind for c in j.cells.values()):
            ax.plot([], [], 'o', ms=5, color=color, label=kind)
    ax.axvline(0, color='.7', lw=0.8, zorder=0)
    ax.axvline(-1, color='.7', lw=0.8, ls='--', zorder=0)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xscale('symlog', linthresh=2)
    ticks = [-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50]
    left, right = ax.get_xlim()
    ax.set_xticks([t for t in ticks if left < t < right], minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.tick_params(axis='x', labelsize=8)
    ax.set_xlabel(
        'gain over labels alone, in margins (0.5 points of most measures); 95% interval, dashed: the margin',
        fontsize=8,
    )
    for o in ('top', 'right'):
        ax.spines[o].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
    fig.savefig(path, dpi=110)


PARTS = [
    (
        'How often the default is better or safe',
        'Compared with labels alone. [PROTOCOL.md](PROTOCOL.md) defines the margins. Safe: the lower end of the interval is above minus the margin, even if the upper end is below zero. Worse: not safe, and the upper end is below zero. Significant: after the correction for all finished cells.',
        of_counts,
    ),
    (
        'The default against labels alone',
        'Mean difference on the test split with its 95% interval, which includes the uncertainty from choosing the rates. The main measure is in points or bits. Higher is better in all columns of gains.',
        of_default,
    ),
    (
        'The effect over data sets',
        'A mixed model with the data set as the group. Higher values favor the default.',
        of_overall,
    ),
    (
        'The default against other recipes',
        'Main measure; bold: significant after the correction for the cells of the column. Higher values favor the default.',
        of_peers,
    ),
    ('The default and the best recipe', '', of_best),
    ('What is not in these tables', '', of_rest),
]


def text(j):
    return '\n'.join(
        f'### {title}\n\n{about}{chr(10) * 2 if about else ""}{draw(j)}'
        for title, about, draw in PARTS
    )
