"""PROTOCOL.md as data: which runs there are, and what a stored run must agree with to count as one of them.

Nothing here looks at a result, except that the rates of a recipe follow from its validation scores."""

import re, warnings
from functools import cache
from itertools import product
import numpy as np
import torch
from torch import nn
from candidates import CANDIDATES
from fastdistill import DistillWarning, Teacher, auto
from fastdistill.base.task import Task
from fastdistill.checks.teacher_outputs import BATCHES, check_outputs
from loop import KINDS, predict, train
from measures import MAIN, measure
from rule import apart
from tasks import Cell, Data, Split

VERSION = 2  # 1: the runs before PROTOCOL.md was written
CHOOSING = 0, 1, 2  # seeds that run at every rate; their validation scores choose one
REPORTED = 100, 101, 102, 103, 104, 105, 106, 107
FEWER = 5  # of them, in the cells of SLOW
SLOW = {'cifar', 'cifar5000_long', 'imagenette', 'imagenette_tuned'}  # a run takes a minute or more
LONG = SLOW | {'cifar_short', 'cifar5000_wide', 'wikitext'}  # 15 seconds or more
FURTHER = 2  # rates beyond either end of a grid, where the best one stands at that end
FROZEN = '72152b4ff91e'  # the commit at which the default was frozen; cells of new data are closed while this is empty

# the largest loss against labels alone that counts as none: in points, bits, nats, and calibration error
MARGINS = dict(accuracy=0.5, miou=0.5, map=0.5, r2=0.5, bits=0.01, nll=0.02, ece=0.01)
LEVEL = 0.05
ENOUGH_RECIPES = 10  # to speak of the best recipe
ENOUGH_DATA_SETS = 3  # for an effect over data sets

SOFTMAX = (
    'kd(5,.5);kd(4,.9);timm;kd(3,.5)',  # peers' defaults and the classic: everywhere
    'kd(1,.5);kd(4,.1);keras;kl(1)x3;kl(4)x3;ttm(4)x1;kd(1,.9);soft(1);dist(4)x1;dist(4)x3;cwd(4)x3',
)
RECIPES = dict(  # output -> (in every cell, also in cells with short runs)
    classes=SOFTMAX,
    pixels=SOFTMAX,
    tokens=SOFTMAX,
    labels=(
        'mse(.5);kd(.9)',
        'kd(.5);kd(.3);kd(.1);binary(1)x.3;binary(1)x1;binary(1)x3;binary(2)x3;soft(1)',
    ),
    numbers=('mse(.5);kd(.9)', 'soft(1);regressionx.3;regressionx1;regressionx3'),
)


def facts(cell, data):
    "What is known of a cell before its student is trained;"
    out = dict(
        task=cell.task,
        data_set=cell.data_set,
        output=cell.output,
        classes=data.train.t.shape[cell.axis + bool(data.train.views)],
        rows=len(data.train),
        steps=cell.steps,
        batch=cell.bs,
        epochs=round(cell.steps * min(cell.bs, len(data.train)) / len(data.train), 2),
        tokens=cell.output == 'tokens',
        dense=cell.output == 'pixels',
        parameters=sum(p.numel() for p in cell.student(data).parameters()),
        items={k: len(getattr(data, k)) for k in ('valid', 'test')},
    )
    options = dict(void=cell.void) if cell.output == 'pixels' else {}
    for name, s in (('valid', data.valid), ('test', data.test)):
        found = measure(cell.output, s.t.float(), s.y, **options)
        out[f'teacher_{name}'] = round(found[MAIN[cell.output]], 4)
        if cell.output == 'labels':
            out[f'apart_{name}'] = round(apart(s.t, s.y), 4)
        if cell.output in ('classes', 'pixels', 'tokens'):
            out[f'top_prob_{name}'] = round(
                s.t.float().softmax(cell.axis).amax(cell.axis).mean().item(), 4
            )
    return out


def names(cell):
    "Of the recipes for such a cell; some need more than two classes"
    everywhere, short = RECIPES[cell.output]
    both = f'{everywhere};{short}' if is_full(cell) else everywhere
    return [
        'labels',
        'default',
        *(n for n in both.split(';') if cell.output in CANDIDATES[n].outputs.split()),
    ]


def recipes(cell, data, known, also=()):
    "name -> Recipe, or None for labels alone: all that the protocol has for this cell, and candidates that are named"
    own = dict(labels=None, default=library_default(cell, data))
    for name in dict.fromkeys([*names(cell)[2:], *also]):
        c = CANDIDATES[name]
        if c.fits(cell, known['classes']):
            own[name] = c.recipe(teacher_rows(cell, data)) if c.measures else c.recipe()
    return own


def teacher_rows(cell, data):
    "The teacher's outputs for about 2,048 training items (or pixels, or tokens), one in each row"
    t = data.train.t.movedim(cell.axis + bool(data.train.views), -1)
    t = t.reshape(-1, t.shape[-1])
    return t[:: max(len(t) // 2048, 1)].float()


class Stored(nn.Module):
    "A model of stored outputs, whose inputs are row numbers"

    def __init__(self, outputs):
        super().__init__()
        self.outputs = [outputs]  # a list, so that it is no weight

    def forward(self, rows):
        return self.outputs[0][rows]


def library_default(cell, data):
    "What the library chooses here"
    return auto(**facts_for_auto(cell, data))


def facts_for_auto(cell, data):
    "Arguments of `auto`: the library scores the teacher on a few validation batches, and looks at its outputs for training items"
    kind, v, bs = KINDS[cell.output], data.valid, 2 * cell.bs
    torch.manual_seed(REPORTED[0])
    student = cell.student(data).eval()
    n = min(len(v), BATCHES * bs)
    batches = [((r,), (v.y[r],)) for r in torch.arange(n).split(bs)]
    found = check_outputs(
        Teacher(Stored(v.t.float())),
        Task(kind, cell.axis, cell.void),
        batches,
        Stored(predict(student, v.x[:n])),
    )
    t = teacher_rows(cell, data)
    return dict(
        kind=kind,
        classes=t.shape[-1] if kind == 'softmax' else None,
        dense=cell.output in ('pixels', 'tokens'),
        teacher=t,
        doubt=found.doubt or None,
    )


def is_full(cell):
    return not (cell.name in LONG or cell.first_try)


def text_of(recipe):
    "A recipe with all its numbers; recipes of the same text train alike"
    return 'labels' if recipe is None else re.sub(r'(\d)\.0\b', r'\1', repr(recipe))


def seeds(cell):
    return REPORTED[:FEWER] if cell.name in SLOW else REPORTED


SHAPES = dict(
    classes=((6,), nn.Linear(6, 4)),
    labels=((6,), nn.Linear(6, 4)),
    numbers=((6,), nn.Linear(6, 4)),
    tokens=((5, 6), nn.Linear(6, 4)),
    pixels=((6, 4, 4), nn.Conv2d(6, 4, 1)),
)


@cache
def example(output):
    "A small cell of this kind, the same on every machine"
    shape, net = SHAPES[output]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, *shape, generator=g)
    weights = [torch.randn(p.shape, generator=g) for p in net.parameters()]

    def student(data):
        for p, w in zip(net.parameters(), weights):
            p.data = 0.1 * w
        return net

    net.requires_grad_(False)
    for p, w in zip(net.parameters(), weights):
        p.data = w.flip(0)
    t = 2 * net(x)
    net.requires_grad_(True)
    axis = 2 if output == 'tokens' else 1
    noisy = t + torch.randn(t.shape, generator=g)
    y = noisy if output == 'numbers' else (noisy > 0).float() if output == 'labels' else None
    s = Split(x, noisy.argmax(axis) if y is None else y, t)
    cell = Cell('example', '', output, None, student, 60, bs=16, opt='sgd', axis=axis)
    return cell, Data(s, s, s)


BEHAVIORS = {}  # (outputs, text of a recipe) -> its behavior


def behavior(output, recipe):
    """Numbers that change if the library trains differently with the recipe, and don't if code is only moved: a student's
    weights after 60 steps of a fixed example. A recipe's text says nothing about how gradients are measured."""
    if recipe is None:
        return None
    key = output, text_of(recipe)
    if key not in BEHAVIORS:
        BEHAVIORS[key] = _behavior(output, recipe)
    return BEHAVIORS[key]


def _behavior(output, recipe):
    cell, data = example(output)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        student, _ = train(cell, data, recipe, 0.05, 0)
    w = torch.cat([p.detach().flatten() for p in student.parameters()])
    return [round(o, 5) for o in (*w[:6].tolist(), w.norm().item(), w.mean().item())]


def teacher_of(data):
    "Numbers that tell teachers apart, and forgive another machine its rounding"
    t = data.valid.t.float()
    return [round(o, 3) for o in (t.mean().item(), t.std().item(), *t.flatten()[:4].tolist())]


def close(a, b):
    if a is None or b is None or len(a) != len(b):
        return a == b
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-3))


def plan(cell, data, also=()):
    "All that stored runs of this cell must agree with, as plain data"
    known = facts(cell, data)
    own = recipes(cell, data, known, also)
    return dict(
        protocol=VERSION,
        setup=f'{cell.setup}; {known["rows"]} training items, {known["parameters"]} parameters',
        rates=list(cell.rates),
        seeds=list(seeds(cell)),
        first_try=cell.first_try,
        sealed=cell.sealed,
        facts=known,
        teacher=teacher_of(data),
        why=own['default'].why,
        recipes={
            k: dict(text=text_of(r), behavior=behavior(cell.output, r)) for k, r in own.items()
        },
    ), own


def belongs(run, planned, name):
    "Is this stored run one of the plan's runs with this recipe?"
    r = planned['recipes'][name]
    same = (run['protocol'], run['setup'], run['recipe']) == (
        planned['protocol'],
        planned['setup'],
        r['text'],
    )
    if not same or r['text'] == 'labels':
        return same
    return close(run['behavior'], r['behavior']) and close(run['teacher'], planned['teacher'])


def next_rate(
    rates,  # of the cell
    tried,  # rate -> validation score of those that ran
):
    "The next rate to try; None once the best one has a worse neighbor on either side, or none is left to try"
    if todo := [r for r in rates if r not in tried]:
        return todo[0]
    if len(rates) == 1:
        return None
    best, all_of = max(tried, key=tried.get), sorted(tried)
    factor = rates[1] / rates[0]
    if best == all_of[-1] and len([r for r in all_of if r > max(rates)]) < FURTHER:
        return float(f'{best * factor:.2g}')
    if best == all_of[0] and len([r for r in all_of if r < min(rates)]) < FURTHER:
        return float(f'{best / factor:.2g}')


def best_rate(
    scores,  # rate -> validation scores, one for each choosing seed
):
    return max(sorted(scores), key=lambda r: np.mean(scores[r]))


def choices(scores):
    "The rate that each resample of the choosing seeds chooses: 27 of three seeds, in a fixed order"
    if len(scores) == 1:
        return [*scores] * len(CHOOSING) ** len(CHOOSING)
    n = len(CHOOSING)
    return [
        best_rate({r: [v[i] for i in rows] for r, v in scores.items()})
        for rows in product(range(n), repeat=n)
    ]


def next_run(planned, name, runs, score):
    """(rate, seed, role) of the next run of a recipe; None when it is done. First every rate with the choosing seeds, then the
    reported seeds at each rate that a resample of the choosing seeds would have chosen.

    runs: those that belong to this recipe.
    score: fn(run) -> its validation score."""
    have = {(r['lr'], r['seed']): r for r in runs}
    if len(planned['rates']) > 1:
        scores = {}
        while True:
            tried = {r: np.mean(v) for r, v in scores.items()}
            lr = next_rate(planned['rates'], tried)
            if lr is None:
                break
            if left := [s for s in CHOOSING if (lr, s) not in have]:
                return lr, left[0], 'choosing'
            scores[lr] = [score(have[lr, s]) for s in CHOOSING]
        rates = [best_rate(scores), *sorted(set(choices(scores)) - {best_rate(scores)})]
    else:
        rates = planned['rates']
    for lr in rates:
        if left := [s for s in planned['seeds'] if (lr, s) not in have]:
            return lr, left[0], 'reported'
    return None


def amount(planned_rates, n_seeds):
    "About how many runs a recipe needs: one more rate than the grid has, and two that a resample may choose"
    return (
        n_seeds
        if len(planned_rates) == 1
        else len(CHOOSING) * (len(planned_rates) + 1) + 2 * n_seeds
    )
