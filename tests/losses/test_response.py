"What the response losses do beyond the contract: masked vocabularies, labels that do not count, text, shapes, standardised logits."

import copy, functools, inspect, math, pickle
import pytest, torch
import torch.nn.functional as F
from apps import FASTAI_WARNINGS, quiet
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.torch_core import TensorBase, TensorImage, TensorMask
from cases import logits
from fastdistill import Distiller, Recipe, kd, losses, recipes
from fastdistill.fastai import cache_teacher
from fastdistill.losses import (
    Loss,
    abkd,
    binary_kl,
    dist,
    dkd,
    hard,
    jsd,
    kl,
    mse,
    nkd,
    regression,
    reverse_kl,
    rld,
    skewed_kl,
    soft_ce,
    soft_targets,
    standardize,
    standardized,
    taid,
    ttm,
    tvd,
    uld,
    wttm,
)
from fastdistill.base.outputs import DistillError
from fastdistill.recipes import uld as uld_recipe

INF = float('inf')
named = lambda f: getattr(f, '__name__', None) or f'{f.func.__name__}-{f.keywords}'
half_taid, with_labels = functools.partial(taid, lam=0.5), (dkd, nkd, rld)
newer = [
    ttm,
    wttm,
    skewed_kl,
    functools.partial(skewed_kl, reverse=True),
    taid,
    half_taid,
    abkd,
    functools.partial(abkd, alpha=1.0, beta=0.0),
    functools.partial(abkd, alpha=0.0, beta=1.0),
]
softmax_losses = pytest.mark.parametrize(
    'fn', [kl, reverse_kl, jsd, tvd, soft_ce, hard, dkd, nkd, rld, dist, *newer], ids=named
)
over_vocabulary = pytest.mark.parametrize(
    'fn',
    [
        kl,
        reverse_kl,
        jsd,
        functools.partial(jsd, beta=0),
        functools.partial(jsd, beta=1),
        tvd,
        soft_ce,
        hard,
        *newer,
    ],
    ids=named,
)
of_logits = pytest.mark.parametrize(
    'fn', [kl, reverse_kl, jsd, tvd, soft_ce, mse, hard, dkd, nkd, rld, dist, *newer], ids=named
)


def value_and_grad(fn, s, *args, **options):
    s = s.detach().clone().requires_grad_()
    v = fn(s, *args, **options)
    return v.item(), torch.autograd.grad(v, s)[0]


def pair(*shape, **kwargs):
    return logits(*shape, **kwargs)()


# a vocabulary with holes


@softmax_losses
def test_a_class_that_is_minus_infinite_for_both_is_not_there(fn):
    s, t, *y = pair(4, 7, y=fn in with_labels)
    y = [o % 5 for o in y]
    holes = torch.tensor([5, 6])
    a, b = s.index_fill(1, holes, -INF), t.index_fill(1, holes, -INF)
    v, g = value_and_grad(fn, a, b, *y)
    assert g.isfinite().all() and (g[:, 5:] == 0).all()
    if fn is dist:
        return  # it takes the mean over classes, so two that are always 0 count as two that never vary
    want, wg = value_and_grad(fn, s[:, :5], t[:, :5], *y)
    assert v == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(g[:, :5], wg)


@over_vocabulary
def test_a_class_outside_one_vocabulary_leaves_value_and_gradient_finite(fn):
    s, t = pair(4, 7)
    for a, b in (
        (s.index_fill(1, torch.tensor([2]), -INF), t),
        (s, t.index_fill(1, torch.tensor([2]), -INF)),
    ):
        v, g = value_and_grad(fn, a, b)
        assert math.isfinite(v) and g.isfinite().all()


def test_what_the_student_cannot_say_is_left_out_of_kl_and_what_the_teacher_cannot_say_out_of_reverse_kl():
    s, t = pair(4, 7)
    hole = lambda x: x.index_fill(1, torch.tensor([6]), -INF)
    for fn in (kl, soft_ce, hard):
        assert fn(hole(s), t).item() == pytest.approx(fn(s[:, :6], t[:, :6]).item())
    assert reverse_kl(s, hole(t)).item() == pytest.approx(reverse_kl(s[:, :6], t[:, :6]).item())
    # the other way round the class has its probability 0: sums of 0 log 0 = 0, by hand
    p, q = t[:, :6].softmax(1), s.softmax(1)[:, :6]
    assert kl(s, hole(t), T=1.0).item() == pytest.approx(
        (p * (p.log() - q.log())).sum(1).mean().item()
    )
    p = F.pad(p, (0, 1))
    assert tvd(s, hole(t)).item() == pytest.approx(
        (p - s.softmax(1)).abs().sum(1).mean().item() / 2
    )
    m = (p + s.softmax(1)) / 2
    want = torch.xlogy(p, p / m) / 2 + torch.xlogy(s.softmax(1), s.softmax(1) / m) / 2
    assert jsd(s, hole(t)).item() == pytest.approx(want.sum(1).mean().item())


# masks


@pytest.mark.parametrize(
    'fn',
    [
        kl,
        reverse_kl,
        jsd,
        tvd,
        uld,
        soft_ce,
        mse,
        hard,
        dist,
        dkd,
        nkd,
        rld,
        standardized(kl),
        standardized(dist),
        *newer,
    ],
)
def test_what_stands_at_a_masked_position_reaches_neither_value_nor_gradient(fn):
    s, t, *y = pair(3, 5, 4, y='y' in inspect.signature(fn).parameters)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    want, wg = value_and_grad(fn, s, t, *y, mask=mask)
    for junk in (math.nan, INF, -INF):
        a, b = [torch.where(mask[:, None], x, junk) for x in (s, t)]
        v, g = value_and_grad(fn, a, b, *[o.where(mask, 255) for o in y], mask=mask)
        assert v == want
        torch.testing.assert_close(g, wg, rtol=0, atol=0)
    assert (wg.movedim(1, -1)[~mask] == 0).all()


def test_junk_at_masked_labels_and_samples_stays_there_too():
    s, t = pair(6, 5)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    v, g = value_and_grad(binary_kl, s.where(mask, math.nan), t.where(mask, math.nan), mask=mask)
    assert v == pytest.approx(binary_kl(s[mask], t[mask]).item()) and g.isfinite().all()
    mask = torch.tensor([1, 1, 0, 1, 0, 1.0])
    v, g = value_and_grad(
        regression,
        s.where(mask[:, None] > 0, math.nan),
        t.where(mask[:, None] > 0, math.nan),
        mask=mask,
    )
    assert v == pytest.approx(F.mse_loss(s[mask > 0], t[mask > 0]).item()) and g.isfinite().all()


@of_logits
def test_padding_of_a_text_does_not_count(fn):
    s, t, *y = pair(3, 6, 11, y=fn in with_labels, axis=-1)
    labels = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))
    labels[0, 4:], labels[2, 1:] = -100, -100
    keep = labels != -100
    got = fn(s, t, *y, axis=-1, mask=keep)
    assert got.item() == pytest.approx(
        fn(s[keep], t[keep], *[o[keep] for o in y]).item()
    )  # as if those tokens were not there
    if fn is dist:
        return
    v = fn(s, t, *y, axis=-1, reduction='none')
    assert v.shape == (3, 6) and got.item() == pytest.approx(
        sum(v[i, j].item() for i, j in keep.nonzero().tolist()) / keep.sum().item()
    )
    # more padding changes nothing
    wide = [F.pad(o, (0, 0, 0, 5)) for o in (s, t)]
    assert fn(
        *wide, *[F.pad(o, (0, 5)) for o in y], axis=-1, mask=F.pad(keep, (0, 5))
    ).item() == pytest.approx(got.item())


def test_a_mask_may_hold_weights():
    s, t = pair(3, 5)
    v = kl(s, t, reduction='none')
    assert kl(s, t, mask=torch.tensor([2.0, 0, 1])).item() == pytest.approx(
        ((2 * v[0] + v[2]) / 3).item()
    )
    # and to weigh a position by 2 is to have it twice
    assert dist(s, t, mask=torch.tensor([2.0, 0, 1])).item() == pytest.approx(
        dist(s[[0, 0, 2]], t[[0, 0, 2]]).item()
    )


# labels


@pytest.mark.parametrize('fn', with_labels, ids=named)
def test_labels_that_do_not_count(fn):
    s, t, y = pair(6, 5, y=True)
    want = fn(s[2:], t[2:], y[2:]).item()
    assert fn(s, t, torch.cat([torch.tensor([-100, -100]), y[2:]])).item() == pytest.approx(want)
    assert fn(
        s, t, torch.cat([torch.tensor([255, 255]), y[2:]]), ignore_index=255
    ).item() == pytest.approx(want)
    v, g = value_and_grad(
        fn,
        s,
        t,
        torch.cat([torch.tensor([255, 255]), y[2:]]).to(torch.uint8),
        mask=torch.arange(6) > 1,
    )
    assert v == pytest.approx(want) and (g[:2] == 0).all()
    v, g = value_and_grad(fn, s, t, y.fill_(-100))
    assert v == 0 and (g == 0).all()


@pytest.mark.parametrize('fn', with_labels, ids=named)
def test_labels_of_other_shapes_and_types(fn):
    s, t, y = pair(6, 5, y=True)
    want = fn(s, t, y).item()
    assert fn(s, t, y[:, None].to(torch.int8)).item() == want  # what tabular learners give
    s, t = [x.reshape(2, 3, 5) for x in (s, t)]
    assert fn(s, t, y.reshape(2, 3, 1), axis=-1).item() == pytest.approx(want)
    with pytest.raises(
        DistillError,
        match=r'Labels of shape \(3, 2\) do not fit .* \(2, 3, 5\): .* on axis 2 they have shape \(2, 3\)',
    ):
        fn(s, t, y.reshape(3, 2), axis=-1)
    with pytest.raises(
        DistillError, match='Labels of torch.float32: .* needs one class .* Mixed or smoothed'
    ):
        fn(s, t, torch.rand(2, 3, 5), axis=-1)
    with pytest.raises(DistillError, match='Labels from 0 to 255 for 5 classes. .* ignore_index'):
        fn(*pair(2, 5), torch.tensor([0, 255]))


# what each is known for


def test_jsd_has_the_two_kls_at_its_ends():
    s, t = pair(5, 7)
    for T in (1.0, 3.0):
        assert jsd(s, t, beta=0, T=T).item() == kl(s, t, T=T).item()
        assert (
            jsd(s, t, beta=1, T=T).item()
            == reverse_kl(s, t, T=T).item()
            == pytest.approx(kl(t, s, T=T).item())
        )
        # the mixture itself goes to 0 there, and its slope is that KL
        assert jsd(s, t, beta=1e-7, T=T).item() / 1e-7 == pytest.approx(
            kl(s, t, T=T).item(), rel=1e-4
        )
        assert jsd(s, t, beta=1 - 1e-7, T=T).item() / 1e-7 == pytest.approx(
            reverse_kl(s, t, T=T).item(), rel=1e-4
        )
    with pytest.raises(DistillError, match='beta=1.5: .* must be between 0 and 1'):
        jsd(s, t, beta=1.5)


@pytest.mark.parametrize('fn', [kl, reverse_kl, soft_ce], ids=named)
def test_the_gradient_of_a_high_temperature_is_that_of_the_centred_logits(fn):
    s, t = pair(5, 7)
    z = lambda x: x - x.mean(1, keepdim=True)
    _, g = value_and_grad(fn, s, t, T=1e5)
    torch.testing.assert_close(
        g, (z(s) - z(t)) / 7 / 5, rtol=1e-3, atol=1e-5
    )  # section 2.1 of Hinton 2015, times T^2


def test_dkd_with_the_coupled_weight_is_kl():
    s, t, y = pair(1, 7, y=True)
    for T in (1.0, 4.0):
        p = (t / T).softmax(1)[0, y].item()
        assert dkd(s, t, y, alpha=1.0, beta=1 - p, T=T).item() == pytest.approx(
            kl(s, t, T=T).item()
        )  # eq. 7 of the paper


def test_the_other_classes_of_dkd_do_not_see_the_target_however_far_it_leads():
    s, t, y = pair(4, 7, y=True)
    far = torch.zeros_like(s).scatter(1, y[:, None], 1e5)
    assert dkd(s + far, t + far, y, alpha=0.0, beta=1.0).item() == pytest.approx(
        dkd(s, t, y, alpha=0.0, beta=1.0).item()
    )
    # and 1-p of a sure student is exact in single precision, where the difference is 0
    s = torch.tensor([[40.0, 0, 1, -2]])
    t, y = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([0])
    assert dkd(s, t, y, T=1.0).item() == pytest.approx(
        dkd(s.double(), t.double(), y, T=1.0).item(), rel=1e-6
    )


def test_nkd_is_least_where_the_student_is_sure_of_the_label_and_agrees_on_the_rest():
    s, t, y = pair(4, 7, y=True)
    others = t.masked_fill(F.one_hot(y, 7) > 0, -INF)
    p = (others / 2).softmax(1)
    floor = (1.5 * 4 * torch.special.entr(p).sum(1)).mean().item()
    best = t + 60 * F.one_hot(y, 7)
    assert nkd(best, t, y, T=2.0).item() == pytest.approx(floor)
    for k in (1e-3, 0.1, 1.0):
        assert nkd(best + k * (s - t), t, y, T=2.0).item() >= floor - 1e-9


def test_hard_asks_for_the_teachers_class():
    s, t = pair(4, 5, 3, 3)
    assert hard(s, t).item() == pytest.approx(F.cross_entropy(s, t.argmax(1)).item())


def test_dist_is_nearly_0_at_the_teacher_and_ignores_a_straight_line():
    _, t = pair(16, 7)
    assert 0 <= dist(t, t).item() < 1e-5
    p = t.softmax(1)
    assert dist((0.5 * p + 0.5 / 7).log(), t).item() < 1e-5  # probabilities a*p + b correlate fully


def test_dist_of_one_sample_has_only_the_relation_between_classes():
    s, t = pair(1, 7)
    v, g = value_and_grad(dist, s, t, gamma=3.0, T=2.0)
    want, wg = value_and_grad(dist, s, t, gamma=0.0, T=2.0)
    assert v == pytest.approx(want + 3 * 2**2)
    torch.testing.assert_close(g, wg)


@pytest.mark.parametrize('mask', [None, [1.0, 0.0, 2.0]])
def test_dist_of_two_samples_has_no_gradient_of_correlations_that_are_always_1_or_minus_1(mask):
    "The gradient of `eps` was up to a million times that of the other part"
    s, t = pair(2 if mask is None else 3, 7)
    t[-1, 3] = t[0, 3] + 1e-9
    mask = mask if mask is None else torch.tensor(mask)
    on = slice(None) if mask is None else mask > 0
    v, g = value_and_grad(dist, s, t, gamma=3.0, T=2.0, mask=mask)
    want, wg = value_and_grad(dist, s, t, gamma=0.0, T=2.0, mask=mask)
    p, q = [(o[on] / 2).softmax(1).diff(dim=0) for o in (s, t)]
    signs = (p * q / (p.abs() * q.abs() / 2 + 1e-8) / 2).mean().item()
    assert v == pytest.approx(want + 3 * 2**2 * (1 - signs), rel=1e-3)
    torch.testing.assert_close(g, wg, rtol=0, atol=0)


def test_dist_of_three_samples_compares_them():
    s, t = pair(3, 7)
    _, g = value_and_grad(dist, s, t)
    _, without = value_and_grad(dist, s, t, gamma=0.0)
    assert (g - without).norm() > 0.1 * without.norm()


def test_binary_kl_is_the_difference_of_two_cross_entropies_and_exact_for_sure_models():
    s, t = pair(5, 7)
    bce = F.binary_cross_entropy_with_logits
    for T in (1.0, 4.0):
        q = (t / T).sigmoid()
        assert binary_kl(s, t, T=T).item() == pytest.approx(
            (T * T * (bce(s / T, q) - bce(t / T, q))).item()
        )
    for x in (40.0, 1e4, INF, -INF):
        x = torch.full((2, 3), x)
        v, g = value_and_grad(binary_kl, x, x)
        assert v == 0 and g.abs().max() < 1e-9


def test_regression_compares_numbers_not_shapes():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(6, 4, 2, generator=g), torch.randn(6, 8, generator=g)
    assert regression(s, t).item() == pytest.approx(F.mse_loss(s.flatten(1), t).item())
    a, b = torch.randn(6, generator=g), torch.randn(6, 1, generator=g)
    assert regression(a, b).item() == pytest.approx(
        F.mse_loss(a, b[:, 0]).item()
    )  # PyTorch's own would make it 6 x 6
    assert regression(s, t, reduction='none').shape == (6,)
    for name, ref in dict(l1=F.l1_loss, huber=F.huber_loss).items():
        assert regression(s, t, distance=name).item() == pytest.approx(ref(s.flatten(1), t).item())
    with pytest.raises(
        DistillError,
        match=r'\(6, 8\), the teacher.s \(6, 1\): both need the same number of samples',
    ):
        regression(t, b)
    with pytest.raises(DistillError, match='same number of samples'):
        regression(s.reshape(8, 6), t)
    with pytest.raises(DistillError, match="distance='l2': must be one of 'mse', 'l1', 'huber'"):
        regression(s, t, distance='l2')


def test_soft_targets_are_those_of_what_the_model_predicts():
    s, t = pair(5, 7)
    mask = torch.arange(5) > 1
    assert soft_targets(s, t, T=2.0, mask=mask).item() == kl(s, t, T=2.0, mask=mask).item()
    assert (
        soft_targets(s, t, kind='sigmoid', T=2.0, mask=mask[:, None]).item()
        == binary_kl(s, t, T=2.0, mask=mask[:, None]).item()
    )
    assert (
        soft_targets(s, t, kind='regression', T=2.0, mask=mask).item()
        == regression(s, t, mask=mask).item()
    )
    with pytest.raises(
        DistillError, match="kind='logits': must be one of 'softmax', 'sigmoid', 'regression'"
    ):
        soft_targets(s, t, kind='logits')


# newer ones


def test_ttm_is_0_where_the_student_predicts_the_softened_probabilities():
    _, t = pair(5, 7)
    assert ttm(t / 4, t).item() == pytest.approx(0, abs=1e-12) == wttm(t / 4, t).item()
    # and kl at T, whose student is softened too, is something else
    assert ttm(t, t).item() > 0.1 and kl(t, t).item() == 0


def test_wttm_weighs_a_position_by_how_unsure_the_teacher_is():
    s = torch.zeros(2, 5, dtype=torch.float64)
    t = torch.tensor([[60.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]], dtype=torch.float64)
    s[:, 1] = 1.0
    ratio = wttm(s, t, T=2.0, reduction='none') / ttm(s, t, T=2.0, reduction='none')
    torch.testing.assert_close(ratio, torch.tensor([1.0, 5**0.5], dtype=torch.float64))


def test_taid_begins_at_the_student_and_ends_at_the_teacher():
    s, t = pair(5, 7)
    v, g = value_and_grad(taid, s, t, lam=0.0)
    assert v == pytest.approx(0, abs=1e-12) and g.abs().max() < 1e-12
    assert value_and_grad(taid, s, t, lam=1.0)[0] == kl(s, t, T=1.0).item()
    v, g = value_and_grad(taid, s, t, lam=0.4, T=2.0)
    want, wg = value_and_grad(
        kl, s, 0.6 * s + 0.4 * t, T=2.0
    )  # a fixed target: no gradient goes into it
    assert v == pytest.approx(want)
    torch.testing.assert_close(g, wg)


def test_abkd_has_the_two_kls_and_hellingers_distance_among_its_members():
    s, t = pair(5, 7)
    for T in (1.0, 3.0):
        assert abkd(s, t, alpha=1.0, beta=0.0, T=T).item() == pytest.approx(kl(s, t, T=T).item())
        assert abkd(s, t, alpha=0.0, beta=1.0, T=T).item() == pytest.approx(
            reverse_kl(s, t, T=T).item()
        )
        assert abkd(s, t, alpha=1 - 1e-6, beta=1e-6, T=T).item() == pytest.approx(
            kl(s, t, T=T).item(), rel=1e-4
        )
    hellinger = (s.softmax(1).sqrt() - t.softmax(1).sqrt()).pow(2).sum(1).mean() / 2
    assert abkd(s, t, alpha=0.5, beta=0.5, T=1.0).item() == pytest.approx(4 * hellinger.item())


def test_skewed_kl_stays_bounded_where_the_student_rules_out_what_the_teacher_predicts():
    s, t = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    assert kl(s, t, T=1.0).item() == pytest.approx(200) and skewed_kl(s, t).item() == pytest.approx(
        -math.log(0.1), rel=1e-5
    )


def test_rld_leaves_out_what_the_teacher_likes_better_than_the_label():
    t = torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64)
    s, y = torch.tensor([[0.0, 1, 2, 3]], dtype=torch.float64), torch.tensor([1])
    far = s.clone()
    far[0, 0] = 5.0
    parts = dict(alpha=0.0, beta=1.0, T=1.0)
    assert (
        rld(s, t, y, **parts).item()
        == rld(far, t, y, **parts).item()
        == pytest.approx(kl(s[:, 2:], t[:, 2:], T=1.0).item())
    )
    v, g = value_and_grad(
        rld, s, t, torch.tensor([3]), **parts
    )  # nothing is below the teacher's last class
    assert v == 0 and (g == 0).all()


@pytest.mark.parametrize(
    'fn,options,says',
    [
        (skewed_kl, dict(lam=1.0), 'lam=1.0: .* must be at least 0 and below 1'),
        (taid, dict(lam=1.5), 'lam=1.5: .* must be between 0 and 1'),
        (abkd, dict(alpha=-1.0), 'alpha=-1.0, beta=0.3: both must be at least 0'),
        (abkd, dict(alpha=0.0, beta=0.0), 'at least one of them above 0'),
    ],
)
def test_options_of_newer_losses_are_checked(fn, options, says):
    with pytest.raises(DistillError, match=says):
        fn(*pair(3, 5), **options)


def test_the_target_of_taid_follows_a_schedule():
    s, t = pair(5, 7)
    recipe = recipes.taid(start=0.4)
    for p, lam in ((0.0, 0.4), (0.5, 0.7), (1.0, 1.0)):
        assert Recipe(recipe, task=0.0)(s, t, progress=p).item() == pytest.approx(
            taid(s, t, lam=lam).item()
        )
    with pytest.raises(
        DistillError, match='lam follows a schedule: pass the progress of the training'
    ):
        Recipe(recipe, task=0.0)(s, t)


# mistakes


@softmax_losses
def test_mistakes_in_shape_speak_up(fn):
    y = [torch.zeros(5, dtype=torch.long)] if fn in with_labels else []
    x = torch.zeros(5, 4)
    with pytest.raises(
        DistillError, match=r'1 class on axis 1\. .* always 1, so there is nothing to learn'
    ):
        fn(x[:, :1], x[:, :1], *y)
    with pytest.raises(DistillError, match='axis=2: outputs of shape .* no such axis'):
        fn(x, x, *y, axis=2)
    with pytest.raises(
        DistillError, match=r'student.s output has shape \(5, 4\), the teacher.s \(5, 3\)'
    ):
        fn(x, x[:, :3], *y)


def test_a_mask_of_another_shape_is_refused_and_not_broadcast():
    x = torch.zeros(2, 4, 3, 3)
    for shape in ((4, 3, 3), (2, 4, 3, 3), (2, 9)):
        with pytest.raises(DistillError, match='does not fit'):
            kl(x, x, mask=torch.ones(shape))
    with pytest.raises(DistillError, match='does not fit'):
        binary_kl(x, x, mask=torch.ones(2, 3, 3))
    with pytest.raises(DistillError, match='does not fit'):
        regression(x, x, mask=torch.ones(2, 4))


def test_fastais_own_tensors_are_welcome():
    s, t, y = pair(2, 4, 3, 3, y=True)
    mask = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    for fn, rest in ((kl, ()), (dkd, (y,)), (standardized(dkd), (y,))):
        got = fn(
            s.as_subclass(TensorBase),
            t.as_subclass(TensorImage),
            *[TensorMask(o) for o in rest],
            mask=TensorMask(mask),
        )
        assert type(got) is torch.Tensor and got.item() == fn(s, t, *rest, mask=mask).item()


# other classes


def test_uld_teaches_where_the_teacher_has_other_classes():
    s, t, x = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5), torch.randn(6, 4)
    d = Distiller(s, t, uld_recipe(weight=2.0))
    p, q = [
        F.pad(m(x).softmax(1).sort(1, descending=True).values, (0, 5 - n))
        for m, n in ((s, 3), (t, 5))
    ]
    r = d(x, torch.zeros(6, dtype=torch.long))
    assert r.added.item() == pytest.approx(2 * (p - q).abs().sum(1).mean().item(), rel=1e-5)
    with pytest.raises(DistillError, match='must be equal'):
        Distiller(s, t, uld_recipe() + kd())(x, torch.zeros(6, dtype=torch.long))
    with pytest.raises(DistillError, match='the positions must be the same'):
        uld(torch.randn(2, 6, 5), torch.randn(2, 7, 9), axis=-1)


@pytest.mark.filterwarnings(*FASTAI_WARNINGS)
def test_uld_in_fastai_is_checked_without_a_score(tmp_path):
    x = torch.randn(16, 4)
    items = list(zip(x, torch.arange(16) % 3))

    def student():
        torch.manual_seed(0)
        dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, shuffle=False, device='cpu')
        return quiet(Learner(dls, torch.nn.Linear(4, 3), loss_func=CrossEntropyLossFlat()))[0]

    t = torch.nn.Linear(4, 5)
    ends = []
    for teacher in (
        lambda dls: t,
        lambda dls: cache_teacher(
            t, dls, tmp_path / 'c', kind='softmax', axis=1, store=dict(dtype='float32'), check=False
        ),
    ):
        learn = student()
        learn.distill(teacher(learn.dls), 2, 1e-2, uld_recipe())
        ends.append(learn.model.weight.detach())
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)
    assert not student().check_teacher(t, recipe=uld_recipe()).errors
    with pytest.raises(DistillError, match='The student.s output has shape'):
        student().distill(t, 1, 1e-2, uld_recipe() + kd())


# kinds


def test_every_loss_says_which_logits_it_is_for():
    names = [
        n
        for module in ('response', 'decoupled', 'divergence', 'transformed_teacher')
        for n in getattr(losses, module).__all__
        if n in losses.LOSSES
    ]
    kinds = {n: getattr(getattr(losses, n), 'kind', None) for n in names}
    assert {n for n, k in kinds.items() if k == 'softmax'} == {
        'kl',
        'reverse_kl',
        'jsd',
        'tvd',
        'soft_ce',
        'hard',
        'dkd',
        'nkd',
        'dist',
        'rld',
        'ttm',
        'wttm',
        'skewed_kl',
        'taid',
        'abkd',
        'uld',
    }
    others = dict(binary_kl='sigmoid', regression='regression', mse=None, soft_targets=None)
    assert {n: k for n, k in kinds.items() if k != 'softmax'} == others
    assert Loss(kl, T=2.0).kind == 'softmax'
    assert standardized(kl).kind == standardized(Loss(kl)).kind == 'softmax'
    assert (
        Loss(mse).kind is None
        and standardized(mse).kind is None
        and standardized(mse).match == 'shape'
    )


# standardised logits


def test_standardised_logits_have_mean_0_and_spread_1():
    x = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0)) * 7 + 3
    for axis in (1, -1):
        z = standardize(x, axis=axis)
        torch.testing.assert_close(z.mean(axis), torch.zeros_like(z.mean(axis)), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.std(axis), torch.ones_like(z.mean(axis)))
        torch.testing.assert_close(
            standardize(x, axis=axis, correction=0).pow(2).mean(axis), torch.ones_like(z.mean(axis))
        )
    assert (
        standardize(x.half()).dtype == torch.float32
        and standardize(x.double()).dtype == torch.float64
    )
    flat = torch.full((2, 5), 3.0, requires_grad=True)
    z = standardize(flat)
    assert (z == 0).all() and torch.autograd.grad(z.sum(), flat)[
        0
    ].isfinite().all()  # logits that are all equal
    with pytest.raises(DistillError, match='1 class on axis 1: no spread'):
        standardize(x[:, :1])


@of_logits
def test_a_standardised_loss_sees_neither_scale_nor_shift(fn):
    s, t, *y = pair(5, 7, 2, y=fn in with_labels)
    want = standardized(fn)(s, t, *y)
    assert want.item() == pytest.approx(fn(standardize(s), standardize(t), *y).item())
    assert standardized(fn)(3 * s + 2, t / 5 - 1, *y).item() == pytest.approx(want.item(), rel=1e-5)
    tokens = [o.movedim(1, -1) for o in (s, t)]
    assert standardized(fn)(*tokens, *y, axis=-1).item() == pytest.approx(want.item())


def test_standardized_keeps_the_face_of_the_loss():
    f = standardized(kl)
    assert (f.__name__, f.__doc__, repr(f)) == (
        'kl',
        kl.__doc__,
        'standardized(kl)',
    ) and inspect.signature(f) == inspect.signature(kl)
    s, t = pair(5, 7)
    for g in (
        pickle.loads(pickle.dumps(f)),
        copy.deepcopy(f),
        standardized(functools.partial(kl, T=2.0), eps=1e-7),
    ):
        assert g(s, t, T=2.0).item() == f(s, t, T=2.0).item()
    with pytest.raises(TypeError, match='tau'):
        f(s, t, tau=3.0)


def test_standardized_takes_a_module_and_leaves_it_alone():
    s, t, y = pair(5, 7, y=True)
    m = Loss(dkd, beta=2.0, T=2.0)
    z = standardized(m)
    assert (
        isinstance(z, Loss)
        and repr(z) == 'Loss(standardized(dkd), beta=2.0, T=2.0)'
        and repr(m) == 'Loss(dkd, beta=2.0, T=2.0)'
    )
    want = standardized(dkd)(s, t, y, beta=2.0, T=2.0).item()
    assert z(s, t, y).item() == pickle.loads(pickle.dumps(z))(s, t, y).item() == want
    assert m(s, t, y).item() == dkd(s, t, y, beta=2.0, T=2.0).item() != want
    tokens = Loss(kl, axis=-1, T=2.0)
    s, t = pair(2, 3, 6, axis=-1)
    assert standardized(tokens)(s, t).item() == pytest.approx(
        kl(standardize(s, axis=-1), standardize(t, axis=-1), axis=-1, T=2.0).item()
    )


def test_standardized_takes_a_function_of_ones_own():
    s, t = pair(5, 7)
    cosine = lambda s, t, y: (1 - F.cosine_similarity(s, t)).mean()
    assert standardized(cosine)(s, t, None).item() == pytest.approx(
        cosine(standardize(s), standardize(t), None).item()
    )
    on_last = functools.partial(kl, axis=-1)
    s, t = pair(2, 3, 6, axis=-1)
    assert standardized(on_last)(s, t).item() == pytest.approx(
        on_last(standardize(s, axis=-1), standardize(t, axis=-1)).item()
    )


def test_standardizing_labels_or_numbers_is_refused():
    for fn in (binary_kl, regression):
        with pytest.raises(DistillError, match='needs a loss on softmax logits'):
            standardized(fn)
    s, t = pair(5, 7)
    for kind in ('sigmoid', 'regression'):
        with pytest.raises(DistillError, match=f'standardized soft_targets for {kind}: '):
            standardized(soft_targets)(s, t, kind=kind)
        with pytest.raises(DistillError, match='needs a loss on softmax logits'):
            standardized(Loss(losses.soft_targets, kind=kind))(s, t)
    assert standardized(soft_targets)(s, t, kind='softmax').item() == standardized(kl)(s, t).item()
