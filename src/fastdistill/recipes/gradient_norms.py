"How long the gradients of a batch's parts are, measured at a place that all of them reach."

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ['gradient_norm', 'norms_at_layer', 'norms_at_logits', 'shares_in_words', 'swamped']


# gradients are measured this many times larger, so that they do not vanish in half precision
SCALE = 2.0**10
# operations that only arrange, copy or average what a layer returned
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


def place_of(x: Tensor):
    """Where `x` comes from in the graph, before it was arranged, copied or averaged: the labels'
    loss may have been computed from there, and not from `x` itself.

    Args:
        x: Logits or features as a term gets them.
    """
    if x.grad_fn is None:
        return x
    edge = get_gradient_edge(x)
    while edge.node.name() in ARRANGES:
        edge = GradientEdge(*edge.node.next_functions[0])
    return edge


def gradient_norm(value: Tensor, at) -> Tensor | None:
    """Length of the gradient of `value` at all of these together, 0-dim and on its device; None
    where it reaches none.

    Args:
        value: 0-dim.
        at: Tensors: logits, or features.
    """
    at = [place_of(x) for x in at]
    grads = torch.autograd.grad(
        value, at, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    norms = [g.float().norm() for g in grads if g is not None]
    return torch.stack(norms).norm() / SCALE if norms else None


def norms_at_logits(values, logits):
    """Part -> the length of its gradient at the student's logits; None if not all reach them."""
    if logits is None or not logits.requires_grad:
        return None
    norms = {k: gradient_norm(v, [logits]) for k, v in values.items()}
    return norms if all(n is not None and n > 0 for n in norms.values()) else None


def norms_at_layer(values, student):
    """Part -> the length of its gradient at the last parameter of the student that all reach; None
    if there is none.
    """
    # subtle: of matrices and kernels where there are any; a bias in front of a batch-norm has a gradient of rounding
    # errors
    params = [p for p in student.parameters() if p.requires_grad]
    params = [p for p in params if p.dim() > 1] or params
    buffers = [(b, b.clone()) for b in student.buffers()]
    norms = {k: norms_at_each(v, params) for k, v in values.items()}
    with torch.no_grad():
        # a checkpointed part runs again in its backward pass, and its batch-norm counts that batch again
        for b, before in buffers:
            if not torch.equal(b, before):
                b.copy_(before)
    shared = [i for i in range(len(params)) if all(n[i] > 0 for n in norms.values())]
    return {k: n[shared[-1]] for k, n in norms.items()} if shared else None


def norms_at_each(value, params):
    grads = torch.autograd.grad(
        value, params, torch.full_like(value, SCALE), retain_graph=True, allow_unused=True
    )
    return [0.0 if g is None else g.float().norm() / SCALE for g in grads]


def shares_in_words(
    shares,  # part -> its share of the gradient
    at_layers,  # term -> its gradient beside that of all these, at its layers
):
    text = ', '.join(f'{"labels" if k == "task" else k} {v:.0%}' for k, v in shares.items())
    return ''.join([text, *(f'; {k} {v:.0%} of these at its layers' for k, v in at_layers.items())])


def swamped(shares, weights):
    """What to say of a part that leaves the labels next to nothing of the gradient; None if there
    is none.

    Args:
        shares: Part -> its share of the gradient; the labels' is 'task'.
        weights: Part -> its weight, of those that have one and no share.
    """
    if not weights.get('task') or 'task' not in shares:
        return None
    part = max(shares, key=lambda k: 0.0 if k == 'task' else shares[k])
    # subtle: labels with the weight .1, as in kd(), have a small share by intention, some .05 at T=4; a fifth of the
    # weight is too little
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
