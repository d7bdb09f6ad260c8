"The recipe for a Learner when none is given, from what its student predicts for one batch."

from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from ..base.outputs import DistillError, Outputs
from ..base.random_state import RandomGuard
from ..checks.findings import Findings
from ..features.probe import dry_run
from ..recipes.batch import plain_logits
from ..recipes.default import auto, facts_for_auto, for_draws
from .batches import PreparationError, prepared_batches

__all__ = ['Example', 'choose_recipe', 'example_of', 'facts_for_choice']


@dataclass
class Example:
    """One batch, on which the student ran as in validation.

    Attributes:
        x: Its inputs.
        labels: Does it have labels?
        logits: The student's.
    """

    x: tuple
    labels: bool
    logits: Tensor


def example_of(learn, output=None) -> Example | None:
    """A training batch, else a validation batch, that the student runs on; None if it does not run
    on batches as they are. Nothing is changed by it.

    Args:
        output: Which of the student's outputs is distilled, as in `Distiller`
    """
    with RandomGuard(), ExitStack() as stack:
        valid, train = (stack.enter_context(closing(o)) for o in prepared_batches(learn, 1, 1))
        try:
            x, y = next(chain(train, valid), (None, None))
            if x is None:
                return None
            return Example(x, bool(y), Outputs.of(dry_run(learn.model, *x), output=output).logits)
        except (PreparationError, DistillError):
            return None


def choose_recipe(example: Example | None, task, teacher, found: Findings | None = None):
    """What `auto` chooses for these outputs and this teacher.

    Args:
        example: As `example_of` gives it.
        task: What the student predicts.
        teacher: What a Distiller takes as its teacher.
        found: What the check of the teacher found; None: it was not checked.
    """
    stored = getattr(teacher, 'draws', None)
    if stored is not None:
        return for_draws(stored['T'], example is None or example.labels)
    return auto(**facts_for_choice(example, task, teacher, found))


def facts_for_choice(example, task, teacher, found=None) -> dict:
    """The arguments of `auto`."""
    low, stored = found is not None and found.doubt, getattr(teacher, 'doubt', '')
    before = f'when its outputs were stored: {stored}' if stored else None
    doubt = dict(doubt='the teacher is in doubt, see above' if low else before)
    if example is None:
        return dict(kind=task.kind) | doubt
    ask = lambda: plain_logits(Outputs(example.logits), teacher.probe(*example.x))[1]
    return facts_for_auto(example.logits.shape, task, ask) | dict(labels=example.labels) | doubt
