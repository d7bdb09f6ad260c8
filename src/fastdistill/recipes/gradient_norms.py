"""Measure the gradient norm of each loss of a batch, at a tensor or parameter on which all losses
depend.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Module

from ..base.model_state import TensorValues
from ..base.outputs import as_plain

# Gradients are scaled by this factor while they are measured, to avoid underflow in half precision
SCALE = 2.0**10
# operations that only rearrange, copy, average, stack or mask the outputs of layers
ARRANGES = {
    f'{n}Backward{i}'
    for i in (0, 1)
    for n in (
        'Alias',
        'Clone',
        'MaskedFill',
        'Mean',
        'Permute',
        'ReshapeAlias',
        'Slice',
        'Stack',
        'ToCopy',
        'Transpose',
        'UnsafeView',
        'View',
    )
}
# operations that keep the position of each element
COPIES = {f'{n}Backward0' for n in ('Alias', 'Clone', 'ToCopy')}


def find_origins(
    x: Tensor, operations: Collection[str] = ARRANGES
) -> list[Tensor] | list[GradientEdge]:
    """Find the tensors in the autograd graph that were rearranged, copied, averaged, stacked or
    masked to get `x`. The task loss may have been computed from these tensors instead of from `x`.

    Args:
        x: Logits or features that a term compares.
        operations: Names of the operations that may lie between the two.
    """
    if x.grad_fn is None:
        return [x]
    edges = [get_gradient_edge(x)]
    origins: dict[GradientEdge, None] = {}
    while edges:
        edge = edges.pop()
        if edge.node.name() not in operations:
            origins[edge] = None
            continue
        edges += [GradientEdge(n, i) for n, i in edge.node.next_functions if n is not None]
    return [*origins]


def gradient_norm(value: Tensor, at: Sequence[Tensor]) -> Tensor | None:
    """Compute the norm of the gradient of `value` with respect to all tensors in `at`.

    Args:
        value: A loss, 0-dim.
        at: List of tensors: logits or features.

    Returns:
        The norm as a 0-dim tensor on the device of `value`. None if `value` does not depend on any
        of the tensors.
    """
    places: Any = [o for x in at for o in find_origins(x)]
    grads = torch.autograd.grad(
        value, places, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    norms = [g.float().norm() for g in grads if g is not None]
    return torch.stack(norms).norm() / SCALE if norms else None


def part_at(value: Tensor, x: Tensor) -> Tensor | None:
    """Return a tensor with the value 0 that has the same gradient with respect to `x` as `value`.
    It stands for the part of a loss that depends on one of several outputs.

    Args:
        value: A loss, 0-dim.
        x: Output of a model, or a copy of it.

    Returns:
        None if `value` does not depend on `x`.
    """
    scale = torch.full_like(value, SCALE)
    places: Any = find_origins(x, COPIES)
    (g,) = torch.autograd.grad(value, places, scale, retain_graph=True, allow_unused=True)
    if g is None:
        return None
    finite = x.where(x.isfinite(), 0.0)
    return ((finite - finite.detach()).float() * (as_plain(g).float() / SCALE)).sum()


def norms_at_logits(
    values: Mapping[str, Tensor], logits: Tensor | None
) -> dict[str, Tensor] | None:
    """Compute the gradient norm of each loss at the student's logits. Return None if a loss does
    not depend on the logits.
    """
    if logits is None or not logits.requires_grad:
        return None
    norms: dict[str, Any] = {k: gradient_norm(v, [logits]) for k, v in values.items()}
    return norms if all(n is not None and n > 0 for n in norms.values()) else None


def norms_at_layer(values: Mapping[str, Tensor], student: Module) -> dict[str, Any] | None:
    """Compute the gradient norm of each loss at the last student parameter on which all losses
    depend. Return None if there is no such parameter.
    """
    # subtle: prefer weight matrices and kernels, because the gradient of a bias before a batch norm
    # is only rounding error
    params = [p for p in student.parameters() if p.requires_grad]
    params = [p for p in params if p.dim() > 1] or params
    buffers = TensorValues(student.buffers())
    norms = {k: norms_at_each(v, params) for k, v in values.items()}
    # With activation checkpointing, the backward pass runs a module a second time.
    # Running statistics of batch norms would then include this batch twice.
    buffers.restore()
    shared = [i for i in range(len(params)) if all(n[i] > 0 for n in norms.values())]
    return {k: n[shared[-1]] for k, n in norms.items()} if shared else None


def norms_at_each(value: Tensor, params: Sequence[Tensor]) -> list[float | Tensor]:
    grads = torch.autograd.grad(
        value, params, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    return [0.0 if g is None else g.float().norm() / SCALE for g in grads]
