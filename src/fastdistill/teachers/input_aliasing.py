"Does a module leave its inputs as they are? Then it needs no copy of the student's batch."
import torch
from ..base.outputs import tensors_in

__all__ = ['input_marks', 'inputs_kept', 'may_be_lent', 'shares_memory']


def may_be_lent(t):
    "Can a change of this tensor be seen?"
    return t.layout == torch.strided and not t.is_inference()


def input_marks(
    inputs, # of one run
    values:bool # keep their values too: a change through .data or NumPy counts no version
) -> list:
    "(tensor, its version, its values) of each input before a run"
    return [(t, t._version, t.clone() if values else None) for t in tensors_in(inputs) if may_be_lent(t)]


def inputs_kept(
    marks # of `input_marks`
) -> bool:
    return all(t._version == v and (was is None or t.is_meta or torch.equal(t, was)) for t,v,was in marks)


def shares_memory(
    marks, # of `input_marks`
    outputs # of the same run
) -> bool:
    "Is an output a view of an input? It would change with the student's batch"
    place = lambda t: t.untyped_storage().data_ptr()
    mine = {place(t) for t,*_ in marks}
    return any(may_be_lent(t) and place(t) in mine for t in tensors_in(outputs))
