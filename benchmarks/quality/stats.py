"Runs with the same seed belong together: paired differences, and whether they are more than luck."

from collections import defaultdict
from dataclasses import dataclass
import numpy as np
from scipy import optimize, stats
from measures import score


def paired(
    a,  # seed -> score
    b,  # the same of what it is compared with
):
    "(mean of a - b, its standard error, two-sided p of Student's t, number of pairs) over the seeds that both have"
    d = np.array([a[s] - b[s] for s in sorted(a.keys() & b.keys())], dtype=float)
    if len(d) < 2:
        return (float(d.mean()) if len(d) else float('nan')), float('nan'), float('nan'), len(d)
    se = d.std(ddof=1) / np.sqrt(len(d))
    p = float(2 * stats.t.sf(abs(d.mean() / se), len(d) - 1)) if se > 0 else float(not d.any())
    return float(d.mean()), float(se), p, len(d)


def by_rate(runs, output):
    "rate -> mean validation score over the seeds that ran at each of the rates, of one recipe's runs"
    scores = defaultdict(dict)
    for r in runs:
        scores[r['lr']][r['seed']] = score(output, r['valid'])
    scores = {lr: o for lr, o in scores.items() if 0 in o}
    both = set.intersection(*map(set, scores.values())) if scores else ()
    return {lr: float(np.mean([o[s] for s in sorted(both)])) for lr, o in scores.items()}


def best_rate(runs, output):
    "The rate that is best on the validation split; None where nothing ran"
    tried = by_rate(runs, output)
    return max(tried, key=tried.get) if tried else None


def at_best_rate(runs, output):
    "recipe -> its runs at the rate that is best on the validation split"
    by = defaultdict(list)
    for r in runs:
        by[r['recipe']].append(r)
    best = {name: best_rate(rs, output) for name, rs in by.items()}
    return {
        name: [r for r in rs if r['lr'] == best[name]]
        for name, rs in by.items()
        if best[name] is not None
    }


def by_seed(runs, output, split='test'):
    return {r['seed']: score(output, r[split]) for r in runs}


def at_rate(runs, recipe, rate):
    return [r for r in runs if r['recipe'] == recipe and r['lr'] == rate]


def corrected(p):  # test -> p
    "test -> p after Benjamini and Hochberg's correction for all of these tests; a test without a p is not one of them"
    known = {k: v for k, v in p.items() if np.isfinite(v)}
    return (
        dict(zip(known, stats.false_discovery_control([*known.values()]).tolist())) if known else {}
    )


def significant(found, sign=1, level=0.05):
    return found[3] > 1 and found[2] < level and np.sign(found[0]) == sign


@dataclass(frozen=True)
class Arm:
    "The runs of one recipe in one cell, by one measure"

    valid: dict  # rate -> validation scores of the main measure, one for each choosing seed; empty where there is one rate
    test: dict  # rate -> {reported seed: value on the test split}
    chosen: list  # the rate that each resample of the choosing seeds chooses, in the same order for all recipes
    best: float  # the rate that all choosing seeds choose


@dataclass(frozen=True)
class Effect:
    "A mean difference with its 95% interval"

    mean: float
    low: float
    high: float
    p: float
    n: int  # seeds of a gain, data sets of an overall effect


def interval(mean, variance, df, n):
    se = np.sqrt(variance)
    if se == 0:
        return Effect(mean, mean, mean, float(mean == 0), n)
    half = stats.t.ppf(0.975, df) * se
    return Effect(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / se, df)), n)


def gain(a: Arm, b: Arm, choosing=3):
    """Mean of a - b over the reported seeds, each at the rate that its choosing seeds chose. The interval knows that other
    choosing seeds might have chosen other rates: its variance is the mean one of the resamples, and that of their means."""

    def difference(rates):
        x, y = a.test[rates[0]], b.test[rates[1]]
        d = np.array([x[s] - y[s] for s in sorted(x.keys() & y.keys())])
        return d.mean(), d.var(ddof=1) / len(d), len(d)

    mean, _, n = difference((a.best, b.best))
    pairs = [difference(rates) for rates in zip(a.chosen, b.chosen, strict=True)]
    means, variances = np.array([p[:2] for p in pairs]).T
    # the spread of means of resamples is too small by this factor, as that of a mean of so few is
    between = means.var() * choosing / (choosing - 1)
    return interval(float(mean), variances.mean() + between, n - 1, n)


def overall(found):
    """The effect over data sets: a mixed model with a random effect of each data set, its variances by restricted maximum likelihood.

    found: (data set, mean gain) of each cell."""
    groups = sorted({g for g, _ in found})
    values = [np.array([v for g, v in found if g == k]) for k in groups]
    sizes, means = np.array([*map(len, values)]), np.array([v.mean() for v in values])
    within = sum(((v - v.mean()) ** 2).sum() for v in values)
    df = len(found) - 1

    def fit(x):
        "Of a variance between data sets that is x / (1 - x) times the one within: mean, its variance, -2 log likelihood"
        ratio = x / (1 - x)
        w = sizes / (1 + sizes * ratio)
        mean = (w * means).sum() / w.sum()
        squares = within + (w * (means - mean) ** 2).sum()
        likelihood = df * np.log(squares) + np.log1p(sizes * ratio).sum() + np.log(w.sum())
        return float(mean), float(squares / df / w.sum()), likelihood

    if np.ptp([v for _, v in found]) == 0:
        return interval(float(means[0]), 0.0, len(groups) - 1, len(groups))
    grid = np.linspace(0, 0.999, 500)
    i = int(np.argmin([fit(x)[2] for x in grid]))
    ends = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    x = optimize.minimize_scalar(lambda x: fit(x)[2], bounds=ends, method='bounded').x
    mean, variance, _ = fit(min((x, grid[i]), key=lambda x: fit(x)[2]))
    return interval(mean, variance, len(groups) - 1, len(groups))


def verdict(effect, margin):
    "Is the recipe safe, that is no worse than what it is compared with by more than the margin?"
    if effect.low > -margin:
        return 'safe'
    return 'worse' if effect.high < 0 else 'too noisy to tell'
