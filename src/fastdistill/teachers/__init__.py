"""Teachers: models, files, functions and ensembles that produce outputs for distillation."""

from .raw_items import with_items
from .teacher import Teacher

__all__ = ['Teacher', 'with_items']
