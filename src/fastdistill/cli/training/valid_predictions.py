"Predict the validation set of a run with all its models, and list the samples that differ."

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...base.outputs import as_plain
from ...base.random_state import guarded_random_state
from ...fastai.probe_batches import prepared, some_batches
from ...fastai.raw_items import items_shown
from ...fastai.task import task_of
from ...fastai.teachers import teacher_of
from ...teachers.fast_copy import AS_IT_IS
from .data_files import Samples
from .data_fingerprint import sample_names

STUDENTS = 'distilled', 'alone'


def valid_predictions(models: Mapping, dls: Any) -> Iterator[tuple]:
    """Yield (inputs, labels, {name: logits}) for each batch of the validation set.

    Args:
        models: {name: model}, with the model 'distilled'.
        dls: DataLoaders of the run.
    """
    student = models['distilled']
    task = task_of(student.loss_func)
    runs = {k: teacher_of(m, student, task, run=AS_IT_IS) for k, m in models.items()}
    with guarded_random_state(), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(items_shown([dls.valid], *runs.values()))
        for run in runs.values():
            stack.enter_context(run)
        batches = prepared(student, some_batches(dls.valid), 1, False)
        for x, y in stack.enter_context(closing(batches)):
            logits = {}
            for k, run in runs.items():
                run.reset()
                logits[k] = run(*x).logits
            yield x[0], y[0], logits


def changed_table(models: Mapping, dls: Any, s: Samples) -> pd.DataFrame:
    """Return a table of the validation samples for which the students with and without the teacher
    predict different classes. The columns are the file or row number, the label, which of the two
    students is right, and the class that each model predicts, with its probability.

    Args:
        models: {name: model}, with the models 'alone' and 'distilled'.
        dls: DataLoaders of the run.
        s: The `Samples` from which `dls` was built.
    """
    order = np.flatnonzero(s.valid)[[*dls.valid.get_idxs()]]
    found: dict[str, list] = {'label': []}
    for _, y, logits in valid_predictions(models, dls):
        found['label'] += as_plain(y).flatten().tolist()
        for k, o in logits.items():
            p, c = o.softmax(-1).max(-1)
            found.setdefault(k, []).extend(c.tolist())
            found.setdefault(f'{k} probability', []).extend(p.tolist())
    differ = np.flatnonzero(np.array(found['alone']) != np.array(found['distilled']))
    differ = differ[np.argsort(order[differ])]
    columns = {k: [v[i] for i in order[differ]] for k, v in sample_names(s).items()}
    who = lambda i: next((k for k in STUDENTS if found[k][i] == found['label'][i]), 'neither')
    columns['right'] = [who(i) for i in differ]
    for k, v in found.items():
        values = [v[i] for i in differ]
        is_class = not k.endswith(' probability')
        columns[k] = [s.classes[o] if is_class else round(o, 4) for o in values]
    return pd.DataFrame(columns)


def changes_in_words(changed: pd.DataFrame, n: int) -> str:
    """Describe how many of the `n` validation samples the table lists."""
    right = changed['right'].value_counts()
    only = ', '.join(f'only {k} is right for {right.get(k, 0):,}' for k in STUDENTS)
    return (
        f'The students predict different classes for {len(changed):,} of {n:,} validation samples: {only}, '
        f'and neither for {right.get("neither", 0):,}. They are listed in changed.csv. With a different '
        'seed, the list would differ in part.'
    )
