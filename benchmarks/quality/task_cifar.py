"Pictures of CIFAR-10, 5,000 or 45,000. A ready-made ResNet-56 teaches a ResNet-8. Each epoch sees its own crops and flips, with the teacher's answers to them."

import importlib.util, json
from functools import cache, partial
import numpy as np
import torch
from PIL import Image
from loop import predict
from tasks import ROOT, Cell, Data, Fast, Split, kept

MEAN, STD = [
    torch.tensor(o).view(3, 1, 1) * 255 for o in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
]
VIEWS = 5


@cache
def nets():
    spec = importlib.util.spec_from_file_location('cifar_resnets', ROOT / 'cifar_resnets.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sheets(split, each, first=0):
    "(N, 3, 32, 32) bytes and classes: `each` pictures of each class"
    xs, classes = [], json.loads((ROOT / 'cifar10' / 'classes.json').read_text())
    for c in classes:
        a = np.asarray(Image.open(ROOT / 'cifar10' / split / f'{c}.webp').convert('RGB'))
        a = (
            a.reshape(a.shape[0] // 32, 32, a.shape[1] // 32, 32, 3)
            .swapaxes(1, 2)
            .reshape(-1, 32, 32, 3)
        )
        xs.append(
            torch.from_numpy(
                a[np.random.default_rng(0).permutation(len(a))[first : first + each]].copy()
            ).permute(0, 3, 1, 2)
        )
    return torch.cat(xs), torch.arange(len(classes)).repeat_interleave(each)


def views(x, n, g):
    "(n, N, 3, 32, 32): random crops of the padded pictures, half of them flipped"
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    out = torch.empty(n, *x.shape, dtype=x.dtype)
    for v in range(n):
        for i, (r, c, flip) in enumerate(
            zip(*(torch.randint(0, k, (len(x),), generator=g).tolist() for k in (9, 9, 2)))
        ):
            o = padded[i, :, r : r + 32, c : c + 32]
            out[v, i] = o.flip(2) if flip else o
    return out


class Pictures(torch.nn.Module):
    "A net that takes bytes"

    def __init__(self, net):
        super().__init__()
        self.net = Fast(net)

    def forward(self, x):
        return self.net((x.float() - MEAN) / STD)


SIZES = dict(
    cifar5000=(500, 200, 300), cifar=(4500, 500, 1000)
)  # pictures of each class to train on, to choose a rate by, to be judged by


def make(each):
    train, valid, test = each
    teacher = Pictures(nets().akamaster(56))
    (x, y), valid, test = (
        sheets('train', train),
        sheets('train', valid, train),
        sheets('test', test),
    )
    seen = views(x, VIEWS, torch.Generator().manual_seed(0))
    return dict(
        splits=[
            (seen, y, torch.stack([predict(teacher, v) for v in seen]), VIEWS),
            *((x, y, predict(teacher, x)) for x, y in (valid, test)),
        ]
    )


@cache
def data(task):
    d = kept('cifar' if task == 'cifar5000' else 'cifar_all', partial(make, SIZES[task]))
    return Data(*(Split(*s) for s in d['splits']), teacher=Pictures(nets().akamaster(56)))


def student(width):
    return lambda d: Pictures(nets().CifarResNet(8, width=width))


def cell(name, task, steps, width=8, **more):
    return Cell(
        name,
        task,
        'classes',
        partial(data, task),
        student(width),
        steps,
        rates=(0.03, 0.1, 0.3),
        opt='sgd',
        cost=3,
        seeds=3,
        **more,
    )


CELLS = [
    cell('cifar5000', 'cifar5000', 390),
    cell('cifar5000_wide', 'cifar5000', 390, width=16),
    cell('cifar5000_long', 'cifar5000', 2340),
    cell('cifar_short', 'cifar', 703, bs=128),
    cell('cifar', 'cifar', 2109, bs=128),
]
