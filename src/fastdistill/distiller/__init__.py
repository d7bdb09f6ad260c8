"The loss of one batch of student, teacher and recipe."
from .distiller import Distilled, Distiller
from .heads import Heads

__all__ = ['Distilled', 'Distiller', 'Heads']
