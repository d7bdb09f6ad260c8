"""Explain why a trained student is not better.

The explanation measures what the student learned from its teacher and looks for known obstacles.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ..base.class_mapping import taught_part, taught_task
from ..base.outputs import DistillError
from ..base.random_state import guarded_random_state
from ..base.task import Task, fit_labels
from ..teachers.members import known_classes
from ..teachers.teacher import Teacher
from .batch_scores import FEW, LEADS, METRICS, Tally
from .findings import Facts, Finding, Findings
from .forward import student_logits, teacher_logits
from .shapes import mismatches
from .teacher_confidence import saturated

# a student that reproduces a smaller fraction of the teacher's predictions does not follow it
FOLLOWS = 0.5
# maximum difference between these fractions for training and for validation items
GAP = 0.2
FEW_STEPS = 1000  # a training run with fewer steps is short
LITTLE_LEFT = 0.1  # a term is reported if less than this fraction of its gradient ratio is left
LITTLE = 0.1  # minimum fraction of the gradient that the task loss should have


class Follow:
    """Fraction of the teacher's predictions that a student reproduces, 1 - d/d0.

    In this formula, d is the distance between the predictions of student and teacher: the KL divergence at
    T=1, or the squared error for regression. d0 is the distance between the teacher's predictions
    and their mean. The fraction is 1 if the predictions are equal, and 0 if the student is as far
    from the teacher as the mean is. The fraction is negative for a student that is even farther
    away, e.g. one with confident wrong predictions.

    `same` is the fraction of predictions with the same class as the teacher's.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.n, self.apart, self.own = task, 0, 0.0, 0.0
        self.sums: Any = 0.0  # a tensor after the first batch
        self.squares: Any = 0.0
        self.n_same: float = 0
        self.n_classes = 0

    def add(self, s: Tensor, t: Tensor) -> None:
        s, t = (o.double() for o in (s, t))
        if self.task.kind == 'softmax':
            axis = self.task.axis % s.dim()
            s, t = (o.movedim(axis, -1).flatten(0, -2).log_softmax(-1) for o in (s, t))
        elif self.task.kind == 'sigmoid':
            s, t = (torch.stack([o, -o], -1).flatten(1, -2) for o in (s, t))
            s, t = (F.logsigmoid(o) for o in (s, t))
        else:
            s, t = (o.reshape(len(o), -1) for o in (s, t))
        self.n += len(t)
        if self.task.kind == 'regression':
            self.apart += (s - t).pow(2).sum().item()
            self.sums, self.squares = self.sums + t.sum(0), self.squares + t.pow(2).sum(0)
        else:
            p, equal = t.exp(), s.argmax(-1) == t.argmax(-1)
            self.n_same += equal.sum().item()
            self.n_classes += equal.numel()
            self.apart += torch.where(p > 0, p * (t - s), 0.0).sum().item()
            self.own += torch.where(p > 0, p * t, 0.0).sum().item()
            self.sums = self.sums + p.sum(0)

    @property
    def same(self) -> float | None:
        return self.n_same / self.n_classes if self.n_classes else None

    @property
    def value(self) -> float | None:
        if not self.n:
            return None
        mean = self.sums / self.n
        if self.task.kind == 'regression':
            most = (self.squares / self.n - mean**2).sum().item()
        else:
            most = self.own / self.n - torch.where(mean > 0, mean * mean.log(), 0.0).sum().item()
        return 1 - self.apart / self.n / most if most > 1e-9 else None


@dataclass
class Explanation(Facts):
    """Measurements after training. A value is None if it could not be measured.

    Attributes:
        teacher_score_train: Score of the teacher on augmented training items.
        follows_train: Fraction of the teacher's predictions that the student reproduces on training
            items, see `Follow`.
        follows_valid: Fraction of the teacher's predictions that the student reproduces on validation
            items.
        repeats: Fraction of the teacher's mistakes on validation items that the student repeats.
            Compare it with the value for a student trained without a teacher, which also makes many
            of these mistakes.
        steps: Number of training steps.
        shares: {loss: fraction of the gradient on the first batch}.
        same_train: Fraction of training predictions that have the same class as the teacher's. None
            for regression.
        same_valid: Fraction of validation predictions that have the same class as the teacher's. None
            for regression.
        faded: {term: fraction of its gradient ratio that is left at the end of training}.
        best_epoch: Epoch with the lowest validation loss, and the number of epochs. None if unknown.
    """

    teacher_score_train: float | None = None
    follows_train: float | None = None
    follows_valid: float | None = None
    repeats: float | None = None
    steps: int | None = None
    shares: dict = field(default_factory=dict)
    same_train: float | None = None
    same_valid: float | None = None
    faded: dict = field(default_factory=dict)
    best_epoch: tuple[int, int] | None = None

    @property
    def converged(self) -> bool:
        """True if the validation loss reached its minimum clearly before the end of training."""
        return self.best_epoch is not None and self.best_epoch[0] <= 0.9 * (self.best_epoch[1] - 1)

    def lines(self) -> Iterator[str]:
        """Yield lines of text about the scores and about what the student learned from the
        teacher.
        """
        if self.n:
            yield self.scores
        what = 'predictions' if self.metric == METRICS['regression'] else 'probabilities'
        for text, train, valid in (
            (
                f"of the teacher's {what}, the student reproduces",
                self.follows_train,
                self.follows_valid,
            ),
            ("it predicts the teacher's class for", self.same_train, self.same_valid),
        ):
            parts = dict(training=train, validation=valid).items()
            if found := ', '.join(f'{k} {as_percent(v)}' for k, v in parts if v is not None):
                yield f'{text}: {found}'


def explain_training(
    teacher: Teacher,
    task: Task,
    student: Module,
    valid: Iterable,
    train: Iterable = (),
    *,
    steps: int | None = None,
    shares: Mapping[str, float] | None = None,
    faded: Mapping[str, float] | None = None,
    output: Any = None,
    lower: Callable | None = None,
    losses: Sequence[float] = (),
) -> Findings:
    """Find reasons why distillation helped less than expected.

    Each finding has the measured number and a suggestion. The attribute `facts` of the result has
    all measurements.

    Args:
        teacher: A `Teacher`.
        task: What the student predicts.
        student: The module of the trained student.
        valid: Validation batches (inputs, targets), where both are tuples.
        train: Augmented training batches (inputs, targets), where both are tuples.
        steps: Number of training steps.
        shares: {loss: fraction of the gradient}, as in `Distiller.gradient_shares`.
        faded: {term: fraction of its gradient ratio that is left}, as in `Distiller.faded`.
        output: Which output of the student is distilled.
        lower: fn(term) -> which options of the term to lower (`Recipe.how_to_lower`).
        losses: Validation loss of each epoch.
    """
    groups = known_classes(teacher)
    own, task = task, taught_task(task, groups)
    tallies = (Tally(task), Tally(task))
    follows = (Follow(task), Follow(task))
    mistakes = [0.0, 0.0]
    with guarded_random_state(), teacher:
        for i, batches in enumerate((valid, train)):
            for xb, yb in batches:
                y = yb[0] if len(yb) and isinstance(yb[0], Tensor) else None
                t, s = teacher_logits(teacher, xb), student_logits(student, xb, output)
                s, y = taught_part(s, y, groups, own)
                if wrong := Findings(mismatches(s.shape, t.shape, y, task)):
                    return wrong
                y = None if y is None else fit_labels(y, t.shape, task)
                tallies[i].add(t, y, s)
                follows[i].add(s, t)
                if i == 0 and y is not None and task.kind == 'softmax':
                    add_mistakes(mistakes, s, t, y, task)
    if not follows[0].n:
        raise DistillError('There are no validation items on which to compare student and teacher.')
    f, other = tallies[0].facts(), tallies[1].facts()
    facts = Explanation(
        f.metric,
        f.n,
        f.teacher_score,
        f.student_score,
        top_prob_train=other.top_prob_valid,
        teacher_score_train=other.teacher_score,
        follows_train=follows[1].value,
        follows_valid=follows[0].value,
        repeats=mistakes[1] / mistakes[0] if mistakes[0] >= FEW else None,
        steps=steps,
        shares=dict(shares or {}),
        same_train=follows[1].same,
        same_valid=follows[0].same,
        faded=dict(faded or {}),
        best_epoch=(1 + min(range(len(losses)), key=losses.__getitem__), len(losses))
        if losses
        else None,
    )
    found = Findings(reasons(facts, tallies[0], lower))
    found.facts, found.none = facts, 'No obstacle to distillation was found.'
    return found


def add_mistakes(counts: list[float], s: Tensor, t: Tensor, y: Tensor, task: Task) -> None:
    """Count the teacher's mistakes, and the mistakes that the student repeats."""
    s, t = s.argmax(task.axis), t.argmax(task.axis)
    wrong = (t != y) & (y != task.ignore_index)
    counts[0] += wrong.sum().item()
    counts[1] += (wrong & (s == t)).sum().item()


def as_percent(v: float) -> str:
    return f'{max(v, 0.0):.0%}' if v > -0.005 else 'less than 0%'


def reasons(f: Explanation, valid: Tally, lower: Callable | None = None) -> Iterator[Finding]:
    """Yield the reasons that the measurements suggest, the most likely first.

    Args:
        f: The measurements.
        valid: `Tally` of the validation set.
        lower: fn(term) -> which options of the term to lower (`Recipe.how_to_lower`).
    """
    if f.n:
        yield from no_better(f.scores, valid.items('teacher'), valid.items('student'), valid)
    yield from does_not_follow(f)
    yield from other_view(f)
    yield from saturated(f.top_prob_train, None, valid.task)
    if 'task' in f.shares and f.shares['task'] < LITTLE:
        largest = max(f.shares, key=lambda k: f.shares[k])
        yield Finding(
            'note',
            f'The task loss had {as_percent(f.shares["task"])} of the gradient on the first batch',
            'Give the task loss more weight' if lower is None else lower(largest),
        )
    for name, left in f.faded.items():
        if left < LITTLE_LEFT:
            yield Finding(
                'note',
                f"At the end of training, {left:.0%} of {name}'s gradient ratio was left: the "
                "teacher's predictions added little to the student's on training batches",
                'Use a better teacher. To follow this one anyway, pass the recipe without fade=',
            )
    if f.steps is not None and f.steps < FEW_STEPS and not f.converged:
        yield Finding(
            'note',
            f'The training had {f.steps} steps, but many recipes need a few thousand to show a '
            'gain',
            'Train longer',
        )


def no_better(score: str, teacher: Tensor, student: Tensor, valid: Tally) -> Iterator[Finding]:
    """Yield a finding if the teacher's score is not better than the student's."""
    if len(teacher) < FEW:
        yield Finding(
            'note',
            f'There are too few items to compare the models ({score})',
            'Use a larger validation set to see whether the teacher is better',
        )
    elif valid.above(student, teacher, least=0.0):
        yield Finding(
            'warning',
            f'The student is better than the teacher ({score}), so it learns more from the labels '
            'than from the teacher',
            'Use a better teacher, or train on the labels only',
        )
    elif not valid.above(teacher, student, least=0.0, sure=LEADS):
        yield Finding(
            'warning',
            f'The teacher is not significantly better than the student ({score})',
            'Use a better teacher, or a smaller student, which may become just as good',
        )


def does_not_follow(f: Explanation) -> Iterator[Finding]:
    """Yield a finding if the student does not reproduce the teacher's predictions.

    The student may fail on all items, or only on items that were not used in training.
    """
    if f.follows_train is not None and f.follows_train < FOLLOWS:
        steps = f' after {f.steps} steps' if f.steps else ''
        what = 'predictions' if f.same_train is None else 'probabilities'
        same = (
            ''
            if f.same_train is None
            else f', and predicts its class for {as_percent(f.same_train)} of them'
        )
        yield Finding(
            'warning',
            'The student does not follow the teacher even on training items: it reproduces '
            f"{as_percent(f.follows_train)} of the teacher's {what}{same}{steps}",
            'Use a larger student or a larger gradient ratio for the teacher; the validation loss was '
            f'lowest after epoch {f.best_epoch[0]} of {f.best_epoch[1]}'
            if f.converged and f.best_epoch
            else 'Train longer first. If that is not enough, use a larger student or a larger gradient '
            'ratio for the teacher',
        )
    elif (
        f.follows_train is not None
        and f.follows_valid is not None
        and f.follows_train - f.follows_valid > GAP
    ):
        yield Finding(
            'warning',
            f'The student follows the teacher on training items ({as_percent(f.follows_train)}), '
            f'but less on validation items ({as_percent(f.follows_valid)})',
            'Train on more inputs: unlabeled items, stronger augmentation, or MixUp',
        )


def other_view(f: Explanation) -> Iterator[Finding]:
    """Yield a finding if the teacher is worse on augmented training items than on validation items.

    A probable reason is stronger augmentation than in the teacher's training.
    """
    if f.teacher_score is None or f.teacher_score_train is None:
        return
    if f.metric == METRICS['regression']:
        return
    if f.teacher_score - f.teacher_score_train > 0.1:
        yield Finding(
            'warning',
            f'The teacher predicts worse on augmented training items ({f.metric} '
            f'{f.teacher_score_train:.3f}) than on validation items ({f.teacher_score:.3f})',
            "Augment less, or as in the teacher's training. Does the teacher get images of the size "
            'that it was trained on?',
        )
