"""Choose the next run of a search with Optuna, from the scores of earlier runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .resumable_runs import Run

# Optuna may propose finished runs. After this many proposals, a new run is chosen at random.
PROPOSALS = 5


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise ImportError(
            "Searching for a recipe needs Optuna: pip install 'fastdistill[find]'"
        ) from e
    return optuna


def proposed_run(candidates: dict, rates: list, runs: list[Run], left: list[Run]) -> Run:
    """Choose one of the remaining runs.

    Args:
        candidates: {name: `Candidate`}.
        rates: Learning rates to try.
        runs: Finished runs with these candidates.
        left: The remaining runs.
    """
    optuna = import_optuna()
    startup = max(10, 2 * len(candidates))
    sampler = optuna.samplers.TPESampler(seed=len(runs), n_startup_trials=startup)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # without a message about each study
    study = optuna.create_study(direction='maximize', sampler=sampler)
    optuna.logging.set_verbosity(verbosity)
    study.add_trials([as_trial(r, candidates, rates) for r in runs])
    files = {r.file for r in left}
    for _ in range(PROPOSALS):
        trial = study.ask()
        c = candidates[trial.suggest_categorical('recipe', list(candidates))]
        options = {k: trial.suggest_categorical(f'{c.name} {k}', v) for k, v in c.options.items()}
        run = Run(c.name, options, trial.suggest_categorical('lr', rates))
        if run.file in files:
            return run
    return left[np.random.default_rng(len(runs)).integers(len(left))]


def as_trial(run: Run, candidates: Mapping[str, Any], rates: Sequence[float]) -> Any:
    """Convert a finished run to an Optuna trial."""
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    params = {f'{run.name} {k}': v for k, v in run.options.items()}
    choices = {f'{run.name} {k}': v for k, v in candidates[run.name].options.items()}
    params |= dict(recipe=run.name, lr=run.lr)
    choices |= dict(recipe=list(candidates), lr=rates)
    return create_trial(
        params=params,
        distributions={k: CategoricalDistribution(v) for k, v in choices.items()},
        state=TrialState.PRUNED if run.stopped else TrialState.COMPLETE,
        value=run.score,
        intermediate_values=dict(enumerate(run.scores, 1)),
    )
