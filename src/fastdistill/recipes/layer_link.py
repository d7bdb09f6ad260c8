"One pair of layers that a term compares, or the logits."

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from ..base.outputs import DistillError, Outputs
from ..features.layer_hooks import layer_output

__all__ = ['Link', 'own_copy']


class Link(nn.Module):
    """One pair of layers that a term compares, with its projector and, if the loss has parameters,
    its own copy of the loss.
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
                    f"{', '.join(o.feats) or 'none'}). distiller.teacher_outputs(x) reads the teacher's "
                    "layers, Taps(student, distiller.student_layers()) the student's."
                )
        a, b = found
        return (a if self.projector is None else self.projector(a, b)), b


def own_copy(loss: Callable) -> Callable:
    """Return a copy of a loss that may have parameters, so that a recipe can be used more than
    once.
    """
    return copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
