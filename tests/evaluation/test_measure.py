"What is measured of models, against scikit-learn, torchmetrics, scipy, closed forms and plain loops."

import warnings
import numpy as np
import pytest, torch
import torch.nn.functional as F
import torchmetrics.functional as tm
from scipy import stats
from sklearn import metrics as skm
from torch import nn
from fastdistill import DistillError, Teacher
from fastdistill.evaluation import PairedScores, mcnemar, measure_models, roles_of
from fastdistill.evaluation.cost import cost_of, latencies
from fastdistill.evaluation.model_comparison import MAX_NAMED
from fastdistill.evaluation.paired_tests import MAX_SAMPLES
from fastdistill.evaluation.metrics import BINS, measures_of
from fastdistill.evaluation import Report
from fastdistill.base.task import Task
from reports import Stored, measured


def value(r, name, model='a'):
    return r.models[model].measures[name].value


def ece(r, model='a'):
    b = r.models[model].reliability
    n = sum(b['count'])
    return sum(abs(c - k) for c, k in zip(b['confidence'], b['right'])) / n


def classes(n=101, c=8):
    y = torch.randint(c, (n,))
    return torch.randn(n, c) * 2 + 1.5 * F.one_hot(y, c), y


def test_classes_are_scored_as_others_score_them():
    o, y = classes()
    r = measured(dict(a=o), y, Task('softmax'))
    p = o.double().softmax(1)
    assert value(r, 'accuracy') == pytest.approx(skm.accuracy_score(y, o.argmax(1)))
    assert 'top5' not in r.models['a'].measures
    assert value(r, 'nll') == pytest.approx(skm.log_loss(y, p, labels=range(8)), rel=1e-5)
    assert value(r, 'brier') == pytest.approx(
        ((p - F.one_hot(y, 8)) ** 2).sum(1).mean().item(), rel=1e-5
    )
    assert ece(r) == pytest.approx(
        tm.calibration_error(p, y, 'multiclass', n_bins=BINS, num_classes=8).item(), rel=1e-4
    )
    assert r.models['a'].classes['recall'] == pytest.approx(
        skm.recall_score(y, o.argmax(1), average=None).tolist()
    )
    assert r.models['a'].classes['precision'] == pytest.approx(
        skm.precision_score(y, o.argmax(1), average=None).tolist()
    )
    assert r.counts == y.bincount(minlength=8).tolist() and r.n == 101 and r.headline == 'accuracy'


def test_labels_are_scored_as_others_score_them():
    y = (torch.rand(60, 5) < 0.3).float()
    o = torch.randn(60, 5) + 2 * y - 1
    r = measured(dict(a=o), y, Task('sigmoid'))
    p, found = o.sigmoid(), (o > 0)
    assert r.headline == 'f1' and value(r, 'f1') == pytest.approx(
        skm.f1_score(y, found, average='micro')
    )
    assert value(r, 'accuracy') == pytest.approx((found == (y > 0.5)).double().mean().item())
    assert value(r, 'nll') == pytest.approx(
        F.binary_cross_entropy(p.double(), y.double()).item(), rel=1e-5
    )
    assert value(r, 'brier') == pytest.approx(((p - y) ** 2).mean().item(), rel=1e-5)
    assert ece(r) == pytest.approx(
        tm.calibration_error(p.flatten(), y.long().flatten(), 'binary', n_bins=BINS).item(),
        rel=1e-4,
    )
    assert r.models['a'].classes['recall'] == pytest.approx(
        skm.recall_score(y, found, average=None).tolist()
    )


def delong(o, y):
    "Area under the ROC curve of each column of scores, and the covariance of the areas, in plain loops"
    pos, neg = o[y == 1], o[y == 0]
    wins = (pos[:, None] > neg[None]) + 0.5 * (pos[:, None] == neg[None])
    covariance = np.cov(wins.mean(1).T) / len(pos) + np.cov(wins.mean(0).T) / len(neg)
    return wins.mean((0, 1)), covariance


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_the_area_under_the_roc_curve_of_two_classes(kind):
    g = np.random.default_rng(0)
    y = (g.random(300) < 0.3).astype(int)
    o = np.round(g.normal(size=(300, 2)) + y[:, None] * [1.0, 0.6], 1)  # with ties
    logits = [torch.from_numpy(v).float() for v in o.T]
    if kind == 'softmax':
        shift = torch.randn(300, 1)
        outs = [shift + torch.stack([torch.zeros(300), v], 1) for v in logits]
        y = np.append(y, -100)
        outs = [torch.cat([v, 9 * torch.ones(1, 2)]) for v in outs]  # a sample to ignore
        outs = [v.double() for v in outs]
    else:
        outs = logits
    r = measured(
        dict(zip('ab', outs)),
        torch.from_numpy(y) if kind == 'softmax' else torch.from_numpy(y).float(),
        Task(kind),
        baseline='b',
        repeats=4000,
    )
    y = y[:300]
    if kind == 'softmax':  # the shift rounds some ties
        o = np.stack([(v[:300, 1] - v[:300, 0]).numpy() for v in outs], 1)
    areas, covariance = delong(o, y)
    for i, k in enumerate('ab'):
        e, half = r.models[k].measures['auc'], 1.96 * covariance[i, i] ** 0.5
        assert e.value == pytest.approx(skm.roc_auc_score(y, o[:, i]))
        assert e.value == pytest.approx(areas[i])
        assert (e.low, e.high) == pytest.approx((e.value - half, e.value + half), abs=0.1 * half)
    d = r.comparison('a', 'b').differences['auc']
    sd = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert d.value == pytest.approx(areas[0] - areas[1])
    assert d.p == pytest.approx(2 * stats.norm.sf(abs(d.value) / sd), abs=0.01)
    assert 'AUC' in r.to_markdown()


def test_no_area_without_both_classes_or_with_more_classes():
    r = measured(dict(a=torch.randn(20, 2)), torch.zeros(20).long(), Task('softmax'))
    assert value(r, 'auc') is None
    r = measured(dict(a=torch.randn(20, 3)), torch.arange(20) % 2, Task('softmax'))
    assert 'auc' not in r.models['a'].measures


@pytest.mark.parametrize('shape', [(50,), (50, 1), (50, 4)], ids=str)
def test_numbers_are_scored_as_others_score_them(shape):
    y = torch.randn(shape) * 3 + 5
    o = y + torch.randn(shape)
    r = measured(dict(a=o), y.flatten() if shape == (50, 1) else y, Task('regression'))
    flat = lambda t: t.reshape(50, -1).numpy()
    assert value(r, 'r2') == pytest.approx(
        skm.r2_score(flat(y), flat(o), multioutput='variance_weighted'), rel=1e-5
    )
    assert value(r, 'mae') == pytest.approx(skm.mean_absolute_error(flat(y), flat(o)), rel=1e-5)
    assert value(r, 'rmse') == pytest.approx(
        skm.root_mean_squared_error(y.flatten(), o.flatten()), rel=1e-5
    )


def masks(n=12, c=4, size=9):
    y = torch.randint(c, (n, size, size))
    y[:, :2] = 11  # does not count
    return torch.randn(n, c, size, size) + 1.5 * F.one_hot(y.clamp(max=c - 1), c).movedim(-1, 1), y


def test_masks_are_scored_as_others_score_them():
    o, y = masks()
    r = measured(dict(a=o), y, Task('softmax', 1, 11), bs=5)
    assert r.headline == 'miou'
    assert value(r, 'miou') == pytest.approx(
        tm.jaccard_index(o, y, 'multiclass', num_classes=4, ignore_index=11).item(), rel=1e-5
    )
    there = y != 11
    assert value(r, 'accuracy') == pytest.approx((o.argmax(1) == y)[there].double().mean().item())
    assert value(r, 'nll') == pytest.approx(F.cross_entropy(o, y, ignore_index=11).item(), rel=1e-5)
    iou = tm.jaccard_index(o, y, 'multiclass', num_classes=4, ignore_index=11, average='none')
    assert r.models['a'].classes['iou'] == pytest.approx(iou.tolist(), rel=1e-5)
    assert r.n == 12


@pytest.mark.parametrize('axis', [1, -1], ids=['axis 1', 'the axis of the flat losses'])
@pytest.mark.parametrize('labels', [1, 3])
def test_masks_of_several_labels_have_a_row_for_each_label(axis, labels):
    y = (torch.rand(10, labels, 6, 7) < 0.4).float()
    o = torch.randn_like(y) + y
    r = measured(dict(a=o), y if labels > 1 else y[:, 0], Task('sigmoid', axis), bs=4)
    rows = lambda v: v.movedim(1, -1).reshape(-1, labels)
    true, found = rows(y).numpy(), (rows(o) > 0).numpy()
    assert value(r, 'f1') == pytest.approx(skm.f1_score(true.ravel(), found.ravel()))
    assert r.counts == true.sum(0).tolist()
    for k, fn in dict(recall=skm.recall_score, precision=skm.precision_score).items():
        each = [fn(a, b) for a, b in zip(true.T, found.T)]
        assert r.models['a'].classes[k] == pytest.approx(each)


def test_a_position_that_does_not_count_may_hold_anything():
    o, y = torch.randn(6, 4, 5), torch.randint(4, (6, 5))
    y[:, 2] = 9
    o[:, 0, 2] = -torch.inf
    r = measured(dict(a=o), y, Task('softmax', 1, 9))
    assert value(r, 'nll') == pytest.approx(F.cross_entropy(o, y, ignore_index=9).item(), rel=1e-5)


def test_an_ignored_class_has_no_score_even_if_it_is_predicted():
    o, y = masks()
    y[y == 11] = 3
    r = measured(dict(a=o), y, Task('softmax', 1, 3), bs=5)
    assert (o.argmax(1) == 3).any()
    assert value(r, 'miou') == pytest.approx(
        tm.jaccard_index(o, y, 'multiclass', num_classes=4, ignore_index=3).item(), rel=1e-5
    )
    there = y != 3
    assert value(r, 'accuracy') == pytest.approx((o.argmax(1) == y)[there].double().mean().item())
    scores = r.models['a'].classes
    assert [scores[k][3] for k in ('iou', 'recall', 'precision')] == [None] * 3
    assert None not in scores['iou'][:3]


def test_a_class_that_is_nowhere_does_not_count():
    o, y = masks()
    o[:, 3] = -torch.inf
    y[y == 3] = 0
    r = measured(dict(a=o), y, Task('softmax', 1, 11))
    assert value(r, 'miou') == pytest.approx(np.mean(r.models['a'].classes['iou'][:3]))
    assert r.models['a'].classes['iou'][3] is None and r.models['a'].classes['recall'][3] is None


def test_perplexity_is_of_all_tokens():
    o, y = torch.randn(10, 6, 9), torch.randint(9, (10, 6))
    r = measured(dict(a=o), y, Task('softmax', -1), language=True)
    assert r.headline == 'perplexity'
    assert value(r, 'perplexity') == pytest.approx(tm.text.perplexity(o, y).item(), rel=1e-5)


def test_agreement_in_a_plain_loop():
    (t, y), noise = classes(), torch.randn(101, 8)
    s = t + 2 * noise
    got = measured(dict(t=t, s=s), y, Task('softmax'), teacher='t').models['s'].agreement
    same = five = kl = reverse = right = same_right = same_wrong = alone = 0
    for a, b, label in zip(s.double(), t.double(), y):
        p, q = b.softmax(0), a.softmax(0)
        kl, reverse = (
            kl + (p * (p / q).log()).sum().item(),
            reverse + (q * (q / p).log()).sum().item(),
        )
        same, five = (
            same + int(a.argmax() == b.argmax()),
            five + int(b.argmax() in a.topk(5).indices),
        )
        knows = b.argmax() == label
        right, same_right = right + int(knows), same_right + int(knows and a.argmax() == b.argmax())
        same_wrong, alone = (
            same_wrong + int(not knows and a.argmax() == b.argmax()),
            alone + int(not knows and a.argmax() == label),
        )
    n = len(y)
    assert got == pytest.approx(
        dict(
            same=same / n,
            in_top5=five / n,
            kl=kl / n,
            reverse_kl=reverse / n,
            teacher_right=right / n,
            same_where_right=same_right / right,
            same_where_wrong=same_wrong / (n - right),
            right_where_right=same_right / right,
            right_where_wrong=alone / (n - right),
        ),
        rel=1e-4,
    )


def test_agreement_of_labels_and_numbers():
    y = (torch.rand(60, 5) < 0.3).float()
    t, s = torch.randn(60, 5) + y, torch.randn(60, 5)
    got = measured(dict(t=t, s=s), y, Task('sigmoid'), teacher='t').models['s'].agreement
    bernoulli = lambda o: torch.distributions.Bernoulli(logits=o)
    assert got['kl'] == pytest.approx(
        torch.distributions.kl_divergence(bernoulli(t), bernoulli(s)).mean().item(), rel=1e-4
    )
    assert got['reverse_kl'] == pytest.approx(
        torch.distributions.kl_divergence(bernoulli(s), bernoulli(t)).mean().item(), rel=1e-4
    )
    assert got['same'] == pytest.approx(((t > 0) == (s > 0)).double().mean().item())
    y = torch.randn(60)
    t, s = y + torch.randn(60), y + torch.randn(60)
    got = measured(dict(t=t, s=s), y, Task('regression'), teacher='t').models['s'].agreement
    assert got['mae'] == pytest.approx((t - s).abs().mean().item(), rel=1e-5)
    assert got['errors_correlation'] == pytest.approx(np.corrcoef(t - y, s - y)[0, 1], rel=1e-4)


def test_a_model_agrees_with_itself():
    o, y = classes()
    got = measured(dict(t=o, s=o), y, Task('softmax'), teacher='t')
    assert got.models['s'].agreement['same'] == 1 and got.models['s'].agreement['kl'] == 0
    d = got.comparison('s', 't').differences['accuracy']
    assert (d.value, d.low, d.high, d.p) == (0, 0, 0, 1) and not d.significant


# what is more than chance


@pytest.mark.parametrize('split', [(0, 0), (1, 0), (3, 9), (9, 3), (40, 20), (5, 5)], ids=str)
def test_mcnemar_is_the_binomial_sum(split):
    n, k = sum(split), min(split)
    tail = sum(stats.binom.pmf(i, n, 0.5) for i in range(k + 1))
    assert mcnemar(*split) == pytest.approx(min(1.0, 2 * tail))


def scores_of_right(**right):
    return {
        k: dict(right=np.asarray(v, float), nll=np.asarray(v, float), n=np.ones(len(v)))
        for k, v in right.items()
    }


def only(*names):
    return [m for m in measures_of('softmax', (), 3, False) if m.name in names]


def test_the_permutation_test_is_mcnemar_where_both_apply():
    g = np.random.default_rng(0)
    for _ in range(5):
        a, b = g.random((2, 80)) < 0.7
        # `nll` is the same number here, but it is tested by permutations
        d = (
            PairedScores(scores_of_right(a=a, b=b), only('accuracy', 'nll'), repeats=4000)
            .compare('a', 'b')
            .differences
        )
        assert (
            d['accuracy'].test == "McNemar's exact test"
            and d['nll'].test == 'paired permutation test'
        )
        assert d['nll'].p == pytest.approx(d['accuracy'].p, abs=0.03)


@pytest.mark.parametrize('scale', [1.0, 1e3, 1e6, 1e9], ids='{:g}'.format)
@pytest.mark.parametrize('few', [0.0, 0.1], ids=['equal', 'zeros'])
def test_ties_of_a_permutation_test_count_at_any_scale(scale, few):
    "All differences of the errors are equal, or most of them are 0"
    g = np.random.default_rng(0)
    y = (g.normal(size=10) + 3) * scale
    near = g.choice([0.1, 0.3, 0.7], 10)
    far = near + np.where(np.arange(10) < 4, 0.1, 0.1 - few)
    sums = lambda e: dict(abs=np.abs((y + e * scale) - y), n=np.ones(10))
    mae = [m for m in measures_of('regression', (), 0, False) if m.name == 'mae']
    got = PairedScores(dict(a=sums(near), b=sums(far)), mae, repeats=20_000).compare('a', 'b')
    wanted = stats.permutation_test(
        (near, far), lambda a, b: round((a - b).mean(), 9), permutation_type='samples'
    )
    assert got.differences['mae'].p == pytest.approx(wanted.pvalue, rel=0.5, abs=2e-4)


@pytest.mark.parametrize('name', ['accuracy', 'nll'])
def test_of_equal_models_one_in_twenty_is_called_significant_at_most(name):
    g, called = np.random.default_rng(1), 0
    for _ in range(400):
        hard = g.random(120)  # samples differ, so both models are right on mostly the same ones
        a, b = g.random((2, 120)) < 0.5 + 0.4 * hard
        called += (
            PairedScores(scores_of_right(a=a, b=b), only(name), repeats=200)
            .compare('a', 'b')
            .differences[name]
            .significant
        )
    assert (
        called <= 30
    )  # 20 are expected of an exact test, fewer of a discrete one; 30 is 2.3 standard deviations more


def test_no_permutation_test_says_that_chance_is_impossible():
    "The observed split is one of the possible ones, so that p is 1/(draws + 1) at least"
    o, y = classes(60)
    d = (
        measured(dict(a=20.0 * F.one_hot(y, 8), b=o), y, Task('softmax'), baseline='b')
        .comparison('a')
        .differences['nll']
    )
    assert d.test == 'paired permutation test'
    assert d.p == pytest.approx(1 / 201)


def test_intervals_hold_the_truth_as_often_as_they_say():
    g, held = np.random.default_rng(2), 0
    for _ in range(300):
        e = PairedScores(
            scores_of_right(a=g.random(150) < 0.7), only('accuracy'), repeats=300
        ).estimates('a')['accuracy']
        held += e.low <= 0.7 <= e.high
    assert 0.91 <= held / 300 <= 0.98


def test_the_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(0).normal(size=900)
    s = {'a': dict(nll=x, right=x, n=np.ones(900))}
    e = PairedScores(s, only('nll'), repeats=4000).estimates('a')['nll']
    half = 1.96 * x.std(ddof=1) / 30
    assert e.low == pytest.approx(x.mean() - half, abs=0.1 * half) and e.high == pytest.approx(
        x.mean() + half, abs=0.1 * half
    )


def test_paired_samples_show_a_difference_that_the_intervals_of_both_hide():
    g = np.random.default_rng(0)
    a = g.random(400) < 0.6
    b = a | (g.random(400) < 0.1)  # right on the same ones, and on a few more
    p = PairedScores(scores_of_right(a=a, b=b), only('accuracy'))
    ea, eb = (p.estimates(k)['accuracy'] for k in 'ab')
    assert eb.low < ea.high and p.compare('b', 'a').differences['accuracy'].significant


@pytest.mark.parametrize('n_classes, shown', [(20, False), (21, True)])
def test_top_5_accuracy_is_shown_for_more_than_20_classes(n_classes, shown):
    o, y = classes(210, n_classes)
    r = measured(dict(a=o), y, Task('softmax'))
    assert ('top5' in r.models['a'].measures) is shown
    if shown:
        wanted = skm.top_k_accuracy_score(y, o, k=5, labels=range(n_classes))
        assert value(r, 'top5') == pytest.approx(wanted)


@pytest.mark.parametrize('kind', ['constant', 'decision tree', 'rounded', 'masked'])
def test_classes_with_equal_logits_are_not_all_among_the_top_5(kind):
    y = torch.arange(250) % 25
    o = torch.randn(250, 25)
    if kind == 'constant':
        o = torch.zeros(250, 25)
    if kind == 'decision tree':  # certain of one class, which is right for a fifth of the samples
        o = torch.full((250, 25), 1e-7).log()
        o[torch.arange(250), torch.where(torch.arange(250) < 50, y, (y + 7) % 25)] = 0.0
    if kind == 'rounded':
        o = o.round()
    if kind == 'masked':
        o = torch.where(o > 1.5, o, -torch.inf)
        o[:, 3] = 0.0
    # as in argmax, the first of several classes with equal logits comes first
    order = np.argsort(-o.numpy(), axis=1, kind='stable')
    wanted = (order[:, :5] == y.numpy()[:, None]).any(1).mean()
    assert value(measured(dict(a=o), y, Task('softmax')), 'top5') == pytest.approx(wanted)


def test_the_share_of_the_lead_that_is_recovered():
    g = np.random.default_rng(0)
    u = g.random(3000)
    p = PairedScores(scores_of_right(t=u < 0.9, a=u < 0.7, s=u < 0.8), only('accuracy'))
    part = p.compare('s', 'a', 't').recovered['accuracy']
    assert (
        part.value == pytest.approx(0.5, abs=0.05)
        and part.low < 0.5 < part.high
        and part.high - part.low < 0.12
    )
    # no lead, nothing to recover: the teacher is as good as the baseline, or worse
    p = PairedScores(scores_of_right(t=u < 0.7, a=u < 0.7, s=u < 0.8, w=u < 0.5), only('accuracy'))
    assert p.compare('s', 'a', 't').recovered == {} == p.compare('s', 'a', 'w').recovered


@pytest.mark.parametrize('more, significant', [(5, False), (6, True)])
def test_only_a_significant_lead_can_be_recovered(more, significant):
    "The teacher is right on 5 or 6 samples more than the baseline, which McNemar's test calls p = .0625 or .03125"
    y = torch.zeros(50, dtype=torch.long)
    right = lambda n: F.one_hot((torch.arange(50) >= n).long(), 2).float()
    r = measured(
        dict(teacher=right(30 + more), alone=right(30), student=right(30 + more)),
        y,
        Task('softmax'),
        teacher='teacher',
        baseline='alone',
    )
    assert r.comparison('alone', 'teacher').differences['accuracy'].p == pytest.approx(
        2 * 0.5**more
    )
    assert ('accuracy' in r.comparison('student').recovered) is significant


@pytest.mark.parametrize('more, significant', [(2, False), (10, True)])
def test_a_report_tells_the_recovered_share_only_of_a_significant_difference(more, significant):
    y = torch.zeros(50, dtype=torch.long)
    right = lambda n: F.one_hot((torch.arange(50) >= n).long(), 2).float()
    outputs = dict(teacher=right(45), alone=right(30), student=right(30 + more))
    r = measured(outputs, y, Task('softmax'), teacher='teacher', baseline='alone')
    assert 'accuracy' in r.comparison('student').recovered
    assert ("of teacher's lead" in r.to_markdown()) is significant


def test_large_sets_are_drawn_in_groups_and_give_the_same_interval():
    x = np.random.default_rng(0).normal(size=3 * MAX_SAMPLES)
    s = {'a': dict(nll=x, right=x, n=np.ones(len(x)))}
    p = PairedScores(s, only('nll'), repeats=300)
    e, half = p.estimates('a')['nll'], 1.96 * x.std() / len(x) ** 0.5
    assert e.value == pytest.approx(x.mean()) and e.high - e.low == pytest.approx(
        2 * half, rel=0.15
    )
    assert p.n == MAX_SAMPLES


def test_one_sample_has_no_interval():
    r = measured(
        dict(a=torch.randn(1, 3), b=torch.randn(1, 3)),
        torch.tensor([1]),
        Task('softmax'),
        baseline='a',
    )
    assert (
        r.models['a'].measures['accuracy'].low is None
        and r.comparison('b').differences['accuracy'].low is None
    )


def test_what_is_stored_of_a_sample_does_not_grow_with_its_size(monkeypatch):
    import fastdistill.evaluation.model_comparison as models

    sizes = []

    class Spy(PairedScores):
        def __init__(self, scores, *args):
            sizes.append(sum(v.size for v in scores['a'].values()) / len(scores['a']['n']))
            super().__init__(scores, *args)

    monkeypatch.setattr(models, 'PairedScores', Spy)
    for size in (9, 36):
        o, y = masks(size=size)
        measured(dict(a=o), y, Task('softmax', 1, 11))
    assert sizes[0] == sizes[1] < 20


def test_pieces_of_a_batch_add_up(monkeypatch):
    import fastdistill.evaluation.model_comparison as models

    o, y = masks()
    whole = measured(dict(t=o, s=o.flip(0)), y, Task('softmax', 1, 11), teacher='t')
    monkeypatch.setattr(models, 'PIECE', 1)
    pieces = measured(dict(t=o, s=o.flip(0)), y, Task('softmax', 1, 11), teacher='t')
    assert {k: v.value for k, v in whole.models['s'].measures.items()} == pytest.approx(
        {k: v.value for k, v in pieces.models['s'].measures.items()}
    )
    assert whole.models['s'].agreement == pytest.approx(pieces.models['s'].agreement)


def test_many_classes_have_no_table():
    n = MAX_NAMED + 1
    r = measured(dict(a=torch.randn(3, n)), torch.tensor([0, 1, n - 1]), Task('softmax'))
    assert r.counts == [] and r.models['a'].classes == {}


# what does not fit


def test_roles_are_found_by_name():
    assert roles_of(['teacher', 'alone', 'distilled']) == ('teacher', 'alone')
    assert roles_of(['teacher', 'student']) == ('teacher', None)
    assert roles_of(['a', 'b']) == (None, 'a')
    assert roles_of(['big', 'small', 'new'], teacher='big') == ('big', 'small')
    with pytest.raises(DistillError, match="teacher='x': the models are named 'a', 'b'"):
        roles_of(['a', 'b'], teacher='x')
    with pytest.raises(DistillError, match='both teacher= and baseline='):
        roles_of(['a', 'b'], 'a', 'a')


def test_models_of_other_classes_nan_and_labels_that_do_not_fit_are_named():
    o, y = classes()
    with pytest.raises(
        DistillError,
        match=r"outputs of 'b' have shape \(7, 5\), but the outputs of 'a' have shape \(7, 8\).*select=",
    ):
        measured(dict(a=o, b=o[:, :5]), y, Task('softmax'))
    with pytest.raises(DistillError, match="outputs of 'b' are nan"):
        measured(dict(a=o, b=o * torch.nan), y, Task('softmax'))
    with pytest.raises(DistillError, match=r'labels \(shape \(7, 2\)\) do not fit'):
        measured(dict(a=o), torch.zeros(101, 2).long(), Task('softmax'))
    with pytest.raises(DistillError, match='no batch'):
        measure_models(dict(a=Teacher(Stored(o))), [], Task('softmax'))
    with pytest.raises(DistillError, match="headline='f1': must be one of 'accuracy',"):
        measured(dict(a=o), y, Task('softmax'), headline='f1')


# what a model costs


def test_parameters_macs_bytes_and_memory_counted_by_hand():
    m = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10)
    )
    with Teacher(m) as t:
        c = cost_of(t, (torch.randn(5, 3, 8, 8),))
    assert c.params == 3 * 4 * 9 + 256 * 10 + 10 and c.bytes == 4 * c.params
    assert c.macs == 64 * 3 * 4 * 9 + 256 * 10
    images, maps, out = 4 * 5 * 3 * 64, 4 * 5 * 4 * 64, 4 * 5 * 10
    assert c.memory - c.bytes >= maps + out and c.memory - c.bytes <= images + maps + 2 * out


def test_recurrent_layers_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 16, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    with Teacher(Net()) as t:
        assert cost_of(t, (torch.randn(2, 5, 8),)).macs == 5 * 4 * 16 * (8 + 16)


def test_shared_weights_count_once():
    a = nn.Linear(4, 4, bias=False)
    with Teacher(nn.Sequential(a, a)) as t:
        c = cost_of(t, (torch.randn(2, 4),))
    assert (c.params, c.bytes, c.macs) == (16, 64, 32)


def test_a_function_has_no_known_cost():
    with Teacher(lambda x: x) as t:
        c = cost_of(t, (torch.randn(2, 4),))
    assert (c.params, c.macs, c.bytes, c.memory) == (None,) * 4


def test_times_are_of_the_asked_batches_and_grow_with_the_work():
    small, big = nn.Linear(64, 64), nn.Sequential(*[nn.Linear(64, 64) for _ in range(40)])
    ticks, seen = [], set()
    small.register_forward_hook(lambda m, x, y: seen.add(len(x[0])))
    with Teacher(small) as s, Teacher(big) as b:
        got = latencies(
            dict(small=s, big=b), (torch.randn(3, 64),), (1, 8), 0.02, lambda: ticks.append(1)
        )
    assert seen == {1, 8} and len(ticks) == 4
    for one, other in zip(got['small'], got['big']):
        assert one.batch == other.batch and 0 < one.p50 <= one.p95 and one.runs >= 20
        assert other.p50 > 5 * one.p50


def test_a_report_is_plain_data_and_back(tmp_path):
    o, y = classes()
    r = measured(
        dict(t=o, a=o.flip(0), s=o + torch.randn_like(o)),
        y,
        Task('softmax'),
        teacher='t',
        baseline='a',
        seconds=0.001,
    )
    assert Report.from_json(r.to_json()) == r
    r.to_json(tmp_path / 'r.json')
    assert Report.from_json(tmp_path / 'r.json') == r == Report.from_json(str(tmp_path / 'r.json'))
    r.models['s'].loss = float('nan')
    assert Report.from_json(r.to_json()).models['s'].loss is None
    for text, why in (
        ('{"format": 9}', 'not a report of format'),
        ('{', 'not JSON'),
        (r.to_json().replace('"headline"', '"headlin"'), 'headlin'),
    ):
        with pytest.raises(DistillError, match=why):
            Report.from_json(text)
    with pytest.raises(DistillError, match='no file'):
        Report.from_json(tmp_path / 'none.json')


def test_no_warning_where_there_is_nothing_to_divide_by():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = measured(
            dict(a=torch.zeros(4), b=torch.ones(4)),
            torch.zeros(4),
            Task('regression'),
            baseline='a',
        )
        assert value(r, 'r2') is None
        r = measured(
            dict(a=torch.zeros(4, 2) - 1, b=torch.ones(4, 2)),
            torch.zeros(4, 2),
            Task('sigmoid'),
            baseline='a',
        )
    assert value(r, 'f1') is None and value(r, 'f1', 'b') == 0


def test_no_warning_where_no_model_gives_the_class_a_probability():
    o = torch.zeros(9, 3)
    o[:, 0] = -torch.inf
    r = measured(
        dict(teacher=o + torch.eye(3)[1], alone=o, distilled=o + torch.eye(3)[2]),
        torch.arange(9) % 3,
        Task('softmax'),
        teacher='teacher',
        baseline='alone',
    )
    nll = r.comparison('distilled').differences['nll']
    assert (nll.value, nll.p) == (None, None)
