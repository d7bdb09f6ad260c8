"Pictures made of scikit-learn's handwritten digits: numbers from 0 to 99, and where the two digits stand. Test pictures are of other writers."

from functools import cache, partial
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from loop import predict
from tasks import Cell, Data, Split, fit, kept

PARTS = (
    (0, 1000),
    (1000, 1200),
    (1200, 1797),
)  # digits of the training, validation and test pictures
AMOUNT = 6000, 2000, 4000
SIZE = dict(digits100=(10, 20), points=(16, 28))
NOISE = dict(digits100=0.2, points=0.6)


def pictures(amount, part, g, height, width, noise):
    "(N, 1, height, width) noisy pictures of two digits, their numbers, and where both stand, from -1 to 1: row and column of each"
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float().view(-1, 8, 8) / 16, torch.tensor(y)
    pick, free = (
        torch.randint(*part, (amount, 2), generator=g),
        torch.tensor([height - 7, width // 2 - 7]),
    )
    at = (
        torch.rand(amount, 2, 2, generator=g) * free
    ).long()  # of each digit in its half: row, column
    canvas = torch.zeros(amount, height, width)
    for i in range(amount):
        for k, (r, c) in enumerate(at[i].tolist()):
            canvas[i, r : r + 8, c + k * width // 2 : c + k * width // 2 + 8] += x[pick[i, k]]
    canvas += noise * torch.randn(canvas.shape, generator=g)
    return canvas[:, None], 10 * y[pick[:, 0]] + y[pick[:, 1]], (2 * at / (free - 1) - 1).flatten(1)


class Net(nn.Sequential):
    "Three convolutions of stride 2, and a linear layer"

    def __init__(self, a, b, c, n_out, size):
        convs = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in ((1, a), (a, b), (b, c))
        ]
        rows, cols = [-(-n // 8) for n in size]
        super().__init__(*convs, nn.Flatten(), nn.Linear(c * rows * cols, n_out))


def make(task):
    g = torch.Generator().manual_seed(0)
    found = [pictures(n, part, g, *SIZE[task], NOISE[task]) for n, part in zip(AMOUNT, PARTS)]
    classes = task == 'digits100'
    xs, ys, n_out = (
        [x for x, *_ in found],
        [y if classes else w for _, y, w in found],
        100 if classes else 4,
    )
    torch.manual_seed(0)
    teacher = fit(
        Net(48, 96, 160, n_out, SIZE[task]),
        xs[0],
        ys[0],
        800,
        0.005,
        loss=F.cross_entropy if classes else F.mse_loss,
        decay=0.1,
    )
    return dict(
        splits=[(x, y, predict(teacher, x)) for x, y in zip(xs, ys)],
        n_out=n_out,
        size=SIZE[task],
        teacher=teacher,
    )


@cache
def data(task):
    d = kept(task, partial(make, task))
    return Data(*(Split(*s) for s in d['splits']), teacher=d['teacher'], extra=d)


def student(d):
    return Net(
        *((8, 16, 32) if d.extra['n_out'] == 100 else (4, 8, 16)), d.extra['n_out'], d.extra['size']
    )


def cell(name, task, steps, output='classes', **more):
    return Cell(name, task, output, partial(data, task), student, steps, **more)


CELLS = [
    cell('digits100_short', 'digits100', 280),
    cell('digits100_long', 'digits100', 940, cost=2),
    cell('points_short', 'points', 280, 'numbers'),
    cell('points_long', 'points', 940, 'numbers', cost=2),
]
