"Read the outputs of named layers while a model runs."

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.outputs import DistillError, Outputs
from .layer_names import item_key, model_name, named, no_such_layer, resolve_among, unwrap
from .maps_and_tokens import as_map, as_tokens, as_vector
from .probe import is_compiled, main_tensor


def as_is(y: Any) -> Any:
    return y


TURNS = dict(map=as_map, tokens=as_tokens, mean=as_vector)


def item_of(out: Any, key: str, name: str) -> Any:
    """Return one item of a layer's output.

    Args:
        out: A dict, or a tuple or list.
        key: Key of the item, or its index as text.
        name: Name of the layer, for the error message.
    """
    items = dict(enumerate(out)) if isinstance(out, (tuple, list)) else out
    have = list(items) if isinstance(items, Mapping) else []
    found = next((k for k in have if str(k) == key), None)
    if found is None:
        says = f'has {", ".join(map(str, have))}' if have else f'is a {type(out).__name__}'
        raise DistillError(f'{name!r} reads the item {key!r} of the output, which {says}.')
    return out[found]


def is_output(name: str) -> bool:
    "Return True if `name` refers to the output of the model."
    return name.split('@')[0] == ''


def layer_output(o: Outputs, name: str) -> Any:
    """Return the output of a layer, or None if `o` does not contain it.

    Args:
        o: Outputs of a batch.
        name: Name of a layer, or '' for the output of the model.
    """
    if not is_output(name):
        return o.feats.get(name)
    y = o.logits
    for h in name.split('@')[1:]:
        y = TURNS.get(h, as_is)(y)
    return y


class _Tap:
    """Hook that stores the output of one layer in a dict. Copies of the hook do nothing."""

    def __init__(self, name: str, module: nn.Module, seen: dict) -> None:
        self.name, self.module, self.seen = name, module, seen
        self.how = name.split('@')[1:]

    def __call__(
        self, module: nn.Module, *what: Any
    ) -> None:  # (args, kwargs) before the layer runs, (args, output) afterwards
        if module is not self.module:
            return
        out = what if 'in' in self.how else what[-1]
        for key in filter(None, map(item_key, self.how)):
            out = item_of(out, key, self.name)
        y = main_tensor(out)
        if y is None:
            self.seen[self.name] = type(out).__name__
        else:
            self.seen[self.name] = self.read(y)

    def read(self, y: Any) -> tuple:
        # subtle: compiled code does not track tensor versions, so copy the output
        compiling = torch.compiler.is_compiling()
        if 'in' in self.how or 'pre' in self.how or compiling:
            y = y.clone()
        for h in self.how:
            y = TURNS.get(h, as_is)(y)
        return y, None if compiling or y.is_inference() else y._version

    # subtle: a model may be copied (EMA) or pickled (export) while it has hooks.
    # A hook is then replaced by a function that does nothing and can be loaded without fastdistill.
    def __reduce__(self) -> tuple:
        return getattr, (contextlib.nullcontext(), '__exit__')


@contextlib.contextmanager
def returned_by(module: nn.Module) -> Iterator[list]:
    """Context manager that yields a list. Everything that the module returns inside the context is
    appended to the list.
    """
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


class Taps:
    """Reader of named layers of a model. Call `attach()`, run the model, and call `pop()` and
    `detach()`. Or use `with Taps(model, names) as taps`.

    Outputs stay attached to the autograd graph. If a layer returns a tuple, dict or ModelOutput,
    its main tensor is read. If a layer runs several times in one forward pass, the output of the
    last run is read. Outputs of DataParallel replicas and of copies of the model are not read.

    Args:
        model: A model, which may be wrapped by DDP or torch.compile.
        names: A name or glob, or a list of names and globs, as in `resolve`.
    """

    def __init__(self, model: nn.Module, names: str | Iterable[str]) -> None:
        names = [names] if isinstance(names, str) else names
        self.model = model
        self.seen: dict[str, Any] = {}
        self.handles: list = []
        self.compiled = is_compiled(
            model
        )  # True if torch.compile was applied to parts of the model
        have = named(model)
        self.names = list(dict.fromkeys(n for p in names for n in resolve_among(model, have, p)))

    def attach(self) -> 'Taps':
        """Add the hooks. If hooks are already attached, replace them."""
        self.detach()
        if self.names:
            _heed_hooks(self.model)
        # look up layers only now, because SyncBatchNorm may have replaced some of them
        for n, m in [(n, self._layer(n)) for n in self.names]:
            tap = _Tap(n, m, self.seen)
            if 'in' in tap.how:
                self.handles.append(m.register_forward_pre_hook(tap, with_kwargs=True))
            else:
                self.handles.append(m.register_forward_hook(tap))
        return self

    def _layer(self, name: str) -> Any:
        name = name.split('@')[0]
        try:
            m = unwrap(self.model).get_submodule(name)
        except (AttributeError, RuntimeError):
            m = None  # use `named` for teachers, compiled parts and TorchScript
        if m is None:
            m = named(self.model).get(name)
        if m is None:
            raise DistillError(no_such_layer(self.model, name, list(named(self.model))))
        if isinstance(m, torch.jit.ScriptModule):
            raise DistillError(
                f"Layer {name!r} is TorchScript, whose parts can't be read. Use the nn.Module "
                'that it was made from.'
            )
        return m

    def detach(self) -> None:
        """Remove the hooks and discard the tensors that they read."""
        self._unhook()
        self.seen.clear()

    def _unhook(self) -> None:
        for h in self.handles:
            h.remove()
        self.handles = []

    def __enter__(self) -> 'Taps':
        return self.attach()

    def __exit__(
        self,
        error: Any,
        *_: Any,
        # unless there was an error, the tensors stay available for `pop` after the `with` block
    ) -> None:
        self._unhook() if error is None else self.detach()

    @property
    def feats(self) -> dict[str, Tensor]:
        """{layer name: tensor} for the layers that ran so far, in the given order."""
        return {n: self.seen[n][0] for n in self.names if isinstance(self.seen.get(n), tuple)}

    def pop(self) -> dict:
        """Return {layer name: tensor} for the last batch, in the given order, and release the
        tensors.
        """
        seen = dict(self.seen)
        self.seen.clear()
        return {n: self._checked(n, seen.get(n)) for n in self.names}

    def _checked(self, name: str, seen: Any) -> Any:
        model, (base, *how) = model_name(self.model), name.split('@')
        if seen is None:
            raise DistillError(
                f"Layer {name!r} of {model} did not run in this batch, or ran where it can't be "
                'read: in replicas of DataParallel, or in a function compiled around the model. '
                'Call pop() after the model runs and before detach(). layers(model, x) shows a '
                'shape for each layer that runs.'
            )
        if isinstance(seen, str):
            raise DistillError(
                f'Layer {name!r} of {model} returned a {seen} without a tensor. layers(model, x) '
                'shows a shape for each layer that returns a tensor.'
            )
        y, version = seen
        if version is not None and y._version != version:
            copied = '@'.join([base, 'pre', *how])
            raise DistillError(
                f'The output of {name!r} of {model} was overwritten by a later in-place '
                f"activation or addition. Use the name '{copied}' for a copy of the original "
                'output, or name the layer that overwrote it.'
            )
        return y


def _heed_hooks(model: nn.Module) -> None:
    """Make torch.compile check for hooks in compiled code.

    Existing compiled code is discarded, because it would not run new hooks.
    """
    if 'torch._dynamo' not in sys.modules or not is_compiled(model):
        return
    if not torch._dynamo.config.skip_nnmodule_hook_guards:
        return  # already done in this process
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()
