"""Build recipes from text, e.g. from a command line. The text is never executed as Python code."""

import inspect
from collections.abc import Sequence

from .. import losses, recipes
from ..base.recipe_grammar import RecipeGrammar
from .term import Recipe, Term


def as_recipe(recipe: Term | Recipe | str | None) -> Recipe | None:
    """Convert a recipe in any form to a `Recipe`. Return None if `auto` should choose the recipe.

    Args:
        recipe: A recipe such as `kd() + at()`, a `Term`, or a recipe as text. None or 'auto' to let
            `auto` choose.
    """
    if isinstance(recipe, str):
        recipe = recipe_from_text(recipe)
    return None if recipe is None or isinstance(recipe, str) else Recipe(recipe)


def recipe_from_text(text: str) -> Recipe | str:
    """Build the recipe that `text` describes. 'auto' is returned unchanged.

    Each part of the sum must call a function of `fastdistill.recipes` or `Term(losses.NAME, ...)`,
    or be `labels` for the task loss. Arguments must be numbers, strings, True, False, None, or
    lists, tuples or dicts of these.

    Args:
        text: 'auto', or calls of recipes joined by `+`, as in 'kd(T=4, alpha=.9) + at()'.
    """
    if text.strip() == 'auto':
        return 'auto'
    return Reader(text).recipe()


class Reader(RecipeGrammar):
    """Parser that builds the recipe.

    Args:
        text: The recipe.
    """

    def __init__(self, text: str) -> None:
        options = {k: [*inspect.signature(getattr(recipes, k)).parameters] for k in recipes.__all__}
        super().__init__(text, options, [*losses.LOSSES])

    def build(self, name: str, loss: str | None, args: Sequence, options: dict) -> Recipe | Term:
        if loss is not None:
            return Term(getattr(losses, loss), *args, **options)
        return getattr(recipes, name)(*args, **options)

    def join(self, parts: list) -> Recipe:
        return Recipe(*parts)
