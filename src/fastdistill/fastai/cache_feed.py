"Train from a cache: add its rows to the batches."

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from fastai.basics import Callback, noop

from ..base.distributed import rank
from ..base.outputs import DistillError, Outputs, TopK, as_plain, tensors_in
from ..base.seeds import RandomGuard
from ..cache.manifest import refuse, sample_differences, transform_differences
from ..cache.reader import TeacherCache
from ..recipes.batch import all_classes
from .cache_data import inspect_views, writer_dl
from .language_model import inner_dl, is_stream, of_length, share_n_inp
from .learner_notes import passed_epochs
from .replay_dl import Plan, attach, detach, refuse_unindexed, set_aside
from .sample_keys import item_keys, matching_root, sample_files
from .targets import Feed
from .transforms import augmented, describe_transforms, moves
from .vocab import stored_order, vocab_of

__all__ = ['CacheFeed', 'Epochs']


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
class CacheFeed(Feed):
    """Adds the rows of a cache to the batches.

    Attributes:
        cache: Or its path.
        keys: The `keys=` of `cache_teacher`
        fed: DataLoaders with rows in them.
    """

    cache: TeacherCache
    keys: object = None
    learn: object = field(default=None, repr=False)
    fed: list = field(default_factory=list, repr=False)
    missing = (
        "This batch has no stored teacher's output: the cache holds the training set only "
        '(cache_teacher(..., valid=True) adds the validation set).'
    )

    def __post_init__(self):
        if not isinstance(self.cache, TeacherCache):
            self.cache = TeacherCache(self.cache)
        if self.keys is None:
            self.keys = self.cache.sample_names
        self.added = self.epochs = None
        self.stream = False

    def attach(self, learn, kind='softmax', axis=1):
        super().attach(learn, kind, axis)
        try:
            share_n_inp(learn.dls)
            with RandomGuard():
                self._attach(learn.dls)
        except BaseException:
            self.detach()
            raise
        many = learn.n_epoch > 1 and not hasattr(learn, 'lr_finder')
        if self.cache.views == 1 and many and augmented(learn.dls.train):
            self._log(ONE_VIEW)
        return self

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

    def _log(self, text):
        """Not inside `learn.no_logging()`, and on the first rank alone."""
        if self.learn.logger is not noop and rank() == 0:
            print(text)

    def _attach(self, dls):
        valid = self.cache.valid
        self._find_order(dls)
        plan = self._feed(dls, dls.train, self.cache, self.keys)
        self._callback().n_inp = dls.train.n_inp
        if valid is not None and len(dls.loaders) > 1:
            try:
                self._feed(dls, dls.valid, valid, self.keys if callable(self.keys) else None)
            except DistillError as e:
                self._log(
                    f'fastdistill: no column for the validation set, since the cache has another one. {e}'
                )
        self.epochs = Epochs(plan, passed_epochs(self.learn).get(self.cache.identity, 0), self.fed)
        self.learn.add_cb(self.epochs)

    def _find_order(self, dls):
        names = self.cache.manifest.vocab
        self.order = (
            None if names is None or vocab_of(dls) is None else stored_order(names, vocab_of(dls))
        )
        self.stream = is_stream(dls.train)

    def _feed(self, dls, dl, cache, keys):
        plan = self._plan(dls, dl, cache, keys)
        self.fed.append(attach(dl, plan))
        return plan

    def _plan(self, dls, dl, cache, keys):
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

    def detach(self):
        for dl in self.fed:
            detach(dl)
        self.fed = []
        if self.learn is not None:
            # subtle: some tools replace the DataLoaders by a copy temporarily
            for dl in map(inner_dl, self.learn.dls.loaders):
                detach(dl)
            if self.epochs is not None:
                if not hasattr(self.learn, 'lr_finder'):
                    passed_epochs(self.learn)[self.cache.identity] = (
                        self.epochs.before + self.epochs.passed
                    )
                self.learn.remove_cbs([c for c in self.learn.cbs if c is self.epochs])
            self.epochs = None
        super().detach()

    def set_aside(self):
        return set_aside(*self.fed)

    def example(self, x):
        """Outputs of as many samples as there are inputs, for their shapes and stored layers."""
        t = next(tensors_in(x))
        out = self.cache.decode(
            torch.from_numpy(self.cache.rows(np.arange(len(t)) % len(self.cache))).to(t.device)
        )
        return of_length(out, t.shape[1]) if self.stream else out

    def decode(self, t, learn):
        out = self.decoded(t)
        if self.stream:
            out = of_length(out, learn.x.shape[1])
        return all_classes(out, Outputs(as_plain(learn.pred)))

    def decoded(self, t):
        """Rows as outputs, with the classes in the order of the labels."""
        out, order = self.cache.decode(t), self.order
        if order is None:
            return out
        lg = out.logits
        lg = (
            lg.reorder(order)
            if isinstance(lg, TopK)
            else lg.index_select(self.axis, order.to(lg.device))
        )
        return replace(out, logits=lg)


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
