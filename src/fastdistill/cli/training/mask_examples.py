"Draw masks that the models of a run predict for images of the validation set."

from collections.abc import Mapping
from typing import Any

import numpy as np
from fastai.vision.core import TensorImage

from ...base.outputs import as_plain
from ...evaluation.mask_plots import plot_masks
from ...fastai.task import task_of
from .data_files import Samples
from .valid_predictions import valid_predictions


def mask_examples(models: Mapping, dls: Any, s: Samples, n: int = 6) -> Any:
    """Plot the images of the validation set on which the models differ most.

    Args:
        models: {name: model}, with the models 'teacher' and 'distilled'.
        dls: DataLoaders of the run.
        s: The `Samples` from which `dls` was built.
        n: Maximum number of images.
    """
    task = task_of(models['distilled'].loss_func)
    most: list[tuple] = []  # (number of pixels that differ, image, labels, {name: mask})
    for x, y, logits in valid_predictions(models, dls):
        found = {name: o.argmax(task.axis).cpu().numpy() for name, o in logits.items()}
        labels = as_plain(y).cpu().numpy()
        differ = np.any([o != found['distilled'] for o in found.values()], axis=0)
        sizes = (differ & (labels != task.ignore_index)).sum((1, 2))
        images, _ = dls.valid.after_batch.decode((TensorImage(x), y))
        images = as_plain(images).permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
        for i, size in enumerate(sizes):
            most.append((size, images[i], labels[i], {k: o[i] for k, o in found.items()}))
        most = sorted(most, key=lambda o: -o[0])[:n]
    _, images, labels, masks = zip(*most)
    return plot_masks(
        images,
        np.stack(labels),
        {name: np.stack([o[name] for o in masks]) for name in masks[0]},
        s.classes,
        'teacher',
        task.ignore_index,
    )
