"""Describe the checks that found no problem, with numbers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..teachers.teacher import Teacher
from .batch_scores import Tally
from .class_order import best_order, hits
from .normalization import can_renormalize

__all__ = [
    'norms_in_words',
    'norms_of',
    'order_in_words',
    'outputs_in_words',
    'recipe_in_words',
    'shapes_in_words',
    'steady_in_words',
    'unknown_normalization',
]


def shapes_in_words(s: Sequence[int] | None, t: Sequence[int], y: Tensor | None) -> str:
    """Describe the shapes of the outputs and labels.

    Args:
        s: Shape of the student's outputs. None if unknown.
        t: Shape of the teacher's outputs.
        y: Labels. None if unknown.
    """
    labels = None if y is None else tuple(y.shape)
    shapes = dict(student=s and tuple(s), teacher=tuple(t), labels=labels)
    return ', '.join(f'{k} {v}' for k, v in shapes.items() if v is not None)


def steady_in_words(teacher: Teacher) -> str:
    drawn = teacher.mode == 'train' or teacher.combine == 'sample'
    return '' if drawn else 'the same in repeated calls with the same batch'


def norms_of(teacher: Teacher) -> list[Any]:
    """Return the batch norm layers of a teacher that track running statistics."""
    return [
        m
        for mod in teacher.modules
        for m in mod.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    ]


def norms_in_words(teacher: Teacher) -> str:
    n = len(norms_of(teacher))
    return f'{n} batch norm layer(s), not at their initial values' if n else ''


def recipe_in_words(recipe: Any) -> str:
    names = [t.name for t in getattr(recipe, 'terms', [] if recipe is None else [recipe])]
    return (
        f'{", ".join(names)}: each is meaningful for these outputs and trains something'
        if names
        else ''
    )


def outputs_in_words(tally: Tally) -> str:
    if tally.task.kind == 'regression':
        return 'finite numbers'
    return 'finite logits, not probabilities'


def order_in_words(tally: Tally) -> str:
    """Describe the teacher's accuracy in the current and in the best order of its outputs."""
    if tally.confusion is None:
        return ''
    table = tally.confusion.sum(0)
    n, best = table.sum().item(), hits(table, best_order(table)).sum().item()
    here = table.trace().item() / n
    return (
        f'accuracy {here:.3f} in this order of {len(table)} classes, {best / n:.3f} in the best one'
    )


def unknown_normalization(teacher: Teacher, batches: Sequence) -> str:
    """Describe the normalization check for a teacher whose normalization is unknown."""
    if teacher.stats is not None or not can_renormalize(teacher, batches):
        return ''
    return "the teacher's is unknown, but no common one scores clearly better than the student's"
