"""What torch.compile takes and saves for teachers of several sizes, on a CPU: the constants of `teacher/compiled.py`.

    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/compiling.py

Each model is the copy that a teacher runs: frozen, in evaluation mode, float32. Nothing comes from PyTorch's caches of earlier compilations. CPU time of
the process and of the C++ compiler is printed beside the time by the clock, since other programs may run.
"""

import os, time
from statistics import median
import timm, torch
import torch._inductor.config as inductor
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from fastdistill import Teacher
from fastdistill.teachers.compiled import Compilation, compile_seconds

MODELS = {
    'mlp of 4 layers': lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 64 * 64, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    ),
    'resnet18': lambda: timm.create_model('resnet18'),
    'resnet50': lambda: timm.create_model('resnet50'),
    'vit_tiny': lambda: timm.create_model('vit_tiny_patch16_224', img_size=64),
}


def cpu():
    return sum(os.times()[:4])  # of this process and its children


def seconds(fn, x, n=3):
    fn(x)
    times = []
    for _ in range(n):
        start = cpu()
        fn(x)
        times.append(cpu() - start)
    return median(times)


def main():
    inductor.force_disable_caches = True
    x, table = (
        torch.randn(16, 3, 64, 64),
        Table(
            'model',
            'layers',
            'assumed, s',
            'CPU, s',
            'clock, s',
            'batch, ms',
            'compiled, ms',
            'saved',
        ),
    )
    for name, make in MODELS.items():
        torch._dynamo.reset()
        t = Teacher(make(), precision='fp32', fold_bn=True, memory_format='channels_last')
        t(x)
        c, start, clock = (
            Compilation(t.runs, True, print, lambda a, b: True),
            cpu(),
            time.perf_counter(),
        )
        with torch.no_grad():
            c((x,), {}, None)
            took, clock = cpu() - start, time.perf_counter() - clock
            a, b = seconds(c.module, x), seconds(c.fast, x)
        row = (
            name,
            c.layers,
            round(compile_seconds(c.layers)),
            f'{took:.1f}',
            f'{clock:.1f}',
            f'{a * 1e3:.0f}',
            f'{b * 1e3:.0f}',
            f'{1 - b / a:.0%}',
        )
        print(*row, flush=True)
        table.add_row(*map(str, row))
    Console(width=120).print(table)


if __name__ == '__main__':
    typer.run(main)
