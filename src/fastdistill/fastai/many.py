"Several students side by side: one stream of batches and one pass of the teacher feed them all."

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from fastai.basics import L, Learner, one_param

from ..base.distributed import rank
from ..base.outputs import DistillError, map_tensors
from ..base.seeds import seeded, seeds_of
from ..teachers.rng_stream import OwnDraws, generators
from .arguments import feed_of
from .cache_feed import StoredOutputs
from .callback import KnowledgeDistillation
from .learner_notes import passed_epochs
from .progress import ProgressTable
from .separate import check_separate
from .shared import SharedBatches, SharedRows, SharedTeacher, Stream
from .task import task_of
from .teachers import refuse_heads, teacher_of
from .turns import Turns, held_interrupts

__all__ = ['distill_many']


def distill_many(
    students,
    teacher,
    n_epoch,
    lr_max=None,
    recipes='auto',
    *,
    seed: int | None = None,
    fine_tune: bool = False,
    progress: bool = True,
    check: bool = True,
    **kwargs,
) -> list:
    """`Learner.distill` for several students that train side by side: each batch is loaded,
    augmented and shown to the teacher once. Returns the callback of each student, None for one that
    trains alone.

    Each student gets what it would get if it trained by itself with the same seed: the same
    batches, and its own random numbers. On a CPU its weights are the same bit for bit.

    Args:
        students: Learners on the same data: a list, or a dict with their names.
        teacher: What `KnowledgeDistillation` takes.
        n_epoch: Number of epochs; or a list, a number for each student.
        lr_max: Maximum learning rate; or a list.
        recipes: A recipe for all students, or a list or dict of them: what `distill` takes,
            'auto' for its default, None for a student that trains alone, from the labels. A
            dict's keys are the names of the students.
        seed: Of the batches and of what students draw (dropout, MixUp); None: drawn.
        fine_tune: Use `Learner.fine_tune` instead of `fit_one_cycle`
        progress: Show a bar, and a table with a row for each student and epoch.
        check: Look for mistakes first, as `distill` does.
        **kwargs: Of `fit_one_cycle` or `fine_tune`, and `kind`, `axis` and `output` of
            `KnowledgeDistillation`
    """
    if 'cbs' in kwargs:
        raise DistillError(
            'cbs=: a callback belongs to one Learner. Add each student its own, as in '
            "student.add_cb(SaveModelCallback(fname='a'))."
        )
    refuse_heads(teacher, 'to distill_many')
    runs = make_runs(students, n_epoch, lr_max, recipes)
    check_separate({r.name: r.learn for r in runs}, teacher)
    asked = {k: kwargs.pop(k) for k in ('kind', 'axis', 'output') if k in kwargs}
    for r in runs:
        r.task = (
            task_of(r.learn.loss_func, asked.get('kind'), asked.get('axis'))
            if r.is_taught
            else None
        )
    seed = int(torch.randint(2**31 - 1, ())) if seed is None else int(seed)
    how = dict(fine_tune=fine_tune, check=check, asked=asked, kwargs=kwargs)
    epochs = max(r.n_epoch for r in runs) + (kwargs.get('freeze_epochs', 1) if fine_tune else 0)
    side_by_side(
        runs, Shared(runs, teacher, seed), ProgressTable(progress and rank() == 0, epochs), how
    )
    return [r.callback for r in runs]


@dataclass
class Training:
    """One student's training.

    Attributes:
        recipe: 'auto', None, or what `KnowledgeDistillation` takes.
        task: What it predicts, if a teacher teaches it.
        callback: Its own, after the training.
    """

    name: str
    learn: Learner
    n_epoch: int
    lr: object
    recipe: object
    task: object = None
    callback: KnowledgeDistillation | None = None
    turns: Turns | None = None
    draws: OwnDraws = field(default_factory=OwnDraws)

    @property
    def is_taught(self):
        return self.recipe is not None

    @property
    def asks(self):
        return None if self.turns.ended else self.turns.request


def make_runs(students, n_epoch, lr, recipes):
    names = [f'student {i}' for i in range(len(students))]
    if isinstance(recipes, dict):
        names, recipes = [*recipes], [*recipes.values()]
    if isinstance(students, dict):
        names, students = [*students], [*students.values()]
    if not len(students) or not all(isinstance(s, Learner) for s in students):
        raise DistillError('students: give a list of Learners, or a dict with names and Learners.')
    n = len(students)
    values = [
        one_each(k, v, n) for k, v in dict(n_epoch=n_epoch, lr_max=lr, recipes=recipes).items()
    ]
    return [Training(*o) for o in zip(map(str, names), students, *values)]


def one_each(name, value, n):
    """One value for each student."""
    if not isinstance(value, (list, tuple, L)):
        return [value] * n
    if len(value) != n:
        raise DistillError(
            f'{name} has {len(value)} values for {n} students: give one, or one for each.'
        )
    return list(value)


class Shared:
    """The stream of batches, and the source of the teacher's outputs."""

    def __init__(self, runs, teacher, seed):
        self.runs, self.seed, self.first, self.streams = runs, seed, runs[0].learn, {}
        self.device = one_param(self.first.model).device
        self.generators = generators(
            {p.device for r in runs for p in r.learn.model.parameters() if p.is_cuda}, True
        )
        taught = [r for r in runs if r.is_taught]
        self.feed, self.teachers = feed_of(teacher) if taught else None, []
        if self.feed is not None:
            return
        # one for all; another one for students whose outputs are of another kind, or have another class axis
        for r in taught:
            if not self._teachers_of(r.task):
                t = teacher_of(teacher, r.learn, r.task)
                if t.reads_items:
                    raise DistillError(
                        "distill_many can't run a teacher with items=: store its outputs with "
                        'cache_teacher(teacher, dls, folder) and give it the cache.'
                    )
                self.teachers.append((r.task, SharedTeacher(t, self.wanted)))

    def _teachers_of(self, task):
        return [t for o, t in self.teachers if o == task]

    @property
    def cached(self):
        return isinstance(self.feed, StoredOutputs)

    def wanted(self):
        """The teacher's layers that any student compares."""
        cbs = [c for r in self.runs for c in r.learn.cbs if isinstance(c, KnowledgeDistillation)]
        return [
            n
            for c in cbs
            if c.distiller is not None and c.distiller.ready
            for n in c.distiller.teacher_layers()
        ]

    def source_for(self, run):
        """What the student's `KnowledgeDistillation` gets as its teacher."""
        if self.cached:
            return SharedRows(self.feed)
        return None if self.feed is not None else self._teachers_of(run.task)[0]

    def __enter__(self):
        with ExitStack() as stack:
            for _, t in self.teachers:
                stack.callback(t.end)
            stack.callback(self._detach)
            stack.callback(lambda: [s.close() for s in self.streams.values()])
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *args):
        self.stack.close()

    def _detach(self):
        if not self.cached or self.feed.learn is None:
            return
        self.feed.detach()
        passed = passed_epochs(self.first)
        for r in self.runs:
            passed_epochs(r.learn).update(passed)

    def batch(self, asked, n):
        """The batch that `n` students asked for, a copy for each of them; None at the end of an
        epoch.
        """
        epoch, index, i = asked
        b = self._stream(epoch, index, i).batch()
        if b is None:
            self.streams.pop((epoch, index)).close()
            return None
        copies = [*(map_tensors(b, torch.clone) for _ in range(n - 1)), b]
        for _, t in self.teachers:
            t.begin_batch(seeds_of(self.seed, 2, epoch, index, i), copies)
        return copies

    def _stream(self, epoch, index, i):
        s = self.streams.get((epoch, index))
        if s is not None and s.next == i:
            return s
        # subtle: begun again for a student that is not where the others are, which needs a callback that does
        # something unusual, such as an additional validation
        if s is not None:
            s.close()
        s = self.streams[epoch, index] = self._new_stream(epoch, index)
        while s.next < i:
            s.batch()
        return s

    def _new_stream(self, epoch, index):
        if self.cached:
            if self.feed.learn is None:
                self.feed.attach(self.first)
            if index == 0:
                self.feed.rows.epochs.begin(epoch)
        for _, t in self.teachers:
            t.begin_epoch()
        return Stream(
            self.first.dls.loaders[index], seeds_of(self.seed, 1, epoch, index), self.generators
        )


def side_by_side(runs, shared, table, how):
    """Let the students take turns, a batch each."""
    with ExitStack() as stack:
        interrupt = stack.enter_context(held_interrupts())
        for o in (table, seeded(shared.seed, shared.device), shared):
            stack.enter_context(o)
        for r in runs:
            r.turns = Turns(partial(train_one, r, shared, table, **how))
            stack.callback(r.turns.close)
        for r in runs:
            take_turn(r, shared)
        while waiting := [r for r in runs if r.asks]:
            asked = min(r.asks for r in waiting)
            now = [r for r in waiting if r.asks == asked]
            batches = shared.batch(asked, len(now))
            table.step(asked, n_batches(shared.first.dls.loaders[asked[1]]))
            for i, r in enumerate(now):
                take_turn(r, shared, None if batches is None else batches[i])
            # subtle: after all of them took this step, so that they stay equally far
            if interrupt.came:
                raise KeyboardInterrupt


def n_batches(dl):
    try:
        return len(dl)
    except TypeError:
        return None  # of a stream


def take_turn(run, shared, batch=None):
    """The student's own random numbers, and its training until it needs the next batch."""
    with run.draws.own(shared.generators):
        try:
            run.turns.resume(batch)
        except Exception as e:
            add_note(e, f'(in the training of {run.name})')
            raise


def add_note(e, text):
    if hasattr(e, 'add_note'):
        e.add_note(text)  # Python 3.11


def train_one(run, shared, table, ask, *, fine_tune, check, asked, kwargs):
    """A student's whole training, which asks for each batch."""
    learn = run.learn
    with (
        learn.no_bar(),
        learn.no_logging(),
        learn.added_cbs([SharedBatches(ask), *table.rows_of(run.name)]),
    ):
        if run.is_taught:
            recipe = None if isinstance(run.recipe, str) and run.recipe == 'auto' else run.recipe
            run.callback = learn.distill(
                shared.source_for(run),
                run.n_epoch,
                run.lr,
                recipe,
                fine_tune=fine_tune,
                check=check,
                **asked,
                **kwargs,
            )
        else:
            train_alone(run, shared, fine_tune, kwargs)


def train_alone(run, shared, fine_tune, kwargs):
    """From the labels; rows of a cache are removed from the batches."""
    with ExitStack() as stack:
        if shared.cached:
            stack.callback(SharedRows(shared.feed).attach(run.learn).detach)
        lr = {} if run.lr is None else {'base_lr' if fine_tune else 'lr_max': run.lr}
        (run.learn.fine_tune if fine_tune else run.learn.fit_one_cycle)(run.n_epoch, **lr, **kwargs)
