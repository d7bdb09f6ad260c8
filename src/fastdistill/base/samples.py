"""The samples of a batch, and the protocol of whatever has a teacher's outputs for them."""

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


@runtime_checkable
class OutputSource(Protocol):
    """Teacher outputs for batches, from a model, a cache or the batch itself.

    Attributes:
        name: In messages.
        needs: What the samples of a batch must bring: 'items', 'rows' or 'target'. Empty if the
            inputs are enough.
    """

    name: str
    needs: str

    def start(self) -> None:
        """Prepare for many batches. A second call changes nothing."""

    def outputs(
        self, inputs: Sequence = (), samples: BatchSamples | None = None, layers: Sequence[str] = ()
    ) -> Outputs:
        """Return the teacher's outputs for a batch.

        Args:
            inputs: Inputs of the batch.
            samples: Its samples. None if they are unknown.
            layers: Names of layers that are read too.
        """

    def has_outputs(self, samples: BatchSamples | None) -> bool:
        """Return True if there are outputs for these samples. Stored ones may cover only the
        training set.
        """

    def probe(self, *x: Any, layers: Sequence[str] | None = None) -> Outputs:
        """Return outputs of the shapes of those for a batch. Nothing changes.

        Args:
            *x: Inputs of the batch.
            layers: Names of layers that are read. None for the source's own.
        """

    def named_modules(self) -> dict:
        """Return {name of a layer: module}. Empty if there is no model."""

    def say_with(self, fn: Callable | None) -> None:
        """Set where messages go.

        Args:
            fn: fn(text). None to print.
        """

    def reset(self) -> None:
        """Reset hidden states, before the first batch of a phase."""

    def stop(self) -> None:
        """Restore everything. May be called at any time, and twice."""


def mixed(out: Outputs, samples: BatchSamples, kind: str, axis: int) -> Outputs:
    """Mix outputs for unmixed samples as MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899)
    mixed the batch.

    Args:
        kind: 'softmax', 'sigmoid' or 'regression': what the logits are.
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
    """The most likely classes of unmixed samples, whose logits of all classes are mixed."""

    mix: Any = None

    def dense(self, student: Tensor | None = None) -> Tensor:
        return self.mix(super().dense(student))


def mix_logits(t: Tensor, perm: Tensor, lam: Tensor, kind: str, axis: int) -> Tensor:
    """Logits of mixed probabilities.

    Args:
        t: Logits of the samples before they were mixed, (B, C, ...).
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
    """Mix as fastai does: `lam` of each sample, and 1-`lam` of the permuted one."""
    lam = as_plain(torch.as_tensor(lam, device=t.device)).to(t.dtype).reshape(-1)
    return torch.lerp(t[perm], t, lam.reshape(-1, *[1] * (t.dim() - 1)))
