"""Losses that compare relations between samples (`rkd`, `sp`, `cc`, `pkt`, `seed`) or between
channels (`ickd`).

Each loss compares a square matrix of the student with a square matrix of the teacher, so most
losses allow features of different sizes. Features of a sample are flattened to one vector. Pool
maps or tokens first if you want to compare their means.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import DistillError, check_choice
from ._base import _full, cells, expect, log_probs, loss, reduce, unit
from .feature import Owner, same_features, tensor_like

__all__ = ['rkd', 'sp', 'cc', 'pkt', 'seed', 'SEED', 'ickd']


def samples(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten the features of both models to (B, D)."""
    if len(s) != len(t) or s.dim() < 2 or t.dim() < 2:
        raise DistillError(
            f'Student {tuple(s.shape)} and teacher {tuple(t.shape)}: relations between samples need the '
            'same samples, (B, D) or (B, ...), from both'
        )
    return s.flatten(1), t.flatten(1)


def distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the distances between all samples, (B, B), divided by their mean. Also return a mask
    of the distances that are 0 up to rounding errors.

    Args:
        x: Features, (B, D).
    """
    # subtle: the gradient of cdist is 0 at equal rows, while the gradient of a square root is
    # infinite. Do not use matrix multiplication, which loses half of the digits.
    d = torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist')
    d = d / (d.sum() / (d > 0).sum().clamp_min(1)).clamp_min(torch.finfo(d.dtype).tiny)
    return d, d <= torch.finfo(d.dtype).eps ** 0.5


def cosines(d: Tensor, none: Tensor) -> Tensor:
    """Compute the cosine of the angle at i between j and k by the law of cosines, (B, B, B). The
    result is 0 if the angle is undefined, because the distance from i to j or k is 0.

    Args:
        d: Distances, (B, B).
        none: Mask of the distances that are 0.
    """
    sq, d = d.square(), d.masked_fill(none, 1.0)
    cos = (sq[:, :, None] + sq[:, None] - sq) / (2 * d[:, :, None] * d[:, None])
    return cos.masked_fill(none[:, :, None] | none[:, None], 0.0)


@loss(kind=None, match='none', samples=True, relates=True)
def rkd(
    s: Tensor,
    t: Tensor,
    *,
    w_d: float = 25.0,
    w_a: float = 50.0,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute Huber losses between distances and between angles (relational KD, arXiv:1904.05068).
    Distances are between pairs of samples and divided by their mean. Angles are represented by
    their cosines in triples of samples.

    The Huber losses are averaged over all pairs and triples, including i = j, as in the authors'
    code. Samples with equal features have no angle and get no gradient.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        w_d: Weight of the distances.
        w_a: Weight of the angles. They need memory for B^3 numbers.
        mask: Samples whose relations are included, (B,). Excluded samples remain neighbors of the
            others.
    """
    (ds, ns), (dt, nt) = map(distances, samples(s, t))
    v = w_d * F.smooth_l1_loss(ds, dt, reduction='none').mean(1)
    if w_a:
        v = v + w_a * F.smooth_l1_loss(cosines(ds, ns), cosines(dt, nt), reduction='none').mean(
            (1, 2)
        )
    return reduce(v, reduction, mask)


@loss(kind=None, match='none', samples=True, relates=True)
def sp(s: Tensor, t: Tensor, *, mask: Tensor | None = None, reduction: str = 'mean') -> Tensor:
    """Compute the squared difference between the matrices x x^T, with rows scaled to length 1,
    averaged over all B^2 elements (similarity-preserving KD, arXiv:1907.09682).

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        mask: Samples whose relations are included, (B,). Excluded samples remain neighbors of the
            others.
    """
    s, t = [unit(x @ x.T) for x in samples(s, t)]
    return reduce((s - t).pow(2).mean(1), reduction, mask)


def gaussian(x: Tensor, gamma: float, degree: int) -> Tensor:
    """Compute exp(-gamma |a-b|^2) for all pairs of rows of length 1, as a Taylor series up to
    `degree`.
    """
    x = x @ x.T
    terms = ((2 * gamma) ** p / math.factorial(p) * x**p for p in range(degree + 1))
    return math.exp(-2 * gamma) * sum(terms, x.new_zeros(()))


@loss(kind=None, match='none', samples=True, relates=True)
def cc(
    s: Tensor,
    t: Tensor,
    *,
    kernel: str = 'gaussian',
    gamma: float = 0.4,
    degree: int = 2,
    normalize: bool = True,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the squared difference between the kernel matrices of the samples, averaged over all
    B^2 elements (correlation congruence, arXiv:1904.01802).

    Other public implementations differ from the paper. For example, some take the square root of
    this loss, or use products of neighboring samples in the batch instead of a kernel matrix.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        kernel: 'gaussian', or 'bilinear' for x x^T.
        gamma: Coefficient of the Gaussian kernel.
        degree: Degree of the Taylor series of the Gaussian kernel.
        normalize: If True, scale the features of each sample to length 1 first. The Taylor series
            approximates the Gaussian kernel only for features of length 1.
        mask: Samples whose relations are included, (B,). Excluded samples remain neighbors of the
            others.
    """
    check_choice('kernel', kernel, ('gaussian', 'bilinear'))
    s, t = [unit(x) if normalize else x for x in samples(s, t)]
    s, t = [gaussian(x, gamma, degree) if kernel == 'gaussian' else x @ x.T for x in (s, t)]
    return reduce((s - t).pow(2).mean(1), reduction, mask)


def neighbors(x: Tensor) -> Tensor:
    """Compute log-probabilities over the other samples for each sample, (B, B). Probabilities are
    proportional to (1 + cosine similarity)/2.

    Args:
        x: Features, (B, D).
    """
    x = unit(x)
    k = ((1 + x @ x.T) / 2).clamp_min(1e-7).log()
    # subtle: use a finite number far below any of the logarithms, because -inf gives nan in a batch
    # of one sample
    return log_probs(k.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -1e4))


@loss(kind=None, match='none', samples=True, relates=True)
def pkt(s: Tensor, t: Tensor, *, mask: Tensor | None = None, reduction: str = 'mean') -> Tensor:
    """Compute the KL between the distributions of each sample over the other samples, p(j|i) ~ (1 +
    cos(i, j))/2, averaged over samples (probabilistic knowledge transfer, arXiv:1803.10837).

    The paper sums over samples. The authors' code includes j = i and averages over all B^2 pairs,
    so its loss is about B times smaller.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        mask: Samples whose distributions are included in the loss, (B,).
    """
    ls, lt = map(neighbors, samples(s, t))
    return reduce(expect(lt, lt - ls).sum(1), reduction, mask)


@loss(kind=None, match='shape', samples=True, relates=True)
def seed(
    s: Tensor,
    t: Tensor,
    *,
    queue: Tensor | None = None,
    T_s: float = 0.2,
    T_t: float = 0.01,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the cross-entropy between the similarities of each sample to many teacher embeddings,
    as a softmax of cosine/T (self-supervised distillation SEED, arXiv:2101.04731).

    The teacher embeddings are those of the batch (including the sample itself) and those in the
    queue. The minimum of the loss is the entropy of the teacher's probabilities. The loss does not
    reach this minimum at s == t, because student and teacher have different temperatures.

    Args:
        s: Student embeddings, projected to the teacher's size, (B, D).
        t: Teacher embeddings, (B, D).
        queue: Teacher embeddings of earlier samples, (K, D), owned by the module `SEED`. Rows of
            zeros are ignored.
        T_s: Temperature of the student's similarities.
        T_t: Temperature of the teacher's similarities.
        mask: Samples to include in the loss, (B,). Teacher embeddings of excluded samples are still
            compared with the others.
    """
    s, t = samples(s, t)
    same_features(s, t)
    anchors = t if queue is None else torch.cat([t, tensor_like(queue, t)])
    ls, lt = [unit(x) @ unit(anchors).to(x).T for x in (s, t)]
    if queue is not None:
        empty = torch.cat([t.new_zeros(len(t), dtype=torch.bool), (anchors[len(t) :] == 0).all(1)])
        ls, lt = [x.masked_fill(empty, -1e4) for x in (ls, lt)]
    ls, lt = log_probs(ls, T_s), log_probs(lt, T_t)
    return reduce(expect(lt, -ls).sum(1), reduction, mask)


class SEED(Owner):
    """Module form of `seed` that owns the queue of teacher embeddings.

    Args:
        size: Number of embeddings in the queue. The authors use 65,536 for ImageNet.
        **options: Options of `seed`.
    """

    own = 'queue'
    queue: Any  # tensor; None before `prepare`

    def __init__(self, *, size: int = 4096, **options: Any) -> None:
        if size < 1:
            raise DistillError(f'size={size}: the queue must hold at least 1 embedding')
        self.size = size
        super().__init__(seed, **options)

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> Tensor:
        """Return an empty queue."""
        return t.new_zeros(self.size, t[0].numel())

    def forward(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss. During training, the teacher embeddings of the batch then replace the
        oldest embeddings in the queue.
        """
        v = super().forward(s, t, *args, **kwargs)
        if torch.is_grad_enabled() and s.requires_grad:
            self.prepare(s, t)
            new = tensor_like(_full(t, detach=True).flatten(1), self.queue)
            self.queue.copy_(torch.cat([new, self.queue])[: len(self.queue)])
        return v

    def extra_repr(self) -> str:
        return ', '.join(filter(None, [f'size={self.size}', super().extra_repr()]))


def correlations(x: Tensor, axis: int) -> Tensor:
    """Compute the matrix of products between channels, summed over positions, with rows scaled to
    length 1, (B, C, C).
    """
    x = cells(x, axis)
    return unit(x @ x.mT, 2)


@loss(kind=None, match='shape', samples=True)
def ickd(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the squared difference between the matrices of products between channels, with rows
    scaled to length 1 (inter-channel correlation, Liu et al., ICCV 2021).

    The loss is summed over the elements of a row and averaged over rows, as in the authors' code
    for CIFAR. The authors' code for ImageNet divides by the batch size once more.

    Args:
        s: Student map, projected to the teacher's channels, (B, C, H, W).
        t: Teacher map, (B, C, H', W'). The grids may differ.
        axis: Channel axis.
        mask: Samples to include in the loss, (B,).
    """
    s, t = correlations(s, axis), correlations(t, axis)
    if s.shape != t.shape:
        raise DistillError(
            f'ickd compares {s.shape[1]} channels of {len(s)} samples with {t.shape[1]} of {len(t)}: '
            "give the student a projector (1x1 convolution) to the teacher's channels. A Distiller "
            'builds one from the shapes'
        )
    return reduce((s - t).pow(2).sum(2).mean(1), reduction, mask)
