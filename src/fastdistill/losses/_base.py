"""What all losses share: precision, shapes, the mask, the reduction, and the module form of a
function.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.outputs import DistillError, as_plain

__all__ = [
    'Loss',
    'loss',
    'reduce',
    'fit_mask',
    'same_shape',
    'class_axis',
    'log_probs',
    'expect',
    'temperature',
    'channels_first',
    'cells',
    'unit',
]


def _full(x, detach=False):
    """`x` (a tensor, or a list of them) in float32 or better."""
    if isinstance(x, (list, tuple)):
        return [_full(o, detach) for o in x]
    if not isinstance(x, Tensor):
        return x
    x = as_plain(x)
    if x.is_floating_point() and x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    return x.detach() if detach else x


KINDS = 'softmax', 'sigmoid', 'regression'


def loss(
    kind: str | None = None,
    match: str = 'shape',
    lists: bool = False,
    samples: bool = False,
    relates: bool = False,
):
    """Make a loss of `fn(s, t, ...)`: `@loss(match='grid')`.

    The loss runs in float32 or better, also under autocast. No gradient reaches the teacher. The
    options become attributes, from which a `Term` reads what the loss needs.

    Args:
        kind: The logits that the loss is for: 'softmax', 'sigmoid', 'regression'; None: any.
        match: What student and teacher features must share: 'shape', 'grid' (positions only) or
            'none'.
        lists: True: the loss takes the features of all layers at once, as two lists.
        samples: True: the loss's `mask` has one value per sample, not per position.
        relates: True: the loss compares samples with each other. Of several processes that
            train together, all then compare the samples of all.
    """
    if callable(kind):
        raise DistillError(
            'loss is a decorator with options: write @loss() above your function, or '
            "@loss(match='grid')"
        )
    for o, v, have in (('kind', kind, (None, *KINDS)), ('match', match, ('shape', 'grid', 'none'))):
        if v not in have:
            raise DistillError(f'{o}={v!r}: must be one of {", ".join(map(repr, have))}')

    def decorate(fn):
        @functools.wraps(fn)
        def call(s, t, *args, **kwargs):
            first = s[0] if isinstance(s, (list, tuple)) else s
            with torch.autocast(first.device.type, enabled=False):
                return fn(_full(s), _full(t, detach=True), *args, **kwargs)

        call.kind, call.match, call.lists, call.samples, call.relates = (
            kind,
            match,
            lists,
            samples,
            relates,
        )
        return call

    return decorate


def fit_mask(mask: Tensor, shape):
    """`mask` as a plain tensor of this shape; refused if it does not fit."""
    if mask.dim() > len(shape) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1])
    ):
        raise DistillError(
            f'A mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(shape)}: a mask '
            'has one number or bool per value. For logits, it has their shape without the class axis'
        )
    return as_plain(mask).expand(shape)


def reduce(v: Tensor, reduction: str = 'mean', mask: Tensor | None = None):
    """Reduce `v` where `mask` counts; an empty mask gives 0 with a gradient, never nan.

    Args:
        v: One value per position.
        reduction: 'mean' over the positions that count, 'sum', or 'none'.
        mask: The shape of `v` (or one that broadcasts to it): True, or a weight, where a
            position counts.
    """
    if reduction not in ('mean', 'sum', 'none'):
        raise DistillError(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
    if mask is not None:
        mask = fit_mask(mask, v.shape).to(v.dtype)
        # subtle: where, not a product: 0*inf is nan, and a masked position may hold anything
        v = torch.where(mask > 0, v, 0.0) * mask
    if reduction == 'none':
        return v
    if reduction == 'sum':
        return v.sum()
    return v.mean() if mask is None else v.sum() / mask.sum().clamp_min(torch.finfo(v.dtype).eps)


def same_shape(s: Tensor, t: Tensor):
    """Refuse shapes that would broadcast silently."""
    if s.shape != t.shape:
        raise DistillError(
            f"The student's output has shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}: they "
            'must be equal. If the teacher has more classes, Teacher(teacher, select=[...]) selects '
            "the student's classes, in its order. If it has fewer, write a loss that compares only "
            'those: Term(lambda s, t: losses.kl(s[:, ids], t)). If the resolutions differ, resize one '
            'of them.'
        )


def temperature(T):
    """`T`, if it is a valid temperature."""
    if not T > 0:
        raise DistillError(
            f'T={T}: a temperature is a number above 0. T=1 does not change the logits, 2 to 8 soften '
            'them'
        )
    return T


def class_axis(x: Tensor, axis: int):
    """`axis` counted from the front, if `x` has it."""
    if not -x.dim() <= axis < x.dim():
        raise DistillError(f'axis={axis}: outputs of shape {tuple(x.shape)} have no such axis')
    return axis % x.dim()


def log_probs(x: Tensor, T: float = 1.0, axis: int = 1):
    """log softmax of `x/T` over the class axis."""
    return F.log_softmax(x / temperature(T), class_axis(x, axis))


def expect(lp: Tensor, v: Tensor):
    """`exp(lp)*v`, and 0 where the probability is 0 (`v` may be infinite there)."""
    zero = lp == -torch.inf
    return lp.exp() * v.masked_fill(zero, 0.0)


def channels_first(x: Tensor, axis: int = 1):
    """`x` with its channel axis moved to 1."""
    if x.dim() < 2 or not -x.dim() <= axis < x.dim() or axis % x.dim() == 0:
        raise DistillError(
            f'axis={axis}: features of shape {tuple(x.shape)} have no such channel axis. Axis 0 is the '
            'batch; channels are on axis 1 in vectors and maps, on axis -1 in tokens (B, L, D)'
        )
    return x.movedim(axis, 1)


def cells(x: Tensor, axis: int = 1):
    """`x` as (B, C, P): channels, then all positions in a row; a vector has one position."""
    x = channels_first(x, axis)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def unit(x: Tensor, axis: int = 1, least: Tensor | float = 0.0):
    """`x` scaled to length 1 along `axis`. Zero vectors stay zero and get no gradient;
    `F.normalize` would multiply their gradient by 1e12.

    Args:
        least: Vectors of at most this length count as zero.
    """
    n = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return x / n.masked_fill(n <= least, torch.inf)


class Loss(nn.Module):
    """The module form of the loss function `fn`: it only holds options."""

    fn = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.fn = staticmethod(cls.fn)
        cls.__doc__ = cls.__doc__ or inspect.getdoc(cls.fn)

    def __init__(self, **options):
        super().__init__()
        have = [
            p.name
            for p in inspect.signature(self.fn).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        if wrong := set(options) - set(have):
            raise TypeError(
                f'{type(self).__name__} has no option {", ".join(sorted(wrong))}. It has: '
                f'{", ".join(have)}'
            )
        self.options = options

    @property
    def kind(self):
        """What the logits must be: 'softmax' over classes, 'sigmoid' per label, 'regression'; None:
        anything.
        """
        return getattr(self.fn, 'kind', None)

    def forward(self, s, t, *args, **kwargs):
        return self.fn(s, t, *args, **{**self.options, **kwargs})

    def option(self, name):
        """An option's value: given, or the function's own default."""
        return self.options.get(name, inspect.signature(self.fn).parameters[name].default)

    def prepare(self, s, t, layer=None, axis=None):
        """Create the tensors that a loss owns. Called once, with the projected student features,
        the teacher features and the teacher's layer.
        """

    def extra_repr(self):
        own = [] if self.fn is type(self).fn else [repr(self.fn)]
        return ', '.join(own + [f'{k}={v!r}' for k, v in self.options.items()])
