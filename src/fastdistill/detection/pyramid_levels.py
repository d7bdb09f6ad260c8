"Pair the levels of two feature pyramids."

from collections.abc import Sequence

from torch import nn

from ..base.outputs import DistillError
from ..features.layer_pairs import longest_row, pair_by_depth
from ..features.model_stages import Stage


def pair_levels(
    student: dict, teacher: dict, s_size: Sequence[int], t_size: Sequence[int]
) -> list[tuple[str, str]]:
    """Pair levels of equal stride, from fine to coarse. If no strides are equal, pair levels by
    relative depth.

    Args:
        student: {level name: shape of the feature map} of the student.
        teacher: {level name: shape of the feature map} of the teacher.
        s_size, t_size: Height and width of the images that each model got.

    Returns:
        List of (student level name, teacher level name).
    """
    if not student or not teacher:
        raise DistillError('A detector without feature maps has no levels to pair.')
    a, b = [[stage(n, shape) for n, shape in o.items()] for o in (student, teacher)]
    strides = lambda level, size: [n / p for n, p in zip(size, level.place)]

    def equal(i: int, j: int) -> bool:
        sides = zip(strides(a[i], s_size), strides(b[j], t_size))
        return all(0.8 < s / t < 1.25 for s, t in sides)

    row = longest_row(a, b, equal) or pair_by_depth(a, b)
    return [(s.name, t.name) for s, t in row]


def stage(name: str, shape: Sequence[int]) -> Stage:
    # the module is not known, and pairing needs only the shape
    return Stage(name, nn.Identity(), 'map', tuple(shape), 1, True)
