"How much the teacher's predictions add to the student's, measured on the labels of the batches."

import torch
from torch import Tensor

from ..base.distributed import sum_over_ranks
from ..base.outputs import as_plain
from ..base.task import Task, fit_labels

__all__ = ['TeacherGain', 'label_errors']


class TeacherGain:
    """The part of the student's squared error on the labels that the teacher's predictions explain:
    1 - min over m in [0, 1] of |y - (m p_teacher + (1-m) p_student)|^2 / |y - p_student|^2, where p are
    probabilities at T=1 (numbers in regression), and the sums over samples are running means. It is
    close to 1 for a teacher that knows the labels of a student that does not, and 0 for a teacher
    whose predictions no mixture improves on the student's.

    The sums stay on the device, so that no step waits for them.
    """

    ENOUGH = 0.2  # a larger gain leaves the gradient ratio as it is
    NEW = 0.2  # minimum weight of a new batch in the mean ...
    POSITIONS = 64  # ... of this many positions; of fewer, it is lower

    def __init__(self) -> None:
        self.batches = 0
        self.sums: Tensor | None = None  # see `label_errors`

    def add(self, errors: Tensor) -> None:
        """Add a batch to the running means. All ranks must call this.

        Args:
            errors: Result of `label_errors`.
        """
        sum_over_ranks([errors])
        self.batches += 1
        *_, positions = errors
        # subtle: means of sums, not of errors, so that all positions that count weigh the same
        before = torch.zeros_like(errors[:3]) if self.sums is None else self.sums.to(errors)
        rate = (positions / self.POSITIONS).clamp(max=1.0) * self.NEW
        means = before.lerp(errors[:3], rate.clamp_min(1 / self.batches))
        self.sums = means.where(errors.isfinite().all(), before)

    @property
    def gain(self) -> Tensor:
        """The part of the student's squared error that the teacher explains, 0-dim. It is 1 before the
        first batch, and where both models predict the same.
        """
        if self.sums is None:
            return torch.ones(())
        error, agreement, distance = self.sums.clamp_min(0)  # a gain of 0 has no sign
        m = (agreement / distance.clamp_min(1e-30)).clamp(0, 1)
        explained = (2 * m * agreement - m * m * distance) / error.clamp_min(1e-30)
        return explained.where((distance > 0) & (error > 0), 1.0)

    @property
    def factor(self) -> Tensor:
        """What a gradient ratio is multiplied by, from 0 to 1, 0-dim."""
        return (self.gain / self.ENOUGH).clamp(max=1.0)

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
    mask: Tensor | None = None,
) -> Tensor | None:
    """Return the sums over a batch of |y - p_s|^2, of (y - p_s) (p_t - p_s), and of |p_t - p_s|^2,
    and the number of positions, as one tensor (4,). None if the labels do not fit, or if the models
    predict different things.

    Args:
        s: Student logits.
        t: Teacher logits.
        labels: The labels; of a mixed batch, the first and the second ones.
        task: The `Task` that describes the logits.
        lam: Weight of the first labels in a mixed batch, one or one for each sample.
        mask: Which positions count. Shape of the logits without the class axis.
    """
    if not all(isinstance(y, Tensor) for y in labels) or t.shape != s.shape:
        return None
    error, p = (-probabilities_of(o, task) for o in (s, t))
    distance = error - p
    weights: list = [1.0] if lam is None else [lam, 1 - lam]
    for y, w in zip(labels, weights):
        if not add_labels(error, as_plain(y), w, task):
            return None
    products = torch.stack([error * error, error * distance, distance * distance])
    if mask is not None:
        axis = task.axis % s.dim()
        products = products * (mask if mask.dim() == s.dim() else mask.unsqueeze(axis)).to(products)
    classes = s.shape[task.axis] if -s.dim() <= task.axis < s.dim() else 1
    return torch.cat([products.flatten(1).sum(1), products.new_tensor([s.numel() / classes])])


def probabilities_of(logits: Tensor, task: Task) -> Tensor:
    logits = as_plain(logits).float()
    if task.kind == 'softmax':
        return logits.softmax(task.axis)
    return logits.sigmoid() if task.kind == 'sigmoid' else logits


def add_labels(out: Tensor, y: Tensor, weight: Tensor | float, task: Task) -> bool:
    """Add weight * labels to a tensor in the shape of the logits, as probabilities or numbers. Return
    False if they do not fit.

    Args:
        weight: A number, or one for each sample.
    """
    if isinstance(weight, Tensor):
        weight = weight.to(out).reshape(-1, *[1] * (out.dim() - 1))
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
    # a label that does not count is hidden by the mask
    index = fitted.clamp(0, out.shape[axis] - 1).unsqueeze(axis)
    out.scatter_add_(axis, index, torch.ones_like(out.narrow(axis, 0, 1)) * weight)
    return True
