"""Define terms, which compare student and teacher with one loss each, and recipes, which combine
terms.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from torch import Tensor, nn

from ..base.outputs import DistillError, Outputs
from ..base.task import labels_loss, task_for
from ..features.layer_pairs import LayersLike, checked_layers
from ..features.projectors import ProjectorLike, checked_projector
from .recipe_loss import RecipeLoss
from .schedule import Scheduled, ScheduleLike, schedule, value_at

SCHEDULED = 'T', 'lam'  # loss options that may follow a schedule


class Term:
    """One comparison of student and teacher, with a loss, a weight, and the layers to compare (by
    default, the logits).

    Args:
        loss: fn(student, teacher, *targets, **options): a function or module of
            `fastdistill.losses`, or your own function.
        weight: Number or schedule (see `fastdistill.recipes.schedule`). 1 if neither `weight` nor
            `grad_ratio` is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the tensors the term compares. A ratio of 1 makes both
            norms equal. Number or schedule. See `GradientRatio`.
        fade: Gain below which the gradient ratio falls in proportion to the gain, from 0 to 1. The
            gain is the fraction of the student's squared error that the teacher's predictions can
            remove (see `TeacherGain`). With 1, the gradient ratio is multiplied by the gain. With 0,
            it never falls. The other losses are scaled up to make up for the lost gradient.
        layers: {'student.name': 'teacher.name'}, pairs of names, 'auto', 'last' or 'embedding' (see
            `fastdistill.pairs`). None to compare the logits.
        match: What must be equal in the layers of both models: 'shape', 'grid' (positions) or
            'none'. None for the value that the loss declares (see `losses.loss`), or 'shape' if the
            loss declares no value.
        projector: Projector that maps the student's features to the teacher's shape, if the loss
            requires equal shapes. One of 'auto', 'linear', 'conv', 'conv_bn', 'mlp', or a module.
        stop_at: Training progress (0 to 1) at which the weight of the term becomes 0.
        name: Name of the term and of its column in the training log. None for the name of the loss.
        **options: Options of the loss. `T` and `lam` may follow a schedule, e.g. T=('linear', 8,
            1). `temperature` is an alias of `T`.
    """

    def __init__(
        self,
        loss: Callable,
        weight: ScheduleLike | None = None,
        *,
        grad_ratio: ScheduleLike | None = None,
        fade: float = 0.0,
        layers: LayersLike | None = None,
        match: str | None = None,
        projector: ProjectorLike = 'auto',
        stop_at: float | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if not callable(loss):
            raise DistillError(
                f'A term needs a loss function, got {loss!r}. See fastdistill.losses for the '
                'available ones.'
            )
        self.loss = loss
        self.layers = None if layers is None else checked_layers(layers)
        self.stop_at = stop_at
        self.projector = checked_projector(projector)
        fn, ps = signature(loss)
        self.name: str = checked_name(name or str(getattr(fn, '__name__', type(fn).__name__)))
        if weight is not None and grad_ratio is not None:
            raise DistillError(
                f'weight={weight!r} and grad_ratio={grad_ratio!r} of {self.name}: give only one '
                'of them. A weight multiplies the loss; a gradient ratio sets how large its '
                'gradient norm is relative to that of the task loss.'
            )
        self.has_grad_ratio = grad_ratio is not None
        if fade and not self.has_grad_ratio:
            raise DistillError(
                f'fade={fade!r} of {self.name} lowers its gradient ratio: give it grad_ratio= '
                'instead of a weight.'
            )
        if not (isinstance(fade, int | float) and 0 <= fade <= 1):
            raise DistillError(f'fade={fade!r} of {self.name}: must be a number from 0 to 1')
        self.fade = float(fade)
        how_much = weight if grad_ratio is None else grad_ratio
        self.weight = schedule(1.0 if how_much is None else how_much, f'weight of {self.name}')
        if self.has_grad_ratio and not callable(self.weight) and not 0 <= self.weight < math.inf:
            raise DistillError(
                f'grad_ratio={grad_ratio!r} of {self.name}: must be a number of at least 0. 0.1 '
                'is a small gradient compared with the task loss, 1 is equal to it, 3 is large.'
            )
        args = [p for p in ps if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.accepts = {p.name for p in ps if p.kind is p.KEYWORD_ONLY}
        self.defaults = {p.name: p.default for p in ps if p.kind is p.KEYWORD_ONLY}
        # number of targets that the loss takes; None if the loss takes any number of targets
        self.n_targets: int | None = sum(p.default is p.empty for p in args[2:])
        if any(p.kind is p.VAR_POSITIONAL for p in ps):
            self.n_targets = None
        named = self.accepts | {p.name for p in args[2:]}
        options = with_short_name(options, named)
        if (wrong := set(options) - named) and not any(p.kind is p.VAR_KEYWORD for p in ps):
            raise DistillError(
                f'{self.name} has no option {", ".join(sorted(wrong))}. It has: '
                f'{", ".join(sorted(named)) or "none"}'
            )
        self.options = {k: option_schedule(k, v) for k, v in options.items()}
        if match not in (None, 'shape', 'grid', 'none'):
            raise DistillError(
                f"match={match!r}: must be 'shape', 'grid' or 'none' (what must be equal in the "
                f'layers that {self.name} compares)'
            )
        self.kind = getattr(fn, 'kind', None)
        self.lists = getattr(fn, 'lists', False)
        self.samples = getattr(fn, 'samples', False)
        self.relates = getattr(fn, 'relates', False)
        self.positionwise = getattr(fn, 'positionwise', False)
        self.linear = getattr(fn, 'linear', False)
        self.match = match or getattr(fn, 'match', 'shape')

    def __add__(self, other: 'Term | Recipe') -> 'Recipe':
        return Recipe(self) + other

    def __repr__(self) -> str:
        of = f', layers={self.layers!r}' if self.layers is not None else ''
        how = 'grad_ratio' if self.has_grad_ratio else 'weight'
        fade = f', fade={self.fade:g}' if self.fade else ''
        options = ''.join(f', {k}={v!r}' for k, v in self.options.items())
        return f'Term({self.name}, {how}={self.weight!r}{fade}{of}{options})'

    def weight_at(self, progress: float | None) -> float:
        """Return the weight, or the gradient ratio, at the given training progress.

        Args:
            progress: Progress of the training, from 0 to 1.
        """
        if self.stop_at is not None:
            if value_at(lambda p: p, progress, f'The end of {self.name}') >= self.stop_at:
                return 0.0
        return value_at(self.weight, progress, f'The weight of {self.name}')

    @property
    def temperature(self) -> float | None:
        """Temperature at the beginning of the training. None if the loss has no temperature."""
        T = {**self.held, **self.options}.get('T', self.defaults.get('T'))
        return None if T is None else value_at(T, 0.0, 'T')

    @property
    def compares_logits(self) -> bool:
        """True if the loss compares the logits themselves, not probabilities."""
        return self.kind is None and self.temperature is None

    @property
    def scheduled_temperature(self) -> bool:
        """True if the temperature changes during the training."""
        return callable(self.options.get('T'))

    @property
    def held(self) -> dict:
        """Options that are already set in the loss, if it is a `Loss` module or a
        `functools.partial`.
        """
        return getattr(self.loss, 'options', getattr(self.loss, 'keywords', {}))

    def channels(self, t: Tensor) -> dict[str, int]:
        """Return {'axis': -1} for tokens (B, L, D), whose channels are on the last axis. Return {}
        for other features.
        """
        own = {**self.options, **self.held}
        tokens = self.layers is not None and t.dim() == 3
        return {'axis': -1} if tokens and 'axis' in self.accepts - own.keys() else {}

    def options_at(self, progress: float | None, context: dict) -> dict:
        """Return the options with which the loss is called. `context` contains options that depend
        on the batch, such as class axis and mask. Options that the loss does not accept are left
        out.
        """
        own = {
            k: value_at(v, progress, k) if k in SCHEDULED else v for k, v in self.options.items()
        }
        return {
            **{k: v for k, v in context.items() if k in self.accepts and k not in self.held},
            **own,
        }


def signature(loss: Callable) -> tuple[Callable, Collection[inspect.Parameter]]:
    """Return the function that a module or partial wraps, and its parameters."""
    fn = loss
    while isinstance(fn, partial):
        fn = fn.func
    fn = getattr(fn, 'fn', fn)
    inner = inspect.unwrap(fn)
    given = inner.forward if isinstance(inner, nn.Module) else inner
    if isinstance(loss, partial):
        given = loss
    try:
        return fn, inspect.signature(given).parameters.values()
    except ValueError:
        return fn, ()  # builtins have no signature, so they are called only with the two tensors


def one_temperature(
    T: ScheduleLike | None,  # None if it was not given
    temperature: ScheduleLike | None,  # alias of `T`; None if it was not given
) -> ScheduleLike | None:
    if T is not None and temperature is not None:
        raise DistillError(
            f'T={T} and temperature={temperature}: these are two names for the same option; give '
            'only one of them'
        )
    return T if temperature is None else temperature


P = ParamSpec('P')
R = TypeVar('R', covariant=True)


class WithTemperature(Protocol[P, R]):
    """Type of a function that also accepts `temperature` as an alias of `T`."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, *args: Any, temperature: ScheduleLike | None, **kwargs: Any) -> R: ...


def long_name_too(recipe: Callable[P, R]) -> WithTemperature[P, R]:
    """Make a recipe accept `temperature` as an alias of `T`. Many libraries use the long name."""
    sig = inspect.signature(recipe)
    make = cast(Callable[..., R], recipe)

    @functools.wraps(recipe)
    def call(*args: Any, temperature: ScheduleLike | None = None, **kwargs: Any) -> R:
        if temperature is None:
            return make(*args, **kwargs)
        T = one_temperature(sig.bind_partial(*args, **kwargs).arguments.get('T'), temperature)
        return make(*args, **kwargs, T=T)

    return cast(WithTemperature[P, R], call)


def with_short_name(options: dict, named: Collection[str]) -> dict:
    """Rename the option `temperature` to `T`, unless the loss has its own option `temperature`.

    Args:
        options: Options of a term.
        named: Names of the options of the loss.
    """
    if 'temperature' not in options or 'temperature' in named or 'T' not in named:
        return options
    rest = {k: v for k, v in options.items() if k != 'temperature'}
    return {**rest, 'T': one_temperature(options.get('T'), options['temperature'])}


def option_schedule(name: str, v: Any) -> Any:
    """Convert an option to a number or schedule if it may follow a schedule. Return other options
    unchanged.
    """
    if name == 'T':
        return temperature_schedule(v)
    return schedule(v, name) if name in SCHEDULED else v


def temperature_schedule(T: ScheduleLike) -> Scheduled:
    """Convert a temperature to a number or schedule. The temperature must be above 0 at both ends
    of the training, because the last validation runs at progress 1.
    """
    T = schedule(T, 'T')
    for progress, when in ((0.0, 'beginning'), (1.0, 'end')):
        if (v := value_at(T, progress)) > 0:
            continue
        at = f' at the {when} of the training' if callable(T) else ''
        raise DistillError(
            f'T={v:g}{at}: a temperature must be a number above 0 (1 leaves the logits as they are, 2 to 8 '
            'soften them)'
        )
    return T


def checked_name(name: str) -> str:
    """Return `name` if a term can have this name. The name is also used for a column and for the
    saved state.
    """
    if name == 'task' or '.' in name or hasattr(nn.ModuleDict, name):
        raise DistillError(
            f"A term can't be named {name!r}, which already has a meaning. Give it a different "
            "name: Term(..., name='...')"
        )
    return name


def weight_text(v: Scheduled) -> str:
    """Format a weight or schedule for messages: 0.1 instead of 0.09999999999999998."""
    return repr(float(f'{v:.12g}')) if isinstance(v, float) else repr(v)


class Recipe:
    """Terms whose weighted sum is added to the weighted task loss.

    Args:
        *terms: Terms or Recipes.
        task: Weight of the task loss, a number or schedule. None for the weight given by the
            recipes in `terms`, or else 1.
    """

    def __init__(self, *terms: 'Term | Recipe', task: ScheduleLike | None = None) -> None:
        self.terms: list[Term] = []
        said = [] if task is None else [schedule(task, 'task')]
        for o in terms:
            if not isinstance(o, (Term, Recipe)):
                raise DistillError(
                    f'A recipe is made of terms and recipes, got {o!r}. Try kd(), or Term(losses.kl, '
                    'weight=.5).'
                )
            if task is None and isinstance(o, Recipe) and o.task is not None:
                said.append(o.task)
            for t in [o] if isinstance(o, Term) else o.terms:
                self._add(t)
        if any(o != said[0] for o in said):
            raise DistillError(
                'These recipes give the task loss different weights '
                f'({" and ".join(map(weight_text, said))}): give them the same alpha, or set the '
                'weight once, as in Recipe(kd(), hard_labels(), task=.1).'
            )
        self.task: Scheduled | None = said[0] if said else None

    def _add(self, t: Term) -> None:
        names = {u.name for u in self.terms}
        if t.name in names:
            t = copy.copy(t)
            t.name = next(n for i in range(2, 99) if (n := f'{t.name}_{i}') not in names)
        self.terms.append(t)

    def __add__(self, other: 'Term | Recipe') -> 'Recipe':
        return Recipe(self, other)

    def how_to_lower(self, name: str) -> str:
        """Describe which option of a term to lower, so that the labels have more effect.

        Args:
            name: Name of the term.
        """
        t = next(t for t in self.terms if t.name == name)
        if self.task == 0:
            return 'Use a recipe that also learns from the labels, such as kd(alpha=.5)'
        now = f' of {name}' + ('' if callable(t.weight) else f', now {t.weight:.4g}')
        if t.has_grad_ratio:
            return f'Use a smaller grad_ratio{now}'
        task = 1.0 if self.task is None else value_at(self.task, 0.0, 'The weight of the task loss')
        what = 'alpha' if abs(t.weight_at(0.0) + task - 1) < 1e-6 else 'weight'
        return f'Use a smaller {what}{now}' + (', or a smaller T' if 'T' in t.options else '')

    def __call__(
        self,
        s: Tensor,
        t: Tensor,
        *targets: Tensor,
        task_loss: Callable | None = None,
        progress: float | None = None,
        mask: Tensor | None = None,
        kind: str | None = None,
        axis: int | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        """Compute the total loss of one batch from the logits of both models, e.g. kd(T=4,
        alpha=.9)(s, t, y).

        Args:
            s: Student logits.
            t: Teacher logits.
            *targets: Labels, if the recipe uses them.
            task_loss: fn(s, *targets). None for the usual loss of this `kind`.
            progress: Progress of the training, from 0 to 1, for schedules.
            mask: Positions to include.
            kind, axis, ignore_index: As in `Distiller`.
        """
        task = task_for(task_loss, kind, axis, ignore_index)
        loss = RecipeLoss(self, task)
        loss.measures = False
        own = partial(labels_loss, task=task) if task_loss is None else task_loss
        value = own(s, *targets) if targets else None
        return loss.compute(
            Outputs(s, mask=mask), Outputs(t), value, targets, progress=progress
        ).total

    def __repr__(self) -> str:
        task = weight_text(1.0 if self.task is None else self.task)
        return f'Recipe({", ".join(map(repr, self.terms))}, task={task})'

    def task_at(self, progress: float | None) -> float:
        return 1.0 if self.task is None else value_at(self.task, progress, "The task's weight")

    def weights_at(self, progress: float | None) -> dict[str, float]:
        """Return {name: weight or gradient ratio} of each loss at the given training progress. The
        task loss is named 'task'.
        """
        return dict(
            task=self.task_at(progress), **{t.name: t.weight_at(progress) for t in self.terms}
        )
