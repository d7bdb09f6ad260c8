"Detections matched with labeled boxes, and average precision as a function of sums over images."

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

__all__ = ['THRESHOLDS', 'Match', 'match_image', 'precision_of_sums', 'sums_of_images']

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # of COCO
MOST_DETECTIONS = 100  # detections of an image that count, as in COCO
RANK_BINS = 100  # of the ranks of the detections of a class


@dataclass
class Match:
    """The detections of an image.

    Attributes:
        scores: (N,).
        labels: (N,).
        right: Whether each is matched with a labeled box of its class, for each IoU threshold
            (T, N).
        counts: {class: number of labeled boxes}.
    """

    scores: np.ndarray
    labels: np.ndarray
    right: np.ndarray
    counts: dict


def match_image(detected: dict, target: dict, thresholds: Sequence[float] = THRESHOLDS) -> Match:
    """Match the detections of an image with its labeled boxes, as COCO does: from the most certain
    detection to the least, each takes the free box of its class with the highest IoU.

    Args:
        detected: 'boxes', 'scores' and 'labels'.
        target: 'boxes' and 'labels'.
        thresholds: Least IoU of a match.
    """
    order = detected['scores'].cpu().argsort(descending=True, stable=True)[:MOST_DETECTIONS]
    boxes, scores, labels = [detected[k].cpu()[order] for k in ('boxes', 'scores', 'labels')]
    true, classes = target['boxes'].cpu(), target['labels'].cpu()
    iou = box_iou(boxes.float(), true.float())
    iou = torch.where(labels[:, None] == classes, iou, -1.0).numpy()
    right = np.zeros((len(thresholds), len(boxes)), bool)
    for k, least in enumerate(thresholds):
        free = iou.copy()
        for i in range(len(boxes)):
            if not free.shape[1]:
                break
            j = free[i].argmax()
            if free[i, j] >= least - 1e-9:
                right[k, i] = True
                free[:, j] = -1
    values, n = classes.unique(return_counts=True)
    return Match(scores.numpy(), labels.numpy(), right, dict(zip(values.tolist(), n.tolist())))


def sums_of_images(matches: list, classes: Sequence[int]) -> dict:
    """Return numbers of each image whose sums determine the average precision: detections and right
    ones in bins of the rank of their score, and labeled boxes.

    Args:
        matches: A `Match` for each image.
        classes: The class numbers.

    Returns:
        'found' (n, C * bins), 'matched' (n, C * T * bins) and 'boxes' (n, C).
    """
    n, c, t = len(matches), len(classes), len(matches[0].right)
    found = np.zeros((n, c, RANK_BINS))
    right = np.zeros((n, c, t, RANK_BINS))
    boxes = np.array([[m.counts.get(k, 0) for k in classes] for m in matches], float)
    image = np.concatenate([np.full(len(m.scores), i) for i, m in enumerate(matches)]).astype(int)
    labels, scores = [
        np.concatenate([getattr(m, k) for m in matches]) for k in ('labels', 'scores')
    ]
    hits = np.concatenate([m.right for m in matches], 1)
    for j, k in enumerate(classes):
        own: Any = np.flatnonzero(labels == k)
        own = own[np.argsort(-scores[own], kind='stable')]
        bins: Any = np.arange(len(own)) * RANK_BINS // max(len(own), RANK_BINS)
        np.add.at(found, (image[own], j, bins), 1)
        for i in range(t):
            np.add.at(right, (image[own], j, i, bins), hits[i, own])
    return dict(found=found.reshape(n, -1), matched=right.reshape(n, -1), boxes=boxes)


def precision_of_sums(sums: dict, thresholds: slice = slice(None)) -> np.ndarray:
    """Return the average precision of each class and threshold, interpolated at 101 recalls as in
    COCO, (R, C, T). NaN for a class without boxes.

    Args:
        sums: Sums of `sums_of_images` over R subsets of the images.
        thresholds: Which of the thresholds.
    """
    r, c = sums['boxes'].shape
    found = sums['found'].reshape(r, c, 1, RANK_BINS).cumsum(-1)
    right = sums['matched'].reshape(r, c, -1, RANK_BINS)[:, :, thresholds].cumsum(-1)
    boxes = sums['boxes'][:, :, None, None]
    with np.errstate(divide='ignore', invalid='ignore'):
        recall = right / boxes
        precision = np.where(found > 0, right / found, 0.0)
        precision = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
        # of the recalls 0, 0.01 ... 1, how many does each bin reach first
        reached = np.floor(recall * 100 + 1e-9) + 1
        share = np.diff(reached, axis=-1, prepend=0.0) / 101
        # a class without a right detection still has the recall 0
        return np.where(boxes[..., 0] > 0, (share * precision).sum(-1), np.nan)
