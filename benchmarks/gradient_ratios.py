"""Does the recipe that is chosen without one ever do harm, whatever the training is like? 200 random trainings of small networks on scikit-learn's data: optimizer,
learning rate, batch size, gradient accumulation (1 to 1,280 items), warm-up from 0, a student that starts as a copy of its teacher or close to it, tiny gradients.
Each is trained by the labels alone and by the default, every tenth also by the default with the gradients measured in every batch.

    python benchmarks/gradient_ratios.py run --n 200
    python benchmarks/gradient_ratios.py table

Seeds are 0 to n-1, and each decides everything. Decided before the first run: a training is worse than labels alone beyond noise if its accuracy on the test half is
lower by more than 3 standard errors of the difference of two proportions, and by more than .03; in regression and with several labels, if its R2 or its accuracy per
label is lower by more than .1 and .03. `strongest` is the norm of the difference between the gradients at the logits of the total loss and of the task loss,
beside that of the task loss (mean of the last 16 batches), in the batch where it was largest. Where the default does harm, `longer steps` tells how labels alone end
with 4 times the learning rate: the default was a sum whose gradient was 4 times as long before all weights were divided by 1 plus the ratios.
"""

import contextlib, copy, io, itertools, json, math, sys, time
from collections import deque
from pathlib import Path
from statistics import median
from unittest.mock import patch
import numpy as np, torch, typer
import torch.nn.functional as F
from sklearn import datasets
from torch import nn
from fastdistill import Distiller, Outputs, Teacher
from fastdistill.recipes.gradient_balance import GradientRatio

RESULTS = Path(__file__).parent / 'results' / 'gradient_ratios.json'
WAYS = 'labels', 'default', 'every batch'
BATCHES, MOST, EVERY = (
    240,
    20,
    10,
)  # of a training; before a step; of which trainings all batches are measured too


def classes(n, noise):
    return lambda: datasets.make_classification(
        1200, 20, n_informative=10, n_classes=n, flip_y=noise, random_state=0
    )


TASKS = {
    'digits': ('softmax', lambda: datasets.load_digits(return_X_y=True)),
    'wine': ('softmax', lambda: datasets.load_wine(return_X_y=True)),
    'iris': ('softmax', lambda: datasets.load_iris(return_X_y=True)),
    '5 classes': ('softmax', classes(5, 0.1)),
    '3 noisy classes': ('softmax', classes(3, 0.3)),
    'several labels': (
        'sigmoid',
        lambda: datasets.make_multilabel_classification(1200, 20, n_classes=6, random_state=0),
    ),
    'diabetes': ('regression', lambda: datasets.load_diabetes(return_X_y=True)),
    'friedman': ('regression', lambda: datasets.make_friedman1(1200, noise=1.0, random_state=0)),
}


def load(name):
    "kind, (x, y) to train, (x, y) to test"
    kind, make = TASKS[name]
    x, y = make()
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    if kind == 'regression':
        y = ((y - y.mean()) / y.std())[:, None]
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (
        torch.tensor(x[order], dtype=torch.float32),
        torch.tensor(y[order], dtype=torch.long if kind == 'softmax' else torch.float32),
    )
    half = len(x) // 2
    return kind, (x[:half], y[:half]), (x[half:], y[half:])


def net(width, x, y, kind):
    return nn.Sequential(
        nn.Linear(x.shape[1], width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, int(y.max()) + 1 if kind == 'softmax' else y.shape[1]),
    )


LOSSES = dict(
    softmax=F.cross_entropy, sigmoid=F.binary_cross_entropy_with_logits, regression=F.mse_loss
)


def score(model, x, y, kind):
    with torch.no_grad():
        s = model(x)
    if kind == 'softmax':
        return (s.argmax(1) == y).float().mean().item()
    if kind == 'sigmoid':
        return ((s > 0) == (y > 0)).float().mean().item()
    return (
        1
        - ((s - y).square().mean() / (y - y.mean(0)).square().mean())
        .nan_to_num(1e9)
        .clamp(max=2.0)
        .item()
    )


def noise(row, way):
    "How far from the score of labels alone may be noise"
    if row['kind'] != 'softmax':
        return 0.1 if row['kind'] == 'regression' else 0.03
    return max(
        0.03,
        3
        * math.sqrt(
            sum(row[w]['score'] * (1 - row[w]['score']) for w in ('labels', way)) / row['n_test']
        ),
    )


def teachers():
    "Task -> kind, data, and a network of 64: that of the best epoch, since the question is not what a bad teacher does"
    out = {}
    for name in TASKS:
        kind, train, test = load(name)
        torch.manual_seed(0)
        model = net(64, *train, kind)
        opt = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
        best = -math.inf, None
        for _ in range(40):
            for i in torch.randperm(len(train[0])).split(32):
                LOSSES[kind](model(train[0][i]), train[1][i]).backward()
                opt.step()
                opt.zero_grad()
            best = max(best, (score(model, *test, kind), copy.deepcopy(model)), key=lambda o: o[0])
        out[name] = kind, train, test, best[1]
    return out


def drawn(seed):
    "What is random in a training"
    g = np.random.default_rng(seed)
    adam, momentum = bool(g.random() < 0.4), float(g.choice([0.0, 0.9]))
    lr = 10 ** g.uniform(-3.5, -2) if adam else 10 ** g.uniform(-2, -1) * (1 - momentum)
    items = round(2 ** g.uniform(0, math.log2(1280)))
    return dict(
        task=str(g.choice(list(TASKS))),
        adam=adam,
        momentum=0.0 if adam else momentum,
        lr=float(lr),
        items=items,
        bs=int(g.choice([b for b in (1, 4, 16, 64) if items / b <= MOST])),
        warm=bool(g.random() < 0.4),
        start=str(g.choice(['random', 'copy', 'near'])),
        width=int(g.choice([8, 32, 64])),
        scale=float(g.choice([1.0, 1.0, 1e-6])),
        seed=seed,
    )


def student_of(o, model, train, kind):
    torch.manual_seed(o['seed'])
    if o['start'] == 'random':
        return net(o['width'], *train, kind)
    model = copy.deepcopy(model)
    if o['start'] == 'near':
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-3 * torch.randn_like(p)
    return model


def batches(o, n):
    "The same ones whatever trains"
    g = torch.Generator().manual_seed(o['seed'])
    while True:
        yield from (
            i
            for i in torch.randperm(n, generator=g).split(o['bs'])
            if len(i) == o['bs'] or n < o['bs']
        )


def train(o, way, kind, data, test, teacher):
    "Score, strongest gradient, CPU seconds"
    (x, y), start = data, time.process_time()
    student = student_of(o, teacher, data, kind)
    loss = lambda s, y: o['scale'] * LOSSES[kind](s, y)
    lr = o['lr'] if o['adam'] else o['lr'] / o['scale']
    opt = (
        torch.optim.Adam(student.parameters(), lr, eps=1e-8 * o['scale'])
        if o['adam']
        else torch.optim.SGD(student.parameters(), lr, o['momentum'])
    )
    d = Distiller(student, Teacher(teacher), None, task_loss=loss, kind=kind)
    every = max(o['items'] // o['bs'], 1)
    steps, lasts, strongest = BATCHES // every, deque(maxlen=16), 0.0
    with d.teacher:
        for b, i in zip(range(steps * every), batches(o, len(x))):
            s = student(x[i])
            own = loss(s, y[i])
            if way == 'labels':
                total = own
            else:
                if d.chooses:
                    d.choose((x[i],), True)
                out = d.compute(
                    Outputs(s), d.teacher_outputs(x[i]), own, (y[i],), progress=b / BATCHES
                )
                total = out.total
                label, both = [
                    torch.autograd.grad(v, s, retain_graph=True)[0] for v in (own, total)
                ]
                lasts.append(label.norm().item())
                strongest = max(
                    strongest, (both - label).norm().item() / max(sum(lasts) / len(lasts), 1e-30)
                )
            (total / every).backward()
            if (b + 1) % every:
                continue
            if o['warm']:
                for p in opt.param_groups:
                    p['lr'] = lr * min((b + 1) // every - 1, 0.3 * steps) / max(0.3 * steps, 1)
            opt.step()
            opt.zero_grad()
    return dict(
        score=score(student, *test, kind), strongest=strongest, seconds=time.process_time() - start
    )


app = typer.Typer(add_completion=False)


@app.command()
def run(
    n: int = 200,
    out: Path = RESULTS,
    first: int = 0,
    ways: str = ','.join(WAYS),
    floor: float = GradientRatio.FLOOR,
):
    torch.set_num_threads(1)
    GradientRatio.FLOOR = floor
    known, rows = teachers(), json.loads(out.read_text()) if out.exists() else []
    done = {r['seed'] for r in rows}  # a restart goes on; delete the file to run everything again
    for seed in sorted({*range(first, first + n)} - done):
        o = drawn(seed)
        kind, data, test, teacher = known[o['task']]
        row = dict(o, kind=kind, teacher=score(teacher, *test, kind), n_test=len(test[0]))
        for way in ways.split(',')[: 3 if seed % EVERY == 0 else 2]:
            always = (
                patch.object(GradientRatio, 'FIRST', 10**9)
                if way == 'every batch'
                else contextlib.nullcontext()
            )
            with always, contextlib.redirect_stdout(io.StringIO()):
                row[way] = train(o, way, kind, data, test, teacher)
        if row['default']['score'] < row['labels']['score'] - noise(row, 'default'):
            # does it come from the length of the steps alone?
            row['longer steps'] = train(
                dict(o, lr=o['lr'] if o['adam'] else 4 * o['lr']),
                'labels',
                kind,
                data,
                test,
                teacher,
            )
        rows = sorted([*rows, row], key=lambda r: r['seed'])
        out.parent.mkdir(exist_ok=True)
        out.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    table(out)


@app.command()
def table(out: Path = RESULTS):
    everything = json.loads(out.read_text())
    for way in WAYS[1:]:
        if not (rows := [r for r in everything if way in r]):
            continue
        lead = lambda r, way=way: r[way]['score'] - r['labels']['score']
        worse, better = [[r for r in rows if sign * lead(r) > noise(r, way)] for sign in (-1, 1)]
        strong = sorted(r[way]['strongest'] for r in rows)
        print(
            f'{way}: {len(worse)} of {len(rows)} worse than labels alone beyond noise, {len(better)} better; mean lead {sum(map(lead, rows)) / len(rows):+.4f}, lowest '
            f'{min(map(lead, rows)):+.3f}; strongest: median {median(strong):.2g}, largest {strong[-1]:.3g}; {median(r[way]["seconds"] for r in rows):.2f} s'
        )
        for r in worse:
            print(
                '  ',
                {
                    k: r[k]
                    for k in (
                        'seed',
                        'task',
                        'adam',
                        'momentum',
                        'bs',
                        'items',
                        'warm',
                        'start',
                        'width',
                        'scale',
                    )
                },
                f'lr {r["lr"]:.2g}, {r["labels"]["score"]:.3f} -> {r[way]["score"]:.3f}, {r[way]["strongest"]:.3g}',
                f'labels alone with longer steps {r["longer steps"]["score"]:.3f}'
                if 'longer steps' in r
                else '',
            )


CELLS = 'occupation_short', 'person_short', 'age5000', 'diabetes', 'digits100_short', 'points_short'


@app.command()
def quality(
    floors: str = f'.3,{GradientRatio.FLOOR:g}',
    cells: str = ','.join(CELLS),
    seeds: int = 4,
    out: Path = RESULTS.parent / 'gradient_ratios' / 'quality.jsonl',
):
    """The default in cells of the quality benchmark, with different floors, at the rate that was the best one
    for it there, and the same seeds. A restart goes on."""
    sys.path.insert(0, str(Path(__file__).parent / 'quality'))
    import run as bench
    from stats import best_rate

    torch.set_num_threads(1)
    known, have = bench.read(out), bench.cells()
    done = {(r['cell'], r['floor'], r['seed']) for r in known}
    for name, seed in itertools.product(cells.split(','), range(seeds)):
        cell, runs = have[name], bench.read(bench.OUT / f'{name}.jsonl')
        default = dict(classes='dist(auto)x3', labels='binary(1)x3', numbers='regressionx3')[
            cell.output
        ]
        lr = best_rate([r for r in runs if r['recipe'] == default], cell.output)
        for floor in map(float, floors.split(',')):
            if (name, floor, seed) in done:
                continue
            GradientRatio.FLOOR = floor
            run = bench.one_run(cell, cell.data(), bench.CANDIDATES[default], lr, seed)
            bench.append(out, dict(run, floor=floor))
    for name in cells.split(','):
        cell, runs = have[name], [r for r in bench.read(out) if r['cell'] == name]
        scores = {
            f: [bench.score(cell.output, r['test']) for r in runs if r['floor'] == f]
            for f in sorted({r['floor'] for r in runs})
        }
        print(
            name, {f: f'{np.mean(v):.2f} ({len(v)} seeds)' for f, v in scores.items()}, flush=True
        )


if __name__ == '__main__':
    app()
