"Find the random generators inside transforms, and seed them like the global ones."

import hashlib
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from numbers import Number
from operator import getitem
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ['Generators', 'access_of', 'hands_out_generators', 'reachable']

PLAIN_TYPES = (
    str,
    bytes,
    Number,
    np.ndarray,
    np.generic,
    Tensor,
    PurePath,
    ModuleType,
    type,
    type(None),
)
GLOBAL_GENERATORS = {id(o) for o in (random._inst, np.random.mtrand._rand, torch.default_generator)}
# the code of these packages draws from the global generators, or from a generator that the user's transform holds
LIBRARIES = {
    'PIL',
    'builtins',
    'fastai',
    'fastcore',
    'fastdistill',
    'fasttransform',
    'numpy',
    'pandas',
    'plum',
    'torch',
    'torchvision',
}
# longer collections are data, and a search that finds more objects has reached the data
MAX_ITEMS, MAX_OBJECTS = 200, 20_000

# class of generator -> (get its state, set its state, seed it)
ACCESS = {
    np.random.Generator: (
        lambda g: g.bit_generator.state,
        lambda g, s: setattr(g.bit_generator, 'state', s),
        lambda g, n: setattr(g.bit_generator, 'state', type(g.bit_generator)(n).state),
    ),
    np.random.RandomState: (
        lambda g: g.get_state(),
        lambda g, s: g.set_state(s),
        lambda g, n: g.seed(n & 0xFFFFFFFF),
    ),
    random.Random: (lambda g: g.getstate(), lambda g, s: g.setstate(s), lambda g, n: g.seed(n)),
    torch.Generator: (
        lambda g: g.get_state(),
        lambda g, s: g.set_state(s),
        lambda g, n: g.manual_seed(n & 0x7FFFFFFFFFFFFFFF),
    ),
}


class Generators:
    """The generators of NumPy, Python and PyTorch inside transforms or datasets, including those
    that their functions name.

    An object with a method `set_random_state(random_generator, py_random)`, such as a transform of
    albumentations, gets new generators.
    """

    def __init__(self, *roots: Any) -> None:
        found = [
            (place, owned)
            for place, o, owned in reachable(roots)
            if access_of(o) or hands_out_generators(o)
        ]
        self.places, self.owned = [p for p, _ in found], [owned for _, owned in found]
        # subtle: a generator's seed depends on its name, so that an attribute added elsewhere does not change it
        names = [
            f'{getattr(at, "__qualname__", type(at).__qualname__)} {k}' for _, at, k in self.places
        ]
        self.names = [f'{n} {names[:i].count(n)}' for i, n in enumerate(names)]

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Context in which each generator has its own seed, derived from `seed`. Their states are
        restored at the end.

        Args:
            seed: Any 64-bit number.
        """
        if not self.places:
            yield
            return
        here = [get(at, k) for get, at, k in self.places]
        were = [vars(o).copy() if hands_out_generators(o) else access_of(o)[0](o) for o in here]
        for o, owned, name in zip(here, self.owned, self.names):
            if owned:
                continue  # its owner seeds it
            digest = hashlib.blake2b(f'{seed} {name}'.encode(), digest_size=8).digest()
            start_from(o, int.from_bytes(digest, 'little'))
        try:
            yield
        finally:
            for o, was in zip(here, were):
                put_back(o, was)


def start_from(o: Any, n: int) -> None:
    if hands_out_generators(o):
        o.set_random_state(np.random.default_rng(n), random.Random(n))
    else:
        access_of(o)[2](o, n)


def put_back(o: Any, was: Any) -> None:
    if not hands_out_generators(o):
        access_of(o)[1](o, was)
        return
    vars(o).clear()
    vars(o).update(was)


def access_of(o: Any) -> Any:
    """Return how to read, set and seed a generator. None for any other object."""
    return next(
        (
            v
            for k, v in ACCESS.items()
            if isinstance(o, k) and not isinstance(o, random.SystemRandom)
        ),
        None,
    )


@lru_cache
def takes_generators(cls: Any) -> bool:
    fn = getattr(cls, 'set_random_state', None)
    return callable(fn) and {'random_generator', 'py_random'} <= set(
        inspect.signature(fn).parameters
    )


def hands_out_generators(o: Any) -> bool:
    return takes_generators(type(o)) and hasattr(o, '__dict__')  # type: ignore[arg-type]


def reachable(roots: Any) -> Iterator[tuple]:
    """Yield (place, object, owned) for all objects that can be reached.

    A place is (get, holder, key), since the object there may be replaced later. An object is
    `owned` if it is inside an object that gives generators to all its parts.
    """
    todo = deque(((getitem, roots, i), o, False) for i, o in enumerate(roots))
    seen: dict[int, Any] = {}
    while todo and len(seen) < MAX_OBJECTS:
        place, o, owned = todo.popleft()
        if id(o) in seen or id(o) in GLOBAL_GENERATORS or isinstance(o, PLAIN_TYPES):
            continue
        seen[id(o)] = o  # keeps the object: if it were freed, another one might get its id
        yield place, o, owned
        todo.extend((p, v, owned or hands_out_generators(o)) for p, v in contents(o))


def contents(o: Any) -> Iterator[tuple]:
    """Yield (place, object) for each object that an object holds or names."""
    if access_of(o):
        return
    if isinstance(o, (dict, list, tuple)):
        if len(o) <= MAX_ITEMS:
            yield from (
                ((getitem, o, k), v)
                for k, v in (o.items() if isinstance(o, dict) else enumerate(o))
            )
    for k in FUNCTION_PARTS.get(type(o), ()):
        yield (getattr, o, k), getattr(o, k)
    if isinstance(o, FunctionType):
        for i in range(len(o.__closure__ or ())):
            try:
                yield (in_closure, o, i), in_closure(o, i)
            except ValueError:
                pass  # an empty cell
        if not is_of_library(o):
            for k in sorted(names_in_code(o.__code__) & set(o.__globals__)):
                yield (in_globals, o, k), in_globals(o, k)
    for c in (o, *type(o).__mro__):
        if not hasattr(c, '__dict__') or (isinstance(c, type) and is_of_library(c)):
            continue
        for k, v in list(vars(c).items()):
            if not inspect.ismemberdescriptor(v):
                yield (in_dict, c, k), v
            elif hasattr(o, k):
                yield (getattr, o, k), getattr(o, k)  # of a class with __slots__


FUNCTION_PARTS = {
    FunctionType: ('__defaults__', '__kwdefaults__'),
    MethodType: ('__self__', '__func__'),
    partial: ('func', 'args', 'keywords'),
}


def is_of_library(o: Any) -> bool:
    return (getattr(o, '__module__', None) or '').partition('.')[0] in LIBRARIES


def in_closure(fn: Any, i: int) -> Any:
    return fn.__closure__[i].cell_contents


def in_globals(fn: Callable, k: str) -> Any:
    return fn.__globals__[k]


def in_dict(o: Any, k: str) -> Any:
    return vars(o)[k]


def names_in_code(code: CodeType) -> set[str]:
    """Return the names that the code of a function, or of a function inside it, reads."""
    return set(code.co_names).union(
        *(names_in_code(c) for c in code.co_consts if hasattr(c, 'co_names'))
    )
