"The recipe that is taken when none is given."

import copy, json, math
import pytest
import scipy.optimize, scipy.stats
import torch
from torch import nn
import torch.nn.functional as F
from fastai.basics import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    Learner,
    set_seed,
)
from fastdistill import (
    DistillError,
    DistillWarning,
    Distiller,
    Outputs,
    Recipe,
    Term,
    auto,
    dist,
    kd,
    losses,
    soft_labels,
)
from fastdistill.fastai import KnowledgeDistillation, cache_teacher
from fastdistill.fastai.default_recipe import example_of
from fastdistill.recipes.default import softening_temperature
from fastdistill.base.task import Task, facts_of_outputs

DIST = dist(T=4, beta=2, gamma=2, grad_ratio=3, fade=1)
RULE = [
    (dict(classes=77), Recipe(DIST), '77 classes'),
    (dict(classes=3), Recipe(DIST), '3 classes'),
    (dict(classes=2), kd(T=1, alpha=0.5), '2 classes'),
    (dict(), kd(T=1, alpha=0.5), 'unknown'),
    (dict(classes=11, dense=True), Recipe(DIST), '11 classes for each of many positions'),
    (dict(classes=2, dense=True), kd(T=1, alpha=0.5), '2 classes for each of many positions'),
    (dict(classes=60000, dense=True), Recipe(DIST), '60000 classes for each of many positions'),
    (dict(classes=60000), Recipe(DIST), '60000 classes'),
    (
        dict(kind='sigmoid'),
        Recipe(Term(losses.binary_kl, grad_ratio=3, fade=0.2, T=1)),
        'several labels',
    ),
    (
        dict(kind='sigmoid', classes=1),
        kd(T=1, alpha=0.5),
        'one label',
    ),  # the same task as two classes
    (
        dict(kind='sigmoid', classes=1, dense=True),
        kd(T=1, alpha=0.5),
        'one label for each of many positions',
    ),
    (dict(kind='sigmoid', dense=True), kd(T=1, alpha=0.5), 'labels for each of many positions'),
    (
        dict(kind='regression', dense=True),
        Recipe(Term(losses.regression, grad_ratio=3, fade=0.2)),
        'numbers',
    ),
    (dict(classes=77, labels=False), soft_labels(T=1), 'no labels'),
    (
        dict(classes=77, teacher=torch.arange(77.0) / 10),
        Recipe(dist(T=2.1, beta=2, gamma=2, grad_ratio=3, fade=1)),
        'T=2.1 softens',
    ),
    (
        dict(classes=77, teacher=torch.zeros(4, 77)),
        Recipe(dist(T=1, beta=2, gamma=2, grad_ratio=3, fade=1)),
        'T=1 softens',
    ),
    (
        dict(classes=77, teacher=1000 * torch.eye(77)),
        Recipe(dist(T=20, beta=2, gamma=2, grad_ratio=3, fade=1)),
        'T=20 softens',
    ),
    (dict(classes=2, doubt='a bad teacher'), kd(T=1, alpha=0.3), 'a bad teacher'),
    (dict(kind='sigmoid', classes=1, doubt='a bad teacher'), kd(T=1, alpha=0.1), 'a bad teacher'),
    (dict(classes=77, doubt='a bad teacher'), Recipe(DIST), '77 classes'),
]


@pytest.mark.parametrize('facts, recipe, why', RULE, ids=[str(i) for i in range(len(RULE))])
def test_the_rule(facts, recipe, why):
    chosen = auto(**facts)
    assert repr(chosen) == repr(recipe) and why in chosen.why
    names = dict(
        kd=kd,
        soft_labels=soft_labels,
        dist=dist,
        Term=Term,
        losses=losses,
        labels=None,
    )
    parts = chosen.text.removeprefix('labels + ')  # what it says is what one can type
    assert repr(Recipe(eval(parts, names))) == repr(recipe)
    classic = 'kd(T=4, alpha=.9)' if facts.get('labels', True) else 'soft_labels(T=4)'
    compared = '' if facts.get('kind') == 'regression' else f'; {classic} is the classic'
    assert str(chosen).endswith(f'({chosen.why}{compared})')


def entropy(logits, T):
    return scipy.stats.entropy(
        torch.softmax(logits.double() / T, -1).numpy(), axis=-1
    ).mean() / math.log(logits.shape[-1])


@pytest.mark.parametrize('c', [3, 10, 100])
def test_a_teacher_is_softened_until_its_entropy_is_nine_tenths_of_the_largest(c):
    logits = 8 * torch.randn(5, 20, c, generator=torch.Generator().manual_seed(c))
    T = softening_temperature(logits)
    assert T == pytest.approx(
        scipy.optimize.brentq(lambda T: entropy(logits.reshape(-1, c), T) - 0.9, 0.5, 50), rel=1e-3
    )
    assert softening_temperature(logits / 2) == pytest.approx(
        T / 2, rel=1e-3
    )  # how large a teacher's logits are tells nothing


@pytest.mark.parametrize('ignored', [255, 1])
def test_pixels_that_the_loss_ignores_do_not_count_for_the_temperature(ignored, capsys):
    "In a plain loop, from outputs that are already computed as other trainers do, and in fastai"
    rng = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(12, 4, 6, 5, generator=rng)
    y = torch.randint(4, (12, 6, 5), generator=rng)
    y[:, :4][y[:, :4] < 3] = ignored
    x = torch.where((y == ignored)[:, None], 9 * x, x)  # the teacher is sure where nobody asks
    conv = lambda: nn.Conv2d(4, 4, 1)
    counted = x.movedim(1, -1)[y != ignored]
    T = softening_temperature(counted)
    assert softening_temperature(x.movedim(1, -1)) > 1.3 * T
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    distiller = Distiller(conv(), nn.Identity(), task_loss=loss, check=False)
    distiller(x, y)
    assert f'dist(T={T:.2g}, ' in capsys.readouterr().out
    distiller = Distiller(conv(), nn.Identity(), task_loss=loss, check=False)
    logits = distiller.student(x)
    distiller.compute(Outputs(logits), Outputs(x), loss(logits, y), [y])
    assert f'dist(T={T:.2g}, ' in capsys.readouterr().out
    items = [*zip(x, y)]
    dls = DataLoaders(*(DataLoader(items, bs=12, num_workers=0) for _ in range(2)))
    learn = Learner(dls, conv(), loss_func=CrossEntropyLossFlat(axis=1, ignore_index=ignored))
    with learn.no_bar():
        learn.fit(1, cbs=KnowledgeDistillation(nn.Identity(), check=False))
    assert f'dist(T={T:.2g}, ' in capsys.readouterr().out


def test_a_large_vocabulary_is_looked_at_in_few_rows(monkeypatch):
    logits = 8 * torch.randn(500, 30_000, generator=torch.Generator().manual_seed(0))
    T, sizes, softmax = softening_temperature(logits[:100]), [], torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, 'softmax', lambda x, *args: sizes.append(x.numel()) or softmax(x, *args)
    )
    assert softening_temperature(logits) == pytest.approx(T, rel=0.01) and max(sizes) < 2**23


def test_classes_without_probability_do_not_disturb_the_temperature():
    logits = torch.where(
        torch.arange(5) == 4,
        -torch.inf,
        torch.randn(20, 5, generator=torch.Generator().manual_seed(0)),
    )
    assert math.isfinite(softening_temperature(logits))


def test_auto_refuses_other_kinds():
    with pytest.raises(
        DistillError, match="kind='soft': must be one of 'softmax', 'sigmoid', 'regression'"
    ):
        auto('soft')
    with pytest.raises(DistillError, match="teacher=Linear: must be the teacher's logits"):
        auto(classes=5, teacher=nn.Linear(2, 5))


@pytest.mark.parametrize(
    'shape, task, facts',
    [
        ((8, 5), Task('softmax'), ('softmax', 5, False)),
        ((8, 12, 30, 40), Task('softmax'), ('softmax', 12, True)),
        ((8, 12, 1, 1), Task('softmax'), ('softmax', 12, False)),
        ((8, 72, 1000), Task('softmax', -1), ('softmax', 1000, True)),
        ((8, 5), Task('softmax', 7), ('softmax', None, False)),
        ((8, 20), Task('sigmoid'), ('sigmoid', None, False)),
        ((8,), Task('sigmoid'), ('sigmoid', 1, False)),
        ((8, 1), Task('sigmoid'), ('sigmoid', 1, False)),
        ((8, 1, 30, 40), Task('sigmoid'), ('sigmoid', 1, True)),
        ((8, 3, 30, 40), Task('sigmoid'), ('sigmoid', None, True)),
    ],
)
def test_facts_are_read_off_the_outputs(shape, task, facts):
    assert tuple(facts_of_outputs(shape, task).values()) == facts


def nets(c, width=16):
    set_seed(0)
    return [nn.Sequential(nn.Linear(6, w), nn.ReLU(), nn.Linear(w, c)) for w in (4, width)]


def data(c, n=64):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return list(zip(x, (x[:, :c].argmax(1) if c > 2 else (x[:, 0] > 0).long())))


def learners(c, labels=True, epochs=30):
    set_seed(2)
    items = data(c)
    dls = [
        DataLoader(
            items if labels else [x for x, _ in items],
            bs=16,
            shuffle=i == 0,
            **({} if labels else dict(create_batch=lambda b: (torch.stack(b),))),
        )
        for i in range(2)
    ]
    student, teacher = (
        Learner(DataLoaders(*dls), m, loss_func=CrossEntropyLossFlat()) for m in nets(c)
    )
    if labels:
        with teacher.no_bar(), teacher.no_logging():
            teacher.fit(epochs, 0.01)
    return student, teacher


def first_logits(student, teacher):
    "The teacher's for the batch that the choice is made by"
    set_seed(3)
    out = teacher.model.eval()(*example_of(student).x)
    set_seed(3)
    return out


@pytest.mark.parametrize('c, name', [(5, 'dist'), (2, 'kd')])
def test_the_callback_chooses_and_says_so(c, name, capsys):
    student, teacher = learners(c)
    student.logger = print
    logits = first_logits(student, teacher)
    with student.no_bar():
        cb = student.distill(teacher, 1, 0.01)
    out = capsys.readouterr().out
    assert f'fastdistill: recipe {cb.recipe}' in out and f'{c} classes' in out
    assert (
        repr(cb.recipe) == repr(auto(classes=c, teacher=logits))
        and student.recorder.metric_names[-2] == f'{name}_loss'
    )


@pytest.mark.parametrize('c', [2, 5])
def test_the_choice_trains_as_the_same_recipe_given_by_hand(c):
    ends = []
    for given in (False, True):
        student, teacher = learners(c)
        logits = first_logits(student, teacher)
        recipe = auto(classes=c, teacher=logits) if given else None
        with student.no_bar(), student.no_logging():
            student.fit(2, 0.01, cbs=KnowledgeDistillation(teacher, recipe))
        ends.append(torch.cat([p.detach().flatten() for p in student.model.parameters()]))
    assert torch.equal(*ends)


def test_T_or_alpha_alone_mean_kd(capsys):
    _, teacher = learners(5)
    for given, recipe in (
        (dict(T=2), kd(T=2)),
        (dict(alpha=0.5), kd(alpha=0.5)),
    ):
        assert repr(KnowledgeDistillation(teacher, **given).recipe) == repr(recipe)
    assert (
        KnowledgeDistillation(teacher).recipe
        is KnowledgeDistillation(teacher, 'auto').recipe
        is None
    )
    with pytest.raises(DistillError, match=r"recipe='kd': write kd\(\), with parentheses"):
        KnowledgeDistillation(teacher, 'kd')
    with pytest.raises(
        DistillError, match='A recipe and T= cannot be combined: set the options in the recipe'
    ):
        KnowledgeDistillation(teacher, 'auto', T=2)


def test_a_teacher_that_scores_low_gets_a_small_part():
    student, _ = learners(5)
    bad = nets(5)[1]
    with torch.no_grad():
        bad[2].bias[3] = 100.0  # it predicts one class
    with (
        student.no_bar(),
        student.no_logging(),
        pytest.warns(DistillWarning, match='no better than chance'),
    ):
        cb = student.distill(bad, 1, 0.01)
    assert [t.name for t in cb.recipe.terms] == ['dist']
    assert cb.distiller.faded['dist'] < 0.1


@pytest.mark.parametrize('scale, small', [(1.0, False), (0.15, True)])
def test_a_teacher_that_is_right_far_more_often_than_it_is_sure_gets_a_small_part(
    scale, small, capsys
):
    student, teacher = learners(2)
    student.logger = print
    with student.no_bar():
        cb = student.distill(lambda x: scale * teacher.model(x), 1, 0.01)
    assert (repr(cb.recipe) == repr(kd(T=1, alpha=0.3))) is small
    assert ('It seems to be undertrained' in capsys.readouterr().out) is small


@pytest.mark.filterwarnings(
    'ignore:numpy.core is deprecated'
)  # fastai's lr_find, as it loads the model again
def test_a_choice_may_change_between_lr_find_and_a_fit():
    student, _ = learners(2)
    bad = nets(2)[1]
    with torch.no_grad():
        bad[2].bias[1] = 100.0
    cb = KnowledgeDistillation(bad)
    with student.no_bar(), student.no_logging(), student.added_cbs(cb):
        student.lr_find(
            num_it=3, show_plot=False, suggest_funcs=None
        )  # it does not check the teacher
        assert repr(cb.recipe) == repr(kd(T=1, alpha=0.5))
        with pytest.warns(DistillWarning, match='no better than chance'):
            student.fit(1, 0.01)
    assert repr(cb.recipe) == repr(kd(T=1, alpha=0.3)) and [*cb.distiller.links] == ['kd']


@pytest.mark.parametrize('scale, small', [(1.0, False), (0.15, True)])
def test_a_doubt_is_stored_with_the_outputs(scale, small, tmp_path):
    student, teacher = learners(2)
    with torch.no_grad():
        for p in teacher.model[2].parameters():
            p *= scale
    with pytest.raises(
        DistillError, match='DataLoader is not a fastai DataLoader whose batches can be replayed'
    ):
        cache_teacher(teacher.model, student.dls, tmp_path / 'c', kind='softmax', check=False)
    student.dls = DataLoaders.from_dsets(data(2), data(2), bs=16, num_workers=0)
    cache = cache_teacher(
        teacher.model, student.dls, tmp_path / 'c', kind='softmax', progress=False
    )
    with student.no_bar(), student.no_logging():
        cb = student.distill(cache, 1, 0.01)
    assert (repr(cb.recipe) == repr(kd(T=1, alpha=0.3))) is small
    assert ('when its outputs were stored: The teacher is right for' in cb.recipe.why) is small
    assert ('doubt' in json.loads((tmp_path / 'c' / 'manifest.json').read_text())) is small
    again = cache_teacher(
        teacher.model, student.dls, tmp_path / 'c', kind='softmax', check=False, progress=False
    )
    assert ('undertrained' in again.manifest.doubt) is small


def test_a_single_label_is_a_task_of_two_classes():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    items = list(zip(x, (x[:, :1] > 0).float()))
    dls = DataLoaders.from_dsets(items, items, bs=16, num_workers=0)
    student, teacher = (Learner(dls, m, loss_func=BCEWithLogitsLossFlat()) for m in nets(1))
    with student.no_bar(), student.no_logging():
        cb = student.distill(teacher, 1, 0.01, check=False)
    assert repr(cb.recipe) == repr(kd(T=1, alpha=0.5)) and cb.recipe.why == 'one label'


def test_a_better_student_does_not_listen_to_its_teacher():
    _, student = learners(5)
    worse = copy.deepcopy(student.model)
    with torch.no_grad():
        worse[2].bias[:3] = -100.0  # it never predicts three of the five classes
    with (
        student.no_bar(),
        student.no_logging(),
        pytest.warns(DistillWarning, match='worse than the student'),
    ):
        cb = student.distill(worse, 1, 0.01)
    assert cb.distiller.faded['dist'] < 0.2


def test_a_fit_says_once_that_the_teacher_adds_little(capsys):
    student, good = learners(5)
    student.logger = print
    bad = nets(5)[1]
    with torch.no_grad():
        bad[2].bias[3] = 100.0
    for teacher, times in ((bad, 1), (good, 0)):
        with student.no_bar():
            student.distill(teacher, 2, 0.01, check=False)
        printed = capsys.readouterr().out
        assert printed.count('the gradient ratio of dist was reduced to') == times


def test_without_labels_the_teacher_alone_teaches():
    student, _ = learners(5, labels=False)
    with student.no_bar(), student.no_logging():
        cb = student.distill(nets(5)[1], 1, 0.01, check=False)
    assert repr(cb.recipe) == repr(soft_labels(T=1))


def test_another_student_gets_a_choice_of_its_own():
    many, teacher = learners(5)
    two, other = learners(2)
    teachers = [teacher]
    cb = KnowledgeDistillation(lambda x: teachers[-1].model(x))
    with many.no_bar(), many.no_logging():
        many.fit(1, 0.01, cbs=cb)
    assert [t.name for t in cb.recipe.terms] == ['dist']
    teachers.append(other)
    with two.no_bar(), two.no_logging():
        two.fit(1, 0.01, cbs=cb)
    assert [t.name for t in cb.recipe.terms] == ['kd']


def test_a_plain_distiller_chooses_at_its_first_batch(capsys):
    (student, teacher), items = nets(5), data(5)
    x, y = torch.stack([a for a, _ in items]), torch.stack([b for _, b in items])
    d = Distiller(student, teacher)
    loss = d(x, y)
    chosen = auto(classes=5, teacher=teacher(x))
    assert repr(d.recipe) == repr(chosen) and '5 classes' in capsys.readouterr().out
    by_hand = Distiller(student, teacher, chosen)(x, y)
    torch.testing.assert_close(loss.total, by_hand.total)
    assert loss.parts.keys() == {'dist'} and not capsys.readouterr().out
    d(x, y).total.backward()
    assert all(p.grad is not None for p in d.parameters())


def test_a_plain_distiller_without_labels_takes_the_teacher_alone(capsys):
    student, teacher = nets(5)
    x = torch.randn(8, 6)
    d = Distiller(student, teacher)
    torch.testing.assert_close(
        d(x).total,
        F.kl_div(student(x).log_softmax(1), teacher(x).softmax(1), reduction='batchmean'),
    )
    assert 'no labels' in capsys.readouterr().out


def test_the_share_is_the_length_of_the_gradient():
    (student, teacher), items = nets(5), data(5)
    x, y = torch.stack([a for a, _ in items]), torch.stack([b for _, b in items])
    s = student(x).detach().requires_grad_()
    of = lambda v: torch.autograd.grad(v, s, retain_graph=True)[0].norm()
    d = Distiller(student, teacher, dist(T=4.0, beta=2, gamma=2, grad_ratio=3))
    r = d(x, y)
    t = teacher(x).detach()
    term = losses.dist(s, t, T=4, beta=2, gamma=2)
    torch.testing.assert_close(
        r.weights['dist'] * of(term),
        3 * of(r.weights['task'] * F.cross_entropy(s, y)),
        rtol=1e-4,
        atol=0,
    )


def test_with_a_ratio_the_gradient_is_as_long_as_that_of_the_task_loss_at_most():
    (student, teacher), items = nets(5), data(5)
    x, y = torch.stack([a for a, _ in items]), torch.stack([b for _, b in items])
    s = student(x).detach().requires_grad_()
    d = Distiller(student, teacher, dist(T=4.0, beta=2, gamma=2, grad_ratio=3))
    r = d(x, y)
    own = torch.autograd.grad(F.cross_entropy(s, y), s)[0]
    term = torch.autograd.grad(losses.dist(s, teacher(x).detach(), T=4, beta=2, gamma=2), s)[0]
    # three parts of the term's direction, one part of that of the labels
    expected = own.norm() * (own / own.norm() + 3 * term / term.norm()) / 4
    found = r.weights['task'] * own + r.weights['dist'] * term
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert r.total.item() == pytest.approx(
        (r.weights['task'] * r.task + r.weights['dist'] * r.parts['dist']).item()
    )


@pytest.mark.parametrize('at', [40, 41, 64])
def test_one_wrong_label_does_not_change_the_weight_of_the_batches_after_it(at):
    "At 40 and 64 the norms are measured, at 41 they are not"
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    weights = {}
    for wrong in (0.0, 1000.0):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
        d = Distiller(student, teacher, Term(losses.regression, grad_ratio=3), kind='regression')
        weights[wrong] = []
        for i in range(1, 81):
            x = torch.randn(32, 8)
            y = teacher(x).detach() + 0.1 * torch.randn(32, 1)
            y[0] += wrong if i == at else 0.0
            weights[wrong].append(float(d(x, y).weights['regression']))
    later = [torch.tensor(w[at:]) for w in weights.values()]
    assert (later[1] / later[0]).max() < 2
