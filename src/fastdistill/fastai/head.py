"One of several heads of a student: its output, its labels and their classes."

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace

from ..base.outputs import DistillError

__all__ = ['Head', 'HeadData', 'heads_of', 'option_of_heads']


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
