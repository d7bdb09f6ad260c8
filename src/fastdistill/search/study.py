"""The search: which run comes next and which one ends early, until the time is over.

Optuna proposes the runs, stops the weak ones (successive halving, arXiv:1810.05934) and stores all
of them.
"""

import base64
import json
import math
import zlib
from contextlib import contextmanager
from datetime import datetime
from itertools import product
from time import time

import numpy as np
import torch

from ..base.outputs import DistillError
from .candidates import LABELS
from .result import Found, Run, best_of

__all__ = ['Search', 'import_optuna']

FINALISTS = 2  # beside labels alone
PROPOSALS = 5  # of Optuna, which may have run before; then one that did not is drawn at random


def import_optuna():
    try:
        import optuna
    except ImportError as e:
        raise ImportError(
            "Looking for a recipe needs Optuna: pip install 'fastdistill[find]'"
        ) from e
    return optuna


@contextmanager
def quiet():
    """Optuna reports warnings alone."""
    log = import_optuna().logging
    was = log.get_verbosity()
    log.set_verbosity(log.WARNING)
    try:
        yield
    finally:
        log.set_verbosity(was)


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
        storage: URL of a database ('sqlite:///find.db'), a file, or Optuna's storage; None:
            nothing is kept.
        name: Of the search in the storage.
        facts: What a stored search must have in common with this one.
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
        storage=None,
        name: str = 'fastdistill',
        facts: dict | None = None,
        metric: str = 'score',
        show=lambda text, share: None,
    ):
        self.optuna = import_optuna()
        self.candidates, self.rates, self.train = (
            {c.name: c for c in candidates},
            [float(o) for o in rates],
            train,
        )
        self.n_epoch, self.metric, self.n_trials, self.seeds, self.show = (
            n_epoch,
            metric,
            trials,
            seeds,
            show,
        )
        self.begin, self.end = begin, end
        self.cut, self.errors, self.n_runs = [], {}, 0
        facts = dict(
            facts or {},
            n_epoch=n_epoch,
            rates=self.rates,
            candidates={c.name: {k: list(v) for k, v in c.options.items()} for c in candidates},
        )
        self._open(storage, name, facts, n_epoch)

    def _open(self, storage, name, facts, n_epoch):
        samplers, pruners = self.optuna.samplers, self.optuna.pruners
        if isinstance(storage, str) and '://' not in storage:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage = JournalStorage(JournalFileBackend(storage))

        def study(part, pruner):
            with quiet():
                return self.optuna.create_study(
                    storage=storage,
                    study_name=f'{name}, {part}',
                    direction='maximize',
                    pruner=pruner,
                    load_if_exists=True,
                )

        # subtle: of labels alone every rate gets a whole run: while a rate warms up, its scores say little of its end,
        # and a comparison with a rate that was stopped too early would not be fair
        self.alone = study('labels alone', pruners.NopPruner())
        check_facts(self.alone, json.loads(json.dumps(facts)), name)
        n = max(10, 2 * len(self.candidates))
        halving = pruners.SuccessiveHalvingPruner(min_resource=-(-n_epoch // 3), reduction_factor=2)
        self.taught = study('recipes', halving)
        seed = len(self.taught.get_trials(deepcopy=False))
        self.taught.sampler = samplers.TPESampler(seed=seed, n_startup_trials=n)
        self.rng = np.random.default_rng(seed)
        self.again = study('seeds', pruners.NopPruner())
        for lr in self.rates:
            self._plan(self.alone, dict(recipe=LABELS.name, lr=lr))

    def _plan(self, study, params):
        """A run that comes before those that Optuna proposes, unless there is one with these
        parameters.
        """
        given = (wanted(t) for t in study.get_trials(deepcopy=False) if self._counts(t))
        if not any(params.items() <= o.items() for o in given):
            study.enqueue_trial(params)

    def _plan_recipes(self):
        """Each recipe begins with its usual options, and with the rate that is best for labels
        alone so far.
        """
        alone = best_of(self.runs()).get(LABELS.name)
        lr = self.rates[0] if alone is None else alone.lr
        for c in self.candidates.values():
            if any(
                wanted(t).get('recipe') == c.name for t in self.taught.get_trials(deepcopy=False)
            ):
                continue
            self._plan(self.taught, next(runs_with(c, [lr])))

    def _counts(self, trial):
        "Has it run, does it wait, or does another process run it now?"
        if trial.state.name != 'RUNNING':
            return trial.state.name != 'FAIL'
        return (datetime.now() - trial.datetime_start).total_seconds() < self.end - self.begin

    # the search

    def run(self) -> Found:
        """Search until the time is over, or until Ctrl-C."""
        try:
            while time() < self.search_end and (asked := self._next()):
                self._try(*asked)
            self._repeat()
        except KeyboardInterrupt:
            if not any(r.scores for r in self.runs()):
                raise
            self.show('interrupted: this is the best so far', None)
        if not any(r.scores for r in self.runs()):
            raise DistillError(self._nothing())
        return Found(
            {LABELS.name: LABELS, **self.candidates},
            self.runs(),
            self.finals(),
            metric=self.metric,
            n_epoch=self.n_epoch,
            rates=self.rates,
        )

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
        took = [whole_seconds(s) for s in (self.alone, self.taught)]
        if None in took:
            return self.end
        return self.end - min((1 + FINALISTS) * self.seeds * max(took), (self.end - self.begin) / 2)

    def _next(self):
        """(study, trial, run) of the next run; None if all were tried. Labels alone come first.
        After a third of the time, they take every other turn.
        """
        if self.n_trials is not None and self.n_runs >= self.n_trials:
            return None
        waiting = self.alone.get_trials(
            deepcopy=False, states=(self.optuna.trial.TrialState.WAITING,)
        )
        early = time() < self.begin + (self.end - self.begin) / 3
        asked = (
            self._ask(self.alone, {LABELS.name: LABELS})
            if waiting and (early or self.n_runs % 2)
            else None
        )
        if asked is None:
            self._plan_recipes()
            asked = self._ask(self.taught, self.candidates)
        return asked or (self._ask(self.alone, {LABELS.name: LABELS}) if waiting else None)

    def _ask(self, study, candidates):
        for i in range(PROPOSALS + 1):
            if not (left := self._left(study, candidates)):
                return None
            if i == PROPOSALS:
                study.enqueue_trial(left[self.rng.integers(len(left))])
            trial = study.ask()
            c = candidates[trial.suggest_categorical('recipe', list(candidates))]
            options = {
                k: trial.suggest_categorical(f'{c.name} {k}', v) for k, v in c.options.items()
            }
            run = Run(c.name, options, trial.suggest_categorical('lr', self.rates))
            if trial.params in left:
                return study, trial, run
            self._fail(study, trial)
        return None

    def _left(self, study, candidates):
        """The parameters of all runs that nobody has begun."""
        begun = [
            t.params
            for t in study.get_trials(deepcopy=False)
            if t.state.name != 'WAITING' and self._counts(t)
        ]
        return [
            o
            for c in candidates.values()
            if c.name not in self.errors
            for o in runs_with(c, self.rates)
            if o not in begun
        ]

    def _fail(self, study, trial):
        study.tell(trial, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def _try(self, study, trial, run):
        """One run of the search."""

        def after_epoch(score):
            trial.report(self._score(run, score), len(run.scores))
            run.stopped = len(run.scores) < self.n_epoch and trial.should_prune()
            return run.stopped

        self.n_runs += 1
        end = self.search_end
        with self._told(study, trial, run):
            self._train(run, after_epoch, lambda: time() > end)
            if not run.stopped and len(run.scores) < self.n_epoch:
                raise OutOfTime
            if run.stopped:
                study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
            else:
                study.tell(trial, run.score)

    def _train(self, run, after_epoch, late):
        recipe = self.all_candidates[run.name].recipe(run.options)
        return self.train(recipe, run.lr, run.seed, after_epoch, late)

    @property
    def all_candidates(self):
        return {LABELS.name: LABELS, **self.candidates}

    def _score(self, run, score):
        """Keep a score, and show it."""
        run.scores.append(score if math.isfinite(score) else -math.inf)
        text = self.all_candidates[run.name].written(run.options)
        again = f', seed {run.seed}' if run.seed else ''
        self.show(
            f'{run.name}: {text}, lr={run.lr:.3g}{again}: {self.metric} {score:.4g} after {len(run.scores)} of '
            f'{self.n_epoch} epochs',
            min((time() - self.begin) / (self.end - self.begin), 1.0),
        )
        return run.scores[-1]

    @contextmanager
    def _told(self, study, trial, run):
        """A run that is cut off is planned again, for whoever resumes. A recipe that can't be used
        is dropped.
        """
        try:
            yield
        except DistillError as e:
            self._fail(study, trial)
            if run.name == LABELS.name or run.seed:
                raise
            self.errors[run.name] = str(e)
            self.show(f'{run.name} is left out: {e}', None)
        except BaseException as e:
            self._fail(study, trial)
            if not run.seed:
                self.cut.append(run)
                study.enqueue_trial(trial.params)
            if not isinstance(e, OutOfTime):
                raise

    # the best runs again

    def _repeat(self):
        best = best_of(self.runs())
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
                self._run_again(Run(r.name, r.options, r.lr, seed))

    def _run_again(self, run):
        key = json.dumps([run.name, run.options, run.lr, run.seed], sort_keys=True)
        trials = self.again.get_trials(deepcopy=False)
        if any(t.user_attrs.get('run') == key and self._counts(t) for t in trials):
            return
        trial = self.again.ask()
        trial.set_user_attr('run', key)

        def after_epoch(score):
            trial.report(self._score(run, score), len(run.scores))

        with self._told(self.again, trial, run):
            items = self._train(run, after_epoch, lambda: time() > self.end)
            if items is None:
                raise OutOfTime
            trial.set_user_attr('items', pack(items))
            self.again.tell(trial, run.score)

    # what is stored

    def runs(self):
        """The runs of the search, those of other processes and of earlier searches in the same
        storage included.
        """
        found = [
            run_of(t)
            for s in (self.alone, self.taught)
            for t in s.get_trials(deepcopy=False)
            if t.state.name in ('COMPLETE', 'PRUNED')
        ]
        return found + self.cut

    def finals(self):
        trials = [t for t in self.again.get_trials(deepcopy=False) if t.state.name == 'COMPLETE']
        return [repeated_run(t) for t in trials]


def runs_with(c, rates):
    """The parameters of all runs with a candidate, the usual ones first."""
    for *values, lr in product(*c.options.values(), rates):
        yield dict(recipe=c.name, lr=lr, **{f'{c.name} {k}': v for k, v in zip(c.options, values)})


class OutOfTime(Exception):
    """A run did not get to its end."""


def check_facts(study, facts, name):
    """Refuse to continue another search."""
    if (have := study.user_attrs.get('facts')) is None:
        return study.set_user_attr('facts', facts)
    if wrong := [
        f'{k} {have.get(k)} there, {v} here' for k, v in facts.items() if have.get(k) != v
    ]:
        raise DistillError(
            f'The storage holds another search named {name!r} ({"; ".join(wrong)}). Give this one '
            'another name=, or another storage=.'
        )


def wanted(trial):
    """The parameters of a trial, also of one that waits."""
    return trial.params or trial.system_attrs.get('fixed_params', {})


def whole_seconds(study):
    """The longest whole run of a study; None if there is none."""
    return max(
        (
            t.duration.total_seconds()
            for t in study.get_trials(deepcopy=False)
            if t.state.name == 'COMPLETE'
        ),
        default=None,
    )


def reported_scores(trial):
    return [v for _, v in sorted(trial.intermediate_values.items())]


def run_of(trial):
    name = trial.params['recipe']
    options = {
        k.removeprefix(f'{name} '): v for k, v in trial.params.items() if k.startswith(f'{name} ')
    }
    return Run(
        name, options, trial.params['lr'], 0, reported_scores(trial), trial.state.name == 'PRUNED'
    )


def repeated_run(trial):
    name, options, lr, seed = json.loads(trial.user_attrs['run'])
    return Run(
        name, options, lr, seed, reported_scores(trial), items=unpack(trial.user_attrs['items'])
    )


def pack(items):
    return base64.b64encode(zlib.compress(items.float().numpy().astype('<f4').tobytes())).decode()


def unpack(text):
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), '<f4').copy())
