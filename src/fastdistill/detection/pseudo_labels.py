"Use the teacher's boxes as labels for unlabeled images, and store them."

import glob
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from ..base.distributed import on_first, rank, world_size
from ..base.folder_lock import locked_folder
from ..base.outputs import DistillError
from ..cache.json_checks import shortened
from .box_matches import match_image
from .metrics import detect
from .stored_detections import (
    PER_IMAGE,
    StoredDetections,
    about_teacher,
    image_key,
    write_detections,
)

WRITE_AFTER = 60  # seconds after which new detections are written to the file


@dataclass
class ScoreThreshold:
    """A score threshold for detections, with precision and recall on validation images.

    Attributes:
        score: Minimum score.
        precision: Fraction of the detections that match a labeled box.
        recall: Fraction of the labeled boxes that are matched by a detection.
        boxes: Number of labeled boxes.
    """

    score: float
    precision: float
    recall: float
    boxes: int

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def best_threshold(
    model: nn.Module | StoredDetections, batches: Iterable, *, iou: float = 0.5
) -> ScoreThreshold:
    """Choose the score threshold for using a teacher's detections as labels. The threshold has the
    highest F1 score on labeled validation images, which must not be training images of the teacher.

    Args:
        model: The teacher, a detector, or its `StoredDetections`.
        batches: Iterable of (images, targets), or of (names, targets) for `StoredDetections`.
        iou: Minimum IoU between a detection and a labeled box of the same class.
    """
    matches = [
        match_image(d, t, (iou,))
        for images, targets in batches
        for d, t in zip(detect(model, images), targets, strict=True)
    ]
    boxes = sum(sum(m.counts.values()) for m in matches)
    scores = np.concatenate([m.scores for m in matches]) if matches else np.zeros(0)
    if not boxes or not len(scores):
        what = 'labeled boxes' if not boxes else 'detections'
        raise DistillError(f'There are no {what}, so no score can be chosen.')
    order = np.argsort(-scores, kind='stable')
    scores = scores[order]
    right = np.concatenate([m.right[0] for m in matches])[order].cumsum()
    found = np.arange(1, len(scores) + 1)
    # detections with equal scores are either all kept or all dropped
    last = np.append(scores[1:] != scores[:-1], True)
    f1 = np.where(last, 2 * right / (found + boxes), -1)
    i = int(f1.argmax())
    return ScoreThreshold(float(scores[i]), right[i] / found[i], right[i] / boxes, boxes)


def teacher_labels(
    model: nn.Module | StoredDetections, images: Sequence, score: float | ScoreThreshold
) -> list:
    """Return the teacher's detections above a score threshold as targets, one dict per image, on
    the device of the image. An image without such detections gets a target without boxes.

    Args:
        model: The teacher, a detector, or its `StoredDetections`.
        images: Tensors (C, H, W), or the names of the images for `StoredDetections`, for which the
            targets are on the CPU.
        score: Minimum score, such as the result of `best_threshold`.
    """
    least = score.score if isinstance(score, ScoreThreshold) else score
    out = []
    for x, o in zip(images, detect(model, images)):
        keep = o['scores'] >= least
        wide = (o['boxes'][:, 2:] > o['boxes'][:, :2]).all(1)
        out.append(
            {k: o[k][keep & wide].to(getattr(x, 'device', 'cpu')) for k in ('boxes', 'labels')}
        )
    return out


def store_detections(model: nn.Module, batches: Iterable, path: Path | str) -> StoredDetections:
    """Run a teacher on images and store its detections in a file.

    Images whose detections are in the file are skipped, so an interrupted call can be repeated, and
    images can be added later. New detections are written about once a minute and at the end, even
    after an error. Under torch.distributed, each rank stores the images of its own batches in a
    separate file. At the end, the first rank adds these files to `path` and deletes them.

    Args:
        model: The teacher, a detector.
        batches: Iterable of (images, names). The images are tensors (C, H, W). A name is a text, a
            path or a number that identifies the image.
        path: Path of the file (.safetensors).
    """
    path, about = Path(path), about_teacher(model)
    lock = locked_folder(path.parent, path, f'.{path.name}.lock')
    with lock if rank() == 0 else nullcontext():
        on_first(lambda: join_parts(path, model))  # files of an interrupted call
        parts, sizes, own = [], {}, path
        if path.exists():
            old = StoredDetections(path, model)
            parts.append(old.arrays)
            sizes = dict(zip(old.positions, old.arrays['sizes'].tolist()))
        if world_size() > 1:
            parts, own = [], path.with_name(f'{path.name}.rank{rank()}')
        written, last = len(parts), time.monotonic()
        seen: set[int] = set()
        try:
            for images, names in batches:
                new = new_images(images, names, sizes, seen, path)
                if new:
                    found = detect(model, [images[i] for i in new.values()])
                    shapes = {k: list(images[i].shape[-2:]) for k, i in new.items()}
                    part = dict(
                        keys=[*new],
                        sizes=[*shapes.values()],
                        counts=[len(d['scores']) for d in found],
                    )
                    for k in ('boxes', 'scores', 'labels'):
                        part[k] = np.concatenate([d[k].double().numpy() for d in found])
                    parts.append(part)
                    sizes |= shapes
                if time.monotonic() - last > WRITE_AFTER and len(parts) > written:
                    write_detections(own, about, parts)
                    written, last = len(parts), time.monotonic()
        finally:
            if len(parts) > written:
                write_detections(own, about, parts)
        on_first(lambda: join_parts(path, model))
    if not path.exists():
        raise DistillError('There are no images, so there are no detections to store.')
    return StoredDetections(path)


def join_parts(path: Path, model: nn.Module) -> None:
    """Add the files of the ranks to the file of all detections, and delete them. If several ranks
    stored the same image, as with a `DistributedSampler`, only the detections of the first of these
    ranks are kept.

    Args:
        path: Path of the file.
        model: The teacher.
    """
    files = sorted(path.parent.glob(f'{glob.escape(path.name)}.rank*[0-9]'))
    if not files:
        return
    parts: list = []
    sizes: dict = {}
    for file in [path, *files] if path.exists() else files:
        arrays = StoredDetections(file, model).arrays
        own = dict(zip(arrays['keys'].tolist(), arrays['sizes'].tolist()))
        if any(sizes.get(k, size) != size for k, size in own.items()):
            raise DistillError(
                f'In {file}, an image has the same name as an image of a different size. Give each '
                'image a unique name, such as its whole path, and delete this file.'
            )
        new = np.array([k not in sizes for k in own])
        rows = np.repeat(new, arrays['counts'])
        parts.append({k: v[new if k in PER_IMAGE else rows] for k, v in arrays.items()})
        sizes |= own
    write_detections(path, about_teacher(model), parts)
    for file in files:
        file.unlink()


def new_images(
    images: Sequence, names: Sequence, sizes: dict, seen: set, path: Path
) -> dict[int, int]:
    """Return {key: position in the batch} of the images that are not stored yet.

    Args:
        images, names: A batch of `store_detections`.
        sizes: {key: [height, width]} of the stored images.
        seen: Keys of the earlier batches. The keys of this batch are added.
        path: Path of the file, for the errors.
    """
    if len(images) != len(names):
        raise DistillError(f'{len(images)} images have {len(names)} names: pass one for each.')
    new = {}
    for i, (x, name) in enumerate(zip(images, names)):
        key, size, shown = image_key(name), list(x.shape[-2:]), shortened(repr(name), 100)
        if key in seen:
            raise DistillError(
                f'Two images have the name {shown}, so they would share their detections. Give '
                'each image a unique name, such as its whole path.'
            )
        seen.add(key)
        if key not in sizes:
            new[key] = i
        elif sizes[key] != size:
            raise DistillError(
                f'The image {shown} has {size[0]}x{size[1]} pixels, but its detections in {path} '
                f'are for {sizes[key][0]}x{sizes[key][1]} pixels. Pass the original images, or a '
                'different path.'
            )
    return new
