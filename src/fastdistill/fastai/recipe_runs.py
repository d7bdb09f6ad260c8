"Recipes with several seeds: the experiment behind a choice of recipe."

import math
import re
import warnings
from collections.abc import Mapping

from fastai.basics import Callback, Learner

from ..base.outputs import DistillError, DistillWarning
from ..base.progress_bar import progress_bar
from ..base.random_state import seeded
from ..cache.digests import fingerprint
from ..cache.reader import TeacherCache
from ..cache.source import identity_of
from ..search.candidates import LABELS
from ..search.recipe_report import RecipeReport, RecipeRun
from ..search.runs import Run, Runs
from ..search.significance import adjusted, difference_by_seed
from .arguments import feed_of
from .compare import history_of
from .metrics import row_by_column
from .sample_keys import item_keys, key_root
from .teachers import is_heads, teacher_of
from .trials import repeatable

__all__ = ['compare_recipes']

# metrics of fastai that are better when less
LESS = 'loss', 'error', 'mae', 'mse', 'msle', 'rmspe', 'perplexity', 'hamming', 'brier'


def compare_recipes(
    make_student,
    teacher,
    recipes: dict | None = None,
    n_epoch: int = 5,
    lr_max=None,
    *,
    seeds=3,
    metric: str | None = None,
    higher: bool | None = None,
    folder=None,
    progress: bool = True,
    **kwargs,
) -> RecipeReport:
    """Train a student with each recipe and seed, one after another. With the same seed, all recipes
    have the same start and the same batches. The baseline, which the others are compared with, is
    the recipe None, or else the first.

    Each student ends as after its own `distill` with the same random state. A teacher that runs is
    run for each of them; with stored outputs (`cache_teacher`) it does not run at all.

    Args:
        make_student: fn() -> a new Learner. Each recipe gets one that is made with the same
            random numbers.
        teacher: What `KnowledgeDistillation` takes. A dict: a teacher for each head.
        recipes: Name -> recipe, 'auto' for `distill`'s default, None for labels alone; None:
            these two.
        lr_max: Maximum learning rate; or a list, one for each recipe.
        seeds: How many, or a list of them.
        metric: Column by which recipes are compared; None: the Learner's first metric, else
            'valid_loss'.
        higher: Is more of it better? None: read off its name.
        folder: Where each finished training is written: the same call continues from there, and
            several processes may share it. Different samples are an error. None: nothing is
            written.
        progress: Show a bar.
        **kwargs: More options of the training, as in `distill`
    """
    if isinstance(make_student, Learner) or not callable(make_student):
        raise DistillError(
            f'make_student is a {type(make_student).__name__}: compare_recipes trains a new student '
            'with each recipe and seed. Give a function without arguments that makes one: '
            'compare_recipes(lambda: vision_learner(dls, resnet18), teacher).'
        )
    if recipes is None:
        recipes = dict(alone=None, default='auto')
    if not isinstance(recipes, Mapping):
        raise DistillError(
            f'recipes={recipes!r}: compare_recipes takes a dict of names and recipes, such as '
            "{'alone': None, 'default': 'auto'}, before the number of epochs."
        )
    recipes = dict(recipes)
    seeds = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    if len(recipes) < 2 or not seeds:
        raise DistillError(
            f'{len(recipes)} recipe(s) and {len(seeds)} seed(s): give two recipes or more, and one seed '
            'or more.'
        )
    if 'cbs' in kwargs:
        raise DistillError(
            'cbs=: a callback belongs to one Learner. Add callbacks in make_student, which makes new ones '
            'for each student.'
        )
    lrs = dict(zip(recipes, one_each('lr_max', lr_max, recipes)))
    texts = {k: comparable_text(r) for k, r in recipes.items()}
    students = Students(make_student, teacher, recipes, n_epoch, lrs, metric, kwargs)
    runs = Runs(
        students.train,
        folder,
        dict(
            recipes=texts,
            n_epoch=n_epoch,
            lr_max=comparable_text(lr_max),
            teacher=teacher_text(teacher),
            options=comparable_text(kwargs),
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
        texts,
        runs,
    )
    others = [k for k in recipes if k != report.baseline]
    base = report.values(report.baseline)
    report.differences = adjusted({k: difference_by_seed(report.values(k), base) for k in others})
    return report


def one_each(name, value, recipes):
    """One value for each recipe."""
    if not isinstance(value, list | tuple):
        return [value] * len(recipes)
    if len(value) != len(recipes):
        raise DistillError(
            f'{name} has {len(value)} values for {len(recipes)} recipes: give one, or one for each.'
        )
    return value


def comparable_text(o):
    """For a comparison with another process: without addresses in memory."""
    return re.sub(r' at 0x[0-9a-fA-F]+', '', repr(o))


def teacher_text(teacher):
    """A fingerprint of the teacher's weights, or of the cache; of several heads, of each teacher."""
    if is_heads(teacher):
        each = {k: '' if t is None else teacher_text(t) for k, t in teacher.items()}
        return ', '.join(f'{k}: {text}' for k, text in each.items())
    feed = feed_of(teacher)
    if feed is not None:
        return feed.cache.identity if isinstance(getattr(feed, 'cache', None), TeacherCache) else ''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        return identity_of(teacher_of(teacher))['weights']


def student_of(make_student, seed):
    with seeded(seed):
        return make_student()


class Students:
    """Trains the student of a run.

    Args:
        lrs: Recipe -> maximum learning rate.
        **options: Of `distill`
    """

    def __init__(self, make_student, teacher, recipes, n_epoch, lrs, metric, options):
        self.make_student, self.teacher, self.recipes = make_student, teacher, recipes
        self.n_epoch, self.lrs, self.metric, self.options = n_epoch, lrs, metric, options
        self.starts = {}  # seed -> fingerprint of the weights with which its students begin
        self.samples = None  # those of the first student, as text

    def train(self, run, after_epoch, late):
        """The numbers of a training, as plain data."""
        learn = student_of(self.make_student, run.seed)
        start = fingerprint(learn.model.state_dict())
        if self.starts.setdefault(run.seed, start) != start:
            raise DistillError(
                'make_student() returned students that begin with different weights, with the same random '
                'state of Python, NumPy and PyTorch. Make a new model in each call, from these generators.'
            )
        own = [m.name for m in learn.metrics]
        self.samples = self.samples or samples_text(learn.dls)
        # subtle: labels alone go through `distill` too, so that a cache gives them the same views of the samples
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
        return dict(start=start, samples=self.samples, metrics=own, history=history_of(learn))

    def check_start(self, runs):
        """Refuse a folder with students that began with other weights, or saw different samples."""
        finished = runs.finished()
        self.starts = {r.seed: r.result['start'] for r in finished}
        for run in finished[:1]:
            learn = student_of(self.make_student, run.seed)
            if fingerprint(learn.model.state_dict()) != self.starts[run.seed]:
                raise DistillError(
                    f'{runs.folder} holds an experiment with another student: make_student() now '
                    f'begins with other weights for seed {run.seed}. Give this one another folder.'
                )
            now, before = samples_text(learn.dls), run.result.get('samples')
            if before != now:
                raise DistillError(
                    f'{runs.folder} holds an experiment with different samples: {before} there, '
                    f'{now} now. Give this one another folder.'
                )


def samples_text(dls):
    """Describe the samples: how many there are, and a fingerprint of which ones."""
    root, parts = key_root(dls), []
    for dl, name in zip(dls.loaders, ('training', 'validation')):
        try:
            keys = item_keys(dl, None, root)
        except DistillError:  # a stream, or a dataset that does not show its samples
            continue
        parts.append(f'{len(keys):,} {name} samples ({fingerprint(keys)[:8]})')
    return ' and '.join(parts)


class WatchEpochs(Callback):
    """Reports the first of some columns after each epoch.

    Args:
        after_epoch: fn(value).
    """

    order = 51  # after the Recorder

    def __init__(self, after_epoch, columns):
        super().__init__()
        self.report, self.columns = after_epoch, columns

    def after_epoch(self):
        row = row_by_column(self.recorder, self.recorder.values[-1])
        found = (row[n] for n in self.columns if row.get(n) is not None)
        self.report(next(found, math.nan))


def progress_of(run, wanted, n_epoch):
    """(text, share of all trainings that is done)."""
    done = [(r.name, r.seed) for r in wanted].index((run.name, run.seed))
    epochs = len(run.scores)
    share = (done + min(epochs / n_epoch, 1)) / len(wanted)
    return f'{run.name}, seed {run.seed}: {run.score:.4g} after epoch {epochs}', share


def possible_columns(metric, own):
    """Names of the columns that may be compared: the first one with numbers is."""
    return [
        o for n in ([*own, 'valid_loss'] if metric is None else [metric]) for o in (n, f'valid_{n}')
    ]


def find_metric(metric, own, runs):
    for name in possible_columns(metric, own):
        if all(r.value(name) is not None for r in runs):
            return name
    raise DistillError(
        f'metric={metric!r}: not all students have a number for it. They have '
        f'{", ".join(runs[0].history)}.'
    )
