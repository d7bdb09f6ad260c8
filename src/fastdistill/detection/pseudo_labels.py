"The teacher's boxes as labels for images without labels."

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..base.outputs import DistillError
from .box_matches import match_image
from .metrics import detect

__all__ = ['ScoreThreshold', 'best_threshold', 'teacher_labels']


@dataclass
class ScoreThreshold:
    """A score from which on detections count, with what they are worth on validation images.

    Attributes:
        score: The least score.
        precision: Share of the detections that match a labeled box.
        recall: Share of the labeled boxes that a detection matches.
        boxes: Number of labeled boxes.
    """

    score: float
    precision: float
    recall: float
    boxes: int

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def best_threshold(model: nn.Module, batches: Iterable, *, iou: float = 0.5) -> ScoreThreshold:
    """Choose the score from which on a teacher's detections make the best labels: that with the
    highest F1 on labeled validation images, which the teacher has not learned from.

    Args:
        model: The teacher, a detector.
        batches: (images, targets) of each batch.
        iou: Least overlap of a detection with a labeled box of the same class.
    """
    matches = [
        match_image(d, t, (iou,))
        for images, targets in batches
        for d, t in zip(detect(model, images), targets, strict=True)
    ]
    boxes = sum(sum(m.counts.values()) for m in matches)
    scores = np.concatenate([m.scores for m in matches]) if matches else np.zeros(0)
    if not boxes or not len(scores):
        what = 'labeled boxes' if not boxes else 'detections'
        raise DistillError(f'There are no {what}, so no score can be chosen.')
    order = np.argsort(-scores, kind='stable')
    scores = scores[order]
    right = np.concatenate([m.right[0] for m in matches])[order].cumsum()
    found = np.arange(1, len(scores) + 1)
    # equal scores are kept or left out together
    last = np.append(scores[1:] != scores[:-1], True)
    f1 = np.where(last, 2 * right / (found + boxes), -1)
    i = int(f1.argmax())
    return ScoreThreshold(float(scores[i]), right[i] / found[i], right[i] / boxes, boxes)


def teacher_labels(
    model: nn.Module, images: Sequence[Tensor], score: float | ScoreThreshold
) -> list:
    """Return the teacher's certain boxes as targets, one dict for each image, on the device of the
    image. An image without any gets a target without boxes.

    Args:
        model: The teacher, a detector.
        images: Tensors (C, H, W).
        score: The least score, such as `best_threshold` chooses.
    """
    least = score.score if isinstance(score, ScoreThreshold) else score
    out = []
    for x, o in zip(images, detect(model, images)):
        keep = o['scores'] >= least
        wide = (o['boxes'][:, 2:] > o['boxes'][:, :2]).all(1)
        out.append({k: o[k][keep & wide].to(x.device) for k in ('boxes', 'labels')})
    return out
