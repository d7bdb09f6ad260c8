"""Mix teacher outputs for unmixed samples in the same way as MixUp or CutMix mixed the batch."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch_samples import BatchSamples
from .outputs import DistillError, Draws, LinearLogits, Outputs, TopK, as_plain


def mixed(out: Outputs, samples: BatchSamples, kind: str, axis: int) -> Outputs:
    """Mix the outputs of unmixed samples in the same way as MixUp (arXiv:1710.09412) or CutMix
    (arXiv:1905.04899) mixed the batch.

    Args:
        kind: Kind of the logits: 'softmax', 'sigmoid' or 'regression'.
        axis: Class axis.

    Raises:
        DistillError: The outputs can't be mixed: features, draws, or outputs with positions in a
            batch of CutMix.
    """
    if samples is None or (mix_of := samples.mix) is None:
        return out
    if out.feats:
        raise DistillError(
            'MixUp and CutMix mix images, but the stored layers are for unmixed images. Remove the '
            'terms with layers, or use a live teacher.'
        )
    if isinstance(out.logits, Draws):
        raise DistillError(
            'MixUp and CutMix mix probabilities, but the cache contains draws for unmixed images. '
            'Remove the callback, or store the outputs in a different way, cache_teacher(..., '
            "store='auto')."
        )
    samples.refuse_pasted(out.logits)
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
