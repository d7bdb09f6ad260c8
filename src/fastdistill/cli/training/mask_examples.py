"Draw masks that the models of a run predict for images of the validation set."

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...base.outputs import as_plain
from ...evaluation.mask_plots import plot_masks
from ...fastai.task import task_of
from ...fastai.teachers import teacher_of
from ...teachers.fast_copy import AS_IT_IS
from .data_files import Samples


def mask_examples(models: Mapping, dls: Any, s: Samples, n: int = 2) -> Any:
    """Plot the images of the first validation batch on which the models differ most.

    Args:
        models: {name: model}, with the models 'teacher' and 'distilled'.
        dls: DataLoaders of the run.
        s: The `Samples` from which `dls` was built.
        n: Maximum number of images.
    """
    student = models['distilled']
    task = task_of(student.loss_func)
    x, y = dls.valid.one_batch()
    found = {}
    for name, model in models.items():
        with teacher_of(model, student, task, run=AS_IT_IS) as teacher:
            logits: Any = teacher(as_plain(x)).logits
        found[name] = logits.argmax(task.axis).cpu().numpy()
    labels = as_plain(y).cpu().numpy()
    differ = np.any([o != found['distilled'] for o in found.values()], axis=0)
    counts = labels != task.ignore_index
    at = np.argsort(-(differ & counts).sum((1, 2)), kind='stable')[:n]
    images = as_plain(dls.valid.after_batch.decode((x, y))[0]).permute(0, 2, 3, 1).cpu()
    return plot_masks(
        images.numpy().astype(np.uint8)[at],
        labels[at],
        {name: o[at] for name, o in found.items()},
        s.classes,
        'teacher',
        task.ignore_index,
    )
