"""Search for a recipe by training short runs until the time limit is reached.

Optuna proposes the runs. Weak runs are stopped early (successive halving, arXiv:1810.05934).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from time import time

from ..base.content import describe_content
from ..base.errors import DistillError
from .candidates import LABELS, Candidate
from .optuna_proposals import import_optuna, proposed_run
from .resumable_runs import Run, Runs
from .search_result import Found, best_of

FINALISTS = 2  # number of recipes whose runs are repeated, in addition to training on labels only


class Search:
    """Search over recipes and learning rates. Training on labels only, without a teacher, is always
    included.

    After one third and after two thirds of the epochs, a run is stopped if its score is in the
    lower half of all runs with recipes. At the end, the best runs are repeated with different
    seeds.

    Args:
        candidates: List of `Candidate`.
        rates: Learning rates to try, with the default first.
        train: fn(recipe, lr, seed, after_epoch, late) -> scores of the test items, or None if
            training ended early. after_epoch(score) and late() return True if training has to stop.
        metric: Name of the score. Higher values are better.
        n_epoch: Number of epochs of a complete run.
        begin, end: Start and end time of the search.
        trials: Maximum number of runs, not counting repetitions of the best runs. None for as many
            as the time permits.
        seeds: Number of seeds with which the best runs are repeated.
        folder: As in `Runs`.
        facts: {name: value} that must be the same in all searches that use the folder.
        show: fn(text, done), called after each epoch with the fraction of the time that has passed.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        rates: Iterable[float],
        train: Callable,
        *,
        n_epoch: int,
        begin: float,
        end: float,
        trials: int | None = None,
        seeds: int = 5,
        folder: str | Path | None = None,
        facts: dict | None = None,
        metric: str = 'score',
        show: Callable[[str, float | None], None] = lambda text, done: None,
    ) -> None:
        import_optuna()  # fail early if Optuna is not installed
        self.candidates = {c.name: c for c in candidates}
        self.all_candidates = {LABELS.name: LABELS, **self.candidates}
        self.rates = [float(o) for o in rates]
        self.train = train
        self.n_epoch = n_epoch
        self.begin, self.end = begin, end
        self.n_trials = trials
        self.seeds = seeds
        self.metric = metric
        self.show = show
        self.n_runs = 0
        self.cut: list[Run] = []  # runs that were cut off by the time limit or an interrupt
        self.busy: set[str] = set()  # files of runs that other processes are training
        self.errors: dict[str, str] = {}  # {candidate: why it can't be used}
        settings = dict(
            facts or {},
            n_epoch=n_epoch,
            rates=self.rates,
            candidates={c.name: describe_content([c.make, c.options]) for c in candidates},
        )
        self.runs = Runs(self._train, folder, settings)

    def _train(
        self, run: Run, after_epoch: Callable[[float], bool], late: Callable[[], bool]
    ) -> list | None:
        recipe = self.all_candidates[run.name].recipe(run.options)
        items = self.train(recipe, run.lr, run.seed, after_epoch, late)
        if items is None:
            return None
        # scores of items are needed only for repeated runs
        return items.tolist() if run.seed else []

    def run(self) -> Found:
        """Search until the time limit is reached, or until Ctrl-C."""
        try:
            while time() < self.search_end and (run := self._next()):
                self._try(run)
            self._repeat()
        except KeyboardInterrupt:
            if not self.tried():
                raise
            self.show('interrupted: this is the best so far', None)
        if not self.tried():
            raise DistillError(self._nothing())
        return Found(
            self.all_candidates,
            self.tried(),
            [r for r in self.runs.finished() if r.seed],
            metric=self.metric,
            n_epoch=self.n_epoch,
            rates=self.rates,
        )

    def tried(self) -> list[Run]:
        """Return the runs of the search, including those of earlier searches and of other processes
        in the same folder.
        """
        return [r for r in self.runs.finished() if not r.seed and r.scores] + self.cut

    def _nothing(self) -> str:
        if self.errors:
            return (
                f'No recipe could be tried. {" ".join(f"{k}: {v}" for k, v in self.errors.items())}'
            )
        return (
            f'No run finished an epoch in {(self.end - self.begin) / 60:.3g} minutes. Increase '
            'minutes=, or use only part of the training set.'
        )

    @property
    def search_end(self) -> float:
        """Time at which the search must stop so that the best runs can be repeated. At most half of
        the total time is reserved for repetitions.
        """
        whole = [r for r in self.runs.finished() if not r.seed and not r.stopped]
        alone = [r.seconds for r in whole if r.name == LABELS.name]
        if not 0 < len(alone) < len(whole):
            return self.end
        took = (1 + FINALISTS) * self.seeds * max(r.seconds for r in whole)
        return self.end - min(took, (self.end - self.begin) / 2)

    # choice of the next run

    def _next(self) -> Run | None:
        """Return the next run, or None if there are no more runs.

        During the first third of the time, runs on labels only come first. After that, every second
        run is on labels only, as long as there are learning rates left to try.

        Runs on labels only are never stopped early. Early scores do not predict the final result
        well, because the learning rate is still warming up, and stopping a run with a good learning
        rate would make the comparison unfair.
        """
        if self.n_trials is not None and self.n_runs >= self.n_trials:
            return None
        alone = next(iter(self._left({LABELS.name: LABELS})), None)
        early = time() < self.begin + (self.end - self.begin) / 3
        if alone is not None and (early or self.n_runs % 2):
            return alone
        return self._next_recipe() or alone

    def _left(self, candidates: Mapping[str, Candidate]) -> list[Run]:
        """Return all runs that have not been started. For each candidate, the run with default
        options comes first.
        """
        begun = {r.file for r in self.runs.finished()} | self.busy
        return [
            run
            for c in candidates.values()
            if c.name not in self.errors
            for run in runs_with(c, self.rates)
            if run.file not in begun
        ]

    def _next_recipe(self) -> Run | None:
        """Return the next run with a recipe.

        The first run of each recipe uses the default options and the learning rate that is best for
        labels only so far. After that, Optuna proposes the runs.
        """
        best = best_of(self.tried())
        lr = best[LABELS.name].lr if LABELS.name in best else self.rates[0]
        left = self._left(self.candidates)
        for run in left:
            if run.name not in best and run.lr == lr:
                return run
        recipes = [r for r in self.runs.finished() if not r.seed and r.name != LABELS.name]
        return proposed_run(self.candidates, self.rates, recipes, left) if left else None

    # execution of a run

    def _try(self, run: Run) -> None:
        self.n_runs += 1
        end = self.search_end
        try:
            done = self.runs.once(run, self._is_over, lambda: time() > end)
        except DistillError as e:
            if run.name == LABELS.name:
                raise
            self.errors[run.name] = str(e)
            self.show(f'{run.name} is left out: {e}', None)
            return
        except BaseException:
            self._cut_off(run)
            raise
        if done is None:
            self.busy.add(run.file)
            self.n_runs -= 1
            return
        # another process may have ended without finishing its run, so try its runs again
        self.busy.clear()
        if done.result is None and not done.stopped:
            self._cut_off(run)

    def _cut_off(self, run: Run) -> None:
        """Keep the scores of a run that was ended early. A search that resumes from the folder
        trains this run again.
        """
        if run.scores:
            self.cut.append(run)

    def _is_over(self, run: Run) -> bool:
        """Show the new score of a run. Return True if the run should be stopped."""
        text = self.all_candidates[run.name].written(run.options)
        again = f', seed {run.seed}' if run.seed else ''
        self.show(
            f'{run.name}: {text}, lr={run.lr:.3g}{again}: {self.metric} {run.score:.4g} after '
            f'{len(run.scores)} of {self.n_epoch} epochs',
            min((time() - self.begin) / (self.end - self.begin), 1.0),
        )
        return run.name != LABELS.name and not run.seed and self._is_weak(run)

    def _is_weak(self, run: Run) -> bool:
        """Return True if the score of a run is in the lower half of the scores of all runs with
        recipes at the same epoch.

        Scores are compared only after one third and after two thirds of the epochs.
        """
        n, third = len(run.scores), -(-self.n_epoch // 3)
        if n not in (third, 2 * third) or n >= self.n_epoch:
            return False
        recipes = (r for r in self.tried() if r.name != LABELS.name)
        scores = [run.score, *(r.scores[n - 1] for r in recipes if len(r.scores) >= n)]
        return run.score < sorted(scores, reverse=True)[max(len(scores) // 2 - 1, 0)]

    # repetitions of the best runs

    def _repeat(self) -> None:
        best = best_of(self.tried())
        others = sorted(
            (r for n, r in best.items() if n != LABELS.name), key=lambda r: r.rank, reverse=True
        )
        if LABELS.name not in best or not others:
            return
        finalists = [others[0], best[LABELS.name], *others[1:FINALISTS]]
        for seed in range(1, self.seeds + 1):
            for r in finalists:
                if time() >= self.end:
                    return
                again = Run(r.name, r.options, r.lr, seed)
                self.runs.once(again, self._is_over, lambda: time() > self.end)


def runs_with(c: Candidate, rates: Iterable[float]) -> Iterator[Run]:
    """Yield all runs of a candidate, starting with the default options."""
    for *values, lr in product(*c.options.values(), rates):
        yield Run(c.name, dict(zip(c.options, values)), lr)
