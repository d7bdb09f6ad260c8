"""A module is a guest while it teaches: its modes, buffers, device and hidden states are restored
afterwards.
"""

import torch
from torch import nn

from ..base.outputs import map_tensors, tensors_in
from ..features.probe import restore_tensor
from .hidden_state import has_reset

__all__ = ['Guest', 'cuda_devices']


class Guest:
    """Inside `with Guest(model, mode):` the model is ready to teach; afterwards it is as before.

    Args:
        ours: A copy of the teacher's own, whose buffers nobody else reads.
    """

    def __init__(self, model, mode, ours: bool = False):
        self.model, self.mode, self.ours = model, mode, ours

    def __enter__(self):
        mods = list(self.model.modules())
        self.modes = [(m, m.training) for m in mods if hasattr(m, 'training')]
        self.buffers = [
            (m._buffers, k, b) for m in mods for k, b in m._buffers.items() if b is not None
        ]
        self.saved = Saved([] if self.ours else [b for *_, b in self.buffers])
        self.states = [(m, state_of(m)) for m in mods if isinstance(m, nn.RNNBase) or has_reset(m)]
        params = [p for m in mods for p in m._parameters.values() if p is not None]
        dtypes = (p.dtype for p in params)
        self.dtype = next((d for d in dtypes if d.is_floating_point and d.itemsize > 1), None)
        self.cuda = {t.device for t in [*params, *(b for *_, b in self.buffers)] if t.is_cuda}
        self.params = []  # as they were, if the model was moved
        self.batch_device = self.device = None  # of the last batch, and where it goes
        self.has_run = False
        self.settle()
        return self

    def settle(self):
        """Set every submodule to the teacher's mode. Each batch does this, since other code may
        have changed modes.
        """
        # subtle: the flag, not .eval(), since some models override .eval() to do more, such as merging adapters
        for m, _ in self.modes:
            if m.training != (self.mode == 'train'):
                m.training = self.mode == 'train'

    def place(self, device):
        """The device to which a batch on `device` moves. A model on the CPU moves to the batch,
        another one stays.
        """
        if device != self.batch_device:
            self.batch_device, self.device = device, self._place(device)
        return self.device

    def _place(self, device):
        at = dict.fromkeys(t.device for t in [*self.model.parameters(), *self.model.buffers()])
        if not at or device in at and len(at) == 1:
            return device
        if list(at) != [torch.device('cpu')]:
            return next(d for d in at if d.type != 'meta')
        self.params = [
            (m._parameters, k, p, p.data, p.grad)
            for m in self.model.modules()
            for k, p in m._parameters.items()
            if p is not None
        ]
        for _, _, p, _, _ in self.params:
            p.grad = None
        self.model.to(device)
        for m, _ in self.states:
            hidden = {k: v for k, v in state_of(m).items() if next(tensors_in(v), None) is not None}
            vars(m).update({k: map_tensors(v, lambda t: t.to(device)) for k, v in hidden.items()})
        return device

    def __exit__(self, *_):
        for m, training in self.modes:
            m.training = training
        for (
            d,
            k,
            p,
            data,
            grad,
        ) in self.params:  # the same tensors as before, not copies that were moved back
            p.data, p.grad = data, grad
            if d[k] is not p:
                d[k] = p
        for d, k, b in self.buffers:
            if d[k] is not b:
                d[k] = b
        self.saved.restore()
        for m, was in self.states:
            vars(m).update(was)


class Saved:
    """Values of tensors, to be restored. Those of one dtype and device are copied, and compared, in
    one piece: a model has hundreds of small buffers, and a teacher that is not started saves them
    at each batch.
    """

    def __init__(self, tensors):
        groups = {}
        for t in tensors:
            # sparse tensors can't be compared
            if t.layout == torch.strided:
                groups.setdefault((t.dtype, t.device), []).append(t)
        self.groups = [(ts, [t.shape for t in ts], one_vector(ts)) for ts in groups.values()]

    @torch.no_grad()
    def restore(self):
        for ts, shapes, values in self.groups:
            # subtle: observers of quantization-aware training change the shape of their buffers in the first batch
            if [t.shape for t in ts] == shapes and torch.equal(one_vector(ts), values):
                continue
            for t, shape, was in zip(ts, shapes, values.split([s.numel() for s in shapes])):
                restore_tensor(t, was.reshape(shape))


@torch.no_grad()
def one_vector(ts):
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in ts])


def cuda_devices(model):
    return {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}


def state_of(m):
    """Attributes that may hold a hidden state, as in fastai's recurrent layers, and `_flat_weights`
    of PyTorch's.
    """
    kept = lambda k: k == '_flat_weights' or (k[0] != '_' and k != 'training')
    return {k: list(v) if type(v) is list else v for k, v in vars(m).items() if kept(k)}
