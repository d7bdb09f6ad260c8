"""Paired significance tests for differences between models on the same samples."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .report_data import Comparison, Difference, Estimate

# If there are more samples, groups of samples are resampled instead of single samples. This is
# then the number of groups.
MAX_SAMPLES = 20_000
CELLS = 10_000_000  # maximum number of elements in a matrix of weights


def mcnemar(only_a: int, only_b: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    Args:
        only_a: Number of samples for which only the first model is right.
        only_b: Number of samples for which only the second model is right.
    """
    from scipy.stats import binomtest

    return (
        1.0 if only_a + only_b == 0 else float(binomtest(int(only_a), int(only_a + only_b)).pvalue)
    )


class PairedScores:
    """Bootstrap intervals and paired tests for several models, computed from per-sample sums.

    All models use the same bootstrap samples, so that differences are paired. Intervals are
    percentiles over `repeats` bootstrap samples.

    Args:
        scores: {model name: {sum name: array (n,) or (n, k)}}.
        measures: A list of `Measure`.
    """

    def __init__(self, scores: dict, measures: list, repeats: int = 2000, seed: int = 0) -> None:
        self.measures = {m.name: m for m in measures}
        self.repeats, self.seed = repeats, seed
        # subtle: store before grouping, because McNemar's test needs single samples
        self.right = {
            k: v['right'] for k, v in scores.items() if 'right' in v and (v['n'] == 1).all()
        }
        n = len(next(iter(next(iter(scores.values())).values())))
        groups = random_groups(n, np.random.default_rng(seed)) if n > MAX_SAMPLES else None
        self.scores = {
            k: {c: summed_in_groups(o, groups) for c, o in v.items()} for k, v in scores.items()
        }
        self.n = min(n, MAX_SAMPLES)
        self.whole = {k: {c: o.sum(0)[None] for c, o in v.items()} for k, v in self.scores.items()}
        drawn = self._weighted(draws(self.n, repeats, seed), self.scores)
        self.drawn = {k: self._values(v) for k, v in drawn.items()}
        self.values = {
            k: {m: v[0] for m, v in self._values(s).items()} for k, s in self.whole.items()
        }

    def _weighted(
        self, weights: Iterable[np.ndarray], scores: Mapping[str, Mapping]
    ) -> dict[str, dict]:
        """Compute the weighted sums over samples for each row of `weights`, as {model name: {sum
        name: array (repeats, ...)}}.
        """
        out: dict[str, dict[str, list]] = {k: {c: [] for c in v} for k, v in scores.items()}
        for w in weights:
            for k, v in scores.items():
                for c, o in v.items():
                    with np.errstate(invalid='ignore'):  # 0 times an infinite NLL is nan
                        out[k][c].append(w @ o)
        return {k: {c: np.concatenate(o) for c, o in v.items()} for k, v in out.items()}

    def _values(self, sums: Mapping) -> dict[str, Any]:
        with np.errstate(divide='ignore', invalid='ignore'), warnings.catch_warnings():
            # NumPy warns about means over zero classes
            warnings.simplefilter('ignore', RuntimeWarning)
            return {k: m.of(sums) for k, m in self.measures.items()}

    def estimates(self, model: str) -> dict:
        """Return {measure: `Estimate`} for a model."""
        return {
            k: Estimate(number(v), *self._interval(self.drawn[model][k]))
            for k, v in self.values[model].items()
        }

    def _interval(self, drawn: np.ndarray) -> tuple:
        """Return the (low, high) ends of the 95% interval, or (None, None) if it can't be computed."""
        drawn = drawn[np.isfinite(drawn)]
        if self.n < 2 or len(drawn) < 2:
            return None, None
        return tuple(map(float, np.percentile(drawn, (2.5, 97.5))))

    @np.errstate(divide='ignore', invalid='ignore')  # measures may be infinite
    def compare(self, model: str, against: str, teacher: str | None = None) -> Comparison:
        """Compare two models with all measures.

        Args:
            model: Name of a model.
            against: Name of the model to compare with.
            teacher: Name of the teacher, for computing how much of its lead over `against` is
                recovered. None to skip this.
        """
        ps, out = self._p_values(model, against), Comparison(model, against)
        for k in self.measures:
            d, drawn = (v[model][k] - v[against][k] for v in (self.values, self.drawn))
            p, test = ps[k]
            low, high = self._interval(drawn)
            out.differences[k] = Difference(number(d), low, high, p, test)
        if teacher is not None and teacher not in (model, against):
            out.recovered = self._recovered(model, against, teacher)
        return out

    def _p_values(self, a: str, b: str) -> dict[str, tuple[float | None, str]]:
        """Return {measure: (p-value, name of the test)}."""
        apart = {c: self.scores[a][c] - self.scores[b][c] for c in self.scores[a]}
        # each permutation swaps the results of random samples between `a` and `b`
        moved = self._weighted(coins(self.n, self.repeats, self.seed), dict(moved=apart))['moved']
        whole_a, whole_b = self.whole[a], self.whole[b]
        va = self._values({c: whole_a[c] - moved[c] for c in moved})
        vb = self._values({c: whole_b[c] + moved[c] for c in moved})
        out = {}
        for k in self.measures:
            x, y = self.values[a][k], self.values[b][k]
            # subtle: rounding errors must not break ties
            least = abs(x - y) * (1 - 1e-6) - 1e-12 * (abs(x) + abs(y))
            d, by_chance = abs(x - y), np.abs(va[k] - vb[k])
            p = (1 + np.sum(by_chance >= least)) / (1 + self.repeats)
            out[k] = (float(p) if np.isfinite(d) else None), 'paired permutation test'
        if a in self.right and 'accuracy' in out:
            ra, rb = self.right[a] > 0.5, self.right[b] > 0.5
            out['accuracy'] = mcnemar((ra & ~rb).sum(), (rb & ~ra).sum()), "McNemar's exact test"
        return out

    def _recovered(self, model: str, against: str, teacher: str) -> dict[str, Estimate]:
        """Compute the fraction of the teacher's lead that the model recovers, for each measure in
        which the teacher has a significant lead.
        """
        ps, out = self._p_values(teacher, against), {}
        for k, m in self.measures.items():
            lead = self.values[teacher][k] - self.values[against][k]
            p, _ = ps[k]
            if p is None or p >= 0.05 or (lead > 0) != m.info.higher:
                continue
            part = lambda v, k=k: (v[model][k] - v[against][k]) / (v[teacher][k] - v[against][k])
            out[k] = Estimate(number(part(self.values)), *self._interval(part(self.drawn)))
        return out


def random_groups(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.integers(MAX_SAMPLES, size=n))[rng.permutation(n)]


def summed_in_groups(o: Any, groups: np.ndarray | None) -> np.ndarray:
    """Convert an array (n, ...) to float64. If groups are given, sum over the samples in each
    group.
    """
    o = np.asarray(o, np.float64)
    if groups is None:
        return o
    out = np.zeros((MAX_SAMPLES, *o.shape[1:]))
    np.add.at(out, groups, o)
    return out


def draws(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Draw bootstrap samples. Yield the number of times that each of `n` samples is drawn, as row
    blocks of a (repeats, n) matrix.
    """
    rng, size = np.random.default_rng(seed + 1), max(1, CELLS // n)
    for i in range(0, repeats, size):
        r = min(size, repeats - i)
        at = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(at.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def coins(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Yield random values 0 or 1 for each of `n` samples, as row blocks of a (repeats, n) matrix."""
    rng, size = np.random.default_rng(seed + 2), max(1, CELLS // n)
    for i in range(0, repeats, size):
        yield rng.integers(2, size=(min(size, repeats - i), n)).astype(np.float64)


def number(v: Any) -> float | None:
    return float(v) if np.isfinite(v) else None
