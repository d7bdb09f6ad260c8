"""Compute the task loss of a head, with labels at the positions where the model predicts them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..base.distributed import rank
from ..base.task import Task, labels_loss
from ..recipes.token_labels import labels_to_shift, next_tokens


class TaskLoss:
    """The task loss of a head.

    Language models predict the next token at each position. Labels that are aligned with the input
    tokens are moved by one position.

    Args:
        task: The `Task` that describes the student's logits.
        loss: fn(student logits, *targets) -> task loss. It gets the labels as they are. None for
            the default loss of the task.
        shift: Whether to move the labels. None to detect this in the first batch.
        causal: True if the student predicts the next token.
    """

    def __init__(self, task: Task, loss: Callable | None, shift: bool | None, causal: bool):
        self.task, self.loss, self.shift, self.causal = task, loss, shift, causal

    def __call__(self, x: Any, logits: Any, targets: Sequence) -> tuple[Tensor | None, Sequence]:
        """Return (task loss, moved targets). The task loss is None if there are no targets."""
        if not targets:
            return None, targets
        at = self.moved(x, logits, targets)
        if self.loss is not None:
            return self.loss(logits, *targets), at
        return labels_loss(logits, *at, task=self.task), at

    def moved(self, x: Any, logits: Any, targets: Sequence) -> Sequence:
        """Move the targets to the positions where the model predicts them."""
        if self.shift is None and targets:
            self.shift = labels_to_shift(x, targets[0], logits.shape, self.task, self.causal)
            if self.shift and rank() == 0:
                print(
                    'fastdistill: the labels are the inputs themselves, so each label is moved one '
                    'position earlier, where it is predicted. Pass shift_labels=True to confirm '
                    'this, or shift_labels=False to leave them'
                )
        if not self.shift:
            return targets
        return next_tokens(targets[0], self.task.ignore_index), *targets[1:]
