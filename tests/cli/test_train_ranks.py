"`fastdistill train` in two processes: the same weights as one process with the doubled batch, one report, one message, and a resume."

import csv, json, os, re, signal, subprocess, sys, time
import numpy as np
import pandas as pd
import pytest, torch
import processes
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from fastdistill.cli import main
from fastdistill.base.distributed import first_then_others, leave_processes, on_first
from fastdistill.evaluation import Report
from fastdistill.cli.training import TrainRun
from fastdistill.cli.training.run_results import write_history
from fastdistill.cli.training.start_or_resume import settings_of

pytest.importorskip('accelerate')
pytestmark = [
    pytest.mark.filterwarnings(w)
    for w in ('ignore::fastdistill.DistillWarning', 'ignore:numpy.core is deprecated')
]
COMMON = dict(device='cpu', onnx=False, baseline=False, recipe='kd(T=2)', lr=0.01, teacher_lr=0.01)


@pytest.fixture(scope='module')
def reviews(tmp_path_factory):
    "24 texts for training, 6 for validation"
    file = tmp_path_factory.mktemp('data') / 'reviews.csv'
    words = {
        'good': ['what a fine film', 'I like this one', 'a great day out'],
        'bad': ['what a poor film', 'I hate this one', 'a dull day out'],
    }
    pd.DataFrame(
        [(t, k) for k, ts in words.items() for t in ts * 5], columns=['review', 'label']
    ).to_csv(file, index=False)
    return file


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digits'
    x, y = load_digits(n_class=3, return_X_y=True)
    for i in range(60):
        (root / f'digit{y[i]}').mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[i].reshape(8, 8) * 15).astype(np.uint8)).resize((16, 16)).save(
            root / f'digit{y[i]}' / f'{i}.png'
        )
    return root


def child(args, log, compares):
    "One of two processes. It notes the weights that it ended with; without a comparison it ends there"
    trained = TrainRun.trained

    def noted(self):
        models = trained(self)
        torch.save(
            {k: m.model.state_dict() for k, m in models.items()}, f'{log}.{os.environ["RANK"]}.pt'
        )
        if compares:
            return models
        leave_processes()
        if self.first:
            write_history(self.folder, self.trainings.runs.finished())
        os._exit(0)

    TrainRun.trained = noted
    sys.argv = ['fastdistill', 'train', *args]
    main()


def start(out, *flags, compares=False, **kwargs):
    "Two processes, from the folder of the run, more flags, settings"
    settings = {k.replace('_', '-'): v for k, v in (COMMON | kwargs | dict(out=out)).items()}
    args = [
        a
        for k, v in settings.items()
        for a in ([f'--{k}' if v else f'--no-{k}'] if isinstance(v, bool) else [f'--{k}', str(v)])
    ]
    return processes.start_two(out, child, [*args, *flags], str(out), compares)


def ended(both):
    return processes.ended(*both)


def said(out, rank=0):
    return processes.said(f'{out}.{rank}')


def assert_both_equal(out):
    "Weights of all models in both processes"
    a, b = (torch.load(f'{out}.{i}.pt', weights_only=True) for i in (0, 1))
    assert [*a] == ['teacher', 'distilled']
    for k in a:
        for n in a[k]:
            assert torch.equal(a[k][n], b[k][n]), (k, n)
    return a


def test_two_processes_end_where_one_with_the_doubled_batch_ends(reviews, tmp_path):
    "One batch holds all samples, so that their order does not matter; these models have no batch-norm"
    options = dict(
        data=reviews,
        teacher='embedding_bag',
        teacher_layers='16',
        student='embedding_bag',
        student_layers='4',
        epochs=4,
    )
    codes = ended(start(tmp_path / 'two', batch_size=12, compares=True, **options))
    assert codes == [0, 0], said(tmp_path / 'two') + said(tmp_path / 'two', 1)
    lines = said(tmp_path / 'two').splitlines()
    assert (
        said(tmp_path / 'two', 1) == ''
        and sum('distilled: epoch 4 of 4' in o for o in lines) == 1
        and sum('Written:' in o for o in lines) == 1
    )
    one = COMMON | options | dict(data=str(reviews), batch_size=24)
    run = TrainRun(*settings_of(one, None, tmp_path / 'one', False), say=lambda _: None)
    models, weights = run.trained(), assert_both_equal(tmp_path / 'two')
    write_history(run.folder, run.trainings.runs.finished())
    for name, m in models.items():
        for k, v in m.model.state_dict().items():
            torch.testing.assert_close(weights[name][k], v, rtol=0, atol=1e-4, msg=f'{name} {k}')
    for k, v in load_file(tmp_path / 'two' / 'student' / 'model.safetensors').items():
        assert torch.equal(v, weights['distilled'][k])
    two, one = (
        [*csv.DictReader((tmp_path / o / 'history.csv').read_text().splitlines())]
        for o in ('two', 'one')
    )
    assert len(two) == 8
    for a, b in zip(two, one):
        assert float(a['valid_loss']) == pytest.approx(float(b['valid_loss']), abs=1e-5)
    assert float(one[0]['valid_loss']) - float(one[3]['valid_loss']) > 0.01  # it has learned
    assert Report.from_json(tmp_path / 'two' / 'report.json').models.keys() == {
        'teacher',
        'distilled',
    }
    assert [
        json.loads((tmp_path / o / 'environment.json').read_text())['processes']
        for o in ('two', 'one')
    ] == [2, 1]
    assert not (tmp_path / 'two' / 'checkpoints').exists()


def test_two_processes_that_are_killed_continue_to_the_same_result(digits, tmp_path):
    "Batch-norm, flipped images, a projector and a share, of which each process has its own part"
    options = dict(
        data=digits,
        teacher='cnn',
        teacher_layers='8',
        student='cnn',
        student_layers='4',
        epochs=2,
        batch_size=8,
        recipe="labels + dist(grad_ratio=1) + hint(layers={'0': '0'}, grad_ratio=.2)",
    )
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert ended(start(whole, **options)) == [0, 0], said(whole) + said(whole, 1)
    both, file = start(killed, **options), killed / 'checkpoints' / 'distilled_0.pt'
    while any(p.is_alive() for p in both) and not file.exists():
        time.sleep(0.01)
    for p in both:
        os.kill(p.pid, signal.SIGKILL)
    assert ended(both) == [-signal.SIGKILL] * 2 and file.exists(), said(killed)
    assert ended(start(killed, '--resume', **options)) == [0, 0], said(killed) + said(killed, 1)
    assert 'teacher: is finished' in said(killed) and 'distilled: continues after epoch' in said(
        killed
    )
    assert (whole / 'history.csv').read_text() == (killed / 'history.csv').read_text()
    a, b = assert_both_equal(whole), assert_both_equal(killed)
    for k in a:
        for n in a[k]:
            assert torch.equal(a[k][n], b[k][n]), (k, n)


def test_one_device_for_all_processes_is_refused(reviews, tmp_path):
    codes = ended(
        start(
            tmp_path / 'two',
            data=reviews,
            teacher='embedding_bag',
            teacher_layers='4',
            student='embedding_bag',
            student_layers='4',
            device='cpu:0',
        )
    )
    assert codes == [2, 2] and "--device 'cpu:0' is one device, but there are 2 processes" in said(
        tmp_path / 'two'
    ).replace('\n', ' ')
    assert said(tmp_path / 'two', 1) == ''
    assert not (tmp_path / 'two').exists()


def test_a_mistake_under_torchrun_is_one_message_of_the_first_process(tmp_path):
    (tmp_path / 'run.py').write_text('from fastdistill.cli import main\nmain()')
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        tmp_path / 'run.py',
        'train',
        '--data',
        'nowhere',
        '--teacher',
        'cnn',
        '--teacher-layers',
        '4',
        '--student',
        'cnn',
        '--student-layers',
        '4',
    ]
    r = subprocess.run(
        [*map(str, launch)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            'COLUMNS': '200',
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': os.pathsep.join(sys.path),
        },
    )
    assert (
        r.returncode
        and r.stderr.count('There is no file or folder') == 1
        and re.search(r'rank *: 0 .*\n *exitcode *: 2', r.stderr)
    ), r.stderr
    assert not (tmp_path / 'runs').exists()


def test_alone_each_function_runs_once():
    done = []
    assert (
        on_first(lambda: 3) == 3
        and first_then_others(lambda: done.append(1) or 4) == 4
        and done == [1]
    )
