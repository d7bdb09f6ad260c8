"""Look up the members of an ensemble."""

from typing import Any

from torch import nn


def single_teachers(teacher: Any) -> list:
    """Return the single teachers in a nested ensemble.

    For a single teacher, the list has only the teacher itself.
    """
    return [o for m in teacher.members for o in single_teachers(m)] or [teacher]


def modules_of(teacher: Any) -> list[nn.Module]:
    """Return a list with the nn.Module of a teacher, or with the modules of all members of an
    ensemble.
    """
    return [t.module for t in single_teachers(teacher) if t.module is not None]


def known_classes(teacher: Any) -> list | None:
    """Return the student's class, or list of classes, for each output of a teacher. None if the
    classes are the same.
    """
    each = (known_classes(m) for m in teacher.members)
    return teacher.classes or next((o for o in each if o is not None), None)
