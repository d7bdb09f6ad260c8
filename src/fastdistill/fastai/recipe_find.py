"""Add `Learner.distill_find`, which searches for a recipe and a learning rate for a student."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from math import inf
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time
from typing import Any

from fastai.basics import Learner, OptimWrapper, noop, patch

from ..base.content import describe_content
from ..base.distributed import rank
from ..base.errors import DistillError, DistillWarning, check_whole
from ..base.model_state import restored
from ..base.progress_bar import progress_bar
from ..base.random_state import guarded_random_state
from ..checks.batch_scores import METRICS
from ..checks.teacher_outputs import BATCHES
from ..search.candidates import candidates_for, candidates_for_heads, given_candidates
from ..search.optuna_proposals import import_optuna
from ..search.recipe_search import Search
from ..search.search_result import Found
from .cache_data import cache_teacher
from .callback_arguments import feed_of, refuse_options
from .default_recipe import example_of, facts_for_choice
from .learner_heads import comparisons_of, options_of_heads
from .multi_head import check_heads
from .probe_batches import number_of_batches
from .teacher_check import check_teacher
from .teachers import is_heads
from .training_setup import setup_of, teacher_text
from .transforms import moves
from .trial_scores import scorer, scorer_of_heads
from .trials import run_trial

FACTORS = 1, 0.32, 3.2, 0.1, 10  # multiples of the Learner's learning rate
# maximum number of views to store if augmentation moves the positions of the outputs (masks,
# tokens)
MOST_VIEWS = 4


@patch
def distill_find(
    self: Learner,
    teacher: Any,
    n_epoch: int,
    minutes: float = 10,
    *,
    rates: Iterable[float] | None = None,
    recipes: dict | None = None,
    live: bool = False,
    score: str | Callable | None = None,
    trials: int | None = None,
    seeds: int = 5,
    folder: str | Path | None = None,
    kind: str | None = None,
    axis: int | None = None,
    output: Any = None,
    check: bool = True,
    fine_tune: bool = False,
    show: bool = True,
    **kwargs: Any,
) -> Found:
    """Search for the best recipe, its options and the learning rate.

    Train with the result: `student.distill(teacher, 5, found.lr, found.recipe)`.

    Each run begins with the student's current weights. The student itself is not changed.

    The recipe is chosen on half of the validation items. The other half tests whether the recipe is
    significantly better than training on labels only. The learning rate for training on labels only
    is tuned in the same way.

    Args:
        teacher: Anything that `distill` accepts. The teacher is run only once, and all runs use the
            stored outputs. For several heads, a dict {head name: teacher}. Some runs use the same
            recipe for all heads, others use the recipe that was chosen for each head.
        n_epoch: Number of epochs of each run, and of the training in which you will use the recipe.
        minutes: Time limit of the search. When the time is up, the search returns the best result
            so far.
        rates: Learning rates to try. If None, the search tries the Learner's learning rate and four
            others, from 10 times lower to 10 times higher.
        recipes: A dict {name: recipe or text of the recipe} of recipes to try. If None, the search
            tries the usual recipes for the task.
        live: Whether to run the teacher in each trial. With True, recipes that compare layers are
            tried too.
        score: fn(logits, targets) -> (B,) score of each item, where higher is better. For several
            heads, the logits are a dict {head name: logits}. If None, the score of `check_teacher`
            is used, averaged over the heads.
        trials: Maximum number of runs, including runs on labels only. If None, only `minutes`
            limits the search.
        seeds: Number of random seeds for repeating the best runs and the run on labels only, if
            time permits.
        folder: Folder in which finished runs are stored. The same call resumes from this folder.
            Several processes can share the folder. An error is raised if the recipes, the teacher,
            the data, the batch sizes, the optimizer or the task loss have changed. If None, nothing
            is stored.
        kind, axis, output: As in `distill`.
        check: Whether to look for mistakes before the search.
        fine_tune: Whether to train with `Learner.fine_tune` instead of `fit_one_cycle`.
        show: Whether to show progress and a table. Notebooks also show a plot.
        **kwargs: More training options, as in `distill`.
    """
    begin = time()
    import_optuna()
    refuse_search(self, score, kwargs)
    refuse_numbers(
        minutes,
        dict(n_epoch=(n_epoch, 1), seeds=(seeds, 0), trials=(1 if trials is None else trials, 1)),
    )
    rates = own_rates(self) if rates is None else as_rates(rates)
    refuse_options(is_heads(teacher), output=output)
    heads = comparisons_of(teacher, output)
    kinds = options_of_heads(kind, 'kind', heads)
    tasks = {k: h.task_of(self, kinds[k], axis) for k, h in heads.items()}
    own_score, (metric, score) = score, how_to_score(heads, tasks, score)
    several = is_heads(teacher)
    show = show and self.logger is not noop and rank() == 0
    stored = [k for k, h in heads.items() if feed_of(h.source) is not None]
    if stored and live:
        raise DistillError(
            'live=True needs a teacher that runs, not stored outputs: pass the teacher itself.'
        )
    as_it_is = live or bool(stored)
    with guarded_random_state(), restored(*self.dls.loaders):
        facts = facts_of_heads(self, teacher, heads, tasks, stored, check, show)
        if recipes is not None:
            candidates = given_candidates(recipes)
        elif several:
            candidates = candidates_for_heads(facts, layers=live)
        else:
            candidates = candidates_for(**facts[''], layers=live)
        positions = any(facts[k].get('dense') or tasks[k].kind == 'regression' for k in heads)
        with (
            answers(self, teacher, tasks, as_it_is, positions, n_epoch, show) as source,
            progress_bar(show, 'of the time') as progress,
        ):
            options = dict(n_epoch=n_epoch, kind=kind, axis=axis, fine_tune=fine_tune, **kwargs)
            outputs = {k: h.output for k, h in heads.items()} if several else output
            epochs = n_epoch + (kwargs.get('freeze_epochs', 1) if fine_tune else 0)
            of_each = lambda fn: {k: fn(k) for k in heads} if several else fn('')
            known = dict(
                kind=of_each(lambda k: tasks[k].kind),
                classes=of_each(lambda k: facts[k].get('classes')),
                fine_tune=fine_tune,
                **sizes(self),
                **({} if folder is None else dict(setup_of(self), teacher=teacher_text(teacher))),
                score=describe_content(own_score),
                options=describe_content(kwargs),
            )
            found = Search(
                candidates,
                rates,
                partial(run_trial, self, source, score, outputs, options),
                n_epoch=epochs,
                begin=begin,
                end=begin + 60 * minutes,
                trials=trials,
                seeds=seeds,
                folder=folder,
                facts=known,
                metric=metric,
                show=progress,
            ).run()
    if show:
        report(found, n_epoch)
    return found


# {option of `distill` that `distill_find` does not accept: what to do instead}
OTHERS = {
    'lr_max': 'give rates=[...]',
    'cbs': 'add callbacks to the Learner',
    'storage': "pass folder='find', in which each finished run is stored",
} | dict.fromkeys(
    ('recipe', 'T', 'alpha', 'loss'),
    'give recipes=dict(mine=kd(T=2, alpha=.5), ...)',
)


def refuse_search(learn, score, options) -> None:
    """Raise an error for options that can't be used in a search. This happens before any run."""
    for k in OTHERS:
        if k in options:
            raise DistillError(f'distill_find takes no {k}=: {OTHERS[k]}.')
    if options.get('unlabeled') is not None:
        raise DistillError(
            'distill_find takes no unlabeled=: there are no stored outputs for inputs without '
            'labels. Find a recipe without them, then distill(teacher, n_epoch, found.lr, '
            'found.recipe, unlabeled=...).'
        )
    if score is not None and not callable(score):
        raise DistillError(
            f'score={score!r}: must be a function of logits and targets that returns a score for each item.'
        )
    if len(learn.dls.loaders) < 2 or getattr(learn.dls.valid, 'n', None) == 0:
        raise DistillError(
            'distill_find needs a validation set: one half chooses the recipe, the other half tests it.'
        )
    if isinstance(learn.opt_func, OptimWrapper):
        raise DistillError(
            'opt_func is an existing optimizer, but each run needs a new one. Give the Learner a '
            'function: opt_func=partial(OptimWrapper, opt=torch.optim.AdamW).'
        )


def refuse_numbers(minutes, whole: dict) -> None:
    """Raise an error for numbers that make a search impossible.

    Args:
        minutes: Time limit.
        whole: {name of an integer option: (value, smallest allowed value)}.
    """
    if not (isinstance(minutes, Real) and minutes > 0):
        raise DistillError(f'minutes={minutes!r}: must be a positive number.')
    for k, (v, least) in whole.items():
        check_whole(k, v, least)


def as_rates(rates):
    """Return the user's learning rates as a list."""
    try:
        found = [float(o) for o in rates]
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 < o < inf for o in found):
        raise DistillError(
            f'rates={rates!r}: must be a list of positive learning rates, as in [1e-3, 3e-3].'
        )
    return found


def own_rates(learn):
    lr = learn.lr.stop if isinstance(learn.lr, slice) else learn.lr
    return [lr * f for f in FACTORS]


def how_to_score(heads, tasks, score):
    """Return (name of the score, fn(logits, targets) -> (B,) score of each item)."""
    if score is not None:
        return 'score', score
    kinds = {t.kind for t in tasks.values()}
    if len(kinds) > 1:
        raise DistillError(
            'The heads have different kinds of predictions, so their scores cannot be averaged: '
            'pass score=, a function of the logits (a dict {{head name: logits}}) and the targets '
            'that returns a score for each item.'
        )
    kind = kinds.pop()
    metric = '-squared error' if kind == 'regression' else METRICS[kind]
    if '' in tasks:
        return metric, scorer(tasks[''])
    return f'{metric}, mean of the heads', scorer_of_heads(heads, tasks)


def facts_of_heads(learn, teacher, heads, tasks, stored, check, show) -> dict:
    """Return {head name: arguments of `candidates_for`}.

    Args:
        learn: The student's Learner.
        teacher: Anything that `distill` accepts.
        heads: {head name: head}.
        tasks: {head name: `Task`}.
        stored: Names of the heads that have stored outputs.
        check: Whether to look for mistakes.
        show: Whether to print messages.
    """
    found = {}
    if check and len(stored) < len(heads):
        found = look(learn, teacher, heads, tasks, stored)
    for f in found.values():
        f.enforce(show)
    facts = {}
    for k, h in heads.items():
        example = example_of(learn, h.output)
        source = feed_of(h.source) if k in stored else h.teacher_of(learn, tasks[k])
        facts[k] = facts_for_choice(example, tasks[k], source, found.get(k))
        if not facts[k].pop('labels', True):
            raise DistillError(
                'These batches have no labels, so recipes cannot be scored: add labels to the validation set.'
            )
        facts[k]['maps'] = example is not None and example.logits.dim() == 4
    return facts


def look(learn, teacher, heads, tasks, stored) -> dict:
    """Return {head name: findings of `check_teacher`}."""
    if '' in heads:
        output = heads[''].output
        return {'': check_teacher(learn, teacher, tasks[''], output=output, n_epoch=None)}
    running = {k: None if str(k) in stored else t for k, t in teacher.items()}
    kinds = {k: t.kind for k, t in tasks.items() if k not in stored}
    return check_heads(learn, running, kinds, None, None, BATCHES)


def sizes(learn):
    """Return the numbers of batches and parameters, which must not change when a search is
    resumed.
    """
    return dict(
        batches=[number_of_batches(dl) for dl in learn.dls.loaders],
        parameters=sum(p.numel() for p in learn.model.parameters()),
    )


@contextmanager
def answers(learn, teacher, tasks, as_it_is, positions, n_epoch, show):
    """Yield the teacher itself or a temporary cache of the teacher's outputs, for use in all runs."""
    if as_it_is:
        yield teacher
        return
    kinds = {k: t.kind for k, t in tasks.items()}
    axis = next(iter(tasks.values())).axis
    with TemporaryDirectory(prefix='fastdistill') as folder:
        views = min(n_epoch, MOST_VIEWS) if positions and moves(learn.dls.train) else 0
        try:
            with warnings.catch_warnings():
                # this warning is irrelevant, because the temporary cache is only used with this
                # teacher
                warnings.filterwarnings('ignore', 'The weights of', DistillWarning)
                cache = cache_teacher(
                    teacher,
                    learn.dls,
                    Path(folder) / 'cache',
                    views,
                    kind=kinds.get('', kinds),
                    axis=axis,
                    check=False,
                    progress=show,
                )
        except DistillError as e:
            raise DistillError(f'{e} Or let the teacher run in each trial: live=True.') from e
        yield cache


def report(found, n_epoch) -> None:
    print(
        f'{found.table}\n\n{found}\nstudent.distill(teacher, {n_epoch}, found.lr, found.recipe) trains with it.'
    )
    from rich.console import Console

    if not Console().is_jupyter:
        return
    from IPython.display import display

    display(found.plot())
