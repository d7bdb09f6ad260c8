"""What three students cost that train side by side, in relation to three separate runs.

    python benchmarks/many.py

ResNet-18s with other recipes (`kd` at two temperatures, `dkd`), and a teacher of the same kind of net; `--teacher` names it, and its forward pass is measured in relation
to the student's. The teacher runs in its fast form, with `--as-it-is` unchanged. Pictures in memory are cropped and flipped at random. Each round runs both ways, so that noise of the machine falls on both alike; medians of the rounds, and
whether both ways end in the same weights.
"""

import time
from statistics import median
import torch, torchvision, typer
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, noop, set_seed
from fastdistill.fastai import Teacher, distill_many, dkd, kd
from fastdistill.teachers.fast_copy import AS_IT_IS

RECIPES = [kd(), kd(T=2.0, alpha=0.5), dkd()]


class Pictures:
    "Random pictures, each time another crop"

    def __init__(self, n, size):
        g = torch.Generator().manual_seed(0)
        self.x, self.y, self.size = (
            torch.randint(
                256, (n, 3, size + size // 8, size + size // 8), dtype=torch.uint8, generator=g
            ),
            torch.randint(10, (n,), generator=g),
            size,
        )

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        a, b = torch.randint(self.size // 8 + 1, (2,)).tolist()
        x = self.x[i, :, a : a + self.size, b : b + self.size]
        return (x.flip(2) if torch.rand(()) < 0.5 else x).float() / 255 - 0.5, self.y[i]


def student(dls, seed):
    set_seed(seed)
    learn = Learner(
        dls, torchvision.models.resnet18(num_classes=10), loss_func=CrossEntropyLossFlat()
    )
    if hasattr(learn, 'progress'):
        learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


def seconds(fn, *args):
    "By the clock, and of this process's own work, which other programs disturb less"
    start = time.perf_counter(), time.process_time()
    fn(*args)
    return torch.tensor([time.perf_counter() - start[0], time.process_time() - start[1]])


def forward(model, x, n=7):
    model.eval()
    with torch.no_grad():
        return median(seconds(model, x)[1].item() for _ in range(n))


def weights(learners):
    return [p for l in learners for p in l.model.state_dict().values()]


def main(
    teacher: str = 'resnet101',
    size: int = 64,
    bs: int = 32,
    batches: int = 8,
    rounds: int = 5,
    as_it_is: bool = False,
):
    set_seed(0)
    dls = DataLoaders.from_dsets(
        Pictures(bs * batches, size),
        Pictures(bs, size),
        bs=bs,
        shuffle=True,
        num_workers=0,
        device='cpu',
    )
    teach = torchvision.models.get_model(teacher, weights=None, num_classes=10).eval()
    taught_by, x = (
        Teacher(teach, run=AS_IT_IS if as_it_is else None),
        torch.randn(bs, 3, size, size),
    )
    run = lambda learners, recipes: distill_many(
        learners, taught_by, 1, 1e-3, recipes, seed=1, progress=False, check=False
    )
    times, same, relation = [], True, []
    for i in range(rounds):
        a, b = [[student(dls, i) for i in range(3)] for _ in range(2)]
        relation.append(forward(teach, x) / forward(a[0].model, x))
        apart, together = (
            sum(seconds(run, [l], [r]) for l, r in zip(a, RECIPES)),
            seconds(run, b, RECIPES),
        )
        times.append(torch.stack([apart, together, together / apart]))
        same &= all(map(torch.equal, weights(a), weights(b)))
        print(f'round {i}: ' + said(times[-1]), flush=True)
    print(
        f"3 ResNet-18, teacher {teacher}, {batches} + 1 batches of {bs} pictures of {size} px, {torch.get_num_threads()} threads, torch {torch.__version__}: the teacher's "
        f"forward pass is {median(relation):.1f} x the student's; medians: {said(torch.stack(times).median(0)[0])}; the same weights to the last bit: {same}"
    )


def said(t):
    (aw, ac), (tw, tc), (rw, rc) = t.tolist()
    return f'separate {aw:.1f} s (work {ac:.1f} s), side by side {tw:.1f} s ({tc:.1f} s), ratio {rw:.3f} ({rc:.3f})'


if __name__ == '__main__':
    typer.run(main)
