"""Reset hidden states with the method `reset` of a model.

The method is used only if a trial call shows that it does not change weights.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..base.errors import few_names
from ..base.model_state import ModelState
from ..features.probe import distinct_modules, untouched

NO_RESET = (
    '{name} has a method reset() that {why}. That was undone, and the method is not called again, so hidden '
    'states are not reset. If the model has hidden states, its reset() should change nothing else.'
)


def has_reset(model: Any) -> bool:
    return callable(getattr(model, 'reset', None))


def why_no_reset(model: Any) -> str | None:
    """Return why `model.reset()` should not be called, or None if it changes only hidden states.

    The method is called once as a trial, and then all state is restored.
    """
    state = ModelState(distinct_modules(model), weights=True)
    was = {n: (t.data_ptr(), t.detach().clone()) for n, t in saved_tensors(model).items()}
    try:
        with untouched(model):
            model.reset()
            now = saved_tensors(model)
            names = dict.fromkeys([*was, *now])
            changed = [n for n in names if is_changed(was.get(n), now.get(n))]
    except Exception as e:  # a user's method may raise any error
        return f'fails without arguments ({type(e).__name__}: {e})'
    finally:
        state.restore()
    if changed:
        return f'changes weights ({few_names(changed, 3)})'
    return None


def saved_tensors(model: Module) -> dict[str, Tensor]:
    """Return {name: tensor} for the parameters and persistent buffers that can be compared."""
    tensors = {n: t for n, t in model.state_dict(keep_vars=True).items() if torch.is_tensor(t)}
    comparable = lambda t: t.layout == torch.strided and not t.is_meta and not t.is_quantized
    return {n: t for n, t in tensors.items() if comparable(t)}


def is_changed(was: tuple | None, now: Tensor | None) -> bool:
    """Return True if a tensor is new, deleted, moved or different.

    Args:
        was: (address, values) before the call. None if the tensor did not exist.
        now: Tensor after the call. None if the tensor was deleted.
    """
    if was is None or now is None or now.data_ptr() != was[0]:
        return True
    # subtle: compare bytes, so that nan equals nan
    a, b = [o.detach().contiguous().reshape(-1).view(torch.uint8) for o in (now, was[1])]
    return not torch.equal(a, b)
