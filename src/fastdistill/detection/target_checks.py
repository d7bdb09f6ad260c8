"Check the boxes and labels on which a detector is trained."

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks.findings import Finding, Findings
from .torchvision_detectors import n_classes


def check_targets(
    images: Sequence[Tensor], targets: Sequence[dict] | None, detector: Any
) -> Findings:
    """Check the targets of a batch, and return the problems found.

    Args:
        images: Tensors (C, H, W).
        targets: One dict per image.
        detector: The student detector.
    """
    found, n = Findings(), n_classes(detector)
    error = lambda what, do: found.add('targets', [Finding('error', what, do)])
    if targets is None or len(targets) != len(images):
        have = 'none' if targets is None else len(targets)
        error(
            f'{len(images)} images have {have} targets',
            "Pass a dict with 'boxes' and 'labels' for each image",
        )
        return found
    for i, (x, t) in enumerate(zip(images, targets)):
        if problem := problem_of_one(x, t, n):
            error(f'Image {i} of the batch: {problem[0]}', problem[1])
            break
    boxes = [t['boxes'] for t in targets if isinstance(t.get('boxes'), Tensor)]
    if not found and sum(map(len, boxes)) == 0:
        do = 'Some images may have no boxes. If this is true for all images, check the labels'
        found.add('targets', [Finding('note', 'No image of the first batch has a box', do)])
    return found


def problem_of_one(image: Tensor, target: dict, classes: int) -> tuple[str, str] | None:
    """Return (what is wrong, what to do) for the target of one image. Return None if there is no
    problem.
    """
    missing = [k for k in ('boxes', 'labels') if not isinstance(target.get(k), Tensor)]
    if missing:
        return f'the target has no tensor {missing[0]!r}', 'It needs boxes (N, 4) and labels (N,)'
    boxes, labels = target['boxes'], target['labels']
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        return (
            f'the boxes have shape {tuple(boxes.shape)}',
            'They must have shape (N, 4). For an image without objects, use torch.zeros(0, 4)',
        )
    if len(labels) != len(boxes):
        return f'{len(boxes)} boxes have {len(labels)} labels', 'Pass one label for each box'
    if not len(boxes):
        return None
    height, width = image.shape[-2:]
    low, high = int(labels.min()), int(labels.max())
    if low < 1 or high >= classes:
        return (
            f'labels are from {low} to {high}, but the student has {classes} classes, of which 0 '
            'is the background',
            f'Labels must be from 1 to {classes - 1}'
            + ('. Add 1 to each if yours start at 0' if low == 0 else ''),
        )
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        return (
            f'the box {boxes[(boxes[:, 2:] <= boxes[:, :2]).any(1)][0].tolist()} ends before it '
            'begins',
            'Boxes must be (x1, y1, x2, y2) in pixels. Convert boxes (x, y, width, height) with '
            "torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')",
        )
    if float(boxes.max()) <= 1 and max(height, width) > 8:
        return (
            'no coordinate of a box is above 1',
            f'Boxes must be in pixels: multiply them by the width and height, here {width} and '
            f'{height}',
        )
    ends = torch.tensor([width, height], device=boxes.device)
    if (boxes[:, :2] < -1).any() or (boxes[:, 2:] > ends + 1).any():
        outside = boxes[((boxes[:, :2] < -1) | (boxes[:, 2:] > ends + 1)).any(1)][0]
        return (
            f'the box {outside.tolist()} is outside of the image of {width}x{height} pixels',
            'Boxes must be (x1, y1, x2, y2) in pixels of the image that is passed. If they are '
            '(x, y, width, height), convert them. If the image was resized, resize them, too',
        )
    return None
