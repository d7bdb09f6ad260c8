"""Find mismatches in a batch: shapes, class axes, labels and token ids."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import Tensor, nn

from ..base.errors import DistillError
from ..base.outputs import map_tensors, tensors_in
from ..base.task import CLASS_NUMBERS, Task, fit_labels, fitting_axes, float_labels, shape_of_labels
from ..teachers.teacher import Teacher
from .findings import Finding

ROUNDED = 0.02  # tolerance for the sum of probabilities
OTHER_KINDS = (
    "If each number is a separate label, pass kind='sigmoid'. If the model predicts numbers, pass "
    "kind='regression'"
)


class UnknownId(Exception):
    """Raised if a batch has an id for which an embedding has no row."""


@contextmanager
def checked_ids(teacher: Teacher) -> Iterator[None]:
    """Raise an error in this context if an embedding of the teacher gets an unknown id.

    On a GPU, an unknown id would crash the process.

    Args:
        teacher: A `Teacher` that runs inside the context.

    Raises:
        UnknownId: If an embedding has no row for an id.
    """
    named = {
        m: k
        for k, m in teacher.named_modules().items()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }

    def check(m: Any, args: tuple, kwargs: dict) -> None:
        if type(m).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
            return try_on_cpu(m, args, kwargs)
        ids, n = args[0] if args else kwargs['input'], m.num_embeddings
        if ids.numel() and not 0 <= (largest := ids.max().item()) < n:
            raise UnknownId(
                f"The inputs have ids up to {largest}, but the teacher's embedding {named[m]} has {n} "
                f'rows, 0 to {n - 1}'
            )

    handles = [m.register_forward_pre_hook(check, with_kwargs=True) for m in named]
    try:
        yield
    except (IndexError, DistillError) as e:
        cause = e.__cause__ if isinstance(e, DistillError) else e
        if not isinstance(cause, IndexError) or 'index out of range in self' not in str(cause):
            raise  # the error was not raised by an embedding
        raise UnknownId('The inputs have ids that an embedding of the teacher does not have') from e
    finally:
        for h in handles:
            h.remove()


def try_on_cpu(embedding: Any, args: tuple, kwargs: dict) -> None:
    """Run an embedding that has its own `forward` on the CPU, where an unknown id raises an
    IndexError.

    The inputs of such an embedding are not always ids: BART's position embeddings get the token ids
    and compute the ids of the positions.
    """
    whole = (t for t in tensors_in((args, kwargs)) if not t.is_floating_point() and t.numel())
    if any(t.max() >= embedding.num_embeddings for t in whole):
        args, kwargs = map_tensors((args, kwargs), Tensor.cpu)
        # subtle: call `forward` directly, because the copy has the hook that called this function
        type(embedding).forward(copy.deepcopy(embedding).cpu(), *args, **kwargs)


def unknown_id(error: UnknownId) -> Finding:
    return Finding(
        'error',
        f'{error}',
        'Are these token ids of a different tokenizer, or codes of different categories? Prepare '
        "the student's data with the teacher's tokenizer or categories, or pass a function that "
        'converts: KnowledgeDistillation(lambda x: ...)',
    )


def mismatches(
    s: Sequence[int] | None, t: Sequence[int], y: Tensor | None, task: Task
) -> Iterator[Finding]:
    """Yield a finding if outputs and labels do not fit together.

    Only the first mismatch is reported, because other mismatches may follow from it.

    Args:
        s: Shape of the student's outputs. None if unknown.
        t: Shape of the teacher's outputs.
        y: Labels. None if unknown.
        task: What the student predicts.
    """
    if found := first_mismatch(s, t, y, task):
        yield Finding('error', *found)


def first_mismatch(
    s: Sequence[int] | None, t: Sequence[int], y: Tensor | None, task: Task
) -> tuple[str, str] | None:
    """Return (what does not fit, what to do). Return None if everything fits."""
    if s is not None and (prod(s) != prod(t) if task.kind == 'regression' else s != t):
        return (
            f"The student's output has shape {tuple(s)}, but the teacher's has shape {tuple(t)}",
            'Both need the same outputs: the same classes (or number of targets) and, in dense '
            "tasks, the same resolution. Teacher(model, select=[...]) selects some of the teacher's "
            'classes. A function around the teacher can select or resize: '
            'KnowledgeDistillation(lambda x: ...)',
        )
    if task.kind == 'sigmoid':
        return None if y is None else not_labels(y, task)
    if task.kind != 'softmax':
        return None
    # axis 0 is the batch axis, so it can't be the class axis
    if not task.axis or not -len(t) < task.axis < len(t):
        return (
            f'Outputs of shape {tuple(t)} have no axis {task.axis} for the classes',
            axis_to_pass(),
        )
    n = t[task.axis]
    if n <= 1:
        return (
            f'The outputs, of shape {tuple(t)}, have 1 class along axis {task.axis}. Its softmax is '
            'always 1',
            "For one yes/no label, use BCEWithLogitsLossFlat or kind='sigmoid'. For a number, use "
            "kind='regression'. If the classes are on a different axis, pass axis=",
        )
    if y is None:
        return None
    if y.is_floating_point() and y.shape == shape_of_labels(t, task.axis):
        return float_labels(y).removesuffix('.'), CLASS_NUMBERS.removesuffix('.')
    if y.shape == t:
        return not_probabilities(y, task)
    if y.is_floating_point() and y.numel() == prod(t):
        return (
            f'The labels are floating-point numbers of shape {tuple(y.shape)}, one for each number in '
            f'the outputs, of shape {tuple(t)}, but the model predicts classes',
            f'{OTHER_KINDS}. Class probabilities must have the shape of the outputs',
        )
    if fit_labels(y, t, task) is None:
        if fits := [-1 if i == len(t) - 1 else i for i in fitting_axes(y, t)]:
            return (
                f'The outputs, of shape {tuple(t)}, have their classes along axis {task.axis}, but '
                f'the labels have shape {tuple(y.shape)}: they fit classes along axis '
                f'{" or ".join(map(str, fits))}',
                axis_to_pass(*fits),
            )
    wrong = y[(y != task.ignore_index) & ((y < 0) | (y >= n))]
    if len(wrong) and not y.is_floating_point():
        return (
            f'There is a label {wrong[0].item()}, but the outputs have {n} classes, 0 to {n - 1}',
            'Give the model as many outputs as there are classes. Set ignore_index of the loss '
            'function to the label that should be ignored',
        )
    return None


def not_labels(y: Tensor, task: Task) -> tuple[str, str] | None:
    """Return (what is wrong, what to do) for labels of a sigmoid that are not from 0 to 1."""
    wrong = y[((y < -ROUNDED) | (y > 1 + ROUNDED)) & (y != task.ignore_index)]
    if not len(wrong):
        return None
    return (
        f'There is a label {wrong[0].item():.4g}, but labels for a sigmoid are from 0 to 1',
        "For classes, use kind='softmax', and for numbers kind='regression'. If it marks labels to "
        'ignore, use a loss function that leaves them out, and give it the attribute ignore_index',
    )


def not_probabilities(y: Tensor, task: Task) -> tuple[str, str] | None:
    """Return (what is wrong, what to do) for labels with a number for each class that are not
    probabilities. A row of zeros is allowed, since cross-entropy ignores it.
    """
    total, least = y.float().sum(task.axis), y.min()
    wrong = total[((total - 1).abs() > ROUNDED) & (total != 0)]
    if not len(wrong) and least >= -ROUNDED:
        return None
    found = f'sum to {wrong[0].item():.4g}' if len(wrong) else f'are as low as {least.item():.4g}'
    return (
        f'The labels, of shape {tuple(y.shape)}, have a number for each class, but they are not '
        f'probabilities: they {found} along axis {task.axis}',
        OTHER_KINDS,
    )


def shapes_in_words(s: Sequence[int] | None, t: Sequence[int], y: Tensor | None) -> str:
    """Describe the shapes of the outputs and labels.

    Args:
        s: Shape of the student's outputs. None if unknown.
        t: Shape of the teacher's outputs.
        y: Labels. None if unknown.
    """
    labels = None if y is None else tuple(y.shape)
    shapes = dict(student=s and tuple(s), teacher=tuple(t), labels=labels)
    return ', '.join(f'{k} {v}' for k, v in shapes.items() if v is not None)


def axis_to_pass(*fits: int) -> str:
    axis = f', axis={fits[0]},' if len(fits) == 1 else ''
    return (
        f'Pass the class axis to KnowledgeDistillation, distill, check_teacher or Distiller{axis} '
        'or use a loss function with this axis, such as CrossEntropyLossFlat(axis=...)'
    )


def broadcasts(s: Sequence[int], t: Sequence[int]) -> bool:
    return len(s) == len(t) and all(a == b or 1 in (a, b) for a, b in zip(s, t))


def unscored(t: Sequence[int], y: Tensor | None, task: Task) -> Iterator[Finding]:
    """Yield a finding if the labels have an unexpected shape, which the loss function may
    accept.
    """
    if y is not None and fit_labels(y, t, task) is None:
        yield Finding(
            'note',
            f'The labels have shape {tuple(y.shape)}, but the outputs have shape {tuple(t)}, so the '
            "teacher's score cannot be measured",
            'If that is a mistake, training will stop with an error from the loss function',
        )
