"What is remembered of a Learner from one fit to the next, outside of it: an exported or copied Learner has none of it."

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

__all__ = ['LearnerNotes', 'notes_of', 'passed_epochs']


@dataclass
class LearnerNotes:
    """What is remembered of a Learner.

    Attributes:
        fitting: The `KnowledgeDistillation` of the present fit.
        last_state: `KnowledgeDistillation.state_dict` after its last fit or load, for
            `Learner.save`; None: there is none.
        loaded_state: The same as `Learner.load` found it beside the student's file, for the next
            fit.
        passed_epochs: Cache -> number of epochs trained from it; the next fit continues with the
            next view.
    """

    fitting: object = None
    last_state: dict | None = None
    loaded_state: dict | None = None
    passed_epochs: dict = field(default_factory=dict)


NOTES = WeakKeyDictionary()


def notes_of(learn) -> LearnerNotes:
    return NOTES.setdefault(learn, LearnerNotes())


def passed_epochs(learn) -> dict:
    return notes_of(learn).passed_epochs
