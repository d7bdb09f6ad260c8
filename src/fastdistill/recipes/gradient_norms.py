"Gradient norms of the losses of a batch, measured at tensors or parameters that all losses reach."

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Module

__all__ = ['gradient_norm', 'norms_at_layer', 'norms_at_logits', 'shares_in_words', 'swamped']


# gradients are scaled by this while they are measured, so that they do not vanish in half precision
SCALE = 2.0**10
# operations that only rearrange, copy or average the output of a layer
ARRANGES = {
    f'{n}Backward{i}'
    for i in (0, 1)
    for n in (
        'Alias',
        'Clone',
        'Mean',
        'Permute',
        'ReshapeAlias',
        'Slice',
        'ToCopy',
        'Transpose',
        'UnsafeView',
        'View',
    )
}


def find_origin(x: Tensor) -> Tensor | GradientEdge:
    """Return the place in the graph that `x` comes from, before it was rearranged, copied or
    averaged. The task loss may have been computed from there instead of from `x` itself.

    Args:
        x: Logits or features, as a term gets them.
    """
    if x.grad_fn is None:
        return x
    edge = get_gradient_edge(x)
    while edge.node.name() in ARRANGES:
        node, output = edge.node.next_functions[0]
        edge = GradientEdge(cast(Node, node), output)
    return edge


def gradient_norm(value: Tensor, at: Sequence[Tensor]) -> Tensor | None:
    """Compute the norm of the gradient of `value` with respect to these tensors together.

    Args:
        value: A loss, 0-dim.
        at: Tensors, logits or features.

    Returns:
        0-dim, on the device of `value`. None if `value` depends on none of the tensors.
    """
    places: Any = [find_origin(x) for x in at]
    grads = torch.autograd.grad(
        value, places, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    norms = [g.float().norm() for g in grads if g is not None]
    return torch.stack(norms).norm() / SCALE if norms else None


def norms_at_logits(
    values: Mapping[str, Tensor], logits: Tensor | None
) -> dict[str, Tensor] | None:
    """Compute the gradient norm of each loss at the student's logits. None if not all losses reach
    them.
    """
    if logits is None or not logits.requires_grad:
        return None
    norms: dict[str, Any] = {k: gradient_norm(v, [logits]) for k, v in values.items()}
    return norms if all(n is not None and n > 0 for n in norms.values()) else None


def norms_at_layer(values: Mapping[str, Tensor], student: Module) -> dict[str, Any] | None:
    """Compute the gradient norm of each loss at the last student parameter that all losses reach.
    None if there is none.
    """
    # subtle: preferably matrices and kernels; the gradient of a bias before a batch norm is only rounding errors
    params = [p for p in student.parameters() if p.requires_grad]
    params = [p for p in params if p.dim() > 1] or params
    buffers = [(b, b.clone()) for b in student.buffers()]
    norms = {k: norms_at_each(v, params) for k, v in values.items()}
    with torch.no_grad():
        # a checkpointed module runs again in its backward pass, and its batch norm would count this batch twice
        for b, before in buffers:
            if not torch.equal(b, before):
                b.copy_(before)
    shared = [i for i in range(len(params)) if all(n[i] > 0 for n in norms.values())]
    return {k: n[shared[-1]] for k, n in norms.items()} if shared else None


def norms_at_each(value: Tensor, params: Sequence[Tensor]) -> list[float | Tensor]:
    grads = torch.autograd.grad(
        value, params, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    return [0.0 if g is None else g.float().norm() / SCALE for g in grads]


def shares_in_words(shares: Mapping[str, float], at_layers: Mapping[str, float]) -> str:
    """Format gradient norms for the line that is printed at the first batch.

    Args:
        shares: {name: fraction of the gradient}. The task loss is 'task'.
        at_layers: {term name: ratio of its gradient norm to that of all these, at its layers}.
    """
    text = ', '.join(f'{k} {v:.0%}' for k, v in shares.items())
    terms = (f". Term '{k}': {v:.0%} of that, measured at its layers" for k, v in at_layers.items())
    return ''.join([text, *terms])


def swamped(shares: Mapping[str, float], weights: Mapping[str, float]) -> str | None:
    """Return a warning if one loss dominates the gradient so that the task loss has almost no
    effect, else None.

    Args:
        shares: {name: fraction of the gradient}. The task loss is 'task'.
        weights: {name: weight} of the losses that have a weight, not a gradient ratio.
    """
    if not weights.get('task') or 'task' not in shares:
        return None
    part = max(shares, key=lambda k: 0.0 if k == 'task' else shares[k])
    # subtle: with the weight 0.1, as in kd(), the task loss has a small fraction by design, about 0.05 at T=4. Only
    # less than a fifth of its weight is too little
    if (
        part == 'task'
        or part not in weights
        or shares[part] <= 0.9
        or shares['task'] >= weights['task'] / 5
    ):
        return None
    equal = (
        f'{weights[part] * shares["task"] / shares[part]:.2g} would give it as much as the labels'
    )
    shared = abs(weights[part] + weights['task'] - 1) < 1e-6  # as alpha and 1-alpha
    how = 'alpha, or T' if shared else f'the weight of {part}, now {weights[part]:.4g}: {equal}'
    return (
        f'{part} has {shares[part]:.2%} of the gradient of the first batch, the labels have {shares["task"]:.2%}, '
        f'so the student hardly learns from them. Lower {how}.'
    )
