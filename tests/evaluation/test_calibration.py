"Temperatures fitted after training, against scikit-learn, closed forms and plain loops."

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastdistill import DistillError
from fastdistill.base.task import Task
from fastdistill.evaluation import fit_temperature
from fastdistill.evaluation.calibration import Calibration, calibrate_model
from reports import measured


def drawn(n=20_000, c=5, scale=2.0):
    "Logits, and labels drawn from their softmax"
    z = torch.randn(n, c, generator=torch.Generator().manual_seed(0)) * scale
    y = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return z, y


@pytest.mark.parametrize('k', [0.3, 1.0, 4.0])
def test_logits_that_are_k_times_too_large_need_the_temperature_k(k):
    z, y = drawn()
    assert fit_temperature(k * z, y).item() == pytest.approx(k, rel=0.03)


def test_the_temperature_has_the_lowest_nll_of_a_fine_grid():
    z, y = drawn(500)
    grid = torch.logspace(-1, 1, 2001)
    nll = [F.cross_entropy(z / t, y).item() for t in grid]
    assert fit_temperature(z, y).item() == pytest.approx(grid[np.argmin(nll)].item(), rel=2e-3)


def test_each_label_of_a_sigmoid_gets_the_inverse_slope_of_a_logistic_regression():
    z = torch.randn(3000, 3) * torch.tensor([1.0, 3.0, 0.5])
    y = (torch.rand(3000, 3) < (z / torch.tensor([1.0, 4.0, 0.4])).sigmoid()).float()
    wanted = [
        1
        / LogisticRegression(C=1e9, fit_intercept=False).fit(z[:, i : i + 1], y[:, i]).coef_.item()
        for i in range(3)
    ]
    assert fit_temperature(z, y, kind='sigmoid').tolist() == pytest.approx(wanted, rel=1e-3)


def test_classes_may_be_on_any_axis_and_ignored_positions_do_not_count():
    z, y = drawn(800)
    wanted = fit_temperature(z, y).item()
    maps, labels = z.view(2, 20, 20, 5).movedim(-1, 1), y.view(2, 20, 20)
    assert fit_temperature(maps, labels).item() == pytest.approx(wanted)
    tokens = z.view(8, 100, 5)
    assert fit_temperature(tokens, y.view(8, 100), axis=2).item() == pytest.approx(wanted)
    more = torch.cat([z, 50 * torch.randn(100, 5)])
    ignored = torch.cat([y, torch.full((100,), -100)])
    assert fit_temperature(more, ignored).item() == pytest.approx(wanted)


def test_labels_that_determine_no_temperature_give_1():
    y = torch.arange(6) % 3
    assert fit_temperature(F.one_hot(y, 3).float(), y) == 1
    constant = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    T = fit_temperature(
        torch.tensor([[2.0, -1.0], [1.0, 1.0], [3.0, 0.5], [1.0, 1.0]]), constant, kind='sigmoid'
    )
    assert T[0] == 1
    assert T[1] != 1


def test_numbers_and_unfit_labels_are_refused():
    with pytest.raises(DistillError, match='numbers have no temperature'):
        fit_temperature(torch.randn(4, 1), torch.randn(4, 1), kind='regression')
    with pytest.raises(
        DistillError, match=r'\(shape \(3,\)\) do not fit the logits \(shape \(4, 2\)\)'
    ):
        fit_temperature(torch.randn(4, 2), torch.zeros(3, dtype=torch.long))


def striped(n=4, c=5, h=64, w=512):
    "Masks whose logits are three times too large, except for each 16th column, where they are right"
    z, y = drawn(n * h * w, c)
    sure = torch.where(torch.arange(w) % 16 == 0, 1.0, 3.0).repeat(n * h)
    maps = lambda o: o.view(n, h, w, -1).movedim(-1, 1)
    return maps(z * sure[:, None]), y.view(n, h, w)


def test_of_many_pixels_all_columns_count(monkeypatch):
    import fastdistill.evaluation.calibration as calibration

    z, y = striped()
    wanted = fit_temperature(z, y).item()
    assert wanted == pytest.approx(2.8, abs=0.2)
    monkeypatch.setattr(calibration, 'MOST_LOGITS', 64 * 5 * 4096)
    c = calibrate_model(nn.Identity(), [((z,), (y,))], Task('softmax'), fold=False)
    assert c.n == 4096
    assert c.temperature == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize('axis', [1, -1], ids=['axis 1', 'the axis of the flat losses'])
def test_each_label_of_masks_has_one_temperature(axis):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 1)
    x = torch.randn(6, 3, 20, 24)
    with torch.no_grad():
        model.weight.mul_(4)
        z = model(x)
    y = (torch.rand_like(z) < (z / torch.tensor([1.5, 3.0])[:, None, None]).sigmoid()).float()
    T = fit_temperature(z, y, kind='sigmoid', axis=axis)
    rows = lambda o: o.movedim(1, -1).flatten(0, -2)
    assert T.tolist() == pytest.approx(fit_temperature(rows(z), rows(y), kind='sigmoid').tolist())
    assert T.tolist() == pytest.approx([1.5, 3.0], rel=0.2)
    c = calibrate_model(model, [((x,), (y,))], Task('sigmoid', axis))
    assert (c.layer, c.n) == ('', 6 * 20 * 24)
    with torch.no_grad():
        assert torch.allclose(model(x), z / T[:, None, None].float(), atol=1e-5)
    # one label, whose masks have no axis for it
    one = fit_temperature(z[:, :1], y[:, 0], kind='sigmoid', axis=axis)
    assert one.tolist() == pytest.approx(T[:1].tolist())


class Tied(nn.Module):
    "Predicts the next token with the weights of its embedding"

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.out(self.body(x).relu())


class Scaled(nn.Module):
    "Its logits are not the output of its last layer"

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 5)

    def forward(self, x):
        return 3 * self.out(x)


class Twice(nn.Module):
    "Its last layer is used before, too"

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(5, 5)

    def forward(self, x):
        return self.out(self.out(x).relu())


MLP = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
FOLDED = dict(
    mlp=(MLP, torch.randn(200, 3), (200,), 1, '2'),
    masks=(Masks(), torch.randn(4, 3, 8, 8), (4, 8, 8), 1, 'out'),
    tokens=(
        nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)),
        torch.arange(200).view(4, 50) % 5,
        (4, 50),
        2,
        '1',
    ),
)


@pytest.mark.parametrize('name', FOLDED)
def test_the_folded_model_has_the_logits_divided_by_the_temperature(name):
    model, x, shape, axis, layer = FOLDED[name]
    model = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
    y = before.argmax(axis).where(torch.rand(shape) < 0.5, torch.randint(5, shape))
    c = calibrate_model(model, [((x,), (y,))], Task('softmax', axis))
    assert c.layer == layer
    with torch.no_grad():
        assert torch.allclose(model(x), before / c.temperature, atol=1e-6)
    nll = F.cross_entropy((before / c.temperature).movedim(axis, 1), y).item()
    assert c.after['nll'] == pytest.approx(nll, rel=1e-5)
    assert c.after['nll'] < c.before['nll']


UNFOLDED = dict(
    tied=(Tied(), torch.arange(60).view(6, 10) % 5, 2, "shares its weight with 'embed.weight'"),
    scaled=(Scaled(), torch.randn(60, 3), 1, 'are not the output of a linear layer'),
    twice=(Twice(), torch.randn(60, 5), 1, 'also changes its other outputs'),
)


@pytest.mark.parametrize('name', UNFOLDED)
def test_a_model_whose_last_layer_cannot_take_the_temperature_stays_as_it_is(name):
    model, x, axis, reason = UNFOLDED[name]
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        z = model(x)
    y = z.argmax(axis).where(
        torch.rand(z.argmax(axis).shape) < 0.5, torch.randint(5, z.argmax(axis).shape)
    )
    c = calibrate_model(model, [((x,), (y,))], Task('softmax', axis))
    assert c.layer is None
    assert reason in c.reason
    assert reason in str(c)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_an_error_while_the_temperature_is_folded_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data = 9 * torch.eye(3)
    before = copy.deepcopy(model.state_dict())

    def fail_if_scaled(m, x):
        if not torch.equal(m.weight, before['0.weight']):
            raise RuntimeError('scaled')

    model[0].register_forward_pre_hook(fail_if_scaled)
    y = torch.arange(200) % 3
    x = F.one_hot(y, 3) + torch.randn(200, 3)
    with pytest.raises(RuntimeError, match='scaled'):
        calibrate_model(model, [((x,), (y,))], Task('softmax'))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_changes_with_fold_false():
    model = copy.deepcopy(MLP)
    y = torch.randint(5, (200,))
    c = calibrate_model(model, [((torch.randn(200, 3),), (y,))], Task('softmax'), fold=False)
    assert c.layer is None
    for k, v in model.state_dict().items():
        assert torch.equal(v, MLP.state_dict()[k]), k


def test_a_model_that_is_always_wrong_stays_as_it_is_and_the_reason_is_named():
    model = copy.deepcopy(MLP)
    x = torch.randn(200, 3)
    with torch.no_grad():
        y = model(x).argmin(1)
    c = calibrate_model(model, [((x,), (y,))], Task('softmax'))
    assert c.temperature == 1
    assert c.layer is None
    assert 'no temperature between 0.05 and 20' in str(c)
    for k, v in model.state_dict().items():
        assert torch.equal(v, MLP.state_dict()[k]), k


def test_a_report_says_that_probabilities_became_worse_although_the_predictions_became_better():
    y = torch.randint(5, (400,))
    alone = 2.0 * F.one_hot(torch.where(torch.rand(400) < 0.6, y, torch.randint(5, (400,))), 5)
    student = 20.0 * F.one_hot(torch.where(torch.rand(400) < 0.8, y, torch.randint(5, (400,))), 5)
    r = measured(dict(alone=alone, student=student), y, Task('softmax'), baseline='alone')
    assert 'student is better than alone' in str(r)
    assert 'Its probabilities are worse: NLL' in str(r)
    assert 'calibrate()' in str(r)
    r = measured(dict(alone=alone, student=student / 10), y, Task('softmax'), baseline='alone')
    assert 'probabilities are worse' not in str(r)


@pytest.mark.parametrize('scale, how', [(20.0, 'overconfident'), (0.1, 'underconfident')])
def test_worse_probabilities_are_called_what_they_are(scale, how):
    y = torch.arange(5).repeat(80)
    guess = torch.where(torch.arange(400) % 4 > 0, y, (y + 1) % 5)  # 75% are right
    alone = 2.0 * F.one_hot(guess, 5)
    r = measured(dict(alone=alone, student=alone / 2 * scale), y, Task('softmax'), baseline='alone')
    top = (alone / 2 * scale).softmax(1).amax(1).mean().item()
    assert f'it is {how}: mean confidence {100 * top:.1f}%, accuracy 75.0%' in str(r)


@pytest.mark.parametrize('ece, says', [(0.028, True), (0.02, False), (0.01, False)])
def test_a_line_says_why_the_ece_may_rise(ece, says):
    before, after = dict(nll=0.3, ece=0.02, brier=0.1), dict(nll=0.299, ece=ece, brier=0.1)
    found = Calibration(1.03, 1000, before, after, 'head')
    line = str(found)
    assert repr(found) == line  # a notebook shows it without print
    assert f'NLL 0.3 -> 0.299, ECE 2.0% -> {100 * ece:.1f}%' in line
    assert ('(the temperature has the lowest NLL, not the lowest ECE)' in line) is says
