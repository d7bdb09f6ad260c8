"Distillation for torchvision's object detectors."

from ..losses.detection import anchor_kl, box_deltas, scored_hint
from .compare import compare_detectors
from .detection_plots import show_detections
from .distiller import DetectionDistiller
from .inherited_head import inherit_head
from .metrics import DetectionScores, average_precision, detect
from .pseudo_labels import ScoreThreshold, best_threshold, store_detections, teacher_labels
from .recipes import anchors, crosskd, fgd, mgd, scored
from .stored_detections import StoredDetections
from .validation_loss import validation_losses

__all__ = [
    'DetectionDistiller',
    'DetectionScores',
    'ScoreThreshold',
    'StoredDetections',
    'anchor_kl',
    'anchors',
    'average_precision',
    'best_threshold',
    'box_deltas',
    'compare_detectors',
    'crosskd',
    'detect',
    'fgd',
    'inherit_head',
    'mgd',
    'scored',
    'scored_hint',
    'show_detections',
    'store_detections',
    'teacher_labels',
    'validation_losses',
]
