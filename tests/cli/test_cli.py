"The command, as a user types it."

import contextlib, io, json, sys, warnings
import pytest, torch
from PIL import Image
import fastdistill
from fastdistill import DistillError
from fastdistill.base.outputs import DistillWarning
from fastdistill.cli import main
from fastdistill.cli.demo import Results, run, tasks
from rich.console import Console
from sklearn.datasets import load_digits


def test_version(command):
    assert command('--version') == (0, f'fastdistill {fastdistill.__version__}\n', '')


def test_a_mistake_is_one_line_and_no_traceback(command):
    code, _, err = command('check', 'nowhere.pkl', 'teacher.pkl')
    assert code == 2
    assert "fastdistill: There is no file 'nowhere.pkl'. A model is an exported Learner" in err


def test_a_warning_is_one_line_too(command, monkeypatch):
    def warns(*_):
        warnings.warn(DistillWarning('a teacher [of nothing] ' + ' '.join(['is noticed'] * 20)))

    monkeypatch.setattr('fastdistill.cli.demo.run', warns)
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        assert command('demo') == (
            0,
            '',
            f'fastdistill: a teacher [of nothing] {" ".join(["is noticed"] * 20)}\n',
        )


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "`fastdistill demo --quick`: (exit code, what it printed, its folder)"
    folder, printed = tmp_path_factory.mktemp('demo'), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as m,
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as e,
    ):
        m.setenv('COLUMNS', '80')
        m.setattr(sys, 'argv', ['fastdistill', 'demo', '--quick', '--out', str(folder)])
        main()
    return e.value.code, printed.getvalue(), folder


def test_the_demo_ends_with_a_table_a_picture_and_numbers(demo):
    code, out, folder = demo
    assert code == 0
    words = (
        'teacher',
        'student alone',
        'distilled',
        'soft labels only',
        '12,444',
        'with your own data',
        'student.distill(teacher',
    )
    for word in words:
        assert word in out
    assert all(len(line) <= 80 for line in out.splitlines())
    with Image.open(folder / 'demo-digits.png') as im:
        assert im.size == (1650, 750)
    got = json.loads((folder / 'demo-digits.json').read_text())
    assert (
        got['steps'] == [36, 36]
        and got['n'] == [600, 600]
        and got['params'] == dict(teacher=421412, student=12444)
    )
    assert 0 < got['teacher'] <= 1 and [*got['scores']] == [
        'student alone',
        'distilled',
        'soft labels only',
    ]
    assert all(ms > 0 for o in got['ms'].values() for ms in o.values())


def test_the_same_seed_gives_the_same_numbers(demo, tmp_path):
    r = run(out=tmp_path, quick=True, console=Console(quiet=True))
    before = json.loads((demo[2] / 'demo-digits.json').read_text())
    assert r.teacher == before['teacher']
    assert r.scores == before['scores']


def test_no_digit_is_in_a_number_for_training_and_in_one_for_the_test():
    task = tasks.digits()
    halves = [torch.cat([x[..., :8], x[..., 8:]]).flatten(1) for x, _ in (task.train, task.test)]
    train, test = [set(map(tuple, h.tolist())) for h in halves]
    assert train & test == set()
    digits, drawn = load_digits(), task.train[0][0, 0]
    for half, figure in zip((drawn[:, :8], drawn[:, 8:]), task.classes[task.train[1][0]]):
        same = (digits.images[:1200] == 16 * half.numpy()).all((1, 2))
        assert {str(d) for d in digits.target[:1200][same]} == {figure}


def results(teacher, **scores):
    scores = {k.replace('_', ' '): v for k, v in scores.items()}
    return Results('data', (9, 9), (1, 1), teacher, scores, {}, {}, 1.0, {}, {})


def test_the_share_of_the_lead_that_is_recovered():
    r = results(0.9, student_alone=[0.5, 0.7], taught=[0.7, 0.7])
    assert r.gain('taught') == pytest.approx(0.1) and r.recovered('taught') == pytest.approx(1 / 3)
    assert r.better('taught') == 1
    assert (
        results(0.5, student_alone=[0.5], taught=[0.7]).recovered('taught') is None
    )  # no lead, no share


def test_seeds_are_counted_from_1():
    with pytest.raises(DistillError, match='at least 1 student'):
        run(seeds=0)
