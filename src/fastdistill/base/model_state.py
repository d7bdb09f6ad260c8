"Save and restore the state of models and other objects: modes, attributes, buffers, hooks and weights."

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .atomic_files import write_atomically
from .errors import DistillError


class ModelState:
    """The modes, attributes, hooks, hidden states and buffers of modules, saved when this object is
    created.

    Args:
        modules: Modules to save. Submodules must be listed separately.
        weights: True to also save the values, gradients and `requires_grad` of parameters.
    """

    def __init__(self, modules: Iterable[nn.Module], weights: bool = False) -> None:
        modules = list(modules)
        # TorchScript modules have a training mode, but no attributes that could be saved
        self.modes = [(m, m.training) for m in modules if hasattr(m, 'training')]
        self.attributes = [
            Attributes(m) for m in modules if not isinstance(m, torch.jit.ScriptModule)
        ]
        tensors = [b for m in modules for b in m.buffers(recurse=False)]
        self.parameters = []
        if weights:
            ps = list(dict.fromkeys(p for m in modules for p in m.parameters(recurse=False)))
            self.parameters = [(p, p.data, p.grad, p.requires_grad) for p in ps]
            tensors += ps
        self.values = TensorValues(tensors)

    def restore(self) -> None:
        for a in self.attributes:
            a.restore()
        for m, training in self.modes:
            if m.training != training:
                m.training = training
        for p, data, grad, requires_grad in self.parameters:
            p.data, p.grad, p.requires_grad = data, grad, requires_grad
        self.values.restore()


class Attributes:
    """The attributes of an object and the contents of its lists, dicts and sets. The attributes of
    a module include its hidden states, buffers, hooks and training mode.

    Args:
        of: Object with a `__dict__`.
        only: fn(name) -> True for attributes to save. None to save all.
    """

    def __init__(self, of: object, only: Callable[[str], bool] | None = None) -> None:
        self.vars, self.only = vars(of), only or (lambda name: True)
        self.was = self.now()
        self.containers = [
            (v, copy.copy(v))
            for v in self.was.values()
            if type(v) in (list, dict, OrderedDict, set)
        ]

    def now(self) -> dict:
        return {k: v for k, v in self.vars.items() if self.only(k)}

    def restore(self) -> None:
        for k in self.now().keys() - self.was.keys():
            del self.vars[k]
        self.vars.update(self.was)
        for now, was in self.containers:
            now.clear()
            now.extend(was) if isinstance(now, list) else now.update(was)


@contextmanager
def restored(*objects: Any, only: Iterable[str] | None = None) -> Iterator[None]:
    """Context manager that restores the attributes of objects at the end, including the contents of
    lists, dicts and sets.

    Args:
        *objects: Objects to restore. Objects without a `__dict__` are ignored.
        only: Names of the attributes to restore. None for all.
    """
    names = None if only is None else set(only).__contains__
    states = [Attributes(o, names) for o in objects if hasattr(o, '__dict__')]
    try:
        yield
    finally:
        for s in states:
            s.restore()


class TensorValues:
    """The values of tensors, saved when this object is created. Tensors with the same dtype and
    device are copied and compared as one vector, which is faster for hundreds of small buffers.

    Args:
        tensors: Tensors to save. Sparse, quantized and meta tensors are ignored, because they can't
            be compared.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[tuple, list[Tensor]] = {}
        for t in tensors:
            if t.layout == torch.strided and not t.is_meta and not t.is_quantized:
                groups.setdefault((t.dtype, t.device), []).append(t)
        self.groups = [(ts, [t.shape for t in ts], one_vector(ts)) for ts in groups.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for ts, shapes, values in self.groups:
            # subtle: compare shapes first, because observers of quantization-aware training change
            # the shapes of their buffers in the first batch
            if [t.shape for t in ts] == shapes and torch.equal(one_vector(ts), values):
                continue
            for t, shape, was in zip(ts, shapes, values.split([s.numel() for s in shapes])):
                if t.shape != shape:
                    t.resize_(shape)
                if not torch.equal(t, was := was.reshape(shape)):
                    t.copy_(was)


@torch.no_grad()
def one_vector(ts: Sequence[Tensor]) -> Tensor:
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in ts])


@torch.no_grad()
def weights_summary(model: nn.Module | None) -> list[float]:
    """Return two numbers for each parameter, which change if the weights of the model change."""
    if model is None:
        return []
    ps = [p for p in model.parameters() if not (is_lazy(p) or p.is_meta) and p.numel()]
    return [v.item() for p in ps for o in [p.double()] for v in (o.sum(), o.norm())]


def write_state(path: str | Path, state: dict) -> None:
    """Write tensors and plain data with `torch.save`, completely or not at all."""
    write_atomically(path, lambda f: torch.save(state, f))


def read_state(path: str | Path, advice: str) -> dict:
    """Read what `write_state` wrote. No code in the file runs.

    Args:
        path: Path of the file.
        advice: What to do if the file is damaged, for the error message.
    """
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    # subtle: a damaged file raises an error of zip, pickle or PyTorch
    except Exception as e:
        raise DistillError(f'{path} is damaged ({type(e).__name__}). {advice}') from e
    if not isinstance(state, dict):
        raise DistillError(f'{path} is damaged (it contains a {type(state).__name__}). {advice}')
    return state
