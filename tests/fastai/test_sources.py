"Every source of teacher outputs meets one protocol, and a batch brings only what its source needs."

import inspect, multiprocessing, pickle, random, runpy
from functools import partial
from pathlib import Path
import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import Callback, CancelFitException, Learner
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, TransformBlock
from torch import nn
import cached, processes
from fastdistill import Teacher
from fastdistill.base.batch_samples import BatchSamples
from fastdistill.base.output_source import OutputSource
from fastdistill.fastai import KnowledgeDistillation, TeacherBlock, cache_teacher, kd
from fastdistill.fastai.cache_feed import StoredOutputs

pytestmark = [pytest.mark.filterwarnings(w) for w in apps.FASTAI_WARNINGS]

N, C = 24, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
NET = nn.Linear(4, C)
ROWS = NET(X).detach().numpy()


def vector(i):
    return X[i].clone()


def label(i):
    return 'abc'[i % C]


def row(i):
    return ROWS[i]


def of_items(items):
    return torch.stack([X[i] for i in items])


def data(*more, bs=4):
    return DataBlock(
        (TransformBlock, CategoryBlock, *more),
        get_x=vector,
        get_y=[label, row] if more else label,
        splitter=IndexSplitter(range(16, N)),
    ).dataloaders(list(range(N)), bs=bs, num_workers=0)


def sources(folder):
    "name -> (teacher= of the callback, DataLoaders)"
    write = lambda: cache_teacher(NET, data(), folder, views=0, store='float32', check=False)
    return dict(
        model=lambda: (NET, data()),
        ensemble=lambda: ([NET, NET], data()),
        items=lambda: (Teacher(NET, items=of_items), data()),
        cache=lambda: (write(), data()),
        block=lambda: (None, data(TeacherBlock)),
    )


NAMES = [*sources('')]


class Ask(Callback):
    "In each batch: what the callback's source says, what the model says of the same inputs, the batch itself"

    order = 6

    def __init__(self):
        super().__init__()
        self.seen = []

    def before_batch(self):
        self.x0 = self.learn.x.clone()

    def after_loss(self):
        kd = self.learn.knowledge_distillation
        brought = getattr(self.learn, 'teacher_targets', None)
        samples = None if brought is None else brought.samples
        self.source = kd.distiller.teacher
        if self.training:
            out = self.source.outputs(self.learn.xb, samples).logits
            self.seen.append((out, NET(torch.Tensor(self.learn.x)).detach(), samples))


def fitted(folder, name, *cbs, epochs=1):
    teacher, dls = sources(folder)[name]()
    learn, ask = Learner(dls, nn.Linear(4, C)), Ask()
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, cbs=[KnowledgeDistillation(teacher, kd(), check=False), ask, *cbs])
    return learn, ask


METHODS = [
    n for n, v in vars(OutputSource).items() if inspect.isfunction(v) and not n.startswith('_')
]


def test_the_protocol_has_the_four_verbs():
    assert {'start', 'outputs', 'reset', 'stop'} <= set(METHODS)
    assert list(inspect.signature(OutputSource.outputs).parameters)[1:] == [
        'inputs',
        'samples',
        'layers',
    ]


@pytest.mark.parametrize('name', NAMES)
def test_each_source_meets_the_protocol(tmp_path, name):
    source = fitted(tmp_path, name)[1].source
    assert isinstance(source, OutputSource)
    for method in METHODS:
        want = [*inspect.signature(getattr(OutputSource, method)).parameters.values()][1:]
        have = [*inspect.signature(getattr(source, method)).parameters.values()]
        named = lambda ps: [p.name for p in ps if p.kind is not p.VAR_KEYWORD]
        assert named(have)[: len(want)] == named(want), method
    for _ in range(2):
        source.start()
    source.reset()
    for _ in range(2):
        source.stop()
    assert source.needs in ('', 'items', 'rows', 'target')
    assert all(isinstance(m, OutputSource) for m in getattr(source, 'members', ()))
    assert source.has_outputs(None) == (source.needs in ('', 'items'))


@pytest.mark.parametrize('name', NAMES)
def test_each_source_gives_what_the_model_says_of_these_samples(tmp_path, name):
    _, ask = fitted(tmp_path, name, epochs=2)
    assert len(ask.seen) == 8
    for got, live, _ in ask.seen:
        torch.testing.assert_close(got.softmax(1), live.softmax(1), rtol=1e-4, atol=1e-5)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, C), nn.Linear(4, C)

    def forward(self, x):
        return dict(a=self.a(x), b=self.b(x))


def both_losses(out, a, b):
    return nn.functional.cross_entropy(out['a'], a) + nn.functional.cross_entropy(out['b'], b)


def test_one_head_reads_a_cache_and_one_reads_raw_items(tmp_path):
    def make():
        torch.manual_seed(0)
        random.seed(0)
        return DataBlock(
            (TransformBlock, CategoryBlock, CategoryBlock),
            n_inp=1,
            get_x=vector,
            get_y=[label, label],
            splitter=IndexSplitter(range(16, N)),
        ).dataloaders(list(range(N)), bs=4, num_workers=0)

    net = dict(a=NET, b=nn.Linear(4, C))
    write = partial(cache_teacher, views=0, store='float32', check=False)
    cache = write(net, make(), tmp_path)['a']
    weights = []
    for a, b in ((cache, Teacher(net['b'], items=lambda i: of_items(i))), (net['a'], net['b'])):
        learn = Learner(make(), TwoHeads(), loss_func=both_losses)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-2, cbs=KnowledgeDistillation(dict(a=a, b=b), kd(), check=False))
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


class Plain(Callback):
    "The DataLoader and the callbacks of a fit"

    def before_train(self):
        self.loader, self.names = dict(vars(self.dls.train)), [c.name for c in self.learn.cbs]


@pytest.mark.parametrize('name', ['model', 'ensemble'])
def test_a_teacher_that_needs_nothing_gets_nothing(tmp_path, name):
    look = Plain()
    _, ask = fitted(tmp_path, name, look)
    assert 'create_batches' not in look.loader
    assert type(look.loader['after_batch']).__name__ == 'Pipeline'
    assert 'teacher_targets' not in look.names
    assert all(samples is None for *_, samples in ask.seen)


@pytest.mark.parametrize('name', ['items', 'cache'])
def test_samples_say_which_items_the_batch_holds(tmp_path, name):
    class Check(Callback):
        order = -10

        def before_batch(self):
            s = self.learn.teacher_targets.samples
            if self.training:
                torch.testing.assert_close(torch.Tensor(self.learn.x), X[s.index])

    learn, ask = fitted(tmp_path, name, Check())
    assert sorted(i for *_, s in ask.seen for i in s.index.tolist()) == list(range(16))
    assert len(learn.dls.one_batch()) == 2


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_samples_record_how_the_batch_was_mixed(tmp_path, mix):
    images = torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, C))
    block = DataBlock(
        (TransformBlock, CategoryBlock),
        get_x=lambda i: images[i].clone(),
        get_y=label,
        splitter=IndexSplitter(range(16, N)),
    )
    dls = block.dataloaders(list(range(N)), bs=4, num_workers=0)
    cache = cache_teacher(net, dls, tmp_path, views=0, store='float32', check=False)
    seen = []

    class Note(Callback):
        order = 6

        def after_loss(self):
            if self.training:
                s = self.learn.teacher_targets.samples
                seen.append((torch.Tensor(self.learn.x), s.index, *s.mix))

    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, C)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[KnowledgeDistillation(cache, kd()), mix(), Note()])
    assert len(seen) == 4
    for x, index, perm, lam in seen:
        a, b = images[index], images[index][perm]
        lam = torch.as_tensor(lam).float().reshape(-1)
        if mix is MixUp:
            torch.testing.assert_close(x, torch.lerp(b, a, lam.view(-1, 1, 1, 1)))
        else:
            assert ((x == a) | (x == b)).all()
            share = (x == a).float().mean((1, 2, 3))
            assert (share >= lam - 1e-6).all()


def test_samples_are_pickled_and_pinned_with_their_rows():
    s = BatchSamples(np.arange(3), np.zeros(3, int), torch.arange(6, dtype=torch.uint8).view(3, 2))
    again = pickle.loads(pickle.dumps(s))
    assert np.array_equal(again.index, s.index)
    assert torch.equal(again.rows, s.rows)
    assert BatchSamples(np.arange(3)).pin_memory().rows is None


def test_a_cached_step_enters_the_files_that_the_script_explains():
    script = runpy.run_path(str(Path(__file__).parents[2] / 'scripts' / 'trace_step.py'))
    main, worker = script['entered_files']()
    assert set(main) == set(script['MAIN'])
    assert set(worker) == set(script['WORKER'])


def by_sample(cache, workers):
    "position -> (input after all transforms, view, stored row), of all training samples"
    dls = cached.data(augment='colours', bs=11, num_workers=workers)
    fed = cached.feed(StoredOutputs(cache), cached.student(dls))
    found = {
        i: (torch.Tensor(x), v, bytes(r))
        for b, _, s in dls.train
        for i, x, v, r in zip(s.index.tolist(), b, s.view.tolist(), s.rows.numpy())
    }
    fed.detach()
    return found


@pytest.mark.parametrize('method', ['fork', 'forkserver'])
def test_workers_bring_the_same_views_and_rows(tmp_path, monkeypatch, method):
    "A forkserver gets pickled data, as a spawned process does"
    context = processes.SERVER if method == 'forkserver' else multiprocessing.get_context(method)
    dls = cached.data(augment='colours')
    cache = cached.cache_teacher(cached.Convs(3).eval(), dls, tmp_path, views=3)
    monkeypatch.setattr(
        type(dls.train.fake_l),
        'multiprocessing_context',
        property(lambda self: context if self.num_workers else None),
    )
    alone, worker = by_sample(cache, 0), by_sample(cache, 1)
    assert set(alone) == set(worker) == set(range(cached.TRAIN))
    for i, (x, view, row) in alone.items():
        assert torch.equal(x, worker[i][0])
        assert (view, row) == worker[i][1:]
        assert row == bytes(cache.row(i, view))
    assert len({view for _, view, _ in alone.values()}) == 3


def test_rows_are_where_the_inputs_are_before_the_student_runs(tmp_path):
    "On the meta device, since a copy after the student's forward would wait for a GPU"
    seen = []

    class ToMeta(Callback):
        order = -30

        def before_batch(self):
            self.learn.xb = tuple(o.to('meta') for o in self.xb)

    class Look(Callback):
        order = -10

        def before_batch(self):
            seen.append(self.learn.teacher_targets.samples.rows.device.type)
            raise CancelFitException

    fitted(tmp_path, 'cache', ToMeta(), Look())
    assert seen == ['meta']
