"""Results of recipes trained with the same seeds, as plain data and as a table."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..evaluation.report_data import Difference, JsonReport
from .significance import spread
from .text_table import TextTable

RECIPES_FORMAT = 1  # version of the JSON file


@dataclass
class RecipeRun:
    """Training run of one student with a recipe and a seed.

    Attributes:
        recipe: Name of the recipe.
        history: {column of the training table: [value after each epoch]}.
    """

    recipe: str
    seed: int
    history: dict[str, list]

    def value(self, column: str) -> Any:
        return self.history[column][-1] if self.history.get(column) else None


@dataclass
class RecipeReport(JsonReport):
    """Results of each recipe after the last epoch for several seeds, and the difference from the
    baseline. The report contains only plain data.

    Attributes:
        baseline: Name of the recipe with which all others are compared.
        metric: Column of the training table in which recipes are compared.
        higher: True if higher values are better.
        recipes: {name: recipe as text}.
        differences: {recipe name: metric minus the baseline's metric}.
    """

    metric: str
    higher: bool
    baseline: str
    n_epoch: int
    recipes: dict[str, str]
    runs: list[RecipeRun]
    differences: dict[str, Difference] = field(default_factory=dict)
    format: int = RECIPES_FORMAT
    called = 'report of recipes'

    @property
    def seeds(self) -> list[int]:
        return sorted({r.seed for r in self.runs})

    def values(self, recipe: str, column: str | None = None) -> list:
        """Return the results of a recipe, one per seed, in the order of `seeds`.

        Args:
            recipe: Name of the recipe.
            column: Column of the training table. None for the metric.
        """
        runs = {r.seed: r for r in self.runs if r.recipe == recipe}
        return [runs[s].value(column or self.metric) for s in self.seeds]

    @property
    def best(self) -> str:
        """Name of the recipe with the best mean. The difference from the baseline may be due to
        chance (see `verdict`). A recipe whose trainings diverged comes last.
        """

        def rank(name: str) -> float:
            mean = fmean(self.values(name))
            return -math.inf if not math.isfinite(mean) else mean if self.higher else -mean

        return max(self.recipes, key=rank)

    def verdict(self, recipe: str) -> str:
        """Return 'better' or 'worse' (than the baseline), 'not significant', or the reason why
        there is no test.
        """
        d: Any = self.differences.get(recipe)
        if d is None:
            return ''
        if not math.isfinite(d.value):
            return 'a training diverged: no test'
        if d.p is None:
            return 'one seed: no test' if len(self.seeds) < 2 else 'the same in each seed: no test'
        return d.verdict(self.higher)

    def rows(self) -> TextTable:
        """Return the rows of the table, as a list of dicts."""
        return TextTable(self._row(n) for n in self.recipes)

    def _row(self, name: str) -> dict[str, str]:
        v, d = self.values(name), self.differences.get(name)
        deviation = spread(v)
        out = {
            'recipe': name,
            'mean': f'{fmean(v):.4f}',
            'spread': '' if deviation is None else f'{deviation:.4f}',
            'each seed': ' '.join(f'{o:.4f}' for o in v),
        }
        between = '' if d is None or d.low is None else f' ({d.low:+.4f} to {d.high:+.4f})'
        return out | {
            f'minus {self.baseline}': '' if d is None else f'{d.value:+.4f}{between}',
            'p': '' if d is None or d.p is None else f'{d.p:.2g}',
            'verdict': self.verdict(name),
        }

    @property
    def caption(self) -> str:
        test = next((f'; {d.test}' for d in self.differences.values() if d.test), '')
        return (
            f'{self.metric} after {self.n_epoch} epoch{"s"[: self.n_epoch > 1]}, '
            f'{"higher" if self.higher else "lower"} is better; '
            f'{len(self.seeds)} seed(s), the same initial weights and batches for all recipes{test}'
        )

    def __str__(self) -> str:
        return f'{self.caption}\n{self.rows()}'

    __repr__ = __str__

    def show(self) -> None:
        """Print the table in a terminal or a notebook."""
        self.rows().show(self.caption)
