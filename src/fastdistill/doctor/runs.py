"One batch through student and teacher, without a trace."
from contextlib import contextmanager
import torch
from ..features.calls import arguments
from ..features.names import unwrap
from ..features.probe import dry_run
from ..outputs import Outputs
from ..replay.seeds import RandomGuard

__all__ = ['guarded_random_state', 'run_student', 'student_logits', 'teacher_logits']


@contextmanager
def guarded_random_state():
    "The global generators of Python, NumPy and PyTorch, those of GPUs too, are afterwards as before"
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with RandomGuard(), torch.random.fork_rng(gpus): yield


def run_student(student, x):
    "What the student returns for inputs `x`, called as in a training step"
    student = unwrap(student)
    args,kwargs = arguments(student, x)
    return student(*args, **kwargs)


def student_logits(
    student,
    x, # tuple: the batch's inputs
    output=None # which of its outputs is distilled, as in `Outputs.of`
):
    "The student's logits, in evaluation mode; the student stays as it is"
    return Outputs.of(dry_run(student, *x), output=output).logits


def teacher_logits(teacher, x):
    "The teacher's logits, from a hidden state without a past"
    teacher.reset()
    return Outputs.of(teacher(*x)).logits
