"""Tasks that were added after the rule of the default was fixed, so that they judge it: facts about people of the adult census, two small tables of
scikit-learn's, digits to be found in pictures, and words of WikiText. Two more, of texts, are in task_text.py."""

import gzip
from collections import Counter
from functools import cache, partial
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from torch import nn
import task_table
from loop import predict
from task_digits import PARTS
from task_lm import Model, windows
from tasks import ROOT, Cell, Data, Split, fit, kept


def log_probs(model, xs):
    return [torch.from_numpy(np.log(model.predict_proba(x.numpy()).clip(1e-6))).float() for x in xs]


def occupation():
    "13 occupations, of the other columns without the income; boosted trees teach. Of the armed forces there are too few for trees"
    full, test = [
        d[d['occupation'].notna() & (d['occupation'] != 'Armed-Forces')] for d in task_table.read()
    ]
    parts = full[4000:14_000], full[:4000], test
    xs, names = (
        task_table.columns(parts[0], parts[1:], 'occupation'),
        sorted(parts[0]['occupation'].unique()),
    )
    ys = [torch.tensor(np.searchsorted(names, d['occupation'])) for d in parts]
    trees = HistGradientBoostingClassifier(
        max_iter=60, learning_rate=0.08, max_leaf_nodes=8, random_state=0
    ).fit(xs[0].numpy(), ys[0].numpy())
    return dict(
        splits=list(zip(xs, ys, log_probs(trees, xs))), n_in=xs[0].shape[1], n_out=len(names)
    )


PERSON = dict(
    sex='Female',
    marital='Married-civ-spouse Never-married Divorced',
    relationship='Own-child Not-in-family',
    workclass='Self-emp-not-inc',
)


def person():
    "8 labels: the income, and what stands in columns that are no inputs then; three wide networks teach"
    full, test = task_table.read()
    parts = full[4000:14_000], full[:4000], test

    def labels(d):
        return torch.tensor(
            np.stack(
                [d['income'], *(d[k] == v for k, vs in PERSON.items() for v in vs.split())], axis=1
            ),
            dtype=torch.float32,
        )

    ys = [labels(d) for d in parts]
    parts = [
        d.drop(columns=list(PERSON)).assign(**{k: 0.0 for k in PERSON}) for d in parts
    ]  # columns that say nothing
    xs = [x.nan_to_num() for x in task_table.columns(parts[0], parts[1:], 'income')]
    return dict(
        splits=list(
            zip(xs, ys, task_table.networks(xs, ys[0], 1500, F.binary_cross_entropy_with_logits))
        ),
        n_in=xs[0].shape[1],
        n_out=ys[0].shape[1],
    )


def small(load, forest, sizes):
    "A table of scikit-learn's, in three parts; a forest teaches"
    x, y = load(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(y))
    cuts = np.split(rows, np.cumsum(sizes))
    mean, std = x[cuts[0]].mean(0), x[cuts[0]].std(0)
    xs, ys = [torch.from_numpy((x[c] - mean) / std).float() for c in cuts], [y[c] for c in cuts]
    forest = forest(300, min_samples_leaf=3, random_state=0)
    if y.dtype.kind == 'f':
        ys = [(o - ys[0].mean()) / ys[0].std() for o in ys]
        forest.fit(xs[0].numpy(), ys[0])
        return dict(
            splits=[
                (
                    a,
                    *(
                        torch.tensor(o, dtype=torch.float32)[:, None]
                        for o in (b, forest.predict(a.numpy()))
                    ),
                )
                for a, b in zip(xs, ys)
            ],
            n_in=x.shape[1],
            n_out=1,
        )
    forest.fit(xs[0].numpy(), ys[0])
    return dict(
        splits=list(zip(xs, map(torch.from_numpy, ys), log_probs(forest, xs))),
        n_in=x.shape[1],
        n_out=int(y.max()) + 1,
    )


def scenes(amount, part, g, height=24, width=40):
    "(N, 1, height, width) noisy pictures of up to four digits, and of each pixel 0, or 1 and the digit that it is of"
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float().view(-1, 8, 8) / 16, torch.tensor(y)
    pick = torch.randint(*part, (amount, 4), generator=g)
    at = (torch.rand(amount, 4, 2, generator=g) * torch.tensor([height - 7, width - 7])).long()
    canvas, mask = (
        torch.zeros(amount, height, width),
        torch.zeros(amount, height, width, dtype=torch.long),
    )
    for i in range(amount):
        for k, (r, c) in enumerate(at[i].tolist()):
            here = slice(r, r + 8), slice(c, c + 8)
            on = x[pick[i, k]] > 0.25
            canvas[i][here] = torch.where(on, x[pick[i, k]], canvas[i][here])
            mask[i][here] = torch.where(on, y[pick[i, k]] + 1, mask[i][here])
    return (canvas + 0.2 * torch.randn(canvas.shape, generator=g))[:, None], mask


class Finder(nn.Module):
    "Two strides down, two up, with what was seen on the way"

    def __init__(self, a, b, c):
        super().__init__()
        conv = lambda i, o, s=1: nn.Sequential(
            nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        )
        self.a, self.b, self.c, self.d = (
            conv(1, a),
            conv(a, b, 2),
            nn.Sequential(conv(b, c, 2), conv(c, c)),
            conv(c + b, b),
        )
        self.head = nn.Conv2d(b + a, 11, 1)

    def forward(self, x):
        up = partial(F.interpolate, scale_factor=2)
        a = self.a(x)
        b = self.b(a)
        return self.head(torch.cat([up(self.d(torch.cat([up(self.c(b)), b], 1))), a], 1))


def digit_pixels():
    g = torch.Generator().manual_seed(0)
    found = [scenes(n, part, g) for n, part in zip((2000, 300, 1000), PARTS)]
    torch.manual_seed(0)
    teacher = fit(Finder(24, 64, 128), *found[0], 500, 0.005, bs=32)
    return dict(splits=[(x, y, predict(teacher, x)) for x, y in found])


WORDS = 2000


def wikitext():
    "Word by word, the 2,000 most frequent ones; others are one"
    ids = [
        gzip.open(ROOT / f'lm/wikitext2_valid_test/{s}.txt.gz', 'rt').read().split()
        for s in ('valid', 'test')
    ]
    have = {w: i for i, (w, _) in enumerate(Counter(ids[0]).most_common(WORDS - 1), 1)}
    ids = torch.tensor([have.get(w, 0) for w in ids[0] + ids[1]])
    parts = [windows(o) for o in (ids[:210_000], ids[250_000:270_000], ids[270_000:310_000])]
    torch.manual_seed(0)
    teacher = fit(
        Model(WORDS, 128),
        *parts[0],
        500,
        0.006,
        bs=32,
        loss=lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten()),
    )
    return dict(splits=[(x, y, predict(teacher, x).half()) for x, y in parts], n_out=WORDS)


MADE = dict(
    occupation=occupation,
    person=person,
    digit_pixels=digit_pixels,
    wikitext=wikitext,
    cancer=partial(small, load_breast_cancer, RandomForestClassifier, (250, 100)),
    diabetes=partial(small, load_diabetes, RandomForestRegressor, (200, 80)),
)


@cache
def data(name):
    d = kept(name, MADE[name])
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def cell(name, output, steps, student=task_table.student, budget='', **more):
    return Cell(name + budget, name, output, partial(data, name), student, steps, **more)


CELLS = [
    cell('cancer', 'classes', 160, bs=32, seeds=8),
    cell('diabetes', 'numbers', 160, bs=32, seeds=8),
    cell('occupation', 'classes', 470, budget='_short'),
    cell('occupation', 'classes', 1560, budget='_long'),
    cell('person', 'labels', 470, budget='_short'),
    cell('person', 'labels', 1560, budget='_long'),
    cell(
        'digit_pixels',
        'pixels',
        625,
        lambda d: Finder(8, 16, 24),
        bs=32,
        rates=(0.01, 0.03, 0.1),
        cost=2,
    ),
    cell(
        'wikitext',
        'tokens',
        204,
        lambda d: Model(WORDS, 32),
        bs=32,
        rates=(0.004, 0.012, 0.036),
        axis=2,
        cost=3,
        seeds=3,
    ),
]
