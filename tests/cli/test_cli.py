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
    code, _, err = command('demo', '--data', 'cifar10')
    assert (
        code == 2
        and 'needs its folder: --root PATH, where PATH holds train/ and test/'
        in ' '.join(err.split())
    )
    said = ' '.join(command('demo', '--data', 'mnist')[2].split())
    assert "No data set 'mnist'. It must be one of digits, cifar10, camvid." in said


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
    task = tasks.load_task('digits')
    halves = [torch.cat([x[..., :8], x[..., 8:]]).flatten(1) for x, _ in (task.train, task.test)]
    train, test = [set(map(tuple, h.tolist())) for h in halves]
    assert train & test == set()
    digits, drawn = load_digits(), task.train[0][0, 0]
    for half, figure in zip((drawn[:, :8], drawn[:, 8:]), task.classes[task.train[1][0]]):
        same = (digits.images[:1200] == 16 * half.numpy()).all((1, 2))
        assert {str(d) for d in digits.target[:1200][same]} == {figure}


def results(teacher, **scores):
    scores = {k.replace('_', ' '): v for k, v in scores.items()}
    return Results('data', 'accuracy', (9, 9), (1, 1), teacher, scores, {}, {}, 1.0, {}, {})


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


@pytest.fixture
def cifar(tmp_path):
    "The same 6 pictures of 2 classes: in train as a folder for each class, in test as one picture of tiles for each"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 32, 32, 3), generator=g, dtype=torch.uint8).numpy()
    for name, pictures in zip(('cat', 'dog'), x):
        for split in ('train', 'test'):
            (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / 'train' / name).mkdir()
        for i, p in enumerate(pictures):
            Image.fromarray(p).save(tmp_path / 'train' / name / f'{i}.png')
        sheet = Image.new('RGB', (96, 32))
        for i, p in enumerate(pictures):
            sheet.paste(Image.fromarray(p), (32 * i, 0))
        sheet.save(tmp_path / 'test' / f'{name}.webp', lossless=True)
    return tmp_path, torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2)


def test_pictures_in_folders_and_in_tiles_are_the_same(cifar):
    root, x = cifar
    t = tasks.load_task('cifar10', root)
    assert t.classes == ['cat', 'dog']
    for got, y in (t.train, t.test):
        assert torch.equal(got, x) and y.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_missing_class_and_a_missing_folder_are_named(cifar):
    root, _ = cifar
    (root / 'test' / 'dog.webp').unlink()
    with pytest.raises(DistillError, match="No pictures of 'dog' in .*test"):
        tasks.load_task('cifar10', root)
    with pytest.raises(
        DistillError, match='No folder .*nowhere.train. A root holds: cifar10: train/'
    ):
        tasks.load_task('cifar10', root / 'nowhere')


def scenes(root, size=(128, 96)):
    "8 pictures for training and 2 for the test, whose left half is road, with a frame of void"
    (root / 'codes.txt').write_text('road\nsky\nVoid')
    for split, n in (('train', 8), ('test', 2)):
        for kind in ('images', 'masks'):
            (root / split / kind).mkdir(parents=True)
        for i in range(n):
            y = torch.zeros(size[::-1], dtype=torch.uint8)
            y[:, size[0] // 2 :] = 1
            y[:4] = 2
            noise = torch.randint(0, 50, (*y.shape, 3), generator=torch.Generator().manual_seed(i))
            x = (y[..., None] * 100 + noise).to(torch.uint8)
            Image.fromarray(y.numpy()).save(root / split / 'masks' / f'{i}.png')
            Image.fromarray(x.numpy()).save(root / split / 'images' / f'{i}.png')
    return root


def test_the_demo_on_scenes(tmp_path):
    r = run('camvid', scenes(tmp_path), out=tmp_path, quick=True, console=Console(quiet=True))
    assert r.unit == 'mean IoU' and r.n == (8, 2) and (tmp_path / 'demo-camvid.png').exists()


def test_mean_iou_against_sets_of_pixels():
    g = torch.Generator().manual_seed(0)
    out, y = (
        torch.randn(2, 3, 4, 5, generator=g),
        torch.randint(0, 4, (2, 4, 5), generator=g),
    )  # 3 is void
    y[y == 1] = 0  # class 1 does not occur
    p, want = out.argmax(1), []
    for c in (0, 2):
        said = {tuple(i) for i in (p == c).nonzero().tolist() if y[tuple(i)] != 3}
        true = {tuple(i) for i in (y == c).nonzero().tolist()}
        want.append(len(said & true) / len(said | true))
    assert tasks.mean_iou(out, y) == pytest.approx(sum(want) / 2)


def test_only_training_batches_are_augmented():
    t = tasks.load_task('digits')
    dls = t.dls(lambda x, y: (x + 1, y))
    assert dls.train.one_batch()[0].min() == 1 and dls.valid.one_batch()[0].min() == 0


def test_flip_and_shift_keeps_each_picture_and_its_label():
    x = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 32, 32) + 1
    a, y = tasks.flip_and_shift(x, torch.arange(8))
    assert a.shape == x.shape and a.dtype == x.dtype and y.tolist() == [*range(8)]
    assert all(set(o.unique().tolist()) <= {0, i + 1} for i, o in enumerate(a))
