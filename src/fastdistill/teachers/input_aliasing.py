"Does a module leave its inputs as they are? Then it needs no copy of the student's batch."

import torch

from ..base.outputs import tensors_in

__all__ = ['input_marks', 'inputs_kept', 'may_be_lent', 'shares_memory']


def may_be_lent(t):
    "Can a change of this tensor be seen?"
    return t.layout == torch.strided and not t.is_inference()


def input_marks(inputs, values: bool) -> list:
    """(tensor, its version, its values) of each input before a run.

    Args:
        inputs: Of one run.
        values: Keep their values too: a change through .data or NumPy counts no version.
    """
    return [
        (t, t._version, t.clone() if values else None) for t in tensors_in(inputs) if may_be_lent(t)
    ]


def inputs_kept(
    marks,  # of `input_marks`
) -> bool:
    return all(
        t._version == v and (was is None or t.is_meta or torch.equal(t, was)) for t, v, was in marks
    )


def shares_memory(marks, outputs) -> bool:
    """Is an output a view of an input? It would change with the student's batch.

    Args:
        marks: Of `input_marks`
        outputs: Of the same run.
    """
    place = lambda t: t.untyped_storage().data_ptr()
    mine = {place(t) for t, *_ in marks}
    return any(may_be_lent(t) and place(t) in mine for t in tensors_in(outputs))
