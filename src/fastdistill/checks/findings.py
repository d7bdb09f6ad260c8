"The result of the checks: findings and measured facts."

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..base.distributed import rank
from ..base.outputs import DistillError, DistillWarning

__all__ = ['Facts', 'Finding', 'Findings', 'count_in_words', 'few_names', 'numbers_in_words']


def few_names(names: Sequence, n: int) -> str:
    return ', '.join(map(str, names[:n])) + (' ...' if len(names) > n else '')


@dataclass
class Finding:
    """One finding, and what to do about it.

    Attributes:
        level: 'error' if training would be pointless, 'warning' if it probably would be, 'note' if it
            is worth knowing, 'ok' if all is fine, '' for a measurement.
        what: What was found.
        do: What to do about it.
        doubt: True if it is a reason not to learn much from this teacher.
        about: What was checked, in a word or two.
    """

    level: str
    what: str
    do: str
    doubt: bool = False
    about: str = ''

    def __str__(self) -> str:
        return f'{self.level}: {self.what}. {self.do}'


@dataclass
class Facts:
    """Measurements on a few batches. None where there was nothing to measure.

    Attributes:
        metric: Metric of the three scores: 'accuracy', 'accuracy per label' or 'squared error'
            (lower is better).
        n: Number of scored items.
        student_score: Score of the student before training.
        constant_score: Score of the best constant prediction.
        top_prob_train: The teacher's mean top probability on training batches, augmented.
        top_prob_valid: The same on the scored batches.
        part: Where the scored items come from: 'validation', 'training', or '' if unknown.
    """

    metric: str
    n: int = 0
    teacher_score: float | None = None
    student_score: float | None = None
    constant_score: float | None = None
    top_prob_train: float | None = None
    top_prob_valid: float | None = None
    part: str = 'validation'

    @property
    def items(self) -> str:
        """Format what was scored: '64 validation items'."""
        return count_in_words(self.n, self.part)

    @property
    def scores(self) -> str:
        """Format the scores. Empty if there are none."""
        scores = dict(
            teacher=self.teacher_score, student=self.student_score, constant=self.constant_score
        )
        return f'{self.metric} on {self.items}: {numbers_in_words(scores)}' if self.n else ''

    @property
    def probabilities(self) -> str:
        """Format the mean top probabilities. Empty if there are none."""
        words = numbers_in_words({'training': self.top_prob_train, self.part: self.top_prob_valid})
        return f"teacher's mean top probability: {words}" if words else ''

    def lines(self) -> Iterator[str]:
        """Format one line about the scores and one about the probabilities."""
        yield from filter(None, (self.scores, self.probabilities))


def count_in_words(n: int, part: str, of: str = 'items') -> str:
    return ' '.join(filter(None, (str(n), part, of)))


def numbers_in_words(values: Mapping[str, float | None]) -> str:
    number = lambda v: f'{v:.3f}' if v < 10 else f'{v:.4g}'
    return ', '.join(f'{k} {number(v)}'.strip() for k, v in values.items() if v is not None)


class Findings(list):
    """List of findings, empty if nothing is wrong. `facts` are the measurements, `in_order` the
    checks that found nothing.
    """

    # `Facts`, or `Explanation` after training. None if an error was found before anything could be measured
    facts: Any = None
    passed: tuple = ()  # checks that found nothing, see `in_order`
    none = 'Nothing found: the teacher fits.'  # text of an empty list

    def __repr__(self) -> str:
        facts = [] if self.facts is None else self.facts.lines()
        return '\n'.join([*facts, *(map(str, self) if self else [self.none])])

    def add(self, about: str, found: Iterable[Finding] = (), fine: str = '') -> list:
        """Add the findings of a check and return them.

        Args:
            about: What was checked.
            found: What the check found.
            fine: What is in order if it found nothing. Empty if there was nothing to check.
        """
        new = [f if f.about else replace(f, about=about) for f in found]
        self += new
        if fine and not new:
            self.passed = *self.passed, Finding('ok', fine, '', about=about)
        return new

    def join(self, others: 'Findings') -> 'Findings':
        """Add everything that a later check found and measured.

        Args:
            others: `Findings` of a later check.
        """
        self += others
        self.passed, self.facts = (*self.passed, *others.passed), others.facts
        return self

    @property
    def in_order(self) -> list[Finding]:
        """Return the checks that found nothing, each as a `Finding` of level 'ok'."""
        subjects = {f.about for f in self}
        return [f for f in self.passed if f.about not in subjects]

    @property
    def doubt(self) -> str:
        """First reason not to learn much from this teacher. Empty if there is none."""
        return next((f.what for f in self if f.doubt or f.level in ('warning', 'error')), '')

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self if f.level == 'error']

    def enforce(self, facts: bool = True) -> 'Findings':
        """Print the facts and notes and issue the warnings on the first rank, raise the errors on all.

        Args:
            facts: Whether to print the facts.
        """
        if facts and self.facts is not None and rank() == 0:
            print('fastdistill:', '; '.join(self.facts.lines()))
        for f in self if rank() == 0 else ():
            if f.level == 'note':
                print(f'fastdistill: {f.what}. {f.do}')
            if f.level == 'warning':
                warnings.warn(f'{f.what}. {f.do}', DistillWarning, stacklevel=2)
        if self.errors:
            head = 'Mistakes were found before training (pass check=False to train anyway):'
            raise DistillError('\n'.join([head, *[f'- {f.what}. {f.do}' for f in self.errors]]))
        return self
