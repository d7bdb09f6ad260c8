"What holds in every application of fastai."

import pytest, torch
from torch import nn
import apps
from apps import APPS, answers, modes, pair, same, snapshot
from fastai.basics import (
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    set_seed,
)
from fastdistill.fastai import KnowledgeDistillation, Term, dkd, kd, losses

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
every_app = pytest.mark.parametrize('app', APPS, ids=lambda a: a.name)
T, ALPHA = 3.0, 0.7


class Grab(Callback):
    "Keep the first step's gradient, loss and batch, and stop"

    order = 8  # after everything that adds to the loss

    def after_loss(self):
        self.seen = self.learn.loss.item(), self.learn.loss_grad.item()

    def after_backward(self):
        self.grads = {
            n: p.grad.clone() for n, p in self.learn.model.named_parameters() if p.grad is not None
        }
        self.batch = self.learn.xb, self.learn.yb
        raise CancelFitException


class Stop(Callback):
    "End a fit in the middle of an epoch"

    order = 7

    def __init__(self, error):
        self.error = error

    def after_loss(self):
        if self.training and self.iter == 1:
            raise self.error


@pytest.mark.parametrize('app', [a for a in APPS if a.kind == 'softmax'], ids=lambda a: a.name)
def test_a_loss_that_reads_labels_meets_them_in_the_shape_they_have(app):
    student, teacher = pair(app)
    grab = Grab()
    student.fit(1, app.lr, cbs=[KnowledgeDistillation(teacher, dkd(beta=2.0)), grab])
    (*xb,), (y,) = grab.batch
    ((t, _),) = answers(teacher.model, [(*xb, y)])
    student.model.train()
    if app.rnn:
        student.model.reset()
    s, y = apps.logits(student.model(*xb)), apps.plain([y])[0]
    rows = [apps.flat(o, app.axis) for o in (s, t)]
    assert grab.seen[0] == pytest.approx(
        (app.task(s, y) + losses.dkd(*rows, y.long().flatten(), beta=2.0)).item(), rel=1e-5
    )


def test_a_number_for_each_item_is_the_same_with_an_axis_of_length_1():
    student, _ = pair('collab')  # gives (B,)
    _, teacher = pair('collab_nn')  # gives (B, 1)
    grab = Grab()
    student.fit(1, 0.1, cbs=[KnowledgeDistillation(teacher, alpha=ALPHA), grab])
    (x,), (y,) = grab.batch
    s, t = student.model(x), teacher.model.eval()(x)
    assert grab.seen[0] == pytest.approx(
        (
            ALPHA * (s - t.flatten()).pow(2).mean() + (1 - ALPHA) * (s - y.flatten()).pow(2).mean()
        ).item(),
        rel=1e-5,
    )


def features(app, weight=1.0):
    return Term(losses.hint, weight=weight, layers=app.layers)


@every_app
def test_the_gradient_is_the_closed_form(app):
    student, teacher = pair(app)
    grab = Grab()
    student.fit(1, app.lr, cbs=[KnowledgeDistillation(teacher, T=T, alpha=ALPHA), grab])
    (*xb,), (y,) = grab.batch
    ((t, _),) = answers(teacher.model, [(*xb, y)])
    student.model.train()
    if app.rnn:
        student.model.reset()
    raw = student.model(*xb)
    s = apps.logits(raw)
    value = ALPHA * app.divergence(s, t, T) + (1 - ALPHA) * app.task(s, apps.plain([y])[0])
    want = torch.autograd.grad(
        value + app.regularisers(raw), list(student.model.parameters()), allow_unused=True
    )
    assert grab.seen[0] == pytest.approx(value.item(), rel=1e-5)
    assert grab.seen[1] == pytest.approx((value + app.regularisers(raw)).item(), rel=1e-5)
    largest = max(w.abs().max() for w in want if w is not None)
    for (n, _), w in zip(student.model.named_parameters(), want):
        if w is not None:
            assert (grab.grads[n] - w).abs().max() <= 1e-5 * largest, n


@every_app
def test_alpha_0_is_no_distillation_at_all(app):
    def run(*cbs):
        student, teacher = pair(app)
        set_seed(5)
        student.fit(2, app.lr, cbs=[cb(teacher) for cb in cbs])
        return student

    off = lambda t: KnowledgeDistillation(t, kd(alpha=0.0) + features(app, weight=0.0))
    alone, logits, layers = run(), run(lambda t: KnowledgeDistillation(t, alpha=0.0)), run(off)
    for learn in (logits, layers):
        assert same(snapshot(alone.model), snapshot(learn.model))
        assert alone.recorder.losses == learn.recorder.losses
        for a, b in zip(alone.recorder.values, learn.recorder.values):
            assert list(a) == list(b)[: len(a)]


def far(app, student, teacher):
    "How far the student is from the teacher on the validation set"
    s, t = [
        torch.cat([apps.flat(o, app.axis) for o, _ in answers(l.model, student.dls.valid)])
        for l in (student, teacher)
    ]
    return (apps.App(app.make, app.kind).divergence(s, t)).item()


@every_app
def test_the_student_follows_the_teacher(app):
    def run(*cbs):
        student, teacher = pair(app)
        set_seed(5)
        student.fit(10, app.lr, cbs=[cb(teacher) for cb in cbs])
        return far(app, student, teacher)

    assert run(lambda t: KnowledgeDistillation(t, T=2.0, alpha=0.9)) < 0.8 * run()


@every_app
def test_validation_loss_is_the_task_loss_and_kd_loss_is_a_column(app):
    student, teacher = pair(app)
    student.fit(1, app.lr, cbs=KnowledgeDistillation(teacher, T=T, alpha=ALPHA))
    names = student.recorder.metric_names
    assert names[:3] == ['epoch', 'train_loss', 'valid_loss'] and names[-2:] == ['kd_loss', 'time']
    row = dict(zip(names[1:], student.recorder.values[-1]))
    valid = list(student.dls.valid)
    s, t = [answers(l.model, valid) for l in (student, teacher)]
    ns = [len(y) for _, y in s]
    mean = lambda vs: sum(v.item() * n for v, n in zip(vs, ns)) / sum(ns)
    assert row['valid_loss'] == pytest.approx(mean([app.task(a, y) for a, y in s]), rel=1e-4)
    assert row['kd_loss'] == pytest.approx(
        mean([app.divergence(a, b, T) for (a, _), (b, _) in zip(s, t)]), rel=1e-4
    )


@every_app
@pytest.mark.parametrize('how', ['fit', 'lr_find', 'error', 'interrupt'])
def test_the_teacher_is_as_before_and_nothing_is_left_behind(app, how, tmp_path):
    student, teacher = pair(app)
    student.path = tmp_path
    guest, student_modes = snapshot(teacher.model), modes(student.model)
    metrics, cbs, loss_func = list(student.metrics), list(student.cbs), student.loss_func
    kd_cb = KnowledgeDistillation(teacher, kd(T, ALPHA) + features(app))
    if how == 'fit':
        student.fit(1, app.lr, cbs=kd_cb)
    if how == 'lr_find':
        student.add_cb(kd_cb)
        student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        assert not kd_cb.distiller.ready  # the projectors are as before: there were none
        student.remove_cb(kd_cb)
    if how == 'error':
        with pytest.raises(RuntimeError, match='boom'):
            student.fit(1, app.lr, cbs=[kd_cb, Stop(RuntimeError('boom'))])
    if how == 'interrupt':
        with pytest.raises(KeyboardInterrupt):
            student.fit(1, app.lr, cbs=[kd_cb, Stop(KeyboardInterrupt())])
    assert same(guest, snapshot(teacher.model))
    assert (
        list(student.metrics) == metrics
        and list(student.cbs) == cbs
        and student.loss_func is loss_func
    )
    assert not hasattr(student, 'knowledge_distillation')
    training = how != 'fit'  # what fastai leaves: the mode of the last phase
    both = {
        id(m) for m in teacher.model.modules()
    }  # fastai's tabular models have the same ReLU, all of them
    own = [n for n, m in student.model.named_modules() if id(m) not in both]
    assert {n: (training, *student_modes[n][1:]) for n in own} == {
        n: modes(student.model)[n] for n in own
    }


# the U-Net


def borderless(model):
    "Convolutions that see a constant image as constant, up to its border"
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.padding_mode = 'circular'
    return model


def one_step(student, teacher, size):
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(8, 3, 1, 1, generator=g).expand(8, 3, size, size),
        torch.randint(4, (8, 1, 1), generator=g).expand(8, size, size),
    )
    dl = DataLoader(list(zip(x, y)), bs=8, num_workers=0)
    student.zero_grad()
    (learn,) = apps.quiet(
        Learner(DataLoaders(dl, dl), student, loss_func=CrossEntropyLossFlat(axis=1))
    )
    grab = Grab()
    learn.fit(1, cbs=[KnowledgeDistillation(teacher, T=T, alpha=ALPHA, check=False), grab])
    return grab


def test_unet_loss_and_gradient_do_not_depend_on_the_image_size():
    student, teacher = [borderless(l.model) for l in pair('unet')]
    a, b = [one_step(student, teacher, size) for size in (32, 64)]
    assert a.seen[0] == pytest.approx(b.seen[0], rel=1e-5)
    largest = max(g.abs().max() for g in a.grads.values())
    for n, g in a.grads.items():
        assert (g - b.grads[n]).abs().max() <= 1e-4 * largest, n


def test_dense_is_the_same_as_flattened():
    g = torch.Generator().manual_seed(0)
    s, t, y = (
        torch.randn(2, 5, 3, 4, generator=g),
        torch.randn(2, 5, 3, 4, generator=g),
        torch.randint(5, (2, 3, 4), generator=g),
    )
    rows = [apps.flat(o, 1) for o in (s, t)]
    assert kd(T, ALPHA)(s, t, y).item() == pytest.approx(
        kd(T, ALPHA)(*rows, y.flatten()).item(), rel=1e-6
    )
