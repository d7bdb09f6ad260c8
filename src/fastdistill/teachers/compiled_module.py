"""Run a module with `torch.compile` for inputs with the shapes of the first batch."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

from ..base.outputs import tensors_in


class CompiledModule:
    """A module compiled for the input shapes of the first batch.

    Batches with different shapes run uncompiled, since compiling again for each shape would take
    longer than it saves.

    Args:
        module: A frozen module in evaluation mode.
        close: fn(compiled outputs, outputs) -> True if they are close enough.
        say: fn(text) that reports the result.
    """

    def __init__(
        self, module: Module, close: Callable[[Any, Any], bool], say: Callable[[str], None]
    ) -> None:
        self.module, self.close, self.say = module, close, say
        self.fast: Callable | None = None
        self.shapes: tuple | None = None
        self.state = ''

    def __call__(self, x: Sequence, kw: Mapping[str, Any]) -> Any:
        if not self.state:
            self.state = self._compile(x, kw)
            self.say(f'is {self.state}')
        run = self.module if self.fast is None or shapes_of(x, kw) != self.shapes else self.fast
        return run(*x, **kw)

    def _compile(self, x: Sequence, kw: Mapping[str, Any]) -> str:
        """Compile the module for this batch, and return a text about the result."""
        device = next(tensors_in((x, kw))).device
        if why := missing_compiler(device):
            return f'not compiled ({why})'
        # with constant weights, the compiler can merge convolutions and activations
        options: dict[str, Any] = dict(options=dict(freezing=True)) if device.type == 'cpu' else {}
        start = time.perf_counter()
        try:
            fast = torch.compile(self.module, dynamic=False, **options)
            close = self.close(fast(*x, **kw), self.module(*x, **kw))
        except Exception as e:  # a compiler may raise any error
            text = (str(e).splitlines() or [''])[0][:100]
            return f'not compiled ({type(e).__name__}: {text})'
        if not close:
            return 'not compiled (the outputs of the compiled module differ too much)'
        self.fast, self.shapes = fast, shapes_of(x, kw)
        return f'compiled in {time.perf_counter() - start:.0f} s'


def missing_compiler(device: torch.device) -> str | None:
    """Return why torch.compile can't work on this machine, or None if it can."""
    if device.type == 'cuda':
        return None
    names = os.environ.get('CXX'), 'g++', 'clang++', 'c++', 'cl'
    if any(n and shutil.which(n) for n in names):
        return None
    return 'there is no C++ compiler on this machine'


def shapes_of(x: Sequence, kw: Mapping[str, Any]) -> tuple:
    return tuple((t.shape, t.dtype) for t in tensors_in((x, kw))), tuple(kw)
