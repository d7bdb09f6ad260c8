"""Build a faster copy of a teacher's model, with a different dtype, layout or device."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..features.layer_names import named
from .batch_norm_folding import FoldablePair


@dataclass(frozen=True)
class CopyPlan:
    """Options for copying a model.

    Attributes:
        dtype: Dtype of the weights.
        device: Device of the copy.
        layout: Memory format of convolution weights. None to keep the current format.
        pairs: Convolutions and batch norms to fold.
        all_floats: If True, convert non-persistent buffers too.
    """

    dtype: torch.dtype
    device: torch.device
    layout: torch.memory_format | None = None
    pairs: tuple[FoldablePair, ...] = ()
    all_floats: bool = False

    def __str__(self) -> str:
        folded = f'{len(self.pairs)} batch-norms folded' if self.pairs else ''
        layout = 'channels_last' if self.layout is not None else ''
        return ', '.join(filter(None, [short_name(self.dtype), layout, folded]))

    def build(self, model: nn.Module) -> nn.Module:
        """Return a frozen copy of the model.

        To save memory, unchanged weights are shared with the model.
        """
        memo: dict[int, Any] = {}
        for conv, norm, _ in self.pairs:
            memo |= {id(conv): folded(conv, norm, self._frozen), id(norm): nn.Identity().eval()}
        for m in model.modules():
            if id(m) in memo:
                continue
            for p in m._parameters.values():
                if p is not None and id(p) not in memo:
                    memo[id(p)] = self._frozen(p)
            for k, b in m._buffers.items():
                if b is None or id(b) in memo:
                    continue
                saved = k not in m._non_persistent_buffers_set
                new = self._convert(b, self.all_floats or saved)
                memo[id(b)] = new.clone() if new.data_ptr() == b.data_ptr() else new
        with torch.no_grad():
            out = copy.deepcopy(model, memo)
        for m in out.modules():
            if isinstance(m, nn.RNNBase):
                m.flatten_parameters()
        return out

    def _frozen(self, p: Tensor) -> nn.Parameter:
        return nn.Parameter(self._convert(p), requires_grad=False)

    def _convert(self, t: Tensor, to_dtype: bool = True) -> Tensor:
        t = t.detach()
        dtype = self.dtype if to_dtype and t.is_floating_point() else t.dtype
        if self.layout is not None and t.dim() == 4:
            return t.to(device=self.device, dtype=dtype, memory_format=self.layout)
        return t.to(device=self.device, dtype=dtype)


@torch.no_grad()
def folded(conv: Any, norm: Any, frozen: Callable[[Tensor], nn.Parameter]) -> Module:
    """Return a convolution that includes the batch norm.

    Args:
        conv: A convolution.
        norm: The batch norm after the convolution.
        frozen: fn(tensor) -> frozen parameter for the copy.
    """
    bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
    weight, bias = fuse_conv_bn_weights(
        conv.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    new = copy.deepcopy(conv, {id(conv.weight): frozen(weight), id(conv.bias): None})
    new.bias = frozen(bias)
    return new.train(False)


def without_layers(
    model: Module, pairs: Iterable[FoldablePair], layers: Sequence[str]
) -> tuple[FoldablePair, ...]:
    """Return the pairs that can still be folded if the named layers are read."""
    have = named(model)
    read = {have.get(n.split('@')[0]) for n in layers}
    return tuple(p for p in pairs if not p.seen_by & read)


def weights_of(model: Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
