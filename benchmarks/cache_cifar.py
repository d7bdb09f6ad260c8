"""Does replayed augmentation close the gap that fixed views open? CIFAR-10, a ResNet-8 taught by a ResNet-56: alone, by the live teacher,
from a cache of the clean view, and of 1, 4, 8 and 32 augmented views (as many as there are epochs: none is shown twice). Equal
epochs, test accuracy of the last one, three seeds.

    python benchmarks/cache_cifar.py --root ../shared/data --out benchmarks/results/cache_cifar --picture docs/img/cache_cifar.png

ROOT holds cifar10/ (train and test: a WebP sheet of 32x32 tiles for each class, 50 tiles a row), and cifar_resnets.py with its checkpoints.
Every finished run is kept in OUT, so that an interrupted benchmark goes on where it stopped; the table is written at the end.
"""

import importlib.util, json, random, time
from pathlib import Path
import numpy as np
import torch, typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset
import torch.nn.functional as F
from fastdistill import Distiller, Outputs, Teacher, kd
from fastdistill.cache import cache_dataset
from fastdistill.cache import Replayed

MEAN, STD = [
    torch.tensor(o).view(3, 1, 1) * 255 for o in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
]
WAYS = 'alone', 'live', 0, 1, 4, 8, 32  # numbers: views in the cache


def sheets(root, split):
    "(N, 32, 32, 3) bytes, (N,) labels"
    xs, classes = [], json.loads((root / 'classes.json').read_text())
    for c in classes:
        a = np.asarray(Image.open(root / split / f'{c}.webp').convert('RGB'))
        xs.append(
            a.reshape(a.shape[0] // 32, 32, a.shape[1] // 32, 32, 3)
            .swapaxes(1, 2)
            .reshape(-1, 32, 32, 3)
        )
    return np.concatenate(xs), np.repeat(np.arange(len(classes)), [len(x) for x in xs])


class Crops(Dataset):
    "Bytes of a crop of the picture padded by 4, half of them flipped; or of the picture as it is"

    def __init__(self, data, targets, augment=True):
        self.data, self.targets, self.augment = data, targets, augment
        self.padded = np.pad(data, ((0, 0), (4, 4), (4, 4), (0, 0))).transpose(0, 3, 1, 2)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        r, c, flip = (
            (random.randrange(9), random.randrange(9), random.random() < 0.5)
            if self.augment
            else (4, 4, False)
        )
        x = self.padded[i, :, r : r + 32, c : c + 32]
        return torch.from_numpy(np.ascontiguousarray(x[..., ::-1] if flip else x)), self.targets[i]


def floats(x):
    return (x.float() - MEAN) / STD


class Bf16(nn.Module):
    "A model in bfloat16 autocast, from bytes to float32 logits"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return self.net(floats(x)).float()


def train(student, data, epochs, bs, lr, teacher=None, cache=None):
    "The same loop for all: labels alone, with the live teacher, or with stored outputs"
    recipe = None if teacher is None and cache is None else kd(T=4, alpha=0.9)
    distiller = None if recipe is None else Distiller(student, teacher or (lambda x: None), recipe)
    if cache is not None:
        data = Replayed(data, cache)
    opt = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    dl = DataLoader(data, bs, shuffle=True, drop_last=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * len(dl), pct_start=0.2)
    for epoch in range(epochs):
        if cache is not None:
            data.set_epoch(epoch)
        for x, y, *rows in dl:
            s = student(x)
            loss = F.cross_entropy(s, y)
            if recipe is not None:
                t = teacher(x) if cache is None else cache.decode(rows[0])
                loss = distiller.compute(Outputs(s), t, loss, (y,)).total
            loss.backward()
            opt.step()
            opt.zero_grad()
            sched.step()


@torch.no_grad()
def accuracy(model, data, bs=500):
    model.eval()
    hits = [(model(x).argmax(1) == y).float().sum() for x, y in DataLoader(data, bs)]
    return (sum(hits) / len(data)).item()


def subset(x, y, n):
    "The same number of each class"
    g = np.random.default_rng(0)
    at = np.concatenate([g.permutation(np.flatnonzero(y == c))[: n // 10] for c in range(10)])
    return x[at], y[at]


def main(
    root: Path = Path('../shared/data'),
    out: Path = Path('benchmarks/results/cache_cifar'),
    n: int = 5000,
    epochs: int = 32,
    seeds: int = 3,
    bs: int = 64,
    lr: float = 0.1,
    n_test: int = 10000,
    threads: int = 1,
    picture: Path | None = None,
):
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.spec_from_file_location('cifar_resnets', root / 'cifar_resnets.py')
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    x, y = subset(*sheets(root / 'cifar10', 'train'), n)
    crops, clean, test = (
        Crops(x, y),
        Crops(x, y, augment=False),
        Crops(*subset(*sheets(root / 'cifar10', 'test'), n_test), augment=False),
    )
    teacher = Teacher(Bf16(nets.akamaster(56)), name='ResNet-56 in bfloat16')
    if not (out / 'teacher.json').exists():
        (out / 'teacher.json').write_text(
            json.dumps(
                dict(
                    accuracy=accuracy(teacher.model, test),
                    seconds=write(teacher, crops, clean, out),
                )
            )
        )
    for seed in range(seeds):
        for way in WAYS:
            if (done := out / f'{way}-{seed}.json').exists():
                continue
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            student, cache = (
                Bf16(nets.CifarResNet(8)),
                None if isinstance(way, str) else written(teacher, crops, clean, out, way),
            )
            start = time.time()
            with teacher:
                train(student, crops, epochs, bs, lr, teacher if way == 'live' else None, cache)
            seconds = time.time() - start
            done.write_text(
                json.dumps(
                    dict(way=way, seed=seed, accuracy=accuracy(student, test), seconds=seconds)
                )
            )
            print(done.read_text(), flush=True)
    rows, teacher = (
        [json.loads(p.read_text()) for p in out.glob('*-*.json')],
        json.loads((out / 'teacher.json').read_text()),
    )
    results = {
        way: sorted((r for r in rows if r['way'] == way), key=lambda r: r['seed']) for way in WAYS
    }
    report(results, teacher, n, epochs)
    if picture is not None:
        draw(results, teacher, picture)


def written(teacher, crops, clean, out, views):
    return cache_dataset(
        teacher, crops if views else clean, out / f'views{views}', views=views, run=dict(bs=250)
    )


def write(teacher, crops, clean, out):
    "Seconds to write each cache"
    seconds = {}
    for views in WAYS[2:]:
        start = time.time()
        written(teacher, crops, clean, out, views)
        seconds[views] = time.time() - start
    return seconds


NAMES = dict(alone='labels alone', live='the live teacher')


def name(way):
    return NAMES.get(way, f'{way} view{"s" * (way != 1)}' if way else 'the clean view (0)')


def report(results, teacher, n, epochs):
    table = Table(
        'taught by',
        'test accuracy',
        'spread (std)',
        'each',
        'seconds a run',
        'seconds to write',
        title=f'CIFAR-10, {n:,} training images, {epochs} epochs, ResNet-8; the teacher ResNet-56: {teacher["accuracy"]:.4f}',
    )
    for way, runs in results.items():
        v, wrote = np.array([r['accuracy'] for r in runs]), teacher['seconds'].get(str(way))
        table.add_row(
            name(way),
            f'{v.mean():.4f}',
            f'{v.std(ddof=1):.4f}' if len(v) > 1 else '',
            ' '.join(f'{o:.4f}' for o in v),
            f'{np.mean([r["seconds"] for r in runs]):.0f}',
            '' if wrote is None else f'{wrote:.0f}',
        )
    Console(width=140).print(table)


def draw(results, teacher, path):
    "Each run a dot, their mean a line"
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.5, 3), layout='constrained')
    ax = fig.subplots()
    for i, (way, runs) in enumerate(results.items()):
        v, c = (
            [100 * r['accuracy'] for r in runs],
            '.5' if way == 'alone' else 'k' if way == 'live' else 'tab:red',
        )
        ax.plot([i] * len(v), v, 'o', color=c, alpha=0.5, mec='none')
        ax.plot([i - 0.3, i + 0.3], [np.mean(v)] * 2, color=c, lw=2)
        ax.text(i + 0.34, np.mean(v), f'{np.mean(v):.1f}', va='center', fontsize=9)
    ax.set_xticks(
        range(len(results)),
        [name(w).replace('the ', '').replace(' (0)', '') for w in results],
        fontsize=9,
    )
    ax.set_xlim(-0.5, len(results) - 0.2)
    ax.set_ylabel('test accuracy, %', fontsize=9)
    ax.tick_params(axis='y', labelsize=8)
    for o in ('top', 'right'):
        ax.spines[o].set_visible(False)
    fig.savefig(path, dpi=110)


if __name__ == '__main__':
    typer.run(main)
