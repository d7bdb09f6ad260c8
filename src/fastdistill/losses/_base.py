"""Code shared by all losses: the `@loss` decorator, shape checks, masks, reductions, and the `Loss`
module.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import DistillError, check_choice
from ..base.outputs import Draws, LinearLogits, as_plain


def _full(x: Any, detach: bool = False) -> Any:
    """Convert a tensor or a list of tensors to float32. Tensors of dtype float64 stay float64."""
    if isinstance(x, (list, tuple)):
        return [_full(o, detach) for o in x]
    if isinstance(x, (LinearLogits, Draws)):
        return x.map(lambda o: _full(o, detach))
    if not isinstance(x, Tensor):
        return x
    x = as_plain(x)
    if x.is_floating_point() and x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    return x.detach() if detach else x


LossFn = TypeVar('LossFn', bound=Callable)  # the function that `@loss` decorates
KINDS = 'softmax', 'sigmoid', 'regression'


def loss(
    kind: str | None = None,
    match: str = 'shape',
    lists: bool = False,
    samples: bool = False,
    relates: bool = False,
    positionwise: bool = False,
    linear: bool = False,
) -> Callable[[LossFn], LossFn]:
    """Decorate `fn(s, t, ...)` as a loss, e.g. `@loss(match='grid')`.

    The decorated loss runs in float32 or float64, even under autocast, and passes no gradient to
    the teacher. The options are stored as attributes of the function, where `Term` reads them.

    Args:
        kind: Kind of outputs that the loss compares: 'softmax', 'sigmoid' or 'regression'. None for
            any kind.
        match: What student and teacher features must have in common: 'shape', 'grid' (only the
            positions) or 'none'.
        lists: True if the loss takes the features of all layers at once, as two lists.
        samples: True if `mask` has one value per sample instead of one per position.
        relates: True if the loss compares samples with each other. In distributed training, each
            process then sees the samples of all processes.
        positionwise: True if the loss accepts `LinearLogits` (hidden states and output layer), from
            which it computes logits in chunks.
        linear: True if the loss is linear in the teacher's probabilities and accepts `Draws`
            (sampled classes).
    """
    options = dict(locals())
    if callable(kind):
        raise DistillError(
            'loss is a decorator with options: write @loss() above your function, or '
            "@loss(match='grid')"
        )
    check_choice('kind', kind, (None, *KINDS))
    check_choice('match', match, ('shape', 'grid', 'none'))

    def decorate(fn: LossFn) -> LossFn:
        @functools.wraps(fn)
        def call(s: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
            first = s[0] if isinstance(s, (list, tuple)) else s
            with torch.autocast(first.device.type, enabled=False):
                return fn(_full(s), _full(t, detach=True), *args, **kwargs)

        vars(call).update(options)
        return cast(LossFn, call)

    return decorate


def fit_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand `mask` to this shape, as a plain tensor. Raise a DistillError if the mask does not
    fit.
    """
    if mask.dim() > len(shape) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1])
    ):
        raise DistillError(
            f'A mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(shape)}: a mask '
            'has one number or bool per value. For logits, it has their shape without the class axis'
        )
    return as_plain(mask).expand(shape)


def reduce(v: Tensor, reduction: str = 'mean', mask: Tensor | None = None) -> Tensor:
    """Reduce `v` over the included positions. If the mask excludes all positions, the result is 0
    (not nan) and still has a gradient.

    Args:
        v: One value per position.
        reduction: 'mean' over the included positions, 'sum', or 'none'.
        mask: True, or a positive weight, for included positions. Must broadcast to the shape of
            `v`.
    """
    check_choice('reduction', reduction, ('mean', 'sum', 'none'))
    if mask is not None:
        mask = fit_mask(mask, v.shape).to(v.dtype)
        # subtle: use `where` instead of a product, because a masked position may contain inf, and 0
        # * inf is nan
        v = torch.where(mask > 0, v, 0.0) * mask
    if reduction == 'none':
        return v
    if reduction == 'sum':
        return v.sum()
    return v.mean() if mask is None else v.sum() / mask.sum().clamp_min(torch.finfo(v.dtype).eps)


def same_shape(s: Tensor, t: Tensor) -> None:
    """Raise a DistillError if the shapes differ. PyTorch would otherwise broadcast them silently."""
    if s.shape != t.shape:
        raise DistillError(
            f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: they "
            'must be equal. If the teacher has more classes, Teacher(teacher, select=[...]) selects '
            "the student's classes, in its order. If it has fewer, write a loss that compares only "
            'those: Term(lambda s, t: losses.kl(s[:, ids], t)). If the resolutions differ, resize one '
            'of them.'
        )


def temperature(T: float) -> float:
    """Return `T` if it is a valid temperature."""
    if not T > 0:
        raise DistillError(
            f'T={T}: a temperature must be a number above 0. T=1 does not change the logits, 2 to 8 soften '
            'them'
        )
    return T


def at_temperature(x: Tensor, T: float) -> Tensor:
    """Return `x/T`. If T is 1, `x` is not copied."""
    return x if temperature(T) == 1 else x / T


def class_axis(x: Tensor, axis: int) -> int:
    """Return `axis` as a non-negative index. Raise a DistillError if `x` has no such axis."""
    if not -x.dim() <= axis < x.dim():
        raise DistillError(f'axis={axis}: outputs of shape {tuple(x.shape)} have no such axis')
    return axis % x.dim()


def log_probs(x: Tensor, T: float = 1.0, axis: int = 1) -> Tensor:
    """Compute the log-softmax of `x/T` over the class axis."""
    return F.log_softmax(at_temperature(x, T), class_axis(x, axis))


def expect(lp: Tensor, v: Tensor) -> Tensor:
    """Compute `exp(lp)*v`. The result is 0 where the probability is 0, even if `v` is infinite."""
    zero = lp == -torch.inf
    return lp.exp() * v.masked_fill(zero, 0.0)


def channels_first(x: Tensor, axis: int = 1) -> Tensor:
    """Move the channel axis of `x` to axis 1."""
    if x.dim() < 2 or not -x.dim() <= axis < x.dim() or axis % x.dim() == 0:
        raise DistillError(
            f'axis={axis}: features of shape {tuple(x.shape)} have no such channel axis. Axis 0 is the '
            'batch; channels are on axis 1 in vectors and maps, on axis -1 in tokens (B, L, D)'
        )
    return x.movedim(axis, 1)


def cells(x: Tensor, axis: int = 1) -> Tensor:
    """Reshape `x` to (B, C, P), where P is the number of positions. A vector has one position."""
    x = channels_first(x, axis)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def unit(x: Tensor, axis: int = 1, least: Tensor | float = 0.0) -> Tensor:
    """Scale vectors to length 1 along `axis`. Zero vectors stay zero and get no gradient. With
    `F.normalize`, the gradient of a zero vector would be multiplied by 1e12.

    Args:
        least: Vectors of at most this length are treated as zero.
    """
    n = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return x / n.masked_fill(n <= least, torch.inf)


class Loss(nn.Module):
    """Module form of a loss function. The module contains only the function and its options.

    Args:
        fn: A function of `fastdistill.losses`, or your own function with keyword-only options.
        **options: Options of the function.

    Example:
        >>> criterion = losses.Loss(losses.kl, T=2.0)
        >>> criterion(s, t)
    """

    def __init__(self, fn: Callable, **options: Any) -> None:
        super().__init__()
        have = [
            p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        if wrong := set(options) - set(have):
            raise TypeError(
                f'{getattr(fn, "__name__", fn)} has no option {", ".join(sorted(wrong))}. It has: '
                f'{", ".join(have)}'
            )
        self.fn = fn
        self.options = options

    @property
    def kind(self) -> str | None:
        """Kind of outputs that the loss compares: 'softmax' over classes, 'sigmoid' per label or
        'regression'. None for any kind.
        """
        return getattr(self.fn, 'kind', None)

    def forward(self, s: Any, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.fn(s, t, *args, **{**self.options, **kwargs})

    def option(self, name: str) -> Any:
        """Return the value of an option, or the function's default if the option was not given."""
        return self.options.get(name, inspect.signature(self.fn).parameters[name].default)

    def prepare(
        self, s: Tensor, t: Tensor, layer: nn.Module | None = None, axis: int | None = None
    ) -> None:
        """Create the tensors that the loss owns. A `Distiller` calls this method once, before the
        training, with projected student features, teacher features and the teacher's layer.
        """

    def extra_repr(self) -> str:
        options = [f'{k}={v!r}' for k, v in self.options.items()]
        if not inspect.isfunction(self.fn):
            options = [repr(self.fn), *options]
        elif type(self) is Loss:
            options = [self.fn.__name__, *options]
        return ', '.join(options)
