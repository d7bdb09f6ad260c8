"""Call a model on a batch, passing inputs by position or by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .layer_names import unwrap


def is_hf(model: Any) -> bool:
    return hasattr(model, 'config') and hasattr(model, 'main_input_name')


def base_model(model: Any) -> Any:
    """Return the model inside wrappers by PyTorch and PEFT."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


# ends of the names of models that predict the next token
PREDICTS_NEXT = 'ForCausalLM', 'WithLMHeadModel', 'LMHeadModel', 'ForConditionalGeneration'
# model families of transformers whose language models expect labels that are already shifted
SHIFTED_BEFORE = (
    'Bart,BigBirdPegasus,Blenderbot,BlenderbotSmall,Flaubert,MBart,Marian,PLBart,Pegasus,TrOCR,'
    'Whisper,XLM,XLNet'
).split(',')


def predicts_next(model: Any) -> bool:
    """Return True for a Hugging Face model that predicts the label of a position at the previous
    position, such as a causal language model or a model that writes captions of images.
    """
    model = base_model(model)
    if not is_hf(model) or getattr(model.config, 'is_encoder_decoder', False):
        return False
    name = type(model).__name__
    end = next((o for o in PREDICTS_NEXT if name.endswith(o)), None)
    return end is not None and name.removesuffix(end) not in SHIFTED_BEFORE


def arguments(model: Any, x: Any, by_name: Mapping | None = None) -> tuple:
    """Return (args, kwargs) for a call of the model.

    If the batch is a single dict, its items are passed by name, provided that the model has
    arguments with these names.

    Args:
        model: A module (which may be wrapped), a callable, or a `Teacher`.
        x: Inputs of the batch, as a tuple.
        by_name: Further inputs to pass by name.
    """
    kwargs = dict(by_name or {})
    if len(x) != 1 or not isinstance(x[0], Mapping) or not takes_names(model, x[0]):
        return tuple(x), kwargs
    return (), {**x[0], **kwargs}


def takes_names(model: Any, batch: Any) -> bool:
    """Return True if the keys of a dict are names of arguments of the model."""
    model = unwrap(model)
    if is_hf(model):
        return True
    # a `Teacher` gets the dict as one argument and decides how to call its model
    if not isinstance(model, nn.Module) and hasattr(model, 'named_modules'):
        return False
    try:
        params = inspect.signature(
            model.forward if isinstance(model, nn.Module) else model
        ).parameters.values()
    except (TypeError, ValueError):
        return False  # builtins and traced modules have no signature
    named = {p.name: p for p in params if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if set(batch) <= set(named):
        return True
    any_name = any(p.kind is p.VAR_KEYWORD for p in params)
    return any_name and all(n in batch or p.default is not p.empty for n, p in named.items())
