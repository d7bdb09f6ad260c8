"Tasks of the demo, each with data, a large and a small model, and training settings."

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, ItemTransform
from fastai.layers import ConvLayer, ResBlock
from fastai.vision.models.unet import DynamicUnet
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ...base.outputs import DistillError


@dataclass
class DemoTask:
    """Data, a teacher and a student architecture, and training settings.

    Attributes:
        title: Name of the data.
        classes: Names of the classes.
        train: Training set: x (N, C, H, W) and y.
        test: Test set, in the same form.
        teacher: fn() -> new model.
        student: fn() -> new model.
        epochs: (epochs of the teacher, epochs of a student).
        lr: (learning rate of the teacher, learning rate of a student).
        bs: Batch size.
        score: fn(outputs (N, C, ...), y) -> score from 0 to 1.
        unit: Name of the score.
        axis: Class axis.
        ignore_index: Label that the loss ignores.
        augment: (augmentation for the teacher, augmentation for a student). Each is fn(x, y) ->
            augmented (x, y) for a training batch, or None for no augmentation.
        threads: Maximum number of threads. None for PyTorch's default.
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
    score: Callable
    unit: str = 'accuracy'
    axis: int = -1
    ignore_index: int = -100
    augment: tuple = (None, None)
    threads: int | None = None

    def dls(self, augment: Callable | None = None) -> DataLoaders:
        """Build DataLoaders from the data in memory."""
        tfms = [ToFloat(), *([Augment(augment)] if augment else [])]
        train, test = TensorDataset(*self.train), TensorDataset(*self.test)
        for split_idx, o in enumerate((train, test)):
            vars(o)['split_idx'] = split_idx  # fastai's transforms use it
        return DataLoaders.from_dsets(train, test, bs=self.bs, num_workers=0, after_batch=tfms)

    def loss(self) -> Any:
        return CrossEntropyLossFlat(axis=self.axis, ignore_index=self.ignore_index)

    @property
    def steps(self) -> tuple[int, int]:
        """(training steps of the teacher, training steps of a student)."""
        return tuple(e * (len(self.train[0]) // self.bs) for e in self.epochs)

    def quick(self) -> 'DemoTask':
        """Return a shortened copy of the task for testing that everything works."""
        cut = lambda xy, n: tuple(
            o[torch.linspace(0, len(o) - 1, min(n, len(o))).long()] for o in xy
        )
        return replace(
            self, train=cut(self.train, 20 * self.bs), test=cut(self.test, 600), epochs=(3, 3)
        )


class ToFloat(ItemTransform):
    """Transform that converts bytes to floats around 0. Other inputs are not changed."""

    def encodes(self, b):  # type: ignore[no-untyped-def] # fastai dispatches on type hints
        return (b[0].float() / 64 - 2 if b[0].dtype == torch.uint8 else b[0], *b[1:])


class Augment(ItemTransform):
    """Transform that applies a function to training batches."""

    split_idx, order = 0, 1

    def __init__(self, fn: Callable):
        super().__init__()
        self.fn = fn

    def encodes(self, b):  # type: ignore[no-untyped-def] # fastai dispatches on type hints
        return self.fn(*b)


def accuracy(out: Tensor, y: Tensor) -> float:
    """Compute the fraction of correct predictions.

    Args:
        out: (N, C).
        y: (N,).
    """
    return (out.argmax(1) == y).double().mean().item()


def mean_iou(out: Tensor, y: Tensor) -> float:
    """Compute the intersection over union over all pixels, averaged over the classes that occur in
    `y`.

    Args:
        out: (N, C, H, W).
        y: (N, H, W). Labels equal to or above C are ignored.
    """
    c = out.shape[1]
    known = y < c
    both = torch.bincount(y[known] * c + out.argmax(1)[known], minlength=c * c).view(c, c).double()
    hit, true = both.diag(), both.sum(1)
    return (hit / (true + both.sum(0) - hit))[true > 0].mean().item()


def load_task(name: str, root: Path | str | None = None) -> DemoTask:
    """Load a task and its data.

    Args:
        name: Name of the task.
        root: Folder of the data. The digits need none.
    """
    if name not in TASKS:
        raise DistillError(f'No data set {name!r}. It must be one of {", ".join(TASKS)}.')
    if name == 'digits':
        return digits()
    if root is None:
        raise DistillError(
            f'Data set {name!r} needs its folder: --root PATH, where PATH holds {LAYOUTS[name]}.'
        )
    return TASKS[name](Path(root))


LAYOUTS = dict(
    cifar10='train/ and test/, in each a folder of pictures for each class, or for each class one picture with '
    'all of them as tiles of 32 x 32',
    camvid='codes.txt (names of the classes, Void last), train/ and test/, in each images/ and masks/ with files '
    'of the same names',
)


def existing_folder(*parts: Any) -> Path:
    """Return the path of a folder. Raise a DistillError if the folder does not exist."""
    if not (p := Path(*parts)).is_dir():
        raise DistillError(
            f'No folder {p}. A root holds: {"; ".join(f"{k}: {v}" for k, v in LAYOUTS.items())}.'
        )
    return p


def rgb(file: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image as a uint8 tensor (3, H, W), resized to `size` (width, height) if given."""
    im = Image.open(file).convert('RGB')
    return torch.from_numpy(
        np.array(im.resize(size, Image.Resampling.BILINEAR) if size else im)
    ).permute(2, 0, 1)


def to_rgb(x: Tensor) -> np.ndarray:
    """Convert an image to an array for matplotlib, (H, W) or (H, W, 3)."""
    return (x[0] if len(x) == 1 else x.permute(1, 2, 0)).numpy()


def head(n: int, c: int, p: float = 0.0) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(n, c)


def digits(train: tuple[int, int] = (0, 1200), test: tuple[int, int] = (1200, 1797)) -> DemoTask:
    """Build the task of reading two-digit numbers. By default, the test set has different writers
    than the training set, because the digits are sorted by writer.

    Args:
        train: (first, last + 1) of the digits in the numbers for training.
        test: The same for the test.
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
        score=accuracy,
        threads=1,
    )


def number_net(a: int, b: int, c: int) -> nn.Module:
    convs = [ConvLayer(i, o, stride=2) for i, o in ((1, a), (a, b), (b, c))]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * c, 100))


def shift(x: Tensor, y: Tensor, by: int = 1) -> tuple[Tensor, Tensor]:
    """Shift all images of a batch by the same random offset of up to `by` pixels."""
    i, j = torch.randint(0, 2 * by + 1, (2,)).tolist()
    return nn.functional.pad(x, (by,) * 4)[..., i : i + x.shape[2], j : j + x.shape[3]], y


def cifar10(root: Path) -> DemoTask:
    classes = sorted(
        p.stem for p in existing_folder(root, 'train').iterdir() if not p.name.startswith('.')
    )
    train, test = (by_class(existing_folder(root, o), classes, 32) for o in ('train', 'test'))
    return DemoTask(
        'CIFAR-10',
        classes,
        train,
        test,
        big_cifar,
        small_cifar,
        epochs=(12, 6),
        lr=(3e-3, 1e-2),
        bs=125,
        score=accuracy,
        augment=(flip_and_shift,) * 2,
    )


def by_class(path: Path, classes: Sequence[str], size: int) -> tuple[Tensor, Tensor]:
    """Read all images under `path` as a uint8 tensor (N, 3, size, size), and return it with the
    class index of each image.
    """
    xs = [torch.cat([tiles(rgb(f), size) for f in class_files(path, c)]) for c in classes]
    return torch.cat(xs), torch.arange(len(xs)).repeat_interleave(
        torch.tensor([len(x) for x in xs])
    )


def class_files(path: Path, c: str) -> list[Path]:
    """Return the image files of class `c`."""
    files = sorted((path / c).iterdir()) if (path / c).is_dir() else sorted(path.glob(c + '.*'))
    if not files:
        raise DistillError(f'No pictures of {c!r} in {path}. It must hold {LAYOUTS["cifar10"]}.')
    return files


def tiles(x: Tensor, size: int) -> Tensor:
    """Cut an image (3, H, W) into tiles (N, 3, size, size), row by row."""
    _, h, w = x.shape
    rows = x.unfold(1, size, size).unfold(2, size, size)
    return rows.permute(1, 2, 0, 3, 4).reshape((h // size) * (w // size), 3, size, size)


def flip_and_shift(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror each image with probability 0.5, and shift all images of the batch by up to 4 pixels."""
    return shift(
        torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x, x.flip(3)), y, by=4
    )


def big_cifar() -> nn.Module:
    return nn.Sequential(
        ConvLayer(3, 32, stride=2),
        ResBlock(1, 32, 64, stride=2),
        ResBlock(1, 64, 64),
        ResBlock(1, 64, 128, stride=2),
        *head(128, 10),
    )


def small_cifar() -> nn.Module:
    return nn.Sequential(
        ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), ConvLayer(16, 24), *head(24, 10)
    )


def camvid(root: Path) -> DemoTask:
    codes = [c for c in (existing_folder(root) / 'codes.txt').read_text().split() if c != 'Void']
    train, test = (load_scenes(existing_folder(root, o), (128, 96)) for o in ('train', 'test'))
    unet = lambda *widths: lambda: small_unet(widths, len(codes), (96, 128))
    return DemoTask(
        'CamVid',
        codes,
        train,
        test,
        unet(24, 48, 96, 128),
        unet(4, 8, 12),
        epochs=(40, 20),
        lr=(3e-3, 1e-2),
        bs=8,
        score=mean_iou,
        unit='mean IoU',
        axis=1,
        ignore_index=len(codes),
        augment=(mirror,) * 2,
    )


def load_scenes(path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read images (N, 3, H, W) and masks (N, H, W)."""
    masks = {p.stem: p for p in existing_folder(path, 'masks').iterdir()}
    files = sorted(existing_folder(path, 'images').iterdir())
    y = [np.array(Image.open(masks[f.stem]).resize(size, Image.Resampling.NEAREST)) for f in files]
    return torch.stack([rgb(f, size) for f in files]), torch.from_numpy(np.stack(y)).long()


def mirror(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror the batch with probability 0.5."""
    return (x.flip(3), y.flip(2)) if torch.rand(()) < 0.5 else (x, y)


def small_unet(widths: Sequence[int], n_out: int, size: tuple[int, int]) -> nn.Module:
    layers = [ConvLayer(a, b, stride=2) for a, b in zip((3, *widths), widths)]
    return DynamicUnet(nn.Sequential(*layers), n_out, size)


TASKS: dict[str, Callable] = dict(digits=digits, cifar10=cifar10, camvid=camvid)
