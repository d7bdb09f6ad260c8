"""Compare models on the same validation data, and report confidence intervals and tests."""

import copy
from collections.abc import Callable
from contextlib import closing, contextmanager
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
from ..base.random_state import RandomGuard
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
from .tables import TableEstimator
from .task import task_of
from .teachers import check_same_codes, is_heads, teacher_of


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
    account for the random choice of validation samples, but not for the variation between training
    runs with different seeds.

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
            Without either, the default task loss of `kind` is used.
        kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the loss
            function. Without a loss function, labels that are integers mean 'softmax'.
        axis: Class axis. If None, the axis is derived from the loss function.
        headline: Main measure, such as 'nll'. If None, the default measure of the task is used.
        large: Batch size for measuring time and memory of a large batch. If None, the batch size of
            the DataLoader is used.
        seconds: Time limit of each time measurement, in seconds. With 0, time is not measured.
        repeats: Number of bootstrap samples.
        seed: Seed of the bootstrap.
        title: Title of the report.
        progress: Whether to show a progress bar in a terminal or notebook.
    """
    if not isinstance(models, dict) or not models:
        raise DistillError(
            "compare needs names: compare({'teacher': teacher, 'alone': alone, 'distilled': student})."
        )
    several = heads_in(models)
    roles_of(models, teacher, baseline)
    if isinstance(dls, DataLoader):
        dls, dl = None, dls
    learn = reference(models, dls, dl, None if several else loss_func)
    data = learn.dls.valid if dl is None else dl
    if not several:
        if learn.loss_func is None:
            kind = kind or kind_of_labels(learn, data)
            learn.loss_func = partial(labels_loss, task=task_for(None, kind, axis))
        loss_func = learn.loss_func
    view = learn
    if isinstance(dl, TfmdDL):  # its classes and encodings may differ from the Learner's
        view = SimpleNamespace(dls=DataLoaders(dl), model=learn.model, loss_func=learn.loss_func)
    heads = several or {'': WholeModel(None)}
    options = dict(kind=kind, loss_func=loss_func, metrics=metrics, headline=headline)
    of_each = {k: options_of_heads(o, k, heads) for k, o in options.items()}
    reports = {}
    for k, head in heads.items():
        task = head.task_of(learn, of_each['kind'][k], axis)
        own = {
            n: o[k] if is_heads(o) else o
            for n, o in models.items()
            if not is_heads(o) or o[k] is not None
        }
        found = of_each['metrics'][k]
        reports[k] = measure_head(
            learn,
            data,
            head,
            head.of(view).dls,
            task,
            own,
            {n: of_head(o, models[n], head, view, task) for n, o in own.items()},
            metrics_of(own, learn, (found or []) if several else found),
            progress,
            teacher=teacher if teacher in own else None,
            baseline=baseline if baseline in own else None,
            loss=of_each['loss_func'][k] or partial(labels_loss, task=task),
            headline=of_each['headline'][k],
            repeats=repeats,
            seed=seed,
            large=large or getattr(data, 'bs', None) or 64,
            seconds=seconds,
        )
        reports[k].title = ': '.join(o for o in (title, k) if o)
    return reports if several else reports['']


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
    given = isinstance(model, Teacher) and 'output' in model.given
    output = {} if given or head.output is None else dict(output=head.output)
    return teacher_of(model, head.of(learn), task, run=AS_IT_IS, **output)


def measure_head(
    learn, data, head, dls, task, models, teachers, metrics, progress, **options: Any
) -> Report:
    """Measure all models in one pass, and return the report.

    Args:
        learn: Learner whose callbacks are used, or a substitute for a Learner.
        data: DataLoader to measure on.
        head: The head to compare.
        dls: DataLoaders of the data, with the classes of the head.
        task: What the models predict.
        models: {name: model}, as the user passed them.
        teachers: {name: the model as a `Teacher`}.
        metrics: As in `measure_models`.
        progress: Whether to show a progress bar.
        **options: Options of `measure_models`.
    """
    for k, o in teachers.items():
        check_same_codes(o, dls, task, repr(k))
    options['teacher'], options['baseline'] = roles_of(
        models, options['teacher'], options['baseline']
    )
    steps = number_of_batches(data)
    steps = None if steps is None else steps + 2 * len(models) * bool(options['seconds'])
    batches = head.batches(prepared(learn, some_batches(data), 1, False))
    with (
        shown_bar(progress, steps) as tick,
        items_shown([data], *teachers.values()),
        closing(batches),
    ):
        report = measure_models(
            teachers,
            batches,
            task,
            metrics=metrics,
            language=is_stream(data),
            tick=tick,
            **options,
        )
    report.unit = unit_of(data)
    report.classes = names_of_classes(dls, len(report.counts))
    learners = {k: o for k, o in models.items() if isinstance(o, Learner)}
    report.notes += notes_on_ignored_labels(task, report.classes, learners)
    for k, o in teachers.items():
        if isinstance(o.model, TableEstimator) and options['seconds']:
            only = 'include' if o.model.frame is None else 'do not include predictions, only'
            report.notes.append(f'The times of {k} {only} finding the raw row of each encoded row.')
    for k, o in learners.items():
        of = report.models[k]
        of.kind = getattr(getattr(o, 'arch', None), '__name__', of.kind)
        of.history = history_of(o)
    return report


def notes_on_ignored_labels(task, classes, learners):
    """Yield notes about the ignored label, and about Learners that ignore a different one."""
    if task.kind != 'softmax':
        return
    mine = ignored_name(task, classes)
    if task.ignore_index != Task.ignore_index:
        yield f'Ignored in the scores of all models: {mine}.'
    for k, o in learners.items():
        theirs = ignored_name(task_of(o.loss_func, task.kind), vocab_of(o.dls))
        if theirs != mine:
            yield (
                f'The loss function of {k} ignores {theirs}, but the scores of all models ignore '
                f'{mine}.'
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
    # DataLoaders draw a random seed
    with RandomGuard(), closing(prepared(learn, some_batches(data, 1), 1, False)) as batches:
        y = next(((yb or (None,))[0] for _, yb in batches), None)
    if isinstance(y, Tensor) and not (y.is_floating_point() or y.dtype is torch.bool):
        return 'softmax'
    raise DistillError(
        'Neither a Learner nor the DataLoaders have a loss function, and the labels are not class '
        "numbers: pass loss_func=, or kind='sigmoid' or 'regression'."
    )


class MetricValues:
    """Computes fastai metrics for one model, using copies of the metrics."""

    def __init__(self, learn, metrics):
        self.learn, self.metrics = learn, copy.deepcopy(metrics)
        for m in self.metrics.values():
            m.reset()

    def add(self, xb, out, yb) -> None:
        now = copy.copy(self.learn)
        x, y = detuplify(xb), detuplify(yb)  # a Learner has these as properties
        vars(now).update(xb=xb, yb=yb, x=x, y=y, pred=out, training=False, to_detach=to_detach)
        for m in self.metrics.values():
            m.accumulate(now)

    def values(self):
        return {k: plain_number(m.value) for k, m in self.metrics.items()}


def metrics_of(models, learn, metrics):
    """Return a function that creates a new `MetricValues` for a model."""
    if metrics is None:
        found = [o.metrics for o in models.values() if isinstance(o, Learner)]
    else:
        found = [[mk_metric(m) for m in L(metrics)]]
    named = {}
    for ms in found:
        names = [m.name for m in ms]
        # e.g. F1 scores with different averages have the same name
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
    from rich.progress import MofNCompleteColumn, Progress

    console = console_for_bars() if progress and not rank() else None
    if console is None:
        yield lambda: None
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
