"""Transformed teacher matching: only the teacher's logits are divided by the temperature."""

from functools import partial

from torch import Tensor

from ._base import log_probs, loss
from .response import kl_from_logs, reduce_positions, within

__all__ = ['ttm', 'wttm']


@loss(kind='softmax', match='shape', positionwise=True)
def ttm(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute KL(softmax(t/T) || softmax(s)), called transformed teacher matching (ICLR 2024,
    arXiv:2402.11148).

    The loss is 0 if the student's probabilities equal the teacher's softened probabilities. There
    is no factor T^2, because the student's logits are not divided by T.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature of the teacher's logits only.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    return reduce_positions(partial(ttm_values, T=T), s, t, axis, mask, reduction)


def ttm_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    return kl_from_logs(log_probs(within(t, s), T, axis), log_probs(s, 1.0, axis), axis)


@loss(kind='softmax', match='shape', positionwise=True)
def wttm(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute `ttm`, with each position weighted by the sum of softmax(t)^(1/T) over classes (ICLR
    2024, arXiv:2402.11148).

    The weight is 1 if the teacher is certain, and C^(1-1/T) if the teacher considers all C classes
    equally likely.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature of the teacher's logits only.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    return reduce_positions(partial(wttm_values, T=T), s, t, axis, mask, reduction)


def wttm_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    return wttm_weights(within(t, s), T, axis) * ttm_values(s, t, T, axis)


def wttm_weights(t: Tensor, T: float, axis: int) -> Tensor:
    """Return the weight of each position: the sum over classes of softmax(t)^(1/T)."""
    return (log_probs(t, 1.0, axis) / T).logsumexp(axis).exp()
