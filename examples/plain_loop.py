"""A plain PyTorch loop, without fastai: a small network learns two-digit numbers, alone and with a larger one as its
teacher. The last line compares the accuracies on digits by different writers.

Data: images. Teacher: a larger network. Trainer: a plain loop.
"""

import sys
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill import Distiller, kd


def numbers(n, first, last):
    "Pictures of two of the digits from `first` to `last` side by side, and the numbers from 0 to 99 that they make"
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    i, j = torch.randint(first, last, (2, n), generator=torch.Generator().manual_seed(0))
    return torch.cat([x[i], x[j]], 2)[:, None], 10 * y[i] + y[j]


def net(*widths, seed):
    torch.manual_seed(seed)  # the students start from the same weights
    conv = lambda i, o: nn.Sequential(
        nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
    )
    return nn.Sequential(
        *map(conv, (1, *widths), widths), nn.Flatten(), nn.Linear(2 * widths[-1], 100)
    )


def fit(loss_of, parameters, loader, epochs, lr):
    opt = torch.optim.AdamW(parameters, lr)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            loss_of(x, y).backward()
            opt.step()
            opt.zero_grad()
            sched.step()


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(quick=False, seed=42):
    loader = DataLoader(
        TensorDataset(*numbers(200 if quick else 600, 0, 1200)), batch_size=50, shuffle=True
    )
    epochs = 1 if quick else 20

    teacher, alone, student = (
        net(64, 128, 256, seed=seed),
        net(8, 16, 32, seed=seed),
        net(8, 16, 32, seed=seed),
    )
    fit(lambda x, y: F.cross_entropy(teacher(x), y), teacher.parameters(), loader, epochs, 5e-3)
    fit(lambda x, y: F.cross_entropy(alone(x), y), alone.parameters(), loader, epochs, 1e-2)
    distiller = Distiller(student, teacher, kd(T=4, alpha=0.9))
    with distiller.teacher:  # frozen and in evaluation mode; restored afterwards
        fit(lambda x, y: distiller(x, y).total, distiller.parameters(), loader, epochs, 1e-2)

    t, a, s = [accuracy(m, *numbers(1000, 1200, 1797)) for m in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
