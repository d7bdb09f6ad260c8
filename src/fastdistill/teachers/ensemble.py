"Several teachers as one: their weights, and the mean of their predictions."

from math import log

import torch
import torch.nn.functional as F

from ..base.outputs import DistillError
from .images import full_precision

__all__ = ['mix', 'member_weights']


def member_weights(weights, n):
    """Weights that add up to 1."""
    w = [1.0] * n if weights is None else [float(o) for o in weights]
    if len(w) != n or min(w) < 0 or not 0 < sum(w) < float('inf'):
        raise DistillError(
            f'weights={weights} of {n} teachers: give each one number, none below 0, not all 0'
        )
    return [o / sum(w) for o in w]


def mix(logits, weights, combine, kind, axis):
    """Logits of the mean prediction of several teachers.

    Args:
        logits: Of each member, equal shapes.
        weights: Of each member, adding up to 1.
        combine, kind, axis: As in `Teacher`
    """
    for i, o in enumerate(logits):
        if o.shape != logits[0].shape:
            raise DistillError(
                f'Logits of member {i} of the ensemble have shape {tuple(o.shape)}, those of member 0 '
                f'{tuple(logits[0].shape)}: they must be equal. Teacher(member, select=...) selects '
                'classes of a member; a function can resize its outputs.'
            )
    weights, logits = zip(*[(w, full_precision(o)) for w, o in zip(weights, logits) if w > 0])
    if combine == 'logits' or kind == 'regression':
        return sum(w * o for w, o in zip(weights, logits))
    log_mean = lambda lps: torch.stack([lp + log(w) for lp, w in zip(lps, weights)]).logsumexp(0)
    if kind == 'sigmoid':
        return log_mean(map(F.logsigmoid, logits)) - log_mean(F.logsigmoid(-o) for o in logits)
    return log_mean(F.log_softmax(o, axis) for o in logits)
