"Use the teacher's boxes as labels for unlabeled images."

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..base.outputs import DistillError
from .box_matches import match_image
from .metrics import detect


@dataclass
class ScoreThreshold:
    """A score threshold for detections, with precision and recall on validation images.

    Attributes:
        score: Minimum score.
        precision: Fraction of the detections that match a labeled box.
        recall: Fraction of the labeled boxes that are matched by a detection.
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
    """Choose the score threshold for using a teacher's detections as labels. The threshold has the
    highest F1 score on labeled validation images, which must not be training images of the teacher.

    Args:
        model: The teacher, a detector.
        batches: Iterable of (images, targets).
        iou: Minimum IoU between a detection and a labeled box of the same class.
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
    # detections with equal scores are either all kept or all left out
    last = np.append(scores[1:] != scores[:-1], True)
    f1 = np.where(last, 2 * right / (found + boxes), -1)
    i = int(f1.argmax())
    return ScoreThreshold(float(scores[i]), right[i] / found[i], right[i] / boxes, boxes)


def teacher_labels(
    model: nn.Module, images: Sequence[Tensor], score: float | ScoreThreshold
) -> list:
    """Return the teacher's detections above a score threshold as targets, one dict per image, on
    the device of the image. An image without such detections gets a target without boxes.

    Args:
        model: The teacher, a detector.
        images: Tensors (C, H, W).
        score: Minimum score, such as the result of `best_threshold`.
    """
    least = score.score if isinstance(score, ScoreThreshold) else score
    out = []
    for x, o in zip(images, detect(model, images)):
        keep = o['scores'] >= least
        wide = (o['boxes'][:, 2:] > o['boxes'][:, :2]).all(1)
        out.append({k: o[k][keep & wide].to(x.device) for k in ('boxes', 'labels')})
    return out
