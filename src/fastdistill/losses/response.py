"""Losses between the outputs of two models, such as (B, C), (B, C, H, W) or (B, L, V). `axis` is
the class axis.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import DistillError, check_choice
from ..base.outputs import Draws
from ._base import (
    KINDS,
    Loss,
    _full,
    at_temperature,
    class_axis,
    expect,
    fit_mask,
    log_probs,
    loss,
    reduce,
    same_shape,
    temperature,
)
from .chunks import all_finite, on_cpu_without_gradient, per_position, seen_finite
from .correlations import both_correlations

__all__ = [
    'kl',
    'reverse_kl',
    'jsd',
    'tvd',
    'soft_ce',
    'mse',
    'hard',
    'binary_kl',
    'regression',
    'soft_targets',
    'uld',
    'dist',
    'standardize',
    'standardized',
]


def positions(x: Tensor, axis: int) -> torch.Size:
    return x.shape[:axis] + x.shape[axis + 1 :]


def blank(mask: Tensor, *xs: Tensor) -> list[Tensor]:
    """Replace masked values of `xs` with 0, so that a nan at a masked position affects neither the
    loss nor the gradient.
    """
    return [x.where(mask > 0, 0.0) for x in xs]


def checked_pair(s: Tensor, t: Tensor, axis: int, mask: Tensor | None) -> Sequence[Tensor]:
    """Check the logits of both models and replace masked positions with 0."""
    same_shape(s, t)
    axis = class_axis(s, axis)
    return (
        (s, t) if mask is None else blank(fit_mask(mask, positions(s, axis)).unsqueeze(axis), s, t)
    )


def check_classes(s: Tensor, axis: int) -> None:
    """Raise a DistillError if there are fewer than two classes."""
    if s.shape[class_axis(s, axis)] < 2:
        raise DistillError(
            f'Outputs of shape {tuple(s.shape)} have 1 class on axis {axis}. Its softmax is always '
            '1, so there is nothing to learn. Is it one label, or a number? Use binary_kl or '
            'regression. Is a different axis the class axis? Pass axis.'
        )


def checked_classes(s: Tensor, t: Tensor, axis: int, mask: Tensor | None) -> Sequence[Tensor]:
    """Check the logits as `checked_pair` does. Also check that there are at least two classes."""
    check_classes(s, axis)
    return checked_pair(s, t, axis, mask)


def reduce_positions(
    values: Callable,
    s: Tensor,
    t: Tensor,
    axis: int,
    mask: Tensor | None,
    reduction: str,
    slope: Callable | None = None,
    scale: float = 1.0,
    both: Callable | None = None,
) -> Tensor:
    """Compute and reduce a loss whose value at each position depends only on the logits at that
    position. For `values`, `slope` and `both`, see `per_position`.
    """
    check_classes(s, axis)
    same_shape(s, t)
    if mask is not None:
        mask = fit_mask(mask, positions(s, class_axis(s, axis)))
    return reduce(per_position(values, s, t, axis, mask, slope, both) * scale, reduction, mask)


def within(x: Tensor, other: Tensor) -> Tensor:
    """Set `x` to -inf for classes that are -inf in `other`. The probabilities of the remaining
    classes then sum to 1.
    """
    return x.masked_fill(other == -torch.inf, -torch.inf)


def kl_from_logs(a: Tensor, b: Tensor, axis: int) -> Tensor:
    return expect(a, a - b).sum(axis)


def mixture(a: Tensor, b: Tensor, lam: float) -> Tensor:
    """Compute log(lam exp(a) + (1-lam) exp(b))."""
    # subtle: the gradient of logaddexp is nan where both inputs are -inf
    low = torch.finfo(a.dtype).min / 4
    return torch.logaddexp(a.clamp_min(low) + math.log(lam), b.clamp_min(low) + math.log(1 - lam))


def select_class(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Select `x` at class `y`. The result has no class axis."""
    axis = class_axis(x, axis)
    return x.gather(axis, y.unsqueeze(axis)).squeeze(axis)


@loss(kind='softmax', match='shape', positionwise=True, linear=True)
def kl(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 KL(softmax(t/T) || softmax(s/T)), called soft targets (Hinton, Vinyals and Dean
    2015, arXiv:1503.02531).

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    slope = partial(kl_slope, T=T)
    drawn = isinstance(t, Draws)
    values = partial(drawn_kl if drawn else kl_values, T=T)
    both = None if drawn else partial(kl_both, T=T)
    return reduce_positions(values, s, t, axis, mask, reduction, slope, T**2, both)


def kl_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    if on_cpu_without_gradient(s, t):
        values = kl_of_finite(s, t, T, axis)[0]
        if all_finite(values):
            return values
    return kl_from_logs(log_probs(within(t, s), T, axis), log_probs(s, T, axis), axis)


def kl_of_finite(s: Tensor, t: Tensor, T: float, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the KL of finite logits with few passes over memory. If a logit is infinite, the
    result at its position is inf or nan.

    Returns:
        (KL of each position, log-probabilities of the student, probabilities of the teacher).
    """
    ls, lt = log_probs(s, T, axis), log_probs(t, T, axis)
    p = lt.exp()
    return torch.linalg.vecdot(p, lt.sub_(ls), dim=axis), ls, p


def kl_both(s: Tensor, t: Tensor, T: float, axis: int) -> tuple[Tensor, Tensor]:
    """Compute `kl_values` and `kl_slope` together."""
    if on_cpu_without_gradient(s, t):
        values, ls, p = kl_of_finite(s, t, T, axis)
        if all_finite(values):
            return values, at_temperature(ls.exp_().sub_(p), T)
    return kl_values(s, t, T, axis), kl_slope(s, t, T, axis)


def drawn_ce(s: Tensor, t: Draws, T: float, axis: int) -> Tensor:
    """Compute an unbiased estimate of the cross-entropy with the teacher from draws (sampled
    classes).
    """
    if temperature(T) != t.T:
        raise DistillError(t.refusal('the loss', T))
    # the frequencies of a position add up to 1
    return -torch.linalg.vecdot(t.freqs, log_probs(s, T, axis).gather(axis, t.ids), dim=axis)


def drawn_kl(s: Tensor, t: Draws, T: float, axis: int) -> Tensor:
    """Compute an unbiased estimate of the KL from draws. The exact entropy of the teacher is stored
    with the draws.
    """
    return drawn_ce(s, t, T, axis) - t.entropy


def kl_slope(s: Tensor, t: Any, T: float, axis: int) -> Tensor:
    """Compute the gradient of `kl_values` with respect to `s`."""
    if not (drawn := isinstance(t, Draws)) and not seen_finite(s):
        t = within(t, s)
    slope = at_temperature(s, T).softmax(axis)
    if drawn:
        slope.scatter_add_(axis, t.ids, -t.freqs)
    else:
        slope.sub_(at_temperature(t, T).softmax(axis))
    return slope if T == 1 else slope.div_(T)


@loss(kind='softmax', match='shape', positionwise=True)
def reverse_kl(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 KL(softmax(s/T) || softmax(t/T)) (MiniLLM, arXiv:2306.08543).

    The student learns to predict only classes that the teacher considers likely.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    return reduce_positions(partial(reverse_values, T=T), s, t, axis, mask, reduction, scale=T**2)


def reverse_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    return kl_from_logs(log_probs(within(s, t), T, axis), log_probs(t, T, axis), axis)


@loss(kind='softmax', match='shape', positionwise=True)
def jsd(
    s: Tensor,
    t: Tensor,
    *,
    beta: float = 0.5,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the generalized Jensen-Shannon divergence, T^2 (beta KL(p_t || m) + (1-beta) KL(p_s
    || m)), where m = beta p_t + (1-beta) p_s (GKD, arXiv:2306.13649).

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        beta: Weight of the teacher in the mixture. 0 gives `kl` and 1 gives `reverse_kl`.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    if not 0 <= beta <= 1:
        raise DistillError(
            f'beta={beta}: the weight of the teacher in the mixture must be between 0 and 1'
        )
    # subtle: at beta 0 and 1, the formula is 0.
    # Return the limit of the formula divided by beta or 1-beta, which is a KL, as TRL does.
    if beta in (0, 1):
        return (reverse_kl if beta else kl)(s, t, T=T, axis=axis, mask=mask, reduction=reduction)
    return reduce_positions(
        partial(jsd_values, beta=beta, T=T), s, t, axis, mask, reduction, scale=T**2
    )


def jsd_values(s: Tensor, t: Tensor, beta: float, T: float, axis: int) -> Tensor:
    ls, lt = log_probs(s, T, axis), log_probs(t, T, axis)
    lm = mixture(lt, ls, beta)
    return beta * kl_from_logs(lt, lm, axis) + (1 - beta) * kl_from_logs(ls, lm, axis)


@loss(kind='softmax', match='shape', positionwise=True)
def tvd(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the total variation distance T^2/2 |softmax(t/T) - softmax(s/T)|, which is at most
    T^2 (f-distill, arXiv:2307.15190).

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    return reduce_positions(partial(tvd_values, T=T), s, t, axis, mask, reduction, scale=T**2)


def tvd_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    return (log_probs(s, T, axis).exp() - log_probs(t, T, axis).exp()).abs().sum(axis) / 2


@loss(kind='softmax', match='grid')
def uld(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 |sort(softmax(t/T)) - sort(softmax(s/T))|, with the smaller vocabulary padded
    with zeros (universal logit distillation, TMLR 2025, arXiv:2402.12030).

    The loss compares the sorted probabilities and ignores which class has which probability. Values
    range from 0 to 2 T^2.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, with the same positions and any number of classes.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    check_classes(s, axis)
    shape = positions(s, class_axis(s, axis))
    if s.dim() != t.dim() or shape != positions(t, class_axis(t, axis)):
        raise DistillError(
            f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: the "
            f'numbers of classes (axis {axis}) may differ, but the positions must be the same. Texts '
            "that two tokenizers cut into different numbers of tokens can't be compared token by token."
        )
    if mask is not None:
        mask = fit_mask(mask, shape)
    return reduce(per_position(partial(uld_values, T=T), s, t, axis, mask) * T**2, reduction, mask)


def uld_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    axis = class_axis(s, axis)
    p, q = [
        log_probs(x, T, axis).exp().sort(axis, descending=True).values.movedim(axis, -1)
        for x in (s, t)
    ]
    n = max(p.shape[-1], q.shape[-1])
    p, q = [F.pad(x, (0, n - x.shape[-1])) for x in (p, q)]
    return (p - q).abs().sum(-1)


@loss(kind='softmax', match='shape', positionwise=True, linear=True)
def soft_ce(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 times the cross-entropy with soft targets (arXiv:1503.02531).

    The loss equals `kl` plus T^2 times the entropy of the teacher's probabilities. Both losses have
    the same gradient.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    values = drawn_ce if isinstance(t, Draws) else ce_values
    return reduce_positions(
        partial(values, T=T), s, t, axis, mask, reduction, partial(kl_slope, T=T), T**2
    )


def ce_values(s: Tensor, t: Tensor, T: float, axis: int) -> Tensor:
    return expect(log_probs(within(t, s), T, axis), -log_probs(s, T, axis)).sum(axis)


@loss(kind=None, match='shape')
def mse(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the squared distance between the logits, summed over classes (Ba and Caruana 2014,
    arXiv:1312.6184).

    This loss has no temperature, because dividing the logits by T and multiplying the loss by T^2
    would cancel.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    s, t = checked_pair(s, t, axis, mask)
    return reduce((s - t).pow(2).sum(axis), reduction, mask)


@loss(kind='softmax', match='shape')
def hard(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the cross-entropy with the class that the teacher predicts (DeiT, arXiv:2012.12877).

    The loss is 0 if the student predicts that class with probability 1.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        axis: Class axis.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
    """
    s, t = checked_classes(s, t, axis, mask)
    return reduce(
        -select_class(log_probs(s, 1.0, axis), within(t, s).argmax(axis), axis), reduction, mask
    )


@loss(kind='sigmoid', match='shape')
def binary_kl(
    s: Tensor, t: Tensor, *, T: float = 4.0, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute T^2 KL(sigmoid(t/T) || sigmoid(s/T)) for each label, called soft targets for
    multi-label models.

    Args:
        s: Student logits, any shape, one per label.
        t: Teacher logits, the same shape.
        T: Temperature.
        mask: Labels to include in the loss. Same shape as `s`.
    """
    same_shape(s, t)
    if mask is not None:
        s, t = blank(fit_mask(mask, s.shape), s, t)
    s, t = s / temperature(T), t / T
    yes, no = [
        expect(F.logsigmoid(b), F.logsigmoid(b) - F.logsigmoid(a)) for a, b in ((s, t), (-s, -t))
    ]
    return reduce((yes + no) * T**2, reduction, mask)


DISTANCES: dict[str, Callable] = dict(mse=F.mse_loss, l1=F.l1_loss, huber=F.huber_loss)


@loss(kind='regression', match='shape', samples=True)
def regression(
    s: Tensor,
    t: Tensor,
    *,
    distance: str = 'mse',
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the distance between predicted numbers, averaged over the numbers of each sample.

    Shapes may differ as long as each sample has the same number of values. For example, (B,) can be
    compared with (B, 1), and (B, n, 2) with (B, 2n).

    Args:
        s: Student's numbers, (B, ...).
        t: Teacher's numbers, (B, ...), with the same number of values per sample.
        distance: 'mse', 'l1' or 'huber' (quadratic up to a distance of 1).
        mask: Samples to include in the loss, (B,).
    """
    check_choice('distance', distance, DISTANCES)
    if s.shape[:1] != t.shape[:1] or s.numel() != t.numel():
        raise DistillError(
            f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: "
            'both need the same number of samples and the same number of values per sample'
        )
    s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
    if mask is not None:
        s, t = blank(fit_mask(mask, s.shape[:1])[:, None], s, t)
    return reduce(DISTANCES[distance](s, t, reduction='none').mean(1), reduction, mask)


@loss(kind=None, match='shape', positionwise=True, linear=True)
def soft_targets(
    s: Tensor,
    t: Tensor,
    *,
    kind: str = 'softmax',
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute `kl`, `binary_kl` or `regression`, depending on the kind of output.

    Args:
        s: Student outputs before softmax or sigmoid.
        t: Teacher outputs before softmax or sigmoid.
        kind: 'softmax' over classes, 'sigmoid' per label, or 'regression'.
        T: Temperature. Ignored for regression.
        axis: Class axis. Used only for softmax.
        mask: As in `kl`, `binary_kl` or `regression`.
    """
    check_choice('kind', kind, KINDS)
    if kind == 'softmax':
        return kl(s, t, T=T, axis=axis, mask=mask, reduction=reduction)
    if kind == 'sigmoid':
        return binary_kl(s, t, T=T, mask=mask, reduction=reduction)
    return regression(s, t, mask=mask, reduction=reduction)


@loss(kind='softmax', match='shape', relates=True)
def dist(
    s: Tensor,
    t: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    T: float = 1.0,
    axis: int = 1,
    eps: float = 1e-8,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 (beta (1 - r_p) + gamma (1 - r_c)) (DIST, NeurIPS 2022, arXiv:2205.10536). Here
    r_p is the Pearson correlation over the classes of a position, and r_c is the Pearson
    correlation over the positions of a class.

    At s == t, the loss is 0 except for the effect of `eps`. A class whose probability is the same
    at all positions has r_c = 0 and no gradient, as in the authors' code. With a single position,
    every class has r_c = 0. With two positions, r_c is always 1 or -1 and has no gradient.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        beta: Weight of the correlation over the classes of a position.
        gamma: Weight of the correlation over the positions of a class.
        T: Temperature.
        axis: Class axis.
        eps: Added to the product of the norms in the denominator, which reduces the effect of
            classes that hardly vary over the batch.
        mask: Positions to include in the loss. Same shape as `s` without the class axis.
        reduction: 'mean', 'sum' or 'none' (r_c is the same for all positions).
    """
    check_classes(s, axis)
    same_shape(s, t)
    axis, T = class_axis(s, axis), temperature(T)
    if mask is not None:
        mask = fit_mask(mask, positions(s, axis))
    own, shared = both_correlations(s, t, T, axis, mask, eps)
    return reduce((beta * (1 - own) + gamma * (1 - shared)) * T**2, reduction, mask)


def standardize(x: Tensor, *, axis: int = 1, eps: float = 1e-7, correction: int = 1) -> Tensor:
    """Subtract the mean of the logits and divide by their standard deviation (CVPR 2024,
    arXiv:2403.01427).

    With standardized logits, the student does not have to learn the scale of the teacher's logits.

    Args:
        x: Logits, any shape.
        axis: Class axis.
        eps: Added to the standard deviation.
        correction: 1 divides by C-1, as in the released code. 0 divides by C, as in the paper.
    """
    x, axis = _full(x), class_axis(x, axis)
    if x.shape[axis] < 2:
        raise DistillError(
            f'Logits of shape {tuple(x.shape)} have 1 class on axis {axis}: no spread to standardize'
        )
    return (x - x.mean(axis, keepdim=True)) / (
        eps + x.std(axis, correction=correction, keepdim=True)
    )


class Standardized:
    """Function returned by `standardized`. The function has the name and signature of the wrapped
    loss and can be pickled.
    """

    def __init__(self, fn: Callable, **options: Any) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.__wrapped__ = fn
        self.options_of_standardize = options
        self.__name__ = getattr(fn, '__name__', type(fn).__name__)
        for k in ('kind', 'match', 'lists', 'samples', 'relates'):
            if hasattr(fn, k):
                setattr(self, k, getattr(fn, k))
        axis = inspect.signature(fn).parameters.get('axis')
        self.axis = 1 if axis is None or axis.default is axis.empty else axis.default
        self._check(getattr(fn, 'kind', None))

    def _check(self, kind: str | None) -> None:
        if kind in ('sigmoid', 'regression'):
            raise DistillError(
                f'standardized {self.__name__} for {kind}: standardizing compares the classes of a '
                'position, so it needs a loss on softmax logits, such as kl, dkd or dist'
            )

    def __call__(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check(kwargs.get('kind'))
        axis = kwargs.get('axis', self.axis)
        s, t = checked_pair(_full(s), _full(t, detach=True), axis, kwargs.get('mask'))
        s, t = [standardize(x, axis=axis, **self.options_of_standardize) for x in (s, t)]
        return self.__wrapped__(s, t, *args, **kwargs)

    def __repr__(self) -> str:
        return f'standardized({self.__name__})'


def standardized(loss: Callable, *, eps: float = 1e-7, correction: int = 1) -> Callable:
    """Return a loss that first standardizes the logits of both models, e.g. standardized(kl) or
    standardized(DKD(beta=2.)) (CVPR 2024, arXiv:2403.01427).

    Args:
        loss: A loss function of two logits, or its `Loss` module.
        eps: As in `standardize`.
        correction: As in `standardize`.
    """
    if not isinstance(loss, Loss):
        return Standardized(loss, eps=eps, correction=correction)
    loss = copy.deepcopy(loss)
    loss.fn = Standardized(loss.fn, eps=eps, correction=correction)
    return loss
