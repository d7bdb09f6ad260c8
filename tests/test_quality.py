"The quality benchmark: a restart skips what ran, rates are chosen on the validation split, and its statistics are right."
import json, math, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip('sklearn')
HERE = Path(__file__).parent.parent/'benchmarks'/'quality'


@pytest.fixture(scope='module')
def quality():
    "The benchmark's modules, which import each other by their bare names"
    sys.path.insert(0, str(HERE))
    try:
        import candidates, loop, measures, rule, run, stats, tasks
        return SimpleNamespace(**{m.__name__: m for m in (candidates, loop, measures, rule, run, stats, tasks)})
    finally: sys.path.remove(str(HERE))


@pytest.fixture
def blobs(quality):
    "A cell of three clouds of points, whose teacher knows where they are"
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 4, generator=g)*2
    def split(n):
        y = torch.randint(0, 3, (n,), generator=g)
        x = centers[y] + torch.randn(n, 4, generator=g)
        return quality.tasks.Split(x, y, -torch.cdist(x, centers).pow(2)/2)
    data,opened = quality.tasks.Data(split(64), split(64), split(64)),[]
    cell = quality.tasks.Cell('blobs', 'blobs', 'classes', lambda: opened.append(1) or data, lambda d: nn.Linear(4, 3), steps=8, bs=16, rates=(.01, .03), seeds=2)
    return cell,data,opened


def test_a_restart_runs_only_what_is_missing(quality, blobs, tmp_path):
    cell,_,opened = blobs
    chosen,path = [quality.candidates.CANDIDATES[n] for n in ('labels', 'kl(1)x3')],tmp_path/'blobs.jsonl'
    assert quality.run.run_cell(cell, chosen[:1], tmp_path, math.inf)
    first = path.read_text()
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf)
    whole = path.read_text()
    assert whole.startswith(first) and len(whole) > len(first)
    keys = [(r['recipe'], r['lr'], r['seed']) for r in quality.run.read(path)]
    assert len(set(keys)) == len(keys)
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf) and path.read_text() == whole
    assert len(opened) == 2         # the third time there was nothing to do
    # an interrupt in the middle of the last line costs this run alone, and gives the same line again
    path.write_text(whole[:-20])
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf)
    without_time = lambda r: {k: v for k,v in r.items() if k != 'seconds'}
    before = [without_time(json.loads(o)) for o in whole.splitlines()]
    assert [without_time(r) for r in quality.run.read(path)] == before


def test_no_time_left_starts_no_run(quality, blobs, tmp_path):
    assert not quality.run.run_cell(blobs[0], [quality.candidates.CANDIDATES['labels']], tmp_path, 0)
    assert not (tmp_path/'blobs.jsonl').exists()


def test_the_grid_of_rates_grows_where_its_best_stands_at_an_end(quality):
    grid = .01,.03,.09
    assert quality.run.next_rate(grid, {}) == .01
    assert quality.run.next_rate(grid, {.01: 5., .03: 7., .09: 6.}) is None
    assert quality.run.next_rate(grid, {.01: 5., .03: 6., .09: 7.}) == .27
    assert quality.run.next_rate(grid, {.01: 7., .03: 6., .09: 5.}) == .0033
    assert quality.run.next_rate(grid, {.01: 1., .03: 2., .09: 3., .27: 4., .81: 5.}) is None     # twice beyond, then no further


def test_a_tiny_cell_chooses_its_rate_by_several_seeds(quality, blobs, tmp_path):
    cell = replace(blobs[0], choosing=2, seeds=3)
    assert quality.run.run_cell(cell, [quality.candidates.CANDIDATES['labels']], tmp_path, math.inf)
    runs = quality.run.read(tmp_path/'blobs.jsonl')
    found = {lr: [r['valid']['accuracy'] for r in runs if r['lr'] == lr and r['seed'] < 2] for lr in {r['lr'] for r in runs}}
    assert len(found) > 1 and {len(v) for v in found.values()} == {2}
    best = quality.stats.best_rate(runs, 'classes')
    assert sum(found[best]) == max(map(sum, found.values()))
    assert {r['lr'] for r in runs if r['seed'] == 2} == {best} == {r['lr'] for r in quality.stats.at_best_rate(runs, 'classes')['labels']}


def test_one_seed_chooses_where_only_one_ran_at_each_rate(quality):
    run = lambda lr,seed,score: dict(recipe='labels', lr=lr, seed=seed, valid=dict(accuracy=score))
    runs = [run(.1, 0, .5), run(.2, 0, .6), run(.2, 1, .1)]
    assert quality.stats.by_rate(runs, 'classes') == {.1: 50., .2: 60.} and quality.stats.best_rate(runs, 'classes') == .2
    assert quality.stats.best_rate([], 'classes') is None


def test_paired_statistics_are_those_of_scipy_and_of_two_pairs_in_closed_form(quality):
    from scipy import stats
    a,b = dict(enumerate([70.1, 71.4, 69.8, 72.0])),dict(enumerate([69.5, 71.6, 68.9, 71.1]))
    mean,se,p,n = quality.stats.paired(a, {**b, 9: 1.})     # a seed that one of them lacks does not count
    d = [a[s]-b[s] for s in a]
    assert n == 4 and mean == pytest.approx(sum(d)/4) and p == pytest.approx(stats.ttest_rel([*a.values()], [*b.values()]).pvalue)
    assert se == pytest.approx(math.sqrt(sum((o-mean)**2 for o in d)/3/4))
    # with one degree of freedom Student's t is Cauchy's distribution: p = 1 - 2/pi atan t
    mean,se,p,_ = quality.stats.paired({0: 3., 1: 2.}, {0: 1., 1: 1.})
    assert p == pytest.approx(1 - 2/math.pi*math.atan(mean/se))
    assert quality.stats.paired({0: 1., 1: 2.}, {0: 1., 1: 2.})[2] == 1


def test_labels_alone_are_a_plain_loop(quality, blobs):
    cell,data,_ = blobs
    student,_ = quality.loop.train(cell, data, quality.candidates.CANDIDATES['labels'], .03, 1)
    torch.manual_seed(1)
    plain,g = nn.Linear(4, 3),torch.Generator().manual_seed(1)
    opt = torch.optim.AdamW(plain.parameters(), .03, weight_decay=.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, .03, 8, pct_start=.25)
    order = torch.cat([torch.randperm(64, generator=g) for _ in range(2)])
    for rows in order.split(16):
        F.cross_entropy(plain(data.train.x[rows]), data.train.y[rows]).backward()
        opt.step(); opt.zero_grad(); sched.step()
    torch.testing.assert_close(student.weight, plain.weight)


def test_measures_equal_those_of_scikit_learn(quality):
    from sklearn import metrics
    g = torch.Generator().manual_seed(0)
    s,y = torch.randn(200, 5, generator=g),torch.randint(0, 5, (200,), generator=g)
    m = quality.measures.measure('classes', s, y)
    assert m['accuracy'] == pytest.approx(metrics.accuracy_score(y, s.argmax(1))) and m['nll'] == pytest.approx(metrics.log_loss(y, s.double().softmax(1)), rel=1e-5)
    p,hit = s.softmax(1).max(1)[0].numpy(),(s.argmax(1) == y).numpy()
    bins = [(p >= i/15) & (p < (i+1)/15) for i in range(15)]
    assert m['ece'] == pytest.approx(sum(b.mean()*abs(p[b].mean()-hit[b].mean()) for b in bins if b.any()), abs=1e-6)
    pixels,void = s.T.reshape(1, 5, 10, 20),y.clone()
    void[:30] = 99
    m = quality.measures.measure('pixels', pixels, void.reshape(1, 10, 20), void=99)
    assert m['miou'] == pytest.approx(metrics.jaccard_score(y[30:], s[30:].argmax(1), average='macro'))
    many = (torch.rand(200, 5, generator=g) > .7).float()
    m = quality.measures.measure('labels', s, many)
    assert m['map'] == pytest.approx(metrics.average_precision_score(many, s, average='macro')) and m['f1'] == pytest.approx(metrics.f1_score(many, s > 0, average='micro'))
    numbers = torch.randn(200, 5, generator=g)
    m = quality.measures.measure('numbers', s, numbers)
    assert m['r2'] == pytest.approx(metrics.r2_score(numbers, s), abs=1e-5) and m['mae'] == pytest.approx(metrics.mean_absolute_error(numbers, s), rel=1e-5)


def test_the_task_that_is_judged_has_no_say(quality):
    "The recipe for a's cells is the one that is best in b's, and the other way round"
    fact = lambda task: dict(task=task, output='classes', classes=10)
    gain = lambda x,y: dict(x=(x, 0, 0, 4), y=(y, 0, 0, 4), labels=(0., 0, 1, 4))
    chosen = quality.rule.left_out(dict(a1=fact('a'), a2=fact('a'), b=fact('b')), dict(a1=gain(9., 1.), a2=gain(9., 2.), b=gain(0., 1.)))
    assert chosen == dict(a1='y', a2='y', b='x')


def test_every_candidate_is_a_recipe_that_fits_its_outputs(quality):
    from fastdistill import Distiller, Outputs, Recipe
    shapes = dict(classes=(6, 4), pixels=(2, 4, 3, 5), tokens=(2, 3, 4), labels=(6, 4), numbers=(6, 2))
    for c in quality.candidates.CANDIDATES.values():
        recipe = c.recipe(torch.randn(50, 4)) if c.measures else c.recipe()
        if recipe is None or any(t.layers is not None for t in Recipe(recipe).terms): continue
        for output in c.outputs.split():
            axis = 2 if output == 'tokens' else 1
            s,t = torch.randn(shapes[output], requires_grad=True),torch.randn(shapes[output])
            y = torch.randn(shapes[output]).sigmoid().round() if output in ('labels', 'numbers') else torch.randint(0, 4, s.movedim(axis, 1)[:, 0].shape)
            cell = SimpleNamespace(output=output, axis=axis, void=-100)
            own = quality.loop.labels_loss(cell)
            d = Distiller(None, None, recipe, task_loss=own, kind=quality.loop.KINDS[output], axis=axis, check=False)
            total = d.compute(Outputs(s), Outputs(t), own(s, y), (y,), progress=.5).total
            total.backward()
            assert total.isfinite() and np.isfinite(s.grad.numpy()).all() and s.grad.any(), (c.name, output)


def test_a_cell_whose_teacher_is_doubted_has_the_recipe_for_that(quality):
    assert quality.rule.default(dict(output='classes', classes=77, teacher_valid=.85, top_prob_valid=.58, dense=False, tokens=False)) == 'kd(1,.3)'
    for apart,recipe in ((.2, 'kd(.1)'), (.3, 'binary(1)x3')): assert quality.rule.default(dict(output='labels', apart_valid=apart, dense=False, tokens=False)) == recipe


def test_the_default_of_each_cell_is_the_library_s(quality):
    from fastdistill import auto
    for output,classes,kind in (('classes', 2, 'softmax'), ('classes', 7, 'softmax'), ('pixels', 2, 'softmax'), ('tokens', 65, 'softmax'), ('labels', 28, 'sigmoid'), ('numbers', 1, 'regression')):
        found = quality.rule.default(dict(output=output, classes=classes, teacher_valid=.9, top_prob_valid=.8, apart_valid=.5, dense=output == 'pixels', tokens=output == 'tokens'))
        c,t = quality.candidates.CANDIDATES[found],5*torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
        chosen = auto(kind, classes=classes, dense=output in ('pixels', 'tokens'), teacher=t if c.measures else None)
        assert repr(c.recipe(t) if c.measures else c.recipe()).replace('.0', '') == repr(chosen).replace('.0', ''), output
