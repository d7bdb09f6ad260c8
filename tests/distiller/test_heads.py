"Several heads, each with its own teacher."

import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill import DistillError, Distiller, Heads, Teacher, Term, kd, losses, soft_labels

g = torch.Generator().manual_seed(0)
X, COLOR, SHAPE, SIZE = (
    torch.randn(8, 6, generator=g),
    torch.randint(3, (8,), generator=g),
    torch.randint(2, (8,), generator=g),
    torch.randn(8, 1, generator=g),
)


class Net(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.body, self.color, self.shape, self.size = (
            nn.Linear(6, h),
            nn.Linear(h, 3),
            nn.Linear(h, 2),
            nn.Linear(h, 1),
        )
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.body(x).relu()
        return dict(color=self.color(h), shape=self.shape(h), size=self.size(h))


def nets():
    torch.manual_seed(0)
    return (
        Net(4),
        nn.Linear(6, 3),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        Net(16),
    )


def test_the_loss_is_the_sum_of_the_heads_and_the_student_runs_once():
    student, color, shape, size = nets()
    heads = Heads(
        weights=dict(shape=0.5),
        color=Distiller(student, Teacher(color), kd(2.0, 0.7), output='color'),
        shape=Distiller(student, Teacher(shape), kd(1.0, 0.4), output='shape'),
        size=Distiller(
            student,
            Teacher(size, output='size', kind='regression'),
            kd(alpha=0.3),
            output='size',
            kind='regression',
        ),
    )
    out = heads(X, COLOR, SHAPE, SIZE)
    assert student.calls == 1
    s = student(X)
    want = (
        0.3 * F.cross_entropy(s['color'], COLOR)
        + 0.7 * losses.kl(s['color'], color(X), T=2.0)
        + 0.5
        * (0.6 * F.cross_entropy(s['shape'], SHAPE) + 0.4 * losses.kl(s['shape'], shape(X), T=1.0))
        + 0.7 * F.mse_loss(s['size'], SIZE)
        + 0.3 * losses.regression(s['size'], size(X)['size'])
    )
    torch.testing.assert_close(out.total, want)
    assert list(out.parts) == [
        'color.task',
        'color.kd',
        'shape.task',
        'shape.kd',
        'size.task',
        'size.kd',
    ]
    torch.testing.assert_close(out.parts['shape.task'], F.cross_entropy(s['shape'], SHAPE).detach())


def test_heads_without_recipes_choose_their_own_and_check_their_labels(capsys):
    student, color, shape, _ = nets()
    heads = Heads(
        color=Distiller(student, Teacher(color), output='color'),
        shape=Distiller(student, Teacher(shape), output='shape'),
    )
    heads(X, COLOR, SHAPE).total.backward()
    assert [*heads.heads['color'].links] == ['dist'] and [*heads.heads['shape'].links] == ['kd']
    assert (
        capsys.readouterr().out.count('fastdistill: recipe') == 2
        and student.body.weight.grad is not None
    )
    wrong = Heads(color=Distiller(student, Teacher(color), kd(), output='color'))
    with pytest.raises(DistillError, match='There is a label 3, but the outputs have 3 classes'):
        wrong(X, torch.full((8,), 3))


def test_a_head_without_labels_learns_from_its_teacher_alone():
    student, color, shape, _ = nets()
    heads = Heads(
        color=Distiller(student, Teacher(color), kd(2.0, 0.7), output='color'),
        shape=Distiller(student, Teacher(shape), soft_labels(T=1), output='shape'),
    )
    out = heads(X, COLOR, None)
    s = student(X)
    torch.testing.assert_close(
        out.total,
        0.3 * F.cross_entropy(s['color'], COLOR)
        + 0.7 * losses.kl(s['color'], color(X), T=2.0)
        + losses.kl(s['shape'], shape(X), T=1.0),
    )


def test_layers_are_compared_in_one_run_and_projectors_are_trained():
    student, color, shape, _ = nets()
    heads = Heads(
        color=Distiller(student, Teacher(color), kd(), output='color'),
        shape=Distiller(
            student, Teacher(shape), kd() + losses_between(), output='shape', example=X
        ),
    )
    n = len(list(student.parameters()))
    assert len(list(heads.parameters())) > n and len({id(p) for p in heads.parameters()}) == len(
        list(heads.parameters())
    )
    calls = student.calls
    heads(X, COLOR, SHAPE).total.backward()
    assert student.calls == calls + 1 and all(
        p.grad is not None
        for k in ('body', 'color', 'shape')
        for p in getattr(student, k).parameters()
    )
    assert all(p.grad is None for p in [*color.parameters(), *shape.parameters()])


def losses_between():
    return Term(losses.mse, layers={'body': '0'}, match='shape', weight=0.005)


def test_what_is_no_set_of_heads():
    student, color, shape, other = nets()
    of = lambda net, teacher, output: Distiller(net, teacher, kd(), output=output)
    with pytest.raises(DistillError, match='Distillers of one student'):
        Heads(color=of(student, Teacher(color), 'color'), shape=of(other, Teacher(shape), 'shape'))
    with pytest.raises(DistillError, match='Distillers of one student'):
        Heads()
    heads = Heads(
        color=of(student, Teacher(color), 'color'), shape=of(student, Teacher(shape), 'shape')
    )
    with pytest.raises(DistillError, match=r'1 labels for 2 heads \(color, shape\)'):
        heads(X, COLOR)
    with pytest.raises(DistillError, match='weights= has colour, the heads are color'):
        Heads(weights=dict(colour=1), color=of(student, Teacher(color), 'color'))
