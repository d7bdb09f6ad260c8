"The pages and notebooks that are made from the examples, and the leaderboard from the result files."

import ast, importlib.util, json, re, sys
from pathlib import Path
from statistics import mean
import pytest

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


def test_the_leaderboard_is_what_the_result_files_say():
    page = leaderboard.PAGE.read_text()
    made = page.split(leaderboard.START)[1].split(leaderboard.END)[0].strip()
    assert made == leaderboard.text(leaderboard.rows()).strip(), 'python benchmarks/leaderboard.py'


def test_a_gain_of_the_leaderboard_is_the_mean_of_paired_differences():
    lines = (leaderboard.QUALITY / 'digits100_short.jsonl').read_text().splitlines()
    runs = [json.loads(o) for o in lines]

    def at_best(recipe):
        mine = [r for r in runs if r['recipe'] == recipe]
        first = {r['lr']: r['valid']['accuracy'] for r in mine if r['seed'] == 0}
        return {
            r['seed']: r['test']['accuracy'] for r in mine if r['lr'] == max(first, key=first.get)
        }

    a, b = at_best('kd(4,.9)'), at_best('labels')
    (row,) = [
        r
        for r in leaderboard.rows()
        if (r.cell, r.method, r.version) == ('digits100_short', 'kd(4,.9)', '1')
    ]
    assert row.seeds == len(a.keys() & b.keys())
    assert row.gain == pytest.approx(100 * mean(a[s] - b[s] for s in a.keys() & b.keys()))
    assert row.low < row.gain < row.high


def runs(recipe, **scores):
    return [
        dict(
            recipe=recipe, lr=0.1, seed=s, valid=dict(accuracy=x), test=dict(accuracy=x), seconds=1
        )
        for s, x in enumerate(scores.values())
    ]


def test_results_of_a_newer_protocol_stand_beside_the_older_ones(tmp_path):
    (tmp_path / 'facts.json').write_text(json.dumps(dict(cell=dict(output='classes'))))
    lines = [*runs('labels', a=0.5, b=0.6), *runs('kd', a=0.6, b=0.9)]
    for folder, cut in ((tmp_path, '\n{"recipe": "k'), (tmp_path / 'protocol2', '')):
        folder.mkdir(exist_ok=True)
        (folder / 'cell.jsonl').write_text('\n'.join(map(json.dumps, lines)) + cut)
    found = list(leaderboard.rows(tmp_path))
    assert [(r.method, r.version) for r in found] == [('kd', '1'), ('kd', '2')]
    assert found[0].gain == pytest.approx(20)


def test_runs_of_a_planned_recipe_have_its_names_and_others_their_text(tmp_path):
    (tmp_path / 'facts.json').write_text('{}')
    folder = tmp_path / 'protocol2'
    folder.mkdir()
    recipes = {'labels': 'labels', 'keras': 'A', 'default': 'A', 'soft(1)': 'B'}
    planned = dict(
        facts=dict(output='classes'), recipes={k: dict(text=v) for k, v in recipes.items()}
    )
    (folder / 'plan.json').write_text(json.dumps(dict(cell=planned)))
    lines = [r for text in ('labels', 'A', 'B', 'C') for r in runs(text, a=0.5, b=0.6)]
    (folder / 'cell.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    found = [r.method for r in leaderboard.rows(tmp_path)]
    assert found == ['kd(10,.9)', 'the default', 'soft(1)', 'C']


def test_a_cell_with_one_rate_reports_all_of_its_seeds(tmp_path):
    (tmp_path / 'facts.json').write_text('{}')
    folder = tmp_path / 'protocol2_more'
    folder.mkdir()
    (folder / 'plan.json').write_text(json.dumps(dict(first=dict(facts=dict(output='classes')))))
    lines = [*runs('labels', a=0.5, b=0.6), *runs('kd', a=0.6, b=0.8)]
    lines = [r | dict(seed=100 + r['seed']) for r in lines]
    (folder / 'first.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    (row,) = leaderboard.rows(tmp_path)
    assert (row.method, row.version, row.seeds) == ('kd', '2', 2)
    assert row.gain == pytest.approx(15)


@pytest.mark.parametrize(
    'method, loss',
    [
        ('kd(4,.9->.2)', 'kl'),
        ('ttm(2)x1', 'ttm'),
        ('wttmx1', 'wttm'),
        ('atx0.3', 'at'),
        ('dist(auto)x3', 'dist'),
        ('Recipe(Term(dist, grad_ratio=3, T=1), task=1)', 'dist'),
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
    (tmp_path / 'facts.json').write_text(json.dumps(dict(cell=dict(output='classes'))))
    lines = [*runs('labels', a=0.5), *runs('kd', a=0.6)]
    (tmp_path / 'cell.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert not list(leaderboard.rows(tmp_path))


def test_a_failure_is_shown():
    page = leaderboard.PAGE.read_text()
    worst = min((r for r in leaderboard.rows() if r.verdict == 'worse'), key=lambda r: r.gain)
    failures = re.search(r'^## Failures\n(.+?)^## ', page, re.M | re.S)[1]
    assert f'| `{worst.method}` | {worst.cell} | {worst.gain:+.1f} |' in failures
