"""Check that the task loss is a mean over the batch, like the terms of a recipe."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import few_names
from ..base.outputs import map_tensors
from ..base.random_state import guarded_random_state
from .findings import Finding
from .recipe import terms_of

# a loss is a sum if repeating each sample of a batch increases it by more than this factor
GROWS = 1.5


def summed_loss(loss: Callable | None, recipe: Any, example: Callable) -> Iterator[Finding]:
    """Yield a finding if the task loss is a sum over the batch and terms have a fixed weight.

    The weights then depend on the batch size. Gradient ratios do not.

    Args:
        loss: fn(outputs of the student, *targets) -> task loss. None if unknown.
        recipe: A recipe. None if unknown.
        example: fn() -> (outputs of the student, targets) of a batch, or None. It is called only if
            the loss has no attribute `reduction`.
    """
    fixed = [t.name for t in terms_of(recipe) if not t.has_grad_ratio and t.weight != 0]
    if loss is None or not fixed or getattr(recipe, 'task', None) == 0:
        return
    reduction = getattr(loss, 'reduction', None)
    if not (grows(loss, example) if reduction is None else reduction == 'sum'):
        return
    yield Finding(
        'warning',
        'The task loss is a sum over the batch, but the terms are means, so the fixed weight of '
        f'{few_names(fixed, 3)} depends on the batch size: with batches of 64, the task loss counts 64 '
        'times as much as the weights say',
        "Use a mean over the batch (reduction='mean'), or give the terms grad_ratio= instead of a weight",
        about='task loss',
    )


def grows(loss: Callable, example: Callable) -> bool:
    """Return True if the loss grows when each sample of a batch is repeated."""
    # subtle: any error is possible, because the loss may be the user's own code. Training raises it
    # again.
    try:
        if (found := example()) is None:
            return False
        loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
        with torch.no_grad(), guarded_random_state():
            once, twice = (loss(s, *y) for s, y in (found, (doubled(found[0]), doubled(found[1]))))
        return bool(once > 0 and twice > GROWS * once)
    except Exception:
        return False


def doubled(o: Tensor | Sequence) -> Any:
    """Return batches in which each sample occurs twice."""
    return map_tensors(o, lambda t: torch.cat([t, t]))
