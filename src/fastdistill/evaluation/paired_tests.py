"""Paired significance tests for differences between models on the same samples."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .report_data import Comparison, Difference, Estimate

__all__ = ['PairedScores', 'mcnemar']

MAX_SAMPLES = (
    20_000  # more samples are combined into this many random groups, which are resampled instead
)
CELLS = 10_000_000  # maximum number of elements in a matrix of weights


def mcnemar(only_a: int, only_b: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    Args:
        only_a: Number of samples on which only the first model is right.
        only_b: Number of samples on which only the second model is right.
    """
    from scipy.stats import binomtest

    return (
        1.0 if only_a + only_b == 0 else float(binomtest(int(only_a), int(only_a + only_b)).pvalue)
    )


class PairedScores:
    """Sums over each sample for several models, for bootstrap intervals and paired tests.

    All models share the bootstrap draws, so that differences are paired. Intervals are percentiles
    of `repeats` draws of whole samples.

    Args:
        scores: {model: {name of a sum: (n,) or (n, k)}}.
        measures: A list of `Measure`.
    """

    def __init__(self, scores: dict, measures: list, repeats: int = 2000, seed: int = 0) -> None:
        self.measures = {m.name: m for m in measures}
        self.repeats, self.seed = repeats, seed
        # subtle: set before grouping, since this test needs single samples
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
        """Return sums over samples, one for each row of `weights`: {model: {name of a sum:
        (repeats, ...)}}.
        """
        out: dict[str, dict[str, list]] = {k: {c: [] for c in v} for k, v in scores.items()}
        for w in weights:
            for k, v in scores.items():
                for c, o in v.items():
                    out[k][c].append(w @ o)
        return {k: {c: np.concatenate(o) for c, o in v.items()} for k, v in out.items()}

    def _values(self, sums: Mapping) -> dict[str, Any]:
        with np.errstate(divide='ignore', invalid='ignore'), warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)  # mean over no classes
            return {k: m.of(sums) for k, m in self.measures.items()}

    def estimates(self, model: str) -> dict:
        """Return {measure: value and interval} of a model."""
        return {
            k: Estimate(number(v), *self._interval(self.drawn[model][k]))
            for k, v in self.values[model].items()
        }

    def _interval(self, drawn: np.ndarray) -> tuple:
        """Return (low, high) of 95% of the draws, or (None, None) if there are none."""
        drawn = drawn[np.isfinite(drawn)]
        if self.n < 2 or len(drawn) < 2:
            return None, None
        return tuple(map(float, np.percentile(drawn, (2.5, 97.5))))

    def compare(self, model: str, against: str, teacher: str | None = None) -> Comparison:
        """Compare two models by each measure.

        Args:
            model: Name of a model.
            against: Name of the model to compare with.
            teacher: Model whose lead over `against` may be recovered.
        """
        ps, out = self._p_values(model, against), Comparison(model, against)
        for k in self.measures:
            with np.errstate(invalid='ignore'):  # infinity minus infinity
                d, drawn = (v[model][k] - v[against][k] for v in (self.values, self.drawn))
            p, test = ps[k]
            low, high = self._interval(drawn)
            out.differences[k] = Difference(number(d), low, high, p, test)
        if teacher is not None and teacher not in (model, against):
            out.recovered = self._recovered(model, against, teacher)
        return out

    def _p_values(self, a: str, b: str) -> dict[str, tuple[float | None, str]]:
        """Return {measure: (p, name of the test)}."""
        whole = (
            {c: o.sum(0) for c, o in self.scores[a].items()},
            {c: o.sum(0) for c, o in self.scores[b].items()},
        )
        apart = {c: self.scores[a][c] - self.scores[b][c] for c in self.scores[a]}
        # a permutation swaps some samples between `a` and `b`
        moved = self._weighted(coins(self.n, self.repeats, self.seed), dict(moved=apart))['moved']
        swapped = [{c: w[c] + sign * moved[c] for c in moved} for w, sign in zip(whole, (-1, 1))]
        va, vb = map(self._values, swapped)
        out = {}
        for k in self.measures:
            with np.errstate(invalid='ignore'):
                d, by_chance = abs(self.values[a][k] - self.values[b][k]), np.abs(va[k] - vb[k])
                p = (1 + np.sum(by_chance >= d - 1e-12)) / (1 + self.repeats)
            out[k] = (float(p) if np.isfinite(d) else None), 'paired permutation test'
        if a in self.right and 'accuracy' in out:
            ra, rb = self.right[a] > 0.5, self.right[b] > 0.5
            out['accuracy'] = mcnemar((ra & ~rb).sum(), (rb & ~ra).sum()), "McNemar's exact test"
        return out

    def _recovered(self, model: str, against: str, teacher: str) -> dict[str, Estimate]:
        """Compute the fraction of the teacher's lead that the model recovers, for each measure with
        a significant lead.
        """
        ps, out = self._p_values(teacher, against), {}
        for k, m in self.measures.items():
            lead = self.values[teacher][k] - self.values[against][k]
            p, _ = ps[k]
            if p is None or p >= 0.05 or (lead > 0) != m.info.higher:
                continue
            part = lambda v, k=k: (v[model][k] - v[against][k]) / (v[teacher][k] - v[against][k])
            with np.errstate(divide='ignore', invalid='ignore'):
                out[k] = Estimate(number(part(self.values)), *self._interval(part(self.drawn)))
        return out


def random_groups(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.integers(MAX_SAMPLES, size=n))[rng.permutation(n)]


def summed_in_groups(o: Any, groups: np.ndarray | None) -> np.ndarray:
    """Convert (n, ...) to float64 and, if there are groups, sum within each."""
    o = np.asarray(o, np.float64)
    if groups is None:
        return o
    out = np.zeros((MAX_SAMPLES, *o.shape[1:]))
    np.add.at(out, groups, o)
    return out


def draws(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of `n` samples is drawn with replacement, as pieces of a (repeats, n)
    matrix.
    """
    rng, size = np.random.default_rng(seed + 1), max(1, CELLS // n)
    for i in range(0, repeats, size):
        r = min(size, repeats - i)
        at = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(at.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def coins(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Yield 0 or 1 for each of `n` samples, as pieces of a (repeats, n) matrix."""
    rng, size = np.random.default_rng(seed + 2), max(1, CELLS // n)
    for i in range(0, repeats, size):
        yield rng.integers(2, size=(min(size, repeats - i), n)).astype(np.float64)


def number(v: Any) -> float | None:
    return float(v) if np.isfinite(v) else None
