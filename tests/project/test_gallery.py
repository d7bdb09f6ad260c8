"The pages and notebooks that are made from the examples, and the leaderboard from the result files."

import ast, importlib.util, json, re, sys
from pathlib import Path
from statistics import mean
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


gallery = module(ROOT / 'scripts' / 'gallery.py')
leaderboard = module(ROOT / 'benchmarks' / 'leaderboard.py')
every_script = pytest.mark.parametrize('script', gallery.scripts(), ids=lambda o: o.stem)


@every_script
def test_an_example_says_its_data_teacher_and_trainer(script):
    facts = gallery.facts(script)
    assert facts['data'] in gallery.HEADS
    assert facts['sentence'].endswith(('.', '?'))


def test_the_page_of_examples_is_what_the_results_say():
    page = (ROOT / 'examples' / 'README.md').read_text()
    made = page.split(gallery.START)[1].split(gallery.END)[0].strip()
    assert made == gallery.tables(gallery.stored()).strip(), 'python scripts/gallery.py page'


@every_script
def test_an_example_has_results_and_a_picture(script):
    assert gallery.stored()[script.stem]
    assert (gallery.PICTURES / f'{script.stem}.png').exists()


def test_a_gain_is_a_mean_with_its_spread_and_lower_may_be_better():
    runs = {
        '1': dict(printed='perplexity: teacher 10, student alone 30.0, student distilled 20.0'),
        '2': dict(
            printed='perplexity: teacher 10, student alone 30.0, student distilled 24.0', seconds=60
        ),
    }
    s = gallery.summary(runs)
    assert s['gain'] == 8
    assert s['spread'] == pytest.approx(8**0.5)
    assert s['minutes'] == 1
    assert s['better'] == 2


@every_script
def test_a_notebook_has_the_code_of_its_script(script):
    pytest.importorskip('nbformat')
    notebooks = module(ROOT / 'scripts' / 'notebooks.py')
    made = notebooks.notebook(script)
    code = '\n'.join(o.source for o in made.cells if o.cell_type == 'code')
    *top, last = ast.parse(script.read_text()).body[1:]
    (run,) = [o for o in top if isinstance(o, ast.FunctionDef) and o.name == 'main']
    expected = [ast.unparse(o) for o in top if o is not run]
    body = [o for o in run.body if not isinstance(o, ast.Return)]
    expected += ['quick, seed = (False, 42)', *map(ast.unparse, body)]
    assert sorted(ast.unparse(o) for o in ast.parse(code).body) == sorted(expected)
    compile(code, script.name, 'exec')  # a `return` that is left would be an error only here


@pytest.fixture(scope='module')
def found():
    return list(leaderboard.rows())


def test_the_leaderboard_is_what_the_result_files_say(found):
    page = leaderboard.PAGE.read_text()
    made = page.split(leaderboard.START)[1].split(leaderboard.END)[0].strip()
    assert made == leaderboard.text(found).strip(), 'python benchmarks/leaderboard.py'


def test_a_gain_of_protocol_1_is_the_mean_of_paired_differences(found):
    lines = (leaderboard.OUT / 'digits100_short.jsonl').read_text().splitlines()
    runs = [json.loads(o) for o in lines]

    def at_best(recipe):
        mine = [r for r in runs if r['recipe'] == recipe]
        first = {r['lr']: r['valid']['accuracy'] for r in mine if r['seed'] == 0}
        return {
            r['seed']: r['test']['accuracy'] for r in mine if r['lr'] == max(first, key=first.get)
        }

    a, b = at_best('kd(4,.9)'), at_best('labels')
    (row,) = [
        r for r in found if (r.cell, r.method, r.version) == ('digits100_short', 'kd(4,.9)', '1')
    ]
    differences = [100 * (a[s] - b[s]) for s in a.keys() & b.keys()]
    test = stats.ttest_1samp(differences, 0)
    assert row.gain.n == len(differences)
    assert row.gain.mean == pytest.approx(mean(differences))
    assert row.gain.p == pytest.approx(test.pvalue)
    assert (row.gain.low, row.gain.high) == pytest.approx(tuple(test.confidence_interval()))


def test_the_default_has_the_gains_and_intervals_of_the_benchmark_s_page(found):
    page = (ROOT / 'benchmarks' / 'quality' / 'README.md').read_text()
    rows = [r for r in found if r.method == 'default']
    assert rows
    for r in rows:
        g, d = r.gain, 2 if r.in_points else 3
        said = re.escape(f'{g.mean:+.{d}f} [{g.low:+.{d}f}, {g.high:+.{d}f}]')
        assert re.search(rf'^\| {r.cell} \| .*\| {said} \|', page, re.M), r


def runs(recipe, *accuracies, ece=0.1):
    return [
        dict(recipe=recipe, lr=0.1, seed=s, valid=dict(accuracy=x), test=dict(accuracy=x, ece=ece))
        for s, x in enumerate(accuracies)
    ]


def write_protocol_1(folder, *runs, cut=''):
    (folder / 'facts.json').write_text(json.dumps(dict(cell=dict(output='classes'))))
    (folder / 'cell.jsonl').write_text('\n'.join(map(json.dumps, runs)) + cut)


def write_protocol_2(folder, recipes, *runs):
    "A cell with one rate, in which these recipes (name -> text) are planned with seeds 100 and 101"
    same = dict(protocol=2, setup='8 steps', teacher=[1.0])
    recipes = {k: dict(text=v, behavior=[0.5]) for k, v in recipes.items()}
    plan = dict(same, rates=[0.1], seeds=[100, 101], facts=dict(output='classes'), recipes=recipes)
    more = dict(same, role='reported', behavior=[0.5], diverged=False)
    folder.mkdir()
    (folder / 'plan.json').write_text(json.dumps(dict(cell=plan)))
    lines = [json.dumps(r | more | dict(seed=100 + r['seed'])) for r in runs]
    (folder / 'cell.jsonl').write_text('\n'.join(lines))


def test_results_of_protocol_2_stand_beside_those_of_protocol_1(tmp_path):
    lines = [*runs('labels', 0.5, 0.6), *runs('kd', 0.6, 0.9, ece=0.3)]
    write_protocol_1(tmp_path, *lines, cut='\n{"recipe": "k')
    for name in ('protocol2', 'protocol2_more'):
        write_protocol_2(tmp_path / name, dict(labels='labels', kd='kd'), *lines)
    found = list(leaderboard.rows(tmp_path))
    assert [(r.method, r.version) for r in found] == [('kd', '1'), ('kd', '2'), ('kd', '2')]
    assert [r.gain.mean for r in found] == pytest.approx([20, 20, 20])
    assert [r.gain.n for r in found] == [2, 2, 2]
    assert [r.ece for r in found] == pytest.approx([0.2, 0.2, 0.2])


def test_a_study_with_other_rules_has_no_rows(tmp_path):
    recipes = {'labels': 'labels', 'default, no fade': 'A'}
    write_protocol_2(tmp_path / 'constants', recipes, *runs('labels', 0.5, 0.6), *runs('A', 0, 1))
    assert not list(leaderboard.rows(tmp_path))


def test_only_finished_recipes_of_the_plan_have_rows_with_its_names(tmp_path):
    recipes = {'labels': 'labels', 'keras': 'A', 'default': 'A', 'soft(1)': 'B'}
    finished = [r for o in ('labels', 'A') for r in runs(o, 0.5, 0.6)]
    former = runs('C', 0.5, 0.6)
    write_protocol_2(tmp_path / 'protocol2', recipes, *finished, *runs('B', 0.5), *former)
    found = [r.method for r in leaderboard.rows(tmp_path)]
    assert found == ['keras', 'default']
    assert [*map(leaderboard.spoken, found)] == ['`kd(10,.9)`', 'the default']


def test_no_rows_before_labels_alone_are_finished(tmp_path):
    recipes = {'labels': 'labels', 'default': 'A'}
    lines = [*runs('labels', 0.5), *runs('A', 0.5, 0.6)]
    write_protocol_2(tmp_path / 'protocol2', recipes, *lines)
    assert not list(leaderboard.rows(tmp_path))


@pytest.mark.parametrize(
    'method, loss',
    [
        ('kd(4,.9->.2)', 'kl'),
        ('ttm(2)x1', 'ttm'),
        ('wttmx1', 'wttm'),
        ('atx0.3', 'at'),
        ('dist(auto)x3', 'dist'),
    ],
)
def test_a_method_has_the_memory_of_its_loss(method, loss):
    measured = json.loads(leaderboard.MEMORY.read_text())['losses'][loss]
    assert leaderboard.memory(method) == f'{measured:.1f}'


def test_a_method_whose_loss_depends_on_the_cell_has_no_memory():
    assert leaderboard.memory('kd(.5)') == ''


def test_the_stored_memory_of_a_loss_is_what_it_needs_now():
    loss_memory = module(ROOT / 'benchmarks' / 'loss_memory.py')
    stored = json.loads(leaderboard.MEMORY.read_text())
    assert stored['losses'].keys() == loss_memory.LOSSES.keys()
    assert loss_memory.peak(*loss_memory.LOSSES['hint']) == pytest.approx(
        stored['losses']['hint'], rel=0.1
    )


def test_one_seed_is_no_row(tmp_path):
    write_protocol_1(tmp_path, *runs('labels', 0.5), *runs('kd', 0.6))
    assert not list(leaderboard.rows(tmp_path))


def test_a_failure_is_shown(found):
    page = leaderboard.PAGE.read_text()
    worst = min((r for r in found if r.verdict == 'worse'), key=lambda r: r.gain.mean)
    failures = re.search(r'^## Failures\n(.+?)^## ', page, re.M | re.S)[1]
    assert (
        f'| {leaderboard.spoken(worst.method)} | {worst.cell} | {worst.gain.mean:+.1f} |'
        in failures
    )
