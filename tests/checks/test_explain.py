"Why a teacher did not help more: each reason is found where it is the reason, with its number."

import re
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from apps import APPS, pair, toy
from fastdistill import DistillError, Teacher
from fastdistill.fastai import cache_teacher, compare, recipes
from fastdistill.checks.explain import Follow, explain_training
from fastdistill.base.task import Task

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
KINDS = [Task('softmax'), Task('softmax', axis=-1), Task('sigmoid'), Task('regression')]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def mean_prediction(t, task):
    "The outputs that predict the mean of the teacher's predictions, for every item"
    if task.kind == 'regression':
        m = t.mean(0)
    elif task.kind == 'sigmoid':
        m = torch.logit(t.sigmoid().mean(0))
    else:
        m = t.softmax(1).mean(0).log()
    return m.expand_as(t)


@pytest.mark.parametrize('task', KINDS, ids=lambda t: f'{t.kind} {t.axis}')
def test_all_was_taken_over_by_an_equal_and_nothing_by_a_constant(task):
    t = 2 * numbers(40, 5)
    for s, want in ((t, 1.0), (mean_prediction(t, task), 0.0)):
        f = Follow(task)
        for part in (slice(0, 15), slice(15, 40)):
            f.add(s[part], t[part])
        assert f.value == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize('task', KINDS, ids=lambda t: f'{t.kind} {t.axis}')
def test_what_was_taken_over_is_a_distance_against_that_of_the_mean(task):
    s, t = numbers(30, 4), 2 * numbers(30, 4, seed=1)

    def d(s):
        if task.kind == 'regression':
            return (s - t).pow(2).sum()
        if task.kind == 'softmax':
            return F.kl_div(s.log_softmax(1), t.softmax(1), reduction='sum')
        p, q = t.sigmoid(), s.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()

    f = Follow(task)
    f.add(s, t)
    assert f.value == pytest.approx(1 - (d(s) / d(mean_prediction(t, task))).item())


def test_a_map_counts_its_places():
    s, t = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1)
    maps, rows = Follow(Task('softmax')), Follow(Task('softmax', axis=-1))
    maps.add(s, t)
    rows.add(*[o.movedim(1, -1).flatten(0, -2) for o in (s, t)])
    assert maps.value == pytest.approx(rows.value)


# reasons


class Model(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def labeled(n=64, seed=0):
    x = numbers(n, 6, seed=seed).float()
    return x, x[:, :3].argmax(1)


def why(teacher, student, train=None, n=256, **options):
    valid, train = labeled(n), labeled(n, 1) if train is None else train
    batch = lambda x, y: ((x,), (y,))
    return explain_training(
        Teacher(teacher),
        Task('softmax'),
        Model(student),
        [batch(*valid)],
        [batch(*train)],
        **options,
    )


def right(x):
    return 3 * x[:, :3]


def blurred(scale):
    return lambda x: x[:, :3] + scale * x[:, 3:]


def constant(x):
    return torch.zeros(len(x), 3)


def test_nothing_stood_in_the_way():
    found = why(right, lambda x: 3 * blurred(0.2)(x), steps=5000, shares=dict(task=0.5, kd=0.5))
    assert found == [] and repr(found).endswith('No obstacle to distillation was found.')
    assert 'accuracy on 256 validation items: teacher' in repr(
        found
    ) and 'the student reproduces: training 9' in repr(found)


REASONS = [
    (
        'the student is better',
        blurred(0.8),
        right,
        {},
        r'warning: The student is better than the teacher \(accuracy on 256 validation items: teacher 0.\d+, student 1.000\)',
    ),
    (
        'as good',
        blurred(0.3),
        blurred(0.3),
        {},
        'warning: The teacher is not significantly better than the student',
    ),
    (
        'does not follow',
        right,
        constant,
        dict(steps=300),
        r'even on training items: it reproduces \d+% of the teacher.s probabilities, and predicts its class for \d+% of them after 300 steps. Train longer',
    ),
    (
        'certain',
        lambda x: 50 * right(x),
        lambda x: 50 * blurred(0.3)(x),
        {},
        r'note: The teacher is nearly certain on the training items: its mean top probability is 0.99',
    ),
    (
        'few labels',
        right,
        blurred(0.3),
        dict(shares=dict(task=0.03, kd=0.97)),
        'note: The task loss had 3% of the gradient',
    ),
    (
        'a faded term',
        right,
        blurred(0.3),
        dict(faded=dict(dist=0.04)),
        "note: At the end of training, 4% of dist's gradient ratio was left",
    ),
    ('few steps', right, blurred(0.3), dict(steps=240), 'note: The training had 240 steps'),
]


@pytest.mark.parametrize('name,teacher,student,options,says', REASONS, ids=[r[0] for r in REASONS])
def test_a_reason_is_found_with_its_number(name, teacher, student, options, says):
    found = why(teacher, student, **options)
    assert any(re.search(says, str(f)) for f in found), repr(found)


def test_a_handful_of_items_says_nothing_of_the_teacher():
    found = why(right, constant, n=5)
    assert not any('not significantly better than the student' in str(f) for f in found)
    assert any(
        'There are too few items to compare the models' in str(f)
        and 'on 5 validation items' in str(f)
        for f in found
    )


def test_training_items_learned_by_heart():
    x, y = labeled(256, 1)
    by_heart = lambda o: right(o) if torch.equal(o, x) else constant(o)
    assert any(
        'on training items (100%), but less on validation items (0%)' in str(f)
        for f in why(right, by_heart)
    )


def test_augmentation_that_the_teacher_does_not_know():
    x, y = labeled(256, 1)
    found = why(right, right, train=(x.flip(1), y))
    assert any(
        'worse on augmented training items' in str(f)
        and 'than on validation items (1.000)' in str(f)
        for f in found
    )


N, Y = 200, torch.arange(200) % 3


def answers(*, wrong=0, sure=0.9, taught=1.0):
    """(N, 3) logits of a teacher whose first `wrong` answers are wrong, and of a student between it and the mean of its
    predictions: `taught` is what it took over"""
    y = torch.where(torch.arange(N) < wrong, (Y + 1) % 3, Y)
    p = torch.full((N, 3), (1 - sure) / 2).scatter(1, y[:, None], sure).double()
    mean = p.mean(0)
    kl = lambda q: (p * (p / q).log()).sum(1).mean()
    low, high = 0.0, 1.0  # the weight of the teacher in the student
    for _ in range(50):
        w = (low + high) / 2
        low, high = (w, high) if 1 - kl(w * p + (1 - w) * mean) / kl(mean) < taught else (low, w)
    return [o.log().float() for o in (p, high * p + (1 - high) * mean)]


def why_of(valid, train, **options):
    "With the answers of teacher and student to validation items, and to training items"
    t, s = [torch.cat(o) for o in zip(valid, train)]
    look = lambda o: lambda x: o[x[:, 0].long()]
    at = torch.arange(2 * N)[:, None].float()
    batch = lambda x: [((x,), (Y,))]
    return explain_training(
        Teacher(look(t)), Task('softmax'), Model(look(s)), batch(at[:N]), batch(at[N:]), **options
    )


@pytest.mark.parametrize('worse, denied', [(2, True), (8, False)])
def test_a_lead_at_the_usual_level_is_not_denied(worse, denied):
    teacher, student = answers()[0], answers(wrong=worse)[0]
    found = why_of((teacher, student), (teacher, student))
    assert says(found, 'not significantly better than the student') is denied


def says(found, text):
    return any(text in str(f) for f in found)


@pytest.mark.parametrize('taught', [0.48, 0.52])
def test_a_student_follows_if_it_took_over_half(taught):
    found = why_of(answers(taught=taught), answers(taught=taught))
    assert found.facts.follows_train == pytest.approx(taught, abs=1e-4)
    assert says(found, 'does not follow the teacher even on training items') is (taught < 0.5)


@pytest.mark.parametrize('taught', [0.78, 0.82])
def test_a_fifth_less_on_other_items_is_learned_by_heart(taught):
    found = why_of(answers(taught=taught), answers())
    assert says(found, 'but less on validation items') is (taught < 0.8)


@pytest.mark.parametrize('wrong', [18, 22])
def test_a_tenth_worse_on_augmented_items_is_another_view(wrong):
    assert says(why_of(answers(), answers(wrong=wrong)), 'worse on augmented training items') is (
        wrong > 20
    )


@pytest.mark.parametrize('wrong, repeated', [(20, 14), (16, 16), (15, 15)])
def test_repeated_mistakes_are_measured_but_no_reason_and_fewer_than_16_say_nothing(
    wrong, repeated
):
    t, right = answers(wrong=wrong)[0], answers()[0]
    s = torch.where(torch.arange(N)[:, None] < repeated, t, right)
    found = why_of((t, s), answers())
    assert found.facts.repeats == (repeated / wrong if wrong > 15 else None)
    assert not says(found, 'mistakes')


@pytest.mark.parametrize(
    'losses, longer',
    [([3, 2, 1], True), ([3, 1, 1.1, 1.2], False), ([9 - i for i in range(10)], True), ([], True)],
)
def test_no_longer_training_is_advised_if_the_validation_loss_stopped_falling(losses, longer):
    options = dict(steps=200, losses=losses)
    assert says(why(right, blurred(0.3), **options), 'had 200 steps') is longer
    found = why(right, constant, **options)
    assert says(found, 'Train longer first') is longer
    assert says(found, 'lowest after epoch 2 of 4') is not longer


@pytest.mark.parametrize('p', [0.989, 0.991])
def test_nearly_certain_begins_at_99_percent(p):
    assert says(why_of(answers(), answers(sure=p)), 'nearly certain on the training items') is (
        p > 0.99
    )


@pytest.mark.parametrize('share', [0.09, 0.1])
def test_less_than_a_tenth_of_the_gradient_is_little(share):
    assert says(
        why_of(answers(), answers(), shares=dict(task=share, kd=1 - share)),
        'of the gradient on the first batch',
    ) is (share < 0.1)


def test_little_of_the_gradient_names_the_options_of_the_term_that_has_most_of_it():
    found = why_of(
        answers(),
        answers(),
        shares=dict(task=0.05, at=0.05, cwd=0.9),
        lower=(recipes.cwd() + recipes.at({'1': '1'})).how_to_lower,
    )
    assert says(found, 'Use a smaller weight of cwd, now 3')


@pytest.mark.parametrize('steps', [999, 1000])
def test_fewer_than_a_thousand_steps_are_few(steps):
    assert says(why_of(answers(), answers(), steps=steps), f'had {steps} steps') is (steps < 1000)


@pytest.mark.parametrize('left', [0.09, 0.1])
def test_a_gradient_ratio_that_fell_below_a_tenth_is_faded(left):
    found = why_of(answers(), answers(), faded=dict(dist=left))
    assert says(found, f"{left:.0%} of dist's gradient ratio was left") is (left < 0.1)


def test_outputs_that_differ_in_shape_are_named():
    assert 'has shape (256, 3)' in str(why(lambda x: x, right)[0])
    with pytest.raises(DistillError, match='no validation items'):
        explain_training(Teacher(right), Task('softmax'), Model(right), [])


# in fastai


@pytest.mark.parametrize('app', APPS, ids=lambda a: a.name)
def test_explaining_changes_nothing(app):
    student, teacher = pair(app)
    before = [apps.snapshot(l.model) for l in (student, teacher)]
    found = student.explain(teacher, n=2)
    assert found.facts.follows_valid is not None and (app.kind == 'regression' or found.facts.n)
    assert all(map(apps.same, before, [apps.snapshot(l.model) for l in (student, teacher)]))


def test_after_a_training_its_steps_and_shares_are_known():
    student, teacher = toy()
    cb = student.distill(teacher, 2, 0.1, check=False)
    found = student.explain(teacher, cb)
    assert (
        found.facts.steps == 2 * len(student.dls.train)
        and found.facts.shares == cb.distiller.gradient_shares
    )
    assert any(f'The training had {found.facts.steps} steps' in f.what for f in found)
    student.validate()  # it sets fastai's count of steps to 0
    assert (
        student.explain(teacher, cb).facts.steps == found.facts.steps
        and student.explain(teacher).facts.steps is None
    )


def test_what_is_no_callback_is_refused():
    student, teacher = toy()
    with pytest.raises(DistillError, match='callback is a .*: must be what distill.. returned'):
        student.explain(teacher, teacher)


def test_stored_outputs_are_refused_where_the_teacher_has_to_run(tmp_path):
    student, teacher = toy()
    cache = cache_teacher(
        teacher, student.dls, tmp_path / 'c', kind='softmax', check=False, progress=False
    )
    for stored in (cache, tmp_path / 'c', [str(tmp_path / 'c')]):
        for ask in (student.explain, student.check_teacher):
            with pytest.raises(
                DistillError, match="c contains a teacher's outputs .* pass the model itself"
            ):
                ask(stored)


@pytest.mark.parametrize('name', ['image', 'multi_label', 'unet'])
def test_the_share_of_equal_predictions_is_the_one_of_the_report(name):
    student, teacher = pair(name)
    same = (
        compare(dict(teacher=teacher, student=student), seconds=0, repeats=10, progress=False)
        .models['student']
        .agreement['same']
    )
    found = student.explain(teacher)
    assert found.facts.same_valid == pytest.approx(same)
    assert f'validation {same:.0%}' in repr(found)


def test_a_student_that_is_surely_wrong_took_over_less_than_nothing_but_says_how_often_it_agrees():
    sure = lambda x: 30 * blurred(2.0)(x)
    found = why(right, sure)
    x, _ = labeled(256, 1)
    same = (sure(x).argmax(1) == right(x).argmax(1)).float().mean().item()
    assert found.facts.follows_train < 0 < same
    assert any(
        f"it reproduces less than 0% of the teacher's probabilities, and predicts its class for {same:.0%} of them"
        in str(f)
        for f in found
    )
