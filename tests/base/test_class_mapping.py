"Teachers of more, fewer, other or coarser classes, and one of several teachers for each batch."

import copy
from math import log
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from fastdistill import DistillError, Distiller, Outputs, Recipe, Teacher, Term, kd, losses
from fastdistill.base.class_mapping import class_groups, grouped, grouped_labels
from fastdistill.base.outputs import TopK
from fastdistill.fastai import KnowledgeDistillation, cache_teacher
from fastdistill.fastai.task import Task
from fastdistill.fastai.teachers import teacher_of
from fastdistill.fastai.class_names import vocab_of

pytestmark = [pytest.mark.filterwarnings(w) for w in apps.FASTAI_WARNINGS]
g = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=g)
Y = torch.tensor([0, 1, 2, 3, 4] * 2 + [0, 3])
FIVE, THREE, TWO = [nn.Linear(6, n) for n in (5, 3, 2)]


def distilled(teacher, recipe, x=X, y=Y, student=FIVE, **kwargs):
    return Distiller(student, teacher, recipe, **kwargs)(x, y)


def kl_loop(p, q):
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q))


def probs(net, x):
    return net(x).softmax(1).tolist()


# groups


def test_the_probability_of_a_group_is_the_sum():
    logits = torch.randn(3, 5, 2, generator=g, dtype=torch.float64)
    p, q = logits.softmax(1), grouped(logits, [[0, 3], 2, [4, 1]]).softmax(1)
    torch.testing.assert_close(q, torch.stack([p[:, 0] + p[:, 3], p[:, 2], p[:, 1] + p[:, 4]], 1))
    assert torch.equal(grouped(logits, [3, 1]), logits[:, [3, 1]])
    assert torch.equal(grouped(logits, [1, 0], axis=-1), logits.flip(-1))


def test_labels_get_the_number_of_their_group():
    y = torch.tensor([0, 1, 2, 3, 4, -100])
    assert grouped_labels(y, [[3, 0], 2], 5, -100).tolist() == [0, -100, 1, 0, -100, -100]
    # group 0 is not class 0
    assert grouped_labels(y, [[3, 0], 2], 5, 0).tolist() == [-100, -100, 1, 0, -100, -100]


@pytest.mark.parametrize('ignored', [0, 1, 3, 4])
@pytest.mark.parametrize('groups', [[[1, 2], [0, 3]], [3, 4], [4, [1, 0], 2]])
def test_an_ignored_class_is_not_taken_for_the_group_with_its_number(ignored, groups):
    sets = [o if isinstance(o, list) else [o] for o in groups]
    teacher, y = nn.Linear(6, len(groups)), Y.clone()
    counts = [v != ignored and any(v in o for o in sets) for v in y.tolist()]
    own = torch.stack([FIVE(X)[:, o].logsumexp(1) for o in sets], 1)[counts]
    q, p = own.log_softmax(1), teacher(X)[counts].log_softmax(1)
    r = distilled(Teacher(teacher, classes=groups), kd(T=1, alpha=0.5), ignore_index=ignored, y=y)
    torch.testing.assert_close(
        r.parts['kd'], F.kl_div(q, p, log_target=True, reduction='batchmean')
    )
    torch.testing.assert_close(r.task, F.cross_entropy(FIVE(X), y, ignore_index=ignored))


def test_the_check_counts_no_ignored_class():
    "A teacher of two groups that is always right, although class 0 is ignored"
    x = F.one_hot(Y, 5).float() * 9
    net = nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 1, 1, 0, 0], [0.0, 0, 0, 1, 1]]))
    distiller = Distiller(
        nn.Linear(5, 5), Teacher(net, classes=[[0, 1, 2], [3, 4]]), kd(), ignore_index=0
    )
    facts = distiller.check([(x, Y)] * 8).facts
    assert facts.teacher_score == 1
    assert facts.n == 8 * int((Y != 0).sum())


@pytest.mark.parametrize(
    'groups,says',
    [
        ([[0, 1], 1], r'two outputs have the class 1. Sum these outputs first'),
        ([[0], []], 'each output needs at least one class'),
        (['cat', 0], "has 'cat', but the classes are dog"),
    ],
)
def test_groups_that_mean_nothing_are_refused(groups, says):
    with pytest.raises(DistillError, match=says):
        class_groups(groups, 'classes', ['dog'], disjoint=True)


# in a batch


def test_fine_classes_of_a_teacher_are_summed_for_a_coarse_student():
    r = distilled(Teacher(FIVE, select=[[0, 1], [2, 3, 4]]), kd(1.0, 1.0), y=Y % 2, student=TWO)
    want = np.mean(
        [kl_loop([p[0] + p[1], sum(p[2:])], q) for p, q in zip(probs(FIVE, X), probs(TWO, X))]
    )
    assert r.parts['kd'].item() == pytest.approx(want, rel=1e-4)


def test_a_coarse_teacher_teaches_through_sums_of_the_students_classes():
    r = distilled(Teacher(TWO, classes=[[0, 1], [2, 3, 4]]), kd(1.0, 0.6))
    want = np.mean(
        [kl_loop(p, [q[0] + q[1], sum(q[2:])]) for p, q in zip(probs(TWO, X), probs(FIVE, X))]
    )
    assert r.parts['kd'].item() == pytest.approx(want, rel=1e-4)
    torch.testing.assert_close(r.total, 0.4 * F.cross_entropy(FIVE(X), Y) + 0.6 * r.parts['kd'])


def test_a_coarse_teacher_leaves_the_classes_of_a_group_to_the_labels():
    "The gradient changes the sum of a group, and no proportions inside it: it is the same for all, by their share"
    logits = torch.randn(4, 5, generator=g).requires_grad_()
    d = Distiller(None, None, kd(1.0, 1.0))
    d.compute(
        Outputs(logits),
        Outputs(torch.randn(4, 2, generator=g), classes=[[0, 1], [2, 3, 4]]),
        targets=(),
    ).total.backward()
    p = logits.detach().softmax(1)
    for group in ([0, 1], [2, 3, 4]):
        each = logits.grad[:, group] / p[:, group]
        torch.testing.assert_close(each, each[:, :1].expand_as(each))


def test_the_coarse_teachers_own_prediction_is_the_minimum_at_any_temperature():
    coarse = torch.tensor([[0.7, 0.3]])
    fine = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log()
    for T in (1.0, 4.0):
        v = (
            Distiller(None, None, kd(T, 1.0))
            .compute(Outputs(fine), Outputs(coarse.log(), classes=[[0, 1], [2, 3, 4]]))
            .total
        )
        assert v.item() == pytest.approx(0, abs=1e-6)


def test_known_classes_are_compared_among_themselves_on_samples_that_have_them():
    known, r = [4, 0, 2], distilled(Teacher(THREE, classes=[4, 0, 2]), kd(1.0, 0.5))
    among = lambda q: [q[c] / sum(q[i] for i in known) for c in known]
    rows = [
        kl_loop(p, among(q))
        for p, q, y in zip(probs(THREE, X), probs(FIVE, X), Y.tolist())
        if y in known
    ]
    assert len(rows) == 7 and r.parts['kd'].item() == pytest.approx(np.mean(rows), rel=1e-4)
    torch.testing.assert_close(r.task, F.cross_entropy(FIVE(X), Y))


def test_only_the_labels_teach_the_classes_that_the_teacher_does_not_know():
    logits = torch.randn(12, 5, generator=g).requires_grad_()
    Distiller(None, None, kd(2.0, 1.0)).compute(
        Outputs(logits), Outputs(torch.randn(12, 3, generator=g), classes=[4, 0, 2]), None, (Y,)
    ).total.backward()
    assert (
        not logits.grad[:, [1, 3]].any()
        and not logits.grad[(Y == 1) | (Y == 3)].any()
        and logits.grad[Y == 0][:, 0].all()
    )


def test_without_labels_every_sample_counts():
    t = torch.randn(12, 3, generator=g)
    v = (
        Distiller(None, None, kd(1.0, 1.0))
        .compute(Outputs(FIVE(X)), Outputs(t, classes=[4, 0, 2]))
        .total
    )
    torch.testing.assert_close(
        v, F.kl_div(FIVE(X)[:, [4, 0, 2]].log_softmax(1), t.softmax(1), reduction='batchmean')
    )


def test_overlapping_classes_are_selected_and_placed():
    r = distilled(Teacher(THREE, select=[2, 0], classes=[1, 3]), Recipe(Term(losses.kl, T=1.0)))
    s, t = FIVE(X)[:, [1, 3]], THREE(X)[:, [2, 0]]
    on = (Y == 1) | (Y == 3)
    torch.testing.assert_close(
        r.parts['kl'],
        F.kl_div(s[on].log_softmax(1), t[on].softmax(1), reduction='batchmean').detach(),
    )


def test_losses_that_read_labels_get_the_number_of_the_group():
    r = distilled(Teacher(TWO, classes=[[3, 4], [0, 1]]), Recipe(Term(losses.dkd)))
    y = torch.tensor([{3: 0, 4: 0, 0: 1, 1: 1}.get(v, -100) for v in Y.tolist()])
    s, t = grouped(FIVE(X), [[3, 4], [0, 1]]), TWO(X)
    torch.testing.assert_close(r.parts['dkd'], losses.dkd(s[y >= 0], t[y >= 0], y[y >= 0]).detach())


def test_labels_each_by_itself():
    y = (torch.rand(12, 5, generator=g) > 0.5).float()
    r = distilled(Teacher(TWO, classes=[3, 1], kind='sigmoid'), kd(1.0, 0.5), y=y, kind='sigmoid')
    torch.testing.assert_close(
        r.parts['kd'], losses.binary_kl(FIVE(X)[:, [3, 1]], TWO(X), T=1.0).detach()
    )
    with pytest.raises(
        DistillError,
        match=r'classes=\[3, \[1, 2\]\] sums the probabilities of mutually exclusive classes',
    ):
        distilled(
            Teacher(TWO, classes=[3, [1, 2]], kind='sigmoid'), kd(1.0, 0.5), y=y, kind='sigmoid'
        )


def test_pixels_are_masked_by_their_labels():
    s, t, y = (
        torch.randn(2, 5, 3, 3, generator=g),
        torch.randn(2, 2, 3, 3, generator=g),
        torch.randint(5, (2, 3, 3), generator=g),
    )
    v = (
        Distiller(None, None, Recipe(Term(losses.kl, T=1.0), task=0.0))
        .compute(Outputs(s), Outputs(t, classes=[[0, 1], 4]), None, (y,))
        .total
    )
    on = ((y < 2) | (y == 4)).flatten()
    flat = lambda o: o.movedim(1, -1).reshape(18, -1)[on]
    torch.testing.assert_close(
        v,
        F.kl_div(
            flat(grouped(s, [[0, 1], 4])).log_softmax(1), flat(t).softmax(1), reduction='batchmean'
        ),
    )


@pytest.mark.parametrize('tail', ['uniform', 'bucket'])
def test_stored_likeliest_classes_work_too(tail):
    t = torch.randn(12, 4, generator=g).log_softmax(1)
    v, ids = t.topk(2)
    groups = [0, [1, 2], 3, 4]
    stored = TopK(ids, v, 4, tail)
    s = grouped(FIVE(X), groups)
    got = (
        Distiller(None, None, kd(1.0, 1.0))
        .compute(Outputs(FIVE(X)), Outputs(stored, classes=groups))
        .total
    )
    torch.testing.assert_close(got, losses.kl(s, stored.dense(s), T=1.0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        DistillError,
        match=r'classes=\[0, 1\] is for 2 outputs, but the teacher returns 3 along axis 1',
    ):
        distilled(Teacher(THREE, classes=[0, 1]), kd())
    with pytest.raises(
        DistillError, match=r'classes=\[0, 1, 5\]: the student has 5 classes along axis 1, 0 to 4'
    ):
        distilled(Teacher(THREE, classes=[0, 1, 5]), kd())
    with pytest.raises(
        DistillError, match="has the name 'cat', but the student's classes have no names here"
    ):
        distilled(Teacher(TWO, classes=['cat', 'dog']), kd())
    with pytest.raises(DistillError, match='two outputs have the class 0'):
        Teacher(TWO, classes=[0, [0, 1]])
    with pytest.raises(DistillError, match='members of the ensemble predict different classes'):
        distilled(Teacher([Teacher(TWO, classes=[0, 1]), Teacher(TWO, classes=[0, 2])]), kd())


# in fastai


def teacher_and_student(of, to=('red', 'green', 'blue')):
    "A teacher of other classes than the student's, in two Learners"
    return apps.image(to)[0], apps.image(of)[1]


def test_the_classes_that_both_have_are_distilled_when_asked_for():
    student, teacher = teacher_and_student(('blue', 'yellow', 'red'), ('red', 'green', 'blue'))
    with pytest.raises(
        DistillError,
        match=r"does not have 1 of the student's classes \(green\).*Teacher\(model, select=\[2, 0\], classes=\[0, 2\]\)",
    ):
        student.distill(teacher, 1, 1e-3)
    found = student.check_teacher(
        Teacher(teacher.model, select=[2, 0], classes=[0, 2])
    )  # what the message says
    assert not found.errors and found.facts.n == 20  # of 32 validation items
    student.distill(
        Teacher(teacher.model, select=[2, 0], classes=[0, 2]), 1, 1e-3, kd(1.0, 0.5), check=False
    )


def test_names_of_a_coarse_teacher_are_found_in_the_vocab():
    student, teacher = apps.image()[0], apps.toy()[1]
    t = teacher_of(
        Teacher(teacher, classes=dict(warm=['red', 'green'], cold='blue')), student, Task('softmax')
    )
    assert t.classes == [[0, 1], 2] and vocab_of(student.dls) == ['red', 'green', 'blue']
    with pytest.raises(
        DistillError, match="classes= has 'pink', but the classes are red, green, blue"
    ):
        teacher_of(Teacher(teacher, classes=['red', 'pink']), student, Task('softmax'))


def test_a_cache_keeps_which_classes_it_is_about(tmp_path):
    torch.manual_seed(0)
    coarse = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), classes=[[2, 0], 1])
    cache = cache_teacher(
        coarse, apps.image()[0].dls, tmp_path / 'targets', store=dict(dtype='float32'), check=False
    )
    assert cache.outputs(np.arange(3)).classes == [[2, 0], 1]
    values = []
    for teacher in (coarse, cache):
        apps.set_seed(0)
        student = apps.image()[0]
        student.fit(1, 0.1, cbs=KnowledgeDistillation(teacher, kd(2.0, 0.7), check=False))
        values.append(torch.cat([p.flatten() for p in student.model.parameters()]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


# one of several teachers for each batch


def test_one_member_is_drawn_for_each_batch_by_its_weight():
    nets, calls = [nn.Linear(6, 5) for _ in range(3)], []
    t = Teacher(
        [lambda x, i=i: (calls.append(i), nets[i](x))[1] for i in range(3)],
        ensemble=dict(combine='sample', weights=[1, 2, 1]),
    )
    torch.manual_seed(3)
    with t:
        for _ in range(400):
            out = t(X).logits
            torch.testing.assert_close(out, nets[calls[-1]](X).detach())
    assert len(calls) == 400 and np.abs(np.bincount(calls) / 400 - [0.25, 0.5, 0.25]).max() < 0.08


def test_the_same_seed_draws_the_same_members():
    def drawn(seed):
        calls = []
        t = Teacher(
            [lambda x, i=i: (calls.append(i), x[:, :5])[1] for i in range(3)],
            ensemble=dict(combine='sample'),
        )
        torch.manual_seed(seed)
        with t:
            [t(X) for _ in range(20)]
        return calls

    assert drawn(1) == drawn(1) != drawn(2) and len(drawn(1)) == 20


def test_the_mean_gradient_is_that_of_the_mean_probabilities():
    p, q = [torch.randn(1, 5, generator=g) for _ in range(2)]
    s = torch.randn(1, 5, generator=g).requires_grad_()
    grad = lambda t: torch.autograd.grad(losses.kl(s, t, T=1.0), s)[0]
    mixed = Teacher([lambda x: p, lambda x: q])(X).logits
    torch.testing.assert_close((grad(p) + grad(q)) / 2, grad(mixed))


def test_the_draw_is_the_teachers_own():
    t = Teacher([nn.Linear(6, 5), nn.Linear(6, 5)], ensemble=dict(combine='sample'))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    t(X)
    assert torch.equal(before, torch.get_rng_state())


def test_a_drawn_member_has_no_layers_and_no_cache(tmp_path):
    with pytest.raises(
        DistillError, match="combine='sample' runs only one member, so layers can't be compared"
    ):
        Teacher([TWO, TWO], ensemble=dict(combine='sample'), layers=['0.weight'])(X)
    student, teacher = apps.toy()
    with pytest.raises(
        DistillError,
        match="combine='sample' draws a teacher for each batch, but a cache has one output",
    ):
        cache_teacher(
            Teacher([teacher, teacher], ensemble=dict(combine='sample')),
            student.dls,
            tmp_path / 'c',
            kind='softmax',
            check=False,
            keys=list(range(64)),
        )
    student.distill(Teacher([teacher, teacher], ensemble=dict(combine='sample')), 1, 1e-3)


def test_the_default_recipe_fits_the_classes_that_are_compared():
    "dist needs three, whatever the student has"
    for groups, net in (([[0, 1], [2, 3, 4]], TWO), ([3, 1], TWO), ([[0, 1], 2, [3, 4]], THREE)):
        distiller = Distiller(copy.deepcopy(FIVE), Teacher(net, classes=groups))
        distiller(X, Y)
        assert [t.name for t in distiller.recipe.terms] == ['kd' if net is TWO else 'dist']
