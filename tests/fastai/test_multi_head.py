"Several heads in one Learner, each with its own teacher."

import copy
import pytest, torch
import torch.nn.functional as F
import apps
from torch import nn
from fastai.basics import (
    Callback,
    CancelFitException,
    CategoryBlock,
    DataBlock,
    DataLoader,
    DataLoaders,
    IndexSplitter,
    Learner,
    TransformBlock,
    load_learner,
    set_seed,
)
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import *
from fastai.vision.augment import RandTransform
from fastdistill import losses
from fastdistill.fastai import (
    DistillError,
    DistillInterpretation,
    KnowledgeDistillation,
    Teacher,
    Term,
    cache_teacher,
    compare,
    compare_recipes,
    kd,
    verify_cache,
)
from fastdistill.fastai.held_outputs import GivenOutputs
from fastdistill.fastai.teacher_targets import samples_of

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
KD = KnowledgeDistillation
g = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=g)
COLOR, SHAPE, SIZE = (
    (X @ torch.randn(6, 3, generator=g)).argmax(1),
    (X @ torch.randn(6, 4, generator=g)).argmax(1),
    X[:, :1].sum(1, keepdim=True),
)


class Net(nn.Module):
    def __init__(self, as_tuple=False):
        super().__init__()
        self.body, self.color, self.shape, self.as_tuple, self.calls = (
            nn.Linear(6, 8),
            nn.Linear(8, 3),
            nn.Linear(8, 4),
            as_tuple,
            0,
        )

    def forward(self, x):
        self.calls += 1
        h = self.body(x).relu()
        out = dict(color=self.color(h), shape=self.shape(h))
        return tuple(out.values()) if self.as_tuple else out


def both(pred, color, shape):
    a, b = pred if isinstance(pred, tuple) else pred.values()
    return F.cross_entropy(a, color) + 0.5 * F.cross_entropy(b, shape)


def learner(as_tuple=False, *ys):
    set_seed(0)  # a DataLoader has its own generator
    items = list(zip(X, *(ys or (COLOR, SHAPE))))
    dls = DataLoaders.from_dsets(items[:64], items[64:], bs=16)
    dls.n_inp = 1
    torch.manual_seed(0)
    return Learner(dls, Net(as_tuple), loss_func=both)


def teachers():
    torch.manual_seed(1)
    nets = nn.Linear(6, 3), nn.Linear(6, 4)
    opt = torch.optim.Adam([p for n in nets for p in n.parameters()], 0.1)
    for _ in range(60):
        (F.cross_entropy(nets[0](X), COLOR) + F.cross_entropy(nets[1](X), SHAPE)).backward()
        opt.step(), opt.zero_grad()
    return dict(color=nets[0], shape=nets[1])


class First(Callback):
    "The first training batch: the loss that is back-propagated, and what it is made of"

    order = 8
    seen = None

    def after_loss(self):
        if self.training and self.seen is None:
            self.seen = (
                self.learn.loss_grad.item(),
                self.x,
                self.yb,
                copy.deepcopy(self.learn.model),
            )


@pytest.mark.parametrize('as_tuple', [False, True])
def test_the_loss_is_the_learners_own_and_the_terms_of_each_head(as_tuple):
    learn, t, first = learner(as_tuple), teachers(), First()
    got = learn.distill(
        t, 1, 0.01, dict(color=kd(T=2.0, alpha=0.7), shape=kd(T=1.0, alpha=0.7)), cbs=first
    )
    loss, x, (c, h), net = first.seen
    a, b = net(x) if as_tuple else net(x).values()
    want = (
        0.3 * both((a, b), c, h)
        + 0.7 * losses.kl(a, t['color'](x), T=2.0)
        + 0.7 * losses.kl(b, t['shape'](x), T=1.0)
    )
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert isinstance(got, KD) and learn.recorder.metric_names[3:6] == [
        'task_loss',
        'color_kd_loss',
        'shape_kd_loss',
    ]
    assert learn.metrics == []


def test_the_student_runs_once_and_each_teacher_once_a_batch():
    learn, t, calls = learner(), teachers(), []
    learn.fit(
        1,
        cbs=KD(
            {k: Teacher(lambda x, k=k: (calls.append(k), t[k](x))[1]) for k in t}, kd(), check=False
        ),
    )
    batches = len(learn.dls.train) + len(learn.dls.valid)
    assert (
        calls.count('color') == calls.count('shape')
        and batches <= calls.count('color') <= batches + 2
    )
    # two dry runs look at an example
    assert batches <= learn.model.calls <= batches + 2


def test_columns_are_the_terms_on_the_validation_set():
    learn, t = learner(), teachers()
    learn.distill(t, 1, 0.01, kd(T=2.0, alpha=0.5))
    x, c, h = [torch.stack(o) for o in zip(*learn.dls.valid_ds)]
    with torch.no_grad():
        s = learn.model.eval()(x)
        want = [
            both(s, c, h),
            losses.kl(s['color'], t['color'](x), T=2.0),
            losses.kl(s['shape'], t['shape'](x), T=2.0),
        ]
    values = learn.recorder.values[-1]
    assert [values[1], *values[3:]] == pytest.approx([o.item() for o in want], rel=1e-4)


def test_a_head_without_a_teacher_keeps_its_place():
    learn, t, first = learner(), teachers(), First()
    learn.distill(dict(color=None, shape=t['shape']), 1, 0.01, kd(T=1.0, alpha=0.5), cbs=first)
    loss, x, (c, h), net = first.seen
    s = net(x)
    assert loss == pytest.approx(
        (0.5 * both(s, c, h) + 0.5 * losses.kl(s['shape'], t['shape'](x), T=1.0)).item(), rel=1e-5
    )


def test_without_a_recipe_each_head_gets_its_own(capsys):
    learn, t, first = learner(), teachers(), First()
    learn.distill(t, 1, 0.01, cbs=first)
    out = capsys.readouterr().out
    assert (
        'color: recipe labels + dist' in out
        and 'shape: recipe labels + dist' in out
        and 'color: accuracy on 32 validation items' in out
    )
    assert (
        'color_dist' in out and 'shape_dist' in out and 'gradient norms at the first batch' in out
    )
    assert [t.name for t in learn.cbs] == [t.name for t in learn.cbs if not isinstance(t, KD)]


def test_heads_learn_from_their_teachers():
    learn, t = learner(), teachers()
    learn.distill(t, 20, 0.05, kd(T=2.0, alpha=0.9))
    x = X[64:]
    for k, o in learn.model.eval()(x).items():
        assert (o.argmax(1) == t[k](x).argmax(1)).float().mean() > 0.75


def test_teachers_do_not_change_and_nothing_is_left():
    learn, t = learner(), teachers()
    was = {k: copy.deepcopy(m.state_dict()) for k, m in t.items()}
    learn.distill(t, 1, 0.01, kd())
    for k, m in t.items():
        assert (
            all(torch.equal(a, b) for a, b in zip(was[k].values(), m.state_dict().values()))
            and m.training
        )
    assert not learn.model.body._forward_hooks


class FirstStep(Callback):
    "The gradients of the first step, and its batch"

    order = 8
    seen = None

    def before_batch(self):
        self.net = copy.deepcopy(self.learn.model)

    def after_backward(self):
        self.seen = [p.grad.clone() for p in self.model.parameters()], self.x, self.yb
        raise CancelFitException


def test_a_dict_of_teachers_makes_the_class_that_was_named():
    class Mine(KD):
        pass

    assert type(KD(teachers())) is KD
    assert type(Mine(teachers())) is Mine


def test_heads_learn_from_their_teachers_on_inputs_without_labels():
    learn, t, first = learner(), teachers(), FirstStep()
    more = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
    unlabeled = DataLoader([(o,) for o in more], bs=16)
    learn.distill(t, 1, 0.01, kd(T=2.0, alpha=0.4), unlabeled=unlabeled, cbs=first, check=False)
    grads, x, (c, h) = first.seen
    net = first.net
    s, u = net(x), net(more)
    term = lambda o, k, x: losses.kl(o[k], t[k](x), T=2.0)
    want = 0.6 * both(s, c, h) + 0.4 * sum(term(s, k, x) + term(u, k, more) for k in t)
    for got, p in zip(grads, torch.autograd.grad(want, [*net.parameters()])):
        torch.testing.assert_close(got, p)


def test_perturbed_rows_are_for_heads_too():
    learn, t, calls = learner(), teachers(), []
    count = {k: Teacher(lambda x, k=k: (calls.append((k, len(x))), t[k](x))[1]) for k in t}
    learn.distill(count, 1, 0.01, kd(), unlabeled=dict(perturbed=2), check=False)
    assert calls.count(('color', 32)) == calls.count(('shape', 32)) == 4


def test_layers_of_each_teacher_are_compared(tmp_path):
    learn, first = learner(), First()
    deep = {
        k: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, n))
        for k, n in dict(color=3, shape=4).items()
    }
    hint = lambda: kd(T=1.0, alpha=0.5) + Term(losses.hint, layers={'body': '0'}, weight=0.1)
    learn.distill(deep, 1, 0.01, dict(color=hint(), shape=hint()), cbs=first, check=False)
    loss, x, (c, h), net = first.seen
    s, feats = net(x), net.body(x)
    want = 0.5 * both(s, c, h) + sum(
        0.5 * losses.kl(s[k], deep[k](x), T=1.0) + 0.1 * losses.hint(feats, deep[k][0](x))
        for k in deep
    )
    assert loss == pytest.approx(want.item(), rel=1e-4)


def test_alpha_0_is_no_distillation():
    def train(cbs):
        learn = learner()
        set_seed(3)
        learn.fit(2, 0.01, cbs=cbs)
        return torch.cat([p.flatten() for p in learn.model.parameters()])

    assert torch.equal(train([]), train(KD(teachers(), kd(alpha=0.0))))


colors, shapes = ['red', 'green', 'blue'], ['disc', 'star', 'cross', 'ring']


def row(i):
    return X[i]


def color_of(i):
    return colors[COLOR[i]]


def shape_of(i):
    return shapes[SHAPE[i]]


def named_dls():
    "Two columns of classes with names"
    block = DataBlock(
        (
            TransformBlock,
            CategoryBlock(vocab=colors, sort=False),
            CategoryBlock(vocab=shapes, sort=False),
        ),
        n_inp=1,
        getters=[row, color_of, shape_of],
        splitter=IndexSplitter(list(range(64, 96))),
    )
    return block.dataloaders(list(range(96)), bs=16, num_workers=0)


def test_classes_of_each_head_are_mapped_by_name():
    learn, t, first = learner(), teachers(), First()
    learn.dls = named_dls()
    other = ['star', 'disc', 'ring', 'cross']
    shape = nn.Linear(6, 4)
    order = [['disc', 'star', 'cross', 'ring'].index(c) for c in other]
    with torch.no_grad():
        shape.weight.copy_(t['shape'].weight[order]), shape.bias.copy_(t['shape'].bias[order])
    theirs = Learner(
        DataBlock(
            (TransformBlock, CategoryBlock(vocab=other, sort=False)),
            getters=[lambda i: X[i], lambda i: other[0]],
        ).dataloaders(list(range(96)), bs=16),
        shape,
        loss_func=nn.CrossEntropyLoss(),
    )
    learn.distill(dict(color=t['color'], shape=theirs), 1, 0.01, kd(T=1.0, alpha=1.0), cbs=first)
    loss, x, _, net = first.seen
    s = net(x)
    assert loss == pytest.approx(
        (
            losses.kl(s['color'], t['color'](x), T=1.0)
            + losses.kl(s['shape'], t['shape'](x), T=1.0)
        ).item(),
        rel=1e-4,
    )


def test_the_check_is_for_each_head():
    learn, t = learner(), teachers()
    swapped = lambda x: t['shape'](x)[:, [1, 0, 2, 3]]
    with pytest.raises(
        DistillError,
        match='shape: The teacher has the classes in a different order: class 0 and class 1 are swapped',
    ):
        learn.distill(dict(color=t['color'], shape=swapped), 1, 0.01, kd())
    with pytest.raises(
        DistillError,
        match=r"shape: The student's output has shape \(16, 4\), but the teacher's has shape \(16, 3\)",
    ):
        learn.distill(dict(color=t['color'], shape=t['color']), 1, 0.01, kd())


def test_mistakes_are_named():
    learn, t = learner(), teachers()

    def refused(says, *args, of=learn, **kwargs):
        with pytest.raises(DistillError, match=says):
            of.distill(*args, **kwargs)

    refused(
        'recipe= has size, but the heads with a teacher are color, shape',
        t,
        1,
        0.01,
        dict(size=kd()),
    )
    refused(
        'give the task loss different weights',
        t,
        1,
        0.01,
        dict(color=kd(alpha=0.9), shape=kd(alpha=0.5)),
    )
    refused(
        'the student returns color, shape',
        dict(hue=t['color'], shape=t['shape']),
        1,
        0.01,
        kd(),
        check=False,
    )
    refused(r'2 column\(s\) of labels for 3 heads', t | dict(size=nn.Linear(6, 1)), 1, 0.01, kd())
    refused('loss= is not possible with several heads', t, 1, 0.01, loss=lambda s, t, y: 0.0)
    refused(
        "The head 'color' needs a teacher that runs, or a cache",
        dict(color=GivenOutputs(), shape=t['shape']),
        1,
        0.01,
    )
    numbers = learner(False, COLOR, SIZE)
    refused(
        "labels of the head 'shape' are not class indices: pass kind={'shape': 'regression'}",
        t,
        1,
        0.01,
        kd(),
        of=numbers,
    )
    refused(
        r'targets in unlabeled= with several heads: pass a dict with a cache for each head \(color, shape\)',
        t,
        1,
        0.01,
        unlabeled=dict(items=[(x,) for x in X], targets='more'),
    )
    refused(
        "output= is not possible with several heads: each head's output is selected by its name",
        t,
        1,
        0.01,
        output='color',
    )
    with pytest.raises(DistillError, match='No head has a teacher'):
        KD(dict(color=None))


def test_where_one_teacher_is_needed_a_dict_of_heads_is_refused():
    learn, t = learner(), teachers()
    with pytest.raises(
        DistillError,
        match='A dict contains one teacher for each head of a student. Pass a single teacher here',
    ):
        learn.distill([t, t], 1, 0.01, kd(), kind='softmax')
    with pytest.raises(DistillError, match='verify_cache checks one head at a time'):
        verify_cache(t, t, learn.dls)


def test_check_teacher_and_explain_look_at_each_head():
    learn, t = learner(), teachers()
    found = learn.check_teacher(
        dict(color=t['color'], shape=lambda x: t['shape'](x)[:, [1, 0, 2, 3]])
    )
    assert (
        not found['color'].errors
        and 'class 0 and class 1 are swapped' in found['shape'].errors[0].what
    )
    distillation = learn.distill(t, 3, 0.01, kd(T=2.0))
    why = learn.explain(t, distillation)
    x, c, h = [torch.stack(o) for o in zip(*learn.dls.valid_ds)]
    with torch.no_grad():
        s = learn.model.eval()(x)
    for k, y in dict(color=c, shape=h).items():
        right = lambda o, y=y: (o.argmax(1) == y).float().mean().item()
        assert why[k].facts.teacher_score == pytest.approx(right(t[k](x))) and why[
            k
        ].facts.student_score == pytest.approx(right(s[k]))
        assert why[k].facts.shares.keys() == {'task', 'kd'} and why[k].facts.steps == 12
    with pytest.raises(DistillError, match="The head 'color' has stored outputs"):
        learn.explain(dict(color=GivenOutputs(), shape=t['shape']))


@pytest.mark.parametrize('as_tuple', [False, True])
def test_teachers_with_several_outputs_of_which_each_teaches_one_head(as_tuple, tmp_path):
    "The same as functions that return the output of the head"
    models = {}
    for i, k in enumerate(('color', 'shape')):
        torch.manual_seed(i + 1)
        models[k] = Net(as_tuple).eval()
    at = lambda k: ['color', 'shape'].index(k) if as_tuple else k
    alone = {k: lambda x, k=k, m=m: m(x)[at(k)] for k, m in models.items()}
    learn, recipe = learner(), kd(T=1.0, alpha=0.5)
    weights, reports, scores = [], [], []
    for t in models, alone:
        old = learner()
        with old.no_bar():
            old.distill(t, 1, 0.01, recipe, check=False)
        weights.append([p.tolist() for p in old.model.parameters()])
        found = compare({'teacher': t, 'student': learn}, learn.dls, seconds=0, repeats=10)
        reports.append({k: r.models['teacher'].metrics for k, r in found.items()})
        scores.append({k: f.facts.teacher_score for k, f in learn.explain(t).items()})
        scores[-1] |= {
            k: f.facts.teacher_score for k, f in learn.check_teacher(t).items() if f.facts
        }
    for old, new in weights, reports, scores:
        assert old == new
    stored = cache_teacher(models, learn.dls, tmp_path, views=0, check=False)
    x = torch.stack([learn.dls.train_ds[i][0] for i in range(4)])
    for k, fn in alone.items():
        got = stored[k].outputs(torch.arange(4)).logits
        torch.testing.assert_close(got, fn(x).detach(), rtol=1e-2, atol=1e-2)


def test_a_head_of_numbers():
    torch.manual_seed(0)

    class TwoKinds(Net):
        def __init__(self):
            super().__init__()
            self.shape = nn.Linear(8, 1)

    items = list(zip(X, COLOR, SIZE))
    dls = DataLoaders.from_dsets(items[:64], items[64:], bs=16)
    dls.n_inp = 1
    mixed = lambda p, c, z: F.cross_entropy(p['color'], c) + F.mse_loss(p['shape'], z)
    learn, t, first = Learner(dls, TwoKinds(), loss_func=mixed), teachers()['color'], First()
    size = nn.Linear(6, 1)
    learn.distill(
        dict(color=t, shape=size),
        1,
        0.01,
        kd(T=1.0, alpha=0.5),
        kind=dict(shape='regression'),
        cbs=first,
        check=False,
    )
    loss, x, (c, z), net = first.seen
    s = net(x)
    want = (
        0.5 * mixed(s, c, z)
        + 0.5 * losses.kl(s['color'], t(x), T=1.0)
        + 0.5 * F.mse_loss(s['shape'], size(x))
    )
    assert loss == pytest.approx(want.item(), rel=1e-4)


def test_lr_find_save_and_export(tmp_path):
    learn, t = learner(), teachers()
    learn.path, learn.dls = tmp_path, named_dls()
    learn.add_cb(KD(t, kd()))
    learn.lr_find(num_it=10, show_plot=False)
    learn.fit(1, 0.01)
    learn.save('a')
    learn.validate()
    learn.export('e.pkl')
    assert (
        isinstance(load_learner(tmp_path / 'e.pkl').model, Net)
        and learn.knowledge_distillation is not None
    )


# stored outputs


class Noise(RandTransform):
    "Another input in each epoch"

    def __init__(self):
        super().__init__(p=1.0)

    def encodes(self, x: torch.Tensor):
        return x + 0.5 * torch.randn(x.shape) if x.dim() == 1 and x.is_floating_point() else x


def noisy_dls():
    set_seed(3)
    block = DataBlock(
        (
            TransformBlock(item_tfms=Noise()),
            CategoryBlock(vocab=colors, sort=False),
            CategoryBlock(vocab=shapes, sort=False),
        ),
        n_inp=1,
        getters=[row, color_of, shape_of],
        splitter=IndexSplitter(list(range(64, 96))),
    )
    return block.dataloaders(list(range(96)), bs=16, num_workers=0)


def seeded_dls():
    set_seed(3)
    return named_dls()


def quiet_learner(dls):
    learn = learner()
    learn.remove_cbs([ProgressCallback])
    learn.dls, learn.logger = dls, lambda _: None
    return learn


def trained(source, dls, n_epoch=3, recipe=None, cbs=None):
    "The Learner after several steps, and its weights"
    learn = quiet_learner(dls)
    set_seed(5)
    with learn.no_bar():
        learn.distill(source, n_epoch, 0.01, recipe or kd(T=2.0), cbs=cbs)
    return learn, torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def test_stored_and_live_heads_end_with_the_same_weights(tmp_path):
    t = teachers()
    stored = cache_teacher(
        t, named_dls(), tmp_path, views=0, store=dict(dtype='float32'), valid=True
    )
    (a, live), (b, old) = trained(t, seeded_dls()), trained(stored, seeded_dls())
    torch.testing.assert_close(old, live, rtol=1e-5, atol=1e-6)
    assert a.recorder.metric_names == b.recorder.metric_names
    torch.testing.assert_close(
        torch.tensor(a.recorder.values[-1]),
        torch.tensor(b.recorder.values[-1]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert (live - trained(dict(color=t['color'], shape=None), seeded_dls())[1]).abs().max() > 1e-3


def test_stored_heads_of_a_plain_list_whose_inputs_were_counted_by_the_user(tmp_path):
    t = teachers()
    stored = cache_teacher(t, learner().dls, tmp_path, store=dict(dtype='float32'), valid=True)
    torch.testing.assert_close(
        trained(stored, learner().dls)[1], trained(t, learner().dls)[1], rtol=1e-5, atol=1e-6
    )


def test_stored_heads_replay_the_views_that_their_teachers_saw(tmp_path):
    t, seen = teachers(), []
    stored = cache_teacher(t, noisy_dls(), tmp_path, views=2, store=dict(dtype='float32'))

    class Follow(Callback):
        order = 6

        def after_loss(self):
            if not self.training:
                return
            heads = self.learn.knowledge_distillation.distiller.heads
            for k, m in t.items():
                torch.testing.assert_close(
                    heads[k].teacher.outputs(self.xb, samples_of(self.learn)).logits,
                    m(self.x).detach(),
                )
            seen.append(self.x.clone())

    both_stored = trained(stored, noisy_dls(), cbs=Follow())
    assert len(seen) == 12 and not torch.equal(
        torch.cat(seen[:4]).sort(0).values, torch.cat(seen[4:8]).sort(0).values
    )
    # a head whose teacher runs, beside a stored one
    for k in t:
        torch.testing.assert_close(
            both_stored[1], trained({**stored, k: t[k]}, noisy_dls())[1], rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(
        both_stored[1], trained({k: tmp_path / k for k in t}, noisy_dls())[1]
    )  # folders
    assert 'create_batches' not in vars(both_stored[0].dls.train) and not [
        c for c in both_stored[0].cbs if type(c).__name__ in ('Epochs', 'TeacherTargets')
    ]


def test_a_second_fit_continues_with_the_next_view(tmp_path):
    stored, seen = cache_teacher(teachers(), noisy_dls(), tmp_path, views=2, check=False), []

    class See(Callback):
        def after_loss(self):
            if self.training:
                seen.append(self.x.clone())

    learn = quiet_learner(noisy_dls())
    with learn.no_bar():
        for _ in range(4):
            learn.distill(stored, 1, 0.01, kd(T=2.0), cbs=See())
    epochs = [torch.cat(seen[i : i + 4]).sum(1) for i in range(0, 16, 4)]
    both_views = [torch.cat(epochs[i : i + 2]).sort().values for i in (0, 2)]
    torch.testing.assert_close(*both_views)
    assert both_views[0].diff().min() > 0  # no sample showed a view twice


def test_without_a_stored_validation_set_the_live_heads_have_columns(tmp_path):
    t = teachers()
    stored = cache_teacher(t, named_dls(), tmp_path, views=0)
    learn, _ = trained(dict(color=stored['color'], shape=t['shape']), seeded_dls())
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['color_kd_loss'] is None and row['shape_kd_loss'] > 0 and row['valid_loss'] > 0


def test_a_recipe_is_chosen_for_stored_heads_and_without_a_check(tmp_path, capsys):
    t = teachers()
    stored = cache_teacher(t, named_dls(), tmp_path, views=0)
    for source, options in ((stored, {}), (t, dict(check=False))):
        learn = quiet_learner(seeded_dls())
        capsys.readouterr()
        with learn.no_bar():
            learn.distill(source, 1, 0.01, **options)
        out = capsys.readouterr().out
        assert (
            'color: recipe labels + dist' in out
            and 'shape: recipe labels + dist' in out
            and 'color_dist 73%' in out  # 3 times the gain of this teacher
        )


def test_stored_heads_of_classes_in_another_order_are_mapped_by_name(tmp_path):
    t, other = teachers(), ['star', 'disc', 'ring', 'cross']
    order = [shapes.index(c) for c in other]
    shape = nn.Linear(6, 4)
    with torch.no_grad():
        shape.weight.copy_(t['shape'].weight[order]), shape.bias.copy_(t['shape'].bias[order])
    theirs = Learner(
        DataBlock(
            (TransformBlock, CategoryBlock(vocab=other, sort=False)),
            getters=[row, lambda i: other[0]],
        ).dataloaders(list(range(96)), bs=16),
        shape,
        loss_func=nn.CrossEntropyLoss(),
    )
    a = cache_teacher(
        dict(color=t['color'], shape=theirs),
        named_dls(),
        tmp_path / 'a',
        views=0,
        store=dict(dtype='float32'),
    )
    assert a['shape'].manifest.vocab == other and a['color'].manifest.vocab == colors
    torch.testing.assert_close(
        trained(a, seeded_dls())[1], trained(t, seeded_dls())[1], rtol=1e-5, atol=1e-6
    )


def test_mistakes_with_stored_heads_are_named(tmp_path):
    t, dls = teachers(), noisy_dls()
    two, three = (cache_teacher(t, dls, tmp_path / str(n), views=n) for n in (2, 3))

    def refused(says, source, **kwargs):
        with pytest.raises(DistillError, match=says):
            quiet_learner(noisy_dls()).distill(source, 1, 0.01, kd(), **kwargs)

    refused(
        r'different views of the samples \(color: 2 view\(s\), seed 0; shape: 3 view\(s\), seed 0\)',
        dict(color=two['color'], shape=three['shape']),
    )
    seed1 = cache_teacher(t, dls, tmp_path / 'seed', views=2, run=dict(seed=1))
    refused('shape: 2 view.s., seed 1', dict(color=two['color'], shape=seed1['shape']))
    refused(
        'does not have the class.es. red, green, blue: it has disc',
        dict(color=two['shape'], shape=two['color']),
    )
    refused('loss= is not possible with several heads', two, loss=lambda s, t, y: 0.0)
    with pytest.raises(
        DistillError,
        match=r'shape: Mistakes [\s\S]*The teacher has the classes in a different order',
    ):
        cache_teacher(
            dict(color=t['color'], shape=lambda x: t['shape'](x)[:, [1, 0, 2, 3]]),
            dls,
            tmp_path / 'bad',
        )
    with pytest.raises(DistillError, match=r'2 column\(s\) of labels for 3 heads'):
        cache_teacher(t | dict(size=nn.Linear(6, 1)), dls, tmp_path / 'bad3')


def test_lr_find_save_and_export_with_stored_heads(tmp_path):
    learn = quiet_learner(named_dls())
    learn.path = tmp_path
    learn.add_cb(
        KD(cache_teacher(teachers(), named_dls(), tmp_path / 'c', views=0, valid=True), kd())
    )
    with learn.no_bar():
        learn.lr_find(num_it=10, show_plot=False)
        learn.fit(1, 0.01)
        learn.save('a')
        learn.validate()
    learn.export('e.pkl')
    assert isinstance(load_learner(tmp_path / 'e.pkl').model, Net)


# a teacher of several heads


class CountedNet(Net):
    "A teacher with both heads"

    def __init__(self, as_tuple=False):
        super().__init__(as_tuple)
        torch.manual_seed(1)
        opt = torch.optim.Adam(self.parameters(), 0.05)
        for _ in range(60):
            both(self(X), COLOR, SHAPE).backward()
            opt.step(), opt.zero_grad()
        self.calls = 0


def apart(net):
    "The same teacher as two teachers of one output"

    class Part(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.net, self.k = net, k

        def forward(self, x):
            out = self.net(x)
            return tuple(out)['color shape'.split().index(self.k)] if net.as_tuple else out[self.k]

    return {k: Part(k) for k in ('color', 'shape')}


@pytest.mark.parametrize('as_tuple', [False, True])
def test_a_teacher_of_both_heads_runs_once_a_batch(as_tuple):
    net = CountedNet(as_tuple)
    learn = learner()
    learn.distill(dict(color=net, shape=net), 1, 0.01, kd(alpha=0.5), check=False)
    batches = len(learn.dls.train) + len(learn.dls.valid)
    assert net.calls == batches
    other = learner()
    other.distill(apart(net), 1, 0.01, kd(alpha=0.5), check=False)
    for a, b in zip(learn.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b)


def test_a_learner_of_both_heads_teaches_each_by_the_names_of_its_classes():
    hues, forms = colors[::-1], ['star', 'disc', 'ring', 'cross']
    block = DataBlock(
        (
            TransformBlock,
            CategoryBlock(vocab=hues, sort=False),
            CategoryBlock(vocab=forms, sort=False),
        ),
        n_inp=1,
        getters=[row, color_of, shape_of],
    )
    net = CountedNet()
    theirs = Learner(block.dataloaders(list(range(96)), bs=16), net, loss_func=both)
    learn, first = learner(), First()
    learn.dls = named_dls()
    learn.distill(
        dict(color=theirs, shape=theirs), 1, 0.01, kd(T=1.0, alpha=1.0), cbs=first, check=False
    )
    loss, x, _, student = first.seen
    s, t = student(x), net(x)
    order = lambda mine, theirs: [theirs.index(c) for c in mine]
    want = losses.kl(s['color'], t['color'][:, order(colors, hues)], T=1.0) + losses.kl(
        s['shape'], t['shape'][:, order(shapes, forms)], T=1.0
    )
    assert loss == pytest.approx(want.item(), rel=1e-4)


# what works for one head works for several


def test_heads_are_compared_one_by_one():
    learn, t = learner(), teachers()
    net = CountedNet()
    models = dict(teacher=dict(color=net, shape=net), other=t, distilled=learn)
    reports = compare(models, seconds=0, repeats=50, progress=False)
    assert list(reports) == ['color', 'shape']
    x, c, h = [torch.stack(o) for o in zip(*learn.dls.valid_ds)]
    with torch.no_grad():
        own = dict(
            teacher=net.eval()(x), other={k: t[k](x) for k in t}, distilled=learn.model.eval()(x)
        )
    for k, y in dict(color=c, shape=h).items():
        models = reports[k].models
        for name, out in own.items():
            right = (out[k].argmax(1) == y).float().mean().item()
            assert models[name].measures['accuracy'].value == pytest.approx(right)
            loss = F.cross_entropy(out[k], y).item()
            assert models[name].loss == pytest.approx(loss, rel=1e-4)
        same = (own['distilled'][k].argmax(1) == own['teacher'][k].argmax(1)).float().mean().item()
        assert models['distilled'].agreement['same'] == pytest.approx(same)
    assert reports['color'].teacher == 'teacher'


class Masks(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, padding=1)
        self.kind, self.edge = nn.Conv2d(width, 3, 1), nn.Conv2d(width, 3, 1)

    def forward(self, x):
        h = self.body(x).relu()
        return dict(kind=self.kind(h), edge=self.edge(h))


@pytest.mark.parametrize('ignored', [2, 255])
def test_pixels_that_the_loss_of_all_heads_ignores_are_ignored_in_each_head(ignored):
    def whole(pred, kind, edge):
        each = (pred['kind'], kind), (pred['edge'], edge)
        return sum(F.cross_entropy(s, y, ignore_index=ignored) for s, y in each)

    whole.ignore_index = ignored
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, 6, 6, generator=g)
    kind, edge = torch.randint(2, (2, 32, 6, 6), generator=g)
    kind[:, :2], edge[:, 3:] = ignored, ignored
    items = list(zip(x, kind, edge))
    set_seed(0)
    dls = DataLoaders.from_dsets(items[:24], items[24:], bs=8)
    dls.n_inp = 1
    learn, teacher, first = Learner(dls, Masks(4), loss_func=whole), Masks(8), First()
    heads = dict(kind=teacher, edge=teacher)
    found = learn.check_teacher(heads)
    assert not [f for head in found.values() for f in head.errors]
    learn.distill(heads, 1, 0.01, kd(T=1.0, alpha=0.5), cbs=first, check=False)
    loss, x, ys, net = first.seen
    s, t = net(x), teacher(x)
    want = 0.5 * whole(s, *ys)
    for head, y in zip(heads, ys):
        p, q = [o[head].movedim(1, -1)[y != ignored].softmax(1) for o in (t, s)]
        want += 0.5 * (p * (p / q).log()).sum(1).mean()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    report = compare(dict(teacher=heads, student=learn), seconds=0, progress=False)
    x, *ys = [torch.stack(o) for o in zip(*learn.dls.valid_ds)]
    for head, y in zip(heads, ys):
        right = (teacher(x)[head].argmax(1) == y)[y != ignored].float().mean().item()
        got = report[head].models['teacher'].measures['accuracy'].value
        assert got == pytest.approx(right)


def test_only_models_with_the_same_heads_are_compared():
    learn, t = learner(), teachers()
    with pytest.raises(DistillError, match='different heads .color, shape and shape, color.'):
        compare(dict(a=t, b=dict(shape=t['shape'], color=t['color']), student=learn))
    half = dict(color=t['color'], shape=None)
    reports = compare(dict(teacher=half, student=learn), seconds=0, repeats=50, progress=False)
    assert list(reports) == ['color']


def test_a_recipe_is_found_for_all_heads():
    learn, t, calls = learner(), teachers(), []
    count = {k: Teacher(lambda x, k=k: (calls.append(k), t[k](x))[1]) for k in t}
    were = copy.deepcopy(learn.model.state_dict())
    found = learn.distill_find(count, 2, 5, rates=[0.01], trials=4, seeds=0, show=False)
    assert all(torch.equal(v, were[k]) for k, v in learn.model.state_dict().items())
    assert found.metric == 'accuracy, mean of the heads'
    assert {r.name for r in found.runs} >= {'labels alone', 'auto'}
    # each teacher answered once for the training set, and for the check
    assert calls.count('color') < 25
    learn.distill(t, 1, found.lr, found.recipe, check=False)


def test_the_score_of_a_search_is_the_mean_of_the_heads():
    learn, t = learner(), teachers()
    seen = []

    def score(logits, targets):
        right = [logits[k].argmax(1) == y for k, y in zip(('color', 'shape'), targets)]
        seen.append(torch.stack([r.float() for r in right]).mean(0))
        return seen[-1]

    search = lambda **kw: learn.distill_find(
        t, 1, 5, rates=[0.01], recipes=dict(mine=kd(T=2.0)), trials=2, seeds=0, show=False, **kw
    )
    usual, own = search(), search(score=score)
    assert seen
    assert [r.scores for r in usual.runs] == [pytest.approx(r.scores) for r in own.runs]


def test_heads_of_different_kinds_need_a_score_of_their_own():
    learn, t = learner(False, COLOR, SIZE), teachers()
    with pytest.raises(DistillError, match='so their scores cannot be averaged: pass score='):
        learn.distill_find(
            dict(color=t['color'], shape=nn.Linear(6, 1)), 1, kind=dict(shape='regression')
        )


def test_recipes_of_heads_are_compared_over_seeds(tmp_path):
    def make():
        return learner()

    recipes = {'alone': None, 'both': kd(T=2.0), 'apart': dict(color=kd(T=2.0), shape=kd(T=1.0))}
    run = lambda t: compare_recipes(
        make, t, recipes, n_epoch=1, lr_max=0.01, seeds=2, folder=tmp_path, progress=False
    )
    report = run(teachers())
    assert report.baseline == 'alone'
    assert report.metric == 'valid_loss'
    assert len({report.values(k)[0] for k in recipes}) == 3
    assert [r.history for r in run(teachers()).runs] == [r.history for r in report.runs]
    with pytest.raises(DistillError, match='teacher'):
        run(teachers() | dict(shape=nn.Linear(6, 4)))


def test_stored_outputs_for_inputs_without_labels_teach_each_head(tmp_path):
    t, items = teachers(), list(range(32))
    stored = cache_teacher(
        t, named_dls(), tmp_path, views=0, store='float32', unlabeled=items, progress=False
    )
    live, old = quiet_learner(seeded_dls()), quiet_learner(seeded_dls())
    for learn, targets in ((live, None), (old, stored)):
        set_seed(5)
        with learn.no_bar():
            unlabeled = dict(items=items, targets=targets)
            learn.distill(t, 2, 0.01, kd(T=2.0), unlabeled=unlabeled, check=False)
    for a, b in zip(live.model.parameters(), old.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inputs_without_labels_are_taught_by_stored_outputs_alone(tmp_path):
    t, items = teachers(), list(range(32))
    store = lambda name, **kw: cache_teacher(
        t, named_dls(), tmp_path / name, views=0, store='float32', progress=False, **kw
    )
    source, more = store('labeled'), store('more', unlabeled=items)
    live, old = quiet_learner(seeded_dls()), quiet_learner(seeded_dls())
    for learn, teacher, targets in ((live, t, None), (old, source, more)):
        set_seed(5)
        with learn.no_bar():
            unlabeled = dict(items=items, targets=targets)
            learn.distill(teacher, 2, 0.01, kd(T=2.0), unlabeled=unlabeled, check=False)
    for a, b in zip(live.model.parameters(), old.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_disagreements_are_those_of_each_head(capsys):
    learn, t = learner(), teachers()
    learn.dls = named_dls()
    found = DistillInterpretation.from_learner(learn, t)
    assert list(found) == ['color', 'shape']
    x, *_ = [torch.stack(o) for o in zip(*[(row(i),) for i in range(64, 96)])]
    with torch.no_grad():
        s = learn.model.eval()(x)
    for k in t:
        want = losses.kl(s[k], t[k](x), T=1.0, reduction='none').detach()
        torch.testing.assert_close(found[k].losses, want, rtol=1e-4, atol=1e-5)
        values, idx = found[k].top_losses(2)
        found[k].show_disagreements(2)
        shown = capsys.readouterr().out
        names = dict(color=colors, shape=shapes)[k]
        for i in idx.tolist():
            assert names[t[k](x)[i].argmax()] in shown
            assert names[s[k][i].argmax()] in shown


class Pictures(nn.Module):
    "A convolutional net with two heads"

    def __init__(self, width):
        super().__init__()
        conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(conv(3, width), conv(width, width))
        self.color, self.shape = nn.Linear(width, 3), nn.Linear(width, 4)

    def forward(self, x):
        h = self.body(x).mean((2, 3))
        return dict(color=self.color(h), shape=self.shape(h))


def test_maps_of_each_teacher_are_shown():
    images = [(torch.rand(3, 16, 16), c, s) for c, s in zip(COLOR[:16], SHAPE[:16])]
    dls = DataLoaders.from_dsets(images, images, bs=8, num_workers=0)
    dls.n_inp = 1
    learn = Learner(dls, Pictures(4), loss_func=both)
    big = Pictures(8)
    figures = learn.show_features(dict(color=big, shape=big), layers={'body.0': 'body.0'}, n=2)
    assert list(figures) == ['color', 'shape']
    assert len(figures['color'].axes) == len(figures['shape'].axes) == 6


def test_a_training_of_heads_continues_from_its_file(tmp_path, capsys):
    def run(file=None):
        learn, cb = quiet_learner(named_dls()), KD(teachers())
        learn.path = tmp_path
        if file is not None:
            learn.load(file)
        learn.logger = print
        with learn.no_bar():
            learn.fit(1, 0.01, cbs=cb)
        return learn, {k: r.batches for k, r in cb.distiller.ratios.items()}

    learn, batches = run()
    assert batches == {'color.dist': 4, 'shape.dist': 4}
    learn.save('half')
    capsys.readouterr()
    _, batches = run('half')
    assert batches == {'color.dist': 8, 'shape.dist': 8}
    assert 'optimizer from half.distill.pth' in capsys.readouterr().out


def test_a_chosen_recipe_of_a_head_is_that_of_the_file(tmp_path, capsys):
    learn, cb, t = quiet_learner(named_dls()), KD(teachers()), teachers()
    learn.path = tmp_path
    with learn.no_bar():
        learn.fit(1, 0.01, cbs=cb)
    learn.save('half')
    chosen = {k: h.chosen_text for k, h in cb.distiller.heads.items()}
    assert chosen['color'].startswith('labels + dist(T=')
    # a teacher that is softened otherwise
    with torch.no_grad():
        t['color'].weight.mul_(3), t['color'].bias.mul_(3)
    other, again = quiet_learner(named_dls()), KD(t)
    other.path, other.logger = tmp_path, print
    other.load('half')
    with other.no_bar():
        other.fit(1, 0.01, cbs=again)
    assert {k: h.chosen_text for k, h in again.distiller.heads.items()} == chosen
    assert f'fastdistill: color: recipe {chosen["color"]}, as before' in capsys.readouterr().out
