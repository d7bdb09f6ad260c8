"Run student and teacher on one batch without changing them."

from collections.abc import Sequence
from typing import Any

from torch.nn import Module

from ..base.outputs import Outputs
from ..features.layer_names import unwrap
from ..features.model_call import arguments
from ..features.probe import dry_run
from ..teachers.teacher import Teacher

__all__ = ['run_student', 'student_logits', 'teacher_logits']


def run_student(student: Module, x: Sequence) -> Any:
    """Return the student's raw outputs for inputs `x`, as in a training step."""
    student = unwrap(student)
    args, kwargs = arguments(student, x)
    return student(*args, **kwargs)


def student_logits(student: Module, x: Sequence, output: Any = None) -> Any:
    """Return the student's logits in evaluation mode, without changing the student.

    Args:
        student: A module.
        x: Inputs of the batch, a tuple.
        output: Which of its outputs is distilled, as in `Outputs.of`.
    """
    return Outputs.of(dry_run(student, *x), output=output).logits


def teacher_logits(teacher: Teacher, x: Sequence) -> Any:
    """Return the teacher's logits, starting from a fresh hidden state."""
    teacher.reset()
    return Outputs.of(teacher(*x)).logits
