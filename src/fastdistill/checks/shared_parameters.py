"""Check that student and teacher do not share parameters, and compare how many they have."""

from collections.abc import Iterator

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from ..base.errors import few_names
from ..teachers.members import modules_of
from ..teachers.teacher import Teacher
from .findings import Finding


def shared_parameters(student: Module | None, teacher: Teacher) -> Iterator[Finding]:
    """Yield a finding if some parameters of the student and the teacher are in the same memory.

    Args:
        student: A module. None if unknown.
        teacher: A `Teacher`.
    """
    if student is None:
        return
    known = parameters_of(teacher)
    if both := [n for n, p in student.named_parameters() if place(p) in known]:
        yield Finding(
            'error',
            f'Student and teacher share {len(both)} parameters ({few_names(both, 3)}), so the '
            'teacher would change with the student',
            'Build the student from a copy: copy.deepcopy(teacher)',
        )


def place(p: Parameter) -> int:
    """Return the address of a parameter's values, or the id of a parameter without an address."""
    # subtle: different objects can share their values, after `load_state_dict(..., assign=True)` and in
    # TorchScript, whose parameters are new objects at each access
    has_values = p.layout == torch.strided and not is_lazy(p)
    return (p.data_ptr() if has_values else 0) or id(p)


def parameters_of(teacher: Teacher) -> dict[int, Parameter]:
    """Return {place: parameter} for the parameters of a teacher."""
    return {place(p): p for m in modules_of(teacher) for p in m.parameters()}


def numbers_of_parameters(student: Module | None, teacher: Teacher) -> tuple[int, int] | None:
    """Return the number of parameters of the student and of the teacher. None if one is unknown."""
    known = parameters_of(teacher)
    if student is None or not known:
        return None
    return sum(p.numel() for p in student.parameters()), sum(p.numel() for p in known.values())


def none_shared(student: Module | None, teacher: Teacher) -> str:
    """Describe a check that found no shared parameters. Return '' if none were compared."""
    if (found := numbers_of_parameters(student, teacher)) is None:
        return ''
    return f'{found[0]:,} of the student, {found[1]:,} of the teacher, none shared'


def larger_student(student: Module | None, teacher: Teacher) -> Iterator[Finding]:
    """Yield a finding if the student has more parameters than the teacher."""
    s, t = numbers_of_parameters(student, teacher) or (0, 0)
    if s > t:
        yield Finding(
            'warning',
            f'The student is larger than its teacher: {s:,} and {t:,} parameters',
            'Are the two models in the right order? Distillation usually trains a smaller model',
        )
