"Communicate between the processes of a distributed run. No other file uses `torch.distributed`."

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

APART = [False]  # True while this process acts as if it were the only process


def is_running() -> bool:
    return not APART[0] and distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if is_running() else 0


def world_size() -> int:
    return distributed.get_world_size() if is_running() else 1


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy the tensors of the first rank to all ranks.

    Args:
        tensors: Tensors to overwrite with those of the first rank.
    """
    if world_size() > 1:
        for t in tensors:
            distributed.broadcast(t, 0)


def mean_over_ranks(tensors: Iterable[Any]) -> None:
    """Replace tensors with their mean over all ranks.

    Args:
        tensors: Tensors to overwrite.
    """
    if world_size() > 1:
        sum_over_ranks(t.div_(world_size()) for t in tensors)


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace tensors with their sum over all ranks.

    Args:
        tensors: Tensors to overwrite.
    """
    if world_size() > 1:
        for t in tensors:
            distributed.all_reduce(t)


def average_gradients(params: Iterable[Tensor]) -> None:
    """Average the gradients of parameters over all ranks. A missing gradient is treated as 0.

    Args:
        params: Parameters of modules that are not wrapped by DistributedDataParallel. All ranks
            must pass the same parameters in the same order.
    """
    if world_size() == 1:
        return
    for p in (params := list(params)):
        # subtle: every rank must take part, because the other ranks would otherwise wait forever
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    mean_over_ranks(p.grad for p in params)


def length_over_ranks(norms: Tensor) -> Tensor:
    """Compute the root mean square of gradient norms over all ranks. The result is proportional to
    the norm of the gradients of all ranks together.

    Args:
        norms: Gradient norms.
    """
    if world_size() == 1:
        return norms
    squares = norms.square()
    mean_over_ranks([squares])
    return squares.sqrt()


class Gathered(torch.autograd.Function):
    """Gather the rows of all ranks. In the backward pass, each rank gets the gradient of its own
    rows, summed over all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sizes = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(world_size())]
        distributed.all_gather(sizes, torch.tensor(len(x), device=x.device))
        ctx.sizes = torch.stack(sizes).tolist()
        padded = x.new_zeros(max(ctx.sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, ctx.sizes)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad)
        return grad.split(ctx.sizes)[rank()]


def gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, in the order of the ranks. If all ranks compute the same loss
    from the gathered rows, the gradient averaged by DistributedDataParallel is the gradient of this
    loss.

    Args:
        x: Rows, (B, ...), where B may differ between ranks.
    """
    return x if world_size() == 1 else Gathered.apply(x.contiguous())


def previous_rows(x: Tensor) -> Tensor:
    """Replace each row with the previous row. The rows of all ranks form one sequence, in the order
    of the ranks. The first row of this sequence is replaced with the last row. If the shapes of
    rows differ between ranks, as with tokens padded to different lengths, each rank uses only its
    own rows.

    Args:
        x: At least one row, (B, ...).
    """
    rolled = x.roll(1, 0)
    if world_size() == 1:
        return rolled
    shapes = [None] * world_size()
    distributed.all_gather_object(shapes, tuple(x.shape[1:]))
    if any(shape != shapes[0] for shape in shapes):
        return rolled
    last = [torch.empty_like(x[-1]) for _ in shapes]
    distributed.all_gather(last, x[-1].contiguous())
    return torch.cat([last[rank() - 1][None], x[:-1]])


def of_first(o: Any) -> Any:
    """Return the object of the first rank on every rank. All ranks must call this function."""
    if world_size() == 1:
        return o
    got = [o]
    distributed.broadcast_object_list(got)
    return got[0]


def on_first(fn: Callable) -> Any:
    """Run `fn` on the first rank after all ranks have reached this call. Every rank returns the
    result of `fn` or raises its error.
    """
    if world_size() == 1:
        return fn()
    distributed.barrier()
    got: tuple | None = None
    if rank() == 0:
        try:
            with counted_as_one():
                got = fn(), None
        except Exception as e:
            got = None, e
    out, error = of_first(got)
    if error is not None:
        error.from_first = rank() > 0  # only the first rank shows the error
        raise error
    return out


def first_then_others(fn: Callable) -> Any:
    """Run `fn` on the first rank and then on the other ranks, so that the other ranks find the
    files that the first rank downloaded. If the first rank fails, the error is raised on every
    rank.
    """
    out = []
    on_first(lambda: out.append(fn()))
    return out[0] if out else fn()


@contextmanager
def counted_as_one() -> Iterator[None]:
    """Context manager inside which this process acts as if it were the only one, and does not wait
    for other processes.
    """
    was, n = APART[0], os.environ.get('WORLD_SIZE')
    APART[0] = True
    os.environ['WORLD_SIZE'] = '1'  # fastai reads the number of processes from the environment
    try:
        yield
    finally:
        APART[0] = was
        if n is None:
            del os.environ['WORLD_SIZE']
        else:
            os.environ['WORLD_SIZE'] = n


def leave_processes() -> None:
    """Leave the process group. Each process then continues on its own."""
    if not is_running():
        return
    # gloo aborts if a process ends while another process is still sending data to it
    distributed.barrier()
    distributed.destroy_process_group()
    os.environ['WORLD_SIZE'] = '1'


@contextmanager
def joined_processes() -> Iterator[bool]:
    """Context manager that joins the process group if this process was started by torchrun or
    accelerate launch. It yields True in the first process.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1 or is_running():
        yield rank() == 0
        return
    if on_gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    # Python objects are sent through gloo
    distributed.init_process_group('cpu:gloo,cuda:nccl' if on_gpu else 'gloo')
    try:
        yield rank() == 0
        leave_processes()
    finally:
        if is_running():
            distributed.destroy_process_group()
