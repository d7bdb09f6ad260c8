"`Learner.distill`, `Learner.check_teacher` and `Learner.show_features`."
from fastai.basics import L, Learner, delegates, patch
import fastai.callback.schedule  # noqa: F401 (it gives Learner fit_one_cycle)
from .. import plots
from ..docments import explain
from ..replay.seeds import RandomGuard
from .task import task_of
from . import check
from .batches import split_batch, valid_batches
from .callback import KnowledgeDistillation
from .teachers import image_stats, teacher_of

__all__ = []


@patch
@delegates(Learner.fit_one_cycle, keep=True, but=['cbs'])
def distill(
    self:Learner,
    teacher, # what `KnowledgeDistillation` takes
    n_epoch, # Number of epochs
    lr_max=None, # Maximum learning rate
    recipe=None, # `kd()`, `kd() + at()`, a `Term`; None: kd(T, alpha)
    *,
    T=None, # temperature
    alpha=None, # weight of the teacher; the labels have 1-alpha
    loss=None, # your own: fn(student_logits, teacher_logits, *targets)
    kind=None, # 'softmax', 'sigmoid' or 'regression'; None: read off the learner's loss function
    axis=None, # class axis; None: likewise
    balance=None, # 'grad': weights are shares of the gradient
    check=True, # look for mistakes first
    cbs=None, # more callbacks
    **kwargs
):
    "Fit with the 1cycle policy and `KnowledgeDistillation(teacher, ...)`"
    kd = KnowledgeDistillation(teacher, recipe, T=T, alpha=alpha, loss=loss, kind=kind, axis=axis, balance=balance, check=check)
    self.fit_one_cycle(n_epoch, lr_max, cbs=L(cbs)+kd, **kwargs)


@patch
def check_teacher(
    self:Learner, # the student
    teacher, # what `KnowledgeDistillation` takes
    kind=None, # 'softmax', 'sigmoid' or 'regression'; None: read off the loss function
    axis=None, # class axis; None: likewise
    recipe=None, # recipe or term that will be trained with: it is checked too
    n:int=check.BATCHES # batches of the validation set to look at, and a quarter as many of the training set
):
    "Mistakes that training with `teacher` would not show: a list of findings, empty when all is well; its `.facts` are what was measured"
    return check.check_teacher(self, teacher, task_of(self.loss_func, kind, axis), recipe, n)


@patch
def show_features(
    self:Learner, # the student
    teacher, # what `KnowledgeDistillation` takes
    layers='auto', # as in `Term`: {'student.layer': 'teacher.layer'}, pairs of names, 'auto' or 'last'; their outputs are maps or tokens
    n:int=4, # pictures of the validation set
    p:float=2 # exponent of the activations
):
    "Where student and teacher look, side by side, in `n` pictures of the validation set; returns the figure, which notebooks show"
    with RandomGuard(): b = next(iter(valid_batches(self.dls.valid)))
    x,_ = split_batch(self, b)
    x = tuple(o[:n] for o in x)
    mean,std = [o.to(x[0]) if hasattr(o, 'to') else o for o in image_stats(self.dls)]
    return plots.show_features(self.model, teacher_of(teacher, self), x, layers, images=(x[0]*std + mean).clamp(0, 1), n=n, p=p)


for _method in (Learner.distill, Learner.check_teacher, Learner.show_features): explain(_method)
