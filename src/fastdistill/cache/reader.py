"""Read rows of a cache by sample and view.

Files are memory-mapped, so any number of DataLoader workers can read the same cache.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.atomic_files import file_errors
from ..base.outputs import DistillError, Outputs
from .digests import checksum, file_checksum, input_digest
from .file_store import Folder, open_folder
from .manifest import Manifest, refuse, sample_differences
from .output_layer import StoredHead
from .sample_files import changed_text, newer_record, read_record


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


class TeacherCache:
    """Teacher outputs on disk, which `cache.decode(cache.rows(positions, views))` reads.

    A pickled cache holds the path of the folder, not the data.

    Args:
        path: Folder or URL that `cache_teacher` or `cache_dataset` wrote.
        force: If True, warn instead of raising an error if the data, transforms or classes differ
            from those of the cache.
        keys: The argument `keys` with which the cache was written: a list, or a function of the
            item.
    """

    def __init__(
        self,
        path: Path | str | Folder,
        force: bool = False,
        keys: Callable | Sequence | None = None,
    ):
        self.folder, self.force, self.sample_names = open_folder(path), force, keys
        self.named_items = None  # keys of the items that a list of names belongs to, if known
        if self.folder.size('manifest.json') is None:
            raise DistillError(
                f'There is no cache at {self.folder} (no manifest.json): write one with '
                'cache_teacher(teacher, dls, path).'
            )
        self.manifest = m = Manifest.read(self.folder)
        if not m.complete:
            why = 'finished: write it again with the same arguments to resume.'
            if m.parts is not None:
                why = 'sealed: call seal_stream(path) when all its writers are done.'
            raise DistillError(f'{self.folder} is not {why}')
        self._maps: dict[tuple[int, int], np.ndarray] = {}
        self._heads: dict[Any, StoredHead] = {}
        self._keys: np.ndarray | None = None
        self._order: np.ndarray | None = None
        self._opened = checksum(m.to_json())
        self._files = {o['name']: o for o in m.shards}
        sizes = zip(m.shards, self.folder.sizes(self._files))
        self._refuse({o['name']: text for o, size in sizes if (text := wrong_size(o, size))})

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
        return str(self.folder), self._opened

    @property
    def views(self) -> int:
        return self.manifest.views

    @property
    def seed(self) -> int:
        return self.manifest.seed

    def __getstate__(self) -> dict[str, Any]:
        # leave out memory maps, which would be pickled as a copy of all data
        unset = dict.fromkeys(('_keys', '_order', 'sample_names', 'named_items'))
        checked = [o for o in INTACT_FILES if o[0] == str(self.folder)]
        return self.__dict__ | unset | dict(_maps={}, _heads={}, _checked=checked)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # so that a worker in a new process does not check the files again
        INTACT_FILES.update(state.pop('_checked'))
        self.__dict__.update(state)

    @property
    def keys(self) -> np.ndarray:
        """Key of the sample at each position, (N,) uint64."""
        if self._keys is None:
            self._keys = self._open('keys.bin', '<u8', (len(self),))
        return self._keys

    @property
    def order(self) -> np.ndarray:
        """Positions sorted by the keys of their samples, (N,) int64."""
        if self._order is None and self.manifest.parts is not None:
            self._order = self._open('index.bin', '<i8', (len(self),))
        if self._order is None:
            self._order = np.argsort(self.keys, kind='stable')
        return self._order

    @property
    def valid(self) -> 'TeacherCache | None':
        """The cache of the validation set in the same folder, or None if there is none."""
        sub = self.folder.sub('valid')
        return None if sub.size('manifest.json') is None else TeacherCache(sub, self.force)

    def _open(self, name: str, dtype: Any, shape: Any) -> np.ndarray:
        self._refuse(damages(self.folder, self.manifest, [self._files[name]], once=True))
        return self.folder.map(name, dtype, shape)

    def _head(self, device: Any) -> StoredHead | None:
        """Return the output layer for hidden states on a device, or None if rows hold logits."""
        m = self.manifest
        if m.layout.head is None:
            return None
        if device not in self._heads:
            data = self._open('head.bin', np.uint8, (m.head_bytes,)).tobytes()
            self._heads[device] = StoredHead.from_bytes(data, m.layout).to(device)
        return self._heads[device]

    def _shard(self, view: int, i: int) -> np.ndarray:
        if (view, i) not in self._maps:
            m = self.manifest
            shape = m.rows_of(i), m.layout.bytes
            self._maps[view, i] = self._open(m.shard(view, i), np.uint8, shape)
        return self._maps[view, i]

    def _refuse(self, found: Mapping[str, str]) -> None:
        if not found:
            return
        there = self.folder.size('manifest.json') is not None
        if not there or checksum(Manifest.read(self.folder).to_json()) != self._opened:
            raise DistillError(
                f'{self.folder} was overwritten or removed after it was opened: open it again.'
            )
        names = [f'{k} {v}' for k, v in found.items()]
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        what = 'Write the cache again with the same arguments: only damaged files are rewritten.'
        if self.manifest.parts is not None:
            what = 'Restore them from a copy, or write the stream again to a new folder.'
        raise DistillError(f'Damaged files in {self.folder}: {", ".join(names[:5])}{more}. {what}')

    def rows(self, at: Any, views: Any = 0) -> np.ndarray:
        """Read stored rows, (B, bytes) uint8.

        Args:
            at: Positions in the cache, (B,).
            views: View of each position, (B,), or one view for all positions.
        """
        at = np.asarray(at)
        views = np.broadcast_to(np.asarray(views), at.shape)
        m, out = self.manifest, np.empty((len(at), self.manifest.layout.bytes), np.uint8)
        if len(at):
            self._within(at.min(), views.min())
            self._within(at.max(), views.max())
        shard, row = m.place(at)
        where = views * m.per_view + shard
        for w in np.unique(where):
            sel = np.flatnonzero(where == w)
            out[sel] = self._shard(*divmod(int(w), m.per_view))[row[sel]]
        return out

    def row(self, at: int, view: int = 0) -> np.ndarray:
        """Read one stored row, (bytes,) uint8, for datasets that return one item at a time.

        Args:
            at: Position in the cache.
            view: View of the sample.
        """
        self._within(at, view)
        i, row = map(int, self.manifest.place(at))
        return np.array(self._shard(view, i)[row])

    def _within(self, at: Any, view: int) -> None:
        if not (0 <= at < len(self) and 0 <= view < self.manifest.stored):
            raise DistillError(
                f'There is no position {at} with view {view}: the cache has {len(self)} samples and '
                f'{self.manifest.stored} views.'
            )

    def decode(self, rows: Any) -> Outputs:
        """Decode stored rows to the teacher's `Outputs`.

        Args:
            rows: Rows as `rows` returns them or a batch of `Replayed` holds them, (B, bytes) uint8:
                an array, or a tensor on any device. For positions in the cache, call `outputs`.
        """
        rows = rows if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
        width = self.manifest.layout.bytes
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != width:
            raise DistillError(
                f'decode takes stored rows, bytes (uint8) of shape (B, {width}), but got '
                f'{str(rows.dtype).removeprefix("torch.")} of shape {tuple(rows.shape)}. For '
                'positions in the cache, call outputs(positions).'
            )
        out = self.manifest.layout.decode(rows, self._head(rows.device))
        out.classes = self.manifest.teacher.get('classes')
        out.lost = self.manifest.lost or None
        return out

    def outputs(self, at: Any, views: Any = 0) -> Outputs:
        """Read rows and decode them to `Outputs`.

        Args:
            at: Positions in the cache, (B,). In a cache of `cache_dataset`, these are the indices of
                the samples in the dataset.
            views: View of each position, (B,), or one view for all positions.
        """
        return self.decode(self.rows(at, views))

    # the methods below find the rows of samples

    def find(self, keys: Any) -> np.ndarray:
        """Return the position in the cache of each sample, (M,).

        Args:
            keys: Keys of the samples, (M,) uint64.

        Raises:
            DistillError: If a sample has no row.
        """
        keys, mine = np.asarray(keys, np.uint64), self.keys
        if len(keys) == len(mine) and np.array_equal(keys, mine):
            return np.arange(len(mine))
        order = self.order
        at = order[np.searchsorted(mine, keys, sorter=order).clip(max=len(mine) - 1)]
        lost = np.flatnonzero(mine[at] != keys)
        if len(lost):
            raise DistillError(
                f'{len(lost)} of {len(keys)} samples have no row in {self.folder} (the first is '
                f'number {lost[0]}). This is a different dataset, or its paths are relative to a '
                f'different root ({self.manifest.data.get("root", "")!r} when the cache was '
                'written), or the cache was written with keys= and must be opened with '
                'TeacherCache(path, keys=...).'
            )
        return at

    def compare(self, at: Any, item: Any) -> None:
        """Check that the inputs of a few samples are the same as when the cache was written.

        Args:
            at: Position in the cache of each sample of a dataset, (N,).
            item: fn(index of a sample, view) -> item of the dataset.

        Raises:
            DistillError: If an input differs. If the cache was opened with `force`, warn instead.
        """
        look = lambda i, view: dict(digest=input_digest(item(i, view)))
        refuse(self.folder, sample_differences(self.manifest, at, look), self.force)

    def changed_files(self, files: Sequence, at: Any = None) -> list:
        """Return the paths of sample files whose content changed since the cache was written.

        A file is read only if its modification time changed.

        Args:
            files: File path of each sample, or a tuple of paths, (M,). None if samples are not
                files.
            at: Position in the cache of each sample, (M,), from `find`. If None, the files are in
                the order of the cache.
        """
        if files is None or (record := read_record(self.folder, len(self))) is None:
            return []
        changed, _ = newer_record(record if at is None else record[np.asarray(at)], files)
        return [str(files[i]) for i in changed]

    def check_files(self, files: Sequence, at: Any = None) -> None:
        """Check that the files of samples have not changed since the cache was written.

        Args:
            files, at: As in `changed_files`.

        Raises:
            DistillError: If a file changed. If the cache was opened with `force`, warn instead.
        """
        if names := self.changed_files(files, at):
            refuse(self.folder, [changed_text(names, len(files))], self.force)

    def check(self) -> 'TeacherCache':
        """Compare every file with its checksum. The error names the damaged files."""
        self._refuse(damages(self.folder, self.manifest, self.manifest.shards))
        read_record(self.folder, len(self))
        return self

    def check_once(self) -> 'TeacherCache':
        """Check all files like `check`, but skip those that this process has checked before.

        Call this method before DataLoader workers start. Otherwise, each worker would check the
        files.
        """
        self._refuse(damages(self.folder, self.manifest, self.manifest.shards, once=True))
        return self


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
    look = lambda o: damage_of(folder, m, o, once)
    if len(files) == 1:
        found = [look(files[0])]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(look, files))
    return {o['name']: text for o, text in zip(files, found) if text}


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
    return '' if all(known) else f'has numbers of classes beyond layout.n={m.layout.n}'


OTHER_BYTES = 'differs from what was written'


def wrong_size(o: dict, size: int | None) -> str:
    if size == o['bytes']:
        return ''
    return 'is missing' if size is None else f'has {size} bytes instead of {o["bytes"]}'
