"Find mistakes before training, from the teacher's detections on a few batches."

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from ..checks.findings import Finding, Findings
from .metrics import detect
from .torchvision_detectors import detector_name

# a teacher that finds a smaller fraction of the labeled boxes is considered untrained
FEW_FOUND = 0.1
LARGE_DROP = 0.1  # a larger drop in the fraction of boxes found is not due to chance
ENOUGH_MATCHES = 10  # minimum number of matched boxes for checking the classes


def check_detections(
    teacher: nn.Module, batches: Sequence, transform: Any, heads: bool
) -> Findings:
    """Check a teacher. The checks report boxes that the teacher does not find, classes in a
    different order, and images that are too small for the teacher.

    Args:
        teacher: A detector.
        batches: List of (images, targets).
        transform: The student's transform. None if the teacher does its own resizing.
        heads: True if the student learns the teacher's class predictions. False if it learns only
            feature maps.
    """
    found, targets = Findings(), [t for _, y in batches for t in y]
    n = sum(len(t['boxes']) for t in targets)
    if not n:
        what = 'The batches read have no boxes, so the teacher was not checked'
        found.add('teacher', [Finding('note', what, 'Pass batches with boxes')])
        return found
    all_of = lambda model: [o for x, _ in batches for o in detect(model, x)]
    matches = top_matches(all_of(teacher), targets)
    share, name = len(matches) / n, detector_name(teacher)
    seen = f'The teacher {name} finds {share:.0%} of {n} labeled boxes with as many detections'
    weak = Finding(
        'warning',
        seen,
        'It seems untrained, or trained on different images (their range must be 0 to 1)',
        doubt=True,
    )
    found.add('teacher', [weak] if share < FEW_FOUND else [], f'{seen}')
    found.add('classes', class_findings(matches, heads), 'the teacher has the same classes')
    if transform is not None and share >= FEW_FOUND:
        small = top_matches(all_of(seeing_size(teacher, transform)), targets)
        drop = Finding(
            'warning',
            f"At the student's image size, the teacher finds {len(small) / n:.0%} of the boxes, "
            f'but {share:.0%} at its own size',
            'Pass size=, the height and width of the images for the teacher, or train it at the '
            "student's size",
        )
        fine = f"the teacher finds {len(small) / n:.0%} of the boxes at the student's size"
        found.add('size', [drop] if share - len(small) / n > LARGE_DROP else [], fine)
    return found


def seeing_size(teacher: nn.Module, transform: Any) -> nn.Module:
    """Return a shallow copy of a detector that resizes images like a different detector. The copy
    has the same weights and normalization as the original.

    Args:
        transform: Transform of the other detector.
    """
    own: Any = teacher.transform
    other = copy.copy(teacher)
    # subtle: copy the dict of submodules, which a shallow copy would share
    other._modules = dict(teacher._modules)
    other.transform = GeneralizedRCNNTransform(
        transform.min_size,
        transform.max_size,
        own.image_mean,
        own.image_std,
        size_divisible=own.size_divisible,
        fixed_size=transform.fixed_size,
    )
    return other


def top_matches(detections: Iterable[dict], targets: Iterable[dict]) -> list:
    """Match the labeled boxes of each image with the same number of detections, which have the
    highest scores. A match needs an IoU of at least 0.5. Each detection is used at most once.
    Return (label, predicted label) for each match.

    Args:
        detections: One dict per image, with 'boxes', 'scores' and 'labels'.
        targets: One dict per image, with 'boxes' and 'labels'.
    """
    pairs = []
    for d, t in zip(detections, targets):
        top = d['scores'].argsort(descending=True)[: len(t['boxes'])]
        if not len(top):
            continue
        iou = box_iou(t['boxes'].cpu(), d['boxes'][top])
        for _ in range(min(iou.shape)):
            i, j = divmod(int(iou.argmax()), iou.shape[1])
            if iou[i, j] < 0.5:
                break
            pairs.append((int(t['labels'][i]), int(d['labels'][top[j]])))
            iou[i], iou[:, j] = -1, -1
    return pairs


def class_findings(matches: Sequence[tuple[int, int]], heads: bool) -> list:
    """Return a finding if the teacher's classes differ from the labels for most of the boxes that
    it finds.

    Args:
        matches: Result of `top_matches`.
        heads: As in `check_detections`.
    """
    if len(matches) < ENOUGH_MATCHES or sum(a == b for a, b in matches) > len(matches) / 2:
        return []
    counts = {a: Counter(b for o, b in matches if o == a) for a in sorted({a for a, _ in matches})}
    likely = {a: c.most_common(1)[0][0] for a, c in counts.items()}
    agree = sum(likely[a] == b for a, b in matches) / len(matches)
    steps = {b - a for a, b in likely.items()}
    table = ', '.join(f'{a} as {b}' for a, b in likely.items())
    what = f'For boxes that it finds, the teacher predicts label {table}'
    if agree < 0.7 or len(set(likely.values())) < len(likely):
        what = (
            'The teacher finds boxes, but its classes agree with the labels for only '
            f'{sum(a == b for a, b in matches) / len(matches):.0%} of them'
        )
        do = 'Does it have the same classes, and was it trained on them?'
    elif len(steps) == 1:
        do = (
            'Its classes are shifted by one, as if only one of the models counted the background as '
            'a class: in torchvision, the background is class 0, so labels start at 1'
            if abs(next(iter(steps))) == 1
            else 'Its classes are shifted'
        )
    else:
        do = 'Its classes are in a different order: change the labels or the teacher'
    if not heads:
        do += '. Feature maps can be compared nevertheless'
    return [Finding('error' if heads else 'warning', what, do)]
