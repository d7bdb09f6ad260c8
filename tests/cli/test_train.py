"`fastdistill train`: data in every form, mistakes in one line, and runs that are killed and continue to the same result."

import csv, json, os, random, re, shlex, shutil, signal, subprocess, sys, time, tomllib
import numpy as np
import pandas as pd
import joblib, pytest, torch
import processes
from PIL import Image
from scipy import stats
from safetensors.torch import load_file
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder
from sklearn.tree import DecisionTreeClassifier
from pathlib import Path
from types import SimpleNamespace
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastdistill import DistillError, DistillWarning
from fastdistill.cli import main
from fastdistill.evaluation import Report
from fastdistill.cli.training import TrainConfig, TrainRun, rate_finder, time_estimate
from fastdistill.cli.training.exported_student import learner_in_file, new_student
from fastdistill.cli.training.architectures import check_arch, learner_of
from fastdistill.cli.training.data_checks import checked_samples
from fastdistill.cli.training.config import Arch, read_config, write_config
from fastdistill.cli.training.data_files import read_samples
from fastdistill.cli.training.dataloaders import loaders_of
from fastdistill.cli.training.rate_finder import find_rate
from fastdistill.cli.training.start_or_resume import settings_of
from fastdistill.cli.training.teachers import file_teacher

pytestmark = [
    pytest.mark.filterwarnings(w)
    for w in (
        'ignore::fastdistill.DistillWarning',
        'ignore:numpy.core is deprecated',
        'ignore:__array__ implementation',
    )
]
FEW_CLASSES = 3


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "60 handwritten digits of three classes, in a folder for each"
    root = tmp_path_factory.mktemp('data') / 'digits'
    write_digits(root, 60)
    return root


def write_digits(root, n, first=0):
    x, y = load_digits(n_class=FEW_CLASSES, return_X_y=True)
    for i in range(first, first + n):
        (root / f'digit{y[i]}').mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[i].reshape(8, 8) * 15).astype(np.uint8)).resize((16, 16)).save(
            root / f'digit{y[i]}' / f'{i}.png'
        )


def changed(usual, given):
    "Other architectures have their own layers"
    own = [f'{role}_layers' for role in ('teacher', 'student') if role in given]
    return {k: v for k, v in usual.items() if k not in own} | given


def settings(data, **kwargs):
    usual = dict(
        data=str(data),
        teacher='cnn',
        teacher_layers='8,16',
        student='cnn',
        student_layers='4',
        epochs=2,
        lr=0.01,
        teacher_lr=0.01,
        batch_size=16,
        augment='flip',
        device='cpu',
        onnx=False,
    )
    return changed(usual, kwargs)


def opened_run(given, config_file=None, out=None, resume=False, **kwargs):
    return TrainRun(*settings_of(given, config_file, out, resume), **kwargs)


def run(out, said=None, **kwargs):
    "Train; returns the report"
    return opened_run(
        settings(**kwargs), out=out, say=(lambda _: None) if said is None else said.append
    )()


@pytest.fixture
def command(monkeypatch, capsys):
    "Run `fastdistill train ARGS`: (exit code, what it printed, what it complained of)"

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', 'train', *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope='module')
def finished(digits, tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs') / 'a'
    run(out, data=digits)
    return out


def numbers(out):
    "All that must be equal in two runs: weights of the student, and the table of the trainings"
    return load_file(out / 'student' / 'model.safetensors'), (out / 'history.csv').read_text()


def assert_same(a, b):
    (wa, ha), (wb, hb) = numbers(a), numbers(b)
    assert ha == hb and wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)


def test_the_command_that_find_prints_trains_with_what_was_found(command, finished, tmp_path):
    from fastdistill.cli.commands.find import training_command
    from fastdistill.cli.named_objects import load_named_learner

    student, teacher = [shutil.copytree(finished, tmp_path / n) / 'student.pkl' for n in 'ab']
    found = load_named_learner(str(student)).distill_find(
        str(teacher), 1, rates=[0.01], trials=2, seeds=1, check=False, live=False
    )
    found.winner = next(r for r in found.runs if r.name != found.labels)  # whatever was better
    program, name, *args = shlex.split(
        training_command(str(student), str(teacher), None, 1, False, found)
    )
    assert [program, name] == ['fastdistill', 'train']
    code, out, err = command(*args, '--out', tmp_path / 'run')
    assert not code, err
    config = tomllib.loads((tmp_path / 'run' / 'config.toml').read_text())
    assert config['recipe'] == found.text
    assert config['lr'] == 0.01
    assert config['epochs'] == 1
    assert config['teacher'] == str(teacher)
    assert (tmp_path / 'run' / 'report.json').is_file()


def test_find_trains_the_student_of_a_run_anew(command, finished, tmp_path, monkeypatch, capsys):
    config = finished / 'config.toml', '--epochs', 1, '--lr', 1e-9
    code, _, err = command('--config', *config, '--no-baseline', '--out', tmp_path / 'same')
    assert not code, err
    begun, _ = numbers(tmp_path / 'same')
    folder = shutil.copytree(finished, tmp_path / 'nan')
    broken = learner_in_file(folder / 'student.pkl')
    for p in broken.model.parameters():
        p.data.fill_(torch.nan)
    broken.export(folder / 'student.pkl')
    args = 'fastdistill', 'find', folder, finished, '--n-epoch', 1, '--rates', 1e-9
    options = '--trials', 2, '--seeds', 0, '--no-check'
    monkeypatch.setattr(sys, 'argv', [*map(str, args + options)])
    with pytest.raises(SystemExit) as e:
        main()
    out, err = capsys.readouterr()
    assert not e.value.code, err
    assert 'Each training run starts from the weights with which fastdistill train begins' in out
    student = new_student(folder / 'student.pkl')
    for k, v in student.model.named_parameters():
        assert torch.allclose(v.cpu(), begun[k], atol=1e-6), k
    assert 'nan' not in out.replace(str(folder), '')


def test_what_a_run_leaves(finished, digits):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        'changed.csv',
        'config.toml',
        'environment.json',
        'history.csv',
        'report.html',
        'report.json',
        'split.csv',
        'student',
        'student.pkl',
        'teacher.safetensors',
    }
    report = Report.from_json(finished / 'report.json')
    assert (
        [*report.models] == ['teacher', 'alone', 'distilled']
        and report.n == 12
        and report.classes == ['digit0', 'digit1', 'digit2']
    )
    rows = [*csv.DictReader((finished / 'history.csv').read_text().splitlines())]
    assert [(r['model'], r['epoch']) for r in rows] == [
        (m, e) for m in ('teacher', 'alone', 'distilled') for e in '01'
    ]
    assert float(rows[-1]['accuracy']) == pytest.approx(
        report.models['distilled'].measures['accuracy'].value
    )
    assert json.loads((finished / 'environment.json').read_text())['torch'] == torch.__version__
    learn = load_learner(finished / 'student.pkl')
    learn.logger = lambda _: None
    with learn.no_bar():
        name, _, probs = learn.predict(next(digits.rglob('*.png')))
    assert name in report.classes and probs.sum().item() == pytest.approx(1)
    weights = load_file(finished / 'student' / 'model.safetensors')
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())


def test_the_samples_that_the_students_predict_differently_are_listed(digits, tmp_path):
    "Compared with predictions of the exported student, one file at a time"
    out = tmp_path / 'run'
    run(out, data=digits, epochs=3, lr=0.03, student_layers='2', batch_size=4, valid='0.5')
    learn = load_learner(out / 'student.pkl')
    table = pd.read_csv(out / 'changed.csv')
    assert [*table] == [
        'file',
        'right',
        'label',
        *(k + end for k in ('teacher', 'alone', 'distilled') for end in ('', ' probability')),
    ]
    assert len(table)
    assert (table['alone'] != table['distilled']).all()
    split = pd.read_csv(out / 'split.csv')
    files = [*split.file[split.set == 'valid']]
    assert [*table.file] == sorted(table.file, key=files.index)
    for row in table.to_dict('records'):
        with learn.no_bar(), learn.no_logging():
            name, number, probs = learn.predict(row['file'])
        assert name == row['distilled']
        assert probs[number].item() == pytest.approx(row['distilled probability'], abs=1e-4)
        assert Path(row['file']).parent.name == row['label']
    report = Report.from_json(out / 'report.json')
    a, b = (report.models[n].measures['accuracy'].value for n in ('alone', 'distilled'))
    gained = (table['distilled'] == table['label']).sum() - (table['alone'] == table['label']).sum()
    assert gained == round((b - a) * report.n)
    own = {k: int((table[k] == table.label).sum()) for k in ('distilled', 'alone')}
    assert (table.right == 'distilled').sum() == own['distilled']
    assert (table.right == 'alone').sum() == own['alone']
    (note,) = (o for o in report.notes if 'changed.csv' in o)
    assert f'different classes for {len(table)} of {report.n} validation samples' in note
    assert (
        f'distilled is right for {own["distilled"]}, only alone is right for {own["alone"]},'
        in note
    )


def test_changed_texts_have_the_numbers_of_their_rows(tmp_path):
    "A validation set of texts is sorted by length"
    g = np.random.default_rng(0)
    texts = [' '.join(g.choice([*'abcdefgh'], g.integers(1, 9))) for _ in range(120)]
    labels = ['vowel' if 'a' in t or 'e' in t else 'none' for t in texts]
    file = tmp_path / 'a.csv'
    pd.DataFrame(dict(text=texts, label=labels)).to_csv(file, index=False)
    layers = dict(teacher='embedding_bag', student='embedding_bag', teacher_layers='16,8')
    out = tmp_path / 'run'
    options = dict(student_layers='2', epochs=3, lr=0.03, batch_size=4, valid='0.5')
    run(out, data=file, **layers, **options)
    learn = load_learner(out / 'student.pkl')
    table = pd.read_csv(out / 'changed.csv', keep_default_na=False)
    assert [*table][:3] == ['row', 'right', 'label']
    assert len(table)
    for row in table.to_dict('records'):
        with learn.no_bar(), learn.no_logging():
            name, number, probs = learn.predict(texts[row['row']])
        assert name == row['distilled']
        assert probs[number].item() == pytest.approx(row['distilled probability'], abs=1e-4)
        assert labels[row['row']] == row['label']


def test_the_validation_set_has_a_share_of_each_class(digits):
    c = TrainConfig(**settings(digits, valid='0.25'))
    s = checked_samples(read_samples(c), c)
    for name in s.classes:
        rows = s.frame['y'] == name
        assert s.valid[rows].sum() == round(0.25 * rows.sum())
    assert s.size == (16, 16)


def test_the_settings_file_repeats_the_run(finished, tmp_path):
    opened_run({}, finished / 'config.toml', tmp_path / 'b', say=lambda _: None)()
    assert_same(finished, tmp_path / 'b')


def test_another_seed_is_another_run(finished, tmp_path):
    opened_run(
        dict(seed=1, baseline=False), finished / 'config.toml', tmp_path / 'b', say=lambda _: None
    )()
    assert not all(map(torch.equal, *[numbers(o)[0].values() for o in (finished, tmp_path / 'b')]))
    assert [*Report.from_json(tmp_path / 'b' / 'report.json').models] == ['teacher', 'distilled']


def test_an_interrupted_run_continues_with_the_recipe_that_was_chosen(finished, digits, tmp_path):
    "The default measures the teacher on training images, which depend on random numbers"

    def say(text):
        if text.startswith('distilled: epoch 1'):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened_run(settings(digits), out=tmp_path / 'b', say=say)()
    lines = []
    opened_run({}, out=tmp_path / 'b', resume=True, say=lines.append)()
    assert 'teacher: is finished' in lines and 'distilled: continues after epoch 1 of 2' in lines
    assert_same(finished, tmp_path / 'b')


def on_split_of(finished):
    "Settings for the data, the split and the teacher of a run"
    return dict(
        data=finished / 'split.csv',
        valid='set',
        teacher_weights=str(finished / 'teacher.safetensors'),
    )


def test_each_seed_is_the_run_with_this_seed(finished, tmp_path):
    "The same data and teacher; what is saved are the models of the first seed"
    several = run(tmp_path / 'several', said := [], seeds=3, **on_split_of(finished))
    found = several.seeds
    assert found.seeds == [0, 1, 2]
    rows = [*csv.DictReader((tmp_path / 'several' / 'history.csv').read_text().splitlines())]
    assert [(r['model'], r['seed'], r['epoch']) for r in rows] == [
        (m, s, e) for s in '012' for m in ('alone', 'distilled') for e in '01'
    ]
    for i in (0, 1):
        name = f'one{i}'
        one = run(tmp_path / name, seed=i, **on_split_of(finished))
        k = one.headline
        assert {n: v[i] for n, v in found.values.items()} == {
            n: one.models[n].measures[k].value for n in ('alone', 'distilled')
        }
        theirs = (tmp_path / name / 'history.csv').read_text().splitlines()[1:]
        ours = (tmp_path / 'several' / 'history.csv').read_text().splitlines()[1:]
        assert [r for r in ours if r.split(',')[1] == str(i)] == theirs
        same = [torch.equal(a, b) for a, b in zip(*weights_of(tmp_path, 'several', name))]
        assert all(same) == (i == 0)
    a, b = (np.array(found.values[n]) for n in ('distilled', 'alone'))
    assert found.difference.value == pytest.approx(np.mean(a - b))
    if np.ptp(a - b) > 0:
        test = stats.ttest_rel(a, b)
        assert found.difference.p == pytest.approx(test.pvalue)
        assert found.difference.low == pytest.approx(test.confidence_interval(0.95).low)
    page = (tmp_path / 'several' / 'report.html').read_text()
    assert 'Seeds: accuracy of each training run' in page
    assert 'Over 3 seeds, ' in page
    assert 'These are the models of seed 0.' in page
    assert 'Each was trained once' not in page
    assert any(line.startswith('distilled, seed 2: epoch 2 of 2') for line in said)


def weights_of(folder, *names):
    return [load_file(folder / name / 'student' / 'model.safetensors').values() for name in names]


def test_a_run_with_several_seeds_continues_in_the_middle_of_one(digits, tmp_path):
    def say(text):
        if text.startswith('distilled, seed 6: epoch 1'):
            raise KeyboardInterrupt

    options = settings(digits, seed=5, seeds=2)
    whole = opened_run(options, out=tmp_path / 'whole', say=lambda _: None)()
    with pytest.raises(KeyboardInterrupt):
        opened_run(options, out=tmp_path / 'stopped', say=say)()
    lines = []
    again = opened_run({}, out=tmp_path / 'stopped', resume=True, say=lines.append)()
    for name in 'teacher', 'alone, seed 5', 'distilled, seed 5', 'alone, seed 6':
        assert f'{name}: is finished' in lines
    assert 'distilled, seed 6: continues after epoch 1 of 2' in lines
    assert_same(tmp_path / 'whole', tmp_path / 'stopped')
    assert again.seeds == whole.seeds
    assert again.seeds.difference.p is None  # two seeds: no test
    assert not (tmp_path / 'stopped' / 'checkpoints').exists()


def test_one_seed_is_called_one_training_and_several_end_with_their_mean(
    command, finished, tmp_path
):
    assert (
        'Each was trained once. Results vary with the seed'
        in (finished / 'report.html').read_text()
    )
    config = '--config', finished / 'config.toml', '--epochs', 1
    code, out, err = command(*config, '--seeds', 2, '--out', tmp_path / 'two')
    assert not code, err
    last = ' '.join(out.split('report.html, and the student in the same folder')[1].split())
    assert re.fullmatch(
        'Over 2 seeds, the difference between distilled and alone is not tested: accuracy '
        r'[+-][\d.]+ points on average \(two seeds are too few for a test\). distilled was better '
        r'in [012] of 2 seeds\.',
        last,
    ), last
    code, _, err = command(*config, '--no-baseline', '--seeds', 2, '--out', tmp_path / 'none')
    assert code == 2
    assert 'Omit one of the two options' in ' '.join(err.split())
    assert not (tmp_path / 'none').exists()


def child(digits, out, recipe, pause):
    "A process of its own, which may be killed at any moment"

    def say(text):
        print(text)
        time.sleep(pause)

    opened_run(settings(digits, recipe=recipe, epochs=4), out=out, resume=True, say=say)()


RECIPE = "labels + dist(grad_ratio=1) + hint(layers={'0': '0'}, grad_ratio=.2)"


def test_a_run_that_is_killed_continues_to_the_same_result(digits, tmp_path):
    "SIGKILL at random moments; the recipe has a projector and shares, whose state must be restored too"

    def start(out, pause=0.0):
        return processes.start(out, child, digits, out, RECIPE, pause)

    luck = random.Random()
    assert processes.ended(start(tmp_path / 'whole')) == [0], processes.said(tmp_path / 'whole')
    for name in ('teacher', 'distilled'):
        # the pause: so that it does not end before it is killed
        p, file = (
            start(tmp_path / 'killed', 0.15),
            tmp_path / 'killed' / 'checkpoints' / f'{name}_0.pt',
        )
        while p.is_alive() and not file.exists():
            time.sleep(0.01)
        time.sleep(luck.uniform(0, 0.3))
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        assert p.exitcode == -signal.SIGKILL and file.exists(), processes.said(tmp_path / 'killed')
    assert processes.ended(start(tmp_path / 'killed')) == [0], processes.said(tmp_path / 'killed')
    assert 'distilled: continues after epoch' in processes.said(tmp_path / 'killed')
    assert_same(tmp_path / 'whole', tmp_path / 'killed')


@pytest.mark.parametrize('recipe', ['auto', RECIPE])
def test_a_run_says_how_long_it_takes_and_trains_as_if_it_had_not_measured(
    recipe, digits, tmp_path, monkeypatch
):
    given = dict(data=digits, recipe=recipe, epochs=2, augment='full')
    monkeypatch.setattr(time_estimate, 'SHORT', 0)
    monkeypatch.setattr(time_estimate, 'MEASURED_STEPS', 1)
    run(tmp_path / 'a', said := [], **given, batch_size=8)
    (line,) = [o for o in said if o.startswith('time: ')]
    number = r'(\d+(?:\.\d)?)'
    assert re.fullmatch(
        rf'time: about {number} (seconds|minutes) \(teacher {number}, alone {number}, distilled {number}\)',
        line,
    )
    monkeypatch.setattr(time_estimate, 'MEASURED_STEPS', 10**9)
    run(tmp_path / 'b', said := [], **given, batch_size=8)
    assert not any(o.startswith('time: ') for o in said)
    assert_same(tmp_path / 'a', tmp_path / 'b')


@pytest.mark.parametrize(
    'seconds, loading, size, ways',
    [
        ((700, 90, 200), 9, (96, 128), '--size 48x64, a smaller --teacher or fewer --epochs'),
        ((100, 400, 500), 9, (96, 96), '--size 48 or fewer --epochs'),
        ((700, 90, 200), 9, None, 'a smaller --teacher or fewer --epochs'),
        ((100, 400, 500), 9, (32, 32), 'fewer --epochs'),
        (
            (700, 90, 200),
            800,
            (96, 96),
            '--workers 2 or smaller files, because loading and augmenting take most of the time',
        ),
    ],
)
def test_a_run_that_takes_long_names_what_would_be_faster(seconds, loading, size, ways):
    parts = dict(zip(('teacher', 'alone', 'distilled'), seconds))
    assert time_estimate.advice(parts, loading, size) == ways


@pytest.mark.parametrize(
    'seconds, says',
    [
        ((20.4, 9, 10), 'about 39 seconds (teacher 20, alone 9, distilled 10)'),
        ((610, 30, 200), 'about 14 minutes (teacher 10, alone 0.5, distilled 3.3)'),
        ((7200, 3600, 4000), 'about 4.1 hours (teacher 2.0, alone 1.0, distilled 1.1)'),
    ],
)
def test_times_have_the_unit_of_their_sum(seconds, says):
    assert time_estimate.amounts(dict(zip(('teacher', 'alone', 'distilled'), seconds))) == says


def test_resume_of_a_finished_or_another_run(finished, digits, command):
    assert 'is finished' in command('--resume', '--out', finished)[2]
    code, _, err = command('--resume', '--out', finished, '--data', digits, '--epochs', 3)
    assert code == 2 and 'contains a run with --epochs 2, but now --epochs 3' in ' '.join(
        err.split()
    )
    assert (
        'already contains a run'
        in command(
            '--data',
            digits,
            '--teacher',
            'cnn',
            '--teacher-layers',
            '4',
            '--student',
            'cnn',
            '--student-layers',
            '4',
            '--out',
            finished,
        )[2]
    )


@pytest.mark.parametrize('key', ['data', 'teacher', 'student'])
def test_a_setting_that_is_missing_in_config_toml_is_named(key, finished, command, tmp_path):
    shutil.copytree(finished, folder := tmp_path / 'w')
    config = folder / 'config.toml'
    lines = config.read_text().splitlines()
    config.write_text('\n'.join(o for o in lines if not o.startswith(f'{key} =')))
    code, _, err = command('--resume', '--out', folder)
    assert code == 2
    assert f"has no setting '{key}'" in ' '.join(err.split())


@pytest.mark.filterwarnings('ignore:.* is a pickle')
def test_a_student_is_not_scored_on_samples_that_it_was_trained_on(finished, digits, tmp_path):
    shutil.copytree(finished, folder := tmp_path / 'w')
    shutil.copytree(digits, data := tmp_path / 'data')
    config = folder / 'config.toml'
    config.write_text(config.read_text().replace(str(digits), str(data)))
    learn = learner_in_file(folder / 'student.pkl')  # the same data in a different place
    assert len(learn.dls.valid_ds) == len(learner_in_file(finished / 'student.pkl').dls.valid_ds)
    split = pd.read_csv(folder / 'split.csv')
    trained = split.file[split.set == 'train'].tolist()
    for i, file in enumerate(trained[:5]):
        (data / Path(file).relative_to(digits)).rename(
            data / Path(file).parent.name / f'new{i}.png'
        )
    with pytest.raises(DistillError, match='validation samples were training samples of the run'):
        learner_in_file(folder / 'student.pkl')


def test_a_student_is_not_scored_on_rows_that_moved_into_the_validation_set(tmp_path):
    "A table that was exported again in a different order: its validation rows have the same numbers"
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=g.normal(size=40).round(4), b=g.normal(size=40).round(4)))
    df['price'] = (2 * df.a + df.b).round(4)
    df.to_csv(data := tmp_path / 'a.csv', index=False)
    own = dict(teacher='tabular', student='tabular', teacher_layers='8', student_layers='4')
    run(
        out := tmp_path / 'run',
        data=data,
        y='price',
        epochs=1,
        augment='none',
        baseline=False,
        **own,
    )
    with pytest.warns(DistillWarning, match='is a pickle'):
        assert len(learner_in_file(out / 'student.pkl').dls.valid_ds) == 8
    df.sort_values('price').to_csv(data, index=False)
    says = 'of 8 validation samples were training samples of the run .row [0-9]'
    with pytest.raises(DistillError, match=says):
        learner_in_file(out / 'student.pkl')
    split = pd.read_csv(out / 'split.csv')
    assert [*split] == ['row', 'content', 'set']
    split.drop(columns='content').to_csv(out / 'split.csv', index=False)  # of an earlier version
    learner_in_file(out / 'student.pkl')


def test_teachers_that_exist_already(finished, digits, tmp_path):
    "Exported, or as weights. It is not trained, and both forms score the same"
    out = tmp_path / 'weights'
    run(
        out,
        data=digits,
        epochs=1,
        baseline=False,
        teacher_weights=str(finished / 'teacher.safetensors'),
    )
    with pytest.warns(DistillWarning, match='is a pickle, and loading it runs the code in it'):
        run(
            tmp_path / 'pkl',
            data=digits,
            epochs=1,
            baseline=False,
            teacher=str(finished / 'student.pkl'),
        )
    score = lambda o, name: (
        Report.from_json(o / 'report.json').models[name].measures['accuracy'].value
    )
    assert score(out, 'teacher') == score(finished, 'teacher') and score(
        tmp_path / 'pkl', 'teacher'
    ) == score(finished, 'distilled')
    assert not (out / 'teacher.safetensors').exists()
    with pytest.raises(DistillError, match='The weights in .* do not fit cnn 16,16'):
        run(
            tmp_path / 'c',
            data=digits,
            teacher='cnn',
            teacher_layers='16,16',
            teacher_weights=str(finished / 'teacher.safetensors'),
        )
    with pytest.raises(DistillError, match='contains weights, but no architecture'):
        run(tmp_path / 'c', data=digits, teacher=str(finished / 'teacher.safetensors'))


MAY_KNOW = 'The teacher may have been trained on some of these validation samples'


@pytest.mark.parametrize('given', ['student.pkl', 'teacher.safetensors'])
def test_a_teacher_that_may_know_the_validation_set_is_named(given, finished, digits, tmp_path):
    "Not if it was trained on the same split, or if the data have a validation set of their own"
    is_learner = given.endswith('.pkl')
    teacher = {'teacher' if is_learner else 'teacher_weights': str(finished / given)}
    usual = dict(data=digits, epochs=1, baseline=False, **teacher)
    shutil.copy(finished / given, tmp_path / given)  # without its split
    elsewhere = {k: str(tmp_path / given) for k in teacher}
    for name, change, warned in [
        ('same', {}, False),
        ('elsewhere', elsewhere, True),
        ('seed', dict(seed=1), True),
        ('given', elsewhere | dict(data=finished / 'split.csv', valid='set'), False),
    ]:
        run(tmp_path / name, said := [], **usual | change)
        assert any(MAY_KNOW in o for o in said) == warned
        report = Report.from_json(tmp_path / name / 'report.json')
        assert any(MAY_KNOW in o for o in report.notes) == warned
        assert (MAY_KNOW in report.to_markdown()) == warned
        assert (MAY_KNOW in (tmp_path / name / 'report.html').read_text()) == warned


def test_the_split_of_a_run_is_in_its_folder_and_can_be_given_again(finished, digits, tmp_path):
    rows = [*csv.DictReader((finished / 'split.csv').read_text().splitlines())]
    c = TrainConfig(**settings(digits))
    s = checked_samples(read_samples(c), c)
    assert {(r['file'], r['label'], r['set'] == 'valid') for r in rows} == {
        *zip(s.frame.x, s.frame.y, s.valid.tolist())
    }
    again, _ = loaders(data=finished / 'split.csv', valid='set', seed=5)
    assert {*zip(again.frame.file, again.valid)} == {*zip(s.frame.x, s.valid)}


def loaders(**kwargs):
    c = TrainConfig(**settings(**kwargs))
    s = checked_samples(read_samples(c), c)
    return s, loaders_of(s, c)


def test_train_and_validation_folders(tmp_path):
    write_digits(tmp_path / 'train', 30)
    write_digits(tmp_path / 'val', 12, 30)
    s, dls = loaders(data=tmp_path)
    assert [len(d) for d in (dls.train_ds, dls.valid_ds)] == [30, 12] and list(
        dls.vocab
    ) == s.classes
    for p, y in zip(dls.valid_ds.items, dls.valid_ds):
        assert p.parents[1].name == 'val' and s.classes[y[1]] == p.parent.name


def test_images_of_a_csv_with_several_labels(digits, tmp_path):
    files = sorted(digits.rglob('*.png'))[:40]
    labels = [['even', 'small'][i % 2 :] if i % 3 else [] for i, _ in enumerate(files)]
    pd.DataFrame(
        dict(
            file=[os.path.relpath(f, tmp_path) for f in files],
            tags=[*map(';'.join, labels)],
            held=[i % 4 == 0 for i in range(40)],
        )
    ).to_csv(tmp_path / 'tags.csv', index=False)
    s, dls = loaders(
        data=tmp_path / 'tags.csv', y='tags', delimiter=';', valid='held', augment='none'
    )
    assert s.task == 'images' and s.target == 'labels' and len(dls.valid_ds) == 10
    for (_, y), i in zip(dls.valid_ds, range(0, 40, 4)):
        assert {c for c, v in zip(s.classes, y) if v} == set(labels[i])
    assert tuple(dls.one_batch()[1].shape) == (16, 2)


def write_masks(root, border=None, palette=None, n=10):
    "Pictures of noise, and masks of three classes with a border"
    luck = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (root / kind).mkdir(parents=True)
    for i in range(n):
        x = luck.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        y = luck.integers(0, 3, (24, 32), dtype=np.uint8)
        if border is not None:
            y[:4] = border
        mask = Image.fromarray(y)
        if palette is not None:
            mask.putpalette(palette)
        Image.fromarray(x).save(root / 'images' / f'{i}.jpg')
        mask.save(root / 'masks' / f'{i}.png')


def test_masks(tmp_path):
    write_masks(tmp_path)
    s, dls = loaders(data=tmp_path)
    x, y = dls.one_batch()
    assert (
        s.task == 'masks'
        and x.shape[2:] == y.shape[1:] == (24, 32)
        and set(y.unique().tolist()) == {0, 1, 2}
    )
    (tmp_path / 'codes.txt').write_text('road\nsky\nVoid\n')
    c = TrainConfig(**settings(data=tmp_path, student='resnet18'))
    s = checked_samples(read_samples(c), c)
    assert s.ignored == 2
    (tmp_path / 'codes.txt').write_text('road\nsky\n')
    with pytest.raises(
        DistillError, match='contain the class number 2, but .*codes.txt lists 2 classes'
    ):
        loaders(data=tmp_path)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / 'masks' / '3.png')
    with pytest.raises(DistillError, match='3.png has 3 channels. A mask must have one'):
        loaders(data=tmp_path)
    (tmp_path / 'masks' / '3.png').unlink()
    with pytest.raises(DistillError, match='3.jpg has no mask'):
        loaders(data=tmp_path)


@pytest.mark.parametrize('palette', [None, [*range(255, -1, -1)] * 3])
def test_a_value_of_masks_that_is_not_a_class_is_ignored(palette, tmp_path, command):
    write_masks(tmp_path / 'data', 255, palette)
    options = ('--data', tmp_path / 'data', '--teacher', 'cnn', '--teacher-layers', '8,16')
    options += ('--student', 'cnn', '--student-layers', '4,8', '--epochs', 1, '--lr', 0.01)
    options += ('--teacher-lr', 0.01, '--device', 'cpu', '--no-onnx', '--recipe', 'kd()')
    code, _, err = command(*options, '--out', tmp_path / 'none')
    assert code == 2
    assert 'If 255 marks pixels to ignore, pass --ignore 255.' in ' '.join(err.split())
    code, _, err = command(*options, '--ignore', 7, '--out', tmp_path / 'none')
    assert code == 2
    assert 'The masks contain the values 0, 1, 2, 255.' in ' '.join(err.split())
    code, out, err = command(*options, '--ignore', 255, '--out', tmp_path / 'run')
    assert code == 0, err
    assert (
        '3 classes (0, 1, 2), 255 ignored (foreground_acc: accuracy of the other pixels); 8 samples'
        in out
    )
    assert read_config(tmp_path / 'run' / 'config.toml')['ignore'] == '255'
    report = Report.from_json(tmp_path / 'run' / 'report.json')
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'Validation images on which the models differ most' in page
    left_out = 'Ignored in the scores of all models: label 255.'
    assert left_out in page
    assert left_out in (tmp_path / 'run' / 'student' / 'README.md').read_text()
    assert json.loads((tmp_path / 'run' / 'student' / 'config.json').read_text())['ignored'] == 255
    assert report.classes == ['0', '1', '2']
    c = TrainConfig(**read_config(tmp_path / 'run' / 'config.toml'))
    s = checked_samples(read_samples(c), c)
    held = s.frame[s.valid]
    y = np.stack([np.asarray(Image.open(p)) for p in held.y])
    assert report.counts == [(y == k).sum() for k in range(3)]
    learn = load_learner(tmp_path / 'run' / 'student.pkl')
    with learn.no_bar(), learn.no_logging():
        probs, shown = learn.get_preds(dl=learn.dls.test_dl(held, with_labels=True))
    assert probs.shape == (2, 3, 24, 32)
    assert (shown.numpy() == y).all()
    right = (probs.argmax(1).numpy() == y)[y < 255].mean()
    measured = report.models['distilled'].measures
    assert measured['accuracy'].value == pytest.approx(right)
    rows = [*csv.DictReader((tmp_path / 'run' / 'history.csv').read_text().splitlines())]
    assert float(rows[-1]['foreground_acc']) == pytest.approx(right)
    loss = torch.nn.functional.nll_loss(probs.log(), torch.tensor(y).long(), ignore_index=255)
    assert float(rows[-1]['valid_loss']) == pytest.approx(loss.item(), rel=1e-4)
    with pytest.raises(
        DistillError, match="ignore='255': this is for masks, but .* contains images"
    ):
        write_digits(tmp_path / 'digits', 30)
        loaders(data=tmp_path / 'digits', ignore='255')


@pytest.mark.parametrize('name', ['mobilenet_v2', 'shufflenet_v2_x0_5', 'regnet_y_400mf'])
def test_the_u_net_of_a_small_encoder_has_skip_connections(name, tmp_path):
    write_masks(tmp_path)
    c = TrainConfig(**settings(tmp_path, student=name))
    s = checked_samples(read_samples(c), c)
    net = learner_of(c.arch('student'), loaders_of(s, c), s, c).model.eval()
    x = torch.zeros(1, 3, 24, 32)
    net(x)
    assert [tuple(o.stored.shape[2:]) for o in net.sfs] == [(2, 2), (3, 4), (6, 8), (12, 16)]


def test_a_transformer_is_no_encoder_of_a_u_net(tmp_path):
    write_masks(tmp_path)
    c = TrainConfig(**settings(tmp_path, student='swin_t'))
    s = checked_samples(read_samples(c), c)
    with pytest.raises(DistillError, match='swin_t has no feature maps of several sizes'):
        learner_of(c.arch('student'), loaders_of(s, c), s, c)


def test_images_are_classified_by_all_layers_of_a_mobilenet(digits):
    for name, width in dict(mobilenet_v2=1280, shufflenet_v2_x0_5=1024).items():
        c = TrainConfig(**settings(digits, student=name))
        s = checked_samples(read_samples(c), c)
        net = learner_of(c.arch('student'), loaders_of(s, c), s, c).model.eval()
        assert net[0](torch.zeros(1, 3, 16, 16)).shape == (1, width, 1, 1)


def test_the_classes_of_a_palette_mask_are_its_numbers_and_not_its_colors(tmp_path):
    luck = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (tmp_path / kind).mkdir()
    classes = luck.integers(0, 3, (10, 24, 32), dtype=np.uint8)
    for i, y in enumerate(classes):
        Image.fromarray(y).save(tmp_path / 'images' / f'{i}.png')
        mask = Image.fromarray(y)
        if i:  # one of them is gray
            mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(tmp_path / 'masks' / f'{i}.png')
        assert mask.mode == ('P' if i else 'L')
    s, dls = loaders(data=tmp_path, augment='none')
    assert s.classes == ['0', '1', '2']
    for dl in dls.loaders:
        for (_, y), path in zip(dl.dataset, dl.items['y']):
            assert np.array_equal(np.asarray(y), classes[int(Path(path).stem)])
    learn = Learner(dls, torch.nn.Conv2d(3, 3, 1), loss_func=CrossEntropyLossFlat(axis=1))
    learn.export(tmp_path / 'learn.pkl')
    code = f"""
import sys, numpy as np
sys.modules['fastdistill'] = None
from fastai.vision.all import load_learner
learn = load_learner({str(tmp_path / 'learn.pkl')!r})
dl = learn.dls.test_dl([{str(tmp_path / 'images' / '1.png')!r}], num_workers=0)
print(learn.get_preds(dl=dl)[0].shape)
"""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True
    )
    assert 'torch.Size([1, 3, 24, 32])' in done.stdout, done.stderr


def test_texts(tmp_path, command):
    words = {
        'good': ['what a fine film', 'I like this one', 'a great day out'],
        'bad': ['what a poor film', 'I hate this one', 'a dull day out'],
    }
    pd.DataFrame(
        [(t, k) for k, ts in words.items() for t in ts * 5], columns=['review', 'label']
    ).to_csv(tmp_path / 'a.csv', index=False)
    code, out, err = command(
        '--data',
        tmp_path / 'a.csv',
        '--teacher',
        'embedding_bag',
        '--teacher-layers',
        '16,8',
        '--student',
        'embedding_bag',
        '--student-layers',
        '4',
        '--epochs',
        10,
        '--lr',
        0.1,
        '--teacher-lr',
        0.1,
        '--batch-size',
        4,
        '--no-onnx',
        '--out',
        tmp_path / 'run',
        '--device',
        'cpu',
        '--recipe',
        'kd(T=2)',
    )
    assert code == 0, err
    assert (
        'texts, column review, 2 classes (bad, good); 24 samples for training, 6 for validation'
        in out
    )
    assert (
        Report.from_json(tmp_path / 'run' / 'report.json')
        .models['distilled']
        .measures['accuracy']
        .value
        == 1
    )
    learn = load_learner(tmp_path / 'run' / 'student.pkl')
    with learn.no_bar(), learn.no_logging():
        assert learn.predict('a fine day')[0] == 'good'


def people(n=80):
    luck = np.random.default_rng(0)
    frame = pd.DataFrame(
        dict(
            age=luck.normal(40, 9, n),
            job=luck.choice(['a', 'b', 'c'], n),
            gap=np.where(luck.random(n) < 0.2, np.nan, luck.normal(size=n)),
        )
    )
    return frame.assign(rich=np.where(frame.age > 40, 'yes', 'no'), wage=frame.age * 3.7 + 1.25)


def test_a_table_and_its_exported_teacher(tmp_path):
    people().drop(columns='wage').to_csv(tmp_path / 'a.csv', index=False)
    options = dict(
        data=tmp_path / 'a.csv',
        teacher='tabular',
        teacher_layers='32',
        student='tabular',
        student_layers='8',
        epochs=2,
    )
    run(tmp_path / 'first', said := [], **options)
    assert 'data: table, 1 category, 2 numbers, 2 classes' in '\n'.join(said)
    run(
        tmp_path / 'second',
        **changed(
            options,
            dict(
                teacher=str(tmp_path / 'first' / 'student.pkl'),
                student='tabular',
                student_layers='4',
                baseline=False,
            ),
        ),
    )
    a, b = (Report.from_json(tmp_path / o / 'report.json') for o in ('first', 'second'))
    assert (
        a.models['distilled'].measures['accuracy'] == b.models['teacher'].measures['accuracy']
        and a.unit == 'rows'
    )
    people().rename(columns=dict(job='work')).to_csv(tmp_path / 'b.csv', index=False)
    with pytest.raises(
        DistillError,
        match="The teacher's table has the column.s. job, which are missing from this data",
    ):
        run(
            tmp_path / 'third',
            **changed(
                options,
                dict(
                    data=tmp_path / 'b.csv',
                    y='rich',
                    teacher=str(tmp_path / 'first' / 'student.pkl'),
                ),
            ),
        )


@pytest.mark.parametrize('order', [['gap', 'age', 'job', 'rich'], ['rich', 'job', 'gap', 'age']])
def test_the_columns_of_a_table_may_have_a_different_order_than_the_teacher(order, tmp_path):
    frame = people().drop(columns='wage')
    both = {}
    for name, columns in (('a', ['age', 'gap', 'job', 'rich']), ('b', order)):
        frame[columns].to_csv(tmp_path / f'{name}.csv', index=False)
        c = TrainConfig(**settings(tmp_path / f'{name}.csv', y='rich'))
        s = checked_samples(read_samples(c), c)
        teacher = SimpleNamespace(dls=both['a']) if both else None
        both[name] = loaders_of(s, c, teacher)
    for x, y in zip(*(both[k].valid.one_batch() for k in 'ab')):
        torch.testing.assert_close(x, y)


def test_trees_in_a_file_teach_a_table(tmp_path, command):
    people().drop(columns='wage').to_csv(file := tmp_path / 'a.csv', index=False)
    frame, columns = pd.read_csv(file), ['age', 'job', 'gap']
    encoded = make_column_transformer((OrdinalEncoder(), ['job']), remainder='passthrough')
    trees = make_pipeline(
        encoded, HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=5)
    ).fit(frame[columns][:40], frame.rich[:40])
    joblib.dump(trees, tmp_path / 'trees.joblib')
    options = (
        '--data',
        file,
        '--student',
        'tabular',
        '--student-layers',
        8,
        '--epochs',
        2,
        '--lr',
        0.01,
        '--no-onnx',
        '--device',
        'cpu',
    )
    code, out, err = command(
        *options,
        '--teacher',
        tmp_path / 'trees.joblib',
        '--out',
        tmp_path / 'run',
        '--recipe',
        'kd(T=1)',
    )
    assert code == 0, err
    with pytest.warns(
        DistillWarning, match='trees.joblib is a pickle, and loading it runs the code in it'
    ):
        file_teacher(str(tmp_path / 'trees.joblib'))
    report, c = (
        Report.from_json(tmp_path / 'run' / 'report.json'),
        TrainConfig(**settings(data=file, task='table')),
    )
    held = frame[checked_samples(read_samples(c), c).valid]
    assert (
        report.models['teacher'].measures['accuracy'].value
        == (trees.predict(held[columns]) == held.rich).mean()
        < 1
    )
    assert (
        report.models['distilled'].agreement
        and not (tmp_path / 'run' / 'teacher.safetensors').exists()
    )


def test_files_that_hold_no_trees_for_these_data(tmp_path, digits):
    people().drop(columns='wage').to_csv(tmp_path / 'a.csv', index=False)
    dummy = DummyClassifier().fit(
        people()[['age', 'gap']].rename(columns=dict(gap='height')), people().rich
    )
    for name, o in dict(other=dummy, dict={}).items():
        joblib.dump(o, tmp_path / f'{name}.joblib')
    (tmp_path / 'damaged.joblib').write_bytes(b'abc')

    def refused(says, name, data=tmp_path / 'a.csv'):
        with pytest.raises(DistillError, match=says):
            run(
                tmp_path / 'run',
                data=data,
                teacher=str(tmp_path / f'{name}.joblib'),
                student='tabular',
                student_layers='4',
            )

    refused('was fitted on the columns age, height .2., but the rows have no height', 'other')
    refused('type dict, which has neither predict_proba nor predict', 'dict')
    refused('could not be loaded .*Did joblib.dump write it', 'damaged')
    refused('There is no file', 'gone')
    with pytest.raises(
        DistillError,
        match='contains an estimator .DummyClassifier., which reads the rows of a table or texts, but .*digits contains images',
    ):
        run(tmp_path / 'run', data=digits, teacher=str(tmp_path / 'other.joblib'))
    assert not (tmp_path / 'run').exists()


def test_a_pipeline_in_a_file_teaches_texts(tmp_path, command, monkeypatch, capsys):
    luck = random.Random(0)
    words = dict(good='fine great nice'.split(), bad='poor dull sad'.split())
    rows = [(f'a {luck.choice(words[k])} film {i}', k) for i, k in enumerate(['good', 'bad'] * 20)]
    frame = pd.DataFrame(rows, columns=['review', 'label'])
    frame.to_csv(file := tmp_path / 'a.csv', index=False)
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression())
    joblib.dump(pipeline.fit(frame.review[:12], frame.label[:12]), tmp_path / 'pipeline.joblib')
    options = ('--data', file, '--teacher', tmp_path / 'pipeline.joblib', '--device', 'cpu')
    options += ('--student', 'embedding_bag', '--student-layers', 8, '--epochs', 2, '--lr', 0.05)
    code, out, err = command(*options, '--no-onnx', '--out', tmp_path / 'run')
    assert code == 0, err
    few = '2 steps: many recipes need a few thousand to show a gain.'
    assert few in out
    report = Report.from_json(tmp_path / 'run' / 'report.json')
    assert [o for o in report.notes if few in o]  # since the verdict is "not significant"
    c = TrainConfig(**read_config(tmp_path / 'run' / 'config.toml'))
    held = frame[checked_samples(read_samples(c), c).valid]
    right = (pipeline.predict(held.review) == held.label).mean()
    assert report.models['teacher'].measures['accuracy'].value == right
    # subtle: its outputs are stored, so no fit checks it
    sure = pipeline.predict_proba(held.review).max(1).mean()
    assert f'validation {sure:.3f}' in out[out.index("teacher's mean top probability") :]
    nll = -np.log(pipeline.predict_proba(held.review))[
        range(len(held)), [*map([*pipeline.classes_].index, held.label)]
    ]
    assert report.models['teacher'].measures['nll'].value == pytest.approx(nll.mean(), rel=1e-5)
    assert 'the teacher' not in err.replace('pipeline.joblib', '')
    load_learner(tmp_path / 'run' / 'student.pkl')
    # the other commands read the texts of the run too
    alone = ('--trials', 1, '--seeds', 1, '--n-epoch', 1)
    pipeline = tmp_path / 'pipeline.joblib'
    for args in (
        ('check', tmp_path / 'run', pipeline, '--no-cost'),
        ('compare', f'teacher={pipeline}', f'student={tmp_path / "run"}', '--seconds', 0),
        ('find', tmp_path / 'run', pipeline, *alone),
    ):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main()
        assert e.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize('student', ['embedding_bag', 'tabular'])
def test_a_teacher_whose_inputs_do_not_change_runs_once_whatever_the_epochs(
    student, tmp_path, monkeypatch
):
    texts, model, rows = student == 'embedding_bag', LogisticRegression(), []
    x = [f'{["this", "that"][i % 2]} film {i}' if texts else i / 40 for i in range(40)]
    frame = pd.DataFrame(dict(x=x, label=['few', 'many'] * 20))
    frame.to_csv(tmp_path / 'a.csv', index=False)
    model = make_pipeline(TfidfVectorizer(), model) if texts else model
    x = frame.x if texts else frame[['x']]
    joblib.dump(model.fit(x, frame.label), tmp_path / 'model.joblib')
    predict = LogisticRegression.predict_proba

    def counted(self, x):
        rows.append(x.shape[0])
        return predict(self, x)

    monkeypatch.setattr(LogisticRegression, 'predict_proba', counted)
    options = dict(data=tmp_path / 'a.csv', teacher=str(tmp_path / 'model.joblib'))
    options |= dict(student=student, student_layers='4', lr=0.01, check=False, recipe='kd()')
    counts = []
    for epochs in (1, 2):
        rows.clear()
        # the report would time the teacher until it is sure of the time
        opened_run(settings(epochs=epochs, **options), out=tmp_path / str(epochs)).trained()
        counts.append(sum(rows))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    'rates, lead', [(dict(lr=0.01, teacher_lr=1e-6), False), (dict(lr=1e-6, teacher_lr=0.03), True)]
)
def test_a_teacher_without_a_lead_is_named_before_its_student_is_distilled(
    digits, tmp_path, rates, lead
):
    run(
        tmp_path / 'run',
        said := [],
        data=digits,
        teacher_epochs=8,
        batch_size=4,
        valid='0.4',
        augment='none',
        **rates,
    )
    named = [
        i for i, line in enumerate(said) if 'no significant lead over the student alone' in line
    ]
    assert named == [] if lead else len(named) == 1
    if not lead:
        assert 'so there is little to learn from it' in said[named[0]]
        assert '(--teacher-lr), or use a better teacher' in said[named[0]]
        distilled = [i for i, line in enumerate(said) if line.startswith('distilled: ')]
        assert named[0] < distilled[0]


def test_a_teacher_with_better_probabilities_but_equal_predictions_is_not_called_useless(tmp_path):
    # the most frequent class is the same everywhere, and only the trees know where it is certain
    g = np.random.default_rng(0)
    x = g.random(1000)
    p = np.where((10 * x).astype(int) % 2, 0.6, 0.98)
    frame = pd.DataFrame(dict(x=x, label=np.where(g.random(1000) < p, 'yes', 'no')))
    frame.to_csv(tmp_path / 'a.csv', index=False)
    tree = DecisionTreeClassifier(min_samples_leaf=60).fit(frame[['x']], frame.label)
    joblib.dump(tree, tmp_path / 'tree.joblib')
    run(
        tmp_path / 'run',
        said := [],
        data=tmp_path / 'a.csv',
        teacher=str(tmp_path / 'tree.joblib'),
        student='tabular',
        student_layers='4',
        recipe='kd()',
        check=False,
        valid='0.4',
    )
    (line,) = [line for line in said if 'no significant lead over the student alone' in line]
    assert 'student alone in accuracy (' in line
    assert 'but it is significantly better in AUC, NLL, Brier score, which' in line
    assert 'or use a better teacher' not in line
    assert 'use a better teacher' in line


def test_a_run_says_why_there_is_no_onnx_file(tmp_path, command):
    texts = pd.DataFrame([('a good film', 'good'), ('a bad film', 'bad')] * 8, columns=['x', 'y'])
    texts.to_csv(tmp_path / 'a.csv', index=False)
    options = '--x x --y y --teacher embedding_bag --teacher-layers 4 --student awd_lstm --epochs 1'
    options += ' --student-layers 4,4,4 --lr 0.01 --teacher-lr 0.01 --no-baseline --device cpu'
    code, _, err = command(
        '--data', tmp_path / 'a.csv', *options.split(), '--out', tmp_path / 'run'
    )
    assert code == 0, err
    (said,) = [line for line in err.splitlines() if 'ONNX' in line]
    assert "no ONNX file: torch.export can't export SequentialRNN" in said
    assert not (tmp_path / 'run' / 'student' / 'student.onnx').exists()
    assert 'def forward' not in err


def test_numbers_of_a_table(tmp_path):
    people().to_csv(tmp_path / 'a.csv', index=False)
    s, dls = loaders(
        data=tmp_path / 'a.csv',
        student='tabular',
        student_layers='8',
        teacher='tabular',
        teacher_layers='16',
    )
    assert s.target == 'numbers' and s.y == 'wage' and dls.one_batch()[2].dtype == torch.float32
    c = TrainConfig(**settings(tmp_path, student='tabular', student_layers='8'))
    learn = learner_of(c.arch('student'), dls, s, c)
    assert learn.model(*dls.one_batch()[:2]).shape == (16, 1)


def test_numbers_stay_in_a_range(tmp_path):
    people().to_csv(tmp_path / 'a.csv', index=False)
    wage = people().wage
    options = dict(data=tmp_path / 'a.csv', teacher='tabular', teacher_layers='16', epochs=1)
    options |= dict(student='tabular', student_layers='8', y='wage')
    low, high = wage.min() - 1, wage.max() + 1
    run(tmp_path / 'run', **options, lr=1.0, y_range=f'{low},{high}')
    assert read_config(tmp_path / 'run' / 'config.toml')['y_range'] == f'{low},{high}'
    learn = load_learner(tmp_path / 'run' / 'student.pkl')
    with learn.no_bar(), learn.no_logging():
        far = people().assign(age=10.0**9)
        out = learn.get_preds(dl=learn.dls.test_dl(far))[0]
    assert out.min() >= low
    assert out.max() <= high
    with pytest.raises(DistillError, match="column 'wage' has numbers from .* to .*: give a range"):
        run(tmp_path / 'b', **options, y_range=f'{low},{wage.max() - 1}')
    with pytest.raises(DistillError, match='this is for numbers, but .* has classes'):
        run(tmp_path / 'b', **options | dict(y='rich'), y_range='0,1')
    for wrong in ('5', '5,1', 'a,b', '0,inf', '1,2,3'):
        with pytest.raises(DistillError, match='must be the lowest and the highest number'):
            TrainConfig(**settings(tmp_path, y_range=wrong))


def test_a_data_set_of_hugging_face(tmp_path, digits):
    datasets = pytest.importorskip('datasets')
    files = sorted(digits.rglob('*.png'))
    of = lambda files: datasets.Dataset.from_dict(
        dict(image=[str(f) for f in files], label=[int(f.parent.name[-1]) for f in files]),
        features=datasets.Features(
            dict(image=datasets.Image(), label=datasets.ClassLabel(names=['zero', 'one', 'two']))
        ),
    )
    datasets.DatasetDict(dict(train=of(files[::2]), test=of(files[1::2]))).save_to_disk(
        tmp_path / 'set'
    )
    s, dls = loaders(data=tmp_path / 'set', augment='none')
    assert s.task == 'images' and s.classes == ['one', 'two', 'zero'] and len(dls.train_ds) == 30
    x, y = dls.valid_ds[0]
    assert (
        np.array_equal(np.asarray(x)[..., 0], np.asarray(Image.open(files[1])))
        and s.classes[y] == 'zero'
    )


@pytest.fixture
def spoiled(digits, tmp_path):
    "fn(name) -> data with a mistake"

    def make(name):
        root = tmp_path / name
        if name == 'empty':
            root.mkdir()
        elif name == 'one class':
            write_digits(root / 'x', 30) or (root / 'x' / 'digit1').rename(
                root / 'digit1'
            ) and shutil.rmtree(root / 'x')
        elif name == 'unreadable':
            write_digits(root, 12)
            bad = next(root.rglob('*.png'))
            bad.write_bytes(bad.read_bytes()[:40] + b'\0' * 30)
        elif name == 'missing class':
            write_digits(root / 'train', 12)
            write_digits(root / 'valid', 12, 12)
            for p in (root / 'valid' / 'digit1').iterdir():
                p.unlink()
        elif name == 'loose':
            write_digits(root, 12) or (root / 'a.png').write_bytes(
                next(root.rglob('*.png')).read_bytes()
            )
        elif name.endswith('.csv'):
            frame = people()
            if name == 'gaps.csv':
                frame.loc[3, 'rich'] = None
            if name == 'same.csv':
                frame['rich'] = 'yes'
            if name == 'lone.csv':
                frame.loc[0, 'rich'] = 'perhaps'
            frame.drop(columns='wage').to_csv(root, index=False)
        elif name == 'binary':
            root.write_bytes(bytes(range(256)))
        return root

    return make


@pytest.mark.parametrize(
    'name,flags,says',
    [
        ('nowhere', {}, "There is no file or folder '.*nowhere'"),
        ('empty', {}, 'contains no images, and no other data that can be read'),
        ('one class', {}, 'All samples have one class'),
        ('unreadable', {}, "1 of 12 images can't be read: .*png"),
        ('missing class', {}, r'1 class\(es\) are missing from the validation set: digit1'),
        ('loose', {}, 'a.png is not in a class folder'),
        ('gaps.csv', {}, "1 of 80 rows have no label in column 'rich' \\(row 3"),
        ('same.csv', {}, 'All samples have one class .yes.'),
        ('lone.csv', {}, r'1 class\(es\) are missing from the validation set: perhaps'),
        ('binary', {}, 'is neither a folder nor a CSV file'),
        (
            'a.csv',
            dict(y='ric'),
            "has no column 'ric' .did you mean 'rich'... It has age, job, gap, rich",
        ),
        (
            'a.csv',
            dict(valid='held'),
            "--valid 'held': must be a fraction such as 0.2. For a CSV file, .* The columns are age",
        ),
        ('a.csv', dict(valid='job'), "this column has 'a'"),
        ('a.csv', dict(task='images'), 'columns of images'),
        (
            'a.csv',
            dict(student='resnet18'),
            "No architecture 'resnet18' for table[^.]*[.][^.]*[.]$",
        ),
        ('a.csv', dict(student='20'), "Give the sizes of layers as --student-layers '16,32'"),
        (
            'digits',
            dict(student='resnet19'),
            "No architecture 'resnet19' for images .did you mean 'resnet1",
        ),
        ('digits', dict(student='cnn-4'), "No architecture 'cnn-4' for images"),
        ('digits', dict(student='cnn-4'), "Give the sizes of layers as --student-layers '16,32'"),
        ('digits', dict(student='cnn'), "cnn needs the sizes of its layers: .*'16,32,64'"),
        ('digits', dict(student_layers='0'), 'must be whole numbers from 1'),
        ('digits', dict(student_layers='4-8'), 'must be whole numbers from 1'),
        (
            'digits',
            dict(student='resnet18', student_layers='4'),
            'the layers of resnet18 are fixed',
        ),
        (
            'digits',
            dict(teacher='gone.pkl', teacher_layers='4'),
            'the teacher is a file, so its layers are fixed',
        ),
        ('digits', dict(teacher='gone.pkl'), 'There is no file'),
        ('digits', dict(recipe='kdd()'), "no recipe 'kdd'"),
        ('digits', dict(size='7'), 'from 8 to 8192'),
        ('digits', dict(recipe="at(layers={'9': '0'})"), "no layer '9'|'9'"),
        ('digits', dict(recipe='Term(losses.binary_kl)'), 'binary_kl compares a sigmoid per label'),
        ('digits', dict(device='cuda:99'), '--device|device='),
        ('digits', dict(lr='fast'), "--lr 'fast'|--lr fast"),
        ('digits', dict(task='sound'), '--task'),
        ('digits', dict(log='paper'), '--log'),
        ('digits', dict(config='gone.toml'), 'no settings file'),
        ('digits', dict(ignore='x', task='masks'), 'contains images. This task needs folders'),
    ],
)
def test_a_mistake_in_data_or_flags_is_one_message(
    name, flags, says, digits, spoiled, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = digits if name == 'digits' else spoiled(name)
    small = 'tabular' if name.endswith('csv') else 'cnn'
    usual = dict(
        data=data,
        teacher=small,
        teacher_layers='4',
        student=small,
        student_layers='4',
        out=tmp_path / 'out',
        epochs=1,
        lr=0.01,
        teacher_lr=0.01,
    )
    flags = changed(usual, flags)
    code, out, err = command(
        *(o for k, v in flags.items() for o in (f'--{k.replace("_", "-")}', v))
    )
    assert code == 2 and 'Traceback' not in out + err
    assert re.search(says, ' '.join(err.split())), err
    assert 'epoch 1' not in out


def test_a_package_that_is_missing_is_named(digits, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard', raising=False)
    code, _, err = command(
        '--data',
        digits,
        '--teacher',
        'cnn',
        '--teacher-layers',
        '4',
        '--student',
        'cnn',
        '--student-layers',
        '4',
        '--out',
        tmp_path / 'out',
        '--log',
        'tensorboard',
    )
    assert code == 2 and 'pip install tensorboard' in err


def test_settings_survive_the_file(tmp_path):
    c = TrainConfig(
        'a "b"\\c\t\x7f\n',
        'ü𝓀',
        "it's",
        recipe="kd(T=('cosine', 8, 1))",
        lr=1e-3,
        x='#',
        baseline=False,
    )
    write_config(c, tmp_path / 'c.toml')
    assert TrainConfig(**read_config(tmp_path / 'c.toml')) == c
    assert tomllib.loads((tmp_path / 'c.toml').read_text())['lr'] == 1e-3


HOSTILE = [
    '',
    ' ',
    '.',
    '..',
    '/',
    '/dev/null',
    '~',
    '-1',
    '0',
    'nan',
    'inf',
    '1e999',
    '9' * 30,
    "'; rm -rf x",
    '$(touch x)',
    '`touch x`',
    '../x',
    'x\ny',
    '\u202e',
    '𝓀',
    '%s%n',
    '{}',
    '__import__("os").system("touch x")',
    'a' * 5000,
    '--',
    '-',
    '*',
    '?',
    'file:///etc/passwd',
    'http://x',
    '\udcff',
    '\0',
    'None',
    'true',
    '[]',
    'cnn-',
    '99999999999',
    '200,100,',
]


def test_hostile_flags_are_refused_and_write_nothing(digits, command, tmp_path, monkeypatch):
    "One flag is replaced, of a command that is good but for a device, which is asked for last"
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.chdir(home)
    good = dict(
        data=digits,
        teacher='cnn',
        teacher_layers='4',
        student='cnn',
        student_layers='4',
        epochs=1,
        lr=0.01,
        teacher_lr=0.01,
        size=16,
        batch_size=16,
        seed=0,
        device='cuda:99',
        workers=0,
        recipe='kd()',
        task='images',
        augment='none',
        log='',
        valid='.5',
        config=None,
        teacher_weights=None,
    )
    luck, n = random.Random(0), 0
    for k in good:
        for v in luck.sample(HOSTILE, 12) + [
            ''.join(map(chr, luck.choices(range(33, 0x250), k=8)))
        ]:
            flags = good | {k: v}
            code, out, err = command(
                *(f'--{a.replace("_", "-")}={b}' for a, b in flags.items() if b is not None)
            )
            assert code == 2 and 'Traceback' not in out + err, (k, v, err)
            n += 'cuda:99' not in err
    assert n > 100 and not [*home.iterdir()]


def test_help_teaches(command):
    code, out, _ = command('--help')
    assert code == 0
    for line in [l.strip() for l in out.splitlines() if l.strip().startswith('fastdistill train')]:
        assert '--' in line


def test_an_empty_settings_file_is_named(tmp_path):
    (tmp_path / 'config.toml').write_text('')
    with pytest.raises(
        DistillError,
        match=r'config.toml has no settings: at least data, teacher and student are needed',
    ):
        opened_run({}, tmp_path / 'config.toml', tmp_path / 'run')
    with pytest.raises(DistillError, match='config.toml has no settings'):
        opened_run({}, out=tmp_path, resume=True)


def test_settings_are_read_from_a_pipe(digits, command, tmp_path):
    "As in --config <(cat config.toml). The device, which does not exist, is asked for last"
    write_config(TrainConfig(**settings(digits, device='cuda:99')), tmp_path / 'c.toml')
    end, start = os.pipe()
    with os.fdopen(start, 'wb') as f:
        f.write((tmp_path / 'c.toml').read_bytes())
    code, _, err = command('--config', f'/dev/fd/{end}', '--out', tmp_path / 'run')
    os.close(end)
    assert code == 2
    assert 'cuda:99' in err


def test_nothing_is_trained_on_the_device_meta(digits, tmp_path):
    with pytest.raises(
        DistillError,
        match="device='meta' stores shapes without values, so nothing can be trained on it",
    ):
        run(tmp_path / 'run', data=digits, device='meta')


def test_a_run_with_lr_auto_repeats_its_rates_and_its_weights(digits, tmp_path, monkeypatch):
    "Also where other random numbers were drawn before"
    monkeypatch.setattr(rate_finder, 'STEPS', 6)
    for i, name in enumerate('ab'):
        random.seed(i)
        np.random.seed(i)
        torch.manual_seed(i)
        run(
            tmp_path / name,
            said := [],
            data=digits,
            epochs=1,
            batch_size=4,
            lr='auto',
            teacher_lr='auto',
        )
        for arch in ('cnn 4', 'cnn 8,16'):
            at = said.index(
                f'learning rate of {arch}: trying rates from 0.0001 to 0.3, 20 steps each'
            )
            # which rate it is differs between processors
            assert re.fullmatch(
                f'learning rate of {arch}: [0-9.]+, (which had the lowest loss'
                '|the (low|high)est that is tried)',
                said[at + 1],
            )
    rates = [
        [tomllib.loads((tmp_path / n / 'config.toml').read_text())[k] for k in ('lr', 'teacher_lr')]
        for n in 'ab'
    ]
    assert rates[0] == rates[1]
    assert rates[0] != [1e-3, 1e-3], 'no rate was found'
    assert_same(tmp_path / 'a', tmp_path / 'b')


def test_lr_auto_finds_a_rate_near_the_best_for_a_small_network(tmp_path):
    x, y = load_digits(n_class=FEW_CLASSES, return_X_y=True)
    frame = (
        pd.DataFrame(x[:60] / 16).add_prefix('pixel').assign(label=[f'digit{i}' for i in y[:60]])
    )
    frame.to_csv(tmp_path / 'digits.csv', index=False)
    layers = dict(teacher='tabular', teacher_layers='8', student='tabular', student_layers='8')

    def loss(lr):
        "Training loss of the student alone"

        def say(text):
            if text.startswith('alone: epoch 4 of 4'):
                losses.append(float(re.search('train_loss ([0-9.]+)', text)[1]))
                raise KeyboardInterrupt

        losses = []
        given = settings(
            tmp_path / 'digits.csv', epochs=4, teacher_epochs=1, batch_size=4, lr=lr, **layers
        )
        with pytest.raises(KeyboardInterrupt):
            opened_run(given, out=tmp_path / str(lr), say=say)()
        return losses[0]

    low, *others = map(loss, (1e-3, 1e-2, 1e-1))
    found = loss('auto')
    assert found < 0.9 * low
    assert found < 1.1 * min(others)


@pytest.mark.parametrize('away, low, high', [(0.002, 1e-4, 1e-3), (0.1, 1e-3, 3e-2), (3, 0.1, 0.3)])
def test_a_rate_suits_the_distance_from_the_solution(away, low, high):
    "A step of Adam is about as long as the rate"
    xs = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders.from_dsets([*zip(xs, xs)], [*zip(xs, xs)], bs=8, device='cpu')
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 1 + away)
    torch.nn.init.constant_(model.bias, away)
    learn = Learner(dls, model, loss_func=torch.nn.functional.mse_loss)
    assert low <= find_rate(learn, 0) <= high
    assert model.weight.item() == pytest.approx(1 + away, abs=1e-7)
    assert model.bias.item() == pytest.approx(away, abs=1e-7)


def test_lr_auto_says_if_no_rate_has_a_finite_loss(tmp_path):
    "The square of such a number is infinite"
    frame = people().drop(columns='rich')
    frame.assign(wage=1e30 * frame.wage).to_csv(tmp_path / 'a.csv', index=False)
    tables = dict(teacher='tabular', teacher_layers='16', student='tabular', student_layers='8')
    run(tmp_path / 'run', said := [], data=tmp_path / 'a.csv', y='wage', lr='auto', **tables)
    assert (
        'learning rate of tabular 8: 0.001, a guess, because no rate had a finite loss' in said
    ), said


def stop_run(out, data, **kwargs):
    "A run that is interrupted while its student is trained"

    def say(text):
        if text.startswith('distilled: epoch 1'):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened_run(settings(data, **kwargs), out=out, say=say)()
    return out


@pytest.fixture(scope='module')
def stopped_run(digits, tmp_path_factory):
    return stop_run(tmp_path_factory.mktemp('runs') / 'stopped', digits)


@pytest.fixture
def stopped(tmp_path, digits, stopped_run):
    "fn(data) -> folder of a run that was interrupted; of one on the digits with the usual settings, a copy"

    def make(data, **kwargs):
        if data == digits and not kwargs:
            return shutil.copytree(stopped_run, tmp_path / 'stopped')
        return stop_run(tmp_path / 'stopped', data, **kwargs)

    return make


def resumed(out):
    return opened_run({}, out=out, resume=True, say=lambda _: None)()


def test_a_run_does_not_continue_with_other_files(stopped, tmp_path):
    write_digits(tmp_path / 'mine', 60)
    out = stopped(tmp_path / 'mine')

    def refused(says):
        with pytest.raises(DistillError) as e:
            resumed(out)
        assert f'The data of the run in {out} changed since it began: {says}. ' in str(e.value)
        assert 'Restore the data to resume, or start a new run' in str(e.value)

    gone = tmp_path / 'mine' / 'digit0' / '0.png'
    kept, other = gone.read_bytes(), (tmp_path / 'mine' / 'digit1' / '1.png').read_bytes()
    gone.with_name('new.png').write_bytes(kept)
    refused('1 file added: digit0/new.png')
    gone.unlink()
    refused('1 file added: digit0/new.png; 1 file removed: digit0/0.png')
    gone.with_name('new.png').unlink()
    gone.write_bytes(other)
    refused('1 file changed (content or label): digit0/0.png')
    gone.write_bytes(kept)
    resumed(out)
    assert (out / 'report.json').is_file()


def test_a_run_does_not_continue_with_another_label_of_a_file(stopped, digits, tmp_path):
    files = sorted(digits.rglob('*.png'))
    paths, labels = [os.path.relpath(f, tmp_path) for f in files], [f.parent.name for f in files]
    frame = pd.DataFrame(dict(file=paths, label=labels))
    frame.to_csv(tmp_path / 'a.csv', index=False)
    out = stopped(tmp_path / 'a.csv', y='label')
    frame.assign(label=[labels[-1], *labels[1:]]).to_csv(tmp_path / 'a.csv', index=False)
    with pytest.raises(DistillError, match=r'began: 1 file changed \(content or label\): '):
        resumed(out)


def test_a_run_does_not_continue_with_another_order_of_the_rows_of_one_file(
    stopped, digits, tmp_path
):
    "The rows that are held out for validation depend on the order"
    paths = [os.path.relpath(f, tmp_path) for f in sorted(digits.rglob('*.png'))]
    frame = pd.DataFrame(dict(file=paths, label=[Path(p).parent.name for p in paths]))
    frame = pd.concat([frame, frame[:1]])
    frame.to_csv(tmp_path / 'a.csv', index=False)
    out = stopped(tmp_path / 'a.csv', y='label')

    def refused(frame, says):
        frame.to_csv(tmp_path / 'a.csv', index=False)
        with pytest.raises(DistillError, match=f'began: {says}'):
            resumed(out)

    refused(frame.iloc[[0, -1, *range(1, len(paths))]], 'the order of the samples')
    refused(frame[:-1], r'1 file removed: \S*0.png \(row 2 with this file\)')
    frame.to_csv(tmp_path / 'a.csv', index=False)
    resumed(out)


@pytest.mark.parametrize('path', ['there', '{folder}/there'])
def test_a_run_continues_with_data_that_were_moved(
    path, finished, stopped, digits, tmp_path, monkeypatch
):
    "Their content counts, not where they are"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, tmp_path / 'here')
    out = stopped(tmp_path / 'here')
    (tmp_path / 'here').rename(tmp_path / 'there')
    with pytest.raises(DistillError, match='There is no file or folder'):
        resumed(out)
    text = (out / 'config.toml').read_text()
    there = path.format(folder=tmp_path)
    (out / 'config.toml').write_text(text.replace(str(tmp_path / 'here'), there))
    for folder in (out, out / 'student', out / 'checkpoints'):
        folder.mkdir(exist_ok=True)
        (folder / 'student.onnx.1234.tmp').touch()  # as a process leaves them that is killed
    resumed(out)
    assert_same(finished, out)
    assert not [*out.rglob('*.tmp')]


def test_a_run_does_not_continue_with_other_rows(stopped, tmp_path):
    frame = people().drop(columns='wage')
    frame.to_csv(tmp_path / 'a.csv', index=False)
    out = stopped(
        tmp_path / 'a.csv',
        teacher='tabular',
        teacher_layers='16',
        student='tabular',
        student_layers='8',
    )

    def refused(frame, says):
        frame.to_csv(tmp_path / 'a.csv', index=False)
        with pytest.raises(DistillError, match=says):
            resumed(out)

    refused(
        pd.concat([frame[:7], frame[20:21].assign(age=1.5), frame[7:]]),
        r'began: 1 row added: 7 \(counted from 0\)',
    )
    refused(frame.drop(index=[3, 5]), r'began: 2 rows removed: 3, 5 \(counted')
    refused(frame[::-1], 'began: the order of the samples')
    refused(
        frame.rename(columns=dict(job='work')),
        'began: the columns were age, job, gap, rich, and are age, work, gap, rich',
    )
    frame.to_csv(tmp_path / 'a.csv', index=False)
    assert resumed(out).n == 16


def test_a_run_does_not_continue_with_other_rows_of_a_column_called_held(stopped, tmp_path):
    frame = people().drop(columns='wage').rename(columns=dict(age='held'))
    frame['set'] = ['train' if i % 4 else 'valid' for i in range(len(frame))]
    frame.to_csv(tmp_path / 'a.csv', index=False)
    out = stopped(
        tmp_path / 'a.csv',
        teacher='tabular',
        teacher_layers='16',
        student='tabular',
        student_layers='8',
        valid='set',
        y='rich',
    )
    frame['held'] = frame['held'] + 1
    frame.to_csv(tmp_path / 'a.csv', index=False)
    with pytest.raises(DistillError, match='began: 80 rows added'):
        resumed(out)


def test_a_run_does_not_continue_with_another_teacher(finished, stopped, digits, tmp_path):
    shutil.copy(finished / 'student.pkl', tmp_path / 'teacher.pkl')
    out = stopped(digits, teacher=str(tmp_path / 'teacher.pkl'))
    other = learner_in_file(finished / 'student.pkl')
    for p in other.model.parameters():
        p.data += 0.1
    other.export(tmp_path / 'teacher.pkl')
    with pytest.raises(DistillError, match='changed since it began: teacher is a different file'):
        resumed(out)


def test_a_run_does_not_continue_with_other_weights_of_an_onnx_teacher(stopped, digits, tmp_path):
    "They may be in a second file, as those of large networks are"
    onnx = pytest.importorskip('onnx')
    make = onnx.helper
    weights = np.random.default_rng(0).normal(size=(3 * 16 * 16, FEW_CLASSES)).astype('float32')
    graph = make.make_graph(
        [
            make.make_node('Flatten', ['x'], ['flat']),
            make.make_node('MatMul', ['flat', 'w'], ['logits']),
        ],
        'g',
        [make.make_tensor_value_info('x', 1, ['n', 3, 'height', 'width'])],
        [make.make_tensor_value_info('logits', 1, ['n', FEW_CLASSES])],
        [onnx.numpy_helper.from_array(weights, 'w')],
    )
    network = make.make_model(graph, opset_imports=[make.make_opsetid('', 17)], ir_version=8)
    options = dict(save_as_external_data=True, location='weights.bin', size_threshold=0)
    onnx.save_model(network, tmp_path / 'teacher.onnx', **options)
    out = stopped(digits, teacher=str(tmp_path / 'teacher.onnx'), check=False)
    (weights + 1).tofile(tmp_path / 'weights.bin')
    with pytest.raises(DistillError, match='changed since it began: teacher is a different file'):
        resumed(out)


def test_a_run_does_not_continue_with_settings_that_were_edited(finished, stopped, digits):
    out = stopped(digits)
    text = (out / 'config.toml').read_text()
    (out / 'config.toml').write_text(
        text.replace('epochs = 2', 'epochs = 3').replace('lr = 0.01', 'lr = 0.02', 1)
    )
    with pytest.raises(
        DistillError,
        match=r'config.toml has epochs=3, lr=0.02, but the run began with epochs=2, lr=0.01. Restore this',
    ):
        resumed(out)
    (out / 'config.toml').write_text(text)
    resumed(out)
    assert_same(finished, out)


def test_a_run_does_not_continue_with_a_setting_that_is_now_auto(stopped, digits):
    out = stopped(digits, recipe='kd(T=2)', size='16')
    for k, was in dict(recipe="'kd(T=2)'", size="'16'", lr='0.01', teacher_lr='0.01').items():
        with pytest.raises(DistillError) as e:
            opened_run({k: 'auto'}, out=out, resume=True)
        assert f"contains a run with {k}={was}, but now {k}='auto'. Pass a" in str(e.value)
    text = (out / 'config.toml').read_text()
    (out / 'config.toml').write_text(text.replace('\nlr = 0.01', '\nlr = "auto"'))
    with pytest.raises(DistillError, match="has lr='auto', but the run began with lr=0.01"):
        resumed(out)


def test_a_run_that_began_with_auto_continues_with_auto(stopped, digits, monkeypatch):
    monkeypatch.setattr(rate_finder, 'STEPS', 6)
    out = stopped(digits, lr='auto')
    given = dict(lr='auto', size='auto', recipe='auto', epochs=2)
    lr = tomllib.loads((out / 'config.toml').read_text())['lr']
    assert lr != 'auto'
    report = opened_run(given, out=out, resume=True, say=lambda _: None)()
    assert report.n > 0
    assert tomllib.loads((out / 'config.toml').read_text())['lr'] == lr


def test_a_run_with_checkpoints_but_without_what_it_began_with_does_not_continue(stopped, digits):
    out = stopped(digits)
    begun = out / 'checkpoints' / 'settings.json'
    text = begun.read_text()
    for change, says in ((begun.unlink, 'missing'), (lambda: begun.write_text('{'), 'damaged')):
        change()
        with pytest.raises(DistillError, match=f'settings.json is {says}.* Use a different folder'):
            resumed(out)
    begun.write_text(text)
    resumed(out)


def test_a_checkpoint_of_another_model_is_named(stopped, digits):
    out = stopped(digits)
    folder = out / 'checkpoints'
    unfinished = max(folder.glob('*.pt'), key=lambda f: f.stat().st_mtime_ns)
    assert unfinished.name != 'teacher_0.pt'
    shutil.copy(folder / 'teacher_0.pt', unfinished)
    with pytest.raises(
        DistillError, match=f'{unfinished.name} has the weights of a different model'
    ):
        resumed(out)


def test_a_run_of_an_earlier_version_or_without_a_checkpoint_does_not_continue(stopped, digits):
    out = stopped(digits)
    folder = out / 'checkpoints'
    teacher = (folder / 'teacher_0.pt').read_bytes()
    (folder / 'teacher_0.pt').unlink()
    with pytest.raises(
        DistillError, match=r'teacher_0.pt is missing. .*, also delete run_\w+.json'
    ):
        resumed(out)
    (folder / 'teacher_0.pt').write_bytes(teacher)
    (folder / 'settings.json').rename(folder / 'begun.json')
    with pytest.raises(DistillError, match='or a different version of fastdistill wrote'):
        resumed(out)


def test_a_link_that_leads_back_shows_no_image_again(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    (tmp_path / 'mine' / 'digit0' / 'loop').symlink_to(tmp_path / 'mine')
    (tmp_path / 'mine' / 'digit1' / 'other').symlink_to(tmp_path / 'mine' / 'digit1')
    s, _ = loaders(data=tmp_path / 'mine')
    assert len(s) == 60
    assert s.classes == ['digit0', 'digit1', 'digit2']


def test_class_folders_may_be_links(digits, tmp_path):
    (tmp_path / 'mine').mkdir()
    for folder in digits.iterdir():
        (tmp_path / 'mine' / folder.name).symlink_to(folder)
    s, _ = loaders(data=tmp_path / 'mine')
    assert len(s) == 60


def images_listed_twice(digits, tmp_path, **columns):
    "A CSV that names each image twice, in two ways"
    names = [os.path.relpath(f, tmp_path) for f in sorted(digits.rglob('*.png'))]
    pd.DataFrame(
        dict(
            file=[*names, *(f'./{n}' for n in names)],
            label=2 * [n.split(os.sep)[-2] for n in names],
            **columns,
        )
    ).to_csv(tmp_path / 'twice.csv', index=False)
    return tmp_path / 'twice.csv'


def test_rows_of_one_image_are_in_one_set(digits, tmp_path):
    s, _ = loaders(data=images_listed_twice(digits, tmp_path))
    train, valid = [
        {os.path.realpath(f) for f in s.frame['file'][rows]} for rows in (~s.valid, s.valid)
    ]
    assert not train & valid
    assert len(train | valid) == 60
    assert (~s.valid).sum() == 2 * len(train)
    assert len(valid) == 12


def test_a_column_that_puts_one_image_in_both_sets_is_refused(digits, tmp_path):
    data = images_listed_twice(digits, tmp_path, held=[i == 3 or i >= 65 for i in range(120)])
    with pytest.raises(
        DistillError,
        match='56 image.s. are in the training set and in the validation set, e.g. .*png',
    ):
        loaders(data=data, valid='held')


@pytest.mark.parametrize('linked', ['folder', 'file'])
def test_an_image_that_links_show_twice_is_refused(linked, tmp_path):
    "One of the two could be in the validation set"
    write_digits(tmp_path / 'train', 12)
    write_digits(tmp_path / 'valid', 12, 12)
    to = tmp_path / 'train' / 'digit0'
    if linked == 'folder':
        (tmp_path / 'valid' / 'digit0' / 'more').symlink_to(to)
    else:
        (tmp_path / 'valid' / 'digit0' / 'again.png').symlink_to(to / '0.png')
    with pytest.raises(
        DistillError,
        match='images appear twice because of links: .*train/digit0/0.png and .*valid/digit0/.* are the same file, .* Remove the link',
    ):
        loaders(data=tmp_path)


def read(data, **settings):
    c = TrainConfig(data=str(data), teacher='cnn', student='cnn', **settings)
    return checked_samples(read_samples(c), c)


@pytest.mark.parametrize('split', [False, True])
def test_images_in_folders_inside_class_folders_are_refused(split, tmp_path):
    root = tmp_path / 'train' if split else tmp_path
    for part in ['train', 'valid'] if split else ['']:
        for label in ('cats', 'dogs'):
            write_digits(tmp_path / part / label, 12)  # cats/digit0/0.png
    says = rf'of .* images are in folders inside a class folder, e.g. {root}/cats/digit0/0.png: .*'
    with pytest.raises(DistillError, match=says + f'as in {root}/CLASS/0.png.*CSV file'):
        read(tmp_path)


def test_folders_whose_names_differ_only_in_case_are_refused(tmp_path):
    for part in ('train', 'Train', 'valid'):
        write_digits(tmp_path / part, 12)
    with pytest.raises(
        DistillError, match="both a folder 'Train' and a folder 'train': merge them"
    ):
        read(tmp_path)


def test_two_folders_of_one_set_are_refused(tmp_path):
    for part in ('train', 'val', 'validation', 'test'):
        write_digits(tmp_path / part, 12)
    with pytest.raises(DistillError, match="a folder 'val' and a folder 'validation': merge them"):
        read(tmp_path)
    shutil.rmtree(tmp_path / 'validation')
    assert len(read(tmp_path)) == 24  # a test set is left for later


def test_a_pipe_among_the_images_is_an_error(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    os.mkfifo(tmp_path / 'mine' / 'digit0' / 'pipe.png')
    with pytest.raises(DistillError, match="digit0/pipe.png' is a pipe"):
        read(tmp_path / 'mine')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_folder_and_a_file_that_must_not_be_read_are_named(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    first = tmp_path / 'mine' / 'digit0' / '0.png'
    shutil.copy(first, first.with_name('copy.png'))
    first.chmod(0)
    with pytest.raises(DistillError, match=r"1 of 61 images can't be read: \S*digit0/0.png"):
        read(tmp_path / 'mine')
    first.parent.chmod(0)
    with pytest.raises(DistillError, match=r"folder \S*digit0 can't be read: Permission denied"):
        read(tmp_path / 'mine')
    first.parent.chmod(0o700)


def test_a_folder_that_is_gone_while_images_are_listed_is_named(digits, tmp_path, monkeypatch):
    shutil.copytree(digits, tmp_path / 'mine')
    scandir = os.scandir

    def failing(path):
        if str(path).endswith('digit1'):
            raise OSError(5, 'Input/output error', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', failing)
    with pytest.raises(DistillError, match=r"folder \S*digit1 can't be read: Input/output error"):
        read(tmp_path / 'mine')


def test_a_folder_without_images_is_named(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    (tmp_path / 'mine' / 'birds').mkdir()
    (tmp_path / 'mine' / '.git').mkdir()
    with pytest.warns(DistillWarning, match=r'1 folder\(s\) contain no images.*: \S*mine/birds\.$'):
        s = read(tmp_path / 'mine')
    assert s.classes == ['digit0', 'digit1', 'digit2']


@pytest.mark.parametrize('copy', [shutil.copy, os.link])
def test_copies_of_an_image_in_both_sets_or_in_two_classes_are_named(copy, tmp_path):
    write_digits(tmp_path / 'train', 12)
    write_digits(tmp_path / 'valid', 12, 12)
    first = tmp_path / 'train' / 'digit0' / '0.png'
    copy(first, tmp_path / 'valid' / 'digit0' / 'x.png')
    copy(first, tmp_path / 'train' / 'digit1' / 'y.png')
    copy(first, tmp_path / 'train' / 'digit0' / 'z.png')  # changes neither score nor labels
    with pytest.warns(DistillWarning) as found:
        read(tmp_path)
    assert [str(w.message) for w in found] == [
        '1 image(s) in the training and the validation set are copies of the same image, e.g. '
        f'{first} and {tmp_path}/valid/digit0/x.png. The validation score is too optimistic: remove the '
        'copies.',
        '1 image(s) in different classes are copies of the same image, e.g. '
        f'{first} and {tmp_path}/train/digit1/y.png. At least one of the labels is wrong: remove '
        'the copies.',
    ]


@pytest.mark.filterwarnings('error::fastdistill.DistillWarning')
def test_copies_of_an_image_are_in_one_set(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    for p in [*(tmp_path / 'mine').rglob('*.png')]:
        shutil.copy(p, p.with_name(f'copy {p.name}'))
    s = read(tmp_path / 'mine')
    train, valid = (
        {Path(p).name.removeprefix('copy ') for p in s.frame['x'][rows]}
        for rows in (~s.valid, s.valid)
    )
    assert not train & valid
    assert len(valid) == 12
    assert s.valid.sum() == 24


@pytest.mark.filterwarnings('error::fastdistill.DistillWarning')
def test_copies_of_an_image_with_a_mask_are_in_one_set(tmp_path):
    write_masks(tmp_path)
    for p in [*tmp_path.rglob('*.*g')]:
        shutil.copy(p, p.with_name(f'copy {p.name}'))
    s, _ = loaders(data=tmp_path)
    train, valid = (
        {Path(p).name.removeprefix('copy ') for p in s.frame['x'][rows]}
        for rows in (~s.valid, s.valid)
    )
    assert not train & valid
    assert s.valid.sum() == 4


def test_copies_of_an_image_with_several_labels_are_in_one_set(digits, tmp_path):
    paths = sorted(digits.rglob('*.png'))
    rows = [(p, f'all {p.parent.name}') for p in (*paths, *paths[:20])]
    pd.DataFrame(rows, columns=['file', 'label']).to_csv(tmp_path / 'a.csv', index=False)
    s = read(tmp_path / 'a.csv', delimiter=' ')
    assert len(s) == 80
    assert not {*s.frame['file'][s.valid]} & {*s.frame['file'][~s.valid]}


def test_copies_of_a_text_in_both_sets_are_named(tmp_path):
    df = pd.DataFrame(dict(text=[f'text {i % 30}' for i in range(60)]))
    df['label'] = [f'c{i % 30 % 2}' for i in range(60)]
    df['marked'] = df.index < 15
    df.to_csv(tmp_path / 'a.csv', index=False)
    options = dict(data=tmp_path / 'a.csv', task='texts', x='text', y='label', valid='marked')
    options |= dict(teacher='embedding_bag', student='embedding_bag', teacher_layers='4')
    c = TrainConfig(**settings(**options, student_layers='2'))
    with pytest.warns(DistillWarning) as found:
        checked_samples(read_samples(c), c)
    assert [str(w.message) for w in found] == [
        '15 text(s) in the training and the validation set are copies of the same text, e.g. row 0 and '
        "row 30 ('text 0'). The validation score is too optimistic: remove the copies."
    ]


def masks_of_three_classes(path):
    for i in range(12):
        for kind in ('images', 'masks'):
            (path / kind).mkdir(exist_ok=True)
            pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
            if kind == 'images':
                pixels += i  # copies of an image would be in one set
            Image.fromarray(pixels).save(path / kind / f'{i}.png')
    return path


@pytest.mark.parametrize(
    'text', [b'void\ntraffic light\ncar\n', b'\xef\xbb\xbfvoid\r\n traffic light\r\n\r\ncar']
)
def test_a_line_of_codes_is_the_name_of_a_class(text, tmp_path):
    (masks_of_three_classes(tmp_path) / 'codes.txt').write_bytes(text)
    assert read(tmp_path).classes == ['void', 'traffic light', 'car']


def test_codes_that_are_not_utf8_are_named(tmp_path):
    (masks_of_three_classes(tmp_path) / 'codes.txt').write_bytes(b'v\xffid\nroad\ncar\n')
    with pytest.raises(DistillError, match="codes.txt can't be read as text in UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize('of', ['gz', 'zip', 'xz', 'bz2', 'tar'])
def test_a_file_that_is_not_compressed_as_its_name_says_is_named(of, tmp_path):
    (tmp_path / f't.csv.{of}').write_text('a,b,y\n1,2,p\n')
    with pytest.raises(DistillError, match=f"t.csv.{of} can't be read as CSV"):
        read(tmp_path / f't.csv.{of}')


def read_text(path, text, **settings):
    path.write_text(text)
    c = TrainConfig(data=str(path), teacher='tabular', student='tabular', **settings)
    return checked_samples(read_samples(c), c)


def rows_of(header, *columns, n=24):
    "A CSV file whose columns repeat the given cells, after a column of numbers"
    cells = zip(*([c[i % len(c)] for i in range(n)] for c in columns))
    return f'a,{header}\n' + ''.join(f'{i}.5,{",".join(c)}\n' for i, c in enumerate(cells))


@pytest.mark.parametrize('header', ['label,label', 'b,a', ' a,label', 'label, label '])
def test_a_column_that_is_there_twice_is_refused(header, tmp_path):
    with pytest.raises(DistillError, match='has two columns named .(a|label)'):
        read_text(tmp_path / 'a.csv', rows_of(header, ['p', 'q'], ['p', 'q']))


def test_columns_have_one_type_in_the_training_and_the_validation_file(tmp_path):
    (other := tmp_path / 'b.csv').write_text(rows_of('code,label', ['01', '02'], ['p', 'q']))
    text = rows_of('code,label', ['01', '02', 'A1'], ['p', 'q'])
    s = read_text(tmp_path / 'a.csv', text, valid=str(other))
    assert set(s.frame.code[s.valid]) == {'01', '02'} and s.valid.sum() == 24
    assert set(s.frame.code[~s.valid]) == {'01', '02', 'A1'}


def test_the_type_of_a_column_does_not_change_after_many_rows(tmp_path):
    body = ''.join(f'{i % 7}.5,{"01" if i % 2 else "02"}\n' for i in range(270_000))
    (file := tmp_path / 'a.csv').write_text(f'a,label\n{body}1,x\n')
    s = read_samples(TrainConfig(data=str(file), teacher='tabular', student='tabular'))
    assert set(s.frame.label) == {'01', '02', 'x'}


@pytest.mark.parametrize(
    'cells,classes',
    [
        (['01', '1', '2'], ['01', '1', '2']),
        (['007', '07', '7'], ['007', '07', '7']),
        (['1e2', '100'], ['100', '1e2']),
        (['1e30', '2e30'], ['1e30', '2e30']),
        (['18446744073709551615', '18446744073709551614'], None),
        (['9007199254740993.0', '9007199254740992.0'], ['9007199254740992', '9007199254740993']),
        (['True', 'true', 'False'], ['False', 'True', 'true']),
        (['1.0', '2.0'], ['1', '2']),
        (['1.0', '0.0', '1'], ['0', '1']),
        (['0.', '.0', '1'], ['.0', '0', '1']),
        (['-1', '0', '1'], ['-1', '0', '1']),
        (['1.0', '2.0', 'x'], ['1.0', '2.0', 'x']),
        (['p ', 'p', ' q'], ['p', 'q']),
    ],
)
def test_classes_are_the_text_in_the_file(cells, classes, tmp_path):
    s = read_text(tmp_path / 'a.csv', rows_of('label', cells))
    assert s.target == 'classes' and s.classes == (classes or sorted(cells))


def test_targets_are_numbers(tmp_path):
    s = read_text(tmp_path / 'a.csv', rows_of('label', ['1', '2.5', '1e2']))
    assert s.target == 'numbers' and s.frame.label.tolist()[:3] == [1, 2.5, 100]
    s = read_text(tmp_path / 'a.csv', rows_of('label', [f'{i:03}' for i in range(60)], n=60))
    assert s.target == 'numbers' and s.frame.label.tolist() == [*range(60)]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'cells,labels',
    [
        (['cat; dog', 'dog ;cat;', 'cat', ';dog'], ['cat;dog', 'dog;cat', 'cat', 'dog']),
        (['None', 'NA;None', 'NA', ''], ['None', 'NA;None', 'NA', '']),
        (['null', 'n/a', 'nan', ' '], ['null', 'n/a', 'nan', '']),
        (['1', '', '2', '1'], ['1', '', '2', '1']),
    ],
)
def test_several_labels_are_the_text_in_the_file(cells, labels, tmp_path):
    s = read_text(tmp_path / 'a.csv', rows_of('label', cells), delimiter=';')
    assert s.frame.label.tolist()[:4] == labels
    assert s.classes == sorted({o for v in labels for o in v.split(';') if o})


@pytest.mark.parametrize('empty', ['', 'NA', '"  "', '\t', '\xa0', 'nan '])
@pytest.mark.parametrize('others', ['pq', '12'])
def test_a_row_without_a_label_is_refused(empty, others, tmp_path):
    with pytest.raises(DistillError, match='6 of 24 rows have no label .*row 2, 6'):
        read_text(tmp_path / 'a.csv', rows_of('label', [*others, empty, others[0]]))


@pytest.mark.parametrize('empty', ['', '"  "', '\xa0'])
def test_a_row_without_a_text_is_refused(empty, tmp_path):
    texts = ['a good day', 'no good day', empty, 'the good days']
    text = 'text,label\n' + ''.join(f'{texts[i % 4]},{"pq"[i % 2]}\n' for i in range(24))
    with pytest.raises(DistillError, match='6 of 24 rows have no text in column .text.'):
        read_text(tmp_path / 'a.csv', text, task='texts')


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_another_encoding_is_named(encoding, tmp_path):
    (tmp_path / 'a.csv').write_bytes(rows_of('label', ['café', 'thé']).encode(encoding))
    with pytest.raises(
        DistillError, match='is not UTF-8 text .* Save it again with UTF-8 encoding'
    ):
        read(tmp_path / 'a.csv')


@pytest.mark.parametrize('sep', [';', '\t', '|'])
def test_another_separator_is_named(sep, tmp_path):
    text = rows_of('b,label', ['1', '2'], ['p', 'q']).replace(',', sep)
    with pytest.raises(DistillError, match='has one column, with .* in each line: .*with commas'):
        read_text(tmp_path / 'a.csv', text)
    with pytest.raises(DistillError, match='Expected 1 fields .* Separate the cells .* commas'):
        read_text(tmp_path / 'a.csv', text.replace('.5', ',5'))
    (tmp_path / 'a.tsv').write_text(text.replace(sep, ','))
    with pytest.raises(DistillError, match="has one column, with ',' in each line: .*with tabs"):
        read(tmp_path / 'a.tsv')


@pytest.mark.parametrize('delimiter', ['', ';'])
@pytest.mark.parametrize('inputs', ['file', 'is_valid'])
@pytest.mark.parametrize('task', ['images', 'texts'])
def test_a_column_may_be_called_is_valid(task, inputs, delimiter, digits, tmp_path):
    "As fastai calls the column that marks the validation set"
    files = sorted(digits.rglob('*.png'))
    labels = ['yes' if i % 3 else 'no' for i in range(len(files))]
    x = files if task == 'images' else [f'a text of number {i}' for i in range(len(files))]
    label = 'label' if inputs == 'is_valid' else 'is_valid'
    pd.DataFrame({inputs: x, label: labels}).to_csv(tmp_path / 'a.csv', index=False)
    arch = 'cnn' if task == 'images' else 'embedding_bag'
    s, dls = loaders(
        data=tmp_path / 'a.csv', y=label, delimiter=delimiter, teacher=arch, student=arch
    )
    assert s.task == task and s.x == [inputs]
    for ds, rows in ((dls.train_ds, ~s.valid), (dls.valid_ds, s.valid)):
        got = [s.classes[int(y.float().argmax()) if delimiter else int(y)] for _, y in ds]
        assert sorted(got) == sorted(k for k, held in zip(labels, rows) if held)


@pytest.mark.parametrize('label', ['label', 'age_na'])
def test_a_column_with_the_name_that_fastai_gives_to_missing_values_is_refused(label, tmp_path):
    columns = dict(age=['1.5', '', '2.5'], age_na=['p', 'q']) | {label: ['p', 'q']}
    with pytest.raises(DistillError, match="'age' has missing values, .*a column 'age_na', but"):
        read_text(tmp_path / 'a.csv', rows_of(','.join(columns), *columns.values()), y=label)


@pytest.mark.parametrize('empty', ['', 'NA', '"  "'])
def test_a_row_without_an_image_is_refused(empty, digits, tmp_path):
    rows = [f'{f},{f.parent.name}' for f in sorted(digits.rglob('*.png'))]
    (tmp_path / 'a.csv').write_text('\n'.join(['file,label', *rows, f'{empty},digit0', '']))
    with pytest.raises(DistillError, match='1 of 61 rows have no image in column .file.'):
        read(tmp_path / 'a.csv')


@pytest.mark.parametrize('given', [dict(x='file'), dict(y='label'), dict(delimiter=';')])
def test_columns_of_a_folder_of_images_are_refused(given, digits, tmp_path):
    (name,) = given
    for data in (digits, masks_of_three_classes(tmp_path)):
        with pytest.raises(DistillError, match=f'{name}=.*is a folder without one. Omit {name}'):
            read(data, **given)


def test_two_masks_of_one_image_are_refused(tmp_path):
    Image.new('L', (8, 8)).save(masks_of_three_classes(tmp_path) / 'masks' / '3.bmp')
    with pytest.raises(
        DistillError, match='3.bmp and .*3.png are masks of the same image: remove one'
    ):
        read(tmp_path)


@pytest.mark.parametrize('line', ['1,p,', '1,p,q', '1,some, p'])
def test_a_row_that_is_longer_than_the_header_is_refused(line, tmp_path):
    with pytest.raises(DistillError, match="can't be read as CSV: .*2 fields in line 3, saw 3"):
        read_text(tmp_path / 'a.csv', f'a,label\n2,q\n{line}\n')


def test_inputs_have_the_types_that_pandas_infers(tmp_path):
    columns = dict(
        whole=['1', '02'],
        gaps=['1', 'NA'],
        words=['p', 'null', 'q'],
        bools=['True', 'false'],
        bool_gaps=['TRUE', '', 'False'],
        mixed=['True', '1'],
        exponents=['1e3', ' 2 ', '-.5'],
        large=['18446744073709551615', '1'],
        huge=['98446744073709551615', '1'],
        spaces=['p ', ' p'],
        missing=['', '<NA>'],
        signs=['+1', '-nan', '2'],
    )
    text = rows_of(','.join(columns) + ',label', *columns.values(), ['p', 'q'])
    c = TrainConfig(data=str(tmp_path / 'a.csv'), teacher='tabular', student='tabular')
    (tmp_path / 'a.csv').write_text(text)
    expected = pd.read_csv(tmp_path / 'a.csv', skipinitialspace=True)
    pd.testing.assert_frame_equal(read_samples(c).frame, expected)


NUMBERS = [f'{i * 0.37:.2f}' for i in range(200)]


@pytest.mark.parametrize(
    'cells,says',
    [
        (['?', *NUMBERS[1:]], r'as 200 categories, because 1 of its 200 .* numbers, such as .\?.'),
        (
            [*NUMBERS[:-9], *['unknown'] * 9],
            '9 of its 200 cells are not numbers, such as .unknown.',
        ),
        (['1', '2', '3', '4'] * 49 + ['-'] * 4, 'as 5 categories, because 4 of its 200 cells'),
        (
            [f'"{o}"'.replace('.', ',') for o in NUMBERS],
            'most of its 200 cells differ, such as .0,00.',
        ),
        ([f'{o}%' for o in NUMBERS], 'most of its 200 cells differ, such as .0.00%.'),
        (
            [f'2026-01-01 {i}:00' for i in range(200)],
            'differ, .* plain numbers .*list the other col',
        ),
    ],
)
def test_a_column_of_numbers_that_is_read_as_categories_is_named(cells, says, tmp_path):
    with pytest.warns(DistillWarning, match=f"Column 'n' .*{says}"):
        read_text(tmp_path / 'a.csv', rows_of('n,label', cells, ['p', 'q'], n=200))


@pytest.mark.filterwarnings('error::fastdistill.DistillWarning')
@pytest.mark.parametrize(
    'cells',
    [NUMBERS, ['A1', 'B2', 'C3'], ['1', '2', 'A', 'B'], ['True', '', 'False'], ['', '7', '8']],
)
def test_categories_and_numbers_as_they_should_be_give_no_warning(cells, tmp_path):
    read_text(tmp_path / 'a.csv', rows_of('n,label', cells, ['p', 'q'], n=200))


@pytest.mark.parametrize(
    'cells,says',
    [
        (['?', *NUMBERS[1:]], r'1 of the 200 labels .*are not numbers, such as .\?.*Remove these'),
        ([f'"{o}"'.replace('.', ',') for o in NUMBERS], 'such as .0,00.*with a decimal point'),
    ],
)
def test_numbers_to_predict_that_are_read_as_classes_are_refused(cells, says, tmp_path):
    with pytest.raises(DistillError, match=says):
        read_text(tmp_path / 'a.csv', rows_of('label', cells, n=200))


@pytest.mark.parametrize('end', ['end",neg', '"start again",neg'])
@pytest.mark.parametrize('last', [11, 30])
@pytest.mark.parametrize('order', ['text,label', 'label,text', 'id,text,label,more'])
def test_a_quote_that_is_not_closed_and_swallows_rows_is_named(order, last, end, tmp_path):
    cells = [
        dict(text=f'a review of product {i}', label='pos' if i % 2 else 'neg', id=str(i), more='x')
        for i in range(40)
    ]
    cells[10]['text'], (cells[last]['text'], _) = '"great, that one', end.split(',')
    rows = [','.join(o[c] for c in order.split(',')) for o in cells]
    says = (
        rf'in row 10, .* column .text. contains whole rows: {last - 10} line break.*close it in the'
    )
    with pytest.raises(DistillError, match=says.replace('close', '[Cc]lose')):
        read_text(tmp_path / 'a.csv', '\n'.join([order, *rows, '']), y='label')


def test_a_text_of_several_lines_is_one_text(tmp_path):
    rows = [
        f'"It came, as I said\nand, yes\n\nI like product {i}",{"no" if i % 2 else "yes"}'
        for i in range(40)
    ]
    s = read_text(tmp_path / 'a.csv', '\n'.join(['text,label', *rows, '']))
    assert len(s) == 40 and s.classes == ['no', 'yes']


def test_a_file_without_a_header_has_numbered_columns(tmp_path):
    s = read_text(tmp_path / 'a.csv', rows_of('x', ['p', 'q']).split('\n', 1)[1], header=False)
    assert s.x == ['0'] and s.y == '1' and len(s) == 24


def test_rows_of_a_test_set_are_named_when_they_are_validated_on(tmp_path):
    text = rows_of('label,set', ['p', 'q'], ['train', 'train', 'valid', 'valid', 'test', 'test'])
    with pytest.warns(DistillWarning, match="marked 'test' are in the validation set"):
        assert read_text(tmp_path / 'a.csv', text, valid='set').valid.sum() == 16


def test_an_image_whose_name_is_not_utf8_is_named(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    folder = os.fsencode(tmp_path / 'mine' / 'digit0')
    try:
        os.rename(folder, folder + b'\xff')
    except OSError:
        pytest.skip('this file system refuses such names')
    with pytest.raises(DistillError, match='is not UTF-8: rename the file or its folder'):
        read(tmp_path / 'mine')


def test_settings_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / 'config.toml').write_bytes(b'\xef\xbb\xbfdata = "x"\n')
    assert read_config(tmp_path / 'config.toml') == dict(data='x')


@pytest.mark.parametrize('kind', ['jpg', 'bmp', 'png'])
def test_an_image_that_ends_too_early_is_named_before_the_training(kind, digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    bad = tmp_path / 'mine' / 'digit0' / f'bad.{kind}'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
        bad
    )
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(
        DistillError, match=f"1 of 61 images can't be read: .*bad.{kind} \\(.*Repair or remove"
    ):
        loaders(data=tmp_path / 'mine')


@pytest.mark.parametrize('kind', ['uint16', 'int32', 'float32'])
def test_images_of_more_than_8_bits_are_refused_instead_of_clipped_to_white(kind, digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    pixels = np.linspace(0, 1, 256).reshape(16, 16) * (1 if kind == 'float32' else 60_000)
    deep = tmp_path / 'mine' / 'digit0' / f'deep.{"png" if kind == "uint16" else "tiff"}'
    Image.fromarray(pixels.astype(kind)).save(deep)
    with pytest.raises(
        DistillError, match=f'{deep} has more than 8 bits per pixel .*divide 16-bit values by 257'
    ):
        read(tmp_path / 'mine')


def test_images_of_16_bits_that_hold_8_bits_are_read(digits, tmp_path):
    shutil.copytree(digits, tmp_path / 'mine')
    dark = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(dark).save(tmp_path / 'mine' / 'digit0' / 'dark.png')
    assert len(read(tmp_path / 'mine')) == 61


def test_files_follow_the_umask(finished):
    "Another user of a shared folder can read all of them"
    mask = os.umask(0)
    os.umask(mask)
    modes = {
        p.relative_to(finished).as_posix(): p.stat().st_mode & 0o777
        for p in finished.rglob('*')
        if p.is_file()
    }
    assert set(modes.values()) == {0o666 & ~mask}, modes


def limited(out, bytes, data):
    "A run whose process can't write a larger file, as if the disk were full"
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))
    sys.argv = [
        'fastdistill',
        'train',
        '--resume',
        '--out',
        str(out),
        '--data',
        str(data),
        '--teacher',
        'cnn',
        '--teacher-layers',
        '8,16',
        '--student',
        'cnn',
        '--student-layers',
        '4',
        '--epochs',
        '2',
        '--lr',
        '.01',
        '--teacher-lr',
        '.01',
        '--batch-size',
        '16',
        '--device',
        'cpu',
        '--no-onnx',
    ]
    main()


def test_a_full_disk_is_one_line_and_the_run_continues_later(finished, digits, tmp_path):
    p = processes.start(tmp_path / 'log', limited, tmp_path / 'run', 20_000, digits)
    assert processes.ended(p) == [2]
    said = (tmp_path / 'log.err').read_text()
    assert 'Traceback' not in said
    assert 'Exception occured' not in said
    assert re.search(
        r'No space for \S*run/checkpoints/teacher_0.pt \(File too large; [\d,.]+ MB are free there\).*free some space and start again to resume',
        said,
    ), said
    assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir() if p.name != '.lock'] == [
        'settings.json'
    ]
    resumed(tmp_path / 'run')
    assert_same(finished, tmp_path / 'run')


def test_a_full_disk_leaves_the_last_checkpoint(stopped, digits):
    out = stopped(digits)
    before = (out / 'checkpoints' / 'distilled_0.pt').read_bytes()
    p = processes.start(out.parent / 'log', limited, out, len(before) - 1000, digits)
    assert processes.ended(p) == [2]
    assert 'checkpoints/distilled_0.pt (File too large' in (out.parent / 'log.err').read_text()
    assert (out / 'checkpoints' / 'distilled_0.pt').read_bytes() == before


def test_two_processes_do_not_continue_one_run(stopped, digits, tmp_path):
    out = stopped(digits)

    def say(text):
        if not text.startswith('distilled: continues'):
            return
        with pytest.raises(
            DistillError,
            match=f'Another process is writing to {out}: wait for it, or choose a different folder',
        ):
            resumed(out)
        second = processes.start(tmp_path / 'log', child_of, out)
        assert processes.ended(second) == [1]
        assert f'BusyError: Another process is writing to {out}' in processes.said(tmp_path / 'log')

    opened_run({}, out=out, resume=True, say=say)()
    assert (out / 'report.json').is_file()


def child_of(out):
    resumed(out)


def test_commands_take_a_run_or_its_student(finished, tmp_path, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', *map(str, args)])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, ' '.join(capsys.readouterr().out.split())

    for name, student in dict(folder=finished, file=finished / 'student.pkl').items():
        code, out = call('export', student, tmp_path / f'{name}.pt2')
        assert code == 0
        assert '(12 validation samples)' in out
    code, _ = call(
        'compare',
        f'a={finished}',
        f'b={tmp_path / "file.pt2"}',
        '--out',
        tmp_path / 'report',
        '--seconds',
        0,
    )
    assert code == 0
    scores = [
        m.measures['accuracy']
        for m in Report.from_json(tmp_path / 'report' / 'report.json').models.values()
    ]
    assert (
        scores[0]
        == scores[1]
        == Report.from_json(finished / 'report.json').models['distilled'].measures['accuracy']
    )
    code, out = call('check', finished, finished, '--no-cost')
    assert 'none shared' in out
    assert 'may have been trained on these validation samples' in out


def test_the_student_of_a_run_teaches_the_next_run(finished, digits, tmp_path):
    run(tmp_path / 'next', data=digits, teacher=str(finished), epochs=1, baseline=False)
    score = lambda o, name: Report.from_json(o / 'report.json').models[name].measures['accuracy']
    assert score(tmp_path / 'next', 'teacher') == score(finished, 'distilled')


def test_an_exported_learner_gets_its_data_from_a_script(
    finished, digits, tmp_path, monkeypatch, capsys
):
    shutil.copy(finished / 'student.pkl', tmp_path / 's.pkl')
    (tmp_path / 'script_of_data.py').write_text(f"""from fastai.vision.all import ImageDataLoaders
def dls(): return ImageDataLoaders.from_folder({str(digits)!r}, valid_pct=.2, seed=0, bs=16, num_workers=0, device='cpu')
""")
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', 'export', 's.pkl', 's.pt2', *args])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, *(' '.join(o.split()) for o in capsys.readouterr())

    code, _, err = call()
    assert code == 2
    assert (
        's.pkl is an exported Learner, which contains no data, and it is not in the folder of a run. Pass the data: --data'
        in err
    )
    code, out, err = call('--data', 'script_of_data.py:dls')
    assert code == 0, err
    assert '(12 validation samples)' in out
    (tmp_path / 'other_data.py').write_text(f"""from fastai.vision.all import *
dls = ImageDataLoaders.from_path_func('.', get_image_files({str(digits)!r}), lambda p: 'ab'[int(p.parent.name[-1]) % 2],
    bs=16, num_workers=0, device='cpu')
""")
    code, _, err = call('--data', 'other_data.py:dls')
    assert code == 2
    assert 's.pkl and these data encode their classes differently' in err


@pytest.mark.parametrize(
    'task,name,layers,says',
    [
        ('images', 'xresnet18', None, None),
        ('masks', 'resnet18', None, None),
        ('texts', 'awd_lstm', [100, 200, 200], None),
        ('texts', 'awd_lstm', None, None),
        ('texts', 'awd_lstm', [100, 200, 300], '1 to 16 equal numbers of hidden units'),
        ('texts', 'awd_lstm', [100], '1 to 16 equal numbers of hidden units'),
        ('texts', 'embedding_bag', None, "needs the sizes of its layers: student_layers='64,32'"),
        ('texts', 'resnet18', None, "No architecture 'resnet18' for texts"),
        ('table', 'tabular', None, None),
        ('masks', 'cnn', [4, 8], None),
        ('masks', 'cnn', None, "needs the sizes of its layers: student_layers='8,16,32'"),
        ('masks', 'embedding_bag', [4], "No architecture 'embedding_bag' for masks"),
        ('images', 'tabular', [4], "No architecture 'tabular' for images"),
    ],
)
def test_an_architecture_fits_the_task_and_has_these_layers(task, name, layers, says):
    arch = Arch(name, layers)
    if says is None:
        check_arch(arch, task)
    else:
        with pytest.raises(DistillError, match=says):
            check_arch(arch, task)


def test_another_architecture_does_not_take_the_layers_of_a_stored_one(digits, tmp_path):
    stored = TrainConfig(**settings(digits, student_layers='4,8'))
    write_config(stored, tmp_path / 'config.toml')
    config, _ = settings_of(
        dict(student='resnet18'), tmp_path / 'config.toml', tmp_path / 'a', False
    )
    assert config.student_layers == ''
    assert config.teacher_layers == '8,16'
