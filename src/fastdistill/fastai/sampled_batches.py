"""Add information about samples to the batches of a DataLoader, and replay the views of a cache."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from fastai.basics import TfmdDL, to_device
from fastai.tabular.core import TabDataLoader
from fastai.text.data import LMDataLoader, SortedDL

from ..base.batch_samples import BatchSamples
from ..base.outputs import DistillError
from ..base.random_state import restored_once, seeded
from ..base.sample_seeds import seeds_of, view_of
from ..base.transform_random_state import Generators
from .language_model import in_a_row
from .transforms import Replay


@dataclass
class Plan:
    """Describes what to add to the batches of a DataLoader, and whether to replay random
    transforms.

    Attributes:
        keys: Key of each sample by position in the dataset, (N,) uint64.
        views: Number of views that are replayed. 0 if nothing is replayed.
        seed: Seed of the views.
        cache: Cache whose rows are added. None to add no rows.
        at: Row of each sample in the cache, (N,).
        items: Raw items of all samples, to add to the batches. None to add no items.
        moved: See `BatchSamples`.
        epoch: Epoch number, which determines the view.
        random: True if random transforms are seeded.
        stream: True if the samples are consecutive pieces of one text, so that all samples have the
            same view.
        transforms: What `Replay` knows about each batch transform. Copies of a plan share it.
    """

    keys: np.ndarray
    views: int = 0
    seed: int = 0
    cache: object = None
    at: np.ndarray | None = None
    items: object = None
    moved: list = field(default_factory=list)
    epoch: int = 0
    random: bool = True
    stream: bool = False
    transforms: dict = field(default_factory=dict)

    def sample(self, i) -> tuple:
        """Return the position in the dataset and the view of a sample, given an index from the
        sampler.

        When a cache is written, each index is already a pair (position, view).
        """
        if isinstance(i, tuple):
            return i
        key = 0 if self.stream else int(self.keys[i])
        return int(i), view_of(key, self.epoch, self.views, self.seed)


class SampledBatches:
    """Creates the batches of a DataLoader. Each batch is returned together with its `BatchSamples`.

    If `plan.random` is True, the random numbers of an item depend only on the sample and the view.

    Args:
        dl: The DataLoader.
        plan: What is added to the batches.
        maker: DataLoader that creates the items. If None, `dl` creates them.
    """

    def __init__(self, dl, plan, maker=None):
        self.dl, self.plan, self.maker = dl, plan, maker or dl
        # subtle: read `n_inp` now. fastai counts the parts of a batch at first use, and transforms
        # may change the number of parts.
        self.n_inp = dl.n_inp
        self.look()

    def look(self):
        """Find the random generators of transforms. Transforms may be replaced between epochs."""
        self.own = Generators(self.maker.after_item, self.maker.dataset)

    def create_batches(self, indices):
        """Create the batches for these indices. The DataLoader calls this method, possibly in a
        worker process.
        """
        return ((b, samples) for _, b, samples in self._batches(indices))

    def views(self, pairs):
        """Yield (item, batch of this item after the batch transforms) for each pair (position,
        view). The batch size must be 1.
        """
        self.dl.before_iter()
        for (item,), *b in self._batches(pairs):
            if self.dl.device is not None:
                b = to_device(tuple(b), self.dl.device)
            yield item, self.dl.after_batch(b)

    def _batches(self, indices):
        chunks = self.dl.chunkify(self._items(indices))
        while True:
            # the global generators are restored once per batch
            with restored_once() if self.plan.random else nullcontext():
                chunk = next(chunks, None)
                items = chunk and [item for *_, item in chunk]
                b = chunk and self.dl.do_batch(items)
            if chunk is None:
                return
            yield items, b, self._samples(*np.array([o[:2] for o in chunk]).T)

    def _items(self, indices):
        for i in indices:
            at, view = self.plan.sample(i)
            if (item := self.item(at, view)) is not None:
                yield at, view, item
            elif isinstance(i, tuple):
                raise DistillError(
                    f'Sample {at} is skipped by its own transforms (SkipItemException): '
                    'remove it from the data before caching.'
                )

    def _samples(self, at, views):
        p = self.plan
        rows = None if p.cache is None else torch.from_numpy(p.cache.rows(p.at[at], views))
        return BatchSamples(at, views, rows, n_inp=self.n_inp)

    def item(self, at, view):
        """Return one view of the item at a position of the dataset.

        Return None if a transform skips the item.
        """
        if not self.plan.random:
            return self.maker.do_item(at)
        seed = seeds_of(self.plan.seed, int(self.plan.keys[at]), view)
        with seeded(seed), self.own.seeded(seed):
            return self.maker.do_item(at)


class SampledPieces(SampledBatches):
    """`SampledBatches` of a language model, whose samples are cut from the concatenated texts.

    Each view has a different order of the texts.
    """

    view = None

    def item(self, at, view):
        if view != self.view:
            self.view, self.chunks = view, self.joined_texts(view)
        was, self.maker.chunks = self.maker.chunks, self.chunks
        try:
            return super().item(at, view)
        finally:
            self.maker.chunks = was

    def joined_texts(self, view):
        dl, seed = self.maker, seeds_of(self.plan.seed, view)
        n = len(dl.items)
        order = np.random.default_rng(seed).permutation(n) if self.plan.views else np.arange(n)
        return in_a_row(dl, order.tolist(), partial(self.text, seed))

    def text(self, seed, i):
        """Return text `i`. The seed of a text differs from the seeds of the samples that are cut
        from the text.
        """
        get = lambda: self.maker.items.tfm(self.maker.items.coll[i])
        if not self.plan.random:
            return get()
        with seeded(s := seeds_of(seed, i)), self.own.seeded(s):
            return get()


def sampled(dl) -> SampledBatches | None:
    """Return the `SampledBatches` attached to `dl`, or None."""
    own = getattr(vars(dl).get('create_batches'), '__self__', None)
    return own if isinstance(own, SampledBatches) else None


def attach(dl, plan, maker=None):
    """Add information about the samples to the end of each batch of `dl`.

    The DataLoader is changed in place, so a Learner that uses it receives these batches.

    Args:
        dl: The DataLoader.
        plan: What is added to the batches.
        maker: See `SampledBatches`.
    """
    detach(dl)
    refuse_unindexed(dl)
    # subtle: `dl.new()` does not copy bound methods, so a copy creates plain batches
    dl.create_batches = (SampledPieces if plan.stream else SampledBatches)(
        dl, plan, maker
    ).create_batches
    dl.after_batch = Replay(dl.after_batch, plan)
    return dl


def detach(dl):
    """Undo `attach`. This function may be called twice, and on a copy of the DataLoader."""
    if sampled(dl) is None:
        return
    del dl.create_batches
    pipe = dl.after_batch
    if isinstance(pipe, Replay):
        pipe.own.fs, dl.after_batch = pipe.fs, pipe.own


def refuse_unindexed(dl):
    """Raise an error if the samples of a DataLoader have no indices, or can't be replayed."""
    what = type(dl).__name__
    if not hasattr(dl, 'after_batch') or not hasattr(dl, 'do_item'):
        raise DistillError(
            f'{what} is not a fastai DataLoader: write with cache_dataset(teacher, dataset, path) and '
            'train with Replayed(dataset, cache).'
        )
    if dl.bs is None:
        raise DistillError(
            f'{what} loads whole batches (bs=None), but outputs are stored for each sample. Give '
            'it a batch size.'
        )
    if not dl.indexed:
        raise DistillError(
            f'{what} has an iterable dataset, whose samples have no indices to which outputs '
            'could be assigned. Use a dataset with __getitem__ and __len__.'
        )
    if (base := next((c for c in type(dl).__mro__ if c in KNOWN_LOADERS), None)) is None:
        raise DistillError(
            f'{what} is not a fastai DataLoader whose batches can be replayed: create it with '
            'DataLoaders.from_dsets, or as a TfmdDL.'
        )
    if own := [
        m
        for m in ('create_item', 'create_batch', 'do_item', 'do_batch')
        if getattr(type(dl), m) is not getattr(base, m)
    ]:
        raise DistillError(
            f'{what} overrides {", ".join(own)}, so its batches cannot be replayed: do this in '
            'the dataset or in a transform.'
        )


KNOWN_LOADERS = LMDataLoader, SortedDL, TabDataLoader, TfmdDL
