"""Choose a recipe for a Learner automatically, based on the student's outputs for one batch."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from ..base.outputs import DistillError, Outputs
from ..base.random_state import RandomGuard
from ..checks.findings import Findings
from ..features.probe import dry_run
from ..recipes.batch_tensors import plain_logits
from ..recipes.default import auto, facts_for_auto, for_draws
from .probe_batches import PreparationError, prepared_batches


@dataclass
class Example:
    """A batch, and the student's outputs for this batch in evaluation mode.

    Attributes:
        x: Inputs of the batch.
        labels: Labels of the batch. Empty if it has none.
        logits: The student's logits.
    """

    x: tuple
    labels: tuple
    logits: Tensor


def example_of(learn, output=None) -> Example | None:
    """Run the student on a training batch, or on a validation batch if there is no training batch.

    The student and the random state are not changed.

    Args:
        learn: The student's Learner.
        output: Which of the student's outputs is distilled, as in `Distiller`.

    Returns:
        The example, or None if the batch can't be prepared or the student's outputs can't be used.
    """
    with RandomGuard(), ExitStack() as stack:
        valid, train = (stack.enter_context(closing(o)) for o in prepared_batches(learn, 1, 1))
        try:
            x, y = next(chain(train, valid), (None, None))
            if x is None:
                return None
            logits = Outputs.of(dry_run(learn.model, *x), output=output).logits
            return Example(x, tuple(y), logits)
        except (PreparationError, DistillError):
            return None


def choose_recipe(example: Example | None, task, teacher, found: Findings | None = None):
    """Return the recipe that `auto` chooses for these outputs and this teacher.

    Args:
        example: What `example_of` returned.
        task: What the student predicts.
        teacher: A teacher, as in `Distiller`.
        found: Findings of `check_teacher`. None if the teacher was not checked.
    """
    stored = getattr(teacher, 'draws', None)
    if stored is not None:
        return for_draws(stored['T'], example is None or bool(example.labels))
    return auto(**facts_for_choice(example, task, teacher, found))


def facts_for_choice(example, task, teacher, found=None) -> dict:
    """Return the arguments of `auto`, as a dict."""
    low, stored = found is not None and found.doubt, getattr(teacher, 'doubt', '')
    before = f'when its outputs were stored: {stored}' if stored else None
    doubt = dict(doubt='the teacher is in doubt, see above' if low else before)
    if example is None:
        return dict(kind=task.kind) | doubt
    ask = lambda: plain_logits(Outputs(example.logits), teacher.probe(*example.x))[1]
    facts = facts_for_auto(example.logits.shape, task, ask, example.labels)
    return facts | dict(labels=bool(example.labels)) | doubt
