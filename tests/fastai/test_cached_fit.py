"Fits from a cache, through the callback that users call: the loss, its gradient and its column are the live teacher's."

import pickle, random
from contextlib import nullcontext
import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL
from fastai.callback.mixup import MixUp
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter
from fastai.vision.all import Flip, ImageBlock, MaskBlock, RandomErasing, Resize, unet_learner
from cached import (
    CROPS,
    N,
    TRAIN,
    Convs,
    cache_teacher,
    data,
    feed,
    image,
    label,
    mask,
    quiet,
    state_of,
    student,
)
from fastdistill import DistillWarning, Distiller, Term, at, kd, losses, soft_labels
from fastdistill.cache import TeacherCache, cache_dataset
from fastdistill.fastai import KnowledgeDistillation, TeacherBlock
from fastdistill.fastai.cache_feed import StoredOutputs
from fastdistill.fastai.learner_notes import notes_of
from fastdistill.fastai.sampled_batches import sampled
from fastdistill.fastai.transforms import Replay
from fastdistill.base.outputs import DistillError, Outputs, TopK
from fastdistill.cache import Replayed
from fastdistill.features import Taps
from fastdistill.teachers import Teacher
from torch import nn
from torch.nn.functional import kl_div

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)


def many(i):
    return 'abcdefghijkl'[i % 12]


def names_of(learn):
    return list(learn.recorder.metric_names)


def column(learn, name):
    return learn.recorder.values[-1][names_of(learn).index(name) - 1]  # values have no epoch


def gradient(loss, model):
    "One long vector of it"
    ps = [p for p in model.parameters() if p.requires_grad]
    gs = torch.autograd.grad(loss, ps, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else apps.plain([g])[0]).flatten()
            for p, g in zip(ps, gs)
        ]
    )


class Before(Callback):
    "The images as they were before they are mixed"

    order = -15

    def before_batch(self):
        self.x0 = torch.Tensor(self.learn.x).clone()


class Watch(Callback):
    "Compares what is about to be back-propagated with a loss of its own: fn(learn, student's logits) of plain tensors"

    order = 6  # the callback before it has added its part

    def __init__(self, fn):
        super().__init__()
        self.fn, self.worst, self.n = fn, 0.0, 0

    def after_loss(self):
        if not self.training:
            return
        want = self.fn(self.learn, apps.logits(self.learn.pred))
        a, b = [gradient(o, self.model) for o in (self.learn.loss_grad, want)]
        self.worst, self.n = (
            max(
                self.worst,
                ((a - b).norm() / b.norm()).item(),
                (self.learn.loss - want).abs().item(),
            ),
            self.n + 1,
        )


def live(teacher, app, T=4.0, alpha=0.9):
    "Hinton's loss with the teacher asked about this very batch"

    def fn(learn, s):
        with torch.no_grad():
            t = apps.logits(teacher(*apps.plain(learn.xb)))
        return (1 - alpha) * app.task(s, apps.plain(learn.yb)[0]) + alpha * app.divergence(s, t, T)

    return fn


def by_name(name):
    return next(a for a in apps.APPS if a.name == name)


def images():
    return (lambda: student(data(item_tfms=CROPS()))), Convs(3).eval(), by_name('image')


def maps():
    make = lambda: data(MaskBlock(codes=['x', 'y']), mask, 'usual', item_tfms=CROPS())
    teacher = unet_learner(make(), apps.big, pretrained=False, n_out=2).model.eval()
    return (
        (lambda: unet_learner(make(), apps.small, pretrained=False, n_out=2)),
        teacher,
        by_name('unet'),
    )


def tables():
    return (
        (lambda: apps.quiet(*apps.tabular())[0]),
        apps.tabular()[1].model.eval(),
        by_name('tabular'),
    )


@pytest.mark.parametrize('make', [images, maps, tables])
def test_the_loss_its_gradient_and_its_column_are_the_live_teachers(tmp_path, make):
    learner, teacher, app = make()
    cache = cache_teacher(
        teacher,
        learner().dls,
        tmp_path,
        views=1 if make is tables else 2,
        store=dict(dtype='float32'),
        valid=True,
    )
    learn = learner()
    watch = Watch(live(teacher, app))
    quiet(learn, 2, cbs=[KnowledgeDistillation(cache, kd()), watch])
    assert watch.worst < 1e-4 and watch.n == 2 * len(learn.dls.train)
    pairs = [
        (s, t)
        for (s, _), (t, _) in zip(
            apps.answers(learn.model, learn.dls.valid), apps.answers(teacher, learn.dls.valid)
        )
    ]
    s, t = [torch.cat(o) for o in zip(*pairs)]
    assert column(learn, 'kd_loss') == pytest.approx(app.divergence(s, t, 4.0).item(), rel=1e-3)
    ys = torch.cat([y for _, y in apps.answers(teacher, learn.dls.valid)])
    assert column(learn, 'valid_loss') == pytest.approx(app.task(s, ys).item(), rel=1e-4)


def test_distill_takes_a_cache_and_a_feed_and_without_validation_the_column_is_empty(tmp_path):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)
    learn = student(data(), metrics=apps.accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.distill(cache, 1, 1e-3, kd())
    assert (
        names_of(learn)
        == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'task_loss', 'kd_loss', 'time']
        and column(learn, 'kd_loss') is None
    )
    with learn.no_bar(), learn.no_logging():
        learn.distill(StoredOutputs(tmp_path), 1, 1e-3, soft_labels())
    assert len(learn.metrics) == 1


def test_a_fit_from_a_cache_runs_no_teacher(tmp_path, monkeypatch):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=2, layers=['a'])

    def never(*args, **kwargs):
        raise AssertionError('a Teacher ran')

    for name in ('__init__', 'outputs', 'probe'):
        monkeypatch.setattr(Teacher, name, never)
    callback = KnowledgeDistillation(cache, kd() + at(layers={'bn': 'a'}))
    quiet(student(data()), 1, cbs=callback)
    assert isinstance(callback.distiller.teacher, StoredOutputs)
    assert len(callback.distiller.pairs) == 1


def test_mixed_batches_learn_the_mixture_of_stored_probabilities(tmp_path):
    teacher, before, app = Convs(3).eval(), Before(), by_name('image')
    cache = cache_teacher(teacher, data(), tmp_path, views=2, store=dict(dtype='float32'))
    shares = []

    def fn(learn, s):
        x, x0 = torch.Tensor(learn.x).flatten(1), before.x0
        share = torch.linalg.lstsq(
            x0.flatten(1).T.double(), x.T.double()
        ).solution.T.float()  # of whom each image is made
        shares.append(share.max(1).values.min())
        with torch.no_grad():
            p = share @ teacher(x0).softmax(1)
        return app.divergence(s, p.log(), 2.0)

    watch = Watch(fn)
    quiet(
        student(data()),
        2,
        cbs=[KnowledgeDistillation(cache, T=2, alpha=1.0), MixUp(0.8), before, watch],
    )
    assert watch.n == 4 and watch.worst < 1e-3 and min(shares) < 0.95


@pytest.mark.parametrize('part', ['inputs', 'labels'])
@pytest.mark.parametrize('stored', [True, False], ids=['cache', 'raw items'])
def test_a_callback_that_reorders_the_samples_of_a_batch_is_refused(tmp_path, stored, part):
    class OwnMixing(Callback):
        def before_batch(self):
            i = torch.randperm(len(self.x))
            if part == 'inputs':
                self.learn.xb = (self.x.lerp(self.x[i], 0.3),)
            else:
                self.learn.yb = (self.y[i],)

    net = Convs(3).eval()
    items = lambda raw: torch.zeros(len(raw), 3, 8, 8)
    teacher = cache_teacher(net, data(), tmp_path) if stored else Teacher(net, items=items)
    callback = KnowledgeDistillation(teacher, kd(), check=False)
    with pytest.raises(DistillError, match='A callback reorders the samples of the batch or mixes'):
        quiet(student(data()), 1, cbs=[callback, OwnMixing()])
    quiet(student(data()), 1, cbs=[KnowledgeDistillation(net, kd(), check=False), OwnMixing()])


@pytest.mark.parametrize('event', ['before_epoch', 'after_epoch'])
def test_new_dataloaders_in_the_middle_of_a_fit_are_refused(tmp_path, event):
    class Larger(Callback):
        def __call__(self, event_name):
            if event_name == event:
                self.learn.dls = data(bs=11)

    cache = cache_teacher(Convs(3).eval(), data(), tmp_path)
    learn = student(data())
    with pytest.raises(
        DistillError, match='DataLoaders of the Learner were replaced during the fit'
    ):
        quiet(learn, 2, cbs=[KnowledgeDistillation(cache, kd()), Larger()])
    quiet(learn, 1, cbs=KnowledgeDistillation(cache, kd()))


def test_a_callback_may_keep_join_and_pickle_the_batches_of_a_fit_from_a_cache(tmp_path):
    class Keeps(Callback):
        def before_batch(self):
            kept.append(self.x)

    kept, dls = [], data()
    cache = cache_teacher(Convs(3).eval(), dls, tmp_path)
    quiet(student(dls), 1, cbs=[KnowledgeDistillation(cache, kd(), check=False), Keeps()])
    joined = torch.cat(kept[:2])
    assert torch.equal(joined[: len(kept[0])], kept[0])
    assert torch.equal(pickle.loads(pickle.dumps(kept[0])), kept[0])


def test_layers_come_from_the_cache_too(tmp_path):
    teacher = Convs(3).eval()
    cache = cache_teacher(
        teacher, data(), tmp_path, views=2, store=dict(dtype='float32'), layers=['a']
    )
    learn = student(data())

    def fn(learn, s):
        with Taps(learn.model, ['bn']) as mine, Taps(teacher, ['a']) as theirs:
            with torch.random.fork_rng():
                learn.model(torch.Tensor(learn.x))
            with torch.no_grad():
                teacher(torch.Tensor(learn.x))
            a, b = [
                nn.functional.normalize(o.pow(2).mean(1).flatten(1))
                for o in apps.plain((mine.pop()['bn'], theirs.pop()['a']))
            ]
        return by_name('image').task(s, learn.y) + 1000 * (a - b).pow(2).mean()

    watch = Watch(fn)
    quiet(
        learn, 2, cbs=[KnowledgeDistillation(cache, at(layers={'bn': 'a'}, weight='paper')), watch]
    )
    assert watch.worst < 1e-3
    with pytest.raises(DistillError, match='outputs have no layer .b.. They have: a'):
        quiet(learn, 1, cbs=KnowledgeDistillation(cache, at(layers={'b': 'b'})))
    with pytest.raises(DistillError, match='stored layers are for unmixed images'):
        quiet(
            learn,
            1,
            cbs=[KnowledgeDistillation(cache, at(layers={'bn': 'a'}, weight='paper')), MixUp()],
        )


@pytest.mark.parametrize('layers', ['auto', 'last', 'embedding', {'bn': 'a'}], ids=str)
def test_a_cache_without_layers_says_how_to_store_them(tmp_path, layers):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path)
    with pytest.raises(DistillError) as e:
        quiet(student(data()), 1, cbs=KnowledgeDistillation(cache, at(layers=layers)))
    said = str(e.value)
    assert (
        "Store the layers too, cache_teacher(..., layers=['layer3']), and name the layers: layers={'student.layer': 'layer3'}"
        in said
    )
    assert 'Feed' not in said


def test_a_cache_with_layers_names_them(tmp_path):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, layers=['a'])
    with pytest.raises(DistillError) as e:
        quiet(student(data()), 1, cbs=KnowledgeDistillation(cache, at()))
    assert f'not the stored outputs in {tmp_path}' in str(e.value)
    assert "It stores 'a': name the layers: layers={'student.layer': 'a'}" in str(e.value)


def conv1d(width):
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv1d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(width, 5, 3, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    ).eval()


def series(n=16):
    return [
        (torch.randn(3, 12, generator=torch.Generator().manual_seed(i)), i % 2) for i in range(n)
    ]


@pytest.mark.parametrize('write', ['cache_teacher', 'cache_dataset'])
def test_series_of_1d_convolutions_are_stored_as_tokens(tmp_path, write):
    teacher, items = conv1d(8), series()
    dls = DataLoaders(TfmdDL(items, bs=8, shuffle=True), TfmdDL(items[:4], bs=8))
    dls.loss_func = CrossEntropyLossFlat()
    names = ['0', '2@mean', '5']  # a series, its mean over time, a vector
    if write == 'cache_teacher':
        cache = cache_teacher(
            teacher, dls, tmp_path, views=0, store=dict(dtype='float32'), layers=names
        )
    else:
        cache = cache_dataset(
            Teacher(teacher, layers=names),
            items,
            tmp_path,
            views=0,
            store=dict(dtype='float32'),
            keys=items,
        )
    feats = cache.outputs(np.arange(len(items))).feats
    x = torch.stack([x for x, _ in items])
    with torch.no_grad():
        conv, later = teacher[0](x), teacher[:3](x)
    assert [*feats] == ['0@tokens', '2@tokens@mean', '5']
    torch.testing.assert_close(feats['0@tokens'], conv.transpose(1, 2))
    torch.testing.assert_close(feats['2@tokens@mean'], later.mean(2))
    student, callback = (
        conv1d(6),
        KnowledgeDistillation(
            cache, Term(losses.mse, 0.1, layers=[('0', '0'), ('2@mean', '2@mean')])
        ),
    )
    learn = Learner(dls, student, loss_func=dls.loss_func)
    quiet(learn, 1, cbs=callback)
    pairs = [(p.student, p.s_shape[1:], p.teacher, p.t_shape[1:]) for p in callback.distiller.pairs]
    assert pairs == [
        ('0@tokens', (12, 6), '0@tokens', (12, 8)),
        ('2@tokens@mean', (5,), '2@tokens@mean', (5,)),
    ]
    live = KnowledgeDistillation(
        teacher, Term(losses.mse, 0.1, layers=[('0', '0'), ('2@mean', '2@mean')]), check=False
    )
    quiet(Learner(dls, conv1d(6), loss_func=dls.loss_func), 1, cbs=live)
    assert [(p.student, p.t_shape[1:]) for p in live.distiller.pairs] == [
        (s, t) for s, _, _, t in pairs
    ]


@pytest.mark.parametrize('how', ['callback', 'distill'])
def test_views_walk_on_over_epochs_and_over_two_fits(tmp_path, how):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=4)
    learn, callback, epochs = student(data(bs=11)), KnowledgeDistillation(cache), []

    class Rows(Callback):
        order = 6

        def before_train(self):
            epochs.append([])

        def after_loss(self):
            if self.training:
                epochs[-1] += [bytes(o) for o in self.learn.teacher_targets.samples.rows.numpy()]

    for _ in range(2):
        if how == 'callback':
            quiet(learn, 2, cbs=[callback, Rows()])  # as in fine_tune
        else:
            with learn.no_bar(), learn.no_logging():
                learn.distill(cache, 2, 1e-3, cbs=Rows())
    stored = {
        bytes(r): (v, i) for v in range(4) for i, r in enumerate(cache.rows(np.arange(TRAIN), v))
    }
    shown = [[stored[o] for o in e] for e in epochs]
    assert sorted(o for e in shown for o in e) == [
        (v, i) for v in range(4) for i in range(TRAIN)
    ]  # each view once
    assert all(
        sorted(i for _, i in e) == list(range(TRAIN)) and len({v for v, _ in e}) > 1 for e in shown
    )


def test_a_caches_folder_is_enough(tmp_path):
    cache_teacher(Convs(3).eval(), data(), tmp_path / 'c', views=2)
    learn = student(data())
    with learn.no_bar(), learn.no_logging():
        learn.distill(tmp_path / 'c', 1, 1e-3, kd())
    assert names_of(learn)[-2:] == ['kd_loss', 'time']


@pytest.mark.parametrize(
    'of, match',
    [
        (lambda folder: 'memory://nothing/here', 'There is no cache at memory://nothing/here'),
        (
            lambda folder: folder,
            'is a folder.*In fastai, the folder of a finished cache can be the teacher',
        ),
        (lambda folder: [folder, Convs(3).eval()], 'is a folder.*but not part of a list'),
    ],
)
def test_a_place_without_a_cache_is_named_as_it_was_given(tmp_path, of, match):
    with pytest.raises(DistillError, match=match):
        quiet(student(data()), cbs=KnowledgeDistillation(of(tmp_path), check=False))


@pytest.mark.parametrize('views', [-1, 1.5, '2', True, None])
def test_views_that_are_no_whole_number_are_refused(tmp_path, views):
    with pytest.raises(DistillError, match=f'views={views!r}: must be a whole number from 0'):
        cache_teacher(Convs(3).eval(), data(), tmp_path, views)


def test_one_view_for_many_epochs_is_noticed(tmp_path, capsys):
    "Students overfit to it: worse than without a teacher (benchmarks/LOG.md)"
    teacher = Convs(3).eval()

    def said(dls, n, **kwargs):
        cache = cache_teacher(teacher, dls, tmp_path / str(len(list(tmp_path.iterdir()))), **kwargs)
        learn = student(dls)
        learn.logger = print
        with learn.no_bar():
            learn.fit(n, cbs=KnowledgeDistillation(cache))
        return 'the cache has one view' in capsys.readouterr().out

    assert said(data(), 2)
    assert not said(data(), 1) and not said(data(), 2, views=2) and not said(data(), 2, views=0)
    assert said(data(augment='none', item_tfms=Resize(24)), 2)  # random crops
    unchanged = data(augment='none', item_tfms=Resize((34, 30)))  # the size of the images
    assert not said(unchanged, 2) and not said(unchanged, 2, views=0)
    with pytest.warns(DistillWarning, match='One view is stored'):
        assert not said(unchanged, 2, views=2)


# nothing is left


def changed(learn, was):
    "What differs: names of attributes of the DataLoaders, callbacks"
    (loaders, cbs), (loaders0, cbs0) = state_of(learn), was
    attrs = [
        k
        for a, b in zip(loaders, loaders0)
        for k in {*a, *b} - {'rng', '_DataLoader__idxs', 'it'}
        if a.get(k) is not b.get(k)
    ]
    # by type: no_bar makes a new progress bar
    names, names0 = [{type(c).__name__ for c in o} for o in (cbs, cbs0)]
    return attrs + sorted(names ^ names0)


class Stops(Callback):
    order = 7

    def __init__(self, error):
        super().__init__()
        self.error = error

    def after_loss(self):
        assert sampled(self.dls.train) and isinstance(self.dls.train.after_batch, Replay)
        raise self.error


@pytest.mark.parametrize('recipe', [kd, lambda: kd() + at(layers={'bn': 'a'})])
def test_nothing_is_left_after_a_fit_an_error_or_an_interrupt(tmp_path, recipe):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=2, valid=True, layers=['a'])
    learn = student(data(), metrics=apps.accuracy)
    quiet(learn)  # what the first fit of a Learner sets up is not ours
    was, model, metrics = state_of(learn), apps.snapshot(learn.model), list(learn.metrics)
    for stop in (None, ValueError('no'), KeyboardInterrupt('stop')):
        cbs = [KnowledgeDistillation(cache, recipe()), *([] if stop is None else [Stops(stop)])]
        if stop is None:
            quiet(learn, cbs=cbs)
        else:
            with pytest.raises(type(stop)):
                quiet(learn, cbs=cbs)
        learn.zero_grad()
        assert changed(learn, was) == [] and list(learn.metrics) == metrics
        assert {n: o[1:] for n, o in apps.modes(learn.model).items()} == {
            n: o[1:] for n, o in model[3].items()
        }
        assert (
            len(learn.dls.one_batch()) == 2
            and len(learn.dls.valid.one_batch()) == 2
            and len(learn.validate()) == 2
        )
    learn.add_cb(KnowledgeDistillation(cache))
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, cbs=Stops(KeyboardInterrupt('stop')))
    quiet(learn, 2)
    assert changed(learn, was) == ['KnowledgeDistillation'] and list(learn.metrics) == metrics


@pytest.mark.parametrize('views', [0, 2])
def test_alpha_0_trains_as_if_there_were_no_teacher(tmp_path, views):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=views)

    class Attached(Callback):  # the same views, and no teacher
        def before_fit(self):
            self.feed = feed(StoredOutputs(cache), self.learn)

        def before_train(self):
            self.feed.begin(self.epoch)

        def after_fit(self):
            self.feed.detach()

    def run(*cbs):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        learn = student(data())
        quiet(learn, 2, cbs=cbs)
        return [
            *learn.model.state_dict().values(),
            torch.tensor(learn.recorder.values[-1][:2]),
            torch.rand(3),
        ]

    a, b = (
        run(*([Attached()] if views else [])),
        run(KnowledgeDistillation(cache, alpha=0.0)),
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not all(
        torch.equal(x, y) for x, y in zip(a, run(KnowledgeDistillation(cache, alpha=0.5)))
    )


# few classes of many


def expected(tail, s, t, k):
    "KL of what a tail policy says of the teacher, one sample at a time"
    out = []
    for a, b in zip(s.log_softmax(1), t.softmax(1)):
        top = b.topk(k).indices
        rest = torch.ones_like(b, dtype=torch.bool).index_fill(0, top, False)
        if tail == 'zero':
            p, q = b[top] / b[top].sum(), a[top]
        if tail == 'uniform':
            p, q = torch.where(rest, b[rest].sum() / rest.sum(), b), a
        if tail == 'mean':
            p, q = torch.where(rest, b[rest].log().mean().exp(), b), a
        if tail == 'mean':
            p = p / p.sum()
        if tail == 'bucket':
            p, q = (
                torch.cat([b[top], b[rest].sum()[None]]),
                torch.cat([a[top], a[rest].logsumexp(0)[None]]),
            )
        out.append((p * (p.log() - q)).sum())
    return torch.stack(out).mean()


@pytest.mark.filterwarnings('ignore:The cache stores the . likeliest')
@pytest.mark.parametrize('tail', ['mean', 'uniform', 'zero', 'bucket'])
def test_the_likeliest_classes_and_what_is_assumed_of_the_rest(tmp_path, tail):
    teacher = Convs(12).eval()
    make = lambda: data(get_y=many)
    cache = cache_teacher(
        teacher, make(), tmp_path, views=1, store=dict(topk=3, tail=tail, dtype='float32')
    )

    def fn(learn, s):
        with torch.no_grad():
            t = teacher(torch.Tensor(learn.x))
        return expected(tail, s, t, 3)

    watch = Watch(fn)
    quiet(student(make(), 12), 1, cbs=[KnowledgeDistillation(cache, T=1, alpha=1.0), watch])
    assert watch.n and watch.worst < 1e-4


@pytest.mark.filterwarnings('ignore:The cache stores the . likeliest')
@pytest.mark.parametrize('tail', ['mean', 'uniform', 'zero', 'bucket'])
def test_a_plain_loop_takes_the_likeliest_classes_as_they_are_stored(tmp_path, tail):
    x, y = apps.rows()
    teacher, net = apps.mlp(16).eval(), apps.mlp(6)
    images = torch.utils.data.TensorDataset(x, y)
    cache = cache_dataset(
        Teacher(teacher), images, tmp_path, views=0, store=dict(topk=2, tail=tail, dtype='float32')
    )
    distiller = Distiller(net, lambda x: None, kd(T=1, alpha=0.7))
    for x, y, rows in torch.utils.data.DataLoader(Replayed(images, cache), batch_size=16):
        t = cache.decode(rows)
        assert isinstance(t.logits, TopK)
        s = net(x)
        task = nn.functional.cross_entropy(s, y)
        got = distiller.compute(Outputs(s), t, task, (y,))
        want = 0.3 * task + 0.7 * expected(tail, s, teacher(x).detach(), 2)
        torch.testing.assert_close(got.total, want)
        torch.testing.assert_close(
            gradient(got.total, net), gradient(want, net), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(kd(T=1, alpha=0.7)(s, t.logits, y), want)


# what doesn't fit


def test_other_data_and_other_transforms_are_refused_before_the_first_batch(tmp_path, monkeypatch):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path, views=1)

    def refused(dls, match):
        learn = student(dls)
        was = state_of(learn)
        weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with pytest.raises(DistillError, match=match):
            quiet(learn, cbs=KnowledgeDistillation(cache))
        assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
        assert {type(c) for c in learn.cbs} == {type(c) for c in was[1]} and not learn.metrics
        assert not any(map(sampled, learn.dls.loaders))

    refused(data(item_tfms=CROPS()), 'transform after_item: noise: .* in the cache, none now')
    refused(data(augment='colours'), 'after_batch: RandomErasing: none in the cache')
    refused(data(valid=[0]), '8 of 29 samples have no row .* This is a different dataset')
    refused(data(get_y=lambda i: 'abcd'[i % 4]), r'does not have the class\(es\) d')
    with pytest.raises(DistillError, match='There is no cache at .*nowhere'):
        KnowledgeDistillation(TeacherCache(tmp_path / 'nowhere'))


class AddFlip(Callback):
    def before_epoch(self):
        if self.epoch == 1:
            self.dls.train.after_batch.add(Flip())


@pytest.mark.parametrize(
    'views, y, match',
    [
        (1, CategoryBlock, 'after_batch: Flip.* none in the cache'),
        (0, CategoryBlock, None),
        (0, MaskBlock(codes=['x', 'y']), 'Flip would move'),
    ],
)
def test_transforms_that_are_added_during_a_fit_are_refused_too(tmp_path, views, y, match):
    dense = y is not CategoryBlock
    make = lambda: data(y, mask if dense else label, 'none', item_tfms=Resize(8, method='squish'))
    model = lambda: nn.Conv2d(3, 2, 1) if dense else nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    cache = cache_teacher(model(), make(), tmp_path, views=views)
    learn = Learner(make(), model(), CrossEntropyLossFlat(axis=1 if dense else -1))
    with nullcontext() if match is None else pytest.raises(DistillError, match=match):
        quiet(learn, 2, cbs=[KnowledgeDistillation(cache, kd()), AddFlip()])
    assert len(learn.recorder.values) == (2 if match is None else 1)


# together with the rest of fastai


def test_lr_find_then_fit(tmp_path):
    teacher = Convs(3).eval()
    cache = cache_teacher(teacher, data(), tmp_path / 'c', views=2, store=dict(dtype='float32'))
    learn = student(data(), path=tmp_path)
    callback, watch = KnowledgeDistillation(cache, kd()), Watch(live(teacher, by_name('image')))
    quiet(learn)
    was, weights = state_of(learn), {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.add_cb(callback)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=8, show_plot=False)
    assert (
        all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
        and not notes_of(learn).passed_epochs
    )
    quiet(learn, 2, cbs=watch)
    assert watch.worst < 1e-4 and notes_of(learn).passed_epochs[cache.identity] == 2
    learn.remove_cb(callback)
    assert changed(learn, was) == []


def test_targets_of_a_block_teach_as_the_teacher_itself():
    teacher, app = Convs(3).eval(), by_name('image')
    plain = data(item_tfms=CROPS(), augment='light')
    with torch.no_grad():  # of the unchanged pictures
        x = torch.cat([torch.Tensor(plain.test_dl([i], bs=1).one_batch()[0]) for i in range(N)])
        stored = teacher(x).numpy()
    dls = DataBlock(
        (ImageBlock, CategoryBlock, TeacherBlock),
        get_x=image,
        get_y=[label, lambda i: stored[i]],
        splitter=IndexSplitter(range(TRAIN, N)),
        item_tfms=Resize(24),
        batch_tfms=RandomErasing(p=1.0),
    ).dataloaders(list(range(N)), bs=8, num_workers=0)
    told = []

    class Notes(Callback):
        order = 4

        def after_loss(self):
            told.append(torch.Tensor(self.learn.teacher_targets.samples.target))

    kl = lambda s, t: kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction='batchmean') * 16
    watch = Watch(lambda learn, s: 0.1 * app.task(s, learn.y) + 0.9 * kl(s, told[-1]))
    learn = student(dls, metrics=apps.accuracy)
    quiet(learn, 2, cbs=[KnowledgeDistillation(recipe=kd()), Notes(), watch])
    assert watch.worst < 1e-5 and column(learn, 'kd_loss') > 0 and names_of(learn)[-2] == 'kd_loss'
    rows = {tuple(r) for r in stored.round(4).tolist()}
    assert {tuple(r) for r in torch.cat(told).numpy().round(4).tolist()} <= rows
    with pytest.raises(DistillError, match='These batches have no teacher targets'):
        quiet(student(data()), cbs=KnowledgeDistillation())


def test_a_fit_from_a_damaged_cache_stops_before_its_first_batch(tmp_path):
    learner, teacher, _ = images()
    cache_teacher(teacher, learner().dls, tmp_path, views=2)
    bad = tmp_path / 'view001' / '000000.bin'
    bad.write_bytes(b'\xff' * bad.stat().st_size)
    learn = learner()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(
        DistillError, match='Damaged files in .*: view001/000000.bin differs from what was written'
    ):
        learn.distill(tmp_path, 1)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert cache_teacher(teacher, learner().dls, tmp_path, views=2).check()
    quiet(learn, 1, cbs=KnowledgeDistillation(tmp_path))


def test_a_batch_size_of_nothing_is_refused(tmp_path):
    learner, teacher, _ = images()
    for bs in (0, -3):
        with pytest.raises(DistillError, match=f'bs={bs}: must be a whole number of at least 1'):
            cache_teacher(teacher, learner().dls, tmp_path, run=dict(bs=bs))
