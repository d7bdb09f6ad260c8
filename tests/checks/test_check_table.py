"The table of a check: ticks, marks, costs; in a terminal, in a notebook, as a command."

import builtins, copy, io, re, sys, warnings
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
import apps
from apps import pair
from rich.console import Console
from torch import nn
from fastai.basics import Learner
from fastai.vision.all import Normalize
from fastdistill.cache.writer import Forecast
from fastdistill.cli import main
from fastdistill.checks import Finding, Findings
from fastdistill.fastai import Teacher, cache_teacher, compare
from fastdistill.fastai.costs import TrainingCosts, duration

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)


def rows(check):
    return {r.about: r for r in check.rows()}


def test_what_is_in_order_has_its_number():
    student, teacher = pair('image')
    check = student.check_teacher(teacher)
    got, f = rows(check), check.facts
    fine = {k: r.what for k, r in got.items() if r.level == 'ok'}
    count = lambda m: f'{sum(p.numel() for p in m.parameters()):,}'
    assert (
        fine['parameters']
        == f'{count(student.model)} of the student, {count(teacher.model)} of the teacher, none shared'
    )
    assert fine['classes'] == '3 classes, with the same names in the same order'
    assert fine['shapes'] == 'student (16, 3), teacher (16, 3), labels (16,)'
    with torch.no_grad():
        hits = [
            (teacher.model.eval()(x).argmax(1) == y).float().mean().item()
            for x, y in teacher.dls.valid
        ]
    assert f'teacher {sum(hits) / len(hits):.3f}, student {f.student_score:.3f}' in fine['score']
    assert f'training {f.top_prob_train:.3f}' in fine['certainty']
    assert {'task', 'steadiness', 'outputs', 'statistics', 'order of classes'} <= {*fine}
    assert [*got][-4:] == ['step', 'memory', 'cache', '10 epochs']


def test_a_student_that_is_larger_than_its_teacher_is_named():
    small, large = pair('image')
    row = rows(large.check_teacher(small, n_epoch=None))['parameters']
    sizes = [f'{sum(p.numel() for p in o.model.parameters()):,}' for o in (large, small)]
    assert row.level == 'warning'
    assert (
        row.what == f'The student is larger than its teacher: {sizes[0]} and {sizes[1]} parameters'
    )
    assert rows(small.check_teacher(large, n_epoch=None))['parameters'].level == 'ok'


def test_a_normalization_that_both_share_is_shown():
    student, teacher = apps.quiet(
        *apps.image(batch_tfms=Normalize.from_stats([0.5] * 3, [0.25] * 3, cuda=False))
    )
    check = student.check_teacher(teacher, n_epoch=None)
    assert (
        rows(check)['normalization'].what == 'mean 0.5 0.5 0.5, std 0.25 0.25 0.25, for both'
        and check.costs is None
    )


def test_a_mistake_stands_first_and_has_no_tick():
    student, teacher = pair('image')
    check = student.check_teacher(lambda x: teacher.model.eval()(x).softmax(1))
    first = check.rows()[0]
    assert (first.level, first.about) == ('error', 'outputs') and check.costs is None
    assert 'outputs' not in {r.about for r in check.in_order}
    text = repr(check)
    assert '✗  outputs' in text and '→ Declare it with Teacher(model' in ' '.join(text.split())
    assert text.endswith('1 error. Training would stop before it begins; check=False trains anyway')


def test_a_low_score_is_shown_without_a_tick():
    student, teacher = pair('image')
    worse = copy.deepcopy(teacher.model)
    nn.init.zeros_(worse[1][1].weight), nn.init.zeros_(worse[1][1].bias)
    check = student.check_teacher(worse)
    scores = [r.level for r in check.rows() if r.about == 'score']
    assert scores == ['warning', ''] and not [r for r in check.in_order if r.about == 'score']


def test_colors_in_a_terminal_and_a_table_in_a_notebook():
    student, teacher = pair('image')
    check = student.check_teacher(teacher)
    check.title = 'a <b> [teacher]'
    out = io.StringIO()
    check.show(Console(file=out, force_terminal=True, width=100))
    assert '\x1b[32m✓' in out.getvalue() and 'a <b> [teacher]' in re.sub(
        r'\x1b\[[\d;]*m', '', out.getvalue()
    )
    html = check._repr_html_()
    assert 'a &lt;b&gt; [teacher]' in html and html.count('✓') == len(check.in_order)


def state(learn):
    return [o.clone() for o in [*learn.model.state_dict().values()]]


@pytest.mark.parametrize('app', ['image', 'unet', 'text_classifier', 'language_model', 'tabular'])
def test_measuring_changes_nothing(app):
    student, teacher = pair(app)
    before, was = state(student), [m.training for m in student.model.modules()]
    rng = torch.get_rng_state()
    costs = student.check_teacher(teacher, n_epoch=5).costs
    assert torch.equal(torch.get_rng_state(), rng) and was == [
        m.training for m in student.model.modules()
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, state(student)))
    assert all(p.grad is None for p in student.model.parameters())
    assert 0 < costs.alone and costs.teacher < costs.live and costs.steps == len(student.dls.train)
    if app == 'unet':
        copy.deepcopy(student.model)


def test_the_forecast_of_a_cache_is_the_size_of_the_cache(tmp_path):
    student, teacher = pair('image')
    costs = student.check_teacher(teacher).costs
    cache_teacher(teacher, student.dls, tmp_path / 'cache', progress=False)
    assert costs.view.bytes == sum(
        o.stat().st_size for o in (tmp_path / 'cache' / 'view000').glob('*.bin')
    )
    own = [*teacher.model.parameters(), *teacher.model.buffers()]
    assert costs.weights == sum(o.numel() * o.element_size() for o in own) and costs.copy == 0


def test_a_copy_of_the_teacher_is_counted():
    student, teacher = pair('image')
    costs = student.check_teacher(Teacher(teacher.model, run=dict(precision='bf16'))).costs
    floats = sum(
        o.numel()
        for o in [*teacher.model.parameters(), *teacher.model.buffers()]
        if o.is_floating_point()
    )
    assert 2 * floats <= costs.copy <= 2 * floats + 64


def test_costs_in_words():
    costs = TrainingCosts(
        50, 100, 0.1, 0.3, 0.15, 10**6, 500_000, Forecast(5000, 1, 20, 100_000, None), mixed=True
    )
    lines = dict(costs.lines(10))
    assert lines['step'].startswith(
        '100 ms alone, 300 ms with the teacher (3.00 times): batches of 50'
    )
    assert lines['step'].endswith('measured without mixed precision')
    assert lines['memory'] == "the teacher's weights take 1.00 MB, its faster copy 500 kB more"
    assert (
        lines['cache']
        == '5000 samples x 1 view(s) x 20 bytes = 0.1 MB; writing a view takes 15.0 s'
    )
    # 10 epochs of 100 steps of .3 s; the teacher's 15 s of an epoch are saved nine times, and ten times
    assert (
        lines['10 epochs']
        == '5.00 min with the teacher. One stored view saves 2.25 min, and 2.50 min for each additional student'
    )
    assert [duration(o) for o in (7200, 119, 1.99)] == ['2.00 h', '119 s', '1990 ms']


def test_what_cannot_be_measured_is_said():
    student, teacher = pair('image')

    class Odd(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m

        def forward(self, x):
            if self.training:
                raise RuntimeError('not today')
            return self.m(x)

    odd = Learner(student.dls, Odd(student.model), loss_func=student.loss_func)
    check = odd.check_teacher(teacher)
    assert (
        check == [] and rows(check)['step'].what == 'could not be measured: RuntimeError: not today'
    )


def test_findings_of_several_checks():
    a, b = Findings(), Findings()
    a.add('x', (), 'fine'), a.add('y', (), ''), b.add('x', [Finding('note', 'odd', 'look')])
    assert [f.what for f in a.in_order] == ['fine']
    a.join(b)
    assert a.in_order == [] and [(f.about, f.what) for f in a] == [('x', 'odd')]


FILE = """
import sys
sys.path.insert(0, {tests!r})
import apps
from fastdistill.fastai import dist, kd
student,teacher = apps.pair('image')
two,_ = apps.pair('text_classifier')
recipe = kd()
def probs(x): return teacher.model.eval()(x).softmax(1)
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / 'work.py').write_text(FILE.format(tests=str(Path(__file__).parents[1] / 'helpers')))
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', 'check', *args])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, *capsys.readouterr()

    code, out, _ = call(
        'work.py:student', 'work.py:teacher', '--recipe', 'work.py:recipe', '--n-epoch', '3'
    )
    assert (
        code == 0
        and '✓  recipe' in out
        and '3 epochs' in out
        and 'No mistakes were found. Is this the score that you expect from the teacher?' in out
    )
    code, out, _ = call('work.py:student', 'work.py:probs', '--no-cost')
    assert code == 1 and '✗  outputs' in out and 'step' not in out.split()
    code, _, err = call('work.py:student', 'nothing.pkl')
    assert code == 2 and "There is no file 'nothing.pkl'" in ' '.join(err.split())


# in a notebook


class ZMQInteractiveShell:
    "IPython's shell in a notebook, as rich recognizes it"


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setattr(builtins, 'get_ipython', ZMQInteractiveShell, raising=False)


def test_in_a_notebook_the_text_of_a_check_is_its_table_and_is_not_displayed(notebook, capsys):
    student, teacher = pair('image')
    check = student.check_teacher(teacher, n_epoch=None)
    capsys.readouterr()
    text = repr(check)
    assert f'{check.title}\n' in text
    assert text.endswith(check.verdict)
    assert capsys.readouterr().out == ''


@pytest.mark.skipif(find_spec('ipywidgets') is not None, reason='rich shows its bars')
def test_in_a_notebook_without_ipywidgets_no_bar_warns(notebook, tmp_path):
    student, teacher = pair('image')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cache_teacher(teacher, student.dls, tmp_path, check=False)
        compare(dict(teacher=teacher, student=student), seconds=0, repeats=10)
