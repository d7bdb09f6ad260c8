"""Find the batch norms that can be folded into the preceding convolution.

The model runs once. Each function that reads the output of a convolution is counted, and each
module that receives or returns it is recorded.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from ..base.outputs import tensors_in

FOLDABLE, NORMS = (
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
# tensor functions that do not read the values
HARMLESS = {
    'size',
    'dim',
    'stride',
    'numel',
    'is_floating_point',
    '__len__',
    '__hash__',
    'get_device',
    'is_contiguous',
}


class FoldablePair(NamedTuple):
    """A batch norm that can be folded into a convolution.

    Attributes:
        seen_by: Modules that receive or return the output of the convolution: the convolution, the
            batch norm and their containers. Their inputs or outputs change if the batch norm is
            folded.
    """

    conv: Module
    norm: Module
    seen_by: frozenset[Module]


@dataclass
class _Watched:
    """The output of a convolution.

    Attributes:
        tensor: Weak reference to the output.
        reads: Number of functions that read it.
        seen_by: Modules that receive or return it.
    """

    tensor: weakref.ref
    conv: Module
    reads: int = 0
    seen_by: set[Module] = field(default_factory=set)


class _Readers(TorchFunctionMode):
    """Mode that counts how many functions read each watched tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, _Watched] = {}  # by the id of the tensor

    def watch(self, y: Tensor, conv: Module) -> None:
        self.watched[id(y)] = _Watched(weakref.ref(y), conv)

    def found_in(self, o: Any) -> Iterator[_Watched]:
        """Yield the entries of watched tensors in nested tuples, lists and dicts.

        A new tensor may have the id of a deleted tensor, so the weak reference is compared.
        """
        for t in tensors_in(o):
            w = self.watched.get(id(t))
            if w is not None and w.tensor() is t:
                yield w

    def __torch_function__(
        self, fn: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = fn(*args, **(kwargs or {}))
        name = getattr(fn, '__name__', '')
        if name not in HARMLESS and (name != '__get__' or isinstance(out, Tensor)):
            for w in self.found_in((args, kwargs or {})):
                w.reads += 1
        return out


@contextmanager
def watched_pairs(model: Module) -> Iterator[list[FoldablePair]]:
    """Watch the model while it runs.

    Yields:
        A list, which contains the foldable pairs after the context ends.
    """
    found: list[tuple[_Watched, Module]] = []
    pairs: list[FoldablePair] = []
    runs: dict[nn.Module, int] = {}
    readers = _Readers()

    def before(m: nn.Module, args: tuple, kwargs: dict) -> None:
        for w in readers.found_in((args, kwargs)):
            w.seen_by.add(m)
            if type(m) in NORMS:
                found.append((w, m))

    def after(m: nn.Module, args: tuple, y: Any) -> None:
        runs[m] = runs.get(m, 0) + 1
        if type(m) in FOLDABLE:
            readers.watch(y, m)
        for w in readers.found_in(y):
            w.seen_by.add(m)

    def at_end(m: nn.Module, args: tuple, y: Any) -> None:
        # anything that the model still stores or returns, in any container, may be read
        for w in readers.watched.values():
            w.reads += w.tensor() is not None

    with ExitStack() as stack:
        # layers of TorchScript can't be read
        for m in (o for o in model.modules() if not isinstance(o, torch.jit.ScriptModule)):
            for handle in (
                m.register_forward_pre_hook(before, with_kwargs=True),
                m.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(at_end).remove)
        stack.enter_context(readers)
        yield pairs
    pairs += [
        FoldablePair(w.conv, m, frozenset(w.seen_by))
        for w, m in found
        if w.reads == 1 and runs[m] == runs[w.conv] == 1
    ]


def foldable(model: nn.Module, run: Callable[[], Any]) -> list[FoldablePair]:
    """Return the pairs of layers that can be merged into one convolution.

    Both layers must run exactly once, and only the batch norm may read the output of the
    convolution.

    Args:
        model: A model in evaluation mode.
        run: fn() that runs the model on a batch.
    """
    names = [m for _, m in model.named_modules(remove_duplicate=False)]
    hooked = lambda m: m._forward_hooks or m._forward_pre_hooks or hasattr(m, 'parametrizations')
    plain = {m for m in model.modules() if not hooked(m) and names.count(m) == 1}
    with watched_pairs(model) as pairs:
        run()
    return [p for p in pairs if {p.conv, p.norm} <= plain and p.norm.running_var is not None]
