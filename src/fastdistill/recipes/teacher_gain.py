"""Estimate from the labels of training batches how much the teacher's predictions would improve the
student's predictions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.distributed import sum_over_ranks
from ..base.outputs import as_plain
from ..base.task import Task, fit_labels


class TeacherGain:
    """Fraction of the student's squared error that the teacher's predictions can remove. The gain
    is 1 - min over m in [0, 1] of |y - (m p_teacher + (1-m) p_student)|^2 / |y - p_student|^2. In
    this formula, y are the labels and p are probabilities at T=1 (or predicted numbers in
    regression). Sums over samples are replaced by running means over batches. The gain is close to
    1 if the teacher predicts the labels well and the student does not. The gain is 0 if no mixture
    of both predictions is better than the student's predictions.

    All sums stay on the GPU, so training steps do not wait for a transfer to the CPU.

    Args:
        enough: A gain above this leaves the gradient ratio unchanged.
    """

    NEW = 0.2  # minimum weight of a new batch in the running mean
    POSITIONS = 64  # a batch with fewer positions has a proportionally lower minimum weight

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.batches = 0
        # running means of the first three numbers of `label_errors`
        self.sums: Tensor | None = None

    def add(self, errors: Tensor) -> None:
        """Add a batch to the running means. In distributed training, all ranks must call this
        method.

        Args:
            errors: Result of `label_errors` for the batch.
        """
        sum_over_ranks([errors])
        self.batches += 1
        *_, positions = errors
        # subtle: average the sums instead of the errors per position, so that each position has the
        # same weight
        before = torch.zeros_like(errors[:3]) if self.sums is None else self.sums.to(errors)
        rate = (positions / self.POSITIONS).clamp(max=1.0) * self.NEW
        means = before.lerp(errors[:3], rate.clamp_min(1 / self.batches))
        self.sums = means.where(errors.isfinite().all(), before)

    @property
    def gain(self) -> Tensor:
        """Fraction of the student's squared error that the teacher's predictions can remove, a
        0-dim tensor. The gain is 1 before the first batch, and if both models make the same
        predictions.
        """
        if self.sums is None:
            return torch.ones(())
        error, agreement, distance = self.sums.clamp_min(0)  # avoid a gain of -0
        m = (agreement / distance.clamp_min(1e-30)).clamp(0, 1)
        explained = (2 * m * agreement - m * m * distance) / error.clamp_min(1e-30)
        return explained.where((distance > 0) & (error > 0), 1.0)

    @property
    def factor(self) -> Tensor:
        """Factor for the gradient ratio of a term, from 0 to 1, a 0-dim tensor."""
        return (self.gain / self.enough).clamp(max=1.0)

    def state_dict(self) -> dict:
        return dict(batches=self.batches, sums=None if self.sums is None else self.sums.tolist())

    def load_state_dict(self, state: dict) -> None:
        self.batches = state['batches']
        self.sums = None if state['sums'] is None else torch.tensor(state['sums'])


@torch.no_grad()
def label_errors(
    s: Tensor,
    t: Tensor,
    labels: list,
    task: Task,
    *,
    lam: Tensor | None = None,
    masks: Sequence[Tensor | None] = (None,),
) -> Tensor | None:
    """Compute the sums from which `TeacherGain` estimates the gain. The result has shape (4,): the
    sums over the batch of |y - p_s|^2, of (y - p_s) (p_t - p_s) and of |p_t - p_s|^2, and the
    number of positions. The result is None if the labels do not fit the logits, or if the shapes of
    both models' logits differ.

    Args:
        s: Student logits.
        t: Teacher logits.
        labels: List with the labels. For a batch mixed by MixUp, the first and the second labels.
        task: The `Task` that describes the logits.
        lam: Weight of the first labels in a mixed batch: one number, or one number per sample.
        masks: Positions to include, for each of `labels`. Same shape as the logits without the class
            axis, or None to include all positions.
    """
    if not all(isinstance(y, Tensor) for y in labels) or t.shape != s.shape:
        return None
    error, p = (-probabilities_of(o, task) for o in (s, t))
    distance = error - p
    weights: list = [1.0] if lam is None else [at_samples(w, error) for w in (lam, 1 - lam)]
    mask: Any = None
    if any(m is not None for m in masks):
        weights = [
            w if m is None else w * at_positions(m, error, task) for w, m in zip(weights, masks)
        ]
        # subtle: if only one of the two labels of a position is included, that label has weight 1
        mask = sum(weights)
        weights = [w / mask.clamp_min(1e-30) for w in weights]
    for y, w in zip(labels, weights):
        if not add_labels(error, as_plain(y), w, task):
            return None
    products = torch.stack([error * error, error * distance, distance * distance])
    if mask is not None:
        products = products * mask
    classes = s.shape[task.axis] if -s.dim() <= task.axis < s.dim() else 1
    return torch.cat([products.flatten(1).sum(1), products.new_tensor([s.numel() / classes])])


def at_samples(weight: Tensor, like: Tensor) -> Tensor:
    """Reshape one number, or one number per sample, so that it multiplies `like`."""
    return weight.to(like).reshape(-1, *[1] * (like.dim() - 1))


def at_positions(mask: Tensor, like: Tensor, task: Task) -> Tensor:
    """Give a mask a class axis, so that it multiplies `like`."""
    mask = mask if mask.dim() == like.dim() else mask.unsqueeze(task.axis % like.dim())
    return mask.to(like)


def probabilities_of(logits: Tensor, task: Task) -> Tensor:
    logits = as_plain(logits).float()
    if task.kind == 'softmax':
        return logits.softmax(task.axis)
    return logits.sigmoid() if task.kind == 'sigmoid' else logits


def add_labels(out: Tensor, y: Tensor, weight: Tensor | float, task: Task) -> bool:
    """Add weight * labels to `out` in place. Class labels are added as one-hot vectors. Return
    False if the shapes of the labels and of `out` do not fit.

    Args:
        weight: A number, or a tensor with one class that broadcasts to `out`.
    """
    classes = task.kind == 'softmax'
    if classes and y.is_floating_point() and y.shape == out.shape:
        out += weight * y
        return True
    if (fitted := fit_labels(y, out.shape, task)) is None:
        return False
    if not classes:
        out += weight * fitted
        return True
    axis = task.axis % out.dim()
    # the mask excludes labels outside the range, so any valid index will do
    index = fitted.clamp(0, out.shape[axis] - 1).unsqueeze(axis)
    out.scatter_add_(axis, index, torch.ones_like(out.narrow(axis, 0, 1)) * weight)
    return True
