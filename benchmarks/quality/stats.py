"Runs with the same seed belong together: paired differences, and whether they are more than luck."

from collections import defaultdict
import numpy as np
from scipy import stats
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
