"""Define `TeacherBlock`, which adds a teacher's outputs to a DataBlock next to the labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastai.basics import ItemTransform, TransformBlock
from torch import Tensor

from ..base.errors import DistillError, check_choice
from ..base.outputs import as_plain
from ..teachers.probabilities import logits_of
from .patches import patch_for_targets
from .teacher_targets import TeacherTarget

GIVEN = ('logits', 'probabilities', 'label_probabilities')


class ToTeacherTarget(ItemTransform):
    """Converts an array, list, tuple, tensor or row of a table to a `TeacherTarget`."""

    _retain, order = False, 1
    makes_teacher_target = True

    def __new__(cls, *args, **kwargs: Any):  # also called when an object is unpickled or copied
        patch_for_targets()
        return super().__new__(cls)

    def __init__(self, given, n_out, names):
        super().__init__()
        self.teacher_given, self.n_out, self.teacher_names = given, n_out, names

    def encodes(self, o):
        t = (
            torch.as_tensor(np.asarray(o), dtype=torch.float32)
            if not isinstance(o, Tensor)
            else as_plain(o).float()
        )
        want = len(self.teacher_names) if self.teacher_names else self.n_out
        if want is not None and (t.dim() == 0 or t.shape[0] != want):
            raise DistillError(
                f'A teacher target has shape {tuple(t.shape)}, but TeacherBlock expects {want} values. '
                'Does the getter return one row for each item?'
            )
        if not t.isfinite().all():
            raise DistillError(
                'A teacher target has nan or infinite values: fix it, or remove its item.'
            )
        return TeacherTarget(to_logits(t, self.teacher_given))


def to_logits(t, given):
    """Return logits whose softmax (or sigmoid) equals the probabilities `t`."""
    if given == 'logits':
        return t
    if t.min() < 0 or t.max() > 1:
        raise DistillError(
            f'given={given!r}, but a teacher target ranges from {t.min():g} to {t.max():g}: use '
            "given='logits'."
        )
    return logits_of(t, 'softmax' if given == 'probabilities' else 'sigmoid')


class TeacherBlock(TransformBlock):
    """A block for a teacher's outputs.

    `DataBlock((ImageBlock, CategoryBlock, TeacherBlock), get_y=[label, row])` creates items of the
    form (x, (y, y_teacher)).

    Args:
        given: Content of the rows: 'logits', 'probabilities' or, for several labels per item,
            'label_probabilities'.
        n_out: Number of values in a row. This is checked for each row.
        vocab: Names of the teacher's classes, in the order of a row. The classes are mapped to the
            labels by name.
    """

    holds_teacher = True

    def __init__(
        self, given: str = 'logits', n_out: int | None = None, vocab: Sequence | None = None
    ):
        check_choice('given', given, GIVEN)
        super().__init__(
            type_tfms=ToTeacherTarget(
                given, n_out, None if vocab is None else list(map(str, vocab))
            )
        )
