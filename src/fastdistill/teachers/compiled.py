"When a teacher is compiled: if that saves more time in the batches to come than it takes."

import os
import shutil
import time
from statistics import median

import torch

from ..base.outputs import tensors_in

__all__ = ['Compilation', 'synchronize']

# what is assumed before it is measured: the share of a batch's time that compiled code saves, and seconds to compile
GAIN, AT_LEAST, PER_LAYER = 0.15, 10.0, 0.15
TIMED = 4  # timed before the decision; the first one does not count
# (layers, seconds) of the compilations of this process, which show how fast this machine compiles
COMPILED = []


def compile_seconds(layers: int, known=()) -> float:
    """Seconds that compiling will probably take.

    Args:
        layers: Of the module.
        known: (layers, seconds) of earlier compilations on this machine.
    """
    assumed = lambda n: AT_LEAST + n * PER_LAYER
    # subtle: PyTorch's own cache makes a compilation fast that another model's will not be
    return assumed(layers) * (max(0.5, median(s / assumed(n) for n, s in known)) if known else 1)


def worth_compiling(left: int, eager: float, layers: int, known=()) -> str:
    """Why not: a text with the numbers; empty if compiling will probably save at least twice the
    time that it takes.

    Args:
        left: Batches to come.
        eager: Seconds of a batch, not compiled.
        layers: Of the module.
        known: As in `compile_seconds`
    """
    saved, cost = left * eager * GAIN, compile_seconds(layers, known)
    return (
        ''
        if saved >= 2 * cost
        else (
            f'in {left} batches of {eager * 1e3:.3g} ms that would save about {saved:.0f} s '
            f'and take about {cost:.0f} s'
        )
    )


def synchronize(tensors):
    """Wait for the GPU, if one computes these."""
    for d in {t.device for t in tensors_in(tensors) if t.is_cuda}:
        torch.cuda.synchronize(d)


def missing_compiler(device) -> str | None:
    """Why torch.compile can't work on this machine; None if it can."""
    if device.type == 'cuda':
        return None
    names = os.environ.get('CXX'), 'g++', 'clang++', 'c++', 'cl'
    if any(n and shutil.which(n) for n in names):
        return None
    return 'there is no C++ compiler on this machine'


def signature_of(x, kw):
    return tuple((t.shape, t.dtype) for t in tensors_in((x, kw))), tuple(kw)


class Compilation:
    """Runs a module, and compiles it where that is worth it, for inputs of the shapes that it was
    compiled for. Other shapes run as before: to compile for each would take longer than the run.

    Args:
        asked: True: at once; 'auto': if it is worth it; False: never.
        say: fn(text).
        close: fn(compiled outputs, outputs) -> are they close enough?
    """

    def __init__(self, module, asked, say, close):
        self.module, self.asked, self.say, self.close = module, asked, say, close
        self.fast = self.shapes = None  # the compiled module, and the shapes that it is for
        self.times, self.fast_times, self.seconds = [], [], 0.0
        self.state = '' if asked else 'not compiled'
        self.layers = sum(not any(m.children()) for m in module.modules())

    def __call__(
        self,
        x,
        kw,
        left,  # batches to come in this run; None: unknown
    ):
        shapes = signature_of(x, kw)
        if not self.state:
            self._consider(x, kw, shapes, left)
        if self.fast is None or shapes != self.shapes:
            return self.module(*x, **kw)
        if len(self.fast_times) >= TIMED:
            return self.fast(*x, **kw)
        out, seconds = self._timed(self.fast, x, kw)
        self.fast_times.append(seconds)
        if len(self.fast_times) == TIMED:
            self._judge(left)
        return out

    def _timed(self, module, x, kw):
        synchronize((x, kw))
        start = time.perf_counter()
        out = module(*x, **kw)
        synchronize((x, kw))
        return out, time.perf_counter() - start

    def _consider(self, x, kw, shapes, left):
        """Compile now, or never, or time one more batch."""
        if self.asked != True:  # noqa: E712  'auto' is true too
            if left is None:
                return
            if shapes != self.shapes:
                self.shapes, self.times = shapes, []
            self.times.append(self._timed(self.module, x, kw)[1])
            if len(self.times) < TIMED:
                return
            if why := worth_compiling(left, self.eager, self.layers, COMPILED):
                self.state = f'not compiled ({why})'
                return self.say(f'is {self.state}')
        if why := missing_compiler(next(tensors_in((x, kw))).device):
            self.state = f'not compiled ({why})'
            return self.say(f'is {self.state}')
        self._compile(x, kw, shapes)

    @property
    def eager(self):
        """Seconds of a batch, not compiled."""
        return median(self.times[1:])

    def _compile(self, x, kw, shapes):
        # frozen weights are constants of the compiled code, for which convolutions and activations become one
        options = (
            dict(options=dict(freezing=True))
            if next(tensors_in((x, kw))).device.type == 'cpu'
            else {}
        )
        start = time.perf_counter()
        try:
            fast = torch.compile(self.module, dynamic=False, **options)
            same = self.close(fast(*x, **kw), self.module(*x, **kw))
        except Exception as e:  # a compiler may raise anything
            self.state = (
                f'not compiled ({type(e).__name__}: {(str(e).splitlines() or [""])[0][:100]})'
            )
            return self.say(f'is {self.state}')
        self.seconds = time.perf_counter() - start
        COMPILED.append((self.layers, self.seconds))
        if not same:
            self.state = 'not compiled (compiled, its outputs differ too much)'
        else:
            self.fast, self.shapes, self.state = fast, shapes, f'compiled in {self.seconds:.0f} s'
        if not same or self.asked is True:
            self.say(f'is {self.state}')

    def _judge(self, left):
        """Keep the compiled module if it is faster."""
        if self.asked is True:
            return
        fast = median(self.fast_times)
        times = f'{fast * 1e3:.3g} ms a batch instead of {self.eager * 1e3:.3g}'
        if fast < self.eager:
            self.state = f'compiled in {self.seconds:.0f} s: {times}'
        else:
            self.fast, self.state = None, f'not compiled (tried for {self.seconds:.0f} s: {times})'
        self.say(f'is {self.state}' + ('' if left is None else f', for {left} more batches'))
