"""Result of a search, with the best recipe and learning rate, a table, a plot, and a significance
test.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from ..evaluation.plot_style import new_figure
from ..recipes.term import Recipe
from .resumable_runs import Run
from .significance import Lead, lead_of, spread
from .text_table import TextTable


class Found:
    """Result of `distill_find`. To train with the result, call `student.distill(teacher, 5,
    found.lr, found.recipe)`.

    Args:
        candidates: {name: `Candidate`}. The first candidate is training on labels only.
        runs: Runs of the search, with one seed.
        finals: Repetitions of the best runs with different seeds.
        metric: Name of the score. Higher values are better.
        n_epoch: Number of epochs of a complete run.
        rates: Learning rates that must be tried with labels only before there can be a verdict.
    """

    def __init__(
        self,
        candidates: dict,
        runs: Sequence[Run],
        finals: Sequence[Run] = (),
        *,
        metric: str = 'score',
        n_epoch: int = 1,
        rates: Sequence[float] = (),
    ) -> None:
        self.candidates = candidates
        self.runs = [r for r in runs if r.scores]
        self.finals = list(finals)
        self.metric, self.n_epoch, self.labels = metric, n_epoch, next(iter(candidates))
        self.rates = rates
        self.best = best_of(self.runs)
        self.winner = self._winner()
        self.lead = self._lead()

    def _winner(self) -> Run:
        """Return the run with the best mean score over the seeds, on the items used for choosing.

        If no runs were repeated, return the best run of the search.
        """
        seeds = self._seeds()
        if not seeds:
            return max(self.best.values(), key=lambda r: r.rank)
        means = {
            r.key: (mean(f.score for f in self._repeats(r) if f.seed in seeds), r)
            for r in self._finalists()
        }
        return max(means.values(), key=lambda o: o[0])[1]

    def _repeats(self, run: Run) -> list[Run]:
        return sorted((f for f in self.finals if f.key == run.key), key=lambda f: f.seed)

    def _finalists(self) -> list[Run]:
        """Return the best runs that were repeated. If at least two runs were repeated with several
        seeds, return only these runs.
        """
        found = [r for r in self.best.values() if self._repeats(r)]
        often = [r for r in found if len(self._repeats(r)) > 1]
        return often if len(often) > 1 else found

    def _seeds(self) -> set[int]:
        """Return the seeds that all finalists have in common. The set is empty if there are fewer
        than two finalists.
        """
        seeds = [{f.seed for f in self._repeats(r)} for r in self._finalists()]
        return set.intersection(*seeds) if len(seeds) > 1 else set()

    def _lead(self) -> Lead | None:
        """Compute the lead of the winner over labels only. Return None if labels only won, or if
        too few runs were repeated.
        """
        alone = self.best.get(self.labels)
        if alone is None or self.winner.name == self.labels:
            return None
        a, b = ({f.seed: f.items for f in self._repeats(r)} for r in (self.winner, alone))
        seeds = sorted(a.keys() & b.keys())
        return lead_of(*(torch.stack([o[s] for s in seeds]) for o in (a, b))) if seeds else None

    # public attributes and methods

    @property
    def recipe(self) -> Recipe | Mapping[str, Any]:
        return self.candidates[self.winner.name].recipe(self.winner.options)

    @property
    def lr(self) -> Any:
        return self.winner.lr

    @property
    def text(self) -> str:
        """The recipe as code."""
        return self._written(self.winner)

    def _written(self, run: Run) -> str:
        return self.candidates[run.name].written(run.options)

    @property
    def verdict(self) -> str:
        """Text that says whether the recipe is better than labels only."""
        if set(self.best) == {self.labels}:
            return 'no recipe was tried yet'
        if self.winner.name == self.labels:
            return 'no recipe was better than labels alone on the items used to choose'
        tried = {r.lr for r in self.runs if r.name == self.labels and len(r.scores) >= self.n_epoch}
        if left := set(self.rates) - tried:
            return (
                'it is unknown whether it is better than labels alone, because there was no time to '
                f'try {len(left)} of {len(self.rates)} learning rates with labels alone'
            )
        if self.lead is None:
            return (
                'it is unknown whether its lead over labels alone is more than luck, because there '
                'was no time to repeat both with different seeds'
            )
        return f'{"" if self.lead.beyond_luck else "not "}more than luck: lead over labels alone {self.lead}'

    @property
    def table(self) -> TextTable:
        """Table with one row per candidate, sorted from best to worst.

        Each row contains the best run of the candidate and the mean score of its repeated runs.
        """
        order = lambda r: (r is self.winner, bool(self._repeats(r)), r.rank)
        return TextTable(self._row(r) for r in sorted(self.best.values(), key=order, reverse=True))

    def _row(self, run: Run) -> dict[str, Any]:
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
            '+-': spread(again),
        }

    def __repr__(self) -> str:
        return f'{self.winner.name}: {self.text}, lr={self.lr:.3g}; {self.verdict}'

    def plot(self) -> Any:
        """Plot the score of each run against its learning rate, in one color per candidate.

        Returns:
            The matplotlib figure.
        """
        fig = new_figure(7, 4)
        ax = fig.subplots()
        for i, name in enumerate(o for o in self.candidates if o in self.best):
            for whole in (True, False):
                runs: list[Any] = [
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


def best_of(runs: Iterable[Run]) -> dict[str, Run]:
    """Return {candidate name: best run}."""
    best: dict[str, Run] = {}
    for r in runs:
        if r.name not in best or r.rank > best[r.name].rank:
            best[r.name] = r
    return best
