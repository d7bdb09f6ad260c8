"A number that may change during training, such as a weight or a temperature."

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from numbers import Real
from typing import Any

from ..base.outputs import DistillError

Scheduled = float | Callable[[float], float]  # a number, or a function of progress
ScheduleLike = Scheduled | str | Sequence[Any]  # all forms that `schedule` accepts

NAMES: dict[str, Callable[[float], float]] = dict(
    linear=lambda p: 1 - p,  # linearly from `start` to `end`
    cosine=lambda p: (1 + cos(pi * p)) / 2,  # from `start` to `end` along half a cosine
    # from `start` to `end` in the first 10% of the training, then constant
    warmup=lambda p: 1 - min(p / 0.1, 1),
)


@dataclass(frozen=True)
class Schedule:
    """A number that changes from `start` to `end` as training progress goes from 0 to 1.

    Attributes:
        name: 'linear', 'cosine' or 'warmup'.
    """

    name: str
    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * NAMES[self.name](progress)


def schedule(v: ScheduleLike, what: str = 'value') -> Scheduled:
    """Convert `v` to a number or a function of progress. `v` must be one of these:

    - a number;
    - a function of progress from 0 to 1, such as fastai's `SchedCos(.9, .1)`;
    - a name: 'linear' and 'cosine' go from 1 to 0, 'warmup' goes from 0 to 1;
    - a name with start and end: ('cosine', start, end), ('warmup', end).

    Args:
        v: A number, a function, a name, or a name with start and end, as above.
        what: Name of the value in error messages.
    """
    if isinstance(v, Real):
        try:
            float(v)
        except OverflowError:
            raise DistillError(
                f'{what}= has more than 300 digits: it must fit into a float, like 4.0 or 1e3.'
            ) from None
        return v
    if callable(v):
        return v
    parts: Sequence[Any] = (
        (v,) if isinstance(v, str) else v if isinstance(v, (tuple, list)) and v else (None,)
    )
    name, *ends = parts
    if (
        not isinstance(name, str)
        or name not in NAMES
        or len(ends) > 2
        or not all(isinstance(o, Real) for o in ends)
    ):
        raise DistillError(
            f'{what}={v!r}: must be a number, a function of progress from 0 to 1, a name '
            f"({', '.join(NAMES)}), or a name with start and end, such as ('cosine', 1., 0.) or "
            "('warmup', 100.)"
        )
    if name == 'warmup':
        ends = [0.0, *ends] if len(ends) < 2 else ends
    usual = (0.0, 1.0) if name == 'warmup' else (1.0, 0.0)
    start, end = list(ends) + list(usual[len(ends) :])
    return Schedule(name, start, end)


@dataclass(frozen=True)
class Rest:
    """The schedule 1 - alpha for an `alpha` that follows a schedule."""

    alpha: Callable

    def __call__(self, progress: float) -> float:
        return 1 - self.alpha(progress)

    def __repr__(self) -> str:
        return f'1-{self.alpha!r}'


def one_minus(alpha: Scheduled) -> Scheduled:
    return Rest(alpha) if callable(alpha) else 1 - alpha


def value_at(v: Scheduled, progress: float | None, what: str = 'value') -> float:
    """Evaluate `v` at `progress`.

    Args:
        v: A number or function, as returned by `schedule`.
        progress: Progress of the training, from 0 to 1.
    """
    if not callable(v):
        return v
    if progress is None:
        raise DistillError(
            f'{what} follows a schedule: pass the progress of the training, as in distiller(x, y, '
            'progress=step/steps)'
        )
    return float(v(progress))
