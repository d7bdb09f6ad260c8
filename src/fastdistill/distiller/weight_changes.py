"""Forget the measured gradients if a model has different weights in the next training."""

from typing import Any

from torch.nn import Module

from ..base.model_state import weights_summary
from ..teachers.members import modules_of
from ..teachers.teacher import Teacher


class WeightChanges:
    """Compares the weights of the models at the end of one training with those at the beginning of
    the next one. If they differ, for example because different weights were loaded, the gradients
    that were measured before are forgotten.

    Args:
        student: The student. None if unknown.
        heads: `Heads` of the `Distiller`.

    Attributes:
        left: Weights at the end of the last training. None if the gradients were measured with the
            current weights.
        running: True during a training.
    """

    def __init__(self, student: Module | None, heads: Any) -> None:
        self.student, self.heads = student, heads
        self.left: tuple[list, dict | None] | None = None
        self.running = False

    @property
    def teachers(self) -> list[Teacher]:
        return [t for t in self.heads.sources if isinstance(t, Teacher)]

    def begin(self) -> None:
        if self.left is not None:
            (was, versions), (now, current) = self.left, self._weights()
            if was != now or versions not in (None, current):
                for h in self.heads.values():
                    h.forget()
        self.left, self.running = None, True

    def end(self) -> None:
        if self.running:
            self.left, self.running = self._weights(), False

    def __getstate__(self) -> dict:
        # the parameters of a copied or unpickled teacher are different objects
        return vars(self) | dict(left=self.left and (self.left[0], None))

    def follow_teachers(self) -> None:
        """Begin if a teacher was started by itself, as in `with distiller.teacher:`, and end when it
        is stopped.
        """
        if self.running:
            return
        if started := next((t for t in self.teachers if t.runner.started), None):
            self.begin()
            started.runner.stack.callback(self.end)

    def _weights(self) -> tuple[list, dict]:
        """Return numbers that change if the student's weights change, and {id of a parameter of a
        teacher: its version}.
        """
        # subtle: a teacher may be much larger, so its weights are not read
        weights = [p for t in self.teachers for m in modules_of(t) for p in m.parameters()]
        versions = {id(p): None if p.is_inference() else p._version for p in weights}
        return weights_summary(self.student), versions
