"""Define `KnowledgeDistillation`, the fastai callback that adds a teacher to a fit."""

from collections.abc import Callable
from typing import Any

from fastai.basics import L, Learner

from ..base.errors import few_names
from ..base.outputs import DistillError, Outputs, check_axis, check_output
from ..base.task import pseudo_labels
from ..distiller.distiller import Distiller
from ..recipes.batch_tensors import all_classes
from ..recipes.schedule import ScheduleLike
from ..recipes.term import Recipe, Term
from ..teachers.raw_items import with_items
from ..teachers.teacher import say_with
from .cache_feed import SampleFeed
from .callback_arguments import check_options, make_recipe, refuse_options
from .finite_check import FiniteCheck
from .fit_distiller import FitDistiller
from .fit_log import FitLog
from .fit_state import FitState
from .learner_notes import notes_of
from .metrics import PartMetric, TaskMetric
from .patches import DistillationCallback, claim_epochs
from .teacher_check import check_optimizer
from .teacher_targets import samples_of
from .teachers import is_heads
from .training_step import StudentTaps, add_distilled, has_outputs, mixed_labels
from .trend_check import TrendCheck
from .unlabeled import UnlabeledInputs


class KnowledgeDistillation(DistillationCallback):
    """Callback that trains the Learner on the teacher's predictions: `learn.fit_one_cycle(3, 1e-3,
    cbs=KnowledgeDistillation(teacher))`.

    Args:
        teacher: The teacher can be a Learner, an exported Learner (.pkl), a module, a callable, or
            a `Teacher`. A TorchScript, torch.export or ONNX file, an estimator with `predict_proba`
            or `predict`, a `TeacherCache`, or the folder of a cache is also allowed. For an
            ensemble, pass a list of teachers. Use None if the batches contain the teacher's outputs
            (see `TeacherBlock`). For several heads, a dict {head name: teacher} (see
            docs/classes.md).
        recipe: `kd()`, `kd() + recipes.at()` or a `Term`. If None and T or alpha is given, kd(T,
            alpha) is used. Otherwise, `auto` chooses a recipe.
        T: Temperature: a number or a schedule (fastai's `SchedCos(8, 2)`). The default is 4.
        alpha: Weight of the teacher: a number or a schedule. The task loss has weight 1-alpha. The
            default is 0.9.
        loss: Your own loss, fn(student_logits, teacher_logits, *targets). If alpha is given, your
            loss replaces only the distillation loss. Otherwise, your loss replaces the whole loss.
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the Learner's
            loss function.
        axis: Class axis. If None, the axis is derived from the Learner's loss function.
        span: Whether schedules, warmup and stop_at span a whole `fine_tune`, which consists of two
            fits. With 'fine_tune', schedules run once over both fits. With 'fit', schedules run
            once in each fit.
        output: Which of the student's outputs is distilled: a name, an index or a function. If
            None, the default of `Distiller` is used. To select a teacher's output, use
            Teacher(model, output=...).
        unlabeled: Additional inputs without labels, on which the student learns only from the
            teacher. Pass a list of items like those of the training set, or a DataLoader. Each
            training batch is accompanied by one unlabeled batch. Pass a dict to set more options.

            - 'items': the items or the DataLoader.
            - 'targets': a cache of the teacher's outputs for the items, or the folder of the cache.
              For several heads, a dict {head name: cache}. If None, the teacher runs.
            - 'perturbed': for tables, the number of perturbed copies of each row.
        check: Whether to look for mistakes before the first fit (see `check_teacher`).
    """

    # runs after the task loss and regularizers, before GradientAccumulation (6) and MixedPrecision
    # (10) scale the loss
    order, remove_on_fetch, _only_train_loop = 5, False, True

    def __init__(
        self,
        teacher: Any = None,
        recipe: Term | Recipe | str | dict | None = None,
        *,
        T: 'ScheduleLike | None' = None,
        alpha: 'ScheduleLike | None' = None,
        loss: Callable | None = None,
        kind: str | None = None,
        axis: int | None = None,
        span: str = 'fine_tune',
        output: Any = None,
        unlabeled: Any = None,
        check: bool = True,
    ):
        super().__init__()
        self.several = is_heads(teacher)
        refuse_options(self.several, loss=loss, output=output)
        check_options(None, span=span)
        check_output(output)
        check_axis(axis)
        self.log = FitLog(self)
        self.fit_distiller = fit = FitDistiller(
            teacher,
            recipe,
            lambda r: make_recipe(r, T, alpha, loss),
            kind=kind,
            axis=axis,
            output=output,
            check=check,
            log=self.log,
        )
        self.output, self.span = output, span
        self.feed, self.state = SampleFeed(), FitState(self.log)
        self.in_fit, self.part_metrics, self.parts = False, L(), {}
        self.taps = StudentTaps()
        self.trend = self.teacher_outputs = self.epochs_span = None
        self.finite_check = FiniteCheck(stored=not fit.runs)
        self.unlabeled = UnlabeledInputs(unlabeled, runs=not fit.stored, heads=fit.heads)

    @property
    def distiller(self) -> Distiller | None:
        """The `Distiller` of the last fit."""
        return self.fit_distiller.distiller

    @property
    def recipe(self) -> Recipe | None:
        """The recipe. None if no recipe has been chosen yet."""
        return self.fit_distiller.recipe

    # before and after a fit

    def before_fit(self) -> None:
        self.teardown(self.learn)
        if any(isinstance(c, KnowledgeDistillation) and c is not self for c in self.learn.cbs):
            raise DistillError(
                'Two KnowledgeDistillation callbacks in one Learner. Give one of them a list of '
                'teachers (an ensemble), or a sum of recipes, kd() + recipes.at().'
            )
        check_optimizer(self.learn)
        self.in_fit, self.trend, finder = True, TrendCheck(), hasattr(self.learn, 'lr_finder')
        notes_of(self.learn).fitting = self
        if self.fit_distiller.build(self.learn):
            self.state.optimizer = None
            self.log.forget()
        d = self.distiller
        say_with(d.heads.sources, self.log)
        # add to the batches what the teachers need
        sources = {k: h.teacher for k, h in d.heads.items() if h.teacher is not None}
        heads = self.fit_distiller.heads if self.several else None
        self.feed.attach(self.learn, sources, self.fit_distiller.tasks, self.log, heads)
        found = None if finder else self.fit_distiller.look(self.learn, self.log.is_on)
        self.fit_distiller.choose(self.learn, found)
        if not finder:
            self.fit_distiller.check_task_loss(self.learn)
        self.state.begin(self.learn, d, self.fit_distiller.output)
        self.epochs_span = None if finder or self.span == 'fit' else claim_epochs(self.learn)
        parts = (PartMetric(self, t.name) for t in self.recipe.terms)
        self.part_metrics = L(TaskMetric(self), *parts)
        self.learn.metrics = self.learn.metrics + self.part_metrics
        if self.unlabeled and not finder:
            self.unlabeled.start(self.learn, d)
        d.start()

    def teardown(self, learn: Learner) -> None:
        """Restore everything. It is safe to call this at any time, and more than once."""
        self.taps.detach()
        self.feed.detach()
        self.unlabeled.stop()
        if not self.in_fit:
            return
        self.in_fit, self.n_steps = False, learn.train_iter  # saved because `validate` sets it to 0
        notes_of(learn).fitting = None
        learn.metrics = learn.metrics.filter(lambda m: m not in self.part_metrics)
        if self.distiller is None:
            return
        self.distiller.stop()
        say_with(self.distiller.heads.sources, None)
        self.state.end(learn, self.distiller)

    # training step

    def __call__(self, event_name: str) -> Any:
        # outside of a fit, handle only the events that prepare a fit or clean up
        if self.in_fit or event_name in ('before_fit', 'after_batch', 'after_fit'):
            return super().__call__(event_name)

    @property
    def training_progress(self) -> float | None:
        """Fraction of the training that is done, from 0 to 1, for schedules."""
        if self.epochs_span is None:
            return self.pct_train
        before, epochs = self.epochs_span
        return (before + self.pct_train * self.n_epoch) / epochs

    def before_epoch(self) -> None:
        self.trend.check(self.learn, self.training_progress, self.recipe)

    def before_train(self) -> None:
        self.distiller.links.train(self.training)
        for t in self.distiller.heads.sources:
            t.reset()
        self.finite_check.start_phase(self.learn, self.fit_distiller.tasks)
        if self.training:
            self.feed.begin(self.epoch)
            self.part_metrics[0].start_training()

    before_validate = before_train

    def before_batch(self) -> None:
        self.parts, self.teacher_outputs = {}, None
        if not self.distiller.ready:
            # the projectors are not built yet, because the student could not run on an example
            # batch
            x = with_items(self.xb, getattr(samples_of(self.learn), 'items', None))
            self.state.build_projectors(self.learn, self.distiller, x)
        # subtle: hook the model that runs on this batch, since an averaged model may replace it in
        # validation
        terms = self.distiller.active_terms(self.training_progress)
        self.taps.attach(self.learn.model, self.distiller.student_layers(terms))

    def after_batch(self) -> None:
        self.taps.end_batch()

    def after_train(self) -> None:
        self.taps.detach()
        self.finite_check.enforce()
        if self.training:
            self.part_metrics[0].end_training()
            self.log.report_faded(self.distiller)

    after_validate = after_train

    def after_pred(self) -> None:
        if len(self.yb) or not self.training:
            return
        if self.several:
            raise DistillError(
                'These batches have no labels, but several heads need labels: each head is identified by its labels.'
            )
        if self.recipe.task_at(self.training_progress):
            raise DistillError(
                'These batches have no labels, but the recipe gives the task loss a weight: use '
                'alpha=1 or soft_labels() to train only from the teacher.'
            )
        # subtle: without labels, fastai computes no loss and takes no step. So use the teacher's
        # predictions as labels. The task loss has weight 0.
        self.teacher_outputs = self._ask_teacher()
        if self.teacher_outputs is not None:
            own = self.distiller.student_outputs(self.learn.pred, {}, self.xb)
            t = all_classes(self.teacher_outputs, own).logits
            y = pseudo_labels(t, own.logits, self.distiller.head.task)
            self.learn.yb = (y,)

    def after_loss(self) -> None:
        if not len(self.yb):
            return
        d, progress = self.distiller, self.training_progress
        if not (self.training or has_outputs(d, samples_of(self.learn))):
            return  # a cache may contain only the outputs for the training set
        unlabeled = self.teacher_outputs is not None
        t = self.teacher_outputs if unlabeled else self._ask_teacher()
        s = d.student_outputs(self.learn.pred, self.taps.pop(), self.xb)
        y, mixed = () if unlabeled else self.yb, mixed_labels(self.learn)
        r = d.compute(s, t, self.learn.loss, y, progress=progress, mixed=mixed)
        self.parts = r.parts if unlabeled else r.losses
        self.log.report_shares(d, progress)
        if not self.training:
            return
        self.part_metrics[0].add_training_batch(self.learn)
        add_distilled(self.learn, r)
        if self.unlabeled and not hasattr(self.learn, 'lr_finder'):
            self.unlabeled.add_losses(self.learn, d, progress, self.taps, self.finite_check.add)

    def _ask_teacher(self) -> Outputs | dict | None:
        """Return the teacher's outputs for this batch. None if no term needs them."""
        samples = samples_of(self.learn)
        t = self.distiller.teacher_outputs(self.xb, self.training_progress, samples)
        self.finite_check.add(t)
        return t

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs in addition to the student.

        This state consists of the projectors, the state of their optimizer, the measured gradients
        and, during a fit, the random state of the teacher.
        """
        return self.state.state_dict(self.distiller)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        If no fit is running, the state is restored when the next fit begins.
        """
        if state and (missing := {'links', 'distiller', 'opt'} - set(state)):
            raise DistillError(
                f'This state has no {", ".join(sorted(missing))}. It has {few_names(list(state))}. Pass what '
                'the `state_dict` method of a KnowledgeDistillation returned. To load the weights of the '
                'student, call learn.load.'
            )
        self.state.to_load = state
        if self.in_fit and self.distiller.ready:
            self.state.take(self.learn, self.distiller)
