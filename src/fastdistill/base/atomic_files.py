"""Write files either completely or not at all."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DistillError

DISK_FULL = errno.ENOSPC, errno.EFBIG, errno.EDQUOT
NOT_WRITTEN = 'iostream|PytorchStreamWriter failed writing'  # PyTorch before 2.10 says the latter


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
            (re.search(r'(?:\(os error |Os { code: )(\d+)', str(error)) or [0, 0])[1]
        )
        if code in DISK_FULL:
            return os.strerror(code)
        # subtle: if PyTorch opens the file itself, as in `Learner.export`, its error has no number
        if isinstance(error, RuntimeError) and re.search(NOT_WRITTEN, str(error)):
            return 'PyTorch could not write the file'
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


def check_regular_file(path: str | Path) -> None:
    """Raise a DistillError for a pipe, a socket or a device, whose reading may never end. Other
    paths, also those that do not exist, are accepted.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DistillError(
            f'{str(path)!r} is a pipe, a socket or a device, but a regular file is needed: write its '
            'content to a file first.'
        )


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
