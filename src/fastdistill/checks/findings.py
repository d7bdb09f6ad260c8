"""Classes for the results of checks: findings and measurements."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..base.distributed import rank
from ..base.outputs import DistillError, DistillWarning


@dataclass
class Finding:
    """A result of a check, with a suggestion.

    Attributes:
        level: 'error' if training would be pointless, 'warning' if it probably would be, 'note' for
            information, 'ok' for a passed check, and '' for a measurement.
        what: Description of what was found.
        do: Suggestion for the user.
        doubt: True if the student should not learn much from this teacher.
        about: Subject of the check, in one or two words.
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
    """Measurements on a few batches. A value is None if it could not be measured.

    Attributes:
        metric: Metric of the scores: 'accuracy', 'accuracy per label' or 'squared error' (lower is
            better).
        n: Number of scored items.
        teacher_score: Score of the teacher.
        student_score: Score of the student before training.
        constant_score: Score of the best constant prediction.
        top_prob_train: Mean top probability of the teacher on augmented training batches.
        top_prob_valid: Mean top probability of the teacher on the scored batches.
        part: Dataset of the scored items: 'validation', 'training', or '' if unknown.
        classes: (number of classes in the labels of the scored items, number of all classes).
    """

    metric: str
    n: int = 0
    teacher_score: float | None = None
    student_score: float | None = None
    constant_score: float | None = None
    top_prob_train: float | None = None
    top_prob_valid: float | None = None
    part: str = 'validation'
    classes: tuple[int, int] | None = None

    @property
    def items(self) -> str:
        """Description of the scored items, such as '64 validation items'."""
        return count_in_words(self.n, self.part)

    @property
    def scores(self) -> str:
        """The scores as text, or '' if there are none."""
        scores = dict(
            teacher=self.teacher_score, student=self.student_score, constant=self.constant_score
        )
        have, all_ = self.classes or (0, 0)
        seen = f' ({have} of the {all_} classes)' if have < all_ else ''
        return f'{self.metric} on {self.items}{seen}: {numbers_in_words(scores)}' if self.n else ''

    @property
    def probabilities(self) -> str:
        """The mean top probabilities as text, or '' if there are none."""
        words = numbers_in_words({'training': self.top_prob_train, self.part: self.top_prob_valid})
        return f"teacher's mean top probability: {words}" if words else ''

    def lines(self) -> Iterator[str]:
        """Yield a line of text about the scores and one about the probabilities."""
        yield from filter(None, (self.scores, self.probabilities))


def count_in_words(n: int, part: str, of: str = 'items') -> str:
    return ' '.join(filter(None, (str(n), part, of)))


def numbers_in_words(values: Mapping[str, float | None]) -> str:
    number = lambda v: f'{v:.3f}' if v < 10 else f'{v:.4g}'
    return ', '.join(f'{k} {number(v)}'.strip() for k, v in values.items() if v is not None)


class Findings(list):
    """List of findings, which is empty if the checks found no problem.

    Attributes:
        facts: The measurements: `Facts` before training, or `Explanation` after training. None if
            an error was found before the first measurement.
        passed: Findings of level 'ok' for the checks that found no problem.
        none: Text that is shown for an empty list.
    """

    facts: Any = None
    passed: tuple = ()
    none = 'No mistakes were found.'

    def __repr__(self) -> str:
        facts = [] if self.facts is None else self.facts.lines()
        return '\n'.join([*facts, *(map(str, self) if self else [self.none])])

    def add(self, about: str, found: Iterable[Finding] = (), fine: str = '') -> list:
        """Add the findings of a check and return them.

        Args:
            about: Subject of the check.
            found: The findings.
            fine: Text for a check without findings. If empty, the check is not listed as passed.
        """
        new = [f if f.about else replace(f, about=about) for f in found]
        self += new
        if fine and not new:
            self.passed = *self.passed, Finding('ok', fine, '', about=about)
        return new

    def join(self, others: 'Findings') -> 'Findings':
        """Add the findings and measurements of a later check, and return the joined object.

        Args:
            others: `Findings` of the later check.
        """
        self += others
        self.passed, self.facts = (*self.passed, *others.passed), others.facts
        self.none = others.none
        return self

    @property
    def in_order(self) -> list[Finding]:
        """The passed checks, as findings of level 'ok'."""
        subjects = {f.about for f in self}
        return [f for f in self.passed if f.about not in subjects]

    @property
    def doubt(self) -> str:
        """First reason why the student should not learn much from this teacher, or ''."""
        return next((f.what for f in self if f.doubt or f.level in ('warning', 'error')), '')

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self if f.level == 'error']

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self if f.level == 'warning']

    def enforce(self, facts: bool = True) -> 'Findings':
        """Print facts and notes, issue warnings, and raise errors.

        Only rank 0 prints and warns. All ranks raise the errors.

        Args:
            facts: If True, print the facts.
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
