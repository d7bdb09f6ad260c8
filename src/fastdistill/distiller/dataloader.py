"""Recognize a DataLoader, and read from it without changing its random state."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..base.random_state import RandomGuard
from ..base.transform_random_state import Generators


def is_loader(x: Any) -> bool:
    """Return True if `x` is a DataLoader or a list of batches. Return False for a single batch."""
    if isinstance(x, (Tensor, Mapping, tuple)) or not hasattr(x, '__iter__'):
        return False
    return not isinstance(x, list) or bool(x) and not isinstance(x[0], Tensor)


def own_generators(loader: Any) -> AbstractContextManager:
    """Seed the random generators of a DataLoader temporarily.

    Returns:
        A context manager that sets the seed when it is entered and restores the generators at the
        end.
    """
    parts = ('dataset', 'sampler', 'batch_sampler', 'generator')
    return Generators(*(getattr(loader, k, None) for k in parts)).seeded(0)


@contextmanager
def read_apart(*loaders: Any) -> Iterator[None]:
    """Context in which DataLoaders may be read without changing the batches of the training: the
    global random generators and their own are restored at the end.
    """
    with RandomGuard(), ExitStack() as stack:
        for o in loaders:
            stack.enter_context(own_generators(o))
        yield


def spread_batches(loader: Any, n: int) -> Iterable:
    """Return at least `n` batches that represent all samples, even if these are sorted by class.

    A PyTorch DataLoader of a map-style dataset is replaced by one of random samples. Of a list, the
    batches are spread evenly. All other loaders are returned, so their first batches are read.

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
