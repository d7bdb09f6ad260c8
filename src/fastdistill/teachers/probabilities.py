"""Convert probabilities to logits."""

from torch import Tensor

from ..base.outputs import DistillError
from .image_normalization import full_precision

LEAST = 1e-7  # minimum probability, since the logarithm of 0 is infinite


def logits_of(p: Tensor, kind: str = 'softmax') -> Tensor:
    """Compute logits whose softmax or sigmoid is `p`.

    Args:
        p: Probabilities.
        kind: 'softmax' for mutually exclusive classes, 'sigmoid' for independent labels.
    """
    p = full_precision(p)
    log = lambda o: o.clamp_min(LEAST).log()
    return log(p) if kind == 'softmax' else log(p) - log(1 - p)


def check_probabilities(p: Tensor, kind: str, axis: int, name: str) -> None:
    """Raise a DistillError if the output of a teacher does not consist of probabilities.

    Args:
        p: Output of a teacher with outputs='probs'.
        kind, axis: As in `Teacher`.
        name: Name of the teacher.
    """
    if kind == 'regression':
        raise DistillError(
            "outputs='probs' is for classes and labels, but this teacher predicts numbers "
            "(kind='regression'): use outputs='logits'."
        )
    v = full_precision(p)
    if not v.isfinite().all():
        return  # other checks report nan and inf
    if v.min() < -1e-3 or v.max() > 1.001:
        raise DistillError(
            f"outputs='probs', but the outputs of {name} go from {v.min():g} to {v.max():g}: "
            "use outputs='logits', or name the output with the probabilities, output=."
        )
    if (
        kind == 'softmax'
        and -v.dim() <= axis < v.dim()
        and (far := (v.sum(axis) - 1).abs().max()) > 0.02
    ):
        raise DistillError(
            f"outputs='probs', but the probabilities of {name} sum to {1 - far:g} or {1 + far:g} along axis "
            f'{axis}, not to 1. Is axis= the class axis? For probabilities of independent labels, pass '
            "kind='sigmoid'."
        )
