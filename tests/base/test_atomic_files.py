"Files are written either completely or not at all."

import os, resource
from pathlib import Path
import pytest, torch
from fastdistill import DistillError
from fastdistill.base.atomic_files import new_file, write_atomically


def test_whoever_reads_a_file_that_is_replaced_reads_the_whole_old_one(tmp_path):
    path = tmp_path / 'a.txt'
    write_atomically(path, 'old ' * 100_000)
    with open(path) as reader:
        first = reader.read(4)
        write_atomically(path, 'new')
        rest = reader.read()
    assert first + rest == 'old ' * 100_000
    assert path.read_text() == 'new'
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_the_whole_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, synced = tmp_path / 'a.txt', []
    write_atomically(path, 'old')

    def fsync(file):
        content = Path(f'/proc/self/fd/{file}').read_text() if os.path.exists('/proc') else 'new'
        synced.append((content, path.read_text()))

    monkeypatch.setattr(os, 'fsync', fsync)
    write_atomically(path, 'new')
    assert synced == [('new', 'old')]


def test_a_full_disk_is_named_where_pytorch_opens_the_file(tmp_path):
    "As in Learner.export. The error of PyTorch has no number"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(DistillError, match='No space for .*a.pt'):
            with new_file(tmp_path / 'a.pt') as tmp:
                torch.save(torch.zeros(9_000), tmp)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]
