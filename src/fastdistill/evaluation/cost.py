"""Measure the cost of a model: parameters, multiply-accumulates, bytes, peak memory and time."""

import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.backends import cudnn, mkldnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..base.outputs import Outputs, map_tensors, tensors_in
from ..teachers.members import modules_of, single_teachers
from ..teachers.raw_items import items_at, items_in, with_items
from ..teachers.teacher import Teacher
from .report_data import Cost, Latency

SECONDS = 0.5  # per time measurement
LEAST_RUNS, MOST_RUNS = 20, 1000


def cost_of(teacher: Teacher, x: Any) -> Cost:
    """Measure the cost of a model, except for its latency. Values that can't be measured are None.

    Args:
        teacher: A `Teacher` that was started.
        x: Inputs of a large batch, as a tuple.
    """
    modules = modules_of(teacher)
    n_params = sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())
    weights = bytes_of(modules)
    out = Cost(n_params or None, bytes=file_size(teacher) or weights or None)
    if not modules:
        return out
    out.macs = macs_of(lambda: fresh_run(teacher, batch_of(x, 1)))
    out.memory = weights + peak_memory(teacher, x)
    return out


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Return the size of parameters and buffers in bytes. Shared tensors are counted once."""
    own = {id(t): t for m in modules for t in [*m.parameters(), *m.buffers()]}.values()
    return sum(t.numel() * t.element_size() for t in own)


def macs_of(run: Callable[[], Any]) -> int | None:
    """Count the multiply-accumulates of matrix products and convolutions in a call.

    Recurrent layers run as matrix products, because PyTorch's FLOP counter ignores fused recurrent
    layers.
    """
    with (
        warnings.catch_warnings(),
        cudnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        # PyTorch warns about its own default settings here
        warnings.filterwarnings('ignore', 'TF32 acceleration')
        with mkldnn.flags(enabled=False):
            run()
    return counter.get_total_flops() // 2 or None


def fresh_run(teacher: Teacher, x: Any) -> Outputs:
    teacher.reset()
    return teacher(*x)


def file_size(teacher: Teacher) -> int:
    """Return the total size of the files from which the models were loaded, in bytes.

    Return 0 if any model was not loaded from a file.
    """
    paths = [o.path for o in single_teachers(teacher)]
    return sum(Path(p).stat().st_size for p in paths) if all(paths) else 0


def batch_of(x: Any, n: int) -> tuple:
    """Return the first `n` samples of a batch.

    Args:
        x: Tuple of inputs.
        n: Number of samples. If the batch has fewer, its samples are repeated.
    """
    items = items_in(x)
    if items is not None:
        items = items_at(items, [i % len(items) for i in range(n)])
    fit = lambda t: t.repeat(-(-n // len(t)), *[1] * (t.dim() - 1))[:n]
    return with_items(map_tensors(tuple(x), fit), items)


class Peak(TorchDispatchMode):
    """Context manager that records the peak memory of the tensors created inside, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # arguments that are not known yet, such as weights, were created before the context and are
        # not counted
        for t in tensors_in((args, kwargs)):
            self._count(t, False)
        out = func(*args, **(kwargs or {}))
        for t in tensors_in(out):
            self._count(t, True)
        return out

    def _count(self, t: torch.Tensor, made_here: bool) -> None:
        if t.layout != torch.strided or t.is_meta:
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * made_here
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def peak_memory(teacher: Teacher, x: Any) -> int:
    """Measure the peak memory of a forward pass in bytes, without the weights."""
    device = next((t.device for t in tensors_in(x)), torch.device('cpu'))
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fresh_run(teacher, x)
        return torch.cuda.max_memory_allocated(device) - before
    with Peak() as peak:
        fresh_run(teacher, x)
    return peak.most


def latencies(
    teachers: dict,
    x: Any,
    sizes: Iterable[int],
    seconds: float = SECONDS,
    tick: Callable[[], None] = lambda: None,
) -> dict:
    """Measure the latency of each model and return {name: [`Latency` for each size]}.

    Models take turns, so that other load on the machine affects all models equally.

    Args:
        teachers: {name: started `Teacher`}.
        x: Inputs of a batch, as a tuple.
        sizes: Batch sizes.
        seconds: Minimum measurement time for each model and batch size, unless the maximum number
            of runs is reached first.
        tick: fn(), called after each model and batch size.
    """
    out: dict[str, list[Latency]] = {k: [] for k in teachers}
    for n in sizes:
        xn = batch_of(x, n)
        calls = {k: bare_call(t, xn) for k, t in teachers.items()}
        times = timed_in_turns(calls, seconds, wait_for(xn), tick)
        for k, ts in times.items():
            out[k].append(latency_of(n, ts))
    return out


def latency_of(batch: int, seconds: Sequence[float]) -> Latency:
    p50, p95 = np.percentile(seconds, (50, 95)) * 1000
    return Latency(batch, float(p50), float(p95), len(seconds))


def bare_call(teacher: Teacher, x: Any) -> Callable[[], Any]:
    """Return a function that runs only the forward pass on prepared inputs, without the checks of a
    `Teacher`.
    """
    fresh_run(teacher, x)  # this run moves the model to its device and sets evaluation mode
    return teacher.runner.bare_call(x)


def wait_for(x: Any) -> Callable[[], None]:
    """Return a function that waits until the GPU has finished. On a CPU, the function does nothing."""
    device = next((t.device for t in tensors_in(x)), torch.device('cpu'))
    return (lambda: torch.cuda.synchronize(device)) if device.type == 'cuda' else (lambda: None)


@torch.inference_mode()
def timed_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    wait: Callable[[], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time the calls in turns and return {name: [seconds of each run]}."""
    ts: dict[str, list[float]] = {k: [] for k in calls}
    for call in calls.values():
        for _ in range(5):
            call()  # warm-up

    def once(call: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    def done(k: str) -> bool:
        return len(ts[k]) >= MOST_RUNS or (len(ts[k]) >= LEAST_RUNS and sum(ts[k]) >= seconds)

    while left := [k for k in calls if not done(k)]:
        for k in left:
            ts[k].append(once(calls[k]))
            if done(k):
                tick()
    return ts
