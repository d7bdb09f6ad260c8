"""Provide batches of unlabeled inputs, on which the student learns only from the teacher."""

from collections.abc import Mapping
from contextlib import ExitStack

from fastai.text.data import LMDataLoader

from ..base.errors import is_whole, options_of_group
from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..cache.manifest import refuse
from ..cache.teacher_description import identity_of
from .cache_feed import SampleFeed, StoredOutputs
from .perturbed_rows import perturbed_rows
from .probe_batches import loader_of, split_batch
from .raw_items import items_shown, split_samples
from .training_step import add_loss


class UnlabeledInputs:
    """Unlabeled batches that accompany the training batches.

    Args:
        given: The option `unlabeled` of `KnowledgeDistillation`. If a DataLoader with labels is
            given, the labels are ignored.
        runs: True if a teacher runs.
        heads: {head name: head}. The name is '' for a student with one output.
    """

    def __init__(self, given, runs: bool, heads):
        given = given if isinstance(given, Mapping) else dict(items=given)
        options = dict(items=None, targets=None, perturbed=0)
        options |= options_of_group('unlabeled', given, options)
        items, targets, perturbed = options.values()
        if not is_whole(perturbed) or perturbed < 0:
            raise DistillError(
                f'perturbed={perturbed!r}: must be a whole number of at least 0, the number of copies of '
                'each row, such as 5.'
            )
        if perturbed and not runs:
            raise DistillError(
                'perturbed in unlabeled= needs a teacher that runs: each batch has new perturbed rows, so '
                'there are no stored outputs for them. Pass the teacher itself.'
            )
        if targets is not None and items is None:
            raise DistillError(
                'targets in unlabeled= are stored outputs for the items, but items are missing: '
                'pass both.'
            )
        if items is not None and targets is None and not runs:
            raise DistillError(
                'unlabeled= needs a teacher that runs, or stored outputs for these inputs too: write '
                "them with cache_teacher(teacher, dls, 'more', unlabeled=items), and pass "
                "unlabeled=dict(items=items, targets='more')."
            )
        self.items, self.perturbed, self.iterator, self.loader = items, perturbed, None, None
        self.stored = None if targets is None else stored_outputs(targets, heads)
        self.feed, self.shown = SampleFeed(), ExitStack()

    def __bool__(self):
        return self.items is not None or self.perturbed > 0

    def start(self, learn, distiller):
        """Prepare the unlabeled batches of a fit. Raise an error for inputs that can't be used.

        Args:
            learn: The student's Learner.
            distiller: The `Distiller` of the fit.
        """
        terms, heads = distiller.recipe.terms, distiller.heads
        if all(t.n_targets for t in terms):
            raise DistillError(
                f'unlabeled=: all terms read labels ({", ".join(t.name for t in terms)}). '
                'Add a term that reads no labels, such as kd() or soft_labels().'
            )
        if isinstance(learn.dls.train, LMDataLoader):
            raise DistillError(
                'A language model needs no labels: add the texts to its training set.'
            )
        with RandomGuard():  # the DataLoader of fastai draws a random seed
            self.loader = None if self.items is None else loader_of(self.items, learn.dls)
            if self.loader is not None and self.stored is None:
                self.shown.enter_context(items_shown([self.loader], *distiller.heads.sources))
        if self.stored is not None:
            for k, stored in self.stored.items():
                refuse_other(stored.cache, heads[k].teacher, heads[k].layers(1))
            with RandomGuard():
                for k, stored in self.stored.items():
                    stored.bind(learn, heads[k].task.kind, heads[k].task.axis)
                self.feed.feed_rows(learn, self.loader, self.stored)

    def add_losses(self, learn, d, progress, taps, check):
        """Add the losses of unlabeled batches to the loss of a training batch.

        Args:
            learn: The student's Learner.
            d: The `Distiller` of the fit.
            progress: Fraction of the training that is done, from 0 to 1.
            taps: The `StudentTaps` that read the student's layers.
            check: fn(teacher outputs) that raises an error for outputs that can't be used.
        """
        # subtle: skip these inputs if their weight is 0, so that they don't change batch norm
        # statistics or random numbers
        if all(t.n_targets for t in d.active_terms(progress)):
            return
        ask = lambda x, samples=None: d.teacher_outputs(x, progress, samples)
        for x, t in self.batches(learn, ask):
            check(t)
            raw = learn.model(*x)
            s = d.student_outputs(raw, taps.pop(), x)
            add_loss(learn, d.without_labels(s, t, progress=progress))

    def batches(self, learn, ask):
        """Yield (inputs, teacher outputs) to use in a training batch. The inputs are a tuple.

        Args:
            learn: The student's Learner, during a training batch.
            ask: fn(inputs, their `BatchSamples` or None) -> outputs of a teacher that runs.
        """
        if self.loader is not None:
            b, samples = split_samples(self._next())
            x, _ = split_batch(learn, b)
            t = ask(x, samples) if self.stored is None else self._stored_outputs(x, samples)
            yield x, t
        if self.perturbed:
            yield (x := perturbed_rows(learn.xb, self.perturbed)), ask(x)

    def _stored_outputs(self, x, samples):
        """Return the stored outputs for a batch, or {head name: outputs} for several heads."""
        each = {k: o.outputs(x, samples) for k, o in self.stored.items()}
        return each.get('', each)

    def _next(self):
        """Return the next batch. After the last batch, a new pass begins."""
        b = None if self.iterator is None else next(self.iterator, None)
        if b is None:
            if self.stored is not None:
                self.feed.begin(self.feed.passed)
            self.iterator = iter(self.loader)
            b = next(self.iterator)
        return b

    def stop(self):
        """Close the iterator of the DataLoader, which ends its workers."""
        if self.iterator is not None and hasattr(self.iterator, 'close'):
            self.iterator.close()
        self.feed.detach()
        self.shown.close()
        self.iterator = self.loader = None


def stored_outputs(targets, heads) -> dict:
    """Return {head name: stored outputs for the unlabeled inputs}."""
    if '' in heads:
        return {'': StoredOutputs(targets)}
    if not isinstance(targets, Mapping) or {*map(str, targets)} != {*heads}:
        raise DistillError(
            'targets in unlabeled= with several heads: pass a dict with a cache for each head '
            f'({", ".join(heads)}), which cache_teacher({{...}}, dls, folder, unlabeled=items) '
            'returns.'
        )
    return {str(k): StoredOutputs(o, head=heads[str(k)]) for k, o in targets.items()}


def refuse_other(cache, teacher, layers):
    """Raise an error if the outputs are from a different teacher, or if compared layers are
    missing.
    """
    m, found = cache.manifest, []
    known = identity_of(teacher)
    weights = [o.get('weights') for o in (m.teacher, known)]
    if all(weights) and weights[0] != weights[1]:
        found.append(
            f'teacher: {m.teacher.get("name")} in the cache has different weights than {known["name"]}, '
            'which teaches the labeled batches'
        )
    refuse(cache.folder, found, cache.force)
    if lost := [n for n in layers if n not in cache.decode(cache.rows([0])).feats]:
        raise DistillError(
            f"{cache.folder} has no outputs of the teacher's layers {', '.join(lost)}, which "
            f'the recipe compares: cache_teacher(..., unlabeled=items, layers={lost}).'
        )
