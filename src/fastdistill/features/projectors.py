"""Project student features to the shape of teacher features. The grid is resized first, then the
channels are mapped.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import DistillError, check_choice
from .maps_and_tokens import to_grid

ProjectorLike = str | Callable[..., Tensor]  # a name in `PROJECTORS`, a module or a function
PROJECTORS = 'auto', 'linear', 'conv', 'conv_bn', 'mlp'
MATCHES = 'shape', 'grid', 'none'
CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm of vectors and tokens, whose channels are on the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _mapper(kind: str, a: int, b: int, dims: int) -> nn.Module:
    """Build a layer that maps each position from `a` to `b` channels."""
    n = dims - 2 if dims > 3 else 0
    one = lambda i, o, **kw: CONV[n](i, o, 1, **kw) if n else nn.Linear(i, o, **kw)
    if kind == 'mlp':
        return nn.Sequential(one(a, b), nn.GELU(), one(b, b))
    if kind == 'conv_bn':
        return nn.Sequential(one(a, b, bias=False), NORM[n](b) if n else _BatchNorm(b))
    return one(a, b)


class Projector(nn.Module):
    """Module that maps student features to the shape of teacher features, called as `projector(s,
    t)`. Only the shape of `t` is used.

    The module has parameters only if the numbers of channels differ or if `kind` is not 'auto'.

    The grid is resized first. Features are average-pooled to a smaller grid or interpolated to a
    larger grid. If the student has tokens and the teacher has a map, class and register tokens are
    dropped and the other tokens are arranged as a map. If the student has a map and the teacher has
    tokens, each position becomes a token. The mean over positions then replaces the missing class
    and register tokens.

    Then the channels are mapped at each position. By default, vectors and tokens get a linear
    layer. Maps get a 1x1 convolution and a batch norm, as in OFD (arXiv:1904.01866).
    arXiv:2303.11098 also recommends a linear layer with a normalized output. Unlike in the code of
    CRD (arXiv:1910.10699), there is no ReLU, because the student could then not match negative
    values of the teacher.

    Args:
        s_shape: Shape of the student features: vector (B, D), tokens (B, L, D) or map (B, C, H, W).
            B is ignored.
        t_shape: Shape of the teacher features, in any of the same forms.
        kind: 'auto', 'linear' or 'conv' (1x1), 'conv_bn', 'mlp', or your own module or function.
        match: What the projected features must have in common with the teacher's: 'shape', 'grid'
            (only the positions), or 'none'.
        picture: True if tokens are positions in an image, provided that their number fits a grid.
            False if tokens are positions in a sequence.
    """

    def __init__(
        self,
        s_shape: Sequence[int],
        t_shape: Sequence[int],
        kind: ProjectorLike = 'auto',
        match: str = 'shape',
        picture: bool = True,
    ) -> None:
        check_projector(s_shape, t_shape, kind, match)
        super().__init__()
        self.s_shape = tuple(s_shape)
        self.t_shape = tuple(t_shape)
        self.match = match
        self.picture = picture
        self.own = not isinstance(kind, str)  # True for a module or function passed by the user
        self.text = describe_projector(s_shape, t_shape, kind, match)
        self.map: Any = kind
        if isinstance(kind, str):
            dims = len(s_shape if match == 'none' else t_shape)
            layer = _kind_of_layer(s_shape, t_shape, kind, match)
            self.map = layer and _mapper(layer, _channels(s_shape), _channels(t_shape), dims)

    def forward(
        self,
        s: Tensor,  # student features
        t: Tensor
        # teacher features, whose grid may change between batches; None to use the grid of `t_shape`
        | None = None,
    ) -> Tensor:
        like = (len(s), *self.t_shape[1:]) if t is None else tuple(t.shape)
        if not self.own and self.match != 'none':
            s = to_grid(s, like, self.picture)
        if self.map is None:
            return s
        p = [*self.parameters(), None][0]  # subtle: PyTorch 2.6 can't compile `next` with a default
        # subtle: features may be in half precision even though autocast is off here, because the
        # models ran under autocast
        if p is not None and p.dtype != s.dtype and not torch.is_autocast_enabled(s.device.type):
            s = s.to(p.dtype)
        y = self.map(s)
        if self.own:
            self._check(s, y, like)
        return y

    def _check(self, s: Tensor, y: Any, like: Sequence[int]) -> None:
        got: Any = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        same_grid = (
            isinstance(y, Tensor) and len(got) == len(like) and _places(got) == _places(like)
        )
        fits = isinstance(y, Tensor) and (self.match == 'none' or same_grid)
        if not fits or (self.match == 'shape' and got != like):
            need = 'shape' if self.match == 'shape' else 'grid'
            raise DistillError(
                f'The projector {self.text} returned {got} for student features of shape '
                f"{tuple(s.shape)}, but this loss needs the teacher's {need}, "
                f'{like if need == "shape" else _places(like)}. Change the output of the module, '
                "or use projector='auto'."
            )

    def extra_repr(self) -> str:
        return self.text

    def __str__(self) -> str:
        return self.text


def _channels(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) == 3 else shape[1]


def _places(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[1],) if len(shape) == 3 else tuple(shape[2:])


def _kind_of_layer(
    s_shape: Sequence[int], t_shape: Sequence[int], kind: str, match: str
) -> str | None:
    """Return the kind of layer that maps the channels. None if the projector needs no weights. If the
    user names a kind other than 'auto', the projector always has weights.
    """
    if kind != 'auto':
        return kind
    if match != 'shape' or _channels(s_shape) == _channels(t_shape):
        return None
    return 'conv_bn' if len(t_shape) > 3 else 'linear'


def checked_projector(kind: ProjectorLike) -> ProjectorLike:
    """Return `kind`. Raise a DistillError if the value is not valid for any shape."""
    if isinstance(kind, type) or not (callable(kind) or kind in PROJECTORS):
        raise DistillError(
            f'projector={kind!r}: must be one of {", ".join(map(repr, PROJECTORS))}, a module '
            '(not its class) or a function'
        )
    return kind


def check_projector(
    s_shape: Sequence[int], t_shape: Sequence[int], kind: ProjectorLike, match: str
) -> None:
    """Raise a DistillError if the options do not fit these shapes."""
    checked_projector(kind)
    check_choice('match', match, MATCHES)
    s, t = len(s_shape), len(t_shape)
    if not (2 <= s <= 5 and 2 <= t <= 5):
        raise DistillError(
            f"Can't project {tuple(s_shape)} to {tuple(t_shape)}: shapes must be vectors (B, D), "
            'tokens (B, L, D) or maps (B, C, H, W)'
        )
    if (
        not callable(kind)
        and match != 'none'
        and s != t
        and (s, t) not in ((3, 4), (4, 3))
        and t != 2
    ):
        raise DistillError(
            f"The student's {tuple(s_shape)} has no grid that fits the teacher's {tuple(t_shape)}. "
            'Pair it with a layer of the same kind (before or after the pooling), or pass a module as projector.'
        )


def describe_projector(
    s_shape: Sequence[int],
    t_shape: Sequence[int],
    kind: ProjectorLike = 'auto',
    match: str = 'shape',
) -> str:
    """Describe the module that `Projector` builds for these shapes."""
    if not isinstance(kind, str):
        return getattr(kind, '__name__', type(kind).__name__)
    parts = []
    if match != 'none' and (len(s_shape) != len(t_shape) or _places(s_shape) != _places(t_shape)):
        parts.append(f'{_size_in_words(s_shape)} -> {_size_in_words(t_shape)}')
    if layer := _kind_of_layer(s_shape, t_shape, kind, match):
        parts.append(f'{layer} {_channels(s_shape)} -> {_channels(t_shape)}')
    return ', '.join(parts) or 'none'


def _size_in_words(shape: Sequence[int]) -> str:
    if len(shape) == 2:
        return 'vector'
    n = _places(shape)
    return f'{n[0]} tokens' if len(shape) == 3 else 'x'.join(map(str, n))
