"Every way out of a fit, a good end, an error or an interrupt at any event: what distillation changed is put back at once."

import pytest
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import Callback, CancelFitException, event
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import RandomResizedCrop
from cached import Convs, cache_teacher, data, student
from fastdistill.fastai import KnowledgeDistillation, at, kd

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)
# all events that an uncancelled fit has; after_create is before it
EVENTS = [
    e for e in vars(event) if not e.startswith('_') and 'cancel' not in e and e != 'after_create'
]

ERRORS = [KeyboardInterrupt('stop'), ValueError('no'), CancelFitException()]
ORDERS = [-30, 4, 6, 80]


class StopAt(Callback):
    "Ends the fit at one event"

    def __init__(self, name, error, order):
        super().__init__()
        self.event_name, self.error, self.order = name, error, order

    def __call__(self, name):
        if name == self.event_name:
            raise self.error


class ExportEachEpoch(Callback):
    order = 70

    def __init__(self, name):
        super().__init__()
        self.file = name

    def after_epoch(self):
        self.learn.export(self.file)


def quiet(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 1e-3, **kwargs)
    return learn


def few():
    "Four training samples, since there are 164 fits of them"
    crops = [RandomResizedCrop(12, min_scale=0.4)]
    return data(items=range(6), valid=(4, 5), bs=2, item_tfms=crops, augment='none')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    teacher = Convs(3).train()
    cache = cache_teacher(
        Convs(3).eval(), few(), tmp_path_factory.mktemp('cache'), views=2, layers=['a']
    )
    return dict(live=teacher, cache=cache)


RECIPE = lambda: kd() + at(layers={'bn': 'a'})


def nothing_stays(learn, teacher, metrics):
    assert list(learn.metrics) == metrics
    assert len(learn.dls.one_batch()) == len(learn.dls.valid.one_batch()) == 2
    assert not any(m._forward_hooks for m in [*learn.model.modules(), *teacher.modules()])
    assert all(m.training for m in teacher.modules())


@pytest.mark.parametrize('source', ['live', 'cache'])
def test_a_callback_that_stays_on_the_learner_puts_everything_back_whatever_ends_the_fit(
    sources, source, tmp_path
):
    "Every event with each error and in each order, and every error in each order"
    learn = student(few(), metrics=apps.accuracy, path=tmp_path)
    learn.add_cb(KnowledgeDistillation(sources[source], RECIPE(), check=False))
    metrics, teacher = list(learn.metrics), sources['live']
    for i, name in enumerate(EVENTS):
        for j, order in enumerate(ORDERS):
            error = ERRORS[(i + j) % len(ERRORS)]
            try:
                quiet(learn, cbs=StopAt(name, error, order))
            except type(error):
                pass
            nothing_stays(learn, teacher, metrics)
            assert [type(c).__name__ for c in learn.cbs].count('KnowledgeDistillation') == 1
    assert learn.get_preds()[0].shape == (2, 3)
    assert len(learn.validate()) == 2
    learn.export('student.pkl')
    assert b'fastdistill' not in (tmp_path / 'student.pkl').read_bytes()
    assert len(learn.dls.train_ds) == 4 and len(learn.dls.one_batch()) == 2
    quiet(learn, 2)
    nothing_stays(learn, teacher, metrics)
    assert learn.recorder.metric_names[-4:-1] == ['task_loss', 'kd_loss', 'at_loss']


def test_a_fit_that_fails_before_its_first_epoch_puts_everything_back(sources):
    learn = student(data(), metrics=apps.accuracy)
    learn.add_cb(KnowledgeDistillation(sources['live'], check=False))
    metrics = list(learn.metrics)
    with pytest.raises(IndexError):
        quiet(learn, cbs=SaveModelCallback(monitor='no_such_column'))
    nothing_stays(learn, sources['live'], metrics)


@pytest.mark.parametrize('views', [0, 2])
def test_a_student_exported_while_it_trains_from_a_cache_is_only_a_student(tmp_path, views):
    cache = cache_teacher(Convs(3).eval(), data(), tmp_path / 'cache', views=views)
    alone, learn = [student(data(), path=tmp_path) for _ in range(2)]
    quiet(alone, cbs=ExportEachEpoch('alone.pkl'))
    quiet(learn, 2, cbs=[KnowledgeDistillation(cache), ExportEachEpoch('student.pkl')])
    a, b = [(tmp_path / f).read_bytes() for f in ('alone.pkl', 'student.pkl')]
    assert b'fastdistill' not in b and len(b) < len(a) + 2000
    assert (
        len(learn.recorder.values) == 2
        and len(learn.dls.train_ds) == 22
        and len(learn.dls.one_batch()) == 2
    )
