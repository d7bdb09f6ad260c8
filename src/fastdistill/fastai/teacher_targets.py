"""Remove sample information and teacher targets from a batch before inputs and labels are used."""

import copy
import inspect
from functools import cache

import torch
from fastai.basics import BaseLoss, Callback, Datasets, TensorBase
from fastai.callback.mixup import MixHandler, MixUp
from torch import Tensor

from ..base.batch_samples import BatchSamples
from ..base.mixup import lerp
from ..base.outputs import DistillError, Outputs, as_plain, tensors_in
from .transforms import moves, refuse_moved_points


class TeacherTarget(TensorBase):
    """A teacher's output for an item.

    Because of this type, transforms of images, masks and categories skip the teacher's output.
    """

    def show(self, ctx=None, **kwargs):
        return ctx


class TeacherTargets(Callback):
    """Callback that removes sample information and teacher targets from the batch.

    MixUp and metrics do not expect samples and targets in the batch. The callback also records how
    MixUp or CutMix mixes the batch. If the loss function has three arguments, the teacher's target
    is the third argument.
    """

    order, remove_on_fetch = -20, False

    def __init__(self):
        super().__init__()
        self.samples = None

    def after_create(self):
        """Remove the callback if the Learner's batches have no sample information and no
        targets.
        """
        dls = self.learn.dls
        # subtle: a DataLoader with its own `create_batches` may belong to a fit of a different
        # Learner
        own = any('create_batches' in vars(dl) for dl in getattr(dls, 'loaders', []))
        if not (own or target_tfms(dls)):
            self.learn.remove_cb(self)

    def before_fit(self):
        if target_tfms(self.learn.dls) and takes_teacher(self.learn.loss_func):
            refuse_moved_points(self.learn.dls)

    def before_batch(self):
        self.samples = None
        if any(isinstance(o, TeacherTarget) for o in self.xb):
            raise DistillError(
                "The teacher's target is among the model's inputs: pass n_inp=1 (or the number "
                'of inputs) to Datasets or DataBlock.'
            )
        *b, last = *self.xb, *self.yb
        if isinstance(last, BatchSamples):
            # subtle: with a plain dataset, fastai's distributed DataLoader treats all parts but the
            # last as inputs
            self.samples, n = last, last.n_inp
            self.learn.xb, self.learn.yb = tuple(b[:n]), tuple(b[n:])
            if last.rows is not None:
                # subtle: copy the rows now. After the student has been launched, a copy to a GPU
                # would wait for the student.
                last.rows = last.rows.to(next(tensors_in(self.xb), last.rows).device)
        if len(self.yb) and isinstance(self.yb[-1], TeacherTarget):
            if self.samples is None:
                self.samples = BatchSamples()
            self.learn.yb, self.samples.target = self.yb[:-1], self.yb[-1]
            self.samples.moved = moves(self.learn.dl)
        if self.samples is not None:
            found = self.samples.permutations
            record = lambda o: recording(o, found) if isinstance(o, Tensor) else o
            self.learn.xb, self.learn.yb = tuple(map(record, self.xb)), tuple(map(record, self.yb))

    def after_pred(self):
        s = self.samples
        if s is None:
            return
        if s.permutations:
            handlers = [c for c in self.learn.cbs if isinstance(c, MixHandler)]
            if not (handlers and self.training):
                raise DistillError(
                    'A callback reorders the samples of the batch or mixes them, but the outputs of '
                    'the teacher belong to the samples in their original order. For mixing, use '
                    "fastai's MixUp or CutMix, or a live teacher that reads the mixed batch."
                )
            s.lam, s.pasted = handlers[0].lam, not isinstance(handlers[0], MixUp)
        if s.target is None or not takes_teacher(self.learn.loss_func):
            return
        t = as_plain(s.target)
        refuse_unlike_batch(s)
        self.learn.yb = (*self.yb, TeacherTarget(t if s.mix is None else lerp(t, *s.mix)))

    def after_loss(self):
        if len(self.yb) and isinstance(self.yb[-1], TeacherTarget):
            self.learn.yb = self.yb[:-1]

    # `__reduce__` is only used for export. A copied Learner needs a working callback.
    def __deepcopy__(self, memo):
        new = type(self)()
        new.learn = copy.deepcopy(self.learn, memo)
        return new

    # an exported Learner contains a callback that does nothing instead, so that it loads without
    # fastdistill
    def __reduce__(self):
        return Callback, ()


def refuse_unlike_batch(samples: BatchSamples):
    """Raise a DistillError if the targets have one value per position, as for pixels, and the
    positions no longer match, because a transform moved the inputs or pasted parts of different
    inputs.
    """
    t = as_plain(samples.target)
    samples.refuse_moved(
        Outputs(t),
        "TeacherBlock's rows belong to the raw items",
        'Remove these transforms, store the outputs of augmented views (cache_teacher), or use a '
        'live teacher.',
    )
    samples.refuse_pasted(t)


def without_targets(b):
    """Return a batch without sample information and teacher targets."""
    if not isinstance(b, (tuple, list)):
        return b
    return type(b)(o for o in b if not isinstance(o, (TeacherTarget, BatchSamples)))


def samples_of(learn) -> BatchSamples | None:
    """Return the `BatchSamples` of a Learner's current batch. Return None if the batch has none."""
    return next((c.samples for c in learn.cbs if isinstance(c, TeacherTargets)), None)


def recording(t, permutations):
    """Return a tensor like `t` that records how callbacks such as MixUp reorder the batch.

    Each permutation that is used to index this tensor is appended to `permutations`. A permutation
    of several tensors of the batch is appended once. `CastToTensor` makes plain tensors before the
    model runs, so the model's own indexing is not recorded.
    """
    out = t.as_subclass(recording_class(type(t)))
    out.permutations = permutations
    return out


@cache
def recording_class(cls):
    """Return the subclass of a tensor class that `recording` uses."""

    # subtle: one class for all batches, because PyTorch refuses operations on tensors of two
    # subclasses
    class Recording(cls):
        def __getitem__(self, i):
            plain, found = self.as_subclass(cls), getattr(self, 'permutations', None)
            reorders = isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32)
            if (
                found is not None
                and reorders
                and i.dim() == 1
                and self.dim()
                and len(i) == len(self)
            ):
                i = as_plain(i)
                if not any(i.data_ptr() == p.data_ptr() for p in found):
                    found.append(i)
            return plain[i]

        def __reduce_ex__(self, protocol):
            return self.as_subclass(cls).__reduce_ex__(protocol)

    return Recording


def takes_teacher(loss_func):
    """Return True if this loss function takes (out, y, y_teacher)."""
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


def makes_target(tfm) -> bool:
    """Return True if this transform converts rows to teacher targets."""
    return getattr(tfm, 'makes_teacher_target', False)


def target_tfms(dls):
    """Return the transforms in these DataLoaders that convert rows to teacher targets."""
    datasets = [getattr(dl, 'dataset', None) for dl in getattr(dls, 'loaders', [])]
    return [
        f
        for ds in datasets
        if isinstance(ds, Datasets)
        for tl in ds.tls
        for f in tl.tfms.fs
        if makes_target(f)
    ]
