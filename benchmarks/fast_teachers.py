"""Forward passes of a teacher's faster copies, over those of the model as it is. All copies take turns.

OMP_NUM_THREADS=1 python benchmarks/fast_teachers.py            # or some: resnet vit lstm
"""

import time
from dataclasses import replace
from typing import Annotated
import timm, torch, torchvision, typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from fastdistill.teachers.copy_plan import CopyPlan
from fastdistill.teachers.fast_copy import operations
from fastdistill.teachers.batch_norm_folding import foldable


class Recurrent(nn.Module):
    "Two LSTM layers and a linear one"

    def __init__(self, width, words, outputs):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True)
        self.out = nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def images(n, size):
    return torch.randn(n, 3, size, size)


def texts(n, length):
    return torch.randint(2000, (n, length))


def small():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def resnet56():
    "For images of 32 pixels, which its first third sees at full resolution (arXiv:1512.03385)"
    widths, blocks = (16, 32, 64), []
    for i, o in zip((16, *widths), widths):
        down = None if i == o else nn.Sequential(nn.Conv2d(i, o, 1, 2), nn.BatchNorm2d(o))
        blocks += [BasicBlock(i, o, 1 if i == o else 2, down)]
        blocks += [BasicBlock(o, o) for _ in range(8)]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vit(name):
    return lambda: timm.create_model(f'vit_{name}_patch16_224', img_size=96)


PAIRS = {
    'small CNN, 64 x 32 px': (small, images(64, 32)),
    'resnet56, 64 x 32 px': (resnet56, images(64, 32)),
    'resnet18, 8 x 64 px': (torchvision.models.resnet18, images(8, 64)),
    'resnet18, 64 x 64 px': (torchvision.models.resnet18, images(64, 64)),
    'resnet50, 16 x 64 px': (torchvision.models.resnet50, images(16, 64)),
    'resnet50, 8 x 128 px': (torchvision.models.resnet50, images(8, 128)),
    'mobilenet_v3, 16 x 96 px': (torchvision.models.mobilenet_v3_large, images(16, 96)),
    'vit_tiny, 16 x 96 px': (vit('tiny'), images(16, 96)),
    'vit_small, 16 x 96 px': (vit('small'), images(16, 96)),
    'lstm 400, 16 x 70 tokens': (lambda: Recurrent(400, 2000, 10), texts(16, 70)),
    'lstm 800, 16 x 70 tokens': (lambda: Recurrent(800, 2000, 10), texts(16, 70)),
    'lstm 256, 30,000 words': (lambda: Recurrent(256, 30_000, 30_000), texts(8, 35)),
}


def copies(model, x):
    "name -> module"
    conv = x.dim() == 4
    plan = CopyPlan(
        torch.float32,
        x.device,
        torch.channels_last if conv else None,
        tuple(foldable(model, lambda: model(x))),
    )
    plans = {'bf16': replace(plan, dtype=torch.bfloat16)} | ({'fp32': plan} if conv else {})
    return {k: p.build(model) for k, p in plans.items()}


@torch.no_grad()
def least(modules, x, seconds):
    "name -> CPU seconds of the fastest pass"
    times, end = {k: [] for k in modules}, time.time() + seconds
    own = lambda m: x.to(next(m.parameters()).dtype) if x.is_floating_point() else x
    inputs = {k: own(m) for k, m in modules.items()}
    while time.time() < end:
        for k, m in modules.items():
            start = time.process_time()
            m(inputs[k])
            times[k].append(time.process_time() - start)
    return {k: min(v) for k, v in times.items()}


def main(
    names: Annotated[list[str], typer.Argument(help='models whose names contain these')] = None,
    seconds: Annotated[float, typer.Option(help='for each model')] = 6.0,
):
    torch.manual_seed(0)
    table = Table('teacher', 'operations, 1e9', 'counted', 'as it is, ms', 'bf16', 'fp32')
    for name, (make, x) in PAIRS.items():
        if names and not any(n in name for n in names):
            continue
        model = make().eval()
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                model(x)
            took = least({'as it is': model} | copies(model, x), x, seconds)
        plain = took.pop('as it is')
        ratio = lambda k: f'{took[k] / plain:.2f}' if k in took else ''
        work = f'{operations(model, (x,), {}) / 1e9:.2f}'
        counted = f'{counter.get_total_flops() / 1e9:.2f}'
        table.add_row(name, work, counted, f'{plain * 1e3:.1f}', ratio('bf16'), ratio('fp32'))
    Console(width=120).print(table)


if __name__ == '__main__':
    typer.run(main)
