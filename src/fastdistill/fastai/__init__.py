"Distillation for fastai: `from fastdistill.fastai import *` after `from fastai.vision.all import *`."
import sys
from .. import docments, losses, recipes
from ..cache import TeacherCache
from ..distiller import Distiller
from ..outputs import DistillError, DistillWarning, Outputs
from ..recipes import *
from ..report import Report
from ..report.recipes import RecipeReport
from ..teacher import Teacher
from ..terms import Recipe, Term
from . import find as _find, heads as _heads, learner as _learner, patches as _patches
from .block import TeacherBlock
from .cache_data import cache_teacher, verify_cache
from .callback import KnowledgeDistillation
from .card import load_student, save_student
from .check import check_teacher
from .compare import compare
from .export import export_student
from .interpret import DistillInterpretation
from .many import distill_many
from .recipe_runs import compare_recipes

# A star import must not shadow common names, such as `dist`, `at`, `sp`, `cwd` or `losses`. So it has only the recipes
# with unmistakable names. All recipes are in `recipes`, and can be imported by name
__all__ = ['DistillError', 'DistillInterpretation', 'DistillWarning', 'Distiller', 'KnowledgeDistillation', 'Outputs',
           'Recipe', 'RecipeReport', 'Report', 'Teacher', 'TeacherBlock', 'TeacherCache', 'Term', 'cache_teacher',
           'check_teacher', 'compare', 'compare_recipes', 'distill_many', 'dkd', 'export_student', 'hard_labels',
           'kd', 'load_student', 'logit_std', 'nkd', 'recipes', 'save_student', 'soft_labels', 'verify_cache']

for _face in (recipes, sys.modules[__name__]): docments.explain_all(_face)
