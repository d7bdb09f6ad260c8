"""Save, restore and seed the global random generators of Python, NumPy and PyTorch, and use
separate streams of random numbers.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch


class RandomState:
    """State of the global generators, saved when this object is created.

    Args:
        devices: CUDA devices whose generators are also saved.
    """

    def __init__(self, devices: Sequence = ()) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.cuda = {d: torch.cuda.get_rng_state(d) for d in devices}

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for d, s in self.cuda.items():
            torch.cuda.set_rng_state(s, d)

    def same_on_cpu(self, other: 'RandomState') -> bool:
        """Return True if the states of the CPU generators are the same in both objects."""
        (_, keys, at, *_), (_, other_keys, other_at, *_) = self.numpy, other.numpy
        return (
            self.python == other.python
            and at == other_at
            and np.array_equal(keys, other_keys)
            and torch.equal(self.cpu, other.cpu)
        )


class RandomGuard:
    """Context manager that restores the global generators of Python, NumPy and PyTorch at the end.
    Afterwards, `moved` is True if code inside the context used any of the CPU generators.

    Args:
        devices: CUDA devices whose generators are also restored.
    """

    def __init__(self, devices: Sequence = ()) -> None:
        self.devices, self.moved = devices, False

    def __enter__(self) -> 'RandomGuard':
        self.state, self.moved = RandomState(self.devices), False
        return self

    def __exit__(self, *_: Any) -> None:
        self.moved = not self.state.same_on_cpu(RandomState())
        self.state.restore()


def guarded_random_state() -> RandomGuard:
    """Return a `RandomGuard` that also restores the generators of all GPUs in use."""
    return RandomGuard(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


@contextmanager
def seeded(seed: int, device: Any = None) -> Iterator[None]:
    """Context manager that seeds the global generators of Python, NumPy and PyTorch, and restores
    them at the end.

    Args:
        seed: Any 64-bit integer.
        device: CUDA device whose generator is also seeded. None to seed only the CPU generators.
    """
    with restored_generators(device) as start:
        start(seed)
        yield


@contextmanager
def restored_generators(device: Any = None) -> Iterator[Callable]:
    """Context manager that yields a function for seeding the global generators, and restores them
    at the end.
    """
    on_gpu = device is not None and torch.device(device).type == 'cuda'
    cuda = [torch.device(device).index or 0] if on_gpu else []

    def start(seed: int) -> None:
        seed = int(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        for g in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            g.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)

    if RESTORED_OUTSIDE and RESTORED_OUTSIDE[-1] and not cuda:
        with restoring_outside(False):
            yield start  # contexts nested inside this one must restore the generators
        return
    state = RandomState(cuda)
    try:
        yield start
    finally:
        state.restore()


RESTORED_OUTSIDE: list[bool] = []


@contextmanager
def restoring_outside(on: bool) -> Iterator[None]:
    RESTORED_OUTSIDE.append(on)
    try:
        yield
    finally:
        RESTORED_OUTSIDE.pop()


@contextmanager
def restored_once() -> Iterator[None]:
    """Context manager inside which `seeded` does not restore the CPU generators. All CPU generators
    are restored once at the end, because restoring NumPy's generator is slow.
    """
    with restored_generators(), restoring_outside(True):
        yield


def global_generators(devices: Sequence = ()) -> dict[str, tuple[Callable, Callable]]:
    """Return {name: (function that reads the state, function that sets the state)} for the global
    generators.

    Args:
        devices: CUDA devices whose generators are included.
    """
    out: dict[str, tuple[Callable, Callable]] = {'cpu': (torch.get_rng_state, torch.set_rng_state)}
    for d in devices:
        put = partial(torch.cuda.set_rng_state, device=d)
        out[str(d)] = partial(torch.cuda.get_rng_state, d), put
    out['random'] = random.getstate, random.setstate
    # replacing NumPy's generator is faster than copying its state
    out['numpy'] = np.random.get_bit_generator, np.random.set_bit_generator  # type: ignore[attr-defined]
    return out


class RandomStream:
    """A separate stream of random numbers. Inside `with stream.own(...)`, the global generators
    continue from their state at the end of the previous such block. The first block starts from the
    current state, or from a loaded state. After each block, the state from before the block is
    restored.

    Args:
        state: What `state_dict` of a stream returned. None for a stream without a state.
        keep: True if a teacher continues this stream when it starts, instead of using a new one.
    """

    # subtle: if the state were only restored, a teacher with dropout would use the same random
    # numbers in each batch
    def __init__(self, state: dict | None = None, keep: bool = False) -> None:
        self.keep = keep
        self.states: dict[str, Any] = {k: from_json(v) for k, v in (state or {}).items()}
        self.first: dict[str, Any] = {}  # states of the generators before the first block

    def state_dict(self) -> dict:
        """Return the state as data for a JSON file. The dict is empty if no code inside the blocks
        used random numbers.
        """
        now = {k: as_json(v) for k, v in self.states.items()}
        return now if now != {k: as_json(v) for k, v in self.first.items()} else {}

    @contextmanager
    def own(self, generators: dict) -> Iterator[None]:
        """Use this stream inside the context.

        Args:
            generators: Result of `global_generators`.
        """
        outside = {k: read() for k, (read, _) in generators.items()}
        for k, (read, put) in generators.items():
            if k not in self.states:
                # subtle: NumPy returns the generator itself, which must be copied. PyTorch returns a new
                # tensor, and inside `torch.func.grad`, a deep copy of it could not be restored
                new = partial(copy.deepcopy, outside[k]) if k == 'numpy' else read
                self.states[k], self.first[k] = new(), new()
            put(self.states[k])
        try:
            yield
        finally:
            for k, (read, put) in generators.items():
                self.states[k] = read()
                put(outside[k])


def as_json(state: Any) -> Any:
    """Convert the state of a generator, as read by `global_generators`, to data for a JSON file."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes().hex()
    if isinstance(state, np.random.BitGenerator):
        return json.loads(json.dumps(state.state, default=lambda o: o.tolist()))
    return json.loads(json.dumps(state))


def from_json(state: Any) -> Any:
    """Undo `as_json`."""
    if isinstance(state, str):
        return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
    if isinstance(state, dict):
        generator = getattr(np.random, state['bit_generator'])()
        generator.state = state
        return generator
    return tuple(tuple(o) if isinstance(o, list) else o for o in state)
