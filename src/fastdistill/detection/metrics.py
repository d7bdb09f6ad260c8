"Compute the mean average precision of a detector with torchmetrics."

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from ..base.outputs import DistillError
from ..features.probe import untouched
from .stored_detections import StoredDetections
from .torchvision_detectors import on_device_of


@dataclass
class DetectionScores:
    """Scores of a detector on a dataset, from 0 to 1. A score is NaN if there are no boxes.

    Attributes:
        map: Mean average precision over IoU thresholds from 0.5 to 0.95 and classes, as in COCO.
        map50: Mean average precision at an IoU threshold of 0.5.
        classes: {class index: average precision over the thresholds}.
        images: Number of images.
    """

    map: float
    map50: float
    classes: dict[int, float] = field(default_factory=dict)
    images: int = 0


def detect(model: nn.Module | StoredDetections, images: Sequence) -> list:
    """Return the detections of a model for a batch of images, on the CPU. The model is not changed.

    Args:
        model: A detector, or its `StoredDetections`.
        images: Tensors (C, H, W). For `StoredDetections`, the names of the images.
    """
    if isinstance(model, StoredDetections):
        return model(images)
    with untouched(model):
        found = model(on_device_of(images, model))
    return [{k: v.detach().cpu() for k, v in o.items()} for o in found]


def average_precision(detections: Sequence[dict], targets: Sequence[dict]) -> DetectionScores:
    """Compute the mean average precision of detections.

    Args:
        detections: One dict per image, with 'boxes' (N, 4), 'scores' and 'labels'.
        targets: One dict per image, with 'boxes' (N, 4) and 'labels'.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(class_metrics=True)
    except ImportError as e:
        raise DistillError(
            f'Mean average precision needs torchmetrics and pycocotools ({e}): '
            "pip install 'fastdistill[detection]'"
        ) from e
    metric.warn_on_many_detections = False
    keep = lambda o, names: {k: o[k].detach().cpu() for k in names}
    metric.update(
        [keep(o, ('boxes', 'scores', 'labels')) for o in detections],
        [keep(o, ('boxes', 'labels')) for o in targets],
    )
    r = metric.compute()
    number = lambda v: float(v) if float(v) >= 0 else float('nan')
    classes = r['classes'].reshape(-1).tolist()
    each = map(number, r['map_per_class'].reshape(-1))
    return DetectionScores(
        number(r['map']), number(r['map_50']), dict(zip(classes, each)), len(targets)
    )
