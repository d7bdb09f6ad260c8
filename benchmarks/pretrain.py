"""Few labels: a backbone that a teacher without a head pretrained, against the same network from scratch. scikit-learn's digits, 1,200 images for
training, of which 50, 100 or all have labels; 597 by other writers for the test. Five seeds.

    python benchmarks/pretrain.py --out benchmarks/results/pretrain.json

The teacher was trained on the labels of all 1,200 images; its head is then removed. The student from scratch takes as many steps as the pretraining
and the fine-tuning together.
"""
import json
from pathlib import Path
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from fastai.vision.all import *
from fastdistill.fastai import *

def net(*widths):
    body = nn.Sequential(*[ConvLayer(i, o, stride=2) for i,o in zip((1, *widths), widths)], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(widths[-1], 10))


def learner(items, valid, model):
    dls = DataLoaders.from_dsets(items, valid, bs=50, num_workers=0)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=lambda m: [params(m[0]), params(m[1])])


def epochs(n, n_items):
    "As many epochs as `n` batches of 50 have"
    return max(1, n*50//n_items)


def main(out:Path=Path('benchmarks/results/pretrain.json'), seeds:int=5, labels:list[int]=(50, 100, 1200)):
    x,y = load_digits(return_X_y=True)
    items = list(zip(tensor(x).float().view(-1, 1, 8, 8)/16, tensor(y)))
    train,valid,rows = items[:1200],items[1200:],[]
    for seed in range(seeds):
        set_seed(seed, reproducible=True)
        teacher = learner(train, valid, net(64, 128, 256))
        with teacher.no_bar(), teacher.no_logging(): teacher.fit_one_cycle(10, 5e-3)
        row = dict(seed=seed, teacher=teacher.validate()[1])
        chosen = torch.randperm(1200)
        for n in labels:
            few,fine = [train[i] for i in chosen[:n]],epochs(240, n)
            for way in ('scratch', 'pretrained'):
                set_seed(seed, reproducible=True)
                model = net(8, 16, 32)
                if way == 'pretrained':
                    pre = learner(train, valid, model)
                    with pre.no_bar(), pre.no_logging(): pre.distill(teacher.model[0], 20, 1e-2, recipes.pretrain())
                learn = learner(few, valid, model)
                with learn.no_bar(), learn.no_logging():
                    if way == 'pretrained': learn.fine_tune(fine, 1e-2)
                    else: learn.fit_one_cycle(fine + 1 + epochs(480, n), 1e-2)
                row[f'{way}, {n} labels'] = learn.validate()[1]
        rows.append(row)
        print(row, flush=True)
    out.write_text(json.dumps(rows, indent=1))
    table = Table('accuracy, %', 'mean', 'std', 'each')
    for k in [k for k in rows[0] if k != 'seed']:
        v = 100*np.array([r[k] for r in rows])
        table.add_row(k, f'{v.mean():.1f}', f'{v.std(ddof=1):.1f}', ' '.join(f'{o:.1f}' for o in v))
    Console(width=120).print(table)


if __name__ == '__main__': typer.run(main)
