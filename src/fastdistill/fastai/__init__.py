"Distillation for fastai: `from fastdistill.fastai import *` after `from fastai.vision.all import *`."
import sys
from .. import docments, losses
from ..cache import TeacherCache
from ..distiller import Distiller
from ..outputs import DistillError, DistillWarning, Outputs
from ..recipes import *
from ..recipes import __all__ as _recipes
from ..teacher import Teacher
from ..terms import Recipe, Term
from . import learner as _learner, patches as _patches
from .block import TeacherBlock
from .cache_data import cache_teacher, verify_cache
from .callback import KnowledgeDistillation
from .check import check_teacher

__all__ = ['DistillError', 'DistillWarning', 'Distiller', 'KnowledgeDistillation', 'Outputs', 'Recipe', 'Teacher', 'TeacherBlock',
           'TeacherCache', 'Term', 'cache_teacher', 'check_teacher', 'losses', 'verify_cache', *_recipes]

docments.explain_all(sys.modules[__name__])
