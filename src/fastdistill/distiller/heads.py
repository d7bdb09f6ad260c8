"""The heads of a `Distiller`, and the values and teachers that they have together."""

from collections.abc import Mapping
from typing import Any

from ..base.outputs import DistillError
from ..recipes.term import Recipe, weight_text
from ..teachers.teacher import same_run, sharing_model
from .head import with_full_task


class Heads(dict):
    """{name: `Head`} of a `Distiller`. A student with one output has a single head, whose name is
    ''. Callers pass and get a value of this head as it is, and values of several heads as a dict.
    """

    @property
    def several(self) -> bool:
        return '' not in self

    def value(self, each: dict) -> Any:
        """Return the values of all heads, or the only value."""
        return each if self.several else each['']

    def by_name(self, value: Any) -> dict:
        """Undo `value`: return {head name: value}."""
        if self.several:
            return value or {}
        return {'': value}

    def flat(self, each: Mapping[str, Mapping | None]) -> dict:
        """Merge the dicts of all heads, with names such as 'color.kd'."""
        if not self.several:
            return self.value(dict(each))
        return {f'{k}.{n}': v for k, o in each.items() for n, v in (o or {}).items()}

    # teachers

    def teacher_groups(self) -> list[dict]:
        """Group the heads that have a teacher. Heads in the same group share one run of a model."""
        groups: list[dict] = []
        for k, h in self.items():
            if h.teacher is None:
                continue
            same = (g for g in groups if same_run(next(iter(g.values())).teacher, h.teacher))
            if (group := next(same, None)) is None:
                groups.append(group := {})
            group[k] = h
        return groups

    @property
    def sources(self) -> list:
        """The teachers to run. If several heads share a run of a model, the list contains only one
        of their teachers.
        """
        return [next(iter(g.values())).teacher for g in self.teacher_groups()]

    def share_models(self) -> None:
        """Let teachers that share a run also share the faster copy of their model."""
        for group in self.teacher_groups():
            first, *others = group.values()
            for h in others:
                h.teacher = sharing_model(h.teacher, first.teacher)

    # weights

    def scales(self, progress: float | None) -> tuple[dict, float]:
        """Return ({head name: factor of the head's loss}, divisor of the shared task loss).

        In each head, weights are divided by 1 plus the sum of the gradient ratios. If heads share a
        task loss, all heads use the largest divisor.
        """
        lengths = {k: h.ratios.length(h.weights_at(progress, True)) for k, h in self.items()}
        longest = max(lengths.values())
        return {k: n / longest for k, n in lengths.items()}, longest

    def share_task_loss(self) -> None:
        """Give the task loss the same weight in the recipes of all heads.

        This is for a single task loss of all heads. Raise an error if the heads weight it
        differently. A recipe that has no weight for it gives it the weight 1. If such a recipe has
        only gradient ratios, which are relative to the task loss, it gets the weight of the other
        heads.
        """
        for h in self.values():
            if h.chosen is not None and not h.shares_task:
                h.recipe = with_full_task(h.recipe)
        weights = {
            k: 1.0 if h.recipe.task is None else h.recipe.task
            for k, h in self.items()
            if h.recipe.task is not None or not all(t.has_grad_ratio for t in h.recipe.terms)
        }
        task = next(iter(weights.values()), None)
        if any(w != task for w in weights.values()):
            each = ', '.join(f'{k}: {weight_text(w)}' for k, w in weights.items())
            raise DistillError(
                f'The recipes of the heads give the task loss different weights ({each}), but there '
                'is one task loss for all heads. Give them the same alpha, or set the weight in each '
                'recipe, as in Recipe(Term(...), task=.1).'
            )
        for h in self.values():
            h.shares_task, h.recipe = True, Recipe(*h.recipe.terms, task=task)

    def recipe_changed(self) -> None:
        """Call `share_task_loss` again, because a recipe has changed. Do nothing if the task loss
        is not shared.
        """
        if any(h.shares_task for h in self.values()):
            self.share_task_loss()
