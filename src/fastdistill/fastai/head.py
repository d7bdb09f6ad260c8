"One of several heads of a student: its output, its labels and their classes."

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace

from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..base.task import Task
from ..distiller.heads import renamed
from ..recipes.term import Recipe
from .batches import PreparationError, prepared_batches

__all__ = [
    'Head',
    'HeadData',
    'WholeModel',
    'beside_labels',
    'heads_of',
    'option_of_heads',
    'task_of_head',
]


@dataclass
class Head:
    """One output of the student, its labels and its teacher.

    Attributes:
        at: Its place among the labels, and among the outputs of a tuple.
        n: Heads.
        source: What `KnowledgeDistillation` takes as a teacher.
    """

    name: str
    at: int
    n: int
    source: object

    @property
    def output(self):
        """What gets its output, as `Distiller(output=)` takes it."""
        return self

    def __call__(self, raw):
        """Its output, of what the student returned."""
        if isinstance(raw, Mapping) and self.name in raw:
            return raw[self.name]
        if isinstance(raw, (tuple, list)) and len(raw) == self.n:
            return raw[self.at]
        have = (
            ', '.join(map(str, raw))
            if isinstance(raw, Mapping)
            else f'{len(raw)} outputs'
            if isinstance(raw, (tuple, list))
            else 'one tensor'
        )
        raise DistillError(
            f'There are {self.n} heads, {self.name!r} among them, but the student returns {have}: name '
            'the outputs of a dict, or give one teacher for each output of a tuple, in their order. '
            'None is a head without a teacher.'
        )

    def labels(self, y):
        """Its labels, as a tuple."""
        if len(y) != self.n:
            raise DistillError(
                f'{len(y)} column(s) of labels for {self.n} heads: the DataLoaders need one for each '
                'head, in the same order (a head without a teacher is None).'
            )
        return tuple(y)[self.at : self.at + 1]

    def batches(self, batches):
        with closing(batches):
            yield from ((x, self.labels(y)) for x, y in batches)

    def of(self, learn):
        """The Learner as this head sees it: with the classes of its own labels."""
        return SimpleNamespace(
            dls=HeadData(learn.dls, self), model=learn.model, loss_func=learn.loss_func
        )


@dataclass
class WholeModel:
    """A student with one output, as its only head.

    Attributes:
        source: What `KnowledgeDistillation` takes as a teacher.
        output: As in `Distiller`
    """

    source: object
    output: object = None

    def labels(self, y):
        return y

    def batches(self, batches):
        return batches

    def of(self, learn):
        return learn


class HeadData:
    """DataLoaders whose `vocab` is that of one column of labels."""

    loss_func = None  # theirs is of all columns

    def __init__(self, dls, head):
        tls = getattr(dls.train_ds, 'tls', ())
        i = getattr(dls, 'n_inp', 1) + head.at
        self.whole, self.head, self.vocab = (
            dls,
            head,
            getattr(tls[i], 'vocab', None) if i < len(tls) else None,
        )

    def __getattr__(self, k):
        return getattr(self.__dict__['whole'], k)

    def __getitem__(self, i):
        return self.whole[i]


def heads_of(teachers) -> dict:
    """Name -> `Head`, of those that have a teacher.

    Args:
        teachers: Name -> what `KnowledgeDistillation` takes, or None.
    """
    found = [Head(str(k), i, len(teachers), t) for i, (k, t) in enumerate(teachers.items())]
    if not any(h.source is not None for h in found):
        raise DistillError('No head has a teacher.')
    return {h.name: h for h in found if h.source is not None}


def option_of_heads(o, option, heads):
    """Name of a head -> its own value of an option that is one for all, or a dict."""
    if not isinstance(o, Mapping):
        return dict.fromkeys(heads, o)
    o = {str(k): v for k, v in o.items()}
    if unknown := set(o) - set(heads):
        raise DistillError(
            f'{option}= has {", ".join(sorted(unknown))}, the heads with a teacher are '
            f'{", ".join(heads)}.'
        )
    return {k: o.get(k) for k in heads}


def task_of_head(learn, head, kind, axis=None):
    """What a head predicts, by its option or by its labels."""
    if kind is None and labels_are_floats(learn, head):
        raise DistillError(
            f"The labels of the head {head.name!r} are not class numbers: pass kind={{'{head.name}': "
            "'regression'} for numbers, or 'sigmoid' for several labels."
        )
    return Task(kind or 'softmax', 1 if axis is None else axis)


def labels_are_floats(learn, head):
    try:
        with RandomGuard(), closing(prepared_batches(learn, 1, 1)[1]) as train:
            return any(o.is_floating_point() for _, y in train for o in head.labels(y))
    except PreparationError:
        return False


def beside_labels(recipe):
    """The same recipe where the labels have the weight 1."""
    w = recipe.task_at(0.0)
    if w in (0.0, 1.0):
        return recipe
    return Recipe(*(renamed(t, t.name, weight=t.weight / w) for t in recipe.terms), task=1.0)
