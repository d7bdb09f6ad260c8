"""Map classes between models with different sets of classes, where a class of one model may be a
group of classes of the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .errors import DistillError, few_names
from .outputs import Outputs, as_plain
from .task import IGNORED, Task, fit_labels


def class_groups(
    groups: Any, option: str, vocab: Sequence | None = None, disjoint: bool = False
) -> list | None:
    """Convert groups of classes to groups of class indices. Without `vocab`, names are kept.

    Args:
        groups: A class or a list of classes for each output, as {output name: classes} or as a
            list.
        option: Name of the option in messages.
        vocab: Names of all classes, for converting names in `groups` to indices. None to keep
            names.
        disjoint: True to raise an error if a class is in two groups.
    """
    if groups is None:
        return None
    if isinstance(groups, dict):
        groups = list(groups.values())
    if isinstance(groups, Tensor):
        groups = groups.tolist()
    number = lambda c: as_number(c, option, vocab)
    out = [list(map(number, g)) if isinstance(g, (list, tuple)) else number(g) for g in groups]
    if not out or any(g == [] for g in out):
        raise DistillError(f'{option}={groups}: each output needs at least one class.')
    flat = list(chain(*members(out)))
    if disjoint and (twice := [c for c in flat if flat.count(c) > 1]):
        raise DistillError(
            f'{option}={out}: two outputs have the class {twice[0]!r}. Sum these outputs first, '
            'as in select=[[0, 1], 2].'
        )
    return out


def as_number(c: Any, option: str, vocab: Sequence | None) -> int | str:
    if isinstance(c, str):
        if vocab is None or c in vocab:
            return c if vocab is None else vocab.index(c)
        raise DistillError(f'{option}= has {c!r}, but the classes are {few_names(vocab, 10)}.')
    return int(c)


def members(groups: Any) -> list[list]:
    return [g if isinstance(g, list) else [g] for g in groups]


def grouped(
    logits: Tensor,
    groups: Any,
    axis: int = 1,
    kind: str = 'softmax',
    option: str = 'classes',
    who: str = 'student',
) -> Tensor:
    """Compute the logits of groups of classes. A group with one class gets the logit of that class.
    A group with several classes gets the logsumexp of their logits, so that the probability of the
    group is the sum of the classes' probabilities.

    Args:
        logits: Logits, (B, C, ...).
        groups: Groups, from `class_groups`.
        axis: Class axis.
        option, who: Names of the option and of the model in messages.
    """
    n, sets = logits.shape[axis], members(groups)
    if names := [c for c in chain(*sets) if isinstance(c, str)]:
        raise DistillError(
            f"{option}= has the name {names[0]!r}, but the {who}'s classes have no names here: "
            'use their numbers.'
        )
    if min(map(min, sets)) < 0 or max(map(max, sets)) >= n:
        raise DistillError(
            f'{option}={list(groups)}: the {who} has {n} classes along axis {axis}, 0 to {n - 1}'
        )
    if max(map(len, sets)) == 1:
        return logits.index_select(axis, torch.tensor([g[0] for g in sets], device=logits.device))
    if kind != 'softmax':
        raise DistillError(
            f'{option}={list(groups)} sums the probabilities of mutually exclusive classes, but '
            f'this is kind={kind!r}: use one class for each output.'
        )
    parts = [logits.index_select(axis, torch.tensor(g, device=logits.device)) for g in sets]
    return torch.stack([p.logsumexp(axis) for p in parts], axis)


def of_classes(
    out: Outputs, select: list | None, classes: list | None, axis: int, kind: str
) -> Outputs:
    """Select classes of a teacher, and record which classes of the student they correspond to.

    Args:
        out: Outputs of a teacher.
        select, classes, axis, kind: Options of `Teacher`.
    """
    logits: Any = out.logits
    if select is not None:
        logits = grouped(logits, select, axis, kind, 'select', 'teacher')
        out = replace(out, logits=logits)
    if classes is None:
        return out
    if len(classes) != (n := logits.shape[axis]):
        raise DistillError(
            f'classes={classes} is for {len(classes)} outputs, but the teacher returns {n} along '
            f"axis {axis}: pass the student's class(es) for each output, or select outputs with select=."
        )
    return replace(out, classes=classes)


def grouped_labels(y: Tensor, groups: Any, n: int, ignore_index: int) -> Tensor:
    """Convert each label to the index of its group. Samples to ignore, and those whose class is not
    in any group, get the label IGNORED, which is never the index of a group.

    Args:
        y: Class indices.
        groups: Disjoint groups of classes.
        n: Number of classes.
        ignore_index: Class index of samples to ignore.
    """
    table = torch.full((n,), IGNORED, dtype=torch.long)
    for i, g in enumerate(members(groups)):
        table[g] = i
    known = (y >= 0) & (y < n) & (y != ignore_index)
    return torch.where(known, table.to(y.device)[y.clamp(0, n - 1)], IGNORED)


def taught_task(task: Task, groups: Any) -> Task:
    """Return the `Task` that describes what `taught_part` returns."""
    if groups is None or task.kind != 'softmax':
        return task
    return replace(task, ignore_index=IGNORED)


def taught_part(logits: Any, y: Any, groups: Any, task: Task) -> tuple:
    """Restrict the student's logits and the labels to the classes that the teacher knows. The
    function `taught_task` returns the `Task` that describes the result.

    Args:
        logits: Student logits. None if unknown.
        y: Labels, or None.
        groups: The teacher's `classes` (see `Outputs`). None if the teacher has the same classes.
        task: The `Task` that describes logits and labels.
    """
    if groups is None:
        return logits, y
    if logits is None:
        if not isinstance(y, Tensor) or task.kind != 'softmax' or y.is_floating_point():
            return None, y
        n = 1 + max(int(y.max()), *chain(*members(groups)))
        return None, grouped_labels(as_plain(y).long(), groups, n, task.ignore_index)
    logits = as_plain(logits)
    s = grouped(logits, groups, task.axis, task.kind)
    if not isinstance(y, Tensor) or (fitted := fit_labels(as_plain(y), logits.shape, task)) is None:
        return s, y
    if task.kind == 'softmax':
        return s, grouped_labels(fitted, groups, logits.shape[task.axis], task.ignore_index)
    return s, grouped(fitted, groups, task.axis, task.kind)
