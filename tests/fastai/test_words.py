"Words of other tools: `temperature` for `T`, and weights that mean the same numbers."

import inspect
import pytest, torch
import apps
from torch import nn
import torch.nn.functional as F
from fastdistill import DistillError, Recipe, Term, kd, losses, recipes

pytestmark = [pytest.mark.filterwarnings(w) for w in apps.FASTAI_WARNINGS]

WITH_T = [n for n in recipes.__all__ if 'T' in inspect.signature(getattr(recipes, n)).parameters]


@pytest.mark.parametrize('name', WITH_T)
def test_temperature_is_another_name_of_T(name):
    recipe = getattr(recipes, name)
    assert repr(recipe(temperature=2.5)) == repr(recipe(T=2.5)) != repr(recipe())
    assert repr(recipe(temperature=('linear', 8, 1))) == repr(recipe(T=('linear', 8, 1)))
    with pytest.raises(
        DistillError,
        match='T=4 and temperature=2: these are two names for the same option; give only one of them',
    ):
        recipe(T=4, temperature=2)
    with pytest.raises(DistillError, match='two names for the same option'):
        kd(4, temperature=2)  # by position, too


def test_a_term_takes_temperature_too():
    assert (
        repr(Term(losses.kl, temperature=2.5))
        == repr(Term(losses.kl, T=2.5))
        != repr(Term(losses.kl))
    )
    assert repr(Term(losses.kl, temperature=('linear', 8, 1))) == repr(
        Term(losses.kl, T=('linear', 8, 1))
    )
    s, t = torch.randn(2, 6, 5).unbind()
    kl = 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction='batchmean')
    torch.testing.assert_close(Recipe(Term(losses.kl, temperature=3.0), task=0.0)(s, t), kl)
    with pytest.raises(
        DistillError, match='T=4 and temperature=2: these are two names for the same option'
    ):
        Term(losses.kl, T=4, temperature=2)
    with pytest.raises(DistillError, match='T=0: a temperature must be a number above 0'):
        Term(losses.kl, temperature=0)
    with pytest.raises(DistillError, match='hint has no option temperature'):
        Term(losses.hint, temperature=2)


def test_a_loss_with_an_option_temperature_of_its_own_gets_it():
    "Its name may mean something else there, so it is not translated"

    def own(s, t, *, T=1.0, temperature=1.0):
        return (s - t).mean() * T + temperature

    s, t = torch.ones(2, 3), torch.zeros(2, 3)
    assert Recipe(Term(own, temperature=5.0), task=0.0)(s, t).item() == 6

    def any_options(s, t, **options):
        return (s - t).mean() + options['temperature']

    assert Recipe(Term(any_options, temperature=5.0), task=0.0)(s, t).item() == 6


@pytest.mark.parametrize(
    'weights',
    [
        dict(task_loss_weight=0.3),
        dict(distill_loss_weight=5.0),
        dict(distill_loss_weight=5.0, task_loss_weight=0.5),
    ],
)
def test_weights_of_timm_are_converted_as_the_page_does(weights):
    LogitDistillationTask = pytest.importorskip('timm.task').LogitDistillationTask

    def net(width):
        m = nn.Sequential(
            nn.Conv2d(3, width, 3, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 5),
        )
        m.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        m.num_classes, m.in_chans = 5, 3
        return m

    student, teacher, x, y = net(4), net(8), torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    task = LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), temperature=4.0, verbose=False, **weights
    )
    if 'distill_loss_weight' in weights:
        recipe = Recipe(
            Term(losses.kl, weight=weights['distill_loss_weight'], T=4.0),
            task=weights.get('task_loss_weight', 1.0),
        )
    else:
        recipe = kd(T=4.0, alpha=1 - weights['task_loss_weight'])
    s, t = student(x), teacher.eval()(x).detach()
    torch.testing.assert_close(recipe(s, t, y, task_loss=F.cross_entropy), task(x, y)['loss'])
