"Match detections with labeled boxes, and compute the average precision from sums over images."

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # IoU thresholds of COCO
MOST_DETECTIONS = 100  # maximum number of detections of a class per image, as in COCO
RANK_BINS = 100  # number of bins for the detections of a class, sorted by score


@dataclass
class Match:
    """The detections of an image, matched with its labeled boxes.

    Attributes:
        scores: Scores of the detections, (N,).
        labels: Predicted classes, (N,).
        right: For each IoU threshold, True for detections that are matched with a labeled box of
            the same class, (T, N).
        counts: {class index: number of labeled boxes}.
    """

    scores: np.ndarray
    labels: np.ndarray
    right: np.ndarray
    counts: dict


def match_image(detected: dict, target: dict, thresholds: Sequence[float] = THRESHOLDS) -> Match:
    """Match the detections of an image with its labeled boxes, as COCO does. In the order of
    decreasing scores, each detection is matched with the unmatched box of the same class that has
    the highest IoU.

    Args:
        detected: Dict with 'boxes', 'scores' and 'labels'.
        target: Dict with 'boxes' and 'labels'.
        thresholds: Minimum IoU of a match. Several values may be given.
    """
    order = detected['scores'].cpu().argsort(descending=True, stable=True)
    labels = detected['labels'].cpu()[order]
    # rank of each detection within its class
    rank = (labels[:, None] == labels).tril(-1).sum(1)
    order = order[rank < MOST_DETECTIONS]
    boxes, scores, labels = [detected[k].cpu()[order] for k in ('boxes', 'scores', 'labels')]
    true, classes = target['boxes'].cpu(), target['labels'].cpu()
    iou = box_iou(boxes.double(), true.double())
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
    """Count the detections, the matched detections and the labeled boxes of each image. Detections
    are counted in bins of equal size, sorted by score. The sums of these counts over images
    determine the average precision.

    Args:
        matches: One `Match` per image.
        classes: Class indices.

    Returns:
        Dict with 'found' (n, C * bins), 'matched' (n, C * T * bins) and 'boxes' (n, C).
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
    """Compute the average precision for each class and threshold, interpolated at 101 recall values
    as in COCO, (R, C, T). The result is NaN for a class without boxes.

    Args:
        sums: Results of `sums_of_images`, summed over the images of each of R subsets.
        thresholds: Slice of the IoU thresholds to use.
    """
    r, c = sums['boxes'].shape
    found = sums['found'].reshape(r, c, 1, RANK_BINS).cumsum(-1)
    right = sums['matched'].reshape(r, c, -1, RANK_BINS)[:, :, thresholds].cumsum(-1)
    boxes = sums['boxes'][:, :, None, None]
    with np.errstate(divide='ignore', invalid='ignore'):
        recall = right / boxes
        precision = np.where(found > 0, right / found, 0.0)
        precision = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
        # count how many of the recall values 0, 0.01, ..., 1 are first reached in each bin
        reached = np.floor(recall * 100 + 1e-9) + 1
        share = np.diff(reached, axis=-1, prepend=0.0) / 101
        # even a class without matched detections reaches recall 0
        return np.where(boxes[..., 0] > 0, (share * precision).sum(-1), np.nan)
