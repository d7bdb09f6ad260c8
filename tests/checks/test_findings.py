"The doctor without a framework: what it measures and finds in a few batches of tensors, a healthy case beside each."

import math, random, re
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill import (
    DistillError,
    Distiller,
    Outputs,
    Teacher,
    Term,
    dist,
    dkd,
    hint,
    kd,
    logit_std,
    losses,
    soft_labels,
)
from fastdistill.checks import Findings, check_outputs
from fastdistill.checks.batch_scores import Tally
from fastdistill.checks.class_order import ClassMap, map_classes
from fastdistill.base.task import Task
from fastdistill.checks.teacher_scores import IF_WEAK, classes_known
from fastdistill.teachers.members import modules_of
from fastdistill.recipes.recipe_text import recipe_from_text

SOFTMAX = Task('softmax', 1)


def rows(n=512, k=10, noise=0.45, seed=0):
    "Items whose class is the largest of `k` numbers, most of the time"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, k, (n,), generator=g)
    return F.one_hot(y, k) + noise * torch.randn(n, k, generator=g), y


def batches(x, y, bs=64):
    return [((a,), (b,)) for a, b in zip(x.split(bs), y.split(bs))]


def linear(w, scale=5.0):
    m = nn.Linear(w.shape[1], w.shape[0], bias=False)
    m.weight.data = scale * w.float()
    return m


def knowing(k=10, order=None, scale=5.0):
    return linear(torch.eye(k)[range(k) if order is None else order], scale)


def check(teacher, x, y, task=SOFTMAX, student=None, **kwargs):
    teacher = (
        teacher
        if isinstance(teacher, Teacher)
        else Teacher(teacher, kind=task.kind, axis=task.axis)
    )
    return check_outputs(teacher, task, batches(x, y), student, **kwargs)


def whats(found):
    return [(f.level, f.what) for f in found]


def one(found, level, *words):
    "The only finding, with these words in it"
    (f,) = found
    assert f.level == level
    for w in words:
        assert w in str(f), str(f)
    return f


# facts


def test_the_score_of_the_teacher_stands_beside_the_students_and_a_constants():
    (x, y), student = (
        rows(200),
        linear(torch.randn(10, 10, generator=torch.Generator().manual_seed(1))),
    )
    f = check(knowing(), x, y, student=student, train=batches(3 * x, y)).facts
    score = lambda m: sum(m(a).argmax().item() == b.item() for a, b in zip(x, y)) / 200
    assert f.metric == 'accuracy' and f.n == 200
    assert f.teacher_score == pytest.approx(score(knowing())) and f.student_score == pytest.approx(
        score(student)
    )
    assert f.constant_score == pytest.approx(max((y == c).sum().item() for c in range(10)) / 200)
    top = lambda x: sum(knowing()(a).softmax(0).max().item() for a in x) / 200
    assert f.top_prob_valid == pytest.approx(top(x)) and f.top_prob_train == pytest.approx(
        top(3 * x)
    )


def test_the_facts_stand_above_the_findings():
    x, y = rows(200)
    found = check(knowing(scale=4.0), x, y)
    assert found == [] and isinstance(found, Findings)
    score, top = f'{found.facts.teacher_score:.3f}', f'{found.facts.top_prob_valid:.3f}'
    assert repr(found).splitlines() == [
        f'accuracy on 200 validation items: teacher {score}, constant {found.facts.constant_score:.3f}',
        f"teacher's mean top probability: validation {top}",
        'No mistakes were found. Is this the score that you expect from the teacher?',
    ]


def test_facts_of_labels_and_of_numbers():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 3, generator=g), torch.rand(100, 3, generator=g)
    f = check(linear(torch.eye(3)), x, (y > 0.3).float(), Task('sigmoid')).facts
    assert f.metric == 'accuracy per label'
    assert f.teacher_score == pytest.approx(((x > 0) == (y > 0.3)).double().mean().item())
    assert f.constant_score == pytest.approx((y > 0.3).double().mean(0).mean().item())
    top = torch.stack([(5 * x).sigmoid(), (-5 * x).sigmoid()]).max(0).values
    assert f.top_prob_valid == pytest.approx(top.mean().item())
    f = check(linear(torch.eye(3), 1.0), x, x + y, Task('regression')).facts
    assert f.metric == 'squared error' and f.teacher_score == pytest.approx(y.pow(2).mean().item())
    assert (
        f.constant_score == pytest.approx((x + y).var(0, correction=0).mean().item())
        and f.top_prob_valid is None
    )


@pytest.mark.parametrize('scale, apart', [(0.2, False), (2.0, True)])
def test_a_teacher_that_hardly_tells_labels_apart_is_a_doubt(scale, apart):
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(200, 4, generator=g) > 0.8).float()
    x = 2 * y - 1 + 0.3 * torch.randn(200, 4, generator=g)
    p = [(scale * x).sigmoid()[y == v].mean().item() for v in (1, 0)]
    found = check(linear(torch.eye(4), scale), x, y, Task('sigmoid'))
    assert (p[0] - p[1] > 0.25) is apart
    if apart:
        assert found == []
    else:
        assert one(
            found, 'note', f'{p[0]:.3f} for labels that an item has', f'{p[1]:.3f} for the others'
        ).doubt


def sure(p, k=10, n=512):
    "Items and labels, and the scale at which a teacher that is always right gives its class the probability `p`"
    y = torch.arange(n) % k
    return F.one_hot(y, k).float(), y, math.log((k - 1) * p / (1 - p))


@pytest.mark.parametrize('p, doubt', [(0.79, True), (0.81, False)])
def test_a_teacher_is_a_doubt_if_it_is_right_more_often_than_it_is_sure_by_over_a_fifth(p, doubt):
    x, y, scale = sure(p)
    found = check(knowing(scale=scale), x, y)
    if doubt:
        assert one(
            found,
            'note',
            'is right for 100.0% of 512 validation items',
            f'probability is {p:.3f}',
            'undertrained',
        ).doubt
    else:
        assert found == []


@pytest.mark.parametrize('n, doubt', [(63, False), (64, True)])
def test_fewer_than_64_items_are_no_reason_for_a_doubt(n, doubt):
    x, y, scale = sure(0.5, n=n)
    assert bool(check(knowing(scale=scale), x, y)) is doubt


@pytest.mark.parametrize('apart', [0.24, 0.26])
def test_labels_are_told_apart_from_a_quarter_on(apart):
    y = (torch.arange(400) % 5 == 0).float().reshape(100, 4)
    p = (1 + apart) / 2
    found = check(linear(torch.eye(4), math.log(p / (1 - p))), 2 * y - 1, y, Task('sigmoid'))
    assert bool(found) is (apart < 0.25)


def test_dense_facts_count_what_counts():
    "Of the pixels of an item those that are not ignored, and no item that has none"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (8, 5, 5), generator=g)
    y[0] = 9
    y[1, :3] = 9
    x = torch.randn(8, 4, 5, 5, generator=g)
    f = check(lambda x: x, x, y, Task('softmax', 1, 9)).facts
    want = [(x[i].argmax(0) == y[i])[y[i] != 9].double().mean().item() for i in range(1, 8)]
    assert f.n == 7 and f.teacher_score == pytest.approx(sum(want) / 7)


def test_without_labels_there_are_probabilities():
    f = check_outputs(Teacher(knowing()), SOFTMAX, [((rows(40)[0],), ())]).facts
    assert (
        f.n == 0
        and f.teacher_score is None
        and f.constant_score is None
        and 0.5 < f.top_prob_valid < 1
    )
    assert (
        'accuracy' not in repr(f.lines())
        and check_outputs(Teacher(knowing()), SOFTMAX, []).facts is None
    )


# unusual batches


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b


def test_a_batch_without_samples_is_skipped():
    x, y = rows()
    d = Distiller(nn.Linear(10, 10), knowing())
    full = [(x[:64], y[:64])]
    assert repr(d.check([*full, (x[:0], y[:0])])) == repr(d.check(full))
    (note,) = d.check([(x[:0], y[:0])])
    assert note.level == 'note'
    assert 'No samples were read' in note.what
    with pytest.raises(DistillError, match='The list of batches is empty'):
        d.check([])
    assert d.check(x[:0], y[:0]) == []


@pytest.mark.parametrize('batch', [lambda x, y: (x, y), lambda x, y: dict(image=x, labels=y)])
def test_inputs_that_the_teacher_does_not_take_are_described(batch):
    x, y = rows()
    d = Distiller(TwoInputs(), TwoInputs())
    with pytest.raises(DistillError, match=r'cannot be called .*\(\(a, b\), labels\).* by name'):
        d.check([batch(x, y)])
    assert not d.check([((x, x), y)]).errors


# the order of classes

SWAPPED = [1, 0, 3, 2, 5, 4, 6, 7, 8, 9]
NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


def test_three_swapped_pairs_of_classes_are_named_with_the_list_to_paste():
    x, y = rows()
    score = check(knowing(order=SWAPPED), x, y).facts.teacher_score
    f = one(
        check(knowing(order=SWAPPED), x, y, names=NAMES),
        'error',
        f'Its accuracy is {score:.3f} in the student',
        "'airplane' and 'automobile', 'bird' and 'cat', 'deer' and 'dog' are swapped",
        f'Teacher(model, select={SWAPPED})',
    )
    assert f'and {check(knowing(), x, y).facts.teacher_score:.3f} in this one' in str(f)
    assert check(Teacher(knowing(order=SWAPPED), select=SWAPPED), x, y) == []
    assert 'class 0 and class 1, class 2' in str(check(knowing(order=SWAPPED), x, y))


def test_a_circle_of_classes_is_described_output_by_output():
    x, y = rows()
    circle = [2, 0, 1, *range(3, 10)]  # output 0 is class 2
    one(
        check(knowing(order=circle), x, y, names=NAMES),
        'error',
        "'airplane' is its output 1, 'automobile' is its output 2, 'bird' is its output 0",
        'select=[1, 2, 0, 3, 4, 5, 6, 7, 8, 9]',
    )


def test_a_selection_that_is_wrong_is_replaced_as_a_whole():
    x, y = rows()
    big = linear(torch.eye(12)[:, 2:])  # two classes more, in front
    assert check(Teacher(big, select=range(2, 12)), x, y) == []
    one(
        check(Teacher(big, select=[3, 2, *range(4, 12)]), x, y),
        'error',
        f'Teacher(model, select={[*range(2, 12)]})',
    )


def test_one_swapped_pair_among_fifty_classes_is_found_if_there_are_items_enough():
    order = [1, 0, *range(2, 50)]
    one(
        check(knowing(50, order), *rows(3000, 50, 0.2)),
        'error',
        'class 0 and class 1 are swapped',
        f'select={order}',
    )
    assert check(knowing(50, order, 9.0), *rows(128, 50, 0.2)) == []


def test_swapped_classes_of_a_segmentation_are_found():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (40, 2, 2), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = F.one_hot(y.clamp(max=3), 4).movedim(-1, 1) + 0.3 * torch.randn(40, 4, 8, 8, generator=g)
    task = Task('softmax', 1, 4)
    assert check(lambda x: 5 * x, x, y, task) == []
    one(
        check(lambda x: 5 * x[:, [0, 2, 1, 3]], x, y, task),
        'error',
        'class 1 and class 2 are swapped',
    )


def test_the_place_of_a_class_without_items_is_called_a_guess():
    x, y = rows(1000)
    keep = (y != 1) & (y != 0)
    order = [0, 2, 1, *range(3, 10)]  # of 1 and 2 only 2 is seen
    one(
        check(knowing(order=order), x[keep], y[keep]),
        'error',
        '(1 of them have no samples here, so their position is a guess: pass a larger n=)',
    )


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('k', [2, 3, 10, 100])
def test_no_order_is_proposed_for_teachers_that_are_right_weak_confused_or_random(k, seed):
    g = torch.Generator().manual_seed(seed)
    swaps = lambda teacher, x, y: [f for f in check(teacher, x, y) if 'different order' in f.what]
    for noise in (0.1, 0.6, 1.5, 4.0):  # from nearly perfect to nearly chance
        assert not swaps(knowing(k), *rows(256, k, noise, seed))
    x, y = rows(256, k, 0.5, seed)
    w = torch.eye(k)
    w[0] = 0.9 * w[1]  # it takes class 0 for class 1
    often = torch.cat([torch.arange(k), torch.zeros(9 * k).long()])  # class 0 is the most frequent
    merged = torch.eye(k)
    merged[1, 0], merged[0, 0] = 1, 0  # and it takes all of them for class 1
    assert not swaps(linear(merged), F.one_hot(often, k).float(), often)
    random = (
        linear(torch.randn(k, k, generator=g)) if k > 2 else knowing(k)
    )  # of two classes, one may be right
    for teacher in (
        linear(w),
        random,
        lambda x: F.one_hot(torch.zeros(len(x)).long(), k).float(),
        lambda x: torch.randn(len(x), k, generator=g),
    ):
        assert not swaps(teacher, x, y)


def weakly_seen(n, accuracy, seed, k=100):
    "Inputs that show the class of a row, or a random one"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=g)
    other = torch.randint(k, (n,), generator=g)
    shown = y.where(torch.rand(n, generator=g) < accuracy, other)
    return F.one_hot(shown, k).float(), y


@pytest.mark.parametrize('accuracy', [0.7, 0.9])
def test_an_order_is_given_only_if_the_samples_are_enough_for_each_class(accuracy):
    "512 samples of 100 classes gave wrong lists for most teachers that are right in 70%"
    orders = [torch.randperm(100, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    for seed, order in enumerate(orders):
        wrong_way = lambda x: 5 * x[:, order]
        (error,) = check(wrong_way, *weakly_seen(512, accuracy, seed)).errors
        assert 'The teacher has classes in a different order: its accuracy is 0.0' in error.what
        assert 'samples are too few to be sure of each' in error.what
        assert 'select=[...]). Or pass a larger n=' in error.do
        (error,) = check(wrong_way, *weakly_seen(4096, accuracy, seed)).errors
        assert f'select={order.argsort().tolist()}' in error.do


def test_the_names_of_many_classes_are_compared_without_a_search_in_lists():
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

    names = [f'class {i}' for i in range(400)]
    shuffled = ['more', *random.Random(0).sample(names, len(names))]
    found = ClassMap([*map(Name, names)], [*map(Name, shuffled)])
    assert [shuffled[i] for i in found.order] == names
    assert found.missing == []
    assert found.extra == ['more']
    assert found.shared == names
    assert Name.compared < 20 * len(names)


def test_names_that_several_classes_have_are_all_listed():
    found = map_classes(['a', 'b', 'a', 'c', 'c'], ['b', 'x', 'a', 'x', 'b'])
    assert found.missing == ['c', 'c']
    assert found.extra == ['x', 'x']
    assert found.shared == ['a', 'b', 'a']
    with pytest.raises(DistillError, match='Several classes are named b, so'):
        _ = map_classes(['a', 'b'], ['b', 'b', 'a']).order
    assert map_classes(['a', 'b'], ['x', 'x', 'b', 'a']).order == [3, 2]


def several(n=400, k=6, kind='sigmoid', noise=1.0, seed=0, rare=0.3):
    "Items with several labels or numbers, which are related to each other, and a teacher that knows"
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, generator=g)
    own = torch.randn(n, k, generator=g) + 0.5 * common
    if kind == 'regression':
        scale = torch.linspace(1, 30, k)
        return (own + noise * 0.3 * torch.randn(n, k, generator=g)) * scale + 5, own * scale + 5
    y = (own > own.quantile(1 - rare)).float()
    return 2 * (own - own.quantile(1 - rare) + noise * torch.randn(n, k, generator=g)), y


@pytest.mark.parametrize('order', [[1, 0, 2, 3, 4, 5], [2, 0, 1, 3, 5, 4], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize('kind', ['sigmoid', 'regression'])
@pytest.mark.parametrize('change', [lambda t: t, lambda t: 3 * t - 4, lambda t: 0.1 * t + 1])
def test_labels_and_numbers_in_another_order_are_named(order, kind, change):
    x, y = several(kind=kind)
    task = Task(kind)
    wrong = lambda x: change(x)[:, order]
    (error,) = check(wrong, x, y, task).errors
    found = [order.index(i) for i in range(6)]
    one = 'label' if kind == 'sigmoid' else 'number'
    assert f'The teacher has the {one}s in a different order: {one} 0' in error.what
    assert f'select={found}). Compare this order with the names' in error.do
    assert re.search(r'correlation of 0\.[0-4]\d* .* and of 0\.[5-9]', error.what)
    assert not check(Teacher(wrong, select=found, kind=kind), x, y, task).errors
    names = 'air bus car dog elk fox'.split()
    assert f"'{names[0]}'" in check(wrong, x, y, task, names=names).errors[0].what


def test_labels_in_another_order_are_named_if_the_teacher_returns_probabilities():
    x, y = several()
    found = check(lambda x: x[:, [1, 0, 2, 3, 4, 5]].sigmoid(), x, y, Task('sigmoid'))
    assert 'they seem to be probabilities' in found[0].what
    assert 'The teacher has the labels in a different order: label 0 and label 1' in found[1].what


def test_points_whose_coordinates_are_swapped_are_named():
    g = torch.Generator().manual_seed(0)
    y = (torch.randn(200, 1, 2, generator=g) + 0.2 * torch.randn(200, 3, 2, generator=g)) * 20
    x = y.flatten(1) + torch.randn(200, 6, generator=g)
    swapped = check(lambda x: x[:, [1, 0, 3, 2, 5, 4]], x, y, Task('regression')).errors
    assert 'number 0 and number 1, number 2 and number 3' in swapped[0].what
    assert check(lambda x: x, x, y, Task('regression')) == []


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('kind', ['sigmoid', 'regression'])
@pytest.mark.parametrize('n,k', [(40, 2), (100, 20), (512, 8), (512, 100)])
def test_no_order_of_labels_is_proposed_for_teachers_that_are_right_weak_confused_or_random(
    n, k, kind, seed
):
    g = torch.Generator().manual_seed(seed)
    for noise, rare in ((0.1, 0.3), (1.0, 0.05), (4.0, 0.3)):  # from nearly perfect to weak
        x, y = several(n, k, kind, noise, seed, rare)
        w = torch.eye(k)
        w[0] = w[1]  # it takes label 0 for label 1
        for teacher in (
            lambda x: x,
            lambda x: 5 * x + torch.linspace(-4, 4, k),  # certain, and biased
            lambda x: x @ w.T,
            lambda x: torch.randn(len(x), k, generator=g),
            lambda x: x.mean(1, keepdim=True) + 0.1 * x,
        ):
            found = check(teacher, x, y, Task(kind))
            assert not [f for f in found if 'different order' in f.what]


# normalization

CENTERS = torch.linspace(0.1, 0.9, 5)


class Brightness(nn.Module):
    "It knows five grades of brightness, in images normalized with (mean, std)"

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return -200 * ((x * self.std + self.mean).mean((1, 2, 3))[:, None] - CENTERS) ** 2


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STATS = {
    '(0, 1)': ([0.0], [1.0]),
    '(.5, .5)': ([0.5], [0.5]),
    "'imagenet'": IMAGENET,
    '(0, 1/255)': ([0.0], [1 / 255]),
}


def photos(n=128, wrong=0.0, channels=3):
    "Raw images from 0 to 1, with grades as labels of which some are `wrong`"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (n,), generator=g)
    x = (CENTERS[y].view(-1, 1, 1, 1) + 0.2 * torch.randn(n, channels, 8, 8, generator=g)).clamp(
        0, 1
    )
    return x, y.where(torch.rand(n, generator=g) > wrong, torch.randint(0, 5, (n,), generator=g))


@pytest.mark.parametrize('given', STATS)
@pytest.mark.parametrize('wanted', STATS)
def test_a_usual_normalization_that_fits_better_is_named(given, wanted):
    (x, y), (m, s) = photos(), [torch.tensor(o).view(-1, 1, 1) for o in STATS[given]]
    found = check(
        Teacher(Brightness(*STATS[wanted]), images=dict(input_stats=STATS[given])), (x - m) / s, y
    )
    if given == wanted:
        assert found == []
    else:
        one(
            found,
            'warning',
            'different normalization: accuracy 0.',
            f'(on 128 validation items). Pass the normalization of its training: Teacher(model, images=dict(stats={wanted}))',
        )


def test_stats_that_are_wrong_are_noticed_too():
    x, y = photos()
    teacher = Teacher(Brightness([0.0], [1.0]), images=dict(stats='imagenet', input_stats=(0, 1)))
    one(check(teacher, x, y), 'warning', 'numbers from 0 to 1', 'stats=(0, 1)')


def test_a_weak_teacher_with_the_right_normalization_is_not_suspected():
    x, y = photos(512, wrong=0.5)
    assert check(Teacher(Brightness([0.0], [1.0]), images=dict(input_stats=(0, 1))), x, y) == []
    x, y = photos(512, wrong=0.5, channels=1)
    assert check(Teacher(Brightness([0.0], [1.0]), images=dict(input_stats=(0, 1))), x, y) == []


@pytest.mark.parametrize('n', [15, 16])
def test_other_images_are_tried_only_if_there_are_enough_items_for_a_test(n):
    "With 15 items, the check runs the teacher twice; no difference would be significant"
    (x, y), sizes = photos(64), []
    x, y = (
        x[y < 2][:n],
        1 - y[y < 2][:n],
    )  # of two classes, the teacher always predicts the wrong one

    def teacher(x):
        sizes.append(tuple(x.shape))
        return Brightness([0.0], [1.0])(x)

    found = check(Teacher(teacher, images=dict(input_stats=(0, 1))), x, y)
    assert found.facts.n == n
    if n < 16:
        assert set(sizes) == {(n, 3, 8, 8), (n - 1, 3, 8, 8)}  # the second without a sample
        assert len(sizes) <= 3
        assert 'ormalization' not in found.none
        assert 'normalization' not in {f.about for f in found.in_order}
    else:
        assert (n, 3, 16, 16) in sizes


def test_the_normalization_of_a_teacher_that_returns_probabilities_is_not_suspected():
    x, y = photos()
    y, task = F.one_hot(y, 5).float(), Task('sigmoid')
    teacher = Teacher(
        nn.Sequential(Brightness([0.0], [1.0]), nn.Sigmoid()), images=dict(input_stats=(0, 1))
    )
    one(check(teacher, x, y, task), 'warning', 'they seem to be probabilities')


def test_the_normalization_of_a_regression_is_found():
    x, y = photos()

    class Mean(Brightness):
        def forward(self, x):
            return (x * self.std + self.mean).mean((1, 2, 3))[:, None]

    target, task = CENTERS[y][:, None], Task('regression')
    teacher = Teacher(Mean(*IMAGENET), images=dict(input_stats=(0, 1)), kind='regression')
    one(check(teacher, x, target, task), 'warning', 'squared error 0.', "stats='imagenet'")
    assert check(Teacher(teacher, images=dict(stats='imagenet')), x, target, task) == []


# tokens


class Reader(nn.Module):
    "The class is the most frequent kind of word"

    def __init__(self, vocab, shift=0):
        super().__init__()
        self.emb = nn.EmbeddingBag(vocab, 4)
        self.emb.weight.data = (
            30 * F.one_hot((torch.arange(vocab) * (1 + shift) + shift) % 4, 4).float()
        )

    def forward(self, input_ids):
        return self.emb(input_ids)


def texts(n=256, vocab=40):
    x = torch.randint(0, vocab, (n, 9), generator=torch.Generator().manual_seed(0))
    return x, F.one_hot(x % 4, 4).sum(1).argmax(1)


def test_ids_beyond_the_teachers_embedding_are_an_error_before_they_crash():
    x, y = texts()
    one(
        check(Reader(30), x, y),
        'error',
        "ids up to 39, but the teacher's embedding emb has 30 rows, 0 to 29",
        'different tokenizer',
    )
    assert (
        check_outputs(Teacher(Reader(30)), SOFTMAX, [((dict(input_ids=x),), (y,))])[0].level
        == 'error'
    )
    assert (
        not check(Reader(40), x, y, student=Reader(40)).errors
        and not check(Reader(64), x, y, student=Reader(40)).errors
    )


def test_unknown_ids_are_found_in_any_embedding_that_runs():
    x, y = texts()

    class Positions(Reader):
        "Its second embedding is too small, or is looked up without its module"

        def __init__(self, rows, functional=False):
            super().__init__(40)
            self.pos, self.functional = nn.Embedding(rows, 4), functional

        def forward(self, x):
            at = torch.arange(x.shape[1]).expand_as(x)
            pos = F.embedding(at, self.pos.weight) if self.functional else self.pos(input=at)
            return super().forward(x) + 0 * pos.sum(1)

    one(
        check(Positions(5), x, y),
        'error',
        "ids up to 8, but the teacher's embedding pos has 5 rows",
    )
    one(
        check(Positions(5, True), x, y),
        'error',
        'ids that an embedding of the teacher does not have',
    )
    ensemble = Teacher([Reader(40), Reader(30)])
    one(check(ensemble, x, y), 'error', 'embedding 1.emb has 30 rows')
    assert check(Positions(9), x, y) == []
    assert not [m for o in modules_of(ensemble) for m in o.modules() if m._forward_pre_hooks]

    class Images(nn.Module):
        "Whole numbers that are no ids"

        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(3, 4)

        def forward(self, x):
            return 9 * F.one_hot(x.sum(1) % 4, 4) + 0 * self.emb(x[:, 0] * 0)

    assert not check(Images(), x, y).errors

    def broken(x):
        raise IndexError('list index out of range')

    with pytest.raises(IndexError):
        check(broken, x, y)


class FromTheThird(nn.Embedding):
    "Position embeddings like those of BART: they get the token ids, but look up the positions"

    def __init__(self, rows, width):
        super().__init__(rows + 2, width)

    def forward(self, input_ids):
        return super().forward(torch.arange(2, 2 + input_ids.shape[1]).expand_as(input_ids))


class Scaled(nn.Embedding):
    "Word embeddings like those of BART"

    def forward(self, input_ids):
        return 2 * super().forward(input_ids)


@pytest.mark.parametrize('rows,unknown', [(9, False), (8, True)])
@pytest.mark.parametrize('words,too_few', [(40, False), (39, True)])
def test_an_embedding_that_computes_its_ids_is_no_other_vocabulary(rows, unknown, words, too_few):
    "There are fewer positions than tokens, as in every BART"
    x, y = texts()

    class Bart(Reader):
        def __init__(self):
            super().__init__(40)
            self.words, self.pos = Scaled(words, 4), FromTheThird(rows, 4)

        def forward(self, input_ids):
            pos = self.pos(input_ids=input_ids) + self.words(input_ids)
            return super().forward(input_ids) + 0 * pos.sum(1)

    teacher = Bart()
    found = check(teacher, x, y)
    if unknown or too_few:
        one(found, 'error', 'ids that an embedding of the teacher does not have')
    else:
        assert found == []
    assert not [m for m in teacher.modules() if m._forward_pre_hooks]


def test_a_teacher_near_chance_with_another_vocabulary_may_have_another_tokenizer():
    x, y = texts()

    class Other(Reader):
        def forward(self, input_ids):
            return self.emb((input_ids * 7 + 3) % 50)

    other = Other(50)
    other.emb.weight.data = torch.randn(50, 4, generator=torch.Generator().manual_seed(4))
    one(
        check(other, x, y, student=Reader(40)),
        'warning',
        "The teacher's embedding has 50 rows, the student's 40",
        'different tokenizer',
    )


# how certain, how good


def test_a_teacher_that_is_certain_of_its_training_data_is_noted():
    x, y = rows()
    one(
        check(knowing(), x, y, train=batches(40 * x, y)),
        'note',
        'its mean top probability is 0.99',
        '(validation: 0.7',
        'nearly one-hot',
        'higher T, stronger augmentation',
    )
    assert check(knowing(), x, y, train=batches(x, y)) == []
    assert check(knowing(), 40 * x, y) == []  # of what it has not learned from it may be certain


@pytest.mark.parametrize('p, certain', [(0.989, False), (0.991, True)])
def test_certain_is_a_mean_probability_above_99_percent(p, certain):
    x, y, scale = sure(0.9)
    train = sure(p)[2] / scale * x
    found = check(knowing(scale=scale), x, y, train=batches(train, y))
    if certain:
        one(found, 'note', f'its mean top probability is {p:.3f} (validation: 0.900)')
    else:
        assert found == []


def test_a_teacher_that_is_worse_than_the_student_is_a_warning_with_both_numbers():
    x, y = rows(512)
    good, bad = (
        knowing(),
        linear(
            torch.eye(10) + 0.5 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        ),
    )
    f = one(
        check(bad, x, y, student=good),
        'warning',
        'The teacher is worse than the student is now: accuracy',
    )
    facts = check(bad, x, y, student=good).facts
    assert f'{facts.teacher_score:.3f} and {facts.student_score:.3f} on 512' in str(f)
    assert 'train the teacher longer or use a larger one' in str(f)
    assert check(good, x, y, student=bad) == []
    x, y = rows(64)
    slightly = linear(
        torch.eye(10) + 0.12 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    )
    for teacher, student in ((slightly, good), (good, slightly)):
        assert one(
            check(teacher, x, y, student=student),
            'note',
            'not significantly better than the student is now: accuracy',
        ).doubt


def test_a_teacher_that_is_a_little_better_than_the_student_needs_many_items_to_show_it():
    noisy = linear(
        torch.eye(10) + 0.15 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    )
    few, many = (check(knowing(), *rows(n), student=noisy) for n in (64, 4096))
    assert one(few, 'note', 'not significantly better than the student is now').doubt
    assert many == []


def lucky(accuracy, k=10, seed=0):
    "A teacher that is right for so many items, and guesses for the others"
    g = torch.Generator().manual_seed(seed)

    def predict(x):
        y = x[:, 0].long()
        guess = torch.randint(0, k, (len(y),), generator=g)
        return (
            9
            * F.one_hot(
                torch.where(torch.rand(len(y), generator=g) < accuracy, y, guess), k
            ).float()
        )

    return predict


def numbered(n, k=10):
    y = torch.arange(n) % k
    return y[:, None].float(), y


@pytest.mark.parametrize('n', [64, 512])
def test_a_teacher_that_guesses_is_in_doubt_however_lucky_it_is(n):
    trusted = 0
    for seed in range(100):
        tally = Tally(SOFTMAX)
        x, y = numbered(n)
        tally.add(lucky(0.0, seed=seed)(x), y)
        trusted += classes_known(tally) is None
    assert trusted <= 3  # 1 of 100 on average


@pytest.mark.parametrize(
    'n, accuracy, level', [(5120, 0.02, 'warning'), (64, 0.03, 'warning'), (32, 0.1, 'note')]
)
def test_a_teacher_hardly_better_than_chance_is_in_doubt(n, accuracy, level):
    x, y = numbered(n)
    found = check_outputs(Teacher(lambda x: x), SOFTMAX, batches(lucky(accuracy, seed=1)(x), y))
    assert one(found, level, 'better than chance: on average it recognizes').doubt
    assert found.doubt.startswith('The teacher is')


@pytest.mark.parametrize('n, accuracy', [(64, 0.3), (512, 0.15)])
def test_a_teacher_that_knows_a_little_is_trusted_if_there_are_items_enough(n, accuracy):
    x, y = numbered(n)
    found = check_outputs(Teacher(lambda x: x), SOFTMAX, batches(lucky(accuracy, seed=1)(x), y))
    assert not [f for f in found if 'chance' in f.what]


def test_the_chance_of_labels_and_of_numbers_has_a_margin_too():
    g = torch.Generator().manual_seed(3)
    y = (torch.rand(64, 3, generator=g) > 0.5).float()
    noise = torch.randn(64, 3, generator=g)
    for strength, known in ((0.1, False), (4.0, True)):
        found = check_outputs(
            Teacher(lambda x: x, kind='sigmoid'),
            Task('sigmoid'),
            batches(strength * (y - 0.5) + noise, y),
        )
        assert ('better than chance' in found.doubt) is not known
    y = torch.randn(64, 1, generator=g)
    for part, known in ((0.2, False), (0.7, True)):
        t = part * y + 0.1 * torch.randn(64, 1, generator=g) * part
        found = check_outputs(
            Teacher(lambda x: x, kind='regression'),
            Task('regression'),
            batches(t if known else 0.1 * t, y),
        )
        assert ('better than chance' in found.doubt) is not known


@pytest.mark.parametrize('values', [(0.0, 1.0), (0.0, 0.25, 0.5, 1.0)])
def test_whether_scores_lead_is_decided_by_a_test_of_scipy(values):
    from scipy import stats
    from fastdistill.checks.batch_scores import p_above

    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.tensor(values)[torch.randint(0, len(values), (40,), generator=g)] for _ in range(2)
    )
    if len(values) == 2:
        more, less = int((a > b).sum()), int((a < b).sum())
        assert p_above(a, b) == pytest.approx(
            stats.binomtest(more, more + less, alternative='greater').pvalue
        )
        assert p_above(a, 0.3) == pytest.approx(
            stats.binomtest(int(a.sum()), 40, 0.3, alternative='greater').pvalue
        )
    else:
        assert p_above(a, b) == pytest.approx(
            stats.ttest_rel(a.numpy(), b.numpy(), alternative='greater').pvalue, rel=1e-5
        )
        assert p_above(a, 0.3) == pytest.approx(
            stats.ttest_1samp(a.numpy(), 0.3, alternative='greater').pvalue, rel=1e-5
        )


@pytest.mark.parametrize('more, worse', [(0.03, False), (0.06, True)])
def test_a_teacher_is_worse_from_a_twentieth_of_what_can_be_gained_on(more, worse):
    "A constant is right for a tenth of these items, so that .9 can be gained; chance explains .01 at most of so many"
    y = torch.arange(5000) % 10
    answers = lambda share: F.one_hot(
        torch.where(torch.arange(5000) < share * 5000, y, torch.randint(10, y.shape)), 10
    ).float()
    x = torch.cat([answers(0.7), answers(0.7 + more)], 1)
    eye, none = torch.eye(10), torch.zeros(10, 10)
    teacher, student = linear(torch.cat([eye, none], 1)), linear(torch.cat([none, eye], 1))
    found = check(teacher, x, y, student=student)
    gained = found.facts.student_score - found.facts.teacher_score
    assert (gained / 0.9 > 0.05) is worse
    assert any('worse than the student' in f.what for f in found) is worse


# shapes


def test_a_class_axis_that_does_not_fit_the_labels_is_an_error():
    "A language model's logits with the default axis trained a softmax over time"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, 11, generator=g), torch.randint(0, 11, (16, 6), generator=g)
    f = one(
        check(lambda x: x, x, y, Task('softmax', 1)),
        'error',
        'The outputs, of shape (16, 6, 11), have their classes along axis 1, but the '
        'labels have shape (16, 6): they fit classes along axis -1',
        'axis=-1,',
    )
    assert 'CrossEntropyLossFlat(axis=' in f.do
    for axis in (-1, 2):
        assert not check(lambda x: x, x, y, Task('softmax', axis)).errors
    maps, masks = torch.randn(4, 3, 8, 6, generator=g), torch.randint(0, 3, (4, 8, 6), generator=g)
    assert 'axis=1,' in str(one(check(lambda x: x, maps, masks, Task('softmax', -1)), 'error'))
    assert (
        not check(lambda x: x, maps, masks).errors
        and not check(lambda x: x, maps, masks[:, None]).errors
    )
    one(check(lambda x: x, x[:, 0], y[:, 0], Task('softmax', 3)), 'error', 'have no axis 3')


def test_labels_that_only_the_users_loss_function_can_read_are_a_note():
    x, y = rows(32)
    f = one(
        check(knowing(), x, torch.ones(32, 4), Task('sigmoid')),
        'note',
        'cannot be measured',
        'The labels have shape (32, 4), but the outputs have shape (32, 10)',
    )
    assert (
        check(knowing(), x, torch.ones(32, 4), Task('sigmoid')).facts.n == 0
        and 'loss function' in f.do
    )
    one(check(knowing(), x, torch.ones(32, 2, 2).long()), 'note', 'cannot be measured')
    assert check_outputs(Teacher(knowing()), SOFTMAX, [((x,), (['a'] * 32,))]) == []


def test_labels_beyond_the_classes_are_an_error():
    x, y = rows(32)
    one(
        check(knowing(), x, y + 1),
        'error',
        'There is a label 10, but the outputs have 10 classes, 0 to 9',
        'ignore_index',
    )
    assert not check(knowing(), x, y.where(y < 8, 255), Task('softmax', 1, 255)).errors
    for labels in (y[:, None].to(torch.int8), F.one_hot(y, 10).float()):
        assert not check(knowing(), x, labels).errors


def test_a_softmax_over_one_class_is_an_error():
    x, y = torch.randn(32, 3), torch.zeros(32).long()
    one(
        check(nn.Linear(3, 1), x, y),
        'error',
        "kind='sigmoid'",
        'The outputs, of shape (32, 1), have 1 class along axis 1. Its softmax is always 1',
    )


# the recipe

TWO_CLASSES = {
    'dist': dist(),
    'dist_4': kd() + dist(T=4.0),
    'std': logit_std(kd(T=2.0)),
    'module': Term(losses.Loss(losses.dist)),
    'std_module': Term(losses.standardized(losses.Loss(losses.kl, T=2.0))),
}


@pytest.mark.parametrize('name', TWO_CLASSES)
def test_correlations_and_standardized_logits_have_no_meaning_for_two_classes(name):
    x, y = rows(64, 2, 0.3)
    (f,) = [f for f in check(knowing(2), x, y, recipe=TWO_CLASSES[name]) if f.level != 'note']
    assert f.level == 'error' and 'is meaningless for 2 classes' in f.what and 'Use kd()' in f.do
    assert check(knowing(3), *rows(64, 3, 0.3), recipe=TWO_CLASSES[name]) == []


def test_other_recipes_may_have_two_classes():
    x, y = rows(64, 2, 0.3)
    for recipe in (kd(), dkd(), soft_labels(), Term(losses.kl), dist(beta=0.0)):
        assert check(knowing(2), x, y, recipe=recipe) == []


def test_a_term_whose_student_layers_are_frozen_is_noted():
    x, y = rows(64)
    student = nn.Sequential(
        nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)
    )
    teacher = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), knowing())
    ask = lambda recipe: [
        f for f in check(teacher, x, y, student=student, recipe=recipe) if f.level == 'note'
    ]
    pairs = hint({'0': '0', '2': '2'})
    teacher[4] = nn.Linear(12, 10)
    assert ask(pairs) == []
    student[0].requires_grad_(False)
    one(
        ask(pairs),
        'note',
        'hint compares frozen layers of the student (0)',
        'trains at most its projector',
        'unfreeze()',
    )
    student[2].requires_grad_(False)
    one(ask(pairs), 'note', '(0, 2)')
    one(ask(hint('auto')), 'note', 'frozen layers')
    student[0].requires_grad_(True)
    assert (
        ask(pairs) == [] and ask(kd()) == []
    )  # below layer 2 something is trained, and its features change
    assert not student.training or all(p.grad is None for p in student.parameters())


# batches


def test_batches_that_are_dicts_reach_both_models():
    x, y = texts()
    right = (Reader(40)(x).argmax(1) == y).double().mean().item()

    class Whole(nn.Module):
        "Takes the whole dict, as fastai calls it"

        def __init__(self):
            super().__init__()
            self.reader = Reader(40)

        def forward(self, d):
            return self.reader(d['input_ids'])

    for student in (Reader(40), Whole()):
        for teacher in (Reader(40), Whole(), lambda d: Outputs(Reader(40)(d['input_ids']))):
            f = check_outputs(
                Teacher(teacher), SOFTMAX, [((dict(input_ids=x),), (y,))], student
            ).facts
            assert f.teacher_score == f.student_score == pytest.approx(right)


@pytest.mark.parametrize(
    'part, items', [('validation', '64 validation'), ('training', '64 training'), ('', '64')]
)
def test_messages_say_which_items_were_scored(part, items):
    x, y = rows(64)
    found = check(lambda x: torch.zeros(len(x), 10), x, y, part=part)
    assert found.facts.scores.startswith(f'accuracy on {items} items: teacher ')
    assert f'({items} labels, 10 classes)' in found[0].what
    # a regression
    task, target = Task('regression'), torch.randn(64, 1)
    found = check_outputs(Teacher(lambda x: x), task, batches(5 * target, target), part=part)
    assert f'its squared error on {items} items is' in found[0].what


def test_errors_stop_a_fit_and_notes_are_printed(capsys):
    x, y = rows(64)
    found = check(knowing(), x, y, train=batches(40 * x, y))
    assert found.enforce() is found
    out = capsys.readouterr().out
    assert out.startswith('fastdistill: accuracy on 64 validation items: teacher ')
    assert 'nearly one-hot. Use a higher T' in out
    with pytest.raises(DistillError, match='Mistakes were found before training'):
        check(knowing(), x, y + 1).enforce(facts=False)
    assert capsys.readouterr().out == ''


def test_the_recipe_that_is_advised_for_a_weak_teacher_fades():
    recipe = recipe_from_text(re.search(r"'(labels \+ .+?)'", IF_WEAK)[1])
    assert all(t.fade for t in recipe.terms)


# the size of images


def blocks(n=200, size=(16, 16), noise=0.1):
    "Images with a bright block at one of four positions, which is the class"
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (n,), generator=g)
    x = F.one_hot(y, 4).float().repeat_interleave(size[1] // 4, 1)[:, None, None]
    x = x.expand(n, 3, *size)
    return x + noise * torch.randn(n, 3, *size, generator=g), y


def of_size(height, width, fixed=False):
    "A teacher that looks for the blocks where they are in images of its size"

    def teacher(x):
        if fixed and x.shape[-2:] != (height, width):
            raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
        at = F.pad(x, (0, max(0, width - x.shape[-1])))[..., :height, :width]
        return 9 * at.unflatten(-1, (4, width // 4)).mean((1, 2, 4))

    return teacher


@pytest.mark.parametrize('trained,given', [(32, 16), (16, 32), (24, 16), (16, 24), (64, 32)])
def test_images_of_another_size_than_the_teachers_are_named(trained, given):
    x, y = blocks(size=(given, given))
    teacher = of_size(trained, trained)
    (found,) = check(teacher, x, y)
    assert found.level == 'warning' and found.about == 'image size'
    assert f'with the images of {given} x {given} pixels that it gets' in found.what
    assert f'with {trained} x {trained} (on 200 validation items)' in found.what
    assert f'images=dict(size={trained}))' in found.do
    assert check(Teacher(teacher, images=dict(size=trained)), x, y) == []


def test_images_of_another_shape_than_the_teachers_are_named():
    x, y = blocks(size=(16, 16))
    (found,) = check(lambda x: of_size(16, 32)(x) * (x.shape[-2] == 16), x, y)
    assert 'images=dict(size=(16, 32))' in found.do


@pytest.mark.parametrize('size', [(16, 16), (16, 24), (32, 32)])
@pytest.mark.parametrize('noise', [0.1, 3.0, 9.0])
@pytest.mark.parametrize('fixed', [False, True])
def test_images_of_the_teachers_size_are_not_doubted(size, noise, fixed):
    x, y = blocks(size=size, noise=noise)
    found = check(of_size(*size, fixed), x, y)
    assert not [f for f in found if f.about == 'image size']
