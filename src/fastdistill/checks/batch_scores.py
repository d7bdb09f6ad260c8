"""Score the teacher, the student and a constant prediction on a few batches."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..base.task import Task, unusable
from .findings import Facts

MOST_CLASSES = 1000  # maximum number of classes for a confusion table
FEW = 16  # minimum number of items for a significance test
SURE = 0.001  # maximum one-sided p-value of a significant difference
LEADS = 0.05  # maximum p-value at which one model is considered better than the other
# minimum relevant difference, relative to the difference between a constant and a perfect
# prediction
SLIGHT = 0.05
METRICS = dict(softmax='accuracy', sigmoid='accuracy per label', regression='squared error')


class Tally:
    """Statistics of predictions and labels over a few batches.

    The statistics are accumulated batch by batch, since all outputs together may not fit in memory.

    Args:
        task: What the model predicts.
        part: Dataset of the scored items, as in `Facts`.
    """

    def __init__(self, task: Task, part: str = 'validation') -> None:
        self.part = part
        self.task, self.n_labels = task, 0
        self.sums: Any = 0.0  # a tensor after the first batch
        self.confusion: Tensor | None = None
        # (outputs, labels) of each batch with several labels or numbers for each item
        self.several: list[tuple[Tensor, Tensor]] = []
        # one number for each item
        self.scores: dict[str, list[Tensor]] = dict(teacher=[], student=[])
        self.tops: dict[str, list[Tensor]] = dict(train=[], valid=[])
        self.between = True  # whether all outputs are between 0 and 1
        self.normed = True  # whether each row of outputs sums to 1
        self.finite = True

    def add(self, t: Tensor, y: Tensor | None = None, s: Tensor | None = None) -> None:
        """Add a batch, usually from the validation set.

        Args:
            t: Outputs of the teacher.
            y: Labels from `fit_labels`. None if unknown.
            s: Outputs of the student. None if unknown.
        """
        t, s = t.float(), None if s is None else s.float()
        self.add_probabilities(t, 'valid')
        if y is None:
            return
        for who, o in dict(teacher=t, student=s).items():
            if o is not None:
                self.scores[who].append(item_scores(o, y, self.task)[has_labels(y, self.task)])
        if self.task.kind != 'softmax' and t.dim() == 2 and 1 < t.shape[1] <= MOST_CLASSES:
            self.several.append((t.cpu(), y.cpu().float()))
        dict(softmax=self.add_classes, sigmoid=self.add_labels, regression=self.add_numbers)[
            self.task.kind
        ](t, y)

    def add_probabilities(self, t: Tensor, part: str) -> None:
        """Add the top probability of each item, averaged over its positions.

        Args:
            t: Outputs of the teacher.
            part: Dataset of the batch, 'train' or 'valid'.
        """
        kind, axis = self.task.kind, self.task.axis
        self.finite = self.finite and not unusable(t, self.task)
        self.between = self.between and bool((t >= 0).all() and (t <= 1).all())
        if kind == 'softmax':
            self.normed = self.normed and bool(((t.sum(axis) - 1).abs() < 1e-3).all())
        if kind == 'regression':
            return
        p = t.softmax(axis).amax(axis) if kind == 'softmax' else t.abs().sigmoid()
        self.tops[part].append(p.reshape(len(p), -1).mean(1).cpu())

    def add_classes(self, t: Tensor, y: Tensor) -> None:
        """For each class, count its items, the correct predictions and all predictions.

        All positions of an item together have a weight of 1.
        """
        c, counts = t.shape[self.task.axis], counts_of(y, self.task).cpu()
        p, y = (o.reshape(len(o), -1).cpu()[counts] for o in (t.argmax(self.task.axis), y))
        w = (counts.double() / counts.sum(1, keepdim=True).clamp_min(1))[counts]
        there, recognized = y.bincount(w, minlength=c), y[p == y].bincount(w[p == y], minlength=c)
        self.sums = self.sums + torch.stack([there, recognized, p.bincount(w, minlength=c)])
        self.n_labels += len(y)
        if c > MOST_CLASSES:
            return
        # subtle: split the items into two tables, since a chance effect appears in only one of them
        half = torch.arange(len(counts))[:, None].expand_as(counts)[counts] % 2
        table = ((half * c + y) * c + p).bincount(w, minlength=2 * c * c).view(2, c, c)
        self.confusion = table if self.confusion is None else self.confusion + table

    def add_labels(self, t: Tensor, y: Tensor) -> None:
        """Count the items with and without each label.

        Also add the sums of the predicted probabilities and of their squares.
        """
        p, y = (o.reshape(len(o), -1).cpu().double() for o in (t.sigmoid(), y > 0.5))
        self.sums = self.sums + torch.stack(
            [y.sum(0), (1 - y).sum(0), (p * y).sum(0), (p * (1 - y)).sum(0), p.pow(2).sum(0)]
        )
        self.n_labels += len(y)

    def add_numbers(self, t: Tensor, y: Tensor) -> None:
        """Add the squared errors, the targets and the squared targets of each output."""
        t, y = (o.reshape(len(o), -1).cpu().double() for o in (t, y))
        self.sums = self.sums + torch.stack([(t - y).pow(2).sum(0), y.sum(0), y.pow(2).sum(0)])
        self.n_labels += len(y)

    # results

    def items(self, who: Literal['teacher', 'student']) -> Tensor:
        return torch.cat(self.scores[who]) if self.scores[who] else torch.zeros(0)

    def variance(self) -> float:
        return (self.sums[2] / self.n_labels - (self.sums[1] / self.n_labels) ** 2).mean().item()

    @property
    def constant(self) -> float:
        """Score of the best constant prediction."""
        if self.task.kind == 'regression':
            return -self.variance()
        if self.task.kind == 'softmax':
            return (self.sums[0].max() / self.sums[0].sum()).item()
        return (self.sums[:2].amax(0) / self.sums[:2].sum(0)).mean().item()

    def above(
        self, a: Tensor, b: Tensor | float, least: float = SLIGHT, sure: float = SURE
    ) -> bool:
        """Return True if the scores `a` are significantly higher than the scores `b`.

        Args:
            a: Scores of some items.
            b: Scores of the same items, or a single score.
            least: Minimum difference, relative to the difference between a constant and a perfect
                prediction.
            sure: Maximum p-value.
        """
        if len(a) < FEW:
            return False
        way = (0.0 if self.task.kind == 'regression' else 1.0) - self.constant
        return (a - b).double().mean().item() / max(way, 1e-9) > least and p_above(a, b) < sure

    def above_constant(self, least: float, sure: float = SURE) -> bool:
        """Return True if the teacher scores significantly higher than a constant prediction."""
        return self.above(self.items('teacher'), self.constant, least, sure)

    def facts(self) -> Facts:
        """Return the mean scores and probabilities."""
        mean = lambda o: torch.cat(o).mean().item() if o else None
        score = lambda v: None if v is None else -v if self.task.kind == 'regression' else v
        # a softmax over probabilities is meaningless
        logits = not (self.between and (self.normed or self.task.kind == 'sigmoid'))
        train, valid = (mean(self.tops[part]) if logits else None for part in ('train', 'valid'))
        n = len(self.items('teacher'))
        return Facts(
            METRICS[self.task.kind],
            n,
            score(mean(self.scores['teacher'])),
            score(mean(self.scores['student'])),
            score(self.constant) if n else None,
            train,
            valid,
            self.part,
            None if self.confusion is None else (int((self.sums[0] > 0).sum()), self.sums.shape[1]),
        )


def counts_of(y: Tensor, task: Task) -> Tensor:
    """Return a mask of the labels that are not ignored, (B, positions)."""
    y = y.reshape(len(y), -1)
    if task.kind == 'softmax':
        return y != task.ignore_index
    return torch.ones_like(y, dtype=torch.bool)


def has_labels(y: Tensor, task: Task) -> Tensor:
    """Return a mask of the items with at least one label that is not ignored, (B,)."""
    return counts_of(y, task).any(1).cpu()


def item_scores(o: Tensor, y: Tensor, task: Task) -> Tensor:
    """Return the score of each item, (B,).

    The score is the negative squared error for regression, and the fraction of correct predictions
    otherwise. It is nan if all labels of the item are ignored.
    """
    rows = lambda v: v.reshape(len(v), -1).float()
    if task.kind == 'regression':
        return -rows(o - y).pow(2).mean(1).cpu()
    right = o.argmax(task.axis) == y if task.kind == 'softmax' else (o > 0) == (y > 0.5)
    counts = rows(counts_of(y, task))
    return ((rows(right) * counts).sum(1) / counts.sum(1)).cpu()


def p_above(a: Tensor, b: Tensor | float) -> float:
    """Return the one-sided p-value for the null hypothesis that the mean of `a` is not higher than
    the mean of `b`.

    Scores that are all 0 or 1 are compared with an exact binomial test. Other scores are compared
    with a t-test.

    Args:
        a: Scores, (items,).
        b: Scores of the same items, or a number.
    """
    from scipy import stats

    are = lambda o, *values: bool(torch.isin(o, torch.tensor(values, dtype=o.dtype)).all())
    d = a.double() - b
    if not isinstance(b, Tensor) and are(a, 0.0, 1.0):
        right, n, chance = int(a.sum()), len(a), min(max(b, 0.0), 1.0)
    elif isinstance(b, Tensor) and are(d, -1.0, 0.0, 1.0):
        right, n, chance = int((d > 0).sum()), int((d != 0).sum()), 0.5
    else:
        mean, sd = d.mean().item(), d.std().item()
        return float(stats.t.sf(mean / sd * len(d) ** 0.5, len(d) - 1)) if sd else float(mean <= 0)
    return float(stats.binomtest(right, n, chance, alternative='greater').pvalue) if n else 1.0
