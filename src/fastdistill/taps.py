"Layers of a model by name: list them, find them, read what comes out of them."
import contextlib, copy, difflib, math, random, re, sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from .outputs import DistillError, as_plain

__all__ = ['LayerInfo', 'LayerTree', 'Taps', 'layers', 'resolve', 'unwrap']

WRAPPERS = nn.parallel.DistributedDataParallel, nn.DataParallel
HOW = {'in': "what goes into the layer", 'pre': "the output, copied before a following in-place layer can overwrite it",
       'map': "tokens, or a channels-last output, as (B, C, H, W)", 'tokens': "a channels-first output as (B, L, D)",
       'mean': "the mean over positions, a vector"}
LEAD = 0, 1, 2, 4, 5 # tokens before a picture's: none, class, class and distillation, 4 registers, class and 4 registers


def unwrap(model:nn.Module):
    "The model inside DDP, DataParallel and torch.compile"
    while True:
        if isinstance(model, WRAPPERS): model = model.module
        elif isinstance(model, nn.Module) and '_orig_mod' in model._modules: model = model._orig_mod
        else: return model


def named(model):
    "Dotted name -> layer of the model inside its wrappers, shared layers under each of their names"
    inner = unwrap(model)
    if not isinstance(inner, nn.Module): return dict(getattr(inner, 'named_modules', dict)())      # a teacher: several models, or none
    have = dict(inner.named_modules(remove_duplicate=False))
    if any('_orig_mod' in n for n in have):      # a compiled part has the name of what it compiles
        have = {re.sub(r'(^|\.)_orig_mod(?=\.|$)', '', n): m for n,m in have.items()}
    return have


# ---------------------------------------------------------------------------------------------------- find

def _regex(glob):
    "A glob over dotted names: `*` and `?` stay within one level, `**` crosses levels, [..] is a set"
    wild = {'**': '.*', '*': '[^.]*', '?': '[^.]'}
    parts = re.split(r'(\*\*|\*|\?|\[[^\]]*\])', glob)
    return ''.join(wild.get(p) or (p.replace('[!', '[^') if p[:1] == '[' else re.escape(p)) for p in parts)


def resolve(
    model:nn.Module, # wrapped or not: names are those of the inner model
    pattern:str # a dotted name or a glob ('layer?', '0.*', 'blocks.**.attn'), then perhaps @in, @pre, @map or @tokens
) -> list:
    "The names that `pattern` stands for, in the model's order, each with its suffix"
    return _resolve(model, named(model), pattern)


def _resolve(model, have, pattern):
    glob,*how = pattern.split('@')
    if wrong := [h for h in how if h not in HOW]:
        raise DistillError(f"{pattern!r} ends in @{wrong[0]}. Possible are "
                           f"{'; '.join(f'@{k} ({v})' for k,v in HOW.items())}.")
    found = [glob] if glob in have else [n for n in have if n and re.fullmatch(_regex(glob), n)]
    if not found: raise DistillError(_unknown(model, glob, list(have)))
    return ['@'.join([n, *how]) for n in found]


def _unknown(model, name, have):
    near = [n for n in have if n.endswith('.'+name)]
    near = list(dict.fromkeys(near + difflib.get_close_matches(name, have, 5)))[:5]
    hint = f" Nearest: {', '.join(map(repr, near))}." if near else ''
    return f"No layer {name!r} in {type(unwrap(model)).__name__}.{hint} It has:\n{layers(model).brief()}"


# ---------------------------------------------------------------------------------------------------- list

@dataclass
class LayerInfo:
    "One layer of a model"
    name:str # dotted
    kind:str # its class
    shape:tuple|None # of what comes out; None if it did not run, or without an input to run it on
    params:int # parameters in it and in the layers below it

    @property
    def depth(self): return self.name.count('.') + 1


def table(head, rows):
    "Rows as lines of text, columns aligned"
    rows = [[str(o) for o in r] for r in [head, *rows]]
    wide = [max(map(len, c)) for c in zip(*rows)]
    lines = ['  '.join(o.ljust(w) for o,w in zip(r, wide)).rstrip() for r in rows]
    return '\n'.join([lines[0], '-'*max(map(len, lines)), *lines[1:]])


class LayerTree(list):
    "The layers of a model as a list of `LayerInfo`; printed, a table"
    def __str__(self):
        rows = [('  '*(l.depth-1) + l.name, l.kind, '' if l.shape is None else l.shape, f'{l.params:,}') for l in self]
        return table(('layer', 'kind', 'output', 'parameters'), rows)
    __repr__ = __str__

    def brief(self, n=40):
        "As many levels as fit in `n` lines"
        fits = [d for d in range(1, 10) if sum(l.depth <= d for l in self) <= n]
        shown = [l for l in self if l.depth <= max(fits, default=1)]
        more = len(self) - len(shown[:n])
        return str(LayerTree(shown[:n])) + (f'\n... and {more} more: layers(model) lists them' if more else '')


def layers(
    model:nn.Module,
    *x # one batch of inputs, for the shapes; a single dict is passed by keyword
) -> LayerTree:
    "Every layer of the model with its class, output shape and number of parameters; the model stays as it is"
    shapes = {f.module: f.shape for f in probe(model, *x)} if x else {}
    count = lambda m: sum(p.numel() for p in m.parameters() if not is_lazy(p))
    return LayerTree(LayerInfo(n, type(m).__name__, shapes.get(m), count(m)) for n,m in named(model).items() if n)


# ---------------------------------------------------------------------------------------------------- probe

@dataclass
class Fired:
    "A layer that ran: what went in, what came out"
    name:str
    module:nn.Module
    shape_in:tuple|None
    shape:tuple|None
    floats:bool # the output is floating point


def probe(
    model:nn.Module,
    *x # one batch of inputs; a single dict is passed by keyword
) -> list:
    "Run the model once, in evaluation mode and leaving it untouched: the layers in the order they finished"
    inner,names,ran = unwrap(model),{},{}
    for n,m in named(model).items(): names.setdefault(m, n)
    def note(m, args, kwargs, out):
        i,y = first((args, kwargs)),first(out)
        ran.pop(m, None)                     # subtle: a layer that runs twice counts where it ran last
        ran[m] = Fired(names[m], m, _shape(i), _shape(y), y is not None and y.is_floating_point())
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in names if not isinstance(m, torch.jit.ScriptModule)]
    try: run(inner, *x)
    finally:
        for h in handles: h.remove()
    return list(ran.values())


def _shape(y): return None if y is None else tuple(y.shape)


def run(model, *x):
    "One forward pass of the inner model that changes nothing"
    inner = unwrap(model)
    by_name = len(x) == 1 and isinstance(x[0], Mapping)
    if any(map(is_lazy, _held(_modules(inner)))):
        raise DistillError(f"{type(inner).__name__} has lazy layers, without weights until a batch has run: run one through it first.")
    with untouched(model):
        try: return inner(**{k: as_plain(v) for k,v in x[0].items()}) if by_name else inner(*map(as_plain, x))
        except DistillError: raise
        except Exception as e:
            sizes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in x]
            raise DistillError(f"{type(inner).__name__} does not run on the inputs given, {', '.join(map(str, sizes))}: {e}") from e


@contextlib.contextmanager
def untouched(model:nn.Module):
    "Evaluation mode, no gradient; afterwards modes, buffers, hidden states, attributes and random states are as before"
    mods = _modules(unwrap(model))
    modes = [(m, m.training) for m in mods if getattr(m, 'training', False)]
    state = [_Attrs(m) for m in mods if not isinstance(m, torch.jit.ScriptModule)]
    buffers = [(b, b.clone()) for m in mods for b in m.buffers(recurse=False)]
    cuda = sorted({t.device.index for t in _held(mods) if t.is_cuda})
    python,numpy = random.getstate(),np.random.get_state()
    # subtle: the flag and not .eval(), which some layers override to do more (merge adapters, for one)
    for m,_ in modes: m.training = False
    try:
        with torch.random.fork_rng(cuda), torch.no_grad(), _eager(model): yield
    finally:
        random.setstate(python); np.random.set_state(numpy)
        for a in state: a.restore()
        for m,mode in modes: m.training = mode
        with torch.no_grad():
            for b,was in buffers:
                if not torch.equal(b, was): b.copy_(was)


def _held(mods): return [t for m in mods for t in [*m._parameters.values(), *m._buffers.values()] if t is not None]


class _Attrs:
    "What a module holds, one container deep: an LSTM's hidden state and flat weights, buffers, hooks, modes"
    def __init__(self, m):
        self.vars,self.was = vars(m),dict(vars(m))
        self.boxes = [(v, copy.copy(v)) for v in self.was.values() if type(v) in (list, dict, OrderedDict, set)]

    def restore(self):
        for k in set(self.vars) - set(self.was): del self.vars[k]
        self.vars.update(self.was)
        for box,was in self.boxes:
            box.clear()
            box.extend(was) if isinstance(box, list) else box.update(was)


def _modules(model): return list(dict.fromkeys(model.modules() if isinstance(model, nn.Module) else named(model).values()))

def _compiled(model): return any('_orig_mod' in m._modules or m._compiled_call_impl is not None for m in _modules(model))

def _eager(model):
    "Compiled parts run as they were written"
    if not hasattr(torch.compiler, 'set_stance') or not _compiled(model): return contextlib.nullcontext()
    return torch.compiler.set_stance('force_eager')


# ---------------------------------------------------------------------------------------------------- read

def first(out):
    "The tensor in what a layer gave: itself, `last_hidden_state` or `logits` of a dict, else the first one in it"
    if isinstance(out, Tensor): return as_plain(out)
    if isinstance(out, Mapping): out = [out.get('last_hidden_state'), out.get('logits'), *out.values()]
    if not isinstance(out, (tuple, list)): return None
    for o in out:
        if (y := first(o)) is not None: return y


def grid(
    n:int, # number of tokens
    aspect:float=1. # height over width of the picture
):
    "(tokens to skip, height, width): the map that `n` tokens are, after class and register tokens; None if they are no map"
    for skip in (k for k in LEAD if k < n):
        h = max(1, round(math.sqrt((n-skip)*aspect)))
        w = (n-skip)//h
        if h*w == n-skip and abs(h - w*aspect) < 1: return skip, h, w


def as_map(
    y:Tensor, # (B, L, D) tokens, or channels-last (B, H, W, C)
    aspect:float=1. # height over width of the picture that the tokens are
) -> Tensor:
    "Channels first: (B, C, H, W), without class and register tokens"
    if y.dim() == 4: return y.movedim(-1, 1)
    g = grid(y.shape[1], aspect) if y.dim() == 3 else None
    if g is None:
        raise DistillError(f"Features of shape {tuple(y.shape)} are no map: possible are (B, H, W, C), and (B, L, D) with L tokens "
                           f"that fill a grid of height/width {aspect:g} after {', '.join(map(str, LEAD))} class and register tokens. "
                           "Leave them as tokens (a name without @map), and pair them with tokens.")
    skip,h,w = g
    return y[:, skip:].transpose(1, 2).unflatten(2, (h, w))


def as_tokens(
    y:Tensor # (B, C, H, W) or (B, C, L), channels first
) -> Tensor:
    "(B, L, C): one token per position"
    if y.dim() < 3: raise DistillError(f"Features of shape {tuple(y.shape)} have no positions to make tokens of: leave out @tokens.")
    return y.flatten(2).transpose(1, 2)


def as_vector(
    y:Tensor # (B, C, H, W), or (B, L, D) tokens
) -> Tensor:
    "(B, C): the mean over positions"
    return y if y.dim() < 3 else y.mean(1) if y.dim() == 3 else y.flatten(2).mean(2)


def as_is(y): return y

TURN = dict(map=as_map, tokens=as_tokens, mean=as_vector)


class _Tap:
    "A hook on one layer: it holds that layer and the dict it writes to, and a copy of it does nothing"
    def __init__(self, name, module, seen):
        self.name,self.module,self.seen = name,module,seen
        self.how = name.split('@')[1:]

    def __call__(self, module, *what): # (args, kwargs) before the layer, (args, output) after it
        if module is not self.module: return
        y = first(what if 'in' in self.how else what[-1])
        if y is None: self.seen[self.name] = type(what[-1]).__name__
        else: self.seen[self.name] = self.read(y)

    def read(self, y):
        # subtle: compiled code does not count versions, so there a copy is the only safe reading (and is fused away)
        compiling = torch.compiler.is_compiling()
        if 'in' in self.how or 'pre' in self.how or compiling: y = y.clone()
        for h in self.how: y = TURN.get(h, as_is)(y)
        return y,None if compiling or y.is_inference() else y._version

    # subtle: models are copied (EMA) and pickled (export) while hooks are on them. What is left then takes any arguments,
    # does nothing, and loads where fastdistill is not installed
    def __reduce__(self): return getattr, (contextlib.nullcontext(), '__exit__')


class Taps:
    """Read named layers of a model while attached: `attach`, run the model, `pop`, `detach`; or `with Taps(model, names) as taps`.

    Outputs keep their gradient. Of a tuple, dict or ModelOutput the main tensor is read. A layer that runs several times in one
    forward pass is read where it ran last. Replicas of DataParallel and copies of the model are not read."""
    def __init__(
        self,
        model:nn.Module, # wrapped (DDP, torch.compile) or not
        names # one or more of what `resolve` understands
    ):
        names = [names] if isinstance(names, str) else names
        self.model,self.seen,self.handles = model,{},[]
        self.compiled = _compiled(model)    # is some of it torch.compile's work?
        have = named(model)
        self.names = list(dict.fromkeys(n for p in names for n in _resolve(model, have, p)))

    def attach(self):
        "Listen; twice is once. Layers are looked up now: they may have been replaced (SyncBatchNorm) since the names were given"
        self.detach()
        if self.names: _heed_hooks(self.model)
        for n,m in [(n, self._layer(n)) for n in self.names]:
            tap = _Tap(n, m, self.seen)
            self.handles.append(m.register_forward_pre_hook(tap, with_kwargs=True) if 'in' in tap.how else m.register_forward_hook(tap))
        return self

    def _layer(self, name):
        name = name.split('@')[0]
        try: m = unwrap(self.model).get_submodule(name)
        except (AttributeError, RuntimeError): m = None      # a teacher, a compiled part, TorchScript
        if m is None: m = named(self.model).get(name)
        if m is None: raise DistillError(_unknown(self.model, name, list(named(self.model))))
        if isinstance(m, torch.jit.ScriptModule):
            raise DistillError(f"Layer {name!r} is TorchScript, whose parts can't be read. Use the nn.Module that it was made from.")
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
        model,(base,*how) = type(unwrap(self.model)).__name__,name.split('@')
        if seen is None:
            raise DistillError(f"Layer {name!r} of {model} did not run in this batch, or out of reach: replicas of DataParallel and "
                               "functions compiled around the model are not heard, and taps are read after the model ran and "
                               "before they are detached. layers(model, x) shows a shape for the layers that run.")
        if isinstance(seen, str):
            raise DistillError(f"Layer {name!r} of {model} gave a {seen} with no tensor in it. "
                               "layers(model, x) shows a shape for those that give one.")
        y,version = seen
        if version is not None and y._version != version:
            raise DistillError(f"What came out of {name!r} of {model} was overwritten afterwards, by an in-place activation or addition. "
                               f"Ask for '{'@'.join([base, 'pre', *how])}' to get a copy from before, or for the layer that overwrote it.")
        return y


def _heed_hooks(model):
    "torch.compile looks at hooks only if told to; what it compiled before that never sees them, and is dropped. Once a process"
    if 'torch._dynamo' not in sys.modules or not torch._dynamo.config.skip_nnmodule_hook_guards or not _compiled(model): return
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()
