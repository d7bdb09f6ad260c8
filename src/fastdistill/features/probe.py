"""Run a model once without changing it, and record the layers that ran and the shapes of their
outputs.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..base.model_state import ModelState
from ..base.outputs import DistillError, as_plain, map_tensors
from ..base.random_state import RandomGuard
from .layer_names import LayerTree, layer_tree, model_name, named, unwrap
from .model_call import arguments


def layers(model: nn.Module, *x: Any) -> LayerTree:
    """List every layer of a model with its class, output shape and number of parameters.

    The model is not changed.

    Args:
        model: A model, which may be wrapped.
        *x: Batch of inputs. Required for output shapes. The items of a dict are passed by name if
            the model has arguments with these names.
    """
    return layer_tree(model, {f.module: f.shape for f in probe(model, *x)} if x else None)


@dataclass
class Fired:
    """A layer that ran, with the shapes of its input and output.

    Attributes:
        floats: True if the output is a floating-point tensor.
    """

    name: str
    module: nn.Module
    shape_in: tuple | None
    shape: tuple | None
    floats: bool


def probe(model: nn.Module, *x: Any) -> list:
    """Return the layers that run, in the order in which they finish.

    The model runs once in evaluation mode and is not changed.

    Args:
        model: A model, which may be wrapped.
        *x: Batch of inputs. The items of a dict are passed by name if the model has arguments with
            these names.
    """
    inner = unwrap(model)
    names: dict[nn.Module, str] = {}
    ran: dict[nn.Module, Fired] = {}
    for n, m in named(model).items():
        names.setdefault(m, n)

    def note(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        i, y = main_tensor((args, kwargs)), main_tensor(out)
        # subtle: a layer that runs twice is listed at the position of its last run
        ran.pop(m, None)
        ran[m] = Fired(names[m], m, _shape(i), _shape(y), y is not None and y.is_floating_point())

    hookable = [m for m in names if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in hookable]
    try:
        dry_run(inner, *x)
    finally:
        for h in handles:
            h.remove()
    return list(ran.values())


# {axis of the channels in the output of a series: layers}
CHANNEL_AXES: dict[int, tuple] = {
    1: (
        nn.Conv1d,
        nn.ConvTranspose1d,
        _BatchNorm,
        _InstanceNorm,
        nn.GroupNorm,
        nn.AvgPool1d,
        nn.MaxPool1d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveMaxPool1d,
        nn.Upsample,
    ),
    2: (
        nn.Linear,
        nn.LayerNorm,
        nn.RNNBase,
        nn.Embedding,
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
    ),
}


def series_layers(ran: Iterable[Fired]) -> set:
    """Return the layers whose output has channels first, (B, C, L), like the output of a 1d
    convolution. Other outputs with three axes are tokens, (B, L, D).

    Some classes of layers always have their channels first, and some always have them last. For any
    other layer, such as an activation or a block, the channel axis is inferred from the previous
    layer with a known channel axis. It is the axis that has the same size as the channel axis of
    that layer. If both axes or neither axis has this size, the position of the channel axis is the
    same as in that layer.

    Args:
        ran: Result of `probe`.
    """
    found, axis, n = set(), 2, None
    for f in ran:
        shape = next((s for s in (f.shape, f.shape_in) if s is not None and len(s) == 3), None)
        if shape is None:
            continue
        by_class = next((k for k, v in CHANNEL_AXES.items() if isinstance(f.module, v)), None)
        here = by_class or (
            axis if (shape[1] == n) == (shape[2] == n) else 1 if shape[1] == n else 2
        )
        if here == 1:
            found.add(f.module)
        if by_class:
            axis, n = here, shape[here]
    return found


def _shape(y: Any) -> Any:
    return None if y is None else tuple(y.shape)


def dry_run(model: Any, *x: Any) -> Any:
    """Run the model once, without its wrappers and without changing it."""
    inner = unwrap(model)
    args, kwargs = arguments(inner, map_tensors(x, as_plain))
    if any(map(is_lazy, weights_and_buffers(distinct_modules(inner)))):
        raise DistillError(
            f'{model_name(inner)} has lazy layers, which have no weights before the first batch. Run '
            'the model on a batch first.'
        )
    # Use the original model.
    # The modules of a faster copy have no hooks and would not be restored.
    run = inner if isinstance(inner, nn.Module) else getattr(inner, 'as_it_is', lambda: inner)()
    with untouched(model):
        try:
            return run(*args, **kwargs)
        except DistillError:
            raise
        except Exception as e:
            sizes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in x]
            raise DistillError(
                f'{model_name(inner)} does not run on the inputs given, '
                f'{", ".join(map(str, sizes))}: {e}'
            ) from e


@contextlib.contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Context manager that restores the model afterwards.

    Inside the context, the model is in evaluation mode without gradients, or in training mode with
    gradients (`training=True`). Afterwards, modes, buffers, hidden states, attributes and random
    states are restored.
    """
    modules = distinct_modules(unwrap(model))
    state = ModelState(modules)
    cuda = sorted({t.device.index for t in weights_and_buffers(modules) if t.is_cuda})
    # subtle: set the flag `training` instead of calling eval(), which some layers override, e.g. to
    # merge adapters
    for m, was in state.modes:
        if was != training:
            m.training = training
    try:
        with RandomGuard(cuda), torch.set_grad_enabled(training), run_eagerly(model):
            yield
    finally:
        state.restore()


def weights_and_buffers(mods: Iterable[nn.Module]) -> list:
    return [
        t for m in mods for t in [*m._parameters.values(), *m._buffers.values()] if t is not None
    ]


def distinct_modules(model: Any) -> list:
    return list(
        dict.fromkeys(model.modules() if isinstance(model, nn.Module) else named(model).values())
    )


def is_compiled(model: Any) -> bool:
    return any(
        '_orig_mod' in m._modules or m._compiled_call_impl is not None
        for m in distinct_modules(model)
    )


def run_eagerly(model: Any) -> contextlib.AbstractContextManager:
    """Return a context manager in which compiled parts of the model run in eager mode."""
    if not hasattr(torch.compiler, 'set_stance') or not is_compiled(model):
        return contextlib.nullcontext()
    return torch.compiler.set_stance('force_eager')


def main_tensor(out: Any) -> Any:
    """Return the main tensor of a layer's output, or None if the output contains no tensor.

    The main tensor is the output itself, or `last_hidden_state` or `logits` in a dict. If there is
    neither, the main tensor is the first tensor in the output.
    """
    if isinstance(out, Tensor):
        return as_plain(out)
    if isinstance(out, Mapping):
        out = [out.get('last_hidden_state'), out.get('logits'), *out.values()]
    if not isinstance(out, (tuple, list)):
        return None
    for o in out:
        if (y := main_tensor(o)) is not None:
            return y
