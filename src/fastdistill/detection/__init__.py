"Distillation of torchvision's object detectors."

from .distiller import DetectionDistiller
from .recipes import anchors, scored

__all__ = ['DetectionDistiller', 'anchors', 'scored']
