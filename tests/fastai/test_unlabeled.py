"Inputs without labels beside the labeled batches: the teacher alone teaches there, in every application."

import random
from pathlib import Path
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from apps import APPS, pair, toy
from fastai.basics import Callback, CancelFitException, DataLoader, L, Learner
from fastai.data.all import CategoryBlock
from fastdistill import Distiller, Outputs, Recipe
from fastdistill.fastai import (
    DistillError,
    KnowledgeDistillation,
    Term,
    dkd,
    kd,
    losses,
    recipes,
    soft_labels,
)
from fastdistill.fastai import cache_teacher, verify_cache
from fastdistill.fastai.probe_batches import loader_of
from fastdistill.fastai.learner_notes import notes_of
from fastdistill.fastai.perturbed_rows import perturbed_rows
from cached import N, TRAIN, Convs, data, student

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)


def KD(teacher, *args, **kwargs):
    return KnowledgeDistillation(teacher, *args, check=False, **kwargs)


class First(Callback):
    "Keep the first step's gradients and inputs, and stop"

    order = 8

    def after_backward(self):
        self.grads, self.batch = [p.grad.clone() for p in self.model.parameters()], (self.x, self.y)
        raise CancelFitException


def test_a_step_is_the_labeled_batch_and_the_teacher_alone_on_the_other():
    student, teacher = toy()
    more = torch.randn(24, 8, generator=torch.Generator().manual_seed(5))
    first = First()
    student.fit(
        1,
        0.1,
        cbs=[
            KD(
                teacher,
                kd(2.0, 0.7) + recipes.dist(grad_ratio=0.5),
                unlabeled=[(o,) for o in DataLoader(more, bs=24)],
            ),
            first,
        ],
    )
    x, y = first.batch
    s, t, su, tu = (
        student.model(x),
        teacher(x).detach(),
        student.model(more),
        teacher(more).detach(),
    )
    base = 0.3 * F.cross_entropy(s, y) + 0.7 * losses.kl(s, t, T=2.0)
    length = lambda v: torch.autograd.grad(v, s, retain_graph=True)[0].norm()
    w = 0.5 * length(base) / length(losses.dist(s, t))
    total = (
        base
        + w.detach() * losses.dist(s, t)
        + 0.7 * losses.kl(su, tu, T=2.0)
        + w.detach() * losses.dist(su, tu)
    ) / 1.5
    for a, b in zip(first.grads, torch.autograd.grad(total, list(student.model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layers_are_compared_there_too_and_terms_that_read_labels_are_not():
    torch.manual_seed(0)
    net = lambda h: nn.Sequential(nn.Linear(8, h), nn.ReLU(), nn.Linear(h, 4))
    student, teacher, x = net(6), net(9), torch.randn(5, 8)
    d = Distiller(
        student,
        teacher,
        Recipe(
            Term(losses.hint, 0.2, layers={'1': '1'}, projector='linear'),
            *dkd().terms,
            *kd(3.0, 0.6).terms,
        ),
        example=x,
    )
    f, s = student[:2](x), student(x)
    got = d.without_labels(Outputs(s, {'1': f}), d.teacher_outputs(x))
    want = 0.2 * losses.hint(
        d.links['hint'][0].projector(f, teacher[:2](x)), teacher[:2](x)
    ) + 0.6 * losses.kl(s, teacher(x), T=3.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def items_of(app, learn):
    "More inputs of the kind that the learner's own items are"
    if app.name == 'tabular':
        return apps.table(20, seed=3).drop(columns='kind')
    if app.name.startswith('collab'):
        return apps.ratings(20, seed=3).drop(columns='rating')
    return L(learn.dls.train_ds.items)[:8] if hasattr(learn.dls.train_ds, 'tls') else None


@pytest.mark.parametrize(
    'app', [a for a in APPS if a.name != 'language_model'], ids=lambda a: a.name
)
def test_every_application_takes_items_without_labels(app):
    student, teacher = pair(app)
    items = items_of(app, student)
    if items is None:
        items = DataLoader(student.dls.train_ds, bs=4)
    calls = []

    class Count(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *x):
            calls.append(len(apps.plain(x)[0]))
            return self.model(*x)

        def reset(self):
            getattr(self.model, 'reset', lambda: None)()

    cb = KD(
        teacher, soft_labels(2.0) if app.kind != 'regression' else kd(alpha=0.5), unlabeled=items
    )
    steps = []

    class Steps(Callback):
        def after_batch(self):
            if self.training:
                steps.append(self.loss.item())

    student.fit(1, app.lr, cbs=[cb, Steps()])
    assert len(steps) == len(student.dls.train) and all(s == s for s in steps)
    assert cb.unlabeled.iterator is None and student.recorder.values


def test_items_get_the_training_sets_augmentation_and_are_all_used():
    student, teacher = pair('image')
    items = L(student.dls.train_ds.items)
    loader = loader_of(items, student.dls)
    assert (
        loader.after_batch.fs == student.dls.train.after_batch.fs
        and loader.after_item.fs == student.dls.train.after_item.fs
    )
    assert sum(len(b[0]) for b in loader) > len(items) - loader.bs and all(
        len(b) == 1 for b in loader
    )


def test_the_items_are_augmented():
    learn = student(data())
    loader = loader_of([0] * 8, learn.dls)  # one item, eight times
    (x,) = loader.one_batch()
    assert len({tuple(o.flatten().tolist()) for o in x}) == 8
    assert (
        loader.dataset.split_idx == 0 == loader.after_batch.split_idx
        and learn.dls.valid_ds.split_idx == 1
    )


def test_what_goes_wrong_is_said_before_the_first_batch(tmp_path):
    student, teacher = toy()
    more = DataLoader(torch.randn(24, 8), bs=8)
    with pytest.raises(
        DistillError,
        match='all terms read labels .dkd.: *.*Add a term that reads no labels|all terms read labels',
    ):
        student.fit(1, cbs=KD(teacher, dkd(), unlabeled=more))
    with pytest.raises(
        DistillError,
        match="needs a teacher that runs, or stored outputs .*unlabeled=dict\\(items=items, targets='more'\\)",
    ):
        KD(None, unlabeled=more)
    with pytest.raises(
        DistillError,
        match='perturbed in unlabeled= needs a teacher that runs: each batch has new perturbed rows',
    ):
        KD(None, unlabeled=dict(perturbed=2))
    with pytest.raises(
        DistillError, match='targets in unlabeled= are stored outputs for the items'
    ):
        KD(teacher, unlabeled=dict(targets=tmp_path))
    with pytest.raises(
        DistillError,
        match="'item': .*: must be a dict with any of 'items', 'targets', 'perturbed'",
    ):
        KD(teacher, unlabeled=dict(item=[1]))
    with pytest.raises(DistillError, match='the list of items is empty'):
        student.fit(1, cbs=KD(teacher, unlabeled=[]))
    for n in (-1, True, 2.5):
        with pytest.raises(DistillError, match=f'perturbed={n}: must be a whole number'):
            KD(teacher, unlabeled=dict(perturbed=n))
    for o in ('photos', Path('photos'), 5):
        with pytest.raises(
            DistillError, match=r'must be a list of items like those of the training set'
        ):
            loader_of(o, None)
    lm, big = pair('language_model')
    with pytest.raises(
        DistillError, match='A language model needs no labels: add the texts to its training set'
    ):
        lm.fit(1, cbs=KD(big, unlabeled=['a']))
    image, big = pair('image')
    with pytest.raises(
        DistillError, match='perturbed in unlabeled= is for tables, with rows of numbers'
    ):
        image.fit(1, cbs=KD(big, unlabeled=dict(perturbed=2)))
    with pytest.raises(
        DistillError, match="these items can't be prepared like those of the training set"
    ):
        image.fit(1, cbs=KD(big, unlabeled=[object()]))


WEIGHT_0 = [
    kd(alpha=0.0),
    Recipe(Term(losses.kl, lambda p: 0.0)),
    Recipe(Term(losses.kl, 0.0), Term(losses.dkd, 0.0)),
]


@pytest.mark.parametrize('recipe', WEIGHT_0, ids=['number', 'schedule', 'two terms'])
@pytest.mark.parametrize('how', ['items', 'DataLoader', 'stored', 'perturbed'])
def test_weight_0_trains_bit_for_bit_as_without_a_teacher(tmp_path, how, recipe):
    "With dropout, batch-norm, a shuffled training set and random draws of the labeled batches"

    class Noise(Callback):
        def before_batch(self):
            if self.training:
                self.learn.xb = (
                    self.x + torch.randn_like(self.x) * random.random() * np.random.rand(),
                )

    runs = []
    for teach in (False, True):
        student, teacher = toy(bs=8)
        student.model = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)
        )
        more, options = torch.randn(24, 8, generator=torch.Generator().manual_seed(5)), {}
        if how == 'perturbed':
            options = dict(unlabeled=dict(perturbed=2))
        elif how == 'DataLoader':
            options = dict(unlabeled=DataLoader(more, bs=8, shuffle=True))
        else:
            options = dict(unlabeled=list(more))
        if how == 'stored':
            targets = cache_teacher(
                teacher,
                student.dls,
                tmp_path / f'{teach}',
                kind='softmax',
                unlabeled=list(more),
                check=False,
            )
            options = dict(unlabeled=dict(items=list(more), targets=targets))
        apps.set_seed(3, reproducible=True)
        for p in student.model.parameters():
            nn.init.normal_(p)
        student.fit(2, 0.1, cbs=[Noise(), *([KD(teacher, recipe, **options)] if teach else [])])
        runs.append(
            [
                *[v.clone() for v in student.model.state_dict().values()],
                torch.get_rng_state(),
                random.random(),
                np.random.rand(),
            ]
        )
    *tensors, a, b = zip(*runs)
    assert all(torch.equal(*v) for v in tensors)
    assert a[0] == a[1]
    assert b[0] == b[1]


# from stored outputs


def drawn(learn):
    "The same random numbers for each fit"
    apps.set_seed(3, reproducible=True)
    return learn


class Steps(Callback):
    "The loss of each step"

    def before_fit(self):
        self.losses = []

    def after_batch(self):
        if self.training:
            self.losses.append(self.loss.item())


def weights_of(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('of_labeled', ['live', 'stored'])
def test_stored_outputs_teach_as_the_live_teacher_does(tmp_path, of_labeled):
    more, runs = torch.randn(40, 8, generator=torch.Generator().manual_seed(5)), []
    for stored in (False, True):
        student, teacher = toy(bs=16)
        source, targets = teacher, None
        if stored:
            targets = cache_teacher(
                teacher,
                student.dls,
                tmp_path / 'more',
                store=dict(dtype='float32'),
                kind='softmax',
                unlabeled=list(more),
                check=False,
            )
            if of_labeled == 'stored':
                source = cache_teacher(
                    teacher,
                    student.dls,
                    tmp_path / 'targets',
                    store=dict(dtype='float32'),
                    kind='softmax',
                    check=False,
                )
        seen = Steps()
        drawn(student).fit(
            3,
            0.1,
            cbs=[KD(source, kd(2.0, 0.7), unlabeled=dict(items=list(more), targets=targets)), seen],
        )
        assert len(seen.losses) == 12
        runs.append((torch.tensor(seen.losses), weights_of(student)))
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_view_is_replayed_and_a_pass_over_the_items_has_the_next_one(tmp_path):
    learn, teacher = student(data()), Convs(3).eval()
    items = list(range(TRAIN, N))  # 8 items, which makes one batch
    more = cache_teacher(
        teacher,
        learn.dls,
        tmp_path / 'more',
        views=2,
        store=dict(dtype='float32'),
        unlabeled=items,
        check=False,
    )
    assert more.views == 2 and len(more) == len(items)
    pairs, inputs = [], []

    def watched(s, t):
        if torch.is_grad_enabled():
            pairs.append(t.clone())
        return losses.kl(s, t, T=1.0)

    hook = learn.model.register_forward_pre_hook(
        lambda m, x: inputs.append(torch.Tensor(x[0].clone())) if m.training else None
    )
    learn.fit(
        1,
        1e-3,
        cbs=KD(teacher, Term(watched), unlabeled=dict(items=items, targets=tmp_path / 'more')),
    )
    hook.remove()
    steps = len(learn.dls.train)
    assert len(pairs) == len(inputs) == 2 * steps and steps > 1
    for x, t in zip(inputs[1::2], pairs[1::2]):
        torch.testing.assert_close(t, teacher(x), rtol=1e-4, atol=1e-4)
    sets = [{tuple(o.flatten()[:9].tolist()) for o in x} for x in inputs[1::2]]
    assert not sets[0] & sets[1]  # another view of each item
    assert notes_of(learn).passed_epochs[more.identity] == steps


def test_stored_outputs_of_a_table_and_of_other_inputs(tmp_path):
    learn, teacher = pair('tabular')
    rows = apps.table(20, seed=3).drop(columns='kind')
    cache_teacher(teacher, learn.dls, tmp_path / 'more', unlabeled=rows, check=False)
    fit = lambda rows: learn.fit(
        1,
        1e-3,
        cbs=KD(teacher, kd(), unlabeled=dict(items=rows, targets=tmp_path / 'more')),
    )
    fit(rows)
    fit(rows.iloc[4:])
    verified = verify_cache(tmp_path / 'more', teacher, learn.dls, unlabeled=rows)
    assert verified.rows == 20 and verified.worst < 1e-2
    with pytest.raises(DistillError, match='20 of 20 samples have no row in'):
        fit(apps.table(20, seed=4).drop(columns='kind'))
    other = pair('tabular')[1]
    for p in other.model.parameters():
        p.data *= 1.01
    with pytest.raises(
        DistillError,
        match='(?s)different weights than .*, which teaches the labeled batches.*write a new cache',
    ):
        learn.fit(
            1, 1e-3, cbs=KD(other, kd(), unlabeled=dict(items=rows, targets=tmp_path / 'more'))
        )
    with pytest.raises(DistillError, match='valid=True caches the labeled validation set'):
        cache_teacher(teacher, learn.dls, tmp_path / 'x', valid=True, unlabeled=rows)


def test_layers_that_are_not_stored_are_refused_before_the_first_batch(tmp_path):
    learn, teacher = toy()
    more, hint = (
        list(torch.randn(16, 8)),
        Term(losses.hint, 0.2, layers={'0': '0'}, projector='linear'),
    )
    for layers in (None, ['0']):
        cache_teacher(
            teacher,
            learn.dls,
            tmp_path / f'more{layers}',
            unlabeled=more,
            layers=layers,
            kind='softmax',
            check=False,
        )
    with pytest.raises(
        DistillError, match="has no outputs of the teacher's layers 0, which the recipe compares"
    ):
        learn.fit(
            1,
            cbs=KD(teacher, kd() + hint, unlabeled=dict(items=more, targets=tmp_path / 'moreNone')),
        )
    learn.fit(
        1, cbs=KD(teacher, kd() + hint, unlabeled=dict(items=more, targets=tmp_path / "more['0']"))
    )


def test_stored_outputs_come_in_the_order_of_the_labels_classes(tmp_path):
    theirs = data(block=CategoryBlock(vocab=['b', 'c', 'a'], sort=False))
    learn, teacher, more = student(data()), Learner(theirs, Convs(3)), list(range(TRAIN, N))
    cache_teacher(teacher, learn.dls, tmp_path, views=1, unlabeled=more, check=False)
    cb = KD(teacher, kd(), unlabeled=dict(items=more, targets=tmp_path))
    seen = []

    class Look(Callback):
        order = 6

        def after_loss(self):
            if self.training:
                x, t = next(cb.unlabeled.batches(self.learn, None))
                seen.append((t.logits, teacher.model.eval()(x[0]).detach()))

    learn.fit(1, 1e-3, cbs=[cb, Look()])
    for stored, live in seen:
        torch.testing.assert_close(stored, live[:, [2, 0, 1]], rtol=1e-2, atol=1e-2)
    assert seen


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind(tmp_path, error):
    learn, teacher = student(data()), Convs(3).eval()
    ds = learn.dls.test_dl(list(range(8))).dataset
    loader = learn.dls.train.new(ds, bs=4, shuffle=True, n=None)
    before = {k: vars(loader)[k] for k in ('after_batch', 'create_batches') if k in vars(loader)}
    cache_teacher(teacher, learn.dls, tmp_path / 'more', unlabeled=loader, check=False)

    class Stop(Callback):
        def after_backward(self):
            raise error('now')

    cb = KD(teacher, kd(), unlabeled=dict(items=loader, targets=tmp_path / 'more'))
    with pytest.raises(error, match='now'):
        learn.fit(1, 1e-3, cbs=[cb, Stop()])
    assert {
        k: vars(loader)[k] for k in ('after_batch', 'create_batches') if k in vars(loader)
    } == before
    assert (
        cb.unlabeled.iterator is None
        and cb.unlabeled.loader is None
        and cb.unlabeled.feed.fed == []
    )
    learn.fit(1, 1e-3, cbs=cb)


# tables


def test_a_perturbed_row_has_cells_of_its_column_and_most_of_its_own():
    torch.manual_seed(0)
    cats, conts = torch.randint(50, (64, 3)), torch.randn(64, 4)
    a, b = perturbed_rows((cats, conts), 5)
    assert a.shape == (320, 3) and b.shape == (320, 4) and a.dtype == cats.dtype
    for old, new in ((cats, a), (conts, b)):
        for c in range(old.shape[1]):
            assert set(new[:, c].tolist()) <= set(old[:, c].tolist())
    assert 0.05 < (b != conts.repeat(5, 1)).float().mean() < 0.15


def test_a_table_is_perturbed_by_one_argument():
    student, teacher = pair('tabular')
    seen = []
    tap = teacher.model.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    student.distill(teacher, 1, 0.01, kd(1.0, 0.5), unlabeled=dict(perturbed=3), check=False)
    tap.remove()
    bs = student.dls.train.bs
    assert 3 * bs in seen and bs in seen


def test_without_either_nothing_changes():
    runs = []
    for options in ({}, dict(unlabeled=None)):
        student, teacher = toy()
        student.fit(1, 0.1, cbs=KD(teacher, **options))
        runs.append([p.detach().clone() for p in student.model.parameters()])
    assert all(map(torch.equal, *runs))
