"Learners and exported Learners as teachers: they answer as the Learner itself does, and are afterwards as they were."

import copy, importlib, random, sys
from collections import OrderedDict
import numpy as np
import pytest, timm, torch, torchvision
from torch import nn
import apps
from apps import APPS, answers, image_dls, plain, quiet, same, snapshot
from fastai.basics import Callback, DataLoader, DataLoaders, L, Learner, noop
from fastai.test_utils import synth_learner
from fastai.vision.all import CategoryBlock, Flatten, Normalize
from fastdistill import Term, kd, losses
from fastdistill.fastai import cache_teacher
from fastdistill.fastai.teachers import image_stats, teacher_of
from fastdistill.base.outputs import DistillError, DistillWarning
from fastdistill.teachers.image_normalization import image_change
from fastdistill.teachers import Teacher

pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable:UserWarning')
A, B = ([0.3, 0.4, 0.5], [0.2, 0.25, 0.3]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def pictures(stats=None):  # of the same items, in the same order
    tfms = [] if stats is None else [Normalize.from_stats(*stats, cuda=False)]
    return image_dls(
        CategoryBlock(vocab=['red', 'green', 'blue']),
        lambda x, at, k: ['red', 'green', 'blue'][k],
        batch_tfms=tfms,
    )


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        Flatten(),
        nn.Linear(4, 3),
    )


def learner(stats=None, seed=0, model=net):
    torch.manual_seed(seed)
    dls = pictures(stats)
    return quiet(Learner(dls, model(), loss_func=nn.CrossEntropyLoss()))[0]


def says(learn):
    "What the Learner itself predicts for its validation set"
    return learn.get_preds(act=noop)[0]


def taught(teacher, learn):
    "What the teacher says to the student's validation batches"
    with teacher:
        return torch.cat([teacher(*plain(b)[:-1]).logits for b in learn.dls.valid])


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('app', APPS, ids=lambda a: a.name)
def test_a_learner_answers_as_itself_in_every_application_and_stays_as_it_was(app):
    torch.manual_seed(0)
    student, learn = quiet(*app.make())
    learn.model.train()
    want = answers(learn.model, learn.dls.valid)
    cbs, was = list(learn.cbs), snapshot(learn.model)
    t = teacher_of(learn, student, kind=app.kind, axis=app.axis)
    with t:
        t.reset()
        for (logits, _), b in zip(want, learn.dls.valid):
            close(t(*plain(b)[:-1]).logits, logits, 0)
    assert (
        same(snapshot(learn.model), was)
        and list(learn.cbs) == cbs
        and t.learner is learn
        and t.model is learn.model
        and image_change(t) == ''
    )


def test_a_language_model_goes_on_where_its_last_batch_ended():
    _, learn = quiet(*apps.language_model())
    t, x = teacher_of(learn), plain(next(iter(learn.dls.valid)))[0]
    lstm = learn.model[0]
    learn.model.eval()
    learn.model.reset()
    with torch.no_grad():
        first, second, third = [learn.model(x)[0] for _ in range(3)]
        learn.model.reset()
        for _ in range(2):
            learn.model(x)
    hidden = [o.clone() for h in lstm.hidden for o in h]
    with t:
        t.reset()
        close(t(x).logits, first, 0)
        close(t.probe(x).logits, second, 0)
        close(t(x).logits, second, 0)
        t.reset()
        close(t(x[:3]).logits, first[:3], 1e-6)  # another batch size
        t(x.to('meta'))
    assert lstm.bs == len(x) and all(
        torch.equal(a, b) for a, b in zip(hidden, [o for h in lstm.hidden for o in h])
    )
    with torch.no_grad():
        close(learn.model(x)[0], third, 0)  # it goes on as if nothing had been


@pytest.mark.parametrize('theirs,ours', [(A, B), (A, None), (None, B), (B, B), (None, None)])
def test_images_come_in_the_teachers_own_normalisation(theirs, ours):
    learn, student = learner(theirs), learner(ours, 1)
    t = teacher_of(learn, student)
    close(taught(t, student), says(learn))
    assert bool(image_change(t)) == (theirs != ours)
    close(taught(teacher_of(learn, student.dls), student), says(learn))  # DataLoaders will do


def test_the_statistics_are_those_at_the_time():
    "A pretrained vision_learner adds Normalize to the DataLoaders it is given, in place"
    learn = learner()
    assert image_stats(learn.dls) == (0.0, 1.0)
    t = teacher_of(learn, learn.dls)
    learn.dls.add_tfms([Normalize.from_stats(*B, cuda=False)], 'after_batch')
    assert (
        torch.equal(image_stats(learn.dls)[0].flatten(), torch.tensor(B[0]))
        and image_change(t) == ''
    )
    assert teacher_of(t, learn.dls) is t  # it was told what it gets
    assert image_stats([]) == image_stats(synth_learner().dls) == (0.0, 1.0)


def test_without_a_student_images_are_refused_until_one_is_known():
    learn = learner(A)
    t = teacher_of(learn)
    with pytest.raises(DistillError, match=r'give images=dict\(input_stats='):
        taught(t, learn)
    close(taught(teacher_of(t, learner(B)), learner(B)), says(learn))
    close(taught(teacher_of(t, learn), learn), says(learn))
    assert t.input_stats is None
    x, _ = synth_learner().dls.one_batch()
    teacher_of(synth_learner())(x)  # numbers need none


def test_what_is_said_wins():
    learn, student = learner(A), learner(B, 1)
    assert image_change(teacher_of(learn, student, stats=None)) == ''
    assert image_change(teacher_of(Teacher(learn.model), student)) == ''
    t = teacher_of(Teacher(learn.model, images=dict(stats=A, input_stats=A)), student)
    assert image_change(t) == ''
    t = teacher_of(
        Teacher(learn.model, kind='sigmoid'), student, kind='softmax', axis=-1, size=16, name='mine'
    )
    assert (t.kind, t.axis, t.size, t.name) == ('sigmoid', -1, (16, 16), 'mine')
    u = teacher_of(
        Teacher(learn.model, kind='softmax', images=dict(size=None), name='first'),
        student,
        kind='sigmoid',
        size=16,
        name='mine',
    )
    assert (u.kind, u.size, u.name) == ('softmax', None, 'first')
    assert teacher_of(t, student, kind='softmax', axis=-1) is t
    t = teacher_of(learn, student, kind='softmax', axis=-1)
    assert (
        teacher_of(t, student, kind='softmax', axis=-1) is t
    )  # so that what a check has set on it stays


def test_an_exported_learner(tmp_path):
    learn, student = learner(A), learner(B, 1)
    learn.path = tmp_path
    learn.model.train()
    learn.export('teacher.pkl')
    for path in (tmp_path / 'teacher.pkl', str(tmp_path / 'teacher.pkl')):
        t = teacher_of(path, student)
        assert sorted(t.learner.dls.vocab) == ['blue', 'green', 'red'] and t.model.training
        was = snapshot(t.model)
        close(taught(t, student), says(learn))
        assert same(snapshot(t.model), was)


def test_a_pickled_state_dict_is_not_a_learner(tmp_path):
    "The error was that 'OrderedDict' has no attribute 'dls'"
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'weights.pkl')
    with pytest.raises(
        DistillError,
        match='weights.pkl does not contain a Learner. A dict .* contains weights, but no network: '
        'build the model and load the weights into it. Or pass a file that learn.export wrote',
    ):
        teacher_of(tmp_path / 'weights.pkl')


def test_an_exported_learner_that_cannot_be_loaded(tmp_path):
    with pytest.raises(
        DistillError, match="There is no file .*nowhere.pkl'. teacher_learner.export"
    ):
        teacher_of(tmp_path / 'nowhere.pkl')
    texts = dict(text='no pickle', garbage='garbage\n', list='(lp0\n', number='I1\n.', empty='')
    for name, text in texts.items():
        (tmp_path / f'{name}.pkl').write_text(text)
    torch.save(nn.Linear(2, 2), tmp_path / 'model.pkl')
    for f in ('model.pkl', *(f'{name}.pkl' for name in texts)):
        with pytest.raises(
            DistillError,
            match=f'{f} could not be loaded as an exported Learner .*Did learn.export write it',
        ):
            teacher_of(tmp_path / f)


@pytest.mark.parametrize('gone', ['class', 'module'])
def test_an_exported_learner_whose_parts_are_gone(tmp_path, monkeypatch, gone):
    (tmp_path / 'mine_only.py').write_text(
        'from torch.nn import Sequential\nclass Mine(Sequential): pass'
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module('mine_only')
    learn = learner(model=lambda: mine.Mine(*net()))
    learn.path = tmp_path
    learn.export('t.pkl')
    assert type(teacher_of(tmp_path / 't.pkl').model) is mine.Mine
    if gone == 'class':
        monkeypatch.delattr(mine, 'Mine')
    else:
        monkeypatch.undo()
        del sys.modules['mine_only']
    with pytest.raises(
        DistillError, match='t.pkl could not be loaded .*Can everything in it be imported here'
    ):
        teacher_of(tmp_path / 't.pkl')


def test_a_list_is_an_ensemble_of_all_that_teaches(tmp_path):
    learns, student = [learner(s, i) for i, s in enumerate((A, None))], learner(B, 2)
    learns[0].path = tmp_path
    learns[0].export('t.pkl')
    want = torch.stack([says(l).softmax(1) for l in (learns[0], *learns)]).mean(0)
    for make in (list, tuple, L):
        t = teacher_of(make([tmp_path / 't.pkl', *learns]), student, axis=-1)
        close(taught(t, student).softmax(1), want)
    assert (
        [m.learner for m in t.members[1:]] == learns
        and t.learner is None
        and t.axis == t.members[0].axis == -1
    )
    weighted = teacher_of(learns, student, weights=[1, 3])
    close(
        taught(weighted, student).softmax(1),
        (says(learns[0]).softmax(1) + 3 * says(learns[1]).softmax(1)) / 4,
    )
    assert teacher_of(weighted, student) is weighted


def test_timm_modules_tell_and_torchvisions_make_one_ask():
    student = learner(A)
    t = teacher_of(timm.create_model('resnet10t', pretrained=False, num_classes=3), student)
    assert image_change(t).endswith('mean 0.485 0.456 0.406, std 0.229 0.224 0.225')
    resnet = torchvision.models.resnet18(num_classes=3)
    with pytest.warns(
        DistillWarning,
        match=r"torchvision's ResNet does not show .*Teacher\(model, images=dict\(stats='imagenet'\)\)",
    ):
        assert image_change(teacher_of(resnet, student)) == ''
    # none of these warns
    assert image_change(teacher_of(resnet, student, stats='imagenet'))
    for t in (
        teacher_of(Teacher(resnet), student),
        teacher_of(resnet, student, stats=None),
        teacher_of(resnet, learner(B)),
    ):
        assert image_change(t) == '' == image_change(teacher_of(resnet))


def test_the_learners_callbacks_stay_out_of_it():
    class Never(Callback):
        def before_batch(self):
            raise AssertionError('ran')

    learn = synth_learner(cbs=Never())
    x, _ = learn.dls.one_batch()
    close(teacher_of(learn, learn)(x).logits, learn.model(x).detach(), 0)


def test_a_teacher_with_its_learner_copies():
    learn = synth_learner()
    t = copy.deepcopy(teacher_of(learn, learn))
    x, _ = learn.dls.one_batch()
    close(t(x).logits, learn.model(x).detach(), 0)
    assert t.learner is not learn and t.model is t.learner.model


class Reinitializes(nn.Sequential):
    "`reset` is its own word for new weights"

    def reset(self):
        for m in self:
            if hasattr(m, 'reset_parameters'):
                m.reset_parameters()


def test_a_teacher_whose_reset_reinitializes_is_unharmed_by_check_fit_and_cache(tmp_path):
    teacher = learner(A, model=lambda: Reinitializes(*net()))
    teacher.fit(3, 0.05)
    was = snapshot(teacher.model)
    for use in (
        lambda s: s.check_teacher(teacher),
        lambda s: s.distill(teacher, 1, 1e-3, check=False),
        lambda s: cache_teacher(
            teacher.model, s.dls, tmp_path / 'cache', kind='softmax', check=True
        ),
    ):
        student = learner(A, 1)
        torch.manual_seed(5)
        with pytest.warns(
            DistillWarning,
            match='Reinitializes has a method reset.. that changes weights .0.weight, 0.bias, 1.weight ....',
        ):
            use(student)
        assert same(snapshot(teacher.model), was)


@pytest.mark.parametrize(
    'teacher',
    [lambda: Teacher(net(), run=dict(mode='train')), lambda: lambda x: torch.randn(len(x), 3)],
    ids=['dropout', 'random'],
)
def test_alpha_0_is_no_distillation_whatever_the_teacher_draws(teacher):
    def run(distill):
        random.seed(5)  # DataLoaders take theirs from it
        student, t = learner(A, 1), teacher()
        torch.manual_seed(5)
        np.random.seed(5)
        if distill:
            student.distill(t, 2, 1e-3, kd(alpha=0.0), check=False)
        else:
            student.fit_one_cycle(2, 1e-3)
        return snapshot(student.model)

    assert same(run(True), run(False))


# batches that are dicts


class OneDict(nn.Module):
    "Takes the whole batch as one argument, as fastai passes it"

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, batch):
        return self.net(batch['image'])


class ByName(OneDict):
    def forward(self, image, size=None):
        return self.net(image)


@pytest.mark.parametrize('make', [OneDict, ByName])
def test_a_batch_that_is_a_dict_trains_like_the_tensor_in_it(make, capsys):
    recipe = kd(T=2.0) + Term(losses.at, layers={'net.2': 'net.2'})

    def run(as_dict):
        random.seed(5)
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 3, 8, 8, generator=g), torch.randint(3, (32,), generator=g)
        items = [({'image': a, 'size': torch.tensor(8)} if as_dict else a, b) for a, b in zip(x, y)]
        dls = DataLoaders(DataLoader(items[:24], bs=8, shuffle=True), DataLoader(items[24:], bs=8))
        torch.manual_seed(1)
        student, teacher = (OneDict() if as_dict else nn.Sequential(OrderedDict(net=net()))), make()
        teacher.net(x)  # batch-norm has seen something
        (learn,) = quiet(Learner(dls, student, loss_func=nn.CrossEntropyLoss()))
        learn.logger = print
        found = learn.check_teacher(teacher if as_dict else teacher.net, kind='softmax')
        assert not [f for f in found if f.level == 'error']
        learn.distill(
            teacher if as_dict else nn.Sequential(OrderedDict(net=teacher.net)),
            2,
            1e-2,
            recipe,
            check=False,
        )
        return (
            student.state_dict(),
            [*map(str, found), *found.facts.lines()],
            capsys.readouterr().out,
        )

    (a, *says), (b, *also) = run(True), run(False)
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and says == also and 'net.2' in says[1]


@pytest.mark.filterwarnings('ignore:.*is a pickle')
def test_the_folder_of_a_run_stands_for_its_student(tmp_path):
    "Where Learners are known; a plain Teacher names the file"
    teacher, student = learner(A), learner(B, seed=1)
    teacher.export(tmp_path / 'student.pkl')
    wanted = taught(teacher_of(teacher, student), student)
    assert torch.equal(taught(teacher_of(str(tmp_path), student), student), wanted)
    with pytest.raises(DistillError, match=r"the folder of a run.*load_learner\('.*student.pkl'\)"):
        Teacher(tmp_path)
