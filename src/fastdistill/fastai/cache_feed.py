"Train from a cache: add its rows to the batches."

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from fastai.basics import Callback, noop

from ..base.distributed import rank
from ..base.outputs import DistillError, Draws, LinearLogits, Outputs, TopK, as_plain, tensors_in
from ..base.random_state import RandomGuard
from ..cache.manifest import refuse, sample_differences, transform_differences
from ..cache.reader import TeacherCache
from ..recipes.batch import all_classes
from .cache_data import inspect_views, writer_dl
from .head import HeadData
from .language_model import inner_dl, is_stream, of_length, share_n_inp
from .learner_notes import passed_epochs
from .replay_dl import Plan, attach, detach, refuse_unindexed, set_aside
from .sample_keys import item_keys, matching_root, sample_files
from .targets import Feed
from .transforms import augmented, describe_transforms, moves
from .vocab import stored_order, vocab_of

__all__ = ['StoredOutputs', 'CacheRows']


class Epochs(Callback):
    """Gives the DataLoader the number of the epoch, on which views depend."""

    order = -20

    def __init__(self, plan, before, fed):
        super().__init__()
        self.plan, self.before, self.fed, self.passed = plan, before, fed, 0

    def before_train(self):
        self.begin(self.learn.epoch)

    def begin(self, epoch):
        for dl in self.fed:
            dl.do_item.look()
        self.plan.epoch = self.before + epoch
        self.passed = epoch + 1

    # an exported Learner gets a callback that does nothing, and needs no fastdistill
    def __reduce__(self):
        return Callback, ()


ONE_VIEW = (
    'fastdistill: the cache has one view. Each sample has the same augmentation in every epoch, and students '
    'overfit. Write more views (views=8). If outputs have no positions (classes, labels, numbers), views=0 '
    'is possible too: augmentation stays random.'
)


@dataclass
class StoredOutputs(Feed):
    """The outputs that a cache stores, for the batches that hold its rows.

    Attributes:
        cache: Or its path.
        keys: The `keys=` of `cache_teacher`
        head: Of several heads of a student the one that these outputs teach.
        rows: What puts the rows into the batches.
        columns: The bytes of a row that are of this cache; None: all.
    """

    cache: TeacherCache
    keys: object = None
    head: object = None
    learn: object = field(default=None, repr=False)
    rows: object = field(default=None, repr=False)
    columns: slice | None = None
    missing = (
        "This batch has no stored teacher's output: the cache holds the training set only "
        '(cache_teacher(..., valid=True) adds the validation set).'
    )

    def __post_init__(self):
        if not isinstance(self.cache, TeacherCache):
            self.cache = TeacherCache(self.cache)
        if self.keys is None:
            self.keys = self.cache.sample_names
        self.added = None
        self.stream = False

    def attach(self, learn, kind='softmax', axis=1):
        CacheRows({'': self}).attach(learn, {'': (kind, axis)})
        return self

    def join(self, rows, learn, kind, axis, columns=None):
        """Read a part of the rows that `rows` puts into the batches."""
        super().attach(learn, kind, axis)
        self.rows, self.columns = rows, columns
        self.find_order(learn.dls)

    def detach(self):
        rows, self.rows = self.rows, None
        super().detach()
        if rows is not None:
            rows.detach()

    @property
    def doubt(self):
        """Why the teacher should not be trusted, as it was found when its outputs were stored;
        empty: nothing was found.
        """
        return self.cache.manifest.doubt

    @property
    def name(self):
        return f'the stored outputs in {self.cache.folder}'

    @property
    def layers_advice(self):
        stored = self.cache.manifest.layout.layers
        name = stored[0] if stored else 'layer3'
        named = f"name the layers: layers={{'student.layer': {name!r}}}"
        if stored:
            return f'It stores {", ".join(map(repr, stored))}: {named}, or store different ones.'
        return (
            f'Store the layers too, cache_teacher(..., layers=[{name!r}]), and {named}. Or give the teacher itself '
            'instead of the cache.'
        )

    def find_order(self, dls):
        """The order of the labels' classes, in which outputs are returned."""
        own = dls if self.head is None else HeadData(dls, self.head)
        names = self.cache.manifest.vocab
        self.order = (
            None if names is None or vocab_of(own) is None else stored_order(names, vocab_of(own))
        )
        self.stream = is_stream(dls.train)

    def plan(self, dls, dl, cache, keys):
        """Which rows belong to the samples of a DataLoader; an error if the cache is not of these
        data.
        """
        refuse_unindexed(dl)
        if cache.views or is_stream(dl):
            refuse(
                cache.folder,
                transform_differences(cache.manifest.transforms, describe_transforms(dl)),
                cache.force,
            )
        names = item_keys(dl, keys, matching_root(cache, dls, dl))
        plan = Plan(
            names,
            cache.views,
            cache.seed,
            cache.find(names),
            cache,
            random=bool(cache.views),
            stream=is_stream(dl),
        )
        cache.check_files(sample_files(dl), plan.at)
        cache.check_once()
        refuse(cache.folder, misfits(dl, plan, cache), cache.force)
        return plan

    def set_aside(self):
        return super().set_aside() if self.rows is None else self.rows.set_aside()

    @property
    def draws(self):
        """Number and temperature of the draws. None if there are none."""
        return self.cache.manifest.layout.draws

    def example(self, x):
        """Outputs of as many samples as there are inputs, for their shapes and stored layers."""
        t = next(tensors_in(x))
        out = self.cache.decode(
            torch.from_numpy(self.cache.rows(np.arange(len(t)) % len(self.cache))).to(t.device)
        )
        return of_length(out, t.shape[1]) if self.stream else out

    def decode(self, t, learn):
        out = self.decoded(t if self.columns is None else t[:, self.columns])
        if self.stream:
            out = of_length(out, learn.x.shape[1])
        if self.targets.mix() is None:
            return out
        # probabilities of all classes are mixed
        pred = learn.pred if self.head is None else self.head(learn.pred)
        return all_classes(out, Outputs(as_plain(pred)))

    def decoded(self, t):
        """Rows as outputs, with the classes in the order of the labels."""
        out, order = self.cache.decode(t), self.order
        if order is None:
            return out
        lg = out.logits
        lg = (
            lg.reorder(order)
            if isinstance(lg, (TopK, LinearLogits, Draws))
            else lg.index_select(self.axis, order.to(lg.device))
        )
        return replace(out, logits=lg)


class CacheRows:
    """Puts the rows of one or several caches into the batches. A row has those of all caches for a
    sample, side by side.

    Args:
        feeds: Name -> `StoredOutputs`
    """

    def __init__(self, feeds: dict):
        self.feeds, self.fed, self.learn, self.passed, self.epochs = feeds, [], None, {}, None
        caches = [f.cache for f in feeds.values()]
        self.identity = tuple(c.identity for c in caches) if len(caches) > 1 else caches[0].identity

    def attach(self, learn, tasks: dict):
        """To the batches of a Learner.

        Args:
            tasks: Name -> (kind of logits, class axis).
        """
        self.detach()
        self.learn, self.passed = learn, passed_epochs(learn)
        sizes = np.cumsum([0, *(f.cache.manifest.layout.bytes for f in self.feeds.values())])
        try:
            with RandomGuard():
                for (k, f), a, b in zip(self.feeds.items(), sizes, sizes[1:]):
                    f.join(self, learn, *tasks[k], slice(a, b) if len(self.feeds) > 1 else None)
                share_n_inp(learn.dls)
                self._attach(learn.dls)
        except BaseException:
            self.detach()
            raise

    def _attach(self, dls):
        feeds = self.feeds.values()
        plan = self.feed(dls, dls.train, [(f.cache, f.keys) for f in feeds])
        next(iter(feeds)).targets.n_inp = dls.train.n_inp
        valid = [(f.cache.valid, f.keys if callable(f.keys) else None) for f in feeds]
        if all(c is not None for c, _ in valid) and len(dls.loaders) > 1:
            try:
                self.feed(dls, dls.valid, valid)
            except DistillError as e:
                self._log(
                    f'fastdistill: no column for the validation set, since the cache has another one. {e}'
                )
        self.learn.add_cb(self.epochs)
        many = self.learn.n_epoch > 1 and not hasattr(self.learn, 'lr_finder')
        if plan.views == 1 and many and augmented(dls.train):
            self._log(ONE_VIEW)

    def feed(self, dls, dl, caches):
        """Put the rows into the batches of one DataLoader, the first of which tells the epochs.

        Args:
            dls: The Learner's.
            caches: (cache, keys) of each feed.
        """
        plan = self._joined(
            [f.plan(dls, dl, c, k) for f, (c, k) in zip(self.feeds.values(), caches)]
        )
        self.fed.append(attach(dl, plan))
        if self.epochs is None:
            self.epochs = Epochs(plan, self.passed.get(self.identity, 0), self.fed)
        return plan

    def _joined(self, plans):
        """One plan of those of all caches."""
        if len(plans) == 1:
            return plans[0]
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
        return replace(first, at=np.arange(len(first.at)), cache=SideBySide(plans))

    def _log(self, text):
        """Not inside `learn.no_logging()`, and on the first rank alone."""
        if self.learn.logger is not noop and rank() == 0:
            print(text)

    def detach(self):
        """Undo `attach`; safe to call twice."""
        fed, self.fed = self.fed, []
        for dl in fed:
            detach(dl)
        if self.learn is not None:
            # subtle: some tools replace the DataLoaders by a copy temporarily
            for dl in map(inner_dl, self.learn.dls.loaders):
                detach(dl)
            self.learn.remove_cbs([c for c in self.learn.cbs if c is self.epochs])
        if self.epochs is not None and not hasattr(self.learn, 'lr_finder'):
            self.passed[self.identity] = self.epochs.before + self.epochs.passed
        self.learn = self.epochs = None
        for f in self.feeds.values():
            if f.rows is self:
                f.detach()

    def set_aside(self):
        return set_aside(*self.fed)


class SideBySide:
    """Rows of several caches as those of one.

    Args:
        plans: Of each.
    """

    def __init__(self, plans):
        self.plans = plans

    def rows(self, at, views):
        """(B, bytes) uint8 for positions in the dataset."""
        # subtle: a cache of the clean view has no other
        return np.concatenate(
            [p.cache.rows(p.at[at], views if p.views else 0) for p in self.plans], 1
        )


def same_views(a, b):
    return (a.views, a.seed) == (b.views, b.seed) and np.array_equal(a.keys, b.keys)


def misfits(dl, plan, cache):
    """Texts: how these data differ from the data when the cache was written."""
    m = cache.manifest
    if m.views:
        n = len(plan.keys)
        again = Plan(plan.keys, m.views, m.seed, np.arange(n), stream=plan.stream)

        def look(i, view):
            return inspect_views(writer_dl(dl, again, [view * n + i], 1, 0), [view * n + i])[0]

        return sample_differences(m, plan.at, look)
    if m.layout.dense and not plan.stream and (moving := moves(dl)):
        return [
            'these outputs have a value for each pixel or token of the clean input, but '
            f"{', '.join(moving)} would move the student's input: cache views=1 or more"
        ]
    return []
