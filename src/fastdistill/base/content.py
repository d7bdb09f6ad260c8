"""Describe losses, recipes and options by their content, to find out whether two experiments are
the same.
"""

import dis
import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST_VALUES = 20  # longer sequences and tensors are described by a hash
INSTALLED_IN = tuple(sysconfig.get_path(k) for k in ('stdlib', 'platstdlib', 'purelib', 'platlib'))


def describe_content(o: Any, inside: tuple = ()) -> Any:
    """Return an object's content as dicts, lists and texts that are equal in different processes.

    Objects are described by their type and attributes, tensors by their values, and functions by
    their name, defaults and closure. The description also includes the code of functions and
    classes, and the numbers and functions that this code reads from its module, unless they are
    from an installed package. Trainable parameters are described only by their shape, because
    training changes their values.

    Args:
        o: Any object.
        inside: The objects that contain `o`.
    """
    if any(o is p for p in inside):
        return '...'
    of = partial(describe_content, inside=(*inside, o))
    if isinstance(o, (int, float, np.number)):
        return repr(o) if isinstance(o, bool) else repr(float(o))
    if isinstance(o, (Tensor, np.ndarray)):
        return array_text(o)
    if isinstance(o, Mapping):
        return {str(k): of(v) for k, v in o.items()}
    if isinstance(o, (list, tuple, set, frozenset)):
        each = [of(v) for v in o]
        if isinstance(o, (set, frozenset)):
            each.sort(key=str)
        return each if len(each) <= MOST_VALUES else f'{len(each)} items {short_hash(each)}'
    if isinstance(o, partial):
        return {'': 'partial', 'func': of(o.func), 'args': of(o.args), **of(o.keywords)}
    if inspect.ismethod(o):
        return {'': o.__name__, 'of': of(o.__self__)}
    if isinstance(o, FunctionType):
        values = closure_of(o) if is_installed(o) else closure_of(o) | globals_of(o)
        defaults = of([o.__defaults__, o.__kwdefaults__])
        own = {k: of(v) for k, v in sorted(values.items())}
        return {'': with_code(o, code_parts(o.__code__)), 'defaults': defaults, **own}
    if isinstance(o, type):
        return class_text(o, inside)
    # subtle: datasets, DataLoaders and tables are too large, and reading changes their state
    is_data = hasattr(o, '__len__') or hasattr(o, '__iter__')
    if isinstance(o, nn.Module) or hasattr(o, '__dict__') and not is_data:
        values = {k: v for k, v in vars(o).items() if k not in vars(nn.Module())}
        if isinstance(o, nn.Module):
            values |= o._parameters | o._buffers | o._modules
        names = sorted(k for k in values if k[:2] != '__') + ['__wrapped__']
        named = {k: of(values[k]) for k in names if k in values}
        return {'': class_text(type(o), inside), **named}
    return stable_repr(o)


def stable_repr(o: Any) -> str:
    """Return the repr of an object without memory addresses."""
    return re.sub(r' at 0x[0-9a-fA-F]+', '', repr(o))


def array_text(o: Tensor | np.ndarray) -> str:
    kind = f'{type(o).__name__} {tuple(o.shape)} of {o.dtype}'
    if isinstance(o, Tensor):
        if o.requires_grad and o.is_leaf:
            return f'trainable {kind}'
        o = o.detach().cpu().to_dense()
        o = (o.float() if o.dtype == torch.bfloat16 else o).numpy()
    values = o.tolist()
    return f'{kind}: {values if o.size <= MOST_VALUES else short_hash(values)}'


def class_text(cls: type, inside: tuple) -> str:
    """Return the name of a class, with a hash of its code unless it is from an installed package."""
    parts = []
    for c in cls.__mro__:
        for k, v in [] if is_installed(c) else sorted(vars(c).items()):
            for f in (getattr(v, n, None) for n in ('__func__', 'fget')):
                v = v if f is None else f
            if isinstance(v, FunctionType) or not k.startswith('__'):
                parts.append((k, describe_content(v, (*inside, cls))))
    return with_code(cls, parts)


def with_code(o: Any, code: Any) -> str:
    """Return the name of a function or class, with a hash of its code unless it is from an installed
    package.
    """
    name = f'{o.__module__}.{o.__qualname__}'
    return name if is_installed(o) else f'{name} (code {short_hash(code)})'


def is_installed(o: Any) -> bool:
    """Return True for functions and classes of Python, installed packages and this package."""
    module = sys.modules.get(o.__module__)
    if module is None or o.__module__ == '__main__':
        return False
    file = getattr(module, '__file__', None)
    own = o.__module__.partition('.')[0] == __name__.partition('.')[0]
    return own or file is None or file.startswith(INSTALLED_IN)


def code_parts(code: CodeType) -> tuple:
    """Return what a function computes, without its file name and line numbers."""
    consts = [
        code_parts(o) if isinstance(o, CodeType) else describe_content(o) for o in code.co_consts
    ]
    return code.co_code, code.co_names, consts


def closure_of(fn: FunctionType) -> dict:
    """Return the variables of outer functions that a function uses."""
    out = {}
    for k, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
        try:
            out[k] = cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    return out


def globals_of(fn: FunctionType) -> dict:
    """Return the numbers, texts, tensors, functions and classes that a function reads from its
    module.
    """
    codes = [fn.__code__]
    for c in codes:
        codes += [o for o in c.co_consts if isinstance(o, CodeType)]
    read = [i.argval for c in codes for i in dis.get_instructions(c) if i.opname == 'LOAD_GLOBAL']
    plain = int, float, str, list, tuple, dict, Tensor, np.ndarray, FunctionType, type
    found = {k: fn.__globals__[k] for k in read if k in fn.__globals__}
    return {k: v for k, v in found.items() if isinstance(v, plain)}


def short_hash(o: Any) -> str:
    return hashlib.blake2b(repr(o).encode(), digest_size=4).hexdigest()


def first_difference(before: Any, now: Any, name: str = '') -> tuple[str, str, str] | None:
    """Return (name, text before, text now) of the first part that differs. The name is a path such
    as 'func.weight'. Return None if both contents are equal.

    Args:
        before, now: What `describe_content` returned.
        name: Path of the whole content.
    """
    if before == now:
        return None
    pairs: Iterable = ()
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = ((k, before.get(k, 'nothing'), now.get(k, 'nothing')) for k in before | now)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = zip(range(len(now)), before, now)
    for k, a, b in pairs:
        if found := first_difference(a, b, '.'.join(str(o) for o in (name, k) if o != '')):
            return found
    return name, brief_text(before), brief_text(now)


def brief_text(content: Any) -> str:
    text = str(content.get('', content) if isinstance(content, dict) else content)
    return text if len(text) < 200 else f'{text[:160]}... ({short_hash(text)})'
