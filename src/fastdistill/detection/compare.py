"Compare the mean average precision and cost of detectors on the same images, with paired tests."

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.model_state import ModelState
from ..base.outputs import DistillError
from ..base.random_state import guarded_random_state
from ..evaluation.cost import bytes_of, latency_of, macs_of, timed_in_turns, wait_for
from ..evaluation.metrics import Measure
from ..evaluation.model_comparison import machine_of, paired_report, roles_of
from ..evaluation.paired_tests import PairedScores
from ..evaluation.report import Report
from ..evaluation.report_data import Cost, MeasureInfo, ModelResult
from .box_matches import match_image, precision_of_sums, sums_of_images
from .metrics import detect
from .torchvision_detectors import detector_name, on_device_of


def compare_detectors(
    models: dict,
    batches: Iterable,
    *,
    classes: list | None = None,
    teacher: str | None = None,
    baseline: str | None = None,
    title: str = '',
    repeats: int = 1000,
    seconds: float = 0.5,
    seed: int = 0,
) -> Report:
    """Measure detectors on the same images. The report contains mean average precision with
    bootstrap intervals over images, average precision per class, paired tests, parameters,
    multiply-accumulates and latency. The models are not changed.

    Intervals and tests resample whole images. For speed, the detections of each class are sorted by
    score into 100 bins of equal size, which changes the average precision by less than one
    percentage point. As in COCO, only the 100 detections of each class with the highest scores are
    used in each image.

    Args:
        models: {name: detector}, such as dict(teacher=..., alone=..., distilled=...).
        batches: Iterable of (images, targets).
        classes: Names of the classes, starting with class 1, without the background. None to use
            the class indices.
        teacher: Name of the teacher in `models`. None for the model named 'teacher', if there is
            one.
        baseline: Name of the model that was trained without the teacher. None for the model named
            'alone'. If there is no such model, the first of several students is used.
        title: Title of the report.
        repeats: Number of bootstrap samples.
        seconds: Duration of each time measurement in seconds. 0 to skip these measurements.
        seed: Seed of the bootstrap samples.
    """
    teacher, baseline = roles_of(models, teacher, baseline)
    matches: dict[str, list] = {k: [] for k in models}
    counts: dict[int, int] = {}
    first: Any = None
    with guarded_random_state():
        for images, targets in batches:
            first = images[:1] if first is None else first
            for k, m in models.items():
                pairs = zip(detect(m, images), targets, strict=True)
                matches[k] += [match_image(d, t) for d, t in pairs]
        if first is None:
            raise DistillError('There is no batch to measure the models on.')
        costs = costs_of(models, first, seconds)
    n = len(next(iter(matches.values())))
    for m in next(iter(matches.values())):
        for c, v in m.counts.items():
            counts[c] = counts.get(c, 0) + v
    if not counts:
        raise DistillError('The images have no labeled boxes, so there is nothing to measure.')
    numbers = sorted(counts)
    check_names_of_labels(classes, numbers)
    sums = {k: sums_of_images(v, numbers) for k, v in matches.items()}
    results = {}
    for k, m in models.items():
        whole = {c: v.sum(0)[None] for c, v in sums[k].items()}
        each = [float(v) for v in precision_of_sums(whole)[0].mean(-1)]
        results[k] = ModelResult('', detector_name(m), classes=dict(ap=each), cost=costs[k])
    name = lambda c: str(c) if classes is None else classes[c - 1]
    return paired_report(
        results,
        PairedScores(sums, map_measures(), repeats, seed),
        teacher,
        baseline,
        task='detection',
        headline='map',
        n=n,
        unit='images',
        title=title,
        classes=[name(c) for c in numbers],
        counts=[counts[c] for c in numbers],
        machine=machine_of(tuple(first)),
    )


def check_names_of_labels(classes: Sequence | None, numbers: Sequence[int]) -> None:
    """Raise a DistillError if there are too few class names, or if they include the background."""
    if classes is None:
        return
    if str(classes[0]).strip('_') in ('#na#', 'background') or len(classes) < numbers[-1]:
        raise DistillError(
            f'classes={[*classes][:5]!r}: the labels are {numbers[0]} to {numbers[-1]}, so there must '
            f'be at least {numbers[-1]} names, starting with class 1 and without the background.'
        )


def map_measures() -> list:
    """Return the measures for detectors."""

    def over(thresholds: slice) -> Callable:
        return lambda sums: np.nanmean(precision_of_sums(sums, thresholds), (1, 2))

    info = lambda label: MeasureInfo(label, percent=True)
    return [
        Measure('map', over(slice(None)), info('mAP')),
        Measure('map50', over(slice(1)), info('mAP50')),
    ]


def costs_of(models: Mapping[str, nn.Module], images: Sequence[Tensor], seconds: float) -> dict:
    """Measure the `Cost` of each model for one image."""
    costs, calls = {}, {}
    state = ModelState(o for m in models.values() for o in m.modules())
    try:
        for k, m in models.items():
            m.eval()
            x = on_device_of(images, m)
            calls[k] = partial(m, x)
            with torch.no_grad():
                macs = macs_of(calls[k])
            costs[k] = Cost(sum(p.numel() for p in m.parameters()), macs, bytes_of([m]))
        if seconds:
            x = on_device_of(images, next(iter(models.values())))
            for k, ts in timed_in_turns(calls, seconds, wait_for(x)).items():
                costs[k].latency = [latency_of(1, ts)]
    finally:
        state.restore()
    return costs
