"`fastdistill cache`, as a user types it."

import json, os, re, sys
import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
import processes
from fastdistill.cache import TeacherCache, writer
from fastdistill.cli import app, main
from fastdistill.base.outputs import DistillError, DistillWarning
from typer.testing import CliRunner

pytestmark = pytest.mark.filterwarnings(
    *apps.FASTAI_WARNINGS, 'ignore:__array__ implementation:DeprecationWarning'
)

SCRIPT = """
import numpy as np, torch
from fastai.vision.all import CategoryBlock, DataBlock, FlipItem, ImageBlock, IndexSplitter, Learner, PILImage, Resize
from torch import nn

IMAGES = np.random.default_rng(0).integers(0, 255, (24, 12, 12, 3), dtype=np.uint8)
def image(i): return PILImage.create(IMAGES[i])
def label(i): return 'ab'[i % 2]
def dls():
    return DataBlock((ImageBlock, CategoryBlock), get_x=image, get_y=label, splitter=IndexSplitter(range(16, 24)),
                     item_tfms=[Resize(8), FlipItem()]).dataloaders(list(range(24)), bs=4, num_workers=0)

class Flat(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.l = nn.Linear(8*8*3, 2)
    def forward(self, x): return self.l(x.flatten(1))

teacher = Flat(0).eval()
def another(): return Flat(1).eval()
def learner(): return Learner(dls(), Flat(0))
def numbers():
    "Data that does not know its loss function"
    from fastai.vision.all import DataLoaders, TfmdDL
    data = [(torch.full((3, 8, 8), i / 16), i % 2) for i in range(16)]
    return DataLoaders.from_dsets(data, data, bs=4, dl_type=TfmdDL, device='cpu')
def of_numbers(): return Learner(numbers(), Flat(0), loss_func=nn.CrossEntropyLoss())
def lossless():
    learn = of_numbers()
    learn.loss_func = None
    return learn
def without_its_own():
    learn = learner()
    learn.loss_func = None
    return learn
class Stopped(Flat):
    "Interrupted by the user at its last batches"
    asked = 0
    def forward(self, x):
        Stopped.asked += 1
        if Stopped.asked == STOP_AT: raise KeyboardInterrupt
        return super().forward(x)
STOP_AT = 8
stopped = Stopped(0).eval()
number = 3
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'my_script.py').write_text(SCRIPT)
    return f'{tmp_path}/my_script.py'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "Run `fastdistill cache ARGS`"
    monkeypatch.setenv('COLUMNS', '160')

    def call(*args, code=0, **kwargs):
        if args[0] == 'write' and '--check' not in args:
            args = *args, '--no-check'  # the teachers know nothing
        r = CliRunner().invoke(app, ['cache', *map(str, args)], **kwargs)
        if code is None:
            return r
        assert r.exit_code == code, f'{r.output}\n{r.exception!r}'
        return r.output

    return call


def fails(r, match):
    assert isinstance(r.exception, DistillError), f'{r.output}\n{r.exception!r}'
    assert re.search(match, str(r.exception)), str(r.exception)


def test_the_loss_function_comes_from_the_learner_in_the_place_of_the_data(script, cache, tmp_path):
    path = tmp_path / 'c'
    cache('write', f'{script}:teacher', f'{script}:of_numbers', path, '--store', 'float32')
    assert len(TeacherCache(path)) == 16
    cache('verify', path, f'{script}:teacher', f'{script}:of_numbers')
    cache('write', f'{script}:teacher', f'{script}:without_its_own', tmp_path / 'd')
    for name in 'numbers', 'lossless':
        r = cache('write', f'{script}:teacher', f'{script}:{name}', tmp_path / 'e', code=None)
        fails(
            r,
            'no loss function that shows .* Set loss_func of the Learner or of its DataLoaders, or',
        )
    assert not (tmp_path / 'e').exists()


def test_write_look_at_it_and_ask_again(script, cache, tmp_path):
    path = tmp_path / 'c'
    out = cache(
        'write',
        f'{script}:teacher',
        f'{script}:dls',
        path,
        '--views',
        2,
        '--store',
        'float32',
        '--valid',
    )
    assert '16 samples x 2 view(s) x 8 bytes = 0.0 MB' in out and '8 samples x 1 view(s)' in out
    assert (len(TeacherCache(path)), TeacherCache(path).views, len(TeacherCache(path).valid)) == (
        16,
        2,
        8,
    )
    out = cache('info', path, '--check')
    for say in (
        '16',
        '2 of each, augmented',
        '8 bytes: logits float32 2',
        '2 of 2 written',
        'name Flat',
        'classes',
        'a, b',
        'FlipItem',
        'included',
        'Every file matches its checksum',
    ):
        assert say in out, say
    out = cache('verify', path, f'{script}:teacher', f'{script}:dls')
    assert out.startswith('32 rows compared: stored logits (float32) differ by')
    cache('verify', path, f'{script}:another', f'{script}:dls', '--n', 4, code=1)
    cache('verify', path, f'{script}:another', f'{script}:dls', '--n', 4, '--tol', 100)
    assert 'Nothing is missing' in cache(
        'write', f'{script}:teacher', f'{script}:dls', path, '--views', 2, '--store', 'float32'
    )
    r = cache(
        'write',
        f'{script}:another',
        f'{script}:dls',
        path,
        '--views',
        2,
        '--store',
        'float32',
        code=None,
    )
    fails(r, 'teacher, weights: .* in the cache')


def test_a_teacher_from_an_exported_learner_and_options(script, cache, tmp_path):
    options = '--store', 'topk=1, dtype=int8, tail=zero', '--layers', 'l', '--seed', 3
    cache('write', f'{script}:learner', f'{script}:learner', tmp_path / 'a', *options)
    m = TeacherCache(tmp_path / 'a').manifest
    assert [f.name for f in m.layout.fields] == [
        'ids',
        'values',
        'scale:values',
        'feats:l',
        'scale:feats:l',
    ]
    assert (m.seed, m.layout.tail) == (3, 'zero')
    sys.modules['my_script'].learner().export(tmp_path / 't.pkl')
    out = cache('write', tmp_path / 't.pkl', f'{script}:dls', tmp_path / 'b', '--views', 0)
    assert 'the clean view' in out
    assert '0 of 1 written' not in cache('info', tmp_path / 'b')


def test_an_interrupt_says_how_to_go_on(script, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(writer.write_cache.__kwdefaults__, 'shard_bytes', 32)  # four rows
    out = cache(
        'write',
        f'{script}:stopped',
        f'{script}:dls',
        tmp_path / 'c',
        '--views',
        2,
        '--store',
        'float32',
        code=130,
    )
    assert 'Finished files are kept' in out and 'To resume, run the same command' in out
    said = cache('info', tmp_path / 'c')
    done = int(
        re.search(r'(\d+) of 8 written, .* in total: `fastdistill cache write` resumes', said)[1]
    )
    assert 0 < done < 8
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / 'c').rglob('0*.bin')}
    assert len(written) == done
    cache(
        'write',
        f'{script}:stopped',
        f'{script}:dls',
        tmp_path / 'c',
        '--views',
        2,
        '--store',
        'float32',
    )
    assert '8 of 8 written' in cache('info', tmp_path / 'c', '--check')
    assert all(p.stat().st_mtime_ns == time for p, time in written.items())


def test_what_does_not_fit_is_refused_and_what_nearly_does_is_asked(
    script, cache, tmp_path, monkeypatch
):
    args = 'write', f'{script}:teacher', f'{script}:dls', tmp_path / 'c'
    free = [60]
    monkeypatch.setattr('fastdistill.cache.file_store.Folder.free', lambda self: free[0])
    fails(
        cache(*args, code=None),
        r'16 samples x 1 view\(s\) x 4 bytes = 0.0 MB, 0.00 GB free. There is not enough disk space: use fewer views',
    )
    free[0] = 100
    r = cache(*args, code=None, input='n\n')
    assert (
        r.exit_code == 1
        and 'more than half of the free disk space. Continue?' in r.output
        and '0 of 1 written' in cache('info', tmp_path / 'c')
    )
    cache(*args, input='y\n')
    assert len(TeacherCache(tmp_path / 'c')) == 16
    free[0] = 100
    cache('write', f'{script}:teacher', f'{script}:dls', tmp_path / 'd', '--yes')


def test_names_that_lead_nowhere(script, cache, tmp_path):
    def no(match, teacher=f'{script}:teacher', data=f'{script}:dls'):
        fails(cache('write', teacher, data, tmp_path / 'c', code=None), match)

    no("must be a file and a name in it, such as 'train.py:dls'", data='dls')
    no("There is no file 'nowhere.py'", data='nowhere.py:dls')
    no("has no 'loaders'. It has: .*image, label, dls, Flat, teacher", data=f'{script}:loaders')
    no(
        "A int is neither fastai's DataLoaders nor a function without arguments",
        data=f'{script}:number',
    )
    no("There is no file 'x.pkl'", teacher='x.pkl')
    fails(cache('info', tmp_path / 'c', code=None), 'There is no cache at')
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'manifest.json').write_text(json.dumps(dict(format='other')))
    fails(cache('info', tmp_path / 'c', code=None), 'does not belong to a fastdistill cache')


def test_help_names_each_command(cache):
    out = cache('--help')
    assert all(c in out for c in ('write', 'verify', 'info'))
    assert torch.is_grad_enabled()


def child(folder, args, shard_bytes=None):
    "The command in a process of its own"
    os.chdir(folder)
    if shard_bytes:
        writer.write_cache.__kwdefaults__['shard_bytes'] = shard_bytes
    sys.argv = ['fastdistill', *map(str, args)]
    main()


def test_each_of_two_processes_writes_its_share(script, cache, tmp_path):
    args = 'write', f'{script}:teacher', f'{script}:dls'
    more = '--views', '2', '--store', 'float32', '--valid'
    both = processes.start_two(
        tmp_path / 'log',
        child,
        tmp_path,
        ['cache', *args, tmp_path / 'two', *more, '--no-check'],
        32,
    )  # four rows
    assert processes.ended(*both) == [0, 0], processes.said(tmp_path / 'log.0') + processes.said(
        tmp_path / 'log.1'
    )
    out = ''.join((tmp_path / f'log.{i}.out').read_text() for i in (0, 1))
    assert out.count('16 samples x 2 view(s)') == 1
    cache(*args, tmp_path / 'one', *more)
    one, two = TeacherCache(tmp_path / 'one'), TeacherCache(tmp_path / 'two').check()
    assert (len(one.manifest.shards), len(two.manifest.shards)) == (3, 9)
    for a, b in ((one, two), (one.valid, two.valid)):
        at, views = np.divmod(np.arange(len(a) * max(a.views, 1)), max(a.views, 1))
        assert np.array_equal(a.keys, b.keys) and np.array_equal(
            a.rows(at, views), b.rows(at, views)
        )


def test_a_teacher_that_knows_nothing_is_noticed_first(script, cache, tmp_path):
    with pytest.warns(DistillWarning, match='no better than chance'):
        cache('write', f'{script}:teacher', f'{script}:dls', tmp_path / 'c', '--check')


def fastdistill(folder, *args):
    "The command as a process: its exit code, and what a user sees of its errors"
    (code,) = processes.ended(processes.start(folder / 'log', child, folder, args, COLUMNS=200))
    return code, (folder / 'log.err').read_text()


@pytest.mark.parametrize(
    'teacher, path, match',
    [
        ('garbage.pkl', 'c', 'garbage.pkl could not be loaded as an exported Learner'),
        ('my_script.py:teacher', 'garbage.pkl/c', 'garbage.pkl'),
        ('broken.py:teacher', 'c', 'broken.py stopped in line 2: NameError'),
        ('late.py:teacher', 'c', 'late.py stopped in line 2: NameError'),
        ('my_script.py:teacher', 's3://nowhere/c', '(?i)s3fs'),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_no_traceback(
    script, tmp_path, teacher, path, match
):
    (tmp_path / 'garbage.pkl').write_bytes(bytes(range(256)) * 8)
    (tmp_path / 'broken.py').write_text('x = 1\nteacher = undefined\n')
    (tmp_path / 'late.py').write_text('def teacher():\n    return undefined\n')
    code, err = fastdistill(
        tmp_path, 'cache', 'write', teacher, 'my_script.py:dls', path, '--no-check'
    )
    assert code == 2 and 'Traceback' not in err, err
    assert re.search(match, err), err


@pytest.mark.skipif(sys.platform == 'darwin', reason='its file names are always UTF-8')
def test_a_name_that_is_not_utf8_is_shown_with_escapes(script, cache, tmp_path):
    name = os.fsdecode(b'c\xff')
    cache('write', f'{script}:teacher', f'{script}:dls', tmp_path / 'c')
    (tmp_path / 'c').rename(tmp_path / name)
    code, err = fastdistill(tmp_path, 'cache', 'pack', tmp_path / name, tmp_path / f'{name}.zip')
    assert code == 0, err
    assert r'c\udcff.zip' in (tmp_path / 'log.out').read_text()


def test_a_damaged_manifest_is_one_line(tmp_path):
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'manifest.json').write_text(
        '{"format": "fastdistill-cache", "version": 1, "count": "12"}'
    )
    code, err = fastdistill(tmp_path, 'cache', 'info', tmp_path / 'c')
    assert code == 2 and 'Traceback' not in err and 'manifest.json' in err, err
    assert 'Traceback' in fastdistill(tmp_path, '--debug', 'cache', 'info', tmp_path / 'c')[1]


def test_messages_name_flags_and_not_pythons_arguments():
    from fastdistill.cli.app import in_flags

    assert (
        in_flags('or force=True to override (views=8, recipe=None, check=False).')
        == 'or --force to override (--views 8, --recipe None, --no-check).'
    )
    assert (
        in_flags('Teacher(model, images=dict(size=...)) with a=1')
        == 'Teacher(model, images=dict(size=...)) with a=1'
    )
