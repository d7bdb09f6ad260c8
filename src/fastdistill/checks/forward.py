"""Run the student and the teacher on a batch without changing them."""

from collections.abc import Sequence
from typing import Any

from torch.nn import Module

from ..base.outputs import Outputs
from ..features.layer_names import unwrap
from ..features.model_call import arguments
from ..features.probe import dry_run
from ..teachers.teacher import Teacher


def run_student(student: Module, x: Sequence) -> Any:
    """Return the raw output of the student for inputs `x`, as in a training step."""
    student = unwrap(student)
    args, kwargs = arguments(student, x)
    return student(*args, **kwargs)


def student_logits(student: Module, x: Sequence, output: Any = None) -> Any:
    """Return the logits of the student in evaluation mode, without changing the student.

    Args:
        student: A module.
        x: Inputs of the batch, as a tuple.
        output: Which output of the student is distilled, as in `Outputs.of`.
    """
    return Outputs.of(dry_run(student, *x), output=output).logits


def teacher_logits(teacher: Teacher, x: Sequence) -> Any:
    """Reset the teacher's hidden states and return its logits for a batch."""
    teacher.reset()
    return Outputs.of(teacher(*x)).logits
