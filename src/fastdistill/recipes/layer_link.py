"A pair of layers, or the logits, that a term compares."

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ..base.outputs import DistillError, Outputs
from ..features.layer_hooks import layer_output


class Link(nn.Module):
    """A pair of layers that a term compares, with a projector and a loss. If the loss has
    parameters, each pair has its own copy of the loss.
    """

    def __init__(
        self,
        loss: Callable,
        layers: tuple[str, str] | None = None,
        projector: Callable | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.projector = layers, projector
        self.loss = loss

    def tensors(self, s: Outputs, t: Outputs) -> tuple[Any, Any]:
        if self.layers is None:
            return s.logits, t.logits
        found = [layer_output(o, n) for o, n in zip((s, t), self.layers)]
        for o, n, who, y in zip((s, t), self.layers, ('student', 'teacher'), found):
            if y is None:
                raise DistillError(
                    f"The {who}'s outputs have no layer {n!r} (they have: "
                    f"{', '.join(o.feats) or 'none'}). To read the teacher's layers, use "
                    "distiller.teacher_outputs(x). To read the student's layers, use Taps(student, "
                    'distiller.student_layers()).'
                )
        a, b = found
        return (a if self.projector is None else self.projector(a, b)), b


def own_copy(loss: Callable) -> Callable:
    """Copy a loss if it is a module. Several models can then be trained with the same recipe
    without sharing parameters.
    """
    return copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
