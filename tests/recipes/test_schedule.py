"Weights and temperatures that move."

import math, pickle
import pytest
from fastdistill import DistillError, Schedule
from fastdistill.recipes.schedule import schedule, value_at

AT = (0.0, 0.05, 0.1, 0.5, 1.0)


@pytest.mark.parametrize(
    'v,want',
    [
        (3, lambda p: 3),
        (0.5, lambda p: 0.5),
        ('linear', lambda p: 1 - p),
        ('cosine', lambda p: (1 + math.cos(math.pi * p)) / 2),
        ('warmup', lambda p: min(p * 10, 1)),
        (('linear', 4), lambda p: 4 - 4 * p),
        (('linear', 4, 1), lambda p: 4 - 3 * p),
        (('cosine', 2, 6), lambda p: 4 - 2 * math.cos(math.pi * p)),
        (('warmup', 100), lambda p: 100 * min(p * 10, 1)),
        (['warmup', 1, 3], lambda p: 1 + 2 * min(p * 10, 1)),
        (lambda p: p**2, lambda p: p**2),
        (Schedule('linear', 1, 0), lambda p: 1 - p),
    ],
)
def test_a_schedule_is_what_it_says(v, want):
    for p in AT:
        assert value_at(schedule(v), p) == pytest.approx(want(p))


@pytest.mark.parametrize(
    'v', ['cosin', ('linear', 'a'), ('linear', 1, 2, 3), (), None, (1, 2), [[]]], ids=repr
)
def test_what_is_none_is_refused_with_what_is_possible(v):
    with pytest.raises(
        DistillError,
        match=r'alpha=.*must be a number, a function of progress from 0 to 1, a name \(linear, cosine,',
    ):
        schedule(v, 'alpha')


def test_a_schedule_asks_where_training_stands():
    assert value_at(2.0, None) == 2.0
    with pytest.raises(
        DistillError,
        match=r'The weight of kl follows a schedule: pass the progress of the training, as in distiller\(x, y, prog',
    ):
        value_at(schedule('cosine'), None, 'The weight of kl')


def test_schedules_of_the_same_name_and_ends_are_the_same():
    a, b = schedule(('linear', 2, 1)), schedule(('linear', 2.0, 1.0))
    assert a == b and pickle.loads(pickle.dumps(a)) == a and a != schedule(('linear', 2, 0))
