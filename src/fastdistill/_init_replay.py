"Repeatable augmentation: random numbers depend on the sample and the view, not on the batch, worker or epoch."
from ..base.generators import Generators
from .per_sample import PerSample, per_sample
from ..base.seeds import seeded, seeds_of, view_of

__all__ = ['Generators', 'PerSample', 'per_sample', 'seeded', 'seeds_of', 'view_of']
