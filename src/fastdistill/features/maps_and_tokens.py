"Convert features between maps, tokens and vectors."

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError

# Possible numbers of tokens before the image tokens:
# 0 none, 1 class, 2 class and distillation, 4 registers, 5 class and 4 registers
LEAD = 0, 1, 2, 4, 5


def grid(n: int, aspect: float = 1.0) -> tuple[int, int, int] | None:
    """Return (tokens to skip, height, width) of the map that `n` tokens fill. Return None if they
    do not fill a map.

    The skipped tokens are class and register tokens.

    Args:
        n: Number of tokens.
        aspect: Height divided by width of the image.
    """
    for skip in (k for k in LEAD if k < n):
        h = max(1, round(math.sqrt((n - skip) * aspect)))
        w = (n - skip) // h
        if h * w == n - skip and abs(h - w * aspect) < 1:
            return skip, h, w
    return None


def as_map(y: Tensor, aspect: float = 1.0) -> Tensor:
    """Convert tokens, or a map with channels last, to a map (B, C, H, W). Class and register tokens
    are dropped.

    Args:
        y: Tokens (B, L, D), or a map (B, H, W, C).
        aspect: Height divided by width of the image. Used only for tokens.
    """
    if y.dim() == 4:
        return y.movedim(-1, 1)
    g = grid(y.shape[1], aspect) if y.dim() == 3 else None
    if g is None:
        raise DistillError(
            f'Features of shape {tuple(y.shape)} are not a map: must be (B, H, W, C), or (B, L, D) '
            f'with L tokens that fill a grid of height/width {aspect:g} after '
            f'{", ".join(map(str, LEAD))} class and register tokens. Name the layer without @map, and '
            'pair it with tokens.'
        )
    skip, h, w = g
    return y[:, skip:].transpose(1, 2).unflatten(2, (h, w))


def as_tokens(y: Tensor) -> Tensor:
    """Convert features to one token per position, (B, L, C).

    Args:
        y: Features with channels first, (B, C, H, W) or (B, C, L).
    """
    if y.dim() < 3:
        raise DistillError(
            f'Features of shape {tuple(y.shape)} have no positions to turn into tokens: remove '
            '@tokens.'
        )
    return y.flatten(2).transpose(1, 2)


def as_vector(y: Tensor) -> Tensor:
    """Average features over positions. The result has shape (B, C).

    Args:
        y: A map (B, C, H, W) or tokens (B, L, D).
    """
    return y if y.dim() < 3 else y.mean(1) if y.dim() == 3 else y.flatten(2).mean(2)


AVERAGE_POOL: dict[int, Callable] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
SMOOTH = {1: 'linear', 2: 'bilinear', 3: 'trilinear'}


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize features to a new grid. Axes that shrink are average-pooled, and axes that grow are
    interpolated.

    Args:
        x: Features, (B, C, *grid).
        size: The new grid.
    """
    size, now = tuple(size), tuple(x.shape[2:])
    less = tuple(map(min, zip(now, size)))
    if less != now:
        x = AVERAGE_POOL[len(size)](x, less)
    return x if less == size else F.interpolate(x, size, mode=SMOOTH[len(size)])


def to_grid(s: Tensor, like: Sequence[int], picture: bool = True) -> Tensor:
    """Convert student features to the grid of the teacher's features. The channels do not change.

    Maps are converted to tokens, or tokens to a map, if necessary.

    Args:
        s: Student features, (B, D), (B, L, D), (B, C, H, W) or (B, C, D, H, W).
        like: Shape of the teacher's features.
        picture: True if tokens are positions in an image, provided that their number fits a grid.
            False if tokens are positions in a sequence.
    """
    dims = s.dim(), len(like)
    if dims in ((2, 2), (3, 3)) and s.shape[1] == like[1]:
        return s
    if dims[1] == 2 and dims[0] > 1:
        return as_vector(s)
    if dims == (3, 3):
        return _resize_tokens(s, like[1], picture)
    if dims == (4, 3):
        return _map_as_tokens(s, like[1])
    if dims == (3, 4):
        s = as_map(s, like[2] / like[3])
    return resize(s, like[2:])


def _resize_tokens(s: Tensor, n: int, picture: bool) -> Tensor:
    """Resize tokens from (B, L, D) to (B, n, D). Tokens of images are resized in two dimensions,
    and other tokens along the sequence.
    """
    a, b = grid(s.shape[1]), grid(n)
    if not picture or a is None or b is None:
        return resize(s.transpose(1, 2), (n,)).transpose(1, 2)
    return _with_class_tokens(s[:, : a[0]], as_tokens(resize(as_map(s), b[1:])), b[0])


def _map_as_tokens(s: Tensor, n: int) -> Tensor:
    g = grid(n, s.shape[2] / s.shape[3])
    if g is None:
        raise DistillError(
            f"The student's map of shape {tuple(s.shape)} can't be converted to the teacher's {n} "
            'tokens: without class and register tokens, they do not fill a grid of that '
            'height/width. Pair maps with maps and sequences with sequences, or pass a module as '
            'projector.'
        )
    return _with_class_tokens(s[:, :0, :0, 0], as_tokens(resize(s, g[1:])), g[0])


def _with_class_tokens(lead: Tensor, x: Tensor, n: int) -> Tensor:
    """Prepend `n` class and register tokens to `x`.

    The student's class and register tokens are used. The mean of `x` is used for tokens that the
    student does not have.
    """
    lead = lead[:, :n]
    mean = x.mean(1, keepdim=True).expand(-1, n - lead.shape[1], -1)
    return torch.cat([lead, mean, x], 1) if lead.shape[1] else torch.cat([mean, x], 1)
