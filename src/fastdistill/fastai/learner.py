"""Add the methods `distill`, `check_teacher`, `explain`, `calibrate` and `show_features` to
Learner.
"""

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

import fastai.callback.schedule  # noqa: F401 (it gives Learner fit_one_cycle)
from fastai.basics import L, Learner, delegates, patch

from .. import evaluation as plots
from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..checks.explain import explain_training
from ..evaluation.calibration import Calibration, calibrate_model
from ..recipes.schedule import ScheduleLike
from ..recipes.term import Recipe, Term
from . import teacher_check
from .callback import KnowledgeDistillation
from .callback_arguments import check_epochs
from .class_names import check_same_data
from .compare import history_of
from .learner_heads import heads_of
from .multi_head import check_heads, running_heads
from .probe_batches import prepared, prepared_batches, valid_batches
from .raw_items import items_shown
from .task import task_of
from .teachers import image_stats, is_heads, teacher_of


@patch
@delegates(Learner.fit_one_cycle, keep=True, but=['cbs'])
def distill(
    self: Learner,
    teacher: Any,
    n_epoch: int,
    lr_max: Any = None,
    recipe: Term | Recipe | str | dict | None = None,
    *,
    T: 'ScheduleLike | None' = None,
    alpha: 'ScheduleLike | None' = None,
    loss: Callable | None = None,
    kind: str | dict | None = None,
    axis: int | dict | None = None,
    output: Any = None,
    unlabeled: Any = None,
    check: bool = True,
    fine_tune: bool = False,
    cbs: Any = None,
    **kwargs: Any,
) -> KnowledgeDistillation:
    """Train with `KnowledgeDistillation(teacher, ...)` and return that callback.

    The training uses the 1cycle policy, or `fine_tune`.

    Args:
        teacher: Anything that `KnowledgeDistillation` accepts.
        n_epoch: Number of epochs.
        lr_max: Maximum learning rate, or base_lr of `fine_tune`.
        recipe: A recipe such as `kd() + recipes.at()`, or a `Term`. If None and T or alpha is
            given, kd(T, alpha) is used. Otherwise, `auto` chooses a recipe.
        T: Temperature.
        alpha: Weight of the teacher. The task loss has weight 1-alpha.
        loss: Your own loss, fn(student_logits, teacher_logits, *targets).
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the Learner's
            loss function.
        axis: Class axis. If None, the axis is derived from the Learner's loss function.
        output: Which of the student's outputs is distilled: a name, an index or a function.
        unlabeled: Additional inputs without labels: items like those of the training set, a
            DataLoader, or a dict. See `KnowledgeDistillation` for the keys of the dict.
        check: Whether to look for mistakes before the training.
        fine_tune: Whether to train with `Learner.fine_tune` instead of `fit_one_cycle`.
        cbs: Additional callbacks.
        **kwargs: Options of `fit_one_cycle` or `fine_tune`.
    """
    if isinstance(lr_max, (Recipe, Term)):
        raise DistillError(
            f'lr_max={lr_max!r}: the recipe comes after the learning rate. Write distill(teacher, '
            f'{n_epoch}, 1e-3, recipe), or distill(teacher, {n_epoch}, recipe=recipe).'
        )
    check_epochs(n_epoch, lr_max)
    if 'lr' in kwargs:
        raise DistillError(f'lr={kwargs["lr"]!r}: the learning rate is lr_max={kwargs["lr"]!r}.')
    kd = KnowledgeDistillation(
        teacher,
        recipe,
        T=T,
        alpha=alpha,
        loss=loss,
        kind=kind,
        axis=axis,
        output=output,
        unlabeled=unlabeled,
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
    teacher: Any,
    kind: str | dict | None = None,
    axis: int | dict | None = None,
    recipe: Term | Recipe | str | dict | None = None,
    n: int = teacher_check.BATCHES,
    n_epoch: int | None = 10,
) -> Any:
    """Find mistakes that training with `teacher` would not report, and estimate the training cost.

    Args:
        teacher: Anything that `KnowledgeDistillation` accepts.
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the loss
            function.
        axis: Class axis. If None, the axis is derived from the loss function.
        recipe: Recipe or term that you plan to train with. If None, only the teacher is checked.
        n: Number of validation batches to read. For every four validation batches, one training
            batch is read.
        n_epoch: Number of epochs for which costs are estimated. If None, costs are not estimated.

    Returns:
        A list of findings that prints as a table. The list is empty if no mistake was found. The
        attributes `.facts` and `.costs` contain the measurements, and `.in_order` contains the
        checks that found nothing. For several heads, a dict {head name: list}, without costs.
    """
    if is_heads(teacher):
        return check_heads(self, teacher, kind, axis, recipe, n)
    return teacher_check.check_teacher(
        self, teacher, task_of(self.loss_func, kind, axis), recipe, n, n_epoch=n_epoch
    )


@patch
def explain(
    self: Learner,
    teacher: Any,
    callback: KnowledgeDistillation | None = None,
    kind: str | dict | None = None,
    axis: int | dict | None = None,
    n: int = 32,
) -> Any:
    """Find reasons why a teacher did not improve the student more.

    The teacher must run on new inputs, so pass the model itself instead of a cache.

    Args:
        teacher: Anything that `KnowledgeDistillation` accepts.
        callback: The callback that `distill` returned. The callback provides the gradient norms of
            the training.
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the loss
            function.
        axis: Class axis. If None, the axis is derived from the loss function.
        n: Number of batches to read from the validation set, and from the training set.

    Returns:
        A list of reasons. Each reason has a measured number and a suggestion of what to try. The
        attribute `.facts` contains the measurements. For several heads, a dict {head name: list}.
    """
    if not isinstance(callback, KnowledgeDistillation | None):
        raise DistillError(
            f'callback is a {type(callback).__name__}: must be what distill() returned, or omitted.'
        )
    steps = getattr(callback, 'n_steps', None) or getattr(self, 'train_iter', None) or None
    trained = None if callback is None else callback.distiller
    output = None if callback is None else callback.output
    # after `fine_tune`, only its last fit is recorded, and `validate` adds no row
    losses = history_of(self).get('valid_loss', []) if steps else []
    # an epoch whose validation was canceled can't be the best one
    losses = [math.inf if v is None else v for v in losses]
    found = {}
    for h, task, t in running_heads(self, teacher, kind, axis, output):
        known = None if trained is None else trained.heads.get(h.name)
        valid, train = map(h.batches, prepared_batches(self, n, n))
        with items_shown(self.dls.loaders, t), closing(valid), closing(train):
            found[h.name] = explain_training(
                t,
                task,
                self.model,
                valid,
                train,
                steps=steps,
                shares=None if known is None else known.gradient_shares,
                faded=None if known is None else known.faded,
                output=h.output,
                lower=None if known is None else known.recipe.how_to_lower,
                losses=losses,
            )
    return found if is_heads(teacher) else found['']


@patch
def calibrate(
    self: Learner,
    dl: Any = None,
    *,
    fold: bool = True,
    kind: str | None = None,
    axis: int | None = None,
) -> Calibration:
    """Fit a temperature on validation data and fold it into the model's last linear layer.

    The weights of the layer are divided by the temperature. If the model predicts several labels
    per item, each label has its own temperature. The predicted classes stay the same, but their
    probabilities become more or less confident.

    Args:
        dl: Labeled data that the model was not trained on. If None, the validation set is used.
        fold: Whether to change the model. With False, the temperature is only measured. A model
            without a suitable last layer is not changed. Divide the logits of this model by
            `.temperature`, or use `export_student(learn, path, temperature=...)`.
        kind: 'softmax' or 'sigmoid'. If None, the kind is derived from the loss function.
        axis: Class axis. If None, the axis is derived from the loss function.

    Returns:
        A `Calibration` that prints the temperature, and the calibration error, NLL and Brier score
        before and after calibration.
    """
    task = task_of(self.loss_func, kind, axis)
    dl = self.dls.valid if dl is None else dl
    check_same_data(self.dls, dl, 'The Learner')
    with closing(prepared(self, valid_batches(dl), 1, False)) as batches:
        return calibrate_model(self.model, batches, task, fold=fold)


@patch
def show_features(
    self: Learner, teacher: Any, layers: Any = 'auto', n: int = 4, p: float = 2
) -> Any:
    """Show attention maps of student and teacher side by side for `n` images of the validation set.

    Args:
        teacher: Anything that `KnowledgeDistillation` accepts.
        layers: Layers whose outputs are feature maps or tokens, named as in `Term`.
        n: Number of images.
        p: Exponent of the activations.

    Returns:
        The figure, which notebooks show. For several heads, a dict {head name: figure}.
    """
    valid, _ = prepared_batches(self, 1, 1)
    with RandomGuard(), closing(valid):
        x, _ = next(valid, (None, None))
    if x is None:
        raise DistillError(
            'show_features shows images of the validation set, but these DataLoaders have none.'
        )
    images = plots.picture_in(x)[:n]
    mean, std = [o.to(images) if hasattr(o, 'to') else o for o in image_stats(self.dls)]
    images = (images * std + mean).clamp(0, 1)
    show = lambda t: plots.show_features(self.model, t, x, layers, images=images, n=n, p=p)
    if not is_heads(teacher):
        return show(teacher_of(teacher, self))
    return {k: show(h.teacher_of(self, None)) for k, h in heads_of(teacher).items()}
