"A student that follows its teacher away from the labels is told so once, during the fit."

import warnings
import pytest, torch
import apps
from apps import toy
from fastai.learner import Recorder
from fastdistill.fastai import (
    DistillWarning,
    KnowledgeDistillation,
    Recipe,
    Term,
    hard_labels,
    kd,
    losses,
    recipes,
    soft_labels,
)
from fastdistill.fastai.trend_check import TrendCheck
from fastdistill.recipes.default import auto

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
SAYS = r'The task loss on the validation set rose from \S+ in epoch 0 to \S+, while kd fell from \S+ to \S+: .*Use a recipe that also learns from the labels'


def fit(recipe, n_epoch=9, wrong=True):
    student, teacher = toy()
    bad = lambda x: (
        5 * torch.roll(x[:, :4], 1, 1)
    )  # another class than the largest of the first four
    cb = KnowledgeDistillation(bad if wrong else teacher, recipe, check=False)
    student.fit(n_epoch, 0.3, cbs=cb)
    return cb


def test_a_wrong_teacher_is_warned_about_once():
    with pytest.warns(DistillWarning, match=SAYS) as seen:
        cb = fit(soft_labels(1.0))
    assert len([w for w in seen if 'rose from' in str(w.message)]) == 1 and cb.trend.warned


@pytest.mark.parametrize(
    'recipe, says',
    [
        (kd(1.0, 0.5), 'Use a smaller alpha of kd, now 0.5, or a smaller T;'),
        (hard_labels(0.9), 'Use a smaller alpha of hard, now 0.9;'),
        (recipes.cwd(), 'Use a smaller weight of cwd, now 3, or a smaller T;'),
        (recipes.cwd(grad_ratio=0.5), 'Use a smaller grad_ratio of cwd, now 0.5;'),
        (
            auto(classes=4),
            "Use a smaller grad_ratio of dist, now 3, as in 'labels "
            r"\+ dist\(T=4, beta=2, gamma=2, grad_ratio=1, fade=1\)';",
        ),
        (auto(classes=2), 'Use a smaller alpha of kd, now 0.5, or a smaller T;'),
        (kd(alpha=('linear', 0.9, 0.5)), 'Use a smaller alpha of kd, or a smaller T;'),
    ],
    ids=repr,
)
def test_the_options_that_are_named_are_those_of_the_recipe(recipe, says):
    t = recipe.terms[0]
    with pytest.warns(DistillWarning, match=f'{says}.*explain'):
        TrendCheck().check(Learn([1.0, 0.5, 0.6], [3.0, 2.0, 1.0], t.name), 0.5, recipe)


def test_nothing_is_said_where_the_labels_loss_falls_or_the_training_has_just_begun():
    with warnings.catch_warnings():
        warnings.simplefilter('error', DistillWarning)
        fit(kd(1.0, 0.5), wrong=False)
        fit(soft_labels(1.0), n_epoch=2)


def test_nothing_is_said_of_a_head_that_nothing_trains():
    "Without labels, a term between layers trains the body alone"
    apart, beside = [
        Recipe(Term(losses.cosine, layers='embedding', name='kd'), task=w) for w in (0.0, 1.0)
    ]
    falls = Learn([1.0, 0.5, 0.6], [3.0, 2.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter('error', DistillWarning)
        TrendCheck().check(falls, 0.5, apart)
    with pytest.warns(DistillWarning, match='rose from'):
        TrendCheck().check(falls, 0.5, beside)


@pytest.mark.parametrize('task, warns', [([1.0, 0.5, 0.4], False), ([1.0, 0.5, 0.55], True)])
def test_nothing_is_said_of_a_student_that_overfits_the_labels_too(task, warns):
    learn = Learn([1.0, 0.5, 0.6], [3.0, 2.0, 1.0], task=task)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        TrendCheck().check(learn, 0.5, kd(1.0, 0.5))
    assert bool(seen) == warns


class Learn:
    def __init__(self, valid, kd, name='kd', task=None):
        names, columns = [f'{name}_loss'], [valid, kd]
        if task is not None:
            names, columns = ['task_loss', *names], [valid, task, kd]
        self.recorder = Recorder()
        self.recorder.metric_names = ['epoch', 'train_loss', 'valid_loss', *names, 'time']
        self.recorder.values = [[1.0, *row] for row in zip(*columns)]


@pytest.mark.parametrize(
    'valid,kd,share,warns',
    [
        ([1.0, 0.5, 0.6], [3.0, 2.0, 1.0], 0.5, True),
        ([1.0, 0.5, 0.54], [3.0, 2.0, 1.0], 0.5, False),
        ([1.0, 0.5, 0.6], [3.0, 2.0, 2.5], 0.5, False),
        ([1.0, 0.5, 0.6], [3.0, 2.0, 1.0], 0.3, False),
        ([None, None], [3.0, 2.0], 0.5, False),
        ([], [], 0.5, False),
        ([1.0, float('nan')], [3.0, 2.0], 0.5, False),
    ],
    ids=['rises', 'hardly', 'both', 'early', 'no labels', 'nothing', 'nan'],
)
def test_it_takes_a_rise_of_a_tenth_and_a_term_that_falls(valid, kd, share, warns):
    t = TrendCheck()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        t.check(Learn(valid, kd), share, soft_labels())
    assert bool(seen) == t.warned == warns
