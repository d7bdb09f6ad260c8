"""Define `Clock`, a callback that reports a score after each epoch and can stop the training."""

from collections.abc import Mapping

import torch
from fastai.basics import Callback, CancelFitException

from ..base.outputs import DistillError, Outputs, as_plain
from .trial_scores import chosen_half


class Clock(Callback):
    """Callback that scores the validation items whenever a fit runs validation.

    The scores of one half of the items guide the search. The other half is used in the final test.

    Args:
        score: fn(logits, targets) -> (B,) scores, see `scorer`.
        output: Which of the student's outputs is scored, as in `Distiller`. For several heads, a
            dict {head name: output}. With several heads, the logits passed to `score` are a dict,
            too.
        after_epoch: fn(mean score of the half that guides the search). It returns True to stop the
            training.
        late: fn() -> True if the time limit is exceeded.
    """

    order = -100  # run before all other callbacks, which should do nothing if the training is over

    def __init__(self, score, output, after_epoch, late):
        super().__init__()
        self.score, self.output, self.after_score, self.late = score, output, after_epoch, late
        self.over, self.items = False, None

    def __call__(self, event_name):
        # other callbacks may validate in the middle of a fit, which locks the Learner
        if not self.learn.lock.locked():
            return super().__call__(event_name)

    def before_fit(self):
        if self.over:
            raise CancelFitException  # also cancels the second fit of `fine_tune`

    def before_validate(self):
        self.batches = []

    def after_pred(self):
        if self.training or not len(self.yb):
            return
        if isinstance(self.output, Mapping):
            logits = {k: self._logits(o) for k, o in self.output.items()}
        else:
            logits = self._logits(self.output)
        self.batches.append(self.score(logits, tuple(map(as_plain, self.yb))).float().cpu())

    def _logits(self, output):
        return as_plain(Outputs.of(self.learn.pred, output=output).logits).detach().float()

    def after_batch(self):
        if self.training and self.late():
            self._end()

    def after_epoch(self):
        if not self.batches:
            raise DistillError('The validation set has no labels, so recipes cannot be compared.')
        self.items = torch.cat(self.batches)
        if self.after_score(self.items[chosen_half(len(self.items))].nanmean().item()):
            self._end()

    def _end(self):
        self.over = True
        raise CancelFitException
