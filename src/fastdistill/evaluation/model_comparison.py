"""Compare models in one pass over the samples. Each batch is passed to all models."""

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ..base.errors import DistillError, check_choice
from ..base.outputs import tensors_in
from ..base.random_state import guarded_random_state
from ..base.task import Task, fit_labels, unusable
from ..teachers.teacher import Teacher
from .agreement import agreement, agreement_sums
from .cost import batch_of, cost_of, latencies
from .metrics import MAX_PER_CLASS, Rows, auc_sums, measures_of, rows_of, scores_of
from .paired_tests import PairedScores
from .report import Report
from .report_data import Cost, ModelResult

PIECE = 2**25  # maximum number of output elements that are scored at once
MAX_NAMED = 1000  # with more classes, the report has no table of classes


def roles_of(
    names: Iterable[str], teacher: str | None = None, baseline: str | None = None
) -> tuple:
    """Return (name of the teacher, name of the baseline). A name is None if there is no such model.

    Args:
        names: Names of the models, in order.
        teacher: Name of the teacher. None for the model named 'teacher', if there is one.
        baseline: Name of the baseline. None for the model named 'alone'. If there is no such model,
            the first of several students is used.
    """
    names = list(names)
    for option, o in (('teacher', teacher), ('baseline', baseline)):
        if o is not None and o not in names:
            raise DistillError(
                f'{option}={o!r}: the models are named {", ".join(map(repr, names))}'
            )
    teacher = teacher or ('teacher' if 'teacher' in names else None)
    students = [n for n in names if n != teacher]
    if baseline is None and len(students) > 1:
        baseline = 'alone' if 'alone' in students else students[0]
    if teacher is not None and teacher == baseline:
        raise DistillError(
            f'{teacher!r} is both teacher= and baseline=: they must be different models'
        )
    return teacher, baseline


class OfModel:
    """Sums over samples for one model, accumulated over batches."""

    def __init__(self, kind: str, loss: Callable | None, metrics: Any) -> None:
        self.kind, self.loss_func, self.metrics = kind, loss, metrics
        self.scores: dict[str, list[np.ndarray]] = {}
        self.sums: dict[str, Any] = dict(bins=0.0, totals=0.0)  # tensors after the first batch
        self.agreement: Counter = Counter()  # sums over batches
        self.loss, self.n = 0.0, 0

    def add_batch(self, xb: Sequence, out: torch.Tensor, yb: Sequence) -> None:
        """Add the task loss and the metrics of a batch."""
        if self.loss_func is not None:
            self.loss += float(self.loss_func(out, *yb)) * len(out)
        if self.metrics is not None:
            self.metrics.add(xb, out, yb)
        self.n += len(out)

    def add_rows(self, rows: Rows, teacher: Rows | None, per_class: bool) -> None:
        """Add the sums of each sample in a batch, and the agreement with the teacher on this batch."""
        for k, v in scores_of(rows, self.kind, per_class).items():
            if k in self.sums:
                self.sums[k] = self.sums[k] + v.cpu()
            else:
                self.scores.setdefault(k, []).append(v.cpu().numpy())
        if teacher is not None:
            self.agreement.update(agreement_sums(rows, teacher, self.kind))


def measure_models(
    models: dict,
    batches: Iterable,
    task: Task,
    *,
    teacher: str | None = None,
    baseline: str | None = None,
    loss: Callable | None = None,
    metrics: Callable[[], Any] | None = None,
    language: bool = False,
    headline: str | None = None,
    repeats: int = 2000,
    seed: int = 0,
    large: int = 64,
    seconds: float = 0.5,
    tick: Callable[[], None] | None = None,
) -> Report:
    """Measure all models on the same batches, which are read only once.

    Args:
        models: {name: `Teacher`}.
        batches: Iterable of (inputs, targets), both tuples.
        task: What the models predict.
        teacher: Name of the teacher, or None.
        baseline: Name of the model with which students are compared, or None.
        loss: fn(logits, *targets) -> task loss.
        metrics: fn() -> object with `add(inputs, logits, targets)` and `values()`. It is called
            once for each model.
        language: True for models that predict the next token.
        headline: Main measure, such as 'nll'. None for the default of the task.
        repeats: Number of bootstrap samples.
        seed: Seed of the bootstrap.
        large: Size of the large batch.
        seconds: Duration of each time measurement in seconds. 0 to skip these measurements.
        tick: fn(), called after each batch and after each time measurement.
    """
    tick = tick or (lambda: None)
    of = {k: OfModel(task.kind, loss, None if metrics is None else metrics()) for k in models}
    with guarded_random_state(), torch.no_grad(), ExitStack() as stack:
        for m in models.values():
            stack.enter_context(m).reset()
        first = None
        for xb, yb in batches:
            add_batch(of, models, xb, yb, task, teacher, language)
            if first is None:
                first = xb
            tick()
        if first is None:
            raise DistillError(
                'There is no batch to measure the models on: is the validation set empty?'
            )
        costs = {k: cost_of(m, batch_of(first, large)) for k, m in models.items()}
        if seconds:
            for k, v in latencies(models, first, dict.fromkeys((1, large)), seconds, tick).items():
                costs[k].latency = v
    scores = {k: {c: np.concatenate(v) for c, v in o.scores.items()} for k, o in of.items()}
    for v in scores.values():
        if 'margin' in v:
            v |= auc_sums(v.pop('margin'), v['positive'], v['n'])
    some = next(iter(of.values()))
    n_classes = some.sums['totals'].shape[1] if task.kind != 'regression' else 0
    measures = measures_of(task.kind, next(iter(scores.values())), n_classes, language)
    names = [m.name for m in measures]
    if headline is not None:
        check_choice('headline', headline, names)
    counts = [] if task.kind == 'regression' else some.sums['totals'][1].tolist()
    return paired_report(
        {k: result(o, costs[k], models[k].name) for k, o in of.items()},
        PairedScores(scores, measures, repeats, seed),
        teacher,
        baseline,
        task=task.kind,
        headline=headline or names[0],
        n=some.n,
        counts=counts if len(counts) <= MAX_NAMED else [],
        machine=machine_of(first),
    )


def add_batch(
    of: Mapping[str, OfModel],
    models: Mapping[str, Teacher],
    xb: Sequence,
    yb: Sequence,
    task: Task,
    teacher: str | None,
    language: bool,
) -> None:
    """Run every model on a batch and add its predictions."""
    outs: dict[str, Any] = {k: m(*xb).logits for k, m in models.items()}
    shape = next(iter(outs.values())).shape
    for k, o in outs.items():
        if o.numel() != shape.numel() or task.kind == 'softmax' and o.shape != shape:
            raise DistillError(
                f'The outputs of {k!r} have shape {tuple(o.shape)}, but the outputs of '
                f'{next(iter(outs))!r} have shape {tuple(shape)}: compared models must predict the '
                'same classes or values. Teacher(model, select=[...]) selects classes.'
            )
        if unusable(o, task):
            raise DistillError(
                f'The outputs of {k!r} are nan or infinite: did its training diverge?'
            )
        of[k].add_batch(xb, o, yb)
    y = fit_labels(yb[0], shape, task) if len(yb) and isinstance(yb[0], torch.Tensor) else None
    if y is None:
        given = ', '.join(str(tuple(o.shape)) for o in yb if isinstance(o, torch.Tensor)) or 'none'
        raise DistillError(
            f'The labels (shape {given}) do not fit the outputs of {next(iter(outs))!r} (shape '
            f'{tuple(shape)}): models must be compared on labeled samples of their task.'
        )
    size = max(1, PIECE * len(y) // shape.numel())
    for i in range(0, len(y), size):
        rows = {k: rows_of(o[i : i + size], y[i : i + size], task) for k, o in outs.items()}
        dense = (
            task.kind == 'softmax'
            and len(shape) > 2
            and not language
            and shape[task.axis] <= MAX_PER_CLASS
        )
        for k, r in rows.items():
            of[k].add_rows(r, None if teacher in (None, k) else rows.get(teacher), dense)


def paired_report(
    results: dict[str, ModelResult],
    paired: PairedScores,
    teacher: str | None,
    baseline: str | None,
    **options: Any,
) -> Report:
    """Build the report of models that were measured on the same samples. Each student is compared
    with the baseline, and each model with the teacher.

    Args:
        results: {model name: results without role and measures}.
        paired: Scores of the models.
        teacher: Name of the teacher, or None.
        baseline: Name of the baseline, or None.
        **options: Further attributes of the report.
    """
    for k, m in results.items():
        m.role = 'teacher' if k == teacher else 'baseline' if k == baseline else 'student'
        m.measures = paired.estimates(k)
    students = [k for k in results if k not in (teacher, baseline)]
    compared = [paired.compare(k, baseline, teacher) for k in students if baseline is not None]
    compared += [paired.compare(k, teacher) for k in results if teacher not in (None, k)]
    info = {k: m.info for k, m in paired.measures.items()}
    options |= dict(teacher=teacher, baseline=baseline)
    return Report(info=info, models=results, comparisons=compared, **options)


def result(o: OfModel, cost: Cost, kind: str) -> ModelResult:
    out = ModelResult(
        '',
        kind,
        o.loss / o.n if o.loss_func is not None else None,
        metrics={} if o.metrics is None else o.metrics.values(),
        agreement=agreement(o.agreement, o.kind),
        cost=cost,
    )
    if o.kind == 'regression':
        return out
    count, confidence, right = o.sums['bins']
    out.reliability = dict(
        count=count.tolist(), confidence=confidence.tolist(), right=right.tolist()
    )
    hit, there, found = o.sums['totals']
    if len(hit) > MAX_NAMED:
        return out
    ratio = lambda a, b: [x / y if y else None for x, y in zip(a.tolist(), b.tolist())]
    out.classes = dict(recall=ratio(hit, there), precision=ratio(hit, found))
    if 'union' in o.scores:
        out.classes['iou'] = ratio(hit, there + found - hit)
    return out


def machine_of(x: Any) -> dict:
    """Describe the machine and the package versions with which the times were measured."""
    device = next((t.device for t in tensors_in(x)), torch.device('cpu'))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        cores=os.cpu_count(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def cpu_name() -> str:
    """Return the name of the processor, or its type if the system does not provide a name."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            lines = f.read().splitlines()
    except OSError:
        lines = []
    named = next((l.partition(':')[2].strip() for l in lines if l.startswith('model name')), '')
    return named or platform.processor() or platform.machine()
