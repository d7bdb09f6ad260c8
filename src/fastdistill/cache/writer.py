"""Write a cache shard by shard, and resume interrupted runs."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..base.distributed import on_first, rank, world_size
from ..base.errors import is_whole, options_of_group
from ..base.outputs import DistillError, DistillWarning, TopK, as_dense
from ..base.sample_seeds import seeds_of
from .digests import checksum, versions
from .file_store import Folder, open_folder
from .head_file import entries_of_head, read_head, restore_head
from .keys import hash_of
from .manifest import MAX_VIEWS, Manifest, differences, refuse
from .output_layer import StoredHead, head_of, worst_error
from .reader import TeacherCache, damages
from .rounding import Rounding, feature_errors, largest_step, warn_of_rounding
from .row_layout import Layout, Store
from .sample_files import changed_files, changed_text, record_files, write_record
from .shard_notes import clear, note_of, notes
from .store_choice import few_outputs
from .teacher_description import Source
from .verify_rows import other_outputs

SHARD_BYTES = 64 * 2**20
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
    head: StoredHead | None = None,
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
        head: Stored linear layer of a cache with the same layout. If None, it is computed from the
            outputs, for layouts that have one.
    """
    check_views(views)
    if not len(source.keys):
        raise DistillError('There are no samples: there is nothing to write.')
    where = open_folder(path)
    first, lost, measured = source.first(1), (), None
    if choose is not None:
        store, source, lost, measured = choose(where, store, source, first, views, force)
    elif store.kind == 'auto':
        store = Store('logits', axis=store.axis)
    if store.kind == 'hidden':
        # subtle: the units of hidden states are computed from a whole batch
        first = source.first(source.bs)
    layout = Layout.of(first, store)
    fitted: Any = first.logits
    if layout.kind == 'pca' and head is None:
        fitted = torch.cat([as_dense(o.logits) for o in measured or few_outputs(source)])
    head = head or head_of(fitted, layout)
    del fitted, measured  # release the memory while the teacher runs
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
        rounding.worst = max(rounding.worst, largest_step(layout, rows))
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
    sums['keys.bin'] = checksum(where.read('keys.bin'))
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
