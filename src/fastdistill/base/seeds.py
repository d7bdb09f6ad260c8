"Seeds that depend on a sample and a view, and random generators that are restored."

import random
from contextlib import contextmanager
from math import gcd

import numpy as np
import torch

__all__ = [
    'RandomGuard',
    'restored_generators',
    'restored_once',
    'scramble',
    'seeded',
    'seeds_of',
    'view_of',
]

MASK = 2**64 - 1
MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(x):
    """splitmix64: a 64-bit number, or an array of them, in which every bit depends on every bit of
    `x`.
    """
    if isinstance(x, int):  # one number: the same, but many times faster than an array of one
        x = (x + MIX[0]) & MASK
        x = ((x ^ (x >> 30)) * MIX[1]) & MASK
        x = ((x ^ (x >> 27)) * MIX[2]) & MASK
        return x ^ (x >> 31)
    u = np.uint64
    with np.errstate(over='ignore'):
        x = np.asarray(x, u) + u(MIX[0])
        x = (x ^ (x >> u(30))) * u(MIX[1])
        x = (x ^ (x >> u(27))) * u(MIX[2])
        return x ^ (x >> u(31))


def seeds_of(seed: int, keys, *stages):
    """(B,) uint64, or one number: a seed for each sample.

    Args:
        seed: Of the whole cache.
        keys: (B,) uint64: which samples; or one number.
        *stages: Numbers, or arrays of (B,): the view, and the step that draws (the item, or one
            of the batch transforms).
    """
    one = isinstance(keys, int)
    whole = int if one else lambda o: np.asarray(o).astype(np.uint64)
    out = scramble(whole(keys) ^ whole(scramble(int(seed) & MASK)))
    for o in stages:
        out = scramble(out ^ scramble(whole(o)))
    return out


def view_of(keys, epoch: int, views: int, seed: int = 0):
    """The view of each sample in an epoch. In `views` epochs a sample shows each view once, in its
    own order. The order changes with each round.

    Args:
        keys: (B,) uint64; or one number.
        views: How many are stored.
    """
    one = isinstance(keys, int)
    if views < 2:
        return 0 if one else np.zeros(np.shape(keys), np.int64)
    lap, step = divmod(epoch, views)
    h = seeds_of(seed, keys, lap, views)
    strides = [s for s in range(1, views) if gcd(s, views) == 1]
    if one:
        return (h % views + strides[(h >> 32) % len(strides)] * step) % views
    u = np.uint64
    stride = np.array(strides, u)[(h >> u(32)) % u(len(strides))]
    return ((h % u(views) + stride * u(step)) % u(views)).astype(np.int64)


@contextmanager
def seeded(seed: int, device=None):
    """Inside, the global generators of Python, NumPy and PyTorch start from `seed`. At the end they
    are restored.

    Args:
        seed: Any 64-bit number.
        device: Of the tensors that are drawn on, if not the CPU.
    """
    with restored_generators(device) as start:
        start(seed)
        yield


@contextmanager
def restored_generators(device=None):
    """Yields a function that seeds the global generators. At the end they are restored."""
    gens = [torch.default_generator] + (
        [torch.cuda.default_generators[torch.device(device).index or 0]] if is_cuda(device) else []
    )

    def start(seed):
        seed = int(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        for g in gens:
            g.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)

    if RESTORED_OUTSIDE and RESTORED_OUTSIDE[-1] and not is_cuda(device):
        with restoring_outside(False):
            yield start  # a `seeded` inside this one must restore
        return
    states = random.getstate(), np.random.get_state(), [g.get_state() for g in gens]
    try:
        yield start
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for g, s in zip(gens, states[2]):
            g.set_state(s)


RESTORED_OUTSIDE = []


@contextmanager
def restoring_outside(on):
    RESTORED_OUTSIDE.append(on)
    try:
        yield
    finally:
        RESTORED_OUTSIDE.pop()


@contextmanager
def restored_once():
    """Inside, the CPU's generators are restored only at the end, not after each `seeded`, since
    NumPy's are slow.
    """
    with restored_generators(), restoring_outside(True):
        yield


def is_cuda(device):
    return device is not None and torch.device(device).type == 'cuda'


class RandomGuard:
    """Restores the global generators of Python, NumPy and PyTorch. Then `moved` is True if anything
    drew from them.
    """

    def __enter__(self):
        self.states = self.now()
        self.moved = False
        return self

    def now(self):
        return random.getstate(), np.random.get_state(), torch.get_rng_state()

    def __exit__(self, *_):
        (p, n, t), (p0, n0, t0) = self.now(), self.states
        self.moved = (
            p != p0 or n[2] != n0[2] or not np.array_equal(n[1], n0[1]) or not torch.equal(t, t0)
        )
        random.setstate(p0)
        np.random.set_state(n0)
        torch.set_rng_state(t0)
