"Knowledge distillation: train a small model on what a big one knows."
from . import losses
from .distiller import Distilled, Distiller, Recipe, Term
from .outputs import DistillError, DistillWarning, Outputs
from .recipes import *
from .recipes import __all__ as _recipes
from .schedule import Schedule
from .taps import layers
from .teacher import Teacher

__version__ = '0.1.0'
__all__ = ['Distilled', 'DistillError', 'DistillWarning', 'Distiller', 'Outputs', 'Recipe', 'Schedule', 'Teacher', 'Term', 'layers',
           'losses', *_recipes]
