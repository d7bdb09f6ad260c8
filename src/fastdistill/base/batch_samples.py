"""The samples of a batch: which they are, and how they were mixed."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from .outputs import DistillError

__all__ = ['BatchSamples']


@dataclass
class BatchSamples:
    """The samples of a batch. It travels with the batch, and stays on the CPU.

    Attributes:
        index: Position of each sample in the dataset, (B,). None if no source looks anything up.
        view: View of each sample, (B,).
        rows: Rows of a cache, (B, bytes) uint8, read where the batch was made.
        target: Teacher outputs that are part of the data, (B, ...), see `TeacherBlock`.
        items: Raw items, a list or rows of a table.
        moved: Names of the transforms that moved positions in the inputs, but not in the items.
        n_inp: Number of tensors of the batch that are inputs.
        permutations: What MixUp or CutMix did: each sample was mixed with the one at its place in
            the permutation.
        lam: Fraction of each sample that is left after mixing.
    """

    index: np.ndarray | None = None
    view: np.ndarray | None = None
    rows: Tensor | None = None
    target: Tensor | None = None
    items: Any = None
    moved: list = field(default_factory=list)
    n_inp: int | None = None
    permutations: list = field(default_factory=list)
    lam: Tensor | None = None

    def pin_memory(self, device: Any = None) -> 'BatchSamples':
        """Called by PyTorch's DataLoader."""
        return self if self.rows is None else replace(self, rows=self.rows.pin_memory())

    @property
    def mix(self) -> tuple[Tensor, Any] | None:
        """(permutation, lam) of MixUp or CutMix. None if the batch was not mixed."""
        if not self.permutations:
            return None
        if len(self.permutations) > 1:
            raise DistillError(
                'The batch was mixed twice (MixUp and CutMix together?). Stored outputs can be mixed '
                'only once. Use a live teacher.'
            )
        return self.permutations[0], self.lam
