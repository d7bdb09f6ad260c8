"""Find the random generators inside transforms, so that they can be seeded like the global
generators.
"""

import hashlib
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from numbers import Number
from operator import getitem
from pathlib import PurePath
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
# code of these packages uses the global generators, or a generator stored in the user's transform
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
    'spacy',
    'torch',
    'torchvision',
}
# Longer collections are assumed to be data and are not searched.
# The search ends after this many objects, because it has probably reached the data.
MAX_ITEMS, MAX_OBJECTS = 200, 20_000

# {generator class: (function that gets the state, function that sets the state, function that
# seeds)}
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
    """The random generators of NumPy, Python and PyTorch that transforms or datasets use.
    Generators in global variables and closures of their functions are included.

    Objects with a method `set_random_state(random_generator, py_random)`, such as albumentations
    transforms, get new generators.

    Args:
        *roots: Transforms, datasets or other objects.
        outside: Objects that are not searched, such as a trainer to which one of the roots refers.
    """

    def __init__(self, *roots: Any, outside: Sequence = ()) -> None:
        found = [
            (place, owned)
            for place, o, owned in reachable(roots, outside)
            if access_of(o) or hands_out_generators(o)
        ]
        self.places, self.owned = [p for p, _ in found], [owned for _, owned in found]
        # subtle: derive the seed of a generator from its name, so that the seed does not change if
        # other attributes are added
        names = [
            f'{getattr(at, "__qualname__", type(at).__qualname__)} {k}' for _, at, k in self.places
        ]
        self.names = [f'{n} {names[:i].count(n)}' for i, n in enumerate(names)]

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Context manager that seeds each generator with its own seed, derived from `seed`. At the
        end, the states of all generators are restored.

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
                continue  # the object that contains this generator seeds it
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
    """Return the functions that read, set and seed the state of a generator. Return None for other
    objects.
    """
    return type_facts(o).access


def hands_out_generators(o: Any) -> bool:
    return type_facts(o).takes_generators and hasattr(o, '__dict__')


class TypeFacts(NamedTuple):
    """What the search for generators needs to know about a class.

    Attributes:
        plain: True if its objects contain no generators.
        access: See `access_of`.
        takes_generators: True if it has the method `set_random_state` of albumentations.
        searched: The class and its bases whose attributes are searched.
    """

    plain: bool
    access: Any
    takes_generators: bool
    searched: tuple[type, ...]


def type_facts(o: Any) -> TypeFacts:
    return facts_of_type(type(o))  # type: ignore[arg-type]


@lru_cache(1000)
def facts_of_type(cls: type) -> TypeFacts:
    access = next((v for k, v in ACCESS.items() if issubclass(cls, k)), None)
    fn = getattr(cls, 'set_random_state', None)
    return TypeFacts(
        plain=issubclass(cls, PLAIN_TYPES),
        access=None if issubclass(cls, random.SystemRandom) else access,
        takes_generators=callable(fn)
        and {'random_generator', 'py_random'} <= set(inspect.signature(fn).parameters),
        searched=tuple(c for c in cls.__mro__ if not is_of_library(c)),
    )


def reachable(roots: Any, outside: Sequence = ()) -> Iterator[tuple]:
    """Yield (place, object, owned) for all objects that can be reached from `roots` without passing
    through the objects in `outside`.

    A place is (get, holder, key), and get(holder, key) returns the object. Places are returned
    because an object may be replaced later. An object is `owned` if it is inside an object with
    `set_random_state`, which sets the generators of all its parts.
    """
    todo = deque(
        ((getitem, roots, i), o, False) for i, o in enumerate(roots) if not type_facts(o).plain
    )
    seen: dict[int, Any] = {id(o): o for o in outside}
    while todo and len(seen) < MAX_OBJECTS:
        place, o, owned = todo.popleft()
        if id(o) in seen or id(o) in GLOBAL_GENERATORS:
            continue
        # keep a reference, because after the object is freed, a new object could get the same id
        seen[id(o)] = o
        yield place, o, owned
        owns = owned or hands_out_generators(o)
        todo.extend((p, v, owns) for p, v in contents(o) if not type_facts(v).plain)


def contents(o: Any) -> Iterator[tuple]:
    """Yield (place, object) for each object that `o` contains, or refers to by a global name or
    closure.
    """
    if access_of(o):
        return
    if isinstance(o, (dict, list, tuple)) and len(o) <= MAX_ITEMS:
        pairs = o.items() if isinstance(o, dict) else enumerate(o)
        yield from (((getitem, o, k), v) for k, v in pairs)
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
    for c in (o, *type_facts(o).searched):
        if not hasattr(c, '__dict__'):
            continue
        for k, v in list(vars(c).items()):
            if not isinstance(v, MemberDescriptorType):
                yield (in_dict, c, k), v
            elif hasattr(o, k):
                yield (getattr, o, k), getattr(o, k)  # attributes of a class with __slots__


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
    """Return the global names used by the code of a function and of its inner functions."""
    return set(code.co_names).union(
        *(names_in_code(c) for c in code.co_consts if hasattr(c, 'co_names'))
    )
