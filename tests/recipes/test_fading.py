"Terms whose gradient ratio falls if the teacher adds little to the student's predictions."

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from fastdistill import DistillError, Distiller, Outputs, Recipe, Term, dist, losses
from fastdistill.base.outputs import Draws, LinearLogits
from fastdistill.recipes import batch_tensors
from fastdistill.recipes.recipe_text import recipe_from_text
from torch import nn

KL = dict(grad_ratio=3, T=1.0)
KINDS = dict(
    softmax=(lambda o: o.softmax(1), Term(losses.kl, fade=0.2, **KL)),
    sigmoid=(torch.sigmoid, Term(losses.binary_kl, fade=0.2, **KL)),
    regression=(lambda o: o, Term(losses.regression, grad_ratio=3, fade=0.2)),
)


def left_by_search(p_s, p_t, y, counts=1.0, fade=0.2):
    "What a search over mixtures leaves of the gradient ratio, for labels as probabilities or numbers"
    error = lambda m: (counts * (y - m * p_t - (1 - m) * p_s).square()).sum()
    best = min(error(m) for m in torch.linspace(0, 1, 2001))
    return min((1 - best / error(0)).item() / fade, 1.0)


def rows(kind, knows=1.5, n=80, c=6, seed=0):
    "Outputs of a student and of a better teacher, labels, and the same as probabilities or numbers"
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(n, c, generator=g), 0.7 * torch.randn(n, c, generator=g)
    if kind == 'softmax':
        y = torch.randint(c, (n,), generator=g)
        full = F.one_hot(y, c).float()
    else:
        y = full = torch.rand(n, c, generator=g).round() if kind == 'sigmoid' else s + t
    return s.requires_grad_(), t + knows * (full - full.mean()), y, full


def step(recipe, s, t, y, kind='softmax', d=None, **options):
    d = Distiller(None, None, recipe, kind=kind, check=False) if d is None else d
    y = y if isinstance(y, tuple) else (y,)
    return d, d.compute(Outputs(s), Outputs(t), d.head.task_loss((), s, y)[0], y, **options)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('knows', [0.4, 1.0])
def test_what_is_left_is_found_by_a_search_over_mixtures(kind, knows):
    p, term = KINDS[kind]
    term = copy.copy(term)
    s, t, y, full = rows(kind, knows)
    for fade in (0.2, 0.6, 1):
        term.fade = fade
        d, _ = step(term, s, t, y, kind)
        left = left_by_search(p(s), p(t), full, fade=fade)
        assert d.faded == {term.name: pytest.approx(left, abs=1e-4)}


def test_labels_that_do_not_count_are_left_out():
    s, t, y, full = rows('softmax', 0.4)
    counts = (torch.arange(80) % 3 > 0).float()[:, None]
    d, _ = step(KINDS['softmax'][1], s, t, y.where(counts[:, 0] > 0, -100))
    expected = left_by_search(s.softmax(1), t.softmax(1), full, counts)
    assert d.faded['kl'] == pytest.approx(expected, abs=1e-4)


def test_pixels_are_counted_along_the_class_axis():
    s, t, y, full = rows('softmax', 0.4)
    as_map = lambda o: o.reshape(5, 4, 4, -1).movedim(-1, 1)
    d, _ = step(KINDS['softmax'][1], as_map(s), as_map(t), y.reshape(5, 4, 4))
    assert d.faded['kl'] == pytest.approx(
        left_by_search(s.softmax(1), t.softmax(1), full), abs=1e-4
    )


@pytest.mark.parametrize('each', [False, True])
def test_a_mixed_batch_has_mixed_labels(each):
    s, t, y, full = rows('softmax', 0.4)
    lam = torch.linspace(0.5, 1, 80) if each else torch.tensor(0.7)
    d, _ = step(KINDS['softmax'][1], s, t, y, mixed=((y.flip(0),), lam))
    w = lam[:, None] if each else lam
    expected = left_by_search(s.softmax(1), t.softmax(1), w * full + (1 - w) * full.flip(0))
    assert d.faded['kl'] == pytest.approx(expected, abs=1e-4)


def test_probabilities_are_labels_too():
    s, t, _, full = rows('softmax', 0.4)
    soft = 0.9 * full + 0.1 / 6
    d, _ = step(KINDS['softmax'][1], s, t, soft)
    assert d.faded['kl'] == pytest.approx(
        left_by_search(s.softmax(1), t.softmax(1), soft), abs=1e-4
    )


def gradient(r, s):
    return torch.autograd.grad(r.total, s, retain_graph=True)[0]


def test_a_teacher_that_knows_the_labels_teaches_as_without_fading():
    s, t, y, _ = rows('softmax', 9.0)
    (d, fading), (_, plain) = (step(dist(grad_ratio=3, fade=o), s, t, y) for o in (0.2, 0))
    assert d.faded == {'dist': 1.0}
    assert torch.equal(gradient(fading, s), gradient(plain, s))


def test_of_a_useless_teacher_the_labels_get_the_whole_gradient():
    s, t, y, _ = rows('softmax', -3.0)
    d, r = step(KINDS['softmax'][1], s, t, y)
    assert str(d.faded['kl']) == '0.0'  # not -0.0, which messages would show as -0%
    own = torch.autograd.grad(F.cross_entropy(s, y), s)[0]
    torch.testing.assert_close(gradient(r, s), own)


def test_what_a_term_loses_the_labels_get():
    s, t, y, _ = rows('softmax', 0.4)
    d, r = step(KINDS['softmax'][1], s, t, y)
    left = d.faded['kl']
    own = torch.autograd.grad(F.cross_entropy(s, y), s)[0]
    term = torch.autograd.grad(losses.kl(s, t, T=1.0), s)[0]
    weight = r.weights['kl'] / left  # without fading
    whole = 1 / (1 + 3 * left)
    torch.testing.assert_close(gradient(r, s), whole * own + left * weight * term)
    assert 0.05 < left < 0.95


def test_a_student_that_overtakes_its_teacher_stops_listening():
    s, t, y, full = rows('softmax', 1.5)
    d, _ = step(KINDS['softmax'][1], s, t, y)
    assert d.faded['kl'] == 1.0
    better = (3 * full + 0.1 * torch.randn(80, 6)).requires_grad_()
    for _ in range(25):
        step(None, better, t, y, d=d)
    assert d.faded['kl'] < 0.1


def test_validation_and_batches_without_labels_change_nothing():
    s, t, y, _ = rows('softmax', 0.4)
    d, _ = step(KINDS['softmax'][1], s, t, y)
    before = d.faded
    other = rows('softmax', 5.0, seed=1)
    with torch.no_grad():
        step(None, *other[:3], d=d)
    d.without_labels(Outputs(other[0]), Outputs(other[1]))
    assert d.faded == before


def test_a_checkpoint_continues_the_same():
    s, t, y, _ = rows('softmax', 0.4)
    d, _ = step(KINDS['softmax'][1], s, t, y)
    again = Distiller(None, None, KINDS['softmax'][1], check=False)
    again.set_extra_state(d.get_extra_state())
    assert again.faded == d.faded
    other = rows('softmax', 1.0, seed=1)[:3]
    (_, a), (_, b) = (step(None, *other, d=o) for o in (d, again))
    assert a.total.item() == b.total.item()
    assert again.faded == d.faded


def test_a_state_from_before_fading_is_read():
    s, t, y, _ = rows('softmax', 0.4)
    plain, _ = step(Term(losses.kl, **KL), s, t, y)
    state = json.loads(bytes(plain.get_extra_state().tolist()))
    assert 'gain' not in state['ratios']['kl']
    d = Distiller(None, None, KINDS['softmax'][1], check=False)
    d.set_extra_state(plain.get_extra_state())
    assert d.faded == {}


def test_classes_that_the_teacher_lacks_are_left_out():
    s, t, y, full = rows('softmax', 0.4)
    keep = [0, 2, 5]
    d = Distiller(None, None, KINDS['softmax'][1], check=False)
    d.compute(Outputs(s), Outputs(t[:, keep], classes=keep), F.cross_entropy(s, y), (y,))
    counts = full[:, keep].sum(1, keepdim=True)
    parts = s[:, keep].softmax(1), t[:, keep].softmax(1), full[:, keep]
    assert d.faded['kl'] == pytest.approx(left_by_search(*parts, counts), abs=1e-4)


def test_fading_needs_a_gradient_ratio():
    with pytest.raises(DistillError, match='fade=0.2 of kl lowers its gradient ratio'):
        Term(losses.kl, 0.5, fade=0.2)


@pytest.mark.parametrize('fade', [-0.1, 1.1, float('nan'), 'yes'])
def test_fade_is_a_gain(fade):
    with pytest.raises(DistillError, match=f'fade={fade!r} of kl: must be a number from 0 to 1'):
        Term(losses.kl, grad_ratio=1, fade=fade)


def test_fading_can_be_written_as_text():
    written = recipe_from_text('labels + dist(T=4, grad_ratio=3, fade=0.2)')
    assert repr(written) == repr(Recipe(dist(T=4, grad_ratio=3, fade=0.2)))


def test_a_student_with_a_weak_teacher_ends_as_good_as_without():
    "In a plain loop: the teacher is right for a third of the items, the labels for all of them"
    g = torch.Generator().manual_seed(0)
    x, right = torch.randn(2000, 10, generator=g), nn.Linear(10, 5)
    y = right(x).argmax(1)
    wrong = torch.randint(5, (2000,), generator=g)
    t = 3 * F.one_hot(y.where(torch.rand(2000, generator=g) < 0.2, wrong), 5).float()

    def accuracy(recipe):
        torch.manual_seed(0)
        student = nn.Linear(10, 5)
        d = Distiller(None, None, recipe, check=False) if recipe else None
        opt = torch.optim.Adam(student.parameters(), 0.02)
        for rows in torch.arange(1000).split(50):
            s = student(x[rows])
            loss = F.cross_entropy(s, y[rows])
            if d is not None:
                loss = d.compute(Outputs(s), Outputs(t[rows]), loss, (y[rows],)).total
            opt.zero_grad()
            loss.backward()
            opt.step()
        return (student(x[1000:]).argmax(1) == y[1000:]).float().mean().item()

    assert accuracy(Recipe(Term(losses.kl, **KL))) < accuracy(None) - 0.02
    assert accuracy(KINDS['softmax'][1]) > accuracy(None) - 0.02


@pytest.mark.parametrize('each', [False, True])
def test_a_mixed_position_with_one_ignored_label_has_the_other_label(each):
    s, t, y, full = rows('softmax', 0.1)
    first, second = torch.arange(80) % 3 > 0, torch.arange(80) % 5 > 0
    lam = torch.linspace(0.5, 1, 80) if each else torch.tensor(0.7)
    ys = y.where(first, -100), y.flip(0).where(second, -100)
    d, _ = step(KINDS['softmax'][1], s, t, ys[0], mixed=((ys[1],), lam))
    w = lam.expand(80)[:, None] * first[:, None], (1 - lam).expand(80)[:, None] * second[:, None]
    counts = w[0] + w[1]
    mixture = (w[0] * full + w[1] * full.flip(0)) / counts.clamp_min(1e-9)
    expected = left_by_search(s.softmax(1), t.softmax(1), mixture, counts)
    assert d.faded['kl'] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('at_once', [7 * 6, 2**22])
@pytest.mark.parametrize('mix', [False, True])
def test_hidden_states_fade_as_their_logits(at_once, mix, monkeypatch):
    monkeypatch.setattr(batch_tensors, 'PLAIN', at_once)
    s, t, y, _ = rows('softmax', 0.1)
    y = y.where(torch.arange(80) % 3 > 0, -100)
    hidden, weight = (
        t @ torch.linalg.inv(torch.triu(torch.ones(6, 6))).T,
        torch.triu(torch.ones(6, 6)),
    )
    options = dict(mixed=((y.flip(0),), torch.linspace(0.5, 1, 80))) if mix else {}
    (d, a), (other, b) = (
        step(KINDS['softmax'][1], s, teacher, y, **options)
        for teacher in (t, LinearLogits(hidden, weight))
    )
    assert other.faded == {'kl': pytest.approx(d.faded['kl'], abs=1e-4)}
    assert 0.05 < d.faded['kl'] < 0.95
    torch.testing.assert_close(a.total, b.total)


@pytest.mark.parametrize('check', [True, False])
def test_draws_do_not_show_whether_a_teacher_helps(check):
    s, _, y, _ = rows('softmax')
    draws = Draws(y[:, None], torch.ones(80, 1), torch.zeros(80), 6)
    with pytest.raises(DistillError, match='kl has fade=, which needs the probabilities'):
        Distiller(None, None, KINDS['softmax'][1], check=check).compute(
            Outputs(s), Outputs(draws), F.cross_entropy(s, y), (y,)
        )


@pytest.mark.parametrize('knows', [-3.0, -0.1, 0.0, 0.1, 0.2, 9.0])
def test_a_gradient_that_fades_in_part_is_at_least_three_quarters_as_long(knows):
    "As docs/features.md says: 1/(1+3f) for the labels and 3f/4 for the term"
    s, t, y, _ = rows('softmax', knows)
    d, r = step(
        Term(lambda a, b: -(a * F.one_hot(y, 6)).mean(), grad_ratio=3, fade=0.2, name='same'),
        s,
        t,
        y,
    )
    own = F.cross_entropy(s, y)
    norm = lambda v: torch.autograd.grad(v, s, retain_graph=True)[0].norm().item()
    left, term = d.faded['same'], r.terms['same']
    assert norm(term) == pytest.approx(0.75 * left * norm(own), rel=1e-4)
    assert norm(r.total - term) == pytest.approx(norm(own) / (1 + 3 * left), rel=1e-4)
    assert 0.749 < norm(term) / norm(own) + norm(r.total - term) / norm(own) <= 1.0001
