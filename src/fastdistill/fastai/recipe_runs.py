"Recipes with several seeds: the experiment behind a choice of recipe."

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fastai.basics import Learner

from ..base.atomic_files import write_json
from ..base.outputs import DistillError, DistillWarning
from ..base.seeds import seeded
from ..cache.digests import fingerprint
from ..cache.reader import TeacherCache
from ..cache.source import identity_of
from ..search.candidates import LABELS
from ..search.recipe_report import RecipeReport, RecipeRun
from ..search.seed_tests import adjusted, difference_by_seed
from .arguments import feed_of
from .compare import history_of
from .teachers import refuse_heads, teacher_of
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
        teacher: What `KnowledgeDistillation` takes.
        recipes: Name -> recipe, 'auto' for `distill`'s default, None for labels alone; None:
            these two.
        lr_max: Maximum learning rate; or a list, one for each recipe.
        seeds: How many, or a list of them.
        metric: Column by which recipes are compared; None: the Learner's first metric, else
            'valid_loss'.
        higher: Is more of it better? None: read off its name.
        folder: Where each finished seed is written; the same call continues from there. None:
            nothing is written.
        progress: Show a bar.
        **kwargs: More options of the training, as in `distill`
    """
    if isinstance(make_student, Learner) or not callable(make_student):
        raise DistillError(
            f'make_student is a {type(make_student).__name__}: compare_recipes trains a new student '
            'with each recipe and seed. Give a function without arguments that makes one: '
            'compare_recipes(lambda: vision_learner(dls, resnet18), teacher).'
        )
    refuse_heads(teacher, 'to compare_recipes')
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
    finished = FinishedSeeds(
        folder,
        dict(
            recipes=texts,
            n_epoch=n_epoch,
            lr_max=comparable_text(lr_max),
            teacher=teacher_text(teacher),
            options=comparable_text(kwargs),
        ),
    )
    train = lambda seed: train_seed(make_student, teacher, recipes, n_epoch, lrs, seed, kwargs)
    runs, columns = finished.all(seeds, make_student, train)
    metric = find_metric(metric, columns, runs)
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
    """A fingerprint of the teacher's weights, or of the cache."""
    feed = feed_of(teacher)
    if feed is not None:
        return feed.cache.identity if isinstance(getattr(feed, 'cache', None), TeacherCache) else ''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        return identity_of(teacher_of(teacher))['weights']


def student_of(make_student, seed):
    with seeded(seed):
        return make_student()


def train_seed(make_student, teacher, recipes, n_epoch, lrs, seed, kwargs):
    """(runs of all recipes with this seed, names of the Learner's own metrics)."""
    runs = []
    for i, (name, recipe) in enumerate(recipes.items()):
        learn = student_of(make_student, seed)
        start = fingerprint(learn.model.state_dict())
        if i == 0:
            own, first = [m.name for m in learn.metrics], start
        elif start != first:
            raise DistillError(
                'make_student() returned students that begin with different weights, with the same random '
                'state of Python, NumPy and PyTorch. Make a new model in each call, from these generators.'
            )
        train_student(learn, teacher, recipe, n_epoch, lrs[name], seed, **kwargs)
        runs.append(RecipeRun(name, seed, history_of(learn)))
    return runs, own, first


def train_student(learn, teacher, recipe, n_epoch, lr_max, seed, *, check=True, **kwargs):
    # subtle: labels alone go through `distill` too, so that a cache gives them the same views of the samples
    alone = recipe is None
    with repeatable(learn.dls, seed), learn.no_bar(), learn.no_logging():
        learn.distill(
            teacher,
            n_epoch,
            lr_max,
            LABELS.recipe({}) if alone else recipe,
            check=check and not alone,
            **kwargs,
        )


def find_metric(metric, own, runs):
    columns = [*runs[0].history]
    for n in [metric] if metric is not None else [*own, 'valid_loss']:
        for name in (n, f'valid_{n}'):
            if all(r.value(name) is not None for r in runs):
                return name
    raise DistillError(
        f'metric={metric!r}: not all students have a number for it. They have {", ".join(columns)}.'
    )


class FinishedSeeds:
    """A folder with a JSON for each seed that is finished, and one with the settings; without a
    folder, nothing is kept.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = None if folder is None else Path(folder), settings
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_json(self.folder / 'settings.json')
        if before is None:
            return write_json(self.folder / 'settings.json', settings)
        if changed := [k for k in settings if before.get(k) != settings[k]]:
            k = changed[0]
            raise DistillError(
                f'{self.folder} holds an experiment with another {k}: {before.get(k)!r} there, '
                f'{settings[k]!r} now. Give this one another folder.'
            )

    def all(self, seeds, make_student, train):
        """(runs of all seeds, the Learner's own metrics): from the folder, or trained now."""
        runs, own, checked = [], [], False
        for i, seed in enumerate(seeds):
            done = None if self.folder is None else read_json(self.folder / f'seed_{seed}.json')
            if done is not None and not checked:
                checked = True
                if fingerprint(student_of(make_student, seed).model.state_dict()) != done['start']:
                    raise DistillError(
                        f'{self.folder} holds an experiment with another student: make_student() now '
                        f'begins with other weights for seed {seed}. Give this one another folder.'
                    )
            if done is None:
                done = self._train(seed, train, f'{i} of {len(seeds)} seeds')
            runs += [RecipeRun(**r) for r in done['runs']]
            own = done['metrics']
        return runs, own

    def _train(self, seed, train, so_far):
        try:
            runs, own, start = train(seed)
        except KeyboardInterrupt:
            if self.folder is not None:
                print(
                    f'fastdistill: {so_far} are finished. The same call continues from {self.folder}'
                )
            raise
        done = dict(runs=[asdict(r) for r in runs], metrics=own, start=start)
        if self.folder is not None:
            write_json(self.folder / f'seed_{seed}.json', done)
        return done


def read_json(path):
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise DistillError(f'{path} is damaged ({e}). Delete it: its seed is trained again.') from e
