"""Losses between the features of two layers. Features are vectors (B, D), maps (B, C, H, W), or
tokens (B, L, D) with axis=-1.

`axis` is the channel axis. Unless a docstring says otherwise, a loss is the mean over all elements.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.outputs import DistillError
from ._base import Loss, _full, cells, channels_first, fit_mask, loss, reduce, unit
from .correlations import without_noise

__all__ = ['hint', 'at', 'nst', 'fsp', 'ab', 'ofd', 'OFD', 'vid', 'VID', 'pkd', 'cosine']

GRID_POOL: dict[int, Callable] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def same_features(s: Tensor, t: Tensor) -> None:
    """Raise a DistillError if the shapes differ. PyTorch would otherwise broadcast them silently."""
    if s.shape != t.shape:
        raise DistillError(
            f"The student's features have shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: this "
            'loss compares them element by element. Give the student a projector (a linear layer or a '
            '1x1 convolution). A Distiller builds one from the shapes'
        )


def pooled(xs: Sequence[Tensor], axis: int = 1) -> list[Tensor]:
    """Move channels to axis 1 and average-pool all features to the smallest grid among them."""
    xs = [channels_first(o, axis) for o in xs]
    grids = [tuple(o.shape[2:]) for o in xs]
    if len({len(g) for g in grids}) > 1 or len(grids[0]) not in GRID_POOL:
        raise DistillError(
            f'Features with the grids {", ".join(map(str, grids))} have no grid in common: this loss '
            'compares maps with maps (B, C, H, W), or tokens with tokens (B, L, D). Turn tokens into a '
            'map first, or choose layers before the pooling'
        )
    grid = tuple(map(min, zip(*grids)))
    return [o if g == grid else GRID_POOL[len(grid)](o, grid) for o, g in zip(xs, grids)]


def tensor_like(v: Tensor | float, x: Tensor) -> Tensor:
    """Return `v` as a tensor on the device of `x`. A number is created directly on that device,
    because a copy from the CPU would force a synchronization.
    """
    return v.to(x) if isinstance(v, Tensor) else x.new_full((1,), v)


def per_channel(v: Tensor | float, x: Tensor, axis: int) -> Tensor:
    """Reshape one number, or one number per channel, so that it broadcasts to `x`."""
    v = tensor_like(v, x).flatten()
    if len(v) not in (1, x.shape[axis]):
        raise DistillError(
            f'{len(v)} values for features of shape {tuple(x.shape)}: axis {axis} has {x.shape[axis]} '
            'channels'
        )
    return v.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@loss(kind=None, match='shape')
def hint(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the mean squared difference between features (FitNets, arXiv:1412.6550).

    The paper's loss, 1/2 ||t-s||^2, equals this loss times channels x positions / 2.

    Args:
        s: Student features, projected to the teacher's shape.
        t: Teacher features.
        axis: Channel axis.
        mask: Positions to include in the loss. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    return reduce((s - t).pow(2).mean(axis), reduction, mask)


@loss(kind=None, match='none', samples=True)
def at(
    s: Tensor,
    t: Tensor,
    *,
    p: float = 2.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the squared difference between the attention maps q = mean_c |x|^p, scaled to length
    1 (arXiv:1612.03928).

    The loss is averaged over positions, as in the authors' code, which uses a weight of 1000. The
    loss times H x W is ||q_s - q_t||^2, which is between 0 and 2 at any resolution. The formula in
    the paper is half the square root of that value.

    Args:
        s: Student map, (B, C, H, W).
        t: Teacher map, (B, C', H', W'). The number of channels may differ. If the grids differ, the
            larger grid is average-pooled to the smaller grid.
        p: Exponent of the activations, at least 1.
        axis: Channel axis. Use -1 for tokens (B, L, D), whose attention map is over L.
        mask: Samples to include in the loss, (B,).
    """
    if p < 1:
        raise DistillError(
            f'p={p}: the exponent must be at least 1. Below 1 the gradient at 0 is infinite'
        )
    s, t = [unit(o.abs().pow(p).mean(1).flatten(1)) for o in pooled([s, t], axis)]
    return reduce((s - t).pow(2).mean(1), reduction, mask)


@loss(kind=None, match='none', samples=True)
def nst(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the maximum mean discrepancy between the student's and the teacher's channels, with
    the kernel (a.b)^2 (neuron selectivity transfer, arXiv:1707.01219).

    Each channel is a vector over the positions, scaled to length 1. The loss is averaged over pairs
    of channels, as in the authors' code.

    Args:
        s: Student map, (B, C, H, W).
        t: Teacher map, (B, C', H', W'). The number of channels may differ. If the grids differ, the
            larger grid is average-pooled to the smaller grid.
        axis: Channel axis.
        mask: Samples to include in the loss, (B,).
    """
    s, t = [unit(o.flatten(2), 2) for o in pooled([s, t], axis)]
    # Both branches compute the same value.
    # With fewer positions than channels, pairs of positions are cheaper.
    if s.shape[2] < max(s.shape[1], t.shape[1]):
        v = (s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]).pow(2).sum((1, 2))
    else:
        ss, st, tt = [(a @ b.mT).pow(2).mean((1, 2)) for a, b in ((s, s), (s, t), (t, t))]
        v = ss + tt - 2 * st
    return reduce(v, reduction, mask)


def flows(xs: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Compute the products of the channels of consecutive layers, averaged over positions. Each
    result has shape (B, C1, C2).
    """
    pairs = [[o.flatten(2) for o in pooled(pair, axis)] for pair in zip(xs, xs[1:])]
    return [a @ b.mT / a.shape[2] for a, b in pairs]


@loss(kind=None, match='shape', lists=True, samples=True)
def fsp(
    s: list, t: list, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the squared difference between the flows of consecutive layers (Yim et al., CVPR
    2017).

    A flow is the matrix of products between the channels of one layer and the channels of the next.
    The loss is averaged over the elements of each matrix and summed over the pairs of layers. The
    paper sums over the elements, so its loss is C1 x C2 times as large. If the grids of two layers
    differ, the larger grid is average-pooled.

    Args:
        s: Two or more student maps [(B, C1, H, W), (B, C2, H2, W2), ...] in the order of the
            layers.
        t: The same number of teacher maps, with the same numbers of channels. The grids may differ
            from the student's.
        axis: Channel axis.
        mask: Samples to include in the loss, (B,).
    """
    if not isinstance(s, list) or not isinstance(t, list) or len(s) != len(t) or len(s) < 2:
        got = [
            f'a list of {len(o)}' if isinstance(o, list) else f'a {type(o).__name__}'
            for o in (s, t)
        ]
        raise DistillError(
            'fsp takes two lists of equal length, with two or more maps each, but got '
            f'{got[0]} and {got[1]}'
        )
    v = s[0].new_zeros(())
    for a, b in zip(flows(s, axis), flows(t, axis)):
        same_features(a, b)
        v = v + (a - b).pow(2).mean((1, 2))
    return reduce(v, reduction, mask)


@loss(kind=None, match='shape')
def ab(
    s: Tensor,
    t: Tensor,
    *,
    margin: float = 1.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute a squared hinge loss that makes each neuron active where the teacher's neuron is
    active (activation boundaries, arXiv:1811.03233).

    The loss is 0 where `s` has the same sign as `t` and |s| is at least `margin`. The loss may
    therefore be positive at s == t. The authors sum over the elements of a sample and multiply by
    0.003.

    Args:
        s: Student features before the ReLU, projected to the teacher's shape.
        t: Teacher features before the ReLU.
        margin: Value of |s| above which the loss is 0, if `s` has the same sign as `t`.
        axis: Channel axis.
        mask: Positions to include in the loss. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    return reduce(
        torch.where(t > 0, margin - s, margin + s).relu().pow(2).mean(axis), reduction, mask
    )


def negative_mean(t: Tensor, axis: int, mask: Tensor | None = None) -> Tensor:
    """Compute the mean of the negative values of each channel, or 0 for a channel without negative
    values.

    Args:
        mask: Positions to include, those above 0. Same shape as `t` without the channel axis.
    """
    if mask is not None:
        on = fit_mask(mask, t.movedim(axis, 0).shape[1:]) > 0
        t = t.where(on.unsqueeze(axis), 0.0)
    t = cells(t, axis)
    return t.clamp_max(0).sum((0, 2)) / (t < 0).sum((0, 2)).clamp_min(1)


def ofd_margin(bn: _BatchNorm) -> Tensor:
    """Compute the expected negative value of each channel, E[x | x < 0] for x ~ N(bias, weight^2),
    as (C,).

    If less than 0.1% of a channel's values are expected to be negative, the result is -3 |weight|,
    as in the code of the OFD authors.

    Args:
        bn: The teacher's batch norm before the ReLU.
    """
    s = _full(torch.ones(bn.num_features) if bn.weight is None else bn.weight.detach().abs())
    m = _full(torch.zeros_like(s) if bn.bias is None else bn.bias.detach())
    z = m / s.clamp_min(1e-12)
    below = torch.special.ndtr(-z)
    mean = m - s * (-z.square() / 2).exp() / math.sqrt(2 * math.pi) / below
    return torch.where(below > 0.001, mean, -3 * s)


@loss(kind=None, match='shape')
def ofd(
    s: Tensor,
    t: Tensor,
    *,
    margin: Tensor | float | None = None,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the squared distance between `s` and the target max(t, margin) (overhaul of feature
    distillation, arXiv:1904.01866). The loss is 0 where the target is not positive and `s` is below
    the target.

    The authors sum over the elements of a sample and divide by 1,000 for CIFAR and by 10,000 for
    ImageNet.

    Args:
        s: Student features before the ReLU, projected to the teacher's shape.
        t: Teacher features before the ReLU.
        margin: Lower bound of the target, (C,). None for the mean of the teacher's negative values
            in each channel, at the positions that `mask` includes.
        axis: Channel axis.
        mask: Positions to include in the loss. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    if margin is None:
        margin = negative_mean(t, axis, mask)
    t = torch.maximum(t, per_channel(margin, t, axis))
    return reduce(torch.where((s > t) | (t > 0), (s - t).pow(2), 0.0).mean(axis), reduction, mask)


@loss(kind=None, match='shape')
def vid(
    s: Tensor,
    t: Tensor,
    *,
    log_scale: Tensor | None = None,
    var: float = 5.0,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the Gaussian negative log-likelihood of `t`, 1/2 ((s-t)^2/var + log var) (variational
    information distillation, arXiv:1904.05835).

    The loss is averaged over the elements of a sample, while the paper sums over them. The loss can
    be negative. For a fixed variance, the minimum of the loss is at s == t.

    Args:
        s: Student features, projected to the teacher's shape. The features are used as the mean of
            the Gaussian.
        t: Teacher features.
        log_scale: Trained parameter, (C,), owned by the module `VID`. The variance is
            softplus(log_scale) + eps. None to use `var` as the variance.
        var: Variance if `log_scale` is None. `VID` uses it as the initial variance.
        eps: Minimum of the variance.
        axis: Channel axis.
        mask: Positions to include in the loss. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    variance = (
        tensor_like(var, s)
        if log_scale is None
        else F.softplus(per_channel(log_scale, s, axis)) + eps
    )
    return reduce(((s - t).pow(2) / variance + variance.log()).mean(axis) / 2, reduction, mask)


class Owner(Loss):
    """Loss that owns a tensor or modules whose size depends on the teacher. The tensor or the
    modules are passed as an option or created by `prepare`.
    """

    own: str  # name of the option and of the attribute
    trains = ''  # what the loss trains, if it has to exist before the optimizer is created

    def __init__(self, fn: Callable, **options: Any) -> None:
        super().__init__(fn, **options)
        v = self.options.pop(self.own, None)
        self.register_buffer(self.own, None)
        if v is not None:
            self.keep(v)

    def keep(self, v: Any) -> None:
        """Own a copy of a tensor or a number, as a buffer."""
        v = torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else torch.float32)
        setattr(self, self.own, v.detach().clone())

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> Any:
        """Return the tensor or the modules for teacher features in full precision (see `prepare`)."""
        raise NotImplementedError

    def prepare(
        self, s: Tensor, t: Tensor, layer: nn.Module | None = None, axis: int | None = None
    ) -> None:
        if getattr(self, self.own) is None:
            self.keep(self.create(_full(t), layer, axis))

    def forward(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = getattr(self, self.own)
        if own is None and self.trains:
            raise DistillError(
                f'{type(self).__name__} trains {self.trains}, which must be created first: call '
                'prepare(s, t) with the features of one batch before you create the optimizer, or '
                f'give {self.own}=. A Distiller calls prepare itself'
            )
        return super().forward(s, t, *args, **{self.own: own, **kwargs})

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        """Create the tensor from the saved state if `prepare` was not called yet."""
        v = state.get(prefix + self.own)
        if v is not None and getattr(self, self.own) is None:
            self.keep(v)
        super()._load_from_state_dict(state, prefix, *args)


class OFD(Owner):
    """Module form of `ofd` that owns the margin.

    Args:
        **options: Options of `ofd`.
    """

    own = 'margin'
    margin: Tensor | None  # None before `prepare`

    def __init__(self, **options: Any) -> None:
        super().__init__(ofd, **options)

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> Tensor:
        """Return the margin. If the teacher's layer is a batch norm, the margin is computed from
        its parameters, otherwise from the negative values in this batch.
        """
        if isinstance(layer, _BatchNorm):
            return ofd_margin(layer).to(t.device)
        return negative_mean(t, self.option('axis') if axis is None else axis)


class VID(Owner):
    """Module form of `vid` that owns the trained variances.

    Args:
        **options: Options of `vid`.
    """

    own, trains = 'log_scale', 'a variance'
    log_scale: Tensor | None  # None before `prepare`

    def __init__(self, **options: Any) -> None:
        super().__init__(vid, **options)

    def keep(self, v: Any) -> None:
        super().keep(v)
        v = self.log_scale
        del self.log_scale
        self.log_scale = nn.Parameter(v)

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> Tensor:
        """Return a variance for each teacher channel."""
        start = math.log(math.expm1(self.option('var') - self.option('eps')))
        return t.new_full((t.shape[self.option('axis') if axis is None else axis],), start)


def standardized_rows(x: Tensor, w: Tensor) -> Tensor:
    """Subtract the mean of each row and scale the row to length 1. A row that is constant up to
    rounding errors becomes 0.

    Args:
        x: Rows, (C, N).
        w: Weights of the columns, (N,).
    """
    x = torch.where(w > 0, x, 0.0)
    eps = torch.finfo(x.dtype).eps
    mean = (x * w).sum(1, keepdim=True) / w.sum().clamp_min(eps)
    return unit(
        (x - mean) * w.sqrt(),
        least=16 * eps * torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True),
    )


@loss(kind=None, match='shape', relates=True)
def pkd(s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None) -> Tensor:
    """Compute 1 - Pearson correlation of each channel over batch and positions, averaged over
    channels (PKD, arXiv:2207.02039).

    The authors' code multiplies the loss by (M-1)/M, where M = batch x positions. A channel that is
    constant in only one model contributes 1/2. A channel that is constant in both models
    contributes 0. The correlation over only two positions is always 1 or -1, and has no gradient.

    Args:
        s: Student features, projected to the teacher's shape.
        t: Teacher features.
        axis: Channel axis.
        mask: Positions to include in the correlation. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    grid = channels_first(s, axis)[:, 0].shape
    w = t.new_ones(grid) if mask is None else fit_mask(mask, grid).to(t)
    s, t = [
        standardized_rows(cells(o, axis).transpose(0, 1).flatten(1), w.flatten()) for o in (s, t)
    ]
    # subtle: half the squared distance between unit vectors equals 1-r, and rounding errors can't
    # make it negative
    return without_noise((s - t).pow(2).sum(1).mean() / 2, (w > 0).sum())


@loss(kind=None, match='shape')
def cosine(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute 1 - cosine similarity of the features at each position, from 0 to 2 (DistilBERT,
    arXiv:1910.01108).

    The loss is half the squared distance between the features scaled to length 1.

    Args:
        s: Student features, projected to the teacher's shape.
        t: Teacher features.
        axis: Channel axis.
        mask: Positions to include in the loss. Same shape as `s` without the channel axis.
    """
    same_features(s, t)
    return reduce(1 - (unit(s, axis) * unit(t, axis)).sum(axis), reduction, mask)
