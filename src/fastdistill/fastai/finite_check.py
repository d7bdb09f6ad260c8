"""Stop a fit if the teacher's outputs are nan or infinite."""

import math
from dataclasses import replace

import torch

from ..base.outputs import DistillError, Draws, LinearLogits, TopK
from ..base.task import unusable


class FiniteCheck:
    """Stops a fit if the teacher's outputs are nan or infinite.

    On the CPU, every batch is checked. On a GPU, a check in every step would have to wait for the
    result. So on a GPU, only the first batch and the end of each phase are checked.

    Args:
        stored: True if the outputs come from a cache or a `TeacherBlock`.
    """

    def __init__(self, stored: bool):
        self.stored, self.found = stored, None

    def start_phase(self, learn, tasks):
        """Begin a phase of training or validation.

        Args:
            learn: The student's Learner.
            tasks: {head name: `Task`}. The name is '' for a student with one output.
        """
        self.learn, self.tasks, self.found = learn, tasks, None

    def add(self, outputs):
        """Check the outputs of a batch. On a GPU, the result of the check may be read later.

        Args:
            outputs: What `Distiller.teacher_outputs` returned.
        """
        each = {'': outputs} if '' in self.tasks else outputs or {}
        for k, o in each.items():
            if o is not None:
                self._add(not_finite(o, self.tasks[k]))

    def _add(self, found):
        first = self.found is None
        self.found = found if first else self.found | found
        # this does not wait for the GPU, because the Recorder has already copied the loss to the
        # CPU
        diverged = not math.isfinite(getattr(self.learn, 'smooth_loss', 0.0))
        if first or diverged or found.device.type == 'cpu':
            self.enforce()

    def enforce(self):
        if self.found is None or not self.found:
            return
        learn = self.learn
        where = f'{"training" if learn.training else "validation"}, epoch {learn.epoch}, up to batch {learn.iter}'
        if self.stored:
            raise DistillError(
                f'Stored teacher outputs are nan or infinite ({where}). Is a file damaged? '
                'cache.check() finds it.'
            )
        raise DistillError(
            f"The teacher's outputs are nan or infinite ({where}). The student's weights would become "
            "nan too. Are the teacher's inputs finite? Does it overflow in half precision?"
        )


def not_finite(t, task):
    """Return a bool tensor that is True if the student can't learn from values in the outputs."""
    if isinstance(t.logits, TopK):
        logits, task = t.logits.values, replace(task, axis=-1)
    elif isinstance(t.logits, (LinearLogits, Draws)):
        values = t.logits.hidden if isinstance(t.logits, LinearLogits) else t.logits.entropy
        logits, task = values, replace(task, kind='regression')
    else:
        logits = t.logits
    found = [] if logits is None else [unusable(logits, task)]
    features = replace(task, kind='regression')  # features have no classes
    return torch.stack(
        [*found, *(unusable(v, features) for v in t.feats.values() if v.is_floating_point())]
    ).any()
