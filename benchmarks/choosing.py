"""What it costs that nothing need be said: the check of the teacher and the choice of a recipe before a fit of five epochs, and in each step the share of the gradient.

    python benchmarks/choosing.py

Medians of the process's own time (other programs disturb it less than the clock), of interleaved rounds.
"""

import time
from contextlib import contextmanager
from statistics import median
import torch, torchvision, typer
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, noop, set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastdistill import Distiller, Outputs, Recipe, Term, auto, dist, losses
from fastdistill.fastai import KnowledgeDistillation


def pictures(n, size):
    g = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(n, 3, size, size, generator=g), torch.randint(10, (n,), generator=g)
    )


def table(n):
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 40, generator=g), torch.randint(10, (n,), generator=g))


def mlp(width):
    return nn.Sequential(
        nn.Linear(40, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


# name -> (data sets, fn() -> student, fn() -> teacher)
FITS = {
    'ResNet-18 taught by ResNet-50, 32 px': (
        lambda: (pictures(2_000, 32), pictures(500, 32)),
        lambda: torchvision.models.resnet18(num_classes=10),
        lambda: torchvision.models.resnet50(num_classes=10),
    ),
    'a table, 2 layers of 50 by 2 of 400': (
        lambda: (table(30_000), table(5_000)),
        lambda: mlp(50),
        lambda: mlp(400),
    ),
}


@contextmanager
def timed(out):
    start = time.process_time()
    yield
    out.append(time.process_time() - start)


def choosing(name, rounds, epochs=5):
    "(seconds of a fit whose recipe is chosen and whose teacher is checked, of the same fit without both)"
    train, valid = FITS[name][0]()
    dls = DataLoaders.from_dsets(train, valid, bs=64, num_workers=0, device='cpu')
    teacher, times = FITS[name][2](), ([], [])
    for _ in range(rounds):
        for out, options in zip(times, (dict(), dict(recipe=auto(classes=10), check=False))):
            set_seed(0)
            learn = Learner(dls, FITS[name][1](), loss_func=CrossEntropyLossFlat())
            learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
            learn.logger = noop
            with timed(out):
                learn.fit(epochs, 1e-3, cbs=KnowledgeDistillation(teacher, **options))
    return [median(t) for t in times]


def sharing(student, x, recipes, steps):
    "Seconds of a step with each recipe, the teacher's outputs given"
    torch.manual_seed(0)
    net, y = student(), torch.randint(10, (len(x),))
    t, opt, times = (
        torch.randn(len(x), 10),
        torch.optim.SGD(net.parameters(), 1e-3),
        [[] for _ in recipes],
    )
    made = [
        Distiller(None, None, r, task_loss=nn.CrossEntropyLoss(), kind='softmax', check=False)
        for r in recipes
    ]
    for i in range(steps + 3):
        for d, out in zip(made, times):
            with timed(out):
                s = net(x)
                d.compute(
                    Outputs(s), Outputs(t), nn.functional.cross_entropy(s, y), (y,), progress=0.5
                ).total.backward()
                opt.step()
                opt.zero_grad()
            if i < 3:
                out.clear()
    return [median(t) for t in times]


def main(rounds: int = 5, steps: int = 60):
    for name in FITS:
        a, b = choosing(name, rounds)
        print(
            f'{name}: five epochs {a:.2f} s of work with the check and the choice, {b:.2f} s without: {100 * (a / b - 1):+.1f} %',
            flush=True,
        )
    given = {
        'kl': [
            Recipe(Term(losses.kl, grad_ratio=3.0, T=4.0)),
            Recipe(Term(losses.kl, weight=3.0, T=4.0)),
        ],
        'dist': [
            dist(T=4.0, beta=2.0, gamma=2.0, grad_ratio=3.0),
            dist(T=4.0, beta=2.0, gamma=2.0),
        ],
    }
    for net, x in (
        ('ResNet-18, 64 images of 64 px', torch.randn(64, 3, 64, 64)),
        ('2 layers of 50, 64 rows', torch.randn(64, 40)),
    ):
        student = (
            FITS['ResNet-18 taught by ResNet-50, 32 px'][1]
            if x.dim() == 4
            else FITS['a table, 2 layers of 50 by 2 of 400'][1]
        )
        for loss, recipes in given.items():
            a, b = sharing(student, x, recipes, steps if x.dim() == 4 else 20 * steps)
            print(
                f'{net}, {loss}: {1e3 * a:.3f} ms a step with a share, {1e3 * b:.3f} with a weight: {100 * (a / b - 1):+.1f} %',
                flush=True,
            )


if __name__ == '__main__':
    typer.run(main)
