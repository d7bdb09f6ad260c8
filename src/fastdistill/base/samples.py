"""Information about the samples of a batch, and the protocol for sources of teacher outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .outputs import DistillError, Draws, LinearLogits, Outputs, TopK, as_plain

__all__ = ['BatchSamples', 'OutputSource', 'lerp', 'mixed']


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
        moved: Names of the transforms (such as flips) that changed positions in the inputs but not
            in the raw items.
        n_inp: Number of tensors in the batch that are inputs.
        permutations: Permutations used by MixUp or CutMix. Sample i was mixed with sample
            permutation[i].
        lam: Weight of each original sample in the mixed sample.
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
        """Pin the rows. PyTorch's DataLoader calls this method."""
        return self if self.rows is None else replace(self, rows=self.rows.pin_memory())

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


@runtime_checkable
class OutputSource(Protocol):
    """Source of teacher outputs for batches: a model, a cache or the batch itself.

    Attributes:
        name: Name of the source in messages.
        needs: Field of `BatchSamples` that the source needs: 'items', 'rows' or 'target'. Empty if
            the inputs are enough.
    """

    name: str
    needs: str

    def start(self) -> None:
        """Prepare the source for many batches. A second call does nothing."""

    def outputs(
        self, inputs: Sequence = (), samples: BatchSamples | None = None, layers: Sequence[str] = ()
    ) -> Outputs:
        """Return the teacher's outputs for a batch.

        Args:
            inputs: Inputs of the batch.
            samples: Information about the samples of the batch. None if unknown.
            layers: Names of layers whose outputs are also returned.
        """

    def has_outputs(self, samples: BatchSamples | None) -> bool:
        """Return True if there are outputs for these samples. Stored outputs may cover only the
        training set.
        """

    def probe(self, *x: Any, layers: Sequence[str] | None = None) -> Outputs:
        """Return outputs with the same shapes as those for a batch, without changing any state.

        Args:
            *x: Inputs of the batch.
            layers: Names of layers whose outputs are returned. None for all layers that the source
                provides.
        """

    def named_modules(self) -> dict:
        """Return {layer name: module}. The dict is empty if the source has no model."""

    def say_with(self, fn: Callable | None) -> None:
        """Set the function that shows messages.

        Args:
            fn: fn(text). None to print.
        """

    def reset(self) -> None:
        """Reset hidden states before the first batch of a training or validation phase."""

    def stop(self) -> None:
        """Restore the state from before `start`. This method may be called at any time and more
        than once.
        """


def mixed(out: Outputs, samples: BatchSamples, kind: str, axis: int) -> Outputs:
    """Mix the outputs of unmixed samples in the same way as MixUp (arXiv:1710.09412) or CutMix
    (arXiv:1905.04899) mixed the batch.

    Args:
        kind: Kind of the logits: 'softmax', 'sigmoid' or 'regression'.
        axis: Class axis.
    """
    if samples is None or (mix_of := samples.mix) is None:
        return out
    if out.feats:
        raise DistillError(
            'MixUp and CutMix mix images, but the stored layers are of unmixed images. '
            'Remove the terms with layers, or use a live teacher.'
        )
    if isinstance(out.logits, Draws):
        raise DistillError(
            'MixUp and CutMix mix probabilities, but the cache holds draws of unmixed images. Remove the '
            "callback, or store the outputs in a different way, cache_teacher(..., store='auto')."
        )
    mix = lambda t: mix_logits(t, *mix_of, kind, axis)
    if isinstance(out.logits, LinearLogits):
        return replace(out, logits=mix(out.logits.dense()))
    if isinstance(out.logits, TopK):
        return replace(out, logits=MixedTopK(**vars(out.logits), mix=mix))
    return replace(out, logits=mix(out.logits))


@dataclass
class MixedTopK(TopK):
    """`TopK` of unmixed samples. `dense` first computes the logits of all classes and then mixes
    them.
    """

    mix: Any = None

    def dense(self, student: Tensor | None = None) -> Tensor:
        return self.mix(super().dense(student))


def mix_logits(t: Tensor, perm: Tensor, lam: Tensor, kind: str, axis: int) -> Tensor:
    """Compute the logits of mixed probabilities.

    Args:
        t: Logits of the samples before mixing, (B, C, ...).
    """
    if kind == 'regression':
        return lerp(t, perm, lam)
    t = t.float()
    lam = as_plain(torch.as_tensor(lam, device=t.device)).float().reshape(-1, *[1] * (t.dim() - 1))
    # log(lam*exp(a) + (1-lam)*exp(b)) without overflow
    both = lambda a: torch.logaddexp(a + lam.log(), a[perm] + (1 - lam).log())
    if kind == 'softmax':
        return both(t.log_softmax(axis))
    return both(F.logsigmoid(t)) - both(F.logsigmoid(-t))


def lerp(t: Tensor, perm: Tensor, lam: Tensor) -> Tensor:
    """Mix as fastai does, with weight `lam` for each sample and weight 1-`lam` for the permuted
    sample.
    """
    lam = as_plain(torch.as_tensor(lam, device=t.device)).to(t.dtype).reshape(-1)
    return torch.lerp(t[perm], t, lam.reshape(-1, *[1] * (t.dim() - 1)))
