"`fastdistill train`: data in every form, mistakes in one line, and runs that are killed and continue to the same result."
import csv, json, multiprocessing, os, random, signal, sys, time, tomllib
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from fastai.learner import load_learner
from fastdistill import DistillError, DistillWarning
from fastdistill.cli import main
from fastdistill.report import Report
from fastdistill.training import TrainConfig, opened_run
from fastdistill.training.checks import checked_samples
from fastdistill.training.config import read_config, write_config
from fastdistill.training.files import read_samples

pytestmark = [pytest.mark.filterwarnings(w) for w in (
    'ignore::fastdistill.DistillWarning', 'ignore:numpy.core is deprecated', 'ignore:__array__ implementation')]
FEW_CLASSES = 3


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "60 handwritten digits of three classes, in a folder for each"
    root = tmp_path_factory.mktemp('data')/'digits'
    write_digits(root, 60)
    return root


def write_digits(root, n, first=0):
    x,y = load_digits(n_class=FEW_CLASSES, return_X_y=True)
    for i in range(first, first + n):
        (root/f'digit{y[i]}').mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[i].reshape(8, 8)*15).astype(np.uint8)).resize((16, 16)).save(root/f'digit{y[i]}'/f'{i}.png')


def settings(data, **kwargs):
    return dict(data=str(data), teacher='cnn-8-16', student='cnn-4', epochs=2, lr=.01, teacher_lr=.01,
                batch_size=16, augment='flip', device='cpu', onnx=False) | kwargs


def run(out, said=None, **kwargs):
    "Train; returns the report"
    return opened_run(settings(**kwargs), out=out, say=(lambda _: None) if said is None else said.append)()


@pytest.fixture
def command(monkeypatch, capsys):
    "Run `fastdistill train ARGS`: (exit code, what it printed, what it complained of)"
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', 'train', *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        return e.value.code,*capsys.readouterr()
    return call


@pytest.fixture(scope='module')
def finished(digits, tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'a'
    run(out, data=digits)
    return out


def numbers(out):
    "All that must be equal in two runs: weights of the student, and the table of the trainings"
    return load_file(out/'student'/'model.safetensors'),(out/'history.csv').read_text()


def assert_same(a, b):
    (wa,ha),(wb,hb) = numbers(a),numbers(b)
    assert ha == hb and wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)


def test_what_a_run_leaves(finished, digits):
    names = {p.name for p in finished.iterdir()}
    assert names == {'config.toml', 'environment.json', 'history.csv', 'report.html', 'report.json', 'student', 'student.pkl', 'teacher.safetensors'}
    report = Report.from_json(finished/'report.json')
    assert [*report.models] == ['teacher', 'alone', 'distilled'] and report.n == 12 and report.classes == ['digit0', 'digit1', 'digit2']
    rows = [*csv.DictReader((finished/'history.csv').read_text().splitlines())]
    assert [(r['model'], r['epoch']) for r in rows] == [(m, e) for m in ('teacher', 'alone', 'distilled') for e in '01']
    assert float(rows[-1]['accuracy']) == pytest.approx(report.models['distilled'].measures['accuracy'].value)
    assert json.loads((finished/'environment.json').read_text())['torch'] == torch.__version__
    learn = load_learner(finished/'student.pkl')
    learn.logger = lambda _: None
    with learn.no_bar(): name,_,probs = learn.predict(next(digits.rglob('*.png')))
    assert name in report.classes and probs.sum().item() == pytest.approx(1)
    weights = load_file(finished/'student'/'model.safetensors')
    assert all(torch.equal(v, weights[k]) for k,v in learn.model.state_dict().items())


def test_the_validation_set_has_a_share_of_each_class(digits):
    c = TrainConfig(**settings(digits, valid='0.25'))
    s = checked_samples(read_samples(c), c)
    for name in s.classes:
        rows = s.frame['y'] == name
        assert s.valid[rows].sum() == round(.25*rows.sum())
    assert s.size == (16, 16)


def test_the_settings_file_repeats_the_run(finished, tmp_path):
    opened_run({}, finished/'config.toml', tmp_path/'b', say=lambda _: None)()
    assert_same(finished, tmp_path/'b')


def test_another_seed_is_another_run(finished, tmp_path):
    opened_run(dict(seed=1, baseline=False), finished/'config.toml', tmp_path/'b', say=lambda _: None)()
    assert not all(map(torch.equal, *[numbers(o)[0].values() for o in (finished, tmp_path/'b')]))
    assert [*Report.from_json(tmp_path/'b'/'report.json').models] == ['teacher', 'distilled']


def child(digits, out, recipe):
    "A process of its own, which may be killed at any moment"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(out.with_suffix('.log'), 'a', buffering=1)
    opened_run(settings(digits, recipe=recipe, epochs=3), out=out, resume=True)()


RECIPE = "labels + dist(share=1) + hint(layers={'0': '0'}, share=.2)"


@pytest.fixture(scope='module')
def processes():
    "Processes that begin with everything imported"
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(['fastdistill.training'])
    return server


def test_a_run_that_is_killed_continues_to_the_same_result(digits, tmp_path, processes):
    "SIGKILL at random moments; the recipe has a projector and shares, whose state must be restored too"
    def start(out):
        p = processes.Process(target=child, args=(digits, out, RECIPE))
        p.start()
        return p
    def lines(): return len(log.read_text().splitlines()) if log.exists() else 0
    whole,log,luck,seen = start(tmp_path/'whole'),tmp_path/'killed.log',random.Random(0),[]
    whole.join(120)
    assert whole.exitcode == 0, (tmp_path/'whole.log').read_text()
    for _ in range(12):
        p,last = start(tmp_path/'killed'),lines() + luck.randint(2, 8)
        while p.is_alive() and lines() < last: time.sleep(.01)
        p.join(luck.uniform(0, .2))
        if p.exitcode is not None: break
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        seen.append({f.stem for f in (tmp_path/'killed'/'checkpoints').glob('*.pt')})
    else: (p := start(tmp_path/'killed')).join(120)
    assert p.exitcode == 0, log.read_text()
    assert len(seen) >= 3 and {'teacher', 'alone', 'distilled'} in seen
    assert_same(tmp_path/'whole', tmp_path/'killed')
