"Large logits in chunks: the same numbers as all at once, with less memory."

import inspect
import pytest
import torch
from fastdistill import losses
from fastdistill.losses import chunks, correlations

NEAR = dict(rtol=1e-10, atol=1e-12)
FNS = [
    losses.kl,
    losses.reverse_kl,
    losses.jsd,
    losses.tvd,
    losses.soft_ce,
    losses.ttm,
    losses.wttm,
    losses.skewed_kl,
    losses.taid,
    losses.abkd,
    losses.uld,
]
fns = pytest.mark.parametrize('fn', FNS, ids=lambda f: f.__name__)
SHAPES = [((3, 5, 4, 6), 1), ((3, 7, 5), -1), ((40, 5), 1), ((2, 3, 4, 5, 2), 2)]


def case(shape, axis, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    s, t = [torch.randn(shape, generator=g, dtype=dtype) * 3 for _ in range(2)]
    lead = list(shape)
    del lead[axis]
    return s.requires_grad_(), t, torch.rand(lead, generator=g) > 0.3


def both(fn, s, t, **options):
    "Values and gradients of all at once, and of chunks of 8 numbers"
    out = []
    for size in (2**16, 8):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(chunks, 'ON_CPU', size)
            v = fn(s, t, **options)
            out.append((v, torch.autograd.grad(v.sum(), s)[0]))
    return out


def graph(v):
    "Names of all operations behind a value"
    found, todo = set(), [v.grad_fn]
    while todo:
        f = todo.pop()
        if f is not None and f not in found:
            found.add(f)
            todo += [o for o, _ in f.next_functions]
    return {f.name() for f in found}


@fns
@pytest.mark.parametrize('shape,axis', SHAPES)
def test_chunks_give_the_same_values_and_gradients(fn, shape, axis):
    s, t, mask = case(shape, axis)
    for options in (
        dict(),
        dict(reduction='none'),
        dict(mask=mask),
        dict(mask=mask * 0.5, reduction='sum'),
        dict(T=2.5),
    ):
        (a, da), (b, db) = both(fn, s, t, axis=axis, **options)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(da, db, rtol=1e-10, atol=1e-12)


def test_the_size_of_the_logits_does_not_cost_precision():
    "What is added to all of a model's logits changes nothing"
    s, t, _ = case((40, 5), 1, torch.float32)
    s, t = [(64 * x.detach()).round() / 64 for x in (s, t)]  # exact, also beside 2**16
    with pytest.MonkeyPatch.context() as m:
        m.setattr(chunks, 'ON_CPU', 8)
        torch.testing.assert_close(
            losses.kl(s + 2**16, t - 2**15), losses.kl(s, t), rtol=1e-5, atol=0
        )


@fns
def test_classes_that_a_model_rules_out_are_the_same_in_chunks(fn):
    s, t, _ = case((40, 5), 1)
    s, t = s.detach().clone(), t.clone()
    s[:, 1], t[::2, 3] = -torch.inf, -torch.inf
    for options in (dict(), dict(T=2.0)):
        (a, da), (b, db) = both(fn, s.requires_grad_(), t, **options)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(da, db, rtol=1e-10, atol=1e-12, equal_nan=True)


@fns
def test_the_gradient_of_chunks_and_its_own_gradient_are_right(fn, monkeypatch):
    monkeypatch.setattr(chunks, 'ON_CPU', 8)
    s, t, mask = case((2, 3, 3, 2), 1)
    assert 'ChunkedBackward' in graph(fn(s, t))
    f = lambda s: fn(s, t, mask=mask, T=1.5)
    assert torch.autograd.gradcheck(f, [s]) and torch.autograd.gradgradcheck(f, [s])


def few_positions(m, n=2):
    "Chunks of `dist` with so many positions"
    m.setattr(chunks, 'ON_CPU', 8)
    m.setattr(correlations, 'FEW_POSITIONS', n)


@pytest.mark.parametrize('shape,axis', SHAPES)
def test_dist_in_chunks_is_dist_at_once(shape, axis, monkeypatch):
    "The relation between the positions goes over all chunks"
    s, t, mask = case(shape, axis)
    few_positions(monkeypatch)
    for options in (
        dict(),
        dict(reduction='none'),
        dict(mask=mask),
        dict(mask=mask * 0.5, reduction='sum'),
        dict(T=2.5, beta=0.5),
        dict(beta=0.0, mask=mask),
        dict(gamma=0.0),
    ):
        (a, da), (b, db) = both(losses.dist, s, t, axis=axis, **options)
        torch.testing.assert_close(a, b, **NEAR)
        torch.testing.assert_close(da, db, **NEAR)
    t[mask.unsqueeze(axis).expand_as(t) == 0] = torch.nan
    (a, da), (b, db) = both(losses.dist, s, t, axis=axis, mask=mask)
    assert a.isfinite() and db.isfinite().all()
    torch.testing.assert_close(da, db, **NEAR)


def test_classes_that_do_not_vary_are_the_same_in_chunks(monkeypatch):
    few_positions(monkeypatch)
    s, t, _ = case((40, 5), 1)
    s, t = s.detach().clone(), t.clone()
    s[:, 1] = t[:, 1] = t[:, 2] = -torch.inf  # one in both models, one in the teacher alone
    (a, da), (b, db) = both(losses.dist, s.requires_grad_(), t)
    torch.testing.assert_close(a, b, **NEAR)
    torch.testing.assert_close(da, db, **NEAR)
    same = torch.zeros(
        40, 5, dtype=torch.float64, requires_grad=True
    )  # a student that says the same to all
    (a, da), (b, db) = both(losses.dist, same, t)
    torch.testing.assert_close(a, b, **NEAR)
    torch.testing.assert_close(
        da, db, rtol=1e-6, atol=0
    )  # large numbers: a norm that is 0 stands below a fraction


def test_the_gradient_of_dist_in_chunks_and_its_own_gradient_are_right(monkeypatch):
    few_positions(monkeypatch)
    s, t, mask = case((2, 3, 4, 3), 1)
    assert 'CorrelationsBackward' in graph(
        losses.dist(s, t)
    ) and 'CorrelationsBackward' not in graph(losses.dist(s[:, :, :1, :1], t[:, :, :1, :1]))
    f = lambda s: losses.dist(s, t, mask=mask, T=1.5)
    assert torch.autograd.gradcheck(f, [s]) and torch.autograd.gradgradcheck(f, [s])


@pytest.mark.parametrize('n,c', [(600, 2000), (20_000, 11), (40, 30_000)])
def test_sums_over_many_chunks_keep_their_precision(n, c):
    "In float32, of probabilities that hardly vary beside their mean, against float64 at once"
    g = torch.Generator().manual_seed(0)
    s, t = [
        torch.randn(c, generator=g, dtype=torch.float64) * 2
        + 0.05 * torch.randn(n, c, generator=g, dtype=torch.float64)
        for _ in range(2)
    ]

    def found(dtype, size):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(chunks, 'ON_CPU', size)
            x = s.to(dtype).requires_grad_()
            v = losses.dist(x, t.to(dtype), beta=0.0, T=4.0)
            return v.item(), torch.autograd.grad(v, x)[0].double()

    (a, da), (b, db) = found(torch.float64, 2**40), found(torch.float32, 2**16)
    assert b == pytest.approx(a, rel=1e-4) and (da - db).norm() < 1e-3 * da.norm()


def test_a_backward_pass_may_run_twice(monkeypatch):
    monkeypatch.setattr(chunks, 'ON_CPU', 8)
    s, t, _ = case((40, 5), 1)
    v = losses.kl(s, t)
    a, b = [torch.autograd.grad(v, s, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(a, b)


def test_a_masked_nan_stays_out_of_chunks(monkeypatch):
    monkeypatch.setattr(chunks, 'ON_CPU', 8)
    s, t, mask = case((3, 5, 4, 6), 1)
    t[(~mask)[:, None].expand_as(t)] = torch.nan
    v = losses.kl(s, t, mask=mask)
    v.backward()
    assert v.isfinite() and s.grad.isfinite().all() and (s.grad.movedim(1, -1)[~mask] == 0).all()


def test_small_logits_and_transforms_need_no_chunks(monkeypatch):
    s, t, _ = case((40, 5), 1)
    assert 'ChunkedBackward' not in graph(losses.kl(s, t))
    monkeypatch.setattr(chunks, 'ON_CPU', 8)
    torch.testing.assert_close(
        torch.func.grad(losses.kl)(s.detach(), t), torch.autograd.grad(losses.kl(s, t), s)[0]
    )


def test_every_loss_of_single_positions_uses_chunks(monkeypatch):
    "A loss whose value at a position depends on that position alone, as its values show"
    monkeypatch.setattr(chunks, 'ON_CPU', 8)
    s, t, _ = case((40, 5), 1)
    assert {f.__name__ for f in FNS} == {
        n
        for n in losses.LOSSES
        if n != 'mse'
        and n != 'hard'
        and (f := getattr(losses, n)).kind == 'softmax'
        and 'y' not in inspect.signature(f).parameters
        and n != 'dist'
    }
    for f in FNS:
        assert 'ChunkedBackward' in graph(f(s, t))
