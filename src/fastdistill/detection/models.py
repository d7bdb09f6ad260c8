"What torchvision's detectors have in common: a backbone with levels, a head, and their own resizing."

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from ..base.outputs import DistillError
from ..features.layer_names import unwrap
from ..teachers.teacher import Teacher, given_options, grouped_options

__all__ = [
    'DETECTOR_CLASSES',
    'DetectorView',
    'checked_detector',
    'detector_inside',
    'detector_name',
    'fixed_size',
    'is_dense',
    'as_levels',
    'example_pixels',
    'level_names',
    'level_scores',
    'n_classes',
    'on_device_of',
    'detector_teacher',
]

DETECTOR_CLASSES = RetinaNet, FCOS, SSD, GeneralizedRCNN
KNOWN_DETECTORS = (
    'must be a RetinaNet, FCOS, SSD, SSDLite, Faster R-CNN, Mask R-CNN or Keypoint R-CNN of '
    'torchvision.models.detection'
)


def checked_detector(model, who: str) -> nn.Module:
    """Return the detector inside its wrappers. Raise a DistillError if it is a different model.

    Args:
        who: 'student', 'teacher' or 'model'.
    """
    inner = unwrap(model)
    if not isinstance(inner, DETECTOR_CLASSES):
        raise DistillError(f'The {who} is a {type(inner).__name__}: it {KNOWN_DETECTORS}.')
    return inner


def detector_name(model) -> str:
    return type(unwrap(model)).__name__


def is_dense(detector) -> bool:
    """Return True if its head predicts classes and boxes at each position, without proposals."""
    return not isinstance(detector, GeneralizedRCNN)


def n_classes(detector) -> int:
    """Return the number of classes, with the background that torchvision counts as class 0."""
    if not is_dense(detector):
        predictor = detector.roi_heads.box_predictor
        return predictor.cls_score.out_features
    head = detector.head.classification_head
    if isinstance(detector, SSD):
        return head.num_columns
    return head.num_classes


def fixed_size(detector) -> tuple | None:
    """Return the height and width to which it resizes every image. None if these vary."""
    size = detector.transform.fixed_size
    return None if size is None else (size[1], size[0])


def pixel_stats(detector):
    """Return (mean, std) of its images."""
    return detector.transform.image_mean, detector.transform.image_std


def as_levels(features) -> dict:
    """Return the feature maps of a backbone by name, as torchvision's detectors do."""
    return features if isinstance(features, Mapping) else {'0': features}


class LevelScores(nn.Module):
    """How sure a detector is that an object is at each position of each level, from 0 to 1: the
    highest probability over anchors and classes without the background. With proposals, it is the
    probability that there is any object.
    """

    def __init__(self, detector):
        super().__init__()
        self.dense, self.softmax = is_dense(detector), isinstance(detector, SSD)
        self.anchors = detector.anchor_generator.num_anchors_per_location() if self.dense else None

    def forward(self, levels: dict, head) -> dict:
        """Return a map (B, H, W) for each level.

        Args:
            levels: Feature maps by name.
            head: What the detector's head returned for them.
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
    """A detector from its pixels to its head: the detector's own modules under their own names,
    without its resizing, normalization and postprocessing.
    """

    def __init__(self, detector):
        super().__init__()
        self.backbone = detector.backbone
        self.dense = is_dense(detector)
        if self.dense:
            self.head = detector.head
        else:
            self.rpn = detector.rpn
        self.scores = LevelScores(detector)
        self.anchors = detector.anchor_generator if self.dense else None

    def forward(self, images: Tensor, sizes: Tensor | None = None, head: bool = False) -> Tensor:
        """Return the last feature map. Hooks read everything else.

        Args:
            images: Normalized pixels, (B, C, H, W).
            sizes: Fractions of height and width that are not padding, (B, 2). None if nothing is.
            head: True to run the head and the scores too.
        """
        if sizes is not None:
            images = without_padding(images, sizes)
        levels = as_levels(self.backbone(images))
        if head:
            maps = list(levels.values())
            self.scores(levels, self.head(maps) if self.dense else self.rpn.head(maps))
        return [*levels.values()][-1]


def without_padding(images: Tensor, sizes: Tensor) -> Tensor:
    """Return images whose padding is 0, as torchvision pads them after the normalization."""
    place = [torch.arange(n, device=images.device) for n in images.shape[2:]]
    ends = [(sizes[:, i] * n).round() for i, n in enumerate(images.shape[2:])]
    rows, columns = [p[None] < e[:, None] for p, e in zip(place, ends)]
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], images, 0.0)


def level_names(features) -> list:
    """Return the names with which `Taps` reads the levels of what a backbone returned."""
    if isinstance(features, Mapping):
        return [f'backbone@[{k}]' for k in features]
    return ['backbone']


def level_scores(name: str) -> str:
    """Return the name of the scores at a level.

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


def on_device_of(images, model: nn.Module) -> list:
    """Return images on the device of a model.

    Args:
        images: Tensors (C, H, W), or one tensor (B, C, H, W).
    """
    p = next(model.parameters(), None)
    return [o if p is None else o.to(p.device) for o in images]


def example_pixels(detector) -> Tensor:
    """Return an empty batch of one image as the backbone gets it. Without a fixed size it is small,
    since the strides of the levels do not depend on it.
    """
    p = next(detector.parameters())
    size = fixed_size(detector) or (256, 256)
    return torch.zeros(1, len(detector.transform.image_mean), *size, device=p.device, dtype=p.dtype)


def detector_inside(teacher) -> nn.Module:
    """Return the detector of a teacher.

    Args:
        teacher: A detector, or a `Teacher` of one.
    """
    return checked_detector(teacher.module if isinstance(teacher, Teacher) else teacher, 'teacher')


def detector_teacher(teacher, student: nn.Module, size=None) -> Teacher:
    """Build the `Teacher` that gets the student's pixels under its own normalization.

    Args:
        teacher: A detector, or a `Teacher` of one.
        student: The detector that is trained.
        size: Height and width at which the teacher sees the images. None for the student's size,
            or its own if it has a fixed one.
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
