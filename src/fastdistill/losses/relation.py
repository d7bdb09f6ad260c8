"""Losses between relations: of samples (`rkd`, `sp`, `cc`, `pkt`, `seed`) or of channels (`ickd`).

Each compares a square matrix of the student with one of the teacher, so their features may have
different sizes. A sample is one vector, flattened behind the batch axis. To compare means, pool
maps or tokens first.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.outputs import DistillError
from ._base import _full, cells, expect, log_probs, loss, reduce, unit
from .feature import Owner, same_features, tensor_like

__all__ = ['rkd', 'sp', 'cc', 'pkt', 'seed', 'SEED', 'ickd']


def samples(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten both to (B, D)."""
    if len(s) != len(t) or s.dim() < 2 or t.dim() < 2:
        raise DistillError(
            f'Student {tuple(s.shape)} and teacher {tuple(t.shape)}: relations between samples need the '
            'same samples, (B, D) or (B, ...), from both'
        )
    return s.flatten(1), t.flatten(1)


def distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the (B, B) distances divided by their mean, and which of them are 0 up to rounding
    (such pairs have no direction).

    Args:
        x: (B, D).
    """
    # subtle: the gradient of cdist is 0 at equal rows (a root's is infinite). The matrix form loses half the digits
    d = torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist')
    d = d / (d.sum() / (d > 0).sum().clamp_min(1)).clamp_min(torch.finfo(d.dtype).tiny)
    return d, d <= torch.finfo(d.dtype).eps ** 0.5


def cosines(d: Tensor, none: Tensor) -> Tensor:
    """Compute the cosine of the angle at i between j and k by the law of cosines, (B, B, B). It is
    0 where there is no angle.

    Args:
        d: Distances, (B, B).
        none: Which of them are 0.
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
    """Compute Huber losses of the distances, divided by their mean, and of the cosines of all
    triples (relational KD, arXiv:1904.05068).

    They are means over all pairs and triples, including i = j, as in the authors' code. Equal rows
    have no angle and get no gradient.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        w_d: Weight of the distances.
        w_a: Weight of the angles, which take memory for B^3 numbers.
        mask: Whose relations count, (B,). All samples remain neighbors of the others.
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
    """Compute the squared difference of the matrices x x^T with rows scaled to length 1, averaged
    over B^2 (similarity-preserving KD, arXiv:1907.09682).

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        mask: Whose relations count, (B,). All samples remain neighbors of the others.
    """
    s, t = [unit(x @ x.T) for x in samples(s, t)]
    return reduce((s - t).pow(2).mean(1), reduction, mask)


def gaussian(x: Tensor, gamma: float, degree: int) -> Tensor:
    """Compute exp(-gamma |a-b|^2) for rows of length 1, as a Taylor sum up to `degree`."""
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
    """Compute the squared difference of the kernel matrices of the samples, averaged over B^2
    (correlation congruence, arXiv:1904.01802).

    Other implementations differ from the paper: one takes the root of this, another multiplies
    neighbors in the batch.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        kernel: 'gaussian', or 'bilinear' for x x^T.
        gamma: Coefficient of the Gaussian kernel.
        degree: Degree of its Taylor sum.
        normalize: Scale rows to length 1 first. The Taylor sum approximates the Gaussian only for
            such rows.
        mask: Whose relations count, (B,). All samples remain neighbors of the others.
    """
    if kernel not in ('gaussian', 'bilinear'):
        raise DistillError(f"kernel={kernel!r}: must be 'gaussian' or 'bilinear'")
    s, t = [unit(x) if normalize else x for x in samples(s, t)]
    s, t = [gaussian(x, gamma, degree) if kernel == 'gaussian' else x @ x.T for x in (s, t)]
    return reduce((s - t).pow(2).mean(1), reduction, mask)


def neighbors(x: Tensor) -> Tensor:
    """Compute the (B, B) log-probabilities of the other samples: (1 + cosine)/2, divided by their
    sum.

    Args:
        x: (B, D).
    """
    x = unit(x)
    k = ((1 + x @ x.T) / 2).clamp_min(1e-7).log()
    # subtle: a finite number, far below any log here, since -inf gives nan in a batch of one
    return log_probs(k.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -1e4))


@loss(kind=None, match='none', samples=True, relates=True)
def pkt(s: Tensor, t: Tensor, *, mask: Tensor | None = None, reduction: str = 'mean') -> Tensor:
    """Compute the KL of each sample's distribution over the others, p(j|i) ~ (1 + cos(i, j))/2,
    averaged over samples (probabilistic knowledge transfer, arXiv:1803.10837).

    The paper sums over samples. The authors' code includes j = i and averages over B^2, so its
    values are about B times smaller.

    Args:
        s: Student features, (B, D) or (B, ...).
        t: Teacher features, (B, D') or (B, ...).
        mask: Whose neighbors count, (B,).
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
    """Compute the cross-entropy of each sample's similarities to many teacher embeddings, softmax
    of cosine/T (self-supervised distillation SEED, arXiv:2101.04731).

    The teacher embeddings are those of the batch, which include the sample's own, and those of the
    queue. The minimum is the entropy of the teacher's probabilities. Student and teacher have
    different temperatures, so s == t does not reach it.

    Args:
        s: Student embeddings, projected to the teacher's size, (B, D).
        t: Teacher embeddings, (B, D).
        queue: Teacher embeddings of earlier samples, (K, D), owned by `SEED`. Rows of zeros are
            empty.
        T_s: Temperature of the student's similarities.
        T_t: Temperature of the teacher's similarities.
        mask: Whose similarities count, (B,). All samples remain neighbors of the others.
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
    """Module form of `seed`, which owns the queue of teacher embeddings.

    Args:
        size: Embeddings in the queue. The authors use 65,536 for ImageNet.
        **options: Options of `seed`.
    """

    own = 'queue'
    queue: Any  # tensor; None before `prepare`

    def __init__(self, *, size: int = 4096, **options: Any) -> None:
        if size < 1:
            raise DistillError(f'size={size}: the queue must hold at least 1 embedding')
        self.size = size
        super().__init__(seed, **options)

    def prepare(
        self, s: Tensor, t: Tensor, layer: nn.Module | None = None, axis: int | None = None
    ) -> None:
        """Create an empty queue."""
        if self.queue is None:
            self.keep(_full(t).new_zeros(self.size, t[0].numel()))

    def forward(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss. In training, the teacher embeddings then enter the queue and the oldest
        ones leave it.
        """
        v = super().forward(s, t, *args, **{'queue': self.queue, **kwargs})
        if torch.is_grad_enabled() and s.requires_grad:
            self.prepare(s, t)
            new = tensor_like(_full(t, detach=True).flatten(1), self.queue)
            self.queue.copy_(torch.cat([new, self.queue])[: len(self.queue)])
        return v

    def extra_repr(self) -> str:
        return ', '.join(filter(None, [f'size={self.size}', super().extra_repr()]))


def correlations(x: Tensor, axis: int) -> Tensor:
    """Compute the products of channels over positions with rows scaled to length 1, (B, C, C)."""
    x = cells(x, axis)
    return unit(x @ x.mT, 2)


@loss(kind=None, match='shape', samples=True)
def ickd(
    s: Tensor, t: Tensor, *, axis: int = 1, mask: Tensor | None = None, reduction: str = 'mean'
) -> Tensor:
    """Compute the squared difference of the products of channels, with rows scaled to length 1
    (inter-channel correlation, Liu et al., ICCV 2021).

    It is summed over a row and averaged over channels, as in the authors' CIFAR code. Their
    ImageNet code divides by the batch size once more.

    Args:
        s: Student map, projected to the teacher's channels, (B, C, H, W).
        t: Teacher map, (B, C, H', W'). The grids may differ.
        axis: Channel axis.
        mask: Which samples count, (B,).
    """
    s, t = correlations(s, axis), correlations(t, axis)
    if s.shape != t.shape:
        raise DistillError(
            f'ickd compares {s.shape[1]} channels of {len(s)} samples with {t.shape[1]} of {len(t)}: '
            "give the student a projector (1x1 convolution) to the teacher's channels. A Distiller "
            'builds one from the shapes'
        )
    return reduce((s - t).pow(2).sum(2).mean(1), reduction, mask)
