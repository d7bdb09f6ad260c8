"Compute torchvision's losses for validation batches without changing the model."

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from ..features.probe import untouched
from .torchvision_detectors import DETECTOR_CLASSES, checked_detector, on_device_of


def validation_losses(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict], seed: int = 0
) -> dict[str, Tensor]:
    """Compute torchvision's losses for a validation batch. By default, torchvision's detectors do
    not return losses in evaluation mode.

    Batch norm, dropout and the transform run in evaluation mode. Only the modules that compute
    losses are switched to training mode. The random sampling of anchors and proposals is seeded, so
    repeated calls return the same losses. No gradients are computed. The model's state and the
    random state are restored.

    Args:
        model: A detector.
        images: Tensors (C, H, W).
        targets: One dict per image, with 'boxes' and 'labels'.
        seed: Seed for sampling anchors and proposals.
    """
    detector = checked_detector(model, 'model')
    compute = DETECTOR_CLASSES + (RegionProposalNetwork, RoIHeads)
    device = next(detector.parameters()).device
    targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
    with untouched(detector):
        for m in detector.modules():
            m.training = isinstance(m, compute)
        torch.manual_seed(seed)
        return detector(on_device_of(images, detector), targets)
