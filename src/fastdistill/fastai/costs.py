"""Measure the cost of training with a teacher: time per step, memory, and savings from a cache."""

import math
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from fastai.callback.fp16 import MixedPrecision

from ..base.random_state import guarded_random_state
from ..cache.row_layout import Layout, Store
from ..cache.writer import Forecast
from ..distiller.distiller import Distiller
from ..evaluation.cost import bytes_of, wait_for
from ..evaluation.number_format import amount, three_digits
from ..features.probe import dry_run, untouched
from ..recipes.term import Recipe
from ..teachers.members import modules_of, single_teachers
from .probe_batches import number_of_batches, prepared_batches

FEW_BATCHES, ROUNDS = 3, 5  # number of batches, and number of runs per batch
MEASURED_SECONDS = 3  # no measurement starts after this many seconds


@dataclass
class TrainingCosts:
    """Costs measured on a few training batches. Data loading and the optimizer are not included.

    Attributes:
        batch: Batch size.
        steps: Number of batches per epoch. None if unknown.
        alone: Seconds per step without a teacher.
        live: Seconds per step with the teacher.
        teacher: Seconds per batch that the teacher needs.
        weights: Size of the teacher's weights in bytes.
        copy: Size of the faster copy of the teacher in bytes. 0 if there is no faster copy.
        view: `Forecast` of one stored view of the training set. None if unknown.
        mixed: True if the fit uses mixed precision. The costs are measured without it.
    """

    batch: int
    steps: int | None
    alone: float
    live: float
    teacher: float
    weights: int
    copy: int
    view: Forecast | None
    mixed: bool = False

    def lines(self, n_epoch: int):
        """Yield (subject, text) for each cost.

        Args:
            n_epoch: Number of epochs of the training.
        """
        apart = ', measured without mixed precision' if self.mixed else ''
        yield (
            'step',
            (
                f'{duration(self.alone)} alone, {duration(self.live)} with the teacher '
                f'({self.live / self.alone:.2f} times): batches of {self.batch}, not including '
                f'data loading and the optimizer{apart}'
            ),
        )
        copy = f', its faster copy {amount(self.copy, "B")} more' if self.copy else ''
        yield 'memory', f"the teacher's weights take {amount(self.weights, 'B')}{copy}"
        if None in (self.steps, self.view):
            return
        epoch = self.steps * self.teacher
        yield 'cache', f'{self.view}; writing a view takes {duration(epoch)}'
        saved = (n_epoch - 1) * epoch
        yield (
            f'{n_epoch} epochs',
            (
                f'{duration(n_epoch * self.steps * self.live)} with the teacher. One stored view '
                f'saves {duration(saved)}, and {duration(n_epoch * epoch)} for each additional '
                'student'
            ),
        )


def duration(seconds):
    for size, unit in ((3600, 'h'), (60, 'min'), (1, 's')):
        if seconds >= 2 * size:
            return f'{three_digits(seconds / size)} {unit}'
    return f'{three_digits(1000 * seconds)} ms'


def training_costs(learn, teacher, task, recipe, output=None) -> TrainingCosts | None:
    """Measure costs on a few training batches.

    The Learner, the models and the random state are not changed.

    Args:
        learn: The student's Learner.
        teacher: A `Teacher`.
        task: What the student predicts.
        recipe: Recipe of the training.
        output: Which of the student's outputs is distilled, as in `Distiller`.

    Returns:
        The costs, or None if there are no batches with labels.
    """
    with guarded_random_state(), closing(prepared_batches(learn, 1, FEW_BATCHES)[1]) as train:
        batches = [b for b in train if len(b[1])]
    if not batches:
        return None
    options = dict(
        kind=task.kind, axis=task.axis, ignore_index=task.ignore_index, output=output, check=False
    )
    alone = Distiller(learn.model, None, Recipe(), task_loss=learn.loss_func, **options)
    live = Distiller(learn.model, teacher, recipe, task_loss=learn.loss_func, **options)
    x, last = batches[0][0], []
    with guarded_random_state(), in_training(learn.model, x), teacher:
        if not live.ready:
            live.setup(*x)
        for d in (alone, live):
            d.head.measures = False
        runs = dict(
            alone=lambda x, y: gradients(alone, x, y),
            live=lambda x, y: gradients(live, x, y),
            teacher=lambda x, y: last.__setitem__(slice(None), [live.teacher_outputs(x)]),
        )
        seconds = seconds_of_batches(runs, batches)
    layout = Layout.of(last[0], Store(axis=task.axis))
    n, steps = getattr(learn.dls.train, 'n', None), number_of_batches(learn.dls.train)
    view = None if n is None else Forecast(n, 1, layout.bytes, n * layout.bytes, None)
    return TrainingCosts(
        len(last[0].logits),
        steps,
        **seconds,
        weights=bytes_of(modules_of(teacher)),
        copy=sum(t.runner.copy_bytes for t in single_teachers(teacher)),
        view=view,
        mixed=any(isinstance(c, MixedPrecision) for c in learn.cbs),
    )


@contextmanager
def in_training(model, x):
    """Put the model into training mode and enable gradients. Restore its state at the end."""
    with untouched(model, training=True):
        yield
    # subtle: some hooks, such as those of a dynamic U-Net, keep the last activations. Tensors with
    # a gradient can't be copied, so replace these activations.
    dry_run(model, *x)


def gradients(distiller, x, y):
    """Compute the gradients of a batch without storing them."""
    total = distiller(x, *y).total
    torch.autograd.grad(
        total, [p for p in distiller.parameters() if p.requires_grad], allow_unused=True
    )


def seconds_of_batches(runs, batches):
    """Return {name: seconds per batch}.

    Each function is timed several times on each batch, and the fastest time is used. The runs of
    different functions are interleaved.
    """
    wait, best = wait_for(batches[0][0]), {k: {} for k in runs}
    for i in range(-1, ROUNDS * len(batches)):
        at = max(i, 0) % len(batches)
        for k, run in runs.items():
            wait()
            start = time.perf_counter()
            run(*batches[at])
            wait()
            if i >= 0:
                best[k][at] = min(time.perf_counter() - start, best[k].get(at, math.inf))
        if i < 0:
            end = time.perf_counter() + MEASURED_SECONDS  # the first batch is a warm-up
        elif time.perf_counter() > end:
            break
    return {k: fmean(v.values()) for k, v in best.items()}
