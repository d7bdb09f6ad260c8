"The heart, without any framework: terms, recipes, and a plain loop."

import copy, functools, math, random, re, subprocess, sys, warnings
from contextlib import nullcontext
from functools import partial
import pytest, torch
import numpy as np
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from cases import Golden
from fastai.layers import Lambda
from fastdistill import (
    DistillError,
    DistillWarning,
    Distiller,
    LinearLogits,
    Outputs,
    Recipe,
    Teacher,
    Term,
    dkd,
    hard_labels,
    kd,
    layers,
    logit_std,
    losses,
    recipes,
    soft_labels,
)
from fastdistill.base.outputs import Draws


def mlp(hidden, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
    )


def batch(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    return x, x[:, :4].argmax(1)


def two(n=6, c=5, *grid, seed=0):
    "Logits of student and teacher, labels"
    g = torch.Generator().manual_seed(seed)
    s, t = [torch.randn(n, c, *grid, generator=g, dtype=torch.float64) * 3 for _ in range(2)]
    return s.requires_grad_(), t, torch.randint(c, (n, *grid), generator=g)


def hint(weight=1.0, layers=None):
    return Term(losses.hint, weight, layers=layers or {'2': '2'}, projector='linear')


@pytest.mark.parametrize(
    'recipe',
    [kd(), hint(), Term(lambda s, t: F.mse_loss(s, t), name='own')],
    ids=['kd', 'hint', 'own'],
)
def test_a_teacher_in_float64_gives_the_loss_of_the_same_teacher_in_float32(recipe):
    (x, y), teacher, total = batch(), mlp(16, 1), {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)  # of the projector
        total[dtype] = Distiller(mlp(6), teacher.to(dtype), recipe)(x, y).total
    assert total[torch.float64].dtype == torch.float32
    assert total[torch.float64].item() == pytest.approx(total[torch.float32].item(), rel=1e-5)


# one call, the numbers that people know


@pytest.mark.parametrize(
    'name,expected,class_mean',
    [('kd_hinton', '', False), ('kd_haitongli', '', True), ('kd_haitongli', '_paper', False)],
)
def test_a_recipe_gives_the_numbers_of_the_scripts_that_people_paste(name, expected, class_mean):
    for tag, g, o in Golden(name).cases():
        s = g['student'].clone().requires_grad_()
        loss = kd(o['T'], o['alpha'], class_mean=class_mean)(s, g['teacher'], g['target'])
        loss.backward()
        assert loss.item() == pytest.approx(g['expected' + expected].item(), rel=1e-12), tag
        torch.testing.assert_close(s.grad, g['grad_student' + expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    'given',
    [losses.Loss(losses.kl, T=2.0, axis=-1), partial(losses.kl, T=2.0, axis=-1)],
    ids=['a module', 'a partial'],
)
def test_options_that_a_loss_brings_along_are_not_replaced_by_the_tasks(given):
    s, t, _ = two(6, 5, 4)
    want = (
        4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction='none').sum(-1).mean()
    )
    assert Recipe(Term(given), task=0.0)(s, t, axis=1).item() == pytest.approx(want.item())
    assert Recipe(Term(losses.kl, T=2.0, axis=-1), task=0.0)(s, t, axis=1).item() == pytest.approx(
        want.item()
    )


def test_a_mean_over_classes_is_a_smaller_alpha():
    s, t, y = two(c=10)
    a, c = 0.9, 10
    scale = a / c + 1 - a
    assert kd(4.0, a, class_mean=True)(s, t, y).item() == pytest.approx(
        scale * kd(4.0, a / c / scale)(s, t, y).item()
    )


@pytest.mark.parametrize(
    'recipe,by_hand',
    [
        (
            hard_labels(0.5),
            lambda s, t, y: 0.5 * F.cross_entropy(s, t.argmax(1)) + 0.5 * F.cross_entropy(s, y),
        ),
        (
            soft_labels(2.0),
            lambda s, t, y: (
                4 * F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction='batchmean')
            ),
        ),
        (
            logit_std(kd(2.0, 0.5)),
            lambda s, t, y: (
                kd(2.0, 0.5)(
                    *[
                        (o - o.mean(1, keepdim=True)) / (o.std(1, keepdim=True) + 1e-7)
                        for o in (s, t)
                    ],
                    y,
                )
                + 0.5
                * (
                    F.cross_entropy(s, y)
                    - F.cross_entropy(
                        (s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-7), y
                    )
                )
            ),
        ),
        (dkd(beta=2.0), lambda s, t, y: F.cross_entropy(s, y) + losses.dkd(s, t, y, beta=2.0)),
        (Term(F.mse_loss, 0.5), lambda s, t, y: F.cross_entropy(s, y) + 0.5 * F.mse_loss(s, t)),
        (
            Recipe(Term(nn.MSELoss()), Term(torch.dist, 0.1), task=0.3),
            lambda s, t, y: 0.3 * F.cross_entropy(s, y) + F.mse_loss(s, t) + 0.1 * torch.dist(s, t),
        ),
        (
            Term(lambda s, t, *ys: (s.sum(1) * ys[0]).mean()),
            lambda s, t, y: F.cross_entropy(s, y) + (s.sum(1) * y).mean(),
        ),
        (
            Term(partial(losses.kl, T=2.0)) + Term(losses.kl, T=3.0, name='other'),
            lambda s, t, y: F.cross_entropy(s, y) + losses.kl(s, t, T=2.0) + losses.kl(s, t, T=3.0),
        ),
    ],
    ids=[
        'hard_labels',
        'soft_labels',
        'logit_std',
        'dkd',
        'function',
        'modules',
        'targets',
        'partial',
    ],
)
def test_recipes_are_what_they_say(recipe, by_hand):
    s, t, y = two()
    assert Recipe(recipe)(s, t, y).item() == pytest.approx(by_hand(s, t, y).item(), rel=1e-6)


def test_without_labels_the_teacher_alone():
    s, t, _ = two()
    assert soft_labels(2.0)(s, t).item() == pytest.approx(losses.kl(s, t, T=2.0).item())
    with pytest.raises(
        DistillError,
        match='no labels, but the recipe gives the task loss the weight 0.1: use alpha=1, or soft_labels',
    ):
        kd(4.0, 0.9)(s, t)
    with pytest.raises(
        DistillError,
        match=r'dkd needs 1 target\(s\) in addition to the outputs of both models, but this batch has 0',
    ):
        Recipe(dkd(), task=0.0)(s, t)


def test_the_kind_chooses_the_form():
    s, t, _ = two()
    y = torch.rand(6, 5).round().double()
    multi = kd(2.0, 0.5)(s, t, y, kind='sigmoid', task_loss=F.binary_cross_entropy_with_logits)
    assert multi.item() == pytest.approx(
        (
            0.5 * losses.binary_kl(s, t, T=2.0) + 0.5 * F.binary_cross_entropy_with_logits(s, y)
        ).item()
    )
    numbers = kd(2.0, 0.5)(s, t, t, kind='regression', task_loss=F.mse_loss)
    assert numbers.item() == pytest.approx(F.mse_loss(s, t).item())
    with pytest.raises(
        DistillError,
        match='dkd compares a softmax over classes, but this model predicts numbers. Use kd()',
    ):
        dkd()(s, t, t, kind='regression')
    with pytest.raises(
        DistillError, match="kind='soft': must be one of 'softmax', 'sigmoid', 'regression'"
    ):
        kd()(s, t, kind='soft')


# terms and recipes


def test_recipes_add_up():
    r = kd(2.0, 0.9) + Term(losses.mse, 0.5) + Term(losses.kl, T=2.0) + kd(4.0, 0.9)
    assert [t.name for t in r.terms] == ['kd', 'mse', 'kl', 'kd_2'] and r.task == pytest.approx(0.1)
    assert [t.name for t in (Term(losses.mse) + Term(losses.mse) + Term(losses.mse)).terms] == [
        'mse',
        'mse_2',
        'mse_3',
    ]
    assert (Term(losses.mse) + kd()).task == pytest.approx(0.1) and Recipe(
        kd(), hard_labels(), task=0.3
    ).task == 0.3
    assert (kd(alpha='linear') + hard_labels(alpha='linear')).task(0.25) == 0.25
    s, t, y = two()
    want = (
        kd(2.0, 0.9)(s, t, y)
        + 0.5 * losses.mse(s, t)
        + losses.kl(s, t, T=2.0)
        + 0.9 * losses.kl(s, t, T=4.0)
    )
    assert r(s, t, y).item() == pytest.approx(want.item())


def test_recipes_print_as_they_are_written():
    assert repr(kd(2.0, 0.5)) == 'Recipe(Term(kd, weight=0.5, T=2.0), task=0.5)'
    assert repr(hint(2.0)) == "Term(hint, weight=2.0, layers={'2': '2'})"


@pytest.mark.parametrize(
    'make,says',
    [
        (
            lambda: kd(alpha=0.9) + kd(alpha=0.5),
            'give the task loss different weights .0.1 and 0.5.: give them the same alpha',
        ),
        (lambda: kd() + 3, r'made of terms and recipes, got 3. Try kd\(\), or Term'),
        (lambda: kd(alpha=1.5), 'alpha=1.5: the weight of the teacher must be between 0'),
        (lambda: Term('kl'), "needs a loss function, got 'kl'. See fastdistill.losses"),
        (
            lambda: Term(losses.kl, temp=2.0),
            'kl has no option temp. It has: T, axis, mask, reduction',
        ),
        (
            lambda: Term(F.mse_loss, name='task'),
            "can't be named 'task', which already has a meaning",
        ),
        (lambda: Term(F.mse_loss, name='a.b'), "can't be named 'a.b'"),
        (lambda: Term(F.mse_loss, weight='up'), "weight of mse_loss='up': must be a number"),
        (
            lambda: Term(losses.kl, 2.0, grad_ratio=1.0),
            'weight=2.0 and grad_ratio=1.0 of kl: give only one of them',
        ),
        (
            lambda: recipes.dist(grad_ratio=-1),
            'grad_ratio=-1 of dist: must be a number of at least 0',
        ),
        (
            lambda: Distiller(mlp(4), mlp(8), dkd(), kind='sigmoid'),
            'a softmax over classes, but this model predicts a sigmoid per label',
        ),
    ],
)
def test_mistakes_are_refused_where_they_are_made(make, says):
    with pytest.raises(DistillError, match=says):
        make()


def test_schedules_ask_for_progress():
    s, t, y = two()
    assert kd(alpha='linear')(s, t, y, progress=0.25).item() == pytest.approx(
        kd(alpha=0.75)(s, t, y).item()
    )
    assert kd(T=('linear', 4, 2))(s, t, y, progress=0.5).item() == pytest.approx(
        kd(T=3.0)(s, t, y).item()
    )
    for r in (kd(alpha='linear'), kd(T=('linear', 4, 2)), Recipe(Term(losses.kl, stop_at=0.5))):
        with pytest.raises(
            DistillError,
            match=r'pass the progress of the training, as in distiller\(x, y, progress=step/steps\)',
        ):
            r(s, t, y)


def test_a_loss_module_may_be_used_by_many():
    vid = losses.VID()
    recipe = Recipe(Term(vid, layers={'2': '2'}))
    a, b = [Distiller(mlp(6), mlp(16), recipe, example=batch()[0]) for _ in range(2)]
    assert not {id(p) for p in a.own_parameters()} & {
        id(p) for p in b.own_parameters()
    } and not list(vid.parameters())


# your own loss


def wide(h, o=4, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, h), nn.ReLU(), nn.Linear(h, o))


def distance(s, t):
    return (s - t).pow(2).mean()


@pytest.mark.parametrize('width', [1, 4])
@pytest.mark.parametrize(
    'mine',
    [distance, F.mse_loss, nn.MSELoss(), losses.loss()(distance)],
    ids=['function', 'torch', 'module', 'decorated'],
)
def test_your_own_loss_of_layers_gets_its_projector(mine, width):
    d = Distiller(wide(width), wide(8), Term(mine, layers={'0': '0'}), example=batch()[0])
    assert d.pairs[0].projector == f'linear {width} -> 8' and len(d.own_parameters()) == 2
    out = d(*batch())
    f, k = d.student[0](batch()[0]), d.links[d.recipe.terms[0].name][0]
    assert list(out.parts.values())[0].item() == pytest.approx(
        distance(k.projector(f, None), d.teacher.module[0](batch()[0])).item()
    )


def gram(s, t):
    return (s @ s.T - t @ t.T).pow(2).mean()


@pytest.mark.parametrize(
    'term',
    [
        Term(gram, 0.001, layers={'0': '0'}, match='none'),
        Term(losses.loss(match='none')(gram), 0.001, layers={'0': '0'}),
        Term(losses.loss()(gram), 0.001, layers={'0': '0'}, match='none'),
    ],
    ids=['plain', 'decorated', 'overridden'],
)
def test_your_own_loss_of_relations_says_that_it_needs_no_projector(term):
    d = Distiller(wide(4), wide(8), term, example=batch()[0])
    assert (
        d.pairs[0].projector == 'none' and not d.own_parameters() and d(*batch()).parts['gram'] > 0
    )


def test_what_a_term_says_counts_before_what_its_loss_says():
    t = [
        Term(losses.at, layers='auto'),
        Term(losses.at, layers='auto', match='grid'),
        Term(losses.Loss(losses.at), layers='auto'),
        Term(distance),
    ]
    assert [o.match for o in t] == ['none', 'grid', 'none', 'shape']
    half = torch.randn(3, 4).half()
    assert losses.loss()(distance)(half, half + 1).dtype == torch.float32


def test_a_loss_of_logits_may_compare_layers_too():
    d = Distiller(
        wide(4),
        wide(8),
        Term(losses.kl, layers={'0': '0'}, T=2.0),
        kind='regression',
        task_loss=F.mse_loss,
        example=batch()[0],
    )
    assert (
        d(batch()[0], torch.zeros(16, 4)).parts['kl'] > 0
        and d.pairs[0].projector == 'linear 4 -> 8'
    )


@pytest.mark.parametrize(
    'make,says',
    [
        (
            lambda: losses.loss(distance),
            r'decorator with options: write @loss\(\) above your function',
        ),
        (
            lambda: losses.loss(match='places'),
            "match='places': must be one of 'shape', 'grid', 'none'",
        ),
        (
            lambda: losses.loss(kind='classes'),
            "kind='classes': must be one of None, 'softmax', 'sigmoid', 'regression'",
        ),
        (
            lambda: Term(distance, layers='auto', match='same'),
            "match='same': must be 'shape', 'grid' or 'none' .what must be equal",
        ),
    ],
)
def test_what_a_loss_needs_is_one_of_few_words(make, says):
    with pytest.raises(DistillError, match=says):
        make()


# which positions count


def test_positions_without_a_label_do_not_count_in_dense_tasks():
    s, t, y = two(2, 5, 3, 4)
    y[0, :2] = 255
    rows = [o.movedim(1, -1)[y != 255] for o in (s, t)]
    got = kd(2.0, 0.5)(
        s, t, y, ignore_index=255, task_loss=partial(F.cross_entropy, ignore_index=255)
    )
    assert got.item() == pytest.approx(kd(2.0, 0.5)(*rows, y[y != 255]).item())


def test_masks_of_both_models_count():
    s, t, _ = two(4, 5, 3)
    g = torch.Generator().manual_seed(1)
    a, b = [torch.rand(4, 3, generator=g) > 0.4 for _ in range(2)]
    d = Distiller(None, None, soft_labels(2.0))
    got = d.compute(Outputs(s, mask=a), Outputs(t, mask=b)).total
    rows = [o.movedim(1, -1)[a & b] for o in (s, t)]
    assert got.item() == pytest.approx(losses.kl(*rows, T=2.0).item())


# a plain loop


def test_a_plain_loop_trains_student_and_projectors_and_leaves_the_teacher():
    student, teacher = mlp(6), mlp(16, seed=1)
    x, y = batch(64)
    opt = torch.optim.Adam(teacher.parameters(), 0.02)
    for _ in range(60):
        F.cross_entropy(teacher(x), y).backward()
        opt.step()
        opt.zero_grad()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    d = Distiller(student, Teacher(teacher), kd(T=2.0, alpha=0.9) + hint(), example=x)
    first = [p.detach().clone() for p in d.own_parameters()]
    opt = torch.optim.Adam(d.parameters(), 0.02)
    seen = []
    with d.teacher:
        for _ in range(80):
            loss = d(x, y)
            loss.total.backward()
            opt.step()
            opt.zero_grad()
            seen.append(loss.parts)
    assert seen[-1]['kd'] < 0.2 * seen[0]['kd'] and seen[-1]['hint'] < 0.5 * seen[0]['hint']
    assert not any(torch.equal(a, b) for a, b in zip(first, d.own_parameters()))
    assert (
        all(torch.equal(v, teacher.state_dict()[k]) for k, v in before.items()) and teacher.training
    )
    assert all(p.requires_grad and not p.grad for p in teacher.parameters())
    assert not any(m._forward_hooks for m in [*student.modules(), *teacher.modules()])


def test_the_teacher_is_no_part_of_what_is_trained_or_saved():
    student, teacher = mlp(6), mlp(16)
    d = Distiller(student, teacher, kd() + hint(), example=batch()[0])
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in d.parameters()} and len(list(d.parameters())) == 6 + 2
    assert {k.split('.')[0] for k in d.state_dict()} == {
        'student',
        'links',
        '_extra_state',
    } and len(d.state_dict()) == 9
    assert teacher not in list(d.modules())
    assert (
        d.train().training and teacher.training and d.eval() and teacher.training
    )  # its mode is its own affair


def test_two_distillers_share_a_teacher_and_each_reads_its_own_layers():
    x, y = batch()
    net, tapped = mlp(16, 1), []
    for name, m in net.named_children():
        m.register_forward_hook(
            lambda m, *_, name=name: tapped.extend([name] * (len(m._forward_hooks) - 1))
        )
    teacher = Teacher(net)
    one = Distiller(mlp(6), teacher, kd() + hint(layers={'2': '2'}), example=x)
    two = Distiller(mlp(6), teacher, kd() + hint(layers={'0': '0'}), example=x)
    tapped.clear()
    for d, name in ((one, '2'), (two, '0'), (one, '2')):
        alone = Distiller(mlp(6), mlp(16, 1), kd() + hint(layers={name: name}), example=x)
        alone.load_state_dict(d.state_dict())
        assert torch.equal(d(x, y).total, alone(x, y).total)
    assert tapped == ['2', '0', '2'] and teacher.layers == [] and teacher(x).feats == {}


def test_compute_without_the_layers_says_where_they_come_from():
    x, y = batch()
    d = Distiller(mlp(6), mlp(16, 1), kd() + hint(), example=x)
    s = Outputs(d.student(x), {'2': d.student[:3](x)})
    with pytest.raises(
        DistillError,
        match=r"teacher's outputs have no layer '2' \(they have: none\).*distiller.teacher_outputs\(x\)",
    ):
        d.compute(s, d.teacher(x), F.cross_entropy(s.logits, y), (y,))
    assert d.compute(s, d.teacher_outputs(x), F.cross_entropy(s.logits, y), (y,)).parts['hint'] > 0


def test_an_optimizer_made_before_the_projectors_is_refused():
    d = Distiller(mlp(6), mlp(16), kd() + hint())
    with pytest.raises(
        DistillError,
        match=r'are not built yet.*give the Distiller a batch of inputs, Distiller\(..., example=x\)',
    ):
        torch.optim.SGD(d.parameters(), 0.1)
    with pytest.raises(DistillError, match='not built yet'):
        list(
            Distiller(
                mlp(6), mlp(16), Term(losses.at, layers={'2': '2'}, projector='mlp')
            ).parameters()
        )
    d(*batch())
    assert len(list(d.parameters())) == 8
    assert len(list(Distiller(mlp(6), mlp(16), kd()).parameters())) == 6  # no layers, no projectors


def test_a_checkpoint_is_refused_before_the_projectors_are_built():
    state = Distiller(mlp(6), mlp(16), kd() + hint(), example=batch()[0]).state_dict()
    d = Distiller(mlp(6), mlp(16), kd() + hint())
    before = copy.deepcopy(d.student.state_dict())
    with pytest.raises(
        DistillError, match=r'checkpoint has projectors.*give the Distiller a batch of inputs'
    ):
        d.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in d.student.state_dict().items())
    d(*batch())
    d.load_state_dict(state)
    assert all(torch.equal(v, state[f'student.{k}']) for k, v in d.student.state_dict().items())


def test_looking_at_a_batch_changes_nothing():
    student = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4))
    teacher, state, rng = mlp(16), copy.deepcopy(student.state_dict()), torch.get_rng_state()
    Distiller(
        student, teacher, Term(losses.hint, layers={'0': '2'}, projector='mlp'), example=batch()[0]
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in state.items()) and all(
        m.training for m in student.modules()
    )


def test_total_is_task_and_parts_by_their_weights():
    d = Distiller(mlp(6), mlp(16, 1), kd(2.0, 0.7) + hint(0.5))
    x, y = batch()
    out = d(x, y)
    want = sum(out.weights[k] * v for k, v in {'task': out.task, **out.parts}.items())
    assert out.weights == pytest.approx(
        dict(task=0.3, kd=0.7, hint=0.5)
    ) and out.total.item() == pytest.approx(want.item())
    assert (
        out.task.item() == pytest.approx(F.cross_entropy(d.student(x), y).item())
        and not out.parts['hint'].requires_grad
    )


def test_a_part_of_weight_0_is_measured_in_validation_but_not_trained():
    d = Distiller(mlp(6), mlp(16, 1), kd(alpha=0.0) + hint(0.0), example=batch()[0])
    out = d(*batch())
    assert (
        out.added is None
        and out.total is out.task
        and out.parts == {}
        and out.weights == dict(task=1.0, kd=0.0, hint=0.0)
    )
    out.total.backward()
    assert all(p.grad is None for p in d.own_parameters())
    with torch.no_grad():
        out = d(*batch())
    assert out.total is out.task and out.parts['kd'] > 0 and out.parts['hint'] > 0


class Asked(nn.Module):
    "A teacher that counts how often it is asked, and draws random numbers each time"

    def __init__(self):
        super().__init__()
        self.net, self.times = mlp(16, 1), 0

    def forward(self, x):
        self.times += 1
        return self.net(x) + 0.1 * torch.randn(len(x), 4)


@pytest.mark.parametrize(
    'recipe,when',
    [
        (kd(alpha=0.0), (0.0, 0.5, 1.0)),
        (Recipe(Term(losses.kl, stop_at=0.5)), (0.5, 1.0)),
        (Recipe(Term(losses.kl, 0.0), Term(losses.mse, lambda p: p > 0.5)), (0.0, 0.5)),
    ],
)
def test_the_teacher_is_not_asked_where_no_part_counts(recipe, when):
    teacher = Asked()
    d = Distiller(mlp(6), teacher, recipe)
    x, y = batch()
    state = torch.get_rng_state()
    for p in when:
        assert (
            d.active_terms(p) == []
            and d.teacher_outputs(x, p) is None
            and d(x, y, progress=p).total.item() == F.cross_entropy(d.student(x), y).item()
        )
    assert teacher.times == 0 and torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert d(x, y, progress=when[0]).parts and d.active_terms(when[0])
    assert teacher.times == 1 and torch.equal(
        state, torch.get_rng_state()
    )  # what validation draws is put back


def test_layers_run_only_where_their_part_counts():
    student = mlp(6)
    recipe = (
        kd()
        + hint(lambda p: float(p > 0.5), layers={'2': '2'})
        + Term(losses.hint, layers={'0': '0'}, projector='linear', stop_at=0.3, name='early')
    )
    d = Distiller(student, mlp(16, 1), recipe, example=batch()[0])
    read = lambda p: [d.head.layers(i, d.active_terms(p)) for i in (0, 1)]
    assert (
        read(0.1) == [['0'], ['0']]
        and read(0.4) == [[], []]
        and read(0.6) == [['2'], ['2']]
        and d.student_layers() == ['2', '0']
    )
    for p, parts in ((0.1, {'kd', 'early'}), (0.4, {'kd'}), (0.6, {'kd', 'hint'})):
        d.zero_grad()
        out = d(*batch(), progress=p)
        out.total.backward()
        assert set(out.parts) == parts
        trained = {
            k
            for k, links in d.links.items()
            for p in links.parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        assert trained == parts - {'kd'}


def test_a_part_that_counts_asks_for_the_teacher():
    d, (x, y) = Distiller(mlp(6), mlp(16), kd()), batch()
    with pytest.raises(
        DistillError,
        match=r"kd needs the teacher's outputs for this batch, but got None. Pass what teacher_outputs\(\) returned",
    ):
        d.compute(Outputs(d.student(x)), None, F.cross_entropy(d.student(x), y), (y,))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_teacher_that_predicts_nan_is_refused_at_the_first_batch(value):
    x, y = batch()
    d = Distiller(mlp(6), lambda x: torch.full((len(x), 4), value), kd())
    with pytest.raises(DistillError, match="teacher's outputs are nan or infinite"):
        d(x, y)
    assert [f.level for f in d.check(x, y)] == ['error']


@pytest.mark.parametrize(
    'task_loss,y',
    [
        (nn.CrossEntropyLoss(weight=torch.zeros(4)), batch()[1]),
        (nn.MSELoss(), torch.full((16, 4), float('nan'))),
    ],
)
def test_labels_that_give_nan_do_not_count_where_their_weight_is_0(task_loss, y):
    x, _ = batch()
    d = Distiller(mlp(6), mlp(16, 1), Recipe(Term(losses.mse), task=0.0), task_loss=task_loss)
    out = d(x, y)
    out.total.backward()
    assert out.task.isnan() and out.total.item() == pytest.approx(
        losses.mse(d.student(x), d.teacher(x).logits).item()
    )
    assert (
        all(p.grad.isfinite().all() for p in d.student.parameters())
        and d.student[0].weight.grad.abs().max() > 0
    )


@pytest.mark.parametrize(
    'teacher',
    [
        lambda net: Teacher(net, run=dict(mode='train')),
        lambda net: lambda x: torch.randn(len(x), 4),
    ],
    ids=['dropout', 'random'],
)
@pytest.mark.parametrize('started', [True, False])
def test_alpha_0_is_no_distillation_whatever_the_teacher_draws(teacher, started):
    def run(distill):
        student = nn.Sequential(mlp(6), nn.Dropout(0.5), nn.Linear(4, 4))
        d = (
            Distiller(student, teacher(nn.Sequential(mlp(16, 1), nn.Dropout(0.5))), kd(alpha=0.0))
            if distill
            else None
        )
        opt, (x, y) = torch.optim.SGD(student.parameters(), 0.1), batch()
        torch.manual_seed(3)
        with d.teacher if started and distill else nullcontext():
            for _ in range(5):
                (d(x, y).total if distill else F.cross_entropy(student(x), y)).backward()
                opt.step()
                opt.zero_grad()
        return student.state_dict()

    a, b = run(True), run(False)
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_no_parameter_of_the_student_is_without_a_gradient():
    d = Distiller(
        mlp(6), mlp(16, 1), Recipe(hint(), task=0.0), example=batch()[0]
    )  # only reaches the first half
    d(*batch()).total.backward()
    assert (
        all(p.grad is not None for p in d.student.parameters())
        and d.student[4].weight.grad.abs().max() == 0
    )


def test_pairs_are_compared_as_asked():
    student, teacher = mlp(6), mlp(16, 1)
    x, y = batch()
    d = Distiller(
        student, teacher, Recipe(hint(layers={'2': ['0', '2'], '0': '2'}), task=0.0), example=x
    )
    assert [(p.student, p.teacher) for p in d.pairs] == [('2', '0'), ('2', '2'), ('0', '2')]
    s, t = {'0': student[:1](x), '2': student[:3](x)}, {'0': teacher[:1](x), '2': teacher[:3](x)}
    want = sum(
        F.mse_loss(k.projector(s[k.layers[0]], t[k.layers[1]]), t[k.layers[1]])
        for k in d.links['hint']
    )
    assert d(x, y).total.item() == pytest.approx(want.item(), rel=1e-5)


def test_inputs_come_alone_as_tuple_or_by_name():
    class Two(nn.Module):
        def __init__(self, h):
            super().__init__()
            self.net = mlp(h)

        def forward(self, a, b):
            return dict(logits=self.net(torch.cat([a, b], 1)))

    x, y = batch()
    student, teacher = mlp(6), mlp(16, 1)
    want = Distiller(student, teacher, kd())(x, y).total.item()
    s, t = Two(6), Two(16)
    s.net, t.net = student, teacher
    a, b = x[:, :3], x[:, 3:]
    assert Distiller(s, t, kd())((a, b), y).total.item() == pytest.approx(want)
    assert Distiller(s, t, kd())(dict(b=b, a=a), y).total.item() == pytest.approx(want)
    recipe = kd() + Term(losses.hint, layers={'net.2': 'net.2'})
    for inputs in ((a, b), dict(b=b, a=a)):
        assert Distiller(s, t, recipe)(inputs, y).parts['hint'] > 0


def test_an_ensembles_and_a_functions_layers_can_be_learnt_from():
    x, y = batch()
    a, b = mlp(16, 1), mlp(12, 2)
    d = Distiller(mlp(6), [a, b], kd() + hint(layers={'2': ['0.2', '1.0']}), example=x)
    assert [p.t_shape for p in d.pairs] == [(16, 16), (16, 12)] and d(x, y).parts['hint'] > 0
    tell = lambda x: Outputs(a(x), {'middle': a[:3](x)})
    d = Distiller(mlp(6), tell, kd() + hint(layers={'2': 'middle'}), example=x)
    assert d(x, y).parts['hint'] > 0


# shares of the gradient


def length(v, *places):
    "Of the gradient of `v` at all these places together"
    grads = [
        g
        for g in torch.autograd.grad(v, places, retain_graph=True, allow_unused=True)
        if g is not None
    ]
    return torch.cat([g.flatten() for g in grads]).norm().item()


def test_a_share_is_the_length_of_the_gradient_at_the_logits_beside_all_that_has_a_weight():
    student, teacher = mlp(6), mlp(16, 1)
    x, y = batch()
    d = Distiller(
        student,
        teacher,
        Recipe(
            Term(losses.kl, T=2.0, grad_ratio=3.0),
            Term(losses.mse, 0.5),
            Term(losses.dist, grad_ratio=0.1),
            task=0.7,
        ),
    )
    out, s, t = d(x, y), student(x), teacher(x)
    whole = 1 + 3 + 0.1  # the weights are divided by it, so that steps stay as long as before
    base = length(0.7 * F.cross_entropy(s, y) + 0.5 * losses.mse(s, t), s) / whole
    kl, dist = out.weights['kl'], out.weights['dist']
    assert kl.item() * length(losses.kl(s, t, T=2.0), s) == pytest.approx(3 * base, rel=1e-4)
    assert dist.item() * length(losses.dist(s, t), s) == pytest.approx(0.1 * base, rel=1e-4)
    want = (
        0.7 / whole * F.cross_entropy(s, y)
        + 0.5 / whole * losses.mse(s, t)
        + kl * losses.kl(s, t, T=2.0)
        + dist * losses.dist(s, t)
    )
    assert out.total.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize('layer', ['2', '2@pre'])
def test_a_share_of_a_term_between_layers_is_measured_at_the_layer(layer):
    student, teacher = mlp(6), mlp(16, 1)
    x, y = batch()
    d = Distiller(
        student,
        teacher,
        kd()
        + Term(
            losses.hint,
            grad_ratio=('linear', 0.4, 0.2),
            layers={layer: '2', '3': '3'},
            projector='linear',
        ),
        example=x,
    )
    out = d(x, y, progress=0.5)
    f = student[:3](x)
    h = student[3](f)
    s, links, g = student[4](h), d.links['hint'], teacher[:3](x)
    hint = losses.hint(links[0].projector(f, g), g) + losses.hint(
        links[1].projector(h, teacher[3](g)), teacher[3](g)
    )
    base = 0.1 * F.cross_entropy(s, y) + 0.9 * losses.kl(s, teacher(x), T=4.0)
    assert out.weights['hint'].item() * length(hint, f, h) == pytest.approx(
        0.3 / 1.3 * length(base, f, h), rel=1e-4
    )
    assert set(d.gradient_shares) == {'task', 'kd'}  # of those that reach the logits


def test_tokens_and_pooled_maps_are_measured_where_they_come_from():
    net = lambda c, seed: (
        torch.manual_seed(seed),
        nn.Sequential(
            nn.Conv2d(3, c, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)
        ),
    )[1]
    student, teacher = net(5, 0), net(5, 1)
    x, y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), batch(6)[1]
    d = Distiller(
        student,
        teacher,
        recipes.hint({'1@mean': '1@mean'}, grad_ratio=0.5, projector='linear')
        + recipes.at({'1': '1'}, grad_ratio=0.25),
        example=x,
    )
    out = d(x, y)
    f, g = student[:2](x), teacher[:2](x)
    task = F.cross_entropy(student[2:](f), y)
    hint = losses.hint(d.links['hint'][0].projector(f.mean((2, 3)), g.mean((2, 3))), g.mean((2, 3)))
    assert out.weights['hint'].item() * length(hint, f) == pytest.approx(
        0.5 / 1.75 * length(task, f), rel=1e-4
    )
    assert out.weights['at'].item() * length(losses.at(f, g), f) == pytest.approx(
        0.25 / 1.75 * length(task, f), rel=1e-4
    )


def test_the_lengths_are_running_means_over_batches():
    student, teacher = mlp(6), mlp(16, 1)
    d = Distiller(student, teacher, recipes.ttm(grad_ratio=2.0))
    norms = []
    for i in range(100):
        x, y = batch(seed=i)
        s = student(x)
        norms.append((length(F.cross_entropy(s, y), s), length(losses.ttm(s, teacher(x)), s)))
        w = d(x, y).weights['ttm'].item()
        if i < 5:
            assert w == pytest.approx(
                2 / 3 * sum(a for a, _ in norms) / sum(b for _, b in norms), rel=1e-4
            )
    measured = [i for i in range(100) if i < 31 or i < 63 and i % 2 or i % 4 == 3]
    a, b = zip(*[norms[i] for i in measured])
    mean = lambda v: functools.reduce(
        lambda m, iv: m + (iv[1] - m) * max(1 / (iv[0] + 1), 0.2), enumerate(v), 0.0
    )
    assert w == pytest.approx(2 / 3 * mean(a) / mean(b), rel=1e-4)


def test_a_share_of_zero_changes_nothing():
    runs = []
    for recipe in (
        Recipe(Term(losses.mse, 0.0)),
        recipes.dist(grad_ratio=0.0),
        recipes.hint({'2': '2'}, grad_ratio=0.0, projector='linear'),
    ):
        student, (x, y) = mlp(6), batch()
        Distiller(student, mlp(16, 1), recipe, example=x)(x, y).total.backward()
        runs.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for r in runs[1:] for a, b in zip(runs[0], r))


def test_a_teacher_that_the_student_equals_makes_no_step_longer_than_asked():
    student, (x, y) = mlp(6), batch()
    d = Distiller(student, copy.deepcopy(student), recipes.ttm(T=1.0, grad_ratio=1.0))
    for _ in range(2):  # at first the term's gradient is rounding errors
        s = student(x)
        total = d.compute(Outputs(s), d.teacher_outputs(x), F.cross_entropy(s, y), (y,)).total
        assert length(total, s) < 1.01 * length(F.cross_entropy(s, y), s)


def weight_after(values, grad_ratio=1.0):
    "The weight of a term with a share, whose loss is (scale of its gradient) x mean squared difference, after such batches"
    scale, y = [1.0], torch.zeros(16, dtype=torch.long)
    student, teacher = torch.zeros(16, 4, requires_grad=True), torch.ones(16, 4)
    d = Distiller(
        None,
        None,
        Term(lambda s, t: scale[0] * losses.mse(s, t), grad_ratio=grad_ratio, name='term'),
        check=False,
    )
    for scale[0] in values:
        out = d.compute(Outputs(student), Outputs(teacher), F.cross_entropy(student, y), (y,))
    return out.weights['term'].item()


def test_an_overflow_does_not_spoil_the_means():
    assert weight_after([1.0, torch.inf, torch.nan, 1.0]) == pytest.approx(weight_after([1.0]))


def longest_gradients(n, seed, **options):
    "The longest gradients of the total and the task loss in 150 batches of n samples, and the trained weights"
    torch.manual_seed(seed)
    student, teacher = mlp(8, seed), mlp(32, seed + 9)
    d = Distiller(student, teacher, recipes.dist(grad_ratio=3.0, **options), check=False)
    opt, longest = torch.optim.SGD(student.parameters(), 0.02), dict(total=0.0, task=0.0)
    for i in range(150):
        loss = d(*batch(n, seed=1000 * seed + i))
        for k in longest:
            grads = torch.autograd.grad(
                getattr(loss, k), [*student.parameters()], retain_graph=True
            )
            longest[k] = max(longest[k], torch.cat([g.flatten() for g in grads]).norm().item())
        opt.zero_grad()
        loss.total.backward()
        opt.step()
    return longest, [p.detach() for p in student.parameters()]


@pytest.mark.parametrize('seed', range(3))
def test_a_batch_of_three_does_not_explode_between_two_measurements(seed):
    """The correlation over few samples has an enormous gradient if their probabilities are nearly
    equal, although its value stays the same."""
    longest, _ = longest_gradients(3, seed)
    assert longest['total'] < 0.75 * longest['task'], longest  # 0.85 to 1.2 if not each is measured


@pytest.mark.parametrize('seed', range(3))
def test_batches_of_two_train_as_without_the_correlation_over_two_samples(seed):
    "It is always 1 or -1, so all of its gradient would be noise"
    torch.testing.assert_close(
        longest_gradients(2, seed), longest_gradients(2, seed, gamma=0.0), rtol=0, atol=0
    )


def a_copy_that_drifts(grad_ratio=3.0, recipe=None, n=60, drift=0.02, still=20, size=16):
    """The strongest gradient of the term beside the labels' mean one, of a student that stays a copy of its teacher for some batches (no optimizer step) and then moves
    away from it step by step"""
    teacher = mlp(16, 1)
    with torch.no_grad():
        for p in teacher[4].parameters():
            p *= 20  # as sure as a trained one
    student = copy.deepcopy(teacher)
    d = Distiller(
        student, teacher, recipe or recipes.dist(T=4.0, beta=2, gamma=2, grad_ratio=grad_ratio)
    )
    labels, terms = [], []
    torch.manual_seed(0)
    away = [torch.randn_like(p) for p in student.parameters()]
    for i in range(n):
        x, y = batch(size, seed=i)
        if i >= still:
            with torch.no_grad():
                for p, v in zip(student.parameters(), away):
                    p += drift * v
        s = student(x)
        task = F.cross_entropy(s, y)
        out = d.compute(Outputs(s), d.teacher_outputs(x), task, (y,))
        own, total = [torch.autograd.grad(v, s, retain_graph=True)[0] for v in (task, out.total)]
        labels.append(own.norm().item())
        terms.append((total - out.weights['task'] * own).norm().item())
    return max(terms) / (out.weights['task'] * sum(labels) / n)


@pytest.mark.parametrize('size', [16, 1], ids=['batches', 'single items'])
@pytest.mark.parametrize('drift', [0.001, 0.02, 0.2])
def test_a_student_that_leaves_its_teacher_between_two_measurements_is_not_thrown_back(drift, size):
    # the gradients of single items differ more
    assert a_copy_that_drifts(drift=drift, size=size) < 3 * (20 if size > 1 else 50)


@pytest.mark.parametrize(
    'loss', [losses.kl, losses.mse, losses.sp, losses.soft_ce], ids=lambda f: f.__name__
)
def test_that_holds_for_other_losses_too(loss):
    assert a_copy_that_drifts(recipe=Term(loss, grad_ratio=3.0)) < 3 * 20


def close_student(seed, shape=(1, 1)):
    "Outputs of a student that nearly equals its teacher, those of the teacher, and labels"
    torch.manual_seed(seed)
    t = torch.randn(shape)
    return (t + 1e-4).requires_grad_(), t, torch.randn(shape)


def weights_on(d, items):
    "The weight of the term after each batch"
    return [
        d.compute(Outputs(s), Outputs(t), F.mse_loss(s, y), (y,)).weights['mse'].item()
        for s, t, y in items
    ]


def of_numbers():
    "A Distiller of a regression"
    return Distiller(
        None,
        None,
        Term(losses.mse, grad_ratio=3.0),
        kind='regression',
        task_loss=F.mse_loss,
        check=False,
    )


@pytest.mark.parametrize('growth, divisor', [(2.25, 1), (4, 1), (100, 25)])
def test_a_value_that_grew_since_the_last_measurement_has_a_smaller_weight(growth, divisor):
    "More than four times its mean: the gradient is taken to have grown with it. Batch 33 is the first one that is not measured"
    torch.manual_seed(0)
    t, y, apart = torch.randn(3, 16, 1)
    d, s = of_numbers(), lambda scale: (t + scale * apart).requires_grad_()
    *_, before = weights_on(d, [(s(1.0), t, y)] * 32)
    assert before > 0
    assert weights_on(d, [(s(growth**0.5), t, y)]) == [pytest.approx(before / divisor, rel=1e-4)]


def test_single_numbers_are_compared_with_those_of_the_sample_before():
    "A batch of one sample and one column holds nothing else to compare with"
    items = [close_student(i) for i in range(20)]
    weight = weights_on(of_numbers(), items)[-1]
    before = [items[0], *items]
    apart = [2 * (s - b[1]).abs().item() for (s, _, _), b in zip(items, before)]
    base = [2 * (s - y).abs().item() for s, _, y in items]
    assert weight == pytest.approx(3 / 4 * sum(base) / (0.7 * sum(apart)), rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_single_numbers_continue_from_a_checkpoint_with_the_sample_before(dtype):
    items = [[2000 + o.to(dtype) for o in close_student(i)] for i in range(12)]
    whole, again = of_numbers(), of_numbers()
    weights_on(whole, items[:5])
    again.load_state_dict(whole.state_dict())
    assert weights_on(again, items[5:]) == weights_on(whole, items[5:])


@pytest.mark.parametrize('shape', [(1, 2, 4, 4), (1, 6, 3), (4, 1), (1, 5)], ids=str)
def test_a_student_that_equals_its_teacher_gets_no_large_weight_whatever_the_shape(shape):
    items = [close_student(i, shape) for i in range(3)]
    weight = weights_on(of_numbers(), items)[-1]
    s, t, y = items[-1]
    assert weight * length(losses.mse(s, t), s) < 0.01 * length(F.mse_loss(s, y), s)


def weight_of_kl(items):
    "The weight of a term on logits (..., 5) after the last of (student's logits, teacher's logits, labels)"
    d = Distiller(None, None, Term(losses.kl, T=1.0, grad_ratio=3.0), axis=-1, check=False)
    for s, t, y in items:
        task = F.cross_entropy(s.flatten(0, -2), y.flatten())
        weight = d.compute(Outputs(s), Outputs(t), task, (y,)).weights['kl']
    return weight.item()


@pytest.mark.parametrize('shape', [(1,), (3,), (1, 16), (2, 16), (1, 4, 3)], ids=str)
def test_hidden_states_get_the_weight_of_the_logits_computed_from_them(shape):
    torch.manual_seed(0)
    w = torch.randn(5, 4)
    hidden, y = torch.randn(3, *shape, 4), torch.randint(5, (3, *shape))
    logits = hidden @ w.T
    s = (0.9 * logits).requires_grad_()  # so close that different samples decide
    got = weight_of_kl(zip(s, (LinearLogits(h, w) for h in hidden), y))
    assert got == pytest.approx(weight_of_kl(zip(s, logits, y)), rel=1e-4)


@pytest.mark.parametrize('shape', [(1,), (3,), (1, 16), (2, 16)], ids=str)
def test_draws_get_the_weight_of_the_probabilities_that_they_are(shape):
    "Two classes of half a chance. A single sample is compared with the same draws of the next classes"
    torch.manual_seed(0)
    ids = torch.rand(*shape, 5).argsort(-1)[..., :2]
    draws = Draws(ids, torch.full(ids.shape, 0.5), torch.full(shape, math.log(2)), 5)
    logits = torch.full((*shape, 5), -30.0).scatter(-1, ids, 0.0)
    s, y = (0.1 * logits).requires_grad_(), torch.randint(5, shape)
    assert weight_of_kl([(s, draws, y)]) == pytest.approx(weight_of_kl([(s, logits, y)]), rel=1e-4)


def test_a_class_that_is_excluded_for_one_sample_does_not_spoil_the_measurement():
    s, t, y = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([1, 2])
    s[0, 3] = t[0, 3] = -torch.inf
    s.requires_grad_()
    d = Distiller(None, None, Term(losses.kl, T=1.0, grad_ratio=3.0), check=False)
    weight = d.compute(Outputs(s), Outputs(t), F.cross_entropy(s, y), (y,)).weights['kl'].item()
    base = length(F.cross_entropy(s, y), s)
    assert weight * length(losses.kl(s, t, T=1.0), s) == pytest.approx(3 / 4 * base, rel=1e-3)


def test_a_gradient_of_rounding_errors_decides_nothing():
    "A copy of the teacher: what is left of the gradient has no direction, and the labels must decide where the student goes"
    teacher = mlp(16, 1)
    student, (x, y) = copy.deepcopy(teacher), batch()
    d, s = (
        Distiller(student, teacher, recipes.dist(T=4.0, beta=2, gamma=2, grad_ratio=3.0)),
        student(x),
    )
    task = F.cross_entropy(s, y)
    out = d.compute(Outputs(s), d.teacher_outputs(x), task, (y,))
    own, total = [torch.autograd.grad(v, s, retain_graph=True)[0] for v in (task, out.total)]
    assert (total - own / 4).norm() < 0.01 * own.norm()


def test_frozen_layers_that_are_unfrozen_are_measured_at_once():
    student = mlp(6)
    for p in student[:4].parameters():
        p.requires_grad_(False)
    d = Distiller(
        student,
        mlp(16, 1),
        Recipe(Term(losses.hint, grad_ratio=0.5, layers={'2': '2'}, projector='linear')),
        example=batch()[0],
    )
    for i in range(40):
        d(*batch(seed=i))
    for p in student.parameters():
        p.requires_grad_(True)
    x, y = batch()
    f = student[:3](x)
    term = losses.hint(
        d.links['hint'][0].projector(f, None), d.teacher.outputs((x,), layers=['2']).feats['2']
    )
    weight = d(x, y).weights['hint'].item()
    assert weight * length(term, f) == pytest.approx(
        0.5 / 1.5 * length(F.cross_entropy(student[3:](f), y), f), rel=1e-4
    )


@pytest.mark.parametrize('term', [losses.hint, losses.at], ids=['projector', 'none'])
def test_layers_that_are_frozen_again_leave_the_task_loss_its_weight(term):
    "With hint, the projector still learns; with at, nothing of the term does"
    student, teacher, (x, y) = conv_net(4), conv_net(16), (torch.randn(8, 3, 8, 8), torch.arange(8))
    recipe = Recipe(Term(term, grad_ratio=3.0, layers={'1': '1'}))
    d = Distiller(student, teacher, recipe, example=x)
    assert d(x, y).weights['task'] == 1 / 4
    student[0].requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():  # as in validation
            d(x, y)
        d(x, y).total.backward()
        got = [p.grad.clone() for p in student[-1].parameters()]
        student.zero_grad()
        F.cross_entropy(student(x), y).backward()
        assert all(map(torch.equal, got, [p.grad for p in student[-1].parameters()]))
        student.zero_grad()
    student[0].requires_grad_(True)
    out, new = d(x, y), Distiller(student, teacher, recipe, example=x)
    new.links.load_state_dict(d.links.state_dict())
    for k, w in new(x, y).weights.items():
        assert float(out.weights[k]) == pytest.approx(float(w), rel=1e-5)


def conv_net(c):
    layers = nn.Conv2d(3, c, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 8)
    return nn.Sequential(*layers)


def test_layers_of_which_more_are_unfrozen_are_measured_anew():
    "With one of two layers frozen, the gradient at the other alone was measured"
    student = mlp(6)
    for p in student[:2].parameters():
        p.requires_grad_(False)
    recipe = Recipe(
        Term(losses.hint, grad_ratio=0.5, layers={'1': '1', '3': '3'}, projector='linear')
    )
    d = Distiller(student, mlp(16, 1), recipe, example=batch()[0])
    for i in range(40):
        d(*batch(seed=i))
    for p in student.parameters():
        p.requires_grad_(True)
    x, y = batch()
    f = student[:2](x)
    h = student[2:4](f)
    t = d.teacher.outputs((x,), layers=['1', '3']).feats
    term = sum(
        losses.hint(k.projector(a, None), t[n]) for k, a, n in zip(d.links['hint'], (f, h), '13')
    )
    weight = d(x, y).weights['hint'].item()
    assert weight * length(term, f, h) == pytest.approx(
        0.5 / 1.5 * length(F.cross_entropy(student[4:](h), y), f, h), rel=1e-4
    )


def test_a_measurement_does_not_run_projectors_again():
    "Their batch-norms would count a batch twice"
    x, y = batch(16)[0].reshape(16, 2, 2, 2), batch(16)[1]
    net = lambda c, seed: (
        torch.manual_seed(seed),
        nn.Sequential(nn.Conv2d(2, c, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * c, 4)),
    )[1]
    d = Distiller(
        net(4, 0),
        net(6, 1),
        Term(losses.hint, grad_ratio=0.5, layers={'1': '1'}, projector='conv_bn'),
        example=x,
    )
    for _ in range(3):
        d(x, y)
    counted = [
        v.item() for k, v in d.links.state_dict().items() if k.endswith('num_batches_tracked')
    ]
    assert counted == [3]


def test_without_labels_a_share_keeps_what_was_measured_before():
    x, y = batch()
    recipe = Recipe(
        recipes.dist(grad_ratio=0.5),
        Term(losses.mse, lambda p: float(p < 0.5)),
        task=lambda p: float(p < 0.5),
    )
    d = Distiller(mlp(6), mlp(16, 1), recipe)
    with pytest.raises(
        DistillError,
        match='grad_ratio= of dist is relative to the task loss and the terms with a weight, and this batch has neither',
    ):
        d(x, progress=0.9)
    w = d(x, y, progress=0.0).weights['dist'].item()
    out = d(x, progress=0.9)
    assert out.weights['dist'].item() == w and out.total.item() == pytest.approx(
        w * out.parts['dist'].item()
    )


def test_a_share_where_the_labels_do_not_reach_is_refused():
    x, y = batch()
    d = Distiller(
        Heads(6, lambda a, b: (a, b)),
        mlp(16, 1),
        recipes.ttm(grad_ratio=1.0),
        output=0,
        task_loss=lambda s, y: F.cross_entropy(d.student.b(x), y),
    )
    with pytest.raises(
        DistillError, match='does not depend on what ttm compares.*weight= instead of grad_ratio='
    ):
        d(x, y)


@pytest.mark.parametrize('frozen', [4, 5], ids=['some layers', 'the whole student'])
def test_a_share_at_frozen_layers_trains_the_projector_alone(frozen):
    student = mlp(6)
    for p in student[:frozen].parameters():
        p.requires_grad_(False)
    d = Distiller(
        student,
        mlp(16, 1),
        kd() + Term(losses.hint, grad_ratio=0.5, layers={'2': '2'}, projector='linear'),
        example=batch()[0],
    )
    out = d(*batch())
    out.total.backward()
    assert out.weights['hint'] == 0.5 and all(p.grad is not None for p in d.own_parameters())


FACTORED = {
    'automatic': None,
    'kd': kd(),
    'gradient ratio': Term(losses.kl, grad_ratio=1.0),
    'fading': Term(losses.kl, grad_ratio=1.0, fade=0.2),
    'dist': recipes.dist(grad_ratio=1.0),
}


@pytest.mark.parametrize('recipe', FACTORED.values(), ids=FACTORED)
def test_a_student_that_returns_factored_logits_is_trained_as_one_that_returns_logits(recipe):
    class Factored(nn.Module):
        def __init__(self, factored):
            super().__init__()
            self.body, self.head, self.factored = nn.Linear(8, 5), nn.Linear(5, 4), factored

        def forward(self, x):
            h = self.body(x)
            whole = LinearLogits(h, self.head.weight, self.head.bias)
            return Outputs(whole if self.factored else self.head(h))

    ends = []
    for factored in (True, False):
        torch.manual_seed(0)
        d = Distiller(Factored(factored), mlp(16), recipe, check=False)
        out = d(*batch())
        out.total.backward()
        ends.append([out.total.detach(), *[p.grad for p in d.parameters()]])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b)


# checkpoints


def parts_of_training(recipe, example=None, seed=0):
    "A student with dropout, its Distiller and an optimizer; other weights for each seed"
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4))
    teacher = mlp(16, 1)
    with torch.no_grad():
        teacher[4].weight *= 20  # so that its batches ask for different temperatures
    d = Distiller(student, teacher, recipe, example=example)
    return d, torch.optim.Adam(d.parameters(), 0.01)


def run(d, opt, steps):
    for i in steps:
        x, y = batch(seed=i)
        torch.manual_seed(i)
        opt.zero_grad()
        out = d(x, y, progress=i / 60)
        out.total.backward()
        opt.step()
    return out


RESUMED = dict(
    automatic=None,
    kd=kd(),
    logits=Recipe(recipes.dist(grad_ratio=3.0), kd(T=('linear', 8, 1), alpha=0.5)),
    layers=Term(losses.hint, grad_ratio=0.5, layers={'1': '1'}, projector='mlp'),
)


@pytest.mark.parametrize('steps', [3, 20, 45])
@pytest.mark.parametrize('recipe', RESUMED.values(), ids=RESUMED)
def test_a_loop_that_was_interrupted_ends_as_one_that_was_not(tmp_path, recipe, steps):
    example = batch()[0] if isinstance(recipe, Term) else None
    whole = parts_of_training(recipe, example)
    run(*whole, range(steps))
    torch.save(
        dict(distiller=whole[0].state_dict(), opt=whole[1].state_dict()), tmp_path / 'checkpoint.pt'
    )
    end = run(*whole, range(steps, 60))
    again = parts_of_training(recipe, example, seed=5)
    state = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    again[0].load_state_dict(state['distiller'])
    again[1].load_state_dict(state['opt'])
    out = run(*again, range(steps, 60))
    assert {k: float(v) for k, v in out.weights.items()} == {
        k: float(v) for k, v in end.weights.items()
    }
    assert all(map(torch.equal, again[0].parameters(), whole[0].parameters()))


def noisy(x):
    "A function that uses all random generators"
    noise = random.random() + np.random.rand() + torch.randn(len(x), 4)
    return mlp(16, 1)(x) + noise


def hooked(model):
    "A model of known layers with a hook that uses all random generators"
    model.register_forward_hook(lambda m, x, y: y + random.random() + np.random.rand())
    return model


DRAWING = dict(
    sample=lambda: Teacher([mlp(16, 1), mlp(16, 2)], ensemble=dict(combine='sample')),
    dropout=lambda: Teacher(
        nn.Sequential(nn.Dropout(0.5), mlp(16, 1)), run=dict(mode='train', device='cpu')
    ),
    function=lambda: Teacher(noisy),
    layer=lambda: Teacher(Lambda(noisy)),
    hook=lambda: Teacher(hooked(mlp(16, 1))),
)


@pytest.mark.parametrize('started', [False, True])
@pytest.mark.parametrize('teacher', DRAWING.values(), ids=DRAWING)
def test_a_teacher_that_draws_continues_with_its_random_numbers(tmp_path, teacher, started):
    def begin(seed):
        torch.manual_seed(seed)
        student = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 4))
        d = Distiller(student, teacher(), kd(), check=False)
        return d, torch.optim.Adam(d.parameters(), 0.01)

    open_ = lambda d: d.teacher if started else nullcontext()
    whole = begin(0)
    random.seed(3), np.random.seed(3)
    with open_(whole[0]):
        run(*whole, range(4))
        state = dict(distiller=whole[0].state_dict(), opt=whole[1].state_dict())
        torch.save(state, tmp_path / 'checkpoint.pt')
        run(*whole, range(4, 9))
    again = begin(5)
    random.seed(4), np.random.seed(4)
    state = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    again[0].load_state_dict(state['distiller'])
    again[1].load_state_dict(state['opt'])
    with open_(again[0]):
        run(*again, range(4, 9))
    assert all(map(torch.equal, again[0].parameters(), whole[0].parameters()))


@pytest.mark.parametrize('teacher', DRAWING.values(), ids=DRAWING)
def test_a_checkpoint_after_validation_continues_as_if_there_had_been_none(teacher):
    "A batch of validation, after the `with` of an epoch, leaves a random state behind"

    def begin():
        d = Distiller(mlp(6), teacher(), kd(), check=False)
        return d, torch.optim.Adam(d.parameters(), 0.01)

    def epoch(d, opt):
        with d.teacher:
            run(d, opt, range(3))
        with torch.no_grad():
            d(*batch(seed=9))

    whole = begin()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    epoch(*whole)
    state = copy.deepcopy([o.state_dict() for o in whole])
    outside = random.getstate(), np.random.get_state(), torch.get_rng_state()
    epoch(*whole)
    again = begin()
    for o, s in zip(again, state):
        o.load_state_dict(s)
    random.setstate(outside[0]), np.random.set_state(outside[1]), torch.set_rng_state(outside[2])
    epoch(*again)
    assert all(map(torch.equal, again[0].parameters(), whole[0].parameters()))


def test_a_loaded_random_state_is_used_once():
    "The next `with` begins with new random numbers, as it does without a checkpoint"
    x, teacher = batch()[0], DRAWING['dropout']()
    d = Distiller(mlp(6), teacher, kd(), check=False)
    with teacher:
        teacher(x)
        state = d.state_dict()
        second = teacher(x).logits
    assert not teacher.runner.random.state_dict()
    d.load_state_dict(state)
    with teacher:
        assert torch.equal(teacher(x).logits, second)
    torch.manual_seed(1)
    with teacher:
        third = teacher(x).logits
    torch.manual_seed(1)
    with teacher:
        assert torch.equal(teacher(x).logits, third)


def test_the_state_of_a_teacher_without_random_numbers_holds_none():
    d = Distiller(mlp(6), mlp(16), kd(), check=False)
    with d.teacher:
        d(*batch())
        assert not d.teacher.runner.random.state_dict()
    assert len(d.get_extra_state()) < 200


def test_the_chosen_recipe_continues_and_is_not_chosen_again(capsys):
    whole = parts_of_training(None)
    run(*whole, range(20))
    again = parts_of_training(None)
    again[0].load_state_dict(whole[0].state_dict())
    capsys.readouterr()
    run(*again, range(20, 22))
    assert 'recipe' not in capsys.readouterr().out


def test_a_checkpoint_holds_only_tensors():
    "So that it can be stored wherever weights can, as in safetensors"
    whole = parts_of_training(None)
    run(*whole, range(2))
    assert all(isinstance(v, torch.Tensor) for v in whole[0].state_dict().values())


# warnings


def test_the_second_training_in_a_process_is_warned_as_the_first_one():
    "Python itself shows a warning of one place and text once in a process only"
    code = """
import torch
from torch import nn
from fastdistill import Distiller, Term, losses
torch.manual_seed(0)
net,x,y = lambda: nn.Linear(8, 4),torch.randn(16, 8),torch.randint(4, (16,))
for _ in range(2):
    torch.manual_seed(1)
    Distiller(net(), net(), Term(losses.mse, 1e6))(x, y)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stderr.count('of the gradient of the first batch') == 2
    hidden = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True
    )
    assert 'of the gradient of the first batch' not in hidden.stderr


# other classes than the teacher's


def test_a_subset_or_a_superset_of_the_teachers_classes_is_refused_with_what_to_do():
    x, y = batch()
    more, fewer = (
        nn.Sequential(mlp(16, 1), nn.Linear(4, 6)),
        nn.Sequential(mlp(16, 1), nn.Linear(4, 3)),
    )
    with pytest.raises(
        DistillError,
        match=r"has shape \(16, 4\), the teacher's \(16, 6\).*has more classes, Teacher\(teacher, select=",
    ):
        Distiller(mlp(6), more, kd())(x, y)
    assert Distiller(mlp(6), Teacher(more, select=[5, 0, 1, 2]), kd())(x, y).total > 0
    ids = [0, 3, 1]
    with pytest.raises(
        DistillError,
        match=r'has fewer, write a loss that compares only those.*losses.kl\(s\[:, ids\], t\)',
    ):
        Distiller(mlp(6), fewer, kd())(x, y)
    assert (
        Distiller(mlp(6), fewer, Term(lambda s, t: losses.kl(s[:, ids], t), name='kl'))(x, y).total
        > 0
    )


# several outputs


class Heads(nn.Module):
    def __init__(self, hidden, give):
        super().__init__()
        self.a, self.b, self.give = mlp(hidden), mlp(hidden, 5), give

    def forward(self, x):
        return self.give(self.a(x), self.b(x))


def test_the_students_output_can_be_named_and_that_of_a_bare_teacher_with_it():
    x, y = batch()
    for give, output in (
        (lambda a, b: (a, b), 1),
        (lambda a, b: dict(a=a, b=b), 'b'),
        (lambda a, b: [[a, b]], lambda o: o[0][1]),
    ):
        s, t = Heads(6, give), Heads(16, give)
        assert Distiller(s, t, kd(), output=output)(x, y).total.item() == pytest.approx(
            Distiller(s.b, t.b, kd())(x, y).total.item()
        )
        got = Distiller(
            s, Teacher(t.a), kd() + hint(layers={'b.2': '2'}), output=output, example=x
        )(x, y)  # its own affair in a Teacher
        assert (
            got.parts['kd'].item() == pytest.approx(losses.kl(s.b(x), t.a(x), T=4.0).item())
            and got.parts['hint'] > 0
        )
    with pytest.raises(DistillError, match="output='b', but the model returned one tensor"):
        Distiller(mlp(6), t.a, kd(), output='b')(x, y)
    with pytest.raises(DistillError, match='output=1.5: must be the name or the index'):
        Distiller(s, t, kd(), output=1.5)


def test_a_student_with_several_outputs_says_once_which_is_taken():
    x, y = batch()
    d = Distiller(Heads(6, lambda a, b: (a, b)), mlp(16, 1), kd())
    with pytest.warns(
        DistillWarning,
        match=r'The student returns several tensors.*: 0 \(16, 4\), 1 \(16, 4\). The first is used',
    ):
        total = d(x, y).total.item()
    assert (
        total
        == d(x, y).total.item()
        == pytest.approx(Distiller(d.student.a, mlp(16, 1), kd())(x, y).total.item())
    )


# batches that are dicts


class OneDict(nn.Module):
    "Takes the whole batch as one argument, as fastai passes it"

    def __init__(self, hidden):
        super().__init__()
        self.net = mlp(hidden)

    def forward(self, batch):
        return self.net(batch['a'])


class ByName(OneDict):
    def forward(self, a, scale=1.0):
        return self.net(a) * scale


class AnyName(OneDict):
    "A wrapper around a model with named arguments"

    def forward(self, *args, **kwargs):
        return self.net(kwargs['a'])


def function(hidden):
    net = mlp(hidden)
    return lambda batch: net(batch['a'])


@pytest.mark.parametrize('student', [OneDict, ByName, AnyName])
@pytest.mark.parametrize('teacher', [OneDict, ByName, AnyName, function])
def test_a_batch_that_is_a_dict_goes_in_as_each_model_takes_it(student, teacher):
    x, y = batch()
    want = Distiller(mlp(6), mlp(16), kd())(x, y).total.item()
    s, t = student(6), teacher(16)
    assert Distiller(s, t, kd())({'a': x}, y).total.item() == pytest.approx(want)
    if not isinstance(t, nn.Module):
        return
    d = Distiller(nn.DataParallel(s), t, kd() + hint(layers={'net.2': 'net.2'}), example={'a': x})
    assert d({'a': x}, y).parts['hint'] > 0 and [(p.s_shape, p.t_shape) for p in d.pairs] == [
        ((16, 6), (16, 16))
    ]
    assert {l.name: l.shape for l in layers(s, {'a': x})}['net.2'] == (16, 6)


# gradient shares


def deep(h, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, h),
        nn.BatchNorm1d(h),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(h, h),
        nn.ReLU(),
        nn.Linear(h, 4),
    )


def test_gradient_shares_are_measured_at_the_logits_where_all_parts_reach_them():
    d, (x, y) = Distiller(mlp(6), mlp(16, 1), kd(2.0, 0.5) + Term(losses.mse, 0.01)), batch()
    assert d.gradient_shares is None
    d(x, y)
    s = d.student(x).detach().requires_grad_()
    t = d.teacher(x).logits
    parts = dict(
        task=0.5 * F.cross_entropy(s, y),
        kd=0.5 * losses.kl(s, t, T=2.0),
        mse=0.01 * losses.mse(s, t),
    )
    norms = {k: torch.autograd.grad(v, s)[0].norm().item() for k, v in parts.items()}
    assert d.gradient_shares == pytest.approx(
        {k: n / sum(norms.values()) for k, n in norms.items()}, rel=1e-4
    )


def test_gradient_shares_with_layers_are_measured_at_the_last_layer_that_all_reach():
    student, (x, y) = mlp(6), batch()
    d = Distiller(student, mlp(16, 1), kd(2.0, 0.5) + hint(0.3), example=x)
    d(x, y)
    s, f, t = student(x), student[:3](x), d.teacher.outputs((x,), layers=['2'])
    parts = dict(
        task=0.5 * F.cross_entropy(s, y),
        kd=0.5 * losses.kl(s, t.logits, T=2.0),
        hint=0.3 * losses.hint(d.links['hint'][0].projector(f, None), t.feats['2']),
    )
    norms = {
        k: torch.autograd.grad(v, student[2].weight, retain_graph=True)[0].norm().item()
        for k, v in parts.items()
    }
    assert d.gradient_shares == pytest.approx(
        {k: n / sum(norms.values()) for k, n in norms.items()}, rel=1e-4
    )


def test_half_precision_does_not_round_gradients_to_0():
    "The mean over many positions makes each one's gradient smaller than the smallest number of half precision"
    s, t = [torch.randn(2, 4, 128, 256) for _ in range(2)]
    y = torch.randint(4, (2, 128, 256))
    shares = []
    for dtype in (torch.float32, torch.float16):
        d, logits = Distiller(None, None, kd(2.0, 0.5)), s.to(dtype).requires_grad_()
        d.compute(Outputs(logits), Outputs(t), F.cross_entropy(logits.float(), y), (y,))
        shares.append(d.gradient_shares)
    assert shares[1] == pytest.approx(shares[0], rel=0.01)


@pytest.mark.parametrize('checkpointed', [False, True])
def test_measuring_gradient_shares_changes_nothing(checkpointed):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep(6)

        def forward(self, x):
            if not checkpointed:
                return self.net(x)
            x = torch.utils.checkpoint.checkpoint(self.net[:4], x, use_reentrant=False)
            return self.net[4:](x)

    runs = []
    for measures in (False, True):
        torch.manual_seed(3)
        d = Distiller(
            Model(),
            deep(16, 1),
            kd(2.0, 0.5) + Term(losses.hint, layers={'net.4': '4'}),
            example=batch()[0],
        )
        d.head.measures = measures
        opt = torch.optim.Adam(d.parameters(), 0.01)
        for i in range(3):
            d(*batch(seed=i)).total.backward()
            opt.step()
            opt.zero_grad()
        runs.append([*[v.clone() for v in d.state_dict().values()], torch.get_rng_state()])
        assert (d.gradient_shares is not None) == measures and (
            not measures or set(d.gradient_shares) == {'task', 'kd', 'hint'}
        )
    assert all(map(torch.equal, *runs))


def test_a_distiller_can_be_copied_after_its_first_batch():
    d = Distiller(mlp(6), mlp(16), kd())
    loss = d(*batch()).total
    assert torch.equal(copy.deepcopy(d)(*batch()).total, loss)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.head, self.reentrant = mlp(6)[:4], nn.Linear(6, 4), reentrant

    def forward(self, x):
        run = torch.utils.checkpoint.checkpoint
        return self.head(run(self.net, x.requires_grad_(), use_reentrant=self.reentrant))


def test_a_model_that_allows_one_backward_pass_alone_is_trained_without_shares():
    d = Distiller(
        Checkpointed(True),
        mlp(16, 1),
        kd(2.0, 0.5) + Term(losses.hint, layers={'net': '2'}, projector='linear'),
        example=batch()[0],
    )
    d(*batch()).total.backward()
    assert d.gradient_shares == {} and all(p.grad is not None for p in d.student.parameters())


@pytest.mark.parametrize('layer', ['net.2', 'net.1', 'net@pre'])
def test_a_layer_that_was_read_without_gradients_is_an_error(layer):
    "The loss of the layer would have no effect, because a reentrant checkpoint runs it under no_grad"
    recipe = Term(losses.hint, layers={layer: '1'}, projector='linear')
    d = Distiller(Checkpointed(True), mlp(16, 1), recipe, example=batch()[0])
    with pytest.raises(DistillError, match=f"'{layer}'.*no gradient.*use_reentrant=False"):
        d(*batch())
    d.head.student.reentrant = False
    alone = Distiller(d.student, None, Recipe(), check=False)
    grads = []
    for o in (d, alone):
        o.student.zero_grad()
        o(*batch()).total.backward()
        grads.append(o.student.net[0].weight.grad.clone())
    assert not torch.equal(*grads)


def test_frozen_layers_and_validation_need_no_gradients():
    recipe = Term(losses.hint, layers={'net.2': '2'}, projector='linear')
    d = Distiller(Checkpointed(True), mlp(16, 1), recipe, example=batch()[0])
    with torch.no_grad():
        d(*batch())
    d.student.net.requires_grad_(False)
    d(*batch()).total.backward()
    assert all(p.grad is not None for p in d.own_parameters())


def test_a_part_that_begins_later_is_measured_then():
    d = Distiller(
        mlp(6), mlp(16, 1), kd(2.0, 0.5) + hint(lambda p: float(p > 0.5)), example=batch()[0]
    )
    keys = [(d(*batch(), progress=p), set(d.gradient_shares))[1] for p in (0.0, 0.4, 0.6, 0.8)]
    assert keys == [{'task', 'kd'}] * 2 + [{'task', 'kd', 'hint'}] * 2


SWAMPED = 'of the gradient of the first batch'


def test_a_part_that_swamps_the_labels_is_warned_about():
    says = r'hint has 9\d.\d\d% of the gradient of the first batch, the labels have .*hardly learns from them. Lower the weight of hint, now 500: (\S+) would give it as much as the labels'
    d = Distiller(mlp(6), mlp(16, 1), hint(500.0), example=batch()[0])
    with pytest.warns(DistillWarning, match=says) as seen:
        d(*batch())
    better = float(re.search(says, str(seen[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        d(*batch())  # once
        d = Distiller(mlp(6), mlp(16, 1), hint(better), example=batch()[0])
        d(*batch())
    assert d.gradient_shares['hint'] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    'weight, task, warned',
    [(8.5, 1.0, False), (9.5, 1.0, True), (4.5, 0.3, False), (5.0, 0.3, True)],
    ids=['89%', '90%', 'labels above a fifth of their weight', 'labels below it'],
)
def test_swamped_is_over_nine_tenths_that_leave_the_labels_less_than_a_fifth_of_their_weight(
    weight, task, warned
):
    s, t, _ = two()
    d = Distiller(
        None, None, Recipe(Term(lambda s, t: s.sum(), weight, name='sum'), task=task), check=False
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        d.compute(Outputs(s), Outputs(t), s.sum())
    assert d.gradient_shares['task'] == pytest.approx(task / (task + weight))
    assert [SWAMPED in str(w.message) for w in seen] == [True] * warned


def test_labels_swamped_by_alpha_are_named_so():
    s, t, y = two()
    d, t = Distiller(None, None, kd(20.0, 0.99)), 20 * t
    with pytest.warns(DistillWarning, match='kd has 99.*Lower alpha, or T.'):
        d.compute(Outputs(s), Outputs(t), F.cross_entropy(s, y), (y,))


@pytest.mark.parametrize(
    'recipe',
    [Recipe(hint(500.0), task=0.0), kd(), recipes.ttm(grad_ratio=30.0)],
    ids=['labels do not count', 'the classic', 'a share'],
)
def test_labels_that_are_not_swamped_give_no_warning(recipe):
    d = Distiller(mlp(6), mlp(16, 1), recipe, example=batch()[0])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        d(*batch())


FEATURES = [
    'hint',
    'at',
    'nst',
    'fsp',
    'ab',
    'ofd',
    'vid',
    'pkd',
    'rkd',
    'sp',
    'cc',
    'pkt',
    'ickd',
    'pairwise',
    'ifvd',
    'seed',
    'gram',
]


@pytest.mark.parametrize('name', FEATURES)
def test_a_term_between_layers_begins_with_a_share_and_takes_its_papers_weight_when_asked(name):
    make = getattr(recipes, name)
    (term,) = make().terms
    assert term.has_grad_ratio and term.weight == 0.1
    for options, has_grad_ratio, value in (
        (dict(grad_ratio=2.0), True, 2.0),
        (dict(weight=3.0), False, 3.0),
    ):
        (term,) = make(**options).terms
        assert (term.has_grad_ratio, term.weight) == (has_grad_ratio, value)
    (term,) = make(weight='paper').terms
    assert not term.has_grad_ratio and term.weight >= 0.5


def test_cwd_on_logits_has_its_papers_weight_and_on_layers_a_share():
    assert [
        (t.has_grad_ratio, t.weight)
        for r in (
            recipes.cwd(),
            recipes.cwd('auto'),
            recipes.cwd('auto', weight='paper'),
            recipes.cwd(grad_ratio=3.0),
        )
        for t in r.terms
    ] == [(False, 3.0), (True, 0.1), (False, 50.0), (True, 3.0)]


# mistakes that a batch shows


class Words(nn.Module):
    "A language model of one layer"

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, x):
        return self.out(self.embed(x))


def words(l=7):
    return torch.randint(11, (3, l), generator=torch.Generator().manual_seed(0))


def flat(s, y):
    return F.cross_entropy(s.flatten(0, 1), y.flatten())


MISTAKES = [
    (
        'axis',
        lambda **kw: (
            Distiller(Words(), Words(1), kd(), task_loss=flat, **kw),
            words(),
            words().roll(-1, 1),
        ),
        r'shape \(3, 7, 11\), have their classes along axis 1, but the labels have shape \(3, 7\): they fit classes along axis -1. Pass the class axis to .*Distiller, axis=-1',
    ),
    (
        'missing axis',
        lambda **kw: (
            Distiller(mlp(6), mlp(16), kd(), axis=2, task_loss=F.cross_entropy, **kw),
            *batch(),
        ),
        r'Outputs of shape \(16, 4\) have no axis 2 for the classes',
    ),
    (
        'probabilities',
        lambda **kw: (Distiller(mlp(6), lambda x: mlp(16)(x).softmax(1), kd(), **kw), *batch()),
        r'outputs are probabilities \(each row sums to 1\)',
    ),
    (
        'unknown label',
        lambda **kw: (
            Distiller(mlp(6), mlp(16), kd(), task_loss=lambda s, y: s.mean(), **kw),
            batch()[0],
            batch()[1] + 1,
        ),
        'There is a label 4, but the outputs have 4 classes, 0 to 3',
    ),
    (
        'broadcast',
        lambda **kw: (
            Distiller(
                nn.Linear(8, 1),
                nn.Linear(8, 6),
                Term(lambda s, t: (s - t).pow(2).mean()),
                kind='sigmoid',
                task_loss=lambda s, y: s.mean(),
                **kw,
            ),
            *batch(),
        ),
        r"student's output has shape \(16, 1\), but the teacher's has shape \(16, 6\)",
    ),
]
mistakes = pytest.mark.parametrize(
    'make,says', [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)


@mistakes
def test_a_mistake_is_found_in_the_first_batch(make, says):
    d, x, y = make()
    with pytest.raises(DistillError, match='Mistakes were found before training.*\n.*' + says):
        d(x, y)


@mistakes
def test_mistakes_are_found_on_request_and_nothing_is_changed(make, says):
    d, x, y = make()
    state, rng = copy.deepcopy(d.state_dict()), torch.get_rng_state()
    found = d.check(x, y)
    assert [f.level for f in found] == ['error'] and re.search(says, str(found[0]))
    assert (
        torch.equal(rng, torch.get_rng_state())
        and all(torch.equal(v, state[k]) for k, v in d.state_dict().items())
        and d.student.training
    )


@pytest.mark.parametrize('name', ['axis', 'probabilities', 'broadcast'])
def test_check_false_trains_all_the_same(name):
    d, x, y = dict((m[0], m[1]) for m in MISTAKES)[name](check=False)
    assert d(x, y).total.isfinite()


@pytest.mark.parametrize('label', [4, -1])
@pytest.mark.parametrize(
    'recipe',
    [kd(), kd(alpha=0.0), recipes.hint(layers={'2': '2'})],
    ids=['kd', 'no teacher', 'layers'],
)
def test_a_label_without_an_output_is_named_in_place_of_an_index_error(label, recipe):
    x, y = batch()
    y[3] = label
    d = Distiller(mlp(16), mlp(16, 1), recipe, example=x)
    with pytest.raises(
        DistillError,
        match=f'There is a label {label}, but the outputs have 4 classes, 0 to 3.*as many outputs as there are classes',
    ):
        d(x, y)


def test_an_ignored_label_is_no_mistake():
    x, y = batch()
    y[3] = 7
    assert Distiller(mlp(6), mlp(16, 1), kd(), ignore_index=7)(x, y).total.isfinite()


@pytest.mark.parametrize('axis', [0, 1.5, True, '1', 9, -9, (1,)])
@pytest.mark.parametrize(
    'make',
    [
        lambda axis: Distiller(mlp(6), mlp(16), kd(), axis=axis),
        lambda axis: Teacher(mlp(16), axis=axis),
    ],
    ids=['Distiller', 'Teacher'],
)
def test_an_axis_that_no_outputs_have_is_refused_at_once(make, axis):
    with pytest.raises(
        DistillError,
        match=re.escape(f'axis={axis!r}: the class axis must be a whole number from 1 to 8'),
    ):
        make(axis)


def test_the_axis_of_the_samples_is_no_class_axis_by_its_negative_number_either():
    d = Distiller(mlp(6), mlp(16), soft_labels(), axis=-2)
    with pytest.raises(DistillError, match='have no axis -2 for the classes'):
        d(batch()[0])


def test_labels_are_looked_at_once_even_if_the_teacher_never_runs():
    d, (x, y) = (
        Distiller(mlp(6), mlp(16, 1), kd(alpha=0.0), task_loss=lambda s, y: s.mean()),
        batch(),
    )
    d(x, y)
    assert d(x, y + 1).total.isfinite()


def test_all_is_well_where_nothing_is_found():
    d = Distiller(mlp(6), mlp(16, 1), kd())
    assert d.check(*batch()) == [] == d.check(batch()[0]) and d(*batch()).total > 0


def test_after_the_first_batch_nothing_is_looked_at():
    d, (x, y) = Distiller(mlp(6), mlp(16, 1), kd(), task_loss=lambda s, y: s.mean()), batch()
    d(x, y)
    assert d(x, y + 1).total.isfinite()


def test_probabilities_of_labels_are_warned_about():
    with pytest.warns(DistillWarning, match='are between 0 and 1: they seem to be probabilities'):
        Distiller(mlp(6), lambda x: mlp(16)(x).sigmoid(), kd(), kind='sigmoid')(
            batch()[0], torch.ones(16, 4)
        )


def test_a_teacher_that_shares_parameters_with_the_student_is_refused():
    body = nn.Linear(8, 6)
    student, teacher = (
        nn.Sequential(body, nn.Linear(6, 4)),
        nn.Sequential(body, nn.ReLU(), nn.Linear(6, 4)),
    )
    says = r'share 2 parameters \(0.weight, 0.bias\), so the teacher would change with the student. Build the student from a copy: copy.deepcopy'
    for t in (teacher, [mlp(6), teacher]):
        with pytest.raises(DistillError, match=says):
            Distiller(student, t, kd())
    Distiller(copy.deepcopy(student), teacher, kd())
    Distiller(student, teacher, kd(), check=False)


def assigned(student):
    teacher = mlp(6)
    teacher.load_state_dict(student.state_dict(), assign=True)
    return teacher


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
@pytest.mark.parametrize('make', [assigned, lambda m: torch.jit.trace(m, batch()[0])])
def test_a_teacher_whose_parameters_share_the_memory_of_the_students_is_refused(make):
    student = mlp(6)
    with pytest.raises(DistillError, match='share 6 parameters .*would change with the student'):
        Distiller(student, make(student), kd())


@pytest.mark.parametrize('alpha', [0.0, 0.1, 0.3, 0.7, 0.9, 1.0])
def test_a_recipe_shows_the_weight_of_the_labels_as_one_would_type_it(alpha):
    assert repr(kd(alpha=alpha)).endswith(f', task={round(1 - alpha, 2)})')


# mistakes that a loader shows


def knowing(order=(0, 1, 2, 3)):
    "A teacher that knows the classes of `batch`, in this order of its outputs"
    net = nn.Linear(8, 4, bias=False)
    net.weight.data = 5 * torch.eye(8)[list(order)]
    return net


def loader(n=64, bs=16, **kwargs):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(n)), bs, **kwargs)


def test_a_loader_shows_that_the_teachers_classes_are_in_a_different_order():
    found = Distiller(mlp(6), knowing([1, 0, 2, 3]), kd()).check(loader())
    (error,) = found.errors
    assert 'class 0 and class 1 are swapped' in error.what
    assert 'Teacher(model, select=[1, 0, 2, 3])' in error.do
    assert (
        Distiller(mlp(6), Teacher(knowing([1, 0, 2, 3]), select=[1, 0, 2, 3]), kd()).check(loader())
        == []
    )


def test_a_loader_shows_an_untrained_teacher():
    found = Distiller(mlp(6), lambda x: torch.zeros(len(x), 4), kd()).check(loader())
    (warning,) = found.warnings
    assert found.errors == []
    assert warning.what.startswith(
        'The teacher is no better than chance: on average it recognizes 25.0%'
    )


def test_a_loader_shows_the_scores_of_both_models_on_as_many_batches_as_asked():
    student, (x, y) = mlp(6), batch(64)
    facts = Distiller(student, knowing(), kd()).check(loader(), n=3).facts
    assert facts.n == 48
    assert facts.scores.startswith('accuracy on 48 items: ')  # the loader may be any
    assert facts.teacher_score == 1
    facts = Distiller(student, knowing(), kd()).check(loader()).facts
    assert facts.student_score == pytest.approx((student(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize('shuffle', [False, True])
def test_a_check_of_a_loader_does_not_change_the_training_that_follows(shuffle):
    def trained(check):
        torch.manual_seed(0)
        student, data = mlp(6), loader(shuffle=shuffle)
        d = Distiller(student, knowing(), kd(alpha=0.5))
        if check:
            d.check(data)
        opt = torch.optim.SGD(student.parameters(), 0.1)
        for x, y in data:
            opt.zero_grad()
            d(x + 0.1 * torch.randn_like(x), y).total.backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    assert torch.equal(trained(True), trained(False))


class Noise:
    "Random noise from a generator of its own, which may be created when it is first used"

    def __init__(self, lazy):
        self.rows = [*zip(*batch(24))]
        self.rng = None if lazy else torch.Generator().manual_seed(3)

    def drawn(self, x):
        if self.rng is None:
            self.rng = torch.Generator().manual_seed(3)
        return x + torch.randn(x.shape, generator=self.rng)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.drawn(self.rows[i][0]), self.rows[i][1]

    def __call__(self, rows):
        x, y = torch.utils.data.default_collate(rows)
        return self.drawn(x), y


@pytest.mark.parametrize('lazy', [False, True])
@pytest.mark.parametrize('place', ['dataset', 'subset', 'collate_fn'])
def test_a_check_draws_nothing_from_the_generator_of_a_loader(place, lazy):
    def batches(check):
        noise = Noise(lazy)
        subset = torch.utils.data.Subset(noise, range(24))
        data = dict(dataset=noise, subset=subset, collate_fn=noise.rows)[place]
        collate = noise if place == 'collate_fn' else None
        loader = torch.utils.data.DataLoader(data, 6, collate_fn=collate)
        if check:
            Distiller(mlp(6), knowing(), kd()).check(loader)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(batches(True), batches(False))


def test_a_list_of_batches_and_batches_that_are_dicts_are_loaders_too():
    x, y = batch(64)
    assert Distiller(mlp(6), knowing(), kd()).check([(x, y)]).facts.n == 64
    rows = [dict(x=a, labels=b) for a, b in zip(x.split(16), y.split(16))]

    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    assert Distiller(Named(mlp(6)), Named(knowing()), kd()).check(rows).facts.teacher_score == 1


def test_the_inputs_of_one_batch_are_not_a_loader():
    x, y = batch(64)
    d = Distiller(mlp(6), knowing([1, 0, 2, 3]), kd())
    for inputs in (x, (x,), [x]):
        assert d.check(inputs, y).facts is None
    assert d.check(x) == []


@pytest.mark.parametrize(
    'models,missing', [((nn.Linear(2, 3), None), 'teacher'), ((None, nn.Linear(2, 3)), 'student')]
)
def test_a_check_without_one_of_the_models_says_so(models, missing):
    with pytest.raises(DistillError, match=f'check needs both models, but there is no {missing}'):
        Distiller(*models, kd()).check([(torch.randn(4, 2), torch.arange(4) % 3)])


def test_checking_a_loader_changes_nothing():
    def run(check):
        student, g = mlp(6), torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        rows = loader(shuffle=True, generator=g)
        d = Distiller(student, knowing(), kd())
        if check:
            d.check(rows)
        opt = torch.optim.SGD(d.parameters(), 0.1)
        for x, y in rows:
            d(x + torch.randn_like(x), y).total.backward()
            opt.step()
            opt.zero_grad()
        return student.state_dict(), student.training

    (a, mode_a), (b, mode_b) = run(True), run(False)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert mode_a is mode_b is True


@pytest.mark.parametrize('form', ['loader', 'batch_sampler', 'list', 'dicts'])
def test_classes_of_a_sorted_loader_are_all_checked(form):
    "The first 8 of its 25 batches hold only classes 0 and 1, which this teacher has in order"
    x, y = batch(400)
    order = y.argsort()
    x, y = x[order], y[order]
    data = torch.utils.data.TensorDataset(x, y)
    if form == 'dicts':
        data = [dict(input=a, labels=b) for a, b in zip(x, y)]
    rows = torch.utils.data.DataLoader(data, 16, shuffle=False)
    if form == 'batch_sampler':
        rows = torch.utils.data.DataLoader(data, batch_sampler=[*torch.arange(400).split(16)])
    if form == 'list':
        rows = [*rows]
    found = Distiller(mlp(6), knowing([0, 1, 3, 2]), kd()).check(rows)
    assert 'class 2 and class 3 are swapped' in found.errors[0].what
    assert found.facts is None or found.facts.n == 128


def test_a_loader_that_cannot_be_spread_says_which_part_of_the_classes_it_showed():
    x, y = batch(400)
    rows = [*zip(x[y < 3], y[y < 3])]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    found = Distiller(mlp(6), knowing(), kd()).check(torch.utils.data.DataLoader(Stream(), 16))
    assert found.facts.scores.startswith(
        'accuracy on 128 items (3 of the 4 classes): teacher 1.000'
    )


def test_a_wrong_normalization_is_found_if_that_of_the_batches_is_given():
    "A teacher that knows three levels of brightness of images from 0 to 1 gets images from -1 to 1"
    y, levels = torch.arange(256) % 3, torch.tensor([0.2, 0.5, 0.8])
    x = levels[y].view(256, 1, 1, 1).expand(256, 3, 4, 4)
    rows = [((a - 0.5) / 0.5, b) for a, b in zip(x.split(16), y.split(16))]
    teacher = lambda x: -50 * (x.mean((1, 2, 3))[:, None] - levels) ** 2
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    assert 'normalization' not in str(list(Distiller(student, teacher, kd()).check(rows)))
    given = Teacher(teacher, images=dict(input_stats=(0.5, 0.5)))
    (found,) = Distiller(student, given, kd()).check(rows)
    assert found.about == 'normalization' and 'images=dict(stats=(0, 1))' in found.do


def test_the_check_says_that_an_unknown_normalization_was_not_checked():
    y = torch.arange(64) % 3
    x = 9 * torch.eye(3)[y].view(64, 3, 1, 1)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)) for _ in range(2))
    teacher[1].weight.data = torch.eye(3)
    student[1].weight.data = -torch.eye(3)
    text = lambda t: repr(Distiller(student, t, kd()).check([(x, y)]))
    assert 'No mistakes were found. Is this the score that you expect' in text(teacher)
    assert 'The normalization of the images was not checked' in text(teacher)
    given = text(Teacher(teacher, images=dict(input_stats=(0, 1))))
    assert 'not checked' not in given
    assert 'Normalization of the images: not in doubt, because the teacher scores well.' in given


def test_checking_a_loader_draws_no_global_random_number():
    d, rows = Distiller(mlp(6), knowing(), kd()), loader(400, shuffle=True)
    before = torch.get_rng_state()
    d.check(rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_that_a_loader_puts_in_doubt_gets_no_full_share():
    _, (x, y) = loader(), batch()
    left = []
    for teacher in (lambda x: torch.zeros(len(x), 4), knowing()):
        d = Distiller(mlp(6), teacher)
        d.check(loader())
        left.append((bool(d.head.doubt), d(x, y) and d.faded['dist']))
    assert left[0] == (True, pytest.approx(0.0, abs=0.1))
    assert not left[1][0] and left[1][1] > 0.5


def test_a_loader_shows_the_order_of_the_tokens_of_a_language_model():
    "Its labels are the inputs themselves, each to be predicted one position earlier"
    ids = (torch.arange(12)[None] + torch.arange(64)[:, None]) % 6

    def next_token(order):
        return nn.Sequential(
            nn.Embedding.from_pretrained(
                9 * torch.eye(6)[(torch.arange(6) + 1) % 6][:, list(order)]
            )
        )

    student = nn.Sequential(nn.Embedding(6, 6))
    rows = [(a, a) for a in ids.split(16)]
    right = Distiller(student, next_token(range(6)), kd(), axis=-1, shift_labels=True).check(rows)
    assert right.facts.teacher_score == 1
    wrong = Distiller(
        student, next_token([1, 0, 2, 3, 4, 5]), kd(), axis=-1, shift_labels=True
    ).check(rows)
    assert 'class 0 and class 1 are swapped' in wrong.errors[0].what


def test_a_student_that_shares_parameters_is_found_with_a_loader_too():
    net = knowing()
    assert (
        'share 1 parameters'
        in Distiller(net, net, kd(), check=False).check(loader()).errors[0].what
    )


# what people type


def test_a_recipe_may_be_a_text():
    d = Distiller(mlp(6), knowing(), 'kd(T=2, alpha=.5)')
    assert repr(d.recipe) == repr(Distiller(mlp(6), knowing(), kd(T=2, alpha=0.5)).recipe)
    assert Distiller(mlp(6), knowing(), 'auto').head.chooses
    with pytest.raises(DistillError, match="there is no recipe 'kdd'"):
        Distiller(mlp(6), knowing(), 'kdd()')


def test_labels_that_are_fractional_numbers_are_named():
    x, y = batch()
    for run in (
        lambda d: d(x, y.float()),
        lambda d: d.check(x, y.float()).enforce(),
        lambda d: d.check([(x, y.float())]).enforce(),
    ):
        with pytest.raises(
            DistillError,
            match=r'The labels, of shape \(16,\), are fractional numbers \(float32\), but the model predicts classes.*y.long\(\)',
        ):
            run(Distiller(mlp(6), knowing(), kd()))
    with pytest.raises(DistillError, match='fractional numbers'):
        Distiller(mlp(6), knowing(), kd(), check=False)(x, y.float())


def test_a_temperature_that_no_float_holds_is_refused():
    with pytest.raises(DistillError, match='T= has more than 300 digits'):
        kd(T=10**600)
    with pytest.raises(DistillError, match='more than 300 digits'):
        Term(losses.kl, weight=10**600)


def test_a_teacher_with_a_smaller_vocabulary_says_so():
    reads = lambda n: nn.Sequential(nn.Embedding(n, 3), nn.Flatten(), nn.Linear(6, 4))
    ids, y = torch.tensor([[1, 2], [30, 4]]), torch.tensor([0, 1])
    with pytest.raises(
        DistillError,
        match='The token ids go up to 30, but its largest embedding has only 20 rows, so its vocabulary is smaller.*inputs=fn',
    ):
        Distiller(reads(40), reads(20), kd())(ids, y)


def test_a_teacher_of_a_fixed_image_size_says_so():
    fixed = lambda n: nn.Sequential(nn.Flatten(), nn.Linear(3 * n * n, 4))
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(
        DistillError,
        match=r'does not run on inputs of shape \(2, 3, 8, 8\).*Teacher\(model, images=dict\(size=...\)\)',
    ):
        Distiller(fixed(8), fixed(16), kd())(x, y)
    Distiller(fixed(8), Teacher(fixed(16), images=dict(size=16)), kd())(x, y)


@pytest.mark.parametrize(
    'have,wants,says',
    [
        (
            1,
            3,
            r'3 channels, but .* 1: .*Teacher\(model, inputs=lambda x: x.expand\(-1, 3, -1, -1\)',
        ),
        (3, 1, r'takes 1 channels, but .* 3: .*Teacher\(model, inputs=fn\)'),
    ],
)
def test_a_teacher_of_images_with_other_channels_says_so(have, wants, says):
    net = lambda n: nn.Sequential(nn.Conv2d(n, 4, 8), nn.Flatten())
    with pytest.raises(DistillError, match=says):
        Distiller(net(have), net(wants), kd())(torch.randn(2, have, 8, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize('device', ['cuda:99', 'meta', 'gpu'])
def test_a_teacher_on_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(DistillError, match=f"device='{device}': this device can't be used here"):
        Teacher(mlp(6), run=dict(device=device))


# unlabeled batches in a plain loop


def test_labels_that_are_none_are_no_labels():
    x, y = batch()
    d = Distiller(mlp(6), knowing(), soft_labels(T=2))
    assert d(x, None).total.item() == d(x).total.item()
    with pytest.raises(DistillError, match='This batch has no labels.*alpha=1'):
        Distiller(mlp(6), knowing(), kd())(x, None)


@pytest.mark.parametrize('recipe', [None, 'dist(grad_ratio=3)'])
def test_unlabeled_inputs_need_a_labeled_batch_first_if_it_chooses_or_measures(recipe):
    student, teacher, (x, y), (u, _) = mlp(6), knowing(), batch(), batch(seed=1)
    d = Distiller(student, teacher, recipe)
    unlabeled = lambda: d.without_labels(Outputs(student(u)), d.teacher_outputs(u))
    with pytest.raises(DistillError, match='before the first labeled batch'):
        unlabeled()
    d(x, y)
    assert unlabeled().item() > 0


@pytest.mark.parametrize('kind', ['sigmoid', 'regression'])
def test_a_teacher_object_combines_its_members_by_the_kind_of_the_student(kind):
    members, student, (x, _) = [mlp(16, 1), mlp(16, 2)], mlp(8), batch()
    a, b = (m(x) for m in members)
    want = ((a.sigmoid() + b.sigmoid()) / 2).logit() if kind == 'sigmoid' else (a + b) / 2
    for teacher in (Teacher(members), Teacher(members, ensemble=dict(weights=[1, 1]))):
        got = Distiller(student, teacher, kd(), kind=kind).teacher_outputs(x).logits
        torch.testing.assert_close(got, want)


def test_a_teacher_object_has_the_class_axis_of_the_student():
    teachers, x = [nn.Linear(8, 5), nn.Linear(8, 5)], torch.randn(3, 5, 8)
    want = sum(t(x).softmax(-1) for t in teachers) / 2
    distiller = Distiller(nn.Linear(8, 5), Teacher(teachers), kd(), axis=-1)
    torch.testing.assert_close(distiller.teacher_outputs(x).logits.softmax(-1), want)
    chosen = Distiller(nn.Linear(8, 2), Teacher(teachers[0], select=[4, 0]), kd(), axis=-1)
    torch.testing.assert_close(chosen.teacher_outputs(x).logits, teachers[0](x)[..., [4, 0]])


def test_a_teacher_object_that_fits_is_taken_itself():
    teacher = Teacher(mlp(16, 1))
    assert Distiller(mlp(8), teacher, kd()).teacher is teacher
    given = Teacher([mlp(16, 1), mlp(16, 2)], kind='sigmoid')
    assert Distiller(mlp(8), given, kd(), kind='regression').teacher.kind == 'sigmoid'


@pytest.mark.parametrize(
    'labels,found',
    [
        (lambda: torch.tensor([[1.0, 1, 0, 1], [0, 1, 0, 0]]), 'sum to 3'),
        (lambda: torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]), 'sum to 3'),
        (lambda: torch.tensor([[0.5, -0.5, 0.5, 0.5], [0, 1, 0, 0]]), 'are as low as -0.5'),
    ],
)
@pytest.mark.parametrize('own', [True, False])
def test_several_labels_or_numbers_are_not_taken_for_probabilities_of_classes(labels, found, own):
    # the kind of a function is unknown, and cross-entropy takes any numbers
    task_loss = (lambda s, y: F.binary_cross_entropy_with_logits(s, y.float())) if own else None
    y = labels()
    if not own:
        y = y.float()
    distiller = Distiller(mlp(4), mlp(8), kd(), task_loss=task_loss)
    with pytest.raises(DistillError, match=f'they {found} along axis 1.*kind=.sigmoid'):
        distiller(torch.randn(2, 8), y)
    kind = 'regression' if y.min() < 0 else 'sigmoid'
    Distiller(mlp(4), mlp(8), kd(), task_loss=task_loss, kind=kind)(torch.randn(2, 8), y)


def test_probabilities_of_classes_are_labels():
    y = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0], [0, 0, 0, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        Distiller(mlp(4), mlp(8), kd())(torch.randn(3, 8), y.to(dtype).float())


def test_points_are_not_taken_for_classes():
    student, teacher = mlp(4), mlp(8)
    task_loss = lambda s, y: F.mse_loss(s, y.flatten(1))
    x, y = torch.randn(3, 8), torch.randn(3, 2, 2)
    with pytest.raises(
        DistillError, match='are floating-point numbers .*, one for each number in the outputs'
    ):
        Distiller(student, teacher, kd(), task_loss=task_loss)(x, y)
    Distiller(student, teacher, kd(), task_loss=task_loss, kind='regression')(x, y)


def test_labels_beyond_1_are_named_for_a_sigmoid():
    s, t, x = mlp(4), mlp(8), torch.randn(3, 8)
    y = torch.tensor([[0.0, 1, 0, 1], [0, 1, 255, 0], [1, 1, 1, 0]])
    own = lambda s, y: F.binary_cross_entropy_with_logits(s[y <= 1], y[y <= 1])
    for options in (dict(kind='sigmoid'), dict(kind='sigmoid', task_loss=own)):
        with pytest.raises(DistillError, match='There is a label 255, but labels for a sigmoid'):
            Distiller(s, t, kd(), **options)(x, y)
    # a loss that ignores this label says so
    got = Distiller(s, t, kd(), kind='sigmoid', task_loss=own, ignore_index=255)(x, y)
    torch.testing.assert_close(got.task, own(s(x), y))
    for kind in ('sigmoid', 'regression'):
        with pytest.raises(DistillError, match='ignore_index=255 is for classes.*task_loss='):
            Distiller(s, t, kd(), kind=kind, ignore_index=255)(x, y)


@pytest.mark.parametrize('check', [True, False])
def test_a_task_loss_that_is_not_reduced_is_refused(check):
    options = dict(task_loss=nn.CrossEntropyLoss(reduction='none'), check=check)
    with pytest.raises(DistillError, match=r"shape \(\d+,\), but must be one .* reduction='mean'"):
        Distiller(mlp(6), mlp(16, 1), kd(), **options)(*batch())
    Distiller(mlp(6), mlp(16, 1), soft_labels(), **options)(*batch()).total.backward()


def test_torch_func_computes_gradients_of_the_loss_and_maps_over_a_teacher():
    student, teacher, (x, y) = mlp(6), mlp(16, 1), batch()
    d = Distiller(student, teacher, kd(), check=False)
    loss = lambda p: torch.func.functional_call(d, p, (x, y)).total
    got = torch.func.grad(loss)(dict(d.named_parameters()))
    d(x, y).total.backward()
    for k, p in d.named_parameters():
        torch.testing.assert_close(got[k], p.grad)
    got = torch.func.vmap(lambda x: Teacher(teacher)(x).logits)(x.view(2, -1, x.shape[1]))
    torch.testing.assert_close(got.flatten(0, 1), teacher(x))


def test_a_batch_inside_vmap_does_not_decide_whether_a_teacher_changes_its_inputs():
    class AddsOne(nn.Module):
        def forward(self, x):
            return x.add_(1)

    teacher, x = Teacher(AddsOne()), torch.zeros(2, 3, 4)
    torch.func.vmap(lambda x: teacher(x).logits)(x.clone())
    for _ in range(2):
        assert torch.equal(teacher(x).logits, torch.ones(2, 3, 4))
    assert not x.any()


# a second `with distiller.teacher:`


def steps(distiller, batches, lr=0.05):
    "Train, and return the weights of the losses in each step"
    opt, seen = torch.optim.SGD(distiller.student.parameters(), lr), []
    for x, y in batches:
        loss = distiller(x, y)
        seen.append({k: float(w) for k, w in loss.weights.items()})
        opt.zero_grad()
        loss.total.backward()
        opt.step()
    return seen


def two_models_and_batches(n=70):
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    return student, teacher, [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(n)]


@pytest.mark.parametrize('ensemble', [False, True])
@pytest.mark.parametrize('which', ['student', 'teacher', 'new tensors'])
def test_gradient_norms_of_other_weights_are_forgotten_in_a_second_with_block(which, ensemble):
    student, teacher, batches = two_models_and_batches()
    source = Teacher([teacher, copy.deepcopy(teacher)]) if ensemble else Teacher(teacher)
    recipe = Term(losses.kl, T=2.0, grad_ratio=1.0, fade=0.2)
    distiller = Distiller(student, source, recipe, check=False)
    with distiller.teacher:
        steps(distiller, batches)
    changed = student if which == 'student' else teacher
    new = {k: 20 * v for k, v in changed.state_dict().items()}
    changed.load_state_dict(new, assign=which == 'new tensors')
    again = copy.deepcopy((student, source))
    with distiller.teacher:
        got = steps(distiller, batches[:40])
    new = Distiller(*again, recipe, check=False)
    with new.teacher:
        want = steps(new, batches[:40])
    assert got == want


@pytest.mark.parametrize('copied', [False, True])
def test_gradient_norms_of_the_same_weights_are_kept_in_a_second_with_block(copied):
    student, teacher, batches = two_models_and_batches()
    whole = Distiller(
        copy.deepcopy(student), teacher, Term(losses.kl, T=2.0, grad_ratio=1.0), check=False
    )
    with whole.teacher:
        want = steps(whole, batches)
    parts = Distiller(student, teacher, Term(losses.kl, T=2.0, grad_ratio=1.0), check=False)
    got = []
    for part in (batches[:50], batches[50:]):
        parts = copy.deepcopy(parts) if copied else parts
        with parts.teacher:
            got += steps(parts, part)
    assert got == want
