"""Read, check and compare the manifests of caches.

A manifest describes the teacher, samples, transforms and layout, and contains the checksum of each
file and of itself.
"""

import builtins
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import numpy as np

from ..base.outputs import DistillError, DistillWarning
from .digests import checksum, versions
from .file_store import Folder
from .json_checks import (
    check_json,
    json_list,
    json_object,
    parse_json,
    shortened,
    whole_number,
)
from .row_layout import Layout

FORMAT, VERSION = 'fastdistill-cache', 1
# limits, so that a damaged manifest can't fill the memory or disk, or cause an endless loop
MAX_MANIFEST, MAX_COUNT, MAX_VIEWS = 2**28, 2**40, 2**16
MAX_BATCH, MAX_FILES, MAX_FILE = 2**20, 2**22, 2**33


@dataclass
class Manifest:
    """Content of `manifest.json`. See docs/cache.md for all entries.

    Attributes:
        count: Number of samples.
        views: Number of augmented views of each sample. 0 if only clean views are stored.
        seed: Random seed of the cache.
        layout: Layout of a row.
        shard_rows: Number of rows of a full shard.
        batch_size: Batch size of the teacher. A full shard contains a whole number of batches.
        teacher: Name of the teacher and fingerprint of its weights.
        data: Fingerprint of the keys (except for a stream), and root folder of the paths.
        transforms: {name: description} of the transforms that are replayed.
        vocab: Class names, in the order of the logits.
        samples: Row, view and digest of a few inputs. The optional entry `after` has numbers computed
            from these inputs after the batch transforms.
        shards: Name, size in bytes and checksum of each file. Until all files are written, only
            `head.bin` is included.
        doubt: Reason not to trust the teacher, found when the cache was written.
        lost: Information lost by compression at a few temperatures, see
            `fastdistill.cache.store_choice`.
        parts: Name and number of rows of each file of a view, if the cache was written as a stream.
            An empty list until the stream is sealed. None for all other caches.
    """

    count: int
    views: int
    seed: int
    layout: Layout
    shard_rows: int
    batch_size: int
    teacher: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    transforms: dict = field(default_factory=dict)
    vocab: Sequence | None = None
    samples: list = field(default_factory=list)
    versions: dict = field(default_factory=dict)
    shards: list = field(default_factory=list)
    complete: bool = False
    doubt: str = ''
    lost: list = field(default_factory=list)
    parts: list | None = None

    @property
    def stored(self) -> int:
        return max(self.views, 1)

    @property
    def per_view(self) -> int:
        return -(-self.count // self.shard_rows) if self.parts is None else len(self.parts)

    def shard(self, view: int, i: int) -> str:
        name = f'{i:06}.bin' if self.parts is None else f'{self.parts[i][0]}.rows'
        return f'view{view:03}/{name}'

    def rows_of(self, i: int) -> int:
        if self.parts is not None:
            return self.parts[i][1]
        return min(self.shard_rows, self.count - i * self.shard_rows)

    def place(self, at: Any) -> tuple:
        """Return (index of the file, index of the row in that file) for positions in the cache."""
        if self.parts is None:
            return np.divmod(at, self.shard_rows)
        i = np.searchsorted(self._starts, at, 'right') - 1
        return i, at - self._starts[i]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(n for _, n in self.parts or ())])[:-1]

    def all_shards(self) -> Iterator[tuple]:
        """Yield (view, index, name, size in bytes) of each shard."""
        for v in range(self.stored):
            for i in range(self.per_view):
                yield v, i, self.shard(v, i), self.rows_of(i) * self.layout.bytes

    def all_files(self) -> Iterator[tuple[str, int]]:
        """Yield (name, size in bytes) of each file that has a checksum."""
        yield 'keys.bin', 8 * self.count
        if self.parts is not None:
            yield 'index.bin', 8 * self.count
        if self.head_bytes:
            yield 'head.bin', self.head_bytes
        yield from ((name, size) for *_, name, size in self.all_shards())

    @property
    def head_bytes(self) -> int:
        """Size of the stored linear layer in bytes, see `StoredHead`. 0 if there is none."""
        return self.layout.head_bytes

    @property
    def bytes(self) -> int:
        return self.count * self.stored * self.layout.bytes + self.head_bytes

    def to_json(self) -> builtins.bytes:
        d = dict(format=FORMAT, version=VERSION, **asdict(self))
        d['layout'] = self.layout.to_json()
        for k in ('doubt', 'lost'):
            if not d[k]:
                del d[k]
        if self.parts is None:
            del d['parts']
        d['checksum'] = entries_checksum(d)
        return json.dumps(d, indent=1, default=as_python).encode()

    def as_read(self) -> 'Manifest':
        """Return the manifest as if read from its file: checked, and without tuples and NumPy
        numbers.
        """
        d = {**asdict(self), 'layout': self.layout.to_json()}
        return manifest_of(json.loads(json.dumps(d, default=as_python)))

    @staticmethod
    def read(where: Folder) -> 'Manifest':
        """Read the manifest of the cache in folder `where`."""
        if (size := where.size('manifest.json') or 0) > MAX_MANIFEST:
            raise DistillError(
                f'{where}/manifest.json has {size} bytes: at most {MAX_MANIFEST} are allowed.'
            )
        return parse_manifest(where.read('manifest.json'), where)

    @property
    def checksums(self) -> dict[str, str]:
        """{file name: checksum} of all files of a complete cache, or else only of `head.bin`."""
        return {s['name']: s['checksum'] for s in self.shards}


CHECKSUM = re.compile('[0-9a-f]{32}'), '32 hexadecimal digits'
PART_NAME = (
    re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}'),
    'up to 200 letters, digits, or any of _.-, not beginning with a dot or a dash',
)


# entries of a manifest that do not depend on other entries, for `check_json`
MANIFEST_ENTRIES = dict(
    views=range(MAX_VIEWS + 1),
    seed=range(-(2**63), 2**64),
    batch_size=range(1, MAX_BATCH + 1),
    shard_rows=range(1, MAX_COUNT + 1),
    teacher=dict,
    transforms=dict,
    versions=dict,
    data={'keys?': str, 'root?': str},
    vocab=(None, [None, 0, MAX_MANIFEST]),
    doubt=str,
    lost=[dict(T=float, kl=float, share=float, correlation=float), 0, 100],
    parts=(None, [[None, 2, 2], 0, MAX_FILES]),
    complete=bool,
)


def check_entries(m: Manifest) -> None:
    """Check all entries except the layout. Raise a DistillError for a wrong type or number, or if
    entries do not fit together.
    """
    check_json('count', m.count, range(0 if m.parts == [] else 1, MAX_COUNT + 1))
    for k, spec in MANIFEST_ENTRIES.items():
        check_json(k, getattr(m, k), spec)
    for g in json_list('teacher.classes', m.teacher.get('classes', [0]), 1, MAX_COUNT):
        for c in g if isinstance(g, list) else [g]:
            whole_number('teacher.classes', c, 0, MAX_COUNT)
    if m.shard_rows % m.batch_size:
        raise DistillError(
            f'shard_rows is {m.shard_rows}: it must be a multiple of batch_size, {m.batch_size}.'
        )
    if m.parts is not None:
        check_parts(m.parts, m.count)
    if (n := m.stored * m.per_view) > MAX_FILES:
        raise DistillError(
            f'count, views and shard_rows make {n} files: at most {MAX_FILES} are allowed.'
        )
    most = m.rows_of(0) if m.parts is None else max((n for _, n in m.parts), default=0)
    if (n := most * m.layout.bytes) > MAX_FILE:
        raise DistillError(
            f'shard_rows and layout make files of {n} bytes: at most {MAX_FILE} are allowed.'
        )
    place = dict(row=range(m.count), view=range(m.stored), digest=str)
    check_json('samples', m.samples, [place | {'after?': [[float, 3, 3], 0, 1000]}, 0, 1000])
    own = 1 + bool(m.head_bytes) + (m.parts is not None)
    n, head = (own + m.stored * m.per_view) * m.complete, [('head.bin', m.head_bytes)]
    json_list('shards', m.shards, n, n if m.complete else bool(m.head_bytes))
    files = m.all_files() if m.complete else head
    for i, (s, (name, size)) in enumerate(zip(m.shards, files)):
        of_file = dict(name=(name,), bytes=range(size, size + 1), checksum=CHECKSUM)
        check_json(f'shards[{i}]', s, of_file)


def check_parts(parts: list, count: int) -> None:
    """Check the file names of a stream, and their numbers of rows."""
    for i, (name, n) in enumerate(parts):
        check_json(f'parts[{i}]', name, PART_NAME)
        whole_number(f'parts[{i}]', n, 1, MAX_COUNT)
    if len({name for name, _ in parts}) < len(parts):
        raise DistillError('parts has the same name twice.')
    if (n := sum(n for _, n in parts)) != count:
        raise DistillError(f'parts have {n} rows, but count is {count}.')


def parse_manifest(text: bytes, where: Any) -> Manifest:
    """Parse the content of `manifest.json`, and check all entries."""
    try:
        if not isinstance(d := parse_json(text), dict) or d.get('format') != FORMAT:
            raise NotACache(f'{where}/manifest.json does not belong to a fastdistill cache.')
        if type(v := d.get('version')) is not int or v != VERSION:
            raise NotACache(
                f'{where} is a cache of version {shortened(v)}, which a different version of '
                f'fastdistill wrote: this one reads only version {VERSION}. Write the cache again '
                '(force=True).'
            )
        # subtle: remove the checksum first, because it covers only the other entries
        intact = d.pop('checksum', None) == entries_checksum(d)
        del d['format'], d['version']
        m = manifest_of(d)
        # subtle: compared last, because the errors of `manifest_of` say more
        if not intact:
            raise DistillError(
                'its entries do not match its checksum, so it was changed after it was written.'
            )
        return m
    except NotACache as e:
        raise DistillError(str(e)) from None
    except DistillError as e:
        raise DistillError(
            f'{where}/manifest.json is damaged: {e} Restore the file, or write the cache again '
            '(force=True).'
        ) from None


def manifest_of(d: Any) -> Manifest:
    """Build the manifest from a dict. All entries are checked first."""
    required = [f.name for f in fields(Manifest) if f.default is f.default_factory is MISSING]
    optional = [f.name for f in fields(Manifest) if f.name not in required]
    json_object('the file', d, required, optional)
    m = Manifest(**{**d, 'layout': Layout.from_json(d['layout'])})
    check_entries(m)
    return m


def entries_checksum(entries: dict) -> str:
    """Compute the checksum of the entries of a manifest. It does not depend on the indentation."""
    return checksum(json.dumps(entries, default=as_python).encode())


class NotACache(DistillError):
    """Raised for an intact file that is not the manifest of a cache, or has an unsupported
    version.
    """


def as_python(o: Any) -> Any:
    """Convert a NumPy number or array to Python objects for JSON."""
    if hasattr(o, 'tolist'):
        return o.tolist()
    raise DistillError(
        f"A {type(o).__name__} can't be stored in a manifest: use strings, numbers, and lists of these."
    )


def differences(a: Manifest, b: Manifest, changed_files: Callable = lambda: '') -> list:
    """Return texts that describe how the requested cache differs from the existing one.

    A larger number of views is not a difference, because the missing views can be added.

    Args:
        a: Manifest of the existing cache.
        b: Manifest of the requested cache.
        changed_files: fn() -> text with the names of changed sample files, or ''.
    """
    out = []

    def differ(what: str, x: Any, y: Any) -> None:
        if x != y:
            out.append(f'{what}: {shortened(x)} in the cache, {shortened(y)} now')

    for k in dict.fromkeys([*a.teacher, *b.teacher]):
        if k != 'name':
            differ(f'teacher, {k}', a.teacher.get(k), b.teacher.get(k))
    if (a.count, a.data.get('keys')) != (b.count, b.data.get('keys')):
        what = "data (count and fingerprint of the samples' keys)"
        differ(what, (a.count, a.data), (b.count, b.data))
    elif text := changed_files():
        out.append(text)
    out += transform_differences(a.transforms, b.transforms)
    if not 0 < a.views < b.views:
        differ('views', a.views, b.views)
    differ('written as a stream', a.parts is not None, b.parts is not None)
    for k in ('seed', 'vocab', 'layout'):
        differ(k, getattr(a, k), getattr(b, k))
    known = {(s['row'], s['view']): s for s in a.samples}
    if not out and not all(alike(known.get((s['row'], s['view']), s), s) for s in b.samples):
        out.append(f'the inputs of some samples{OTHER_INPUT}{other_libraries(a)}')
    return out


def transform_differences(found: Mapping, now: Mapping) -> list[str]:
    return [
        f'transform {k}: {shortened(a)} in the cache, {shortened(b)} now'
        for k in dict.fromkeys([*found, *now])
        for a, b in option_differences(found.get(k, 'none'), now.get(k, 'none'))
    ]


def option_differences(a: Any, b: Any) -> list:
    """Compare the descriptions of two transforms.

    Returns:
        List with a pair (options of `a`, options of `b`) for each difference.
    """
    if a == b:
        return []
    if not all(isinstance(o, str) and o.endswith((')', ']')) for o in (a, b)):
        return [(a, b)]  # at least one description has no options
    x, y = options_in(a), options_in(b)
    found = [
        (', '.join(x[i:j]) or 'none', ', '.join(y[k:l]) or 'none')
        for kind, i, j, k, l in SequenceMatcher(None, x, y, autojunk=False).get_opcodes()
        if kind != 'equal'
    ]
    return found or [(a, b)]


def options_in(text: str) -> list[str]:
    """Split the description of a transform into its options, e.g. 'size=224.0',
    'rotate_mat.p=0.75'.
    """
    # options of a function are written as pairs
    text = re.sub(r"\['(\w+)', ([^\[\]]*)\]", r'\1=\2', text)
    out, owners, last = [], [], ''
    for part in re.findall(r'[\[\]()]|[^\[\](), ]+', text):
        if part in '[(':
            owners.append(last)
        elif part in '])':
            last = owners.pop() if owners else ''
        elif re.fullmatch('[0-9a-f]{16}', part):
            out.append(f'{last}: code {part}')
        else:
            owner = owners[-1] if len(owners) > 1 or owners and owners[0].endswith('=') else ''
            if not part.endswith('='):
                out.append(owner + ('.' if owner and not owner.endswith('=') else '') + part)
            last = part if part.endswith('=') else part.rpartition('=')[2]
    return out


def sample_differences(m: Manifest, at: Any, look: Callable) -> list:
    """Recompute the inputs of a few samples and compare them with the manifest.

    Args:
        m: The manifest.
        at: Position in the cache of each sample of a dataset, (N,).
        look: fn(index of a sample, view) -> dict with its digest, as in `Manifest.samples`.

    Returns:
        List with a text about the first input that differs, or an empty list.
    """
    for s in m.samples:
        here = np.flatnonzero(at == s['row'])
        if len(here) and not alike(s, s | look(int(here[0]), s['view'])):
            return [f'the input of sample {here[0]}{OTHER_INPUT}{other_libraries(m)}']
    return []


def moved_samples(m: Manifest, at: np.ndarray, look: Callable[[int, int], str]) -> list:
    """Look for inputs of a cache without views that have a different name now.

    The student's transforms may differ from the teacher's. Therefore, an input that differs is not
    an error, but an input that belonged to a different sample is. For example, if the names are
    positions, they belong to different samples after the data were shuffled.

    Args:
        m: The manifest.
        at: Position in the cache of each sample of a dataset, (N,).
        look: fn(index of a sample, view) -> digest of its input. If transforms are random, their
            random numbers depend on the view.

    Returns:
        List with a text about the first such input, or an empty list.
    """
    places: dict[str, list[int]] = {}
    for s in m.samples:
        places.setdefault(s['digest'], []).extend(np.flatnonzero(at == s['row']).tolist())
    # a random transform may leave the input unchanged in one of several views
    places = {
        digest: here
        for digest, here in places.items()
        if here and all(look(here[0], view) != digest for view in range(16))
    }
    near = [i + step for here in places.values() for i in here for step in (-2, -1, 1, 2)]
    some = np.linspace(0, len(at) - 1, min(1000, len(at))).astype(int).tolist()
    for i in dict.fromkeys([i for i in near if 0 <= i < len(at)] + some * bool(places)):
        if (here := places.get(look(i, 0))) is not None and i not in here:
            return [
                f'sample {i} has the input that sample {here[0]} had when the cache was written: keys= '
                'must identify the samples themselves, not their positions, which change when samples '
                'are shuffled, added or removed'
            ]
    return []


def alike(a: Any, b: Any) -> bool:
    """Return True if two entries of `Manifest.samples` describe the same input.

    The digests must be equal. Values after the batch transforms may differ slightly, since they
    depend on the device.
    """
    if any(a.get(k) != b.get(k) for k in ('row', 'view', 'digest')):
        return False
    x, y = [np.asarray(o.get('after', []), float) for o in (a, b)]
    return x.shape == y.shape and np.allclose(x, y, rtol=1e-3, atol=1e-3, equal_nan=True)


OTHER_INPUT = (
    ': the transforms give a different result than when the cache was written, because a file, '
    'a function among the transforms or a library changed'
)


def other_libraries(m: Manifest) -> str:
    now = versions()
    other = [f'{k} {v} then, {now.get(k)} now' for k, v in m.versions.items() if now.get(k) != v]
    return f' ({"; ".join(other)})' if other else ''


def refuse(where: Any, found: list, force: bool, then: str = 'It is used anyway') -> None:
    """Raise a DistillError if a cache does not fit.

    Args:
        where: Folder of the cache.
        found: Texts that describe the differences.
        force: If True, warn instead of raising an error.
        then: End of the warning.
    """
    if not found:
        return
    text = f"{where} doesn't fit:\n" + '\n'.join(f'- {o}' for o in found)
    if not force:
        raise DistillError(
            f'{text}\nUse the data, transforms and teacher with which it was written, write a new '
            'cache, or pass force=True.'
        )
    warnings.warn(DistillWarning(f'{text}\n{then} (force=True).'))
