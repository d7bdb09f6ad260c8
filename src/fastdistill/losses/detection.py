"""Losses for object detectors, between feature maps (weighted by where objects are) and between the
outputs of dense heads.

For each anchor, a dense head predicts class logits (B, A, K) and box deltas (B, A, 4).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.outputs import DistillError
from ._base import loss, reduce, same_shape, temperature
from .feature import Owner, hint
from .response import binary_kl, kl

__all__ = [
    'anchor_kl',
    'box_deltas',
    'crosskd',
    'scored_hint',
    'mgd',
    'MGD',
    'fgd',
    'FGD',
    'GlobalContext',
]


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
        t: Teacher class logits, (B, A, K), for the same anchors.
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
        t: Teacher class logits and box deltas, for the same anchors.
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
def crosskd(
    s: list,
    t: list,
    *,
    head: Callable,
    boxes: float = 1.0,
    T: float = 1.0,
    sure: float = 0.5,
    background: int | None = None,
) -> Tensor:
    """Run the teacher's head on the student's feature maps, and compare these predictions with those
    for the teacher's own maps (CrossKD, arXiv:2306.11369).

    The loss is `anchor_kl` of the classes plus `box_deltas` of the boxes. Differences between the
    maps that do not change the predictions of the head have no effect on the loss.

    Args:
        s: Student feature maps, (B, C, H, W), each projected to the shape of the teacher's map.
        t: Teacher feature maps, for all levels of the head.
        head: fn(feature maps) -> dict with class logits 'cls_logits' (B, A, K) and box deltas
            'bbox_regression' (B, A, 4), such as the head of a RetinaNet. It should be in evaluation
            mode. In a `DetectionDistiller`, this is the teacher's head.
        boxes: Weight of the boxes. 0 to leave them out.
        T, sure, background: As in `anchor_kl` and `box_deltas`. In a `DetectionDistiller`, the
            teacher determines `background`.
    """
    if len(s) != len(t):
        raise DistillError(
            f'{len(s)} student maps and {len(t)} teacher maps: give one of each for every level.'
        )
    with torch.no_grad():
        theirs = head(t)
    names = 'cls_logits', 'bbox_regression'
    a, b = [[o[k] for k in names] for o in (head(s), theirs)]
    v = anchor_kl(a[0], b[0], T=T, background=background)
    return v + boxes * box_deltas(a, b, sure=sure, background=background) if boxes else v


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


class ModuleOwner(Owner):
    """Loss that owns trained modules."""

    def keep(self, v: Any) -> None:
        delattr(self, self.own)
        setattr(self, self.own, v)


class MGD(ModuleOwner):
    """Module form of `mgd`. The module owns the convolutions and selects the hidden positions at
    random.

    Args:
        drop: Probability that a position is hidden.
        **options: Options of `mgd`.
    """

    own, trains = 'generate', 'convolutions'

    def __init__(self, *, drop: float = 0.65, **options: Any) -> None:
        super().__init__(mgd, **options)
        if not 0 <= drop < 1:
            raise DistillError(f'drop={drop}: must be at least 0 and below 1')
        self.drop = drop

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> nn.Module:
        """Return the convolutions, with the teacher's number of channels."""
        c = t.shape[1]
        conv = lambda: nn.Conv2d(c, c, 3, padding=1)
        return nn.Sequential(conv(), nn.ReLU(), conv())

    def forward(self, s: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        keep = (torch.rand(len(t), 1, *t.shape[2:], device=t.device) >= self.drop).to(t)
        return super().forward(s, t, *args, **{'keep': keep, **kwargs})


def attention_maps(x: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Return the spatial attention (B, H, W) and the channel attention (B, C) of a feature map,
    each with mean 1.
    """
    v = x.abs()
    place, channel = v.mean(1).flatten(1), v.mean((2, 3))
    place, channel = [(o / temperature(T)).softmax(1) * o.shape[1] for o in (place, channel)]
    return place.unflatten(1, x.shape[2:]), channel


def object_masks(boxes: list, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the positions inside and outside of objects, (B, H, W). The weights
    inside a box sum to 1. Where boxes overlap, the smallest box counts. The weights outside all
    boxes of an image sum to 1.

    Args:
        boxes: For each image, corners (N, 4) as fractions of the width and height.
        x: Feature map, (B, C, H, W).
    """
    found, (h, w) = [], x.shape[2:]
    rows, columns = [torch.arange(n, device=x.device) for n in (h, w)]
    for b in boxes:
        b = b.to(x) * x.new_tensor([w, h, w, h])
        x1, y1, x2, y2 = [o[:, None] for o in (*b[:, :2].floor().T, *b[:, 2:].ceil().T)]
        across = (columns >= x1) & (columns <= x2)
        down = (rows >= y1) & (rows <= y2)
        inside = (down[:, :, None] & across[:, None]) / ((x2 + 1 - x1) * (y2 + 1 - y1))[..., None]
        found.append(inside.amax(0) if len(b) else x.new_zeros(h, w))
    objects = torch.stack(found)
    outside = (objects == 0).to(x)
    return objects, outside / outside.sum((1, 2), keepdim=True).clamp_min(1)


@loss(kind=None, match='shape')
def fgd(
    s: Tensor,
    t: Tensor,
    y: list,
    *,
    context: Sequence[Callable],
    T: float = 0.5,
    background: float = 0.5,
    attention: float = 1.0,
    relation: float = 0.005,
    reduction: str = 'mean',
) -> Tensor:
    """Compare feature maps separately inside and outside of the labeled boxes, weighted by the
    teacher's attention (FGD, arXiv:2111.11837).

    The loss is the sum of four parts: the squared differences inside the boxes, the squared
    differences outside the boxes, the differences of the attention maps, and the squared
    differences after a global context was added to each position. As in the authors' code, it is
    summed over channels and positions.

    Args:
        s: Student feature map, projected to the teacher's shape (B, C, H, W).
        t: Teacher feature map, (B, C, H, W).
        y: Labeled boxes of each image, (N, 4): x1, y1, x2, y2 as fractions of the width and height.
        context: (fn of the student's map, fn of the teacher's map), usually two `GlobalContext`.
        T: Temperature of the attention.
        background: Weight of the positions outside of boxes.
        attention: Weight of the attention maps.
        relation: Weight of the maps with global context.
        reduction: 'mean' over images, 'sum' or 'none' (one value per image).
    """
    same_shape(s, t)
    (place, channel), (t_place, t_channel) = [attention_maps(o, T) for o in (s, t)]
    objects, outside = object_masks(y, t)
    far = ((s - t).pow(2) * t_channel[:, :, None, None]).sum(1) * t_place
    v = ((objects + background * outside) * far).sum((1, 2))
    v = v + attention * ((place - t_place).abs().sum((1, 2)) + (channel - t_channel).abs().sum(1))
    a, b = [fn(o) for fn, o in zip(context, (s, t))]
    return reduce(v + relation * (a - b).pow(2).sum((1, 2, 3)), reduction)


class GlobalContext(nn.Module):
    """Adds the same vector to all positions of a feature map. The vector is computed from a
    weighted mean over positions (GcBlock, arXiv:1904.11492). It is zero before the training.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(channels // 2, 1)
        self.weights = nn.Conv2d(channels, 1, 1)
        last = nn.Conv2d(half, channels, 1)
        for p in last.parameters():
            nn.init.zeros_(p)
        first = nn.Conv2d(channels, half, 1)
        self.vector = nn.Sequential(first, nn.LayerNorm([half, 1, 1]), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x).flatten(2).softmax(2).unflatten(2, x.shape[2:])
        return x + self.vector((x * weights).sum((2, 3), keepdim=True))


class FGD(ModuleOwner):
    """Module form of `fgd`. The module owns the two `GlobalContext`.

    Args:
        **options: Options of `fgd`.
    """

    own, trains = 'context', 'modules'

    def __init__(self, **options: Any) -> None:
        super().__init__(fgd, **options)
        temperature(self.option('T'))

    def create(self, t: Tensor, layer: nn.Module | None, axis: int | None) -> nn.Module:
        """Return the modules, with the teacher's number of channels."""
        return nn.ModuleList([GlobalContext(t.shape[1]) for _ in range(2)])
