"Does a module leave its inputs as they are? Then it needs no copy of the student's batch."

import torch

from ..base.outputs import DistillError, tensors_in

__all__ = ['InputAliasing']


class InputAliasing:
    """Whether a module gets the batch itself or a copy. Its first batch, on a copy, shows whether it
    changes its inputs or returns views of them.

    Args:
        name: Of the teacher.
        keeps: Layers that are read -> does the module leave its inputs as they were? Not known of
            others.
    """

    def __init__(self, name, keeps):
        self.name, self.keeps = name, keeps

    def lends(self, layers):
        """fn(tensor): may the module get this very tensor?"""
        known = self.keeps.get(tuple(layers))
        return lambda t: bool(known) and can_show_changes(t) and not t.requires_grad

    def marks(self, batch, prepared, layers) -> list:
        """What shows after a run whether the module changed its inputs.

        Args:
            batch: The batch's inputs.
            prepared: What the module gets.
        """
        known = self.keeps.get(tuple(layers))
        if known is False:
            return []
        return input_marks(batch, False) if known else input_marks(prepared, True)

    def judge(self, marks, layers, outputs):
        """After a run: a module that changes its inputs, or returns views of them, gets copies."""
        key = tuple(layers)
        known = self.keeps.get(key)
        if known is False:
            return
        kept = inputs_kept(marks)
        self.keeps[key] = kept and (known or not shares_memory(marks, outputs))
        if known and not kept:
            raise DistillError(
                f'The teacher {self.name} changed its input in this batch, and not in its first one. So '
                "the student's batch was changed too. Train again: now the teacher gets copies."
            )


def can_show_changes(t):
    "Can a change of this tensor be seen?"
    return t.layout == torch.strided and not t.is_inference()


def input_marks(inputs, values: bool) -> list:
    """(tensor, its version, its values) of each input before a run.

    Args:
        values: Keep their values too: a change through .data or NumPy counts no version.
    """
    return [
        (t, t._version, t.clone() if values else None)
        for t in tensors_in(inputs)
        if can_show_changes(t)
    ]


def inputs_kept(marks) -> bool:
    return all(
        t._version == v and (was is None or t.is_meta or torch.equal(t, was)) for t, v, was in marks
    )


def shares_memory(marks, outputs) -> bool:
    """Is an output a view of an input? It would change with the student's batch."""
    place = lambda t: t.untyped_storage().data_ptr()
    mine = {place(t) for t, *_ in marks}
    return any(can_show_changes(t) and place(t) in mine for t in tensors_in(outputs))
