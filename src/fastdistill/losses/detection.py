"""Losses for object detectors, between feature maps (weighted by where objects are) and between the
outputs of dense heads.

For each anchor, a dense head predicts class logits (B, A, K) and box deltas (B, A, 4).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.outputs import DistillError
from ._base import Loss, loss, reduce, same_shape
from .feature import hint
from .response import binary_kl, kl


def object_scores(t: Tensor, background: int | None) -> Tensor:
    """Return the probability that there is an object of any class at each anchor, (B, A).

    Args:
        t: Class logits, (B, A, K).
        background: Index of the background class, for a softmax over classes. None for a sigmoid
            per class.
    """
    if background is None:
        return t.sigmoid().amax(-1)
    return 1 - t.softmax(-1)[..., background]


@loss(kind=None, match='shape')
def anchor_kl(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 1.0,
    background: int | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the KL between the class probabilities at each anchor, weighted by the teacher's
    probability of an object.

    Without this weight, thousands of anchors without objects would dominate the few with objects.

    Args:
        s: Student class logits, (B, A, K).
        t: Teacher class logits, (B, A, K), of the same anchors.
        T: Temperature.
        background: Index of the background class, for a softmax over classes (0 in torchvision's
            SSD). None for a sigmoid per class (RetinaNet, FCOS).
        reduction: 'mean', 'sum' or 'none' (one weighted value per anchor, (B, A)).
    """
    same_shape(s, t)
    weight = object_scores(t, background)
    if background is None:
        v = binary_kl(s, t, T=T, reduction='none').sum(-1)
    else:
        v = kl(s, t, T=T, axis=-1, reduction='none')
    return reduce(v, reduction, weight)


@loss(kind=None, match='shape', lists=True)
def box_deltas(
    s: list,
    t: list,
    *,
    sure: float = 0.5,
    beta: float = 1 / 9,
    background: int | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the smooth L1 distance between the box deltas, summed over the four deltas. Only
    anchors where the teacher's probability of an object is above `sure` are included.

    Args:
        s: Student class logits (B, A, K) and box deltas (B, A, 4).
        t: Teacher class logits and box deltas, of the same anchors.
        sure: Probability of an object above which an anchor is included. If no anchor is included,
            the loss is 0.
        beta: Distance at which the loss changes from quadratic to linear.
        background: As in `anchor_kl`.
        reduction: 'mean', 'sum' or 'none' (one value per anchor, (B, A), 0 for excluded anchors).
    """
    logits, deltas = t
    same_shape(s[1], deltas)
    v = F.smooth_l1_loss(s[1], deltas, beta=beta, reduction='none').sum(-1)
    return reduce(v, reduction, object_scores(logits, background) > sure)


@loss(kind=None, match='shape', lists=True)
def scored_hint(s: list, t: list, y: list) -> Tensor:
    """Compute the mean squared difference between feature maps, weighted by the teacher's
    probability of an object at each position. The loss is summed over the levels of the feature
    pyramid.

    Args:
        s: Student feature maps, (B, C, H, W), each projected to the shape of the teacher's map.
        t: Teacher feature maps.
        y: Weights of the positions of each map, (B, H, W).
    """
    if not len(s) == len(t) == len(y):
        raise DistillError(
            f'{len(s)} student maps, {len(t)} teacher maps and {len(y)} maps of weights: give one '
            'of each for every level.'
        )
    return torch.stack([hint(a, b, mask=w) for a, b, w in zip(s, t, y)]).sum()


@loss(kind=None, match='shape')
def mgd(
    s: Tensor,
    t: Tensor,
    *,
    generate: Callable,
    keep: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute the mean squared difference between the teacher's map and a map that convolutions
    generate from the student's map, with random positions set to 0 (MGD, arXiv:2205.01529).

    The authors sum over channels and positions instead of averaging, so their loss is C x H x W
    times as large.

    Args:
        s: Student feature map, projected to the teacher's shape (B, C, H, W).
        t: Teacher feature map, (B, C, H, W).
        generate: fn(map) -> map of the same shape, usually two convolutions.
        keep: 1 for visible positions and 0 for hidden positions, (B, 1, H, W). None if all
            positions are visible.
        reduction: 'mean', 'sum' or 'none' (one value per position, (B, H, W)).
    """
    same_shape(s, t)
    s = s if keep is None else s * keep
    return reduce((generate(s) - t).pow(2).mean(1), reduction)


class MGD(Loss):
    """Module form of `mgd`. The module owns the convolutions and selects the hidden positions at
    random.

    Args:
        drop: Probability that a position is hidden.
        **options: Options of `mgd`.
    """

    def __init__(self, *, drop: float = 0.65, **options: Any) -> None:
        super().__init__(mgd, **options)
        if not 0 <= drop < 1:
            raise DistillError(f'drop={drop}: must be at least 0 and below 1')
        self.drop = drop
        self.generate = self.options.pop('generate', None)

    def prepare(
        self, s: Tensor, t: Tensor, layer: nn.Module | None = None, axis: int | None = None
    ) -> None:
        """Create the convolutions, with the teacher's number of channels."""
        if self.generate is None:
            c = t.shape[1]
            conv = lambda: nn.Conv2d(c, c, 3, padding=1)
            self.generate = nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.generate is None:
            raise DistillError(
                'MGD trains convolutions, which do not exist yet: call prepare(s, t) with the features of '
                'one batch before you create the optimizer. A Distiller calls prepare itself'
            )
        keep = (torch.rand(len(t), 1, *t.shape[2:], device=t.device) >= self.drop).to(t)
        return super().forward(s, t, *args, **{'generate': self.generate, 'keep': keep, **kwargs})
