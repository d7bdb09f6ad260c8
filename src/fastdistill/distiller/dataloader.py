"""Tell a DataLoader from the inputs of one batch, and read it without changing its random state."""

from collections.abc import Mapping

from torch import Tensor

from ..base.transform_random_state import Generators

__all__ = ['is_loader', 'own_generators']


def is_loader(x):
    """Return True if `x` is a series of batches, not the inputs of one batch."""
    if isinstance(x, (Tensor, Mapping, tuple)) or not hasattr(x, '__iter__'):
        return False
    return not isinstance(x, list) or bool(x) and not isinstance(x[0], Tensor)


def own_generators(loader):
    """Return the random generators of a DataLoader, seeded now and restored at the end."""
    parts = ('dataset', 'sampler', 'batch_sampler', 'generator')
    return Generators(*(getattr(loader, k, None) for k in parts)).seeded(0)
