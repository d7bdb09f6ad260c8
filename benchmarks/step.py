"""What a step costs: a ResNet-18 without a teacher, with `kd` of a ResNet-50, and with `kd + at` on its four stages.

    python benchmarks/step.py

Times are medians of interleaved steps in one process, so that noise of the machine falls on all alike; peak memory is that of a process of its own for each.
"""

import json, resource, subprocess, sys, time
from statistics import median
import torch, torchvision, typer
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from fastdistill import Distiller, Teacher, at, kd

STAGES = {f'layer{i}': f'layer{i}' for i in range(1, 5)}
RECIPES = dict(
    alone=lambda: None,
    kd=lambda: kd(T=4, alpha=0.9),
    **{'kd + at': lambda: kd(T=4, alpha=0.9) + at(layers=STAGES)},
)


def step_of(name, size, bs, device):
    "A function that does one training step"
    torch.manual_seed(0)
    student, teacher = (
        torchvision.models.resnet18(num_classes=100).to(device),
        torchvision.models.resnet50(num_classes=100).to(device),
    )
    x, y = torch.randn(bs, 3, size, size, device=device), torch.randint(100, (bs,), device=device)
    recipe = RECIPES[name]()
    distiller = (
        None if recipe is None else Distiller(student, Teacher(teacher).start(), recipe, example=x)
    )
    opt = torch.optim.SGD(
        student.parameters() if distiller is None else distiller.parameters(), lr=0.01
    )

    def step():
        loss = F.cross_entropy(student(x), y) if distiller is None else distiller(x, y).total
        loss.backward()
        opt.step()
        opt.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()

    return step


def peak(name, size, bs, device):
    "Peak memory in MiB of a few steps"
    step = step_of(name, size, bs, device)
    for _ in range(3):
        step()
    return (
        torch.cuda.max_memory_allocated() / 2**20
        if device == 'cuda'
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )


def main(size: int = 64, bs: int = 32, rounds: int = 11, device: str = 'cpu', memory_of: str = ''):
    if memory_of:
        return print(json.dumps(peak(memory_of, size, bs, device)))
    call = lambda name: (
        subprocess.run(
            [
                sys.executable,
                __file__,
                '--size',
                str(size),
                '--bs',
                str(bs),
                '--device',
                device,
                '--memory-of',
                name,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    mem = {n: json.loads(call(n)) for n in RECIPES}
    steps, times = {n: step_of(n, size, bs, device) for n in RECIPES}, {n: [] for n in RECIPES}
    for i in range(rounds + 2):
        for n, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                times[n].append(time.perf_counter() - start)
    t = {n: median(v) for n, v in times.items()}
    table = Table(
        'recipe',
        'ms a step',
        'over kd',
        'peak MiB',
        'over kd',
        title=f'ResNet-18 taught by ResNet-50, {bs} images of {size} px, {device}, {torch.get_num_threads()} threads',
    )
    for n in RECIPES:
        table.add_row(
            n,
            f'{t[n] * 1e3:.0f}',
            f'{t[n] / t["kd"]:.3f}',
            f'{mem[n]:.0f}',
            f'{mem[n] / mem["kd"]:.3f}',
        )
    Console(width=120).print(table)


if __name__ == '__main__':
    typer.run(main)
