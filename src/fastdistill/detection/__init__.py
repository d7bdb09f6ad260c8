"Distillation for torchvision's object detectors."

from ..losses.detection import anchor_kl, box_deltas, scored_hint
from .compare import compare_detectors
from .distiller import DetectionDistiller
from .labels import ScoreThreshold, best_threshold, teacher_labels
from .metrics import DetectionScores, average_precision, detect
from .pictures import show_detections
from .recipes import anchors, mgd, scored
from .validation import validation_losses

__all__ = [
    'DetectionDistiller',
    'DetectionScores',
    'ScoreThreshold',
    'anchor_kl',
    'anchors',
    'average_precision',
    'best_threshold',
    'box_deltas',
    'compare_detectors',
    'detect',
    'mgd',
    'scored',
    'scored_hint',
    'show_detections',
    'teacher_labels',
    'validation_losses',
]
