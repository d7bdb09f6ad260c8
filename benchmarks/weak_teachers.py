"""Teachers that are worse than the student will be: does the default notice?

    python benchmarks/weak_teachers.py first       # first tries of benchmarks/quality
    python benchmarks/weak_teachers.py ordinary    # cells with good teachers, which must not lose
    python benchmarks/weak_teachers.py stopped     # teachers stopped after a different number of steps
    python benchmarks/weak_teachers.py smoothed    # teachers trained with label smoothing, of which some look unsure
    python benchmarks/weak_teachers.py --table             # of this version; --version 2 for the runs before
    python benchmarks/weak_teachers.py --plot docs/img/weak_teachers.png

Each run is a line of results/weak_teachers.jsonl; runs that are there are skipped. `before` is the default of protocol 2: the
same recipe without `fade`, and `kd(T=1, alpha=.3)` or `kd(T=1, alpha=.1)` for a teacher in doubt. `fade` is
the default of today."""

import copy, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / 'quality'))
import protocol  # noqa: E402
import task_first  # noqa: E402
from fastdistill import Recipe, auto, kd  # noqa: E402
from loop import labels_loss, predict  # noqa: E402
from measures import MAIN  # noqa: E402
from run import commit, one_run  # noqa: E402
from stored import append, read  # noqa: E402
from tasks import Data, Split, cells, fit, kept  # noqa: E402

OUT = HERE / 'results' / 'weak_teachers.jsonl'
# 1: the gradient of the default was up to 4 times as long as that of the labels; 2: for classes, `fade` was a bound of .2
VERSION = 3
FIRST = 'first_two_digits first_ages first_questions first_intents first_income first_emotions'
# cell -> the rate, of the cell's grid, that protocol 1 or 2 chose for labels alone or the default
ORDINARY = dict(
    diabetes=0.01,
    trec50_short=0.1,
    trec_short=0.1,
    age5000=0.003,
    occupation_short=0.01,
    digits100_short=0.01,
    person_short=0.01,
    banking77_short=0.03,
    banking77weak_short=0.03,
    points_short=0.01,
    goemotionsweak_short=0.03,
)
STEPS = 10, 20, 40, 60, 80, 120, 160, 240, 320, 640  # of a teacher
# first try -> a rate that suits its teachers
STOPPED = dict(first_two_digits=0.005, first_questions=0.02, first_intents=0.02, first_ages=0.02)
SMOOTHED = 'first_two_digits', 'first_questions', 'first_intents'


def plain(recipe):
    "The same recipe without fading"
    terms = [copy.copy(t) for t in recipe.terms]
    for t in terms:
        t.fade = 0.0
    return Recipe(*terms, task=recipe.task)


def recipes(cell, data):
    facts = protocol.facts_for_auto(cell, data)
    chosen = auto(**facts)
    before = plain(chosen)
    if facts['doubt'] is not None:
        before = kd(T=1, alpha=0.1 if facts['kind'] == 'sigmoid' else 0.3)
    return dict(labels=None, before=before, fade=chosen)


def stopped(task, steps, smoothing=0.0):
    "A first try whose teacher was trained for so many steps"
    cell = cells()[task]
    d = task_first.inputs(task)
    loss = partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else labels_loss(cell)
    name = f'{task}-{steps}' + (f'-{smoothing:g}' if smoothing else '')

    def make():
        torch.manual_seed(0)
        net = task_first.TASKS[task][2](d)
        t = fit(net, d.train.x, d.train.y, steps, STOPPED[task], loss=loss)
        return [(s.x, s.y, predict(t, s.x)) for s in (d.train, d.valid, d.test)]

    data = Data(*(Split(*s) for s in kept(f'weak_{name}', make)), extra=d.extra)
    return replace(cell, name=name, data=lambda: data)


def chosen(which):
    "(cell, rate) of a group"
    have = cells()
    if which == 'first':
        return [(have[n], have[n].rates[0]) for n in FIRST.split()]
    if which == 'ordinary':
        return [(have[n], lr) for n, lr in ORDINARY.items()]
    if which == 'stopped':
        found = [stopped(task, n) for task in STOPPED for n in STEPS]
    else:
        found = [stopped(task, n, o) for task in SMOOTHED for n in (160, 640) for o in (0.1, 0.3)]
    return [(c, c.rates[0]) for c in found]


def rows_of(version):
    return [r for r in read(OUT) if r['version'] == version]


def run(which, seeds):
    done, code = {(r['cell'], r['name'], r['seed']) for r in rows_of(VERSION)}, commit()
    for cell, lr in chosen(which):
        data = cell.data()
        facts = protocol.facts(cell, data)
        for name, recipe in recipes(cell, data).items():
            for seed in range(300, 300 + seeds):
                if (cell.name, name, seed) in done:
                    continue
                r = one_run(cell, data, recipe, lr, seed)
                own = dict(
                    version=VERSION, group=which, cell=cell.name, name=name, seed=seed, lr=lr
                )
                sure = facts.get('top_prob_test')  # mean of the highest probability
                teacher = dict(teacher=facts['teacher_test'], sure=sure, measure=MAIN[cell.output])
                text = protocol.text_of(recipe)
                append(OUT, own | teacher | dict(recipe=text, commit=code, **r))
        print(table([r for r in rows_of(VERSION) if r['cell'] == cell.name]), flush=True)


def gain(rows, cell, name):
    "Mean difference from labels alone over the seeds, and its standard error"
    by = {
        k: {r['seed']: r['test'][r['measure']] for r in rows if (r['cell'], r['name']) == (cell, k)}
        for k in ('labels', name)
    }
    d = [100 * (v - by['labels'][s]) for s, v in by[name].items()]
    return np.mean(d), np.std(d, ddof=1) / len(d) ** 0.5 if len(d) > 1 else np.nan


def table(rows):
    "Mean of the main measure, NLL and calibration error on the test split, and the difference from labels alone"
    lines = []
    for cell in dict.fromkeys(r['cell'] for r in rows):
        own = [r for r in rows if r['cell'] == cell]
        for name in dict.fromkeys(r['name'] for r in own):
            rs = [r for r in own if r['name'] == name]
            mean = lambda k: float(np.mean([r['test'][k] for r in rs]))
            main = own[0]['measure']
            more = f'{mean("nll"):.3f} | {mean("ece"):.3f}' if 'nll' in rs[0]['test'] else ' | '
            said = '' if name == 'labels' else '{:+.2f} ± {:.2f}'.format(*gain(own, cell, name))
            lines.append(
                f'| {cell} | {100 * own[0]["teacher"]:.1f} | {name} | {len(rs)} | '
                f'{100 * mean(main):.2f} | {said} | {more} |'
            )
    return '\n'.join(lines)


def picture(rows, path):
    "Gain of the default over labels alone against the score of the teacher, for each task"
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 2.8), layout='constrained')
    axes = fig.subplots(1, len(STOPPED))
    for ax, task in zip(axes, STOPPED):
        own = [r for r in rows if r['cell'].startswith(task)]
        for name, group, style in (
            ('before', 'stopped', dict(fmt='x', color='.6', label='without fading')),
            ('fade', 'stopped', dict(fmt='o', color='tab:red', label='the default')),
            (
                'fade',
                'smoothed',
                dict(fmt='^', color='tab:blue', label='the default, teacher with label smoothing'),
            ),
        ):
            inside = [r for r in own if r['group'] == group]
            teachers = {r['cell']: 100 * r['teacher'] for r in inside}
            found = [(score, *gain(inside, cell, name)) for cell, score in teachers.items()]
            if found:
                ax.errorbar(*np.array(found).T, ms=4, lw=1, **style)
        alone = np.mean([100 * r['test'][r['measure']] for r in own if r['name'] == 'labels'])
        ax.axhline(0, color='.7', lw=0.8, zorder=0)
        ax.axvline(alone, color='.7', lw=0.8, ls='--', zorder=0)
        measure = own[0]['measure'].replace('r2', 'R2')
        ax.set_title(task.removeprefix('first_').replace('_', ' '), fontsize=9)
        ax.set_xlabel(f'{measure} of the teacher', fontsize=8)
        ax.tick_params(labelsize=8)
        for o in ('top', 'right'):
            ax.spines[o].set_visible(False)
    axes[0].set_ylabel('gain over labels alone, points', fontsize=8)
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=8,
        loc='outside lower center',
        ncol=3,
        frameon=False,
    )
    fig.savefig(path, dpi=130)


def main(
    which: str = typer.Argument(''),
    seeds: int = 4,
    show: bool = typer.Option(False, '--table'),
    version: int = VERSION,
    plot: Path | None = None,
):
    torch.set_num_threads(1)
    if which:
        run(which, seeds)
    if plot is not None:
        return picture(rows_of(version), plot)
    if show or not which:
        print(
            '| cell | teacher | recipe | seeds | mean | gain | NLL | ECE |\n|---|---|---|---|---|---|---|---|'
        )
        print(table(rows_of(version)))


if __name__ == '__main__':
    typer.run(main)
