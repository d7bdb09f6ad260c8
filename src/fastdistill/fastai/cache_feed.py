"""Train from a cache: add the stored teacher outputs of each sample to the batches of a fit."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..base.outputs import DistillError, Draws, LinearLogits, Outputs, TopK, tensors_in
from ..base.random_state import RandomGuard
from ..cache.manifest import (
    moved_samples,
    refuse,
    sample_differences,
    transform_differences,
)
from ..cache.reader import TeacherCache
from ..cache.teacher_description import views_differ
from .cache_data import (
    check_shared_inputs,
    inspected_views,
    item_digest,
    validation_transforms,
    view_inspector,
    writer_dl,
)
from .class_names import stored_order, vocab_of
from .held_outputs import HeldOutputs
from .language_model import inner_dl, is_stream, of_length, share_n_inp
from .learner_heads import HeadData
from .learner_notes import notes_of
from .patches import patch_for_targets
from .raw_items import plan_of_items
from .sample_keys import content_keys, item_keys, matching_root, sample_files
from .sampled_batches import Plan, attach, detach, refuse_unindexed, sampled
from .teacher_targets import TeacherTargets
from .transforms import (
    augmented,
    describe_transforms,
    labels_are_points,
    moves,
    refuse_moved_points,
)

ONE_VIEW = (
    'fastdistill: the cache has one view, so each sample has the same augmentation in every epoch, '
    'and students overfit. Write more views (views=8). If outputs have no positions (classes, '
    'labels, numbers), views=0 also works: augmentation stays random.'
)


@dataclass
class StoredOutputs(HeldOutputs):
    """Teacher outputs that are stored in a cache.

    Attributes:
        cache: A `TeacherCache`, or its path.
        keys: The `keys=` argument of `cache_teacher`.
        head: The student's head that is trained on these outputs. None if the student has one
            output.
    """

    cache: TeacherCache
    keys: object = None
    head: object = None
    needs = 'rows'
    missing = (
        'This batch has no stored teacher outputs: the cache contains only the training set '
        '(cache_teacher(..., valid=True) adds the validation set).'
    )

    def __post_init__(self):
        if not isinstance(self.cache, TeacherCache):
            self.cache = TeacherCache(self.cache)
        if self.keys is None:
            self.keys = self.cache.sample_names
        # `columns` selects the bytes of this cache from the concatenated rows
        self.order, self.stream, self.columns = None, False, slice(None)
        manifest = self.cache.manifest
        self.name = f'the stored outputs in {self.cache.folder}'
        self.written_identity = manifest.teacher
        # the reason to doubt the teacher, and the number and temperature of the draws (sampled
        # classes), or None if no draws are stored
        self.doubt, self.draws = manifest.doubt, manifest.layout.draws

    @property
    def layers_advice(self):
        stored = self.cache.manifest.layout.layers
        name = stored[0] if stored else 'layer3'
        named = f"name the layers: layers={{'student.layer': {name!r}}}"
        if stored:
            return f'It stores {", ".join(map(repr, stored))}: {named}, or store different ones.'
        return (
            f'Store the layers too, cache_teacher(..., layers=[{name!r}]), and {named}. Or pass '
            'the teacher itself instead of the cache.'
        )

    def bind(self, learn, kind, axis):
        super().bind(learn, kind, axis)
        own = learn.dls if self.head is None else HeadData(learn.dls, self.head)
        names, vocab = self.cache.manifest.vocab, vocab_of(own)
        whole = self.cache.manifest.layout.kind not in ('topk', 'draws')
        known = names is not None and vocab is not None
        self.order = stored_order(names, vocab, whole) if known else None
        self.stream = is_stream(learn.dls.train)

    def plan(self, dls, dl, cache, keys) -> Plan:
        """Find the row of the cache for each sample of a DataLoader.

        Args:
            dls: The DataLoaders of the Learner.
            dl: The DataLoader.
            cache: The cache of the training set or of the validation set.
            keys: The `keys=` argument of `cache_teacher`.

        Raises:
            DistillError: The cache was written from different data.
        """
        refuse_unindexed(dl)
        self.check_transforms(dls, dl, cache)
        names = item_keys(dl, keys, matching_root(cache, dls, dl))
        if keys is not None and not callable(keys) and keys is cache.sample_names:
            refuse_other_items(cache, dl)
        plan = Plan(
            names,
            cache.views,
            cache.seed,
            cache,
            cache.find(names, named=keys is not None),
            moved=[] if is_stream(dl) else moves(dl),
            random=bool(cache.views),
            stream=is_stream(dl),
        )
        if not np.array_equal(names, cache.keys):
            seeded = replace(plan, random=True, cache=None)
            check_shared_inputs(dl, seeded, keys, most=256)
        cache.check_files(files := sample_files(dl), plan.at)
        cache.check(once=True)
        named = keys is not None and files is None
        refuse(cache.folder, misfits(dl, plan, cache, named), cache.force)
        return plan

    def check_transforms(self, dls, dl, cache):
        """Raise an error if the transforms of a DataLoader don't fit the stored outputs.

        Args:
            dls: The DataLoaders of the Learner.
            dl: The DataLoader.
            cache: The cache of the training set or of the validation set.
        """
        m = cache.manifest
        if m.views or is_stream(dl):
            found = transform_differences(m.transforms, describe_transforms(dl))
        else:
            points = lambda: self.kind == 'regression' and labels_are_points(dls, self.head)
            found = moved_positions(m.layout.dense, moves(dl), points)
        refuse(cache.folder, found, cache.force)

    def example(self, x):
        """Return some stored outputs, which show the shapes and the stored layers."""
        t = next(tensors_in(x))
        rows = self.cache.rows(np.arange(len(t)) % len(self.cache))
        out = self.cache.decode(torch.from_numpy(rows).to(t.device))
        return of_length(out, t.shape[1]) if self.stream else out

    def outputs(self, inputs=(), samples=None, layers=()) -> Outputs:
        out = super().outputs(inputs, samples, layers)
        if not self.cache.views:
            samples.refuse_moved(
                Outputs(feats={k: v for k, v in out.feats.items() if k in layers}),
                f'{self.cache.folder} contains layers of the clean inputs',
                'Remove these transforms, or cache views=1 or more.',
            )
        return out

    def decode(self, t, x) -> Outputs:
        """Convert rows to outputs, with the classes in the order of the labels."""
        out, order = self.cache.decode(t[:, self.columns]), self.order
        if self.stream:
            out = of_length(out, x.shape[1])
        if order is None:
            return out
        if isinstance(lg := out.logits, (TopK, LinearLogits, Draws)):
            return replace(out, logits=lg.reorder(order))
        return replace(out, logits=lg.index_select(self.axis, order.to(lg.device)))


class SampleFeed:
    """Adds rows of caches or raw items to the batches of a fit.

    If no source of teacher outputs needs rows or items, the DataLoaders are not changed.
    """

    def __init__(self):
        self.learn = self.plan = self.fed_rows = None
        self.fed, self.targets, self.before, self.passed = [], None, 0, 0

    def attach(self, learn, sources: dict, tasks: dict, log=print, heads=None):
        """Prepare the DataLoaders of a Learner for a fit that is about to start.

        Args:
            learn: The Learner.
            sources: {head name: `OutputSource`}.
            tasks: {head name: what the head predicts}.
            log: fn(text) that prints a message.
            heads: {head name: `LearnerHead`} of a student with several outputs.
        """
        self.detach()
        needing = {k: s for k, s in sources.items() if s.needs}
        if not needing:
            return self
        self.learn, self.log = learn, log
        patch_for_targets()
        try:
            if not any(isinstance(c, TeacherTargets) for c in learn.cbs):
                self.targets = TeacherTargets()
                learn.add_cb(self.targets)
            with RandomGuard():
                share_n_inp(learn.dls)
                self._attach(needing, tasks, heads or {})
        except BaseException:
            self.detach()
            raise
        return self

    def _attach(self, sources, tasks, heads):
        learn, dls = self.learn, self.learn.dls
        held = {k: s for k, s in sources.items() if s.needs != 'items'}
        for k, s in held.items():
            s.bind(learn, tasks[k].kind, tasks[k].axis)
        stored = {k: s for k, s in held.items() if s.needs == 'rows'}
        if stored:
            many = learn.n_epoch > 1 and not hasattr(learn, 'lr_finder')
            one = max(s.cache.views for s in stored.values()) == 1
            # subtle: a `Resize` is called random, but may change nothing
            if (
                many
                and one
                and augmented(dls.train)
                and views_differ(2, *inspected_views(dls.train, 2))
            ):
                self.log(ONE_VIEW)
            self.feed_rows(learn, dls.train, stored)
            self._feed_valid(dls, stored)
        of_items = sources.keys() - stored
        if numbers := [k for k in of_items if tasks[k].kind == 'regression']:
            refuse_moved_points(dls, [heads.get(k) for k in numbers])
        if len(held) < len(sources):
            self._feed_items(dls)

    def _feed_items(self, dls):
        for dl in dls.loaders:
            plan = plan_of_items(dl, moves(dl))
            if (own := sampled(dl)) is not None:
                own.plan.items, own.plan.moved = plan.items, plan.moved
            elif len(dl.dataset):
                self._feed(dl, plan)

    def feed_rows(self, learn, dl, stored: dict):
        """Attach the rows of one or several caches to the batches of a DataLoader.

        The rows of several caches are concatenated. If the student was already trained from these
        caches, the fit continues with the next views.

        Args:
            learn: The Learner.
            dl: The DataLoader.
            stored: {head name: `StoredOutputs`}.
        """
        end = 0
        for s in stored.values():
            start, end = end, end + s.cache.manifest.layout.bytes
            s.columns = slice(start, end)
        caches = {k: (s, s.cache, s.keys) for k, s in stored.items()}
        self.plan, self.passed = plan_of_rows(learn.dls, dl, caches), 0
        identity = tuple(s.cache.identity for s in stored.values())
        self.identity = identity if len(identity) > 1 else identity[0]
        self.trained = notes_of(learn).passed_epochs
        self.before = self.trained.get(self.identity, 0)
        self.fed_rows = learn.dls, dl, stored
        self._feed(dl, self.plan)

    def _feed_valid(self, dls, stored):
        caches = {
            k: (s, s.cache.valid, s.keys if callable(s.keys) else None) for k, s in stored.items()
        }
        if len(dls.loaders) < 2 or any(c is None for _, c, _ in caches.values()):
            return
        try:
            self._feed(dls.valid, plan_of_rows(dls, dls.valid, caches))
        except DistillError as e:
            self.log(
                'fastdistill: the terms have no losses on the validation set, because the cache '
                f'was written for a different one. {e}'
            )

    def _feed(self, dl, plan):
        self.fed.append(attach(dl, plan))

    def begin(self, epoch):
        """Begin an epoch of the current fit.

        Args:
            epoch: Number of the epoch.
        """
        if self.learn is not None and self.fed and sampled(inner_dl(self.learn.dl)) is None:
            raise DistillError(
                'The DataLoaders of the Learner were replaced during the fit, so the batches have no '
                'stored teacher outputs or raw items. Replace them between two fits: set learn.dls, then '
                'call fit again.'
            )
        # subtle: callbacks may change the transforms between epochs
        for plan, dl in ((sampled(dl).plan, dl) for dl in self.fed):
            plan.moved = [] if plan.stream else moves(dl)
        if self.plan is None:
            return
        for dl in self.fed:
            sampled(dl).look()
        dls, dl, stored = self.fed_rows
        for s in stored.values():
            s.check_transforms(dls, dl, s.cache)
        self.plan.epoch, self.passed = self.before + epoch, epoch + 1

    def detach(self):
        """Undo `attach`. It is safe to call this twice."""
        learn, self.learn = self.learn, None
        for dl in self.fed:
            detach(dl)
        if learn is not None:
            # subtle: some tools temporarily replace the DataLoaders with a copy
            for dl in map(inner_dl, learn.dls.loaders):
                detach(dl)
            if self.targets in learn.cbs:
                learn.remove_cb(self.targets)
        if self.plan is not None and not hasattr(learn, 'lr_finder'):
            self.trained[self.identity] = self.before + self.passed
        self.fed, self.targets, self.plan = [], None, None


def plan_of_rows(dls, dl, caches: dict) -> Plan:
    """Make a `Plan` that adds the rows of one or several caches to the batches.

    Args:
        dls: The DataLoaders of the Learner.
        dl: The DataLoader that gets the rows.
        caches: {head name: (`StoredOutputs`, cache, keys)}.
    """
    plans = [s.plan(dls, dl, cache, keys) for s, cache, keys in caches.values()]
    if len(plans) == 1:
        return plans[0]
    first = max(plans, key=lambda p: p.views)
    if any(p.views and not same_views(p, first) for p in plans):
        have = '; '.join(f'{k}: {p.views} view(s), seed {p.seed}' for k, p in zip(caches, plans))
        raise DistillError(
            f'The caches of these heads contain different views of the samples ({have}), but a '
            "batch has one view of each sample. Write them in one call: cache_teacher({'color': "
            "teacher1, 'shape': teacher2}, dls, folder, views=...)."
        )
    return replace(first, at=np.arange(len(first.at)), cache=SideBySide(plans))


class SideBySide:
    """Reads the rows of several caches as if they were one cache.

    Args:
        plans: The `Plan` of each cache.
    """

    def __init__(self, plans):
        self.plans = plans

    def rows(self, at, views):
        """Return the concatenated rows of samples, (B, bytes) uint8, given their positions."""
        # subtle: a cache with views=0 has only view 0
        return np.concatenate(
            [p.cache.rows(p.at[at], views if p.views else 0) for p in self.plans], 1
        )


def same_views(a, b):
    return (a.views, a.seed) == (b.views, b.seed) and np.array_equal(a.keys, b.keys)


def refuse_other_items(cache, dl):
    """Raise an error if a cache was written with a list of names, but the DataLoader has different
    items, or the same items in a different order.
    """
    was, now = cache.named_items, content_keys(dl.dataset)
    if was is None or now is None or np.array_equal(was, now):
        return
    raise DistillError(
        f'{cache.folder} was written with a list of sample names (keys=), but this training set '
        'has different samples or a different order (first difference at position '
        f'{np.flatnonzero(was != now)[0]}). Open the cache with the names of these samples, '
        'TeacherCache(path, keys=[...]), or with a function that returns the name of an item.'
    )


def moved_positions(dense: bool, moved: list, points) -> list:
    """Describe why outputs for the clean inputs don't fit inputs that random transforms move.

    Args:
        dense: True if the outputs have a value for each position.
        moved: Names of these transforms.
        points: fn() -> True if the outputs are coordinates of points.
    """
    if not moved or not (dense or points()):
        return []
    what = 'have a value for each pixel or token' if dense else 'are the points'
    return [
        f'these outputs {what} of the clean input, but {", ".join(moved)} would move the '
        "student's input: cache views=1 or more"
    ]


def misfits(dl, plan, cache, named: bool):
    """Describe how the data differ from the data from which the cache was written.

    Args:
        dl: The DataLoader.
        plan: Its `Plan`.
        cache: The cache.
        named: True if only names given by the user identify the samples.
    """
    m = cache.manifest
    if m.views:
        inspect = view_inspector(dl, Plan(plan.keys, m.views, m.seed, stream=plan.stream))
        return sample_differences(m, plan.at, inspect)
    if not named or plan.stream:
        return []
    with validation_transforms(dl, True):
        own = writer_dl(dl, Plan(plan.keys, seed=m.seed), [], 1, 0)
        own.before_iter()
        look = lambda i, view: item_digest(sampled(own).item(i, view), own.n_inp)
        return moved_samples(m, plan.at, look)
