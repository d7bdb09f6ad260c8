"The loss of one batch of student, teacher and recipe."

from ..recipes.recipe_loss import Distilled
from .distiller import Distiller

__all__ = ['Distilled', 'Distiller']
