"The same augmentation twice: random numbers that belong to a sample and a view, not to a batch, a worker or an epoch."
from .generators import Generators
from .per_sample import PerSample, per_sample
from .seeds import seeded, seeds_of, view_of

__all__ = ['Generators', 'PerSample', 'per_sample', 'seeded', 'seeds_of', 'view_of']
