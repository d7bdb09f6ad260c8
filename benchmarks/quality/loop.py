"One run: a plain PyTorch loop over a `Distiller`, with the teacher's outputs in memory."

import math, time
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from fastdistill import Distiller, Outputs

KINDS = dict(
    classes='softmax', pixels='softmax', tokens='softmax', labels='sigmoid', numbers='regression'
)


def labels_loss(cell):
    "fn(logits, labels): the task loss"
    if cell.output == 'labels':
        return F.binary_cross_entropy_with_logits
    if cell.output == 'numbers':
        return F.mse_loss
    return lambda s, y: F.cross_entropy(s.movedim(cell.axis, 1), y, ignore_index=cell.void)


def optimizer(cell, params, lr):
    if cell.opt == 'sgd':
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return torch.optim.AdamW(params, lr, weight_decay=0.01, fused=True)


def batches(n, bs, steps, seed):
    "(epoch, rows) of each step; the same for every recipe"
    g, bs, epoch, left = torch.Generator().manual_seed(seed), min(bs, n), -1, ()
    for _ in range(steps):
        if len(left) < bs:
            epoch, left = epoch + 1, torch.randperm(n, generator=g)
        yield epoch, left[:bs]
        left = left[bs:]


def train(
    cell,  # a `tasks.Cell`
    data,  # its `tasks.Data`
    recipe,  # a Recipe; None: labels alone
    lr,
    seed,
):
    "The student after its last step, and the seconds of the loop"
    torch.manual_seed(seed)
    student = cell.student(data).train()
    own, distiller = labels_loss(cell), None
    if recipe is not None:
        live = any(t.layers is not None for t in recipe.terms)
        distiller = Distiller(
            student if live else None,
            data.teacher if live else None,
            recipe,
            task_loss=own,
            kind=KINDS[cell.output],
            axis=cell.axis,
            ignore_index=cell.void,
            check=False,
            shift_labels=False,
            example=data.train.batch(0, torch.arange(2))[0] if live else None,
        )
    opt = optimizer(
        cell, (student if distiller is None or not live else distiller).parameters(), lr
    )
    # the same warm-up for long and short runs: a quarter of the steps
    sched = OneCycleLR(opt, lr, cell.steps, pct_start=0.25)
    start = time.process_time()
    for step, (epoch, rows) in enumerate(batches(len(data.train), cell.bs, cell.steps, seed)):
        x, y, t = data.train.batch(epoch, rows)
        if distiller is None:
            loss = own(student(x), y)
        elif live:
            loss = distiller(x, y, progress=step / cell.steps).total
        else:
            s = student(x)
            loss = distiller.compute(
                Outputs(s), Outputs(t), own(s, y), (y,), progress=step / cell.steps
            ).total
        loss.backward()
        opt.step()
        opt.zero_grad()
        sched.step()
        if not math.isfinite(loss.item()):
            break
    return student.eval(), time.process_time() - start


@torch.no_grad()
def predict(model, x, bs=500):
    "Logits of all inputs"
    return torch.cat([model(x[i : i + bs]) for i in range(0, len(x), bs)])
