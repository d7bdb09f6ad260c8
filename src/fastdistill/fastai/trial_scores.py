"""Score the validation items of a trial, and divide them between the search and the final test."""

import torch

from ..base.outputs import DistillError
from ..base.task import fit_labels
from ..checks.batch_scores import item_scores


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
