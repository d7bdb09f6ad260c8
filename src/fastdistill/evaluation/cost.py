"""Measure the cost of a model: parameters, multiply-accumulates, bytes, peak memory and time."""

import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.backends import cudnn, mkldnn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..base.outputs import Outputs, tensors_in
from ..teachers.raw_items import items_at, items_in, with_items
from ..teachers.teacher import Teacher
from .report_data import Cost, Latency

__all__ = ['batch_of', 'cost_of', 'latencies', 'wait_for', 'weights_of_teacher']

SECONDS, LEAST_RUNS, MOST_RUNS = (
    0.5,
    20,
    1000,
)  # seconds per time measurement; minimum and maximum number of runs


def cost_of(
    teacher: Teacher,
    x: Any,
) -> Cost:
    """Return the cost of a model, without times. Values that can't be counted are None.

    Args:
        teacher: A started `Teacher`.
        x: Inputs of a large batch, a tuple.
    """
    n_params = sum({id(p): p.numel() for m in teacher.modules for p in m.parameters()}.values())
    weights = weights_of_teacher(teacher)
    out = Cost(n_params or None, bytes=file_size(teacher) or weights or None)
    if not teacher.modules:
        return out
    with FlopCounterMode(display=False) as counter, unfused():
        fresh_run(teacher, batch_of(x, 1))
    out.macs = counter.get_total_flops() // 2 or None
    out.memory = weights + peak_memory(teacher, x)
    return out


def weights_of_teacher(teacher: Teacher) -> int:
    """Return the size in bytes of the parameters and buffers of a teacher, counting shared ones
    once.
    """
    own = {id(t): t for m in teacher.modules for t in [*m.parameters(), *m.buffers()]}.values()
    return sum(t.numel() * t.element_size() for t in own)


@contextmanager
def unfused() -> Iterator[None]:
    """Run recurrent layers as matrix products inside, since the counter does not know the fused
    ones.
    """
    with warnings.catch_warnings(), cudnn.flags(enabled=False):
        warnings.filterwarnings(
            'ignore', 'TF32 acceleration'
        )  # PyTorch's warning about its own default
        with mkldnn.flags(enabled=False):
            yield


def fresh_run(teacher: Teacher, x: Any) -> Outputs:
    teacher.reset()
    return teacher(*x)


def file_size(teacher: Teacher) -> int:
    """Return the total size in bytes of the files that the models were loaded from.

    0 if any model was not loaded from a file.
    """
    paths = [o.path for o in (teacher.members or [teacher])]
    return sum(Path(p).stat().st_size for p in paths) if all(paths) else 0


def batch_of(x: Any, n: int) -> tuple:
    """Return the first `n` samples of a batch.

    Args:
        x: Tuple of inputs.
        n: Number of samples. If there are fewer, they are repeated.
    """
    items = items_in(x)
    if items is not None:
        items = items_at(items, [i % len(items) for i in range(n)])

    def fit(t: Any) -> Any:
        if isinstance(t, torch.Tensor):
            return t.repeat(-(-n // len(t)), *[1] * (t.dim() - 1))[:n]
        if isinstance(t, dict):
            return {k: fit(v) for k, v in t.items()}
        return type(t)(map(fit, t)) if isinstance(t, (tuple, list)) else t

    return with_items(tuple(map(fit, x)), items)


class Peak(TorchDispatchMode):
    """Records the peak number of bytes of tensors created inside the context and alive at the same
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # an unknown argument was created earlier, such as a weight
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
    """Return the peak bytes allocated in a forward pass, without the weights."""
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
    """Return {name: [`Latency` for each size]}.

    The models are timed alternately, so that other load on the machine affects all of them equally.

    Args:
        teachers: {name: started `Teacher`}.
        x: Inputs of a batch, a tuple.
        sizes: Batch sizes.
        seconds: Time limit for each model and size.
        tick: Called after each model and size.
    """
    out: dict[str, list[Latency]] = {k: [] for k in teachers}
    for n in sizes:
        xn = batch_of(x, n)
        calls = {k: bare_call(t, xn) for k, t in teachers.items()}
        times = timed_in_turns(calls, seconds, wait_for(xn), tick)
        for k, ts in times.items():
            p50, p95 = np.percentile(ts, (50, 95)) * 1000
            out[k].append(Latency(n, float(p50), float(p95), len(ts)))
    return out


def bare_call(teacher: Teacher, x: Any) -> Callable[[], Any]:
    """Return the model's forward pass on prepared inputs, without the checks of a `Teacher`."""
    fresh_run(teacher, x)  # moves the model to its device and sets its mode
    return teacher.runner.bare_call(x)


def wait_for(x: Any) -> Callable[[], None]:
    """Return a function that waits until the GPU has finished, if there is one."""
    device = next((t.device for t in tensors_in(x)), torch.device('cpu'))
    return (lambda: torch.cuda.synchronize(device)) if device.type == 'cuda' else (lambda: None)


@torch.inference_mode()
def timed_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    wait: Callable[[], None],
    tick: Callable[[], None],
) -> dict[str, list[float]]:
    """Time the calls alternately and return {name: seconds of each run}."""
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
