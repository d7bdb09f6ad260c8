"Pixels: streets (CamVid, 11 classes) and cell nuclei (2 classes). A U-Net teaches a narrower one."

from functools import cache, partial
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from loop import predict
from tasks import ROOT, Cell, Data, Fast, Split, fit, kept

VOID = 11


def block(i, o):
    return nn.Sequential(
        *(
            l
            for a in (i, o)
            for l in (nn.Conv2d(a, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        )
    )


class UNet(nn.Module):
    "Four levels; each half as fine and twice as wide as the one before"

    def __init__(self, i, w, n_out, levels=4):
        super().__init__()
        ws = [w * 2**k for k in range(levels)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([i, *ws], ws))
        self.up = nn.ModuleList(block(a + b, a) for a, b in zip(ws, ws[1:]))
        self.head = nn.Conv2d(w, n_out, 1)

    def forward(self, x):
        seen = []
        for k, b in enumerate(self.down):
            x = b(x if k == 0 else F.max_pool2d(x, 2))
            seen.append(x)
        for b, skip in zip(reversed(self.up), reversed(seen[:-1])):
            x = b(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1))
        return self.head(x)


def camvid():
    "(N, 3, 72, 96) pictures and (N, 72, 96) classes of train, val and test"

    def split(name):
        files = sorted((ROOT / 'camvid' / name / 'images').iterdir())
        masks = [ROOT / 'camvid' / name / 'masks' / f'{f.stem}.png' for f in files]
        x = np.stack(
            [
                np.asarray(Image.open(f).convert('RGB').resize((96, 72), Image.BILINEAR))
                for f in files
            ]
        )
        y = np.stack([np.asarray(Image.open(f).resize((96, 72), Image.NEAREST)) for f in masks])
        return (
            torch.from_numpy(x).float().permute(0, 3, 1, 2).contiguous() / 255 - 0.45
        ) / 0.27, torch.from_numpy(y).long()

    return [split(s) for s in ('train', 'val', 'test')]


def nuclei():
    "(N, 1, 64, 64) pictures, and where nuclei are"
    files = sorted((ROOT / 'nuclei' / 'images').iterdir())
    x = np.stack(
        [np.asarray(Image.open(f).convert('L').resize((64, 64), Image.BILINEAR)) for f in files]
    )
    y = np.stack(
        [
            np.asarray(
                Image.open(ROOT / 'nuclei' / 'masks' / f.name).resize((64, 64), Image.NEAREST)
            )
            > 0
            for f in files
        ]
    )
    x, y = (torch.from_numpy(x).float()[:, None] / 255 - 0.2) / 0.2, torch.from_numpy(y).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[o], y[o]) for o in (order[:160], order[160:214], order[214:])]


def make(task, width, steps):
    parts = dict(camvid=camvid, nuclei=nuclei)[task]()
    n_out = VOID if task == 'camvid' else 2
    torch.manual_seed(0)
    teacher = fit(
        Fast(UNet(parts[0][0].shape[1], width, n_out)),
        *parts[0],
        steps,
        0.003,
        bs=8,
        loss=partial(F.cross_entropy, ignore_index=VOID),
    )
    return dict(
        splits=[(x, y, predict(teacher, x, 50).half()) for x, y in parts],
        n_in=parts[0][0].shape[1],
        n_out=n_out,
    )


@cache
def data(task):
    d = kept(task, partial(make, task, *dict(camvid=(16, 800), nuclei=(16, 400))[task]))
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def student(width):
    return lambda d: Fast(UNet(d.extra['n_in'], width, d.extra['n_out']))


CELLS = [
    Cell(
        'nuclei',
        'nuclei',
        'pixels',
        partial(data, 'nuclei'),
        student(4),
        120,
        bs=8,
        void=VOID,
        cost=2,
    ),
    Cell(
        'camvid',
        'camvid',
        'pixels',
        partial(data, 'camvid'),
        student(6),
        138,
        bs=8,
        void=VOID,
        cost=3,
        seeds=3,
    ),
]
