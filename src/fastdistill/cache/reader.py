"""Read rows of a cache by sample and view.

Files are memory-mapped, so any number of DataLoader workers can read the same cache.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.atomic_files import file_errors
from ..base.outputs import DistillError, Outputs
from .digests import checksum, file_checksum
from .file_store import Folder, open_folder
from .keys import look_up
from .manifest import Manifest, refuse
from .output_layer import StoredHead
from .sample_files import changed_files, changed_text, read_record


def is_cache(path: Any) -> bool:
    """Return True if there is a cache at a path or URL.

    Args:
        path: A path or URL. For objects of other types, the result is False.
    """
    if not isinstance(path, (str, PurePath)):
        return False
    if '://' not in str(path) and not os.path.isdir(os.path.expanduser(path)):
        return False
    return open_folder(path).size('manifest.json') is not None


class CacheFiles:
    """The files of a complete cache, which are checked and memory-mapped when they are first read.

    A pickled object contains the path of the folder, not the data.

    Args:
        folder: Folder of the cache.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        if folder.size('manifest.json') is None:
            raise DistillError(
                f'There is no cache at {folder} (no manifest.json): write one with '
                'cache_teacher(teacher, dls, path).'
            )
        self.manifest = m = Manifest.read(folder)
        if not m.complete:
            why = 'finished: write it again with the same arguments to resume.'
            if m.parts is not None:
                why = 'sealed: call seal_stream(path) when all its writers are done.'
            raise DistillError(f'{folder} is not {why}')
        self.maps: dict[str, np.ndarray] = {}
        self.heads: dict[Any, StoredHead] = {}
        self.opened = checksum(m.to_json())
        self.entries = {o['name']: o for o in m.shards}
        sizes = zip(m.shards, folder.sizes(self.entries))
        self.refuse({o['name']: text for o, size in sizes if (text := wrong_size(o, size))})

    def __getstate__(self) -> dict[str, Any]:
        # omit the memory maps, which would be pickled as a copy of all data
        checked = [o for o in INTACT_FILES if o[0] == str(self.folder)]
        return self.__dict__ | dict(maps={}, heads={}, checked=checked)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # so that a worker in a new process does not check the files again
        INTACT_FILES.update(state.pop('checked'))
        self.__dict__.update(state)

    def map(self, name: str, dtype: Any, shape: Any) -> np.ndarray:
        if name not in self.maps:
            self.refuse(damages(self.folder, self.manifest, [self.entries[name]], once=True))
            # plain arrays are faster to index than `np.memmap`
            self.maps[name] = np.asarray(self.folder.map(name, dtype, shape))
        return self.maps[name]

    def shard(self, view: int, i: int) -> np.ndarray:
        m = self.manifest
        return self.map(m.shard(view, i), np.uint8, (m.rows_of(i), m.layout.bytes))

    def head(self, device: Any) -> StoredHead | None:
        """Return the stored linear layer on a device, or None if the rows do not need one."""
        m = self.manifest
        if m.layout.head is None:
            return None
        if device not in self.heads:
            data = self.map('head.bin', np.uint8, (m.head_bytes,)).tobytes()
            self.heads[device] = StoredHead.from_bytes(data, m.layout).to(device)
        return self.heads[device]

    @property
    def keys(self) -> np.ndarray:
        """Key of the sample at each position, (N,) uint64."""
        return self.map('keys.bin', '<u8', (self.manifest.count,))

    @property
    def order(self) -> np.ndarray:
        """Positions sorted by the keys of their samples, (N,) int64."""
        if self.manifest.parts is not None:
            return self.map('index.bin', '<i8', (self.manifest.count,))
        if 'order' not in self.maps:
            self.maps['order'] = np.argsort(self.keys, kind='stable')
        return self.maps['order']

    def check(self, once: bool = False) -> None:
        """Compare every file with its checksum.

        Args:
            once: If True, skip files that this process has checked before.
        """
        self.refuse(damages(self.folder, self.manifest, self.manifest.shards, once))

    def refuse(self, found: Mapping[str, str]) -> None:
        if not found:
            return
        there = self.folder.size('manifest.json') is not None
        if not there or checksum(Manifest.read(self.folder).to_json()) != self.opened:
            raise DistillError(
                f'{self.folder} was overwritten or removed after it was opened: open it again.'
            )
        names = [f'{k} {v}' for k, v in found.items()]
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        what = 'Write the cache again with the same arguments: only damaged files are rewritten.'
        if self.manifest.parts is not None:
            what = 'Restore them from a copy, or write the stream again to a new folder.'
        raise DistillError(f'Damaged files in {self.folder}: {", ".join(names[:5])}{more}. {what}')


class TeacherCache:
    """Teacher outputs on disk. Read them with `cache.decode(cache.rows(positions, views))`.

    A pickled cache contains the path of the folder, not the data.

    Args:
        path: Folder or URL that `cache_teacher` or `cache_dataset` wrote.
        force: If True, warn instead of raising an error if the data, transforms or classes are
            different from when the cache was written.
        keys: The argument `keys` with which the cache was written: a list, or a function of the
            item.
    """

    def __init__(
        self,
        path: Path | str | Folder,
        force: bool = False,
        keys: Callable | Sequence | None = None,
    ):
        self.files = CacheFiles(open_folder(path))
        self.folder, self.manifest = self.files.folder, self.files.manifest
        self.views, self.seed = self.manifest.views, self.manifest.seed
        self.force, self.sample_names = force, keys
        self.named_items = None  # keys of the items that a list of names belongs to, if known

    def __repr__(self) -> str:
        m = self.manifest
        views = f'{m.views} views' if m.views else 'the clean view'
        size = f'{m.layout.bytes} bytes each, {m.bytes / 1e6:.1f} MB'
        return f'TeacherCache({self.folder}: {m.count} samples, {views}, {size})'

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def identity(self) -> tuple:
        """Folder and content of the cache. The value is the same each time this cache is opened."""
        return str(self.folder), self.files.opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(sample_names=None, named_items=None)

    @property
    def keys(self) -> np.ndarray:
        """Key of the sample at each position, (N,) uint64."""
        return self.files.keys

    @property
    def valid(self) -> 'TeacherCache | None':
        """The cache of the validation set in the same folder, or None if there is none."""
        sub = self.folder.sub('valid')
        return None if sub.size('manifest.json') is None else TeacherCache(sub, self.force)

    def rows(self, at: Any, views: Any = 0) -> np.ndarray:
        """Read stored rows, (B, bytes) uint8.

        Args:
            at: Positions in the cache, (B,).
            views: View of each position, (B,), or one view for all positions.
        """
        at = np.asarray(at)
        if at.ndim != 1 or len(at) and at.dtype.kind not in 'iu':
            raise DistillError(
                f'Positions in the cache must be a list or 1D array of whole numbers, but got '
                f'{at.dtype} of shape {at.shape}. For one sample, pass [position].'
            )
        views = np.broadcast_to(np.asarray(views), at.shape)
        m = self.manifest
        if len(at):
            check_place(m, at.min(), views.min())
            check_place(m, at.max(), views.max())
        shard, row = m.place(at)
        where = views * m.per_view + shard
        # often, all rows are in one file
        if len(at) and (where == where[0]).all():
            return self.files.shard(*divmod(int(where[0]), m.per_view))[row]
        out = np.empty((len(at), m.layout.bytes), np.uint8)
        for w in np.unique(where):
            sel = np.flatnonzero(where == w)
            out[sel] = self.files.shard(*divmod(int(w), m.per_view))[row[sel]]
        return out

    def row(self, at: int, view: int = 0) -> np.ndarray:
        """Read one stored row, (bytes,) uint8, for datasets that return one item at a time.

        Args:
            at: Position in the cache.
            view: View of the sample.
        """
        check_place(self.manifest, at, view)
        i, row = map(int, self.manifest.place(at))
        return np.array(self.files.shard(view, i)[row])

    def decode(self, rows: Any) -> Outputs:
        """Decode stored rows to the teacher's `Outputs`.

        Args:
            rows: Rows from `rows` or from a batch of `Replayed`, (B, bytes) uint8, as an array or as
                a tensor on any device. For positions in the cache, call `outputs`.
        """
        rows = rows if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
        width = self.manifest.layout.bytes
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != width:
            raise DistillError(
                f'decode takes stored rows, bytes (uint8) of shape (B, {width}), but got '
                f'{str(rows.dtype).removeprefix("torch.")} of shape {tuple(rows.shape)}. For '
                'positions in the cache, call outputs(positions).'
            )
        out = self.manifest.layout.decode(rows, self.files.head(rows.device))
        out.classes = self.manifest.teacher.get('classes')
        out.lost = self.manifest.lost or None
        return out

    def outputs(self, at: Any, views: Any = 0) -> Outputs:
        """Read rows and decode them to `Outputs`.

        Args:
            at: Positions in the cache, (B,). If `cache_dataset` wrote the cache, these are the
                indices of the samples in the dataset.
            views: View of each position, (B,), or one view for all positions.
        """
        return self.decode(self.rows(at, views))

    # the methods below find the rows of samples

    def find(
        self, keys: Any, named: bool = False, call: str = 'TeacherCache(path, keys=...)'
    ) -> np.ndarray:
        """Return the position in the cache of each sample, (M,).

        Args:
            keys: Keys of the samples, (M,) uint64.
            named: True if the user passed the names of the samples, for the error.
            call: Call to which the names are passed, for the error.

        Raises:
            DistillError: If a sample has no row.
        """
        keys, mine = np.asarray(keys, np.uint64), self.keys
        if len(keys) == len(mine) and np.array_equal(keys, mine):
            return np.arange(len(mine))
        at, there = look_up(mine, self.files.order, keys)
        lost = np.flatnonzero(~there)
        if len(lost):
            hint = (
                'keys= does not give the samples the names that they had then'
                if named
                else f'it was written with keys=, so the same names are needed here: {call}'
            )
            raise DistillError(
                f'{len(lost)} of {len(keys)} samples have no row in {self.folder} (the first is '
                f'number {lost[0]}). This is a different dataset, or its paths are relative to a '
                f'different root ({self.manifest.data.get("root", "")!r} when the cache was '
                f'written), or {hint}.'
            )
        return at

    def check_files(self, files: Sequence | None, at: Any = None) -> None:
        """Check that the files of samples have not changed since the cache was written.

        A file is read only if its modification time changed.

        Args:
            files: File path of each sample, or a tuple of paths, (M,). None if samples are not
                files.
            at: Position in the cache of each sample, (M,), from `find`. If None, the files are in
                the order of the cache.

        Raises:
            DistillError: If a file changed. If the cache was opened with `force`, warn instead.
        """
        if names := changed_files(self.folder, len(self), files, at):
            refuse(self.folder, [changed_text(names, len(files or ()))], self.force)

    def check(self, once: bool = False) -> 'TeacherCache':
        """Compare every file with its checksum. The error lists the damaged files.

        Args:
            once: If True, skip files that this process has checked before. Pass True before
                DataLoader workers start. Otherwise, each worker would check the files.
        """
        self.files.check(once)
        if not once:
            read_record(self.folder, len(self))
        return self


def check_place(m: Manifest, at: Any, view: int) -> None:
    """Raise a DistillError if a cache has no such position and view."""
    if not (0 <= at < m.count and 0 <= view < m.stored):
        raise DistillError(
            f'There is no position {at} with view {view}: the cache has {m.count} samples and '
            f'{m.stored} views.'
        )


# files that this process has checked, as (folder, name, checksum, number of classes, size,
# modification time, inode)
INTACT_FILES: set[tuple] = set()


def damages(folder: Folder, m: Manifest, files: Sequence[dict], once: bool = False) -> dict:
    """Return {file name: description of the damage} for the damaged files.

    Args:
        folder: Folder of the cache.
        m: Manifest of the cache.
        files: Entries of `m.shards` to check.
        once: If True, skip files that this process has checked before.
    """
    found = in_threads(lambda o: damage_of(folder, m, o, once), files)
    return {o['name']: text for o, text in zip(files, found) if text}


def in_threads(fn: Callable, items: Collection) -> list:
    """Apply a function that reads, writes or hashes files to all items in several threads. Return the
    results in the order of the items.
    """
    if len(items) == 1:
        return [fn(o) for o in items]
    # more threads than cores: while some wait for the disk, others compute
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(fn, items))


def damage_of(folder: Folder, m: Manifest, o: dict, once: bool) -> str:
    name = o['name']
    if text := wrong_size(o, folder.size(name)):
        return text
    # subtle: a downloaded copy may be intact while the remote file is damaged
    if folder.fetches and not once:
        return '' if folder.checksum(name) == o['checksum'] else OTHER_BYTES
    with file_errors(f"Can't read {name} in {folder}"):
        path = folder.local(name)
        stat = path.stat()
        state = stat.st_size, stat.st_mtime_ns, stat.st_ino
        seen = str(folder), name, o['checksum'], m.layout.n, *state
        text = '' if once and seen in INTACT_FILES else damage_inside(path, m, o)
    if not text:
        INTACT_FILES.add(seen)
    return text


def damage_inside(path: Any, m: Manifest, o: dict) -> str:
    size = m.layout.bytes if o['name'].startswith('view') else 1
    known: list[bool] = []

    def look(part: memoryview) -> None:
        if size > 1:
            known.append(m.layout.knows_ids(np.frombuffer(part, np.uint8).reshape(-1, size)))

    if file_checksum(path, max(2**20 // size, 1) * size, look) != o['checksum']:
        return OTHER_BYTES
    return '' if all(known) else f'has class numbers that are not below layout.n={m.layout.n}'


OTHER_BYTES = 'differs from what was written'


def wrong_size(o: dict, size: int | None) -> str:
    if size == o['bytes']:
        return ''
    return 'is missing' if size is None else f'has {size} bytes instead of {o["bytes"]}'
