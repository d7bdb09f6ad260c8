"Stored outputs of several heads: the rows of their caches stand side by side in the batches."

from dataclasses import replace

import numpy as np

from ..base.outputs import DistillError, Outputs, as_plain
from ..recipes.batch import all_classes
from .cache_feed import CacheFeed
from .head import HeadData
from .targets import Feed

__all__ = ['HeadFeed', 'HeadsFeed']


class HeadFeed(CacheFeed):
    """The teacher of one head: reads its part of the rows that a `HeadsFeed` puts into the batches.

    Args:
        source: Of the cache.
        head: Its `Head`
    """

    task = None  # what the head predicts

    def __init__(self, source: CacheFeed, head):
        super().__init__(source.cache, source.keys)
        self.head = head

    def attach(self, learn, columns):
        Feed.attach(self, learn, self.task.kind, self.task.axis)
        self.columns = columns  # the bytes of its rows
        self._find_order(HeadData(learn.dls, self.head))

    def detach(self):
        Feed.detach(self)

    def decode(self, t, learn):
        return all_classes(
            self.decoded(t[:, self.columns]), Outputs(as_plain(self.head(learn.pred)))
        )


class CachesOfHeads:
    """The caches of several heads as one. A row has those of all caches for a sample, side by side."""

    def __init__(self, caches, plans=()):
        self.caches, self.plans = caches, plans

    @property
    def views(self):
        return max(c.views for c in self.caches)

    @property
    def identity(self):
        return tuple(c.identity for c in self.caches)

    @property
    def valid(self):
        """Those of the validation set; None if one of them is missing."""
        found = [c.valid for c in self.caches]
        return None if None in found else CachesOfHeads(found)

    def rows(self, at, views):
        """(B, bytes) uint8 for positions in the dataset."""
        # subtle: a cache of the clean view has no other
        return np.concatenate(
            [p.cache.rows(p.at[at], views if p.views else 0) for p in self.plans], 1
        )


class HeadsFeed(CacheFeed):
    """Adds the rows of the caches of several heads to the batches.

    Args:
        feeds: Name -> `HeadFeed`
    """

    def __init__(self, feeds: dict):
        self.feeds = feeds
        super().__init__(CachesOfHeads([f.cache for f in feeds.values()]))

    def __post_init__(self):
        self.keys = self.added = self.epochs = None

    def _find_order(self, dls):
        """Each head reads its own part of the rows, in the order of its own classes."""
        sizes = np.cumsum([0, *(f.cache.manifest.layout.bytes for f in self.feeds.values())])
        for f, a, b in zip(self.feeds.values(), sizes, sizes[1:]):
            f.attach(self.learn, slice(a, b))

    def _plan(self, dls, dl, cache, keys):
        feeds = self.feeds.values()
        names = [f.keys if dl is dls.train or callable(f.keys) else None for f in feeds]
        plans = [f._plan(dls, dl, c, k) for f, c, k in zip(feeds, cache.caches, names)]
        first = max(plans, key=lambda p: p.views)
        if any(p.views and not same_views(p, first) for p in plans):
            have = '; '.join(
                f'{k}: {p.views} view(s), seed {p.seed}' for k, p in zip(self.feeds, plans)
            )
            raise DistillError(
                f'The caches of these heads hold other views of the samples ({have}), but a batch has '
                "one view of each. Write them in one call: cache_teacher({'color': teacher1, 'shape': "
                'teacher2}, dls, folder, views=...).'
            )
        return replace(first, at=np.arange(len(first.at)), cache=CachesOfHeads(cache.caches, plans))

    def detach(self):
        for f in self.feeds.values():
            f.detach()
        super().detach()


def same_views(a, b):
    return (a.views, a.seed) == (b.views, b.seed) and np.array_equal(a.keys, b.keys)
