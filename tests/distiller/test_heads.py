"Several heads, each with its own teacher."

import copy, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastdistill import (
    DistillError,
    DistillWarning,
    Distiller,
    Outputs,
    Recipe,
    Teacher,
    Term,
    kd,
    losses,
    recipes,
    soft_labels,
    with_items,
)
from fastdistill.recipes.default import Automatic

g = torch.Generator().manual_seed(0)
X, COLOR, SHAPE, SIZE = (
    torch.randn(8, 6, generator=g),
    torch.randint(3, (8,), generator=g),
    torch.randint(2, (8,), generator=g),
    torch.randn(8, 1, generator=g),
)


class Net(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.body, self.color, self.shape, self.size = (
            nn.Linear(6, h),
            nn.Linear(h, 3),
            nn.Linear(h, 2),
            nn.Linear(h, 1),
        )
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.body(x).relu()
        return dict(color=self.color(h), shape=self.shape(h), size=self.size(h))


def nets():
    torch.manual_seed(0)
    return (
        Net(4),
        nn.Linear(6, 3),
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        Net(16),
    )


def two_heads(student, color, shape, recipe=None, **options):
    return Distiller(student, dict(color=color, shape=shape), recipe, **options)


def test_the_loss_is_the_sum_of_the_heads_and_the_student_runs_once():
    student, color, shape, size = nets()
    heads = Distiller(
        student,
        dict(
            color=color, shape=Teacher(shape), size=Teacher(size, output='size', kind='regression')
        ),
        dict(color=kd(2.0, 0.7), shape=kd(1.0, 0.4), size=kd(alpha=0.3)),
        kind=dict(size='regression'),
        weights=dict(shape=0.5),
    )
    out = heads(X, COLOR, SHAPE, SIZE)
    assert student.calls == 1
    s = student(X)
    want = (
        0.3 * F.cross_entropy(s['color'], COLOR)
        + 0.7 * losses.kl(s['color'], color(X), T=2.0)
        + 0.5
        * (0.6 * F.cross_entropy(s['shape'], SHAPE) + 0.4 * losses.kl(s['shape'], shape(X), T=1.0))
        + 0.7 * F.mse_loss(s['size'], SIZE)
        + 0.3 * losses.regression(s['size'], size(X)['size'])
    )
    torch.testing.assert_close(out.total, want)
    assert list(out.parts) == [
        'color.task',
        'color.kd',
        'shape.task',
        'shape.kd',
        'size.task',
        'size.kd',
    ]
    torch.testing.assert_close(out.parts['shape.task'], F.cross_entropy(s['shape'], SHAPE).detach())
    assert out.weights['shape.kd'] == 0.2
    assert out.weights['size.task'] == 0.7


def test_a_student_that_returns_a_tuple_has_its_heads_in_the_order_of_the_teachers():
    student, color, shape, _ = nets()

    class AsTuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = student

        def forward(self, x):
            out = self.net(x)
            return out['color'], out['shape']

    teachers = Teacher(color), Teacher(shape)
    of_dict = two_heads(student, *teachers, kd(), output=dict(color='color', shape='shape'))
    of_tuple = two_heads(AsTuple(), color, shape, kd())
    torch.testing.assert_close(of_tuple(X, COLOR, SHAPE).total, of_dict(X, COLOR, SHAPE).total)


FORMS = dict(
    dict=lambda o: o,
    tuple=lambda o: (o['color'], o['shape']),
    list=lambda o: [o['color'], o['shape']],
    arrays=lambda o: [o['color'].numpy(), o['shape'].numpy()],
)


@pytest.mark.parametrize('as_teacher', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_each_head_takes_its_output_of_its_own_teacher(form, as_teacher):
    "also if no model teaches several heads"
    student, *_ = nets()
    models = dict(color=Net(5), shape=Net(7))
    given = {k: lambda x, m=m: FORMS[form](m(x)) for k, m in models.items()}
    if as_teacher:
        given = {k: Teacher(fn) for k, fn in given.items()}
    out = Distiller(student, given, kd(T=1.0, alpha=0.5))(X, COLOR, SHAPE)
    s, t = student(X), {k: m(X)[k].detach() for k, m in models.items()}
    for k in models:
        torch.testing.assert_close(out.parts[f'{k}.kd'], losses.kl(s[k], t[k], T=1.0).detach())
    outputs = Distiller(student, dict(given, shape=None), kd()).teacher_outputs(X)
    torch.testing.assert_close(outputs['color'].logits, t['color'])


def test_teachers_with_one_output_are_read_as_without_heads():
    student, color, shape, _ = nets()
    few, y = X[:2], (COLOR[:2], SHAPE[:2])  # a list of 2 rows is not 2 outputs
    wanted = two_heads(student, color, shape, kd())(few, *y).total
    for form in (lambda o: o.tolist(), lambda o: (o, [o], None), lambda o: dict(logits=o)):
        given = {k: lambda x, m=m: form(m(x)) for k, m in dict(color=color, shape=shape).items()}
        got = Distiller(student, given, kd())(few, *y).total
        torch.testing.assert_close(got, wanted)


def test_a_teacher_with_more_outputs_than_heads_is_doubted():
    student, color, shape, _ = nets()
    several = lambda x: (color(x), shape(x), shape(x))
    with pytest.warns(DistillWarning, match='returns several tensors .* The first is used'):
        two_heads(student, several, None, dict(color=kd()))(X, COLOR, SHAPE)


def test_a_head_without_a_teacher_has_its_task_loss():
    student, color, _, _ = nets()
    out = two_heads(student, color, None, dict(color=kd(2.0, 0.7)))(X, COLOR, SHAPE)
    s = student(X)
    torch.testing.assert_close(
        out.total,
        0.3 * F.cross_entropy(s['color'], COLOR)
        + 0.7 * losses.kl(s['color'], color(X), T=2.0)
        + F.cross_entropy(s['shape'], SHAPE),
    )


def test_labels_of_a_head_may_be_computed_from_those_of_the_batch():
    student, color, shape, _ = nets()
    labels = dict(color=lambda y: (y[0][:, 0],), shape=lambda y: (y[0][:, 1],))
    both = torch.stack([COLOR, SHAPE], 1)
    apart = two_heads(student, color, shape, kd())
    together = two_heads(student, color, shape, kd(), labels=labels)
    torch.testing.assert_close(together(X, both).total, apart(X, COLOR, SHAPE).total)


@pytest.mark.parametrize(
    'make',
    [
        lambda net: (net, net),
        lambda net: (Teacher(net, output='color'), Teacher(net, output='shape')),
        lambda net: (t := Teacher(net), t),
    ],
    ids=['a module', 'two teachers', 'one teacher'],
)
def test_a_teacher_of_several_heads_runs_once_per_batch(make):
    student, _, _, teacher = nets()
    heads = two_heads(student, *make(teacher), kd(2.0, 0.7))
    out = heads(X, COLOR, SHAPE)
    assert teacher.calls == 1
    s, t = student(X), teacher(X)
    torch.testing.assert_close(
        out.parts['color.kd'], losses.kl(s['color'], t['color'], T=2.0).detach()
    )
    torch.testing.assert_close(
        out.parts['shape.kd'], losses.kl(s['shape'], t['shape'], T=2.0).detach()
    )


def test_a_teacher_of_several_heads_reads_the_layers_of_all_in_one_run():
    student, _, _, teacher = nets()
    between = lambda k: Term(losses.mse, layers={'body': k}, match='shape', weight=0.01)
    recipes = dict(color=kd() + between('body'), shape=kd() + between('shape'))
    heads = two_heads(student, teacher, teacher, recipes, example=X)
    calls = teacher.calls
    out = heads(X, COLOR, SHAPE)
    assert teacher.calls == calls + 1
    link = heads.links['shape']['mse'][0]
    h = teacher.body(X).relu()
    torch.testing.assert_close(
        out.parts['shape.mse'],
        losses.mse(link.projector(student.body(X), None), teacher.shape(h)).detach(),
    )


def test_teachers_that_get_different_inputs_run_apart():
    student, _, _, teacher = nets()
    other = Teacher(teacher, output='shape', inputs=lambda x: 2 * x)
    heads = two_heads(student, Teacher(teacher, output='color'), other, kd(2.0))
    out = heads(X, COLOR, SHAPE)
    assert teacher.calls == 2
    torch.testing.assert_close(
        out.parts['shape.kd'],
        losses.kl(student(X)['shape'], teacher(2 * X)['shape'], T=2.0).detach(),
    )


def test_teachers_with_different_normalization_run_apart():
    student, _, _, teacher = nets()
    images = lambda mean: dict(stats=(mean, 1.0), input_stats=(0.0, 1.0))
    of = lambda k, mean: Teacher(teacher, output=k, images=images(mean))
    heads = two_heads(student, of('color', 0.0), of('shape', 1e-6), kd())
    assert len(heads.heads.sources) == 2
    assert len(two_heads(student, of('color', 0.5), of('shape', 0.5), kd()).heads.sources) == 1


def test_a_teacher_of_several_heads_is_prepared_once_and_restored():
    student, _, _, teacher = nets()
    heads = two_heads(student, teacher, teacher, kd())
    assert len(heads.heads.sources) == 1
    heads.start()
    heads(X, COLOR, SHAPE)
    assert not teacher.training
    heads.stop()
    assert teacher.training


def test_teachers_of_one_model_share_its_faster_copy():
    student, _, _, teacher = nets()
    each = Teacher(teacher, output='color'), Teacher(teacher, output='shape')
    heads = two_heads(student, *each, kd()).heads
    copies = [h.teacher.runner.fast_copy for h in heads.values()]
    assert copies[0] is copies[1]
    assert [h.teacher.output for h in heads.values()] == ['color', 'shape']


def test_heads_without_recipes_choose_their_own_and_check_their_labels(capsys):
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape)
    heads(X, COLOR, SHAPE).total.backward()
    assert [*heads.links['color']] == ['dist']
    assert [*heads.links['shape']] == ['kd']
    out = capsys.readouterr().out
    assert 'fastdistill: color: recipe labels + dist' in out
    assert 'fastdistill: shape: recipe kd(T=1, alpha=.5)' in out
    assert student.body.weight.grad is not None
    wrong = Distiller(student, dict(color=color), kd())
    with pytest.raises(DistillError, match='There is a label 3, but the outputs have 3 classes'):
        wrong(X, torch.full((8,), 3))


def test_a_head_without_labels_learns_from_its_teacher_alone():
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape, dict(color=kd(2.0, 0.7), shape=soft_labels(T=1)))
    out = heads(X, COLOR, None)
    s = student(X)
    torch.testing.assert_close(
        out.total,
        0.3 * F.cross_entropy(s['color'], COLOR)
        + 0.7 * losses.kl(s['color'], color(X), T=2.0)
        + losses.kl(s['shape'], shape(X), T=1.0),
    )


def test_layers_are_compared_in_one_run_and_projectors_are_trained():
    student, color, shape, _ = nets()
    recipes = dict(color=kd(), shape=kd() + losses_between())
    with pytest.raises(DistillError, match='The projectors are not built yet'):
        two_heads(student, color, shape, recipes).parameters()
    heads = two_heads(student, color, shape, recipes, example=X)
    n = len(list(student.parameters()))
    assert len(list(heads.parameters())) == n + 2
    assert len({id(p) for p in heads.parameters()}) == n + 2
    calls = student.calls
    heads(X, COLOR, SHAPE).total.backward()
    assert student.calls == calls + 1
    assert all(
        p.grad is not None
        for k in ('body', 'color', 'shape')
        for p in getattr(student, k).parameters()
    )
    assert all(p.grad is not None for p in heads.own_parameters())
    assert all(p.grad is None for p in [*color.parameters(), *shape.parameters()])


def losses_between():
    return Term(losses.mse, layers={'body': '0'}, match='shape', weight=0.005)


def test_a_loader_is_checked_for_each_head():
    student, color, shape, _ = nets()
    batches = [(X, COLOR, SHAPE)] * 8
    found = two_heads(student, color, shape).check(batches)
    assert found.keys() == {'color', 'shape'}
    right = lambda o, y: (o.argmax(1) == y).float().mean().item()
    for k, y, t in (('color', COLOR, color), ('shape', SHAPE, shape)):
        assert found[k].facts.teacher_score == pytest.approx(right(t(X), y))
        assert found[k].facts.student_score == pytest.approx(right(student(X)[k], y))
    same = two_heads(student, color, color)
    wrong = same.check([(X, COLOR, SHAPE)])
    assert (
        "The student's output has shape (8, 2), but the teacher's has shape (8, 3)"
        in wrong['shape'][0].what
    )
    assert not same.check(X, COLOR, SHAPE)['color']
    other = same.check(X, COLOR + 3, SHAPE)['color']
    assert 'There is a label 5, but the outputs have 3 classes' in other[0].what


def trained(n, state=None):
    "The Distiller after `n` steps, its weights and its state; it continues from `state`"
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape, dict(shape=kd() + losses_between()), example=X)
    opt = torch.optim.SGD(heads.parameters(), 0.1)
    if state is not None:
        heads.load_state_dict(state)
    for _ in range(n):
        loss = heads(X, COLOR, SHAPE).total
        opt.zero_grad(), loss.backward(), opt.step()
    return heads, torch.cat([p.detach().flatten() for p in heads.parameters()])


def test_a_training_of_heads_continues_with_the_recipes_and_norms_that_it_had(capsys):
    _, whole = trained(5)
    half, _ = trained(3)
    state = {k: v.clone() for k, v in half.state_dict().items()}
    capsys.readouterr()
    again, resumed = trained(2, state)
    assert torch.equal(resumed, whole)
    assert 'recipe' not in capsys.readouterr().out
    assert again.heads['color'].recipe.terms[0].name == 'dist'
    assert list(again.ratios) == ['color.dist']


def test_each_head_continues_with_the_random_numbers_of_its_teacher():
    def begin(seed):
        student, color, shape, _ = nets()
        torch.manual_seed(seed)
        sampled = lambda m: Teacher([m, copy.deepcopy(m)], ensemble=dict(combine='sample'))
        dropout = nn.Sequential(nn.Dropout(0.5), shape)
        heads = two_heads(student, sampled(color), Teacher(dropout, run=dict(mode='train')), kd())
        with torch.no_grad():
            heads.heads['color'].teacher.members[1].module.weight.neg_()
        return heads

    whole, again = begin(1), begin(2)
    torch.manual_seed(3)
    for _ in range(3):
        whole(X, COLOR, SHAPE)
    again.load_state_dict(whole.state_dict())
    torch.manual_seed(4)
    for _ in range(5):
        a, b = (d(X, COLOR, SHAPE) for d in (whole, again))
        assert torch.equal(a.total, b.total)


def test_a_state_of_other_heads_is_refused():
    student, color, shape, _ = nets()
    both = two_heads(student, color, shape, kd())
    other = Distiller(student, dict(color=color), kd())
    with pytest.raises(
        DistillError, match='the heads color, shape, but this one has the heads color'
    ):
        other.set_extra_state(both.get_extra_state())
    with pytest.raises(DistillError, match='the heads color, shape, but this one has one output'):
        Distiller(student, color, kd(), output='color').set_extra_state(both.get_extra_state())
    with pytest.raises(DistillError, match='with one output, but this one has the heads color'):
        other.set_extra_state(Distiller(student, color, kd()).get_extra_state())


def test_a_teacher_of_a_head_may_read_the_raw_items():
    student, color, shape, _ = nets()
    reads = Teacher(color, items=lambda rows: torch.stack(rows))
    heads = two_heads(student, reads, shape, kd(2.0))
    items = [x + 1 for x in X]
    out = heads(with_items((X,), items), COLOR, SHAPE)
    torch.testing.assert_close(
        out.parts['color.kd'], losses.kl(student(X)['color'], color(X + 1), T=2.0).detach()
    )


def test_what_is_no_set_of_heads():
    student, color, shape, _ = nets()
    with pytest.raises(DistillError, match='The dict of teachers is empty'):
        Distiller(student, {})
    with pytest.raises(
        DistillError, match='A dict .a state_dict.. contains weights, but no network'
    ):
        Distiller(student, color.state_dict())
    with pytest.raises(
        DistillError, match='A dict of teachers is for a student with several heads'
    ):
        Teacher(dict(color=color))
    with pytest.raises(DistillError, match='labels= and weights= are for several heads'):
        Distiller(student, color, weights=dict(color=1))
    heads = two_heads(student, color, shape, kd())
    with pytest.raises(DistillError, match=r'1 labels for 2 heads \(color, shape\)'):
        heads(X, COLOR)
    for option in ('weights', 'recipe', 'kind', 'output'):
        with pytest.raises(
            DistillError, match=f'{option}= has colour, but the heads are color, shape'
        ):
            two_heads(student, color, shape, **{option: dict(colour=1)})
    with pytest.raises(
        DistillError, match=r"use the attribute of one of them, as in distiller.heads\['color'\]"
    ):
        heads.teacher  # noqa: B018
    with pytest.raises(
        DistillError, match="including 'hue', but the student returns color, shape, size"
    ):
        Distiller(student, dict(hue=color, shape=shape), kd())(X, COLOR, SHAPE)


def test_a_trainer_gives_the_task_loss_of_all_heads():
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape, kd(2.0, 0.7), weights=dict(shape=0.5))
    heads.heads.share_task_loss()
    raw = student(X)
    task = F.cross_entropy(raw['color'], COLOR) + F.cross_entropy(raw['shape'], SHAPE)
    out = heads.compute(
        heads.student_outputs(raw, {}, X), heads.teacher_outputs(X), task, (COLOR, SHAPE)
    )
    terms = losses.kl(raw['color'], color(X), T=2.0) + 0.5 * losses.kl(
        raw['shape'], shape(X), T=2.0
    )
    torch.testing.assert_close(out.total, 0.3 * task + 0.7 * terms)
    torch.testing.assert_close(
        heads.without_labels(heads.student_outputs(raw, {}, X), heads.teacher_outputs(X)),
        0.7 * terms,
    )


def test_recipes_that_were_chosen_for_heads_share_a_task_loss_of_weight_1():
    "Whatever weight each of them gives the labels; the terms of a head keep their ratio to it"
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape)
    heads.heads.share_task_loss()
    for name, text in dict(color='kd(T=2, alpha=.75)', shape='kd(T=1, alpha=.5)').items():
        heads.heads[name].take(Automatic(text, 'a reason', 'softmax'))
    heads.heads.share_task_loss()
    raw = student(X)
    task = F.cross_entropy(raw['color'], COLOR) + F.cross_entropy(raw['shape'], SHAPE)
    out = heads.compute(
        heads.student_outputs(raw, {}, X), heads.teacher_outputs(X), task, (COLOR, SHAPE)
    )
    terms = [losses.kl(raw['color'], color(X), T=2.0), losses.kl(raw['shape'], shape(X), T=1.0)]
    torch.testing.assert_close(out.total, task + 3 * terms[0] + terms[1])


def test_heads_that_share_a_task_loss_are_divided_by_the_same_number():
    student, color, shape, _ = nets()
    recipe = dict(color=recipes.dist(grad_ratio=3), shape=Recipe(Term(losses.mse)))
    heads = two_heads(student, color, shape, recipe)
    heads.heads.share_task_loss()
    raw = student(X)
    task = F.cross_entropy(raw['color'], COLOR) + F.cross_entropy(raw['shape'], SHAPE)
    outputs = heads.student_outputs(raw, {}, X), heads.teacher_outputs(X)
    out = heads.compute(*outputs, task, (COLOR, SHAPE))
    norm = lambda v: torch.autograd.grad(v, raw['color'], retain_graph=True)[0].norm()
    dist = losses.dist(raw['color'], color(X))
    ratio = (3 * norm(task) / norm(dist)).detach()
    terms = ratio * dist + losses.mse(raw['shape'], shape(X))
    torch.testing.assert_close(out.total, (task + terms) / 4)
    torch.testing.assert_close(heads.without_labels(*outputs), terms / 4)


def test_one_task_loss_needs_one_weight():
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape, dict(color=kd(alpha=0.9), shape=kd(alpha=0.5)))
    with pytest.raises(DistillError, match='give the task loss different weights'):
        heads.heads.share_task_loss()


def told(y, classes, knows):
    "A teacher whose logits are random, but know this much of the labels"
    noise = torch.randn(len(y), classes, generator=torch.Generator().manual_seed(classes))
    return 0.7 * noise + knows * (F.one_hot(y, classes) - 1 / classes)


def gradients(loss, student):
    return torch.autograd.grad(loss, [*student.parameters()], retain_graph=True, allow_unused=True)


def sum_of(*gradients):
    return [sum(p for p in ps if p is not None) for ps in zip(*gradients)]


@pytest.mark.parametrize('weights', [{}, dict(shape=0.5)], ids=['', 'weights'])
@pytest.mark.parametrize('several_terms', [False, True])
@pytest.mark.parametrize('knows', [(-3.0, 9.0), (9.0, -3.0), (0.3, 0.1), (-3.0, -3.0)])
def test_each_head_fades_as_if_it_were_alone(knows, several_terms, weights):
    "With the labels of all heads in one loss: the doubt about one teacher changes no other head"
    student, *_ = nets()
    recipe = recipes.dist(grad_ratio=3, fade=0.2)
    if several_terms:
        recipe = recipe + Term(losses.mse, weight=0.1) + Term(losses.kl, grad_ratio=1, fade=0.2)
    heads = Distiller(student, dict(color=None, shape=None), recipe, weights=weights, check=False)
    of = lambda: Distiller(None, None, recipe, check=False)
    alone = dict(color=of(), shape=of())
    w = dict(color=1.0, shape=1.0) | weights
    opt, g = torch.optim.SGD(student.parameters(), 0.05), torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(32, 6, generator=g)
        y = dict(
            color=torch.randint(3, (32,), generator=g), shape=torch.randint(2, (32,), generator=g)
        )
        raw = student(x)
        s = {k: Outputs(raw[k]) for k in y}
        t = {k: Outputs(told(y[k], raw[k].shape[1], o)) for k, o in zip(y, knows)}
        each = {k: F.cross_entropy(raw[k], y[k]) for k in y}
        own = [w[k] * d.compute(s[k], t[k], each[k], (y[k],)).total for k, d in alone.items()]
        out = heads.compute(s, t, sum(w[k] * v for k, v in each.items()), (*y.values(),))
        want = sum_of(*(gradients(o, student) for o in own))
        got = gradients(out.total, student)
        for a, b in zip(got[:6], want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert heads.faded == {f'{k}.{n}': v for k, d in alone.items() for n, v in d.faded.items()}
        opt.zero_grad(), out.total.backward(), opt.step()
    assert any(0 < v < 1 for v in heads.faded.values()) or min(heads.faded.values()) == 0


def outputs_of(heads, student):
    return heads.student_outputs(student(X), {}, X), heads.teacher_outputs(X)


def test_outputs_that_are_computed_elsewhere_get_the_default_recipe_of_each_head(capsys):
    student, color, shape, _ = nets()
    heads = two_heads(student, color, shape)
    s, t = outputs_of(heads, student)
    task = F.cross_entropy(s['color'].logits, COLOR) + F.cross_entropy(s['shape'].logits, SHAPE)
    out = heads.compute(s, t, task, (COLOR, SHAPE))
    assert list(out.parts) == ['color.dist', 'shape.kd']
    assert 'shape: recipe kd(T=1, alpha=.5)' in capsys.readouterr().out
    assert out.weights['shape.kd'] == out.weights['task'] == 0.25  # labels and kd are equal
    with pytest.raises(DistillError, match="dist needs the teacher's outputs .* but got None"):
        heads.compute(s, {'shape': t['shape']}, task, (COLOR, SHAPE))
    again = two_heads(student, color, shape)
    with pytest.raises(DistillError, match='color: there is no recipe yet. .* teacher_outputs'):
        again.compute(s, {'shape': t['shape']}, task, (COLOR, SHAPE))


def test_one_output_gets_its_default_recipe_too():
    student, color, _, _ = nets()
    d = Distiller(student, Teacher(color), output='color')
    s = d.student_outputs(student(X), {}, X)
    task = F.cross_entropy(s.logits, COLOR)
    with pytest.raises(DistillError, match='there is no recipe yet'):
        d.compute(s, None, task, (COLOR,))
    assert list(d.compute(s, d.teacher_outputs(X), task, (COLOR,)).parts) == ['dist']


def test_different_weights_of_one_task_loss_are_an_error_wherever_it_comes_from():
    student, color, shape, _ = nets()
    with_weight = dict(color=kd(alpha=0.9), shape=Term(losses.mse, weight=0.5))
    heads = two_heads(student, color, shape, with_weight)
    s, t = outputs_of(heads, student)
    with pytest.raises(DistillError, match=r'different weights \(color: 0.1, shape: 1.0\)'):
        heads.compute(s, t, s['color'].logits.sum(), (COLOR, SHAPE))
    ratio = Term(losses.mse, grad_ratio=0.5)  # relative to the task loss, whatever its weight
    heads = two_heads(student, color, shape, dict(color=kd(alpha=0.9), shape=ratio))
    task = F.cross_entropy(s['color'].logits, COLOR) + F.cross_entropy(s['shape'].logits, SHAPE)
    out = heads.compute(s, t, task, (COLOR, SHAPE))
    alone = Distiller(None, None, Recipe(ratio, task=0.1), check=False)
    want = alone.compute(s['shape'], t['shape'], task, (SHAPE,)).total
    torch.testing.assert_close(gradients(out.total, student.shape), gradients(want, student.shape))


def test_a_head_of_weight_0_has_no_terms_but_those_of_other_heads_stay():
    student, color, shape, _ = nets()
    weights = dict(color=0.0)
    heads = two_heads(student, color, shape, recipes.dist(grad_ratio=3), weights=weights)
    s, t = outputs_of(heads, student)
    task = F.cross_entropy(s['shape'].logits, SHAPE)
    out = heads.compute(s, t, task, (COLOR, SHAPE))
    want = Distiller(None, None, recipes.dist(grad_ratio=3), check=False).compute(
        s['shape'], t['shape'], task, (SHAPE,)
    )
    torch.testing.assert_close(out.total, want.total)
