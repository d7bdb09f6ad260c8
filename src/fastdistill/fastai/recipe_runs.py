"""Compare recipes by training students with several random seeds."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastai.basics import Callback, Learner

from ..base.content import describe_content, first_difference, stable_repr
from ..base.outputs import DistillError
from ..base.progress_bar import progress_bar
from ..base.random_state import seeded
from ..cache.digests import fingerprint
from ..search.candidates import LABELS
from ..search.recipe_report import RecipeReport, RecipeRun
from ..search.resumable_runs import Run, Runs
from ..search.significance import adjusted, difference_by_seed
from .callback_arguments import check_epochs
from .compare import history_of
from .metrics import row_by_column
from .training_setup import setup_of, teacher_text
from .trials import repeatable

# metrics of fastai for which lower is better, or parts of their names
LESS = 'loss', 'error', 'mae', 'mse', 'msle', 'rmspe', 'perplexity', 'hamming', 'brier'


def compare_recipes(
    make_student: Callable[[], Learner],
    teacher: Any,
    recipes: dict | None = None,
    n_epoch: int = 5,
    lr_max: Any = None,
    *,
    seeds: int | list[int] = 3,
    metric: str | None = None,
    higher: bool | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> RecipeReport:
    """Train a student with each recipe and each seed, one after another.

    With the same seed, all recipes start from the same weights and see the same batches. The
    baseline is training on labels only, which is the recipe None. If `recipes` does not contain
    None, the first recipe is the baseline. All other recipes are compared with the baseline. Each
    student is identical to the result of a single `distill` with the same random state. The teacher
    runs again for each student, unless its outputs are stored (see `cache_teacher`).

    Args:
        make_student: fn() -> new Learner. The function `make_student` is called with the same
            random state for each recipe.
        teacher: Anything that `KnowledgeDistillation` accepts. For several heads, a dict {head
            name: teacher}.
        recipes: {name: recipe}. Use 'auto' for the default recipe of `distill`, and None for
            training on labels only. By default, these two are compared.
        n_epoch: Number of epochs.
        lr_max: Maximum learning rate, or a list with one learning rate for each recipe.
        seeds: Number of seeds, or a list of seeds.
        metric: Column of the progress table by which recipes are compared. If None, the Learner's
            first metric is used, or 'valid_loss' if the Learner has no metrics.
        higher: Whether higher values of the metric are better. If None, the direction is derived
            from the name of the metric.
        folder: Folder in which finished runs are stored. The same call resumes from this folder.
            Several processes can share the folder. An error is raised if the recipes, the teacher,
            the samples, their labels or files, the batch sizes, the optimizer or the task loss have
            changed. If None, nothing is stored.
        progress: Whether to show a progress bar.
        **kwargs: More training options, as in `distill`.
    """
    if isinstance(make_student, Learner) or not callable(make_student):
        raise DistillError(
            f'make_student is a {type(make_student).__name__}: compare_recipes trains a new '
            'student with each recipe and seed. Pass a function without arguments that creates '
            'one: compare_recipes(lambda: vision_learner(dls, resnet18), teacher).'
        )
    if recipes is None:
        recipes = dict(alone=None, default='auto')
    if not isinstance(recipes, Mapping):
        raise DistillError(
            f'recipes={recipes!r}: compare_recipes takes a dict of names and recipes, such as '
            "{'alone': None, 'default': 'auto'}, before the number of epochs."
        )
    check_epochs(n_epoch, lr_max)
    recipes = dict(recipes)
    seeds = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(recipes) < 2 or not seeds:
        raise DistillError(
            f'{len(recipes)} recipe(s) and {len(seeds)} seed(s): give at least two recipes and '
            'one seed.'
        )
    if 'cbs' in kwargs:
        raise DistillError(
            'cbs=: a callback belongs to one Learner. Create the callbacks in make_student, so '
            'that each student gets new ones.'
        )
    lrs = dict(zip(recipes, one_each('lr_max', lr_max, recipes)))
    students = Students(
        make_student, teacher, recipes, n_epoch, lrs, metric, folder is not None, kwargs
    )
    runs = Runs(
        students.train,
        folder,
        dict(
            recipes=describe_content(recipes),
            n_epoch=n_epoch,
            lr_max=describe_content(lr_max),
            teacher=teacher_text(teacher),
            options=describe_content(kwargs),
        ),
    )
    students.check_start(runs)
    wanted = [Run(k, seed=s) for s in seeds for k in recipes]
    with progress_bar(progress) as show:
        done = runs.all(wanted, lambda run: show(*progress_of(run, wanted, n_epoch)))
    own = done[0].result['metrics']
    runs = [RecipeRun(r.name, r.seed, r.result['history']) for r in done]
    metric = find_metric(metric, own, runs)
    if higher is None:
        higher = not any(o in metric for o in LESS)
    report = RecipeReport(
        metric,
        higher,
        next((k for k, r in recipes.items() if r is None), next(iter(recipes))),
        n_epoch,
        {k: stable_repr(r) for k, r in recipes.items()},
        runs,
    )
    others = [k for k in recipes if k != report.baseline]
    base = report.values(report.baseline)
    report.differences = adjusted({k: difference_by_seed(report.values(k), base) for k in others})
    return report


def one_each(name, value, recipes):
    """Return a list or tuple with one value for each recipe."""
    if not isinstance(value, list | tuple):
        return [value] * len(recipes)
    if len(value) != len(recipes):
        raise DistillError(
            f'{name} has {len(value)} values for {len(recipes)} recipes: pass one value, or one for each recipe.'
        )
    return value


def student_of(make_student, seed):
    with seeded(seed):
        return make_student()


class Students:
    """Trains the student of each run.

    Args:
        lrs: {recipe name: maximum learning rate}.
        stored: True if results are stored in a folder.
        options: Options of `distill`.
    """

    def __init__(self, make_student, teacher, recipes, n_epoch, lrs, metric, stored, options):
        self.make_student, self.teacher, self.recipes = make_student, teacher, recipes
        self.n_epoch, self.lrs, self.metric, self.options = n_epoch, lrs, metric, options
        self.stored = stored
        self.starts = {}  # {seed: fingerprint of the students' initial weights}
        self.setup = None  # of the first student

    def train(self, run, after_epoch, late):
        """Train the student of a run. Return the results as plain data."""
        learn = student_of(self.make_student, run.seed)
        start = fingerprint(learn.model.state_dict())
        if self.starts.setdefault(run.seed, start) != start:
            raise DistillError(
                'make_student() returned students with different initial weights, although the '
                'random state of Python, NumPy and PyTorch was the same. Make a new model in each '
                'call, using only these random generators.'
            )
        own = [m.name for m in learn.metrics]
        if self.stored and self.setup is None:
            self.setup = setup_of(learn)
        # subtle: training on labels only also uses `distill`, so that a cache replays the same
        # views
        recipe = self.recipes[run.name]
        options = dict(self.options)
        if recipe is None:
            recipe = LABELS.recipe({})
            options['check'] = False
        watch = WatchEpochs(after_epoch, possible_columns(self.metric, own))
        with repeatable(learn.dls, run.seed), learn.no_bar(), learn.no_logging():
            learn.distill(
                self.teacher, self.n_epoch, self.lrs[run.name], recipe, cbs=watch, **options
            )
        return dict(start=start, setup=self.setup, metrics=own, history=history_of(learn))

    def check_start(self, runs) -> None:
        """Raise an error if the folder has students with different initial weights, data or
        optimizers.
        """
        finished = runs.finished()
        self.starts = {r.seed: r.result['start'] for r in finished}
        for run in finished[:1]:
            learn = student_of(self.make_student, run.seed)
            if fingerprint(learn.model.state_dict()) != self.starts[run.seed]:
                raise DistillError(
                    f'{runs.folder} contains an experiment with a different student: '
                    f'make_student() now returns different initial weights for seed {run.seed}. '
                    'Use a different folder.'
                )
            if (found := first_difference(run.result['setup'], setup_of(learn))) is not None:
                name, there, here = found
                raise DistillError(
                    f'{runs.folder} contains an experiment with different {name}: {there} there, '
                    f'{here} now. Use a different folder.'
                )


class WatchEpochs(Callback):
    """Callback that reports a column of the training table after each epoch.

    Args:
        after_epoch: fn(value), called after each epoch.
        columns: Names of columns. The first column that has a value is reported.
    """

    order = 51  # after the Recorder

    def __init__(self, after_epoch, columns):
        super().__init__()
        self.report, self.columns, self.in_fit = after_epoch, columns, False

    def before_fit(self) -> None:
        # subtle: `tta` does not lock the Learner, and has no `after_epoch`
        self._refuse(self.in_fit)
        self.in_fit = True

    def after_fit(self) -> None:
        self.in_fit = False

    def _refuse(self, inner: bool) -> None:
        if inner:
            raise DistillError(
                'A callback of the students calls learn.validate, get_preds or tta during the fit, which '
                "changes fastai's table of the fit. Create the students without this callback."
            )

    def after_epoch(self) -> None:
        self._refuse(self.learn.lock.locked())
        row = row_by_column(self.recorder)
        found = (row[n] for n in self.columns if row.get(n) is not None)
        self.report(next(found, math.nan))


def progress_of(run, wanted, n_epoch):
    """Return (text, finished fraction of all training) for a run that is in progress."""
    done = [(r.name, r.seed) for r in wanted].index((run.name, run.seed))
    epochs = len(run.scores)
    share = (done + min(epochs / n_epoch, 1)) / len(wanted)
    return f'{run.name}, seed {run.seed}: {run.score:.4g} after epoch {epochs}', share


def possible_columns(metric, own):
    """Return the names of columns by which recipes can be compared, in order of preference."""
    return [
        o for n in ([*own, 'valid_loss'] if metric is None else [metric]) for o in (n, f'valid_{n}')
    ]


def find_metric(metric, own, runs):
    for name in possible_columns(metric, own):
        if all(r.value(name) is not None for r in runs):
            return name
    raise DistillError(
        f'metric={metric!r}: not all students have a value for it. The columns are '
        f'{", ".join(runs[0].history)}.'
    )
