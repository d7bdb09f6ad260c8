"A teacher's answer beside the label: the neutral block, and the callback that keeps it away from whoever doesn't ask for it."
import copy, functools, inspect, warnings
import numpy as np
import torch
from torch import Tensor
from fastai.basics import BaseLoss, Callback, DataBlock, Datasets, ItemTransform, TensorBase, TfmdDL, TransformBlock, defaults
from fastai.callback.mixup import MixHandler
from ..outputs import DistillError, DistillWarning, Outputs, as_plain

__all__ = ['TeacherBlock', 'TeacherTarget', 'TeacherTargets', 'TargetFeed']

GIVEN = ('logits', 'probabilities', 'label_probabilities')


class TeacherTarget(TensorBase):
    "What a teacher says about an item: a type of its own, so that no transform of images, masks or categories touches it"
    def show(self, ctx=None, **kwargs): return ctx


class TeacherRow(TeacherTarget): "The same as bytes, as a cache stores it"


class ToTeacherTarget(ItemTransform):
    "Anything that holds numbers (array, list, tuple, tensor, a row of a table) as a `TeacherTarget`"
    _retain,order = False,1

    def __init__(self, given, n_out, names):
        super().__init__()
        self.teacher_given,self.n_out,self.teacher_names = given,n_out,names

    def encodes(self, o):
        t = torch.as_tensor(np.asarray(o), dtype=torch.float32) if not isinstance(o, Tensor) else as_plain(o).float()
        want = len(self.teacher_names) if self.teacher_names else self.n_out
        if want is not None and (t.dim() == 0 or t.shape[0] != want):
            raise DistillError(f"A teacher's target has shape {tuple(t.shape)}, TeacherBlock expects {want} values. "
                               "Does the getter return one row for each item?")
        if not t.isfinite().all(): raise DistillError("A teacher's target holds nan or infinite values: leave its item out, or mend it.")
        return TeacherTarget(to_logits(t, self.teacher_given))


def to_logits(t, given):
    "Logits whose softmax (or sigmoid) gives the probabilities `t` again"
    if given == 'logits': return t
    if t.min() < 0 or t.max() > 1:
        raise DistillError(f"given={given!r}, but a teacher's target goes from {t.min():g} to {t.max():g}: use given='logits'.")
    if given == 'probabilities': return log_clamped(t)
    return log_clamped(t) - log_clamped(1-t)


def log_clamped(p): return p.clamp_min(torch.finfo(p.dtype).tiny).log()


class TeacherBlock(TransformBlock):
    "A block for a teacher's outputs: `DataBlock((ImageBlock, CategoryBlock, TeacherBlock), get_y=[label, row])` gives (x, (y, y_teacher))"
    def __init__(
        self,
        given:str='logits', # what the rows are: 'logits', 'probabilities' (over classes), 'label_probabilities' (one for each label)
        n_out:int|None=None, # how many values a row has, checked for each
        vocab=None # names of the teacher's classes in the order of a row; mapped by name to the labels' own order
    ):
        if given not in GIVEN: raise DistillError(f"TeacherBlock(given={given!r}): possible are {', '.join(map(repr, GIVEN))}")
        super().__init__(type_tfms=ToTeacherTarget(given, n_out, None if vocab is None else list(map(str, vocab))))


def _n_inp_without_teacher(init):
    "`DataBlock(..., n_inp)` takes all blocks but the last for inputs; a `TeacherBlock` is never one, and the label before it neither"
    sig = inspect.signature(init)
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = sig.bind_partial(self, *args, **kwargs).arguments
        blocks = given.get('blocks')
        if given.get('n_inp') is None and isinstance(blocks, (list, tuple)):
            rest = [b for b in blocks if not (b is TeacherBlock or isinstance(b, TeacherBlock))]
            if len(rest) < len(blocks): kwargs['n_inp'] = max(1, len(rest)-1)
        init(self, *args, **kwargs)
    return __init__


def _decode_without_teacher(decode):
    "`Datasets.decode` of an input and a prediction (`predict`, `show_results`): no prediction belongs to the teacher's column"
    @functools.wraps(decode)
    def _decode(self, o, full=True):
        tls = [tl for tl in self.tls if not any(isinstance(f, ToTeacherTarget) for f in tl.tfms.fs)]
        if len(tls) < len(self.tls) and len(o) == len(tls): return tuple(tl.decode(v, full=full) for v,tl in zip(o, tls))
        return decode(self, o, full=full)
    return _decode


def _empty_without_teacher(new_empty):
    "What `export` keeps of the data: an exported student knows nothing of its teacher"
    @functools.wraps(new_empty)
    def _new_empty(self):
        tls = [tl for tl in self.tls if not any(isinstance(f, ToTeacherTarget) for f in tl.tfms.fs)]
        return new_empty(self) if len(tls) == len(self.tls) else type(self)(tls=[tl.new_empty() for tl in tls], n_inp=self.n_inp)
    return _new_empty


def _types_without_teacher(one_pass):
    "A DataLoader remembers the types of a batch, and `export` keeps them: the teacher's is remembered as a tensor like any other"
    @functools.wraps(one_pass)
    def _one_pass(self):
        one_pass(self)
        if isinstance(self._types, dict):
            self._types = {k: [TensorBase if o is TeacherTarget else o for o in v] for k,v in self._types.items()}
    return _one_pass


def _show_without_teacher(pre_show_batch):
    "Pictures are chosen by the type of input and label: a tuple of targets would be of no type that fastai can show"
    @functools.wraps(pre_show_batch)
    def _pre_show_batch(self, b, max_n=9):
        if isinstance(b, (tuple, list)): b = type(b)(o for o in b if not isinstance(o, TeacherTarget))
        return pre_show_batch(self, b, max_n=max_n)
    return _pre_show_batch


def _once(cls, name, wrap):
    "Wrap a method of fastai's, once, however often this module is loaded"
    if hasattr(getattr(cls, name), '_knows_teacher'): return
    setattr(cls, name, wrap(getattr(cls, name)))
    getattr(cls, name)._knows_teacher = True

_once(DataBlock, '__init__', _n_inp_without_teacher)
_once(Datasets, 'decode', _decode_without_teacher)
_once(Datasets, 'new_empty', _empty_without_teacher)
_once(TfmdDL, '_one_pass', _types_without_teacher)
_once(TfmdDL, '_pre_show_batch', _show_without_teacher)


class TeacherTargets(Callback):
    "Takes the teacher's target out of `yb`, so that labels, MixUp and metrics see what they know; a loss of three arguments gets it back"
    order,remove_on_fetch = -20,False

    def __init__(self):
        super().__init__()
        self.told = self.indexed = None

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
        self.learn.yb = (noting(self.yb[0], self.indexed), *self.yb[1:])

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


if TeacherTargets not in defaults.callbacks: defaults.callbacks = [*defaults.callbacks, TeacherTargets]


def noting(y, notes):
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
    tfms = [f for tl in getattr(dls.train_ds, 'tls', []) for f in tl.tfms.fs if isinstance(f, ToTeacherTarget)]
    names = next((f.teacher_names for f in tfms if f.teacher_names), None)
    if names is None: return None
    return reorder(names, getattr(dls, 'vocab', None))


def reorder(
    teacher, # names of the teacher's classes, in its order
    student # vocab of the labels
) -> Tensor|None:
    "Which of the teacher's columns each of the labels' classes has; None if the order is the same"
    if student is None:
        raise DistillError("The teacher's classes have names, but the labels have no vocab to map them to: leave vocab= out.")
    student = list(map(str, student[-1] if len(student) and isinstance(student[-1], (list, tuple)) else student))
    if student == teacher: return None
    if missing := [c for c in student if c not in teacher]:
        raise DistillError(f"The teacher doesn't know the class(es) {', '.join(missing[:5])}: "
                           f"it has {', '.join(teacher[:10])}{' ...' if len(teacher) > 10 else ''}.")
    if len(teacher) > len(student):
        raise DistillError(f"The teacher has {len(teacher)} classes, the labels {len(student)}: probabilities would no longer sum to 1. "
                           f"Leave out {', '.join([c for c in teacher if c not in student][:5])} (Teacher(model, select=...) does).")
    return torch.tensor([teacher.index(c) for c in student])
