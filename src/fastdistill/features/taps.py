"Read named layers of a model while it runs."
import contextlib, sys
import torch
from torch import nn
from ..outputs import DistillError
from .names import model_name, named, no_such_layer, resolve_among, unwrap
from .probe import is_compiled, main_tensor
from .shapes import as_map, as_tokens, as_vector

__all__ = ['Taps']


def as_is(y): return y

TURNS = dict(map=as_map, tokens=as_tokens, mean=as_vector)


class _Tap:
    "A hook on one layer: it holds that layer and the dict it writes to, and a copy of it does nothing"
    def __init__(self, name, module, seen):
        self.name,self.module,self.seen = name,module,seen
        self.how = name.split('@')[1:]

    def __call__(self, module, *what): # (args, kwargs) before the layer, (args, output) after it
        if module is not self.module: return
        y = main_tensor(what if 'in' in self.how else what[-1])
        if y is None: self.seen[self.name] = type(what[-1]).__name__
        else: self.seen[self.name] = self.read(y)

    def read(self, y):
        # subtle: compiled code does not count versions, so there a copy is the only safe reading (and is fused away)
        compiling = torch.compiler.is_compiling()
        if 'in' in self.how or 'pre' in self.how or compiling: y = y.clone()
        for h in self.how: y = TURNS.get(h, as_is)(y)
        return y,None if compiling or y.is_inference() else y._version

    # subtle: models are copied (EMA) and pickled (export) while hooks are on them. What is left then takes any
    # arguments,
    # does nothing, and loads where fastdistill is not installed
    def __reduce__(self): return getattr, (contextlib.nullcontext(), '__exit__')


class Taps:
    """Read named layers of a model while attached: `attach`, run the model, `pop`, `detach`; or `with Taps(model,
    names) as taps`.

    Outputs keep their gradient. Of a tuple, dict or ModelOutput the main tensor is read. A layer that runs several
    times in one forward pass is read where it ran last. Replicas of DataParallel and copies of the model are not
    read."""
    def __init__(
        self,
        model:nn.Module, # wrapped (DDP, torch.compile) or not
        names # one or more of what `resolve` understands
    ):
        names = [names] if isinstance(names, str) else names
        self.model,self.seen,self.handles = model,{},[]
        self.compiled = is_compiled(model)    # is some of it torch.compile's work?
        have = named(model)
        self.names = list(dict.fromkeys(n for p in names for n in resolve_among(model, have, p)))

    def attach(self):
        """Listen; twice is once. Layers are looked up now: they may have been replaced (SyncBatchNorm) since the names
        were given"""
        self.detach()
        if self.names: _heed_hooks(self.model)
        for n,m in [(n, self._layer(n)) for n in self.names]:
            tap = _Tap(n, m, self.seen)
            self.handles.append(m.register_forward_pre_hook(tap, with_kwargs=True) if 'in' in tap.how
                                else m.register_forward_hook(tap))
        return self

    def _layer(self, name):
        name = name.split('@')[0]
        try: m = unwrap(self.model).get_submodule(name)
        except (AttributeError, RuntimeError): m = None      # a teacher, a compiled part, TorchScript
        if m is None: m = named(self.model).get(name)
        if m is None: raise DistillError(no_such_layer(self.model, name, list(named(self.model))))
        if isinstance(m, torch.jit.ScriptModule):
            raise DistillError(f"Layer {name!r} is TorchScript, whose parts can't be read. Use the nn.Module that it "
                               "was made from.")
        return m

    def detach(self):
        "Take the hooks away, and forget what they saw"
        self._unhook()
        self.seen.clear()

    def _unhook(self):
        for h in self.handles: h.remove()
        self.handles = []

    def __enter__(self): return self.attach()

    def __exit__(self, error, *_): # what was seen stays readable after a `with` that went well
        self._unhook() if error is None else self.detach()

    @property
    def feats(self):
        "Layer name -> tensor, in the order asked, of those that ran so far"
        return {n: self.seen[n][0] for n in self.names if isinstance(self.seen.get(n), tuple)}

    def pop(self) -> dict:
        "Layer name -> tensor, in the order asked, of the batch that just ran; and forget them"
        seen = dict(self.seen)
        self.seen.clear()
        return {n: self._checked(n, seen.get(n)) for n in self.names}

    def _checked(self, name, seen):
        model,(base,*how) = model_name(self.model),name.split('@')
        if seen is None:
            raise DistillError(f"Layer {name!r} of {model} did not run in this batch, or out of reach: replicas of "
                               "DataParallel and functions compiled around the model are not heard, and taps are read "
                               "after the model ran and "
                               "before they are detached. layers(model, x) shows a shape for the layers that run.")
        if isinstance(seen, str):
            raise DistillError(f"Layer {name!r} of {model} gave a {seen} with no tensor in it. "
                               "layers(model, x) shows a shape for those that give one.")
        y,version = seen
        if version is not None and y._version != version:
            raise DistillError(f"What came out of {name!r} of {model} was overwritten afterwards, by an in-place "
                               f"activation or addition. Ask for '{'@'.join([base, 'pre', *how])}' to get a copy from "
                               "before, or for the layer that overwrote it.")
        return y


def _heed_hooks(model):
    """torch.compile looks at hooks only if told to; what it compiled before that never sees them, and is dropped. Once
    a process"""
    if 'torch._dynamo' not in sys.modules or not torch._dynamo.config.skip_nnmodule_hook_guards: return
    if not is_compiled(model): return
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()
