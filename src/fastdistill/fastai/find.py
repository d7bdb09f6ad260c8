"""`Learner.distill_find`: look for the recipe and the learning rate that suit a student, its data
and its teacher.
"""

import warnings
from contextlib import contextmanager
from math import inf
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

from fastai.basics import Learner, OptimWrapper, noop, patch

from ..base.distributed import rank
from ..base.outputs import DistillError, DistillWarning
from ..base.progress_bar import progress_bar
from ..base.random_state import guarded_random_state
from ..cache.source import is_whole
from ..checks.batch_scores import METRICS
from ..search.candidates import candidates_for, given_candidates
from ..search.proposals import import_optuna
from ..search.search import Search
from .arguments import feed_of
from .batches import restored
from .cache_data import cache_teacher
from .check import check_teacher
from .default_recipe import example_of, facts_for_choice
from .task import task_of
from .teachers import refuse_heads, teacher_of
from .transforms import moves
from .trial_callback import scorer
from .trials import Trials

__all__ = []

FACTORS = 1, 0.32, 3.2, 0.1, 10  # of the Learner's own rate
MOST_VIEWS = 4  # of outputs with positions, which augmentation moves


@patch
def distill_find(
    self: Learner,
    teacher,
    n_epoch: int,
    minutes: float = 10,
    *,
    rates=None,
    recipes: dict | None = None,
    live: bool = False,
    score=None,
    trials: int | None = None,
    seeds: int = 5,
    folder=None,
    kind: str | None = None,
    axis: int | None = None,
    output=None,
    check: bool = True,
    fine_tune: bool = False,
    show: bool = True,
    **kwargs,
):
    """Try recipes, their options and learning rates; return the best: `student.distill(teacher, 5,
    found.lr, found.recipe)`.

    Half of the validation items choose. The other half decides whether the lead over labels alone,
    with a rate of its own, is more than luck.

    Args:
        : The student. Each run begins with its present weights; nothing of it is changed.
        teacher: What `distill` takes. A teacher that runs is asked once, and its answers are
            used by all runs.
        n_epoch: Of the training for which a recipe is needed.
        minutes: The search ends after this time, with the best that it knows.
        rates: Learning rates to try; None: the learner's own, and two below and two above it,
            up to 10 times.
        recipes: Name -> recipe, or its text: these instead of the usual ones for the task.
        live: Let the teacher run in each trial, so that recipes between layers are tried too.
        score: fn(logits, targets) -> (B,) score of each item, greater is better; None: as in
            `check_teacher`
        trials: End the search after so many runs, those of labels alone included; None: by the
            time.
        seeds: The best runs and labels alone are repeated with so many seeds, if there is time.
        folder: Where each finished run is written: the same call continues from there, and
            several processes may share it. None: nothing is written.
        kind, axis, output: As in `distill`
        check: Look for mistakes first.
        fine_tune: Train with `Learner.fine_tune` instead of `fit_one_cycle`
        show: Progress, a table and, in notebooks, a plot.
        **kwargs: More options of the training, as in `distill`
    """
    begin = time()
    import_optuna()
    refuse_search(self, score, kwargs)
    refuse_numbers(
        minutes,
        dict(n_epoch=(n_epoch, 1), seeds=(seeds, 0), trials=(1 if trials is None else trials, 1)),
    )
    rates = own_rates(self) if rates is None else as_rates(rates)
    refuse_heads(teacher, 'to distill_find')
    task, show = (
        task_of(self.loss_func, kind, axis),
        show and self.logger is not noop and rank() == 0,
    )
    as_it_is = live or feed_of(teacher) is not None
    with guarded_random_state(), restored(*self.dls.loaders):
        facts = facts_of_task(self, teacher, task, output, live, check, show)
        candidates = (
            candidates_for(**facts, layers=live) if recipes is None else given_candidates(recipes)
        )
        positions = facts.get('dense') or task.kind == 'regression'
        with (
            answers(self, teacher, task, as_it_is, positions, n_epoch, show) as source,
            progress_bar(show, 'of the time') as progress,
        ):
            train = Trials(
                self,
                source,
                n_epoch,
                score or scorer(task),
                output,
                kind=kind,
                axis=axis,
                fine_tune=fine_tune,
                **kwargs,
            )
            epochs = n_epoch + (kwargs.get('freeze_epochs', 1) if fine_tune else 0)
            stored = dict(
                kind=task.kind, classes=facts.get('classes'), fine_tune=fine_tune, **sizes(self)
            )
            found = Search(
                candidates,
                rates,
                train,
                n_epoch=epochs,
                begin=begin,
                end=begin + 60 * minutes,
                trials=trials,
                seeds=seeds,
                folder=folder,
                facts=stored,
                metric=metric_of(task, score),
                show=progress,
            ).run()
    if show:
        report(found, n_epoch)
    return found


# options of `distill` that a search has no use for -> what to do
OTHERS = {
    'lr_max': 'give rates=[...]',
    'cbs': 'add callbacks to the Learner',
    'storage': "give folder='find', to which each finished run is written",
} | dict.fromkeys(
    ('recipe', 'T', 'alpha', 'temperature', 'loss'),
    'give recipes=dict(mine=kd(T=2, alpha=.5), ...)',
)


def refuse_search(learn, score, options):
    """Refuse what can't be searched, before anything runs."""
    for k in OTHERS:
        if k in options:
            raise DistillError(f'distill_find takes no {k}=: {OTHERS[k]}.')
    if given := [k for k in ('unlabeled', 'unlabeled_targets', 'perturbed') if options.get(k)]:
        raise DistillError(
            f'distill_find takes no {"= and ".join(given)}=: there are no stored outputs for inputs '
            'without labels. Find a recipe without them, then distill(teacher, n_epoch, found.lr, '
            f'found.recipe, {given[0]}=...).'
        )
    if score is not None and not callable(score):
        raise DistillError(
            f'score={score!r}: give a function of logits and targets, with a score for each item.'
        )
    if len(learn.dls.loaders) < 2 or getattr(learn.dls.valid, 'n', None) == 0:
        raise DistillError(
            'distill_find needs a validation set: one half chooses the recipe, the other judges it.'
        )
    if isinstance(learn.opt_func, OptimWrapper):
        raise DistillError(
            'opt_func is an optimizer that exists already, and each run needs its own. Give the Learner '
            'a function: opt_func=partial(OptimWrapper, opt=torch.optim.AdamW).'
        )


def refuse_numbers(minutes, whole: dict):
    """Refuse numbers with which no search can run.

    Args:
        whole: Name -> (value, the least that is possible).
    """
    if not (isinstance(minutes, Real) and minutes > 0):
        raise DistillError(f'minutes={minutes!r}: a number above 0.')
    for k, (v, least) in whole.items():
        if not (is_whole(v) and v >= least):
            raise DistillError(f'{k}={v!r}: a whole number from {least} up.')


def as_rates(rates):
    """The user's learning rates, as a list."""
    try:
        found = [float(o) for o in rates]
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 < o < inf for o in found):
        raise DistillError(
            f'rates={rates!r}: give a list of learning rates above 0, as in [1e-3, 3e-3].'
        )
    return found


def own_rates(learn):
    lr = learn.lr.stop if isinstance(learn.lr, slice) else learn.lr
    return [lr * f for f in FACTORS]


def metric_of(task, score):
    if score is not None:
        return 'score'
    return '-squared error' if task.kind == 'regression' else METRICS[task.kind]


def facts_of_task(learn, teacher, task, output, live, check, show):
    """The arguments of `candidates_for`."""
    feed = feed_of(teacher)
    stored = feed is not None
    if stored and live:
        raise DistillError(
            'live=True needs a teacher that runs, not stored outputs: pass the teacher itself.'
        )
    look = lambda: check_teacher(learn, teacher, task, output=output, n_epoch=None).enforce(show)
    mistakes = look() if check and not stored else None
    example = example_of(learn, output)
    facts = facts_for_choice(
        example, task, feed if stored else teacher_of(teacher, learn, task), mistakes
    )
    if not facts.pop('labels', True):
        raise DistillError(
            'These batches have no labels, so no score can be computed: there is nothing to search by.'
        )
    return facts | dict(maps=example is not None and example.logits.dim() == 4)


def sizes(learn):
    """What a search that resumes must have in common with the first one: numbers of batches and of
    parameters.
    """

    def length(dl):
        try:
            return len(dl)
        except TypeError:
            return None

    return dict(
        batches=[length(dl) for dl in learn.dls.loaders],
        parameters=sum(p.numel() for p in learn.model.parameters()),
    )


@contextmanager
def answers(learn, teacher, task, as_it_is, positions, n_epoch, show):
    """What the runs take as teacher: a cache of its answers, which is deleted at the end, unless
    they take it as it is.
    """
    if as_it_is:
        yield teacher
        return
    with TemporaryDirectory(prefix='fastdistill') as folder:
        views = min(n_epoch, MOST_VIEWS) if positions and moves(learn.dls.train) else 0
        try:
            with warnings.catch_warnings():
                # no other teacher gets to this cache
                warnings.filterwarnings('ignore', 'The weights of', DistillWarning)
                cache = cache_teacher(
                    teacher,
                    learn.dls,
                    Path(folder) / 'cache',
                    views,
                    kind=task.kind,
                    axis=task.axis,
                    check=False,
                    progress=show,
                )
        except DistillError as e:
            raise DistillError(f'{e} Or let the teacher run in each trial: live=True.') from e
        yield cache


def report(found, n_epoch):
    print(
        f'{found.table}\n\n{found}\nstudent.distill(teacher, {n_epoch}, found.lr, found.recipe) trains with it.'
    )
    from rich.console import Console

    if not Console().is_jupyter:
        return
    from IPython.display import display

    display(found.plot())
