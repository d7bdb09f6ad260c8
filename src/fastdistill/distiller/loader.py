"What `Distiller.check` reads: one batch, or a DataLoader, which stays as it is."

from collections.abc import Mapping

from torch import Tensor

from ..base.generators import Generators

__all__ = ['is_loader', 'own_generators']


def is_loader(x):
    "Is it many batches, and not the inputs of one?"
    if isinstance(x, (Tensor, Mapping, tuple)) or not hasattr(x, '__iter__'):
        return False
    return not isinstance(x, list) or bool(x) and not isinstance(x[0], Tensor)


def own_generators(loader):
    """Random generators of a DataLoader, which are as before at the end."""
    parts = ('dataset', 'sampler', 'batch_sampler', 'generator')
    return Generators(*(getattr(loader, k, None) for k in parts)).seeded(0)
