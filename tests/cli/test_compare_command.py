"`fastdistill compare`, `report` and `export`, as a user types them."

import shutil
import sys, textwrap
from pathlib import Path
import pytest
from fastdistill.fastai import Report
from reports import a_report

CODE = """
import torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
torch.manual_seed(0)
x = torch.randn(96, 4)
y = x.argmax(1)
items = list(zip(x, y))
dls = DataLoaders.from_dsets(items[:32], items[32:], bs=16, num_workers=0, device='cpu')
def learner(scale):
    m = nn.Linear(4, 4)
    with torch.no_grad():
        m.weight.copy_(scale*torch.eye(4) + torch.randn(4, 4))
        m.bias.zero_()
    return Learner(dls, m, loss_func=CrossEntropyLossFlat())
teacher,alone,student = learner(9.), learner(.3), learner(4.)
net = student.model
def make_student(): return learner(-9.)
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    (tmp_path / 'mine.py').write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '120')
    monkeypatch.delitem(sys.modules, 'mine', raising=False)
    return tmp_path


@pytest.mark.parametrize('name', ['file', 'row'])
def test_runs_that_know_each_others_validation_samples_are_not_compared(command, tmp_path, name):
    "Before anything is loaded: the students here are not even Learners"

    def run(k, valid, n=10):
        (folder := tmp_path / k).mkdir()
        (folder / 'config.toml').touch()
        (folder / 'student.pkl').touch()
        rows = [f'{i},{"valid" if i in valid else "train"}' for i in range(n)]
        (folder / 'split.csv').write_text('\n'.join([f'{name},set', *rows]))
        return f'{k}={folder}'

    a, b, c = run('a', [1, 2, 3]), run('b', [2, 3, 4]), run('c', [1, 2, 3])
    code, _, err = command('compare', a, b)
    assert code
    assert 'was trained on 1 of the 3 validation samples of' in ' '.join(err.split())
    for o in [c, *([run('d', [7], n=11)] if name == 'row' else [])]:
        code, _, err = command('compare', a, o)
        assert code  # the files are empty
        assert 'was trained on' not in ' '.join(err.split())


def test_rows_of_runs_are_compared_by_their_content(command, tmp_path):
    "The file of the second run has the same rows in the opposite order"

    def run(k, valid, order, n=10):
        (folder := tmp_path / k).mkdir()
        (folder / 'config.toml').touch()
        (folder / 'student.pkl').touch()
        rows = [f'{i},h{c},{"valid" if i in valid else "train"}' for i, c in zip(range(n), order)]
        (folder / 'split.csv').write_text('\n'.join(['row,content,set', *rows]))
        return f'{k}={folder}'

    a, b = run('a', [1, 2, 3], range(10)), run('b', [1, 2, 3], range(9, -1, -1))
    code, _, err = command('compare', a, b)
    assert code
    assert 'was trained on 3 of the 3 validation samples of' in ' '.join(err.split())
    code, _, err = command('compare', a, run('c', [6, 7, 8], range(9, -1, -1)))
    assert code  # the files are empty
    assert 'was trained on' not in ' '.join(err.split())


def test_compare_prints_and_writes_a_report(command, there):  # noqa: F811
    code, out, err = command(
        'compare',
        'teacher=mine.py:teacher',
        'alone=mine.py:alone',
        'distilled=mine.py:net',
        '--data',
        'mine.py:dls',
        '--out',
        'runs/a',
        '--seconds',
        0,
        '--title',
        'Mine',
    )
    assert code == 0, err
    assert (
        'distilled is better than alone' in ' '.join(out.split())
        and 'Written: runs/a/report.html' in out
    )
    r = Report.from_json(there / 'runs' / 'a' / 'report.json')
    assert r.title == 'Mine' and [*r.models] == ['teacher', 'alone', 'distilled'] and r.n == 64
    assert '<title>Mine</title>' in (there / 'runs/a/report.html').read_text() and (
        there / 'runs/a/report.md'
    ).read_text().startswith('# Mine')


@pytest.mark.parametrize(
    'args,why',
    [
        (
            ['mine.py:teacher'],
            "'mine.py:teacher': must be a name and a model, such as big=teacher.pkl",
        ),
        (['a=none.pkl', 'b=mine.py:student'], "no file 'none.pkl'"),
        (['a=missing.pkl'], "There is no file 'missing.pkl'"),
        (['a=gone.py:net'], "There is no file 'gone.py'"),
        (['a=mine.py:net'], 'None of the models is a Learner'),
        (['a=mine.py:alone', '--headline', 'x'], '--headline'),
        (['a=mine.py:nothing'], "mine.py has no 'nothing'"),
        (
            ['a=mine.py:student', 'b=mine.py:student', 'a=mine.py:alone'],
            "The name 'a' is used twice",
        ),
        (['a=mine.py:student', '--out', 'mine.py'], "'mine.py' is a file"),
    ],
)
def test_mistakes_of_compare_are_one_line(command, there, args, why):  # noqa: F811
    code, _, err = command('compare', *args, '--seconds', 0)
    assert code == 2 and why in ' '.join(err.split()) and 'Traceback' not in err


def test_the_report_of_a_run_is_not_overwritten(command, there):  # noqa: F811
    (there / 'runs/w').mkdir(parents=True)
    for name in 'config.toml', 'report.json':
        (there / 'runs/w' / name).write_text('of the run')
    code, _, err = command('compare', 'a=mine.py:student', '--out', 'runs/w')
    assert code == 2
    assert "--out 'runs/w' is the folder of a run" in ' '.join(err.split())
    assert (there / 'runs/w/report.json').read_text() == 'of the run'


@pytest.mark.parametrize(
    'args,why',
    [
        (['r.json', '--plot', 'a.foo'], "'a.foo': a picture ends in .png"),
        (['r.json', '--plot', 'none/a.png'], "'none/a.png': there is no folder 'none'"),
        (['bytes.json'], 'This is not JSON'),
        (['deep.json'], 'This is not JSON'),
    ],
)
def test_mistakes_of_report_are_one_line(command, there, args, why):  # noqa: F811
    a_report().to_json(there / 'r.json')
    (there / 'bytes.json').write_bytes(b'\xff')
    (there / 'deep.json').write_text('[' * 100_000)
    code, out, err = command('report', *args)
    assert code == 2 and why in ' '.join(err.split()), err
    assert not out


def test_reports_of_several_runs_are_one_table_the_best_first(command, there):  # noqa: F811
    for name, better in (('runs/dull', False), ('runs/good', True)):
        (there / name).mkdir(parents=True)
        a_report(better=better).to_json(there / name / 'report.json')
    code, out, err = command('report', 'runs/dull', 'runs/good/report.json', '--plot', 'runs.png')
    assert code == 0, err
    lines = [l for l in out.splitlines() if 'distilled' in l or 'alone' in l]
    assert (
        len(lines) == 4
        and lines[0].split()[:2] == ['runs/good', 'distilled']
        and 'better' in lines[0]
    )
    assert (there / 'runs.png').stat().st_size > 5000
    shutil.copy(there / 'runs/dull/report.json', there / 'runs/good/other.json')
    code, out, err = command('report', 'runs/good/report.json', 'runs/good/other.json')
    assert code == 0, err
    assert sum('distilled' in l for l in out.splitlines()) == 2
    code, out, _ = command('report', 'runs/good', '--html', 'page.html')
    assert code == 0 and 'Agreement with teacher' in out and (there / 'page.html').is_file()
    for args, why in (
        (['runs/none'], 'no file'),
        (['runs/good', 'runs/dull', '--html', 'x.html'], 'page of one report'),
        (['mine.py'], 'not JSON'),
        (['runs/good', 'runs/good'], 'is used twice'),
    ):
        code, _, err = command('report', *args)
        assert code == 2 and why in ' '.join(err.split())


@pytest.mark.filterwarnings('always::fastdistill.DistillWarning')
def test_export_says_that_a_network_is_untrained(command, there):  # noqa: F811
    code, _, err = command('export', 'mine.py:make_student', 'x.pt2')
    said = ' '.join(err.split())
    assert code == 0
    assert (
        'mine.py:make_student is hardly better than a constant prediction: accuracy 0.000 on 64 validation samples, and a constant'
        in said
    )
    assert 'Has it been trained? mine.py:make_student is run again' in said


def test_a_recipe_is_text_or_an_object_of_a_script(command, there):  # noqa: F811
    with open(there / 'mine.py', 'a') as f:
        f.write('from fastdistill import kd\nmild = kd(T=1, alpha=.5)\n')
    for recipe in ('kd(T=1, alpha=.5)', 'mine.py:mild'):
        code, out, err = command(
            'check', 'mine.py:student', 'mine.py:teacher', '--recipe', recipe, '--no-cost'
        )
        assert 'kd: meaningful for these outputs' in ' '.join(out.split()), err
    code, _, err = command('check', 'mine.py:student', 'mine.py:teacher', '--recipe', 'kdd()')
    assert code == 2
    assert "there is no recipe 'kdd'" in ' '.join(err.split())


def test_export_writes_a_checked_file(command, there):  # noqa: F811
    code, out, err = command('export', 'mine.py:student', 'out/s.pt2')
    assert (
        code == 0
        and 'largest difference from the Learner' in ' '.join(out.split())
        and (there / 'out/s.pt2').is_file()
    ), err
    for args, why in (
        (['mine.py:student', 'x', '--int8'], '--int8 needs an .onnx file'),
        (['mine.py:net', 'x.pt2'], 'neither a fastai Learner'),
        (['mine.py:student', 'x.pt2', '--int8'], '--int8 needs an .onnx file'),
    ):
        code, _, err = command('export', *args)
        assert code == 2 and why in ' '.join(err.split())


def test_export_can_calibrate_first(command, there):  # noqa: F811
    code, out, err = command('export', 'mine.py:student', 'c.pt2', '--calibrate')
    assert code == 0, err
    assert 'temperature' in out.splitlines()[0] and (there / 'c.pt2').is_file()


def test_runs_that_are_not_finished_are_left_out_of_the_table(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in ('good', 'fine', 'begun'):
        Path(n).mkdir()
        Path(n, 'config.toml').touch()
        if n != 'begun':
            a_report().to_json(f'{n}/report.json')
    code, out, err = command('report', 'good', 'fine', 'begun')
    assert code == 0
    assert 'begun is left out: the run is not finished.' in err
    assert 'good' in out
    assert 'fine' in out
    assert 'begun' not in out
    code, _, err = command('report', 'begun')
    assert code == 2
    assert "There is no file 'begun/report.json'." in err


@pytest.mark.parametrize('name', ['compare', 'report', 'export'])
def test_help_has_an_example(command, name):  # noqa: F811
    code, out, _ = command(name, '--help')
    assert code == 0 and f'Example: fastdistill {name} ' in ' '.join(out.replace('│', ' ').split())


def test_a_csv_file_as_data_is_refused_with_the_code_that_scores_on_it(command):  # noqa: F811
    code, _, err = command('compare', 'a=runs/a', '--data', 'test.csv')
    assert code == 2 and 'must be a file and a name in it' in err
    assert "learn.dls.test_dl(pd.read_csv('test.csv'), with_labels=True)" in ' '.join(err.split())
