"""Reset hidden states. A model's method `reset` is called only if a trial shows that it changes
nothing else.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..base.model_state import ModelState
from ..features.probe import distinct_modules, untouched

__all__ = ['NO_RESET', 'has_reset', 'why_no_reset']

NO_RESET = (
    '{name} has a method reset() that {why}. That was undone, and the method is not called again, so hidden '
    'states are not reset. If the model has hidden states, its reset() should change nothing else.'
)


def has_reset(model: Any) -> bool:
    return callable(getattr(model, 'reset', None))


def why_no_reset(model: Any) -> str | None:
    """Return the reason not to call `model.reset()`. None if it changes only hidden states. It is
    called once to find out, and everything is restored.
    """
    state = ModelState(distinct_modules(model), weights=True)
    was = {n: (t.data_ptr(), t.detach().clone()) for n, t in saved_tensors(model).items()}
    try:
        with untouched(model):
            model.reset()
            now = saved_tensors(model)
            names = dict.fromkeys([*was, *now])
            changed = [n for n in names if is_changed(was.get(n), now.get(n))]
    except Exception as e:  # a user's method may raise anything
        return f'fails without arguments ({type(e).__name__}: {e})'
    finally:
        state.restore()
    if changed:
        return f'changes weights ({", ".join(changed[:3])}{" ..." if len(changed) > 3 else ""})'
    return None


def saved_tensors(model: Module) -> dict[str, Tensor]:
    """Return {name: tensor} of the parameters and saved buffers that can be compared."""
    buffers = {
        f'{n}.{k}'.lstrip('.'): b
        for n, m in model.named_modules()
        for k, b in m._buffers.items()
        if b is not None and k not in getattr(m, '_non_persistent_buffers_set', ())
    }
    comparable = lambda t: t.layout == torch.strided and not t.is_meta and not t.is_quantized
    return {n: t for n, t in {**dict(model.named_parameters()), **buffers}.items() if comparable(t)}


def is_changed(was: tuple | None, now: Tensor | None) -> bool:
    """Return True if a tensor is new, gone, moved or different.

    Args:
        was: (address, values) before. None if there was no such tensor.
        now: The tensor. None if it is gone.
    """
    if was is None or now is None or now.data_ptr() != was[0]:
        return True
    # subtle: bit by bit, so that nan equals nan
    a, b = [o.detach().contiguous().reshape(-1).view(torch.uint8) for o in (now, was[1])]
    return not torch.equal(a, b)
