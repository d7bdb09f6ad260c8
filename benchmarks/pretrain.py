"""Few labels: a backbone that a teacher without a head pretrained in one of several ways, against the same network from scratch. scikit-learn's digits,
1,200 images for training, of which 50 or 200 have labels; 597 by other writers for the test. Three seeds.

    python benchmarks/pretrain.py --out benchmarks/results/pretrain.json

The teacher was trained on the labels of all 1,200 images; its head is then removed. Fine-tuning takes 60 steps after 360 steps of pretraining; the
student from scratch takes 60 steps, and 420 steps.
"""

import json
from copy import deepcopy
from pathlib import Path
import numpy as np
import typer
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *
from rich.console import Console  # after fastai's names
from rich.table import Table


def alone(recipe):
    return Recipe(recipe, task=0.0)


# the last map of both bodies has one position alone, so gram compares the maps before it, of 2 x 2
MAPS = {'0.1': '1'}
WAYS = {
    'cosine': recipes.pretrain(),
    'seed': alone(recipes.seed(weight=1.0)),
    'seed, T_t=.1': alone(recipes.seed(weight=1.0, T_t=0.1)),
    'seed, mlp': alone(recipes.seed(weight=1.0, projector='mlp')),
    'gram': alone(recipes.gram(MAPS, weight=1.0)),
    'cosine and gram': recipes.pretrain() + recipes.gram(MAPS, weight=1.0),
}


def net(*widths):
    body = nn.Sequential(
        *[ConvLayer(i, o, stride=2) for i, o in zip((1, *widths), widths)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(body, nn.Linear(widths[-1], 10))


def learner(items, valid, model):
    dls = DataLoaders.from_dsets(items, valid, bs=50, num_workers=0)
    return Learner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        splitter=lambda m: [params(m[0]), params(m[1])],
    )


def digits():
    "1,200 items for training, and 597 for the test"
    x, y = load_digits(return_X_y=True)
    items = list(zip(tensor(x).float().view(-1, 1, 8, 8) / 16, tensor(y)))
    return items[:1200], items[1200:]


def quietly(learn, fit, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, fit)(*args, **kwargs)
    return learn


def show(rows):
    "The mean and spread of each way over the seeds"
    table = Table('accuracy, %', 'mean', 'std', 'each')
    for k in [k for k in rows[0] if k != 'seed']:
        v = 100 * np.array([r[k] for r in rows])
        table.add_row(k, f'{v.mean():.1f}', f'{v.std(ddof=1):.1f}', ' '.join(f'{o:.1f}' for o in v))
    Console(width=120).print(table)


def main(
    out: Path = Path('benchmarks/results/pretrain.json'),
    seeds: int = 3,
    labels: list[int] = (50, 200),
):
    (train, valid), rows = digits(), []
    test = DataLoader(valid, bs=597)
    for seed in range(seeds):
        set_seed(seed, reproducible=True)
        teacher = quietly(learner(train, valid[:10], net(64, 128, 256)), 'fit_one_cycle', 10, 5e-3)
        row, chosen = dict(seed=seed, teacher=teacher.validate(dl=test)[1]), torch.randperm(1200)
        pretrained = {}
        for way, recipe in WAYS.items():
            set_seed(seed, reproducible=True)
            pretrained[way] = quietly(
                learner(train, valid[:10], net(8, 16, 32)),
                'distill',
                teacher.model[0],
                15,
                1e-2,
                recipe,
            )
        for n in labels:
            few = [train[i] for i in chosen[:n]]
            tuned = 60 * 50 // n  # epochs: 60 steps
            for way, other in pretrained.items():
                set_seed(seed, reproducible=True)
                learn = quietly(
                    learner(few, valid[:10], deepcopy(other.model)), 'fine_tune', tuned, 1e-2
                )
                row[f'pretrained by {way}, {n} labels'] = learn.validate(dl=test)[1]
            for more in (0, 360):
                set_seed(seed, reproducible=True)
                learn = quietly(
                    learner(few, valid[:10], net(8, 16, 32)),
                    'fit_one_cycle',
                    tuned + more * 50 // n,
                    1e-2,
                )
                row[f'from scratch, {60 + more} steps, {n} labels'] = learn.validate(dl=test)[1]
        rows.append(row)
        print(row, flush=True)
    out.write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == '__main__':
    typer.run(main)
