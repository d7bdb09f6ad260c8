"""Prepare batches for checks in the same way as in training, and create batches of unlabeled items.

The Learner, its DataLoaders and the random state are not changed.
"""

import inspect
import random
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import PurePath

import torch
from fastai.basics import (
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    TfmdLists,
    is_listy,
    one_param,
    to_device,
)
from fastai.callback.mixup import MixHandler
from torch.utils.data import IterableDataset

from ..base.model_state import restored
from ..base.outputs import DistillError, as_plain, map_tensors
from ..distiller.loader_batches import restored_loaders
from ..teachers.raw_items import with_items
from .raw_items import renewed, without_samples

CANCELED = (
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
)


class PreparationError(Exception):
    """Raised if a callback that changes batches fails outside a fit."""


def valid_batches(dl, n=None):
    """Yield some shuffled batches of the validation set, which is often sorted by class."""
    options = dict(shuffle=getattr(dl, 'indexed', True), drop_last=False, num_workers=0)
    if hasattr(dl, 'wgts'):
        # fastai's DataLoaders with weights, such as those of tables, draw samples with replacement
        order = random.Random(0).sample(range(dl.n), dl.n)
        options |= dict(get_idxs=lambda: order)
    yield from some_batches(dl, n, **options)


def train_batches(dl, n):
    """Yield some shuffled batches of the training set, without changing the order in training."""
    if isinstance(getattr(dl, 'dataset', None), IterableDataset):
        return  # iterable datasets may not be readable twice
    yield from some_batches(dl, n, num_workers=0)


def some_batches(dl, n=None, **options):
    """Yield the first `n` batches, then restore the DataLoader and its random generators.

    Args:
        dl: The DataLoader.
        n: Number of batches. None for all.
        **options: Options with which a fastai DataLoader is copied before it is read.
    """
    with restored_loaders(dl):
        if options and hasattr(dl, 'shuffle_fn'):
            dl = renewed(dl, **options)
        yield from islice(dl, n)


def split_batch(learn, b):
    """Return (inputs, targets) of a batch. Both are tuples of plain tensors."""
    return as_plain_batch(*parts_of_batch(learn, b))


def parts_of_batch(learn, b):
    """Return (inputs, targets) of a batch on the model's device. Both are tuples."""
    if learn.model is not None:
        b = to_device(b, one_param(learn.model).device)
    b = tuple(b) if is_listy(b) else (b,)
    n = getattr(learn.dls, 'n_inp', 1 if len(b) == 1 else len(b) - 1)
    return b[:n], b[n:]


def as_plain_batch(*parts):
    return tuple(tuple(map_tensors(o, as_plain) for o in part) for part in parts)


def prepared_batches(learn, n_valid, n_train):
    """Return two generators of (inputs, targets), one for validation and one for training
    batches.
    """
    has_valid = len(learn.dls.loaders) > 1 and getattr(learn.dls.valid, 'n', None) != 0
    valid = valid_batches(learn.dls.valid, n_valid) if has_valid else (b for b in ())
    return prepared(learn, valid, 1, False), prepared(
        learn, train_batches(learn.dls.train, n_train), 0, True
    )


def prepared(learn, batches, ds_idx, training):
    """Yield (inputs, targets) of batches after the Learner's callbacks have changed them."""
    # subtle: close the batches first, because they restore the same random generators
    with restored_loaders(*getattr(learn.dls, 'loaders', ())), closing(batches):
        for i, b in enumerate(batches):
            b, items = without_samples(b)
            try:
                x, y = (
                    split_batch(learn, b)
                    if learn.model is None
                    else with_callbacks(learn, b, i, ds_idx, training)
                )
            except CANCELED:
                continue  # a fit would also skip this batch
            yield with_items(x, items), y


def number_of_batches(dl):
    try:
        return len(dl)
    except TypeError:
        return None  # an iterable dataset has no length


def changing_callbacks(learn, training):
    """Return the callbacks that may change a batch.

    The result contains the user's own callbacks and, in training, MixUp and similar callbacks.
    fastai's other callbacks don't change inputs.
    """

    def is_users(cb):
        if (fn := getattr(cb, 'before_batch', None)) is None:
            return False
        module = getattr(inspect.unwrap(getattr(fn, '__func__', fn)), '__module__', None) or ''
        return module.partition('.')[0] not in ('fastai', 'fastdistill')

    return [
        cb
        for cb in learn.cbs.sorted('order')
        if is_users(cb) or (training and isinstance(cb, MixHandler))
    ]


@contextmanager
def restored_autocast():
    """Context manager that restores the state of autocast. A callback may enter `torch.autocast` in
    `before_batch` and leave it in `after_loss`, which does not run here.
    """
    states = [
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ('cpu', 'cuda')
    ]
    level = torch.autocast_increment_nesting()
    try:
        yield
    finally:
        for device, enabled, dtype in states:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        # subtle: inside of a context, autocast would keep the copies of weights from earlier steps
        while torch.autocast_decrement_nesting() >= level:
            pass
        if level == 1:
            torch.clear_autocast_cache()


def with_callbacks(learn, b, i, ds_idx, training):
    """Run `before_batch` of the callbacks on a batch, and return (inputs, targets).

    The Learner and its callbacks are restored.
    """
    with restored(learn, *learn.cbs), restored_autocast():
        now, dl = vars(learn), learn.dls[ds_idx]
        now.update(training=training, iter=i, dl=dl, n_iter=number_of_batches(dl))
        for k, v in dict(epoch=0, n_epoch=1, pct_train=0.0, train_iter=0).items():
            now.setdefault(k, v)
        learn.xb, learn.yb = parts_of_batch(learn, b)
        for cb in changing_callbacks(learn, training):
            if isinstance(cb, MixHandler):
                vars(cb)['stack_y'] = True  # prevents MixUp from changing the labels
            try:
                cb('before_batch')
            except CANCELED:
                raise
            except Exception as e:
                raise PreparationError(f'{type(cb).__name__} ({e})') from e
        return as_plain_batch(learn.xb, learn.yb)


def loader_of(items, dls):
    """Return a DataLoader of the given items, transformed and augmented like the training set.

    Args:
        items: Items like those of the training set, without labels, or a DataLoader.
        dls: DataLoaders with the training set.
    """
    if hasattr(items, '__iter__') and hasattr(items, 'batch_size') or hasattr(items, 'after_batch'):
        loader = items
    else:
        if isinstance(items, (str, PurePath)) or not hasattr(items, '__len__'):
            raise DistillError(
                f'unlabeled={items!r}: must be a list of items like those of the training set, such as '
                'get_image_files(folder), or a DataLoader.'
            )
        if len(items) == 0:
            raise DistillError('unlabeled=: the list of items is empty.')
        train = dls.train
        try:
            ds = dls.test_dl(items).dataset
        except Exception as e:
            raise DistillError(
                "unlabeled=: these items can't be prepared like those of the training set "
                f'({type(e).__name__}: {e}). Give items of the same kind, or a DataLoader.'
            ) from e
        for o in getattr(ds, 'tls', [ds]):
            # subtle: `test_dl` returns a validation set, for which random transforms are skipped
            if isinstance(o, TfmdLists):
                o.split_idx = o.tfms.split_idx = 0
        loader = train.new(ds, bs=min(train.bs, len(items)), shuffle=True, drop_last=True, n=None)
    if number_of_batches(loader) == 0:
        raise DistillError('unlabeled=: this DataLoader is empty.')
    return loader
