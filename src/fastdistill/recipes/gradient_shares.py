"""Measure which fraction of the gradient each loss of a batch has, and warn if one term dominates."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from .gradient_norms import norms_at_layer, norms_at_logits


def gradient_shares(
    values: Mapping[str, Tensor], weights: Mapping[str, Any], logits: Tensor | None, student: Any
) -> dict[str, float]:
    """Return {loss: its fraction of the gradient}, without changing the training.

    The gradient is measured at the logits if all losses depend on them, otherwise at the last
    student parameter on which all losses depend. The result is empty if there is no such parameter.

    Args:
        values: {name: value} of the task loss ('task') and the terms of a batch.
        weights: {name: weight}.
        logits: The student's logits. None to measure at its parameters.
        student: The student. None if unknown.
    """
    try:
        norms = norms_at_logits(values, logits)
        if norms is None and isinstance(student, Module):
            norms = norms_at_layer(values, student)
    except RuntimeError:
        return {}  # compiled or checkpointed parts may allow only one backward pass
    weighted = {k: float(weights[k] * n) for k, n in (norms or {}).items()}
    return {k: n / sum(weighted.values()) for k, n in weighted.items()}


def shares_in_words(shares: Mapping[str, float], at_layers: Mapping[str, float]) -> str:
    """Format gradient norms for the line printed at the first batch.

    Args:
        shares: {name: fraction of the sum of all gradient norms}. The task loss is named 'task'.
        at_layers: {term name: ratio of the term's gradient norm to that of the losses in `shares`,
            measured at the layers of the term}.
    """
    text = ', '.join(f'{k} {v:.0%}' for k, v in shares.items())
    terms = (f". Term '{k}': {v:.0%} of that, measured at its layers" for k, v in at_layers.items())
    return ''.join([text, *terms])


def swamped(shares: Mapping[str, float], weights: Mapping[str, float]) -> str | None:
    """Return a warning if one term dominates the gradient and the task loss has almost no effect.
    Otherwise return None.

    Args:
        shares: {name: fraction of the sum of all gradient norms}. The task loss is named 'task'.
        weights: {name: weight} of all losses without a gradient ratio.
    """
    if not weights.get('task') or 'task' not in shares:
        return None
    part = max(shares, key=lambda k: 0.0 if k == 'task' else shares[k])
    # subtle: in kd(), the task loss has weight 0.1, so its fraction of the gradient is small by
    # design (about 0.05 at T=4). Warn only if that fraction is less than a fifth of the weight.
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
