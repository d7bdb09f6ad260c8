"A number that may change during training: a weight, a temperature."

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from numbers import Real

from ..base.outputs import DistillError

__all__ = ['Schedule', 'rest_of', 'schedule', 'value_at']

NAMES = dict(
    linear=lambda p: 1 - p,  # from `start` to `end` along a line
    cosine=lambda p: (1 + cos(pi * p)) / 2,  # from `start` to `end` along half a cosine
    warmup=lambda p: 1 - min(p / 0.1, 1),  # from `start` to `end` in the first tenth, then flat
)


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` while training progress goes from 0 to 1.

    Attributes:
        name: 'linear', 'cosine' or 'warmup'.
    """

    name: str
    start: float
    end: float

    def __call__(self, progress):
        return self.end + (self.start - self.end) * NAMES[self.name](progress)


def schedule(v, what: str = 'value'):
    """`v` as a number or a function of progress. One of:

    - a number;
    - a function of progress from 0 to 1, such as fastai's `SchedCos(.9, .1)`;
    - a name: 'linear' and 'cosine' go from 1 to 0, 'warmup' goes from 0 to 1;
    - a name with its ends: ('cosine', start, end), ('warmup', end).

    Args:
        v: A number, a function of progress from 0 to 1, a name, or a name with its ends.
        what: Its name in errors.
    """
    if isinstance(v, Real):
        try:
            float(v)
        except OverflowError:
            raise DistillError(
                f'{what}= is a number of more than 300 digits: it must fit a float, '
                'as 4.0 or 1e3 do.'
            ) from None
        return v
    if callable(v):
        return v
    name, *ends = (
        (v,) if isinstance(v, str) else v if isinstance(v, (tuple, list)) and v else (None,)
    )
    if (
        not isinstance(name, str)
        or name not in NAMES
        or len(ends) > 2
        or not all(isinstance(o, Real) for o in ends)
    ):
        raise DistillError(
            f'{what}={v!r}: must be a number, a function of progress from 0 to 1, a name '
            f"({', '.join(NAMES)}), or a name with its ends, as ('cosine', 1., 0.) or ('warmup', 100.)"
        )
    if name == 'warmup':
        ends = [0.0, *ends] if len(ends) < 2 else ends
    start, end = (*ends, *((0.0, 1.0) if name == 'warmup' else (1.0, 0.0))[len(ends) :])
    return Schedule(name, start, end)


@dataclass(frozen=True)
class Rest:
    """1 - alpha, where alpha follows a schedule."""

    alpha: Callable

    def __call__(self, progress):
        return 1 - self.alpha(progress)

    def __repr__(self):
        return f'1-{self.alpha!r}'


def rest_of(alpha):
    return Rest(alpha) if callable(alpha) else 1 - alpha


def value_at(v, progress: float | None, what: str = 'value') -> float:
    """The number that `v` is at `progress`.

    Args:
        v: What `schedule` gave.
        progress: Share of the training that is done.
    """
    if not callable(v):
        return v
    if progress is None:
        raise DistillError(
            f'{what} follows a schedule: pass the progress of the training, as in distiller(x, y, '
            'progress=step/steps)'
        )
    return float(v(progress))
