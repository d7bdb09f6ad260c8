"Knowledge distillation: train a small model on what a big one knows."
import sys
from . import docments, losses
from .distiller import Distilled, Distiller
from .outputs import DistillError, DistillWarning, Outputs
from .recipes import *
from .recipes import __all__ as _recipes
from .schedule import Schedule
from .features import layers
from .teacher import Teacher
from .terms import Recipe, Term

__version__ = '0.1.0'
__all__ = ['Distilled', 'DistillError', 'DistillWarning', 'Distiller', 'Outputs', 'Recipe', 'Schedule', 'Teacher', 'Term', 'layers',
           'losses', *_recipes]

for _face in (losses, sys.modules[__name__]): docments.explain_all(_face)
