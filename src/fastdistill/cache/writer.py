"""Write a cache shard by shard, and resume interrupted runs."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..base.distributed import on_first, rank, world_size
from ..base.errors import options_of_group
from ..base.outputs import DistillError, DistillWarning, Outputs, TopK, as_dense
from ..base.sample_seeds import seeds_of
from .digests import checksum, versions
from .file_store import Folder, open_folder
from .json_checks import check_json, parse_json
from .keys import hash_of
from .manifest import CHECKSUM, MAX_VIEWS, Manifest, differences, refuse
from .output_layer import StoredHead, head_of, worst_error
from .reader import TeacherCache, damages
from .row_layout import COARSE, Layout, Store
from .sample_files import changed_files, changed_text, record_files, write_record
from .store_choice import few_outputs
from .teacher_description import Source, is_whole
from .verify_rows import comparable, row_errors

SHARD_BYTES = 64 * 2**20
# maximum error of logits computed from hidden states, relative to the range of the logits
INACCURATE = 0.02
# maximum difference of features, relative to their standard deviation
FEATURES_FAR = 0.1
# if the outputs for the first samples differ by more than this fraction of the largest output, the
# cache belongs to a different teacher. A different batch size or device, or int8, changes them less
OTHER_OUTPUTS = 0.05
DRAWS = 2  # random stream for drawing classes. Item and batch transforms use the streams 0 and 1


@dataclass
class Forecast:
    """The size of a cache, computed before the teacher runs.

    Attributes:
        samples: Number of samples.
        views: Number of views of each sample.
        bytes_per_view: Size of one view of one sample in bytes.
        bytes: Size of the rows that are not written yet, in bytes.
        free: Free disk space in bytes. None if unknown.
    """

    samples: int
    views: int
    bytes_per_view: int
    bytes: int
    free: int | None

    def __str__(self) -> str:
        disk = '' if self.free is None else f', {self.free / 1e9:.2f} GB free'
        total = f'{self.bytes / 1e6:.1f} MB{disk}'
        return (
            f'{self.samples} samples x {self.views} view(s) x {self.bytes_per_view} bytes = {total}'
        )

    def check(self, where: Folder) -> None:
        if self.free is not None and self.bytes > self.free:
            raise DistillError(
                f'{where}: {self}. There is not enough disk space: use fewer views, store less '
                "(store='auto' compares the formats), or use a different disk."
            )


def check_views(views: Any) -> None:
    if not is_whole(views) or not 0 <= views <= MAX_VIEWS:
        raise DistillError(
            f'views={views!r}: must be a whole number from 0 (the clean view) to {MAX_VIEWS}.'
        )


def options_of_run(run: Mapping | None, **loader: Any) -> tuple[dict, dict]:
    """Split the argument `run` of `cache_dataset` and `cache_teacher`.

    Args:
        run: Options that the user passed.
        **loader: Options of the DataLoader, with their defaults.

    Returns:
        (options of the DataLoader, options of `write_cache`).
    """
    own: dict[str, Any] = dict(seed=0, forecast=None)
    given = options_of_group('run', run, [*loader, *own])
    of_loader, of_writer = ({k: given.get(k, v) for k, v in o.items()} for o in (loader, own))
    return of_loader, of_writer


def write_cache(
    path: Any,
    source: Source,
    store: Store,
    *,
    views: int = 1,
    seed: int = 0,
    force: bool = False,
    progress: Callable | None = None,
    forecast: Callable | None = None,
    shard_bytes: int = SHARD_BYTES,
    choose: Callable | None = None,
) -> TeacherCache:
    """Write the missing shards of a cache, and open it.

    If the cache has fewer views than requested, the missing views are added. Under
    torch.distributed, each rank writes some of the shards.

    Args:
        path: Folder or URL of the cache.
        source: The teacher and its data.
        store: How to store the outputs.
        views: Number of augmented views of each sample. 0 for a single clean view.
        seed: Random seed.
        force: If True, overwrite an existing cache with different data or a different teacher,
            instead of raising an error.
        progress: fn(rows done, total rows, bytes done), called after each batch.
        forecast: fn(Forecast), called before the teacher runs.
        shard_bytes: Maximum size of a shard in bytes.
        choose: `fastdistill.cache.store_choice.Choice` that chooses the storage format. If None,
            `store='auto'` stores all logits.
    """
    check_views(views)
    if not len(source.keys):
        raise DistillError('There are no samples: there is nothing to write.')
    where = open_folder(path)
    first, lost = source.first(1), ()
    if choose is not None:
        store, source, lost = choose(where, store, source, first, views)
    elif store.kind == 'auto':
        store = Store('logits', axis=store.axis)
    if store.kind == 'hidden':
        # subtle: the units of hidden states are computed from a whole batch
        first = source.first(source.bs)
    layout = Layout.of(first, store)
    fitted: Any = first.logits
    if layout.kind == 'pca':
        fitted = torch.cat([as_dense(o.logits) for o in few_outputs(source)])
    head = head_of(fitted, layout)
    rows = max(shard_bytes // layout.bytes // source.bs, 1) * source.bs
    data = dict(keys=f'{hash_of(source.keys.tobytes()):016x}', root=source.root)
    m = Manifest(len(source.keys), views, seed, layout, rows, source.bs, source.teacher, data)
    m.transforms, m.vocab, m.samples = source.transforms, source.vocab, source.samples or []
    m.versions, m.doubt, m.lost = versions(), source.doubt, list(lost)
    m.shards = entries_of_head(head)
    with where.lock() if rank() == 0 else nullcontext():
        # subtle: invalid values raise an error in `as_read`, before files are removed
        m, done = on_first(lambda: _begin(where, source, m.as_read(), first, head, force))
        # subtle: read the stored layer, since an interrupted run may have used a different one
        head = read_head(where, m)
        todo = [s for s in m.all_shards() if s[2] not in done]
        plan = Forecast(m.count, m.stored, layout.bytes, sum(s[3] for s in todo), where.free())
        if forecast is not None:
            forecast(plan)
        plan.check(where)
        _write_shards(where, source, m, head, todo[rank() :: world_size()], progress)
        on_first(lambda: _finish(where, m, done))
    return TeacherCache(where)


def _begin(
    where: Folder, source: Source, m: Manifest, first: Any, head: StoredHead | None, force: bool
) -> tuple:
    """Create the cache, or reopen an existing cache of the same data and teacher.

    Returns:
        (manifest, {shard: checksum} of the shards that are already written).
    """
    keys = source.keys.astype('<u8').tobytes()
    if where.size('manifest.json') is not None:
        try:
            old = Manifest.read(where)
        except DistillError as e:
            if not force:
                raise
            warnings.warn(DistillWarning(f'{e} The cache is overwritten (force=True).'))
        else:
            restore_head(where, old, head)
            found = differences(old, m, lambda: changed_now(where, source.files))
            if not (found := found or other_outputs(where, old, first)):
                return _reopen(where, old, m, keys)
            refuse(where, found, force, 'The cache is overwritten')
    clear(where)
    clear(where.sub('valid'))  # the validation cache belongs to the overwritten cache
    where.write('keys.bin', keys)
    if head is not None:
        where.write('head.bin', head.to_bytes())
    if source.files is not None:
        write_record(where, record_files(source.files))
    where.write('manifest.json', m.to_json())
    return m, {}


def changed_now(where: Folder, paths: Sequence | None) -> str:
    """Return a text that lists changed sample files, or '' if none changed."""
    try:
        names = changed_files(where, len(paths or ()), paths, update=True)
    except DistillError as e:
        return str(e)
    return changed_text(names, len(paths or ())) if names else ''


def other_outputs(where: Folder, m: Manifest, first: Any) -> list:
    """Check whether the teacher's outputs for the first samples differ from the stored outputs.

    This detects changes that the description of a teacher does not show, such as a different
    function that prepares its inputs.

    Args:
        where: Folder of the cache.
        m: Manifest of the cache.
        first: Current outputs for the first samples.

    Returns:
        List with a text about the difference, or an empty list.
    """
    name, size = m.shard(0, 0), m.layout.bytes
    known = m.checksums.get(name) or note_checksum(where, next(m.all_shards()))
    if known is None or head_is_lost(where, m):
        return []
    if where.size(name) is None or checksum(data := where.read(name)) != known:
        return []  # the file is missing or damaged, and will be written again
    head = read_head(where, m)
    likeliest = isinstance(first.logits, TopK)
    n = (first.logits.ids if likeliest else first.logits).shape[0]
    rows = np.frombuffer(data, np.uint8)[: n * size].reshape(n, size).copy()
    old, now = comparable(m.layout, rows, first.logits, head)
    # encode the current outputs, too, so that both have the errors of the storage format. This does
    # not work for formats that select classes
    whole = m.layout.n is None or m.head_bytes
    if m.layout.kind != 'pca' and (whole or likeliest):
        now = m.layout.decode(torch.from_numpy(m.layout.encode(first, head)), head).logits
    errors, sizes = row_errors(old, now)
    largest = max(sizes) or 1 if whole else max(*sizes, 1)  # log-probabilities may be almost 0
    if (far := max(errors) / largest) <= OTHER_OUTPUTS:
        return []
    return [
        f"the teacher's outputs for the first samples: they differ by {far:.2g} of the largest output, "
        'so the teacher, or a function that prepares its inputs, has changed'
    ]


def _reopen(where: Folder, old: Manifest, m: Manifest, keys: bytes) -> tuple:
    """Reopen an existing cache.

    Returns:
        (manifest with the requested number of views, {shard: checksum} of the intact shards).
    """
    clear(where, '.tmp')
    new = replace(
        old,
        views=m.views,
        samples=m.samples,
        shards=[o for o in old.shards if o['name'] == 'head.bin'],
        complete=False,
        doubt=m.doubt or old.doubt,
    )
    if where.size('keys.bin') != len(keys) or where.read('keys.bin') != keys:
        where.write('keys.bin', keys)
    read_head(where, old)
    if not old.complete:
        if new != old:
            where.write('manifest.json', new.to_json())
        return new, notes(where, new.all_shards())
    bad, own = damages(where, old, old.shards), old.checksums
    # a writer that was killed just before it finished may have left these files
    clear(where, '.json', {note_of(n) for n in own})
    if new.views == old.views and not bad:
        return old, own
    for n in bad:
        if n != 'keys.bin':
            where.remove(n)
    # subtle: the old manifest is kept until all shards are written, so that the old views stay
    # readable
    added = [s for s in new.all_shards() if s[2] not in own]
    return new, {k: v for k, v in own.items() if k not in bad} | notes(where, added)


def entries_of_head(head: StoredHead | None) -> list[dict]:
    """Return the entries of `Manifest.shards` before the rows are written."""
    if head is None:
        return []
    data = head.to_bytes()
    return [dict(name='head.bin', bytes=len(data), checksum=checksum(data))]


def head_is_lost(where: Folder, m: Manifest) -> bool:
    """Return True if `head.bin` is needed, but is missing, has a different size, or was changed."""
    if (where.size('head.bin') if m.head_bytes else 0) != m.head_bytes:
        return True
    known = m.checksums.get('head.bin')  # unknown if an earlier version began to write the cache
    return known is not None and checksum(where.read('head.bin')) != known


def restore_head(where: Folder, m: Manifest, head: StoredHead | None) -> None:
    """Rewrite `head.bin` if it is missing or damaged and `head` is the layer that it contained."""
    if head is not None and head_is_lost(where, m):
        data = head.to_bytes()
        if checksum(data) == m.checksums.get('head.bin'):
            where.write('head.bin', data)


def read_head(where: Folder, m: Manifest) -> StoredHead | None:
    """Read `head.bin`, and compare it with its checksum. Return None if the rows do not need it."""
    if head_is_lost(where, m):
        what = (
            'components' if m.layout.kind == 'pca' else 'output layer of the stored hidden states'
        )
        again = 'write the cache again (force=True)' if m.parts is None else 'start a new stream'
        raise DistillError(
            f'head.bin of {where}, the {what}, is missing or damaged, but the rows are unreadable '
            f'without it: restore it, or {again}.'
        )
    return StoredHead.from_bytes(where.read('head.bin'), m.layout) if m.head_bytes else None


CACHE_FILES = re.compile(
    r'(manifest\.json|keys\.bin|index\.bin|head\.bin|files\.bin|view\d{3,}/\d{6,}\.(bin|json)'
    r'|view\d{3,}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.(rows|keys|end))(\.\d+\.tmp)?'
)


def clear(where: Folder, ending: str = '', only: Any = None) -> None:
    """Remove only files that belong to a cache.

    The manifest is removed first, since a folder without a manifest is not a cache.
    """
    for n in sorted(where.names(), key=lambda n: n != 'manifest.json'):
        wanted = n.endswith(ending) and (only is None or n in only)
        if wanted and CACHE_FILES.fullmatch(n) and not (ending and n == 'manifest.json'):
            where.remove(n)


def note_of(name: str) -> str:
    return name.replace('.bin', '.json')


def note_checksum(where: Folder, shard: Sequence) -> str | None:
    """Return the checksum of a shard from its '.json' file.

    The result is None if the shard is missing or has the wrong size.
    """
    *_, name, size = shard
    note = note_of(name)
    if where.size(name) != size or not 0 < (where.size(note) or 0) < 1000:
        return None
    try:
        check_json(
            note,
            o := parse_json(where.read(note)),
            dict(name=(name,), checksum=CHECKSUM, bytes=None),
        )
    except DistillError:
        return None
    return o['checksum']


def notes(where: Folder, shards: Iterable[tuple]) -> dict[str, str]:
    """Return {shard: checksum} of the shards that have been written."""
    return {s[2]: o for s in shards if (o := note_checksum(where, s)) is not None}


def _write_shards(
    where: Folder,
    source: Source,
    m: Manifest,
    head: StoredHead | None,
    todo: Sequence[tuple],
    progress: Callable | None,
) -> None:
    """Run the teacher on the samples of the missing shards, and write these shards."""
    done, total = 0, sum(m.rows_of(i) for _, i, *_ in todo)
    rounding = Rounding()
    # limit the number of shards per pass of the DataLoader, since the tasks of a pass are in memory
    some = max(2**20 // m.shard_rows, 1)
    positions = lambda i: i * m.shard_rows + np.arange(m.rows_of(i))
    for at in range(0, len(todo), some):
        shards = todo[at : at + some]
        tasks = [padded(v * m.count + positions(i), m.batch_size) for v, i, *_ in shards]
        # subtle: close the generator explicitly. After an error, the traceback would keep the
        # generator alive, and its changes to the teacher and the random state would remain
        with closing(source.run(np.concatenate(tasks), m.batch_size)) as batches:
            for v, i, name, _ in shards:
                keys, encode = source.keys[positions(i)], partial(encoded, m, head, v, rounding)
                for rows in _write_shard(where, m, name, keys, batches, encode):
                    done += rows
                    if progress is not None:
                        progress(done, total, done * m.layout.bytes)
    warn_of_rounding(m.layout, rounding)


@dataclass
class Rounding:
    """Errors of the stored numbers, which `encoded` updates.

    Attributes:
        worst: If hidden states are stored in int8, the largest error of a logit so far, relative to
            the range of the logits. Otherwise, the largest step between stored numbers.
        features: {layer: root mean square difference of its stored features in the first batch,
            relative to their standard deviation}. None before the first batch.
    """

    worst: float = 0.0
    features: dict[str, float] | None = None


def feature_errors(layout: Layout, rows: np.ndarray, head: Any, out: Outputs) -> dict[str, float]:
    """Return `Rounding.features` for a batch."""
    errors: dict[str, float] = {}
    got = layout.decode(torch.from_numpy(rows), head).feats if out.feats else {}
    for k, v in got.items():
        own = out.feats[k].detach().float().cpu()
        spread = float(own.std(correction=0))
        errors[k] = float((v - own).square().mean().sqrt()) / spread if spread > 0 else 0.0
    return errors


def warn_of_rounding(layout: Layout, rounding: Rounding) -> None:
    """Warn if logits in int8 or float16, logits computed from hidden states in int8, or features are
    too inaccurate.

    Args:
        layout: Layout of the rows.
        rounding: What `encoded` updated.
    """
    worst = rounding.worst
    if bad := {k: e for k, e in (rounding.features or {}).items() if e > FEATURES_FAR}:
        far = ', '.join(f'{100 * e:.0f}% ({k})' for k, e in bad.items())
        text = (
            f"Stored features differ from the teacher's by {far} of their standard deviation: they are "
            "very small, or their mean is large compared with their differences. Use store='float32'."
        )
        warnings.warn(DistillWarning(text))
    if layout.kind == 'hidden' and worst > INACCURATE:
        text = (
            f"Logits computed from hidden states in int8 differ from the teacher's by up to "
            f'{100 * worst:.1f}% of their range: a few numbers are much larger than all others. Use '
            "store=dict(kind='hidden', dtype='float16')."
        )
    elif layout.kind != 'hidden' and worst > COARSE and layout.fields[0].dtype == 'float16':
        text = (
            f'float16 stores the outputs of some samples in steps of {worst:.3g}, because all of them '
            'are very high or very low numbers. Smaller differences are lost. Use '
            "dtype='float32', or subtract the largest logit in the teacher, which doesn't change the "
            'probabilities.'
        )
    elif layout.kind != 'hidden' and worst > COARSE:
        text = (
            f'int8 stores the outputs of some samples in steps of {worst:.3g}, because they range from '
            'very low to very high numbers (is a class masked out with a low logit?). Smaller '
            "differences are lost. Use dtype='float16', or 'float32' for numbers beyond 65504."
        )
    else:
        return
    warnings.warn(DistillWarning(text))


def encoded(
    m: Manifest, head: Any, view: Any, rounding: Rounding, keys: Any, out: Any
) -> np.ndarray:
    """Encode the outputs of a batch to rows.

    Args:
        m: Manifest of the cache.
        head: `StoredHead` of the cache, for layouts with a `head`.
        view: View of the samples.
        rounding: The `Rounding` that this function updates.
        keys: Keys of the samples in the batch.
        out: Outputs of the batch.
    """
    layout, t = m.layout, out.logits
    if (n := len(t.ids if isinstance(t, TopK) else t)) != len(keys):
        raise DistillError(
            f'The teacher returned {n} outputs for {len(keys)} samples: it must return one for each '
            'sample.'
        )
    if layout.draws is not None:
        seeds = seeds_of(m.seed, keys, view, DRAWS) >> np.uint64(1)
        return layout.encode(out, seeds=seeds.astype(np.int64))
    rows = layout.encode(out, head)
    if rounding.features is None:
        rounding.features = feature_errors(layout, rows, head, out)
    if layout.kind != 'hidden':
        rounding.worst = max(rounding.worst, layout.largest_step(torch.from_numpy(rows)))
    elif layout.fields[0].dtype == 'int8':
        got: Any = layout.decode(torch.from_numpy(rows), head).logits
        rounding.worst = max(rounding.worst, worst_error(t, got))
    return rows


def _write_shard(
    where: Folder, m: Manifest, name: str, keys: np.ndarray, batches: Any, encode: Callable
) -> Iterator[int]:
    """Write one shard, and yield the number of rows after each batch."""
    n, bs = len(keys), m.batch_size
    buf, keys = np.empty((n, m.layout.bytes), np.uint8), padded(keys, bs)
    for row in range(0, n, bs):
        buf[row : row + bs] = encode(keys[row : row + bs], next(batches))[: n - row]
        yield min(bs, n - row)
    data = buf.data.cast('B')
    where.write(name, data)
    note = dict(name=name, bytes=len(data), checksum=checksum(data))
    where.write(note_of(name), json.dumps(note).encode())


def _finish(where: Folder, m: Manifest, done: dict[str, str]) -> None:
    """Complete the manifest with the checksums of all files."""
    if m.complete:
        return
    sums = notes(where, [s for s in m.all_shards() if s[2] not in done]) | done
    sums |= m.checksums
    for name in ['keys.bin'] + ['head.bin'] * bool(m.head_bytes and 'head.bin' not in sums):
        sums[name] = checksum(where.read(name))
    if lost := [name for name, _ in m.all_files() if name not in sums]:
        raise DistillError(
            f'{lost[0]} of {where} disappeared while the cache was being written: write the cache again.'
        )
    m.shards = [dict(name=k, bytes=size, checksum=sums[k]) for k, size in m.all_files()]
    m.complete = True
    where.write('manifest.json', m.to_json())
    clear(where, '.json')


def padded(a: np.ndarray, bs: int) -> np.ndarray:
    """Pad tasks or keys to whole batches by repeating the last one.

    The additional outputs are discarded later.
    """
    return np.concatenate([a, np.repeat(a[-1:], -len(a) % bs)])
