"The quality benchmark: a restart skips what ran, rates are chosen on the validation split, its statistics are right, and the pages say what the runs say."

import inspect, json, math, re, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip('sklearn')
HERE = Path(__file__).parents[2] / 'benchmarks' / 'quality'


@pytest.fixture(scope='module')
def quality():
    "The benchmark's modules, which import each other by their bare names"
    sys.path.insert(0, str(HERE))
    try:
        import candidates, loop, measures, rule, run, stats, tables, tasks

        return SimpleNamespace(
            **{m.__name__: m for m in (candidates, loop, measures, rule, run, stats, tables, tasks)}
        )
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture
def blobs(quality):
    "A cell of three clouds of points, whose teacher knows where they are"
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 4, generator=g) * 2

    def split(n):
        y = torch.randint(0, 3, (n,), generator=g)
        x = centers[y] + torch.randn(n, 4, generator=g)
        return quality.tasks.Split(x, y, -torch.cdist(x, centers).pow(2) / 2)

    data, opened = quality.tasks.Data(split(64), split(64), split(64)), []
    cell = quality.tasks.Cell(
        'blobs',
        'blobs',
        'classes',
        lambda: opened.append(1) or data,
        lambda d: nn.Linear(4, 3),
        steps=8,
        bs=16,
        rates=(0.01, 0.03),
        seeds=2,
    )
    return cell, data, opened


def test_a_restart_runs_only_what_is_missing(quality, blobs, tmp_path):
    cell, _, opened = blobs
    chosen, path = (
        [quality.candidates.CANDIDATES[n] for n in ('labels', 'kl(1)x3')],
        tmp_path / 'blobs.jsonl',
    )
    assert quality.run.run_cell(cell, chosen[:1], tmp_path, math.inf)
    first = path.read_text()
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf)
    whole = path.read_text()
    assert whole.startswith(first) and len(whole) > len(first)
    keys = [(r['recipe'], r['lr'], r['seed']) for r in quality.run.read(path)]
    assert len(set(keys)) == len(keys)
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf) and path.read_text() == whole
    assert len(opened) == 2  # the third time there was nothing to do
    # an interrupt in the middle of the last line costs this run alone, and gives the same line again
    path.write_text(whole[:-20])
    assert quality.run.run_cell(cell, chosen, tmp_path, math.inf)
    without_time = lambda r: {k: v for k, v in r.items() if k != 'seconds'}
    before = [without_time(json.loads(o)) for o in whole.splitlines()]
    assert [without_time(r) for r in quality.run.read(path)] == before


def test_no_time_left_starts_no_run(quality, blobs, tmp_path):
    assert not quality.run.run_cell(
        blobs[0], [quality.candidates.CANDIDATES['labels']], tmp_path, 0
    )
    assert not (tmp_path / 'blobs.jsonl').exists()


def test_the_grid_of_rates_grows_where_its_best_stands_at_an_end(quality):
    grid = 0.01, 0.03, 0.09
    assert quality.run.next_rate(grid, {}) == 0.01
    assert quality.run.next_rate(grid, {0.01: 5.0, 0.03: 7.0, 0.09: 6.0}) is None
    assert quality.run.next_rate(grid, {0.01: 5.0, 0.03: 6.0, 0.09: 7.0}) == 0.27
    assert quality.run.next_rate(grid, {0.01: 7.0, 0.03: 6.0, 0.09: 5.0}) == 0.0033
    assert (
        quality.run.next_rate(grid, {0.01: 1.0, 0.03: 2.0, 0.09: 3.0, 0.27: 4.0, 0.81: 5.0}) is None
    )  # twice beyond, then no further


def test_a_tiny_cell_chooses_its_rate_by_several_seeds(quality, blobs, tmp_path):
    cell = replace(blobs[0], choosing=2, seeds=3)
    assert quality.run.run_cell(cell, [quality.candidates.CANDIDATES['labels']], tmp_path, math.inf)
    runs = quality.run.read(tmp_path / 'blobs.jsonl')
    found = {
        lr: [r['valid']['accuracy'] for r in runs if r['lr'] == lr and r['seed'] < 2]
        for lr in {r['lr'] for r in runs}
    }
    assert len(found) > 1 and {len(v) for v in found.values()} == {2}
    best = quality.stats.best_rate(runs, 'classes')
    assert sum(found[best]) == max(map(sum, found.values()))
    assert (
        {r['lr'] for r in runs if r['seed'] == 2}
        == {best}
        == {r['lr'] for r in quality.stats.at_best_rate(runs, 'classes')['labels']}
    )


def test_one_seed_chooses_where_only_one_ran_at_each_rate(quality):
    run = lambda lr, seed, score: dict(
        recipe='labels', lr=lr, seed=seed, valid=dict(accuracy=score)
    )
    runs = [run(0.1, 0, 0.5), run(0.2, 0, 0.6), run(0.2, 1, 0.1)]
    assert (
        quality.stats.by_rate(runs, 'classes') == {0.1: 50.0, 0.2: 60.0}
        and quality.stats.best_rate(runs, 'classes') == 0.2
    )
    assert quality.stats.best_rate([], 'classes') is None


def test_paired_statistics_are_those_of_scipy_and_of_two_pairs_in_closed_form(quality):
    from scipy import stats

    a, b = dict(enumerate([70.1, 71.4, 69.8, 72.0])), dict(enumerate([69.5, 71.6, 68.9, 71.1]))
    mean, se, p, n = quality.stats.paired(
        a, {**b, 9: 1.0}
    )  # a seed that one of them lacks does not count
    d = [a[s] - b[s] for s in a]
    assert (
        n == 4
        and mean == pytest.approx(sum(d) / 4)
        and p == pytest.approx(stats.ttest_rel([*a.values()], [*b.values()]).pvalue)
    )
    assert se == pytest.approx(math.sqrt(sum((o - mean) ** 2 for o in d) / 3 / 4))
    # with one degree of freedom Student's t is Cauchy's distribution: p = 1 - 2/pi atan t
    mean, se, p, _ = quality.stats.paired({0: 3.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert p == pytest.approx(1 - 2 / math.pi * math.atan(mean / se))
    assert quality.stats.paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})[2] == 1


def test_labels_alone_are_a_plain_loop(quality, blobs):
    cell, data, _ = blobs
    student, _ = quality.loop.train(cell, data, quality.candidates.CANDIDATES['labels'], 0.03, 1)
    torch.manual_seed(1)
    plain, g = nn.Linear(4, 3), torch.Generator().manual_seed(1)
    opt = torch.optim.AdamW(plain.parameters(), 0.03, weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 0.03, 8, pct_start=0.25)
    order = torch.cat([torch.randperm(64, generator=g) for _ in range(2)])
    for rows in order.split(16):
        F.cross_entropy(plain(data.train.x[rows]), data.train.y[rows]).backward()
        opt.step()
        opt.zero_grad()
        sched.step()
    torch.testing.assert_close(student.weight, plain.weight)


def test_measures_equal_those_of_scikit_learn(quality):
    from sklearn import metrics

    g = torch.Generator().manual_seed(0)
    s, y = torch.randn(200, 5, generator=g), torch.randint(0, 5, (200,), generator=g)
    m = quality.measures.measure('classes', s, y)
    assert m['accuracy'] == pytest.approx(metrics.accuracy_score(y, s.argmax(1))) and m[
        'nll'
    ] == pytest.approx(metrics.log_loss(y, s.double().softmax(1)), rel=1e-5)
    p, hit = s.softmax(1).max(1)[0].numpy(), (s.argmax(1) == y).numpy()
    bins = [(p >= i / 15) & (p < (i + 1) / 15) for i in range(15)]
    assert m['ece'] == pytest.approx(
        sum(b.mean() * abs(p[b].mean() - hit[b].mean()) for b in bins if b.any()), abs=1e-6
    )
    pixels, void = s.T.reshape(1, 5, 10, 20), y.clone()
    void[:30] = 99
    m = quality.measures.measure('pixels', pixels, void.reshape(1, 10, 20), void=99)
    assert m['miou'] == pytest.approx(
        metrics.jaccard_score(y[30:], s[30:].argmax(1), average='macro')
    )
    many = (torch.rand(200, 5, generator=g) > 0.7).float()
    m = quality.measures.measure('labels', s, many)
    assert m['map'] == pytest.approx(
        metrics.average_precision_score(many, s, average='macro')
    ) and m['f1'] == pytest.approx(metrics.f1_score(many, s > 0, average='micro'))
    numbers = torch.randn(200, 5, generator=g)
    m = quality.measures.measure('numbers', s, numbers)
    assert m['r2'] == pytest.approx(metrics.r2_score(numbers, s), abs=1e-5) and m[
        'mae'
    ] == pytest.approx(metrics.mean_absolute_error(numbers, s), rel=1e-5)


def test_the_task_that_is_judged_has_no_say(quality):
    "The recipe for a's cells is the one that is best in b's, and the other way round"
    fact = lambda task: dict(task=task, output='classes', classes=10)
    gain = lambda x, y: dict(x=(x, 0, 0, 4), y=(y, 0, 0, 4), labels=(0.0, 0, 1, 4))
    chosen = quality.rule.left_out(
        dict(a1=fact('a'), a2=fact('a'), b=fact('b')),
        dict(a1=gain(9.0, 1.0), a2=gain(9.0, 2.0), b=gain(0.0, 1.0)),
    )
    assert chosen == dict(a1='y', a2='y', b='x')


def test_every_candidate_is_a_recipe_that_fits_its_outputs(quality):
    from fastdistill import Distiller, Outputs, Recipe

    shapes = dict(
        classes=(6, 4), pixels=(2, 4, 3, 5), tokens=(2, 3, 4), labels=(6, 4), numbers=(6, 2)
    )
    for c in quality.candidates.CANDIDATES.values():
        recipe = c.recipe(torch.randn(50, 4)) if c.measures else c.recipe()
        if recipe is None or any(t.layers is not None for t in Recipe(recipe).terms):
            continue
        for output in c.outputs.split():
            axis = 2 if output == 'tokens' else 1
            s, t = torch.randn(shapes[output], requires_grad=True), torch.randn(shapes[output])
            y = (
                torch.randn(shapes[output]).sigmoid().round()
                if output in ('labels', 'numbers')
                else torch.randint(0, 4, s.movedim(axis, 1)[:, 0].shape)
            )
            cell = SimpleNamespace(output=output, axis=axis, void=-100)
            own = quality.loop.labels_loss(cell)
            d = Distiller(
                None,
                None,
                recipe,
                task_loss=own,
                kind=quality.loop.KINDS[output],
                axis=axis,
                check=False,
            )
            total = d.compute(Outputs(s), Outputs(t), own(s, y), (y,), progress=0.5).total
            total.backward()
            assert total.isfinite() and np.isfinite(s.grad.numpy()).all() and s.grad.any(), (
                c.name,
                output,
            )


def test_a_cell_whose_teacher_is_doubted_has_the_recipe_for_that(quality):
    assert (
        quality.rule.default(
            dict(
                output='classes',
                classes=77,
                teacher_valid=0.85,
                top_prob_valid=0.58,
                dense=False,
                tokens=False,
            )
        )
        == 'kd(1,.3)'
    )
    for apart, recipe in ((0.2, 'kd(.1)'), (0.3, 'binary(1)x3')):
        assert (
            quality.rule.default(
                dict(output='labels', apart_valid=apart, dense=False, tokens=False)
            )
            == recipe
        )


def test_the_default_of_each_cell_is_the_library_s(quality):
    from fastdistill import auto

    for output, classes, kind in (
        ('classes', 2, 'softmax'),
        ('classes', 7, 'softmax'),
        ('pixels', 2, 'softmax'),
        ('tokens', 65, 'softmax'),
        ('labels', 28, 'sigmoid'),
        ('numbers', 1, 'regression'),
    ):
        found = quality.rule.default(
            dict(
                output=output,
                classes=classes,
                teacher_valid=0.9,
                top_prob_valid=0.8,
                apart_valid=0.5,
                dense=output == 'pixels',
                tokens=output == 'tokens',
            )
        )
        c, t = (
            quality.candidates.CANDIDATES[found],
            5 * torch.randn(50, classes, generator=torch.Generator().manual_seed(0)),
        )
        chosen = auto(
            kind,
            classes=classes,
            dense=output in ('pixels', 'tokens'),
            teacher=t if c.measures else None,
        )
        assert repr(c.recipe(t) if c.measures else c.recipe()).replace('.0', '') == repr(
            chosen
        ).replace('.0', ''), output


def test_corrected_p_values_are_those_of_the_paper(quality):
    "Benjamini and Hochberg (1995): the smallest p*m/rank of this p and all larger ones"
    p = dict(a=0.01, b=0.04, c=0.03, d=0.8, e=0.005)
    found = quality.stats.corrected({**p, 'not run': float('nan')})
    ranked = sorted(p.values())
    reference = {
        k: min(o * len(p) / (ranked.index(o) + 1) for o in ranked if o >= v) for k, v in p.items()
    }
    assert found == pytest.approx(reference)
    assert quality.stats.corrected({}) == {}


def gain(quality, mean=1.0, p=0.001, planned=None, rates=(0.1, 0.1), equal=(1.0, 1.0)):
    return quality.tables.Gain(mean, 0.1, p, p if planned is None else planned, 4, rates, equal)


def test_a_gain_is_bold_only_after_the_correction_for_all_tests(quality):
    assert quality.tables.earned(dict(a=gain(quality, p=0.04))) == {'a'}
    assert (
        quality.tables.earned(
            dict(a=gain(quality, p=0.04)) | {i: gain(quality, p=0.5) for i in range(9)}
        )
        == set()
    )


def test_seeds_that_were_added_later_make_no_gain_bold(quality):
    assert quality.tables.earned(dict(a=gain(quality, p=0.001, planned=0.06))) == set()


@pytest.mark.parametrize(
    ('mean', 'equal', 'bold'),
    [
        (1.0, (0.6, 1.2), True),
        (1.0, (0.6, 0.4), False),
        (1.0, (1.0, -0.1), False),
        (1.0, (1.0, float('nan')), False),
        (-1.0, (-0.6, -2.0), True),
        (-1.0, (-0.4, -2.0), False),
    ],
)
def test_a_gain_that_the_learning_rate_makes_is_not_bold(quality, mean, equal, bold):
    assert quality.tables.earned(dict(a=gain(quality, mean, rates=(0.1, 0.3), equal=equal))) == (
        {'a'} if bold else set()
    )


@pytest.fixture
def written(quality, monkeypatch, tmp_path):
    "Results of one cell: labels alone are best at .1, the default at .3; six seeds, four of them planned; a recipe that is no candidate, and one with one seed"

    def run(recipe, lr, seed, valid, test):
        return dict(
            cell='c',
            recipe=recipe,
            lr=lr,
            seed=seed,
            valid=dict(accuracy=valid),
            test=dict(accuracy=test, nll=1.0, ece=0.1),
        )

    alone, taught = [0.70, 0.72, 0.71, 0.69, 0.60, 0.61], [0.74, 0.73, 0.75, 0.72, 0.70, 0.72]
    runs = (
        [run('labels', 0.1, s, 0.7, v) for s, v in enumerate(alone)]
        + [run('labels', 0.3, 0, 0.6, 0.65)]
        + [run('kd(1,.5)', 0.3, s, 0.7, v) for s, v in enumerate(taught)]
        + [run('kd(1,.5)', 0.1, 0, 0.6, 0.71)]
        + [run('gone', 0.1, s, 0.7, 0.8) for s in range(2)]
        + [run('kd(4,.9)', 0.1, 0, 0.7, 0.8)]
    )
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in runs))
    fact = dict(
        task='t',
        output='classes',
        classes=2,
        dense=False,
        tokens=False,
        teacher_train=0.9,
        teacher_valid=0.8,
        teacher_test=0.8,
        top_prob_train=0.8,
        top_prob_valid=0.8,
        rows=9,
        steps=1,
        epochs=1.0,
        parameters=5,
    )
    (tmp_path / 'facts.json').write_text(json.dumps(dict(c=fact)))
    cell = quality.tasks.Cell('c', 't', 'classes', None, None, 1)
    for m in (quality.rule, quality.tables):
        monkeypatch.setattr(m, 'OUT', tmp_path)
    monkeypatch.setattr(quality.tables, 'cells', lambda: dict(c=cell))
    return quality.tables.Results(), alone, taught


def test_a_gain_compares_the_same_seeds_at_each_recipe_s_best_rate_and_at_equal_rates(written):
    from scipy import stats

    r, alone, taught = written
    g = r.gains['c']['kd(1,.5)']
    assert g.mean == pytest.approx(100 * np.mean(np.subtract(taught, alone)))
    assert g.p == pytest.approx(stats.ttest_rel(taught, alone).pvalue)
    assert g.planned == pytest.approx(stats.ttest_rel(taught[:4], alone[:4]).pvalue)
    assert g.rates == (0.3, 0.1)
    assert g.equal == pytest.approx((9.0, 1.0))  # .74 - .65 at .3, .71 - .70 at .1
    assert g.seeds == 6


def test_a_run_that_no_table_can_use_is_listed(quality, written):
    text = quality.tables.of_dropped(written[0])
    assert '2 runs of `gone`' in text
    assert '| gone | c | 2 | 0.1 | 2 | +9.00 |' in text
    assert 'kd(4,.9) in c (1)' in text


def test_the_picture_is_drawn(quality, written, tmp_path):
    quality.tables.picture(written[0], tmp_path / 'gains.png')
    assert (tmp_path / 'gains.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture(scope='module')
def stored(quality):
    "The results of the repository"
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(HERE))
        return quality.tables.Results()


def test_the_tables_of_the_page_are_those_of_the_stored_runs(quality, stored):
    "If this fails: python benchmarks/quality/tables.py"
    page = (
        (HERE / 'README.md').read_text().split(quality.tables.START)[1].split(quality.tables.END)[0]
    )
    assert page.strip().splitlines() == quality.tables.text(stored).strip().splitlines()


def test_every_stored_recipe_is_in_a_table(quality, stored):
    dropped = quality.tables.of_dropped(stored)
    for n, runs in stored.all.items():
        for k in {r['recipe'] for r in runs} - stored.gains[n].keys() - {'labels'}:
            assert f'| {k} | {n} |' in dropped or f'{quality.tables.shown(k)} in {n} (' in dropped


def test_no_table_calls_a_recipe_by_the_name_of_a_tool(quality, stored):
    assert not re.search('fasterai|torchdistill|timm|keras', quality.tables.text(stored))


# the words of the table in docs/recipes.md -> cells
SAID = {
    'two-digit numbers': 'digits100_short digits100_long',
    'Fashion-MNIST': 'fashion_short fashion_long',
    'CIFAR-10, all images': 'cifar_short cifar',
    'CIFAR-10, 5,000 images': 'cifar5000 cifar5000_wide cifar5000_long',
    'Imagenette': 'imagenette imagenette_tuned',
    'trec': 'trec_short trec_long',
    'trec, 50 fine classes': 'trec50_short trec50_long',
    'banking77': 'banking77_short banking77_long banking77_wide_short banking77_wide_long',
    'occupations (a table)': 'occupation_short occupation_long',
    'CamVid': 'camvid',
    'pixels of digits': 'digit_pixels',
    'Shakespeare': 'lm_short',
    'WikiText': 'wikitext',
    'adult': 'adult500_short adult500_long adult5000_short adult5000_long adult_short',
    'adult, taught by networks': 'adultnets5000 adultnets',
    'film reviews': 'polarity_short polarity_long',
    'SST-2': 'sst2_short sst2_long',
    'breast cancer': 'cancer',
    'nuclei': 'nuclei',
    'GoEmotions': 'goemotions_short',
    'facts about people (a table)': 'person_short person_long',
    'diabetes': 'diabetes',
    'ages': 'age5000',
    'points': 'points_short points_long',
}


def said():
    "(words, place, number, bold, decimals) of each gain in the table of docs/recipes.md"
    page = (HERE.parent.parent / 'docs' / 'recipes.md').read_text()
    rows = re.search(r'^\| the student predicts .*?\n\n', page, re.M | re.S)[0].splitlines()[2:]
    text = '; '.join(row.split('|')[3].strip() for row in rows if row)
    text = (
        text.replace(', pixels of digits', '; pixels of digits')
        .replace(', WikiText', '; WikiText')
        .replace(', ages', '; ages')
    )
    for part in text.split('; '):
        words = re.match(r'.+?(?= \**[+-]?\d+\.\d)', part)[0]
        for i, (bold, number) in enumerate(re.findall(r'(?<!= )(\*\*)?([+-]?\d+\.\d+)', part)):
            yield words, i, float(number), bool(bold), len(number.split('.')[1])


def test_the_page_of_recipes_names_every_cell_but_those_of_the_weak_teachers(stored):
    assert {c for cells in SAID.values() for c in cells.split()} == {
        n for n in stored.cells if 'weak' not in n
    }
    assert {w for w, *_ in said()} == SAID.keys()


def test_the_gains_on_the_page_of_recipes_are_those_of_the_stored_runs(stored):
    for words, i, number, bold, decimals in said():
        n = SAID[words].split()[i]
        g = stored.gains[n][stored.default[n]]
        scale = 100 if n in ('lm_short', 'wikitext') else 1  # bits
        assert number == pytest.approx(g.mean / scale, abs=0.5 * 10**-decimals + 1e-9), n
        assert bold == (n in stored.bold_default), n
    assert sum(len(c.split()) for c in SAID.values()) == len([*said()])


def test_the_sentences_below_these_gains_are_true(quality, stored):
    page = (HERE.parent.parent / 'docs' / 'recipes.md').read_text()
    details = (HERE.parent.parent / 'docs' / 'fastai.md').read_text()
    own = stored.of_default()
    has = lambda text: text in page
    assert has(
        f'beat labels alone in {sum(g.mean > 0 for g in own.values())} of the {len(own)} cells, significantly so in the {len(stored.bold_default)} that are bold, and was significantly worse in none'
    )
    assert all(g.mean > 0 for n, g in own.items() if n in stored.bold_default or g.p < 0.05)
    assert has(
        '{} to {} seeds'.format(
            min(g.seeds for g in own.values()), max(g.seeds for g in own.values())
        )
    )
    new = [n for n, f in stored.facts.items() if f['task'] in quality.tables.NEW]
    significant = len([n for n in new if n in stored.bold_default])
    assert f'{significant} of their {len(new)} cells are significantly better' in details
    readme = (HERE.parent.parent / 'README.md').read_text()
    assert (
        f'beat labels alone in {sum(g.mean > 0 for g in own.values())} of the {len(own)} cells that were measured, and was significantly worse in none'
        in readme
    )
    assert has('(p = {:.2f})'.format(own['camvid'].p))
    for n, k, where, text in (
        (
            'digits100_short',
            'kd(4,.9)',
            details,
            'gains **{:.1f}** points on two-digit numbers (short)',
        ),
        ('banking77_long', 'kd(4,.9)', details, 'loses **{:.1f}** on banking77 (long)'),
        ('banking77weak_long', 'dist(auto)x3', page, '`dist` lost **{:.1f}** points on banking77'),
        ('goemotionsweak_short', 'binary(1)x3', page, '`binary_kl` **{:.1f}** on GoEmotions'),
    ):
        assert text.format(abs(stored.gains[n][k].mean)) in where, text
        assert n in stored.bold[k], text
    nll, count, ours, alone = re.search(
        r'in (\d+) of (\d+) cells. Its median expected calibration error is (\S+), that of labels alone (\S+)\.\n',
        quality.tables.of_calibration(stored),
    ).groups()
    assert has(
        f'the loss on the test set fell in {nll} of {count} cells, but the median calibration error rose from {alone} to {ours}'
    )


def test_what_the_pages_measured_elsewhere_is_what_the_result_files_say():
    root, results = HERE.parent.parent, HERE.parent / 'results'
    pages = {
        n: (root / n).read_text()
        for n in ('docs/moving/fasterai.md', 'docs/cache.md', 'docs/methods/cwd.md')
    }

    def each(folder, way, key):
        return np.array(
            [json.loads((results / folder / f'{way}-{s}.json').read_text())[key] for s in range(3)]
        )

    def spread(folder, way, key, form, scale=1):
        return ' ± '.join(
            format(scale * o, form)
            for o in (each(folder, way, key).mean(), each(folder, way, key).std(ddof=1))
        )

    for way, row in (
        ('alone', '| alone | {} |'),
        ('live', '| live ResNet-56 as teacher | {} |'),
        ('8', '| eight stored views | {} |'),
    ):
        assert (
            row.format(spread('cache_cifar', way, 'accuracy', '.1f', 100)) in pages['docs/cache.md']
        )
    writing = json.loads((results / 'cache_cifar' / 'teacher.json').read_text())['seconds']['8']
    share = (each('cache_cifar', '8', 'seconds').mean() + writing) / each(
        'cache_cifar', 'live', 'seconds'
    ).mean()
    assert f'| {share:.2f}, including the time to write the cache |' in pages['docs/cache.md']
    miou = [
        spread('camvid_unet', way, 'miou', '.3f').replace('0.', '.')
        for way in ('alone', 'kd', 'cwd', 'both')
    ]
    assert '| student alone | `kd` | `cwd` | both |' in pages['docs/methods/cwd.md']
    assert '| {} | {} | {} | {} |'.format(*miou) in pages['docs/methods/cwd.md']
    ways = json.loads((results / 'bench' / 'resnet.json').read_text())['pairs']['resnet']['ways']
    assert (
        f"costs {ways['fastdistill']['ratio']:.2f} times a step without a teacher, fasterai's {ways['fasterai']['ratio']:.1f}"
        in pages['docs/moving/fasterai.md']
    )


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(8, 5, generator=g),
        3 * torch.randn(8, 5, generator=g),
        torch.randint(5, (8,), generator=g),
    )


def test_fasterai_s_default_is_the_candidate_of_its_numbers(quality, logits):
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    from fasterai.distill.losses import SoftTarget

    s, t, y = logits
    weight = inspect.signature(KnowledgeDistillationCallback).parameters['weight'].default
    assert (inspect.signature(SoftTarget).parameters['T'].default, weight) == (5, 0.5)
    theirs = torch.lerp(
        F.cross_entropy(s, y), SoftTarget(s, t), weight
    )  # as its callback mixes them
    torch.testing.assert_close(quality.candidates.CANDIDATES['kd(5,.5)'].recipe()(s, t, y), theirs)
    assert not torch.isclose(
        quality.candidates.CANDIDATES['fasterai'].recipe()(s, t, y), theirs
    )  # the name in the result files is wrong


@pytest.mark.filterwarnings(
    'ignore:.*invalid escape sequence'
)  # in its docstrings, where an installer did not compile them
@pytest.mark.parametrize(
    ('temperature', 'alpha', 'T', 'ours'),
    [(1.0, 0.5, 1.0, 0.5), (4.0, 0.9, 4.0, 0.1)],
    ids=['ImageNet', 'CIFAR-10'],
)
def test_torchdistill_has_no_default_and_its_alpha_weights_the_labels(
    quality, logits, temperature, alpha, T, ours
):
    "`temperature` and `alpha` are those of its configurations, which its package does not contain"
    from fastdistill import kd
    from torchdistill.losses.mid_level import KDLoss

    s, t, y = logits
    assert inspect.signature(KDLoss).parameters['temperature'].default is inspect.Parameter.empty
    theirs = KDLoss('.', 'output', '.', 'output', temperature=temperature, alpha=alpha)(
        {'.': dict(output=s)}, {'.': dict(output=t)}, y
    )
    torch.testing.assert_close(kd(T, ours)(s, t, y), theirs)
    if T == 1:
        torch.testing.assert_close(
            quality.candidates.CANDIDATES['kd(1,.5)'].recipe()(s, t, y), theirs
        )


def test_timm_s_default_is_the_task_loss_and_kl(quality, logits):
    task = pytest.importorskip('timm.task', reason='this timm has no tasks')
    s, t, y = logits

    class Fixed(nn.Module):
        pretrained_cfg, num_classes, in_chans = dict(mean=(0.5,) * 3, std=(0.5,) * 3), 5, 3

        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, x):
            return self.out

    theirs = task.LogitDistillationTask(Fixed(s), Fixed(t), nn.CrossEntropyLoss(), verbose=False)(
        torch.zeros(8, 3, 4, 4), y
    )['loss']
    torch.testing.assert_close(quality.candidates.CANDIDATES['timm'].recipe()(s, t, y), theirs)


def test_the_page_of_the_demo_says_what_its_run_measured():
    run = json.loads((HERE.parent / 'results' / 'demo' / 'digits.json').read_text())
    page = (HERE.parents[1] / 'docs' / 'demo.md').read_text()
    rows = {
        'student alone': 'student alone',
        'distilled': 'distilled with the default',
        'soft labels only': "only the teacher's soft labels",
    }
    alone = run['scores']['student alone']
    for way, begins in rows.items():
        scores = 100 * np.array(run['scores'][way])
        (row,) = [l for l in page.splitlines() if l.startswith(f'| {begins}')]
        assert f'| {scores.mean():.1f} ± {scores.std(ddof=1):.1f} |' in row
        if way != 'student alone':
            better = sum(a > b for a, b in zip(run['scores'][way], alone))
            assert f'| {better} of 5 seeds |' in row
    assert f'| teacher | {100 * run["teacher"]:.1f} |' in page
