"A packed cache: one file or a folder with a card, and back."
import zipfile
import numpy as np
import pytest, torch
from torch.utils.data import TensorDataset
from fastdistill import DistillError, Teacher
from fastdistill.cache import TeacherCache, cache_dataset, pack_cache, unpack_cache
from fastdistill.cli import app
from typer.testing import CliRunner

g = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.randn(12, 5, generator=g), torch.arange(12) % 3)

class Noisy(TensorDataset):
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x + torch.randn_like(x),y


@pytest.fixture
def cache(tmp_path):
    teacher = Teacher(torch.nn.Linear(5, 3), name='big | one')
    stored = cache_dataset(teacher, Noisy(*DATA.tensors), tmp_path/'c', views=2, bs=4)
    cache_dataset(teacher, DATA, tmp_path/'c'/'valid', views=0, bs=4)
    return stored


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name not in ('.lock', 'README.md')}

def rows(c): return c.outputs(np.arange(12), np.zeros(12, int)).logits


@pytest.mark.parametrize('out', ['a.zip', 'folder'])
def test_what_comes_back_is_what_was_packed(out, cache, tmp_path):
    (tmp_path/'c'/'notes.txt').write_text('mine')
    packed = pack_cache(cache, tmp_path/out)
    got = TeacherCache(packed) if out == 'folder' else unpack_cache(packed, tmp_path/'back')
    where = tmp_path/('folder' if out == 'folder' else 'back')
    mine = content(tmp_path/'c')
    del mine['notes.txt']
    assert content(where) == mine and 'valid/manifest.json' in mine and torch.equal(rows(got), rows(cache))
    assert (where/'README.md').is_file()


def test_the_card_names_teacher_data_and_licenses(cache, tmp_path):
    pack_cache(tmp_path/'c', tmp_path/'out', title='Numbers', data='twelve rows', note='For tests.', license='cc-by-4.0', data_license='mit')
    text = (tmp_path/'out'/'README.md').read_text()
    assert text.startswith('---\nlicense: cc-by-4.0\ntags:\n') and '# Numbers' in text and 'For tests.' in text
    cells = dict(line.strip('| ').split(' | ', 1) for line in text.splitlines() if line.startswith('| ') and ' | ' in line[2:-2])
    assert cells['data'] == 'twelve rows' and cells['license of the data'] == 'mit' and cells['license of the teacher'] == 'not stated'
    assert cells['samples'] == '12' and cells['views'] == '2 of each, augmented' and 'logits float16 3' in cells['a row']
    assert cells['teacher'].startswith('name big \\| one') and cells['validation set'] == 'is there too'


def test_the_same_cache_makes_the_same_file_without_compression(cache, tmp_path):
    a,b = pack_cache(cache, tmp_path/'a.zip'),pack_cache(cache, tmp_path/'b.zip')
    assert a.read_bytes() == b.read_bytes()
    with zipfile.ZipFile(a) as z: assert {o.compress_type for o in z.infolist()} == {zipfile.ZIP_STORED}


def test_damage_is_named_before_packing_and_after_unpacking(cache, tmp_path):
    packed = pack_cache(cache, tmp_path/'a.zip')
    shard = tmp_path/'c'/'view001'/'000000.bin'
    data = bytearray(shard.read_bytes())
    broken = packed.read_bytes().replace(bytes(data), bytes([data[0] ^ 1]) + bytes(data[1:]))
    (tmp_path/'b.zip').write_bytes(broken)
    with pytest.raises(DistillError, match="can't be read as a packed cache: Bad CRC-32|other bytes"): unpack_cache(tmp_path/'b.zip', tmp_path/'b')
    assert not content(tmp_path/'b')
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DistillError, match='view001/000000.bin has other bytes'): pack_cache(tmp_path/'c', tmp_path/'c.zip')
    assert not (tmp_path/'c.zip').exists()


def test_a_changed_row_with_a_right_zip_is_found_by_its_checksum(cache, tmp_path):
    packed = pack_cache(cache, tmp_path/'a.zip')
    with zipfile.ZipFile(packed) as z, zipfile.ZipFile(tmp_path/'b.zip', 'w') as to:
        for n in z.namelist(): to.writestr(n, z.read(n)[::-1] if n == 'view000/000000.bin' else z.read(n))
    with pytest.raises(DistillError, match='view000/000000.bin has other bytes'): unpack_cache(tmp_path/'b.zip', tmp_path/'b')
    assert not content(tmp_path/'b')


@pytest.mark.parametrize('name', ['../evil.txt', '/etc/passwd', 'view000/../../x.bin', 'run.py'])
def test_a_file_with_other_names_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(name, 'x'); z.writestr('manifest.json', '{}')
    with pytest.raises(DistillError, match='is no packed cache: it holds'): unpack_cache(tmp_path/'a.zip', tmp_path/'to')
    assert not (tmp_path/'to').exists()


def test_nothing_is_overwritten(cache, tmp_path):
    packed = pack_cache(cache, tmp_path/'a.zip')
    with pytest.raises(DistillError, match='There is a file .*a.zip already'): pack_cache(cache, packed)
    assert pack_cache(cache, packed, force=True) == packed
    with pytest.raises(DistillError, match='is not empty: choose another folder'): unpack_cache(packed, tmp_path/'c')
    with pytest.raises(DistillError, match='is not empty: choose another folder'): pack_cache(cache, tmp_path/'c')
    (tmp_path/'no.zip').write_text('no zip')
    with pytest.raises(DistillError, match="can't be read as a packed cache"): unpack_cache(tmp_path/'no.zip', tmp_path/'x')
    with zipfile.ZipFile(tmp_path/'e.zip', 'w'): pass
    with pytest.raises(DistillError, match='it has no manifest.json'): unpack_cache(tmp_path/'e.zip', tmp_path/'x')
    with pytest.raises(DistillError, match='There is no file'): unpack_cache(tmp_path/'nothing.zip', tmp_path/'x')
    with pytest.raises(DistillError, match='There is no cache at'): pack_cache(tmp_path/'nowhere', tmp_path/'n.zip')


def test_the_commands(cache, tmp_path):
    call = lambda *args: CliRunner().invoke(app, ['cache', *map(str, args)], catch_exceptions=False)
    r = call('pack', tmp_path/'c', tmp_path/'a.zip', '--license', 'mit', '--data', 'rows')
    assert r.exit_code == 0 and 'a.zip' in r.output.replace('\n', '')
    r = call('unpack', tmp_path/'a.zip', tmp_path/'back')
    assert r.exit_code == 0 and '12 samples, 2 views' in ' '.join(r.output.split())
    assert 'license: mit' in (tmp_path/'back'/'README.md').read_text()
    assert call('info', tmp_path/'back', '--check').exit_code == 0
