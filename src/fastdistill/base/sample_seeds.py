"Seeds that depend on a sample and a view."

from math import gcd
from typing import Any

import numpy as np

__all__ = ['scramble', 'seeds_of', 'view_of']

MASK = 2**64 - 1
MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(x: Any) -> Any:
    """Compute splitmix64: a 64-bit number, or an array of them, in which every bit depends on every
    bit of `x`.
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


def seeds_of(seed: int, keys: Any, *stages: Any) -> Any:
    """Compute a seed for each sample, (B,) uint64, or one number for one key.

    Args:
        seed: Seed of the whole cache.
        keys: Keys of the samples, (B,) uint64, or one number.
        *stages: Numbers, or arrays (B,): the view, and the step that uses random numbers (the item,
            or one of the batch transforms).
    """
    one = isinstance(keys, int)
    whole = int if one else lambda o: np.asarray(o).astype(np.uint64)
    out = scramble(whole(keys) ^ whole(scramble(int(seed) & MASK)))
    for o in stages:
        out = scramble(out ^ scramble(whole(o)))
    return out


def view_of(keys: Any, epoch: int, views: int, seed: int = 0) -> Any:
    """Return the view of each sample in an epoch. In `views` epochs, a sample shows each view once, in
    its own order. The order changes with each round.

    Args:
        keys: Keys of the samples, (B,) uint64, or one number.
        epoch: Number of the epoch, from 0.
        views: Number of stored views.
        seed: Seed of the cache.
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
