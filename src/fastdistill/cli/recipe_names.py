"""Find mistakes in recipes written as text without importing PyTorch, which takes seconds. The valid
names are read from the source of `fastdistill.recipes` and `fastdistill.losses`.
"""

import ast
from functools import cache
from pathlib import Path

from ..base.recipe_grammar import RecipeGrammar

PACKAGE = Path(__file__).parents[1]


def check_recipe_text(text: str) -> None:
    """Raise a DistillError if the text is not a sum of recipes with options that exist. The values of
    the options are not checked.
    """
    if text.strip() != 'auto':
        RecipeGrammar(text, *names_in_source()).recipe()


@cache
def names_in_source() -> tuple[dict, list]:
    """Return ({name of a recipe: names of its options}, names of the losses)."""
    public, functions = names_and_functions('recipes/zoo.py')
    args = {k: functions[k].args for k in public}
    recipes = {
        k: [o.arg for o in (*a.posonlyargs, *a.args, *a.kwonlyargs)] for k, a in args.items()
    }
    losses = []
    for node in tree_of('losses/__init__.py').body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == '*':
            public, functions = names_and_functions(f'losses/{node.module}.py')
            marks = {k: [*map(ast.unparse, f.decorator_list)] for k, f in functions.items()}
            losses += [k for k in public if any(m.startswith('loss(') for m in marks.get(k, ()))]
    return recipes, losses


def names_and_functions(file: str) -> tuple[list, dict]:
    """Return the names in `__all__` and the functions of a file."""
    body = tree_of(file).body
    assigned = (o for o in body if isinstance(o, ast.Assign))
    names = next(o.value for o in assigned if ast.unparse(o.targets[0]) == '__all__')
    return ast.literal_eval(names), {o.name: o for o in body if isinstance(o, ast.FunctionDef)}


def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding='utf-8'))
