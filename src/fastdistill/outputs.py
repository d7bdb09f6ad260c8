"What a model says about a batch, and the error that tells what is wrong."
from dataclasses import dataclass, field
import torch
from torch import Tensor

__all__ = ['DistillError', 'DistillWarning', 'Outputs', 'as_plain']


class DistillError(ValueError):
    "A mistake that training would not have shown: the message says what was given, what is possible, what to do"


class DistillWarning(UserWarning):
    "Something that is probably, but not certainly, a mistake"


def as_plain(x):
    "`x` with tensor subclasses (fastai's `TensorImage` and so on) turned into plain tensors: they refuse many losses"
    return x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x


@dataclass
class Outputs:
    "Of one batch: the values before softmax, the named layers that were asked for, which positions count"
    logits:Tensor|None=None # (B, C), (B, C, H, W), (B, L, V), or any shape for regression
    feats:dict[str,Tensor]=field(default_factory=dict) # dotted layer name -> what came out of that layer
    mask:Tensor|None=None # logits' shape without the class axis: True, or a weight, where a position counts

    @classmethod
    def of(
        cls,
        raw, # what a model returned: a tensor, a tuple whose first item is one, a dict or ModelOutput with `logits`
        feats:dict|None=None,
        mask:Tensor|None=None
    ) -> 'Outputs':
        "The outputs in whatever `raw` a model returned"
        if isinstance(raw, Outputs): return raw
        return cls(as_plain(_logits(raw)), feats or {}, mask)


def _logits(raw):
    if isinstance(raw, Tensor): return raw
    if isinstance(raw, dict) and 'logits' in raw: return raw['logits']     # Hugging Face's ModelOutput is a dict
    if hasattr(raw, 'logits'): return raw.logits
    if isinstance(raw, dict) and 'out' in raw: return raw['out']           # torchvision's segmentation models
    if isinstance(raw, (tuple, list)) and len(raw) and isinstance(raw[0], Tensor): return raw[0]  # fastai's RNNs
    have = f" with the keys {', '.join(map(str, raw))}" if isinstance(raw, dict) else ''
    raise DistillError(f"The model returned a {type(raw).__name__}{have}: no logits in it. Possible are a tensor, a tuple "
                       "that begins with one, a dict with 'logits' or 'out'. Wrap the model in a function that returns one of these.")
