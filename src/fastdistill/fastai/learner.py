"`Learner.distill` and `Learner.check_teacher`."
from fastai.basics import L, Learner, delegates, patch
import fastai.callback.schedule as _  # noqa: F401 (it gives Learner fit_one_cycle)
from . import check
from .callback import KnowledgeDistillation
from .task import task_of

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
    axis=None # class axis; None: likewise
):
    "What would go wrong, in silence, if `teacher` taught this learner: a list of findings, empty when all is well"
    return check.check_teacher(self, teacher, task_of(self.loss_func, kind, axis))
