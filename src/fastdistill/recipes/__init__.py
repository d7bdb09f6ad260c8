"Recipes: functions that return terms with the defaults of the papers. `+` combines recipes."

from . import zoo
from .zoo import *

__all__ = zoo.__all__


def __dir__() -> list[str]:
    return __all__  # tab completion of `recipes.` lists only the recipes
