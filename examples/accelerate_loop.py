"""A loop with accelerate. The Distiller is prepared, so every process trains the student and the projectors, but not
the teacher. Only the student is compiled and averaged. `accelerate launch accelerate_loop.py` starts several
processes. The last line compares the accuracies of the averaged students on digits by different writers.

Data: images. Teacher: a larger network. Trainer: accelerate.
"""

import sys
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill import Distiller, Term, kd, losses


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


def fit(accelerator, student, loader, epochs, lr, teacher=None, backend='inductor'):
    "The student's average over the training"
    recipe = kd(T=4, alpha=0.9) + Term(losses.hint, layers={'2': '2'}, weight=0.01)
    example = next(iter(loader))[0]
    # without a teacher there is nothing to distill: only the task loss
    model = student if teacher is None else Distiller(student, teacher, recipe, example=example)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    student.compile(backend=backend)  # in place, which keeps the names in state_dict and layers=
    opt = torch.optim.AdamW(model.parameters(), lr)  # includes projectors
    prepared, opt, batches = accelerator.prepare(model, opt, loader)
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(prepared(x), y) if teacher is None else prepared(x, y).total
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            average.update_parameters(student)
    return average.module


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(quick=False, seed=42):
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(
        TensorDataset(*numbers(200 if quick else 600, 0, 1200)), batch_size=50, shuffle=True
    )
    epochs, backend = (1, 'eager') if quick else (20, 'inductor')
    teacher = fit(accelerator, net(64, 128, 256, seed=seed), loader, epochs, 5e-3, backend=backend)
    alone, student = [
        fit(accelerator, net(8, 16, 32, seed=seed), loader, epochs, 1e-2, t, backend)
        for t in (None, teacher)
    ]
    t, a, s = [accuracy(m, *numbers(1000, 1200, 1797)) for m in (teacher, alone, student)]
    accelerator.print(
        f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}'
    )


if __name__ == '__main__':
    main('--quick' in sys.argv)
