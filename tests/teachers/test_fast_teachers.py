"Teachers that run as a faster copy (half precision, channels last, folded batch-norms): all that works with a small teacher works with these."

import copy, functools, inspect
import pytest
import torch
import torch.nn.functional as F
import apps  # before the rest of fastai: it keeps its warnings quiet
import lightning.pytorch as pl
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai.vision.all import TensorImage, TensorMask, resnet34
from fastai.vision.learner import create_unet_model
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from torchvision.models import resnet50
from transformers import TrainingArguments
from apps import quiet, same, snapshot
from fastdistill import Distiller, Teacher, kd, layers, recipes
from fastdistill.fastai import KnowledgeDistillation, cache_teacher, compare
from fastdistill.huggingface import DistillationTrainer
from fastdistill.lightning import DistillCallback, DistillModule

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS,
    'ignore::lightning.fabric.utilities.warnings.PossibleUserWarning',
    'ignore:.*isinstance.treespec, LeafSpec.',
)
FAST = dict(precision='bf16', memory_format='channels_last', fold_bn=True)


def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Sequential):
    "With labels, it also returns its loss, as the Trainer of transformers wants it"

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return (
            logits if labels is None else dict(loss=F.cross_entropy(logits, labels), logits=logits)
        )


def net(width):
    return Net(
        conv(3, width),
        conv(width, 2 * width),
        conv(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


def images(n=16):
    "Noise in the color of its class"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(n, 3, 32, 32, generator=g) + torch.randn(3, 3, 1, 1, generator=g)[y], y


@functools.cache
def weights_of(width):
    torch.manual_seed(1)
    model, (x, y) = net(width), images(48)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model.state_dict()


def trained(width=8):
    model = net(width)
    model.load_state_dict(weights_of(width))
    return model


def fast(model=None):
    return Teacher(trained() if model is None else model, run=FAST)


def far(a, b):
    return ((a - b).norm() / b.norm()).item()


def is_copy(t):
    return (
        t.runner.module is not t.module
        and 'bfloat16, channels_last' in repr(t)
        and 'folded' in repr(t)
    )


# pairs of layers


@pytest.mark.parametrize('used', [False, True], ids=['new', 'used before'])
@pytest.mark.parametrize(
    'names',
    ['auto', 'last', 'embedding', 'last@mean', {'1': '1'}, {'?.1@pre': '?.1@pre'}, ['0', '2']],
    ids=str,
)
def test_layers_are_found_and_named_as_in_the_model_itself(names, used):
    model, (x, y) = trained(), images()
    t = fast(model)
    if used:
        t(x)
    torch.manual_seed(0)
    s = net(4)
    d = Distiller(
        s,
        t,
        recipes.hint(layers=names, projector='linear' if names == 'embedding' else 'auto'),
        example=x,
    )
    exact = Distiller(copy.deepcopy(s), model, recipes.hint(layers=names), example=x)
    assert d.pairs == exact.pairs
    d(x, y).total.backward()
    assert t.runner.module is not model and t.runner.half == 'bfloat16'


LAYERED = {
    n: f
    for n in recipes.__all__
    if 'layers' in inspect.signature(f := getattr(recipes, n)).parameters
}


def test_these_are_all_recipes_that_take_layers():
    assert sorted(LAYERED) == [
        'ab',
        'at',
        'cc',
        'cwd',
        'fsp',
        'gram',
        'hint',
        'ickd',
        'ifvd',
        'nst',
        'ofd',
        'pairwise',
        'pkd',
        'pkt',
        'pretrain',
        'rkd',
        'seed',
        'sp',
        'vid',
    ]


def dense(width):
    return nn.Sequential(conv(3, width), conv(width, 2 * width), nn.Conv2d(2 * width, 3, 1))


@pytest.mark.parametrize('name', LAYERED)
def test_every_recipe_with_layers_compares_what_it_compares_with_the_model_itself(name):
    of_pixels = name in ('cwd', 'ifvd', 'pairwise')
    make = dense if of_pixels else net
    model, (x, y) = dense(8) if of_pixels else trained(), images()
    if of_pixels:
        y = torch.randint(3, (len(x), 8, 8))
    how = dict(layers='last') if name == 'cwd' else {}
    values, pairs = [], []
    for t in (Teacher(model), fast(model)):
        t(x)
        torch.manual_seed(0)
        d = Distiller(make(4), t, LAYERED[name](**how), example=x)
        r = d(x, y)
        r.total.backward()
        values.append(next(iter(r.parts.values())))
        pairs.append(d.pairs)
    assert is_copy(t)
    assert pairs[0] == pairs[1]
    assert values[1].item() == pytest.approx(values[0].item(), rel=0.05)


# fastai


def learner(model, n=48, bs=16, **kwargs):
    items = list(zip(*images(n)))
    dls = DataLoaders.from_dsets(
        items[:32], items[32:], bs=bs, num_workers=0, shuffle=False, device='cpu'
    )
    return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), **kwargs))[0]


def student(seed=0, width=4, **kwargs):
    set_seed(seed)
    return learner(net(width), **kwargs)


class Sees(Callback):
    "Was the teacher of this fit a copy?"

    order = 100

    def after_batch(self):
        self.copy = is_copy(
            next(
                c for c in self.learn.cbs if isinstance(c, KnowledgeDistillation)
            ).distiller.teacher
        )


def taught(teacher, recipe, seed=0, lr=1e-2, epochs=2, **kwargs):
    "(student, its callback) after a fit that had a copy of the teacher's model"
    learn, sees = student(seed), Sees()
    set_seed(seed)
    cb = learn.distill(teacher, epochs, lr, recipe, cbs=sees, **kwargs)
    assert sees.copy
    return learn, cb


def used(t):
    t(images()[0])
    return t


@pytest.mark.parametrize(
    'recipe',
    [
        lambda: kd() + recipes.at(),
        lambda: recipes.hint({'1': '1', '2.1@pre': '2.1@pre'}),
        lambda: recipes.pretrain(),
    ],
    ids=['kd+at', 'hint', 'pretrain'],
)
@pytest.mark.parametrize('before', [lambda t: t, used], ids=['new', 'used before'])
def test_a_fit_with_layers_learns_as_from_the_model_itself(recipe, before):
    model = trained()
    was = snapshot(model)
    a, _ = taught(before(fast(model)), recipe())
    b = student()
    set_seed(0)
    b.distill(
        Teacher(model, run=dict(precision='fp32', memory_format=None, fold_bn=False)),
        2,
        1e-2,
        recipe(),
    )
    assert same(was, snapshot(model))
    start = torch.cat([p.flatten() for p in student().model.parameters()])
    a, b = [torch.cat([p.detach().flatten() for p in o.model.parameters()]) - start for o in (a, b)]
    assert 0 < far(a, b) < 0.1


def test_weight_0_trains_bit_for_bit_as_without_a_teacher():
    ends = []
    for teacher in (None, fast()):
        learn = student()
        set_seed(0)
        if teacher is None:
            learn.fit_one_cycle(2, 1e-2)
        else:
            learn.distill(teacher, 2, 1e-2, kd(alpha=0) + recipes.at(weight=0.0))
        ends.append(learn.model.state_dict())
    for k, v in ends[0].items():
        assert torch.equal(v, ends[1][k]), k


class Stops(Callback):
    order = 4

    def after_loss(self):
        if self.training and self.iter == 1:
            raise KeyboardInterrupt


def test_after_an_interrupt_nothing_is_left_on_the_teacher_or_on_its_copy():
    model = trained()
    was, t, learn = snapshot(model), used(fast(model)), student()
    copied = snapshot(t.runner.module)
    before = apps.modes(learn.model)
    with pytest.raises(KeyboardInterrupt):
        learn.distill(t, 1, 1e-2, kd() + recipes.at(), cbs=Stops())
    assert same(was, snapshot(model))
    assert same(copied, snapshot(t.runner.module))
    assert {k: v[1:] for k, v in apps.modes(learn.model).items()} == {
        k: v[1:] for k, v in before.items()
    }
    assert not t.runner.started


def test_a_teacher_speaks_after_a_fit_too(capsys):
    t = fast()
    taught(t, kd())
    capsys.readouterr()
    Teacher(t, run=dict(precision='fp32', fold_bn=True))(images()[0])
    assert 'fastdistill: the teacher Net runs as a copy: float32' in capsys.readouterr().out


def test_an_ensemble_of_copies_is_compared_by_layer():
    nets, (x, y) = [trained(8), trained(6)], images()
    values = []
    for t in (Teacher(nets), used(Teacher(nets, run=FAST)), Teacher([used(fast(n)) for n in nets])):
        torch.manual_seed(0)
        d = Distiller(net(4), t, recipes.at({'1': '0.1', '2': '1.2'}), example=x)
        values.append(d(x, y).parts['at'].item())
    assert all(is_copy(m) for m in t.members)
    assert values[1] == values[2] == pytest.approx(values[0], rel=0.05)


def test_layers_of_a_fast_teacher_can_be_listed():
    model, (x, _) = trained(), images()
    t = used(fast(model))
    assert str(layers(t, x)) == str(layers(model, x))


# around a fit


def test_check_teacher_measures_a_recipe_with_layers():
    learn, model = student(), trained()
    was = snapshot(model)
    found = learn.check_teacher(used(fast(model)), recipe=kd() + recipes.at())
    assert not found.errors
    assert found.costs is not None
    assert 'could not be measured' not in str(found)
    assert same(was, snapshot(model))


def test_the_check_finds_frozen_layers_with_a_fast_teacher():
    learn = student()
    for p in learn.model[:2].parameters():
        p.requires_grad = False
    found = learn.check_teacher(used(fast()), recipe=kd() + recipes.hint({'1': '1'}))
    assert 'hint compares frozen layers of the student (1)' in str([f.what for f in found])


def test_a_student_of_a_fast_teacher_is_explained_compared_and_shown():
    model = trained()
    t = used(fast(model))
    learn, cb = taught(t, kd() + recipes.at())
    was = snapshot(model)
    assert learn.explain(t, cb).facts.follows_valid is not None
    report = compare({'teacher': t, 'student': learn}, seconds=0)
    exact = compare({'teacher': model, 'student': learn}, seconds=0)
    assert (
        report.models['teacher'].measures['accuracy'].value
        == exact.models['teacher'].measures['accuracy'].value
    )
    assert learn.show_features(t) is not None
    assert same(was, snapshot(model))


# caches


@pytest.mark.parametrize('names', [['1', '2'], ['1.1@pre', '2']], ids=str)
def test_stored_layers_of_a_fast_teacher_teach_as_the_model_itself(names, tmp_path):
    model, ends = trained(), []
    was = snapshot(model)
    for i, t in enumerate(
        (Teacher(model, run=dict(precision='fp32')), used(fast(model)), fast(model))
    ):
        learn = student()
        cache = cache_teacher(t, learn.dls, tmp_path / str(i), layers=names, kind='softmax')
        set_seed(0)
        learn.distill(cache, 2, 1e-2, kd() + recipes.hint({n: n for n in names}))
        ends.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert same(was, snapshot(model))
    start = torch.cat([p.flatten() for p in student().model.parameters()])
    for end in ends[1:]:
        assert 0 < far(end - start, ends[0] - start) < 0.1


# plain loops, Lightning, Hugging Face


def loader(bs=16):
    return DataLoader(TensorDataset(*images(48)), bs)


def plain(model, teacher, recipe, folder):
    d = Distiller(model, teacher, recipe)
    x, y = next(iter(loader()))
    assert not d.check(x, y)
    d.setup(x)
    opt = torch.optim.SGD(d.parameters(), 0.05)
    with d.teacher:
        for i, (x, y) in enumerate(loader()):
            d(x, y, progress=i / 3).total.backward()
            opt.step()
            opt.zero_grad()
    return d


def without_block(model, teacher, recipe, folder):
    d = Distiller(model, teacher, recipe, example=images()[0])
    opt = torch.optim.SGD(d.parameters(), 0.05)
    for i, (x, y) in enumerate(loader()):
        d(x, y, progress=i / 3).total.backward()
        opt.step()
        opt.zero_grad()
    return d


class Mine(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05)


def fitted(module, folder, *callbacks):
    pl.Trainer(
        max_epochs=1,
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    ).fit(module, loader())


def in_lightning(model, teacher, recipe, folder):
    cb = DistillCallback(teacher, recipe, student='net')
    fitted(Mine(model), folder, cb)
    return cb.distiller


def in_a_ready_module(model, teacher, recipe, folder):
    module = DistillModule(model, teacher, recipe, lr=0.05, optimizer=torch.optim.SGD)
    fitted(module, folder)
    return module.callback.distiller


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def in_hugging_face(model, teacher, recipe, folder):
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        lr_scheduler_type='constant',
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy='no',
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
        learning_rate=0.05,
    )
    trainer = InOrder(
        model,
        args,
        train_dataset=[dict(x=x, labels=y) for x, y in zip(*images(48))],
        teacher=teacher,
        recipe=recipe,
        optimizers=(torch.optim.SGD(model.parameters(), 0.05), None),
    )
    trainer.train()
    return trainer.distiller


FACES = dict(
    plain=plain,
    plain_without_block=without_block,
    lightning=in_lightning,
    ready_module=in_a_ready_module,
    hugging_face=in_hugging_face,
)


@pytest.mark.parametrize('face', FACES)
@pytest.mark.parametrize('before', [lambda t: t, used], ids=['new', 'used before'])
def test_every_trainer_learns_from_layers_of_a_copy_as_from_the_model_itself(
    face, before, tmp_path
):
    recipe = lambda: kd() + recipes.hint({'1': '1', '2.1@pre': '2.1@pre'}) + recipes.at()
    model, ends = trained(), []
    was = snapshot(model)
    for t in (Teacher(model), before(fast(model))):
        torch.manual_seed(0)
        s = net(4)
        start = torch.cat([p.detach().flatten() for p in s.parameters()])
        d = FACES[face](s, t, recipe(), tmp_path)
        ends.append(torch.cat([p.detach().flatten() for p in s.parameters()]) - start)
    assert d.teacher.runner.half == 'bfloat16'
    assert not d.teacher.runner.started
    assert 0 < far(ends[1], ends[0]) < 0.1
    assert same(was, snapshot(model))


@pytest.mark.parametrize('face', FACES)
def test_in_every_trainer_weight_0_trains_bit_for_bit_as_without_a_teacher(face, tmp_path):
    ends = []
    for teacher, recipe in (
        (used(fast()), kd(alpha=0) + recipes.at(weight=0.0)),
        (used(Teacher(trained(), run=dict(precision='fp32'))), kd(alpha=0)),
    ):
        torch.manual_seed(0)
        s = net(4)
        FACES[face](s, teacher, recipe, tmp_path)
        ends.append(s.state_dict())
    torch.manual_seed(0)
    s = net(4)
    opt = torch.optim.SGD(s.parameters(), 0.05)
    for x, y in loader():
        F.cross_entropy(s(x), y).backward()
        opt.step()
        opt.zero_grad()
    for k, v in s.state_dict().items():
        assert torch.equal(v, ends[0][k]), k
        assert torch.equal(v, ends[1][k]), k


# large models


def unet(arch, n=8, size=32):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    items = [(TensorImage(a), TensorMask(b)) for a, b in zip(x, (x.mean(1) > 0.5).long())]
    dls = DataLoaders.from_dsets(
        items[: n // 2], items[n // 2 :], bs=n // 2, num_workers=0, device='cpu'
    )
    return quiet(
        Learner(
            dls,
            create_unet_model(arch, 2, (size, size), pretrained=False),
            loss_func=CrossEntropyLossFlat(axis=1),
        )
    )[0]


@pytest.mark.parametrize(
    'given', [lambda t: t, lambda t: Teacher(t.model, run=FAST)], ids=['Learner', 'Teacher']
)
def test_a_unet_teaches_the_layers_of_a_unet(given):
    torch.manual_seed(0)
    teacher, learn = unet(resnet34), unet(apps.small)
    was = snapshot(teacher.model)
    source = given(teacher)
    cb = learn.distill(
        source, 1, 1e-3, kd() + recipes.at() + recipes.hint({'layers.8': 'layers.11'}), check=False
    )
    assert set(cb.parts) == {'task', 'kd', 'at', 'hint'}
    assert is_copy(cb.distiller.teacher) or source is teacher
    assert same(was, snapshot(teacher.model))


OF_RESNET50 = dict(
    auto=(lambda: recipes.at(), {'layer1', 'layer3', 'layer4'}),
    named=(lambda: recipes.hint({'1': 'layer2', '2': 'layer3'}), {'layer2', 'layer3'}),
    pretrain=(lambda: recipes.pretrain(), {'avgpool@mean'}),
)


@pytest.mark.parametrize('given', ['Learner', 'Teacher', 'used Teacher'])
def test_a_resnet50_teaches_its_layers(given):
    torch.manual_seed(0)
    model = resnet50(num_classes=3)
    was = snapshot(model)
    t = (
        learner(model)
        if given == 'Learner'
        else Teacher(model)
        if given == 'Teacher'
        else used(fast(model))
    )
    for recipe, names in OF_RESNET50.values():
        learn = student(bs=32)
        cb = learn.distill(t, 1, 1e-3, recipe(), check=False)
        assert {p.teacher for p in cb.distiller.pairs} == names
        assert is_copy(cb.distiller.teacher) or given != 'used Teacher'
    assert same(was, snapshot(model))
