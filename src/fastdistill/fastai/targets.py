"Stored teacher outputs in the batches of a fit."

import warnings
from contextlib import nullcontext
from dataclasses import replace

from fastai.basics import TfmdDL

from ..base.outputs import DistillError, DistillWarning, Draws, LinearLogits, Outputs, as_plain
from ..base.random_state import RandomGuard
from .patches import patch_for_targets
from .teacher_targets import TeacherTarget, TeacherTargets, mix_logits, target_tfms
from .vocab import stored_order

__all__ = ['Feed', 'GivenOutputs', 'mixed']


class Feed:
    """Stored teacher outputs for the batches of a fit: `attach` before it, `outputs` in each batch,
    `detach` after it.

    A Distiller takes it instead of a Teacher. It has no modules. Its outputs are those of the
    current batch, for any inputs, with all stored layers.
    """

    def attach(
        self,
        learn,  # the Learner that is about to fit
        kind: str = 'softmax',  # what the logits are: needed to mix them
        axis: int = 1,  # their class axis
    ):
        self.detach()
        patch_for_targets()
        self.learn, self.kind, self.axis = learn, kind, axis
        self.added = None
        if self.targets is None:
            self.added = TeacherTargets()
            learn.add_cb(self.added)
        return self

    def detach(self):
        """Undo what `attach` did; safe to call twice."""
        learn = getattr(self, 'learn', None)
        if learn is not None and self.added is not None:
            learn.remove_cbs([c for c in learn.cbs if c is self.added])
        elif learn is not None and (cb := self.targets) is not None:
            cb.n_inp = None
        self.learn = self.added = None

    def set_aside(self):
        """A context inside which the data are as they were before `attach`."""
        return nullcontext()

    @property
    def targets(self):
        """The callback that removes the targets from the batches of the Learner."""
        return next((c for c in self.learn.cbs if isinstance(c, TeacherTargets)), None)

    def ready(self):
        "Does the current batch have a teacher's target?"
        cb = self.targets
        return cb is not None and cb.target is not None

    def outputs(self, args=(), kwargs=None, layers=()) -> Outputs:
        """The teacher's outputs for the current batch, mixed as MixUp or CutMix mixed it."""
        if not self.ready():
            raise DistillError(self.missing)
        cb = self.targets
        out, mix = self.decode(as_plain(cb.target), self.learn), cb.mix()
        return out if mix is None else mixed(out, *mix, self.kind, self.axis)

    # what else of a teacher Distiller and `pair` use

    name = 'stored outputs'
    layers_advice = 'Outputs stored in the data have no layers: give the teacher itself, or a cache of its layers.'

    def __call__(self, *x, **kw):
        return self.example(x)

    def probe(self, *x, layers=None, **kw):
        return self.example(x)

    def named_modules(self):
        return {}

    def start(self):
        pass

    def stop(self):
        pass

    def reset(self):
        pass

    def say_with(self, fn):
        pass


def mixed(out: Outputs, perm, lam, kind: str, axis: int) -> Outputs:
    """Outputs for unmixed samples, mixed as `mix_logits` does."""
    if out.feats:
        raise DistillError(
            'MixUp and CutMix mix images, but the stored layers are of unmixed images. '
            'Remove the terms with layers, or use a live teacher.'
        )
    if isinstance(out.logits, Draws):
        raise DistillError(
            'MixUp and CutMix mix probabilities, but the cache holds draws of unmixed images. Remove the '
            "callback, or store the outputs in a different way, cache_teacher(..., store='auto')."
        )
    t = out.logits.dense() if isinstance(out.logits, LinearLogits) else out.logits
    return replace(out, logits=mix_logits(t, perm, lam, kind, axis))


class GivenOutputs(Feed):
    """Targets that a `TeacherBlock` added to the labels."""

    missing = (
        "These batches hold no teacher's target. Give KnowledgeDistillation a teacher, or build the data with a "
        'third block: DataBlock((ImageBlock, CategoryBlock, TeacherBlock), get_y=[label, teacher_row]).'
    )

    def attach(self, learn, kind='softmax', axis=1):
        super().attach(learn, kind, axis)
        if not target_tfms(learn.dls) and not in_first_batch(learn.dls.train):
            self.detach()
            raise DistillError(self.missing)
        self.order, self.is_checked = class_order(learn.dls), False
        return self

    def example(self, x):
        return Outputs()  # no layers are stored

    def decode(self, t, learn):
        if not self.is_checked:
            self._check(t)
        return Outputs(t if self.order is None else t[:, self.order.to(t.device)])

    def _check(self, t):
        self.is_checked = True
        classes = self.kind == 'softmax' and t.dim() == 2 and t.shape[1] > 1
        if classes and t.min() >= 0 and (t.sum(1) - 1).abs().max() < 1e-3:
            warnings.warn(
                DistillWarning(
                    "The teacher's targets seem to be probabilities (each row sums to 1), but "
                    "they are used as logits: pass TeacherBlock(given='probabilities')."
                )
            )


def in_first_batch(dl):
    "Does the first batch of a DataLoader hold a teacher's target?"
    with RandomGuard():
        b = next(iter(dl.new(num_workers=0) if isinstance(dl, TfmdDL) else dl), ())
    return isinstance(b, (tuple, list)) and any(isinstance(o, TeacherTarget) for o in b)


def class_order(dls):
    """Columns of the teacher's rows in the order of the labels' vocab; None if the order is the
    same.
    """
    names = next((f.teacher_names for f in target_tfms(dls) if f.teacher_names), None)
    return None if names is None else stored_order(names, getattr(dls, 'vocab', None))
