"""Differences of recipes that were trained with the same seeds: which of them are more than the
luck of a seed.
"""

import math

import numpy as np

from ..evaluation.data import Difference

__all__ = ['adjusted', 'difference_by_seed']

TEST = 'paired t test'


def difference_by_seed(a, b) -> Difference:
    """The mean of `a` minus `b`, with its 95% interval and p-value (Student's paired t test). There
    is no p-value if all differences are equal, since then nothing shows how much a seed matters.

    Args:
        a: What one recipe reached, a number for each seed.
        b: The other one, with the same seeds.
    """
    from scipy.stats import t

    d = np.subtract(a, b, dtype=float)
    n, mean = len(d), d.mean()
    if n < 2:
        return Difference(float(mean))
    if np.ptp(d) <= 1e-12 * max(1.0, np.abs(d).max()):
        return Difference(float(mean), p=1.0 if np.abs(d).max() < 1e-12 else None, test=TEST)
    error = d.std(ddof=1) / math.sqrt(n)
    half = t.ppf(0.975, n - 1) * error
    return Difference(
        float(mean),
        float(mean - half),
        float(mean + half),
        float(2 * t.sf(abs(mean) / error, n - 1)),
        TEST,
    )


def adjusted(differences: dict) -> dict:
    """The same with p-values for several tests at once (Holm, 1979): the chance that any of them is
    called significant by luck alone stays below 5%

    Args:
        differences: Name -> Difference.
    """
    tested = sorted(
        (k for k, d in differences.items() if d.p is not None), key=lambda k: differences[k].p
    )
    if len(tested) < 2:
        return differences
    out, least = dict(differences), 0.0
    for i, k in enumerate(tested):
        d = differences[k]
        least = max(least, min(1.0, (len(tested) - i) * d.p))
        out[k] = Difference(
            d.value, d.low, d.high, least, f'{d.test}, adjusted for {len(tested)} recipes (Holm)'
        )
    return out
