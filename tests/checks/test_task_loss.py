"A task loss that is a sum over the batch is reported before training, because fixed weights then depend on the batch size."

import warnings
import pytest, torch
import torch.nn.functional as F
from apps import FASTAI_WARNINGS, quiet
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from torch import nn
from fastdistill import Distiller, Teacher
from fastdistill.base.outputs import DistillWarning
from fastdistill.fastai import KnowledgeDistillation, cache_teacher, check_teacher

pytestmark = pytest.mark.filterwarnings(
    *FASTAI_WARNINGS, 'ignore:The teacher is no better', 'ignore:The student is larger'
)
X, Y = torch.randn(32, 5, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
FIXED, RATIO = 'kd(T=2, alpha=.5)', 'labels + Term(losses.kl, grad_ratio=1)'
SUM = 'The task loss is a sum over the batch.*fixed weight of kd.*grad_ratio='


def own_sum(out, y):
    return F.cross_entropy(out, y, reduction='sum')


def own_mean(out, y):
    return F.cross_entropy(out, y, weight=torch.tensor([1.0, 5.0, 2.0]))


class OwnSum(nn.Module):
    def forward(self, out, y):
        return F.cross_entropy(out, y, reduction='none').sum()


class OwnMean(nn.Module):
    def forward(self, out, y):
        return F.cross_entropy(out, y, reduction='none').mean() + 0.01


sums = pytest.mark.parametrize(
    'loss', [own_sum, OwnSum(), nn.CrossEntropyLoss(reduction='sum')], ids=['fn', 'module', 'torch']
)
means = pytest.mark.parametrize(
    'loss',
    [own_mean, OwnMean(), nn.CrossEntropyLoss(), None],
    ids=['fn', 'module', 'torch', 'none'],
)


def learner(loss):
    samples = list(zip(X, Y))
    dls = DataLoaders.from_dsets(samples, samples, bs=8, num_workers=0, device='cpu')
    dls.n_inp = 1
    torch.manual_seed(0)
    return quiet(Learner(dls, nn.Linear(5, 3), loss_func=loss or CrossEntropyLossFlat()))[0]


def loop(loss, recipe):
    torch.manual_seed(0)
    d = Distiller(nn.Linear(5, 3), nn.Linear(5, 3), recipe, task_loss=loss, kind='softmax')
    return d(X[:8], Y[:8])


@sums
def test_a_loop_warns_in_the_first_batch(loss):
    with pytest.warns(DistillWarning, match=SUM):
        summed = loop(loss, FIXED)
    assert summed.losses['task'].item() == pytest.approx(
        8 * loop(None, FIXED).losses['task'].item()
    )


@means
def test_a_loop_with_a_mean_does_not_warn(loss):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loop(loss, FIXED)


@sums
def test_gradient_ratios_do_not_depend_on_the_batch_size(loss):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loop(loss, RATIO)


@sums
@pytest.mark.parametrize('stored', [False, True])
def test_a_fit_warns_once_before_it_begins(loss, stored, tmp_path):
    learn, teacher = learner(loss), Teacher(nn.Linear(5, 3))
    if stored:
        teacher = cache_teacher(teacher, learn.dls, tmp_path, views=0, kind='softmax', check=False)
    cb = KnowledgeDistillation(teacher, FIXED, kind='softmax')
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(1, 1e-3, cbs=cb)
        learn.fit(1, 1e-3, cbs=cb)
    assert sum('is a sum over the batch' in str(w.message) for w in seen) == 1


@means
def test_a_fit_with_a_mean_does_not_warn(loss):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        cb = KnowledgeDistillation(Teacher(nn.Linear(5, 3)), FIXED, kind='softmax')
        learner(loss).fit(1, 1e-3, cbs=cb)
    assert not any('is a sum over the batch' in str(w.message) for w in seen)


def test_check_teacher_reports_a_sum_only_for_fixed_weights():
    learn, teacher = learner(nn.CrossEntropyLoss(reduction='sum')), nn.Linear(5, 3)
    about = lambda recipe: [f.about for f in check_teacher(learn, teacher, recipe=recipe)]
    assert 'task loss' in about(FIXED)
    assert 'task loss' not in about(RATIO)
    assert 'task loss' not in about('soft_labels()')
