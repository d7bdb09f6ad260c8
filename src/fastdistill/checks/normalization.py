"""Detect a teacher that gets images with the wrong normalization or size, by trying common ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import map_tensors
from ..base.task import Task, fit_labels
from ..teachers.image_normalization import affine, is_image, stats_of
from ..teachers.teacher import Teacher
from .batch_scores import FEW, METRICS, SLIGHT, Tally, has_labels, item_scores
from .findings import Finding, count_in_words
from .forward import teacher_logits

# {description: (value for `Teacher`, code for the user)}
USUAL = {
    'numbers from 0 to 1': ((0.0, 1.0), '(0, 1)'),
    'mean 0.5 and std 0.5': ((0.5, 0.5), '(.5, .5)'),
    "ImageNet's mean and std": ('imagenet', "'imagenet'"),
    'numbers from 0 to 255': ((0.0, 1 / 255), '(0, 1/255)'),
}
# the normalization of a teacher with at least this score is not questioned. On this scale, 0 is a
# constant prediction and 1 is a perfect prediction
ENOUGH = 0.9
# minimum difference in score on this scale for a size to be clearly better. Images that are a
# little larger than in training often score slightly better
CLEARLY = 0.15
# largest height or width that is tried, and largest number of pixels relative to the present one
LARGEST_SIZE, LARGEST_AREA = 256, 16
MOST_WORK = 4  # maximum time for trying a size, relative to the time of a batch


def renormalized_images(
    tally: Tally, teacher: Teacher, task: Task, batches: Sequence
) -> Iterator[tuple[float, Finding]]:
    """Yield a finding if the teacher is clearly better with a different common normalization.

    Args:
        tally: `Tally` of the teacher's predictions.
        teacher: The teacher.
        task: What the student predicts.
        batches: (inputs, labels) of the first validation batches.

    Yields:
        (score with the new normalization, finding).
    """
    if not (can_renormalize(teacher, batches) and may_be_improved(tally)):
        return
    others = {
        k: t
        for k, (stats, _) in USUAL.items()
        if (t := with_stats(teacher, stats, batches)) is not None
    }
    few = {k: scores_with(t, task, batches[:2]) for k, t in others.items()}
    run = lambda k: scores_with(others[k], task, batches)
    if (found := clearly_better(few, run, tally, SLIGHT)) is None:
        return
    best, now, then = found
    a, b = (abs(o.mean().item()) for o in (now, then))
    yield (
        then.mean().item(),
        Finding(
            'warning',
            'The teacher seems to have been trained on images with a different normalization: '
            f'{METRICS[task.kind]} {a:.3f} with the images that it gets, {b:.3f} with {best} (on '
            f'{count_in_words(len(now), tally.part)})',
            f'Pass the normalization of its training: Teacher(model, images=dict(stats={USUAL[best][1]}))',
            about='normalization',
        ),
    )


def resized_images(
    tally: Tally, teacher: Teacher, task: Task, batches: Sequence
) -> Iterator[tuple[float, Finding]]:
    """Yield a finding if the teacher is clearly better with images of a different size.

    Args:
        tally: `Tally` of the teacher's predictions.
        teacher: The teacher.
        task: What the student predicts.
        batches: (inputs, labels) of the first validation batches.

    Yields:
        (score with the new size, finding).
    """
    if not (can_resize(teacher, batches) and may_be_improved(tally)):
        return
    n, _, h, w = images_in(batches[0][0])[0].shape
    few = {}
    for size in other_sizes(h, w):
        # larger images take more time, so fewer are tried
        some = max(FEW, min(n, MOST_WORK * n * h * w // (size[0] * size[1])))
        first = map_tensors(batches[0], lambda o, some=some: o[:some])
        with suppress(Exception):  # models for one size raise all kinds of errors
            few[size] = scores_with(resizing(teacher, size), task, [first])
    run = lambda k: scores_with(resizing(teacher, k), task, batches)
    if (found := clearly_better(few, run, tally, CLEARLY)) is None:
        return
    best, now, then = found
    a, b = (abs(o.mean().item()) for o in (now, then))
    pixels = best[0] if best[0] == best[1] else best
    yield (
        then.mean().item(),
        Finding(
            'warning',
            'The teacher seems to have been trained on images of a different size: '
            f'{METRICS[task.kind]} {a:.3f} with the images of {h} x {w} pixels that it gets, {b:.3f} with '
            f'{best[0]} x {best[1]} (on {count_in_words(len(now), tally.part)})',
            f'Pass the size of its training images, such as Teacher(model, images=dict(size={pixels}))',
            about='image size',
        ),
    )


def clearly_better(
    few: dict[Any, Tensor], run: Callable[[Any], Tensor], tally: Tally, least: float
) -> tuple[Any, Tensor, Tensor] | None:
    """Return the variant of the teacher that scores highest on a few items, with the scores of the
    teacher and of the variant. Return None if it is not clearly better than the teacher.

    Args:
        few: {variant: its scores for the first items}.
        run: fn(variant) -> its scores for all items.
        tally: `Tally` of the teacher's predictions.
        least: Minimum difference (see `Tally.above`).
    """
    now = tally.items('teacher')
    gain = {k: (v.mean() - now[: len(v)].mean()).item() for k, v in few.items()}
    best = max(gain, key=lambda k: gain[k], default=None)
    if best is None or gain[best] <= 0:
        return None
    then = run(best)
    now = now[: len(then)]
    return (best, now, then) if tally.above(then, now, least=least) else None


def may_be_improved(tally: Tally) -> bool:
    """Return True if a variant of the teacher could be clearly better than the teacher.

    With few items, no difference would be significant, so nothing needs to be tried.
    """
    return len(tally.items('teacher')) >= FEW and not tally.above_constant(least=ENOUGH)


def can_resize(teacher: Teacher, batches: Sequence) -> bool:
    """Return True if different sizes can be tried. The teacher must be a single model that gets
    unmodified color or gray images, and it must not predict maps.
    """
    if teacher.members or teacher.size is not None or teacher.inputs is not None:
        return False
    images = [images_in(xb) for xb, _ in batches]
    flat = all(len(yb) and isinstance(yb[0], Tensor) and yb[0].dim() < 3 for _, yb in batches)
    return flat and all(len(o) == 1 and o[0].shape[1] in (1, 3) for o in images)


def other_sizes(h: int, w: int) -> list[tuple[int, int]]:
    """Return common image sizes, and sizes relative to `h` and `w`, that have at most LARGEST_AREA
    times as many pixels.
    """
    scaled = [(round(h * f), round(w * f)) for f in (1 / 2, 2 / 3, 3 / 2, 2)]
    shapes = [(2 * h, w), (h, 2 * w), (h, h), (w, w)]
    sizes = dict.fromkeys([*scaled, *shapes, *((n, n) for n in (32, 64, 128, 224))])
    fits = lambda a, b: (
        min(a, b) >= 8 and max(a, b) <= LARGEST_SIZE and a * b <= LARGEST_AREA * h * w
    )
    return [s for s in sizes if s != (h, w) and fits(*s)]


def resizing(teacher: Teacher, size: tuple[int, int]) -> Teacher:
    return Teacher(teacher, images=dict(size=size))


def images_in(x: Iterable) -> list[Tensor]:
    return [o for o in x if isinstance(o, Tensor) and is_image(o)]


def can_renormalize(teacher: Teacher, batches: Sequence) -> bool:
    """Return True if different normalizations can be tried.

    The teacher must be a single model for color or gray images, and the normalization of the images
    must be known.
    """
    if teacher.members or teacher.input_stats is None:
        return False
    return all(
        len(o) == 1 and o[0].shape[1] in (1, 3) for o in [images_in(xb) for xb, _ in batches]
    )


def normalization_result(tally: Tally, teacher: Teacher, batches: Sequence) -> str:
    """Describe a normalization check that found no mistake. Return '' if the normalization could not
    be checked.
    """
    if len(tally.items('teacher')) < FEW or not can_renormalize(teacher, batches):
        return ''
    if tally.above_constant(least=ENOUGH):
        return 'not in doubt, because the teacher scores well'
    if teacher.stats is None:
        return (
            "the teacher's is unknown, but no common one scores clearly better than the student's"
        )
    return "no common one scores clearly better than the teacher's"


def with_stats(teacher: Teacher, stats: Any, batches: Sequence) -> Teacher | None:
    """Return a variant of the teacher with a different image normalization.

    The result is None if the normalization does not differ or does not fit the images.
    """
    now = teacher.input_stats if teacher.stats is None else teacher.stats
    given: Any = stats_of(stats)
    (image,) = images_in(batches[0][0])
    if len(given[0]) not in (1, image.shape[1]) or affine(now, given) is None:
        return None
    return Teacher(teacher, images=dict(stats=stats))


def scores_with(teacher: Teacher, task: Task, batches: Sequence) -> Tensor:
    """Compute the teacher's score for each item in the batches, (items,)."""
    with teacher:
        outs = [(teacher_logits(teacher, xb).float(), yb[0]) for xb, yb in batches]
    scores = []
    for t, labels in outs:
        y: Any = fit_labels(labels, t.shape, task)
        scores.append(item_scores(t, y, task)[has_labels(y, task)])
    return torch.cat(scores)
