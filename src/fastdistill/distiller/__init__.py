"""Compute the distillation loss of a batch from a student, a teacher and a recipe."""

from ..recipes.recipe_loss import Distilled
from .distiller import Distiller

__all__ = ['Distilled', 'Distiller']
