"Mixed precision, accumulation, clipping, compiled and averaged students, channels_last: each with a live teacher, a cache and features."

import copy
import pytest, torch
from torch import nn
import apps
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastdistill import losses
from fastdistill.fastai import KnowledgeDistillation, Term, cache_teacher, kd

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
SIZE, BS, STEPS = 8, 16, 6
FEATURES = kd(T=2.0) + Term(
    losses.hint, layers={'1': '1'}, projector='conv', weight=0.3
)  # no batch-norm in it
SOURCES = dict(live=kd(T=2.0), cache=kd(T=2.0), features=FEATURES, cached_features=FEATURES)


def net(width):
    "No batch-norm, so that a batch in parts is the same batch"
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def loaders(bs=BS, device='cpu'):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BS * STEPS, 3, SIZE, SIZE, generator=g)
    items = [*zip(x, x.mean((2, 3)).argmax(1))]
    return DataLoaders.from_dsets(
        items, items[:BS], bs=bs, shuffle=False, num_workers=0, device=device
    )


def source(name, folder, device='cpu'):
    set_seed(1)
    teacher = net(8)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2.0)  # predictions that are far from alike
    if 'cache' not in name:
        return teacher
    layers = ['1'] if 'features' in name else []
    with pytest.warns():
        return cache_teacher(
            teacher,
            loaders(device=device),
            folder,
            views=0,
            store=dict(dtype='float32'),
            layers=layers,
            kind='softmax',
            axis=1,
        )


def train(name, teacher, cbs=(), bs=BS, change=None, device='cpu', lr=0.2):
    "(weights of the student before and after two epochs, the Learner)"
    set_seed(0)
    (learn,) = apps.quiet(
        Learner(
            loaders(bs, device), net(4).to(device), loss_func=CrossEntropyLossFlat(), opt_func=SGD
        )
    )
    if change is not None:
        learn.model = change(learn.model)
    before = vector(learn.model)
    kd_ = KnowledgeDistillation(teacher, SOURCES[name], check=False)
    learn.fit(2, lr, cbs=[kd_, *cbs])
    return before, vector(learn.model), learn


def vector(model):
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def relative(a, b, start):
    "The distance of two trainings beside the way that they went"
    return ((a - b).norm() / (b - start).norm()).item()


class Averaged(Callback):
    "A running mean of the weights that stands in for the student in validation"

    order = 55

    def before_fit(self):
        self.mean = torch.optim.swa_utils.AveragedModel(
            self.learn.model, avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p
        )

    def after_step(self):
        self.mean.update_parameters(self.learn.model)

    def before_validate(self):
        self.own, self.learn.model = self.learn.model, self.mean.module

    def after_validate(self):
        self.learn.model = self.own


# name -> (callbacks, batch size, change of the model, tolerance: the distance beside the way that the weights went)
HOW = dict(
    bf16=(lambda: [apps.HalfOnCPU('bf16')], BS, None, 0.05),
    fp16_scaled=(lambda: [apps.HalfOnCPU('fp16', init_scale=2.0**10)], BS, None, 0.02),
    scaler_alone=(
        lambda: [apps.HalfOnCPU('bf16', enabled=True, init_scale=2.0**12)],
        BS,
        None,
        0.05,
    ),
    accumulation=(lambda: [GradientAccumulation(BS)], BS // 4, None, 1e-4),
    clipping_that_clips_nothing=(lambda: [GradientClip(1e3)], BS, None, 0.0),
    compiled=(lambda: [], BS, lambda m: torch.compile(m, backend='aot_eager'), 1e-4),
    channels_last=(lambda: [ChannelsLast()], BS, None, 1e-4),
    averaged=(lambda: [Averaged()], BS, None, 0.0),
    all_together=(
        lambda: [
            apps.HalfOnCPU('bf16'),
            GradientAccumulation(BS),
            GradientClip(1e3),
            ChannelsLast(),
            Averaged(),
        ],
        BS // 4,
        None,
        0.05,
    ),
)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "name -> (teacher or cache, weights before, weights after), in float32 and with nothing else"
    out = {}
    for name in SOURCES:
        teacher = source(name, tmp_path_factory.mktemp(name) / 'c')
        out[name] = teacher, *train(name, teacher)[:2]
    return out


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('name', SOURCES)
def test_ends_where_the_plain_training_ends(plain, name, how):
    cbs, bs, change, tolerance = HOW[how]
    teacher, start, after = plain[name]
    before, got, learn = train(name, teacher, cbs(), bs, change)
    torch._dynamo.reset()
    assert torch.equal(before, start) and relative(got, after, start) <= tolerance
    assert relative(start, after, start) == 1 and not apps.modes(learn.model)[''][1]
    if 'cache' not in name:
        assert learn.recorder.metric_names[-2 if len(SOURCES[name].terms) == 1 else -3] == 'kd_loss'


def test_the_tolerances_see_a_teacher_that_is_not_there(plain):
    "Without the teacher, or without features, the training ends elsewhere by more than any of them"
    teacher, start, after = plain['features']
    assert relative(plain['live'][2], after, start) > 0.1
    set_seed(0)
    (learn,) = apps.quiet(
        Learner(loaders(), net(4), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    )
    learn.fit(2, 0.2)
    assert relative(vector(learn.model), plain['live'][2], start) > 0.1


def test_live_and_cached_are_one_training(plain):
    for a, b in (('live', 'cache'), ('features', 'cached_features')):
        assert relative(plain[a][2], plain[b][2], plain[a][1]) < 1e-4


@pytest.mark.parametrize('name', SOURCES)
def test_clipping_clips_the_gradient_with_the_teachers_part(plain, name):
    teacher, start, after = plain[name]
    got = train(name, teacher, [GradientClip(1e-3)], lr=1.0)[1]
    # no momentum: each of the steps is at most that long
    assert 0 < (got - start).norm() <= 2 * STEPS * 1e-3 + 1e-6


@pytest.mark.parametrize('name', SOURCES)
def test_the_average_is_that_of_the_students_weights(plain, name):
    "Nothing of distillation is in it: no hook, no projector"
    teacher, start, after = plain[name]
    seen = []

    class Steps(Callback):
        order = 54

        def after_step(self):
            seen.append(vector(self.learn.model))

    cb = Averaged()
    train(name, teacher, [cb, Steps()])
    mean = seen[0]
    for w in seen[1:]:
        mean = 0.5 * mean + 0.5 * w
    torch.testing.assert_close(vector(cb.mean.module), mean)
    assert all(m[1:] == (0, 0, 0) for m in apps.modes(cb.mean.module).values())
    assert cb.mean.module.state_dict().keys() == net(4).state_dict().keys()
    copy.deepcopy(cb.mean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
@pytest.mark.parametrize('name', SOURCES)
def test_on_a_gpu(name, mode, tmp_path):
    teacher = source(name, tmp_path / 'c', 'cuda')
    start, after, _ = train(name, teacher, device='cuda')
    got = train(name, teacher, [MixedPrecision(amp_mode=mode)], device='cuda')[1]
    assert relative(got, after, start) <= 0.05
