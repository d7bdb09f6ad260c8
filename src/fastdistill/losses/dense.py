"""Losses for dense prediction, between maps of logits or features (B, C, H, W), or tokens (B, L, D)
with axis=-1.

`axis` is the channel axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError, as_plain
from ._base import cells, channels_first, expect, fit_mask, log_probs, loss, reduce, unit

__all__ = ['cwd', 'pairwise', 'ifvd']

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@loss(kind=None, match='shape')
def cwd(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute T^2 KL between the softmax of each channel over all positions, averaged over channels
    and samples (channel-wise KD, arXiv:2011.13256).

    Args:
        s: Student logits, or features projected to the teacher's shape, (B, C, H, W).
        t: Teacher logits or features, (B, C, H, W).
        T: Temperature.
        axis: Channel axis.
        mask: Pixels to include in the softmax, (B, H, W). An image without included pixels is
            ignored.
        reduction: 'mean', 'sum' or 'none' (one value per sample and channel, (B, C)).
    """
    if s.shape != t.shape:
        raise DistillError(
            f'Student {tuple(s.shape)}, teacher {tuple(t.shape)}: cwd compares channel with channel and '
            'pixel with pixel. Resize one of them, or give the student a projector (1x1 convolution)'
        )
    grid = channels_first(s, axis)[:, 0].shape
    if len(grid) < 2:
        raise DistillError(
            'cwd compares where in the image a channel is active, but outputs of shape '
            f'{tuple(s.shape)} have no positions: use kl, as kd() does'
        )
    s, t = cells(s, axis), cells(t, axis)
    if mask is not None:
        mask = (fit_mask(mask, grid) > 0).reshape(len(s), 1, -1)
        # subtle: use a finite number, because -inf gives nan in an image without included pixels
        s, t = [o.masked_fill(~mask, -1e30) for o in (s, t)]
        mask = mask.any(2)
    ls, lt = log_probs(s, T, 2), log_probs(t, T, 2)
    return reduce(expect(lt, lt - ls).sum(2) * T**2, reduction, mask)


def affinity(x: Tensor, pool: float, axis: int) -> Tensor:
    """Max-pool features to cells and compute the cosine similarity between all pairs of cells, (B,
    P, P).
    """
    x = channels_first(x, axis)
    grid = x.shape[2:]
    if len(grid) not in MAX_POOL:
        raise DistillError(
            f'pairwise compares positions, but features of shape {tuple(x.shape)} have no grid of '
            'positions'
        )
    size = [min(pool, n) if isinstance(pool, int) else max(int(n * pool), 1) for n in grid]
    x = unit(MAX_POOL[len(grid)](x, size, size, ceil_mode=True).flatten(2))
    return x.mT @ x


@loss(kind=None, match='grid', samples=True)
def pairwise(
    s: Tensor,
    t: Tensor,
    *,
    pool: int | float = 2,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the squared difference between the cosine similarities of all pairs of cells,
    averaged over pairs (structured KD, arXiv:1903.04197). Cells are max-pooled positions.

    In the authors' code, no gradient passes through the lengths of the student's vectors. In this
    implementation, it does.

    Args:
        s: Student map, (B, C, H, W).
        t: Teacher map, (B, C', H, W). The number of channels may differ.
        pool: Size of a cell in pixels, as an int. A float below 1 is a fraction of the height and
            width. The authors use 0.5.
        axis: Channel axis.
        mask: Samples to include in the loss, (B,).
    """
    if not (pool >= 1 if isinstance(pool, int) else 0 < pool < 1):
        raise DistillError(
            f'pool={pool}: the size of a cell must be a whole number of pixels, or a fraction of '
            'height and width below 1'
        )
    s, t = affinity(s, pool, axis), affinity(t, pool, axis)
    if s.shape != t.shape:
        raise DistillError(
            f'pool={pool} leaves {s.shape[1]} cells of {len(s)} student maps and {t.shape[1]} of '
            f'{len(t)} teacher maps: choose layers with the same grid, or resize one'
        )
    return reduce((s - t).pow(2).mean((1, 2)), reduction, mask)


def to_prototypes(x: Tensor, y: Tensor, n: int) -> Tensor:
    """Compute the cosine similarity between the feature at each position and the mean feature of
    the same class in the image, (B, P).

    Args:
        x: Features, (B, C, P).
        y: Class of each position, (B, P).
        n: Number of classes.
    """
    i = y[:, None].expand_as(x)
    # the sum gives the same cosine similarity as the mean
    proto = x.new_zeros(len(x), x.shape[1], n).scatter_add(2, i, x)
    return (unit(x) * unit(proto).gather(2, i)).sum(1)


def numbered(y: Tensor) -> Tensor:
    """Renumber the classes of each image as 0, 1, 2, ... in ascending order.

    Unlike counting the classes, this does not force a GPU synchronization.

    Args:
        y: Class of each position, (B, P).
    """
    v, i = y.sort(1)
    return torch.zeros_like(y).scatter(
        1, i, F.pad((v[:, 1:] != v[:, :-1]).long().cumsum(1), (1, 0))
    )


@loss(kind=None, match='grid')
def ifvd(
    s: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    classes: int | None = None,
    ignore_index: int = -100,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the squared difference between both models' intra-class variation (Wang et al., ECCV
    2020). The variation at a position is the cosine similarity between the feature at the position
    and the mean feature of the same class in the image.

    The loss is averaged over the included positions. The authors average over all positions, with 0
    for ignored positions.

    Args:
        s: Student map, (B, C, H, W).
        t: Teacher map, (B, C', H, W). The number of channels may differ.
        y: Labels, (B, H', W'). Labels are resized to the size of the map by nearest-neighbor
            interpolation.
        classes: Number of classes. None if unknown, which doubles the memory use.
        ignore_index: Positions with this label are excluded.
        axis: Channel axis.
        mask: Positions of the map to include in the loss, (B, H, W).
        reduction: 'mean', 'sum' or 'none' (one value per position, (B, H, W), 0 where ignored).
    """
    s, t = channels_first(s, axis), channels_first(t, axis)
    if s.shape[2:] != t.shape[2:] or len(s) != len(t) or y.dim() != s.dim() - 1 or len(y) != len(s):
        raise DistillError(
            'ifvd needs student and teacher maps with the same grid, and labels with the axes of '
            f'this grid: got {tuple(s.shape)}, {tuple(t.shape)} and labels {tuple(y.shape)}'
        )
    y = F.interpolate(as_plain(y)[:, None].float(), s.shape[2:], mode='nearest')[:, 0].long()
    on = y != ignore_index
    y = torch.where(on, y, 0).flatten(1)
    n = classes or y.shape[1]
    if not classes:
        y = numbered(y)
    # set ignored positions to 0, so that they do not change the mean of any class
    s, t = [to_prototypes(torch.where(on[:, None], x, 0.0).flatten(2), y, n) for x in (s, t)]
    return reduce(
        (s - t).pow(2).reshape(on.shape),
        reduction,
        on if mask is None else on * fit_mask(mask, on.shape),
    )
