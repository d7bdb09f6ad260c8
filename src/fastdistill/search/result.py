"""What a search found: the recipe, its rate, a table and a plot of the runs, and whether its lead
is more than luck.
"""

import math
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch
from torch import Tensor

__all__ = ['Found', 'Lead', 'RunTable', 'Run', 'lead_of']


@dataclass
class Run:
    """One training of the search.

    Attributes:
        name: Of its candidate.
        options: Of the recipe.
        scores: After each epoch, on the items that choose.
        stopped: Before its last epoch.
        items: (N,) scores of the items that judge, after the last epoch.
    """

    name: str
    options: dict
    lr: float
    seed: int = 0
    scores: list = field(default_factory=list)
    stopped: bool = False
    items: Tensor | None = None
    seconds: float = 0.0

    @property
    def key(self):
        return self.name, tuple(sorted(self.options.items())), self.lr

    @property
    def score(self):
        return self.scores[-1] if self.scores else -math.inf

    @property
    def rank(self):
        """Runs that went on longer are better, since others were stopped for their scores; then the
        score decides.
        """
        return len(self.scores), self.score


@dataclass
class Lead:
    """Mean difference of two recipes' scores, and its 95% interval over items and seeds.

    Attributes:
        p: How often luck alone gives a difference as large as this, in either direction.
        n: Items.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    seeds: int

    @property
    def beyond_luck(self):
        return self.low > 0

    def __str__(self):
        return (
            f'{self.mean:+.4g} ({self.n} validation items that took no part in the choice, {self.seeds} seeds; '
            f'95% interval {self.low:+.4g} to {self.high:+.4g}, p = {self.p:.2g})'
        )


def lead_of(a, b) -> Lead | None:
    """How much better `a` is than `b`. None with fewer than two seeds or items, where the luck of a
    run can't be told.

    Both items and seeds are drawn: the variance of the mean is at most the sum of their mean's
    variances. The interval is Student's, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        a, b: (seeds, items) scores of the same items, in row i of runs with the same seed.
    """
    from scipy.stats import t

    d = (torch.as_tensor(a) - torch.as_tensor(b)).double()
    d = d[:, ~d.isnan().any(0)]
    if d.dim() != 2 or min(d.shape) < 2:
        return None
    parts = [(o.var().item() / len(o), len(o) - 1) for o in (d.mean(0), d.mean(1))]
    var, m = sum(v for v, _ in parts), d.mean().item()
    if not var > 0:
        return Lead(m, m, m, 0.0 if m else 1.0, d.shape[1], d.shape[0])
    df = var**2 / sum(v**2 / n for v, n in parts)
    half = t.ppf(0.975, df) * var**0.5
    return Lead(m, m - half, m + half, 2 * t.sf(abs(m) / var**0.5, df), d.shape[1], d.shape[0])


class RunTable(list):
    """A list of dicts, shown as a table."""

    def __repr__(self):
        if not self:
            return 'no runs'
        names = [*self[0]]
        cells = [names, *([as_text(r[n]) for n in names] for r in self)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return '\n'.join(
            '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells
        )


def as_text(v):
    return '' if v is None else f'{v:.4g}' if isinstance(v, float) else str(v)


class Found:
    """The result of `distill_find`: `student.distill(teacher, 5, found.lr, found.recipe)` trains
    with it.

    Args:
        candidates: Name -> `Candidate`; the first one is labels alone.
        runs: Of the search: `Run`s with one seed.
        finals: Of the best, again, with other seeds.
        metric: What the scores are; greater is better.
        n_epoch: Of a whole run.
        rates: All rates that labels alone should have had.
    """

    def __init__(
        self,
        candidates: dict,
        runs: list,
        finals: list = (),
        *,
        metric: str = 'score',
        n_epoch: int = 1,
        rates=(),
    ):
        self.candidates, self.runs, self.finals = (
            candidates,
            [r for r in runs if r.scores],
            list(finals),
        )
        self.metric, self.n_epoch, self.labels = metric, n_epoch, next(iter(candidates))
        self.rates = rates
        self.best = best_of(self.runs)
        self.winner = self._winner()
        self.lead = self._lead()

    def _winner(self):
        """The best mean over seeds, of the items that choose; without repeated runs, the best run
        of the search.
        """
        seeds = self._seeds()
        if not seeds:
            return max(self.best.values(), key=lambda r: r.rank)
        means = {
            r.key: (mean(f.score for f in self._repeats(r) if f.seed in seeds), r)
            for r in self._finalists()
        }
        return max(means.values(), key=lambda o: o[0])[1]

    def _repeats(self, run):
        return sorted((f for f in self.finals if f.key == run.key), key=lambda f: f.seed)

    def _finalists(self):
        """The best runs that were repeated; where two of them ran with several seeds, those that
        did.
        """
        found = [r for r in self.best.values() if self._repeats(r)]
        often = [r for r in found if len(self._repeats(r)) > 1]
        return often if len(often) > 1 else found

    def _seeds(self):
        """Seeds with which all finalists ran; none if fewer than two did."""
        seeds = [{f.seed for f in self._repeats(r)} for r in self._finalists()]
        return set.intersection(*seeds) if len(seeds) > 1 else set()

    def _lead(self):
        """Over labels alone; None where labels alone won, or where too few runs were repeated."""
        alone = self.best.get(self.labels)
        if alone is None or self.winner.name == self.labels:
            return None
        a, b = ({f.seed: f.items for f in self._repeats(r)} for r in (self.winner, alone))
        seeds = sorted(a.keys() & b.keys())
        return lead_of(*(torch.stack([o[s] for s in seeds]) for o in (a, b))) if seeds else None

    # what users read

    @property
    def recipe(self):
        return self.candidates[self.winner.name].recipe(self.winner.options)

    @property
    def lr(self):
        return self.winner.lr

    @property
    def text(self):
        """The recipe as code."""
        return self._written(self.winner)

    def _written(self, run):
        return self.candidates[run.name].written(run.options)

    @property
    def verdict(self):
        """Is the recipe better than labels alone? In words."""
        if set(self.best) == {self.labels}:
            return 'no recipe was tried yet'
        if self.winner.name == self.labels:
            return 'no recipe was better than labels alone on the items that chose'
        tried = {r.lr for r in self.runs if r.name == self.labels and len(r.scores) >= self.n_epoch}
        if left := set(self.rates) - tried:
            return (
                f'whether it is better than labels alone is unknown: there was no time for {len(left)} of their '
                f'{len(self.rates)} learning rates'
            )
        if self.lead is None:
            return (
                'whether its lead over labels alone is more than luck is unknown: there was no time to repeat both '
                'with other seeds'
            )
        return f'{"" if self.lead.beyond_luck else "not "}more than luck: lead over labels alone {self.lead}'

    @property
    def table(self):
        """A row for each candidate, the best first: its best run, and the mean over the seeds of
        the repeated runs.
        """
        order = lambda r: (r is self.winner, bool(self._repeats(r)), r.rank)
        return RunTable(self._row(r) for r in sorted(self.best.values(), key=order, reverse=True))

    def _row(self, run):
        again = [f.items[~f.items.isnan()].mean().item() for f in self._repeats(run)]
        return {
            '': '*' if run is self.winner else '',
            'candidate': run.name,
            'recipe': self._written(run),
            'lr': run.lr,
            'runs': sum(r.name == run.name for r in self.runs),
            'epochs': f'{len(run.scores)} of {self.n_epoch}',
            self.metric: run.score,
            'seeds': len(again),
            'judged': mean(again) if again else None,
            '+-': stdev(again) if len(again) > 1 else None,
        }

    def __repr__(self):
        return f'{self.winner.name}: {self.text}, lr={self.lr:.3g}; {self.verdict}'

    def plot(self):
        """The score of each run over its learning rate, a color for each candidate. Returns the
        figure.
        """
        import matplotlib.pyplot as plt  # noqa: F401 (notebooks show figures only after this import)
        from matplotlib.figure import Figure

        fig = Figure(figsize=(7, 4), layout='constrained')
        ax = fig.subplots()
        for i, name in enumerate(o for o in self.candidates if o in self.best):
            for whole in (True, False):
                runs = [
                    r
                    for r in self.runs
                    if r.name == name
                    and math.isfinite(r.score)
                    and (len(r.scores) >= self.n_epoch) == whole
                ]
                ax.scatter(
                    [r.lr for r in runs],
                    [r.score for r in runs],
                    color=f'C{i}',
                    marker='o' if whole else 'x',
                    alpha=0.9 if whole else 0.4,
                    label=name if whole else None,
                )
        if math.isfinite(self.winner.score):
            ax.scatter([self.lr], [self.winner.score], s=200, facecolors='none', edgecolors='black')
        ax.set(
            xscale='log',
            xlabel='learning rate (x: stopped early)',
            ylabel=self.metric,
            title=f'{self.winner.name}, lr={self.lr:.3g}',
        )
        ax.legend(fontsize=8)
        return fig


def best_of(runs):
    """Name of a candidate -> its best run."""
    best = {}
    for r in runs:
        if r.name not in best or r.rank > best[r.name].rank:
            best[r.name] = r
    return best
