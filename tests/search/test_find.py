"Looking for a recipe: candidates, the search, the judgement, and what a Learner keeps."

import copy, math, random, shlex, sys
from functools import partial
from statistics import variance
from time import time
import numpy as np
import optuna, pytest, torch
from torch import nn
import apps  # before the rest of fastai: it keeps its warnings quiet
from fastai.basics import (
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    OptimWrapper,
    TfmdDL,
    accuracy,
    noop,
)
from fastai.callback.all import CSVLogger, GradientAccumulation, MixUp, SaveModelCallback
from fastdistill import DistillError, Recipe, Term, losses, recipes
from fastdistill.recipes.default import auto
from fastdistill.search.candidates import LABELS, Candidate, candidates_for, given_candidates
from fastdistill.fastai import kd, soft_labels
from fastdistill.fastai.trial_scores import chosen_half
from fastdistill.search.search_result import Found
from fastdistill.search.resumable_runs import Run
from fastdistill.search.significance import lead_of
from fastdistill.search.recipe_search import Search

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)


# candidates

TASKS = dict(
    classes=dict(classes=5),
    two=dict(classes=2),
    unknown={},
    pixels=dict(classes=3, dense=True, maps=True),
    tokens=dict(classes=3, dense=True),
    labels=dict(kind='sigmoid'),
    numbers=dict(kind='regression'),
)


@pytest.mark.parametrize('facts', TASKS.values(), ids=TASKS)
def test_each_candidate_is_a_recipe_that_its_text_writes_too(facts):
    names = {k: getattr(recipes, k) for k in recipes.__all__} | dict(
        recipes=recipes, losses=losses, Term=Term
    )
    first, *others = candidates_for(**facts)
    assert repr(first.recipe({}).terms) == repr(
        auto(**{k: v for k, v in facts.items() if k != 'maps'}).terms
    )
    for c in others:
        for i in range(4):
            options = {k: v[i % len(v)] for k, v in c.options.items()}
            assert repr(c.recipe(options)) == repr(Recipe(eval(c.written(options), names))), c.name


def test_candidates_fit_the_task():
    names = lambda **facts: {c.name for c in candidates_for(**facts)}
    assert 'dist' in names(classes=3) and not {'dist', 'logit_std', 'dkd'} & names(classes=2)
    assert 'cwd' in names(classes=3, dense=True, maps=True) and 'cwd' not in names(
        classes=3, dense=True
    )
    assert names(kind='sigmoid') == {'auto', 'kd', 'binary_kl'} and names(kind='regression') == {
        'auto',
        'kd',
        'regression',
    }
    assert 'hint' not in names(classes=3) and 'hint' in names(classes=3, layers=True)
    for facts in TASKS.values():
        kind = facts.get('kind', 'softmax')
        for c in candidates_for(**facts):
            assert all(
                t.kind in (None, kind)
                for t in c.recipe({k: v[0] for k, v in c.options.items()}).terms
            ), c.name


def test_ones_own_recipes():
    a, b = given_candidates(dict(mild=kd(T=1, alpha=0.3), soft=soft_labels))
    assert (
        a.recipe({}).task == 0.7 and b.recipe({}).task == 0 and (a.name, b.options) == ('mild', {})
    )
    (c,) = given_candidates(
        dict(maps="kd(T=1, alpha=.3) + at(layers={'0': '1'}, grad_ratio=.2)")
    )  # braces are no place for options
    assert (
        c.recipe({}).task == 0.7
        and c.written({}) == "kd(T=1, alpha=.3) + at(layers={'0': '1'}, grad_ratio=.2)"
    )
    for wrong in ([kd()], {}, dict(x=3), dict(x='kd')):
        with pytest.raises(DistillError, match='recipes?='):
            given_candidates(wrong)


# the judgement


def test_the_lead_and_its_interval_are_those_of_plain_sums():
    from scipy.stats import t

    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 7, generator=g), torch.rand(3, 7, generator=g)
    d = [[(a[k, i] - b[k, i]).item() for i in range(7)] for k in range(3)]
    by_item, by_seed = (
        [sum(d[k][i] for k in range(3)) / 3 for i in range(7)],
        [sum(o) / 7 for o in d],
    )
    m, vi, vs = sum(by_seed) / 3, variance(by_item) / 7, variance(by_seed) / 3
    df = (vi + vs) ** 2 / (vi**2 / 6 + vs**2 / 2)
    got = lead_of(a, b)
    assert (got.n, got.seeds) == (7, 3) and got.mean == pytest.approx(m, abs=1e-6)
    assert (
        got.high - m
        == pytest.approx(t.ppf(0.975, df) * (vi + vs) ** 0.5, rel=1e-4)
        == pytest.approx(m - got.low, rel=1e-4)
    )
    assert got.p == pytest.approx(2 * t.sf(abs(m) / (vi + vs) ** 0.5, df), rel=1e-4)


def test_luck_is_rarely_called_more_than_luck_and_a_lead_is_found():
    g = np.random.default_rng(0)

    def called(lead, n=300):
        found = 0
        for _ in range(n):
            item, seed = g.normal(size=(1, 80)), 0.05 * g.normal(size=(3, 1))
            a, b = (item + seed * o + 0.3 * g.normal(size=(3, 80)) for o in (1, -1))
            found += lead_of(a + lead, b).beyond_luck
        return found / n

    assert called(0.0) < 0.06 and called(0.4) > 0.8


def test_without_repeated_runs_or_items_there_is_no_judgement():
    assert (
        lead_of(torch.rand(1, 9), torch.rand(1, 9)) is None
        and lead_of(torch.rand(3, 1), torch.rand(3, 1)) is None
    )
    x = torch.rand(2, 9)
    x[:, 4] = math.nan
    assert lead_of(x, x).n == 8 and not lead_of(x, x).beyond_luck and lead_of(x + 1, x).beyond_luck


def runs_of(scores, n=20):
    "Finals: name -> scores of the half that chooses, one a seed; the other half has the same"
    return [
        Run(
            k,
            {},
            0.1,
            i + 1,
            [v],
            result=(torch.full((n,), v) + 0.01 * torch.arange(n) * (i + 1)).tolist(),
        )
        for k, o in scores.items()
        for i, v in enumerate(o)
    ]


def found(first, again=None, **kwargs):
    names = {
        k: Candidate(k, lambda: kd(T=3, alpha=0.5), {}, f'{k}()') for k in first if k != LABELS.name
    }
    return Found(
        {LABELS.name: LABELS, **names},
        [Run(k, {}, 0.1, 0, [v]) for k, v in first.items()],
        runs_of(again or {}),
        rates=[0.1],
        **kwargs,
    )


def test_the_winner_is_the_best_of_the_repeated_runs():
    f = found(
        {LABELS.name: 0.5, 'a': 0.9, 'b': 0.8, 'c': 0.7},
        {LABELS.name: [0.5, 0.5], 'a': [0.6, 0.6], 'b': [0.8, 0.79]},
    )
    assert (f.winner.name, f.text, f.lr) == ('b', 'b()', 0.1) and f.recipe.task == 0.5
    assert [r['candidate'] for r in f.table] == ['b', 'a', LABELS.name, 'c'] and f.table[0][
        ''
    ] == '*'
    assert 'b  ' in repr(f.table) and f.verdict.startswith(
        'more than luck: lead over labels alone +0.295'
    )


def test_a_resumed_search_does_not_drop_what_was_repeated_often_for_what_ran_once():
    first = {LABELS.name: 0.5, 'a': 0.9, 'new': 0.95, 'b': 0.6}
    f = found(first, {LABELS.name: [0.5] * 5, 'a': [0.8] * 5, 'b': [0.7] * 5, 'new': [0.95]})
    assert (f.winner.name, f.lead.seeds) == ('a', 5) and f.table[0]['candidate'] == 'a'
    f = found(first, {LABELS.name: [0.5] * 5, 'a': [0.8] * 5, 'new': [0.95, 0.9]})
    assert (f.winner.name, f.lead.seeds) == ('new', 2)


def test_what_it_does_not_know_it_says():
    assert found({LABELS.name: 0.5}).verdict == 'no recipe was tried yet'
    assert 'no recipe was better' in found({LABELS.name: 0.5, 'a': 0.4}).verdict
    assert (
        'more than luck, because there was no time to repeat'
        in found({LABELS.name: 0.5, 'a': 0.9}).verdict
    )
    # one repeated run alone decides nothing
    assert found({LABELS.name: 0.5, 'a': 0.9}, {LABELS.name: [0.5]}).winner.name == 'a'
    f = found({LABELS.name: 0.5, 'a': 0.9}, {LABELS.name: [0.5], 'a': [0.9]})
    assert f.winner.name == 'a' and f.lead is None
    f = found({LABELS.name: 0.5, 'a': 0.9}, {LABELS.name: [0.5, 0.5], 'a': [0.51, 0.8]})
    assert f.verdict.startswith('not more than luck')
    f.rates = [0.1, 0.2]
    assert 'no time to try 1 of 2 learning rates' in f.verdict


def test_a_longer_run_comes_before_a_better_one_that_was_stopped():
    runs = [
        Run('a', {}, 0.1, 0, [0.9], stopped=True),
        Run('a', {}, 0.2, 0, [0.1, 0.8]),
        Run(LABELS.name, {}, 0.1, 0, [0.1, 0.2]),
    ]
    f = Found({LABELS.name: LABELS, 'a': Candidate('a', kd)}, runs, n_epoch=2)
    assert (f.winner.lr, f.table[0]['epochs'], f.table[0]['runs']) == (0.2, '2 of 2', 2)
    assert len(f.plot().axes[0].collections) == 2 * 2 + 1


# the search, of a training that is a formula

RATES = [0.1, 0.03, 0.3]
CANDIDATES = [
    Candidate('good', lambda x: kd(T=x, alpha=0.5), dict(x=(1, 2, 3)), 'good({})'),
    Candidate('bad', lambda: kd(T=9, alpha=0.5), {}, 'bad'),
]


class Formula:
    "Scores grow with the epochs: 'good' is the best with x=2, all of them with the rate .3"

    def __init__(self, n_epoch, stop_at=None, error=None):
        self.n_epoch, self.calls, self.stop_at, self.error = n_epoch, [], stop_at, error

    def __call__(self, recipe, lr, seed, after_epoch, late):
        T = recipe.terms[0].options['T']
        alone = recipe.terms[0].weight == 0
        self.calls.append(('alone' if alone else T, lr, seed))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        if T == self.error:
            raise DistillError('no such layer')
        at_end = (0.5 if alone else {9: 0.2, 2: 0.9}.get(T, 0.6)) + (0.05 if lr == 0.3 else 0.0)
        for epoch in range(1, self.n_epoch + 1):
            if late() or after_epoch(at_end * epoch / self.n_epoch):
                return None
        return torch.full((20,), at_end) + 0.001 * seed * torch.arange(20)


def search(train, seconds=60, seeds=2, **kwargs):
    now = time()
    return Search(
        CANDIDATES,
        RATES,
        train,
        n_epoch=train.n_epoch,
        begin=now,
        end=now + seconds,
        seeds=seeds,
        **kwargs,
    )


def test_the_best_recipe_and_rate_are_found_and_each_is_tried_once():
    train = Formula(6)
    f = search(train).run()
    assert (f.winner.name, f.winner.options, f.lr, f.recipe.terms[0].options['T']) == (
        'good',
        dict(x=2),
        0.3,
        2,
    )
    first, again = [c for c in train.calls if not c[2]], [c for c in train.calls if c[2]]
    # three rates x (labels alone, three times 'good', 'bad')
    assert len(first) == len(set(first)) == 15
    # the winner, labels alone and the next recipe, each with two seeds
    assert again == [
        (2, 0.3, 1),
        ('alone', 0.3, 1),
        (9, 0.3, 1),
        (2, 0.3, 2),
        ('alone', 0.3, 2),
        (9, 0.3, 2),
    ]
    assert f.lead.beyond_luck and f.lead.mean == pytest.approx(0.4) and f.lead.seeds == 2


def test_labels_alone_come_first_and_no_rate_of_theirs_is_stopped():
    train = Formula(6)
    f = search(train).run()
    assert train.calls[:3] == [('alone', lr, 0) for lr in RATES]
    # the recipes begin with their best rate
    assert train.calls[3:5] == [(1, 0.3, 0), (9, 0.3, 0)]
    alone = [r for r in f.runs if r.name == LABELS.name]
    assert [len(r.scores) for r in alone] == [6] * 3 and not any(r.stopped for r in alone)


def test_weak_recipes_are_stopped_after_a_third():
    f = search(Formula(6)).run()
    lengths = {(r.name, r.options.get('x'), r.lr): len(r.scores) for r in f.runs}
    assert lengths['bad', None, 0.3] == 2 and lengths['good', 2, 0.3] == 6
    assert all(r.stopped == (len(r.scores) < 6) for r in f.runs)


def test_weak_runs_are_those_that_optunas_pruner_stops():
    "Its successive halving, with the same scores in the same order"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for n_epoch in (2, 5, 6, 9):
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=-(-n_epoch // 3), reduction_factor=2
        )
        study = optuna.create_study(direction='maximize', pruner=pruner)
        g = np.random.default_rng(n_epoch)
        differences, stopped = [], []

        def train(recipe, lr, seed, after_epoch, late):
            alone = recipe.terms[0].weight == 0
            trial = study.ask()
            for epoch in range(1, n_epoch + 1):
                score = g.normal()
                over = after_epoch(score)
                if not alone:
                    trial.report(score, epoch)
                    differences.append(over != (epoch < n_epoch and trial.should_prune()))
                if over:
                    stopped.append(epoch)
                    return None
            return torch.zeros(20)

        now = time()
        Search(
            CANDIDATES, RATES + [0.2], train, n_epoch=n_epoch, begin=now, end=now + 60, seeds=0
        ).run()
        assert len(differences) > 16
        assert not any(differences)
        assert stopped


def test_a_search_resumes_from_its_folder(tmp_path):
    path = tmp_path / 'find'
    a, b = Formula(2), Formula(2)
    search(a, seeds=1, folder=path, trials=4).run()
    f = search(b, folder=path).run()
    once = [c for c in a.calls + b.calls if not c[2]]
    assert len(a.calls) == 4 + 2 and len(once) == len(set(once)) == 15
    again = [c for c in a.calls + b.calls if c[2]]
    assert len(again) == len(set(again)) and f.winner.options == dict(x=2) and f.lead.seeds == 2
    c = Formula(2)
    assert repr(search(c, folder=path).run()) == repr(f) and not c.calls
    with pytest.raises(
        DistillError, match='find contains an experiment with n_epoch=2, but now it is 3'
    ):
        search(Formula(3), folder=path)
    search(Formula(3), folder=tmp_path / 'other')


def test_two_searches_share_a_folder(tmp_path):
    path = tmp_path / 'find'
    a, b = Formula(2), Formula(2)
    first = search(a, folder=path)

    class Between(Formula):
        "While a run goes on, another process makes two of its own"

        def __call__(self, *args):
            if len(self.calls) == 1:
                search(b, seeds=0, folder=path, trials=2).run()
            return super().__call__(*args)

    first.train = both = Between(2)
    f = first.run()
    once = [c for c in both.calls + b.calls if not c[2]]
    assert len(b.calls) == 2 and len(once) == len(set(once)) == len(f.runs) == 15


def test_an_interrupt_gives_the_best_so_far_and_the_run_is_made_later(tmp_path):
    path, notes = tmp_path / 'find', []
    a = Formula(2, stop_at=5)
    f = search(a, folder=path, show=lambda text, share: notes.append(text)).run()
    assert len(f.runs) == 4 and f.winner.name == 'good' and 'interrupted' in notes[-1]
    b = Formula(2)
    search(b, folder=path).run()
    assert a.calls[-1] in b.calls
    with pytest.raises(KeyboardInterrupt):
        search(Formula(2, stop_at=1)).run()


def test_a_recipe_that_cannot_be_used_is_left_out_and_named():
    notes = []
    train = Formula(2, error=9)
    f = search(train, show=lambda text, share: notes.append(text)).run()
    assert f.winner.name == 'good' and 'bad is left out: no such layer' in notes
    assert sum(c[0] == 9 for c in train.calls) == 1 and 'bad' not in f.best

    class Wrong(Formula):
        def __call__(self, *args):
            raise DistillError('nothing works')

    with pytest.raises(DistillError, match='nothing works'):
        search(Wrong(2)).run()


class Slow(Formula):
    "An epoch takes a tenth of a second"

    def __call__(self, recipe, lr, seed, after_epoch, late):
        def wait(score):
            until = time() + 0.1
            while time() < until:
                if late():
                    return True
            return after_epoch(score)

        return super().__call__(recipe, lr, seed, wait, late)


def test_it_ends_in_time_with_the_best_so_far():
    begin = time()
    f = search(Slow(4), seconds=1).run()
    assert time() - begin < 1.5 and f.winner.name == LABELS.name
    with pytest.raises(DistillError, match='No run finished an epoch in'):
        search(Slow(4), seconds=0.05).run()


def test_half_of_the_time_at_most_is_kept_for_the_repeated_runs():
    s = search(Slow(1), seconds=2)
    assert s.search_end == s.end
    f = s.run()
    assert s.end - 1.01 <= s.search_end < s.end - 0.5 and {1} <= f._seeds() <= {
        1,
        2,
    }  # on a busy machine, 2 comes too late


def test_a_score_that_is_no_number_loses():
    class Nan(Formula):
        def __call__(self, recipe, lr, seed, after_epoch, late):
            if recipe.terms[0].options['T'] == 2:
                after_epoch(math.nan)
                return torch.full((20,), math.nan)
            return super().__call__(recipe, lr, seed, after_epoch, late)

    assert search(Nan(1)).run().winner.options != dict(x=2)


# Learners


def planted(n=48, noise=0.6, seed=0):
    "Points in a plane, four classes by quadrant. Most labels of the training set are noise. (learner, teacher)"
    g = np.random.default_rng(seed)
    x = torch.tensor(g.normal(size=(n + 200, 2)), dtype=torch.float)
    true = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    y = torch.where(
        torch.tensor(g.random(n + 200) < noise), torch.tensor(g.integers(0, 4, n + 200)), true
    )
    y[n:] = true[n:]
    items = list(zip(x, y))
    dls = DataLoaders(
        TfmdDL(items[:n], bs=16, shuffle=True, drop_last=True, num_workers=0),
        TfmdDL(items[n:], bs=100, num_workers=0),
    )
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), lr=0.03, metrics=accuracy)
    learn.logger = noop
    signs = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]])
    return learn, lambda x: 4 * x @ signs


def test_a_teacher_that_knows_more_than_noisy_labels_wins():
    learn, teacher = planted()
    found = learn.distill_find(
        teacher,
        6,
        minutes=2,
        recipes=dict(soft=soft_labels(T=1), little=kd(T=1, alpha=0.05)),
        trials=6,
        rates=[0.03, 0.1],
        seeds=3,
    )
    assert (
        found.winner.name == 'soft'
        and found.lead.beyond_luck
        and found.lead.mean > 0.05
        and found.lead.n == 100
    )
    assert found.verdict.startswith('more than luck') and {r['candidate'] for r in found.table} == {
        'soft',
        'little',
        LABELS.name,
    }
    learn.distill(teacher, 6, found.lr, found.recipe)
    assert learn.validate()[1] == pytest.approx(found.table[0]['judged'], abs=0.1)


def test_a_folder_of_a_search_with_a_different_teacher_or_optimizer_is_refused(tmp_path):
    learn, teacher = planted()

    def find(teacher):
        options = dict(minutes=2, recipes=dict(kd=kd()), trials=2, rates=[0.1], seeds=0)
        return learn.distill_find(teacher, 1, folder=tmp_path, check=False, **options)

    found = find(teacher)
    assert find(teacher).table == found.table
    with pytest.raises(DistillError, match='contains an experiment with teacher='):
        find(nn.Linear(2, 4))
    learn.opt_func = partial(learn.opt_func, eps=0.1)
    with pytest.raises(DistillError, match='with optimizer.opt_func=.*, but now it is partial'):
        find(teacher)


def test_a_folder_of_a_search_with_different_recipes_or_a_different_score_is_refused(tmp_path):
    learn, teacher = planted()

    def right(scale):
        return lambda logits, ys: scale * (logits.argmax(1) == ys[0]).float()

    def find(alpha=0.5, scale=1.0, **options):
        def scheduled():
            return kd(T=lambda p: 4 - p, alpha=alpha)

        return learn.distill_find(
            teacher,
            1,
            minutes=2,
            recipes=dict(kd=scheduled, given=kd(alpha=alpha)),
            trials=3,
            rates=[0.1],
            seeds=0,
            folder=tmp_path,
            score=right(scale),
            check=False,
            **options,
        )

    found = find()
    assert find().table == found.table
    with pytest.raises(DistillError, match='with candidates.kd.0.alpha=0.5, but now it is 0.3'):
        find(alpha=0.3)
    with pytest.raises(DistillError, match='with score.scale=1.0, but now it is 2.0'):
        find(scale=2.0)
    with pytest.raises(DistillError, match='with options.wd=nothing, but now it is 0.5'):
        find(wd=0.5)


def test_a_teacher_that_knows_nothing_has_no_lead_beyond_luck():
    learn, _ = planted(noise=0.0)
    found = learn.distill_find(
        lambda x: torch.zeros(len(x), 4),
        6,
        minutes=2,
        recipes=dict(kd=kd(T=1, alpha=0.5)),
        trials=4,
        rates=[0.03, 0.1],
        seeds=3,
        check=False,
    )
    assert found.lead is None or not found.lead.beyond_luck
    assert not found.verdict.startswith('more than luck')


def test_a_run_is_what_a_fit_by_hand_is():
    "Scores are those of the student after the same fit, on half of the validation items"
    learn, teacher = planted()
    found = learn.distill_find(
        teacher, 2, minutes=2, recipes=dict(kd=kd()), trials=2, rates=[0.1], seeds=1
    )
    for recipe, name in ((None, LABELS.name), (kd(), 'kd')):
        hand, _ = planted()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        for dl in hand.dls.loaders:
            dl.rng = random.Random(1)
        if recipe is None:
            hand.fit_one_cycle(2, 0.1)
        else:
            hand.distill(teacher, 2, 0.1, recipe, check=False)
        preds, y = hand.get_preds()
        right = (preds.argmax(1) == y).float()
        run = next(r for r in found.finals if r.name == name)
        chosen = chosen_half(len(y))
        assert run.score == pytest.approx(right[chosen].mean().item()) and torch.equal(
            run.items, right[~chosen]
        )
    assert chosen.sum() == 100 and not torch.equal(chosen, chosen.sort().values)


def state(learn):
    "All that must not change"
    ps = [
        (p.clone(), None if p.grad is None else p.grad.clone(), p.requires_grad)
        for p in learn.model.parameters()
    ]
    opt = None if learn.opt is None else copy.deepcopy(learn.opt.state_dict())
    rec = getattr(learn, 'recorder', None)
    dls = [
        sorted(vars(dl)) + [dl.rng.getstate(), getattr(dl, 'shuffle', None)]
        for dl in learn.dls.loaders
    ]
    return dict(
        ps=ps,
        buffers=[b.clone() for b in learn.model.buffers()],
        modes=[m.training for m in learn.model.modules()],
        opt=opt,
        hypers=None if learn.opt is None else copy.deepcopy(list(learn.opt.hypers)),
        cbs=[*map(id, learn.cbs)],
        loss=id(learn.loss_func),
        dls=dls,
        values=list(getattr(rec, 'values', [])),
        losses=list(getattr(rec, 'losses', [])),
        names=sorted(vars(learn)),
        metrics=list(learn.metrics),
        own=[cb.learn is learn for cb in learn.cbs],
        random=(random.getstate(), torch.get_rng_state(), np.random.get_state()),
    )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    return a == b


class Interrupt(Callback):
    def after_batch(self):
        if self.training and self.train_iter == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize('how', ['to the end', 'interrupted', 'error'])
def test_nothing_of_the_learner_is_changed(how, monkeypatch):
    learn, teacher = planted()
    learn.fit(1)
    next(learn.model.parameters()).requires_grad_(False)
    learn.model[3].weight.grad = torch.ones(4, 16)
    learn.add_cb(MixUp())
    before = state(learn)
    options = dict(minutes=2, recipes=dict(kd=kd()), trials=3, rates=[0.1, 0.3], seeds=1)
    if how == 'to the end':
        learn.distill_find(teacher, 2, **options)
    elif how == 'interrupted':
        with pytest.raises(KeyboardInterrupt):
            learn.distill_find(teacher, 2, **options, pct_start=Broken())
    else:
        with pytest.raises(DistillError, match='are not 4'):
            learn.distill_find(teacher, 2, **options, score=wrong_score)
    after = state(learn)
    for k in before:
        assert same(before[k], after[k]), k
    learn.fit(1)


class Broken:
    "An interrupt while a schedule is made"

    def __rsub__(self, o):
        raise KeyboardInterrupt

    __float__ = __sub__ = __rsub__


def wrong_score(logits, targets):
    raise DistillError('there are not 4 but others: they are not 4')


def test_callbacks_that_matter_are_copied_and_those_that_write_are_not(tmp_path):
    learn, teacher = planted()
    seen = []

    class Seen(Callback):
        def before_fit(self):
            seen.append((self, self.learn, [type(c).__name__ for c in self.learn.cbs]))

    learn.path = tmp_path
    learn.add_cbs([Seen(), GradientAccumulation(32), CSVLogger(), SaveModelCallback()])
    learn.distill_find(teacher, 1, minutes=2, recipes=dict(kd=kd()), trials=2, rates=[0.1], seeds=0)
    cb, trial, names = seen[0]
    assert (
        cb is not learn.seen
        and trial is not learn
        and trial.model is learn.model
        and learn.seen.learn is learn
    )
    assert 'GradientAccumulation' in names and not {
        'CSVLogger',
        'SaveModelCallback',
        'ProgressCallback',
    } & set(names)
    assert not list(tmp_path.iterdir())


class Validates(Callback):
    def after_train(self):
        with torch.random.fork_rng():
            self.learn.validate()


def test_a_validation_in_mid_epoch_is_not_an_epoch():
    found = []
    for cbs in ([], [Validates()]):
        learn, teacher = planted()
        learn.add_cbs(cbs)
        options = dict(minutes=2, recipes=dict(kd=kd()), trials=2, rates=[0.1], seeds=1)
        found.append(learn.distill_find(teacher, 3, check=False, show=False, **options))
    a, b = ([(r.name, r.scores) for r in f.runs + f.finals] for f in found)
    assert all(len(scores) == 3 for _, scores in a)
    assert a == b


def test_a_frozen_student_and_fine_tune():
    learn, teacher = planted()
    learn.splitter = lambda m: [list(m[0].parameters()), list(m[3].parameters())]
    learn.create_opt()
    learn.freeze()
    moved = []

    class Moved(Callback):
        def after_fit(self):
            moved.append(not torch.equal(self.learn.model[0].weight, was))

    was = learn.model[0].weight.detach().clone()
    learn.add_cb(Moved())
    options = dict(minutes=2, recipes=dict(kd=kd()), trials=1, rates=[0.1], seeds=0)
    learn.distill_find(teacher, 1, **options)
    assert moved == [False]
    found = learn.distill_find(teacher, 1, fine_tune=True, **options)
    assert moved == [False, False, True] and found.table[0]['epochs'] == '2 of 2'
    assert (
        learn.opt.frozen_idx == 1
        and not learn.model[0].weight.requires_grad
        and torch.equal(was, learn.model[0].weight)
    )


def test_live_teachers_and_layers_and_own_scores():
    learn, _ = planted()
    big = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
    seen = []

    def score(logits, targets):
        seen.append(logits.shape)
        return -nn.functional.cross_entropy(logits, targets[0], reduction='none')

    own = dict(hint=recipes.hint(layers={'0': '0'}), none=recipes.hint(layers={'0': 'nowhere'}))
    found = learn.distill_find(
        big,
        1,
        minutes=2,
        live=True,
        recipes=own,
        trials=3,
        rates=[0.1],
        seeds=0,
        score=score,
        check=False,
    )
    assert (
        {r['candidate'] for r in found.table} == {LABELS.name, 'hint'}
        and found.metric == 'score'
        and found.table[0]['score'] < 0
    )
    assert seen[0] == (100, 4)


APPS = [
    apps.multi_label,
    apps.unet,
    apps.language_model,
    apps.text_classifier,
    apps.tabular,
    apps.points,
]


@pytest.mark.parametrize('make', APPS, ids=lambda o: o.__name__)
def test_every_kind_of_data(make, monkeypatch):
    student, teacher = make()
    for l in (student, teacher):
        l.remove_cbs([cb for cb in l.cbs if type(cb).__name__ == 'ProgressCallback'])
        l.logger = noop
    before = [p.clone() for p in student.model.parameters()]
    found = student.distill_find(
        teacher, 1, minutes=5, trials=2, rates=[0.01], seeds=0, check=False
    )
    assert {r['candidate'] for r in found.table} == {LABELS.name, 'auto'} and not math.isnan(
        found.winner.score
    )
    assert all(map(torch.equal, before, student.model.parameters()))


def test_what_cannot_be_searched_is_refused():
    learn, teacher = planted()
    refused = lambda match, *args, **kwargs: pytest.raises(DistillError, match=match)
    with refused('takes no unlabeled=.*Find a recipe without them'):
        learn.distill_find(teacher, 1, unlabeled=[1])
    with refused('takes no unlabeled=.*there are no stored outputs'):
        learn.distill_find(teacher, 1, unlabeled=dict(perturbed=3))
    for n in (0, 1.5, '2', True):
        with refused(f'n_epoch={n!r}: must be a whole number of at least 1'):
            learn.distill_find(teacher, n)
    for k, wrong in dict(
        minutes=(0, 'a'), trials=(0,), seeds=(-1,), rates=([], [-1.0], 1e-3, [math.nan]), score=(3,)
    ).items():
        for o in wrong:
            with refused(f'{k}='):
                learn.distill_find(teacher, 1, **{k: o})
    with refused('takes no lr_max=: give rates='):
        learn.distill_find(teacher, 1, lr_max=0.1)
    with refused("takes no storage=: pass folder='find'"):
        learn.distill_find(teacher, 1, storage='sqlite:///find.db')
    with refused('takes no alpha=: give recipes='):
        learn.distill_find(teacher, 1, alpha=0.5)
    with refused('live=True needs a teacher that runs'):
        learn.distill_find(None, 1, live=True)
    with refused('each run needs a new one'):
        learn.opt_func = OptimWrapper(learn.model.parameters(), torch.optim.SGD)
        learn.distill_find(teacher, 1)
    learn, _ = planted()
    learn.dls = DataLoaders(learn.dls.train)
    with refused('needs a validation set'):
        learn.distill_find(teacher, 1)


def test_optuna_is_needed_only_here(monkeypatch):
    learn, teacher = planted()
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match="pip install 'fastdistill.find.'"):
        learn.distill_find(teacher, 1)


def test_it_prints_a_table_and_a_verdict(capsys):
    learn, teacher = planted()
    learn.logger = print
    found = learn.distill_find(
        teacher, 1, minutes=2, recipes=dict(kd=kd()), trials=2, rates=[0.1], seeds=0
    )
    out = capsys.readouterr().out
    assert (
        repr(found.table) in out
        and repr(found) in out
        and 'student.distill(teacher, 1, found.lr, found.recipe)' in out
    )
    assert 'candidate' in out and 'accuracy on 200 validation items' in out


# the command

SCRIPT = """
import torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
g = torch.Generator().manual_seed(0)
x = torch.randn(96, 2, generator=g)
items = list(zip(x, (x[:, 0] > 0).long()))
def student():
    torch.manual_seed(0)
    dls = DataLoaders.from_dsets(items[:64], items[64:], bs=16, num_workers=0)
    return Learner(dls, nn.Linear(2, 2), loss_func=CrossEntropyLossFlat())
class Knows(nn.Module):
    def forward(self, x): return torch.stack([-x[:, 0], x[:, 0]], 1)
teacher = Knows()
number = 3
"""


def test_the_command(tmp_path, monkeypatch):
    from fastdistill.cli import app
    from typer.testing import CliRunner

    (tmp_path / 'find_script.py').write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)

    def call(*args):
        return CliRunner().invoke(app, ['find', *map(str, args)])

    args = (
        'find_script.py:student',
        'find_script.py:teacher',
        '--n-epoch',
        2,
        '--rates',
        0.1,
        '--trials',
        3,
        '--seeds',
        1,
        '--folder',
        'find',
    )
    r = call(*args, '--plot', 'plot.png')
    assert r.exit_code == 0, f'{r.output}\n{r.exception!r}'
    assert (
        'labels alone' in r.output
        and 'student.distill(teacher, 2, found.lr, found.recipe)' in r.output
    )
    assert (tmp_path / 'plot.png').stat().st_size > 1000 and (
        tmp_path / 'find' / 'settings.json'
    ).exists()
    python, option, code = shlex.split(r.output.splitlines()[-1])
    assert (python, option) == ('python', '-c')
    exec(code, {})
    assert (tmp_path / 'models' / 'student.pth').is_file()
    assert call(*args, '--minutes', 2).exit_code == 0
    r = call('find_script.py:number', 'find_script.py:teacher', '--n-epoch', 2)
    assert isinstance(
        r.exception, DistillError
    ) and 'neither a fastai Learner nor a function' in str(r.exception)
