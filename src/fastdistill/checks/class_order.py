"""Detect a teacher whose classes have a different order than the student's.

The order is inferred from class names, from a confusion table, or from the correlations of outputs
and labels.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Gamma

from ..base.errors import DistillError, few_names
from ..base.random_state import seeded
from ..teachers.teacher import Teacher
from .batch_scores import FEW, Tally, item_scores
from .findings import Finding

# minimum mean correlation between the reordered outputs and their labels
RELATED = 0.2
# number of orders computed with random item weights, and the minimum fraction that must agree
REPEATS, AGREE = 20, 0.75


@dataclass
class ClassMap:
    """Mapping from the student's classes to the teacher's classes.

    Attributes:
        student: Class names of the student, in the order of its outputs.
        teacher: Class names of the teacher, in the order of its outputs.
    """

    student: list[str]
    teacher: list[str]

    @property
    def same(self) -> bool:
        """True if both models have the same classes in the same order."""
        return self.student == self.teacher

    @property
    def missing(self) -> list[str]:
        """Classes that only the student has."""
        teacher = set(self.teacher)
        return [c for c in self.student if c not in teacher]

    @property
    def extra(self) -> list[str]:
        """Classes that only the teacher has."""
        student = set(self.student)
        return [c for c in self.teacher if c not in student]

    @property
    def shared(self) -> list[str]:
        """Classes that both models have, in the student's order."""
        teacher = set(self.teacher)
        return [c for c in self.student if c in teacher]

    @property
    def order(self) -> list[int] | None:
        """Index of each student class in the teacher's classes. None if `same`, or if classes are
        missing.

        Raises:
            DistillError: If several classes have the same name.
        """
        if self.same or self.missing:
            return None
        count = Counter(self.student) | Counter(self.teacher)
        if several := [c for c in dict.fromkeys(self.student) if count[c] > 1]:
            raise DistillError(
                f'Several classes are named {few_names(several, 5)}, so the names do not show which '
                "class of the teacher belongs to each class of the student. List the teacher's "
                'class for each student class: Teacher(model, select=[...]).'
            )
        at = {c: i for i, c in enumerate(self.teacher)}
        return [at[c] for c in self.student]


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
    return ClassMap([*map(str, student)], [*map(str, teacher)])


def reordered(
    tally: Tally, teacher: Teacher, names: Sequence | None = None
) -> Iterator[tuple[float, Finding]]:
    """Yield a finding if the teacher is far better with its outputs in a different order.

    The order of classes is inferred from a confusion table. The order of outputs for several labels
    or numbers is inferred from their correlations, which do not depend on the scale and calibration
    of the outputs.

    Args:
        tally: `Tally` of the teacher's predictions.
        teacher: The teacher.
        names: Names of the student's classes or labels. None if unknown.

    Yields:
        (score in the new order, finding).
    """
    if tally.confusion is not None:
        one, table = 'class', tally.confusion.sum(0)
        order = best_order(table)
    elif sum(len(y) for _, y in tally.several) >= 2 * FEW:
        one = dict(sigmoid='label', regression='number')[tally.task.kind]
        t, y = (torch.cat(o) for o in zip(*tally.several))
        table, order = correlation_table(t, y), related_order(t, y)
    else:
        return
    if not (moved := moved_outputs(order)):
        return
    if tally.confusion is not None:
        n, k = table.sum().item(), len(table)
        before, score = table.trace().item() / n, hits(table, order).sum().item() / n
        # the accuracy in the new order must be at least halfway from chance to a perfect prediction
        if score < (1 + 1 / k) / 2 or not holds_elsewhere(tally.confusion):
            return
        scores = f"accuracy is {before:.3f} in the student's order and {score:.3f} in this one"
        if not is_clear(table, order):
            yield score, unclear_order(before, score, n, len(moved))
            return
    else:
        if not related_elsewhere(t, y):
            return
        now, then = (table[moved, o].mean().item() for o in (moved, [order[i] for i in moved]))
        score = item_scores(t[:, order], y, tally.task).mean().item()
        scores = (
            f"outputs have a mean correlation of {now:.3f} with these {one}s in the student's "
            f'order, and of {then:.3f} in this one'
        )
    unseen = sum(not table[i].any() for i in moved)
    yield score, wrong_order(teacher, order, unseen, scores, one, names)


def moved_outputs(order: Sequence[int]) -> list[int]:
    return [i for i, o in enumerate(order) if i != o]


def wrong_order(
    teacher: Teacher, order: list, unseen: int, scores: str, one: str, names: Sequence | None
) -> Finding:
    """Return the finding that the classes have a different order.

    Args:
        teacher: The teacher.
        order: Index of each of the student's classes in the teacher's outputs.
        unseen: Number of moved classes without samples.
        scores: Text that compares the two orders.
        one: Word for an output, such as 'class'.
        names: Names of the student's classes. None if unknown.
    """
    select = order if teacher.select is None else [teacher.select[o] for o in order]
    guess = (
        f' ({unseen} of them have no samples here, so their position is a guess: pass a larger n=)'
        if unseen
        else ''
    )
    many = 'classes' if one == 'class' else f'{one}s'
    # an output of a weak teacher may be more correlated with a related label than with its own
    care = '' if one == 'class' else '. Compare this order with the names of its outputs'
    return Finding(
        'error',
        f'The teacher has the {many} in a different order: {moves_in_words(order, names, one)}{guess}. '
        f'Its {scores}',
        f"Put its {many} into the student's order: Teacher(model, select={select}){care}",
        about='order of classes',
    )


def unclear_order(before: float, score: float, n: float, moved: int) -> Finding:
    """Return the finding that the classes have a different order, which can't be determined exactly
    from these samples.

    Args:
        before: Accuracy in the student's order.
        score: Accuracy in the best order.
        n: Number of samples.
        moved: Number of classes that are moved in the best order.
    """
    return Finding(
        'error',
        f'The teacher has classes in a different order: its accuracy is {before:.3f} in the '
        f"student's order and {score:.3f} in the best one, which moves {moved} classes. {n:.0f} samples "
        'are too few to be sure of each of them',
        "Put its classes into the student's order by their names: Teacher(model, select=[...]). Or pass "
        'a larger n= to the check, to find the order',
        about='order of classes',
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


def best_order(table: Tensor, stay: float = 1.0) -> list[int]:
    """Return the assignment of outputs to classes that makes the most predictions correct.

    Args:
        table: Score of each output (column) for each class (row), such as a number of items.
        stay: Number that is added to the scores of the present order, so that classes without items
            keep their position.
    """
    from scipy.optimize import linear_sum_assignment

    scores = table + stay * torch.eye(len(table))
    return linear_sum_assignment(scores.numpy(), maximize=True)[1].tolist()


def hits(table: Tensor, order: Sequence[int]) -> Tensor:
    return table[torch.arange(len(order)), torch.tensor(order)]


def is_clear(table: Tensor, order: Sequence[int]) -> bool:
    """Return True if there are enough samples to be sure of this order of the moved classes.

    An order can be far better than the present one although some of its classes have the wrong
    output, if the teacher is weak or there are few items of a class. The order must therefore stay
    the same if the items are given random weights (a Bayesian bootstrap). Classes without items are
    not compared.
    """
    was = torch.tensor(order)
    shown = (was != torch.arange(len(order))) & table.any(1)
    weights = Gamma(table.double().clamp_min(1e-9), torch.ones((), dtype=torch.float64))
    with seeded(0):
        found = [torch.tensor(best_order(weights.sample())) for _ in range(REPEATS)]
    return sum((o == was)[shown].all().item() for o in found) >= AGREE * REPEATS


def in_other_half(halves: Tensor, stay: float = 1.0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Find the best order on each half of the items, and yield the scores of the moved classes on
    the other half: in the present order, in the best order, and with all outputs.

    Args:
        halves: Tables of both halves, as for `best_order`, (2, C, C).
        stay: As in `best_order`.
    """
    for suggests, shows in (halves, halves.flip(0)):
        order = best_order(suggests, stay)
        moved = torch.tensor(order) != torch.arange(len(order))
        yield shows.diagonal()[moved], hits(shows, order)[moved], shows[moved]


def holds_elsewhere(halves: Tensor) -> bool:
    """Return True if the class order that fits half of the items best also fits the other half far
    better than the present order.
    """
    now = then = recall_now = recall_then = 0.0
    for right_now, right_then, rows in in_other_half(halves):
        have = rows.sum(1).clamp_min(1)
        now, then = now + right_now.sum().item(), then + right_then.sum().item()
        # subtle: mistaking a frequent class for a rare one does not mean a different order
        recall_now += (right_now / have).sum().item()
        recall_then += (right_then / have).sum().item()
    far = then > 2 * now and recall_then > 2 * recall_now
    return far and then - now > 3 * (then + now) ** 0.5


def correlation_table(t: Tensor, y: Tensor) -> Tensor:
    """Return the correlation of each label (row) with each output (column)."""
    t, y = (o.double() - o.double().mean(0) for o in (t, y))
    t, y = (o / o.norm(dim=0).clamp_min(1e-12) for o in (t, y))
    return y.T @ t


def related_order(t: Tensor, y: Tensor) -> list[int]:
    # outputs that are unrelated to all labels keep their position
    return best_order(correlation_table(t, y), stay=2 / len(t) ** 0.5)


def related_elsewhere(t: Tensor, y: Tensor) -> bool:
    """Return True if the order that fits half of the items best also fits the other half far better
    than the present order.
    """
    now, then, n, items = 0.0, 0.0, 0, len(t[::2])
    halves = torch.stack([correlation_table(t[i::2], y[i::2]) for i in (0, 1)])
    for related_now, related_then, rows in in_other_half(halves, stay=2 / items**0.5):
        now, then = now + related_now.sum().item(), then + related_then.sum().item()
        n += len(rows)
    # a correlation of unrelated numbers has a standard deviation of 1 / sqrt(items)
    sure = then - now > 3 * (2 * n / items) ** 0.5
    return sure and then > RELATED * n and (then > 2 * now or n - then < (n - now) / 2)


def moves_in_words(order: Sequence[int], names: Sequence | None, one: str = 'class') -> str:
    """Describe how the classes are reordered.

    If classes are only swapped in pairs, name the pairs. Otherwise, name the output of each class.
    """
    moved = moved_outputs(order)
    name = lambda i: (
        repr(str(names[i])) if names is not None and len(names) == len(order) else f'{one} {i}'
    )
    if all(order[order[i]] == i for i in moved):
        return (
            few_names([f'{name(i)} and {name(order[i])}' for i in moved if i < order[i]], 5)
            + ' are swapped'
        )
    return few_names([f'{name(i)} is its output {order[i]}' for i in moved], 5)
