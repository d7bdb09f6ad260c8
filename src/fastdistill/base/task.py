"""Find out from a loss function what a model predicts, check which labels fit, and compute the
default task loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DistillError, check_choice
from .outputs import Draws, as_plain, check_axis

IGNORED = -100  # label that PyTorch's losses of classes ignore by default
# {kind of outputs: loss classes}; integrations for frameworks register further classes
CLASSES: dict[str, list[type]] = dict(
    softmax=[nn.CrossEntropyLoss],
    sigmoid=[nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss],
    regression=[nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss],
)
FUNCTIONS = {
    F.cross_entropy: 'softmax',
    F.binary_cross_entropy_with_logits: 'sigmoid',
    F.mse_loss: 'regression',
    F.l1_loss: 'regression',
    F.smooth_l1_loss: 'regression',
    F.huber_loss: 'regression',
}


WRAPPED: list[Callable] = [lambda lf: (lf.func, None) if isinstance(lf, partial) else None]


def register_losses(kind: str, *classes: type) -> None:
    """Register loss classes of a framework, so that `task_of` recognizes them.

    Args:
        kind: 'softmax', 'sigmoid' or 'regression'.
        *classes: Loss classes for outputs of this kind.
    """
    CLASSES[kind] += [c for c in classes if c not in CLASSES[kind]]


def register_wrapper(look: Callable) -> None:
    """Register a wrapper of losses, so that `task_of` can find the loss inside.

    Args:
        look: fn(loss) -> (inner loss, class axis or None). Returns None if `loss` is not such a
            wrapper.
    """
    WRAPPED.append(look)


@dataclass
class Task:
    """The kind of logits, the class axis, and the label that losses ignore.

    Attributes:
        kind: 'softmax', 'sigmoid' or 'regression'.
    """

    kind: str
    axis: int = 1
    ignore_index: int = IGNORED


def task_of(loss_func: Any, kind: str | None = None, axis: int | None = None) -> Task:
    """Return the `Task` of a loss function. If the loss is unknown, `kind` is required.

    Args:
        loss_func: A loss of PyTorch, a loss registered by an integration, or a partial or subclass
            of these.
        kind: Kind of outputs, for a loss function that is not recognized.
    """
    check_axis(axis)
    lf, own_axis = innermost(loss_func)
    if kind is None and (kind := kind_of(lf)) is None:
        raise DistillError(unknown_loss(lf))
    if axis is None:
        axis = getattr(lf, 'axis', 1) if own_axis is None else own_axis
    return Task(kind, axis, ignored_label(loss_func))


def ignored_label(loss_func: Any) -> int:
    """Return the label that a loss function ignores, according to its attribute or argument
    `ignore_index`.
    """
    lf, _ = innermost(loss_func)
    ignore = getattr(lf, 'ignore_index', None)
    if ignore is None and isinstance(loss_func, partial):
        ignore = loss_func.keywords.get('ignore_index')
    return IGNORED if ignore is None else ignore


def innermost(loss: Any) -> tuple[Any, int | None]:
    """Return the loss inside all wrappers, and the class axis of the outermost wrapper that has a
    class axis.
    """
    axes: list[int] = []
    while inner := next((o for look in WRAPPED if (o := look(loss)) is not None), None):
        loss, axis = inner
        if axis is not None:
            axes.append(axis)
    return loss, (axes[0] if axes else None)


def kind_of(loss: Any) -> str | None:
    """Return the kind of outputs that an unwrapped loss takes. Return None if unknown."""
    known = FUNCTIONS.get(loss) if callable(loss) and getattr(loss, '__hash__', None) else None
    return known or next(
        (k for k, classes in CLASSES.items() if isinstance(loss, tuple(classes))), None
    )


def task_for(
    loss: Any, kind: str | None = None, axis: int | None = None, ignore_index: int | None = None
) -> Task:
    """Build the `Task` from options. Options that are None are taken from the task loss. The
    default is a softmax over axis 1.

    Args:
        loss: The task loss. None for the default loss of this kind.
    """
    if kind is not None:
        check_choice('kind', kind, CLASSES)
    check_axis(axis)
    lf, _ = innermost(loss)
    known = kind_of(lf)
    if None not in (kind, known) and kind != known:
        raise DistillError(
            f'kind={kind!r}, but task_loss={loss!r} is for kind={known!r}: one of the two is wrong'
        )
    default = None if takes_probabilities(lf) else 'softmax'
    task = Task(kind or 'softmax') if loss is None else task_of(loss, kind or known or default)
    given: dict[str, Any] = dict(axis=axis, ignore_index=ignore_index)
    return replace(task, **{k: v for k, v in given.items() if v is not None})


def takes_probabilities(lf: Any) -> bool:
    return isinstance(lf, (nn.BCELoss, nn.NLLLoss)) or lf in (F.binary_cross_entropy, F.nll_loss)


def shape_of_labels(shape: Sequence[int], axis: int) -> tuple:
    """Return the shape of the labels, which is the shape of the logits without the class axis.

    Args:
        shape: Shape of the logits.
        axis: Class axis of the logits.
    """
    axis = axis % len(shape)
    return (*shape[:axis], *shape[axis + 1 :])


def label_axis(shape: Sequence[int], task: Task) -> int:
    """Return the axis of the classes, or of the labels of a sigmoid.

    fastai's flat losses report axis -1 for any shape, but the labels of masks (B, L, H, W) are on
    axis 1.

    Args:
        shape: Shape of the logits.
    """
    masks = task.kind == 'sigmoid' and task.axis == -1 and len(shape) > 3
    return 1 if masks else task.axis % len(shape)


def facts_of_outputs(shape: Sequence[int], task: Task) -> dict:
    """Return a dict with `kind`, `classes` and `dense`. `classes` is the number of classes of a
    softmax, 1 for a single sigmoid label, and None otherwise. `dense` is True if each sample has
    many predictions.

    Args:
        shape: Shape of the logits.
    """
    has_axis = task.kind == 'softmax' and -len(shape) <= task.axis < len(shape)
    single = task.kind == 'sigmoid' and prod(shape[1:2]) == 1
    classes = shape[task.axis] if has_axis else 1 if single else None
    positions = prod(shape[1:]) / classes if classes else prod(shape[2:])
    return dict(kind=task.kind, classes=classes, dense=positions > 1)


def fit_labels(y: Tensor, shape: Sequence[int], task: Task) -> Tensor | None:
    """Convert labels to the shape of the predictions, as class indices for a softmax. Return None
    if the labels do not fit.

    For numbers and for sigmoid labels, the shapes of labels and logits may differ if they have the
    same number of values. They may differ in axes of length 1. The values of the batch, or of each
    sample, may also be flat: points (B, N, 2) fit outputs (B, 2N).

    Args:
        y: Labels of a batch.
        shape: Shape of the logits.
    """
    squeezed = lambda s: [n for n in s if n != 1]
    if task.kind != 'softmax':
        fewest = min(y.dim(), len(shape))
        flat = fewest <= 1 or fewest == 2 and y.shape[0] == shape[0]
        fits = flat or squeezed(y.shape) == squeezed(shape)
        return y.reshape(shape) if fits and y.numel() == prod(shape) else None
    if not -len(shape) <= task.axis < len(shape):
        return None
    # labels with a probability for each class
    if y.is_floating_point():
        return y.argmax(task.axis) if y.shape == shape else None
    wanted = shape_of_labels(shape, task.axis)
    fits = squeezed(y.shape) == squeezed(wanted) or y.shape == (prod(wanted),)
    return y.long().reshape(wanted) if fits else None


def fitting_axes(y: Tensor, shape: Sequence[int], kind: str = 'softmax') -> list:
    """Return all class axes for which these labels fit these logits.

    Args:
        y: Labels of a batch.
        shape: Shape of the logits.
    """
    return [i for i in range(1, len(shape)) if fit_labels(y, shape, Task(kind, i)) is not None]


def labels_loss(s: Tensor, y: Tensor, *more: Any, task: Task) -> Tensor:
    """Compute the default task loss: cross-entropy, binary cross-entropy or squared error.

    Args:
        s: Student logits.
        y: Labels.
    """
    if more:
        raise DistillError(
            f'These batches have {1 + len(more)} targets: pass task_loss=, a function of the '
            'logits and all targets'
        )
    s, y = as_plain(s), as_plain(y)
    if task.kind == 'softmax' and y.is_floating_point() and y.shape == s.shape:
        return F.cross_entropy(s.movedim(task.axis, 1), y.movedim(task.axis, 1))
    if (fitted := fit_labels(y, s.shape, task)) is None:
        raise DistillError(unfit_labels(y, s.shape, task))
    if task.kind != 'softmax' and task.ignore_index != IGNORED:
        raise DistillError(
            f"ignore_index={task.ignore_index} is for classes, but the model's kind is {task.kind!r}: "
            'pass task_loss=, a function of the logits and labels that leaves out the ignored ones.'
        )
    if task.kind == 'sigmoid':
        return F.binary_cross_entropy_with_logits(s, fitted.to(s.dtype))
    if task.kind == 'regression':
        return F.mse_loss(s, fitted.to(s.dtype))
    return F.cross_entropy(s.movedim(task.axis, 1), fitted, ignore_index=task.ignore_index)


def unfit_labels(y: Any, shape: Sequence[int], task: Task) -> str:
    """Describe why the labels do not fit, and how to fix it."""
    if task.kind != 'softmax':
        return (
            f"The labels have shape {tuple(y.shape)}, the student's outputs {tuple(shape)}: both "
            'need the same number of values per sample'
        )
    if y.is_floating_point():
        return f'{float_labels(y)} {CLASS_NUMBERS}'
    axes = fitting_axes(y, shape)
    fits = ''
    if axes:
        fits = f' They fit classes along axis {" or ".join(map(str, axes))}: pass axis={axes[0]}.'
    return (
        f'The logits, of shape {tuple(shape)}, have their classes on axis {task.axis}, '
        f'but the labels have shape {tuple(y.shape)}.{fits}'
    )


CLASS_NUMBERS = (
    'Classes are whole numbers: y.long() converts them. If the model predicts numbers, pass '
    "kind='regression'; if each column is a separate label, pass kind='sigmoid'."
)


def float_labels(y: Any) -> str:
    dtype = str(y.dtype).removeprefix('torch.')
    return f'The labels, of shape {tuple(y.shape)}, are fractional numbers ({dtype}), but the model predicts classes.'


def unknown_loss(lf: Any) -> str:
    name = getattr(lf, '__name__', type(lf).__name__)
    if isinstance(lf, nn.BCELoss) or lf is F.binary_cross_entropy:
        return (
            f"The student's loss {name} takes probabilities, so the model ends in a sigmoid. "
            'Distillation needs the outputs before it: end the model with the last linear layer '
            'and use BCEWithLogitsLossFlat.'
        )
    if isinstance(lf, nn.NLLLoss) or lf is F.nll_loss:
        return (
            f"The student's loss {name} takes log-probabilities, which are also logits: pass "
            "kind='softmax' and axis=..."
        )
    wanted = (
        "pass kind='softmax' (classes, along axis=), 'sigmoid' (labels) or 'regression' (numbers)."
    )
    if lf is None:
        return (
            'There is no loss function that shows what the model predicts. Set loss_func of the '
            f'Learner or of its DataLoaders, or in Python: {wanted}'
        )
    return (
        f"The student's loss {name} does not show what the student predicts: {wanted} "
        'If the loss ignores a label, give it the attribute ignore_index, so that distillation ignores this label too.'
    )


def unusable(logits: Tensor, task: Task) -> Tensor:
    """Return a bool tensor that is True if logits contain nan or infinite values. Values of -inf
    are allowed, because they exclude classes.

    Args:
        logits: Logits with classes along `task.axis`.
        task: The `Task` that describes the logits.
    """
    v = logits.detach()
    # the largest logit is nan if any logit is nan, and -inf if all classes are excluded
    softmax = task.kind == 'softmax' and -v.dim() <= task.axis < v.dim()
    # the sum is nan or infinite if any value is, and needs only one pass
    total = (v.amax(task.axis) if softmax else v).sum(dtype=torch.float)
    return ~total.isfinite() if softmax else total.isnan() | (total == torch.inf)


def pseudo_labels(t: Tensor, s: Tensor, task: Task) -> Tensor:
    """Convert the teacher's predictions to labels for the task loss.

    Args:
        t: Teacher logits, or stored outputs from which they can be computed.
        s: Student logits.
    """
    if isinstance(t, Draws):
        return t.ids[..., 0]  # the class drawn most often
    if not isinstance(t, Tensor):
        t = t.dense(s)
    if t.shape != s.shape:
        t = s.detach()  # subtle: a teacher without a head has no predictions, so use the student's
    if task.kind == 'softmax':
        return t.argmax(task.axis)
    return (t > 0).to(s.dtype) if task.kind == 'sigmoid' else t.to(s.dtype)
