"""The raw items of a batch, such as texts and files: what a teacher with `items=` reads instead of
the batch's inputs.
"""

from typing import Any

from torch import Tensor

from ..base.batch_samples import BatchSamples
from ..base.mixup import mixed
from ..base.outputs import DistillError, Outputs, map_tensors, tensors_in

__all__ = ['as_in_batch', 'items_at', 'items_beside', 'items_in', 'reads_only_items', 'with_items']


def with_items(x: Any, items: Any) -> Any:
    """The same inputs, as tensors that carry the raw items of their samples, for a teacher with
    `items=`. In a plain loop: `distiller(with_items(x, paths), y)`.

    Args:
        x: Inputs of a batch, where the student gets them.
        items: Of its samples, in their order: a list, or rows of a table; None: unknown.
    """
    if items is None:
        return x
    sizes = [len(t) for t in tensors_in(x) if t.dim()]
    if len(items) not in sizes:
        raise DistillError(
            f'{len(items)} items for a batch of {sizes[0] if sizes else "no"} samples: give one for '
            "each, in the batch's order, and the inputs as tensors."
        )
    # subtle: views, which are new objects, since the batch's own must not change. `as_subclass` may return `t` itself
    x = map_tensors(x, lambda t: t.as_subclass(Tensor)[...])
    for t in tensors_in(x):
        t.raw_items = items  # type: ignore[attr-defined]
    return x


def items_beside(x: Any, name: str) -> Any:
    """The raw items of these inputs.

    Args:
        x: Inputs of a batch, as `with_items` returned them.
        name: Of the teacher, in messages.
    """
    if (items := items_in(x)) is None:
        raise DistillError(
            f'items= of the teacher {name}: the raw items of these inputs are not known here. They are '
            "known for the batches of fastai's DataLoaders, in distill, KnowledgeDistillation, "
            'check_teacher, compare and cache_teacher. In a loop of your own, hand them beside the '
            "batch: distiller(with_items(x, items), y). Elsewhere, store the teacher's outputs with "
            'cache_teacher or cache_dataset and train from these, or make its inputs from the batch: '
            'Teacher(model, inputs=fn).'
        )
    return items


def items_in(x: Any) -> Any:
    """The raw items that they carry; None if they carry none.

    Args:
        x: Inputs of a batch.
    """
    return next((t.raw_items for t in tensors_in(x) if hasattr(t, 'raw_items')), None)


def reads_only_items(teacher: Any) -> bool:
    """Return True if the teacher, or each of its members, reads raw items."""
    return all(map(reads_only_items, teacher.members)) if teacher.members else teacher.reads_items


def items_at(items: Any, positions: list) -> Any:
    """Those at these positions: a list, or rows of the table.

    Args:
        items: A list, or a table.
    """
    return items.iloc[positions] if hasattr(items, 'iloc') else [items[i] for i in positions]


def as_in_batch(out: Outputs, samples: BatchSamples, teacher: Any) -> Outputs:
    """Outputs for raw items, mixed as MixUp or CutMix mixed the batch.

    Args:
        out: Outputs of `teacher`, which has items=.
        samples: The samples of the batch.
    """
    if samples.moved and any(t.dim() > 2 for t in tensors_in((out.logits, out.feats))):
        raise DistillError(
            'The teacher reads the raw items, and its outputs have a value for each pixel or token, '
            f"but {', '.join(samples.moved)} would move the student's input. Remove these "
            'transforms, or use a teacher of the batch: Teacher(model, inputs=fn).'
        )
    if samples.mix is not None and not reads_only_items(teacher):
        raise DistillError(
            'MixUp and CutMix mix the batch, which some members of the ensemble read, while others '
            'read the raw items: give all members items=, or train without mixing.'
        )
    return mixed(out, samples, teacher.kind, teacher.axis)
