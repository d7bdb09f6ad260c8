"A cell is a task, a budget and a student. Its data hold the teacher's outputs; teachers are trained once and kept in a folder."

import importlib, os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT = Path(
    os.environ.get('QUALITY_DATA', HERE.parents[2] / 'shared' / 'data')
)  # real data, see LOG.md
KEPT = Path(
    os.environ.get('QUALITY_KEPT', HERE.parents[1] / 'out' / 'quality')
)  # teachers and their outputs


@dataclass
class Split:
    "Inputs, labels and the teacher's outputs; of pictures that are seen in several views, (views, items, ...)"

    x: torch.Tensor
    y: torch.Tensor
    t: torch.Tensor
    views: int = 0  # 0: none but the items themselves

    def __len__(self):
        return len(self.y)

    def batch(self, epoch, rows):
        if not self.views:
            return self.x[rows], self.y[rows], self.t[rows].float()
        v = epoch % self.views
        return self.x[v, rows], self.y[rows], self.t[v, rows].float()


@dataclass
class Data:
    "The three splits: trained on, to choose a rate by, to be judged by"

    train: Split
    valid: Split
    test: Split
    teacher: nn.Module | None = None  # for terms between layers
    extra: dict | None = None  # what a student's shape depends on


@dataclass(frozen=True)
class Cell:
    "One task, one budget, one student"

    name: str
    task: str  # cells of one task stand together where a task is left out
    output: str  # 'classes', 'pixels', 'tokens', 'labels' or 'numbers'
    data: Callable  # () -> Data
    student: Callable  # Data -> module
    steps: int
    bs: int = 64
    rates: tuple = (0.003, 0.01, 0.03)
    opt: str = 'adamw'
    axis: int = 1  # of the classes in the logits
    void: int = -100  # a label that does not count
    seeds: int = 4  # that protocol 1 reported
    cost: int = 1  # 1: a few seconds a run, 2: some ten, 3: more
    source: str = ''  # the data set, if different tasks share it; the task otherwise
    first_try: bool = (
        False  # one rate that nobody tuned, a short training, a teacher trained as briefly
    )
    sealed: bool = False  # data that only the frozen default is judged by

    @property
    def data_set(self):
        return self.source or SOURCES.get(self.task, self.task)

    @property
    def setup(self):
        "What a run depends on besides the recipe, the rate, the seed and the data"
        return f'{self.output}, {self.steps} steps of {self.bs}, {self.opt}, axis {self.axis}, void {self.void}'


# task -> the data set that it shares with other tasks
SOURCES = dict(
    adult='adult census',
    age='adult census',
    occupation='adult census',
    person='adult census',
    sst2='film reviews',
    polarity='film reviews',
    trec50='trec',
    digits100='digits',
    points='digits',
    digit_pixels='digits',
    cifar5000='cifar',
    goemotionsweak='goemotions',
    banking77weak='banking77',
)


class Fast(nn.Module):
    "A net of pictures in bfloat16 and channels last, twice as fast on this CPU; its logits are float32"

    def __init__(self, net):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return self.net(x.float().contiguous(memory_format=torch.channels_last)).float()


def kept(name, make):
    "What `make()` returns, made once and kept on disk"
    path = KEPT / f'{name}.pt'
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        torch.save(made, part)
        part.replace(path)
    return torch.load(path, weights_only=False)


def fit(model, x, y, steps, lr, *, bs=64, loss=nn.functional.cross_entropy, seed=0, decay=0.01):
    "Train a teacher: AdamW, one cycle"
    torch.manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps)
    left = ()
    for _ in range(steps):
        if len(left) < bs:
            left = torch.randperm(len(y))
        rows, left = left[:bs], left[bs:]
        loss(model.train()(x[rows]), y[rows]).backward()
        opt.step()
        opt.zero_grad()
        sched.step()
    return model.eval()


def cells():
    "name -> Cell, cheap ones first"
    found = [
        c
        for m in (
            'text',
            'table',
            'digits',
            'lm',
            'dense',
            'fashion',
            'cifar',
            'imagenette',
            'unseen',
            'first',
            'sealed',
        )
        if (HERE / f'task_{m}.py').exists()
        for c in importlib.import_module(f'task_{m}').CELLS
    ]
    return {c.name: c for c in found}
