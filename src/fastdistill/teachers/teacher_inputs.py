"""Prepare the inputs of a teacher's model.

These are the inputs of the batch, or the result of `inputs=` or `items=`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.outputs import DistillError, as_plain, map_tensors, tensor_of_numbers, tensors_in
from ..features.model_call import arguments, is_hf
from .image_normalization import is_image
from .model_loading import Onnx, check_second_argument
from .raw_items import items_beside


def check_own_inputs(inputs: Callable | None, items: Callable | None) -> None:
    """Raise a DistillError if `inputs=` or `items=` is not a function, or if both are given."""
    given = {k: fn for k, fn in dict(inputs=inputs, items=items).items() if fn is not None}
    if len(given) > 1:
        raise DistillError(
            "inputs= computes the teacher's inputs from the batch, items= computes them from the "
            'raw items: pass only one of them.'
        )
    for k, fn in given.items():
        if not callable(fn):
            raise DistillError(f"{k}={fn!r}: give a function that returns the teacher's inputs.")


def own_inputs(teacher: Any, x: tuple, kw: Mapping[str, Any]) -> tuple:
    """Return the positional and keyword inputs of the model.

    These are the inputs of the batch, or the result of `inputs=` or `items=`.

    Args:
        teacher: A `Teacher` with a single model.
        x: Inputs of the batch.
        kw: Keyword inputs.
    """
    if teacher.inputs is None and teacher.items is None:
        return x, kw
    own = (
        teacher.inputs(*x, **kw)
        if teacher.items is None
        else teacher.items(items_beside((x, kw), teacher.name))
    )
    if own is not None and not isinstance(teacher.model, (nn.Module, Onnx)):
        # functions and estimators may take anything, such as texts
        return own if isinstance(own, tuple) else (own,), {}
    n = next((len(t) for t in tensors_in((x, kw)) if t.dim()), None)
    if isinstance(own, tuple):
        return tuple(tensor_of_rows(v, n) for v in own), {}
    if isinstance(own, Mapping):
        own_by_name = {k: tensor_of_rows(v, n) for k, v in own.items()}
        if not any(isinstance(v, list) for v in own_by_name.values()):
            return (own_by_name,), {}
    elif isinstance(rows := tensor_of_rows(own, n), Tensor):
        return (rows,), {}
    option = 'inputs' if teacher.items is None else 'items'
    raise DistillError(
        f'{option}= of the teacher {teacher.name} returned a '
        f'{type(own).__name__}{" of lists" if isinstance(own, Mapping) else ""}: must be a tensor '
        'or array with a row for each sample, a tuple of several, or a dict of tensors by name '
        "(for a Hugging Face tokenizer, pass return_tensors='pt', padding=True)."
    )


def tensor_of_rows(o: Any, n: int | None) -> Any:
    """Convert an array or a list with a row for each of `n` samples to a tensor. Return other values
    unchanged.
    """
    t = None if isinstance(o, Tensor) else tensor_of_numbers(o)
    return o if t is None or n not in (None, len(t)) else t


def prepared_inputs(
    runner: Any,
    x: Sequence,
    kw: Mapping[str, Any],
    device: torch.device,
    frozen: Any,
) -> tuple:
    """Return the positional and keyword inputs of the model in their final form.

    The inputs are on the device of the model and have its precision. Images have the normalization
    and size that the model expects.

    Args:
        runner: The `ModelRunner` of a teacher.
        x, kw: Results of `own_inputs`.
        device: Device of the batch.
        frozen: The `FrozenModel`. None if the model is not an nn.Module.
    """
    model = runner.teacher.model
    x, kw = arguments(model, x, kw)
    if len(x) > 1 and is_hf(model) and not frozen.has_run:
        check_second_argument(model, *x[:2])
    runner.images.check([t for t in tensors_in((x, kw)) if is_image(t)])
    dtype = None
    if frozen is not None:
        device, dtype, frozen.has_run = frozen.place(device), frozen.dtype, True

    def prepare(original: Tensor) -> Tensor:
        t = (plain := as_plain(original)).to(device)
        if is_image(t):
            t = runner.images(t)
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        # subtle: make a copy, since a model that changes its input in place would change the batch
        return t.clone() if t is plain else t

    return map_tensors((x, kw), prepare)
