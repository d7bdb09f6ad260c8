"""Pass the raw items of a batch, such as texts or file paths, to a teacher with `items=`."""

from typing import Any

from torch import Tensor

from ..base.batch_samples import BatchSamples
from ..base.mixup import mixed
from ..base.outputs import DistillError, Outputs, map_tensors, tensors_in
from .members import single_teachers


def with_items(x: Any, items: Any) -> Any:
    """Return the inputs of a batch as tensors that also carry the raw items of their samples.

    A teacher with `items=` needs the raw items. In a plain training loop, call `distiller(with_items(x,
    paths), y)`.

    Args:
        x: Inputs of a batch.
        items: Raw items of the samples in the same order, as a list or as rows of a table. None if
            they are unknown.
    """
    if items is None:
        return x
    sizes = [len(t) for t in tensors_in(x) if t.dim()]
    if len(items) not in sizes:
        raise DistillError(
            f'{len(items)} items for a batch of {sizes[0] if sizes else "no"} samples: pass one '
            'item for each sample, in the order of the batch, and pass the inputs as tensors.'
        )
    # subtle: create views, since the tensors of the batch must not change. Indexing is needed,
    # because `as_subclass` may return the same object
    x = map_tensors(x, lambda t: t.as_subclass(Tensor)[...])
    for t in tensors_in(x):
        t.raw_items = items  # type: ignore[attr-defined]
    return x


def items_beside(x: Any, name: str) -> Any:
    """Return the raw items that the inputs carry. Raise a DistillError if there are none.

    Args:
        x: Inputs of a batch, returned by `with_items`.
        name: Name of the teacher for the error message.
    """
    if (items := items_in(x)) is None:
        raise DistillError(
            f'items= of the teacher {name}: the raw items of these inputs are not known here. They '
            "are known for the batches of fastai's DataLoaders, in distill, KnowledgeDistillation, "
            'check_teacher, compare and cache_teacher. In your own training loop, pass them with '
            "the batch: distiller(with_items(x, items), y). Otherwise, store the teacher's outputs "
            'with cache_teacher or cache_dataset and train from the cache, or compute the '
            "teacher's inputs from the batch: Teacher(model, inputs=fn)."
        )
    return items


def items_in(x: Any) -> Any:
    """Return the raw items that the inputs carry, or None if there are none.

    Args:
        x: Inputs of a batch.
    """
    return next((t.raw_items for t in tensors_in(x) if hasattr(t, 'raw_items')), None)


def reads_only_items(teacher: Any) -> bool:
    """Return True if the teacher reads raw items. For an ensemble, all members must read raw
    items.
    """
    return all(t.items is not None for t in single_teachers(teacher))


def items_at(items: Any, positions: list) -> Any:
    """Return the raw items at some positions.

    Args:
        items: A list or a table.
        positions: Indices of the items, or of the rows of the table.
    """
    return items.iloc[positions] if hasattr(items, 'iloc') else [items[i] for i in positions]


def as_in_batch(out: Outputs, samples: BatchSamples, teacher: Any) -> Outputs:
    """Mix outputs for raw items in the same way as MixUp or CutMix mixed the batch.

    Args:
        out: Outputs of `teacher` for the raw items.
        samples: The samples of the batch.
        teacher: The teacher, which has `items=`.
    """
    samples.refuse_moved(
        out,
        'The teacher reads the raw items',
        'Remove these transforms, or use a teacher that reads the batch: Teacher(model, '
        'inputs=fn).',
    )
    if samples.mix is not None and not reads_only_items(teacher):
        raise DistillError(
            'MixUp and CutMix mix the batch, which some members of the ensemble read, while others '
            'read the raw items: give all members items=, or train without mixing.'
        )
    return mixed(out, samples, teacher.kind, teacher.axis)
