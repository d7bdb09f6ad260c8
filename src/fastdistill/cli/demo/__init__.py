"`fastdistill demo`: train a small model with and without a large teacher on real data, and measure the gain."

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, noop, set_seed
from rich.console import Console
from torch import nn

from ...base.outputs import DistillError, DistillWarning
from ...base.progress_bar import progress_bar
from ...evaluation.cost import timed_in_turns, wait_for
from ...fastai import soft_labels
from .picture import draw_results
from .results import ALONE, Results, Trained, closing, machine, n_params, opening, results_table
from .tasks import DemoTask, digits

__all__ = ['Results', 'run']

BATCH_SIZES = 1, 64  # batch sizes for which times are measured
# ways to train the same small model
WAYS = {ALONE: None, 'distilled': 'auto', 'soft labels only': soft_labels(T=4)}


class Ticks(Callback):
    """Callback that calls `tick` after each training batch."""

    def __init__(self, tick: Callable[[], Any]):
        self.tick = tick

    def after_batch(self) -> None:
        if self.training:
            self.tick()


def run(
    seeds: int = 5,
    out: Path | str = 'out',
    quick: bool = False,
    console: Console | None = None,
) -> Results:
    """Train a teacher, then small students with and without the teacher. Print a table, and save a
    picture and the numbers.

    Args:
        seeds: Number of students to train in each way.
        out: Folder for the picture and the numbers.
        quick: If True, train only a few steps with one seed, to test that everything works.
        console: Console to print to. None for the terminal.
    """
    if seeds < 1:
        raise DistillError(
            f'seeds={seeds}: at least 1 student of each kind is needed, or 2 for a standard deviation'
        )
    console, start, out = console or Console(), time.perf_counter(), Path(out)
    task = digits()
    if quick:
        task, seeds = task.quick(), 1
    console.print(opening(task, seeds))
    with one_thread(), progress_bar(not console.quiet, 'of the steps') as show:
        teacher, students = train_all(task, seeds, show)
        ms = latency(
            task, 0.05 if quick else 1.0, teacher=teacher.model, student=students[ALONE][0].model
        )
    r = Results(
        task.title,
        n=(len(task.train[0]), len(task.test[0])),
        steps=task.steps,
        teacher=teacher.score,
        scores={way: [s.score for s in ss] for way, ss in students.items()},
        params=dict(teacher=n_params(teacher.model), student=n_params(students[ALONE][0].model)),
        ms=ms,
        seconds=time.perf_counter() - start,
        machine=machine(),
        recipes={way: ss[0].recipe for way, ss in students.items() if ss[0].recipe},
    )
    out.mkdir(parents=True, exist_ok=True)
    picture, numbers = out / 'demo-digits.png', out / 'demo-digits.json'
    draw_results(r, task, teacher, students, picture)
    r.save(numbers)
    console.print(results_table(r), closing(r, picture, numbers), sep='\n')
    return r


def train_all(
    task: DemoTask, seeds: int, show: Callable
) -> tuple[Trained, dict[str, list[Trained]]]:
    """Train the teacher, and students in each way. Return (teacher, {way: students}). After each
    step, show(name of the model, fraction of all steps) is called.
    """
    total, steps = task.steps[0] + seeds * len(WAYS) * task.steps[1], count(1)
    tick = lambda name: lambda: show(name, next(steps) / total)
    of_teacher, of_student = zip(task.epochs, task.lr)
    teacher = train(task, task.teacher, *of_teacher, 0, tick('teacher'))
    students: dict[str, list[Trained]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way, recipe in WAYS.items():
            students[way].append(
                train(task, task.student, *of_student, seed, tick(way), teacher.learn, recipe)
            )
    return teacher, students


def train(
    task: DemoTask,
    model: Callable[[], nn.Module],
    n_epoch: int,
    lr: float,
    seed: int,
    tick: Callable[[], Any],
    teacher: Any = None,
    recipe: Any = None,
) -> Trained:
    """Train a new model with or without a teacher. With the same seed, all students start from the
    same weights and get the same batches.
    """
    set_seed(seed)
    learn = Learner(task.dls(), model(), loss_func=CrossEntropyLossFlat(), cbs=Ticks(tick))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        # hide warnings about a rising task loss, because the table shows the student's score
        warnings.simplefilter('ignore', DistillWarning)
        cb = (
            learn.distill(teacher, n_epoch, lr, recipe, check=False)
            if recipe
            else learn.fit_one_cycle(n_epoch, lr)
        )
        out, y = learn.get_preds(act=noop)
    score = (out.argmax(1) == y).double().mean().item()
    return Trained(learn, out, score, str(cb.recipe) if recipe == 'auto' else '')


def latency(task: DemoTask, seconds: float, **models: nn.Module) -> dict[str, dict[int, float]]:
    """Measure the median time of a forward pass in milliseconds, for each model and batch size.

    Args:
        task: Task whose test images are used.
        seconds: Duration of each measurement in seconds.
        **models: Models by name.
    """
    x = task.test[0]
    ms: dict[str, dict[int, float]] = {name: {} for name in models}
    for n in BATCH_SIZES:
        x_on = lambda m, n=n: x[:n].to(next(m.parameters()).device)
        calls = {name: partial(m.eval(), x_on(m)) for name, m in models.items()}
        wait = wait_for(x_on(next(iter(models.values()))))
        for name, times in timed_in_turns(calls, seconds, wait).items():
            ms[name][n] = 1000 * median(times)
    return ms


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager that limits PyTorch to one thread. On two cores, small models run faster with
    one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
