"`compare` in every application of fastai: the same numbers as fastai's own, in every form of model, and honest about luck."

import functools, random, warnings
from copy import deepcopy
import numpy as np
import pytest, torch
import torch.nn.functional as F
import apps
from apps import APPS, FASTAI_WARNINGS, answers, mlp, pair, quiet, rows, same, snapshot, toy
from fastai.basics import Callback, CancelTrainException, CancelValidException, DataLoaders, compose
from fastai.metrics import F1Score, RocAuc, accuracy
from torch import nn
from fastdistill.fastai import DistillError, DistillInterpretation, Report, Teacher, compare

pytestmark = [pytest.mark.filterwarnings(w) for w in FASTAI_WARNINGS]
QUICK = dict(seconds=0, repeats=200, progress=False)
by_app = pytest.mark.parametrize('app', APPS, ids=lambda a: a.name)


@by_app
def test_every_application_gets_the_numbers_of_fastai_itself(app):
    student, teacher = pair(app)
    alone, _ = pair(app, seed=3)
    were = [snapshot(l.model) for l in (student, alone, teacher)]
    r = compare(dict(teacher=teacher, alone=alone, distilled=student), **QUICK)
    assert all(same(a, snapshot(l.model)) for a, l in zip(were, (student, alone, teacher)))
    for name, learn in dict(teacher=teacher, alone=alone, distilled=student).items():
        loss, *values = learn.validate()
        assert r.models[name].loss == pytest.approx(loss, rel=1e-4)
        assert list(r.models[name].metrics.values()) == pytest.approx(list(values), rel=1e-4)
    assert r.task == app.kind and (r.teacher, r.baseline) == ('teacher', 'alone')
    assert r.unit == dict(
        text_classifier='texts',
        language_model='pieces of text',
        tabular='rows',
        collab='rows',
        collab_nn='rows',
    ).get(app.name, 'images')
    assert [(c.model, c.against) for c in r.comparisons] == [
        ('distilled', 'alone'),
        ('alone', 'teacher'),
        ('distilled', 'teacher'),
    ]
    if app.kind != 'regression':
        assert len(r.classes) == len(r.counts) == len(r.models['alone'].classes['recall'])
    assert Report.from_json(r.to_json()) == r


def right(o, y):
    return o.argmax(1) == y


def iou(o, y, c):
    return (right(o, y) & (y == c)).sum() / ((o.argmax(1) == c) | (y == c)).sum()


BY_HAND = dict(
    accuracy=lambda o, y: right(o, y).double().mean(),
    perplexity=lambda o, y: F.cross_entropy(o, y.long()).exp(),
    miou=lambda o, y: torch.stack([iou(o, y, c) for c in range(4)]).mean(),
    f1=lambda o, y: 2 * ((o > 0) & (y > 0)).sum() / ((o > 0).sum() + (y > 0).sum()),
    r2=lambda o, y: 1 - (o - y).pow(2).sum() / (y - y.double().mean(0)).pow(2).sum(),
)


@by_app
def test_the_headline_in_a_plain_loop(app):
    student, teacher = pair(app)
    r = compare(dict(teacher=teacher, student=student), **QUICK)
    for name, learn in dict(teacher=teacher, student=student).items():
        batches = answers(learn.model, learn.dls.valid)
        o = torch.cat(
            [
                o.movedim(app.axis, -1).reshape(-1, o.shape[app.axis])
                if app.kind == 'softmax'
                else o.reshape(len(o), -1)
                for o, _ in batches
            ]
        ).double()
        y = torch.cat(
            [y.flatten() if app.kind == 'softmax' else y.reshape(len(y), -1) for _, y in batches]
        )
        wanted = BY_HAND[r.headline](o, y)
        assert r.models[name].measures[r.headline].value == pytest.approx(float(wanted), rel=1e-4)


def test_every_form_of_a_model_has_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    monkeypatch.chdir(tmp_path)
    student, teacher = pair('image')
    teacher.export('t.pkl')
    x = student.dls.valid.one_batch()[0]
    model = deepcopy(teacher.model).eval()
    with warnings.catch_warnings():  # the exporter, about PyTorch
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model,
            (x.as_subclass(torch.Tensor),),
            't.onnx',
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    forms = dict(
        learner=teacher,
        module=teacher.model,
        file='t.pkl',
        onnx='t.onnx',
        function=lambda x: model(x),
        twice=[teacher, teacher.model],
        own=Teacher(teacher.model),
    )
    teacher.dls.path = student.dls.path = tmp_path
    r = compare({**forms, 'student': student}, seconds=0.001, repeats=100, progress=False)
    ms = [r.models[k] for k in forms]
    assert (
        len({round(m.loss, 4) for m in ms}) == 1
        and len({m.measures['accuracy'].value for m in ms}) == 1
    )
    assert [r.models[k].cost.params for k in ('learner', 'file', 'onnx', 'function')] == [
        ms[0].cost.params
    ] * 2 + [None] * 2
    assert r.models['onnx'].cost.bytes == (tmp_path / 't.onnx').stat().st_size
    assert all(
        [l.batch for l in m.cost.latency] == [1, 16] and l.p50 > 0
        for m in ms
        for l in m.cost.latency
    )
    assert r.machine['threads'] == torch.get_num_threads()


def test_a_teacher_with_classes_in_another_order_is_mapped():
    from apps import image

    student, teacher = pair('image')
    other, _ = quiet(*image(vocab=('blue', 'red', 'green')))
    _, other = quiet(*image(vocab=('blue', 'red', 'green')))
    other.model.load_state_dict(teacher.model.state_dict())
    with torch.no_grad():
        for p in list(other.model[1].parameters()):
            p.copy_(p[[2, 0, 1]])
    r = compare(dict(teacher=other, same=teacher, student=student), **QUICK)
    assert (
        r.models['teacher'].measures['accuracy'].value
        == r.models['same'].measures['accuracy'].value
    )
    assert r.models['same'].agreement['same'] == 1


def a_table(cats, conts, df=None):
    df = apps.table(96) if df is None else df
    dls = apps.TabularDataLoaders.from_df(
        df[[*cats, *conts, 'kind']].copy(),
        procs=[apps.Categorify, apps.FillMissing, apps.Normalize],
        cat_names=cats,
        cont_names=conts,
        y_names='kind',
        y_block=apps.CategoryBlock(),
        valid_idx=list(range(64, 96)),
        bs=16,
        num_workers=0,
    )
    return quiet(apps.tabular_learner(dls, layers=[4]))[0]


def of_letters():
    block = apps.CategoryBlock(vocab=['a', 'b', 'c'], sort=False)
    return apps.image_dls(block, lambda x, at, k: 'abc'[k])


SHAPES, SIZES = ['colour', 'shape'], ['length', 'width']
OTHER_CODES = dict(
    categories=(
        lambda: a_table(SHAPES, SIZES, apps.table(96).replace('red', 'yellow')),
        r'their categories differently \(in colour\)',
    ),
    columns=(
        lambda: a_table(SHAPES[:1], SIZES),
        r'categories differently \(not in both: shape\)',
    ),
    two_columns=(
        lambda: a_table(
            ['colour', 'kind_2'], SIZES, apps.table(96).rename(columns={'shape': 'kind_2'})
        ),
        r'categories differently \(not in both: shape, kind_2\)',
    ),
    scales=(
        lambda: a_table(SHAPES, SIZES, apps.table(96).assign(width=range(96))),
        r'their columns of numbers differently \(in width\)',
    ),
    order_of_categories=(
        lambda: a_table(SHAPES[::-1], SIZES),
        r'categories differently \(in their order: colour, shape and shape, colour\)',
    ),
    order_of_numbers=(
        lambda: a_table(SHAPES, SIZES[::-1]),
        r'numbers differently \(in their order: length, width and width, length\)',
    ),
    words=(
        lambda: apps.text_classifier(vocab=apps.WORDS[:2] + apps.WORDS[:1:-1])[0],
        r"their tokens differently \(first 'good' and 'is'\)",
    ),
    direction=(
        lambda: apps.text_classifier(backwards=True)[0],
        r'their texts differently \(forward and backward\)',
    ),
    classes=(
        lambda: quiet(*apps.vision(of_letters(), 3))[0],
        r'does not have 3 of the classes of these data \(red, green, blue\)',
    ),
)


@pytest.mark.parametrize('name', OTHER_CODES)
def test_a_model_of_other_classes_or_codes_is_refused(name, tmp_path):
    make, why = OTHER_CODES[name]
    other = make()
    apps_of = dict(words=apps.text_classifier, direction=apps.text_classifier, classes=apps.image)
    student = quiet(*apps_of.get(name, apps.tabular)())[0]
    with pytest.raises(DistillError, match=why):
        compare(dict(other=other, student=student), **QUICK)
    other.export(tmp_path / 'other.pkl')
    for o in (tmp_path / 'other.pkl', [student, other]):
        with pytest.raises(DistillError, match=why):
            compare(dict(other=o, student=student), **QUICK)
    with pytest.raises(DistillError, match='differently'):
        student.calibrate(other.dls.valid)
    with pytest.raises(DistillError, match=why):
        DistillInterpretation.from_learner(student, other)
    assert compare(dict(other=other), **QUICK).n == 32


def test_a_given_dataloader_decides_the_order_of_the_classes_and_the_normalization():
    stats = apps.Normalize.from_stats([0.2] * 3, [0.5] * 3)
    student = pair('image')[0]
    other = quiet(*apps.image(vocab=('blue', 'red', 'green'), batch_tfms=stats))[0]
    wanted = compare(dict(student=student), **QUICK).models['student']
    got = compare(dict(student=student), dl=other.dls.valid, **QUICK)
    assert got.classes == ['blue', 'red', 'green']
    got = got.models['student']
    assert got.loss == pytest.approx(wanted.loss, rel=1e-4)
    assert got.classes['recall'] == [wanted.classes['recall'][i] for i in (2, 0, 1)]
    with pytest.raises(DistillError, match='their classes differently'):
        student.calibrate(other.dls.valid)


def test_metrics_and_data_of_the_users_choice():
    student, teacher = toy()
    r = compare(
        dict(teacher=teacher, student=student),
        metrics=[accuracy, F1Score(average='macro'), RocAuc()],
        **QUICK,
    )
    y = torch.stack([y for _, y in student.dls.valid_ds])
    o = torch.cat([o for o, _ in answers(teacher, student.dls.valid)])
    from sklearn.metrics import f1_score, roc_auc_score

    assert r.models['teacher'].metrics == pytest.approx(
        dict(
            accuracy=(o.argmax(1) == y).double().mean().item(),
            f1_score=f1_score(y, o.argmax(1), average='macro'),
            roc_auc_score=roc_auc_score(y, o.softmax(1), multi_class='ovr'),
        ),
        rel=1e-4,
    )
    train = compare(dict(teacher=teacher, student=student), dl=student.dls.train, **QUICK)
    assert (train.n, r.n) == (64, 32)
    alone = compare(
        dict(a=teacher, b=student.model),
        student.dls,
        loss_func=nn.CrossEntropyLoss(),
        metrics=accuracy,
        **QUICK,
    )
    assert alone.models['a'].metrics == dict(accuracy=r.models['teacher'].metrics['accuracy'])
    assert r.models['teacher'].loss == pytest.approx(alone.models['a'].loss)


def test_metrics_of_one_name_have_a_row_each():
    student, teacher = toy()
    ms = [F1Score(average='macro'), F1Score(average='micro')]
    student.metrics = ms
    models = dict(teacher=teacher, student=student)
    y = torch.stack([y for _, y in student.dls.valid_ds])
    o = torch.cat([o for o, _ in answers(teacher, student.dls.valid)]).argmax(1)
    from sklearn.metrics import f1_score

    for r in (compare(models, **QUICK), compare(models, metrics=ms, **QUICK)):
        got = r.models['teacher'].metrics
        assert [*got] == ['f1_score', 'f1_score (2)']
        wanted = [f1_score(y, o, average=k) for k in ('macro', 'micro')]
        assert [*got.values()] == pytest.approx(wanted, rel=1e-4)


def test_the_training_goes_into_the_report():
    student, teacher = toy()
    student.distill(teacher, 3, 1e-2, check=False)
    h = compare(dict(teacher=teacher, student=student), **QUICK).models['student'].history
    assert list(h) == ['train_loss', 'valid_loss', 'accuracy', 'task_loss', 'dist_loss'] and {
        len(v) for v in h.values()
    } == {3}
    assert h['valid_loss'][-1] == pytest.approx(student.validate()[0], rel=1e-5)


def test_each_batch_is_read_once_and_the_dataloader_is_as_before():
    student, teacher = toy()
    read = []
    dl = student.dls.valid
    dl.after_batch = compose(lambda b: (read.append(len(b[0])), b)[1])
    before = dict(vars(student))
    compare(dict(teacher=teacher, a=student, b=deepcopy(student.model)), **QUICK)
    assert read == [16, 16] and vars(student) == before


def test_a_random_state_is_not_moved():
    student, teacher = toy()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    compare(dict(teacher=teacher, student=student), **QUICK)
    now = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    assert now == (torch.rand(1), np.random.rand(), random.random())


def test_the_same_call_gives_the_same_report():
    student, teacher = toy()
    a, b = (
        compare(dict(teacher=teacher, alone=mlp(4), student=student), **QUICK) for _ in range(2)
    )
    a.models['alone'] = b.models['alone']
    b.comparisons = a.comparisons  # `alone` is new each time
    assert a == b


@pytest.mark.parametrize(
    'call,why',
    [
        (lambda s, t: compare([s, t]), 'compare needs names'),
        (lambda s, t: compare({}), 'compare needs names'),
        (lambda s, t: compare(dict(a=t, b=t)), 'None of the models is a Learner'),
        (lambda s, t: compare(dict(teacher=t, s=s), teacher='x'), "teacher='x'"),
        (
            lambda s, t: compare(dict(teacher=t, s=s), headline='x', **QUICK),
            "headline='x': must be one of 'accuracy',",
        ),
        (lambda s, t: compare(dict(teacher='none.pkl', s=s)), 'no file'),
        (
            lambda s, t: compare(dict(teacher=nn.Linear(8, 5), s=s), **QUICK),
            r"'s' have shape \(16, 4\), but the outputs of 'teacher' have shape \(16, 5\)",
        ),
    ],
)
def test_mistakes_are_named(call, why):
    with pytest.raises(DistillError, match=why):
        call(*toy())


# luck


@functools.cache
def data():
    "300 rows to train on, 400 to compare on"
    x, y = rows(700, seed=5)
    items = list(zip(x, y))
    dls = DataLoaders.from_dsets(
        items[:300], items[300:], bs=400, shuffle=False, num_workers=0, device='cpu'
    )
    return dls, x[:300], y[:300]


def fitted(seed, hidden=8, steps=60, seen=300):
    torch.manual_seed(seed)
    _, x, y = data()
    m = mlp(hidden)
    opt = torch.optim.Adam(m.parameters(), 0.02)
    for _ in range(steps):
        F.cross_entropy(m(x[:seen]), y[:seen]).backward()
        opt.step()
        opt.zero_grad()
    return m


def difference(a, b):
    r = compare(dict(alone=a, distilled=b), data()[0], loss_func=nn.CrossEntropyLoss(), **QUICK)
    return r.comparison('distilled').differences['accuracy']


def test_of_20_pairs_of_the_same_recipe_two_are_called_significant_at_most():
    ds = [difference(fitted(2 * i), fitted(2 * i + 1)) for i in range(20)]
    assert sum(d.significant for d in ds) <= 2
    assert sum(d.value != 0 for d in ds) >= 15  # the pairs do differ


def test_a_student_that_is_better_is_called_significant():
    for i in range(3):
        d = difference(fitted(i, seen=12), fitted(i + 10))
        assert d.significant and d.value > 0 and d.low > 0


LOSSES = ['train_loss', 'valid_loss']


def history(learn):
    return compare(dict(student=learn), **QUICK).models['student'].history


def trained(n_epoch=2, cbs=(), metrics=accuracy):
    student, _ = toy()
    student.metrics = metrics
    with student.no_bar(), student.no_logging():
        student.fit(n_epoch, 0.1, cbs=cbs)
    return student


class ValidatesInside(Callback):
    "Calls the Learner's own methods in the middle of a fit, before the Recorder sees the event"

    def __init__(self, event, call):
        self.event, self.call, self.busy = event, call, False

    def __call__(self, event_name):
        if event_name == self.event and not self.busy:
            self.busy = True
            self.call(self.learn)
            self.busy = False


@pytest.mark.parametrize('event', ['after_epoch', 'after_train', 'before_validate'])
@pytest.mark.parametrize('call', ['validate', 'get_preds'])
@pytest.mark.parametrize('metrics', [accuracy, []], ids=['accuracy', 'no metrics'])
def test_a_validation_in_the_middle_of_an_epoch_is_not_taken_for_a_training_curve(
    metrics, call, event
):
    student = trained(cbs=[ValidatesInside(event, lambda o: getattr(o, call)())], metrics=metrics)
    assert history(student) == {}


class CancelsTraining(Callback):
    "In the second epoch"

    def before_batch(self):
        if self.training and self.epoch == 1:
            raise CancelTrainException


@pytest.mark.parametrize('metrics', [accuracy, []], ids=['accuracy', 'no metrics'])
def test_a_validation_after_the_training_is_not_taken_for_a_training_curve(metrics):
    student = trained(metrics=metrics)
    assert [len(history(student)[k]) for k in LOSSES] == [2, 2]
    student.validate()
    assert history(student) == {}


def test_the_search_for_a_rate_is_not_taken_for_a_training_curve():
    student = trained(0)
    with student.no_bar(), student.no_logging():
        student.lr_find(num_it=20, show_plot=False)
    assert student.recorder.losses
    assert history(student) == {}


def test_training_curves_without_a_validation_have_the_training_loss():
    student = toy()[0]
    student.recorder.valid_metrics = False
    with student.no_bar(), student.no_logging():
        student.fit(2, 0.1)
        assert history(student)['train_loss'] == [v[0] for v in student.recorder.values]
        assert len(student.recorder.values) == 2
        student.lr_find(num_it=20, show_plot=False)
        assert len(student.recorder.values) > 0
        assert history(student) == {}


@pytest.mark.parametrize('metrics', [[accuracy], []], ids=['accuracy', 'no metrics'])
@pytest.mark.parametrize('train_metrics', [False, True])
def test_the_training_curves_have_a_gap_where_an_epoch_was_not_trained(metrics, train_metrics):
    student = trained(0, metrics=metrics)
    student.recorder.train_metrics = train_metrics
    with student.no_bar(), student.no_logging():
        student.fit(3, 0.1, cbs=CancelsTraining())
    h = history(student)
    first, second, third = student.recorder.values
    n = 1 + len(metrics) * train_metrics
    assert h['train_loss'] == [first[0], None, third[0]]
    assert h['valid_loss'] == [first[n], second[0], third[n]]
    if metrics:
        name = 'valid_accuracy' if train_metrics else 'accuracy'
        assert h[name] == [first[n + 1], second[1], third[n + 1]]


class CancelsValidation(Callback):
    "In the second epoch"

    def before_validate(self):
        if self.epoch == 1:
            raise CancelValidException


@pytest.mark.parametrize('metrics', [[accuracy], []], ids=['accuracy', 'no metrics'])
def test_the_training_curves_have_a_gap_where_an_epoch_was_not_validated(metrics):
    student = trained(3, CancelsValidation(), metrics)
    h = history(student)
    first, second, third = student.recorder.values
    assert h['train_loss'] == [first[0], second[0], third[0]]
    assert h['valid_loss'] == [first[1], None, third[1]]
    assert student.explain(toy()[1]) is not None


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid', 'regression'])
def test_modules_are_compared_on_a_loader_of_pytorch(kind):
    torch.manual_seed(0)
    x, nets = torch.randn(60, 5), dict(teacher=nn.Linear(5, 3), student=nn.Linear(5, 3))
    y = torch.arange(60) % 3
    y = y if kind == 'softmax' else F.one_hot(y, 3).float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    loss = dict(
        softmax=F.cross_entropy, sigmoid=F.binary_cross_entropy_with_logits, regression=F.mse_loss
    )[kind]
    given = {} if kind == 'softmax' else dict(kind=kind)
    for options in (dict(dl=loader, **given), dict(dl=loader, loss_func=loss)):
        r = compare(nets, **options, **QUICK)
        assert r.task == kind and r.n == 60 and r.teacher == 'teacher'
        for k, net in nets.items():
            assert r.models[k].loss == pytest.approx(loss(net(x), y).item(), rel=1e-4)
    assert compare(nets, loader, loss_func=loss, **QUICK).n == 60
    if kind != 'softmax':
        with pytest.raises(DistillError, match='the labels are not class numbers: pass loss_func='):
            compare(nets, dl=loader, **QUICK)


def test_comparing_modules_on_a_loader_of_pytorch_moves_no_random_state():
    rows = torch.utils.data.TensorDataset(torch.randn(30, 5), torch.arange(30) % 3)
    net, loader = nn.Linear(5, 3), torch.utils.data.DataLoader(rows, 16)
    before = torch.get_rng_state()
    compare(dict(net=net), dl=loader, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
