"One batch through student and teacher, without a trace."
from collections.abc import Mapping
from contextlib import contextmanager
import torch
from ..features.names import unwrap
from ..features.probe import dry_run, untouched
from ..outputs import Outputs
from ..replay.seeds import RandomGuard
from ..teacher.forms import takes_names

__all__ = ['guarded_random_state', 'run_student', 'student_logits', 'teacher_logits']


@contextmanager
def guarded_random_state():
    "The global generators of Python, NumPy and PyTorch, those of GPUs too, are afterwards as before"
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with RandomGuard(), torch.random.fork_rng(gpus): yield


def run_student(student, x):
    "What the student returns for inputs `x`, called as in a training step"
    student = unwrap(student)
    by_name = len(x) == 1 and isinstance(x[0], Mapping) and takes_names(student, x[0])
    return student(**x[0]) if by_name else student(*x)


def student_logits(student, x):
    "The student's logits, in evaluation mode; the student stays as it is"
    if not any(isinstance(o, Mapping) for o in x): return Outputs.of(dry_run(student, *x)).logits
    with untouched(student): return Outputs.of(run_student(student, x)).logits


def teacher_logits(teacher, x):
    "The teacher's logits, from a hidden state without a past"
    teacher.reset()
    return Outputs.of(teacher(*x)).logits
