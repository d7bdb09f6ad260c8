"Files that are written completely or not at all, and folders that one process writes at a time."

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

__all__ = [
    'BusyError',
    'enough_space',
    'file_errors',
    'locked_folder',
    'new_file',
    'write_atomically',
    'write_json',
]

DISK_FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT


class BusyError(DistillError):
    """Another process writes there."""


@contextmanager
def enough_space(path: str | Path) -> Iterator[None]:
    """Context that turns the error of a full disk into one line that names the file.

    Args:
        path: File or folder that is written.
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
    """Context that yields the path of a temporary file in the same folder and renames it at the
    end. Readers find the whole new file or the old one, even if the process is killed. The file's
    mode follows the umask.

    Args:
        path: Path of the file to write.
    """
    path = Path(path)
    tmp = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    with enough_space(path):
        try:
            tmp.unlink(missing_ok=True)
            with open(tmp, 'xb') as f:
                mode = os.fstat(f.fileno()).st_mode  # subtle: mode x does not open a link
            yield tmp
            os.chmod(tmp, mode & 0o777)  # some writers choose a mode that only the owner can read
            with open(tmp, 'rb+') as f:
                os.fsync(f.fileno())
            os.replace(tmp, path)
        finally:
            with suppress(OSError):
                tmp.unlink(missing_ok=True)


def disk_full(error: BaseException | None) -> str | None:
    """Return the system's message if there was no space, else None."""
    while error is not None:
        # subtle: PyTorch raises its own error on top of the system's, and Rust has the error number in the text
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


LOCKED: set[str] = set()  # for this process; the system's locks work only between processes


@contextmanager
def locked_folder(path: Path, name: object = None, file: str = '.lock') -> Iterator[None]:
    """Context that allows one writer at a time. The system releases the lock when a writer dies.

    Args:
        path: Folder, which is created.
        name: Name of what is written, for messages. None for the path of the folder.
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
    # subtle: without O_NOFOLLOW, a link would create or lock a file somewhere else
    try:
        opened = os.open(path / file, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EROFS):
            raise DistillError(f"Can't write to {name}: {e.strerror}.") from e
        yield  # a read-only folder: an error is raised if there is something to write
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
    # subtle: lockf, because locks of flock survive in forked DataLoader workers after the writer is killed
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        return msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def file_errors(
    what: str, errors: tuple[type[BaseException], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Context that turns an error of the file system into one clear line."""
    try:
        yield
    except DistillError:
        raise
    except errors as e:
        raise DistillError(
            f'{what}: {getattr(e, "strerror", None) or e or type(e).__name__}.'
        ) from e
