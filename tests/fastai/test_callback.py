"KnowledgeDistillation beside everything else that happens in a fastai training."

import copy, csv, importlib, inspect, math, random, re, subprocess, sys, warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps, processes
from apps import CallsInside, Rows, pair, toy
from fastai.basics import (
    Adam,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    Callback,
    CancelFitException,
    CancelStepException,
    CrossEntropyLossFlat,
    DataLoaders,
    DiceLoss,
    FocalLoss,
    FocalLossFlat,
    L,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    Lamb,
    Learner,
    MSELossFlat,
    OptimWrapper,
    SGD,
    SkipToEpoch,
    noop,
    rank_distrib,
    ranger,
    set_seed,
    tensor,
)
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.all import CategoryBlock, DataBlock, TransformBlock
from fastai.data.transforms import Normalize
from fastai.interpret import Interpretation
import fastdistill.fastai
from fastdistill import Distiller, Outputs, Teacher
from fastdistill.fastai import (
    DistillError,
    DistillWarning,
    KnowledgeDistillation,
    Term,
    dkd,
    kd,
    losses,
    soft_labels,
)
from fastdistill.fastai.finite_check import FiniteCheck
from fastdistill.fastai.task import Task, task_of

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
KD = KnowledgeDistillation
T, ALPHA = 3.0, 0.7
TESTS = Path(__file__).parents[1] / 'helpers'


def kl(s, t, T=T):
    return (
        T**2
        * ((t / T).softmax(1) * ((t / T).log_softmax(1) - (s / T).log_softmax(1))).sum(1).mean()
    )


def ce(s, y):
    return F.cross_entropy(s, y, reduction='none')


def hint(weight=1.0, **kwargs):
    return Term(losses.hint, weight=weight, layers={'2': '2'}, projector='linear', **kwargs)


class Watch(Callback):
    "Keep what each training batch was and became"

    order = 5.5  # after distillation, before GradientAccumulation

    def before_fit(self):
        self.seen = []

    def after_loss(self):
        if not self.training:
            return
        mix = next((c for c in self.learn.cbs if isinstance(c, (MixUp, CutMix))), None)
        mixed = {} if mix is None else dict(lam=mix.lam, y1=mix.yb1[0])
        self.seen.append(
            SimpleNamespace(
                loss=self.learn.loss.item(),
                loss_grad=self.learn.loss_grad.item(),
                x=self.x.clone(),
                y=self.y,
                s=self.pred.detach(),
                pct=self.pct_train,
                **mixed,
            )
        )


def watched(student, cbs, epochs=1, lr=0.1):
    w = Watch()
    student.fit(epochs, lr, cbs=[*cbs, w])
    return w.seen


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def projectors(cb):
    return [p.detach().clone() for p in cb.distiller.own_parameters()]


def close(a, b, tol=1e-6):
    return len(a) == len(b) and all(
        (x - y).abs().max() <= tol * max(1, y.abs().max()) for x, y in zip(a, b)
    )


# what is trained

LOSSES = [
    LabelSmoothingCrossEntropyFlat(),
    FocalLossFlat(),
    CrossEntropyLossFlat(weight=tensor([1.0, 2.0, 3.0, 4.0])),
    F.cross_entropy,
    nn.CrossEntropyLoss(),
    partial(F.cross_entropy, label_smoothing=0.1),
]


@pytest.mark.parametrize('loss_func', LOSSES, ids=lambda f: type(f).__name__)
def test_label_smoothing_focal_and_other_losses_of_classes(loss_func):
    student, teacher = toy(loss_func=loss_func)
    seen = watched(student, [KD(teacher, T=T, alpha=ALPHA)])
    assert len(seen) == 4
    for b in seen:
        want = ALPHA * kl(b.s, teacher(b.x)) + (1 - ALPHA) * loss_func(b.s, b.y)
        assert b.loss == pytest.approx(want.item(), rel=1e-5) and b.loss_grad == pytest.approx(
            b.loss
        )
    assert student.loss_func is loss_func


@pytest.mark.parametrize('first', [True, False])
def test_mixup_teacher_sees_the_mixed_inputs(first):
    student, teacher = toy()
    loss_func, cbs = student.loss_func, [MixUp(), KD(teacher, T=T, alpha=ALPHA)]
    for b in watched(student, cbs if first else cbs[::-1]):
        task = (b.lam * ce(b.s, b.y) + (1 - b.lam) * ce(b.s, b.y1)).mean()
        assert b.loss == pytest.approx(
            (ALPHA * kl(b.s, teacher(b.x)) + (1 - ALPHA) * task).item(), rel=1e-5
        )
    assert student.loss_func is loss_func


def test_function_matching_is_the_teacher_alone_on_mixed_inputs_and_no_label_counts():
    ends = []
    for other in (False, True):
        student, teacher = toy()
        if other:
            student.dls.train.dataset[:] = [(x, (y + 1) % 4) for x, y in student.dls.train.dataset]
        apps.set_seed(1, reproducible=True)
        seen = watched(student, [MixUp(1.0), KD(teacher, soft_labels(T=1))])
        plain = torch.cat([x[None] for x, _ in student.dls.train.dataset])
        for b in seen:
            assert b.loss == pytest.approx(
                F.kl_div(b.s.log_softmax(1), teacher(b.x).softmax(1), reduction='batchmean').item(),
                rel=1e-4,
            )
            assert (
                torch.cdist(b.x, plain).min(1).values.max() > 1e-3
            )  # these are none of the samples themselves
        ends.append(weights(student))
    assert torch.equal(*ends)


def test_one_is_the_share_of_mixup_that_is_uniform():
    torch.manual_seed(0)
    share = MixUp(1.0).distrib.sample((20_000,))
    assert (torch.histc(share, 10, 0, 1) / 2000 - 1).abs().max() < 0.1


def test_mixed_labels_of_a_multi_label_model_are_numbers():
    student, teacher = pair('multi_label')
    t, app = (
        copy.deepcopy(teacher.model).eval(),
        next(a for a in apps.APPS if a.name == 'multi_label'),
    )
    for b in watched(student, [MixUp(), KD(teacher, T=T, alpha=ALPHA)], lr=0.01):
        want = ALPHA * app.divergence(b.s, t(b.x).detach(), T) + (1 - ALPHA) * app.task(b.s, b.y)
        assert b.loss == pytest.approx(want.item(), rel=1e-5) and 0 < (b.y * (1 - b.y)).max()


def test_cutmix_teacher_sees_the_mixed_inputs():
    student, teacher = pair('image')
    t = copy.deepcopy(teacher.model).eval()
    for b in watched(student, [CutMix(), KD(teacher, T=T, alpha=ALPHA)], lr=0.01):
        task = b.lam.item() * ce(b.s, b.y).mean() + (1 - b.lam.item()) * ce(b.s, b.y1).mean()
        assert b.loss == pytest.approx(
            (ALPHA * kl(b.s, t(b.x)) + (1 - ALPHA) * task).item(), rel=1e-5
        )


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_a_loss_that_reads_labels_is_mixed_as_the_labels_are(mix):
    student, teacher = toy() if mix is MixUp else pair('image')
    t = teacher if mix is MixUp else copy.deepcopy(teacher.model).eval()
    for b in watched(student, [mix(), KD(teacher, dkd(beta=2.0, T=T))], lr=0.01):
        each = [
            losses.dkd(b.s, t(b.x).detach(), y, beta=2.0, T=T, reduction='none')
            for y in (b.y, b.y1)
        ]
        want = (b.lam * ce(b.s, b.y) + (1 - b.lam) * ce(b.s, b.y1)).mean() + (
            b.lam * each[0] + (1 - b.lam) * each[1]
        ).mean()
        assert b.loss == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_in_validation_nothing_is_mixed(mix):
    "The callbacks still hold the second labels of the last training batch"
    student, teacher = toy() if mix is MixUp else pair('image')
    student.fit(1, 0.01, cbs=[mix(), KD(teacher, dkd(beta=2.0, T=T))])
    out, n = [], 0
    with torch.no_grad():
        for xb, yb in student.dls.valid:
            s, t = student.model.eval()(xb), getattr(teacher, 'model', teacher).eval()(xb)
            out.append(losses.dkd(s, t, yb, beta=2.0, T=T).item() * len(yb))
            n += len(yb)
    assert student.recorder.values[-1][
        student.recorder.metric_names.index('dkd_loss') - 1
    ] == pytest.approx(sum(out) / n, rel=1e-4)


def test_mixup_needs_one_value_per_sample_of_your_own_loss():
    student, teacher = toy()
    with pytest.raises(DistillError, match='reads labels, and MixUp gives each sample two of them'):
        student.fit(1, cbs=[MixUp(), KD(teacher, loss=lambda s, t, y: F.cross_entropy(s, y))])
    student, teacher = toy()
    student.fit(
        1, cbs=[MixUp(), KD(teacher, loss=lambda s, t: (s - t).pow(2).mean())]
    )  # reads none


def test_your_own_loss_of_three_inputs_is_the_whole_loss_unless_alpha_mixes():
    def mine(s, t, *yb):
        return (s - t).abs().mean() + ce(s, yb[0]).max()

    student, teacher = toy()
    for b in watched(student, [KD(teacher, loss=mine)]):
        assert b.loss == pytest.approx(mine(b.s, teacher(b.x), b.y).item(), rel=1e-5)
    for b in watched(student, [KD(teacher, loss=mine, alpha=0.3)]):
        assert b.loss == pytest.approx(
            (0.3 * mine(b.s, teacher(b.x), b.y) + 0.7 * ce(b.s, b.y).mean()).item(), rel=1e-5
        )


SCHEDULES = [
    (
        dict(T=SchedCos(8, 2), alpha=SchedLin(1.0, 0.2)),
        lambda p: 2 + 3 * (1 + math.cos(math.pi * p)),
        lambda p: 1 - 0.8 * p,
    ),
    (
        dict(T=('cosine', 8, 2), alpha='linear'),
        lambda p: 2 + 3 * (1 + math.cos(math.pi * p)),
        lambda p: 1 - p,
    ),
    (
        dict(T=('linear', 4, 1), alpha=('warmup', 0.5)),
        lambda p: 4 - 3 * p,
        lambda p: 0.5 * min(p / 0.1, 1),
    ),
    (dict(T=2, alpha=lambda p: p**2), lambda p: 2.0, lambda p: p**2),
]


@pytest.mark.parametrize(
    'options,T_at,alpha_at', SCHEDULES, ids=['fastai', 'tuples', 'warmup', 'function']
)
def test_temperature_and_alpha_follow_their_schedules(options, T_at, alpha_at):
    student, teacher = toy()
    seen = watched(student, [KD(teacher, **options)], epochs=3)
    assert seen[0].pct == 0 and len({b.pct for b in seen}) == 12
    for b in seen:
        a = alpha_at(b.pct)
        want = a * kl(b.s, teacher(b.x), T_at(b.pct)) + (1 - a) * ce(b.s, b.y).mean()
        assert b.loss == pytest.approx(want.item(), rel=1e-5)


def test_a_terms_weight_moves_and_stops_as_said():
    student, teacher = toy()
    recipe = Term(losses.kl, weight=('linear', 2.0, 0.0), T=T) + Term(
        losses.mse, weight=0.1, stop_at=0.5
    )
    for b in watched(student, [KD(teacher, recipe)], epochs=2):
        t = teacher(b.x)
        want = (
            ce(b.s, b.y).mean()
            + 2 * (1 - b.pct) * kl(b.s, t)
            + (b.pct < 0.5) * 0.1 * (b.s - t).pow(2).sum(1).mean()
        )
        assert b.loss == pytest.approx(want.item(), rel=1e-5)


def recorded(student, fit, **options):
    "At which share of the training each batch computed its weight"
    seen = []

    def alpha(p):
        if student.training and (not seen or p != seen[-1]):
            seen.append(p)
        return 0.5

    fit(KD(apps.mlp(16), alpha=alpha, check=False, **options))
    return seen


@pytest.mark.parametrize(
    'fit',
    [
        lambda s, cb: s.fine_tune(3, 0.01, freeze_epochs=2, cbs=cb),
        lambda s, cb: s.fine_tune(3, 0.01, 2, cbs=[cb]),
        lambda s, cb: (s.add_cb(cb), s.fine_tune(3, freeze_epochs=2)),
    ],
    ids=['named', 'by position', 'on the learner'],
)
def test_schedules_span_the_whole_fine_tune(fit):
    student, _ = toy()
    seen = recorded(student, partial(fit, student))
    assert (
        seen == pytest.approx([i / 20 for i in range(21)][: len(seen)]) and len(seen) >= 20
    )  # 5 epochs of 4 batches
    assert not hasattr(student, 'fine_tune_span')


def test_schedules_run_through_each_fit_where_that_is_asked():
    student, _ = toy()
    seen = recorded(student, lambda cb: student.fine_tune(1, 0.01, cbs=cb), span='fit')
    assert [p for p in seen if p < 1] == pytest.approx([0, 0.25, 0.5, 0.75] * 2)
    student, _ = toy()
    twice = recorded(
        student, lambda cb: [student.fit(1, 0.01, cbs=cb) for _ in range(2)]
    )  # two fits by hand are two trainings
    assert [p for p in twice if p < 1] == pytest.approx([0, 0.25, 0.5, 0.75] * 2)


def test_a_term_that_stops_halfway_stops_halfway_through_a_fine_tune():
    student, teacher = toy()
    counted = []

    class Count(Callback):
        order = 6

        def after_loss(self):
            if self.training:
                counted.append('mse' in cb.parts)

    cb = KD(teacher, kd() + Term(losses.mse, weight=0.1, stop_at=0.5))
    student.fine_tune(3, 0.01, cbs=[cb, Count()])
    assert counted == [True] * 8 + [False] * 8


def test_a_fine_tune_that_fails_leaves_no_span_behind():
    student, teacher = toy()
    with pytest.raises(KeyboardInterrupt):
        student.fine_tune(1, 0.01, cbs=[KD(teacher), Interrupt()])
    assert not hasattr(student, 'fine_tune_span') and not hasattr(student, 'knowledge_distillation')


def test_a_fit_builds_the_teacher_once(monkeypatch):
    student, teacher = pair('image')
    built = []

    def count(self, *args, init=Teacher.__init__, **kwargs):
        built.append(args[0])
        init(self, *args, **kwargs)

    monkeypatch.setattr(Teacher, '__init__', count)
    student.fit(1, 0.01, cbs=KD(teacher, kd(), check=False))
    assert built == [teacher.model]
    student.fit(
        1, 0.01, cbs=KD(teacher)
    )  # the check makes variations of it, for a layer or another normalization
    assert [o for o in built if not isinstance(o, Teacher)] == [teacher.model] * 2


def broken(teacher, at, value):
    "A teacher whose outputs hold one such value in call number `at`"
    calls = []

    def fn(x):
        calls.append(1)
        out = teacher(x)
        if len(calls) == at:
            out[0, 0] = value
        return out

    return fn


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('at', [1, 3])
def test_a_teacher_that_predicts_nan_stops_the_fit_before_the_student_learns_it(value, at):
    student, teacher = toy()
    before = weights(student)
    with pytest.raises(
        DistillError,
        match=rf"teacher's outputs are nan or infinite .training, epoch 0, up to batch {at - 1}",
    ):
        student.fit(1, 0.1, cbs=KD(broken(teacher, at, value), kd(), check=False))
    assert weights(student).isfinite().all() and torch.equal(before, weights(student)) is (at == 1)
    assert len(student.metrics) == 1


def test_features_that_are_nan_stop_the_fit_too():
    student, teacher = toy()
    with torch.no_grad():
        teacher[2].bias[0] = float('nan')
    with pytest.raises(DistillError, match='outputs are nan'):
        student.fit(1, 0.1, cbs=KD(teacher, Term(losses.at, layers={'2': '2'}), check=False))


def test_classes_that_are_switched_off_are_no_reason_to_stop():
    student, teacher = toy()
    off = torch.tensor([0.0, 0.0, 0.0, float('-inf')])
    student.fit(1, 0.1, cbs=KD(lambda x: teacher(x) + off, check=False))
    assert weights(student).isfinite().all()


def test_a_sample_whose_classes_are_all_switched_off_stops_the_fit():
    student, teacher = toy()
    before = weights(student)
    with pytest.raises(
        DistillError, match='outputs are nan or infinite .training, epoch 0, up to batch 0'
    ):
        student.fit(
            1,
            0.1,
            cbs=KD(
                lambda x: teacher(x).index_fill(0, torch.tensor([3]), float('-inf')), check=False
            ),
        )
    assert torch.equal(before, weights(student))


def test_looking_for_nan_does_not_wait_for_a_gpu():
    "On the meta device nothing can be looked at: a look is an error there"
    student, teacher = toy()
    outputs = Outputs(torch.empty(16, 4, device='meta'), {'2': torch.empty(16, 6, device='meta')})

    class Look(Callback):
        order = 6

        def after_loss(self):
            if self.train_iter != 1:
                return
            check = FiniteCheck(stored=False)
            check.start_phase(self.learn, {'': Task('softmax')})
            check.found = torch.zeros((), dtype=torch.bool, device='meta')
            check.add(outputs)
            with pytest.raises(RuntimeError):
                check.enforce()
            self.looked = True

    look = Look()
    student.fit(1, 0.1, cbs=[KD(teacher), look])
    assert look.looked


def test_an_ensemble_teaches_its_mean_probabilities():
    student, teacher = toy()
    other = apps.mlp(5)
    for b in watched(student, [KD([teacher, other], T=1.0, alpha=1.0, check=False)]):
        t = torch.stack([m(b.x).softmax(1) for m in (teacher, other)]).mean(0).log()
        assert b.loss == pytest.approx(kl(b.s, t, 1.0).item(), rel=1e-4)


def test_a_teacher_comes_as_learner_file_module_or_function(tmp_path):
    _, teacher = pair('image')
    teacher.export(tmp_path / 'teacher.pkl')
    module = teacher.model.eval()

    def run(t):
        learn, _ = pair('image')
        learn.fit(1, 0.01, cbs=KD(t))
        return weights(learn)

    want = run(module)
    with pytest.warns(
        DistillWarning, match='teacher.pkl is a pickle, and loading it runs the code in it'
    ):
        from_file = run(tmp_path / 'teacher.pkl')
    for got in (run(teacher), from_file, run(lambda x: module(x)), run([module, module])):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'recipe', [soft_labels(T=2.0), kd(T=2.0, alpha=1.0)], ids=['soft_labels', 'alpha=1']
)
def test_batches_without_labels_distil(recipe):
    student, teacher = toy(labels=False)
    before = weights(student)
    for b in watched(student, [KD(teacher, recipe)]):
        assert b.loss == pytest.approx(kl(b.s, teacher(b.x), 2.0).item(), rel=1e-5)
    labeled, _ = toy()
    labeled.fit(1, 0.1, cbs=KD(teacher, recipe))
    assert not torch.equal(before, weights(student))
    torch.testing.assert_close(weights(student), weights(labeled), rtol=1e-6, atol=1e-7)


def test_batches_without_labels_accumulate():
    runs = []
    for bs, cbs in ((16, []), (4, [GradientAccumulation(16)])):
        student, teacher = toy(bs=bs, labels=False)
        student.fit(1, 0.1, cbs=[KD(teacher, soft_labels(T=2.0)), *cbs])
        runs.append([weights(student)])
    assert close(*runs)


def test_batches_without_labels_are_refused_where_labels_count():
    student, teacher = toy(labels=False)
    with pytest.raises(
        DistillError, match='no labels, but the recipe gives the task loss a weight: use alpha=1'
    ):
        student.fit(1, cbs=KD(teacher, kd()))


def test_a_share_is_the_same_in_a_fit_as_by_hand():
    student, teacher = toy()
    cb = KD(
        teacher,
        Term(losses.kl, weight=0.5, T=T)
        + Term(losses.dist, grad_ratio=2.0)
        + hint(None, grad_ratio=0.3),
    )

    class First(Callback):
        order = 8

        def after_backward(self):
            self.got, self.batch = student.model[4].weight.grad.clone(), (self.x, self.y)
            raise CancelFitException

    first = First()
    student.fit(1, cbs=[cb, first])
    x, y = first.batch
    s, t = student.model(x), teacher(x).detach()
    g = [
        torch.autograd.grad(p, s, retain_graph=True)[0]
        for p in (F.cross_entropy(s, y) + 0.5 * kl(s, t), losses.dist(s, t))
    ]
    (total,) = torch.autograd.grad(
        s, student.model[4].weight, (g[0] + 2 * g[0].norm() / g[1].norm() * g[1]) / 3.3
    )
    torch.testing.assert_close(first.got, total, rtol=1e-4, atol=1e-6)
    assert cb.distiller.ratios['hint'].measured == 1


def test_both_doors_give_the_same_loss_and_gradients():
    student, teacher = toy()
    recipe = kd(T, ALPHA) + hint(weight=0.5)
    cb, seen = KD(teacher, recipe), []

    class First(Callback):
        order = 8

        def after_backward(self):
            ps = [*student.model.parameters(), *cb.distiller.own_parameters()]
            seen.extend([self.learn.loss.item(), *[p.grad.clone() for p in ps], self.x, self.y])
            raise CancelFitException

    student.fit(1, cbs=[cb, First()])
    loss, *grads, x, y = seen
    student.model.zero_grad()
    d = Distiller(student.model, teacher, recipe, example=x)
    d.links.load_state_dict(cb.distiller.links.state_dict())
    out = d(x, y)
    out.total.backward()
    assert out.total.item() == pytest.approx(loss, rel=1e-6)
    assert close([p.grad for p in [*student.model.parameters(), *d.own_parameters()]], grads)


# other callbacks


@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
@pytest.mark.filterwarnings('ignore:.*CUDA is not available:UserWarning')
def test_half_precision_does_nothing_on_the_cpu(half):
    runs = []
    for on in (False, True):
        student, teacher = toy()
        if on:
            getattr(student, half)()
        cb = KD(teacher, kd() + hint())
        student.fit(2, 0.1, cbs=cb)
        runs.append([weights(student), *projectors(cb)])
    assert close(*runs, tol=0)


class CpuScaler(MixedPrecision):
    "fastai's mixed precision with the scaler of the CPU, where all is float32"

    def before_fit(self):
        self.autocast, self.learn.scaler, self.scales = (
            torch.autocast('cpu', enabled=False),
            torch.amp.GradScaler('cpu', **self.kwargs),
            L(),
        )


def test_projectors_take_unscaled_steps_with_a_gradient_scaler():
    runs = []
    for scaled in (False, True):
        student, teacher = toy()
        cb = KD(teacher, kd() + hint())
        student.fit(2, 0.1, cbs=[cb, *([CpuScaler(init_scale=4096.0)] if scaled else [])])
        runs.append([weights(student), *projectors(cb)])
    assert close(*runs, tol=1e-6)


def test_under_autocast_features_of_half_precision_pass():
    runs = []
    for dtype in (None, torch.bfloat16):
        student, teacher = pair('image')

        class Half(CpuScaler):
            def before_fit(self, dtype=dtype):
                super().before_fit()
                self.autocast = torch.autocast('cpu', dtype=dtype, enabled=dtype is not None)

        set_seed(3)
        recipe = (
            kd()
            + Term(losses.hint, layers={'0.1': '0.1'}, projector='conv')
            + Term(losses.at, layers={'0.1': '0.1'})
        )
        runs.append(
            [b.loss for b in watched(student, [Half(enabled=False), KD(teacher, recipe)], lr=0.001)]
        )
    assert runs[1] == pytest.approx(runs[0], rel=0.05) and runs[1] != runs[0]


def test_projectors_skip_the_step_that_the_scaler_skips():
    student, teacher = toy()
    cb, seen = KD(teacher, kd() + hint()), []

    class Overflow(Callback):
        order = 9.5

        def before_backward(self):
            if self.train_iter == 1:
                self.learn.loss_grad = self.learn.loss_grad * float('inf')

        def after_batch(self):
            seen.append([weights(student), *projectors(cb)])

    student.fit(1, 0.1, cbs=[cb, CpuScaler(init_scale=4096.0), Overflow()])
    assert close(seen[0], seen[1], tol=0) and not close(seen[1], seen[2], tol=0)
    assert all(o.isfinite().all() for o in seen[-1])


def test_projectors_whose_gradient_overflows_skip_their_own_step_alone():
    student, teacher = toy()
    cb, students, links = KD(teacher, kd() + hint()), [], []

    class Overflow(Callback):
        def after_backward(self):
            if self.train_iter == 1:
                for p in cb.distiller.own_parameters():
                    p.grad.fill_(float('inf'))

        def after_batch(self):
            students.append(weights(student))
            links.append([*projectors(cb)])

    student.fit(1, 0.1, cbs=[cb, CpuScaler(init_scale=4096.0), Overflow()])
    assert close(links[0], links[1], tol=0)
    assert not close([students[0]], [students[1]], tol=0)
    assert not close(links[1], links[2], tol=0)
    assert all(o.isfinite().all() for o in links[-1])


def test_projectors_skip_the_step_that_a_callback_cancels():
    student, teacher = toy()
    cb, seen = KD(teacher, kd() + hint()), []

    class Skip(Callback):
        def before_step(self):
            if self.train_iter == 1:
                raise CancelStepException

        def after_batch(self):
            seen.append([weights(student), *projectors(cb)])

    student.fit(1, 0.1, cbs=[cb, Skip()])
    assert close(seen[0], seen[1], tol=0)  # the second batch was cancelled
    assert not close(seen[1][1:], seen[2][1:], tol=0)  # the third one was not


def test_four_batches_of_4_accumulated_are_one_of_16():
    runs = []
    for bs, cbs in ((16, []), (4, [GradientAccumulation(16)])):
        student, teacher = toy(bs=bs)
        cb = KD(teacher, kd() + hint())
        student.fit(2, 0.1, cbs=[cb, *cbs])
        runs.append([weights(student), *projectors(cb)])
    assert close(*runs, tol=1e-6)


def test_gradient_clip_clips_the_whole_gradient():
    norms = []

    class Norm(Callback):
        order = 12  # after GradientClip

        def before_step(self):
            norms.append(
                torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).norm().item()
            )

    student, teacher = toy()
    with pytest.warns(DistillWarning, match='hint has .*% of the gradient of the first batch'):
        student.fit(1, 0.1, cbs=[KD(teacher, kd() + hint(100.0)), GradientClip(0.1), Norm()])
    assert norms == pytest.approx([0.1] * 4, rel=1e-4)


def test_lr_find_leaves_projectors_as_they_were_and_a_fit_goes_on(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = KD(teacher, kd() + hint())
    student.add_cb(cb)
    student.fit(1, 0.01)
    before = [weights(student), *projectors(cb)]
    student.lr_find(num_it=12, show_plot=False)
    assert close([weights(student), *projectors(cb)], before, tol=0)
    student.fit(1, 0.01)
    assert not close(projectors(cb), before[1:], tol=0)


def test_lr_find_sees_the_whole_loss(tmp_path):
    student, teacher = toy(path=tmp_path)
    student.add_cb(KD(teacher, kd() + hint(50.0)))
    student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    alone, _ = toy(path=tmp_path)
    alone.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert student.recorder.losses[0] > 2 * alone.recorder.losses[0]


def test_freeze_trains_the_head_alone_and_unfreeze_all():
    student, teacher = pair('image')
    student.freeze()
    body, head = [
        [p.detach().clone() for n, p in student.model[i].named_parameters() if 'weight' in n]
        for i in (0, 1)
    ]
    now = lambda i: [p.detach() for n, p in student.model[i].named_parameters() if 'weight' in n]
    cb = KD(teacher, kd() + Term(losses.at, layers={'0.1': '0.1'}))
    student.fit(1, 0.01, cbs=cb)
    assert [a.dim() for a, b in zip(body, now(0)) if not torch.equal(a, b)] == [
        1,
        1,
    ]  # batch-norm alone, as fastai has it
    assert not close(head, now(1), tol=0)
    student.unfreeze()
    student.fit(1, 0.01, cbs=cb)
    assert not any(torch.equal(a, b) for a, b in zip(body, now(0)))


def test_fine_tune_keeps_its_projectors_from_one_fit_to_the_next():
    student, teacher = pair('image')
    cb, starts = KD(teacher, kd() + Term(losses.hint, layers={'0.1': '0.1'})), []

    class Look(Callback):
        def before_batch(self):
            if self.train_iter == 1 and self.training and not starts:
                starts.append(cb.distiller.links['hint'][0])

    student.fine_tune(1, 0.01, cbs=[cb, Look()])
    assert cb.distiller.links['hint'][0] is starts[0] and not student.cbs.filter(lambda c: c is cb)


def test_save_model_follows_kd_loss_and_keeps_the_optimizer(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    cb = KD(teacher, kd() + hint())
    student.fit(3, 0.01, cbs=[cb, SaveModelCallback(monitor='kd_loss', with_opt=True)])
    saved = torch.load(tmp_path / 'models' / 'model.pth', weights_only=False)
    assert saved['model'].keys() == student.model.state_dict().keys()
    student.load('model', with_opt=True)  # a warning would be an error here
    student.fit(1, 0.01, cbs=cb)


def test_early_stopping_can_watch_kd_loss():
    student, teacher = toy()
    student.fit(
        9, 0.0, cbs=[KD(teacher, kd()), EarlyStoppingCallback(monitor='kd_loss', patience=2)]
    )
    assert len(student.recorder.values) == 3


def test_csv_logger_has_the_column(tmp_path):
    student, teacher = toy(path=tmp_path)
    student.fit(2, 0.1, cbs=[KD(teacher, kd() + hint()), CSVLogger()])
    head, *lines = csv.reader((tmp_path / 'history.csv').read_text().splitlines())
    assert (
        head
        == [
            'epoch',
            'train_loss',
            'valid_loss',
            'accuracy',
            'task_loss',
            'kd_loss',
            'hint_loss',
            'time',
        ]
        and len(lines) == 2
    )
    assert all(float(l[4]) > 0 for l in lines)


def test_train_metrics_give_the_parts_of_training_too():
    student, teacher = toy()
    student.recorder.train_metrics = True
    seen = watched(student, [KD(teacher, T=T, alpha=ALPHA)])
    row = dict(zip(student.recorder.metric_names[1:], student.recorder.values[-1]))
    assert row['train_kd_loss'] == pytest.approx(
        np.mean([kl(b.s, teacher(b.x)).item() for b in seen]), rel=1e-5
    )
    assert row['valid_kd_loss'] > 0 and 'train_accuracy' in row


def test_fetching_predictions_in_mid_fit_changes_nothing():
    runs = []
    for cbs in ([], [FetchPredsCallback()]):
        student, teacher = toy()
        student.fit(2, 0.1, cbs=[KD(teacher, kd() + hint()), *cbs])
        runs.append(
            (weights(student), student.recorder.metric_names, *map(list, student.recorder.values))
        )
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]


class TotalLosses(Callback):
    "The total loss of each training batch"

    order = 5.5  # after distillation

    def __init__(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            self.seen.append(self.learn.loss_grad.item())


INNER_CALLS = dict(
    validate=lambda learn: learn.validate(),
    train=lambda learn: learn.validate(0),
    get_preds=lambda learn: learn.get_preds(),
    tta=lambda learn: learn.tta(n=1),
)


@pytest.mark.parametrize('order', [0, 55], ids=['before the Recorder', 'after it'])
@pytest.mark.parametrize('call', INNER_CALLS.values(), ids=INNER_CALLS)
def test_a_callback_that_validates_or_predicts_in_mid_fit_does_not_end_the_distillation(
    call, order
):
    ends = []
    for cbs in ([], [CallsInside(call, 'after_epoch', order)]):
        student, teacher = toy()
        student.dls.valid.dataset = Rows(student.dls.valid.dataset)
        cb = KD(teacher, kd() + hint())
        totals = TotalLosses()
        student.fit(3, 0.1, cbs=[cb, totals, *cbs])
        ends.append((weights(student), totals.seen, projectors(cb)))
        assert not cb.in_fit
        assert not any(m.name.startswith('kd') for m in student.metrics)
        assert not any(m._forward_hooks for m in student.model.modules())
    (wa, la, pa), (wb, lb, pb) = ends
    assert la == lb
    assert torch.equal(wa, wb)
    assert all(map(torch.equal, pa, pb))


def test_a_teacher_that_can_not_be_loaded_is_named_in_each_fit():
    student, _ = toy()
    student.add_cb(KD('nowhere.pkl', kd(), check=False))
    for _ in range(2):
        with pytest.raises(DistillError, match="There is no file 'nowhere.pkl'"):
            student.fit(1, 0.1)


def test_data_without_a_class_of_the_teacher_are_refused_in_each_fit():
    (student, teacher), (other, _) = toy(), toy()
    student.dls.vocab, other.dls.vocab = [*'abcd'], [*'abcx']
    student.add_cb(KD(Teacher(teacher, classes=[*'abcd']), kd(), check=False))
    student.fit(1, 0.1)
    student.dls = other.dls
    for _ in range(2):
        with pytest.raises(DistillError, match="'d'"):
            student.fit(1, 0.1)


OTHERS = dict(
    short=[ShortEpochCallback(0.5)],
    plateau=[ReduceLROnPlateau(monitor='kd_loss', patience=1)],
    nan=[TerminateOnNaNCallback()],
    graph=[ProgressCallback(), ShowGraphCallback()],
)


@pytest.mark.parametrize('cbs', OTHERS.values(), ids=OTHERS)
def test_other_callbacks_of_fastai_go_on_working(cbs):
    student, teacher = toy()
    student.fit(3, 0.1, cbs=[KD(teacher, kd() + hint()), *cbs])
    assert len(student.recorder.values) == 3
    plt.close('all')


def test_a_fit_may_begin_later():
    student, teacher = toy()
    seen = watched(student, [KD(teacher, alpha='linear'), SkipToEpoch(1)], epochs=2)
    assert [b.pct for b in seen] == pytest.approx([0.5, 0.625, 0.75, 0.875])


OPTS = [
    Adam,
    Lamb,
    ranger,
    partial(OptimWrapper, opt=torch.optim.AdamW),
    partial(SGD, mom=0.9, wd=0.1),
]


@pytest.mark.parametrize('opt_func', OPTS, ids=['Adam', 'Lamb', 'ranger', 'AdamW', 'SGD'])
def test_projectors_are_trained_by_the_students_kind_of_optimizer(opt_func):
    student, teacher = toy(opt_func=opt_func)
    cb = KD(teacher, kd() + hint())
    student.fit_one_cycle(1, 0.01, cbs=cb)
    assert cb.state.optimizer.optimizer.hypers[0]['lr'] == pytest.approx(
        student.opt.hypers[-1]['lr']
    ) and type(cb.state.optimizer.optimizer) is type(student.opt)
    before = projectors(cb)
    student.fit_one_cycle(1, 0.01, cbs=cb)
    assert not any(map(torch.equal, before, projectors(cb)))


def first_step(lr=0.1, wd=0.0, **kwargs):
    "Projectors before and after the first step of a fit"
    student, teacher = toy(**kwargs)
    cb, seen = KD(teacher, kd() + hint()), []

    class Steps(Callback):
        def before_batch(self):
            seen.append(projectors(cb))

    student.fit(1, lr, wd=wd, cbs=[cb, Steps()])
    return [o for o in seen if o][:2]  # there are none before the fit, where the teacher is checked


def test_projectors_have_the_weight_decay_of_the_fit():
    (start, plain), (_, decayed) = first_step(wd=0.0), first_step(wd=0.5)
    for a, b, w in zip(decayed, plain, start):
        torch.testing.assert_close(a - b, -0.1 * 0.5 * w, rtol=1e-3, atol=1e-6)


def test_projectors_have_the_rate_of_the_students_last_layers():
    halves = lambda m: [[*m[:2].parameters()], [*m[2:].parameters()]]
    for a, b in zip(first_step(slice(0.001, 0.1), splitter=halves)[1], first_step(0.1)[1]):
        torch.testing.assert_close(a, b)


def test_an_optimizer_that_is_built_already_leaves_projectors_to_adam():
    student, teacher = toy()
    student.opt_func = OptimWrapper(opt=torch.optim.SGD(student.model.parameters(), lr=0.1))
    cb = KD(teacher, kd() + hint())
    student.fit(1, 0.1, cbs=cb)
    assert cb.state.optimizer.optimizer.hypers[0]['lr'] == 0.1


def test_channels_last_changes_nothing():
    def run(*cbs):
        student, teacher = pair('image')
        set_seed(3)
        recipe = (
            kd() + Term(losses.hint, layers={'0.1': '0.1'}) + Term(losses.at, layers={'0.0': '0.0'})
        )
        student.fit(1, 0.01, cbs=[KD(teacher, recipe), *cbs])
        return [weights(student)]

    assert close(run(), run(ChannelsLast()), tol=1e-3)


def test_a_model_copied_in_mid_fit_is_free_of_distillation():
    student, teacher = toy()
    copies = []

    class Ema(Callback):
        order = 5.5

        def before_fit(self):
            copies.append(copy.deepcopy(self.learn.model))

        def after_loss(self):
            copies.append(copy.deepcopy(self.learn.model))

    cb = KD(teacher, kd() + hint())
    student.fit(1, 0.1, cbs=[cb, Ema()])
    x, _ = apps.rows()
    assert len(copies) == 7 and all(
        m(x).shape == (96, 4) for m in copies
    )  # 1 + 4 training batches + 2 of validation
    assert not cb.distiller.ready or cb.taps.taps is None


def test_an_averaged_model_may_stand_in_for_validation():
    student, teacher = toy()
    other = copy.deepcopy(student.model)

    class Swap(Callback):
        order = 11

        def before_validate(self):
            self.own, self.learn.model = self.learn.model, other.eval()

        def after_validate(self):
            self.learn.model = self.own

    cb = KD(teacher, kd(T) + hint())
    student.fit(1, 0.5, cbs=[cb, Swap()])
    x, _ = apps.rows()
    row = dict(zip(student.recorder.metric_names[1:], student.recorder.values[-1]))
    assert row['kd_loss'] == pytest.approx(kl(other(x[64:]), teacher(x[64:])).item(), rel=1e-5)
    assert (
        not any(m._forward_hooks for m in [*other.modules(), *student.model.modules()])
        and student.model is not other
    )


# inference


@pytest.mark.filterwarnings(
    'ignore:__array__ implementation:DeprecationWarning'
)  # of a picture that is shown
def test_a_callback_that_stays_changes_no_prediction(monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a: None)
    student, teacher = pair('image')
    start = copy.deepcopy(student.model.state_dict())

    def look():
        student.model.load_state_dict(start)
        set_seed(4)
        student.show_results(max_n=2)
        out = [
            *student.validate(),
            *student.get_preds(),
            *student.get_preds(with_loss=True),
            *student.tta(n=2),
            *student.predict(0)[1:],
            Interpretation.from_learner(student).losses,
        ]
        plt.close('all')
        return (
            [torch.as_tensor(o) for o in out],
            student.summary().split('Optimizer')[0],
            list(student.metrics),
        )

    want = look()
    student.add_cb(KD(teacher, kd() + Term(losses.hint, layers={'0.1': '0.1'})))

    def same_as_before(got):
        return all(map(torch.equal, got[0], want[0])) and got[1:] == want[1:]

    assert same_as_before(look())
    student.fit(1, 0.01)
    assert same_as_before(look())
    with pytest.raises(KeyboardInterrupt):
        student.fit(1, 0.01, cbs=Interrupt())
    assert same_as_before(look())
    assert not any(m._forward_hooks for m in student.model.modules())


class Interrupt(Callback):
    def before_step(self):
        if self.train_iter == 1:
            raise KeyboardInterrupt


def test_a_fit_without_its_progress_bar_distils_too():
    runs = []
    for quietly in (False, True):
        student, teacher = toy()
        with student.no_mbar() if quietly else nullcontext():
            student.fit(1, 0.1, cbs=KD(teacher))
        runs.append((weights(student), student.recorder.metric_names))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


LOAD = """
import sys, warnings
warnings.simplefilter('ignore')
sys.modules['fastdistill'] = None # as if it were not installed
sys.path.insert(0, {tests!r})
import torch
from fastai.vision.all import load_learner
for file in {files!r}:
    learn = load_learner(file)
    print(*map(float, learn.predict(0)[2]), *[type(c).__name__ for c in learn.cbs])
learn = load_learner({of_targets!r})
with learn.no_bar():
    print(learn.dls.vocab, len(learn.predict((torch.zeros(4),))[2]))
"""


def student_with_targets(path):
    "A student whose DataLoaders hold a teacher's outputs beside the labels"
    columns = [torch.zeros(4)] * 8, ['a', 'b'] * 4, [np.zeros(2, 'f4')] * 8
    blocks = TransformBlock, CategoryBlock, fastdistill.fastai.TeacherBlock
    dls = DataBlock.from_columns(blocks).dataloaders(columns, bs=2)
    (learn,) = apps.quiet(Learner(dls, nn.Linear(4, 2), path=path))
    learn.fit(1)
    return learn


def test_an_exported_student_loads_where_fastdistill_is_not_installed(tmp_path):
    recipe = kd() + Term(losses.hint, layers={'0.1': '0.1'})

    def distilled(student, teacher):
        student.distill(teacher, 1, 0.01, recipe)

    def interrupted(student, teacher):
        student.add_cb(KD(teacher, recipe))
        with pytest.raises(KeyboardInterrupt):
            student.fit(1, 0.01, cbs=Interrupt())

    wants = {}
    for fit in (lambda student, _: student.fit(1, 0.01), distilled, interrupted):
        student, teacher = pair('image')
        fit(student, teacher)
        file = tmp_path / f'{fit.__name__}.pkl'
        student.export(file)
        wants[str(file)] = student.predict(0)[2]
        assert b'fastdistill' not in file.read_bytes()
    sizes = [Path(f).stat().st_size for f in wants]
    assert max(sizes) < sizes[0] + 2000  # neither teacher nor projector inside
    student_with_targets(tmp_path).export('targets.pkl')
    code = LOAD.format(
        tests=str(TESTS), files=list(wants), of_targets=str(tmp_path / 'targets.pkl')
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    *lines, of_targets = r.stdout.splitlines()
    assert of_targets == "['a', 'b'] 2"
    for line, want in zip(lines, wants.values(), strict=True):
        torch.testing.assert_close(
            torch.tensor(list(map(float, line.split()[:3]))), want, rtol=1e-5, atol=1e-6
        )
        assert 'KnowledgeDistillation' not in line


def test_a_copied_learner_is_free_of_distillation():
    student, teacher = toy()
    student.add_cb(KD(teacher, kd() + hint()))
    student.fit(1, 0.1)
    other = copy.deepcopy(student)
    other.fit(1, 0.1)
    assert other.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert not [c for c in other.cbs if isinstance(c, KD)]


# before, after, again


def test_after_an_interrupt_the_next_fit_is_a_fit_like_any_other():
    student, teacher = toy()
    cb = KD(teacher, kd() + hint())
    with pytest.raises(KeyboardInterrupt):
        student.fit(1, 0.1, cbs=[cb, Interrupt()])
    assert not any(m._forward_hooks for m in student.model.modules()) and len(student.metrics) == 1
    links = cb.distiller.links['hint'][0]
    for b in watched(student, [cb]):
        assert b.loss > 0
    assert cb.distiller.links['hint'][0] is links  # its projectors go on
    student.fit(1, 0.1)
    assert student.recorder.metric_names == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'time',
    ]


@pytest.mark.parametrize('how', ['a fit', 'an error'])
def test_the_teacher_leaves_its_evaluation_mode_with_the_fit(how):
    student, teacher = toy()
    teacher.train()
    seen = []

    class Watching(Callback):
        def after_pred(self):
            seen.append(teacher.training)
            if how == 'an error':
                raise ValueError('stop')

    with pytest.raises(ValueError) if how == 'an error' else nullcontext():
        student.fit(1, 0.1, cbs=[KD(teacher), Watching()])
    assert not any(seen) and teacher.training


def test_one_callback_can_teach_another_student():
    cb = None
    for seed in (0, 1):
        student, teacher = toy(seed=seed)
        cb = cb or KD(teacher, kd() + hint())
        student.fit(1, 0.1, cbs=cb)
        assert cb.distiller.student is student.model


def test_new_data_are_looked_at_anew():
    student, right = pair('image')
    cb = KD(right, kd(T=1.0, alpha=1.0) + Term(losses.hint, layers={'0.1': '0.1'}))
    student.fit(1, 0.01, cbs=cb)
    links = cb.distiller.links
    student.dls = apps.image(batch_tfms=Normalize.from_stats([0.5] * 3, [0.25] * 3))[0].dls
    x = next(iter(student.dls.valid))[0].as_subclass(torch.Tensor)
    with cb.distiller.teacher:
        before = cb.distiller.teacher(x).logits
    student.fit(1, 0.01, cbs=cb)
    after = cb.distiller.teacher(x).logits
    torch.testing.assert_close(after, right.model.eval()(x * 0.25 + 0.5), rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, after) and cb.distiller.links is links


def test_two_distillations_in_one_learner_are_refused():
    student, teacher = toy()
    with pytest.raises(DistillError, match='Two KnowledgeDistillation callbacks.*list of teachers'):
        student.fit(1, cbs=[KD(teacher), KD(teacher)])
    assert len(student.metrics) == 1


TASKS = [
    (CrossEntropyLossFlat(), Task('softmax', -1)),
    (CrossEntropyLossFlat(axis=1, ignore_index=255), Task('softmax', 1, 255)),
    (nn.CrossEntropyLoss(ignore_index=0), Task('softmax', 1, 0)),
    (F.cross_entropy, Task('softmax', 1)),
    (partial(F.cross_entropy, ignore_index=7), Task('softmax', 1, 7)),
    (LabelSmoothingCrossEntropy(), Task('softmax', 1)),
    (LabelSmoothingCrossEntropyFlat(axis=1), Task('softmax', 1)),
    (FocalLoss(), Task('softmax', 1)),
    (FocalLossFlat(), Task('softmax', -1)),
    (DiceLoss(), Task('softmax', 1)),
    (BCEWithLogitsLossFlat(), Task('sigmoid', -1)),
    (nn.BCEWithLogitsLoss(), Task('sigmoid', 1)),
    (MSELossFlat(), Task('regression', -1)),
    (L1LossFlat(), Task('regression', -1)),
    (nn.HuberLoss(), Task('regression', 1)),
    (F.mse_loss, Task('regression', 1)),
]


@pytest.mark.parametrize(
    'loss_func,task', TASKS, ids=lambda o: getattr(o, '__name__', type(o).__name__)
)
def test_what_a_model_predicts_is_read_off_its_loss(loss_func, task):
    assert task_of(loss_func) == task


def test_an_unknown_loss_is_asked_for_and_then_believed():
    def mine(s, y):
        return F.cross_entropy(s, y)

    student, teacher = toy(loss_func=mine)
    with pytest.raises(
        DistillError,
        match="The student's loss mine does not show what the student predicts: pass kind='softmax'",
    ):
        student.fit(1, cbs=KD(teacher))
    for b in watched(student, [KD(teacher, T=T, alpha=ALPHA, kind='softmax', axis=1)]):
        assert b.loss == pytest.approx(
            (ALPHA * kl(b.s, teacher(b.x)) + (1 - ALPHA) * mine(b.s, b.y)).item(), rel=1e-5
        )


def test_a_model_that_ends_in_a_sigmoid_is_explained():
    student, teacher = toy(loss_func=BCELossFlat())
    with pytest.raises(DistillError, match='BCELoss takes probabilities.*BCEWithLogitsLossFlat'):
        student.fit(1, cbs=KD(teacher))


@pytest.mark.parametrize(
    'kwargs,says',
    [
        (
            dict(recipe=kd(), T=2),
            r'A recipe and T= cannot be combined: set the options in the recipe',
        ),
        (
            dict(recipe=kd(), loss=F.mse_loss),
            r'A recipe and loss= cannot be combined: set the options in the recipe',
        ),
        (
            dict(loss=F.mse_loss, T=2),
            'T= has no effect with loss=, because your loss gets the unscaled logits',
        ),
        (dict(recipe=dict(T=2)), 'A recipe is made of terms and recipes'),
        (dict(alpha=2), 'between 0 .labels only. and 1 .teacher only.'),
        (dict(T='cosin'), "T='cosin': must be a number, a function"),
        (
            dict(axis=1.0),
            r'axis=1.0: the class axis must be a whole number from 1 to 8, or, counted from the end, from -1 to -8',
        ),
        (dict(axis=0), r'axis=0: .*\(axis 0 is the batch axis\)'),
        (dict(T=0), 'T=0: a temperature must be a number above 0'),
        (dict(recipe=dkd(), kind='soft'), "kind='soft': must be None or 'softmax' or"),
        (
            dict(T=('linear', 4, 0)),
            'T=0 at the end of the training: a temperature must be a number above 0',
        ),
        (dict(output=1.5), 'output=1.5: must be the name or the index'),
        (dict(span='epoch'), "span='epoch': must be 'fine_tune' or 'fit'"),
    ],
    ids=lambda o: '' if isinstance(o, str) else '-'.join(o),
)
def test_contradictions_are_refused_when_the_callback_is_made(kwargs, says):
    with pytest.raises(DistillError, match=says):
        KD(apps.mlp(4), **kwargs)


def test_a_recipe_in_the_place_of_the_teacher_or_of_the_rate_is_refused():
    with pytest.raises(DistillError, match='is not a teacher: the teacher comes first'):
        KD(kd())
    student, teacher = toy()
    for recipe in (kd(), Term(losses.kl)):
        with pytest.raises(
            DistillError,
            match=r'the recipe comes after the learning rate. Write distill.teacher, 1, 1e-3, recipe.',
        ):
            student.distill(teacher, 1, recipe)


def test_a_rate_in_the_place_of_the_number_of_epochs_is_refused():
    student, teacher = toy()
    swapped = 'n_epoch=0.001: must be a whole number.*Did you mean n_epoch=1, lr_max=0.001'
    with pytest.raises(DistillError, match=swapped):
        student.distill(teacher, 1e-3, 1)
    for n in (1.0, '2', -1, True):
        with pytest.raises(DistillError, match=f'n_epoch={n!r}: must be a whole number'):
            student.distill(teacher, n, 1e-3)


@pytest.mark.parametrize(
    'layers,says',
    [
        ({'2': 'two'}, "In the teacher: No layer 'two'"),
        ({'two': '2'}, "In the student: No layer 'two'"),
    ],
)
def test_wrong_layers_are_refused_before_the_first_batch(layers, says):
    student, teacher = toy()

    class Never(Callback):
        def before_train(self):
            raise AssertionError('training began')

    with pytest.raises(DistillError, match=says):
        student.fit(1, cbs=[KD(teacher, Term(losses.hint, layers=layers)), Never()])
    assert len(student.metrics) == 1


def test_pairs_are_printed_once_before_the_progress_bar(capsys):
    student, teacher = toy()
    student.logger = print
    student.add_cb(ProgressCallback())
    student.fit(2, 0.1, cbs=KD(teacher, kd() + hint(), check=False))
    out = capsys.readouterr().out
    assert out.count('projector') == 1 and 0 <= out.index('projector') < out.index('epoch')
    with student.added_cbs(KD(teacher, kd() + hint(), check=False)):
        student.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert 'projector' not in capsys.readouterr().out


@pytest.mark.parametrize('valid', [True, False])
def test_pairs_are_made_of_inputs_as_callbacks_prepare_them(valid):
    "This student's data are not what its model takes: a callback makes them so"
    x, y = apps.rows()
    items = list(zip(x.reshape(-1, 2, 4), y))
    dls = DataLoaders.from_dsets(
        items[:64], items[64:] if valid else [], bs=16, num_workers=0, device='cpu'
    )

    class Flatten(Callback):
        def before_batch(self):
            self.learn.xb = (self.x.flatten(1),)

    (student,) = apps.quiet(
        Learner(dls, apps.mlp(6), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=Flatten())
    )

    class Ready(Callback):
        def before_train(self):
            assert cb.distiller.ready

        def before_validate(self):
            raise CancelFitException

    cb = KD(apps.mlp(16), kd() + hint(), check=False)
    student.fit(1, 0.1, cbs=[cb, Ready()])
    assert len(cb.distiller.pairs) == 1


def test_an_example_before_the_fit_changes_nothing_of_it():
    "Own generators of transforms and samplers included"

    def run(*cbs):
        x, y = apps.rows()
        g = torch.Generator().manual_seed(3)
        noisy = [(Noisy(o, g), t) for o, t in zip(x, y)]
        loader = torch.utils.data.DataLoader(
            noisy, batch_size=16, shuffle=True, generator=g, collate_fn=collate
        )
        set_seed(3)
        (student,) = apps.quiet(
            Learner(
                DataLoaders(loader, loader), apps.mlp(6), loss_func=F.cross_entropy, opt_func=SGD
            )
        )
        student.fit(2, 0.1, cbs=cbs)
        return weights(student)

    off = KD(apps.mlp(16), kd(alpha=0.0) + hint(0.0), check=False)
    assert torch.equal(run(), run(off)) and off.distiller.pairs


class Noisy:
    "A sample that is drawn when it is used"

    def __init__(self, x, g):
        self.x, self.g = x, g

    def __call__(self):
        return self.x + torch.randn(8, generator=self.g)


def collate(items):
    return torch.stack([x() for x, _ in items]), torch.stack([y for _, y in items])


def test_distill_returns_the_callback():
    student, teacher = toy()
    cb = student.distill(teacher, 1, 0.01, kd() + hint())
    assert (
        isinstance(cb, KD)
        and len(cb.distiller.pairs) == 1
        and cb.state_dict()['links']
        and cb not in student.cbs
    )


def test_distill_with_fine_tune_freezes_first():
    def run(f):
        student, teacher = pair('image')
        set_seed(3)
        f(student, teacher)
        return weights(student), student.recorder.hps['lr'][0].tolist()

    a = run(lambda s, t: s.distill(t, 2, 0.01, fine_tune=True, freeze_epochs=2, T=2.0, check=False))
    b = run(lambda s, t: s.fine_tune(2, 0.01, freeze_epochs=2, cbs=KD(t, T=2.0, check=False)))
    c = run(lambda s, t: s.distill(t, 2, fine_tune=True, freeze_epochs=2, T=2.0, check=False))
    d = run(lambda s, t: s.fine_tune(2, freeze_epochs=2, cbs=KD(t, T=2.0, check=False)))
    assert (
        torch.equal(a[0], b[0])
        and a[1] == b[1]
        and torch.equal(c[0], d[0])
        and not torch.equal(a[0], c[0])
    )


def test_lr_find_with_a_teacher_is_one_line(tmp_path):
    student, teacher = toy(path=tmp_path, opt_func=Adam)
    before = weights(student)
    with student.added_cbs(KD(teacher, kd() + hint(50.0))):
        found = student.lr_find(num_it=20, show_plot=False)
    alone, _ = toy(path=tmp_path, opt_func=Adam)
    alone.lr_find(num_it=20, show_plot=False)
    assert found.valley > 0 and student.recorder.losses[0] > 2 * alone.recorder.losses[0]
    assert (
        torch.equal(before, weights(student))
        and not hasattr(student, 'knowledge_distillation')
        and len(student.metrics) == 1
    )


def test_distill_is_fit_one_cycle_with_the_callback():
    def run(f):
        student, teacher = toy()
        f(student, teacher)
        return weights(student)

    assert torch.equal(
        run(
            lambda s, t: s.distill(
                t, 2, 0.05, T=2.0, alpha=0.5, pct_start=0.4, cbs=GradientClip(0.5)
            )
        ),
        run(
            lambda s, t: s.fit_one_cycle(
                2, 0.05, pct_start=0.4, cbs=[KD(t, T=2.0, alpha=0.5), GradientClip(0.5)]
            )
        ),
    )


@pytest.mark.parametrize('name', ['vision.all', 'text.all', 'tabular.all', 'collab'])
def test_no_name_of_fastai_is_shadowed(name):
    assert not set(fastdistill.fastai.__all__) & set(
        vars(importlib.import_module(f'fastai.{name}'))
    )


def test_distill_tells_its_options():
    ps = list(inspect.signature(Learner.distill).parameters)
    assert ps[:5] == ['self', 'teacher', 'n_epoch', 'lr_max', 'recipe']
    assert {'T', 'alpha', 'loss', 'check', 'cbs', 'div', 'pct_start', 'wd', 'moms'} <= set(ps)


# more than one process


def one_of_two(folder):
    "What each of two processes does"
    import fastai.distributed  # noqa: F401

    warnings.simplefilter('ignore')
    apps.distributed_on_cpu()
    set_seed(0)
    x = torch.randn(96, 8)
    dls = DataLoaders.from_dsets(
        *[list(zip(o, o[:, :4].argmax(1))) for o in (x[:64], x[64:])],
        bs=8,
        num_workers=0,
        device='cpu',
    )
    student, teacher = (
        Learner(dls, apps.mlp(6), loss_func=CrossEntropyLossFlat(), opt_func=SGD),
        apps.mlp(16),
    )
    student.logger = noop
    torch.manual_seed(rank_distrib())  # each rank would draw another projector
    cb = KD(teacher, kd() + hint())
    with student.no_bar(), student.distrib_ctx(sync_bn=False, cpu=True):
        student.fit(2, 0.1, cbs=cb)
    state = [p.detach() for p in [*student.model.parameters(), *cb.distiller.own_parameters()]]
    torch.save((state, list(student.recorder.values[-1])), folder / f'{rank_distrib()}.pt')
    apps.leave_together()


def test_two_processes_train_one_student_and_one_projector(tmp_path):
    pytest.importorskip('accelerate')
    both = processes.start_two(tmp_path / 'two', one_of_two, tmp_path, ACCELERATE_USE_CPU='true')
    assert processes.ended(*both) == [0, 0], processes.said(tmp_path / 'two.0') + processes.said(
        tmp_path / 'two.1'
    )
    (a, logged_a), (b, logged_b) = [
        torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in (0, 1)
    ]
    assert len(a) == 8 and all(torch.equal(x, y) for x, y in zip(a, b)) and logged_a == logged_b


# parts that do not count


class Drawing(nn.Module):
    "A teacher that draws random numbers of every kind, and counts how often it is asked"

    def __init__(self, net):
        super().__init__()
        self.net, self.drop, self.times = net, nn.Dropout(), 0

    def forward(self, x):
        self.times += 1
        np.random.rand()
        random.random()
        return self.drop(self.net(x)) + torch.randn(len(x), 4)


class Augmented:
    "A dataset with random augmentation, by its own generator or PyTorch's"

    def __init__(self, xs, ys, own):
        self.xs, self.ys, self.rng = xs, ys, np.random.default_rng(0) if own else None

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, i):
        noise = torch.randn(5) if self.rng is None else tensor(self.rng.standard_normal(5)).float()
        return self.xs[i] + noise, self.ys[i]


@pytest.mark.parametrize('own', [True, False])
def test_checks_do_not_change_the_augmentation_of_the_training(own):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 5, generator=g), torch.randint(3, (48,), generator=g)

    def net(width):
        return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))

    ends = []
    recipe = kd(alpha=0.0) + Term(losses.hint, 0.0, layers={'0': '0'}, projector='linear')
    set_seed(1)
    teacher = net(8)
    for cbs in ([], [KD(teacher, recipe)]):
        set_seed(2, True)
        dls = DataLoaders.from_dsets(
            Augmented(x[:32], y[:32], own), Augmented(x[32:], y[32:], own), bs=8, num_workers=0
        )
        learn = Learner(dls, net(4), loss_func=CrossEntropyLossFlat())
        set_seed(3, True)
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'The teacher')  # it is untrained
            learn.fit(2, 0.1, cbs=cbs)
        ends.append((weights(learn), learn.recorder.values[-1][1]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


class OwnAutocast(Callback):
    "Half precision on the CPU, where fastai has none; it begins and ends as in fastai's MixedPrecision"

    order = 10

    def before_batch(self):
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.autocast.__enter__()

    def after_loss(self):
        self.autocast.__exit__(None, None, None)


def test_a_callback_that_enters_autocast_leaves_it_although_checks_prepare_batches():
    ends = []
    for distils in (False, True):
        learn, teacher = toy()
        own = [KD(teacher, kd(alpha=0))] if distils else []
        learn.fit(2, 0.1, cbs=[OwnAutocast(), *own])
        assert not torch.is_autocast_enabled('cpu')
        # otherwise autocast would train with old copies of the weights
        assert torch.autocast_increment_nesting() == 1
        assert torch.autocast_decrement_nesting() == 0
        ends.append(weights(learn))
    assert torch.equal(*ends)


def test_alpha_0_is_bit_identical_whatever_the_teacher_does():
    runs = []
    for recipe in (None, kd(alpha=0.0), kd(alpha=0.0) + hint(0.0), kd(alpha=lambda p: 0.0)):
        student, teacher = toy()
        student.model.insert(1, nn.Dropout(0.3))
        drawing = Drawing(teacher)
        layers = dict(layers={'3': 'net.2'})
        cb = (
            None
            if recipe is None
            else KD(
                Teacher(drawing, run=dict(mode='train')),
                recipe
                if len(recipe.terms) == 1
                else kd(alpha=0.0) + Term(losses.hint, 0.0, projector='linear', **layers),
                check=False,
            )
        )
        set_seed(5)
        student.fit(2, 0.1, cbs=cb)
        runs.append(
            (
                weights(student),
                student.recorder.values[-1][0],
                np.random.rand(),
                torch.rand(1).item(),
            )
        )
        if recipe is not None:
            assert (
                student.recorder.metric_names[-2 if len(recipe.terms) == 1 else -3] == 'kd_loss'
                and drawing.times > 0
            )
    for i, r in enumerate(runs):
        assert torch.equal(r[0], runs[0][0]) and r[1:] == runs[0][1:], i


def test_a_fit_asks_the_teacher_only_while_a_part_counts_and_validation_shows_all():
    student, teacher = toy()
    drawing, asked = Drawing(teacher), []
    recipe = Term(losses.kl, T=T, stop_at=0.5) + Term(
        losses.hint, lambda p: 0.05 * (p > 0.75), layers={'2': 'net.2'}, projector='linear'
    )
    cb = KD(drawing, recipe, check=False)

    class Look(Callback):
        order = 7

        def after_loss(self):
            asked.append(
                (
                    self.training,
                    round(self.pct_train, 3),
                    drawing.times,
                    list(cb.taps.taps.names) if cb.taps.taps else [],
                )
            )

    student.fit(2, 0.1, cbs=[cb, Look()])
    seen = [
        (train, p, times - before, taps)
        for (train, p, times, taps), (_, _, before, _) in zip(asked[1:], asked)
    ]
    assert all(
        (n, taps) == ((1, []) if p < 0.5 else (0, []) if p <= 0.75 else (1, ['2']))
        for train, p, n, taps in seen
        if train
    )
    assert all((n, taps) == (1, ['2']) for train, _, n, taps in seen if not train)
    assert student.recorder.metric_names[-3:-1] == ['kl_loss', 'hint_loss'] and all(
        v is not None for v in student.recorder.values[-1]
    )


@pytest.mark.parametrize(
    'kind,loss_func',
    [('softmax', CrossEntropyLossFlat(weight=torch.zeros(4))), ('regression', MSELossFlat())],
)
def test_labels_that_give_nan_are_not_reported_where_they_do_not_count(kind, loss_func):
    student, teacher = toy(loss_func=loss_func)

    class Unlabeled(Callback):
        order = -5

        def before_batch(self):
            if kind == 'regression':
                self.learn.yb = (
                    torch.full((len(self.y), 4), float('nan') if self.training else 0.0),
                )

    student.metrics = []
    before = weights(student)
    for b in watched(student, [Unlabeled(), KD(teacher, soft_labels(T=2.0), check=False)]):
        assert b.loss == pytest.approx(
            losses.soft_targets(b.s, teacher(b.x).detach(), kind=kind, T=2.0).item(), rel=1e-5
        )
    assert (
        weights(student).isfinite().all()
        and not torch.equal(before, weights(student))
        and math.isfinite(student.recorder.values[-1][0])
    )


@pytest.mark.parametrize(
    'label', [0, -100]
)  # with the second the task loss is nan, and what was added to it is lost
def test_a_regularizer_stays_where_labels_do_not_count(label):
    student, teacher = toy()

    class Regularizer(Callback):
        order = 1

        def before_batch(self):
            if self.training:
                self.learn.yb = (torch.full_like(self.y, label),)

        def after_loss(self):
            if self.training:
                self.learn.loss_grad += 0.5 * self.pred.pow(2).mean()

    for b in watched(student, [KD(teacher, soft_labels(T=2.0)), Regularizer()]):
        want, more = (
            (0.0, 0.0)
            if label == -100
            else (kl(b.s, teacher(b.x), 2.0).item(), 0.5 * b.s.pow(2).mean().item())
        )
        assert b.loss == pytest.approx(want, rel=1e-5) and b.loss_grad == pytest.approx(
            want + more, rel=1e-5
        )


# gradient shares


def test_gradient_shares_are_printed_once_a_training(capsys):
    student, teacher = toy()
    student.logger = print
    cb = KD(teacher, kd(2.0, 0.5) + hint(0.1) + Term(losses.mse, lambda p: 0.01 * (p > 0.5)))
    student.fit(2, 0.1, cbs=cb)
    student.fit(1, 0.1, cbs=cb)
    lines = [l for l in capsys.readouterr().out.splitlines() if 'gradient norms' in l]
    shares = r'task \d+%, kd \d+%, hint \d+%'
    assert len(lines) == 2 and re.fullmatch(
        f'fastdistill: gradient norms at the first batch: {shares}', lines[0]
    )
    assert re.fullmatch(
        rf'fastdistill: gradient norms at the first batch with mse: {shares}, mse \d+%', lines[1]
    )


def test_in_a_terminal_the_gradient_shares_have_a_line_of_their_own(capsys):
    student, teacher = toy()
    student.logger = print
    student.fit(
        2, 0.1, cbs=[*([] if hasattr(student, 'progress') else [ProgressCallback()]), KD(teacher)]
    )
    screen = Screen(capsys.readouterr().out)
    (shares,) = [l for l in screen.lines if 'gradient norms' in l]
    assert shares.startswith('fastdistill: gradient norms at the first batch: task')
    assert shares.endswith('%')


class Screen:
    "What a terminal shows: a carriage return goes back to the beginning of the line, and new text replaces old"

    def __init__(self, text):
        self.lines = []
        for line in text.split('\n'):
            shown = ''
            for part in line.split('\r'):
                shown = part + shown[len(part) :]
            self.lines.append(shown.rstrip())


def test_lr_find_measures_no_gradient_shares(tmp_path, capsys):
    student, teacher = toy(path=tmp_path)
    student.logger = print
    cb = KD(teacher, hint(500.0))
    student.add_cb(cb)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=DistillWarning)
        student.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    assert 'gradient norms' not in capsys.readouterr().out
    with pytest.warns(DistillWarning, match='hint has 99.*Lower the weight of hint, now 500'):
        student.fit(1, 0.01)
    assert 'gradient norms at the first batch: task' in capsys.readouterr().out


def test_layers_that_fine_tune_unfreezes_are_measured_in_their_first_batch():
    "While they are frozen there is nothing to measure, and 40 such batches must not count as measured ones"
    student, teacher = toy(bs=2)
    student.model = nn.Sequential(
        nn.Sequential(*student.model[:3]), nn.Sequential(*student.model[3:])
    )
    student.splitter = lambda m: L(m[0], m[1]).map(lambda o: list(o.parameters()))
    student.create_opt()
    cb = KD(
        teacher,
        Term(losses.hint, grad_ratio=0.5, layers={'0': '2'}, projector='linear'),
        check=False,
    )
    factors, frozen = [], []

    class Seen(Callback):
        order = 5.5

        def after_loss(self):
            if not self.training:
                return
            frozen.append(student.opt.frozen_idx)
            ratio = cb.distiller.ratios['hint']
            factors.append(None if ratio.means is None else ratio.factor_at(None).item())

    student.fine_tune(1, 0.01, freeze_epochs=2, cbs=[cb, Seen()])
    assert 1 in frozen and frozen[-1] == 0
    assert all((w is None) == (f == 1) for w, f in zip(factors, frozen))
