"Distillation of torchvision's object detectors."

from ..losses.detection import anchor_kl, box_deltas, scored_hint
from .distiller import DetectionDistiller
from .metrics import DetectionScores, average_precision, detect
from .recipes import anchors, mgd, scored

__all__ = [
    'DetectionDistiller',
    'DetectionScores',
    'anchor_kl',
    'anchors',
    'average_precision',
    'box_deltas',
    'detect',
    'mgd',
    'scored',
    'scored_hint',
]
