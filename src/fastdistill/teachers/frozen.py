"""Freeze a module while it is used as a teacher, and restore its state afterwards."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Module

from ..base.model_state import Attributes, TensorValues
from ..base.outputs import map_tensors, tensors_in
from .hidden_state import has_reset


class FrozenModel:
    """Context manager that freezes a model in evaluation or training mode.

    When the context ends, the modes, buffers, device and hidden states of the model are restored. The
    weights, and the statistics of batch norms in evaluation mode, keep their values: the model only
    reads them, so if they changed, other code updated them, as for a moving average of the student.

    Args:
        model: An nn.Module.
        mode: 'eval' or 'train'.
        private: True for a copy that belongs to the teacher, whose buffers need not be restored.
    """

    def __init__(self, model: Module, mode: str, private: bool = False) -> None:
        self.model, self.mode, self.private = model, mode, private

    def __enter__(self) -> Self:
        modules = list(self.model.modules())
        self.modes = [(m, m.training) for m in modules if hasattr(m, 'training')]
        kept = [] if self.private else [m for m in modules if not self._only_reads_buffers(m)]
        self.buffers = buffers_of(kept)
        self.values = TensorValues([b for *_, b in self.buffers])
        self.hidden = [
            Attributes(m, may_be_hidden_state)
            for m in modules
            if isinstance(m, nn.RNNBase) or has_reset(m)
        ]
        dtypes = (p.dtype for p in self.model.parameters())
        self.dtype = next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None)
        self.cuda = cuda_devices(self.model)
        self.params: list[tuple] = []  # original parameters, if the model was moved
        # device of the last batch, and device on which the model runs it
        self.batch_device: torch.device | None = None
        self.device: Any = None
        self.has_run = False
        self.settle()
        return self

    def _only_reads_buffers(self, m: Module) -> bool:
        # subtle: a subclass may have its own `forward`, which updates the statistics
        known = nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward
        norm = isinstance(m, nn.modules.batchnorm._BatchNorm) and type(m).forward in known
        return norm and self.mode == 'eval'

    def settle(self) -> None:
        """Set every submodule to the mode of the teacher.

        The mode is set for each batch, since other code may have changed it.
        """
        # subtle: set the flag instead of calling .eval(), which some models override, e.g. to merge
        # adapters
        for m, _ in self.modes:
            if m.training != (self.mode == 'train'):
                m.training = self.mode == 'train'

    def place(self, device: torch.device) -> torch.device:
        """Return the device on which a batch from `device` runs.

        A model on the CPU moves to the device of the batch. A model on a different device stays
        there.
        """
        if device != self.batch_device:
            self.batch_device, self.device = device, self._place(device)
        return self.device

    def _place(self, device: torch.device) -> torch.device:
        at = dict.fromkeys(t.device for t in [*self.model.parameters(), *self.model.buffers()])
        if not at or device in at and len(at) == 1:
            return device
        if list(at) != [torch.device('cpu')]:
            return next(d for d in at if d.type != 'meta')
        self.params = [
            (m._parameters, k, p, p.data, p.grad)
            for m in self.model.modules()
            for k, p in m.named_parameters(recurse=False)
        ]
        # subtle: the buffers from before the run are restored last, if they were replaced since
        self.buffers = buffers_of(self.model.modules()) + self.buffers
        for _, _, p, _, _ in self.params:
            p.grad = None
        self.model.to(device)
        for h in self.hidden:
            tensors = {k: v for k, v in h.now().items() if next(tensors_in(v), None) is not None}
            h.vars.update({k: map_tensors(v, lambda t: t.to(device)) for k, v in tensors.items()})
        return device

    def __exit__(self, *_: object) -> None:
        for m, training in self.modes:
            m.training = training
        # restore the original tensors instead of moving copies back
        for parameters, k, p, data, grad in self.params:
            keep_changes(parameters[k], data)
            p.data, p.grad = data, grad
            if parameters[k] is not p:
                parameters[k] = p
        for buffers, k, b in self.buffers:
            if buffers[k] is not b:
                keep_changes(buffers[k], b)
                buffers[k] = b
        self.values.restore()
        for h in self.hidden:
            h.restore()


@torch.no_grad()
def keep_changes(now: Tensor, original: Tensor) -> None:
    """Copy the values of a moved tensor to the original tensor if they differ."""
    alike = now.shape == original.shape and now.layout == original.layout == torch.strided
    # the meta device has no values
    if alike and not now.is_meta and not torch.equal(now := now.to(original), original):
        original.copy_(now)


def buffers_of(modules: Iterable[Module]) -> list[tuple[dict, str, Tensor]]:
    """Return (dict of a module's buffers, name, buffer) for each buffer."""
    return [(m._buffers, k, b) for m in modules for k, b in m.named_buffers(recurse=False)]


def cuda_devices(model: Module) -> set[torch.device]:
    return {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}


def may_be_hidden_state(name: str) -> bool:
    """Return True if an attribute of a recurrent layer may contain a hidden state.

    The result is also True for `_flat_weights`, an attribute of PyTorch's recurrent layers.
    """
    return name == '_flat_weights' or (name[0] != '_' and name != 'training')
