"Tables: income of the adult census, and age from the rest. Boosted trees or wide networks teach a net of one hidden layer."

from functools import cache, partial
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from torch import nn
from loop import predict
from tasks import ROOT, Cell, Data, Split, fit, kept

NAMES = 'age workclass fnlwgt education education-num marital occupation relationship race sex gain loss hours country income'.split()
N_VALID = 4000


def read():
    "Train and test; the income's words end in a full stop in some files"
    ds = [
        pd.read_csv(
            ROOT / f'tabular/adult/adult-{s}.csv.gz',
            header=None,
            names=NAMES,
            skipinitialspace=True,
            na_values='?',
        )
        for s in ('train', 'test')
    ]
    for d in ds:
        d['income'] = (d['income'].str.rstrip('.') == '>50K').astype(int)
    return [ds[0].sample(frac=1, random_state=0), ds[1]]


def columns(train, others, target):
    "One-hot words and standardized numbers, as the training rows have them"
    numbers = [n for n in NAMES if n not in (target, 'income') and train[n].dtype.kind in 'if']
    words = [n for n in NAMES if n not in (target, 'income') and n not in numbers]
    mean, std = train[numbers].mean(), train[numbers].std()
    have = {n: sorted(train[n].dropna().unique()) for n in words}

    def encode(d):
        hot = [
            (d[n].to_numpy()[:, None] == np.array(have[n], dtype=object)).astype(np.float32)
            for n in words
        ]
        return torch.from_numpy(
            np.concatenate([((d[numbers] - mean) / std).to_numpy(np.float32), *hot], axis=1)
        )

    return [encode(d) for d in (train, *others)]


def networks(xs, y, steps, loss=F.cross_entropy, n=3):
    "Mean logits of three wide networks on the parts of a table"
    width, out = y.shape[1] if y.dim() == 2 else int(y.max()) + 1, [0 for _ in xs]
    for seed in range(n):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(xs[0].shape[1], 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, width),
        )
        fit(net, xs[0], y, steps, 0.003, loss=loss, seed=seed)
        out = [a + predict(net, x) / n for a, x in zip(out, xs)]
    return out


def make(target, n, teacher='trees'):
    full, test = read()
    valid, train = full[:N_VALID], full[N_VALID:][:n]
    xs = columns(train, (valid, test), target)
    if target == 'income':
        ys = [torch.from_numpy(d['income'].to_numpy().copy()) for d in (train, valid, test)]
        if teacher == 'networks':
            xs = [x.nan_to_num() for x in xs]
            return dict(
                splits=list(zip(xs, ys, networks(xs, ys[0], 10 * len(xs[0]) // 64))),
                n_in=xs[0].shape[1],
                n_out=2,
            )
        leaves, rounds = {500: (4, 60), 5000: (8, 100)}.get(n, (31, 150))
        trees = HistGradientBoostingClassifier(
            max_iter=rounds, learning_rate=0.08, max_leaf_nodes=leaves, random_state=0
        )
        trees.fit(xs[0].numpy(), ys[0].numpy())
        ts = [
            torch.from_numpy(np.log(trees.predict_proba(x.numpy()).clip(1e-6))).float() for x in xs
        ]
    else:
        mean, std = train[target].mean(), train[target].std()
        ys = [
            torch.from_numpy(((d[target] - mean) / std).to_numpy(np.float32))[:, None]
            for d in (train, valid, test)
        ]
        trees = HistGradientBoostingRegressor(max_iter=150, learning_rate=0.08, random_state=0).fit(
            xs[0].numpy(), ys[0][:, 0].numpy()
        )
        ts = [torch.from_numpy(trees.predict(x.numpy())).float()[:, None] for x in xs]
    return dict(splits=list(zip(xs, ys, ts)), n_in=xs[0].shape[1], n_out=ts[0].shape[1])


@cache
def data(target, n, teacher='trees'):
    d = kept(
        f'adult_{target}_{n}{"_networks" if teacher == "networks" else ""}',
        partial(make, target, n, teacher),
    )
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def student(d, width=32):
    return nn.Sequential(
        nn.Linear(d.extra['n_in'], width), nn.ReLU(), nn.Linear(width, d.extra['n_out'])
    )


def cell(name, steps, target='income', n=None, teacher='trees', **more):
    return Cell(
        name,
        'adult' if target == 'income' else 'age',
        'classes' if target == 'income' else 'numbers',
        partial(data, target, n, teacher),
        student,
        steps,
        rates=(0.001, 0.003, 0.01),
        **more,
    )


CELLS = [
    cell('adult500_short', 400, n=500),
    cell('adult500_long', 1200, n=500),
    cell('adult5000_short', 400, n=5000),
    cell('adult5000_long', 1200, n=5000),
    cell('adult_short', 800),
    cell('adult_long', 2400, cost=2),
    cell('adultnets5000', 400, n=5000, teacher='networks'),
    cell('adultnets', 800, teacher='networks'),
    cell('age5000', 800, target='age', n=5000),
    cell('age', 1200, target='age'),
]
