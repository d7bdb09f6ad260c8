"Copy the weights of the teacher's head to the student."

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from ..base.outputs import DistillError
from .torchvision_detectors import (
    DETECTOR_CLASSES,
    checked_detector,
    detector_inside,
    detector_name,
    is_dense,
)

ANCHOR_OPTIONS = 'sizes', 'scales', 'aspect_ratios'  # attributes of torchvision's generators


@dataclass(repr=False)
class InheritedHead:
    """What `inherit_head` copied. `print` shows one line for each module.

    Attributes:
        copied: Names of the student's modules that now have the teacher's weights.
        kept: {name of a module of the student: why it kept its own weights}.
    """

    copied: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'{name}: copied' for name in self.copied]
        return '\n'.join(lines + [f'{name}: not copied, {why}' for name, why in self.kept.items()])

    __repr__ = __str__


def inherit_head(student: nn.Module, teacher: Any) -> InheritedHead:
    """Copy the weights of the teacher's head and feature pyramid to the student (the inheriting
    strategy of Kang et al., arXiv:2110.12724).

    Each part of the head, such as the classification head, is copied if all of its tensors have the
    same shapes in both detectors. So is each block of a `FeaturePyramidNetwork`, if there is one.
    Nothing else in the student changes, and copied layers are trained like the others.

    Args:
        student: The detector to train. The weights of its head are overwritten.
        teacher: A detector of the same kind with the same anchors, or a `Teacher` of one.

    Returns:
        What was copied, and why other parts were not.

    Raises:
        DistillError: If the detectors are of different kinds or have different anchors, or if no
            part of the head fits.
    """
    own, other = checked_detector(student, 'student'), detector_inside(teacher)
    check_same_kind(own, other)
    found = InheritedHead()
    for parts in (head_parts, pyramid_blocks):
        theirs = {place: m for place, _, m in parts(other)}
        for place, name, module in parts(own):
            why = misfit(module, theirs.get(place))
            if why:
                found.kept[name] = why
                continue
            module.load_state_dict(theirs[place].state_dict())
            found.copied.append(name)
        if not found.copied:
            raise DistillError(
                f"No part of the teacher's head fits the student:\n{found}\nBuild the student with "
                "the teacher's number of channels in the feature pyramid, and with the same "
                'classes, anchors per position and layers in the head.'
            )
    return found


def check_same_kind(student: Any, teacher: Any) -> None:
    """Raise a DistillError if the detectors are of different kinds or have different anchors."""
    a, b = [next(c for c in DETECTOR_CLASSES if isinstance(o, c)) for o in (student, teacher)]
    if a is not b:
        raise DistillError(
            f'Student and teacher are different kinds of detectors, {detector_name(student)} and '
            f'{detector_name(teacher)}: a head can only be inherited from a detector of the same '
            'kind. Terms such as pkd() compare the feature maps of any two detectors.'
        )
    for option in ANCHOR_OPTIONS:
        s, t = [anchor_option(o, option) for o in (student, teacher)]
        if s != t:
            raise DistillError(
                f'The anchors of the student have the {option} {s}, those of the teacher {t}. The '
                "teacher's head predicts boxes relative to its own anchors: build the student with "
                'the same anchors.'
            )


def anchor_option(detector: Any, name: str) -> list:
    """Return an option of a detector's anchors as a list. Return [] if it has no such option."""
    owner = detector if is_dense(detector) else detector.rpn
    values = getattr(owner.anchor_generator, name, ())
    return [list(v) if isinstance(v, list | tuple) else v for v in values]


# (name that both detectors share, name in the detector, module)
Parts = list[tuple[str, str, nn.Module]]


def head_parts(detector: Any) -> Parts:
    """Return the parts of a head that have parameters."""
    if is_dense(detector):
        parts = [(f'head.{k}', m) for k, m in detector.head.named_children()]
    else:
        parts = [(f'roi_heads.{k}', m) for k, m in detector.roi_heads.named_children()]
        parts.insert(0, ('rpn.head', detector.rpn.head))
    return [(k, k, m) for k, m in parts if any(True for _ in m.parameters())]


def pyramid_blocks(detector: Any) -> Parts:
    """Return the blocks of the feature pyramid. Return [] if there is none."""
    for name, m in detector.named_modules():
        if isinstance(m, FeaturePyramidNetwork):
            # subtle: the number of levels is part of the name, because blocks of pyramids that
            # begin at different strides do not correspond
            n = len(m.layer_blocks)
            kinds = [(f'{n} levels', k, v) for k, v in m.named_children()]
            return [
                (f'{k} {kind}.{i}', f'{name}.{kind}.{i}', block)
                for k, kind, blocks in kinds
                for i, block in blocks.named_children()
            ]
    return []


def misfit(student: nn.Module, teacher: nn.Module | None) -> str:
    """Return why the student's module cannot take the teacher's weights. Return '' if it can."""
    if teacher is None:
        return 'because the teacher has no such layer'
    s, t = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (student, teacher)]
    if s.keys() != t.keys():
        k = next(k for k in (*s, *t) if k not in s or k not in t)
        return f'because only the {"student" if k in s else "teacher"} has {k}'
    for k in s:
        if s[k] != t[k]:
            return f'because {k} has the shape {s[k]}, in the teacher {t[k]}'
    return ''
