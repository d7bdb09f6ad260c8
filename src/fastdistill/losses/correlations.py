"""Compute correlations between the probabilities of student and teacher, over the classes and over
the positions. Large logits are processed in chunks.
"""

from typing import Any

import torch
from torch import Tensor

from ._base import log_probs
from .chunks import blanked, chunk_size, chunks, in_three, rows_at

# minimum number of positions per chunk, so that the mean of the first chunk is close to the mean of
# all positions
FEW_POSITIONS = 8
# minimum number of positions for which the correlation is not always 1 or -1
FEWEST_POSITIONS = 3


def both_correlations(
    s: Tensor, t: Tensor, T: float, axis: int, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the Pearson correlations between both models' probabilities, over the classes of each
    position and over the positions of each class.

    With fewer than `FEWEST_POSITIONS` positions, the correlations over the positions have no
    gradient.

    Args:
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        T: Temperature.
        axis: Class axis, as a non-negative index.
        mask: Weight of each position in the correlation of a class. Same shape as `s` without the
            class axis.
        eps: Added to the product of the norms in the denominator.
    """
    mask = None if mask is None else mask.to(s.dtype).unsqueeze(axis)
    if (size := chunk_size(s)) is None:
        own, shared = blanked(at_once, s, t, mask, axis=axis, w=mask, T=T, eps=eps)
    else:
        three = [None if x is None else in_three(x, axis) for x in (s, t, mask)]
        own, shared = Correlations.apply(*three, T, eps, max(size, FEW_POSITIONS * s.shape[axis]))
        own = own.reshape(s.shape[:axis] + s.shape[axis + 1 :])
    n: Any = s.numel() // s.shape[axis]
    if mask is not None and n >= FEWEST_POSITIONS:
        n = (mask > 0).sum()
    return own, without_noise(shared, n)


def without_noise(r: Tensor, n: int | Tensor) -> Tensor:
    """Return the correlations `r`, without their gradient if they are over too few positions.

    The correlation over two positions is always 1 or -1. Its gradient comes only from rounding
    errors and from `eps`, and can be huge.

    Args:
        n: Number of positions, an int or a 0-dim tensor.
    """
    enough = n >= FEWEST_POSITIONS
    if isinstance(enough, Tensor):
        return r.where(enough, r.detach())
    return r if enough else r.detach()


def at_once(
    s: Tensor, t: Tensor, axis: int, w: Tensor | None, T: float, eps: float
) -> tuple[Tensor, Tensor]:
    p, q = log_probs(s, T, axis).exp(), log_probs(t, T, axis).exp()
    return pearson(p, q, axis, None, eps), pearson(p, q, others(p, axis), w, eps).mean()


def others(x: Tensor, axis: int = 1) -> list[int]:
    return [d for d in range(x.dim()) if d != axis]


def pearson(a: Tensor, b: Tensor, dim: int | list[int], w: Tensor | None, eps: float) -> Tensor:
    """Compute the Pearson correlation, or 0 where `a` or `b` is constant.

    Args:
        a, b: Tensors of the same shape.
        dim: Dimensions to correlate over.
        w: Weights that broadcast to `a`. None for equal weights.
    """

    def center(x: Tensor) -> Tensor:
        if w is None:
            return x - x.mean(dim, keepdim=True)
        return (
            x
            - (w * x).sum(dim, keepdim=True)
            / w.sum(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
        ) * w.sqrt()

    a, b = center(a), center(b)
    return (a * b).sum(dim) / (
        torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim) + eps
    )


class Correlations(torch.autograd.Function):
    """`both_correlations` for logits of shape (before, classes, after). The forward and the
    backward pass each read the logits once.
    """

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, t: Tensor, mask: Tensor | None, T: float, eps: float, size: int
    ) -> tuple[Tensor, Tensor]:
        own = s.new_empty(len(s), 1, s.shape[2])
        first: list[Tensor] = []
        sums = s.new_zeros(())
        for i in chunks(s.shape, size):
            p, q, w = probs_at(s, t, mask, i, T)
            own[i] = pearson(p, q, 1, None, eps).reshape(own[i].shape)
            # subtle: subtract a value close to the mean before squaring, because the sums would
            # otherwise lose precision
            if not first:
                first = [x.mean(others(x), keepdim=True) for x in (p, q)]
            sums = sums + moments(p - first[0], q - first[1], w)
        n = own.numel() if mask is None else mask.sum().clamp_min(torch.finfo(s.dtype).eps)
        means = sums[:2] / n
        norms = (sums[2:4] - n * means**2).clamp_min(0).sqrt()
        cov, both = sums[4] - n * means[0] * means[1], norms[0] * norms[1] + eps
        # the gradient of a class's correlation is of_t * (teacher - mean) - of_s * (student - mean)
        of_t, of_s = 1 / both, safe_ratio(cov * norms[1], both**2 * norms[0])
        ctx.save_for_backward(s, t, mask, *(f + m for f, m in zip(first, means)), of_t, of_s)
        ctx.options = T, eps, size
        return own, (cov / both).mean()

    @staticmethod
    def backward(ctx: Any, g_own: Tensor, g_shared: Tensor) -> tuple:
        (s, t, mask, mean_s, mean_t, of_t, of_s), (T, eps, size) = ctx.saved_tensors, ctx.options
        if torch.is_grad_enabled():
            return with_graph(s, t, mask, T, eps, g_own, g_shared), *[None] * 5
        out, each = torch.empty_like(s), g_shared / s.shape[1]
        for i in chunks(s.shape, size):
            p, q, w = probs_at(s, t, mask, i, T)
            d = (of_t * each) * (q - mean_t) - (of_s * each) * (p - mean_s)
            if w is not None:
                d *= w
            d += own_slope(p, q, eps) * g_own[i].reshape(len(p), 1, *p.shape[2:])
            out[i] = (p * (d - (p * d).sum(1, keepdim=True)) / T).reshape(out[i].shape)
        return out, *[None] * 5


def probs_at(
    s: Tensor, t: Tensor, mask: Tensor | None, i: tuple[slice, slice, slice], T: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both models' probabilities in a chunk, and the mask of the chunk."""
    s, t, w = rows_at((s, t, mask), i)
    if w is not None:
        s, t = [x.where(w > 0, 0.0) for x in (s, t)]
    return (s / T).softmax(1), (t / T).softmax(1), w


def moments(a: Tensor, b: Tensor, w: Tensor | None) -> Tensor:
    """Compute weighted sums over the positions of a, b, a*a, b*b and a*b. The reduced axes are kept
    with size 1.
    """
    wa, wb = (a, b) if w is None else (w * a, w * b)
    return torch.stack([x.sum(others(a), keepdim=True) for x in (wa, wb, wa * a, wb * b, wa * b)])


def own_slope(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """Compute the gradient of the correlation over the classes with respect to the student's
    probabilities `p`.
    """
    a, b = [x - x.mean(1, keepdim=True) for x in (p, q)]
    norm_a, norm_b = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (a, b)]
    both = norm_a * norm_b + eps
    return b / both - safe_ratio((a * b).sum(1, keepdim=True) * norm_b, both**2 * norm_a) * a


def safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def with_graph(
    s: Tensor, t: Tensor, mask: Tensor | None, T: float, eps: float, g_own: Tensor, g_shared: Tensor
) -> Tensor:
    """Compute the gradient so that it can be differentiated again. This path does not use chunks."""
    own, shared = blanked(at_once, s, t, mask, axis=1, w=mask, T=T, eps=eps)
    return torch.autograd.grad([own.unsqueeze(1), shared], s, [g_own, g_shared], create_graph=True)[
        0
    ]
