"The validation loss of a detector: torchvision's own losses, without changing the model."

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from ..base.model_state import ModelState
from ..base.random_state import RandomGuard
from .torchvision_detectors import DETECTOR_CLASSES, checked_detector, on_device_of

__all__ = ['validation_losses']


def validation_losses(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict], seed: int = 0
) -> dict[str, Tensor]:
    """Return torchvision's losses for a validation batch. In evaluation mode, torchvision's
    detectors return none.

    All layers (batch norm, dropout, the transform) are in evaluation mode, and only the modules
    that compute the losses are in training mode. Anchors and proposals that are sampled at random
    are the same in each call. There is no gradient, and the model and the random state stay as they are.

    Args:
        model: A detector.
        images: Tensors (C, H, W).
        targets: A dict for each image.
        seed: Seed of the draws.
    """
    detector = checked_detector(model, 'model')
    state = ModelState(detector.modules())
    compute = DETECTOR_CLASSES + (RegionProposalNetwork, RoIHeads)
    device = next(detector.parameters()).device
    targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
    try:
        for m in detector.modules():
            m.training = isinstance(m, compute)
        with torch.no_grad(), RandomGuard([device.index] if device.type == 'cuda' else []):
            torch.manual_seed(seed)
            losses = detector(on_device_of(images, detector), targets)
    finally:
        state.restore()
    return losses
