"""Lock a folder, so that only one process writes to it at a time."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .atomic_files import file_errors
from .errors import DistillError

# folders locked by this process, because the system's locks work only between processes
LOCKED: set[str] = set()


class BusyError(DistillError):
    """Error raised if another process is writing to the same folder or file."""


@contextmanager
def locked_folder(path: Path, name: object = None, file: str = '.lock') -> Iterator[None]:
    """Context manager that locks a folder, so that only one process writes at a time. The system
    releases the lock if the process dies.

    Args:
        path: Folder to lock. It is created if necessary.
        name: Name of the folder or file in messages. None for the path of the folder.
        file: Name of the lock file.
    """
    name = name or path
    with file_errors(f"Can't write to {name}"):
        path.mkdir(parents=True, exist_ok=True)
    me = str(path.resolve() / file)
    busy = BusyError(
        f'Another process is writing to {name}: wait for it, or choose a different '
        f'{"folder" if file == ".lock" else "file"}.'
    )
    if me in LOCKED:
        raise busy
    # subtle: without O_NOFOLLOW, a symbolic link could create or lock a file in a different place
    try:
        opened = os.open(path / file, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EROFS):
            raise DistillError(f"Can't write to {name}: {e.strerror}.") from e
        # a read-only folder can't be locked; an error is raised later if something must be written
        yield
        return
    with os.fdopen(opened, 'r+') as f:
        try:
            acquire(f)
        except OSError as e:
            raise busy from e
        LOCKED.add(me)
        try:
            yield
        finally:
            LOCKED.discard(me)


def acquire(f: Any) -> Any:
    # subtle: use lockf instead of flock, whose locks survive in forked DataLoader workers after the
    # writer is killed
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        return msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
