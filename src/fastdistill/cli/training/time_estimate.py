"Estimate how long a run takes, from a few training steps of each model."

import warnings
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from fastai.basics import Callback, CancelFitException

from ...base.errors import DistillError
from ...base.random_state import guarded_random_state
from ...evaluation.cost import wait_for
from ...fastai.probe_batches import restored_loaders
from .config import TrainConfig

MOST_STEPS, ENOUGH_TIME = 6, 1.5  # maximum steps of a model, and seconds after which no step begins
SLOW_STEP = 8  # if the first step takes this many seconds, there is no second step
MEASURED_STEPS = 20  # training runs with fewer steps are not measured
RATE_STEPS = 100  # maximum steps of a search for a learning rate
SHORT, LONG = 20, 600  # seconds below which nothing is printed, and above which there is advice
TIME_UNITS = (3600, 'hours'), (60, 'minutes'), (1, 'seconds')


class StepClock(Callback):
    """Callback that measures a few training steps and then cancels the fit.

    Attributes:
        steps: Seconds of each step, including loading its batch.
        loads: Seconds of loading the batch of each step.
    """

    order = 100  # run after all other callbacks

    def before_train(self) -> None:
        self.steps: list[float] = []
        self.loads: list[float] = []
        self.last = perf_counter()

    def before_batch(self) -> None:
        self.loads.append(perf_counter() - self.last)

    def after_batch(self) -> None:
        wait_for(self.xb)()
        now = perf_counter()
        self.steps.append(now - self.last)
        self.last = now
        first, *others = self.steps
        if len(others) == MOST_STEPS or sum(others) > ENOUGH_TIME or first > SLOW_STEP:
            raise CancelFitException


def measure_steps(learn: Any, *cbs: Any) -> tuple[float, float]:
    """Train a Learner for a few steps. Return (seconds per step, seconds to load a batch)."""
    clock = StepClock()
    with restored_loaders(*learn.dls.loaders), learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[*cbs, clock])
    typical = lambda values: median(values[1:] or values)  # the first step is a warm-up
    return typical(clock.steps), typical(clock.loads)


def time_in_words(
    c: TrainConfig, dls: Any, make: Callable, kd: Callable | None, size: Sequence[int] | None
) -> str:
    """Return a line that says how long training will take, or '' if this is unknown. The random
    state and the DataLoaders are not changed.

    Args:
        c: Settings of the run.
        dls: DataLoaders of the run.
        make: fn(Arch) -> a new Learner.
        kd: fn(student) -> callback that adds the teacher. None if its outputs will be stored.
        size: Height and width of images. None for other data.
    """
    if c.epochs * len(dls.train) < MEASURED_STEPS:
        return ''
    with guarded_random_state(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        measured = {}
        if not c.teacher_files:
            measured['teacher'] = measure_steps(make(c.arch('teacher')))
        measured['alone'] = measured['distilled'] = measure_steps(make(c.arch('student')))
        if kd is not None:
            student = make(c.arch('student'))
            try:
                measured['distilled'] = measure_steps(student, kd(student))
            except DistillError:
                return ''  # a teacher that is not trained yet may have infinite outputs
    # a validation step takes about half the time, because it computes no gradients
    epoch = len(dls.train) + len(dls.valid) / 2
    steps = dict(
        teacher=(c.teacher_epochs or c.epochs) * epoch + RATE_STEPS * (c.teacher_lr == 'auto'),
        alone=c.seeds * c.epochs * epoch * c.baseline + RATE_STEPS * (c.lr == 'auto'),
        distilled=c.seeds * c.epochs * epoch,
    )
    seconds = {k: step * steps[k] for k, (step, _) in measured.items() if steps[k]}
    total = sum(seconds.values())
    if total < SHORT:
        return ''
    loading = sum(load * steps[k] for k, (_, load) in measured.items())
    line = f'time: {amounts(seconds)}'
    return line if total < LONG else f'{line}; faster with {advice(seconds, loading, size)}'


def amounts(seconds: dict[str, float]) -> str:
    """Format the sum of these times and its parts in one unit."""
    total = sum(seconds.values())
    size, unit = next((o for o in TIME_UNITS if total >= 2 * o[0]), TIME_UNITS[-1])
    text = lambda v: f'{v / size:.{0 if v >= 10 * size or size == 1 else 1}f}'
    return f'about {text(total)} {unit} ({", ".join(f"{k} {text(v)}" for k, v in seconds.items())})'


def advice(seconds: dict[str, float], loading: float, size: Sequence[int] | None) -> str:
    """Return options that make a run faster.

    Args:
        seconds: {model: seconds of its training}.
        loading: Total seconds in which batches are loaded.
        size: Height and width of images. None for other data.
    """
    total = sum(seconds.values())
    if loading > total / 2:
        return '--workers 2 or smaller files, because loading and augmenting take most of the time'
    ways = ['fewer --epochs']
    if seconds.get('teacher', 0) > total / 2:
        ways.insert(0, 'a smaller --teacher')
    if size and min(size) >= 64:
        half = [o // 2 for o in size]
        ways.insert(0, f'--size {half[0] if half[0] == half[1] else "x".join(map(str, half))}')
    return f'{", ".join(ways[:-1])} or {ways[-1]}' if ways[1:] else ways[0]
