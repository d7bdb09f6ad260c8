"""For teachers that read the raw items, texts or files, in their own way: which items a batch was
made of.
"""

from contextlib import ExitStack, contextmanager

import numpy as np
from fastai.tabular.core import Tabular

from ..base.outputs import DistillError, as_plain, tensors_in
from ..checks.outputs import single_teachers
from ..teachers.items import items_at, with_items
from .language_model import inner_dl, is_stream, share_n_inp
from .replay_dl import Plan, attach, detach, refuse_unindexed, set_aside
from .sample_keys import items_of
from .targets import Feed, mixed
from .teacher_targets import TeacherRow
from .transforms import moves

__all__ = ['ItemFeed', 'RawItems', 'items_shown', 'renewed', 'without_places']


class RawItems:
    """The items of a DataLoader as they were given to it: the list of files or texts, or the table."""

    def __init__(self, dl):
        refuse_unknown_items(dl)
        self.items = given_items(dl.dataset)

    def at(self, positions):
        """Those at these positions in the dataset: a list, or rows of the table."""
        return items_at(self.items, positions.tolist())

    # instead of a cache: the row of a sample is its position
    def rows(self, at, views):
        return at[:, None]


def given_items(dataset):
    # subtle: fastai's tokenizer replaces the table of the inputs, but not that of the labels
    tls = getattr(dataset, 'tls', ())
    return tls[-1].items if len(tls) else items_of(dataset)


def refuse_unknown_items(dl):
    """Refuse a DataLoader that does not show which items a batch holds."""
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
        return
    raise DistillError(
        'items= of the teacher needs to know of which items a batch was made, and here it is unknown: '
        f"{why} Teacher(model, inputs=fn) makes the teacher's inputs from the batch; for tables, an "
        'estimator takes frame=.'
    )


def known_items(dl):
    """The `RawItems` of a DataLoader that shows them; None if it does not."""
    plan = getattr(vars(dl).get('do_item'), 'plan', None)
    return plan.cache if plan is not None and isinstance(plan.cache, RawItems) else None


def show_items(dl):
    """Let the batches of `dl` end with the positions of their items, if there are any."""
    raw, n = RawItems(dl), len(dl.dataset)
    return (
        attach(dl, Plan(np.zeros(n, np.uint64), 0, 0, np.arange(n), raw, random=False)) if n else dl
    )


@contextmanager
def items_shown(loaders, *teachers):
    """Inside, the batches of these DataLoaders show their items.

    Args:
        loaders: DataLoaders of fastai.
        *teachers: Each a `Teacher`; if none reads items, nothing is done.
    """
    reads = any(t.reads_items for t in teachers)
    with ExitStack() as stack:
        for dl in [dl for dl in loaders if known_items(dl) is None] if reads else ():
            stack.callback(detach, show_items(dl))
        yield


def renewed(dl, **options):
    """`dl.new(...)`, which shows its items if `dl` does."""
    if known_items(dl) is None:
        return dl.new(**options)
    with set_aside(dl):
        new = dl.new(**options)
    return show_items(new)


def without_places(b, dl):
    """(batch as the model and its loss take it, its raw items or None).

    Args:
        b: A batch.
        dl: That made it, or of which `renewed` made the one that did.
    """
    raw = known_items(dl)
    if raw is None or not isinstance(b[-1], TeacherRow):
        return b, None
    return b[:-1], raw.at(positions_in(b[-1]))


def positions_in(row):
    return as_plain(row).cpu().numpy()[:, 0]


class ItemFeed(Feed):
    """Shows a teacher that reads the raw items those of each batch of a fit."""

    def __init__(self):
        self.learn, self.added, self.fed, self.attached = None, None, [], False

    def attach(self, learn, teachers):
        """For teachers that read no items, nothing is done."""
        self.detach()
        if not any(t.reads_items for t in teachers):
            return
        super().attach(learn)
        share_n_inp(learn.dls)
        self.attached, self.training_moves = True, moves(learn.dls.train)
        try:
            for dl in learn.dls.loaders:
                if known_items(show_items(dl)) is None:
                    continue
                self.fed.append(dl)
                self.targets.n_inp = dl.n_inp
        except BaseException:
            self.detach()
            raise

    def detach(self):
        # subtle: some tools replace the DataLoaders by a copy temporarily
        for dl in [*self.fed, *(map(inner_dl, self.learn.dls.loaders) if self.fed else ())]:
            detach(dl)
        self.fed, self.attached = [], False
        super().detach()

    def set_aside(self):
        return set_aside(*self.fed)

    def beside(self, x):
        """The inputs of the current batch, with its raw items."""
        if not self.attached or not self.ready():
            return x
        positions = positions_in(self.targets.target)
        return with_items(tuple(x), known_items(inner_dl(self.learn.dl)).at(positions))

    def mixed(self, out, teacher, task):
        """Outputs of a teacher for the items, mixed as MixUp or CutMix mixed the batch."""
        if not self.attached or not teacher.reads_items or not self.ready():
            return out
        self._check_positions(out)
        if (mix := self.targets.mix()) is None:
            return out
        if not all(m.reads_items for m in single_teachers(teacher)):
            raise DistillError(
                'MixUp and CutMix mix the batch, which some members of the ensemble read, while others '
                'read the raw items: give all members items=, or train without mixing.'
            )
        return mixed(out, *mix, task.kind, task.axis)

    def _check_positions(self, out):
        """Refuse outputs with positions where augmentation moves the student's input."""
        dense = any(t.dim() > 2 for t in tensors_in((out.logits, out.feats)))
        if self.training_moves and dense:
            raise DistillError(
                'The teacher reads the raw items, and its outputs have a value for each pixel or token, '
                f"but {', '.join(self.training_moves)} would move the student's input. Remove these "
                'transforms, or use a teacher of the batch: Teacher(model, inputs=fn).'
            )
