"A DataLoader whose random transforms repeat the views of a cache."

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType

import numpy as np
import torch
from fastai.basics import TfmdDL
from fastai.tabular.core import TabDataLoader
from fastai.text.data import LMDataLoader, SortedDL

from ..base.generators import Generators
from ..base.outputs import DistillError
from ..base.random_state import restored_once, seeded
from ..base.seeds import seeds_of, view_of
from .language_model import in_a_row
from .teacher_targets import TeacherRow
from .transforms import Replay, Shown

__all__ = ['Plan', 'attach', 'detach', 'refuse_unindexed', 'set_aside']


@dataclass
class Plan:
    """The sample and the view of each index of a DataLoader.

    Attributes:
        keys: (N,) uint64 by position in the dataset; while writing: by row.
        views: 0: nothing is replayed.
        at: (N,) row of each position (training); position of each row (writing).
        cache: Whose rows are fed; None while writing.
        random: Random transforms are seeded.
        stream: Samples follow one another in a text, so all have the same view.
    """

    keys: np.ndarray
    views: int
    seed: int
    at: np.ndarray | None = None
    cache: object = None
    epoch: int = 0
    random: bool = True
    stream: bool = False

    def of(self, i):
        """(positions, keys, views, rows) of indices, an array of them or one number."""
        if self.cache is None:
            view, row = divmod(i, len(self.keys))
            at, keys = self.at[row], self.keys[row]
            return at, keys if isinstance(i, np.ndarray) else int(keys), view, None
        keys = self.keys[i] if isinstance(i, np.ndarray) else int(self.keys[i])
        return (
            i,
            keys,
            view_of(keys * 0 if self.stream else keys, self.epoch, self.views, self.seed),
            self.at[i],
        )


class IndexedItem(tuple):
    """An item and its index."""


class Items:
    """A DataLoader's `do_item` whose random numbers depend on the sample and the view."""

    def __init__(self, dl, plan):
        self.dl, self.plan = dl, plan
        self.look()

    def look(self):
        """Find the generators inside transforms. They may be other objects in another epoch."""
        self.own = Generators(self.dl.after_item, self.dl.dataset)

    def __call__(self, s):
        s = 0 if s is None else int(s)
        at, key, view, _ = self.plan.of(s)
        item = self.make(int(at), key, int(view))
        if item is None and self.plan.cache is None:
            raise DistillError(
                f'Sample {at} is skipped by its own transforms (SkipItemException): '
                'remove it from the data before caching.'
            )
        return None if item is None else IndexedItem((item, s))

    def make(self, at, key, view):
        if not self.plan.random:
            return type(self.dl).do_item(self.dl, at)
        seed = seeds_of(self.plan.seed, key, view)
        with seeded(seed), self.own.seeded(seed):
            return type(self.dl).do_item(self.dl, at)


class Cuts(Items):
    """The same for a language model, whose samples are cut from the joined texts: each view is an
    order of the texts.
    """

    view = None

    def make(self, at, key, view):
        if view != self.view:
            self.view, self.chunks = view, self.joined_texts(view)
        was, self.dl.chunks = self.dl.chunks, self.chunks
        try:
            return super().make(at, key, view)
        finally:
            self.dl.chunks = was

    def joined_texts(self, view):
        seed, n = seeds_of(self.plan.seed, view), len(self.dl.items)
        order = np.random.default_rng(seed).permutation(n) if self.plan.views else np.arange(n)
        return in_a_row(self.dl, order.tolist(), partial(self.text, seed))

    def text(self, seed, i):
        """Text `i`. Its random numbers differ from those of the samples that are cut from it."""
        get = lambda: self.dl.items.tfm(self.dl.items.coll[i])
        if not self.plan.random:
            return get()
        with seeded(s := seeds_of(seed, i)), self.own.seeded(s):
            return get()


class Batches:
    """A DataLoader's `do_batch` that adds stored rows and indices to the batch."""

    def __init__(self, dl, plan, own):
        self.dl, self.plan, self.own = dl, plan, own

    def __call__(self, b):
        make = self.own or partial(type(self.dl).do_batch, self.dl)
        if not isinstance(b[0], IndexedItem):
            return make(b)  # `dl.new()` copies `do_batch`, but not `do_item`
        cache, (_, keys, views, at) = self.plan.cache, self.plan.of(np.array([s for _, s in b]))
        rows = np.zeros((len(b), 0), np.uint8) if cache is None else cache.rows(at, views)
        return make([o for o, _ in b]), TeacherRow(torch.from_numpy(rows)), Shown(keys, views)


def create_batches(self, samps):
    """The DataLoader's own method, with the global generators restored once for each batch."""
    batches = type(self).create_batches(self, samps)
    while True:
        with restored_once():
            b = next(batches, None)
        if b is None:
            return
        yield b


def attach(dl, plan, source=None):
    """Make `dl` replay `plan`. It stays the same object, so a Learner that holds it uses the plan.

    Args:
        source: The DataLoader that makes the items, if not `dl` itself.
    """
    detach(dl)
    refuse_unindexed(dl)
    assert dl.n_inp  # subtle: fastai computes it from a first batch, which must not have rows yet
    own = dl.__dict__.get('do_batch')
    dl.do_batch, dl.do_item = (
        Batches(dl, plan, own),
        (Cuts if plan.stream else Items)(source or dl, plan),
    )
    # subtle: as a bound method, since `dl.new()` does not copy these
    if plan.random:
        dl.create_batches = MethodType(create_batches, dl)
    dl.after_batch = Replay(dl.after_batch, plan)
    return dl


def detach(dl):
    """Undo `attach`; safe to call twice, and on a copy of the DataLoader."""
    if not isinstance(dl.__dict__.get('do_item'), Items):
        return
    del dl.__dict__['do_item']
    dl.__dict__.pop('create_batches', None)
    own = dl.__dict__.pop('do_batch').own
    if own is not None:
        dl.do_batch = own
    pipe = dl.after_batch
    if isinstance(pipe, Replay):
        pipe.own.fs, dl.after_batch = pipe.fs, pipe.own


@contextmanager
def set_aside(*dls):
    """Inside, these DataLoaders are as they were before `attach`."""
    parts = 'do_item', 'do_batch', 'create_batches', 'after_batch'
    attached = [{k: dl.__dict__[k] for k in parts if k in dl.__dict__} for dl in dls]
    for dl in dls:
        detach(dl)
    try:
        yield
    finally:
        for dl, own in zip(dls, attached):
            dl.__dict__.update(own)


def refuse_unindexed(dl):
    """Refuse a DataLoader whose samples have no indices."""
    what = type(dl).__name__
    if not hasattr(dl, 'after_batch') or not hasattr(dl, 'do_item'):
        raise DistillError(
            f'{what} is not a fastai DataLoader: write with cache_dataset(teacher, dataset, path) and '
            'train with Replayed(dataset, cache).'
        )
    if dl.bs is None:
        raise DistillError(
            f'{what} loads whole batches (bs=None), but a stored output belongs to a sample. Give it a '
            'batch size.'
        )
    if not dl.indexed:
        raise DistillError(
            f'{what} loads data that can only be iterated: a stored output belongs to a sample, and '
            'these samples have no indices. Use a dataset with __getitem__ and __len__.'
        )
    if (base := next((c for c in type(dl).__mro__ if c in KNOWN_LOADERS), None)) is None:
        raise DistillError(
            f"{what} is none of fastai's loaders whose batches can be repeated: make the DataLoaders "
            'with DataLoaders.from_dsets, or of TfmdDL.'
        )
    if own := [
        m
        for m in ('create_item', 'create_batch', 'do_item', 'do_batch')
        if getattr(type(dl), m) is not getattr(base, m)
    ]:
        raise DistillError(
            f'{what} overrides {", ".join(own)}, so its batches could not be repeated: do this in the '
            'dataset or in a transform.'
        )


KNOWN_LOADERS = LMDataLoader, SortedDL, TabDataLoader, TfmdDL
