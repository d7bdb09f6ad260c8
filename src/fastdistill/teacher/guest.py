"A module that teaches is a guest: its modes, buffers, device and hidden states are put back afterwards."
import torch
from torch import nn
from ..features.probe import restore_tensor
from ..outputs import map_tensors, tensors_in

__all__ = ['Guest', 'cuda_devices']


class Guest:
    "What a module is like before it teaches, and the way back"
    def __init__(self, model, mode): self.model,self.mode = model,mode

    def __enter__(self):
        mods = list(self.model.modules())
        self.modes = [(m, m.training) for m in mods if hasattr(m, 'training')]
        self.buffers = [(m._buffers, k, b, b.clone() if b.layout == torch.strided else None)      # sparse ones can't be compared
                        for m in mods for k,b in m._buffers.items() if b is not None]
        self.states = [(m, state_of(m)) for m in mods if isinstance(m, nn.RNNBase) or callable(getattr(m, 'reset', None))]
        self.dtype = next((p.dtype for p in self.model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1), None)
        self.cuda = cuda_devices(self.model)
        self.params,self.batch,self.device,self.seen = [],None,None,False
        self.settle()
        return self

    def settle(self):
        "Every submodule in the mode asked for, at each batch: something in between may have changed it"
        # subtle: the flag and not .eval(), which some models override to do more (merge adapters into weights, for one)
        for m,_ in self.modes:
            if m.training != (self.mode == 'train'): m.training = self.mode == 'train'

    def place(self, device):
        "Where a batch that is on `device` has to go: a teacher on the CPU comes to it, one that lives elsewhere stays"
        if device != self.batch: self.batch,self.device = device,self._place(device)
        return self.device

    def _place(self, device):
        at = dict.fromkeys(t.device for t in [*self.model.parameters(), *self.model.buffers()])
        if not at or device in at and len(at) == 1: return device
        if list(at) != [torch.device('cpu')]: return next(d for d in at if d.type != 'meta')
        self.params = [(m._parameters, k, p, p.data, p.grad)
                       for m in self.model.modules() for k,p in m._parameters.items() if p is not None]
        for _,_,p,_,_ in self.params: p.grad = None
        self.model.to(device)
        for m,_ in self.states:
            held = {k: v for k,v in state_of(m).items() if next(tensors_in(v), None) is not None}
            vars(m).update({k: map_tensors(v, lambda t: t.to(device)) for k,v in held.items()})
        return device

    def __exit__(self, *_):
        for m,on in self.modes: m.training = on
        for d,k,p,data,grad in self.params:     # the very tensors that were there, so that nothing was rounded or copied
            p.data,p.grad = data,grad
            if d[k] is not p: d[k] = p
        for d,k,b,was in self.buffers:
            if d[k] is not b: d[k] = b
            if was is not None: restore_tensor(b, was)
        for m,was in self.states: vars(m).update(was)


def cuda_devices(model): return {t.device for t in [*model.parameters(), *model.buffers()] if t.is_cuda}


def state_of(m):
    "Hidden state and the like: of fastai's recurrent layers, and what PyTorch's keep beside their parameters"
    return {k: list(v) if type(v) is list else v for k,v in vars(m).items() if k == '_flat_weights' or (k[0] != '_' and k != 'training')}
