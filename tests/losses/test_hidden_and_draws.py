"Losses of logits that are not given as a tensor: hidden states with their output layer, and draws."

import math

import numpy as np
import pytest
import torch

from fastdistill import losses
from fastdistill.base.outputs import DistillError, Draws, LinearLogits
from fastdistill.cache.row_layout import draw_classes
from fastdistill.losses import chunks

POSITIONWISE = (
    'kl',
    'reverse_kl',
    'jsd',
    'tvd',
    'soft_ce',
    'ttm',
    'wttm',
    'skewed_kl',
    'taid',
    'abkd',
)


def linear(seed, width, *shape, classes=50, cap=None, bias=True):
    rng = torch.Generator().manual_seed(seed)
    random = lambda *s: torch.randn(*s, generator=rng, dtype=torch.double)
    parts = random(*shape, width), random(classes, width), random(classes) if bias else None
    return LinearLogits(*parts, cap)


@pytest.fixture(params=['whole', 'in chunks'])
def few_rows(request, monkeypatch):
    if request.param == 'in chunks':
        monkeypatch.setattr(chunks, 'ON_CPU', 300)
        monkeypatch.setattr(chunks, 'LINEAR_ROWS', 1)
        monkeypatch.setattr(chunks, 'TEACHER_ROWS', 1)


@pytest.mark.parametrize('cap', [None, 3.0])
@pytest.mark.parametrize('name', POSITIONWISE)
def test_a_loss_of_hidden_states_is_that_of_their_logits(name, cap, few_rows):
    s, t = linear(0, 6, 5, 7, cap=cap), linear(1, 9, 5, 7, cap=cap)
    options = dict(axis=-1, mask=torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) > 0.3)
    fn, parts = getattr(losses, name), [s.hidden, s.weight, s.bias]
    for p in parts:
        p.requires_grad_()
    got, want = fn(s, t, **options), fn(s.dense(), t.dense(), **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, parts), torch.autograd.grad(want, parts))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', POSITIONWISE)
def test_only_the_teacher_may_be_hidden(name, few_rows):
    t, fn = linear(1, 9, 5, 7), getattr(losses, name)
    x = linear(0, 6, 5, 7).dense().requires_grad_()
    got, want = fn(x, t, axis=-1), fn(x, t.dense(), axis=-1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    a, b = [torch.autograd.grad(v, x)[0] for v in (got, want)]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('T', [1.0, 3.0])
@pytest.mark.parametrize('masked_out', [False, True])
def test_kl_to_hidden_states_in_chunks_is_the_formula(T, masked_out, monkeypatch):
    "Also if a class is masked out, by a bias of -inf or in the student's logits"
    monkeypatch.setattr(chunks, 'ON_CPU', 300)
    t, x = linear(1, 9, 40), linear(0, 6, 40).dense()
    if masked_out:
        t.bias[3] = -torch.inf
        x[:, 7] = -torch.inf
    x.requires_grad_()
    got = losses.kl(x, t, T=T, axis=-1, reduction='none')
    z = t.hidden.numpy() @ t.weight.numpy().T + t.bias.numpy()
    a, b = z / T, x.detach().numpy() / T
    a[b == -np.inf] = -np.inf
    with np.errstate(invalid='ignore'):
        a, b = [o - np.log(np.exp(o).sum(1, keepdims=True)) for o in (a, b)]
        want = T**2 * np.nansum(np.exp(a) * (a - b), 1)
    np.testing.assert_allclose(got.detach(), want, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(1, 2, 40, dtype=torch.double)
    g = torch.autograd.grad((got * weights).sum(), x)[0]
    slope = T * (np.exp(b) - np.exp(a)) * weights.numpy()[:, None]
    np.testing.assert_allclose(g, slope, rtol=1e-9, atol=1e-12)


def test_the_second_derivative_in_chunks_is_that_of_the_logits(monkeypatch):
    monkeypatch.setattr(chunks, 'ON_CPU', 100)
    monkeypatch.setattr(chunks, 'LINEAR_ROWS', 1)
    s, t = linear(0, 3, 4, classes=40, bias=False), linear(1, 3, 4, classes=40)
    s.hidden.requires_grad_()

    def second(s):
        g = torch.autograd.grad(
            losses.kl(s, t), s.hidden if isinstance(s, LinearLogits) else h, create_graph=True
        )
        return torch.autograd.grad(g[0].pow(2).sum(), h)[0]

    h = s.hidden
    torch.testing.assert_close(second(s), second(s.dense()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('least', [1, 64])
def test_no_tensor_of_all_logits_exists(least, monkeypatch):
    """In either pass: the largest tensor of a class axis has the size of a chunk, in which the output
    layer is applied to many positions at once."""
    monkeypatch.setattr(chunks, 'ON_CPU', 2**12)
    monkeypatch.setattr(chunks, 'LINEAR_ROWS', least)
    rows = []
    dense = LinearLogits.dense
    monkeypatch.setattr(LinearLogits, 'dense', lambda self: rows.append(len(self)) or dense(self))
    s, t = linear(0, 6, 3, 40, classes=400), linear(1, 9, 3, 40, classes=400)
    s.hidden.requires_grad_()
    losses.kl(s, t, axis=-1).backward()
    assert max(rows) == max(2**12 // 400, least)
    assert sum(rows) == 4 * 120


@pytest.mark.parametrize('least', [1, 7, 63])
def test_the_output_layer_of_the_teacher_is_applied_once_to_many_positions(least, monkeypatch):
    "Gradients of the student's logits are kept, so that they can be read again"
    monkeypatch.setattr(chunks, 'ON_CPU', 2000)
    monkeypatch.setattr(chunks, 'TEACHER_ROWS', least)
    rows = []
    dense = LinearLogits.dense
    monkeypatch.setattr(LinearLogits, 'dense', lambda self: rows.append(len(self)) or dense(self))
    x, t = torch.randn(3, 40, 400).double().requires_grad_(), linear(1, 9, 3, 40, classes=400)
    loss = losses.kl(x, t, axis=-1)
    got = [torch.autograd.grad(2 * loss, x, retain_graph=True)[0] for _ in range(2)]
    assert sum(rows) == 120
    assert least <= max(rows) < least + 5  # a chunk has 5 positions
    want = torch.autograd.grad(losses.kl(x, t.dense(), axis=-1), x)[0]
    for g in got:
        torch.testing.assert_close(g, 2 * want, rtol=1e-9, atol=1e-15)


def test_classes_on_another_axis_are_refused():
    with pytest.raises(DistillError, match='have their classes on the last axis, but axis=1 of 3'):
        losses.kl(linear(0, 6, 3, 4), linear(1, 6, 3, 4), axis=1)


def test_an_output_layer_of_another_shape_is_refused():
    with pytest.raises(
        DistillError, match=r'Hidden states of shape \(3, 6\) do not fit .* \(50, 7\)'
    ):
        LinearLogits(torch.zeros(3, 6), torch.zeros(50, 7))


# draws


def drawn(t, number, T=1.0, seed=0):
    "Draws for one position, as a cache stores and reads them"
    parts = draw_classes(t[None], torch.tensor([seed]), number, T)
    freqs = parts['counts'].to(t.dtype) / number
    return Draws(parts['ids'], freqs, parts['entropy'].squeeze(-1), len(t), T)


@pytest.mark.parametrize('T', [1.0, 2.5])
@pytest.mark.parametrize('name', ['kl', 'soft_ce'])
def test_draws_are_unbiased(name, T):
    "Mean and gradient over 1e5 draws, within a bound for the largest of all coordinates (Bonferroni)"
    rng = torch.Generator().manual_seed(3)
    s, t = torch.randn(2, 30, generator=rng, dtype=torch.double) * 2
    fn, rounds, each = getattr(losses, name), 2000, 50
    x = s[None].requires_grad_()
    want = fn(x, t[None], T=T)
    exact = torch.autograd.grad(want, x)[0][0]
    # draws depend only on the seed of their row, so all rounds are one batch
    parts = draw_classes(t.expand(rounds, -1), torch.arange(rounds), each, T)
    freqs = parts['counts'].to(t.dtype) / each
    draws = Draws(parts['ids'], freqs, parts['entropy'].squeeze(-1), len(t), T)
    x = s.expand(rounds, -1).detach().requires_grad_()
    values = fn(x, draws, T=T, reduction='none')
    grads = torch.autograd.grad(values.sum(), x)[0]
    values = values.detach()
    coordinates = 1 + len(t)
    # a coordinate is farther away than this with a probability of 1e-3 / coordinates
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 1e-3 / coordinates, dtype=torch.double)))
    error = lambda x: x.std(0) / math.sqrt(rounds)
    assert abs(values.mean(0) - want.detach()) <= z * error(values)
    assert ((grads.mean(0) - exact).abs() <= z * error(grads) + 1e-12).all()


def test_top_k_of_as_many_bytes_is_biased():
    "The test above notices a bias: of the likeliest classes alone"
    rng = torch.Generator().manual_seed(3)
    s, t = torch.randn(2, 30, generator=rng, dtype=torch.double) * 2
    top = t.masked_fill(t < t.topk(5).values.min(), -torch.inf)
    exact, biased = [losses.kl(s[None], o[None], T=1.0) for o in (t, top)]
    spread = torch.stack(
        [losses.kl(s[None], drawn(t, 50, seed=i), T=1.0) for i in range(200)]
    ).std()
    assert abs(biased - exact) > 10 * spread / math.sqrt(2000)


def test_counts_sum_to_the_number_of_draws():
    parts = draw_classes(torch.randn(7, 5, 9), torch.arange(7), 100, 1.0)
    assert parts['ids'].shape == parts['counts'].shape == (7, 5, 9)
    assert (parts['counts'].sum(-1) == 100).all()
    used = parts['counts'] > 0
    for ids, on in zip(parts['ids'].reshape(35, 9), used.reshape(35, 9)):
        assert len(set(ids[on].tolist())) == on.sum()


def test_draws_depend_only_on_the_seed_of_their_sample():
    t, seeds = torch.randn(6, 4, 20), torch.arange(6)
    a, b = draw_classes(t, seeds, 30, 1.0), draw_classes(t[3:5], seeds[3:5], 30, 1.0)
    assert torch.equal(a['ids'][3:5], b['ids'])
    assert torch.equal(a['counts'][3:5], b['counts'])


def test_a_class_without_probability_is_never_drawn():
    t = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    parts = draw_classes(t, torch.tensor([0]), 1000, 1.0)
    assert set(parts['ids'][parts['counts'] > 0].tolist()) == {1, 3}


def test_draws_at_another_temperature_are_refused():
    d = drawn(torch.randn(9), 20, T=2.0)
    with pytest.raises(DistillError, match=r'drawn|draws were made at T=2, but the loss has T=4'):
        losses.kl(torch.randn(1, 9), d, T=4.0)


def test_draws_in_chunks_with_a_mask(monkeypatch):
    t, mask = torch.randn(6, 4, 20), torch.rand(6, 4) > 0.4
    parts = draw_classes(t, torch.arange(6), 30, 1.0)
    d = Draws(parts['ids'], parts['counts'] / 30, parts['entropy'].squeeze(-1), 20)
    s = torch.randn(6, 4, 20, requires_grad=True)
    found = []
    for size in (2**16, 60):
        monkeypatch.setattr(chunks, 'ON_CPU', size)
        v = losses.kl(s, d, T=1.0, axis=-1, mask=mask)
        found.append((v, torch.autograd.grad(v, s)[0]))
    lp = s.log_softmax(-1).gather(-1, d.ids)
    want = (-(d.freqs * lp).sum(-1) - d.entropy)[mask].mean()
    for v, g in found:
        torch.testing.assert_close(v, want)
        torch.testing.assert_close(g, torch.autograd.grad(want, s, retain_graph=True)[0])
