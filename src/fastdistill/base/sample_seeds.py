"Compute seeds that depend on the sample and the view (random augmentation)."

from math import gcd
from typing import Any

import numpy as np

MASK = 2**64 - 1
MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def scramble(x: Any) -> Any:
    """Compute the splitmix64 hash of a 64-bit integer or of an array of 64-bit integers. Every bit
    of the result depends on every bit of `x`.
    """
    # for a single integer, this computes the same value but is much faster than NumPy
    if isinstance(x, int):
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
    """Compute a seed for each sample, (B,) uint64. If `keys` is one integer, the result is one
    integer.

    Args:
        seed: Seed of the whole cache.
        keys: Keys of the samples, (B,) uint64, or one integer.
        *stages: Integers, or arrays (B,): the view, and the index of the step that uses random
            numbers (the item transforms, or one of the batch transforms).
    """
    one = isinstance(keys, int)
    whole = int if one else lambda o: np.asarray(o).astype(np.uint64)
    out = scramble(whole(keys) ^ whole(scramble(int(seed) & MASK)))
    for o in stages:
        out = scramble(out ^ scramble(whole(o)))
    return out


def view_of(keys: Any, epoch: int, views: int, seed: int = 0) -> Any:
    """Return the view of each sample to use in an epoch. In each round of `views` epochs, every
    view of a sample is used once. The order differs between samples and between rounds.

    Args:
        keys: Keys of the samples, (B,) uint64, or one integer.
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
