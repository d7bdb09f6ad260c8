"Reports made of outputs that are decided beforehand."

import copy, functools
import torch
import torch.nn.functional as F
from torch import nn
from fastdistill import Teacher
from fastdistill.evaluation import measure_models
from fastdistill.base.task import Task


class Stored(nn.Module):
    "A model whose outputs are decided before: its input are row numbers"

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, i):
        return self.out[i]


def measured(outs, y, task, bs=7, **kwargs):
    "A report on stored outputs, name -> tensor"
    at = torch.arange(len(y)).split(bs)
    kwargs = dict(seconds=0, repeats=200) | kwargs
    return measure_models(
        {k: Teacher(Stored(o), kind=task.kind, axis=task.axis) for k, o in outs.items()},
        [((i,), (y[i],)) for i in at],
        task,
        **kwargs,
    )


def a_report(*args, **kwargs):
    "A copy of `made_report`, which a test may change"
    freeze = lambda o: tuple(o) if isinstance(o, list) else o
    return copy.deepcopy(
        made_report(*map(freeze, args), **{k: freeze(v) for k, v in kwargs.items()})
    )


@functools.cache
def made_report(
    seconds=0, names=('teacher', 'alone', 'distilled'), classes=None, better=True, n=300
):
    "Three models of twelve classes, of which the third one is better than the second"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 12
    out = lambda k: torch.randn(n, 12, generator=g) + k * F.one_hot(y, 12)
    r = measured(
        dict(zip(names, [out(4), out(1.5), out(3 if better else 1.5)])),
        y,
        Task('softmax'),
        teacher=names[0],
        baseline=names[1],
        seconds=seconds,
    )
    r.classes = list(classes or map(str, range(12)))
    r.models[names[2]].history = dict(
        train_loss=[2.0, 1.0], valid_loss=[2.1, None], kd_loss=[3.0, 2.0]
    )
    return r
