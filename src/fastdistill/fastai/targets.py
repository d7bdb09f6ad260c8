"Stored teacher outputs in the batches of a fit: taken out of them before labels are used, mixed as MixUp mixes."
import copy, inspect, warnings
import torch
from torch import Tensor
from fastai.basics import BaseLoss, Callback, Datasets
from fastai.callback.mixup import MixHandler
from ..outputs import DistillError, DistillWarning, Outputs, as_plain
from .block import TeacherRow, TeacherTarget, ToTeacherTarget, before_first_target
from .vocab import stored_order

__all__ = ['Feed', 'TargetFeed', 'TeacherTargets']


class TeacherTargets(Callback):
    "Takes the teacher's target out of `yb`, so that labels, MixUp and metrics see what they know; a loss of three arguments gets it back"
    order,remove_on_fetch = -20,False

    def __init__(self):
        super().__init__()
        self.told = self.indexed = None

    def after_create(self):
        "A Learner whose data hold no teacher's target has no use for it"
        if not target_tfms(self.learn.dls): self.learn.remove_cb(self)

    def before_batch(self):
        self.told,self.indexed = None,None
        if any(isinstance(o, TeacherTarget) for o in self.xb):
            raise DistillError("The teacher's target came as an input of the model: say n_inp=1 (or however many inputs there are) "
                               "to Datasets or DataBlock.")
        if not (len(self.yb) and isinstance(self.yb[-1], TeacherTarget)): return
        self.learn.yb,self.told = self.yb[:-1],self.yb[-1]
        if self.training and len(self.yb) and any(isinstance(c, MixHandler) for c in self.learn.cbs): self._listen()

    def _listen(self):
        "Have the label note which permutation it is mixed with"
        self.indexed = []
        self.learn.yb = (recording(self.yb[0], self.indexed), *self.yb[1:])

    def mix(self):
        "The permutation and the share of the unpermuted samples with which MixUp or CutMix mixed this batch; None if it is as it was"
        if not self.indexed: return None
        if len(self.indexed) > 1:
            raise DistillError("The batch was mixed twice (MixUp and CutMix together?): a stored teacher's answer can follow one of them. "
                               "Use a live teacher.")
        lam = next(c.lam for c in self.learn.cbs if isinstance(c, MixHandler))
        return self.indexed[0],lam

    def after_pred(self):
        if self.told is None or isinstance(self.told, TeacherRow) or not takes_teacher(self.learn.loss_func): return
        t,mix = as_plain(self.told),self.mix()
        self.learn.yb = (*self.yb, TeacherTarget(t if mix is None else lerp(t, *mix)))

    def after_loss(self):
        if self.told is not None and len(self.yb) and isinstance(self.yb[-1], TeacherTarget): self.learn.yb = self.yb[:-1]

    def __deepcopy__(self, memo): # in a copied learner: one that goes on
        new = type(self)()
        new.learn = copy.deepcopy(self.learn, memo)
        return new

    def __reduce__(self): return Callback, ()     # in an exported learner: a callback that does nothing and needs nothing


def recording(y, notes):
    "`y` as a tensor that notes by which permutation it is indexed"
    cls = type(y)
    class Noting(cls):
        def __getitem__(self, i):
            if isinstance(i, Tensor) and not i.is_floating_point() and i.dim() == 1 and len(i) == len(self): notes.append(as_plain(i))
            return self.as_subclass(cls)[i]
    return y.as_subclass(Noting)


def takes_teacher(loss_func):
    "Does this loss take (out, y, y_teacher)?"
    if isinstance(loss_func, BaseLoss): return False
    if isinstance(getattr(loss_func, '__self__', None), MixHandler): return takes_teacher(loss_func.__self__.old_lf)
    try: ps = inspect.signature(loss_func.forward if isinstance(loss_func, torch.nn.Module) else loss_func).parameters.values()
    except (TypeError, ValueError): return False
    needed = [p for p in ps if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(needed) > 2 or any(p.kind is p.VAR_POSITIONAL for p in ps)


def lerp(t, perm, lam):
    "fastai's own mixture: `lam` of the sample, the rest of the permuted one"
    lam = as_plain(torch.as_tensor(lam, device=t.device)).to(t.dtype).reshape(-1)
    return torch.lerp(t[perm], t, lam.reshape(-1, *[1]*(t.dim()-1)))


def mix_logits(
    t:Tensor, # (B, C, ...) teacher logits of the samples before they were mixed
    perm:Tensor, lam:Tensor, # of `TeacherTargets.mix`
    kind:str, # 'softmax', 'sigmoid' or 'regression': what the logits are
    axis:int # class axis
):
    "Logits of the teacher's probabilities, mixed as the batch was (MixUp, arXiv:1710.09412; CutMix, arXiv:1905.04899)"
    if kind == 'regression': return lerp(t, perm, lam)
    t = t.float()
    lam = as_plain(torch.as_tensor(lam, device=t.device)).float().reshape(-1, *[1]*(t.dim()-1))
    both = lambda a: torch.logaddexp(a + lam.log(), a[perm] + (1-lam).log())      # log(lam*exp(a) + (1-lam)*exp(b)), however far apart
    if kind == 'softmax': return both(t.log_softmax(axis))
    return both(torch.nn.functional.logsigmoid(t)) - both(torch.nn.functional.logsigmoid(-t))


class Feed:
    "What brings stored teacher targets to the batches of a fit: `attach` before it, `outputs` in each batch, `detach` after it"
    def attach(
        self,
        learn, # the Learner that is about to fit
        kind:str='softmax', # what the logits are: needed to mix them
        axis:int=1 # their class axis
    ):
        self.detach()
        before_first_target()
        self.learn,self.kind,self.axis = learn,kind,axis
        self.added = None
        if not any(isinstance(c, TeacherTargets) for c in learn.cbs):
            self.added = TeacherTargets()
            learn.add_cb(self.added)
        return self

    def detach(self):
        "Take back what `attach` did; safe to call twice"
        learn = getattr(self, 'learn', None)
        if learn is not None and self.added is not None: learn.remove_cbs([c for c in learn.cbs if c is self.added])
        self.learn = self.added = None

    def popped(self, learn): return next((c for c in learn.cbs if isinstance(c, TeacherTargets)), None)

    def ready(self, learn):
        "Has the current batch a teacher's target?"
        cb = self.popped(learn)
        return cb is not None and cb.told is not None

    def outputs(self, learn) -> Outputs:
        "The teacher's outputs for the current batch, mixed as MixUp or CutMix mixed it"
        if not self.ready(learn): raise DistillError(self.missing)
        cb = self.popped(learn)
        out,mix = self.decode(as_plain(cb.told), learn),cb.mix()
        return out if mix is None else self.mixed(out, *mix)

    def mixed(self, out, perm, lam):
        if out.feats: raise DistillError("MixUp and CutMix mix images; stored layers of unmixed images don't fit them. "
                                         "Leave out the feature terms, or use a live teacher.")
        return Outputs(mix_logits(out.logits, perm, lam, self.kind, self.axis), {}, out.mask)


class TargetFeed(Feed):
    "Targets that a `TeacherBlock` put beside the labels"
    missing = ("These batches hold no teacher's target. Give KnowledgeDistillation a teacher, or build the data with a third block: "
               "DataBlock((ImageBlock, CategoryBlock, TeacherBlock), get_y=[label, teacher_row]).")

    def attach(self, learn, kind='softmax', axis=1):
        super().attach(learn, kind, axis)
        self.order,self.seen = class_order(learn.dls),False
        return self

    def decode(self, t, learn):
        if not self.seen: self._look(t)
        return Outputs(t if self.order is None else t[:, self.order.to(t.device)])

    def _look(self, t):
        self.seen = True
        if self.kind == 'softmax' and t.dim() == 2 and t.shape[1] > 1 and t.min() >= 0 and (t.sum(1)-1).abs().max() < 1e-3:
            warnings.warn(DistillWarning("The teacher's targets look like probabilities (each row sums to 1), but are taken for logits: "
                                         "TeacherBlock(given='probabilities')."))


def class_order(dls):
    "Columns of the teacher's rows in the order of the labels' vocab; None if they need none"
    names = next((f.teacher_names for f in target_tfms(dls) if f.teacher_names), None)
    return None if names is None else stored_order(names, getattr(dls, 'vocab', None))


def target_tfms(dls):
    "What turns rows into teacher's targets in these DataLoaders; empty where they have none"
    datasets = [getattr(dl, 'dataset', None) for dl in getattr(dls, 'loaders', [])]
    return [f for ds in datasets if isinstance(ds, Datasets) for tl in ds.tls for f in tl.tfms.fs if isinstance(f, ToTeacherTarget)]
