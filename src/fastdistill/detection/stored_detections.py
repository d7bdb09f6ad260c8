"Read and write a file with the detections of a teacher."

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from ..base.atomic_files import check_regular_file, file_errors, new_file
from ..base.content import first_difference
from ..base.outputs import DistillError
from ..cache.digests import fingerprint
from ..cache.json_checks import shortened
from ..cache.keys import key_of
from ..features.layer_names import unwrap
from .torchvision_detectors import detector_name

# {name: (type, shape of a row)} of the arrays in a file
ARRAYS: dict[str, tuple] = dict(
    keys=('uint64', ()),
    sizes=('int32', (2,)),  # height and width of the image
    counts=('int32', ()),  # number of detections
    boxes=('float32', (4,)),
    scores=('float32', ()),
    labels=('int32', ()),
)
PER_IMAGE = 'keys', 'sizes', 'counts'  # arrays with one row per image. The others have one per box
# attributes of a detector and its parts that change the detections
DETECTION_OPTIONS = (
    'min_size',
    'max_size',
    'image_mean',
    'image_std',
    'fixed_size',
    'score_thresh',
    'nms_thresh',
    'detections_per_img',
    'topk_candidates',
    '_pre_nms_top_n',
    '_post_nms_top_n',
)


class StoredDetections:
    """The detections of a teacher, stored by `store_detections`. `best_threshold` and
    `teacher_labels` accept this object instead of the teacher, with the names of images instead of
    the images.

    Args:
        path: Path of the file.
        model: The teacher. If the detections of a different teacher are stored, an error is raised.
            None to skip this check.

    Attributes:
        teacher: Name of the teacher, fingerprint of its weights, and its options.
    """

    def __init__(self, path: Path | str, model: nn.Module | None = None) -> None:
        self.path = Path(path)
        check_regular_file(path)
        with file_errors(
            f"Can't read the detections in {path}",
            (OSError, ValueError, TypeError, SafetensorError),
        ):
            with safe_open(self.path, 'np') as f:
                self.teacher = json.loads((f.metadata() or {}).get('teacher', '{}'))
                if {*f.keys()} != {*ARRAYS} or {*self.teacher} != {'name', 'weights', 'options'}:
                    raise ValueError('store_detections did not write this file')
                self.arrays = {k: f.get_tensor(k) for k in ARRAYS}
            check_arrays(self.arrays)
        self.positions = {k: i for i, k in enumerate(self.arrays['keys'].tolist())}
        self.ends = self.arrays['counts'].cumsum(dtype=np.int64)
        if model is not None:
            self.check(model)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.arrays['keys'])

    def check(self, model: nn.Module) -> None:
        """Raise a DistillError if the detections are from a different teacher, or from the same
        teacher with different options.
        """
        if (found := first_difference(self.teacher, about_teacher(model))) is None:
            return
        what = (
            'different weights' if found[0] == 'weights' else '{} {}, not {}'.format(*found)
        ).removeprefix('options.')
        raise DistillError(
            f'{self.path} has the detections of a teacher with {what}. Pass the same teacher, or '
            'store the detections of this teacher in a different file.'
        )

    def __call__(self, names: Sequence) -> list:
        """Return the detections for images, as a detector in evaluation mode does.

        Args:
            names: Names under which the images were stored.
        """
        out = []
        for name in names:
            if (i := self.positions.get(image_key(name))) is None:
                raise DistillError(
                    f'{self.path} has no detections for the image {shortened(repr(name), 100)}. '
                    f'It has detections for {len(self)} images: pass the names under which they were '
                    'stored, or store this image, too.'
                )
            rows = slice(self.ends[i] - self.arrays['counts'][i], self.ends[i])
            boxes, scores, labels = [
                torch.from_numpy(self.arrays[k][rows].copy()) for k in ('boxes', 'scores', 'labels')
            ]
            out.append(dict(boxes=boxes, scores=scores, labels=labels.long()))
        return out


def check_arrays(arrays: dict) -> None:
    """Raise a ValueError if the arrays of a file do not fit together."""
    for k, (dtype, shape) in ARRAYS.items():
        if arrays[k].dtype != dtype or arrays[k].shape[1:] != shape:
            raise ValueError(f'{k} are {arrays[k].dtype} {list(arrays[k].shape)}')
    images, counts = len(arrays['keys']), arrays['counts']
    if not images == len(arrays['sizes']) == len(counts) == len(np.unique(arrays['keys'])):
        raise ValueError('the images do not have unique keys')
    total = counts.sum(dtype=np.int64)
    if (counts < 0).any() or any(len(arrays[k]) != total for k in ('boxes', 'scores', 'labels')):
        raise ValueError('the number of boxes differs from the sum over the images')


def write_detections(path: Path, teacher: dict, parts: Sequence[dict]) -> None:
    """Write a file completely or not at all.

    Args:
        path: Path of the file.
        teacher: What `about_teacher` returned.
        parts: Dicts of the arrays to concatenate.
    """
    arrays = {
        k: np.concatenate([np.asarray(p[k], dtype).reshape(-1, *shape) for p in parts])
        for k, (dtype, shape) in ARRAYS.items()
    }
    with file_errors(f"Can't write {path}", (OSError, SafetensorError)), new_file(path) as tmp:
        save_file(arrays, tmp, metadata=dict(teacher=json.dumps(teacher)))


def image_key(name: Any) -> int:
    """Return the key of an image.

    Args:
        name: A text, path or number. If images have no names, an image itself can be the name.
    """
    if isinstance(name, dict):
        raise DistillError(
            'The name of an image is a dict. Does the batch have targets instead of names? Pass '
            'batches of images and names (file names or numbers).'
        )
    if isinstance(name, Tensor) and name.numel() == 1:
        name = name.item()  # a DataLoader converts numbers to a tensor
    return key_of(name)


def about_teacher(model: nn.Module) -> dict:
    """Return what determines the detections of a model, for a comparison with the teacher of a
    file.
    """
    model = unwrap(model)
    options = {
        f'{name}.{k}'.lstrip('.'): vars(m)[k]
        for name, m in model.named_modules()
        for k in DETECTION_OPTIONS
        if k in vars(m)
    }
    about = dict(
        name=detector_name(model), weights=fingerprint(model.state_dict()), options=options
    )
    # convert tuples to lists, as in a file
    return json.loads(json.dumps(about, default=str))
