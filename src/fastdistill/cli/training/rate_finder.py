"""Find a learning rate with a few steps of training at several rates, for `--lr auto`."""

import math
from copy import deepcopy
from typing import Any

import numpy as np
from fastai.basics import CancelFitException, CancelValidException
from fastai.callback.schedule import ParamScheduler, combined_cos

from .resumable_fit import BEFORE_FIT, seed_epoch

RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1  # learning rates that find_rate may try
FIRST = RATES.index(1e-2)
IF_NONE_IS_FOUND = 1e-3
STEPS = 20  # steps for which each rate is tried


class ShortTraining(ParamScheduler):
    """Callback that trains for a few steps with the schedule of fit_one_cycle, and then ends the
    fit. `losses` contains the training loss of each step. The fit also ends if the loss is not
    finite.

    Args:
        lr: Maximum learning rate.
        steps: Number of steps.
    """

    def __init__(self, lr: float, steps: int):
        momentum = combined_cos(0.25, 0.95, 0.85, 0.95)
        super().__init__(dict(lr=combined_cos(0.25, lr / 25, lr, lr / 1e5), mom=momentum))
        self.steps = steps
        self.losses: list[float] = []

    def before_batch(self) -> None:
        self._update_val(len(self.losses) / self.steps)

    def after_batch(self) -> None:
        super().after_batch()
        self.losses.append(self.loss.item())
        if len(self.losses) == self.steps or not math.isfinite(self.losses[-1]):
            raise CancelFitException()

    def before_validate(self) -> None:
        raise CancelValidException()

    @property
    def score(self) -> float:
        """Mean loss of the last third of the steps. Infinite if the fit ended earlier."""
        if len(self.losses) < self.steps or not math.isfinite(self.losses[-1]):
            return math.inf
        return float(np.mean(self.losses[-(self.steps // 3) :]))


def find_rate(learn: Any, *seed: int) -> float | None:
    """Return a learning rate at which a few steps of training lead to a lower loss than at its
    neighbors in RATES. Return None if no loss is finite.

    Args:
        learn: A Learner. Its weights are restored at the end.
        *seed: Numbers from which the seeds are computed. All rates are tried on the same batches.
    """
    start = deepcopy(learn.model.state_dict())
    scores: dict[int, float] = {}
    ahead = [FIRST]
    while ahead:
        for i in ahead:
            seed_epoch(learn, *seed, BEFORE_FIT)
            training = ShortTraining(RATES[i], STEPS)
            with learn.no_bar(), learn.no_logging():
                learn.fit(STEPS, cbs=training, reset_opt=True)  # an epoch has at least one step
            scores[i] = training.score
            learn.model.load_state_dict(start)
        best = min(scores, key=lambda i: (scores[i], i))
        ahead = [i for i in (best - 1, best + 1) if i in range(len(RATES)) and i not in scores]
    return RATES[best] if math.isfinite(scores[best]) else None
