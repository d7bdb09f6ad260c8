"""Compute one value per position in chunks. The only large tensor created is the gradient of the
logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import DistillError, Draws, LinearLogits
from ._base import class_axis

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
        values: fn(s, t, axis=) -> one value per position, which depends only on the logits at that
            position.
        s: Student logits, any shape: a tensor or `LinearLogits`.
        t: Teacher logits, the same shape: a tensor, `LinearLogits` or `Draws`.
        axis: Class axis.
        mask: Same shape as `s` without the class axis. Logits at masked positions are replaced by
            0.
        slope: fn(s, t, axis=) -> gradient of `values` with respect to `s`. None to use autograd.
    """
    axis = class_axis(s, axis)
    if not (isinstance(s, Tensor) and isinstance(t, Tensor)):
        return by_rows(values, s, t, axis, mask, slope)
    size = chunk_size(s)
    if size is None:
        return blanked(values, s, t, None if mask is None else mask.unsqueeze(axis), axis=axis)
    three = [
        None if x is None else in_three(x, axis)
        for x in (s, t, None if mask is None else mask.unsqueeze(axis))
    ]
    fns = partial(blanked, values), None if slope is None else partial(blanked, slope)
    return Chunked.apply(*three, *fns, size).reshape(s.shape[:axis] + s.shape[axis + 1 :])


def chunk_size(x: Tensor) -> int | None:
    """Return the number of elements per chunk, or None if `x` is small enough to be processed at
    once.
    """
    size = ON_CPU if x.is_cpu else ON_GPU
    if x.numel() < 4 * size or torch.compiler.is_compiling() or x.is_meta or in_transform():
        return None
    return size


def in_transform() -> bool:
    """Return True inside a torch.func transform, which does not support the autograd functions used
    here.
    """
    return getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)() is not None


def seen_finite(*xs: Tensor) -> bool:
    """Return True if all numbers are known to be finite. The check runs only on a CPU and without
    gradients, where it is fast. Otherwise return False.
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
    """Call `fn` with 0 at masked positions, so that a nan at a masked position affects neither the
    loss nor the gradient.
    """
    if mask is not None:
        s, t = [x.where(mask > 0, 0.0) for x in (s, t)]
    return fn(s, t, axis=axis, **options)


def chunks(shape: Sequence[int], size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of a (before, classes, after) tensor with about `size` elements each."""
    a, c, p = shape
    rows, cols = max(size // (c * p), 1), max(min(p, size // c), 1)
    for i in range(0, a, rows):
        for j in range(0, p, cols):
            yield slice(i, i + rows), slice(None), slice(j, j + cols)


class Chunked(torch.autograd.Function):
    """Loss values for logits of shape (before, classes, after). The backward pass recomputes each
    chunk.
    """

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
    """Return chunk `i` of each tensor. A last axis of size 1 is removed, because PyTorch's softmax
    is faster over the last axis.
    """
    rows: list = [None if x is None else x[i] for x in tensors]
    return rows if rows[0].shape[2] > 1 else [None if x is None else x.squeeze(2) for x in rows]


@torch.enable_grad()
def by_autograd(values: Callable, s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    s = s.detach().requires_grad_()
    return torch.autograd.grad(values(s, t, mask).sum(), s)[0]


def second_order(values: Callable, s: Tensor, t: Tensor, mask: Tensor | None, g: Tensor) -> Tensor:
    """Compute the gradient so that it can be differentiated again. This path does not use chunks."""
    return torch.autograd.grad(values(s, t, mask).unsqueeze(1), s, g, create_graph=True)[0]


def by_rows(
    values: Callable, s: Any, t: Any, axis: int, mask: Tensor | None, slope: Callable | None
) -> Tensor:
    """Compute `per_position` if the logits of at least one model are not given as a tensor. These
    logits are computed in chunks in both the forward and the backward pass.
    """
    shape = s.shape[:axis] + s.shape[axis + 1 :]
    if axis != s.dim() - 1 and any(isinstance(x, LinearLogits) for x in (s, t)):
        raise DistillError(
            f'The logits of hidden states have their classes on the last axis, but axis={axis} of '
            f'{s.dim()} dimensions was given.'
        )
    s, t = as_rows(s, axis), as_rows(t, axis)
    mask = None if mask is None else mask.reshape(-1, 1)
    fns = partial(blanked_rows, values), None if slope is None else partial(blanked_rows, slope)
    whole = torch.compiler.is_compiling() or in_transform()
    size = len(s) if whole else max((ON_CPU if s.device.type == 'cpu' else ON_GPU) // s.shape[1], 1)
    if size >= len(s):
        return fns[0](dense_rows(s), dense_rows(t), mask).reshape(shape)
    parts = [s] if isinstance(s, Tensor) else [s.hidden, s.weight, s.bias]
    return ChunkedRows.apply(s, t, mask, *fns, size, *parts).reshape(shape)


def as_rows(x: Any, axis: int) -> Any:
    """Reshape logits to (positions, classes)."""
    if isinstance(x, Tensor):
        x = x.movedim(axis, -1)
        return x.reshape(-1, x.shape[-1])
    if isinstance(x, LinearLogits):
        return replace(x, hidden=x.hidden.reshape(-1, x.hidden.shape[-1]))
    k = x.ids.shape[-1]
    ids, freqs = x.ids.reshape(-1, k), x.freqs.reshape(-1, k)
    return replace(x, ids=ids, freqs=freqs, entropy=x.entropy.reshape(-1), axis=-1)


def some_rows(x: Any, i: slice) -> Any:
    """Return the logits of a slice of positions."""
    if isinstance(x, LinearLogits):
        return replace(x, hidden=x.hidden[i])
    return x.map(lambda o: o[i]) if isinstance(x, Draws) else x[i]


def dense_rows(x: Any) -> Any:
    """Compute logits from hidden states. Other inputs are returned unchanged."""
    return x.dense() if isinstance(x, LinearLogits) else x


def blanked_rows(fn: Callable, s: Any, t: Any, mask: Tensor | None) -> Tensor:
    """Call `fn` with 0 at masked positions."""
    if mask is None:
        return fn(s, t, axis=-1)
    if isinstance(t, Draws):
        empty = lambda o: o.where(mask.reshape(-1, *[1] * (o.dim() - 1)) > 0, 0)
        return fn(s.where(mask > 0, 0.0), t.map(empty), axis=-1)
    return blanked(fn, s, t, mask, axis=-1)


class ChunkedRows(torch.autograd.Function):
    """Loss values for logits of shape (positions, classes), which both passes compute chunk by
    chunk.

    The last arguments of `apply` are the student's tensors: either the logits, or the hidden states
    and the weight and bias of the output layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        s: Any,
        t: Any,
        mask: Tensor | None,
        values: Callable,
        slope: Callable | None,
        size: int,
        *parts: Any,
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.rest = t, mask, values, slope, size, getattr(s, 'cap', None)
        out = parts[0].new_empty(len(parts[0]))
        for a in range(0, len(out), size):
            i = slice(a, a + size)
            z = dense_rows(some_rows(s, i))
            out[i] = values(z, dense_rows(some_rows(t, i)), None if mask is None else mask[i])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        parts, (t, mask, values, slope, size, cap) = ctx.saved_tensors, ctx.rest
        if torch.is_grad_enabled():
            v = values(student_rows(parts, cap), dense_rows(t), mask)
            found = gradients_of(v, parts, g, create_graph=True)
            return *[None] * 6, *found
        needs = ctx.needs_input_grad[6:]
        sums: Any = [torch.zeros_like(p) if need else None for p, need in zip(parts, needs)]
        for a in range(0, len(g), size):
            i = slice(a, a + size)
            m = None if mask is None else mask[i]
            own: Any = [p if p is None else p.detach() for p in (parts[0][i], *parts[1:])]
            own = [p.requires_grad_() if need else p for p, need in zip(own, needs)]
            with torch.enable_grad():
                z = student_rows(own, cap)
                if slope is None:
                    v = values(z, dense_rows(some_rows(t, i)), m)
            if slope is None:
                found = gradients_of(v, own, g[i])
            else:
                d = slope(z.detach(), dense_rows(some_rows(t, i)), m)
                found = gradients_of(z, own, d * g[i, None])
            if needs[0]:
                sums[0][i] = found[0]
            for total, d in zip(sums[1:], found[1:]):
                if total is not None:
                    total += d
        return *[None] * 6, *sums


def student_rows(parts: Sequence[Any], cap: float | None) -> Tensor:
    """Compute the student's logits from (logits,) or (hidden states, weight, bias)."""
    if len(parts) == 1:
        return parts[0]
    hidden, weight, bias = parts
    return LinearLogits(hidden, weight, bias, cap).dense()


def gradients_of(v: Tensor, parts: Sequence[Any], g: Tensor, **options: Any) -> list:
    """Return the gradient of each part. Parts that do not require a gradient get None."""
    needed = [p is not None and p.requires_grad for p in parts]
    found = iter(torch.autograd.grad(v, [p for p, on in zip(parts, needed) if on], g, **options))
    return [next(found) if on else None for on in needed]
