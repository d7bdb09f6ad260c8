"""Seal a cache that was written as a stream: check its files and complete its manifest."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..base.outputs import DistillError
from .digests import checksum
from .file_store import Folder, natural_order, open_folder
from .head_file import read_head
from .keys import keys_in_stream, look_up
from .manifest import Manifest
from .reader import TeacherCache, damage_of, in_threads
from .shard_notes import clear
from .stream_writer import NUMBERED, keys_file, read_keys, rows_at_end, stream_manifest

STEP = 2**14  # number of keys handled at once, which fit into the processor's cache
PART = re.compile(r'view(\d{3,})/(.+)\.(rows|keys|end)')


def seal_stream(path: Path | str, keys: Any = None) -> TeacherCache:
    """Check the rows from all writers of a stream, complete the cache, and open it.

    Each file is read once and is not moved. About 8 bytes of memory are needed for each sample, or
    16 if `keys` is passed or the folder is remote. If there is a problem, an error lists the writers
    that must run again, and no file is changed.

    Args:
        path: Folder or URL of the stream, created by `start_stream`.
        keys: Iterable of the names or keys of all expected samples. If None, check only the rows
            that were written.

    Raises:
        DistillError: If rows are duplicated, missing or incomplete, a file is damaged, or a writer
            has not finished.
    """
    where = open_folder(path)
    with where.lock():
        m = stream_manifest(where)
        if not m.complete:
            _seal(where, m, keys)
        # also remove row files without a key file, which a killed writer may have left
        clear(where, only={*where.names()} - {'manifest.json', *(n for n, _ in m.all_files())})
    return TeacherCache(where)


def _seal(where: Folder, m: Manifest, expected: np.ndarray | None) -> None:
    read_head(where, m)
    names, ends, unfinished = part_files(where, m.stored)
    problems = Problems(where)
    problems.add('writers are not done', unfinished)
    if not names[0]:
        problems.add('writers have missing rows', lost_rows({}, ends))
        problems.add('files with rows', ['none'])
        problems.enforce()
    counts = count_rows(where, m, names, problems)
    problems.add('writers have missing rows', lost_rows(counts, ends))
    problems.enforce()
    m.parts = [[part_name(n), counts[n]] for n in names[0]]
    m.count = sum(n for _, n in m.parts)
    m.shard_rows = max(n for _, n in m.parts)
    own, sums = read_all_keys(where, m, names, problems)
    shards = [
        dict(name=n, bytes=m.rows_of(i) * m.layout.bytes, checksum=sums[n])
        for view in names
        for i, n in enumerate(view)
    ]

    def entry(name: str, data: Any) -> dict:
        return dict(name=name, bytes=len(data), checksum=checksum(data))

    def written(name: str, a: np.ndarray) -> dict:
        where.write(name, a.data.cast('B'))
        return entry(name, a.data.cast('B'))

    def write_keys_and_index() -> list[dict]:
        first = written('keys.bin', own)
        # read the keys from the new file, so that their memory can be reused for the index
        keys = own.copy() if where.fetches else where.map('keys.bin', '<u8', own.shape)
        order, same = sorted_positions(keys, out=own)
        problems.add('samples have several rows', duplicates(m, keys, order, same))
        if expected is not None:
            compare_expected(m, keys, order, expected, problems)
        return [first, written('index.bin', order)]

    with ExitStack() as undo:
        for name in ('keys.bin', 'index.bin'):
            undo.callback(where.remove, name)
        # write the keys and their index while the rows are read
        check = [partial(damage_of, where, m, o, once=False) for o in shards]
        first, *texts = in_threads(lambda task: task(), [write_keys_and_index, *check])
        found = [f'{o["name"]} {text}' for o, text in zip(shards, texts) if text]
        problems.add('files are damaged', found)
        problems.enforce()
        undo.pop_all()
    if m.head_bytes:
        first.append(entry('head.bin', where.read('head.bin')))
    m.shards = first + shards
    m.complete = True
    m.as_read()  # subtle: raise an error now if the manifest could not be read later
    where.write('manifest.json', m.to_json())


class Problems:
    """Collects the problems that prevent sealing a cache."""

    def __init__(self, where: Folder):
        self.where = where
        self.found: list[str] = []

    def add(self, what: str, places: Sequence) -> None:
        """Add a problem. Nothing is added if `places` is empty.

        Args:
            what: Description of the problem.
            places: Texts that locate the problem, or (number of places, texts for some of them).
        """
        n, some = places if isinstance(places, tuple) else (len(places), places)
        if n:
            more = f' and {n - 5} more' if n > 5 else ''
            self.found.append(f'- {n} {what}: {"; ".join(some[:5])}{more}')

    def enforce(self) -> None:
        if self.found:
            raise DistillError(
                f"{self.where} can't be sealed:\n"
                + '\n'.join(self.found)
                + '\nNothing was changed. Run the writers of these rows again, or remove the extra '
                'files (.rows and .keys). Then seal the cache again.'
            )


def part_name(name: str) -> str:
    return name_parts(name)[1]


def name_parts(name: str) -> tuple:
    """Split a file name into (view, writer and number, suffix)."""
    return cast(re.Match, PART.fullmatch(name)).groups()


def part_files(where: Folder, views: Any) -> tuple:
    """List the row files of a stream.

    Returns:
        (file names of each view in their natural order, {(view, writer): number of rows that the
        writer recorded}, texts about writers that have not finished).
    """
    found: list[list[str]] = [[] for _ in range(views)]
    ends = {}
    for n in where.names():
        if not (at := PART.fullmatch(n)) or int(at[1]) >= views:
            continue
        if at[3] == 'keys':
            found[int(at[1])].append(n.removesuffix('.keys') + '.rows')
        elif at[3] == 'end':
            ends[int(at[1]), at[2]] = rows_at_end(where, n)
    unfinished = []
    for view, names in enumerate(found):
        series = defaultdict(list)
        for n in names:
            if at := NUMBERED.fullmatch(part_name(n)):
                series[at[1]].append(int(at[2]))
        for name, numbers in series.items():
            missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
            if missing:
                unfinished.append(f'{name} of view {view} (no file {missing[0]})')
            elif (view, name) not in ends:
                unfinished.append(f'{name} of view {view} ({len(numbers)} files so far)')
    return [sorted(o, key=natural_order) for o in found], ends, unfinished


def lost_rows(counts: Any, ends: Mapping) -> list[str]:
    """Return texts about writers with a different number of rows than they recorded at their end."""
    there: dict[tuple, int] = defaultdict(int)
    for name, n in counts.items():
        view, part, _ = name_parts(name)
        if at := NUMBERED.fullmatch(part):
            there[int(view), at[1]] += n
    return [
        f'{name} of view {view} ({there[view, name]} of {n} rows)'
        for (view, name), n in sorted(ends.items())
        if there[view, name] != n
    ]


def count_rows(where: Folder, m: Manifest, names: Sequence, problems: Problems) -> dict:
    """Return {file name: number of rows}, computed from the sizes of the files."""
    counts, torn, size = {}, [], m.layout.bytes
    for view in names:
        for n, a, b in zip(view, where.sizes([*map(keys_file, view)]), where.sizes(view)):
            a = a or 0
            counts[n] = (a - 32) // 8
            if a < 40 or (a - 32) % 8 or b != counts[n] * size:
                rows = 'no rows' if b is None else f'{b / size:.10g} rows'
                torn.append(f'{n} ({rows}, {max(counts[n], 0)} keys)')
    problems.add('files are incomplete', torn)
    for v, view in enumerate(names[1:], 1):
        lacking = sorted({*map(part_name, names[0])} ^ {*map(part_name, view)})
        problems.add(f'files are in only one of view 0 and view {v}', lacking)
    return counts


def read_all_keys(where: Folder, m: Manifest, names: Any, problems: Problems) -> tuple:
    """Read the keys of all samples, and check that all views have the same keys.

    Returns:
        (keys, {file name: checksum}).
    """
    own, sums = np.empty(m.count, '<u8'), {}
    bad, different = [], []
    starts = np.cumsum([0, *(n for _, n in cast(list, m.parts))])

    def read(i: int) -> None:
        mine = own[starts[i] : starts[i + 1]]
        for v, view in enumerate(names):
            try:
                keys, sums[view[i]] = read_keys(where, view[i])
            except DistillError as e:
                bad.append(str(e))
                continue
            if v == 0:
                mine[:] = keys
            elif not np.array_equal(mine, keys):
                different.append(view[i])

    in_threads(read, range(len(names[0])))
    bad.sort()
    different.sort(key=natural_order)
    problems.add('files are damaged', bad)
    problems.add('files have different samples than in view 0, or a different order', different)
    problems.enforce()
    return own, sums


def sorted_positions(keys: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort samples by their keys.

    Args:
        keys: Key of each sample, (N,) uint64.
        out: Copy of the keys, whose memory is used for the result.

    Returns:
        (positions sorted by their keys, (N,) int64, indices into these positions at which the next
        key is the same).
    """
    # Sort integers that contain the leading bits of a key and, instead of the other bits, the
    # position. Sorting plain integers in place is several times faster than an argsort, and needs
    # no more memory than the result
    bits = np.uint64(len(keys).bit_length())
    positions = (np.uint64(1) << bits) - np.uint64(1)
    tied = []
    for i in range(0, len(keys), STEP):
        part = out[i : i + STEP]
        part &= ~positions
        part |= np.arange(i, i + len(part), dtype=np.uint64)
    out.sort()
    for i in range(0, len(keys), STEP):
        leading = out[i : i + STEP + 1] >> bits
        tied.append(np.flatnonzero(leading[1:] == leading[:-1]) + i)
        out[i : i + STEP] &= positions
    order = out.view(np.int64)
    # sort keys whose leading bits are the same by their other bits
    before = np.concatenate(tied)
    tied_at = np.union1d(before, before + 1)
    at = order[tied_at]
    order[tied_at] = at = at[np.argsort(keys[at], kind='stable')]
    return order, tied_at[:-1][keys[at[1:]] == keys[at[:-1]]]


def place_of(m: Manifest, at: Any) -> str:
    i, row = m.place(at)
    return f'{cast(list, m.parts)[int(i)][0]}, row {int(row)}'


def duplicates(m: Manifest, keys: np.ndarray, order: np.ndarray, same: np.ndarray) -> tuple:
    """Describe samples that have several rows.

    Args:
        m: Manifest of the stream.
        keys: Key of each row, (N,).
        order: Positions sorted by their keys, (N,).
        same: Indices into `order` at which the next key is the same.

    Returns:
        (number of such samples, texts about some of them).
    """
    some = []
    for i in same[:5]:
        a, b = sorted(order[i : i + 2].tolist())
        some.append(f'{place_of(m, a)} and {place_of(m, b)} (key {keys[a]:016x})')
    return len(same), some


def compare_expected(
    m: Manifest, keys: np.ndarray, order: np.ndarray, expected: np.ndarray, problems: Problems
) -> None:
    """Add problems for expected samples without a row, and for rows of unexpected samples."""
    root, known = m.data.get('root', ''), np.zeros(len(keys), bool)
    names, n, missing = iter(expected), 0, 0
    some: list[str] = []
    while part := list(islice(names, 2**16)):
        want = np.array(part) if isinstance(part[0], np.uint64) else keys_in_stream(part, root)
        at, there = look_up(keys, order, want)
        known[at[there]] = True
        for i in np.flatnonzero(~there)[: 5 - len(some)]:
            some.append(f'number {n + i} ({part[i]!r})')
        missing, n = missing + int((~there).sum()), n + len(part)
    problems.add('samples have no row', (missing, some))
    extra = np.flatnonzero(~known)
    places = [place_of(m, i) for i in extra[:5]]
    problems.add('rows belong to samples that are not in keys=', (len(extra), places))
