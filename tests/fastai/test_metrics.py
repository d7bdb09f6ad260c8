"What the progress table and the curves show with a teacher."

import copy
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
import torch.nn.functional as F
import apps  # before the rest of fastai: it keeps its warnings quiet
from apps import pair, toy
from fastai.basics import Adam, Callback, DataLoaders, Recorder
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastdistill.fastai import KnowledgeDistillation, kd, soft_labels

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
KD = KnowledgeDistillation


class OwnLoss(Callback):
    "The task loss of each training batch"

    order = 4

    def __init__(self):
        super().__init__()
        self.epochs = []

    def before_train(self):
        self.epochs.append([])

    def after_loss(self):
        if self.training:
            self.epochs[-1].append((F.cross_entropy(self.pred, self.y).item(), len(self.y)))

    @property
    def means(self):
        return [sum(v * n for v, n in e) / sum(n for _, n in e) for e in self.epochs]


def column(learn, name):
    return [v[learn.recorder.metric_names.index(name) - 1] for v in learn.recorder.values]


@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(32)]], ids=['plain', 'accumulated'])
def test_task_loss_is_the_labels_own_loss_on_the_training_set(cbs):
    student, teacher = toy(bs=24)  # the last batch is smaller
    own = OwnLoss()
    student.fit(3, 0.1, cbs=[KD(teacher, kd()), own, *cbs])
    assert student.recorder.metric_names == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'task_loss',
        'kd_loss',
        'time',
    ]
    assert column(student, 'task_loss') == pytest.approx(own.means, rel=1e-5)


def test_an_epoch_that_is_cut_short_counts_as_far_as_it_went():
    student, teacher = toy()
    own, cb = OwnLoss(), KD(teacher)
    student.fit(
        1, 0.1, cbs=[cb, own, ShortEpochCallback(0.5)]
    )  # fastai leaves such an epoch out of its table
    assert 0 < len(own.epochs[0]) < 4 and cb.part_metrics[0].value == pytest.approx(
        own.means[0], rel=1e-5
    )


@pytest.mark.filterwarnings('ignore:.*The task loss on the validation set rose')
@pytest.mark.filterwarnings('ignore:The labels. loss on the validation set rose')
def test_an_overfitting_student_is_seen():
    "It learns 16 labels that are drawn at random: valid_loss rises, task_loss falls"
    student, teacher = toy(bs=16)
    x, _ = apps.rows()
    y = torch.randint(4, (96,))
    student.dls = DataLoaders.from_dsets(
        list(zip(x[:16], y[:16])), list(zip(x[64:], y[64:])), bs=16, num_workers=0, device='cpu'
    )
    student.model = apps.mlp(64)
    student.opt_func = Adam
    student.create_opt()
    student.fit(60, 0.01, cbs=KD(teacher, alpha=0.1, check=False))
    task, valid = column(student, 'task_loss'), column(student, 'valid_loss')
    assert task[-1] < 0.5 * task[0] and valid[-1] > valid[0]


def test_with_train_metrics_each_set_has_its_own_column():
    student, teacher = toy()
    student.recorder.train_metrics = True
    own = OwnLoss()
    student.fit(2, 0.1, cbs=[KD(teacher), own])
    assert column(student, 'train_task_loss') == pytest.approx(own.means, rel=1e-5)
    assert column(student, 'valid_task_loss') == pytest.approx(
        column(student, 'valid_loss'), rel=1e-5
    )


def test_without_labels_or_a_recorder_nothing_is_measured():
    student, teacher = toy(labels=False)
    student.fit(1, 0.1, cbs=KD(teacher, soft_labels()))
    assert column(student, 'task_loss') == [None]
    student, teacher = toy()
    student.remove_cb(Recorder)
    student.fit(1, 0.1, cbs=KD(teacher))


def test_measuring_it_does_not_wait_for_a_gpu():
    "The sums stay where the loss is: on the meta device a look at a number would be an error"
    student, teacher = toy()
    cb = KD(teacher)
    student.fit(1, 0.1, cbs=cb)
    metric = cb.part_metrics[0]
    metric.start_training()
    cb.parts = {'task': torch.empty((), device='meta')}
    student.yb = (torch.zeros(16),)
    for _ in range(2):
        metric.add_training_batch(student)
    assert metric.training_sums.device.type == 'meta'


@pytest.fixture
def figure():
    yield plt.figure()
    plt.close('all')


@pytest.mark.filterwarnings('ignore:.*The task loss on the validation set rose')
@pytest.mark.filterwarnings('ignore:The labels. loss on the validation set rose')
@pytest.mark.parametrize('train_metrics', [False, True])
def test_plot_loss_has_the_labels_losses_on_a_scale_of_their_own(figure, train_metrics):
    student, teacher = toy()
    student.recorder.train_metrics = train_metrics
    student.fit(4, 0.1, cbs=KD(teacher, T=20.0, alpha=0.3))
    left = student.recorder.plot_loss(skip_start=3)
    (right,) = [a for a in figure.axes if a is not left]
    assert left.get_ylabel() == 'loss with the teacher' and right.get_ylabel() == 'task loss'
    train, valid = right.lines
    name = 'train_task_loss' if train_metrics else 'task_loss'
    for line, n in ((train, name), (valid, 'valid_loss')):
        np.testing.assert_allclose(line.get_ydata(), column(student, n), rtol=1e-6)
        assert list(line.get_xdata()) == [4, 8, 12, 16]
    np.testing.assert_allclose(left.lines[0].get_ydata(), torch.stack(student.recorder.losses[3:]))
    assert [t.get_text() for t in left.get_legend().get_texts()] == [
        'train, with the teacher',
        'train, labels',
        'valid, labels',
    ]


def test_plot_loss_without_a_teacher_is_fastais(figure):
    student, teacher = toy()
    student.fit(2, 0.1)
    ax = student.recorder.plot_loss(skip_start=0, show_epochs=True)
    assert figure.axes == [ax] and [t.get_text() for t in ax.get_legend().get_texts()] == [
        'train',
        'valid',
    ]
    student.fit(2, 0.1, cbs=KD(teacher))
    plt.clf()
    assert len(student.recorder.plot_loss(with_valid=False).figure.axes) == 1


def test_plot_loss_without_labels(figure):
    student, teacher = toy(labels=False)
    student.fit(2, 0.1, cbs=KD(teacher, soft_labels()))
    student.recorder.plot_loss(skip_start=0)
    assert all(np.isnan(np.asarray(l.get_ydata(), float)).all() for l in figure.axes[1].lines)


def test_an_averaged_model_and_a_copied_learner_keep_their_columns():
    student, teacher = pair('image')
    student.fit(1, 0.01, cbs=KD(teacher, kd()))
    other = copy.deepcopy(student)
    other.fit(1, 0.01)
    assert 'task_loss' not in other.recorder.metric_names
