"Recipes: functions that return terms with their paper's defaults. `+` joins them."

from . import zoo
from .zoo import *

__all__ = zoo.__all__


def __dir__() -> list[str]:
    return __all__  # tab completion of `recipes.` lists only the recipes
