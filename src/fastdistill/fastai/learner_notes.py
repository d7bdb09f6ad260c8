"""State of a Learner that is kept from one fit to the next.

The state is stored outside the Learner, so that exports and copies of the Learner do not contain
it.
"""

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary


@dataclass
class LearnerNotes:
    """State of a Learner that is kept between fits.

    Attributes:
        fitting: The `KnowledgeDistillation` of the current fit.
        last_state: `KnowledgeDistillation.state_dict` after the last fit or load. `Learner.save`
            saves this state. None before the first fit or load.
        loaded_state: State that `Learner.load` found next to the student's file, and that the next
            fit will load.
        passed_epochs: {cache: number of epochs trained from this cache}. The next fit continues
            with the next view.
    """

    fitting: object = None
    last_state: dict | None = None
    loaded_state: dict | None = None
    passed_epochs: dict = field(default_factory=dict)


NOTES = WeakKeyDictionary()


def notes_of(learn) -> LearnerNotes:
    return NOTES.setdefault(learn, LearnerNotes())
