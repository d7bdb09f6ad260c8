"""The memory that each loss needs at once, in a forward and a backward pass, beside both models' outputs and the gradient.

    python benchmarks/loss_memory.py

Tensors are counted, not processes, so the numbers do not depend on what else the machine does. They are written to
benchmarks/results/loss_memory.json, from where docs/leaderboard.md has them. On a GPU the chunks are larger.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import typer

from fastdistill import losses
from fastdistill.evaluation.cost import Peak

RESULT = Path(__file__).parent / 'results' / 'loss_memory.json'
LOGITS = 4096, 1000
MAPS = 64, 64, 32, 31  # as many numbers, but for 1%


def cross_entropy(s, t, y):
    return F.cross_entropy(s, y)


def with_labels(loss):
    return lambda s, t, y: loss(s, t, y)


def without(loss, **options):
    return lambda s, t, y: loss(s, t, **options)


# name of the loss -> fn(student's, teacher's, labels), and the shape of both
LOSSES = {
    'labels alone': (cross_entropy, LOGITS),
    'kl': (without(losses.kl), LOGITS),
    'standardized kl': (without(losses.standardized(losses.kl)), LOGITS),
    'skewed_kl': (without(losses.skewed_kl), LOGITS),
    'abkd': (without(losses.abkd), LOGITS),
    'taid': (without(losses.taid, lam=0.5), LOGITS),
    'ttm': (without(losses.ttm), LOGITS),
    'wttm': (without(losses.wttm), LOGITS),
    'dist': (without(losses.dist), LOGITS),
    'dkd': (with_labels(losses.dkd), LOGITS),
    'nkd': (with_labels(losses.nkd), LOGITS),
    'rld': (with_labels(losses.rld), LOGITS),
    'binary_kl': (without(losses.binary_kl), LOGITS),
    'regression': (without(losses.regression), LOGITS),
    'cwd': (without(losses.cwd), MAPS),
    'hint': (without(losses.hint), MAPS),
    'at': (without(losses.at), MAPS),
}


def peak(loss, shape):
    "In multiples of the student's outputs, which are as large as their gradient"
    torch.manual_seed(0)
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    y = torch.randint(shape[1], shape[:1])
    with Peak() as counted:
        (gradient,) = torch.autograd.grad(loss(s, t, y), s)
    return (counted.most - gradient.numel() * gradient.element_size()) / (s.numel() * 4)


def main():
    found = {name: round(peak(*o), 2) for name, o in LOSSES.items()}
    about = dict(logits=LOGITS, maps=MAPS, torch=torch.__version__, device='cpu')
    RESULT.write_text(json.dumps(dict(about, losses=found), indent=1) + '\n')
    for name, times in found.items():
        print(f'{name:16} {times:.2f}')


if __name__ == '__main__':
    typer.run(main)
