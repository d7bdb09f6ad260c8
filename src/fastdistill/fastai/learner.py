"`Learner.distill`, `check_teacher`, `explain` and `show_features`."

from contextlib import closing

import fastai.callback.schedule  # noqa: F401 (it gives Learner fit_one_cycle)
from fastai.basics import L, Learner, delegates, patch

from .. import evaluation as plots
from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..checks.explain import explain_training
from ..recipes.term import Recipe, Term
from . import check
from .batches import prepared_batches
from .callback import KnowledgeDistillation
from .multi_head import check_heads, explain_heads
from .raw_items import items_shown
from .task import task_of
from .teachers import image_stats, is_heads, teacher_of

__all__ = []


@patch
@delegates(Learner.fit_one_cycle, keep=True, but=['cbs'])
def distill(
    self: Learner,
    teacher,
    n_epoch,
    lr_max=None,
    recipe=None,
    *,
    T=None,
    alpha=None,
    temperature=None,
    loss=None,
    kind=None,
    axis=None,
    span='fine_tune',
    output=None,
    unlabeled=None,
    unlabeled_targets=None,
    perturbed=0,
    check=True,
    fine_tune=False,
    cbs=None,
    **kwargs,
):
    """Fit with the 1cycle policy, or `fine_tune`, and `KnowledgeDistillation(teacher, ...)`, which
    is returned.

    Args:
        teacher: What `KnowledgeDistillation` takes.
        n_epoch: Number of epochs.
        lr_max: Maximum learning rate; with fine_tune: its base_lr.
        recipe: `kd()`, `kd() + recipes.at()`, a `Term`; None or 'auto': `auto` chooses, or
            kd(T, alpha).
        T: Temperature.
        alpha: Weight of the teacher; the labels have 1-alpha.
        temperature: The same as T.
        loss: Your own: fn(student_logits, teacher_logits, *targets).
        kind: 'softmax', 'sigmoid' or 'regression'; None: read from the learner's loss function.
        axis: Class axis; None: read from the learner's loss function.
        span: Schedules run once through a whole `fine_tune`; 'fit': once through each of its
            two fits.
        output: Which of the student's outputs is distilled: a name, an index or a function.
        unlabeled: More inputs, without labels: items as in the training set, or a DataLoader.
        unlabeled_targets: A cache of the teacher's outputs for them, or its folder; None: the
            teacher runs.
        perturbed: For tables: so many perturbed copies of each row, without labels.
        check: Look for mistakes first.
        fine_tune: Use `Learner.fine_tune`, which also gets the other options, instead of
            `fit_one_cycle`
        cbs: More callbacks.
    """
    if isinstance(lr_max, (Recipe, Term)):
        raise DistillError(
            f'lr_max={lr_max!r}: the recipe comes after the learning rate. Write distill(teacher, '
            f'{n_epoch}, 1e-3, recipe), or distill(teacher, {n_epoch}, recipe=recipe).'
        )
    kd = KnowledgeDistillation(
        teacher,
        recipe,
        T=T,
        alpha=alpha,
        temperature=temperature,
        loss=loss,
        kind=kind,
        axis=axis,
        span=span,
        output=output,
        unlabeled=unlabeled,
        unlabeled_targets=unlabeled_targets,
        perturbed=perturbed,
        check=check,
    )
    cbs = L(cbs) + kd
    if not fine_tune:
        self.fit_one_cycle(n_epoch, lr_max, cbs=cbs, **kwargs)
    else:
        self.fine_tune(
            n_epoch, **({} if lr_max is None else dict(base_lr=lr_max)), cbs=cbs, **kwargs
        )
    return kd


@patch
def check_teacher(
    self: Learner,
    teacher,
    kind=None,
    axis=None,
    recipe=None,
    n: int = check.BATCHES,
    n_epoch: int | None = 10,
):
    """Mistakes that training with `teacher` would not show, and what it would cost: a list of
    findings, empty if nothing is wrong, shown as a table.

    Its `.facts` and `.costs` are the measurements, `.in_order` the checks that found nothing. For a
    dict of teachers of several heads it is a dict of such lists, without costs.

    Args:
        : The student.
        teacher: What `KnowledgeDistillation` takes.
        kind: 'softmax', 'sigmoid' or 'regression'; None: read from the loss function.
        axis: Class axis; None: read from the loss function.
        recipe: Recipe or term of the training, which is checked too.
        n: Number of validation batches to read, and a quarter as many training batches.
        n_epoch: Of the training whose costs are estimated; None: they are not.
    """
    if is_heads(teacher):
        return check_heads(self, teacher, kind, axis, recipe, n)
    return check.check_teacher(
        self, teacher, task_of(self.loss_func, kind, axis), recipe, n, n_epoch=n_epoch
    )


@patch
def explain(
    self: Learner,
    teacher,
    callback: KnowledgeDistillation | None = None,
    kind=None,
    axis=None,
    n: int = 32,
):
    """Why did the teacher not help more? A list of reasons, each with the number behind it and what
    to try; `.facts` are what was measured. For a dict of teachers of several heads it is a dict of
    such lists. Teachers that are stored in a cache cannot be asked: pass the model itself.

    Args:
        : The student, trained.
        teacher: What `KnowledgeDistillation` takes.
        callback: What `distill` returned, for the gradient shares of that training.
        kind: 'softmax', 'sigmoid' or 'regression'; None: read off the loss function.
        axis: Class axis; None: read off the loss function.
        n: Batches of the validation set to look at, and as many of the training set.
    """
    steps = getattr(callback, 'n_steps', None) or getattr(self, 'train_iter', None) or None
    if is_heads(teacher):
        return explain_heads(self, teacher, callback, kind, axis, n, steps)
    if not isinstance(callback, KnowledgeDistillation | None):
        raise DistillError(
            f'callback is a {type(callback).__name__}: give what distill() returned, or nothing.'
        )
    task = task_of(self.loss_func, kind, axis)
    teacher = teacher_of(teacher, self, task)
    valid, train = prepared_batches(self, n, n)
    shares = (
        None
        if callback is None or callback.distiller is None
        else callback.distiller.gradient_shares
    )
    with items_shown(self.dls.loaders, teacher), closing(valid), closing(train):
        return explain_training(
            teacher,
            task,
            self.model,
            valid,
            train,
            steps=steps,
            shares=shares,
            output=None if callback is None else callback.output,
        )


@patch
def show_features(self: Learner, teacher, layers='auto', n: int = 4, p: float = 2):
    """Attention maps of student and teacher, side by side, for `n` pictures of the validation set.

    Returns the figure, which notebooks show.

    Args:
        : The student.
        teacher: What `KnowledgeDistillation` takes.
        layers: Layers with maps or tokens, named as in `Term`
        n: Pictures of the validation set.
        p: Exponent of the activations.
    """
    valid, _ = prepared_batches(self, 1, 1)
    with RandomGuard(), closing(valid):
        x, _ = next(valid, (None, None))
    if x is None:
        raise DistillError('These DataLoaders have no validation set, whose pictures are shown.')
    images = plots.picture_in(x)[:n]
    mean, std = [o.to(images) if hasattr(o, 'to') else o for o in image_stats(self.dls)]
    return plots.show_features(
        self.model,
        teacher_of(teacher, self),
        x,
        layers,
        images=(images * std + mean).clamp(0, 1),
        n=n,
        p=p,
    )
