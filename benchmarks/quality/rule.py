"""The library's default rule in each cell, and what a rule chosen without a task would have been worth on it.

python benchmarks/quality/rule.py     # writes results/quality/facts.json"""

import json
import numpy as np
import torch
from candidates import CANDIDATES
from fastdistill import auto
from fastdistill.checks.scores import HESITANT, NOT_APART
from loop import KINDS
from measures import MAIN, measure
from run import OUT, classes_of, read
from stats import at_best_rate, by_seed, paired
from tasks import cells


def facts_of(cell):
    "What is known of a cell before its student is trained"
    data, options = cell.data(), dict(void=cell.void) if cell.output == 'pixels' else {}
    out = dict(
        task=cell.task,
        output=cell.output,
        classes=classes_of(cell, data),
        rows=len(data.train),
        steps=cell.steps,
        batch=cell.bs,
        epochs=round(cell.steps * min(cell.bs, len(data.train)) / len(data.train), 2),
        views=data.train.views,
        tokens=cell.output == 'tokens',
        dense=cell.output == 'pixels',
        parameters=sum(p.numel() for p in cell.student(data).parameters()),
    )
    for name, s in (('train', data.train), ('valid', data.valid), ('test', data.test)):
        t = (s.t[0] if s.views else s.t).float()
        out[f'teacher_{name}'] = round(
            measure(cell.output, t, s.y, **options)[MAIN[cell.output]], 4
        )
        if cell.output == 'labels':
            out[f'apart_{name}'] = round(apart(t, s.y), 4)
        if cell.output in ('classes', 'pixels', 'tokens'):
            out[f'top_prob_{name}'] = round(t.softmax(cell.axis).amax(cell.axis).mean().item(), 4)
    return out


def apart(logits, y):
    "How far the mean probability of the labels that items have is above that of the others"
    p = logits.float().sigmoid()
    return (p[y > 0.5].mean() - p[y <= 0.5].mean()).item()


def write_facts(path=OUT / 'facts.json'):
    have = json.loads(path.read_text()) if path.exists() else {}
    for name, cell in cells().items():
        if name not in have and (OUT / f'{name}.jsonl').exists():
            have[name] = facts_of(cell)
    path.write_text(json.dumps(have, indent=1) + '\n')
    return have


def group(f):
    "Cells among which a rule may not tell"
    if f['output'] != 'classes':
        return f['output']
    return 'two classes' if f['classes'] == 2 else 'classes'


def default(f):
    "The candidate that is the library's default recipe in such a cell"
    hesitant = f['output'] == 'classes' and f['teacher_valid'] - f['top_prob_valid'] > HESITANT
    hesitant = hesitant or (f['output'] == 'labels' and f['apart_valid'] < NOT_APART)
    recipe = auto(
        KINDS[f['output']],
        classes=f['classes'] if KINDS[f['output']] == 'softmax' else None,
        dense=f['dense'] or f['tokens'],
        doubt='it was trained too briefly' if hesitant else None,
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
            'timm',
            'keras',
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


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name, f in write_facts().items():
        print(name, default(f), f)
