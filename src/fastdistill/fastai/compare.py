"""Compare models on the same validation data, and report confidence intervals and tests."""

import copy
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from fastai.basics import (
    DataLoaders,
    L,
    Learner,
    TensorImageBase,
    TfmdDL,
    detuplify,
    mk_metric,
    to_detach,
)
from fastai.tabular.core import TabDataLoader
from fastai.text.data import TensorText
from torch import Tensor
from torch.utils.data import DataLoader

from ..base.distributed import rank
from ..base.outputs import DistillError
from ..base.progress_bar import console_for_bars
from ..base.task import Task, labels_loss, task_for
from ..evaluation import Report, measure_models, roles_of
from ..teachers.fast_copy import AS_IT_IS
from ..teachers.teacher import Teacher
from .class_names import ignored_name, vocab_of
from .language_model import is_stream
from .learner_heads import LearnerHead, WholeModel, heads_of, options_of_heads
from .metrics import columns_of
from .probe_batches import number_of_batches, prepared, some_batches
from .raw_items import items_shown
from .task import task_of
from .teachers import check_same_codes, is_heads, teacher_of

__all__ = ['compare', 'history_of']


def compare(
    models: dict,
    dls: DataLoaders | None = None,
    *,
    dl: Any = None,
    teacher: str | None = None,
    baseline: str | None = None,
    metrics: Any = None,
    loss_func: Callable | None = None,
    kind: str | dict | None = None,
    axis: int | None = None,
    headline: str | None = None,
    large: int | None = None,
    seconds: float = 0.5,
    repeats: int = 2000,
    seed: int = 0,
    title: str = '',
    progress: bool = True,
) -> Report | dict[str, Report]:
    """Compare models on the same validation data, in one pass.

    The report contains scores, the task loss, the metrics of the Learners, agreement with the
    teacher, calibration, results per class, cost and time.

    Differences are paired by sample, with 95% bootstrap intervals and exact tests. The intervals
    reflect the random choice of validation samples. The intervals do not reflect the variation
    between trainings with different seeds.

    A model can be a dict {head name: model}. In that case, the result is a dict {head name:
    report}. The other models must have all heads: `compare({'teacher': {'color': teacher1, 'shape':
    teacher2}, 'distilled': student})`. With several heads, the options kind, metrics, loss_func and
    headline are one value for all heads or a dict {head name: value}. Without loss_func, each head
    uses the default task loss of its kind.

    Args:
        models: {name: model}. A model is a Learner, an exported Learner (.pkl), a module, a file or
            anything else that `Teacher` accepts.
        dls: DataLoaders whose validation set is used. If None, the DataLoaders of the last Learner
            in `models` are used.
        dl: A different DataLoader with labels, such as dls.test_dl(items, with_labels=True), or a
            DataLoader of PyTorch.
        teacher: Name of the teacher. If None, the model named 'teacher' is the teacher, if such a
            model exists.
        baseline: Name of the model trained without a teacher. If None, the model named 'alone' is
            the baseline. If no model has this name, the first of several students is the baseline.
        metrics: Metrics of fastai. If None, the metrics of the Learners are used.
        loss_func: Task loss. If None, the loss function of the Learner or the DataLoaders is used.
            Without these, it is the default task loss of `kind`.
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the loss
            function. Without a loss function, labels that are integers mean 'softmax'.
        axis: Class axis. If None, the axis is derived from the loss function.
        headline: Main measure, such as 'nll'. If None, the default measure of the task is used.
        large: Batch size for measuring time and memory of a large batch. If None, the batch size of
            the DataLoader is used.
        seconds: Time limit of each time measurement, in seconds. With 0, time is not measured.
        repeats: Number of bootstrap draws.
        seed: Seed of the bootstrap.
        title: Title of the report.
        progress: Whether to show a progress bar in a terminal or notebook.
    """
    if not isinstance(models, dict) or not models:
        raise DistillError(
            "compare needs names: compare({'teacher': teacher, 'alone': alone, 'distilled': student})."
        )
    names = heads_in(models)
    roles_of(models, teacher, baseline)
    if isinstance(dls, DataLoader):
        dls, dl = None, dls
    learn = reference(models, dls, dl, None if names else loss_func)
    data = learn.dls.valid if dl is None else dl
    view = learn
    if isinstance(dl, TfmdDL):  # it may have other classes and codes than the Learner
        view = SimpleNamespace(dls=DataLoaders(dl), model=learn.model, loss_func=learn.loss_func)
    measure = dict(
        repeats=repeats,
        seed=seed,
        large=large or getattr(data, 'bs', None) or 64,
        seconds=seconds,
    )
    asked = dict(teacher=teacher, baseline=baseline, headline=headline)
    if not names:
        if learn.loss_func is None:
            task = task_for(None, kind or kind_of_labels(learn, data), axis)
            learn.loss_func = partial(labels_loss, task=task)
        else:
            task = task_of(learn.loss_func, kind, axis)
        teachers = {k: teacher_of(o, view, task, run=AS_IT_IS) for k, o in models.items()}
        head = WholeModel(None)
        found = Compared(learn, view.dls, head, task, learn.loss_func, models, teachers)
        return found.report(data, metrics, title, progress, **asked, **measure)
    options = dict(kind=kind, loss_func=loss_func, metrics=metrics, headline=headline)
    of_each = {k: options_of_heads(o, k, names) for k, o in options.items()}
    reports = {}
    for head in names.values():
        k = head.name
        task = head.task_of(learn, of_each['kind'][k], axis)
        own = {n: o[k] if is_heads(o) else o for n, o in models.items()}
        own = {n: o for n, o in own.items() if o is not None}
        teachers = {n: of_head(o, models[n], head, view, task) for n, o in own.items()}
        loss = of_each['loss_func'][k] or partial(labels_loss, task=task)
        found = Compared(learn, head.of(view).dls, head, task, loss, own, teachers)
        asked = dict(
            teacher=teacher if teacher in own else None,
            baseline=baseline if baseline in own else None,
            headline=of_each['headline'][k],
        )
        named = f'{title}: {k}' if title else k
        reports[k] = found.report(
            data, of_each['metrics'][k] or [], named, progress, **asked, **measure
        )
    return reports


def heads_in(models) -> dict:
    """Return {head name: head} if a model is a dict with a model for each head. Otherwise, return
    an empty dict.
    """
    dicts = [{str(k): o for k, o in m.items()} for m in models.values() if is_heads(m)]
    if not dicts:
        return {}
    first, *others = dicts
    if any([*o] != [*first] for o in others):
        have = ' and '.join(', '.join(o) for o in dicts)
        raise DistillError(
            f'The models have different heads ({have}): all must have the same heads, in the same order.'
        )
    heads = [LearnerHead(k, i, len(first)) for i, k in enumerate(first)]
    return {h.name: h for h in heads if any(o[h.name] is not None for o in dicts)}


def of_head(model, whole, head, learn, task):
    """Return the `Teacher` that runs one head of a model.

    Args:
        model: Model of the head.
        whole: A model that has all heads, or the dict that contains `model`.
        head: The head.
        learn: The student's Learner.
        task: What the head predicts.
    """
    if is_heads(whole):
        own = heads_of(whole)[head.name]
        return own.teacher_of(learn, task, run=AS_IT_IS)
    output = {} if isinstance(model, Teacher) and 'output' in model.given else dict(output=head)
    return teacher_of(model, head.of(learn), task, run=AS_IT_IS, **output)


@dataclass
class Compared:
    """Models to compare. All models have the same task.

    Attributes:
        learn: Learner whose callbacks are used, or a substitute for a Learner.
        dls: DataLoaders of the data, with the classes of the head.
        head: The head to compare.
        task: What the models predict.
        loss: Task loss.
        models: {name: model}, as the user passed them.
        teachers: {name: the model as a `Teacher`}.
    """

    learn: object
    dls: object
    head: object
    task: object
    loss: object
    models: dict
    teachers: dict

    def report(
        self, data, metrics, title, progress, *, teacher, baseline, seconds, **options: Any
    ) -> Report:
        """Measure all models in one pass, and return the report.

        Args:
            data: DataLoader to measure on.
            metrics: As in `compare`.
            title: Title of the report.
            progress: Whether to show a progress bar.
            teacher, baseline, seconds, **options: Options of `measure_models`.
        """
        learn = self.learn
        for k, o in self.teachers.items():
            check_same_codes(o, self.dls, self.task, repr(k))
        teacher, baseline = roles_of(self.models, teacher, baseline)
        steps = number_of_batches(data)
        steps = None if steps is None else steps + 2 * len(self.models) * bool(seconds)
        batches = self.head.batches(prepared(learn, some_batches(data), 1, False))
        with (
            shown_bar(progress, steps) as tick,
            items_shown([data], *self.teachers.values()),
            closing(batches),
        ):
            report = measure_models(
                self.teachers,
                batches,
                self.task,
                teacher=teacher,
                baseline=baseline,
                loss=self.loss,
                metrics=metrics_of(self.models, learn, metrics),
                language=is_stream(data),
                seconds=seconds,
                tick=tick,
                **options,
            )
        report.title, report.unit = title, unit_of(data)
        report.classes = names_of_classes(self.dls, len(report.counts))
        report.notes += self.ignored(report.classes)
        for k, o in self.models.items():
            if not isinstance(o, Learner):
                continue
            arch = getattr(getattr(o, 'arch', None), '__name__', report.models[k].kind)
            report.models[k].kind = arch
            report.models[k].history = history_of(o)
        return report

    def ignored(self, classes):
        """Yield sentences on the label that is ignored, and on Learners that ignore another one."""
        if self.task.kind != 'softmax':
            return
        mine = ignored_name(self.task, classes)
        if self.task.ignore_index != Task.ignore_index:
            yield f'Labels that are left out of the scores of all models: {mine}.'
        for k, o in self.models.items():
            if not isinstance(o, Learner):
                continue
            theirs = ignored_name(task_of(o.loss_func, self.task.kind), vocab_of(o.dls))
            if theirs != mine:
                yield (
                    f'The loss function of {k} ignores {theirs}, but all models are measured with '
                    f'one rule, which ignores {mine}.'
                )


def names_of_classes(dls, n):
    """Return `n` class names. If the data have no class names, return numbers as text."""
    names = vocab_of(dls)
    return names if names is not None and len(names) == n else list(map(str, range(n)))


def reference(models, dls, dl, loss_func):
    """Return the Learner whose data, callbacks and loss are used. Without a Learner, return a
    substitute, whose loss is None if it is unknown.
    """
    learners = [o for o in models.values() if isinstance(o, Learner)]
    if dls is None and dl is None and not learners:
        raise DistillError(
            'None of the models is a Learner: pass the data, compare(models, dls) or '
            'compare(models, dl=loader) with batches (inputs, labels). If the labels are not class '
            "numbers, pass loss_func= or kind= ('sigmoid', 'regression') too."
        )
    own = next((o for o in learners[::-1] if dls is None or o.dls is dls), None)
    loss = loss_func or getattr(own or next(iter(learners[::-1]), dls), 'loss_func', None)
    if own is not None and loss_func is None:
        return own
    data = own.dls if own is not None else DataLoaders(dl, dl) if dls is None else dls
    return SimpleNamespace(dls=data, model=None, loss_func=loss)


def kind_of_labels(learn, data) -> str:
    """Return 'softmax' if the labels of the first batch are class numbers."""
    with closing(prepared(learn, some_batches(data, 1), 1, False)) as batches:
        y = next(((yb or (None,))[0] for _, yb in batches), None)
    if isinstance(y, Tensor) and not (y.is_floating_point() or y.dtype is torch.bool):
        return 'softmax'
    raise DistillError(
        'Neither a Learner nor the DataLoaders have a loss function, and the labels are not class '
        "numbers: pass loss_func=, or kind='sigmoid' or 'regression'."
    )


class MetricValues:
    """Computes metrics of fastai for one model. It uses copies of the metrics."""

    def __init__(self, learn, metrics):
        self.learn, self.metrics = learn, copy.deepcopy(metrics)
        for m in self.metrics.values():
            m.reset()

    def add(self, xb, out, yb) -> None:
        now = Step(
            self.learn,
            xb=xb,
            yb=yb,
            x=detuplify(xb),
            y=detuplify(yb),
            pred=out,
            training=False,
            to_detach=to_detach,
        )
        for m in self.metrics.values():
            m.accumulate(now)

    def values(self):
        return {k: plain_number(m.value) for k, m in self.metrics.items()}


class Step:
    """A substitute for the Learner that is passed to metrics after each batch. The Learner itself
    is not changed.
    """

    def __init__(self, learn, **now: Any):
        self.__dict__.update(now)
        self._learn = learn

    def __getattr__(self, name):
        return getattr(self._learn, name)


def metrics_of(models, learn, metrics):
    """Return a function that creates a new `MetricValues` for a model."""
    if metrics is None:
        found = [o.metrics for o in models.values() if isinstance(o, Learner)]
    else:
        found = [[mk_metric(m) for m in L(metrics)]]
    named = {}
    for ms in found:
        names = [m.name for m in ms]
        # e.g. two averages of the F1 score have one name
        again = [names[:i].count(n) for i, n in enumerate(names)]
        named |= {f'{n} ({i + 1})' if i else n: m for n, i, m in zip(names, again, ms)}
    return lambda: MetricValues(learn, named)


def plain_number(v):
    try:
        return None if v is None else float(v)
    except (TypeError, ValueError):
        return None  # the metric has several values


def unit_of(dl):
    """Return a word for the samples of a DataLoader, such as 'images'."""
    if is_stream(dl):
        return 'pieces of text'
    if isinstance(dl, TabDataLoader):
        return 'rows'
    types = getattr(dl, '_types', None) if isinstance(dl, TfmdDL) else None
    found = list(types_in(types)) if types else []
    if TensorText in found[:1]:
        return 'texts'
    return 'images' if found and issubclass(found[0], TensorImageBase) else 'samples'


def types_in(types):
    """Yield the types of the tensors of a batch, in order. fastai stores these types nested."""
    for o in (v for vs in types.values() for v in vs) if isinstance(types, dict) else [types]:
        if isinstance(o, type):
            yield o
        else:
            yield from types_in(o)


def history_of(learn):
    """Return {column of the training table: value in each epoch of the last fit}."""
    recorder = getattr(learn, 'recorder', None)
    if recorder is None:
        return {}
    return {k: [*map(plain_number, v)] for k, v in columns_of(recorder).items()}


@contextmanager
def shown_bar(progress, total, what='compare'):
    """Show a progress bar in a terminal or notebook. Yield a function to call after each step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = console_for_bars() if progress and not rank() else None
    if console is None:
        yield lambda: None
        return
    with Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
