"A cache's files may be damaged or made to do harm: each such file is named, and nothing outside the folder is touched."

import copy, json, os, random, shutil, sys
from contextlib import contextmanager
import numpy as np
import pytest, torch
from fastdistill import Teacher
from fastdistill.cache import Source, TeacherCache, Store, ask_server, cache_from, write_cache
from fastdistill.cache.file_store import open_folder
from fastdistill.base.outputs import DistillError, Outputs
from manifests import signed, write_manifest

N = 26


def source(n=N, bs=4, **kwargs):
    "A teacher whose outputs are known: of each sample, in each view, others"

    def run(tasks, bs):
        for i in range(0, len(tasks), bs):
            t = torch.as_tensor(tasks[i : i + bs], dtype=torch.float32)
            yield Outputs(
                (t[:, None] * torch.tensor([0.1, 0.2, 0.3, -0.1, -0.2, 0.05])).sin(),
                {'layer': t[:, None, None].expand(-1, 2, 3).contiguous()},
            )

    samples = [dict(row=i, view=0, digest=f'{i:032}', after=[[0.5, 1.0, 0.0]]) for i in (0, 8)]
    given = dict(
        teacher=dict(name='t', weights='w'),
        transforms={'crop': '24'},
        vocab=list('abcdef'),
        samples=samples,
    )
    return Source(np.arange(n, dtype=np.uint64), run, bs, **{**given, **kwargs})


def write(path, views=2, shard_bytes=256, wish=None, **kwargs):
    return write_cache(
        path,
        kwargs.pop('source', None) or source(),
        wish or Store(topk=3, dtype='int8'),
        views=views,
        shard_bytes=shard_bytes,
        **kwargs,
    )


def all_rows(cache):
    return [cache.rows(np.arange(len(cache)), v) for v in range(cache.manifest.stored)]


def tree(path):
    return {p: p.read_bytes() for p in path.rglob('*') if p.is_file() and p.name != '.lock'}


def test_a_crafted_name_makes_the_writer_touch_nothing_outside_its_folder(tmp_path):
    cache = tmp_path / 'deep' / 'cache'
    write(cache)
    (tmp_path / 'victim.txt').write_text('precious')
    for name in (
        '../../victim.txt',
        str(tmp_path / 'victim.txt'),
        'view000/../../../victim.txt',
        'manifest.json',
    ):
        m = json.loads((cache / 'manifest.json').read_text())
        m['shards'][1]['name'] = name
        write_manifest(cache, m)
        before = tree(tmp_path)
        for act in (
            lambda: write(cache),
            lambda: TeacherCache(cache),
            lambda: TeacherCache(cache).check(),
        ):
            with pytest.raises(
                DistillError,
                match=r"manifest.json is damaged: shards\[1\].name is .*: it must be 'view000/000000.bin'",
            ):
                act()
        assert tree(tmp_path) == before
    with pytest.warns(match='is damaged: .* The cache is overwritten'):
        assert write(cache, force=True).check()
    assert (tmp_path / 'victim.txt').read_text() == 'precious' and {
        p.name for p in tmp_path.iterdir()
    } == {'victim.txt', 'deep'}


def deep(n):
    return [deep(n - 1)] if n else []


# path in the manifest, value, what is said of it
CRAFTED = [
    ('count', -1, 'count is -1: it must be a whole number from 1'),
    ('count', '12', "count is '12'"),
    ('count', True, 'count is True'),
    ('count', 10**13, 'count is 10000000000000'),
    ('count', 10**9, 'make 250000000 files: at most'),
    ('count', 10**6, r'shards has 9 entries: it must have'),
    ('count', 25.0, 'count is 25.0'),
    ('shard_rows', 0, 'shard_rows is 0'),
    ('shard_rows', 10**9, 'shard_rows is .*: it must be a multiple|shards has'),
    ('shard_rows', None, 'shard_rows is None'),
    ('shards', None, 'shards is None: it must be a list'),
    ('shards', [], 'shards has 0 entries'),
    ('shards.1.bytes', 1, r'shards\[1\].bytes is 1: it must be'),
    ('shards.1.bytes', True, r'shards\[1\].bytes is True'),
    ('shards.2.checksum', 'x', '32 hexadecimal digits'),
    ('shards.0', [], r'shards\[0\] is \[\]'),
    (
        'shards.1.extra',
        1,
        r"shards\[1\] has an entry 'extra': must be one of name, bytes, checksum",
    ),
    ('layout.fields.0.at', -4, r'layout.fields\[0\].at is -4'),
    (
        'layout.fields.1.at',
        0,
        r"layout.fields\[1\] is 'values' .* at byte 0: .* it must be .* at byte 3",
    ),
    ('layout.fields.0.at', False, 'at is False'),
    ('layout.fields.0.shape', [10**12], r'shape\[0\] is 1000000000000'),
    ('layout.fields.0.shape', [10**9] * 8, 'fields take .* bytes'),
    ('layout.fields.0.shape', [-1], r'shape\[0\] is -1'),
    ('layout.fields.0.shape', [[1]], r'shape\[0\] is \[1\]'),
    ('layout.fields.0.shape', [1] * 9, 'shape has 9 entries'),
    ('layout.fields.0.shape', [], 'layout.n is 6'),
    ('layout.fields.0.shape', [7], 'topk=7, but the teacher has 6 classes'),
    ('layout.fields.0.dtype', 'int64', "dtype is 'int64': it must be 'uint8' or"),
    ('layout.fields.1.dtype', 'object', "dtype is 'object'"),
    (
        'layout.fields.1.dtype',
        'uint8',
        "dtype='uint8': must be one of 'float32', 'float16', 'int8'",
    ),
    ('layout.fields.1.dtype', 1, 'dtype is 1: it must be a string'),
    ('layout.fields.0.name', 'logits', r"layout.fields\[0\] is 'logits'"),
    ('layout.fields.2.name', 'scale:x', r"layout.fields\[2\] is 'scale:x'"),
    ('layout.fields.4.name', '../../x', r'layout.fields\[4\] is'),
    ('layout.fields', [], 'layout.fields has 0 entries'),
    ('layout.fields', {}, 'it must be a list'),
    ('layout.n', 10**12, 'layout.n is 1000000000000'),
    ('layout.n', 0, 'layout.n is 0'),
    ('layout.n', None, "dtype='uint8'"),
    ('layout.n', 70000, r"layout.fields\[0\] is 'ids' of uint8"),
    ('layout.axis', 5, 'layout.axis is 5: the outputs have 2 dimensions'),
    ('layout.axis', 0, 'topk=3 along axis 0'),
    ('layout.tail', 'x', "layout.tail is 'x': it must be 'mean' or"),
    ('layout.tail', 'zero', r"layout.fields\[3\] is 'rest' .* it must be 'feats:layer'"),
    ('layout.full', [4, 4], 'this is only for maps'),
    ('layout.full', [1, True], r'layout.full\[1\] is True'),
    ('layout', None, 'layout is None: it must be an object'),
    ('layout.x', 1, "layout has an entry 'x'"),
    ('views', 10**12, 'views is 1000000000000'),
    ('views', -1, 'views is -1'),
    ('views', 60000, r'shards has \d+ entries'),
    ('views', True, 'views is True'),
    ('batch_size', 0, 'batch_size is 0'),
    ('batch_size', 3, 'it must be a multiple of batch_size, 3'),
    ('batch_size', 10**9, 'batch_size is'),
    ('seed', 1.5, 'seed is 1.5'),
    ('seed', 10**400, 'seed is 1000'),
    ('vocab', 'abc', "vocab is 'abc': it must be a list"),
    ('vocab', deep(50), 'nested more than 20 levels'),
    ('teacher', [], 'teacher is'),
    ('teacher.members', deep(500), 'nested more than 20'),
    ('teacher.name', '\ud800', 'surrogates'),
    ('data.root', 3, 'data.root is 3'),
    ('transforms', None, 'transforms is None'),
    ('versions', 'new', 'versions is'),
    ('samples', None, 'samples is None'),
    ('samples.0.row', N, r'samples\[0\].row is 26'),
    ('samples.0.view', 2, r'samples\[0\].view is 2'),
    ('samples.0.digest', None, 'digest is None'),
    ('samples.0.after', [[1.0, 2.0], [3.0]], r'after\[0\] has 2 entries: it must have 3'),
    ('samples.0.after', [['a', 'b', 'c']], r"after\[0\]\[0\] is 'a': it must be a number"),
    ('samples.0', {}, r'samples\[0\] has no row, view, digest'),
    ('complete', 1, 'complete is 1: it must be true or false'),
    ('complete', False, 'shards has 9 entries: it must have 0'),
    ('extra', 1, "the file has an entry 'extra': must be one of count, views"),
]


def changed(m, path, value):
    m = copy.deepcopy(m)
    *way, last = [int(k) if k.isdigit() else k for k in path.split('.')]
    o = m
    for k in way:
        o = o[k]
    o[last] = value
    return m


@contextmanager
def calls_below(most, what):
    "Fail at the call that is one too many: a limit of the work to do, which is the same on every machine"
    n = 0

    def count(frame, event, arg):
        nonlocal n
        n += event in ('call', 'c_call')
        assert n < most, f'{what}: {most} calls'

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_every_entry_is_checked_and_named_at_once(tmp_path):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    assert [f['name'] for f in m['layout']['fields']] == [
        'ids',
        'values',
        'scale:values',
        'rest',
        'feats:layer',
        'scale:feats:layer',
    ]
    for path, value, match in CRAFTED:
        write_manifest(tmp_path, changed(m, path, value))
        with (
            pytest.raises(DistillError, match=f'manifest.json is damaged: .*(?:{match})'),
            calls_below(5000, path),
        ):
            TeacherCache(tmp_path)
        with pytest.raises(DistillError):
            write(tmp_path)


# plausible values: each of them is allowed
PLAUSIBLE = [
    ('seed', 1),
    ('transforms.crop', '25'),
    ('vocab.2', 'd'),
    ('teacher.weights', 'v'),
    ('samples.0.row', 1),
    ('samples.0.digest', '1' * 32),
    ('shards.2.checksum', '0' * 32),
    ('layout.n', 7),
    ('data.root', 'elsewhere'),
    ('versions.torch', '1.0'),
    ('doubt', 'It guesses.'),
]


def test_a_plausible_value_that_was_changed_by_hand_is_noticed(tmp_path):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    assert signed(m) == m
    for path, value in PLAUSIBLE:
        (tmp_path / 'manifest.json').write_text(json.dumps(changed(m, path, value), indent=1))
        for act in (lambda: TeacherCache(tmp_path), lambda: write(tmp_path)):
            with pytest.raises(
                DistillError,
                match='manifest.json is damaged: its entries do not match its checksum, so it was '
                r'changed after it was written. Restore the file, or write the cache again \(force=True\)',
            ):
                act()
    with pytest.warns(match='do not match its checksum.* The cache is overwritten'):
        assert write(tmp_path, force=True).check()
    assert json.loads((tmp_path / 'manifest.json').read_text()) == m


@pytest.mark.parametrize('value', [None, '', 0, 'x' * 32])
def test_a_checksum_that_is_not_one_is_refused(tmp_path, value):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    (tmp_path / 'manifest.json').write_text(json.dumps({**m, 'checksum': value}))
    with pytest.raises(DistillError, match='do not match its checksum'):
        TeacherCache(tmp_path)


def test_a_manifest_may_be_indented_differently(tmp_path):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    (tmp_path / 'manifest.json').write_text(json.dumps(m, indent=4) + '\n')
    assert TeacherCache(tmp_path).check()


def test_a_manifest_without_a_checksum_is_refused(tmp_path):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    del m['checksum']
    (tmp_path / 'manifest.json').write_text(json.dumps(m))
    with pytest.raises(DistillError, match='do not match its checksum'):
        TeacherCache(tmp_path)


@pytest.mark.parametrize('value', [True, None, 24, ['24'], {'size': 24}])
def test_a_transform_that_is_not_described_by_a_string_is_named(tmp_path, value):
    write(tmp_path)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    write_manifest(tmp_path, changed(m, 'transforms.crop', value))
    with pytest.raises(DistillError, match='transform crop: .* in the cache, 24 now'):
        write(tmp_path)


def test_maps_that_are_stored_smaller_are_checked_too(tmp_path):
    maps = source()

    def run(tasks, bs):
        for i in range(0, len(tasks), bs):
            yield Outputs(torch.zeros(len(tasks[i : i + bs]), 2, 8, 8))

    maps.run = run
    cache = write(tmp_path, source=maps, wish=Store(size=(4, 2)))
    assert cache.outputs([3]).logits.shape == (1, 2, 8, 8)
    m = json.loads((tmp_path / 'manifest.json').read_text())
    for value, match in [
        ([10**6, 10**6], r'Outputs of shape \(2, 1000000, 1000000\) are too large'),
        ([3, 8], r'layout.fields\[0\] is .*it must be'),
        ([8], 'layout.full has 1 entries'),
        (8, 'layout.full is 8'),
        ([8, 0], r'layout.full\[1\] is 0'),
    ]:
        write_manifest(tmp_path, changed(m, 'layout.full', value))
        with pytest.raises(DistillError, match=f'is damaged: .*{match}'):
            TeacherCache(tmp_path)


@pytest.mark.parametrize(
    'text,match',
    [
        (b'', 'Expecting value'),
        (b'{"format"', 'is damaged'),
        (b'\xff\xfe\x00', 'is damaged'),
        (b'[' * 10**5, 'recursion'),
        (b'{"a":' * 10**4, 'recursion'),
        (b'9' * 5000, 'is damaged'),
        (b'null', 'does not belong to a fastdistill cache'),
        (b'[]', 'does not belong to a fastdistill cache'),
        (b'{"format": "fastdistill-cache"}', 'a cache of version None'),
        (b'{"format": "fastdistill-cache", "version": true}', 'a cache of version True'),
        (b'{"format": "fastdistill-cache", "version": 1}', 'the file has no count, views'),
    ],
    ids=lambda o: None if isinstance(o, bytes) else o,
)
def test_a_manifest_that_is_no_json_says_so(tmp_path, text, match):
    (tmp_path / 'manifest.json').write_bytes(text)
    with pytest.raises(DistillError, match=match):
        TeacherCache(tmp_path)


def test_a_huge_manifest_is_not_read(tmp_path):
    with open(tmp_path / 'manifest.json', 'wb') as f:
        f.truncate(2**40)  # sparse: takes no room
    with pytest.raises(DistillError, match='manifest.json has 1099511627776 bytes'):
        TeacherCache(tmp_path)
    with pytest.raises(DistillError, match='manifest.json has'):
        write(tmp_path)


ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    12,
    255,
    2**31,
    10**12,
    -(10**30),
    0.5,
    1e308,
    float('nan'),
    float('inf'),
    '',
    '12',
    'logits',
    'view000/000000.bin',
    '../../victim.txt',
    '/etc/passwd',
    [],
    [1],
    [10**12],
    [[]],
    {},
    {'a': 1},
    {'name': '../x', 'bytes': 1, 'checksum': ''},
]


def places(o):
    "Every (container, key) in a nested object"
    for k in list(o) if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
        yield o, k
        yield from places(o[k])


def mutate(m, g):
    """One to three random changes: another value, one from elsewhere, one less, one more, one twice; or of the text's bytes

    The checksum is right afterwards, so that each entry is tested, except if bytes changed
    """
    m = copy.deepcopy(m)
    for _ in range(g.choice([1, 1, 2, 3])):
        everywhere = list(places(m))
        if not everywhere:
            break
        o, k = g.choice(everywhere)
        way = g.choice(['value', 'number', 'elsewhere', 'less', 'more', 'twice'])
        if way == 'value':
            o[k] = g.choice(ODD)
        if way == 'number' and type(o[k]) is int:
            o[k] += g.choice([-4, -1, 1, 4, 100])
        if way == 'elsewhere':
            p, q = g.choice(everywhere)
            o[k] = copy.deepcopy(p[q])
        if way == 'less':
            del o[k]
        if way == 'more' and isinstance(o, dict):
            o[g.choice(['x', 'at', 'n', '__class__'])] = g.choice(ODD)
        if way == 'twice' and isinstance(o, list):
            o.append(copy.deepcopy(o[k]))
    text = bytearray(json.dumps(signed(m)).encode())
    for _ in range(g.choice([0, 0, 0, 1, 5])):
        text[g.randrange(len(text))] = g.randrange(32, 127)
    return bytes(text)


def test_thousands_of_mutated_manifests_are_refused_or_read_right(tmp_path):
    g, folder = random.Random(0), tmp_path / 'a' / 'b' / 'cache'
    cache = write(folder)
    want, decoded, layout = (
        all_rows(cache),
        cache.outputs(np.arange(N)).logits.dense(),
        cache.manifest.layout,
    )
    m = json.loads((folder / 'manifest.json').read_text())
    (tmp_path / 'victim.txt').write_text('precious')
    before, refused, right = tree(tmp_path), 0, 0
    for _ in range(4000):
        (folder / 'manifest.json').unlink()  # ext4 waits for the disk when a file is truncated
        (folder / 'manifest.json').write_bytes(mutate(m, g))
        try:
            got = TeacherCache(folder)
        except DistillError as e:
            assert (
                'manifest.json' in str(e)
                or 'Damaged files' in str(e)
                or 'is a cache of version' in str(e)
                or 'not finished' in str(e)
            )
            refused += 1
            continue
        try:
            rows, out = all_rows(got), got.outputs(np.arange(N)).logits.dense(torch.zeros(N, 6))
        except DistillError:
            refused += 1
        else:
            assert len(rows) == len(want) and all(map(np.array_equal, rows, want))
            if got.manifest.layout == layout:
                assert torch.equal(out, decoded)
            right += 1
    assert refused > 3000 and right > 100
    (folder / 'manifest.json').write_text(json.dumps(m))
    after = tree(tmp_path)
    assert {p: b for p, b in after.items() if p.name != 'manifest.json'} == {
        p: b for p, b in before.items() if p.name != 'manifest.json'
    }


def test_the_writer_makes_of_mutated_manifests_a_right_cache_or_none(tmp_path):
    g, whole, folder, outside = (
        random.Random(1),
        tmp_path / 'whole',
        tmp_path / 'a' / 'b' / 'cache',
        tmp_path / 'victim.txt',
    )
    want = all_rows(write(whole))
    outside.write_text('precious')
    begun = interrupted(tmp_path / 'begun')
    kept, refused, right = tree(tmp_path), 0, 0
    for i in range(300):
        base = (whole, begun)[i % 2]
        shutil.copytree(base, folder)
        (folder / 'manifest.json').write_bytes(
            mutate(json.loads((base / 'manifest.json').read_text()), g)
        )
        if not i % 3:
            damage(g.choice(sorted(folder.rglob('view*/*'))), g)
        try:
            rows = all_rows(write(folder))
        except DistillError:
            refused += 1
        else:
            assert all(map(np.array_equal, rows, want))
            right += 1
        shutil.rmtree(folder)
        assert tree(tmp_path) == kept
    assert refused > 100 and right > 20


def interrupted(path):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done > 30:
            raise Stop

    with pytest.raises(Stop):
        write(path, progress=stop)
    return path


def damage(p, g):
    data = bytearray(p.read_bytes())
    data[g.randrange(len(data))] ^= 1 << g.randrange(8)
    p.write_bytes(data)


# links and folders that can't be written


def test_the_writer_follows_no_link_out_of_its_folder(tmp_path):
    write(tmp_path / 'c')
    other = tmp_path / 'other'
    shutil.copytree(tmp_path / 'c' / 'view001', other)
    shutil.rmtree(tmp_path / 'c' / 'view001')
    (tmp_path / 'c' / 'view001').symlink_to(other)
    damage(other / '000000.bin', random.Random(0))
    before = tree(other)
    with pytest.raises(
        DistillError, match='view001 is a link, but a cache is written only to real folders'
    ):
        write(tmp_path / 'c')
    with (
        pytest.warns(match='The cache is overwritten'),
        pytest.raises(DistillError, match='view001 is a link'),
    ):
        write(tmp_path / 'c', force=True, source=source(vocab=None))
    assert tree(other) == before
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'valid').symlink_to(other)
    with pytest.raises(DistillError, match='valid is a link'):
        write(open_folder(tmp_path / 'd').sub('valid'))
    assert tree(other) == before


def test_links_to_files_are_read_and_replaced_by_files(tmp_path):
    want = all_rows(write(tmp_path / 'c'))
    shard, elsewhere, lock = (
        tmp_path / 'c' / 'view000' / '000001.bin',
        tmp_path / 'blob',
        tmp_path / 'c' / '.lock',
    )
    shutil.move(shard, elsewhere)
    shard.symlink_to(elsewhere)
    assert all(
        map(np.array_equal, all_rows(TeacherCache(tmp_path / 'c').check()), want)
    )  # as download tools store files
    damage(elsewhere, random.Random(0))
    before = elsewhere.read_bytes()
    assert all(map(np.array_equal, all_rows(write(tmp_path / 'c')), want))
    assert not shard.is_symlink() and elsewhere.read_bytes() == before
    lock.unlink()
    lock.symlink_to(tmp_path / 'created')
    with pytest.raises(DistillError, match="Can't write to .*/c"):
        write(tmp_path / 'c')
    assert not (tmp_path / 'created').exists()


def test_the_cache_itself_may_be_a_link(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'c').symlink_to(tmp_path / 'disk')
    assert write(tmp_path / 'c').check() and (tmp_path / 'disk' / 'manifest.json').is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_folders_without_permission_are_named(tmp_path):
    (tmp_path / 'no').mkdir(mode=0o500)
    with pytest.raises(DistillError, match="Can't write to .*/no/c: Permission denied"):
        write(tmp_path / 'no' / 'c')
    write(tmp_path / 'c')
    (tmp_path / 'c').chmod(0o500)
    assert write(tmp_path / 'c').check()  # nothing to write
    (tmp_path / 'c' / 'manifest.json').chmod(0)
    with pytest.raises(DistillError, match="Can't read manifest.json in .*/c: Permission denied"):
        TeacherCache(tmp_path / 'c')


def test_places_where_nothing_can_be_written_are_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(DistillError, match="Can't write to .*/file/c: Not a directory"):
        write(tmp_path / 'file' / 'c')
    with pytest.raises(DistillError, match="Can't .*: File name too long"):
        write(tmp_path / ('x' * 300))
    with pytest.raises(DistillError, match="Can't .*null (byte|character)"):
        write(f'{tmp_path}/a\0b')
    with pytest.raises(DistillError, match='nobody9'):
        write('~nobody9/c')
    (tmp_path / 'd' / 'manifest.json').mkdir(parents=True)
    with pytest.raises(DistillError, match="Can't read manifest.json in .*/d: Is a directory"):
        TeacherCache(tmp_path / 'd')
    with pytest.raises(DistillError, match='Protocol not known: nowhere'):
        write('nowhere://bucket/c')


# pipes and devices


def pipe(path):
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize('name', ['manifest.json', 'keys.bin', 'view000/000001.bin'])
def test_a_pipe_in_a_cache_is_named_instead_of_waiting_for_it(tmp_path, name):
    write(tmp_path)
    pipe(tmp_path / name)
    for act in (lambda: TeacherCache(tmp_path).check(), lambda: write(tmp_path)):
        with pytest.raises(
            DistillError, match=f'{name}. is a pipe, a socket or a device, but a regul'
        ):
            act()


@pytest.mark.parametrize('ending', ['jsonl', 'npy'])
@pytest.mark.parametrize('in_folder', [False, True])
def test_a_pipe_with_outputs_is_named_instead_of_waiting_for_it(tmp_path, ending, in_folder):
    file = pipe(tmp_path / 'rows' / f'a.{ending}')
    with pytest.raises(DistillError, match=f'a.{ending}. is a pipe, a socket or a device'):
        cache_from(file.parent if in_folder else file, tmp_path / 'c', n=3)


def test_a_pipe_with_answers_is_named_instead_of_waiting_for_it(tmp_path):
    file = pipe(tmp_path / 'a.jsonl')
    with pytest.raises(DistillError, match='a.jsonl. is a pipe, a socket or a device'):
        ask_server('http://localhost:1', {'a': 'text'}, file, body={})


@pytest.mark.parametrize('ending', ['pt', 'pt2', 'onnx', 'joblib', 'pkl'])
def test_a_pipe_as_a_teacher_is_named_instead_of_waiting_for_it(tmp_path, ending):
    with pytest.raises(DistillError, match='is a pipe, a socket or a device'):
        Teacher(pipe(tmp_path / f'a.{ending}'))
    (tmp_path / f'b.{ending}').symlink_to('/dev/zero')
    with pytest.raises(DistillError, match='is a pipe, a socket or a device'):
        Teacher(tmp_path / f'b.{ending}')
