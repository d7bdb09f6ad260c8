"The recipe for a Learner when none is given, from what its student predicts for one batch."
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from ..automatic import auto
from ..doctor.findings import Findings
from ..features.probe import dry_run
from ..outputs import DistillError, Outputs
from ..replay.seeds import RandomGuard
from ..task import facts_of_outputs
from .batches import PreparationError, prepared_batches

__all__ = ['Example', 'choose_recipe', 'example_of', 'facts_for_choice']


@dataclass
class Example:
    "One batch, on which the student ran as in validation"
    x:tuple # its inputs
    labels:bool # does it have labels?
    shape:tuple # of the student's outputs


def example_of(
    learn,
    output=None # which of the student's outputs is distilled, as in `Distiller`
) -> Example|None:
    "The first batch that the student runs on; None if it does not run on batches as they are. Nothing is changed by it"
    with RandomGuard(), ExitStack() as stack:
        batches = [stack.enter_context(closing(o)) for o in prepared_batches(learn, 1, 1)]
        try:
            x,y = next(chain(*batches), (None, None))
            if x is None: return None
            return Example(x, bool(y), tuple(Outputs.of(dry_run(learn.model, *x), output=output).logits.shape))
        except (PreparationError, DistillError): return None


def choose_recipe(
    example:Example|None, # as `example_of` gives it
    task, # what the student predicts
    found:Findings|None=None # what the check of the teacher found; None: it was not checked
):
    "What `auto` chooses for these outputs and this teacher"
    return auto(**facts_for_choice(example, task, found))


def facts_for_choice(example, task, found=None) -> dict:
    "The arguments of `auto`"
    low = any(f.doubt for f in found or ())
    doubt = dict(doubt="the teacher's score is in doubt, see the warning" if low else None)
    if example is None: return dict(kind=task.kind) | doubt
    return facts_of_outputs(example.shape, task) | dict(labels=example.labels) | doubt
