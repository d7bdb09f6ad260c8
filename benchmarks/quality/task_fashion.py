"""Pictures of clothes (Fashion-MNIST). A CNN teaches a small one. The data are Debian's package dataset-fashion-mnist; QUALITY_FASHION names the
folder of its four .gz files."""

import gzip, os
from functools import cache
from pathlib import Path
import numpy as np
import torch
from loop import predict
from tasks import Cell, Data, Fast, Split, fit, kept
from task_digits import Net

FASHION = Path(os.environ.get('QUALITY_FASHION', '/usr/share/datasets/fashion-mnist'))
TRAIN, VALID = 10_000, 5_000
SIZE = 28, 28


def read(name, header):
    return torch.from_numpy(
        np.frombuffer(
            gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header
        ).copy()
    )


def pictures(part):
    x, y = read(f'{part}-images-idx3-ubyte.gz', 16), read(f'{part}-labels-idx1-ubyte.gz', 8)
    return (x.view(-1, 1, *SIZE).float() / 255 - 0.286) / 0.353, y.long()


def make():
    (x, y), test = pictures('train'), pictures('t10k')
    parts = [(x[:TRAIN], y[:TRAIN]), (x[TRAIN : TRAIN + VALID], y[TRAIN : TRAIN + VALID]), test]
    torch.manual_seed(0)
    # it learns from all pictures but those that a rate is chosen by
    rest = torch.cat([torch.arange(TRAIN), torch.arange(TRAIN + VALID, len(y))])
    teacher = fit(Fast(Net(32, 64, 128, 10, SIZE)), x[rest], y[rest], 3000, 0.003)
    return dict(splits=[(x, y, predict(teacher, x)) for x, y in parts])


@cache
def data():
    return Data(*(Split(*s) for s in kept('fashion', make)['splits']))


def student(d):
    return Net(4, 8, 16, 10, SIZE)


CELLS = [
    Cell('fashion_short', 'fashion', 'classes', data, student, 470),
    Cell('fashion_long', 'fashion', 'classes', data, student, 3130, seeds=3, cost=2),
]
