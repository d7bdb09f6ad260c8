"""Compute one value per position in chunks, so that large logits need no more memory than their
gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ._base import class_axis

__all__ = ['blanked', 'chunk_size', 'chunks', 'in_three', 'per_position', 'rows_at', 'seen_finite']

# elements per chunk: small enough for the cache of a CPU, large enough to fill a GPU
ON_CPU, ON_GPU = 2**16, 2**24


def per_position(
    values: Callable,
    s: Tensor,
    t: Tensor,
    axis: int = 1,
    mask: Tensor | None = None,
    slope: Callable | None = None,
) -> Tensor:
    """Compute `values` for all logits. The result has no class axis.

    Args:
        values: fn(s, t, axis=) -> one value per position, each computed only from the logits at
            that position.
        s: Student logits, any shape.
        t: Teacher logits, the same shape.
        axis: Class axis.
        mask: Shape of `s` without the class axis. Logits are replaced by 0 where it is 0.
        slope: fn(s, t, axis=) -> gradient of `values` with respect to `s`. None to use autograd.
    """
    axis, size = class_axis(s, axis), chunk_size(s)
    if size is None:
        return blanked(values, s, t, None if mask is None else mask.unsqueeze(axis), axis=axis)
    three = [
        None if x is None else in_three(x, axis)
        for x in (s, t, None if mask is None else mask.unsqueeze(axis))
    ]
    fns = partial(blanked, values), None if slope is None else partial(blanked, slope)
    return Chunked.apply(*three, *fns, size).reshape(s.shape[:axis] + s.shape[axis + 1 :])


def chunk_size(x: Tensor) -> int | None:
    """Return the number of elements per chunk of these logits, or None if they need no chunks."""
    size = ON_CPU if x.is_cpu else ON_GPU
    return (
        None
        if x.numel() < 4 * size or torch.compiler.is_compiling() or x.is_meta or in_transform()
        else size
    )


def in_transform() -> bool:
    """Return True inside a torch.func transform, which needs to see every operation of the loss."""
    return getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)() is not None


def seen_finite(*xs: Tensor) -> bool:
    """Return True if all numbers are known to be finite. Checked only where that is fast: on a CPU,
    without a graph.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return False
    return all(x.is_cpu and isfinite(x.sum()) for x in xs)


def in_three(x: Tensor, axis: int) -> Tensor:
    """Reshape `x` to (positions before the class axis, classes, positions after it)."""
    before, after = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    return x.reshape(before, x.shape[axis], after)


def blanked(
    fn: Callable, s: Tensor, t: Tensor, mask: Tensor | None, axis: int = 1, **options: Any
) -> Any:
    """Call `fn` with 0 at masked positions, so that a nan there reaches neither the loss nor the
    gradient.
    """
    if mask is not None:
        s, t = [x.where(mask > 0, 0.0) for x in (s, t)]
    return fn(s, t, axis=axis, **options)


def chunks(shape: Sequence[int], size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of (before, classes, after) with about `size` elements each."""
    a, c, p = shape
    rows, cols = max(size // (c * p), 1), max(min(p, size // c), 1)
    for i in range(0, a, rows):
        for j in range(0, p, cols):
            yield slice(i, i + rows), slice(None), slice(j, j + cols)


class Chunked(torch.autograd.Function):
    """Values of logits (before, classes, after). The backward pass recomputes each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        t: Tensor,
        mask: Tensor | None,
        values: Callable,
        slope: Callable | None,
        size: int,
    ) -> Tensor:
        ctx.save_for_backward(s, t, mask)
        ctx.fns = values, slope, size
        out = s.new_empty(len(s), 1, s.shape[2])
        for i in chunks(s.shape, size):
            out[i] = values(*rows_at((s, t, mask), i)).reshape(out[i].shape)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        (s, t, mask), (values, slope, size) = ctx.saved_tensors, ctx.fns
        if torch.is_grad_enabled():
            return second_order(values, s, t, mask, g), *[None] * 5
        out = torch.empty_like(s)
        for i in chunks(s.shape, size):
            rows = rows_at((s, t, mask), i)
            d = slope(*rows) if slope is not None else by_autograd(values, *rows)
            torch.mul(d.reshape(out[i].shape), g[i], out=out[i])
        return out, *[None] * 5


def rows_at(tensors: Sequence[Tensor | None], i: tuple[slice, slice, slice]) -> list:
    """Return chunk `i` of each tensor, without a last axis of size 1: PyTorch's softmax is faster
    over the last axis.
    """
    rows: list = [None if x is None else x[i] for x in tensors]
    return rows if rows[0].shape[2] > 1 else [None if x is None else x.squeeze(2) for x in rows]


@torch.enable_grad()
def by_autograd(values: Callable, s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    s = s.detach().requires_grad_()
    return torch.autograd.grad(values(s, t, mask).sum(), s)[0]


def second_order(values: Callable, s: Tensor, t: Tensor, mask: Tensor | None, g: Tensor) -> Tensor:
    """Compute the gradient with its own graph and without chunks."""
    return torch.autograd.grad(values(s, t, mask).unsqueeze(1), s, g, create_graph=True)[0]
