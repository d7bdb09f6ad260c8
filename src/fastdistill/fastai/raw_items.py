"""Provide the raw items of a batch (texts, files) to teachers that process raw items."""

from contextlib import ExitStack, contextmanager

import numpy as np
from fastai.tabular.core import Tabular

from ..base.batch_samples import BatchSamples
from ..base.outputs import DistillError
from .language_model import is_stream
from .sample_keys import items_of
from .sampled_batches import Plan, attach, detach, refuse_unindexed, sampled
from .transforms import moves


def given_items(dataset):
    """Return the items of a dataset before any transform. None if they are unknown."""
    # subtle: fastai's tokenizer replaces the table of the inputs, but not the table of the labels
    tls = getattr(dataset, 'tls', ())
    return tls[-1].items if len(tls) else items_of(dataset)


def raw_items(dl):
    """Return the items as they were passed to a DataLoader: a list of files or texts, or a
    table. Raise an error if the DataLoader does not show which items are in a batch.
    """
    why, ds = None, getattr(dl, 'dataset', None)
    if is_stream(dl):
        why = 'The samples of a language model are pieces of one long text, not items.'
    elif isinstance(ds, Tabular):
        why = 'The items of a table are its rows after the transforms.'
    elif getattr(dl, 'indexed', True) and given_items(ds) is None:
        why = f'A {type(ds).__name__} does not show its items. Use a DataBlock, Datasets, or a list of samples.'
    try:
        refuse_unindexed(dl)
    except DistillError as e:
        why = e
    if why is None:
        return given_items(ds)
    raise DistillError(
        f"The teacher's option items= needs the items of each batch, which are unknown here: {why} "
        "To compute the teacher's inputs from the batch, use Teacher(model, inputs=fn); for an "
        'estimator on tables, use frame=.'
    )


def plan_of_items(dl, moved=()) -> Plan:
    """Return a plan that adds the raw items to the batches of a DataLoader.

    Args:
        dl: The DataLoader.
        moved: See `BatchSamples`.
    """
    items = raw_items(dl)
    return Plan(np.zeros(len(items), np.uint64), items=items, moved=list(moved), random=False)


def shows_items(dl):
    return (own := sampled(dl)) is not None and own.plan.items is not None


@contextmanager
def items_shown(loaders, *teachers):
    """Context manager that temporarily adds the raw items to the batches of these DataLoaders.

    Args:
        loaders: DataLoaders of fastai.
        *teachers: `Teacher`s. If no teacher reads raw items, the DataLoaders are not changed.
    """
    reads = any(t.needs == 'items' for t in teachers)
    with ExitStack() as stack:
        for dl in [dl for dl in loaders if not shows_items(dl)] if reads else ():
            plan = plan_of_items(dl, moves(dl))
            if len(dl.dataset):
                stack.callback(detach, attach(dl, plan))
        yield


def renewed(dl, **options):
    """Return `dl.new(...)`. Raw items are added to the new batches if the batches of `dl` have raw
    items.
    """
    new = dl.new(**options)
    return attach(new, sampled(dl).plan) if shows_items(dl) else new


def split_samples(b):
    """Split a batch into (batch for the model and the loss, its `BatchSamples` or None)."""
    return (b[:-1], b[-1]) if isinstance(b[-1], BatchSamples) else (b, None)


def without_samples(b):
    """Split a batch into (batch for the model and the loss, raw items or None)."""
    b, samples = split_samples(b)
    return b, getattr(samples, 'items', None)
