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

from ..base.outputs import DistillError, Draws, LinearLogits, as_dense
from ._base import class_axis

# elements per chunk: small enough for the cache of a CPU, large enough to fill a GPU
ON_CPU, ON_GPU = 2**16, 2**24
# minimum number of positions to which an output layer is applied at once, because its whole weight is
# read each time
LINEAR_ROWS = 64
# the same for the teacher's output layer, if the student's logits of all positions are in memory
# anyway
TEACHER_ROWS = 256


def per_position(
    values: Callable,
    s: Tensor,
    t: Tensor,
    axis: int = 1,
    mask: Tensor | None = None,
    slope: Callable | None = None,
    both: Callable | None = None,
) -> Tensor:
    """Compute `values` for all logits. The result has no class axis.

    Args:
        values: fn(s, t, axis=) -> one value per position, which depends only on the logits at that
            position.
        s: Student logits, any shape: a tensor or `LinearLogits`.
        t: Teacher logits, the same shape: a tensor, `LinearLogits` or `Draws`.
        axis: Class axis.
        mask: Same shape as `s` without the class axis. Logits at masked positions are replaced with
            0.
        slope: fn(s, t, axis=) -> gradient of `values` with respect to `s`. None to use autograd.
        both: fn(s, t, axis=) -> (values, slope), if this is faster than computing each separately.
    """
    axis = class_axis(s, axis)
    shape = s.shape[:axis] + s.shape[axis + 1 :]
    plain = isinstance(s, Tensor) and isinstance(t, Tensor)
    linear = any(isinstance(x, LinearLogits) for x in (s, t))
    if isinstance(s, Tensor) and isinstance(t, Draws):
        s, axis = s.movedim(axis, -1), s.dim() - 1  # draws have their classes on the last axis
    if axis != s.dim() - 1 and linear:
        raise DistillError(
            'Logits computed from hidden states have their classes on the last axis, but '
            f'axis={axis} of {s.dim()} dimensions was given.'
        )
    mask = None if mask is None else mask.unsqueeze(axis)
    rows = LINEAR_ROWS if isinstance(s, LinearLogits) else 0
    if (size := chunk_size(s, 4 if plain else 1, rows * s.shape[axis])) is None:
        s, t = [as_dense(x) for x in (s, t)]
        return blanked(values, s, t, mask, axis=axis)
    s, t = in_three(s, axis), in_three(t, axis)
    mask = None if mask is None else in_three(mask, axis)
    fns = [None if fn is None else partial(blanked, fn) for fn in (values, slope, both)]
    parts = [s] if isinstance(s, Tensor) else [s.hidden, s.weight, s.bias]
    return Chunked.apply(s, t, mask, fns, size, *parts).reshape(shape)


def chunk_size(x: Any, least: int = 4, smallest: int = 0) -> int | None:
    """Return the number of elements per chunk, or None if `x` has fewer than `least` chunks, so that
    it can be processed at once.

    Args:
        x: Logits.
        least: Smallest number of chunks.
        smallest: Smallest number of elements per chunk.
    """
    if torch.compiler.is_compiling() or in_transform() or x.device.type == 'meta':
        return None
    size = max(ON_CPU if x.device.type == 'cpu' else ON_GPU, smallest)
    return None if x.shape.numel() < least * size else size


def in_transform() -> bool:
    """Return True inside a torch.func transform, which does not support the autograd functions used
    here.
    """
    return getattr(torch._C._functorch, 'peek_interpreter_stack', lambda: None)() is not None


def on_cpu_without_gradient(*xs: Tensor) -> bool:
    """Return True on a CPU and without gradients, where it is fast to check whether numbers are
    finite.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        return False
    return all(x.is_cpu for x in xs)


def all_finite(x: Tensor) -> bool:
    return isfinite(x.sum())


def seen_finite(*xs: Tensor) -> bool:
    """Return True if all numbers are known to be finite. They are checked only if this is fast."""
    return on_cpu_without_gradient(*xs) and all(map(all_finite, xs))


def in_three(x: Any, axis: int) -> Any:
    """Reshape logits to (positions before the class axis, classes, positions after it). Logits that
    are not a tensor are reshaped to (positions, ...).
    """
    if isinstance(x, LinearLogits):
        return replace(x, hidden=x.hidden.flatten(0, -2))
    if isinstance(x, Draws):
        ids, freqs = x.ids.flatten(0, -2), x.freqs.flatten(0, -2)
        return replace(x, ids=ids, freqs=freqs, entropy=x.entropy.flatten(), axis=-1)
    before, after = x.shape[:axis].numel(), x.shape[axis + 1 :].numel()
    return x.reshape(before, x.shape[axis], after)


def blanked(
    fn: Callable, s: Tensor, t: Any, mask: Tensor | None, axis: int = 1, **options: Any
) -> Any:
    """Call `fn` with 0 at masked positions, so that a nan at a masked position affects neither the
    loss nor the gradient.
    """
    if mask is not None:
        on = mask > 0
        blank = lambda o: o.where(on if o.dim() == on.dim() else on.squeeze(axis), 0)
        s, t = blank(s), t.map(blank) if isinstance(t, Draws) else blank(t)
    return fn(s, t, axis=axis, **options)


def chunks(shape: Sequence[int], size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of a (before, classes, after) tensor with about `size` elements each."""
    a, c, p = shape
    rows, cols = max(size // (c * p), 1), max(min(p, size // c), 1)
    for i in range(0, a, rows):
        for j in range(0, p, cols):
            yield slice(i, i + rows), slice(None), slice(j, j + cols)


WHOLE = (slice(None),) * 3


class Chunked(torch.autograd.Function):
    """Loss values for logits in the form that `in_three` returns. The backward pass recomputes each
    chunk, unless this would apply the teacher's output layer a second time.

    The last arguments of `apply` are the student's tensors: either the logits, or the hidden states
    and the weight and bias of the output layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        s: Any,
        t: Any,
        mask: Tensor | None,
        fns: Sequence[Any],
        size: int,
        *parts: Any,
    ) -> Tensor:
        values, slope, both = fns
        a, c, p = s.shape if isinstance(s, Tensor) else (*s.shape, 1)
        saved, kept = (t, None) if isinstance(t, Tensor) else (None, t)
        ctx.rest = kept, values, slope, [*chunks((a, c, p), size)], getattr(s, 'cap', None)
        out, t, d = parts[0].new_empty(a, 1, p), in_blocks(t, s), None
        if slope and isinstance(s, Tensor) and isinstance(t, Blocks) and ctx.needs_input_grad[5]:
            d = torch.empty_like(s)  # compute the gradient while the teacher's logits are available
        for i in ctx.rest[3]:
            rows = rows_at((s, t, mask), i)
            if d is None:
                v = values(*rows)
            else:
                v, g = both(*rows) if both else (values(*rows), slope(*rows))
                d[i] = g.reshape(d[i].shape)
            out[i] = v.reshape(out[i].shape)
        ctx.save_for_backward(mask, saved, d, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (mask, t, d, *parts), (kept, values, slope, places, cap) = ctx.saved_tensors, ctx.rest
        t, s = t if kept is None else kept, logits_of_parts(parts, cap)
        if torch.is_grad_enabled():  # the gradient can be differentiated again, without chunks
            v = values(*rows_at((s, t, mask), WHOLE)).reshape(g.shape)
            return *[None] * 5, *gradients_of(v, parts, g, create_graph=True)
        if d is not None:
            return *[None] * 5, d * g
        t = in_blocks(t, s)
        if isinstance(s, Tensor):
            out = torch.empty_like(s)
            for i in places:
                rows = rows_at((s, t, mask), i)
                d = slope(*rows) if slope is not None else by_autograd(values, *rows)
                torch.mul(d.reshape(out[i].shape), g[i], out=out[i])
            return *[None] * 5, out
        needs = ctx.needs_input_grad[5:]
        sums: Any = [torch.zeros_like(p) if need else None for p, need in zip(parts, needs)]
        for i in places:
            own: Any = [p if p is None else p.detach() for p in (parts[0][i[0]], *parts[1:])]
            own = [p.requires_grad_() if need else p for p, need in zip(own, needs)]
            t_rows, m, g_rows = rows_at((t, mask, g), i)
            with torch.enable_grad():
                z = logits_of_parts(own, cap).dense()
                if slope is None:
                    found = gradients_of(values(z, t_rows, m), own, g_rows.squeeze(1))
                else:
                    found = gradients_of(z, own, slope(z.detach(), t_rows, m) * g_rows)
            if needs[0]:
                sums[0][i[0]] = found[0]
            for total, d in zip(sums[1:], found[1:]):
                if total is not None:
                    total += d
        return *[None] * 5, *sums


class Blocks:
    """Rows of `LinearLogits` that are read in order. The output layer is applied to blocks of at
    least `least` positions, although the chunks may be smaller.
    """

    def __init__(self, logits: LinearLogits, least: int):
        self.logits, self.least = logits, least
        self.start, self.block = 0, torch.empty(0)

    def __getitem__(self, rows: slice) -> Tensor:
        if min(rows.stop, len(self.logits)) > self.start + len(self.block):
            step = rows.stop - rows.start
            size = step * -(-self.least // step)  # a whole number of chunks
            hidden = self.logits.hidden[rows.start : rows.start + size]
            self.start, self.block = rows.start, replace(self.logits, hidden=hidden).dense()
        return self.block[rows.start - self.start : rows.stop - self.start]


def in_blocks(t: Any, s: Any) -> Any:
    """Return the teacher's logits as `Blocks` if they are `LinearLogits`, or else as they are."""
    least = TEACHER_ROWS if isinstance(s, Tensor) else LINEAR_ROWS
    return Blocks(t, least) if isinstance(t, LinearLogits) else t


def rows_at(logits: Sequence, i: tuple[slice, slice, slice]) -> list:
    """Return chunk `i` of logits in the form that `in_three` returns. Logits are computed from hidden
    states. A last axis of size 1 is removed, because PyTorch's softmax is faster over the last axis.
    """

    def rows(x: Any) -> Any:
        if isinstance(x, Blocks):
            return x[i[0]]
        if isinstance(x, LinearLogits):
            return replace(x, hidden=x.hidden[i[0]]).dense()
        if isinstance(x, Draws):
            return x.map(lambda o: o[i[0]])
        return None if x is None else x[i].squeeze(2)

    return [rows(x) for x in logits]


@torch.enable_grad()
def by_autograd(values: Callable, s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    s = s.detach().requires_grad_()
    return torch.autograd.grad(values(s, t, mask).sum(), s)[0]


def logits_of_parts(parts: Sequence[Any], cap: float | None) -> Any:
    """Return the student's logits from (logits,) or (hidden states, weight, bias)."""
    if len(parts) == 1:
        return parts[0]
    hidden, weight, bias = parts
    return LinearLogits(hidden, weight, bias, cap)


def gradients_of(v: Tensor, parts: Sequence[Any], g: Tensor, **options: Any) -> list:
    """Return the gradient of each part. Parts that do not require a gradient get None."""
    needed = [p is not None and p.requires_grad for p in parts]
    found = iter(torch.autograd.grad(v, [p for p, on in zip(parts, needed) if on], g, **options))
    return [next(found) if on else None for on in needed]
