"""Recognize a DataLoader, and read from it without changing its random state."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..base.model_state import restored
from ..base.random_state import guarded_random_state
from ..base.transform_random_state import Generators


def is_loader(x: Any) -> bool:
    """Return True if `x` is a DataLoader or a list of batches. Return False for a single batch."""
    if isinstance(x, (Tensor, Mapping, tuple)) or not hasattr(x, '__iter__'):
        return False
    return not isinstance(x, list) or bool(x) and not isinstance(x[0], Tensor)


# attributes of a DataLoader of PyTorch or fastai that may have their own random generators
PARTS = (
    'dataset',
    'collate_fn',
    'sampler',
    'batch_sampler',
    'generator',
    'after_item',
    'before_batch',
    'after_batch',
)


@contextmanager
def restored_loaders(*loaders: Any, seed: int = 0) -> Iterator[None]:
    """Context manager in which DataLoaders and their random generators can be used. The generators
    are seeded, and everything is restored at the end.
    """
    # subtle: on first use, fastai creates an item to count the parts of a batch, and stores the
    # count. The count is removed at the end, so that a fit also creates the item, which draws
    # random numbers
    parts = (getattr(dl, k, None) for dl in loaders for k in PARTS)
    # subtle: an object may create its generator when it is first used
    users = [o for dl in loaders for o in wrapped(dl)]
    with restored(*users), Generators(*parts).seeded(seed):
        yield


def wrapped(o: Any) -> Iterator[Any]:
    """Yield a DataLoader, its datasets and its collate functions."""
    yield o
    # a `Subset` and a DataLoader have a dataset, and a collator of the Hugging Face Trainer wraps
    # the user's collator
    for k in ('dataset', 'collate_fn', 'data_collator'):
        if (inner := vars(o).get(k) if hasattr(o, '__dict__') else None) is not None:
            yield from wrapped(inner)


@contextmanager
def read_apart(*loaders: Any) -> Iterator[None]:
    """Context manager in which DataLoaders can be read without changing the training batches: the
    global random generators and those of the DataLoaders are restored at the end.
    """
    with guarded_random_state(), restored_loaders(*loaders):
        yield


def spread_batches(loader: Any, n: int) -> Iterable:
    """Return at least `n` batches that represent all samples, even if the samples are sorted by
    class.

    A PyTorch DataLoader of a map-style dataset is replaced with one that loads random samples. From
    a list, evenly spaced batches are taken. Any other loader is returned as is, so its first
    batches are read.

    Args:
        loader: A DataLoader or a list of batches.
        n: Number of batches to read.
    """
    if isinstance(loader, list):
        return [loader[i * len(loader) // n] for i in range(n)] if len(loader) > n else loader
    batches: Any = getattr(loader, 'batch_sampler', None)
    # subtle: a subclass with its own `__iter__` may change the batches
    if (
        getattr(type(loader), '__iter__', None) is not DataLoader.__iter__
        or isinstance(loader.dataset, IterableDataset)
        or not hasattr(batches, '__len__')
        or len(loader) <= n
    ):
        return loader
    draw, collate = random.Random(0).sample, dict(collate_fn=loader.collate_fn)
    if type(batches) is BatchSampler:
        rows = [*batches.sampler]
        rows = draw(rows, min(n * batches.batch_size, len(rows)))
        return DataLoader(loader.dataset, batches.batch_size, sampler=rows, **collate)
    chosen = draw([*islice(batches, len(loader))], n)
    return DataLoader(loader.dataset, batch_sampler=chosen, **collate)
