"A packed cache: one file or a folder with a card, and back."

import errno, json, random, re, stat, tracemalloc, zipfile
import numpy as np
import pytest, torch
from torch.utils.data import TensorDataset
from fastdistill import DistillError, Teacher
from fastdistill.cache import TeacherCache, cache_dataset, pack_cache, unpack_cache
from fastdistill.cache.file_store import Folder
from fastdistill.cli import app
from manifests import signed, write_manifest
from typer.testing import CliRunner

g = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(12, 5, generator=g), torch.arange(12) % 3)


class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn_like(x), y


@pytest.fixture
def cache(tmp_path):
    teacher = Teacher(torch.nn.Linear(5, 3), name='big | one')
    stored = cache_dataset(teacher, Noisy(*DATA.tensors), tmp_path / 'c', views=2, run=dict(bs=4))
    cache_dataset(teacher, DATA, tmp_path / 'c' / 'valid', views=0, run=dict(bs=4))
    return stored


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob('*')
        if p.is_file() and p.name not in ('.lock', 'README.md')
    }


def rows(c):
    return c.outputs(np.arange(12), np.zeros(12, int)).logits


@pytest.mark.parametrize('out', ['a.zip', 'folder'])
def test_what_comes_back_is_what_was_packed(out, cache, tmp_path):
    (tmp_path / 'c' / 'notes.txt').write_text('mine')
    packed = pack_cache(cache, tmp_path / out)
    got = TeacherCache(packed) if out == 'folder' else unpack_cache(packed, tmp_path / 'back')
    where = tmp_path / ('folder' if out == 'folder' else 'back')
    mine = content(tmp_path / 'c')
    del mine['notes.txt']
    assert (
        content(where) == mine
        and 'valid/manifest.json' in mine
        and torch.equal(rows(got), rows(cache))
    )
    assert (where / 'README.md').is_file()


def test_a_folder_that_could_not_be_filled_is_empty_again(cache, tmp_path, monkeypatch):
    "So the same call can be repeated, for example after a full disk"
    write, names = Folder.write, []

    def full(self, name, *args):
        names.append(name)
        if len(names) == 4:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(self, name, *args)

    with monkeypatch.context() as m, pytest.raises(OSError, match='No space left'):
        m.setattr(Folder, 'write', full)
        pack_cache(cache, tmp_path / 'out')
    assert not content(tmp_path / 'out') and not (tmp_path / 'out' / 'README.md').exists()
    got = TeacherCache(pack_cache(cache, tmp_path / 'out'))
    assert torch.equal(rows(got), rows(cache))


def test_the_card_names_teacher_data_and_licenses(cache, tmp_path):
    pack_cache(
        tmp_path / 'c',
        tmp_path / 'out',
        title='Numbers',
        data='twelve rows',
        note='For tests.',
        license='cc-by-4.0',
        data_license='mit',
    )
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert (
        text.startswith('---\nlicense: cc-by-4.0\ntags:\n')
        and '# Numbers' in text
        and 'For tests.' in text
    )
    cells = dict(
        line.strip('| ').split(' | ', 1)
        for line in text.splitlines()
        if line.startswith('| ') and ' | ' in line[2:-2]
    )
    assert (
        cells['data'] == 'twelve rows'
        and cells['license of the data'] == 'mit'
        and cells['license of the teacher'] == 'not stated'
    )
    assert (
        cells['samples'] == '12'
        and cells['views'] == '2 of each, augmented'
        and 'logits float16 3' in cells['a row']
    )
    assert cells['teacher'].startswith('name big \\| one') and cells['validation set'] == 'included'


def test_the_same_cache_makes_the_same_file_without_compression(cache, tmp_path):
    a, b = pack_cache(cache, tmp_path / 'a.zip'), pack_cache(cache, tmp_path / 'b.zip')
    assert a.read_bytes() == b.read_bytes()
    with zipfile.ZipFile(a) as z:
        assert {o.compress_type for o in z.infolist()} == {zipfile.ZIP_STORED}


def test_damage_is_named_before_packing_and_after_unpacking(cache, tmp_path):
    packed = pack_cache(cache, tmp_path / 'a.zip')
    shard = tmp_path / 'c' / 'view001' / '000000.bin'
    data = bytearray(shard.read_bytes())
    broken = packed.read_bytes().replace(bytes(data), bytes([data[0] ^ 1]) + bytes(data[1:]))
    (tmp_path / 'b.zip').write_bytes(broken)
    with pytest.raises(
        DistillError,
        match="can't be read as a packed cache: Bad CRC-32|differs from what was written",
    ):
        unpack_cache(tmp_path / 'b.zip', tmp_path / 'b')
    assert not [*(tmp_path / 'b').iterdir()]
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DistillError, match='view001/000000.bin differs from what was written'):
        pack_cache(tmp_path / 'c', tmp_path / 'c.zip')
    assert not (tmp_path / 'c.zip').exists()


def test_a_changed_row_with_a_right_zip_is_found_by_its_checksum(cache, tmp_path):
    packed = pack_cache(cache, tmp_path / 'a.zip')
    with zipfile.ZipFile(packed) as z, zipfile.ZipFile(tmp_path / 'b.zip', 'w') as to:
        for n in z.namelist():
            to.writestr(n, z.read(n)[::-1] if n == 'view000/000000.bin' else z.read(n))
    with pytest.raises(DistillError, match='view000/000000.bin differs from what was written'):
        unpack_cache(tmp_path / 'b.zip', tmp_path / 'b')
    assert not [*(tmp_path / 'b').iterdir()]


@pytest.mark.parametrize(
    'name',
    [
        '../evil.txt',
        '/etc/passwd',
        'view000/../../x.bin',
        'run.py',
        'view999/000000.bin',
        'view000/000001.bin',
        'valid/view001/000000.bin',
        'files.bin.tmp',
    ],
)
def test_a_file_that_the_manifest_does_not_list_is_refused(name, cache, tmp_path):
    with zipfile.ZipFile(pack_cache(cache, tmp_path / 'a.zip'), 'a') as z:
        z.writestr(name, 'x')
    with pytest.raises(
        DistillError,
        match=f"is not a packed cache: it contains '{name}', which its manifest does not list",
    ):
        unpack_cache(tmp_path / 'a.zip', tmp_path / 'to')
    assert not (tmp_path / 'to').exists()


def test_nothing_is_overwritten(cache, tmp_path):
    packed = pack_cache(cache, tmp_path / 'a.zip')
    with pytest.raises(DistillError, match='There is already a file .*a.zip'):
        pack_cache(cache, packed)
    assert pack_cache(cache, packed, force=True) == packed
    with pytest.raises(DistillError, match='is not empty: choose a different folder'):
        unpack_cache(packed, tmp_path / 'c')
    with pytest.raises(DistillError, match='is not empty: choose a different folder'):
        pack_cache(cache, tmp_path / 'c')
    (tmp_path / 'no.zip').write_text('no zip')
    with pytest.raises(DistillError, match="can't be read as a packed cache"):
        unpack_cache(tmp_path / 'no.zip', tmp_path / 'x')
    with zipfile.ZipFile(tmp_path / 'e.zip', 'w'):
        pass
    with pytest.raises(DistillError, match='it has no manifest.json'):
        unpack_cache(tmp_path / 'e.zip', tmp_path / 'x')
    with pytest.raises(DistillError, match='There is no file'):
        unpack_cache(tmp_path / 'nothing.zip', tmp_path / 'x')
    with pytest.raises(DistillError, match='There is no cache at'):
        pack_cache(tmp_path / 'nowhere', tmp_path / 'n.zip')


def test_the_commands(cache, tmp_path):
    call = lambda *args: CliRunner().invoke(app, ['cache', *map(str, args)], catch_exceptions=False)
    r = call('pack', tmp_path / 'c', tmp_path / 'a.zip', '--license', 'mit', '--data', 'rows')
    assert r.exit_code == 0 and 'a.zip' in r.output.replace('\n', '')
    r = call('unpack', tmp_path / 'a.zip', tmp_path / 'back')
    assert r.exit_code == 0 and '12 samples, 2 views' in ' '.join(r.output.split())
    assert 'license: mit' in (tmp_path / 'back' / 'README.md').read_text()
    assert call('info', tmp_path / 'back', '--check').exit_code == 0


@pytest.mark.parametrize(
    'change',
    [
        dict(teacher=dict(name='[/x] [bold]big')),
        dict(transforms=dict(crop=5)),
        dict(vocab=[{'a': 1}, 'b', 'c']),
        dict(vocab=['\x1b[31mred', 'b', 'c']),
        dict(versions={'[/x]': '\x1b[2J'}),
    ],
)
def test_texts_of_a_strange_manifest_are_shown_as_they_are(change, cache, tmp_path):
    file = tmp_path / 'c' / 'manifest.json'
    write_manifest(tmp_path / 'c', json.loads(file.read_text()) | change)
    call = lambda *args: CliRunner().invoke(app, ['cache', *map(str, args)], catch_exceptions=False)
    shown = call('info', tmp_path / 'c')
    assert shown.exit_code == 0
    assert '\x1b' not in shown.output
    assert call('pack', tmp_path / 'c', tmp_path / 'a.zip').exit_code == 0
    with zipfile.ZipFile(tmp_path / 'a.zip') as z:
        assert b'\x1b' not in z.read('README.md')


def test_the_brackets_of_a_name_are_shown(cache, tmp_path):
    (tmp_path / 'c').rename(tmp_path / 'a[b]')
    shown = CliRunner().invoke(
        app, ['cache', 'info', str(tmp_path / 'a[b]')], catch_exceptions=False
    )
    assert 'a[b]' in shown.output.replace('\n', '')


def test_a_place_where_no_cache_can_be_packed_is_named(cache, tmp_path):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(DistillError, match='file is a file, but a cache is a folder'):
        pack_cache(cache, tmp_path / 'file')
    packed = pack_cache(cache, tmp_path / 'a.zip')
    for use in (
        lambda: pack_cache(cache, 'memory://a.zip'),
        lambda: unpack_cache(packed, 'memory://a'),
        lambda: unpack_cache('memory://a.zip', tmp_path / 'b'),
    ):
        with pytest.raises(DistillError, match='memory://a.* is a URL: pass a local path'):
            use()


# archives that someone else made


def rewritten(packed, change):
    "The same archive; `change(entry, data)` returns (entry, data), or None to leave the file out"
    to = packed.with_name('changed.zip')
    with zipfile.ZipFile(packed) as z, zipfile.ZipFile(to, 'w') as out:
        for o in z.infolist():
            new = zipfile.ZipInfo(o.filename)
            new.external_attr = o.external_attr
            if (got := change(new, z.read(o))) is not None:
                out.writestr(*got)
    return to


def refused(path, says, to):
    with pytest.raises(DistillError, match=says) as caught:
        unpack_cache(path, to)
    assert path.name in str(caught.value)
    assert not to.exists()


SHARD = 'view001/000000.bin'


def test_a_file_of_another_size_than_in_the_manifest_is_refused_before_anything_is_written(
    cache, tmp_path
):
    longer = rewritten(
        pack_cache(cache, tmp_path / 'a.zip'),
        lambda o, data: (o, data + bytes(2**20) * (o.filename == SHARD)),
    )
    refused(longer, f'{SHARD} has 1048648 bytes, but 72 in the manifest', tmp_path / 'to')


def test_a_missing_file_is_named(cache, tmp_path):
    refused(
        rewritten(
            pack_cache(cache, tmp_path / 'a.zip'),
            lambda o, data: None if o.filename == SHARD else (o, data),
        ),
        f'it has no {SHARD}, which its manifest lists',
        tmp_path / 'to',
    )


@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(method, cache, tmp_path):
    def change(o, data):
        o.compress_type = method
        return o, data

    refused(
        rewritten(pack_cache(cache, tmp_path / 'a.zip'), change),
        rf'is compressed \(method {method}\): files of a packed cache are not compressed',
        tmp_path / 'to',
    )


def test_a_small_archive_can_not_fill_the_disk(cache, tmp_path):
    packed = pack_cache(cache, tmp_path / 'a.zip')
    with zipfile.ZipFile(packed, 'a') as z:
        o = zipfile.ZipInfo('view002/000000.bin')
        o.compress_type = zipfile.ZIP_DEFLATED
        z.writestr(o, bytes(2**25))
    assert packed.stat().st_size < 2**17
    refused(packed, "'view002/000000.bin' is compressed", tmp_path / 'to')


@pytest.mark.parametrize('mode', [stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755, stat.S_IFIFO | 0o644])
def test_a_link_or_a_folder_is_refused(mode, cache, tmp_path):
    def change(o, data):
        if o.filename == SHARD:
            o.external_attr = mode << 16
        return o, data

    refused(
        rewritten(pack_cache(cache, tmp_path / 'a.zip'), change),
        f"'{SHARD}' is a link, a folder or a device",
        tmp_path / 'to',
    )


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_a_name_that_is_there_twice_is_refused(cache, tmp_path):
    packed = pack_cache(cache, tmp_path / 'a.zip')
    with zipfile.ZipFile(packed, 'a') as z:
        z.writestr(SHARD, z.read(SHARD))
    refused(packed, f"it contains '{SHARD}' twice", tmp_path / 'to')


def with_field(packed, at, size, value):
    "The archive with another number in each entry of its directory"
    data = bytearray(packed.read_bytes())
    for m in re.finditer(b'PK\x01\x02', bytes(data)):
        data[m.start() + at : m.start() + at + size] = value.to_bytes(size, 'little')
    packed.write_bytes(data)
    return packed


@pytest.mark.parametrize(
    'at,size,value,says',
    [
        (8, 2, 1, 'is encrypted: decrypt the archive first'),
        (8, 2, 0x41, 'is encrypted'),
        (8, 2, 0x20, 'is compressed'),
        (10, 2, 99, r'is compressed \(method 99\)'),
        (34, 2, 1, 'is in a different part of a multi-part archive: join the parts first'),
        (20, 4, 5, 'is compressed'),
        (42, 4, 2**31, 'overlaps with what follows'),
        (42, 4, 0, 'overlaps with what follows'),
        (6, 2, 99, "can't be read as a packed cache: zip file version 9.9"),
    ],
)
def test_an_unusual_archive_is_refused_in_one_line(at, size, value, says, cache, tmp_path):
    refused(
        with_field(pack_cache(cache, tmp_path / 'a.zip'), at, size, value), says, tmp_path / 'to'
    )


def test_a_file_inside_another_one_is_refused_before_anything_is_written(cache, tmp_path):
    "The first 72 bytes of a shard are also the header and the content of a different file"
    packed, inner = pack_cache(cache, tmp_path / 'a.zip'), tmp_path / 'inner.zip'
    with zipfile.ZipFile(inner, 'w') as z:
        z.writestr(zipfile.ZipInfo('README.md'), b'x')
    start = inner.read_bytes()[: 30 + len('README.md') + 1]
    packed = rewritten(
        packed,
        lambda o, data: (
            None
            if o.filename == 'README.md'
            else (o, start + data[len(start) :] if o.filename == SHARD else data)
        ),
    )
    with zipfile.ZipFile(packed, 'a') as z, zipfile.ZipFile(inner) as other:
        shard, o = z.getinfo(SHARD), other.getinfo('README.md')
        o.header_offset = shard.header_offset + 30 + len(SHARD)
        z.filelist.append(o)
        z._didModify = True
    with zipfile.ZipFile(packed) as z:
        assert z.read('README.md') == b'x'
    refused(packed, f"'{SHARD}' overlaps with what follows", tmp_path / 'to')


def test_an_unfinished_cache_in_an_archive_is_refused(cache, tmp_path):
    def change(o, data):
        if o.filename != 'manifest.json':
            return o, data
        unfinished = dict(shards=[], complete=False)
        return o, json.dumps(signed(json.loads(data) | unfinished)).encode()

    refused(
        rewritten(pack_cache(cache, tmp_path / 'a.zip'), change),
        'manifest.json belongs to an unfinished cache',
        tmp_path / 'to',
    )


def test_a_damaged_archive_is_refused_by_name_or_harmless(cache, tmp_path):
    packed, rng, n = pack_cache(cache, tmp_path / 'a.zip'), random.Random(0), 0
    whole, want = packed.read_bytes(), content(tmp_path / 'c')
    for i in range(100):
        data, at = bytearray(whole), rng.randrange(len(whole))
        change = rng.randrange(4)
        if change == 0:
            del data[at:]
        elif change == 1:
            del data[at : at + rng.randrange(1, 20)]
        elif change == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            data[at] ^= 1 << rng.randrange(8)
        packed.write_bytes(data)
        try:
            unpack_cache(packed, tmp_path / str(i))
        except DistillError as e:
            assert 'a.zip' in str(e) or str(tmp_path / str(i)) in str(e)
            assert not content(tmp_path / str(i))
            n += 1
        else:
            assert content(tmp_path / str(i)) == want
    assert n > 50


def test_unpacking_needs_little_memory(tmp_path):
    x = TensorDataset(torch.zeros(32, 1), torch.zeros(32))
    cache = cache_dataset(
        Teacher(torch.nn.Linear(1, 2**18), name='t'),
        x,
        tmp_path / 'c',
        views=0,
        run=dict(bs=32),
        store=dict(dtype='float32'),
    )
    packed = pack_cache(cache, tmp_path / 'a.zip')
    assert packed.stat().st_size > 2**25
    tracemalloc.start()
    try:
        unpack_cache(packed, tmp_path / 'to')
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**23
