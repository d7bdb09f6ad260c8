"""Detect changed sample files with the record `files.bin`.

The record contains the size, modification time and content hash of each sample's file, or of all of
its files together. A file is read again only if its modification time changed.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import numpy as np

from ..base.outputs import DistillError
from .digests import checksum
from .file_store import Folder
from .keys import name_of, names_of_samples

NO_FILE = -1  # size recorded for a file that does not exist


def files_of(items: Any) -> list | None:
    """Return the file path of each sample, or None if samples are not files.

    Args:
        items: Paths, or tuples whose first element is a path.
    """
    paths = [name_of(o) for o in items]
    if not paths or not all(isinstance(o, (str, PurePath)) for o in paths):
        return None
    return paths if os.path.isfile(paths[0]) else None


def dataset_files(dataset: Any) -> list | None:
    """Return the file path of each sample in a plain PyTorch dataset, or None if samples are not
    files.

    Args:
        dataset: Map-style dataset.
    """
    try:
        names = names_of_samples(dataset)
    except DistillError:
        return None  # the samples of this dataset have no known names
    return files_of(names)


def record_files(paths: Sequence) -> np.ndarray:
    """Return the record of the files of all samples, (N, 3) int64.

    The columns are the size, the modification time in nanoseconds, and a 64-bit hash of the
    content.

    Args:
        paths: Path of each sample, or a tuple of paths for samples with several files.
    """
    return np.concatenate([in_parallel(stat_of, paths, 2), in_parallel(content_of, paths, 1)], 1)


def newer_record(record: np.ndarray, paths: Sequence) -> tuple:
    """Compare files with their record.

    A file is read only if its modification time changed and its size did not.

    Args:
        record: Result of `record_files` when the cache was written, (N, 3).
        paths: Current paths of the same files, as in `record_files`.

    Returns:
        (indices of files whose content changed, record with the current modification times).
    """
    now, new = in_parallel(stat_of, paths, 2), record.copy()
    changed = now[:, 0] != record[:, 0]
    new[:, 1] = now[:, 1]
    touched = np.flatnonzero(~changed & (now[:, 1] != record[:, 1]))
    content = in_parallel(content_of, [paths[i] for i in touched.tolist()], 1)
    changed[touched] = content[:, 0] != record[touched, 2]
    return np.flatnonzero(changed), new


def stat_of(sample: Any) -> tuple[int, int]:
    try:
        stats = [os.stat(p) for p in paths_of(sample)]
    except OSError:
        return NO_FILE, 0
    times = sum(i * s.st_mtime_ns for i, s in enumerate(stats, 1)) % 2**63
    return sum(s.st_size for s in stats), times  # `times` changes if two files change places


def content_of(sample: Any) -> tuple[int]:
    h = hashlib.blake2b(digest_size=8)
    try:
        for path in paths_of(sample):
            with open(path, 'rb') as f:
                while part := f.read(2**20):
                    h.update(part)
    except OSError:
        return (0,)
    return (int.from_bytes(h.digest(), 'little', signed=True),)


def paths_of(sample: Any) -> tuple:
    return sample if isinstance(sample, tuple) else (sample,)


def in_parallel(fn: Callable, paths: Sequence, n: int, size: int = 256) -> np.ndarray:
    """Call `fn` for each path in several threads and return the results, (N, n) int64."""
    parts = [paths[i : i + size] for i in range(0, len(paths), size)]
    with ThreadPoolExecutor(8) as pool:
        rows = [r for rs in pool.map(lambda ps: [fn(p) for p in ps], parts) for r in rs]
    return np.array(rows, np.int64).reshape(-1, n)


def write_record(folder: Folder, record: np.ndarray) -> None:
    """Write the record as little-endian numbers, followed by a checksum."""
    data = record.astype('<i8').tobytes()
    folder.write('files.bin', data + bytes.fromhex(checksum(data)))


def record_size(n: int) -> int:
    return 24 * n + 16


def read_record(folder: Folder, n: int) -> np.ndarray | None:
    """Read the record, (N, 3).

    The result is None if there is no record, because samples are not files or the cache was written
    by an older version.

    Args:
        folder: Folder of the cache.
        n: Number of samples.
    """
    if (size := folder.size('files.bin')) is None:
        return None
    data = folder.read('files.bin') if size == record_size(n) else b''
    if not data or bytes.fromhex(checksum(data[:-16])) != data[-16:]:
        raise DistillError(
            f"files.bin in {folder} is damaged, so changed files can't be detected. Write the cache again "
            '(force=True), or remove files.bin to use the cache without this check.'
        )
    return np.frombuffer(data[:-16], '<i8').reshape(n, 3).astype(np.int64)


def changed_files(
    folder: Folder, n: int, files: Sequence | None, at: Any = None, update: bool = False
) -> list[str]:
    """Return the paths of sample files whose content changed since the cache was written.

    Args:
        folder: Folder of the cache.
        n: Number of samples of the cache.
        files: File path of each sample, or a tuple of paths, (M,). None if samples are not files.
        at: Position in the cache of each sample, (M,). If None, the files are in the order of the
            cache.
        update: If True and only modification times changed, store the new times. `at` must be None.
    """
    if files is None or (record := read_record(folder, n)) is None:
        return []
    changed, new = newer_record(record if at is None else record[np.asarray(at)], files)
    if update and not len(changed) and not np.array_equal(new, record):
        # the folder may be read-only
        with suppress(DistillError):
            write_record(folder, new)
    return [str(files[i]) for i in changed]


def changed_text(names: Sequence, n: int) -> str:
    """Return a message that lists some of the changed files."""
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return f'{len(names)} of {n} files changed since the cache was written: {", ".join(names[:5])}{more}'
