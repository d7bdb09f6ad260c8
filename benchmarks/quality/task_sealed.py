"""Data sets that share no source with any other cell, to judge the default once it is frozen (`protocol.FROZEN`). Until then the runner
leaves them out; only the labels may be tried, for an epoch, to see that the data load:

    python benchmarks/quality/task_sealed.py

The data are inside packages, which `make quality` unpacks into out/packages (QUALITY_PACKAGES): elpv-dataset 1.0.0.post1 (solar cells),
aeon 1.6.0 (series), river 0.26.1 (image segments, bananas, genes of yeast), Orange3 3.40.0 (houses, hearts). Blood cells: bccd in QUALITY_DATA."""

import os, zipfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
import numpy as np
import pandas as pd
import task_table, torch
import torch.nn.functional as F
from PIL import Image
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from torch import nn
from loop import predict
from task_dense import UNet
from task_digits import Net
from task_unseen import small
from tasks import HERE, ROOT, Cell, Data, Fast, Split, fit, kept

PACKAGES = Path(os.environ.get('QUALITY_PACKAGES', HERE.parents[1] / 'out' / 'packages'))


def parts(x, y, *sizes):
    "Splits of these sizes; the rest is the test split"
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    cuts = rows.tensor_split(np.cumsum(sizes).tolist())
    return [(x[r], y[r]) for r in cuts]


def taught(splits, teacher, steps, lr=0.003, bs=64, **extra):
    "Train the teacher, and add its outputs"
    torch.manual_seed(0)
    teacher = fit(teacher, *splits[0], steps, lr, bs=bs)
    n_out = int(splits[0][1].max()) + 1
    return dict(splits=[(x, y, predict(teacher, x)) for x, y in splits], n_out=n_out, **extra)


def solar():
    "Solar cells, 64 px, gray: 4 degrees of how likely they are defective"
    folder = PACKAGES / 'elpv_dataset' / 'data'
    rows = [line.split() for line in (folder / 'labels.csv').read_text().splitlines()]
    x = np.stack([np.asarray(Image.open(folder / r[0]).resize((64, 64))) for r in rows])
    x = (torch.from_numpy(x).float()[:, None] / 255 - 0.5) / 0.2
    y = torch.tensor([round(3 * float(r[1])) for r in rows])
    return taught(parts(x, y, 1400, 400), Fast(Net(48, 96, 160, 4, (64, 64))), 600, size=(64, 64))


def series(name, length):
    "(N, channels, length) of a file of aeon's for training and one for testing, the end filled with zeros, and classes"
    found = []
    for s in ('TRAIN', 'TEST'):
        text = (PACKAGES / 'aeon/datasets/data' / name / f'{name}_{s}.ts').read_text()
        rows = [r.rsplit(':', 1) for r in text.split('@data')[1].split()]
        xs = [[[float(v) for v in c.split(',')] for c in r.split(':')] for r, _ in rows]
        x = torch.zeros(len(rows), len(xs[0]), length)
        for i, channels in enumerate(xs):
            for k, c in enumerate(channels):
                x[i, k, : len(c)] = torch.tensor(c)
        found.append((x, torch.tensor([int(float(c)) for _, c in rows])))
    least = min(y.min() for _, y in found)
    mean, std = found[0][0].mean((0, 2), keepdim=True), found[0][0].std((0, 2), keepdim=True)
    return [((x - mean) / std, y - least) for x, y in found]


class Convs(nn.Sequential):
    "Two convolutions over time, and the mean over it"

    def __init__(self, channels, width, n_out, stride):
        conv = lambda i, o: [
            nn.Conv1d(i, o, 7, stride, 3, bias=False),
            nn.BatchNorm1d(o),
            nn.ReLU(),
        ]
        pool = [nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(8 * width, n_out)]
        super().__init__(*conv(channels, width), *conv(width, 2 * width), *pool)


def of_series(name, length, stride, n_train, steps):
    (x, y), test = series(name, length)
    (train, valid), n = parts(x, y, n_train), int(y.max()) + 1
    splits = [train, valid, test]
    extra = dict(channels=x.shape[1], stride=stride)
    return taught(splits, Convs(x.shape[1], 64, n, stride), steps, bs=32, **extra)


def table(path, target, **options):
    "fn(return_X_y): numbers, words one-hot, and what is to be predicted"

    def load(return_X_y):
        d = pd.read_csv(PACKAGES / path, **options).dropna().reset_index(drop=True)
        y = d.pop(target)
        y = y.to_numpy(float) if y.nunique() > 20 else y.astype('category').cat.codes.to_numpy(int)
        return pd.get_dummies(d).to_numpy(float), y

    return load


def bananas(return_X_y):
    with zipfile.ZipFile(PACKAGES / 'river/datasets/banana.zip') as z:
        d = pd.read_csv(z.open('banana.all.txt'), sep=' ', header=None)
    numbers = [d[c].astype(str).str.split(':').str[1].astype(float) for c in (1, 2)]
    return np.stack(numbers, 1), (d[0] > 0).to_numpy(int)


def yeast():
    "Genes of yeast: 14 functions"
    d = pd.read_csv(PACKAGES / 'river/datasets/yeast.csv.gz')
    x, y = d.filter(like='Att').to_numpy(np.float32), d.filter(like='Class').to_numpy()
    y = torch.tensor((y.astype(str) == '1') | (y.astype(str) == 'True')).float()
    splits = parts(torch.from_numpy(x), y, 1200, 400)
    mean, std = splits[0][0].mean(0), splits[0][0].std(0)
    xs, ys = [(o - mean) / std for o, _ in splits], [o for _, o in splits]
    ts = task_table.networks(xs, ys[0], 200, F.binary_cross_entropy_with_logits)
    return dict(splits=list(zip(xs, ys, ts)), n_in=x.shape[1], n_out=y.shape[1])


KINDS = 'RBC', 'WBC', 'Platelets'


def boxes():
    d = pd.read_csv(ROOT / 'bccd' / 'boxes.csv')
    image = {n: Image.open(ROOT / 'bccd/images' / n).convert('RGB') for n in sorted(set(d.image))}
    return d.assign(kind=d.label.map(KINDS.index)), image


def crops(size=48):
    "Blood cells, each in the middle of 48 px, seen at 24; not more than 600 of a kind and split"
    d, image = boxes()
    splits = []
    for s in ('train', 'val', 'test'):
        own = d[d.split == s].groupby('kind').head(600)
        x = []
        for r in own.itertuples():
            left, top = (r.x1 + r.x2 - size) / 2, (r.y1 + r.y2 - size) / 2
            crop = image[r.image].crop((left, top, left + size, top + size))
            x.append(np.asarray(crop.resize((24, 24), Image.BILINEAR)))
        x = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / 255 - 0.6) / 0.2
        splits.append((x.mean(1, keepdim=True), torch.tensor(own.kind.to_numpy())))
    return taught(splits, Net(32, 64, 128, 3, (24, 24)), 300, size=(24, 24))


def blood():
    "Of each pixel, at 80 x 60, whether it is in the box of a cell, and of which kind"
    d, image = boxes()
    splits = []
    for s in ('train', 'val', 'test'):
        own = d[d.split == s]
        names = sorted(set(own.image))
        x = np.stack([np.asarray(image[n].resize((80, 60), Image.BILINEAR)) for n in names])
        y = torch.zeros(len(names), 60, 80, dtype=torch.long)
        for r in own.sort_values('kind', kind='stable').itertuples():
            cut = [round(v / 4) for v in (r.y1, r.y2, r.x1, r.x2)]
            y[names.index(r.image), cut[0] : cut[1], cut[2] : cut[3]] = r.kind + 1
        splits.append(((torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - 0.6) / 0.2, y))
    return taught(splits, Fast(UNet(3, 16, 4, levels=3)), 400, bs=8)


TAB = dict(sep='\t', skiprows=[1, 2], na_values='?')
MADE = dict(
    solar=solar,
    vowels=partial(of_series, 'JapaneseVowels', 29, 1, 200, 200),
    leaves=partial(of_series, 'OSULeaf', 427, 3, 150, 300),
    segments=partial(
        small,
        table('river/datasets/segment.csv.zip', 'category'),
        RandomForestClassifier,
        (1000, 400),
    ),
    bananas=partial(small, bananas, RandomForestClassifier, (1500, 800)),
    hearts=partial(
        small,
        table('Orange/datasets/heart_disease.tab', 'diameter narrowing', **TAB),
        RandomForestClassifier,
        (140, 60),
    ),
    houses=partial(
        small,
        table('Orange/datasets/housing.tab', 'MEDV', **TAB),
        RandomForestRegressor,
        (250, 100),
    ),
    yeast=yeast,
    blood_crops=crops,
    blood_pixels=blood,
)


@cache
def data(name):
    d = kept(f'sealed_{name}', MADE[name])
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def convs(d):
    return Convs(d.extra['channels'], 6, d.extra['n_out'], d.extra['stride'])


def net(*widths):
    return lambda d: Net(*widths, d.extra['n_out'], d.extra['size'])


def cell(name, output, student, steps, **more):
    return Cell(name, name, output, partial(data, name), student, steps, sealed=True, **more)


table_net = partial(task_table.student, width=8)
CELLS = [
    cell('solar', 'classes', net(8, 16, 32), 220),
    cell('vowels', 'classes', convs, 120, bs=32),
    cell('leaves', 'classes', convs, 120, bs=32),
    cell('segments', 'classes', table_net, 160),
    cell('bananas', 'classes', table_net, 240),
    cell('hearts', 'classes', table_net, 80, bs=32),
    cell('houses', 'numbers', table_net, 160, bs=32),
    cell('yeast', 'labels', task_table.student, 190),
    cell('blood_crops', 'classes', net(2, 4, 8), 100, source='blood cells'),
    cell(
        'blood_pixels',
        'pixels',
        lambda d: Fast(UNet(3, 4, 4, levels=3)),
        104,
        bs=8,
        cost=2,
        source='blood cells',
    ),
]


def main():
    from measures import MAIN, measure
    from loop import train

    torch.set_num_threads(1)
    for c in CELLS:
        d = c.data()
        sizes = [len(s) for s in (d.train, d.valid, d.test)]
        epoch = replace(c, steps=-(-len(d.train) // c.bs))
        student, seconds = train(epoch, d, None, c.rates[1], 0)
        found = measure(c.output, predict(student, d.valid.x), d.valid.y)[MAIN[c.output]]
        print(
            f'{c.name}: {sizes} items, labels alone after one epoch: {MAIN[c.output]} on the validation split {found:.3f}, {seconds:.1f} s'
        )


if __name__ == '__main__':
    main()
