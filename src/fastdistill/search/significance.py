"""Significance tests for differences between recipes trained with the same seeds."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..evaluation.report_data import Difference

TEST = 'paired t test'


def difference_by_seed(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compute the mean of `a` minus `b`, with a 95% confidence interval and a p-value from
    Student's paired t test.

    The p-value is None if all differences are equal (and not 0), because the variation between
    seeds is then unknown, and if a result is not finite, because a training diverged.

    Args:
        a: Results of one recipe, one number per seed.
        b: Results of the other recipe, for the same seeds.
    """
    from scipy.stats import ttest_rel

    with np.errstate(invalid='ignore'):  # infinity minus infinity is nan
        d = np.subtract(a, b, dtype=float)
    mean = float(d.mean())
    if len(d) < 2 or not np.isfinite(d).all():
        return Difference(mean)
    if np.ptp(d) <= 1e-12 * max(1.0, np.abs(d).max()):
        return Difference(mean, p=1.0 if np.abs(d).max() < 1e-12 else None, test=TEST)
    test = ttest_rel(a, b)
    low, high = map(float, test.confidence_interval(0.95))
    return Difference(mean, low, high, float(test.pvalue), TEST)


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of the results of a recipe. Return None for a single result, or
    if a result is not finite.
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None


def adjusted(differences: dict) -> dict:
    """Adjust the p-values for multiple tests with Holm's method (1979).

    The probability that at least one difference is significant by chance is then below 5%.

    Args:
        differences: {name: `Difference`}.
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
        out[k] = replace(d, p=least, test=f'{d.test}, adjusted for {len(tested)} recipes (Holm)')
    return out


@dataclass
class Lead:
    """Mean difference between the scores of two recipes, with a 95% confidence interval over items
    and seeds.

    Attributes:
        p: Probability of a difference at least this large, in either direction, by chance.
        n: Number of items.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    seeds: int

    @property
    def beyond_luck(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        return (
            f'{self.mean:+.4g} ({self.n} validation items that were not used for choosing, {self.seeds} seeds; '
            f'95% interval {self.low:+.4g} to {self.high:+.4g}, p = {self.p:.2g})'
        )


def lead_of(a: Tensor, b: Tensor) -> Lead | None:
    """Compute how much better `a` is than `b`.

    Return None if there are fewer than two seeds or two items, because the variation can't be
    estimated then.

    Items and seeds are both random samples. The variance of the mean difference is at most the
    variance of the mean over items plus the variance of the mean over seeds. The test therefore
    uses the formula for two independent samples (Welch's t test).

    Args:
        a, b: (seeds, items) scores of the same items. Row i has the same seed in both.
    """
    from scipy.stats import ttest_ind

    d = (torch.as_tensor(a) - torch.as_tensor(b)).double()
    d = d[:, ~d.isnan().any(0)]
    if d.dim() != 2 or min(d.shape) < 2:
        return None
    seeds, n = d.shape
    mean = d.mean().item()
    of_items = d.mean(0)
    # center to mean 0, so that the difference of the two means is the lead
    of_seeds = d.mean(1) - mean
    if not of_items.var() + of_seeds.var() > 0:
        return Lead(mean, mean, mean, 0.0 if mean else 1.0, n, seeds)
    with warnings.catch_warnings():
        # ttest_ind warns if all values of one sample are nearly equal, which is harmless because
        # the variance of the other sample dominates
        warnings.filterwarnings('ignore', 'Precision loss', RuntimeWarning)
        test = ttest_ind(of_items.numpy(), of_seeds.numpy(), equal_var=False)
    low, high = map(float, test.confidence_interval(0.95))
    return Lead(mean, low, high, float(test.pvalue), n, seeds)
