"""Describe what a training run depends on besides its recipe, so that a folder of finished runs is
not resumed with a different student, teacher or dataset.
"""

import warnings

import numpy as np
from fastai.basics import Learner

from ..base.content import describe_content
from ..base.outputs import DistillError, DistillWarning
from ..base.random_state import RandomGuard, seeded
from ..cache.digests import fingerprint, flat_values
from ..cache.keys import keys_of
from ..cache.reader import TeacherCache
from ..cache.sample_files import files_of, record_files
from ..cache.teacher_description import identity_of, spread_positions
from .callback_arguments import feed_of
from .sample_keys import item_keys, items_of, key_root, keys_of_table, sample_files
from .teachers import is_heads, teacher_of


def teacher_text(teacher) -> str:
    """Return a fingerprint of the teacher's weights or of the cache.

    For several heads, the text contains a fingerprint for each teacher.
    """
    if is_heads(teacher):
        each = {k: '' if t is None else teacher_text(t) for k, t in teacher.items()}
        return ', '.join(f'{k}: {text}' for k, text in each.items())
    feed = feed_of(teacher)
    if feed is not None:
        return feed.cache.identity if isinstance(getattr(feed, 'cache', None), TeacherCache) else ''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        return identity_of(teacher_of(teacher))['weights']


def setup_of(learn: Learner) -> dict:
    """Describe the data, the optimizer and the task loss of a Learner, as {name: content}."""
    loaders = {k: dl for k, dl in zip(('training', 'validation'), learn.dls.loaders)}
    with RandomGuard():
        labels = [f'{k} {text}' for k, dl in loaders.items() if (text := labels_text(dl))]
        files = [f'{k} {text}' for k, dl in loaders.items() if (text := files_text(dl))]
        samples = samples_text(learn.dls)
    optimizer = {k: getattr(learn, k) for k in ('opt_func', 'wd', 'moms', 'wd_bn_bias')}
    return {
        'samples': samples,
        'labels': ' and '.join(labels),
        'files': ' and '.join(files),
        'batch sizes': ' and '.join(f'{getattr(dl, "bs", None)}' for dl in loaders.values()),
        'optimizer': describe_content(optimizer),
        'task loss': describe_content(learn.loss_func),
    }


def samples_text(dls) -> str:
    """Describe the samples by their number and a fingerprint of their keys."""
    root, parts = key_root(dls), []
    for dl, name in zip(dls.loaders, ('training', 'validation')):
        try:
            keys = item_keys(dl, None, root)
        except DistillError:  # an iterable dataset, or one that does not show its samples
            continue
        parts.append(f'{len(keys):,} {name} samples ({fingerprint(keys)[:8]})')
    return ' and '.join(parts)


def labels_text(dl) -> str:
    """Return a fingerprint of the labels of all samples, or of a few whole samples of a dataset
    that does not show its labels. Empty if this is not possible.
    """
    dataset = dl.dataset
    try:
        if hasattr(items := items_of(dataset), 'columns'):
            return fingerprint(keys_of_table(items))[:8]
        if targets := getattr(dataset, 'tls', [])[getattr(dataset, 'n_inp', 1) :]:
            return fingerprint(*map(raw_values, targets))[:8]
        few = spread_positions(len(dataset), 8).tolist()
        with seeded(0):
            return fingerprint(*(v for i in few for v in flat_values(dataset[i])))[:8]
    except (DistillError, TypeError, NotImplementedError):  # an iterable dataset
        return ''


def raw_values(part) -> np.ndarray:
    """Return a key for each value that the first transform of a `TfmdLists` returns. If the values
    are files, the keys are computed from their contents.
    """
    values = [part.tfms.fs[0](o) for o in part.items] if len(part.tfms.fs) else list(part.items)
    if (files := files_of(values)) is not None:
        return record_files(files)[:, 2]
    return keys_of(values)


def files_text(dl) -> str:
    """Return a fingerprint of the contents of the samples' files. Empty if they are not files."""
    files = sample_files(dl)
    return '' if files is None else fingerprint(record_files(files)[:, 2])[:8]
