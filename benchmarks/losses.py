"""What a loss over large logits costs: time of the forward and the backward pass, and the memory that it needs beside both logits and the
gradient. Of `kl` and `dist`, the three lines that everybody writes, torchdistill's losses, PyTorch's cross-entropy with labels as a measure, and Liger's fused
kernel where there is CUDA (pip install liger-kernel).

    python benchmarks/losses.py

Medians of interleaved rounds; on a CPU of the process's own time, which other programs disturb less than the clock.
"""

import time
from functools import partial
from statistics import median
import torch, typer
import torch.nn.functional as F
from fastdistill import losses
from fastdistill.evaluation.cost import Peak
from rich.console import Console
from rich.table import Table

T = 4.0
SHAPES = {
    '512 x 30,000': ((512, 30_000), -1),
    '8 x 32 x 180 x 240': ((8, 32, 180, 240), 1),
    '64 x 1,000': ((64, 1000), -1),
}


def naive(s, t, axis):
    return (
        F.kl_div(F.log_softmax(s / T, axis), F.softmax(t / T, axis), reduction='none')
        .sum(axis)
        .mean()
        * T**2
    )


def rows(x, axis):
    return x.movedim(axis, -1).flatten(0, -2)


def labels(s, t, axis):
    return F.cross_entropy(rows(s, axis), rows(t, axis).argmax(-1))


def ways(cuda):
    "name -> fn(s, t, axis)"
    out = {
        'kl': lambda s, t, axis: losses.kl(s, t, T=T, axis=axis),
        'kl, three lines': naive,
        'cross-entropy with labels': labels,
        'dist': lambda s, t, axis: losses.dist(s, t, T=T, axis=axis),
    }
    try:
        from torchdistill.losses.mid_level import DISTLoss, KDLoss

        kd, dist = (
            KDLoss('.', 'output', '.', 'output', temperature=T, alpha=0.0),
            DISTLoss('.', 'output', '.', 'output', tau=T),
        )
        io = lambda x, axis: {'.': dict(output=rows(x, axis))}
        out['kl, torchdistill'] = lambda s, t, axis: kd(io(s, axis), io(t, axis), None)
        out['dist, torchdistill'] = lambda s, t, axis: dist(io(s, axis), io(t, axis), None)
    except ImportError:
        pass
    if cuda:
        try:
            from liger_kernel.transformers import LigerKLDIVLoss

            liger = LigerKLDIVLoss(reduction='batchmean')
            out['liger'] = lambda s, t, axis: (
                liger(F.log_softmax(rows(s, axis) / T, -1), F.softmax(rows(t, axis) / T, -1)) * T**2
            )
        except ImportError:
            pass
    return out


def both_ways(fn, s, t, axis):
    return torch.autograd.grad(fn(s, t, axis), s)


def seconds(fn, device):
    clock = time.process_time if device == 'cpu' else time.perf_counter
    if device != 'cpu':
        torch.cuda.synchronize()
    start = clock()
    fn()
    if device != 'cpu':
        torch.cuda.synchronize()
    return clock() - start


def main(rounds: int = 7, threads: int = 1):
    torch.set_num_threads(threads)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    table = Table('logits', 'loss', 'ms', 'over kl', 'MiB beside logits and gradient')
    for shape, (size, axis) in SHAPES.items():
        torch.manual_seed(0)
        s, t = (
            torch.randn(size, device=device, requires_grad=True),
            torch.randn(size, device=device),
        )
        run = {k: partial(both_ways, fn, s, t, axis) for k, fn in ways(device == 'cuda').items()}
        memory = {}
        for k, fn in run.items():
            with Peak() as p:
                fn()
            memory[k] = (p.most - s.numel() * s.element_size()) / 2**20
        times = {k: [] for k in run}
        for _ in range(rounds):
            for k, fn in run.items():
                times[k].append(seconds(fn, device) * 1e3)
        ours = median(times['kl'])
        for k, v in times.items():
            table.add_row(
                shape, k, f'{median(v):.3g}', f'{median(v) / ours:.2f}', f'{memory[k]:.1f}'
            )
    Console(width=120).print(table)
    print(f'{device}, {threads} thread(s), torch {torch.__version__}')


if __name__ == '__main__':
    typer.run(main)
