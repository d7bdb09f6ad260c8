"""Write files either completely or not at all, and lock folders so that only one process writes at
a time.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DistillError

DISK_FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT


class BusyError(DistillError):
    """Error raised if another process is writing to the same folder or file."""


@contextmanager
def enough_space(path: str | Path) -> Iterator[None]:
    """Context manager that replaces the error for a full disk with a DistillError that names the
    file.

    Args:
        path: File or folder to write.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, DistillError) or (why := disk_full(e)) is None:
            raise
        free = shutil.disk_usage(Path(path).absolute().parent).free
        raise DistillError(
            f'No space for {path} ({why}; {free / 1e6:,.1f} MB are free there). Finished files '
            'are kept: free some space and start again to resume.'
        ) from e


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Context manager that yields the path of a temporary file in the same folder, and renames the
    file at the end. Readers find either the complete new file or the old file, even if the process
    is killed. The permissions of the file follow the umask.

    Args:
        path: Path of the file to write.
    """
    path = Path(path)
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    with enough_space(path):
        try:
            tmp.unlink(missing_ok=True)
            with open(tmp, 'xb') as f:
                # subtle: mode x does not follow a symbolic link
                mode = os.fstat(f.fileno()).st_mode
            yield tmp
            os.chmod(tmp, mode & 0o777)  # some libraries write files that only the owner can read
            with open(tmp, 'rb+') as f:
                os.fsync(f.fileno())
            os.replace(tmp, path)
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)


def disk_full(error: BaseException | None) -> str | None:
    """Return the system's message if the error or one of its causes is a full disk. Otherwise
    return None.
    """
    while error is not None:
        # subtle: the system's error may be the cause of a PyTorch error.
        # Rust libraries give the error number only in the text of the error.
        code = getattr(error, 'errno', None) or int(
            (re.search(r'\(os error (\d+)\)', str(error)) or [0, 0])[1]
        )
        if code in DISK_FULL:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def write_atomically(path: str | Path, content: bytes | str | Callable) -> None:
    """Write a file completely or not at all.

    Args:
        path: Path of the file.
        content: Bytes, text, or fn(binary file).
    """
    with new_file(path) as tmp, open(tmp, 'wb') as f:
        if callable(content):
            content(f)
        else:
            f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=1) + '\n')


# folders locked by this process, because the system's locks work only between processes
LOCKED: set[str] = set()


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


@contextmanager
def file_errors(
    what: str, errors: type[Exception] | tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Context manager that replaces errors of the file system with a DistillError that has a clear
    message.
    """
    try:
        yield
    except DistillError:
        raise
    except errors as e:
        raise DistillError(
            f'{what}: {getattr(e, "strerror", None) or e or type(e).__name__}.'
        ) from e
