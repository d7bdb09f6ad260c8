"""Read and write the files of a cache folder, local or remote.

Each file is written completely or not at all.
"""

import itertools
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..base.atomic_files import check_regular_file, file_errors, write_atomically
from ..base.folder_lock import locked_folder
from ..base.outputs import DistillError
from .digests import checksum, file_checksum


def natural_order(name: str) -> tuple[list, str]:
    """Sort key with which numbers in names are compared as numbers: part_2 before part_10."""
    parts = re.split('([0-9]+)', name)  # every second one is a number
    return [int(o) if i % 2 else o for i, o in enumerate(parts)], name


class Folder:
    """A local folder.

    Args:
        path: Path of the folder.
        top: Root folder of the cache, if this is a subfolder. If None, this folder is the root.
    """

    fetches = False  # True for remote folders, in which `local` downloads files

    def __init__(self, path: Path | str, top: Path | None = None):
        try:
            self.path = Path(path).expanduser().absolute()
        except RuntimeError as e:
            raise DistillError(f'{path}: {e}') from e  # unknown user, as in ~nobody
        self.top = self.path if top is None else top
        with file_errors(f"Can't open {path}"):
            if self.path.is_file():
                raise DistillError(f'{path} is a file, but a cache is a folder.')

    def __repr__(self) -> str:
        return str(self.path)

    def sub(self, name: str) -> 'Folder':
        return Folder(self.path / name, self.top)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if the file does not exist."""
        with file_errors(f"Can't read {name} in {self}"):
            try:
                check_regular_file(self.path / name)
                return (self.path / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        """Return the sizes of many files."""
        return [self.size(n) for n in names]

    def names(self) -> list[str]:
        with file_errors(f"Can't read {self}"):
            files = [p for p in self.path.rglob('*') if p.is_file()]
        return sorted(p.relative_to(self.path).as_posix() for p in files)

    def read(self, name: str) -> bytes:
        check_regular_file(self.path / name)
        with file_errors(f"Can't read {name} in {self}"):
            return (self.path / name).read_bytes()

    def local(self, name: str) -> Path:
        """Return a local path from which the file can be read."""
        return self.path / name

    def checksum(self, name: str) -> str:
        with file_errors(f"Can't read {name} in {self}"):
            return file_checksum(self.path / name)

    def own(self, name: str) -> Path:
        """Return the path of a file to write or remove.

        Raise a DistillError if a folder on the path is a symbolic link, which could lead out of the
        cache.
        """
        p = self.path / name
        for d in itertools.takewhile(lambda d: d != self.top, p.parents):
            if d.is_symlink():
                raise DistillError(
                    f'{d} is a link, but a cache is written only to real folders. Remove the '
                    'link, or use the folder that it points to.'
                )
        return p

    def write(self, name: str, data: Any) -> None:
        """Write a file atomically: readers see the whole file or none, even if the writer is
        killed.
        """
        p = self.own(name)
        with file_errors(f"Can't write {name} in {self}"):
            p.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(p, data)

    def remove(self, name: str) -> None:
        with file_errors(f"Can't remove {name} from {self}"):
            self.own(name).unlink(missing_ok=True)

    def map(self, name: str, dtype: Any, shape: Any) -> np.ndarray:
        with file_errors(f"Can't read {name} in {self}"):
            return np.memmap(self.local(name), dtype, 'r', shape=shape)

    def free(self) -> int | None:
        """Return the free disk space in bytes. None for a remote folder."""
        if self.fetches:
            return None
        there = next(p for p in (self.path, *self.path.parents) if p.exists())
        return shutil.disk_usage(there).free

    def lock(self, name: str = '.lock', what: object = None) -> AbstractContextManager:
        """Lock the folder, so that only one process writes to it.

        Args:
            name: Name of the lock file.
            what: Name of the written object for the error message. If None, use this folder.
        """
        return locked_folder(self.path, what or self, name)


class Remote(Folder):
    """A folder on a file system of fsspec. Each file is downloaded when it is first read."""

    fetches = True

    def __init__(self, url: str):
        self.url, self.downloads = url.rstrip('/'), tempfile.mkdtemp(prefix='fastdistill-')
        weakref.finalize(self, remove_download, self.downloads, os.getpid())

    @property
    def fs(self) -> Any:
        return fsspec_of(self.url)[0]

    def at(self, name: str) -> str:
        return f'{fsspec_of(self.url)[1]}/{name}'

    def __repr__(self) -> str:
        return self.url

    def sub(self, name: str) -> 'Remote':
        return Remote(f'{self.url}/{name}')

    # subtle: file systems of fsspec raise errors that are not OSErrors, so all exceptions are
    # caught

    def size(self, name: str) -> int | None:
        with file_errors(f"Can't reach {self}", Exception):
            try:
                return self.fs.size(self.at(name))
            except FileNotFoundError:
                return None

    def listing(self) -> dict[str, int]:
        """Return {name: size} of all files with a single request."""
        base, found = self.at('').lstrip('/'), {}
        with file_errors(f"Can't reach {self}", Exception), suppress(FileNotFoundError):
            found = self.fs.find(self.at(''), detail=True)
        return {n.lstrip('/')[len(base) :]: o['size'] for n, o in found.items()}

    def sizes(self, names: Iterable[str]) -> list[int | None]:
        have = self.listing()
        # a web server may not list its files, or may not give their sizes
        return [self.size(n) if have.get(n) is None else have[n] for n in names]

    def names(self) -> list[str]:
        return sorted(self.listing())

    def read(self, name: str) -> bytes:
        with file_errors(f"Can't read {name} in {self}", Exception):
            return self.fs.cat_file(self.at(name))

    def checksum(self, name: str) -> str:
        return checksum(self.read(name))  # checksum of the remote file, not of the downloaded copy

    def local(self, name: str) -> Path:
        if not (p := Path(self.downloads) / name).exists():
            Folder(self.downloads).write(name, self.read(name))
        return p

    def write(self, name: str, data: Any) -> None:
        tmp = self.at(name) + f'.{os.getpid()}.tmp'
        with file_errors(f"Can't write {name} in {self}", Exception):
            self.fs.makedirs(self.at(name).rpartition('/')[0], exist_ok=True)
            self.fs.pipe_file(tmp, bytes(data))
            self.fs.mv(tmp, self.at(name))

    def remove(self, name: str) -> None:
        with file_errors(f"Can't remove {name} from {self}", Exception):
            if self.size(name) is not None:
                self.fs.rm_file(self.at(name))

    @contextmanager
    def lock(self, name: str = '.lock', what: object = None) -> Iterator[None]:
        yield  # object stores have no locks, so simultaneous writers are not detected


def remove_download(path: str, pid: int) -> None:
    if os.getpid() == pid:
        # forked workers must not remove the folder of their parent
        shutil.rmtree(path, ignore_errors=True)


def fsspec_of(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in that file system."""
    from fsspec.core import url_to_fs

    # the protocol may be unknown, or its package (s3fs, gcsfs ...) may not be installed
    with file_errors(f"Can't reach {url}", Exception):
        return url_to_fs(url)


def open_folder(path: Any) -> Folder:
    """Open a cache folder at a local path or a URL (`s3://`, `memory://` ...)."""
    if isinstance(path, Folder):
        return path
    return Remote(str(path)) if '://' in str(path) else Folder(path)
