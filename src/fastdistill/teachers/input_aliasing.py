"""Decide whether a module needs a copy of the student's batch.

A copy is needed if the module changes its inputs or returns views of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import DistillError, tensors_in


class InputAliasing:
    """Decides whether a module gets the batch itself or a copy.

    The first batch is always copied. The first run shows whether the module changes its inputs or
    returns views of them.

    Args:
        name: Name of the teacher.
        keeps: {names of the layers that are read: True if no copy is needed}. `judge` fills this
            dict.
    """

    def __init__(self, name: str, keeps: dict[tuple, bool]) -> None:
        self.name, self.keeps = name, keeps

    def lends(self, layers: Sequence[str]) -> Callable[[Tensor], bool]:
        """Return fn(tensor) -> True if the module may get the tensor itself."""
        known = self.keeps.get(tuple(layers))
        return lambda t: bool(known) and can_show_changes(t) and not t.requires_grad

    def marks(self, batch: Any, prepared: Any, layers: Sequence[str]) -> list:
        """Return (tensor, version, values) for each input before a run, so that `judge` can detect
        changes.

        Args:
            batch: Inputs of the batch.
            prepared: Inputs that the module gets.
            layers: Names of the layers that are read.
        """
        known = self.keeps.get(tuple(layers))
        if known is False:
            return []
        inputs = filter(can_show_changes, tensors_in(batch if known else prepared))
        # subtle: copy the values too, since changes through .data or NumPy do not increase the version
        return [(t, t._version, None if known else t.clone()) for t in inputs]

    def judge(self, marks: Sequence[tuple], layers: Sequence[str], outputs: Any) -> None:
        """Check after a run whether the module needs copies of its inputs from now on.

        Args:
            marks: Result of `marks` before the run.
            layers: Names of the layers that are read.
            outputs: Outputs of the module.

        Raises:
            DistillError: If the module changed inputs that were not copied.
        """
        key = tuple(layers)
        known = self.keeps.get(key)
        if known is False or not marks:
            return
        unchanged = lambda t, values: values is None or t.is_meta or torch.equal(t, values)
        kept = all(t._version == v and unchanged(t, values) for t, v, values in marks)
        place = lambda t: t.untyped_storage().data_ptr()
        mine = {place(t) for t, *_ in marks}
        # an output may be a view of an input, so that changing one would change the other
        is_view = lambda t: can_show_changes(t) and place(t) in mine
        self.keeps[key] = kept and (known or not any(map(is_view, tensors_in(outputs))))
        if known and not kept:
            raise DistillError(
                f'The teacher {self.name} changed its input in this batch, but not in the first batch. '
                "So the student's batch was changed too. Train again: the teacher now gets copies."
            )


def can_show_changes(t: Tensor) -> bool:
    """Return True if changes of a tensor can be detected."""
    if t.layout != torch.strided or t.is_inference():
        return False
    try:
        t.untyped_storage()
    except NotImplementedError:  # inside `vmap` and `grad` of torch.func
        return False
    return True
