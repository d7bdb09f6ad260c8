"The task of the demo: data, a large and a small model, and training settings."

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from fastai.basics import DataLoaders
from fastai.layers import ConvLayer
from torch import Tensor, nn
from torch.utils.data import TensorDataset


@dataclass
class DemoTask:
    """Data, a teacher and a student architecture, and training settings.

    Attributes:
        title: Name of the data.
        classes: Names of the classes.
        train: Training set: images (N, C, H, W) and labels (N,).
        test: Test set, in the same form.
        teacher: fn() -> new model.
        student: fn() -> new model.
        epochs: (epochs of the teacher, epochs of a student).
        lr: (learning rate of the teacher, learning rate of a student).
        bs: Batch size.
    """

    title: str
    classes: list
    train: tuple
    test: tuple
    teacher: Callable
    student: Callable
    epochs: tuple
    lr: tuple
    bs: int

    def dls(self) -> DataLoaders:
        """Build DataLoaders from the data in memory."""
        train, test = TensorDataset(*self.train), TensorDataset(*self.test)
        return DataLoaders.from_dsets(train, test, bs=self.bs, num_workers=0)

    @property
    def steps(self) -> tuple[int, int]:
        """(training steps of the teacher, training steps of a student)."""
        return tuple(e * (len(self.train[0]) // self.bs) for e in self.epochs)

    def quick(self) -> 'DemoTask':
        """Return a shortened copy of the task for testing that everything works."""
        test = tuple(o[:600] for o in self.test)
        return replace(self, test=test, epochs=(3, 3))


def digits(train: tuple[int, int] = (0, 1200), test: tuple[int, int] = (1200, 1797)) -> DemoTask:
    """Build the task of reading two-digit numbers. By default, the test set has different writers
    than the training set, because the digits are sorted by writer.

    Args:
        train: (first, last + 1) of the digits in the numbers for training.
        test: (first, last + 1) of the digits in the numbers for testing.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    g = torch.Generator().manual_seed(42)

    def numbers(part: tuple[int, int], n: int) -> tuple[Tensor, Tensor]:
        i, j = torch.randint(*part, (2, n), generator=g)
        return torch.cat([x[i], x[j]], 3), 10 * y[i] + y[j]

    return DemoTask(
        'two-digit handwritten numbers',
        [f'{i:02}' for i in range(100)],
        numbers(train, 600),
        numbers(test, 1000),
        partial(number_net, 64, 128, 256),
        partial(number_net, 8, 16, 32),
        epochs=(10, 10),
        lr=(0.01, 0.3),  # chosen by benchmarks/demo_rate.py
        bs=50,
    )


def number_net(a: int, b: int, c: int) -> nn.Module:
    convs = [ConvLayer(i, o, stride=2) for i, o in ((1, a), (a, b), (b, c))]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * c, 100))
