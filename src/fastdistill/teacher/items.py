"The raw items of a batch, such as texts and files: what a teacher with `items=` reads in place of the batch's inputs."
from torch import Tensor
from ..outputs import DistillError, map_tensors, tensors_in

__all__ = ['items_beside', 'with_items']


def with_items(
    x, # inputs of a batch
    items # of its samples, in their order; None: unknown
):
    "The same inputs, as tensors that carry the raw items"
    if items is None: return x
    x = map_tensors(x, lambda t: t.as_subclass(Tensor))     # new objects, since the batch's own must not change
    for t in tensors_in(x): t.raw_items = items
    return x


def items_beside(
    x, # inputs of a batch, as `with_items` returned them
    name:str # of the teacher, in messages
):
    "The raw items of these inputs"
    items = next((t.raw_items for t in tensors_in(x) if hasattr(t, 'raw_items')), None)
    if items is None:
        raise DistillError(f"items= of the teacher {name}: the raw items of these inputs are not known here. They are "
                           "known for the batches of fastai's DataLoaders, in distill, KnowledgeDistillation, "
                           "check_teacher and cache_teacher. Elsewhere, store the teacher's outputs with "
                           "cache_teacher or cache_dataset and train from these, or make its inputs from the batch: "
                           "Teacher(model, inputs=fn).")
    return items
