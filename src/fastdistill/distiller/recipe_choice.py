"""Let `auto` choose the recipe of a head from the outputs of its first batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..base.distributed import of_first, rank
from ..base.outputs import DistillError, Outputs
from ..recipes.batch_tensors import plain_logits
from ..recipes.default import auto, facts_for_auto
from .head import Head


def choose(
    h: Head, student: Outputs, ask: Callable[[], Outputs] | None, labels: Sequence | bool
) -> None:
    """Let `auto` choose the recipe of a head that has none yet.

    Args:
        h: The head.
        student: Student outputs for a batch.
        ask: fn() -> teacher outputs for the same batch. None if unknown.
        labels: Labels of the same batch, or whether the batches have labels.
    """
    if ask is not None:
        logits: Any = student.logits
        doubt = 'the teacher is in doubt, see above' if h.doubt else None
        facts = facts_for_auto(
            logits.shape, h.task, lambda: plain_logits(student, ask())[1], labels
        )
        chosen = of_first(auto(**facts, labels=bool(labels), doubt=doubt))
        h.take(chosen)
        if rank() == 0:
            print(f'fastdistill: {h.prefix}recipe {chosen}')
    elif h.teacher is not None and torch.is_grad_enabled():
        raise DistillError(
            f"{h.prefix}there is no recipe yet. It is chosen from the teacher's outputs, but they "
            'are None for this batch. Pass what teacher_outputs() returned.'
        )
    elif h.teacher is None and not h.name:
        raise DistillError(
            'There is no recipe, no teacher and no teacher output for this batch, so there is '
            'nothing to distill. Pass a teacher or a recipe to the Distiller, or the outputs of '
            'the teacher to compute().'
        )
