"""The search: which run comes next and which one ends early, until the time is over.

Optuna proposes the runs. The weak ones are stopped (successive halving, arXiv:1810.05934).
"""

from itertools import product
from time import time

from ..base.errors import DistillError
from .candidates import LABELS
from .proposals import import_optuna, proposed_run
from .result import Found, best_of
from .runs import Run, Runs

__all__ = ['Search']

FINALISTS = 2  # beside labels alone


class Search:
    """Runs with recipes, and runs with labels alone, with rates from one list. Of the recipes, the
    weaker half is stopped after a third of the training, and again after two thirds. Then the best
    once more, with other seeds.

    Args:
        candidates: List of `Candidate`
        rates: Learning rates to try, the usual one first.
        train: fn(recipe, lr, seed, after_epoch, late) -> scores of the items that judge; None
            if it ended early. after_epoch(score) and late() are true where the run has to end.
        n_epoch: Of a whole run.
        begin, end: Time when the search began, and when it must be over.
        trials: So many runs, then the best again; None: as many as there is time for.
        seeds: With which the best runs are repeated.
        folder: Of `Runs`
        facts: What a folder's search must have in common with this one.
        show: Called after each epoch, with the share of the time that has passed.
    """

    def __init__(
        self,
        candidates,
        rates,
        train,
        *,
        n_epoch: int,
        begin: float,
        end: float,
        trials: int | None = None,
        seeds: int = 5,
        folder=None,
        facts: dict | None = None,
        metric: str = 'score',
        show=lambda text, done: None,
    ):
        import_optuna()  # before time is spent
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
        self.cut = []  # runs that the end of the time, or an interrupt, ended
        self.busy = set()  # files of runs that other processes train now
        self.errors = {}  # candidate -> why it can't be used
        settings = dict(
            facts or {},
            n_epoch=n_epoch,
            rates=self.rates,
            candidates={c.name: {k: list(v) for k, v in c.options.items()} for c in candidates},
        )
        self.runs = Runs(self._train, folder, settings)

    def _train(self, run, after_epoch, late):
        recipe = self.all_candidates[run.name].recipe(run.options)
        items = self.train(recipe, run.lr, run.seed, after_epoch, late)
        if items is None:
            return None
        return items.tolist() if run.seed else []  # only repeated runs are judged

    def run(self) -> Found:
        """Search until the time is over, or until Ctrl-C."""
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

    def tried(self):
        """The runs of the search, also those of earlier searches and other processes in the same
        folder.
        """
        return [r for r in self.runs.finished() if not r.seed and r.scores] + self.cut

    def _nothing(self):
        if self.errors:
            return (
                f'No recipe could be tried. {" ".join(f"{k}: {v}" for k, v in self.errors.items())}'
            )
        return (
            f'No run finished an epoch in {(self.end - self.begin) / 60:.3g} minutes. Give it more minutes, or a '
            'part of the training set.'
        )

    @property
    def search_end(self):
        """When the best runs have to be repeated: the time that this takes, at most half of all."""
        whole = [r for r in self.runs.finished() if not r.seed and not r.stopped]
        alone = [r.seconds for r in whole if r.name == LABELS.name]
        if not 0 < len(alone) < len(whole):
            return self.end
        took = (1 + FINALISTS) * self.seeds * max(r.seconds for r in whole)
        return self.end - min(took, (self.end - self.begin) / 2)

    # which run comes next

    def _next(self):
        """The next run; None if all were tried. Labels alone come first. After a third of the time,
        they take every other turn.

        Of labels alone every rate gets a whole run: while a rate warms up, its scores say little of
        its end, and a comparison with a rate that was stopped too early would not be fair.
        """
        if self.n_trials is not None and self.n_runs >= self.n_trials:
            return None
        alone = next(iter(self._left({LABELS.name: LABELS})), None)
        early = time() < self.begin + (self.end - self.begin) / 3
        if alone is not None and (early or self.n_runs % 2):
            return alone
        return self._next_recipe() or alone

    def _left(self, candidates):
        """The runs that nobody has begun, for each candidate the usual ones first."""
        begun = {r.file for r in self.runs.finished()} | self.busy
        return [
            run
            for c in candidates.values()
            if c.name not in self.errors
            for run in runs_with(c, self.rates)
            if run.file not in begun
        ]

    def _next_recipe(self):
        """Each recipe begins with its usual options, and with the rate that is best for labels
        alone so far. Then Optuna proposes the runs.
        """
        best = best_of(self.tried())
        lr = best[LABELS.name].lr if LABELS.name in best else self.rates[0]
        left = self._left(self.candidates)
        for run in left:
            if run.name not in best and run.lr == lr:
                return run
        recipes = [r for r in self.runs.finished() if not r.seed and r.name != LABELS.name]
        return proposed_run(self.candidates, self.rates, recipes, left) if left else None

    # one run

    def _try(self, run):
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
        self.busy.clear()  # a process may have ended without its run
        if done.result is None and not done.stopped:
            self._cut_off(run)

    def _cut_off(self, run):
        """Whoever continues from the folder trains it again; here its scores count."""
        if run.scores:
            self.cut.append(run)

    def _is_over(self, run):
        """Show a run's new score; is the run to be stopped?"""
        text = self.all_candidates[run.name].written(run.options)
        again = f', seed {run.seed}' if run.seed else ''
        self.show(
            f'{run.name}: {text}, lr={run.lr:.3g}{again}: {self.metric} {run.score:.4g} after '
            f'{len(run.scores)} of {self.n_epoch} epochs',
            min((time() - self.begin) / (self.end - self.begin), 1.0),
        )
        return run.name != LABELS.name and not run.seed and self._is_weak(run)

    def _is_weak(self, run):
        """After a third and after two thirds of the epochs: is it not in the better half of the
        recipes' runs that came so far?
        """
        n, third = len(run.scores), -(-self.n_epoch // 3)
        if n not in (third, 2 * third) or n >= self.n_epoch:
            return False
        recipes = (r for r in self.tried() if r.name != LABELS.name)
        scores = [run.score, *(r.scores[n - 1] for r in recipes if len(r.scores) >= n)]
        return run.score < sorted(scores, reverse=True)[max(len(scores) // 2 - 1, 0)]

    # the best runs again

    def _repeat(self):
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


def runs_with(c, rates):
    """All runs with a candidate, the usual ones first."""
    for *values, lr in product(*c.options.values(), rates):
        yield Run(c.name, dict(zip(c.options, values)), lr)
