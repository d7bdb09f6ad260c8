"""Find out whether the labels of a language model must be shifted, and which tokens are padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import DistillError, as_plain, tensors_in
from ..base.task import Task, shape_of_labels


def padding_mask(x: Any, shape: Sequence[int], axis: int) -> Tensor | None:
    """Find the `attention_mask` in the inputs of a batch. Return None unless the logits have one
    position per token.

    Args:
        x: Inputs of the batch: a tuple that may contain a dict with an attention mask.
        shape: Shape of the logits.
        axis: Class axis of the logits.
    """
    found = [
        o['attention_mask']
        for o in x
        if isinstance(o, Mapping) and isinstance(o.get('attention_mask'), Tensor)
    ]
    return (
        as_plain(found[0]) > 0 if found and found[0].shape == shape_of_labels(shape, axis) else None
    )


def next_tokens(y: Tensor, ignore_index: int) -> Tensor:
    """Shift the labels of a causal language model by one position, so that each label is at the
    position that predicts it. The last position has no label.

    Args:
        y: Labels, (B, L), each at the position of its token.
    """
    return F.pad(as_plain(y)[:, 1:], (0, 1), value=ignore_index)


def labels_to_shift(
    x: Any, y: Any, shape: Sequence[int], task: Task, causal: bool = False
) -> bool | None:
    """Check whether the labels of a language model must be shifted by one position. Labels must be
    shifted if each label is at the position of its token. No shift is needed if each label is one
    position earlier, where the token is predicted. Return None if this batch has no labels.

    This check synchronizes with the GPU, so call it only once.

    Args:
        x: Inputs of the batch.
        y: Labels.
        shape: Shape of the logits.
        causal: True if the student is a causal model, which predicts the next token.
    """
    tokens = task.kind == 'softmax' and len(shape) == 3 and isinstance(y, Tensor)
    if not tokens or y.shape != shape_of_labels(shape, task.axis):
        return False
    y = as_plain(y)
    ids = [as_plain(o) for o in tensors_in(x) if o.shape == y.shape and not o.is_floating_point()]
    on = y != task.ignore_index
    if not on.any():
        return None
    here = any((o == y)[on].all() for o in ids)
    ahead = any((o[:, 1:] == y[:, :-1])[on[:, :-1]].all() for o in ids)
    if here != ahead or not causal:
        return here and not ahead
    raise DistillError(
        'The student predicts the next token, but the alignment of these labels cannot be '
        'detected. If each label is at the position of its own token, as Hugging Face models '
        'expect, pass shift_labels=True to the Distiller. If it is one position earlier, where the '
        'token is predicted, pass shift_labels=False'
    )
