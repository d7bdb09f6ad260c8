"""Further divergences: KL to mixtures of both models, and divergences between forward and reverse KL."""

from functools import partial

from torch import Tensor

from ..base.outputs import DistillError
from ._base import expect, log_probs, loss
from .response import kl, kl_from_logs, kl_values, mixture, reduce_positions, reverse_kl, within

__all__ = ['skewed_kl', 'taid', 'abkd']


@loss(kind='softmax', match='shape', positionwise=True)
def skewed_kl(
    s: Tensor,
    t: Tensor,
    *,
    lam: float = 0.1,
    reverse: bool = False,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the skewed KL, T^2 KL(p_t || lam p_t + (1-lam) p_s), whose gradient is bounded
    (DistiLLM, ICML 2024, arXiv:2402.03898).

    With `reverse=True`, the loss is T^2 KL(p_s || lam p_s + (1-lam) p_t).

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        lam: Weight of the first distribution in the mixture, from 0 (plain KL) to below 1.
        reverse: If True, swap the roles of the student's and the teacher's probabilities.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    if not 0 <= lam < 1:
        raise DistillError(
            f'lam={lam}: the weight of the first distribution must be at least 0 and below 1'
        )
    if lam == 0:
        return (reverse_kl if reverse else kl)(s, t, T=T, axis=axis, mask=mask, reduction=reduction)
    return reduce_positions(
        partial(skewed_values, lam=lam, reverse=reverse, T=T),
        s,
        t,
        axis,
        mask,
        reduction,
        scale=T**2,
    )


def skewed_values(s: Tensor, t: Tensor, lam: float, reverse: bool, T: float, axis: int) -> Tensor:
    ls, lt = log_probs(s, T, axis), log_probs(t, T, axis)
    a, b = (ls, lt) if reverse else (lt, ls)
    return kl_from_logs(a, mixture(a, b, lam), axis)


@loss(kind='softmax', match='shape', positionwise=True)
def taid(
    s: Tensor,
    t: Tensor,
    *,
    lam: float = 1.0,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 KL(softmax(m/T) || softmax(s/T)), where m = (1-lam) s + lam t without a gradient
    (TAID, ICLR 2025, arXiv:2501.16937).

    As `lam` grows, the target moves from the student to the teacher.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        lam: Weight of the teacher in the target, from 0 to 1. A `Term` takes a schedule, e.g.
            ('linear', .4, 1.).
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    if not 0 <= lam <= 1:
        raise DistillError(
            f'lam={lam}: the weight of the teacher in the target must be between 0 and 1'
        )
    return reduce_positions(
        partial(taid_values, lam=lam, T=T), s, t, axis, mask, reduction, scale=T**2
    )


def taid_values(s: Tensor, t: Tensor, lam: float, T: float, axis: int) -> Tensor:
    # subtle: at lam 0 and 1, use the logits of only one model, because 0 * inf is nan
    target = t if lam == 1 else s.detach() if lam == 0 else (1 - lam) * s.detach() + lam * t
    return kl_values(s, target, T, axis)


@loss(kind='softmax', match='shape', positionwise=True)
def abkd(
    s: Tensor,
    t: Tensor,
    *,
    alpha: float = 0.8,
    beta: float = 0.3,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 times the alpha-beta divergence of the probabilities (ABKD, ICML 2025,
    arXiv:2505.04560).

    With a = alpha, b = beta and c = a + b, the divergence is 1/(ab) times the sum over classes of
    a/c p_t^c + b/c p_s^c - p_t^a p_s^b. If a or b is 0, the limit of this formula is used.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        alpha: Exponent of the teacher's probabilities.
        beta: Exponent of the student's probabilities. The loss equals `kl` for alpha=1 and beta=0,
            `reverse_kl` for alpha=0 and beta=1, and 4 times the squared Hellinger distance for
            alpha=0.5 and beta=0.5.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise DistillError(
            f'alpha={alpha}, beta={beta}: both must be at least 0, and at least one of them above 0'
        )
    return reduce_positions(
        partial(abkd_values, alpha=alpha, beta=beta, T=T), s, t, axis, mask, reduction, scale=T**2
    )


def abkd_values(s: Tensor, t: Tensor, alpha: float, beta: float, T: float, axis: int) -> Tensor:
    # subtle: leave out classes with logit -inf, as in `kl` and `reverse_kl`, because they would
    # make the limit infinite
    a, b = within(t, s) if beta == 0 else t, within(s, t) if alpha == 0 else s
    return ab_divergence(log_probs(a, T, axis), log_probs(b, T, axis), alpha, beta).sum(axis)


def ab_divergence(lp: Tensor, lq: Tensor, a: float, b: float) -> Tensor:
    """Compute the summands of the alpha-beta divergence from the log-probabilities of two
    distributions.
    """
    if a == 0:
        return ab_divergence(lq, lp, b, 0)
    if b == 0:
        return expect(a * lp, lp - lq) / a - ((a * lp).exp() - (a * lq).exp()) / a**2
    c = a + b
    return (a / c * (c * lp).exp() + b / c * (c * lq).exp() - (a * lp + b * lq).exp()) / (a * b)
