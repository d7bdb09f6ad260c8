"""Information about the samples of a batch: their positions in the dataset, and how they were
mixed.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from .outputs import DistillError, Outputs, tensors_in


@dataclass
class BatchSamples:
    """Information about the samples of a batch. A `BatchSamples` object is passed along with the
    batch and stays on the CPU.

    Attributes:
        index: Position of each sample in the dataset, (B,). None if no source needs the positions.
        view: Number of the stored view (random augmentation) of each sample, (B,).
        rows: Rows of a cache, (B, bytes) uint8, read by the process that created the batch.
        target: Teacher outputs that are part of the data, (B, ...) (see `TeacherBlock`).
        items: Raw items of the dataset, as a list or as rows of a table.
        moved: Names of the random transforms (such as flips) that changed positions in the inputs,
            but not in the raw items or in the clean view of a cache.
        n_inp: Number of tensors in the batch that are inputs.
        permutations: Permutations used by MixUp or CutMix. Sample i was mixed with sample
            permutation[i].
        lam: Weight of each original sample in the mixed sample.
        pasted: True if the batch was mixed by pasting a region, as CutMix does.
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
    pasted: bool = False

    def pin_memory(self, device: Any = None) -> 'BatchSamples':
        """Pin the rows. PyTorch's DataLoader calls this method."""
        return self if self.rows is None else replace(self, rows=self.rows.pin_memory())

    def refuse_moved(self, out: Outputs, whose: str, instead: str) -> None:
        """Raise a DistillError if outputs for unchanged inputs have positions, but the positions in
        this batch were moved.

        Args:
            out: Outputs for the raw items or the clean view of the samples.
            whose: What the teacher saw, for the error message.
            instead: What to do, for the error message.
        """
        if self.moved and any(t.dim() > 2 for t in tensors_in((out.logits, out.feats))):
            raise DistillError(
                f'{whose}, and its outputs have a value for each pixel or token, but '
                f"{', '.join(self.moved)} would move the student's input. {instead}"
            )

    def refuse_pasted(self, values: Any) -> None:
        """Raise a DistillError if the batch was mixed by pasting a region, and outputs for unmixed
        inputs have positions. The weights in `lam` are correct only for whole samples.

        Args:
            values: Logits of the unmixed samples.
        """
        if self.pasted and any(t.dim() > 2 for t in tensors_in(values)):
            raise DistillError(
                "CutMix pastes a region of one image into another, but the teacher's outputs are "
                'for unmixed images, and have a value for each pixel or token. Use a live teacher '
                "that reads the batch, or remove CutMix. (For masks, fastai's CutMix also mixes "
                'the losses of both masks over all pixels, not by region.)'
            )

    @property
    def mix(self) -> tuple[Tensor, Any] | None:
        """(permutation, lam) used by MixUp or CutMix. None if the batch was not mixed."""
        if not self.permutations:
            return None
        if len(self.permutations) > 1:
            raise DistillError(
                'The batch was mixed twice (MixUp and CutMix together?). Stored outputs can be mixed '
                'only once. Use a live teacher.'
            )
        return self.permutations[0], self.lam
