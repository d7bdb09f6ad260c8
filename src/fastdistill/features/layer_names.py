"Look up and list the layers of a model by name or glob. Wrappers such as DDP are ignored."

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..base.outputs import DistillError
from ..base.text_table import text_table

WRAPPERS = nn.parallel.DistributedDataParallel, nn.DataParallel
SUFFIXES = {
    'in': 'the input of the layer',
    'pre': 'the output, copied before the next layer can overwrite it in place',
    'map': 'tokens, or an output with channels last, as (B, C, H, W)',
    'tokens': 'an output with channels first, as (B, L, D)',
    'mean': 'the mean over positions, a vector',
    '[key]': 'one item of an output that is a dict or a tuple',
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers by DDP, DataParallel or torch.compile."""
    inner: Any = model
    while True:
        if isinstance(inner, WRAPPERS):
            inner = inner.module
        elif isinstance(inner, nn.Module) and '_orig_mod' in inner._modules:
            inner = inner._orig_mod
        else:
            return inner


def named(model: Any) -> dict[str, nn.Module]:
    """Return {dotted name: layer} for a model, without its wrappers.

    A layer that is used under several names has one entry per name.
    """
    inner = unwrap(model)
    # a teacher may contain several modules, or none
    if not isinstance(inner, nn.Module):
        return dict(getattr(inner, 'named_modules', dict)())
    have = dict(inner.named_modules(remove_duplicate=False))
    if any(
        '_orig_mod' in n for n in have
    ):  # a compiled part gets the name of the module that was compiled
        have = {re.sub(r'(^|\.)_orig_mod(?=\.|$)', '', n): m for n, m in have.items()}
    return have


def model_name(model: Any) -> str:
    """Return the name of a model for messages: the name of its class, or the name of a `Teacher`."""
    inner = unwrap(model)
    if isinstance(inner, nn.Module):
        return type(inner).__name__
    return getattr(inner, 'name', type(inner).__name__)


def how_to_name_layers(model: Any) -> str:
    """Return advice for error messages about layers that can't be found.

    Sources of stored outputs give their own advice.
    """
    return getattr(
        unwrap(model),
        'layers_advice',
        "Name the layers: layers={'student.layer': 'teacher.layer'}.",
    )


def _regex(glob: str) -> str:
    """Convert a glob for dotted names to a regular expression. `*` and `?` match within one level,
    and `**` matches across levels.
    """
    wild = {'**': '.*', '*': '[^.]*', '?': '[^.]'}
    parts = re.split(r'(\*\*|\*|\?|\[[^\]]*\])', glob)
    return ''.join(
        wild.get(p) or (p.replace('[!', '[^') if p[:1] == '[' else re.escape(p)) for p in parts
    )


def resolve(model: nn.Module, pattern: str) -> list:
    """Return the names that match `pattern`, in the order of the model, with the suffix of the
    pattern.

    Args:
        model: A model, which may be wrapped. Names refer to the model inside the wrappers.
        pattern: A dotted name or a glob ('layer?', '0.*', 'blocks.**.attn'), with or without a
            suffix (see `SUFFIXES`).
    """
    return resolve_among(model, named(model), pattern)


def item_key(suffix: str) -> str | None:
    """Return the key in a suffix '[key]', which selects one item of a layer's output. Return None
    for other suffixes.
    """
    return suffix[1:-1] if suffix[:1] == '[' and suffix[-1:] == ']' else None


def split_suffixes(pattern: str) -> list[str]:
    """Split a pattern into [name or glob, *suffixes]. Raise a DistillError if a suffix is unknown."""
    name, *how = pattern.split('@')
    if wrong := [h for h in how if h not in SUFFIXES and item_key(h) is None]:
        raise DistillError(
            f'{pattern!r} ends in @{wrong[0]}. It must be one of '
            f'{"; ".join(f"@{k} ({v})" for k, v in SUFFIXES.items())}.'
        )
    return [name, *how]


def resolve_among(model: Any, have: Iterable[str], pattern: str) -> list[str]:
    glob, *how = split_suffixes(pattern)
    found = [glob] if glob in have else [n for n in have if n and re.fullmatch(_regex(glob), n)]
    if not found:
        raise DistillError(no_such_layer(model, glob, list(have)))
    return ['@'.join([n, *how]) for n in found]


def no_such_layer(model: Any, name: str, have: Iterable[str]) -> str:
    near = [n for n in have if n.endswith('.' + name)]
    near = list(dict.fromkeys(near + difflib.get_close_matches(name, have, 5)))[:5]
    hint = f' Nearest: {", ".join(map(repr, near))}.' if near else ''
    return f'No layer {name!r} in {model_name(model)}.{hint} It has:\n{layer_tree(model).brief()}'


@dataclass
class LayerInfo:
    """One layer of a model.

    Attributes:
        name: Dotted name.
        kind: Name of the layer's class.
        shape: Shape of the output. None if the layer did not run.
        params: Number of parameters, including those of inner layers.
    """

    name: str
    kind: str
    shape: tuple | None
    params: int

    @property
    def depth(self) -> int:
        return self.name.count('.') + 1


class LayerTree(list):
    """The layers of a model, as a list of `LayerInfo` that prints as a table."""

    def __str__(self) -> str:
        shape = lambda l: '' if l.shape is None else l.shape
        rows = [('  ' * (l.depth - 1) + l.name, l.kind, shape(l), f'{l.params:,}') for l in self]
        return text_table(('layer', 'kind', 'output', 'parameters'), rows)

    __repr__ = __str__

    def brief(self, n: int = 40) -> str:
        """Format the table with as many levels as fit into `n` lines."""
        fits = [d for d in range(1, 10) if sum(l.depth <= d for l in self) <= n]
        shown = [l for l in self if l.depth <= max(fits, default=1)]
        more = len(self) - len(shown[:n])
        return str(LayerTree(shown[:n])) + (
            f'\n... and {more} more: layers(model) lists them' if more else ''
        )


def layer_tree(model: nn.Module, shapes: Any = None) -> LayerTree:
    """List every layer of the model with its class, output shape and number of parameters.

    Args:
        model: A model, which may be wrapped.
        shapes: {module: shape of its output} for the layers that ran.
    """
    count = lambda m: sum(p.numel() for p in m.parameters() if not is_lazy(p))
    shape = (shapes or {}).get
    return LayerTree(
        LayerInfo(n, type(m).__name__, shape(m), count(m)) for n, m in named(model).items() if n
    )
