"""Define `Clock`, a callback that reports a score after each epoch and can stop the training."""

from collections.abc import Mapping

import torch
from fastai.basics import Callback, CancelFitException

from ..base.outputs import DistillError, Outputs, as_plain
from ..base.task import fit_labels
from ..checks.batch_scores import item_scores


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


def chosen_half(n):
    """Return a bool array (n,) that is True for the validation items that guide the search.

    The half is chosen at random, but is always the same for the same `n`.
    """
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // 2]] = True
    return chosen


def scorer(task):
    """Return a function that computes the score of each item, (B,).

    The score is the fraction of correct predictions in the item. For regression, the score is the
    negative squared error. The score is nan if all labels of the item are ignored.

    Args:
        task: What the student predicts.
    """

    def score(logits, targets):
        y = fit_labels(targets[0], logits.shape, task)
        if y is None:
            raise DistillError(
                f'Labels of shape {tuple(targets[0].shape)} do not fit outputs of shape '
                f'{tuple(logits.shape)}: pass score=, a function of both.'
            )
        return item_scores(logits, y, task)

    return score


def scorer_of_heads(heads, tasks):
    """Return a function that computes the score of each item, averaged over all heads.

    Args:
        heads: {head name: head}.
        tasks: {head name: `Task`}.
    """
    of_each = {k: scorer(t) for k, t in tasks.items()}

    def score(logits, targets):
        scores = [fn(logits[k], heads[k].labels(targets)) for k, fn in of_each.items()]
        return torch.stack([o.float() for o in scores]).nanmean(0)

    return score
