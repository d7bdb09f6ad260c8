"""Detect a teacher whose classes have a different order than the student's.

The order is inferred from class names or from a confusion table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..teachers.teacher import Teacher
from .batch_scores import Tally
from .findings import Finding, few_names


@dataclass
class ClassMap:
    """Mapping from the student's classes to the teacher's classes.

    Attributes:
        same: True if both models have the same classes in the same order.
        order: Index of each student class in the teacher's classes. None if `same`, or if classes
            are missing.
        missing: Classes that only the student has.
        extra: Classes that only the teacher has.
        shared: Classes that both models have, in the student's order.
    """

    same: bool
    order: list | None
    missing: list
    extra: list
    shared: list


def map_classes(student: Sequence | None, teacher: Sequence | None) -> ClassMap | None:
    """Compare the classes of two models and their order.

    Args:
        student: Class names of the student, in the order of its outputs. None if unknown.
        teacher: Class names of the teacher, in the order of its outputs. None if unknown.

    Returns:
        A `ClassMap`, or None if the class names of a model are unknown.
    """
    if student is None or teacher is None:
        return None
    student, teacher = list(map(str, student)), list(map(str, teacher))
    missing = [c for c in student if c not in teacher]
    extra = [c for c in teacher if c not in student]
    same = student == teacher
    return ClassMap(
        same,
        None if same or missing else [teacher.index(c) for c in student],
        missing,
        extra,
        [c for c in student if c in teacher],
    )


def reordered_classes(
    tally: Tally, teacher: Teacher, names: Sequence | None = None
) -> Iterator[tuple[float, Finding]]:
    """Yield a finding if the teacher is far more accurate with its outputs in a different order.

    Args:
        tally: `Tally` of the teacher's predictions.
        teacher: The teacher.
        names: Names of the student's classes. None if unknown.

    Yields:
        (accuracy in the new order, finding).
    """
    if tally.confusion is None:
        return
    table = tally.confusion.sum(0)
    order, n, k = best_order(table), table.sum().item(), len(table)
    moved = [i for i, o in enumerate(order) if i != o]
    before, after = table.trace().item() / n, hits(table, order).sum().item() / n
    # the accuracy in the new order must be at least halfway from chance to a perfect prediction
    if not moved or after < (1 + 1 / k) / 2 or not holds_elsewhere(tally.confusion):
        return
    select = order if teacher.select is None else [teacher.select[o] for o in order]
    unseen = sum(not table[i].any() for i in moved)
    guess = (
        f' ({unseen} of them have no samples here, so their position is a guess: pass a larger n=)'
        if unseen
        else ''
    )
    words = moves_in_words(order, moved, names)
    yield (
        after,
        Finding(
            'error',
            f'The teacher has the classes in a different order: {words}{guess}. Its accuracy is '
            f"{before:.3f} in the student's order and {after:.3f} in this one",
            f"Put its classes into the student's order: Teacher(model, select={select})",
            about='order of classes',
        ),
    )


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


def best_order(table: Tensor) -> list[int]:
    """Return the assignment of outputs to classes that makes the most predictions correct."""
    from scipy.optimize import linear_sum_assignment

    # subtle: add one correct item per class, so that classes without items keep their position
    return linear_sum_assignment((table + torch.eye(len(table))).numpy(), maximize=True)[1].tolist()


def hits(table: Tensor, order: Sequence[int]) -> Tensor:
    return table[torch.arange(len(order)), torch.tensor(order)]


def holds_elsewhere(halves: Tensor) -> bool:
    """Return True if the class order that fits half of the items best also fits the other half far
    better than the present order."""
    now = then = 0.0
    for suggests, shows in (halves, halves.flip(0)):
        order = best_order(suggests)
        moved = torch.tensor(order) != torch.arange(len(order))
        now += shows.diagonal()[moved].sum().item()
        then += hits(shows, order)[moved].sum().item()
    return then > 2 * now and then - now > 3 * (then + now) ** 0.5


def moves_in_words(order: Sequence[int], moved: Sequence[int], names: Sequence | None) -> str:
    """Describe how the classes are reordered.

    If classes are only swapped in pairs, name the pairs. Otherwise, name the output of each class.
    """
    name = lambda i: (
        repr(str(names[i])) if names is not None and len(names) == len(order) else f'class {i}'
    )
    if all(order[order[i]] == i for i in moved):
        return (
            few_names([f'{name(i)} and {name(order[i])}' for i in moved if i < order[i]], 5)
            + ' are swapped'
        )
    return few_names([f'{name(i)} is its output {order[i]}' for i in moved], 5)
