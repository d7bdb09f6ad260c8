"""Stored teacher outputs in the batches of a fit. They are removed before labels are used, and
mixed like the batch.
"""

import copy
import inspect
import warnings
from contextlib import nullcontext
from dataclasses import replace

import torch
from fastai.basics import BaseLoss, Callback, Datasets, TfmdDL
from fastai.callback.mixup import MixHandler
from torch import Tensor

from ..base.outputs import DistillError, DistillWarning, Outputs, as_plain
from ..base.seeds import RandomGuard
from .block import TeacherRow, TeacherTarget, ToTeacherTarget, before_first_target
from .vocab import stored_order

__all__ = ['Feed', 'TargetFeed', 'TeacherTargets']


class TeacherTargets(Callback):
    """Removes the teacher's target from `yb`, since MixUp and metrics don't expect it. A loss of
    three arguments gets it.
    """

    order, remove_on_fetch = -20, False

    def __init__(self):
        super().__init__()
        self.target = self.permutations = self.n_inp = None

    def after_create(self):
        """Remove the callback from a Learner whose data hold no teacher's target."""
        dls = self.learn.dls
        # subtle: a DataLoader with its own `do_item` holds stored outputs, for a fit of another Learner
        fed = any('do_item' in vars(dl) for dl in getattr(dls, 'loaders', []))
        if not (fed or target_tfms(dls)):
            self.learn.remove_cb(self)

    def before_batch(self):
        self.target = self.permutations = None
        if any(isinstance(o, TeacherTarget) for o in self.xb):
            raise DistillError(
                "The teacher's target is among the model's inputs: give Datasets or DataBlock n_inp=1 "
                '(or the number of inputs).'
            )
        if not (len(self.yb) and isinstance(self.yb[-1], TeacherTarget)):
            return
        if self.n_inp is not None:
            # subtle: fastai's distributed DataLoader of a plain dataset takes all but the last part as inputs
            b = *self.xb, *self.yb
            self.learn.xb, self.learn.yb = b[: self.n_inp], b[self.n_inp :]
        self.learn.yb, self.target = self.yb[:-1], self.yb[-1]
        if (
            self.training
            and len(self.yb)
            and any(isinstance(c, MixHandler) for c in self.learn.cbs)
        ):
            self.permutations = []
            self.learn.yb = (recording(self.yb[0], self.permutations), *self.yb[1:])

    def mix(self):
        """The permutation, and the share of the unpermuted samples, of MixUp or CutMix; None if
        this batch is not mixed.
        """
        if not self.permutations:
            return None
        if len(self.permutations) > 1:
            raise DistillError(
                'The batch was mixed twice (MixUp and CutMix together?). Stored outputs can be mixed '
                'only once. Use a live teacher.'
            )
        lam = next(c.lam for c in self.learn.cbs if isinstance(c, MixHandler))
        return self.permutations[0], lam

    def after_pred(self):
        if (
            self.target is None
            or isinstance(self.target, TeacherRow)
            or not takes_teacher(self.learn.loss_func)
        ):
            return
        t, mix = as_plain(self.target), self.mix()
        self.learn.yb = (*self.yb, TeacherTarget(t if mix is None else lerp(t, *mix)))

    def after_loss(self):
        if self.target is not None and len(self.yb) and isinstance(self.yb[-1], TeacherTarget):
            self.learn.yb = self.yb[:-1]

    def __deepcopy__(
        self, memo
    ):  # `__reduce__` is for export alone: a copied Learner needs a callback that works
        new = type(self)()
        new.learn = copy.deepcopy(self.learn, memo)
        return new

    # an exported Learner gets a callback that does nothing, and needs no fastdistill
    def __reduce__(self):
        return Callback, ()


def recording(y, permutations):
    """`y` as a tensor that appends each permutation that indexes it to `permutations`."""
    cls = type(y)

    class Recording(cls):
        def __getitem__(self, i):
            if (
                isinstance(i, Tensor)
                and not i.is_floating_point()
                and i.dim() == 1
                and len(i) == len(self)
            ):
                permutations.append(as_plain(i))
            return self.as_subclass(cls)[i]

    return y.as_subclass(Recording)


def takes_teacher(loss_func):
    "Does this loss take (out, y, y_teacher)?"
    if isinstance(loss_func, BaseLoss):
        return False
    if isinstance(getattr(loss_func, '__self__', None), MixHandler):
        return takes_teacher(loss_func.__self__.old_lf)
    try:
        fn = loss_func.forward if isinstance(loss_func, torch.nn.Module) else loss_func
        ps = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p
        for p in ps
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(needed) > 2 or any(p.kind is p.VAR_POSITIONAL for p in ps)


def lerp(t, perm, lam):
    """The mixture as in fastai: `lam` of each sample, and 1-`lam` of the permuted one."""
    lam = as_plain(torch.as_tensor(lam, device=t.device)).to(t.dtype).reshape(-1)
    return torch.lerp(t[perm], t, lam.reshape(-1, *[1] * (t.dim() - 1)))


def mix_logits(t: Tensor, perm: Tensor, lam: Tensor, kind: str, axis: int):
    """Logits of the teacher's probabilities, mixed as the batch was (MixUp, arXiv:1710.09412;
    CutMix, arXiv:1905.04899).

    Args:
        t: (B, C, ...) teacher logits of the samples before they were mixed.
        perm, lam: Of `TeacherTargets.mix`
        kind: 'softmax', 'sigmoid' or 'regression': what the logits are.
        axis: Class axis.
    """
    if kind == 'regression':
        return lerp(t, perm, lam)
    t = t.float()
    lam = as_plain(torch.as_tensor(lam, device=t.device)).float().reshape(-1, *[1] * (t.dim() - 1))
    # log(lam*exp(a) + (1-lam)*exp(b)) without overflow
    both = lambda a: torch.logaddexp(a + lam.log(), a[perm] + (1 - lam).log())
    if kind == 'softmax':
        return both(t.log_softmax(axis))
    return both(torch.nn.functional.logsigmoid(t)) - both(torch.nn.functional.logsigmoid(-t))


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
        before_first_target()
        self.learn, self.kind, self.axis = learn, kind, axis
        self.added = None
        if self._callback() is None:
            self.added = TeacherTargets()
            learn.add_cb(self.added)
        return self

    def detach(self):
        """Undo what `attach` did; safe to call twice."""
        learn = getattr(self, 'learn', None)
        if learn is not None and self.added is not None:
            learn.remove_cbs([c for c in learn.cbs if c is self.added])
        elif learn is not None and (cb := self._callback()) is not None:
            cb.n_inp = None
        self.learn = self.added = None

    def set_aside(self):
        """A context inside which the data are as they were before `attach`."""
        return nullcontext()

    def _callback(self):
        return next((c for c in self.learn.cbs if isinstance(c, TeacherTargets)), None)

    def ready(self):
        "Does the current batch have a teacher's target?"
        cb = self._callback()
        return cb is not None and cb.target is not None

    def outputs(self, args=(), kwargs=None, layers=()) -> Outputs:
        """The teacher's outputs for the current batch, mixed as MixUp or CutMix mixed it."""
        if not self.ready():
            raise DistillError(self.missing)
        cb = self._callback()
        out, mix = self.decode(as_plain(cb.target), self.learn), cb.mix()
        return out if mix is None else self._mixed(out, *mix)

    def _mixed(self, out, perm, lam):
        if out.feats:
            raise DistillError(
                'MixUp and CutMix mix images, but the stored layers are of unmixed images. '
                'Remove the terms with layers, or use a live teacher.'
            )
        return replace(out, logits=mix_logits(out.logits, perm, lam, self.kind, self.axis))

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


class TargetFeed(Feed):
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


def target_tfms(dls):
    """The transforms in these DataLoaders that make teacher's targets of rows."""
    datasets = [getattr(dl, 'dataset', None) for dl in getattr(dls, 'loaders', [])]
    return [
        f
        for ds in datasets
        if isinstance(ds, Datasets)
        for tl in ds.tls
        for f in tl.tfms.fs
        if isinstance(f, ToTeacherTarget)
    ]
