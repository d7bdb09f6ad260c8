"""Grammar of recipes written as text, e.g. on a command line. The text is never executed as Python
code. This module does not import PyTorch.
"""

import ast
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DistillError, close_name

LONGEST, MOST = 2000, 20  # characters, parts
LARGEST = 2**53  # largest integer allowed
EXAMPLE = "'kd(T=4, alpha=.9) + at()'"


class RecipeGrammar:
    """Parser for one recipe. Error messages quote the text of the recipe. This class checks the
    text only; `fastdistill.recipes.recipe_text` also builds the recipe.

    Args:
        text: The recipe.
        recipes: {name of a recipe: names of its options}.
        losses: Names of the losses.
    """

    def __init__(
        self, text: str, recipes: Mapping[str, Sequence[str]], losses: Sequence[str]
    ) -> None:
        self.text, self.recipes, self.losses = text, recipes, losses

    def build(self, name: str, loss: str | None, args: Sequence, options: dict) -> Any:
        """Build a part of the recipe, a call of a recipe or of `Term` with a loss."""
        return name

    def join(self, parts: list) -> Any:
        """Build the sum of the parts."""
        return parts

    def error(self, what: str, node: ast.AST | None = None) -> DistillError:
        part = None if node is None else ast.get_source_segment(self.text, node)
        at = f', at {part!r}' if part and part != self.text else ''
        text = self.text if len(self.text) <= 200 else f'{self.text[:200]} ...'
        return DistillError(f'recipe={text!r}{at}: {what}')

    def recipe(self) -> Any:
        if len(self.text) > LONGEST:
            raise self.error(f'a recipe can have at most {LONGEST} characters')
        return self.sum(self.parsed())

    def sum(self, node: Any) -> Any:
        nodes = self.summands(node)
        if len(nodes) > MOST:
            raise self.error(f'a recipe can have at most {MOST} parts')
        if not (parts := [p for p in map(self.part, nodes) if p is not None]):
            raise self.error(f'labels only is not a recipe; an example is {EXAMPLE}')
        try:
            return self.join(parts)
        except DistillError as e:
            raise self.error(str(e)) from e

    def parsed(self) -> ast.expr:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Python warns about invalid escapes in strings
            try:
                return ast.parse(self.text.strip(), mode='eval').body
            # subtle: deep nesting raises MemoryError or RecursionError, and a null byte or a long
            # number raises ValueError
            except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
                raise self.error(
                    f'this is not a recipe ({getattr(e, "msg", None) or e or type(e).__name__}). '
                    f'An example is {EXAMPLE}'
                ) from e

    def summands(self, node: Any) -> list[ast.expr]:
        """Return the summands of a sum, in order."""
        parts: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts, node = [node.right, *parts], node.left
        return [node, *parts]

    def part(self, node: Any) -> Any:
        """Build a recipe or a term; return None for `labels`."""
        if isinstance(node, ast.Name) and node.id == 'labels':
            return
        if isinstance(node, ast.Name) and node.id in self.recipes:
            raise self.error(f'write {node.id}(), with parentheses', node)
        if isinstance(node, ast.Name) and node.id not in ('auto', 'Term'):
            self.function(node)  # raises an error that names similar recipes
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            raise self.error('a sum does not need parentheses', node)
        if not isinstance(node, ast.Call):
            raise self.error(f"a recipe must be a sum of calls, such as {EXAMPLE}, or 'auto'", node)
        name, loss = self.function(node.func), None
        first: list[Any] = node.args[:1]
        others = node.args[1:]
        if name == 'Term':
            if not first:
                raise self.error('a term needs a loss, e.g. Term(losses.kl, weight=.5)', node)
            loss, first = self.loss(*first), []
        elif name == 'logit_std':
            first = [self.sum(*first)] if first else []
        else:
            first = [*map(self.literal, first)]
        return self.call(
            node, name, loss, [*first, *map(self.literal, others)], self.keywords(node)
        )

    def function(self, node: Any) -> str:
        """Return the name of a recipe, or 'Term'."""
        name = node.id if isinstance(node, ast.Name) else member_of('recipes', node)
        if name is None:
            raise self.error('only recipes can be called, by name', node)
        if name != 'Term' and name not in self.recipes:
            raise self.error(
                f'there is no recipe {name!r}{close_name(name, self.recipes)}. It must be one of '
                f"{', '.join(self.recipes)}, Term and 'auto'",
                node,
            )
        return name

    def loss(self, node: Any) -> str:
        """Return the name of a loss, which is written as `losses.NAME`."""
        name = member_of('losses', node)
        if name is None or name not in self.losses:
            raise self.error(
                'the first argument of a term must be a loss, e.g. Term(losses.kl). The losses '
                f'are {", ".join(self.losses)}',
                node,
            )
        return name

    def keywords(self, node: Any) -> dict[str, Any]:
        out = {}
        for k in node.keywords:
            if k.arg is None:
                raise self.error('** is not supported: write out the options', k.value)
            if k.arg in out:
                raise self.error(f'{k.arg} is given twice', node)
            out[k.arg] = self.literal(k.value)
        return out

    def call(self, node: Any, name: str, loss: str | None, args: Sequence, kwargs: dict) -> Any:
        if name != 'Term':
            have = [*self.recipes[name]]
            have += ['temperature'] if 'T' in have else []
            if wrong := [k for k in kwargs if k not in have]:
                raise self.error(
                    f'{name} has no option {wrong[0]!r}{close_name(wrong[0], have)}. It has '
                    f'{", ".join(have) or "none"}',
                    node,
                )
        try:
            return self.build(name, loss, args, kwargs)
        except DistillError as e:
            raise self.error(str(e), node) from e
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise self.error(f'{name} does not take these arguments ({e})', node) from e

    def literal(self, node: Any) -> Any:
        """Evaluate a number, a string, True, False, None, or a list, tuple or dict of these."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
            v = node.value
            if isinstance(v, int | float) and not (
                math.isfinite(v) and abs(v) <= (LARGEST if isinstance(v, int) else v)
            ):
                raise self.error('this number is too large', node)
            return v
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            v = self.literal(node.operand)
            if type(v) in (int, float):
                return -v if isinstance(node.op, ast.USub) else v
        if isinstance(node, ast.Tuple):
            return tuple(map(self.literal, node.elts))
        if isinstance(node, ast.List):
            return [*map(self.literal, node.elts)]
        if isinstance(node, ast.Dict) and None not in node.keys:
            keys = [self.literal(k) for k in node.keys]
            if all(isinstance(k, str | int | float | None) for k in keys):
                return dict(zip(keys, map(self.literal, node.values)))
        raise self.error(
            'an argument must be a number, a string, True, False, None, or a list, tuple or dict '
            'of these',
            node,
        )


def member_of(owner: str, node: Any) -> str | None:
    """Return NAME if a node is written as OWNER.NAME, otherwise None."""
    known = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if known and node.value.id == owner else None
