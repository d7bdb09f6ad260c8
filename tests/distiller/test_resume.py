"A loop that continues from a checkpoint, in new objects, gives the same bits as one without a break."

import io

import pytest, torch
import torch.nn.functional as F
from torch import nn

from fastdistill import Distiller, Outputs

g = torch.Generator().manual_seed(0)
BATCHES = [
    (
        torch.randn(8, 6, generator=g) * (1 + i),  # so that a recipe chosen later differs
        torch.randint(4, (8,), generator=g),
        torch.randint(2, (8,), generator=g),
    )
    for i in range(5)
]


class Net(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.color, self.shape = (
            nn.Linear(6, width),
            nn.Linear(width, 4),
            nn.Linear(width, 2),
        )

    def forward(self, x):
        h = self.body(x).relu()
        return dict(color=self.color(h), shape=self.shape(h))


def trained(step, build, stop=None):
    "Train for all batches, and save and load everything before batch `stop`"
    d = build()
    opt = torch.optim.Adam(d.student.parameters(), 0.1)
    totals = []
    for i, batch in enumerate(BATCHES):
        if i == stop:
            file = io.BytesIO()
            torch.save(dict(d=d.state_dict(), opt=opt.state_dict()), file)
            file.seek(0)
            state, d = torch.load(file, weights_only=True), build()
            opt = torch.optim.Adam(d.student.parameters(), 0.1)
            d.load_state_dict(state['d']), opt.load_state_dict(state['opt'])
        total = step(d, i, *batch)
        opt.zero_grad(), total.backward(), opt.step()
        totals.append(total.item())
    return totals, [p.tolist() for p in d.student.parameters()]


def given_outputs(d, i, x, color, shape):
    "One output, and the teacher's outputs come from elsewhere"
    logits = d.student(x)['color']
    teacher = Outputs(Net(16, 7)(x)['color'].detach())
    return d.compute(Outputs(logits), teacher, F.cross_entropy(logits, color), (color,)).total


def one_task_loss(d, i, x, color, shape):
    "Several heads, and one task loss of all of them"
    raw = d.student(x)
    task = F.cross_entropy(raw['color'], color) + F.cross_entropy(raw['shape'], shape)
    s, t = d.student_outputs(raw, {}, x), d.teacher_outputs(x)
    return d.compute(s, t, task, (color, shape)).total


def unlabeled_first(d, i, x, color, shape):
    "As above, and from the second batch on, unlabeled inputs precede the labeled ones"
    if i == 0:
        return one_task_loss(d, i, x, color, shape)
    s, t = d.student_outputs(d.student(-x), {}, -x), d.teacher_outputs(-x)
    return d.without_labels(s, t) + one_task_loss(d, i, x, color, shape)


def own_task_losses(d, i, x, color, shape):
    "Several heads, each with its own task loss"
    return d(x, color, shape).total


def one_output():
    return Distiller(Net(5, 1), None)


def two_heads():
    teacher = Net(16, 7)
    return Distiller(Net(5, 1), dict(color=teacher, shape=teacher), weights=dict(color=0.5))


@pytest.mark.parametrize('stop', [0, 1, 3])
@pytest.mark.parametrize(
    'step, build',
    [
        (given_outputs, one_output),
        (one_task_loss, two_heads),
        (unlabeled_first, two_heads),
        (own_task_losses, two_heads),
    ],
)
def test_a_resumed_loop_with_the_default_recipe_continues_the_same(step, build, stop):
    assert trained(step, build, stop) == trained(step, build)


def test_the_weight_of_one_task_loss_does_not_depend_on_who_chose_the_recipes():
    "`forward` chooses them for a task loss per head, `compute` for one of all heads"
    x, color, shape = BATCHES[0]
    a, b = two_heads(), two_heads()
    with torch.no_grad():
        b(x, color, shape)
    a, b = (one_task_loss(d, 0, x, color, shape) for d in (a, b))
    assert a.item() == b.item()
