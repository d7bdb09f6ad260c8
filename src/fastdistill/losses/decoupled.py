"Losses that treat the class of the label and the other classes separately."

import torch
from torch import Tensor

from ..base.outputs import DistillError, as_plain
from ._base import class_axis, expect, fit_mask, log_probs, loss, reduce
from .response import checked_classes, kl_from_logs, positions, select_class

__all__ = ['dkd', 'nkd', 'rld']


def checked_labels(
    y: Tensor, s: Tensor, axis: int, ignore_index: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the labels. Return one class per position, and a mask that excludes positions whose
    label is `ignore_index`.
    """
    y, axis = as_plain(y), class_axis(s, axis)
    shape, n = positions(s, axis), s.shape[axis]
    if y.is_floating_point() or y.is_complex():
        raise DistillError(
            f"Labels of {y.dtype}: this loss treats the label's class separately, so it needs one class "
            '(an integer) per position. Mixed or smoothed labels have none: use kl, jsd or dist, or '
            'pass the plain labels.'
        )
    if y.shape == (*shape, 1):
        y = y[..., 0]  # tabular targets are (B, 1)
    if y.shape != shape:
        raise DistillError(
            f'Labels of shape {tuple(y.shape)} do not fit logits of shape {tuple(s.shape)}: with the '
            f'classes on axis {axis} they have shape {tuple(shape)}'
        )
    y = y.long()
    keep = y != ignore_index
    if mask is not None:
        keep = keep * fit_mask(mask, shape)
    y = y.where(keep > 0, 0)
    # subtle: check the range only on a CPU and in eager mode. The check would force a
    # synchronization on a GPU, and would break the graph of torch.compile.
    if (
        y.is_cpu
        and not torch.compiler.is_compiling()
        and y.numel()
        and not 0 <= y.min() <= y.max() < n
    ):
        raise DistillError(
            f'Labels from {y.min()} to {y.max()} for {n} classes. Use ignore_index (now '
            f'{ignore_index}) or mask to exclude labels'
        )
    return y, keep


def without_class(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Set `x` to -inf at class `y`, so that a softmax or logsumexp covers exactly the other
    classes.
    """
    axis = class_axis(x, axis)
    return x.masked_fill(
        torch.zeros_like(x, dtype=torch.bool).scatter(axis, y.unsqueeze(axis), True), -torch.inf
    )


@loss(kind='softmax', match='shape')
def dkd(
    s: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    T: float = 4.0,
    axis: int = 1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 times the sum of two KLs (decoupled distillation, CVPR 2022, arXiv:2203.08679).
    The first KL compares (p_y, 1-p_y) and has weight alpha. The second KL compares the softmax over
    the classes other than y and has weight beta.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        y: Labels. Same shape as `s` without the class axis.
        alpha: Weight of the KL between the probabilities of the target class.
        beta: Weight of the part that compares the other classes.
        T: Temperature.
        axis: Class axis.
        ignore_index: Positions with this label are excluded.
        mask: Positions to include in the loss. Same shape as `y`.
    """
    y, mask = checked_labels(y, s, axis, ignore_index, mask)
    s, t = checked_classes(s, t, axis, mask)
    ls, lt = [_target_or_not(log_probs(x, T, axis), y, axis) for x in (s, t)]
    os, ot = [log_probs(without_class(x, y, axis), T, axis) for x in (s, t)]
    return reduce(
        (alpha * kl_from_logs(lt, ls, 0) + beta * kl_from_logs(ot, os, axis)) * T**2,
        reduction,
        mask,
    )


def _target_or_not(lp: Tensor, y: Tensor, axis: int) -> Tensor:
    """Compute log p_y and log(1-p_y), without the cancellation in 1-p_y."""
    return torch.stack([select_class(lp, y, axis), without_class(lp, y, axis).logsumexp(axis)])


@loss(kind='softmax', match='shape')
def nkd(
    s: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    gamma: float = 1.5,
    T: float = 1.0,
    axis: int = 1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute -p_t^y log p_s^y plus gamma T^2 times a cross-entropy (normalized distillation, ICCV
    2023, arXiv:2303.13005). The cross-entropy compares the softmax over the classes other than y.

    The minimum is gamma T^2 times the entropy of the teacher's softmax over the other classes. The
    student reaches this minimum if it predicts y with probability 1 and matches the teacher on the
    other classes.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        y: Labels. Same shape as `s` without the class axis.
        gamma: Weight of the part that compares the other classes.
        T: Temperature of the part that compares the other classes. The target class has no
            temperature.
        axis: Class axis.
        ignore_index: Positions with this label are excluded.
        mask: Positions to include in the loss. Same shape as `y`.
    """
    y, mask = checked_labels(y, s, axis, ignore_index, mask)
    s, t = checked_classes(s, t, axis, mask)
    ls, lt = [select_class(log_probs(x, 1.0, axis), y, axis) for x in (s, t)]
    os, ot = [log_probs(without_class(x, y, axis), T, axis) for x in (s, t)]
    return reduce(expect(lt, -ls) + gamma * T**2 * expect(ot, -os).sum(axis), reduction, mask)


@loss(kind='softmax', match='shape')
def rld(
    s: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    T: float = 4.0,
    alpha_T: float | None = None,
    axis: int = 1,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the two-part loss of refined logit distillation (ICCV 2025, arXiv:2408.07703).

    The first part is alpha_T^2 alpha KL between the teacher's (max p_t, 1 - max p_t) and the
    student's (p_s^y, 1-p_s^y). The second part is T^2 beta KL between softmaxes over the classes
    that the teacher considers less likely than y.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        y: Labels. Same shape as `s` without the class axis.
        alpha: Weight of the first part, which compares the student's probability of the label with
            the teacher's highest probability.
        beta: Weight of the second part, which compares the classes less likely than the label.
        T: Temperature.
        alpha_T: Temperature of the first part. None to use `T`.
        axis: Class axis.
        ignore_index: Positions with this label are excluded.
        mask: Positions to include in the loss. Same shape as `y`.
    """
    y, mask = checked_labels(y, s, axis, ignore_index, mask)
    s, t = checked_classes(s, t, axis, mask)
    A = T if alpha_T is None else alpha_T
    best, label = [
        _target_or_not(log_probs(x, A, axis), k, axis) for x, k in ((t, t.argmax(axis)), (s, y))
    ]
    ruled_out = (t == -torch.inf) | (s == -torch.inf)
    out = ruled_out | (t >= select_class(t, y, axis).unsqueeze(axis))
    none = out.all(
        axis,
        keepdim=True,
        # positions where the teacher considers no class less likely than the label; their second part
        # is 0
    )
    os, ot = [
        log_probs(x.masked_fill(out, -torch.inf).masked_fill(none, 0.0), T, axis) for x in (s, t)
    ]
    below = kl_from_logs(ot, os, axis).masked_fill(none.squeeze(axis), 0.0)
    return reduce(
        alpha * A**2 * kl_from_logs(best, label, 0) + beta * T**2 * below, reduction, mask
    )
