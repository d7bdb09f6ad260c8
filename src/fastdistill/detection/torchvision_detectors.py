"""Access the parts of torchvision's detectors: a backbone with several levels, a head, and a
transform that resizes images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from ..base.outputs import DistillError
from ..features.layer_names import unwrap
from ..teachers.frozen import FrozenModel
from ..teachers.teacher import Teacher, given_options, grouped_options

DETECTOR_CLASSES = RetinaNet, FCOS, SSD, GeneralizedRCNN
KNOWN_DETECTORS = (
    'must be a RetinaNet, FCOS, SSD, SSDLite, Faster R-CNN, Mask R-CNN or Keypoint R-CNN of '
    'torchvision.models.detection'
)


def checked_detector(model: Any, who: str) -> nn.Module:
    """Return a detector without its wrappers. Raise a DistillError if the model is not a supported
    detector.

    Args:
        who: 'student', 'teacher' or 'model'.
    """
    inner = unwrap(model)
    if not isinstance(inner, DETECTOR_CLASSES):
        raise DistillError(f'The {who} is a {type(inner).__name__}: it {KNOWN_DETECTORS}.')
    return inner


def detector_name(model: Any) -> str:
    return type(unwrap(model)).__name__


def is_dense(detector: Any) -> bool:
    """Return True if the detector is dense, i.e. predicts classes and boxes at each position
    without proposals.
    """
    return not isinstance(detector, GeneralizedRCNN)


def n_classes(detector: Any) -> int:
    """Return the number of classes, including the background, which is class 0 in torchvision."""
    if not is_dense(detector):
        predictor = detector.roi_heads.box_predictor
        return predictor.cls_score.out_features
    head = detector.head.classification_head
    if isinstance(detector, SSD):
        return head.num_columns
    return head.num_classes


def fixed_size(detector: Any) -> tuple | None:
    """Return the height and width to which the detector resizes every image. Return None if the
    size varies.
    """
    size = detector.transform.fixed_size
    return None if size is None else (size[1], size[0])


def pixel_stats(detector: Any) -> tuple[Any, Any]:
    """Return the (mean, std) with which the detector normalizes images."""
    return detector.transform.image_mean, detector.transform.image_std


def as_levels(features: Any) -> Any:
    """Convert the output of a backbone to {name: feature map}, as torchvision's detectors do."""
    return features if isinstance(features, Mapping) else {'0': features}


class LevelScores(nn.Module):
    """Module that computes the probability of an object at each position of each level. For dense
    detectors, the module uses the highest probability over anchors and classes, without the
    background. For detectors with proposals, the module uses the highest objectness over anchors.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.dense, self.softmax = is_dense(detector), isinstance(detector, SSD)
        generator = detector.anchor_generator if self.dense else None
        self.anchors: Any = None if generator is None else generator.num_anchors_per_location()

    def forward(self, levels: dict, head: Any) -> dict:
        """Return {level name: map (B, H, W)}.

        Args:
            levels: Feature maps by name.
            head: Output of the detector's head for these feature maps.
        """
        if not self.dense:
            return {k: o.sigmoid().amax(1) for k, o in zip(levels, head[0])}
        logits = head['cls_logits']
        p = logits.softmax(-1)[..., 1:] if self.softmax else logits.sigmoid()
        grids = [tuple(x.shape[2:]) for x in levels.values()]
        parts = p.amax(-1).split([h * w * a for (h, w), a in zip(grids, self.anchors)], 1)
        return {
            k: o.reshape(len(o), *hw, a).amax(-1)
            for k, o, hw, a in zip(levels, parts, grids, self.anchors)
        }


class DetectorView(nn.Module):
    """The backbone and the head of a detector, without resizing, normalization and postprocessing.
    The modules of the detector are used directly, under the same names.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.dense = is_dense(detector)
        if self.dense:
            self.head = detector.head
        else:
            self.rpn = detector.rpn
        self.scores = LevelScores(detector)
        self.anchors: Any = detector.anchor_generator if self.dense else None

    def forward(self, images: Tensor, sizes: Tensor | None = None, head: bool = False) -> Tensor:
        """Run the backbone and return the last feature map. All other outputs are read by hooks.

        Args:
            images: Normalized pixels, (B, C, H, W).
            sizes: Fractions of height and width that are not padding, (B, 2). None if no image is
                padded.
            head: True to also run the head and compute the scores.
        """
        if sizes is not None:
            images = without_padding(images, sizes)
        levels = as_levels(self.backbone(images))
        if head:
            maps = list(levels.values())
            self.scores(levels, self.head(maps) if self.dense else self.rpn.head(maps))
        return [*levels.values()][-1]


class FrozenHead:
    """Runs a dense head in evaluation mode. Gradients reach the feature maps, but not the parameters
    of the head, and the head is not changed.

    Args:
        head: Head of a detector.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, maps: list) -> dict[str, Tensor]:
        x, tensors = maps[0], [*self.head.named_parameters(), *self.head.named_buffers()]
        state = {k: v.detach().to(x if v.is_floating_point() else x.device) for k, v in tensors}
        with FrozenModel(self.head, 'eval', private=True):
            return functional_call(self.head, state, (maps,))


def without_padding(images: Tensor, sizes: Tensor) -> Tensor:
    """Set the padding of images to 0. torchvision also pads with 0 after the normalization."""
    place = [torch.arange(n, device=images.device) for n in images.shape[2:]]
    ends = [(sizes[:, i] * n).round() for i, n in enumerate(images.shape[2:])]
    rows, columns = [p[None] < e[:, None] for p, e in zip(place, ends)]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], images, 0.0)


def level_names(features: Any) -> list:
    """Return the layer names with which `Taps` reads the levels of a backbone, given the output of
    the backbone.
    """
    if isinstance(features, Mapping):
        return [f'backbone@[{k}]' for k in features]
    return ['backbone']


def level_scores(name: str) -> str:
    """Return the layer name of the scores for a level.

    Args:
        name: Name of the level, from `level_names`.
    """
    base, *how = name.split('@')
    if base != 'backbone':
        raise DistillError(
            f'{name!r} is not a level of the feature pyramid, so there are no scores for its '
            "positions: use layers='auto'."
        )
    return f'scores@{how[0] if how else "[0]"}'


def on_device_of(images: Sequence[Tensor], model: nn.Module) -> list:
    """Move images to the device of a model.

    Args:
        images: Tensors (C, H, W), or one tensor (B, C, H, W).
    """
    p = next(model.parameters(), None)
    return [o if p is None else o.to(p.device) for o in images]


def example_pixels(detector: Any) -> Tensor:
    """Return a batch with one image of zeros, in the form that the backbone expects. If the
    detector has no fixed size, the image is small, because the strides of the levels do not depend
    on the size.
    """
    p = next(detector.parameters())
    size = fixed_size(detector) or (256, 256)
    return torch.zeros(1, len(detector.transform.image_mean), *size, device=p.device, dtype=p.dtype)


def detector_inside(teacher: Any) -> nn.Module:
    """Return the detector inside a teacher.

    Args:
        teacher: A detector, or a `Teacher` of a detector.
    """
    return checked_detector(teacher.module if isinstance(teacher, Teacher) else teacher, 'teacher')


def detector_teacher(teacher: Any, student: nn.Module, size: int | tuple | None = None) -> Teacher:
    """Build a `Teacher` that takes the student's pixels and converts them to the teacher's
    normalization.

    Args:
        teacher: A detector, or a `Teacher` of a detector.
        student: The detector to train.
        size: Height and width of the images for the teacher. None for the teacher's fixed size, if
            it has one, or else the student's size.
    """
    given = isinstance(teacher, Teacher)
    options = given_options(teacher) if given else {}
    detector = detector_inside(teacher)
    if size is None and fixed_size(detector) != fixed_size(student):
        size = fixed_size(detector)
    own = dict(
        stats=pixel_stats(detector),
        input_stats=pixel_stats(student),
        size=size,
        name=detector_name(detector),
    )
    return Teacher(DetectorView(detector), **grouped_options(own | options))
