"""Check the outputs and labels of a head, on a few batches before training and on the first batch."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..base.class_mapping import taught_part, taught_task
from ..base.outputs import Outputs, as_plain
from ..checks.findings import Findings
from ..checks.shared_parameters import none_shared, shared_parameters
from ..checks.stored_outputs import check_stored
from ..checks.task_loss import summed_loss
from ..checks.teacher_outputs import check_batch, check_outputs
from ..recipes.batch_tensors import plain_logits
from .head import Head


def check_batches_of_head(h: Head, batches: Iterable, placed: bool, part: str) -> Findings:
    """Find mistakes that training would not report. See `Distiller.check_batches`."""
    found = Findings()
    found.add(
        'parameters', shared_parameters(h.student, h.teacher), none_shared(h.student, h.teacher)
    )
    found.join(
        check_outputs(
            h.teacher,
            h.task,
            batches,
            h.student,
            recipe=None if h.chooses else h.recipe,
            output=h.output,
            place=None if placed else h.task_loss.moved,
            part=part,
        )
    )
    h.doubt = found.doubt
    return found


def check_batch_of_head(
    h: Head, student: Outputs, teacher: Outputs | None, targets: Sequence
) -> Findings:
    """Report mistakes in the outputs and labels of one batch, such as incompatible shapes."""
    found = Findings()
    if teacher is not None:
        found.add('store', check_stored(h.recipe, teacher, h.task.kind))
    if targets:
        example = student.logits, targets
        found.add('task loss', summed_loss(h.task_loss.loss, h.recipe, lambda: example))
    student, t, targets = plain_logits(student, teacher, targets)
    y = as_plain(targets[0]) if len(targets) and isinstance(targets[0], Tensor) else None
    classes = None if teacher is None else teacher.classes
    s, y = taught_part(student.logits, y, classes, h.task)
    return found.join(check_batch(s, t, y, taught_task(h.task, classes)))


def check_first_batch(
    h: Head, student: Outputs, teacher: Outputs | None, targets: Sequence
) -> None:
    """Raise an error for mistakes in the first batch.

    The teacher's outputs are checked in the first batch for which the teacher runs.
    """
    parts = {'labels'} if teacher is None else {'labels', 'outputs'}
    if parts & h.unchecked:
        h.unchecked -= parts
        check_batch_of_head(h, student, teacher, targets).enforce()
