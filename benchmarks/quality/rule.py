"The library's default recipe in each cell, and what a rule chosen without a task would have been worth on it."

import numpy as np
from candidates import CANDIDATES
from fastdistill import auto
from fastdistill.checks.teacher_confidence import HESITANT, NOT_APART
from loop import KINDS
from stats import at_best_rate, by_seed, paired
from stored import OUT, read


def apart(logits, y):
    "How far the mean probability of the labels that items have is above that of the others"
    p = logits.float().sigmoid()
    return (p[y > 0.5].mean() - p[y <= 0.5].mean()).item()


def group(f):
    "Cells among which a rule may not tell"
    if f['output'] != 'classes':
        return f['output']
    return 'two classes' if f['classes'] == 2 else 'classes'


def default(f):
    """The candidate that was the library's default recipe in such a cell when protocol 1 ran. Since then its gradient ratio can fall
    (`fade=`), which replaced the recipe of a teacher in doubt, but for two classes."""
    hesitant = f['output'] == 'classes' and f['teacher_valid'] - f['top_prob_valid'] > HESITANT
    hesitant = hesitant or (f['output'] == 'labels' and f['apart_valid'] < NOT_APART)
    if hesitant:
        return 'kd(.1)' if f['output'] == 'labels' else 'kd(1,.3)'
    recipe = auto(
        KINDS[f['output']],
        classes=f['classes'] if KINDS[f['output']] == 'softmax' else None,
        dense=f['dense'] or f['tokens'],
    )
    if [t.name for t in recipe.terms] == ['dist']:
        return 'dist(auto)x3'  # its T depends on the teacher
    return next(
        c.name
        for c in CANDIDATES.values()
        if not (c.smoothing or c.measures)
        and c.tier != 'peer'
        and c.recipe() is not None
        and parts(c.recipe()) == parts(recipe)
    )


def parts(recipe):
    "What makes two recipes equal"
    return [
        (t.name, t.has_grad_ratio, t.weight, t.layers, t.options) for t in recipe.terms
    ], recipe.task_at(0.0)


def results(cell):
    "recipe -> its runs at its best rate, of those with more than one seed"
    return {
        k: v
        for k, v in at_best_rate(read(OUT / f'{cell.name}.jsonl'), cell.output).items()
        if len(v) > 1 and k in CANDIDATES
    }


def gains(cell):
    "recipe -> (gain over labels alone, standard error, p, seeds) on the test split"
    best = results(cell)
    base = by_seed(best['labels'], cell.output)
    return {k: paired(by_seed(v, cell.output), base) for k, v in best.items()}


def spread(found):
    "Gains as shares of the best one, so that no cell counts more than another"
    top = max(max(g[0] for g in found.values()), 0.1)
    return {k: max(g[0] / top, -1.0) for k, g in found.items()}


def left_out(
    facts,  # cell -> facts
    found,  # cell -> recipe -> gain
):
    "cell -> the recipe that is best on average in the cells of other tasks of its group; none where there is no other task"
    out = {}
    for name, f in facts.items():
        others = {
            n: o['task']
            for n, o in facts.items()
            if o['task'] != f['task'] and group(o) == group(f) and n in found
        }
        # tokens stand alone: what other softmax tasks say counts
        if not others and f['output'] == 'tokens':
            others = {
                n: o['task']
                for n, o in facts.items()
                if o['output'] in ('classes', 'pixels') and n in found
            }
        if name not in found or not others:
            continue
        known = set.intersection(*(set(found[n]) for n in [*others, name])) - {
            'labels',
            'fasterai',
            *(c.name for c in CANDIDATES.values() if c.tier == 'peer'),
        }
        if known:
            out[name] = max(
                sorted(known), key=mean_over_tasks(others, {n: spread(found[n]) for n in others})
            )
    return out


def mean_over_tasks(
    task,  # cell -> task
    shares,  # cell -> recipe -> share of the best gain
):
    "fn(recipe): its mean share, each task counting once"
    of = lambda t, k: np.mean([shares[n][k] for n in task if task[n] == t])
    return lambda k: np.mean([of(t, k) for t in sorted(set(task.values()))])
