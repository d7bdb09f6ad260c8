"""Knowledge distillation for fastai. Import `*` from here after the star import of fastai."""

from .. import losses, recipes
from ..base.outputs import DistillError, DistillWarning, Outputs
from ..cache import TeacherCache
from ..distiller.distiller import Distiller
from ..evaluation import Report
from ..recipes.term import Recipe, Term
from ..recipes.zoo import *
from ..search.recipe_report import RecipeReport
from ..teachers import Teacher
from . import learner as _learner
from . import recipe_find as _find
from .cache_data import cache_teacher, verify_cache
from .callback import KnowledgeDistillation
from .compare import compare
from .interpret import DistillInterpretation
from .recipe_runs import compare_recipes
from .saved_student import load_student, save_student
from .student_export import export_student
from .teacher_block import TeacherBlock
from .teacher_check import check_teacher

# A star import must not shadow common names, such as `dist`, `at`, `sp`, `cwd` or `losses`. So
# `__all__` contains only recipes with unmistakable names. Other recipes can be imported by name, or
# used as attributes of `recipes`.
__all__ = [
    'DistillError',
    'DistillInterpretation',
    'DistillWarning',
    'Distiller',
    'KnowledgeDistillation',
    'Outputs',
    'Recipe',
    'RecipeReport',
    'Report',
    'Teacher',
    'TeacherBlock',
    'TeacherCache',
    'Term',
    'cache_teacher',
    'check_teacher',
    'compare',
    'compare_recipes',
    'dkd',
    'export_student',
    'hard_labels',
    'kd',
    'load_student',
    'logit_std',
    'nkd',
    'recipes',
    'save_student',
    'soft_labels',
    'verify_cache',
]
