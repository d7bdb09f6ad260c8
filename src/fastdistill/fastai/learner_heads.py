"""Heads of a Learner's model. A head is one output of the model, with its labels and classes."""

from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace

from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..base.task import Task, ignored_label
from ..distiller.heads import HeadOutput, SharedOutput, options_by_head
from .probe_batches import PreparationError, prepared_batches
from .task import task_of
from .teachers import is_heads, teacher_of


@dataclass
class LearnerHead(HeadOutput):
    """A head of a Learner's model: one output, with its labels and its teacher.

    Attributes:
        source: The teacher, as passed to `KnowledgeDistillation`.
    """

    source: object = None

    @property
    def output(self):
        """The `output` option of `Distiller` that selects this head's output."""
        return self

    def labels(self, y):
        """Return the labels of this head from the labels of a batch, as a tuple."""
        if len(y) != self.n:
            raise DistillError(
                f'{len(y)} column(s) of labels for {self.n} heads: the DataLoaders need one for '
                'each head, in the same order. For a head without a teacher, pass None.'
            )
        return tuple(y)[self.at : self.at + 1]

    def batches(self, batches):
        with closing(batches):
            yield from ((x, self.labels(y)) for x, y in batches)

    def of(self, learn):
        """Return a substitute for the Learner that has only the classes of this head."""
        return SimpleNamespace(
            dls=HeadData(learn.dls, self), model=learn.model, loss_func=learn.loss_func
        )

    def teacher_of(self, learn, task, **options):
        """Return this head's `Teacher`, prepared for the batches of a Learner."""
        return teacher_of(self.source, self.of(learn), task, **options)

    def task_of(self, learn, kind, axis=None):
        """Return this head's `Task`, derived from the option `kind` or from its labels. Classes that
        the loss function of all heads ignores are ignored by each head.
        """
        if kind is None and labels_are_floats(learn, self):
            raise DistillError(
                f"The labels of the head {self.name!r} are not class indices: pass kind={{'{self.name}': "
                "'regression'} for numbers, or 'sigmoid' for several labels."
            )
        task = Task(kind or 'softmax', 1 if axis is None else axis)
        if task.kind == 'softmax':
            task.ignore_index = ignored_label(learn.loss_func)
        return task


@dataclass
class WholeModel:
    """The only head of a student with one output.

    Attributes:
        source: The teacher, as passed to `KnowledgeDistillation`.
        output: As in `Distiller`.
    """

    source: object
    output: object = None
    name: str = ''

    def labels(self, y):
        return y

    def batches(self, batches):
        return batches

    def of(self, learn):
        return learn

    def teacher_of(self, learn, task, **options):
        return teacher_of(self.source, learn, task, **options)

    def task_of(self, learn, kind, axis=None):
        return task_of(learn.loss_func, kind, axis)


class HeadData:
    """DataLoaders with the `vocab` of a single column of labels."""

    loss_func = None  # the loss function of the DataLoaders applies to all columns of labels

    def __init__(self, dls, head):
        tls = getattr(dls.train_ds, 'tls', ())
        i = getattr(dls, 'n_inp', 1) + head.at
        self.whole, self.head = dls, head
        self.vocab = getattr(tls[i], 'vocab', None) if i < len(tls) else None

    @property
    def options_of_teacher(self):
        """The option of `Teacher` that selects this head's output from a teacher with several
        outputs.
        """
        h = self.head
        return dict(output=SharedOutput(h.name, h.at, h.n))

    def column_of(self, dls):
        """Wrap other DataLoaders in the same way if their batches also have the labels of all
        heads.
        """
        tls = getattr(dls.train_ds, 'tls', ())
        columns = len(tls) - getattr(dls, 'n_inp', 1)
        return HeadData(dls, self.head) if columns == self.head.n else dls

    def __getattr__(self, k):
        return getattr(self.__dict__['whole'], k)

    def __getitem__(self, i):
        return self.whole[i]


def heads_of(teachers) -> dict:
    """Return {head name: `LearnerHead`} for the heads that have a teacher.

    Args:
        teachers: {head name: teacher or None}.
    """
    found = [LearnerHead(str(k), i, len(teachers), t) for i, (k, t) in enumerate(teachers.items())]
    if not any(h.source is not None for h in found):
        raise DistillError(
            'No head has a teacher: the dict must have at least one that is not None.'
        )
    return {h.name: h for h in found if h.source is not None}


def comparisons_of(teacher, output=None) -> dict:
    """Return {head name: head}. A student with one output has a single head with the name ''."""
    return heads_of(teacher) if is_heads(teacher) else {'': WholeModel(teacher, output)}


def options_of_heads(o, option: str, heads) -> dict:
    """Convert an option to a dict {head name: value}. A single value is used for all heads."""
    if '' in heads:
        return {'': o}
    return options_by_head(o, option, heads, 'the heads with a teacher are')


def labels_are_floats(learn, head):
    try:
        with RandomGuard(), closing(prepared_batches(learn, 1, 1)[1]) as train:
            return any(o.is_floating_point() for _, y in train for o in head.labels(y))
    except PreparationError:
        return False
