"A folder of files, on this machine or wherever fsspec reaches: whole files appear at once or not at all."
import contextlib, errno, os, shutil, tempfile, weakref
from pathlib import Path
import numpy as np
from ..outputs import DistillError

__all__ = ['Folder', 'open_folder']


class Folder:
    "A local folder"
    def __init__(self, path):
        self.path,self.kept = Path(path).expanduser().absolute(),None      # absolute, for shards are opened later
        if self.path.is_file(): raise DistillError(f"{path} is a file: a cache is a folder.")

    def __repr__(self): return str(self.path)

    def sub(self, name): return type(self)(self.path/name)

    def size(self, name):
        "In bytes; None if there is no such file"
        try: return (self.path/name).stat().st_size
        except FileNotFoundError: return None

    def names(self):
        if not self.path.exists(): return []
        return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob('*') if p.is_file())

    def read(self, name): return (self.path/name).read_bytes()

    def write(self, name, data):
        "Through a temporary file and a rename: whoever reads `name`, or is killed, finds all of it or nothing"
        p = self.path/name
        p.parent.mkdir(parents=True, exist_ok=True)
        tmp = p.with_name(f'{p.name}.{os.getpid()}.tmp')
        try:
            with open(tmp, 'wb') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, p)
        except BaseException as e:
            tmp.unlink(missing_ok=True)
            if not isinstance(e, OSError) or e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT): raise
            raise DistillError(f"No room for {name} in {self}: {e.strerror}. What was finished stays: make room and start again, "
                               "and it goes on from there.") from e

    def remove(self, name): (self.path/name).unlink(missing_ok=True)

    def map(self, name, dtype, shape): return np.memmap(self.path/name, dtype, 'r', shape=shape)

    def free(self):
        "Bytes left on the disk"
        p = self.path.absolute()
        while not p.exists(): p = p.parent
        return shutil.disk_usage(p).free

    @contextlib.contextmanager
    def lock(self):
        "One writer at a time; the system takes the lock back when a writer dies"
        self.path.mkdir(parents=True, exist_ok=True)
        me = str(self.path.resolve())
        busy = DistillError(f"Another writer is at work on {self}: wait for it, or choose another folder.")
        if me in LOCKED: raise busy
        try: f = open(self.path/'.lock', 'a+')
        except PermissionError:     # a place to read from: who has something to write will be told
            yield
            return
        with f:
            try: acquire(f)
            except OSError as e: raise busy from e
            LOCKED.add(me)
            try: yield
            finally: LOCKED.discard(me)


LOCKED = set()      # the system's locks are between processes, this is within one


def acquire(f):
    # subtle: lockf and not flock, whose locks live on in forked DataLoader workers after the writer was killed
    try: import fcntl
    except ImportError:     # Windows
        import msvcrt
        return msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Remote(Folder):
    "A folder behind fsspec: files are fetched to this machine when they are first read"
    def __init__(self, url, kept=None):
        self.url,self.kept = url.rstrip('/'),kept
        if kept is None:
            self.kept = tempfile.mkdtemp(prefix='fastdistill-')
            weakref.finalize(self, remove_download, self.kept, os.getpid())

    @property
    def fs(self): return fsspec_of(self.url)[0]

    def at(self, name): return f'{fsspec_of(self.url)[1]}/{name}'

    def __repr__(self): return self.url

    def sub(self, name): return Remote(f'{self.url}/{name}')

    def size(self, name):
        try: return self.fs.size(self.at(name))
        except FileNotFoundError: return None

    def names(self):
        base = self.at('')
        try: return sorted(n.lstrip('/')[len(base.lstrip('/')):] for n in self.fs.find(base))
        except FileNotFoundError: return []

    def read(self, name): return self.fs.cat_file(self.at(name))

    def write(self, name, data):
        self.fs.makedirs(self.at(name).rpartition('/')[0], exist_ok=True)
        tmp = self.at(name) + f'.{os.getpid()}.tmp'
        self.fs.pipe_file(tmp, bytes(data))
        self.fs.mv(tmp, self.at(name))

    def remove(self, name):
        if self.size(name) is not None: self.fs.rm_file(self.at(name))

    def map(self, name, dtype, shape):
        local = Path(self.kept)/name
        if not local.exists(): Folder(self.kept).write(name, self.read(name))
        return np.memmap(local, dtype, 'r', shape=shape)

    def free(self): return None

    @contextlib.contextmanager
    def lock(self): yield       # object stores have none; a folder is for one writer


def remove_download(path, pid):
    if os.getpid() == pid: shutil.rmtree(path, ignore_errors=True)      # a forked worker only borrows it


def fsspec_of(url):
    try: from fsspec.core import url_to_fs
    except ImportError as e: raise ImportError(f"{url} is not on this machine: pip install fsspec") from e
    return url_to_fs(url)


def open_folder(path) -> Folder:
    "The folder at a path, or at a URL (`s3://`, `memory://` ...)"
    if isinstance(path, Folder): return path
    return Remote(str(path)) if '://' in str(path) else Folder(path)
