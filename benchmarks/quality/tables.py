"The tables and the picture of the runs of protocol 1."

import json
from collections import Counter
from dataclasses import dataclass
import numpy as np
from scipy import stats
from candidates import CANDIDATES
from measures import MAIN
from rule import default, gains, group, left_out, results
from stats import at_best_rate, at_rate, by_seed, corrected, paired
from stored import OUT, read
from tasks import cells

LATER = (
    'fashion imagenette cancer diabetes trec50 polarity occupation person digit_pixels'.split()
)  # tasks that were added after the rule was fixed
NEW = LATER[:4]  # those of data that no earlier task has
OTHERS = ['kd(1,.5)', 'kd(4,.9)', 'kd(5,.5)', 'timm', 'keras']  # what the default is compared with
SOFTMAX = [
    'dist(auto)x3',
    'kd(1,.5)',
    'kd(5,.5)',
    'timm',
    'kd(4,.9)',
    'keras',
    'fasterai',
    'kd(1,.9)',
    'soft(1)',
    'kl(1)x3',
    'kl(2)x3',
    'kl(4)x3',
    'dist(4)x3',
    'dist(4)x1',
    'dkdx.3',
    'logit_std(2)x3',
    'smoothing',
]
PLAIN = ['binary(1)x3', 'binary(1)x1', 'kd(.1)', 'kd(.5)', 'kd(.9)', 'regressionx3', 'mse(.5)']
KINDS = {
    'two classes': 'two classes',
    'classes': 'many classes',
    'pixels': 'segmentation',
    'tokens': 'language model',
    'labels': 'multi-label',
    'numbers': 'regression',
}
LEVEL = 0.05


@dataclass(frozen=True)
class Gain:
    "How much more a recipe scores than another one, each at its own best rate"

    mean: float
    se: float
    p: float  # of all seeds
    planned: float  # p of the seeds that were planned, without those that were added later
    seeds: int
    rates: tuple  # of the recipe, of the other one
    equal: tuple  # the gain if both train at the first of these rates, and at the second; of the seeds that both ran there

    @property
    def holds(self):
        "Where the rates differ: is at least half of the gain left with either of them?"
        return self.rates[0] == self.rates[1] or all(g / self.mean >= 0.5 for g in self.equal)


def earned(
    family,  # test -> Gain
):
    "The gains that are more than luck: after a correction for all tests of the family, by the planned seeds, and whichever of the two rates both train at"
    p = corrected({k: g.planned for k, g in family.items()})
    return {k for k, g in family.items() if p.get(k, 1.0) < LEVEL and g.mean and g.holds}


class Results:
    "All that is known of the cells where labels alone and the default ran"

    def __init__(self):
        self.facts = {n: f for n, f in json.loads((OUT / 'facts.json').read_text()).items()}
        self.cells = {
            n: c
            for n, c in cells().items()
            if n in self.facts and {'labels', default(self.facts[n])} <= results(c).keys()
        }
        self.facts = {n: self.facts[n] for n in self.cells}
        self.all = {n: read(OUT / f'{n}.jsonl') for n in self.cells}
        self.runs = {n: results(c) for n, c in self.cells.items()}
        self.gains = {
            n: {k: self.gain(n, k) for k in runs if k != 'labels'} for n, runs in self.runs.items()
        }
        self.default = {n: default(f) for n, f in self.facts.items()}
        self.left_out = left_out(self.facts, {n: gains(c) for n, c in self.cells.items()})
        # which gains are bold: those of a recipe are one family, and those of the default, whatever it is in a cell
        self.bold = {k: earned(self.of_recipe(k)) for k in CANDIDATES}
        self.bold_default = earned(self.of_default())

    def gain(self, n, k, other='labels'):
        c, (a, b) = self.cells[n], (self.runs[n][o] for o in (k, other))
        scores = lambda runs, seeds=None: {
            s: v for s, v in by_seed(runs, c.output).items() if seeds is None or s < seeds
        }
        rates = a[0]['lr'], b[0]['lr']
        equal = tuple(
            paired(*(scores(at_rate(self.all[n], o, lr)) for o in (k, other)))[0] for lr in rates
        )
        mean, se, p, seeds = paired(scores(a), scores(b))
        return Gain(
            mean, se, p, paired(scores(a, c.seeds), scores(b, c.seeds))[2], seeds, rates, equal
        )

    def of_recipe(self, k):
        return {n: g[k] for n, g in self.gains.items() if k in g}

    def of_default(self):
        return {n: g[self.default[n]] for n, g in self.gains.items()}

    def best(self, n):
        "The recipe with the largest mean gain on the test split, of all but labels alone"
        return max(
            (k for k in self.gains[n] if k != 'smoothing'), key=lambda k: self.gains[n][k].mean
        )

    def teacher_is_better(self, n):
        "Is the teacher better than the student that learns from the labels alone, on the validation split?"
        alone = np.mean([*by_seed(self.runs[n]['labels'], self.cells[n].output, 'valid').values()])
        f = self.facts[n]['teacher_valid'] * 100
        return (-f if self.cells[n].output == 'tokens' else f) > alone


def table(head, rows):
    return (
        '\n'.join(
            ['| ' + ' | '.join(map(str, r)) + ' |' for r in (head, ['---'] * len(head), *rows)]
        )
        + '\n'
    )


def shown(k):
    "The name of a recipe; some that ran are no candidates any more"
    return k in CANDIDATES and CANDIDATES[k].shown or k


def said(g, bold):
    "A gain; bold if it is earned, with ' worse' if it is a loss"
    text = f'{g.mean:+z.2f}'
    return text if not bold else f'**{text}**' if g.mean > 0 else f'**{text} worse**'


def mean_of(runs, key):
    return np.mean([r['test'][key] for r in runs]) if runs and key in runs[0]['test'] else None


def number(v, form='.3f'):
    return '' if v is None or np.isnan(v) else format(v, form)


def names(cells):
    return f' ({", ".join(cells)})' if cells else ''


def of_cells(r):
    rows = []
    for n, f in r.facts.items():
        base = r.runs[n]['labels']
        top = (
            f'{f["top_prob_train"]:.3f} / {f["top_prob_valid"]:.3f}'
            if 'top_prob_train' in f
            else ''
        )
        scores = list(by_seed(base, r.cells[n].output).values())
        rows.append(
            [
                n,
                KINDS[group(f)],
                f['classes'],
                f'{f["rows"]:,}',
                f'{f["steps"]:,} ({f["epochs"]:g})',
                f'{f["parameters"]:,}',
                f'{100 * f["teacher_train"]:.1f} / {100 * f["teacher_valid"]:.1f} / {100 * f["teacher_test"]:.1f}',
                top,
                f'{np.mean(scores):.2f} ± {np.std(scores, ddof=1):.2f}',
                len(scores),
                f'{base[0]["lr"]:g}',
            ]
        )
    return table(
        [
            'cell',
            'kind',
            'outputs',
            'training items',
            'steps (epochs)',
            'parameters of the student',
            'teacher: train / valid / test',
            'its top probability: train / valid',
            'labels alone, test',
            'seeds',
            'rate',
        ],
        rows,
    )


def of_default(r):
    rows, q = [], corrected({n: g.p for n, g in r.of_default().items()})
    for n, g in r.of_default().items():
        same = g.rates[0] == g.rates[1]
        rows.append(
            [
                n,
                shown(r.default[n]),
                said(g, n in r.bold_default),
                f'{g.se:.2f}',
                g.seeds,
                f'{g.p:.3f}',
                f'{q[n]:.3f}',
                f'{g.rates[1]:g}',
                'the same' if same else f'{g.rates[0]:g}',
                *(
                    ('', '')
                    if same
                    else (number(o, '+.2f') or 'not run' for o in reversed(g.equal))
                ),
            ]
        )
    return table(
        [
            'cell',
            'default',
            'its gain',
            'standard error',
            'seeds',
            'p',
            'p, corrected',
            'rate of labels alone',
            'rate of the default',
            'gain at the former, one seed',
            'at the latter, one seed',
        ],
        rows,
    )


def of_best(r):
    rows = []
    chosen = {n: r.gains[n][k] for n, k in r.left_out.items()}
    bold = earned(chosen)
    for n, g in r.of_default().items():
        b, l = r.best(n), r.left_out.get(n)
        rows.append(
            [
                n,
                f'{g.mean:+z.2f}',
                f'{shown(b)} {r.gains[n][b].mean:+z.2f}',
                len(r.gains[n]),
                f'{shown(l)} {said(chosen[n], n in bold)}' if l else '',
            ]
        )
    return table(
        ['cell', 'default', 'best of all', 'of how many', 'chosen without this task'], rows
    )


def of_recipes(r, recipes, kinds):
    recipes = [k for k in recipes if r.of_recipe(k)]
    rows = [
        [n, *(said(r.gains[n][k], n in r.bold[k]) if k in r.gains[n] else '' for k in recipes)]
        for n, f in r.facts.items()
        if group(f) in kinds
    ]
    return table(['cell', *map(shown, recipes)], rows)


def of_all_recipes(r):
    rest = lambda n: [
        f'{shown(k)} {g.mean:+z.2f}' for k, g in r.gains[n].items() if k not in SOFTMAX + PLAIN
    ]
    return (
        of_recipes(r, SOFTMAX, ('two classes', 'classes', 'pixels', 'tokens'))
        + '\n'
        + of_recipes(r, PLAIN, ('labels', 'numbers'))
        + '\nThe other recipes, without marks:\n\n'
        + table(['cell', 'gains'], [[n, ', '.join(rest(n))] for n in r.cells if rest(n)])
    )


def of_groups(r):
    "Each recipe over the cells of a kind"
    rows = []
    for kind, title in KINDS.items():
        inside = [n for n, f in r.facts.items() if group(f) == kind]
        found = {k: {n: r.gains[n][k] for n in inside if k in r.gains[n]} for k in CANDIDATES}
        for k, gs in sorted(
            found.items(), key=lambda o: -np.mean([g.mean for g in o[1].values()]) if o[1] else 0
        ):
            if len(gs) < max(0.6 * len(inside), 1):
                continue
            means, bold = [g.mean for g in gs.values()], [gs[n].mean for n in gs if n in r.bold[k]]
            rows.append(
                [
                    title,
                    shown(k),
                    len(gs),
                    f'{np.mean(means):+z.2f}',
                    f'{min(means):+z.2f}',
                    sum(m > 0 for m in bold),
                    sum(m < 0 for m in bold),
                ]
            )
    return table(['kind', 'recipe', 'cells', 'mean gain', 'worst', 'better', 'worse'], rows)


def of_calibration(r):
    rows = []
    inside = [n for n, c in r.cells.items() if c.output != 'numbers']
    for n in inside:
        found = [r.runs[n].get(k) for k in ('labels', r.default[n], 'kd(4,.9)', 'fasterai')]
        rows.append(
            [
                n,
                *(
                    f'{number(mean_of(o, "nll"))} / {number(mean_of(o, "ece"))}' if o else ''
                    for o in found
                ),
            ]
        )
    both = {
        k: np.array([[mean_of(r.runs[n][o], k) for o in ('labels', r.default[n])] for n in inside])
        for k in ('nll', 'ece')
    }
    (alone, ours), (a, b) = both['nll'].T, np.median(both['ece'], axis=0)
    return (
        f'The default has a lower NLL than labels alone in {(ours < alone).sum()} of {len(ours)} cells. Its median expected calibration error is {b:.3f}, compared with {a:.3f} for labels alone.\n\n'
        + table(['cell', 'labels alone', 'default', *map(shown, ('kd(4,.9)', 'fasterai'))], rows)
    )


def claims(r):
    "How often the default is better or worse: in all cells, where the teacher has something to teach, and in tasks that were added later"
    good = [n for n in r.cells if r.teacher_is_better(n)]
    rest = [n for n in r.cells if n not in good]
    new, again = [
        [n for n, f in r.facts.items() if f['task'] in tasks] for tasks in (NEW, LATER[len(NEW) :])
    ]
    parts = {
        f'All {len(r.cells)} cells': (r.cells, ''),
        f'The {len(good)} cells whose teacher is better, on the validation split, than the student that learns from labels alone': (
            good,
            f' (without {", ".join(rest)})' if rest else '',
        ),
        f'The {len(new)} cells of tasks that were added after the rule was fixed, on datasets that no earlier task uses': (
            new,
            names(new),
        ),
        f'The {len(again)} cells of tasks that were added after the rule was fixed, on data that earlier tasks use too': (
            again,
            names(again),
        ),
    }
    return '\n'.join(
        f'**{title}**{more}\n\n' + claims_in(r, list(inside))
        for title, (inside, more) in parts.items()
    )


def claims_in(r, inside):
    own = {n: g for n, g in r.of_default().items() if n in inside}
    q, planned = [
        corrected({n: getattr(g, p) for n, g in r.of_default().items()}) for p in ('p', 'planned')
    ]
    better = [
        {n for n, g in own.items() if g.mean > 0 and p[n] < LEVEL}
        for p in ({n: g.p for n, g in own.items()}, q, planned)
    ]
    bold = [n for n in own if n in r.bold_default and own[n].mean > 0]
    lines = [
        f'- The default against labels alone: better on average in {sum(g.mean > 0 for g in own.values())} of {len(own)} cells. Significantly worse in {sum(g.mean < 0 and g.p < LEVEL for g in own.values())}, even without a correction. '
        f'Significantly better in {len(better[0])} without a correction, in {len(better[1])} with it, in {len(better[2])} with only the planned seeds, and in {len(bold)} if the gain must not depend on the learning rate{names(bold)}.'
    ]
    for k in OTHERS:
        family = {
            n: r.gain(n, r.default[n], k) for n in r.cells if k in r.runs[n] and r.default[n] != k
        }
        won, both = earned(family), [n for n in family if n in inside]
        if both:
            lines.append(
                f'- The default against `{shown(k)}`, where they differ: {len(both)} cells, better in {sum(n in won and family[n].mean > 0 for n in both)}, worse in {sum(n in won and family[n].mean < 0 for n in both)}.'
            )
    chosen = {n: r.gains[n][k] for n, k in r.left_out.items()}
    won, both = earned(chosen), [n for n in chosen if n in inside]
    lines.append(
        f'- The recipe that is best on the other tasks of the same kind, against labels alone: {len(both)} cells, better in {sum(n in won and chosen[n].mean > 0 for n in both)}, '
        f'worse in {sum(n in won and chosen[n].mean < 0 for n in both)}.'
    )
    return '\n'.join(lines) + '\n'


def of_dropped(r):
    "Runs that are in none of the other tables"
    rows, lone, counts = [], [], Counter()
    for n, c in r.cells.items():
        base = by_seed(r.runs[n]['labels'], c.output)
        for k, runs in at_best_rate(r.all[n], c.output).items():
            ran = sum(o['recipe'] == k for o in r.all[n])
            if k not in CANDIDATES:
                counts[k] += ran
                g = paired(by_seed(runs, c.output), base)
                rows.append(
                    [k, n, ran, f'{runs[0]["lr"]:g}', len(runs), f'{g[0]:+z.2f}' if g[3] else '']
                )
            elif len(runs) < 2:
                lone.append(f'{shown(k)} in {n} ({ran})')
    return (
        f'{", ".join(f"{v} runs of `{k}`" for k, v in counts.items())}, at all rates:\n\n'
        + table(['recipe', 'cell', 'runs', 'best rate', 'seeds there', 'gain'], rows)
        + f'\nFewer than two seeds at the best rate: {", ".join(lone)}; in parentheses the number of runs.\n'
    )


def picture(r, path):
    "Each cell a line: the gain of the default, of the classic recipe, and of the best one"
    from matplotlib.figure import Figure

    order = [n for k in KINDS for n, f in r.facts.items() if group(f) == k]
    fig = Figure(figsize=(9, 0.28 * len(order) + 1.2), layout='constrained')
    ax = fig.subplots()
    inside = lambda v: np.clip(v, -20, 40)
    bar = dict(ms=9, mew=2)
    styles = {
        'best of all recipes, chosen by the test': dict(color='.55', marker='|', **bar),
        'kd(T=4, alpha=.9)': dict(color='tab:blue', marker='o', ms=5, mew=0),
        'the default: significant after correction, at either rate': dict(
            color='tab:red', marker='o', ms=5.5, mew=1.2
        ),
        'the default: not significant, or it depends on the rate': dict(
            color='tab:red', marker='o', ms=5.5, mew=1.2, mfc='white'
        ),
    }
    best, kd, sure, unsure = styles.values()
    for i, n in enumerate(order):
        g, d = r.gains[n], r.gains[n][r.default[n]]
        ax.plot(inside(g[r.best(n)].mean), i, ls='', **best)
        if 'kd(4,.9)' in g:
            ax.plot(inside(g['kd(4,.9)'].mean), i, ls='', **kd)
        ax.plot(
            inside(d.mean + d.se * stats.t.ppf(0.975, d.seeds - 1) * np.array([-1, 1])),
            [i, i],
            color='tab:red',
            lw=1.2,
            alpha=0.6,
        )
        ax.plot(inside(d.mean), i, ls='', **(sure if n in r.bold_default else unsure))
    for label, style in styles.items():
        ax.plot([], [], ls='', label=label, **style)
    ax.axvline(0, color='.7', lw=0.8, zorder=0)
    ax.set_yticks(
        range(len(order)), [f'{n}  ({KINDS[group(r.facts[n])]})' for n in order], fontsize=8
    )
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_xscale('symlog', linthresh=1)
    ax.set_xticks(
        [-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30],
        ['-10', '-3', '-1', '-0.5', '0', '0.5', '1', '3', '10', '30'],
        fontsize=8,
    )
    ax.set_xlabel(
        'points over labels alone, each at its own best rate; line: 95% interval of the default, by the seeds alone',
        fontsize=8,
    )
    for o in ('top', 'right'):
        ax.spines[o].set_visible(False)
    ax.legend(fontsize=7, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    fig.savefig(path, dpi=110)


def text(r):
    return '\n'.join(f'## {title}\n\n{about}\n\n{draw(r)}' for title, about, draw in PARTS)


PARTS = [
    (
        'How often the default is better',
        "Significant: a two-sided paired t test over the seeds, 5%, after Benjamini and Hochberg's correction for all cells in which the two recipes ran.",
        claims,
    ),
    (
        'The default in each cell',
        'Gain over labels alone in points on the test split, each recipe at its own best rate. Bold: p, corrected for the 48 cells, is below 5% with only the planned seeds, and if the rates differ, '
        'at least half of the gain remains when both are trained at either rate (one seed). The p in the table uses all seeds.',
        of_default,
    ),
    (
        'The default and the best recipe',
        'The best of all is chosen by its test score, so its gain is overestimated, especially if many recipes ran. The last column is the recipe that is best on average on the *other tasks* of the same kind.',
        of_best,
    ),
    (
        'Each recipe in each cell',
        'Gain over labels alone. Bold as above, corrected for the cells in which the recipe ran.',
        of_all_recipes,
    ),
    (
        'Each recipe over the cells of a kind',
        'Better, worse: the number of cells in which the recipe is bold above. Only recipes that ran in most of these cells.',
        of_groups,
    ),
    (
        'Probabilities',
        'NLL / expected calibration error on the test split, for the same runs.',
        of_calibration,
    ),
    (
        'The cells',
        f'Main measures: {", ".join(f"{v} for {k}" for k, v in MAIN.items())}; in points.',
        of_cells,
    ),
    (
        'Runs that are not in the tables above',
        'The runs that chose the rates are not included.',
        of_dropped,
    ),
]
