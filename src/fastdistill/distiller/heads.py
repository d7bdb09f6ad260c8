"""The heads of a `Distiller`, and the values and teachers that they share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..base.outputs import DistillError, tensor_of_numbers
from ..recipes.term import Recipe, weight_text
from ..teachers.model_loading import holds_weights
from ..teachers.teacher import Teacher, same_run, sharing_model, with_defaults
from .head import with_full_task


class Heads(dict):
    """{name: `Head`} of a `Distiller`. A student with one output has a single head, whose name is
    ''. A value for this single head is passed and returned as is. Values for several heads are
    passed and returned as a dict.
    """

    @property
    def several(self) -> bool:
        return '' not in self

    def value(self, each: dict) -> Any:
        """Return the values of all heads, or the only value."""
        return each if self.several else each['']

    def by_name(self, value: Any) -> dict:
        """Undo `value`: return {head name: value}."""
        return (value or {}) if self.several else {'': value}

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
        """Return ({head name: factor of the head's loss}, weight of the shared task loss).

        In each head, weights are divided by 1 plus the sum of the gradient ratios. If heads share a
        task loss, all heads use the largest divisor.
        """
        lengths = {k: h.ratios.length(h.weights_at(progress, True)) for k, h in self.items()}
        longest, first = max(lengths.values()), next(iter(self.values()))
        task = first.recipe.task_at(progress) / longest
        return {k: n / longest for k, n in lengths.items()}, task

    def share_task_loss(self) -> None:
        """Give the task loss the same weight in the recipes of all heads.

        This is used if one task loss is computed for all heads. Raise an error if the recipes give
        it different weights. In a recipe that sets no weight for the task loss, its weight is 1.
        But if all terms of such a recipe have gradient ratios, which are relative to the task loss,
        the recipe gets the weight of the other heads.
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


def build_heads(head_class: type, student: Any, teacher: Any, options: Mapping[str, Any]) -> Heads:
    """Build a head for each teacher, or the only head if `teacher` is not a dict.

    Args:
        head_class: `Head` or a subclass.
        student, teacher: As in `Distiller`.
        options: The other options of `Distiller`, each as one value or a dict {head name: value}.
    """
    if not isinstance(teacher, Mapping) or holds_weights(teacher):
        teacher = {'': teacher}
    if not teacher:
        raise DistillError(
            'The dict of teachers is empty: give one teacher per head, {name: teacher}.'
        )
    teachers = {str(k): t for k, t in teacher.items()}
    names, several = [*teachers], [*teachers] != ['']
    if not several and (options['labels'] is not None or options['weights'] is not None):
        raise DistillError(
            'labels= and weights= are for several heads: give a dict of teachers, as in '
            "Distiller(student, {'color': teacher1, 'shape': teacher2})."
        )
    by_head = {k: options_by_head(o, k, names) for k, o in options.items()}
    heads = Heads()
    for i, (name, t) in enumerate(teachers.items()):
        o = {k: values[name] for k, values in by_head.items()}
        labels, weight, output = o.pop('labels'), o.pop('weights'), o['output']
        if several and output is None:
            o['output'] = HeadOutput(name, i, len(names))
            output = SharedOutput(name, i, len(names))
            if isinstance(t, Teacher):
                t = with_defaults(t, output=output)
        of_head = partial(labels_in_order, names, i) if several else given_labels
        heads[name] = head_class(
            name,
            student,
            t,
            labels=labels or of_head,
            weight=1.0 if weight is None else weight,
            teacher_output=output,
            **o,
        )
    heads.share_models()
    return heads


@dataclass
class HeadOutput:
    """Selects the output of one head from the outputs that the student returned.

    Attributes:
        name: Name of the head.
        at: Position of the head among all heads.
        n: Number of heads.
    """

    name: str
    at: int
    n: int

    def __call__(self, raw: Any) -> Any:
        if isinstance(raw, Mapping) and self.name in raw:
            return raw[self.name]
        if isinstance(raw, (tuple, list)) and len(raw) == self.n:
            return raw[self.at]
        if isinstance(raw, Tensor) and self.n == 1:
            return raw
        return self.otherwise(raw)

    def otherwise(self, raw: Any) -> Any:
        """Raise an error if the student has no output with the name or position of the head."""
        if isinstance(raw, Mapping):
            have = ', '.join(map(str, raw))
        else:
            have = f'{len(raw)} outputs' if isinstance(raw, (tuple, list)) else 'one tensor'
        raise DistillError(
            f'The Distiller has {self.n} heads, including {self.name!r}, but the student returns '
            f'{have}: use the keys of a returned dict as head names, or pass one teacher for each '
            'output of a tuple, in the same order. Pass None for a head without a teacher.'
        )


class SharedOutput(HeadOutput):
    """Selects the output of one head of a teacher. A teacher may have a single output for all
    heads.
    """

    def __call__(self, raw: Any) -> Any:
        if isinstance(raw, list) and len(raw) and not isinstance(raw[0], Tensor):
            rows = tensor_of_numbers(raw)
            if rows is not None and rows.dim() < 3:
                return rows  # the list is a batch, not a list of outputs
        return super().__call__(raw)

    def otherwise(self, raw: Any) -> Any:
        if type(raw) is dict and len(raw) == 1:
            return next(iter(raw.values()))  # an ONNX network
        return raw


def options_by_head(o: Any, option: str, heads: Iterable[str], who: str = 'the heads are') -> dict:
    """Convert an option to a dict {head name: value}. A single value is used for all heads."""
    if not isinstance(o, Mapping):
        return dict.fromkeys(heads, o)
    o = {str(k): v for k, v in o.items()}
    if unknown := set(o) - set(heads):
        raise DistillError(
            f'{option}= has {", ".join(sorted(unknown))}, but {who} {", ".join(heads)}.'
        )
    return {k: o.get(k) for k in heads}


def given_labels(targets: Sequence) -> tuple:
    """Return the labels as a tuple, which is empty for distiller(x, None)."""
    return () if all(y is None for y in targets) else tuple(targets)


def labels_in_order(names: Sequence[str], i: int, targets: Sequence) -> tuple:
    """Return the labels of head `i` as a tuple, if each head has one label."""
    if targets and len(targets) != len(names):
        raise DistillError(
            f'{len(targets)} labels for {len(names)} heads ({", ".join(names)}): give one '
            'for each, or None.'
        )
    return tuple(y for y in targets[i : i + 1] if y is not None)
