"""Recognize a DataLoader, and read from it without changing its random state."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..base.random_state import RandomGuard
from ..base.transform_random_state import Generators

__all__ = ['is_loader', 'own_generators', 'read_apart']


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
