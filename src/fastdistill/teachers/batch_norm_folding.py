"""Find the batch norms that can be folded into the preceding convolution.

The model runs once, and each function that reads the output of a convolution is counted.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

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


class _Readers(TorchFunctionMode):
    """Mode that counts how many functions read each watched tensor."""

    def __init__(self) -> None:
        super().__init__()
        # {id: [weak reference, convolution, number of functions that read it]}
        self.watched: dict[int, list] = {}

    def watch(self, y: Tensor, conv: Module) -> None:
        self.watched[id(y)] = [weakref.ref(y), conv, 0]

    def entry(self, y: Any) -> list | None:
        """Return the entry of a watched tensor, or None.

        A new tensor may have the id of a deleted tensor, so the weak reference is compared.
        """
        e = self.watched.get(id(y))
        return e if e is not None and e[0]() is y else None

    def __torch_function__(
        self, fn: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = fn(*args, **(kwargs or {}))
        name = getattr(fn, '__name__', '')
        if name not in HARMLESS and (name != '__get__' or isinstance(out, Tensor)):
            self.count((args, kwargs or {}))
        return out

    def count(self, read: Any) -> None:
        for t in tensors_in(read):
            if (e := self.entry(t)) is not None:
                e[2] += 1


@contextmanager
def watched_pairs(model: Module) -> Iterator[list]:
    """Watch the model while it runs.

    Yields:
        A list, which holds the foldable pairs (convolution, batch norm) after the context ends.
    """
    pairs: list = []
    runs: dict[nn.Module, int] = {}
    readers = _Readers()

    def after_conv(m: nn.Module, args: tuple, y: Tensor) -> None:
        runs[m] = runs.get(m, 0) + 1
        readers.watch(y, m)

    def before_norm(m: nn.Module, args: tuple) -> None:
        runs[m] = runs.get(m, 0) + 1
        if (e := readers.entry(args[0])) is not None:
            pairs.append((e, m))

    with ExitStack() as stack:
        for m in model.modules():
            if type(m) in FOLDABLE:
                handle = m.register_forward_hook(after_conv)
            elif type(m) in NORMS:
                handle = m.register_forward_pre_hook(before_norm)
            else:
                continue
            stack.callback(handle.remove)
        # the caller reads what the model returns
        stack.callback(model.register_forward_hook(lambda m, args, out: readers.count(out)).remove)
        stack.enter_context(readers)
        yield pairs
    pairs[:] = [(e[1], m) for e, m in pairs if e[2] == 1 and runs[m] == runs[e[1]] == 1]


def foldable(model: nn.Module, run: Callable[[], Any]) -> list:
    """Return the pairs (convolution, batch norm) that can be merged into one convolution.

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
    return [(c, n) for c, n in pairs if {c, n} <= plain and n.running_var is not None]
