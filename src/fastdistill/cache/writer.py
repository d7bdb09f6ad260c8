"Write a cache shard by shard. An interrupted run is resumed."

import json
import re
import warnings
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ..base.distributed import on_first, rank, world_size
from ..base.errors import options_of_group
from ..base.outputs import DistillError, DistillWarning
from ..base.sample_seeds import seeds_of
from .digests import checksum, versions
from .file_store import open_folder
from .json_checks import json_object, json_text, parse_json
from .keys import hash_of
from .manifest import CHECKSUM, MAX_VIEWS, Manifest, differences, refuse
from .output_layer import StoredHead, worst_error
from .reader import TeacherCache, damages
from .row_layout import Layout, Store
from .sample_files import changed_text, newer_record, read_record, record_files, write_record
from .teacher_description import Source, is_whole

__all__ = ['Forecast', 'check_views', 'finished', 'options_of_run', 'write_cache']

SHARD_BYTES = 64 * 2**20
INACCURATE = 0.02  # error of logits of hidden states, relative to their spread
DRAWS = 2  # stream of random numbers for draws; 0 and 1 are those of item and batch transforms


@dataclass
class Forecast:
    """The size of a cache, known before the teacher runs.

    Attributes:
        bytes: Bytes of the rows that are still missing.
        free: Free bytes on the disk. None if unknown.
    """

    samples: int
    views: int
    bytes_per_view: int
    bytes: int
    free: int | None

    def __str__(self):
        disk = '' if self.free is None else f', {self.free / 1e9:.2f} GB free'
        total = f'{self.bytes / 1e6:.1f} MB{disk}'
        return (
            f'{self.samples} samples x {self.views} view(s) x {self.bytes_per_view} bytes = {total}'
        )

    def check(self, where):
        if self.free is not None and self.bytes > self.free:
            raise DistillError(
                f"{where}: {self}. The disk is too small: use fewer views, store less (store='auto' "
                'measures what each way costs), or use a different disk.'
            )


def check_views(views):
    if not is_whole(views) or not 0 <= views <= MAX_VIEWS:
        raise DistillError(
            f'views={views!r}: must be a whole number from 0 (the clean view) to {MAX_VIEWS}.'
        )


def options_of_run(run, **loader) -> tuple[dict, dict]:
    """Return the options of the DataLoader and those of `write_cache` in the argument `run` of
    `cache_dataset` and `cache_teacher`.

    Args:
        run: What the user passed.
        **loader: Options of the DataLoader, with their defaults.
    """
    own = dict(seed=0, forecast=None)
    given = options_of_group('run', run, [*loader, *own])
    return tuple({k: given.get(k, v) for k, v in o.items()} for o in (loader, own))


def write_cache(
    path,
    source: Source,
    store: Store,
    *,
    views: int = 1,
    seed: int = 0,
    force: bool = False,
    progress=None,
    forecast=None,
    shard_bytes: int = SHARD_BYTES,
    choose=None,
) -> TeacherCache:
    """Write the missing shards and open the cache.

    If the cache has fewer views, they are kept and the others are added. Under torch.distributed,
    each rank writes its part.

    Args:
        path: Folder or URL.
        views: Number of augmented views of each sample. 0 for the clean view.
        seed: Seed of the random numbers.
        force: Whether to overwrite a cache that does not fit instead of raising an error.
        progress: fn(rows done, total rows, bytes done), called after each batch.
        forecast: fn(Forecast), called before the teacher runs.
        choose: `fastdistill.cache.store_choice.Choice`. None to store logits if `store` is 'auto'.
    """
    check_views(views)
    if not len(source.keys):
        raise DistillError('There are no samples: there is nothing to write.')
    where = open_folder(path)
    first, lost = first_outputs(source, 1), ()
    if choose is not None:
        store, source, lost = choose(where, store, source, first, views)
    elif store.kind == 'auto':
        store = Store('logits', axis=store.axis)
    if store.kind == 'hidden':
        # subtle: hidden states are scaled by the numbers of a whole batch
        first = first_outputs(source, min(source.bs, len(source.keys)))
    layout = Layout.of(first, store)
    head = None if layout.head is None else StoredHead.of(first.logits)
    with where.lock() if rank() == 0 else nullcontext():
        begin = lambda: _begin(where, source, layout, head, views, seed, force, shard_bytes, lost)
        m, done = on_first(begin)
        # subtle: the stored one, since an interrupted run may have scaled it by other numbers
        head = None if head is None else StoredHead.from_bytes(where.read('head.bin'), layout)
        todo = [s for s in m.all_shards() if s[2] not in done]
        plan = Forecast(m.count, m.stored, layout.bytes, sum(s[3] for s in todo), where.free())
        if forecast is not None:
            forecast(plan)
        plan.check(where)
        _write_shards(where, source, m, head, todo[rank() :: world_size()], progress)
        on_first(lambda: _finish(where, m, done))
    return TeacherCache(where)


def first_outputs(source, n):
    """Return the outputs of the first samples in one batch."""
    with closing(source.run(tasks_of(source, 0, 0, n), n)) as batches:
        return next(batches)


def _begin(where, source, layout, head, views, seed, force, shard_bytes, lost):
    """Return (manifest of the finished cache, checksums of the shards that already exist)."""
    rows = max(shard_bytes // layout.bytes // source.bs, 1) * source.bs
    m = Manifest(
        len(source.keys),
        views,
        seed,
        layout,
        rows,
        source.bs,
        source.teacher,
        dict(keys=f'{hash_of(source.keys.tobytes()):016x}', root=source.root),
        source.transforms,
        source.vocab,
        source.samples or [],
        versions(),
        doubt=source.doubt,
        lost=list(lost),
    )
    m = m.as_read()  # subtle: before anything is removed, since wrong values raise an error here
    keys = source.keys.astype('<u8').tobytes()
    if where.size('manifest.json') is not None:
        try:
            old = Manifest.read(where)
        except DistillError as e:
            if not force:
                raise
            warnings.warn(DistillWarning(f'{e} It is overwritten (force=True).'))
        else:
            if not (found := differences(old, m, lambda: changed_now(where, source.files))):
                return _reopen(where, old, m, keys)
            refuse(where, found, force, 'It is overwritten')
    clear(where)
    clear(where.sub('valid'))  # it holds outputs of a different teacher
    where.write('keys.bin', keys)
    if head is not None:
        where.write('head.bin', head.to_bytes())
    if source.files is not None:
        write_record(where, record_files(source.files))
    where.write('manifest.json', m.to_json())
    return m, {}


def changed_now(where, paths) -> str:
    """Describe which files of samples changed. If none did, store their new times."""
    try:
        record = None if paths is None else read_record(where, len(paths))
    except DistillError as e:
        return str(e)
    if record is None:
        return ''
    changed, new = newer_record(record, paths)
    if len(changed):
        return changed_text([str(paths[i]) for i in changed], len(record))
    if not np.array_equal(new, record):
        with suppress(DistillError):
            write_record(where, new)  # fails in a read-only folder
    return ''


def _reopen(where, old, m, keys):
    """Reopen an existing cache. Return its manifest with the requested number of views, and
    checksums of intact shards.
    """
    clear(where, '.tmp')
    new = replace(
        old, views=m.views, samples=m.samples, shards=[], complete=False, doubt=m.doubt or old.doubt
    )
    if where.size('keys.bin') != len(keys) or where.read('keys.bin') != keys:
        where.write('keys.bin', keys)
    if old.head_bytes and head_is_lost(where, old):
        raise DistillError(
            f'head.bin of {where}, the output layer of the stored hidden states, is missing or damaged, '
            'and no row can be read without it: restore it, or write the cache again (force=True).'
        )
    if not old.complete:
        if new != old:
            where.write('manifest.json', new.to_json())
        return new, notes(where, new.all_shards())
    bad, own = damages(where, old, old.shards), old.checksums
    clear(
        where, '.json', {note_of(n) for n in own}
    )  # left by a writer that was killed just before it finished
    if new.views == old.views and not bad:
        return old, own
    for n in bad:
        if n != 'keys.bin':
            where.remove(n)
    # subtle: the old manifest stays until all shards are written, so that the old views can be read meanwhile
    added = [s for s in new.all_shards() if s[2] not in own]
    return new, {k: v for k, v in own.items() if k not in bad} | notes(where, added)


def head_is_lost(where, m) -> bool:
    """Return True if the output layer is missing, has a different size, or was changed."""
    if where.size('head.bin') != m.head_bytes:
        return True
    return bool(m.complete and checksum(where.read('head.bin')) != m.checksums['head.bin'])


CACHE_FILES = re.compile(
    r'(manifest\.json|keys\.bin|index\.bin|head\.bin|files\.bin|view\d{3,}/\d{6,}\.(bin|json)'
    r'|view\d{3,}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.(rows|keys|end))(\.\d+\.tmp)?'
)


def clear(where, ending='', only=None):
    """Remove only the files of a cache. The manifest goes first, since the other files are not a
    cache without it.
    """
    for n in sorted(where.names(), key=lambda n: n != 'manifest.json'):
        if (
            not CACHE_FILES.fullmatch(n)
            or not n.endswith(ending)
            or only is not None
            and n not in only
        ):
            continue
        if not (ending and n == 'manifest.json'):
            where.remove(n)


def note_of(name):
    return name.replace('.bin', '.json')


def note_checksum(where, shard) -> str | None:
    """Read the checksum of a shard from the file next to it. None if the shard is missing or has a
    different size.
    """
    *_, name, size = shard
    if where.size(name) != size or not 0 < (where.size(note_of(name)) or 0) < 1000:
        return None
    try:
        o = json_object(note_of(name), parse_json(where.read(note_of(name))), ('name', 'checksum'))
        return (
            o['checksum']
            if o['name'] == name and CHECKSUM.fullmatch(json_text('checksum', o['checksum']))
            else None
        )
    except DistillError:
        return None


def notes(where, shards):
    return {s[2]: o for s in shards if (o := note_checksum(where, s)) is not None}


def finished(where, shard):
    "Is this shard written?"
    return note_checksum(where, shard) is not None


def _write_shards(where, source, m, head, todo, progress):
    """Run the teacher over the samples of these shards."""
    done, total = 0, sum(m.rows_of(i) for _, i, *_ in todo)
    worst = [0.0]
    # one pass of the DataLoader writes a limited number of shards, since all its tasks are in one list
    some = max(2**20 // m.shard_rows, 1)
    for at in range(0, len(todo), some):
        tasks = [
            padded(tasks_of(source, v, i * m.shard_rows, m.rows_of(i)), m.batch_size)
            for v, i, *_ in todo[at : at + some]
        ]
        # subtle: closed immediately, since a traceback would keep the generator, and the changes it made, alive
        with closing(source.run(np.concatenate(tasks), m.batch_size)) as batches:
            for v, i, name, _ in todo[at : at + some]:
                keys = source.keys[i * m.shard_rows :][: m.rows_of(i)]
                encode = partial(encoded, m.layout, head, keys, v, m.seed, worst)
                for rows in _write_shard(where, m, name, m.rows_of(i), batches, encode):
                    done += rows
                    if progress is not None:
                        progress(done, total, done * m.layout.bytes)
    warn_of_int8(worst[0])


def warn_of_int8(error):
    """Warn if logits of hidden states in int8 are too far from the teacher's."""
    if error > INACCURATE:
        warnings.warn(
            DistillWarning(
                f'The logits of the hidden states in int8 differ by up to {100 * error:.1f}% of their '
                "spread from the teacher's: a few numbers are much larger than the others. Use "
                "store=dict(kind='hidden', dtype='float16')."
            )
        )


def encoded(layout, head, keys, view, seed, worst, out, row):
    """Encode outputs of a batch.

    Args:
        keys: Keys of the samples of the shard.
        worst: List of one number, the largest error of hidden states in int8.
        row: First row of the batch in the shard.
    """
    if layout.draws is None:
        rows = layout.encode(out, head)
        if head is not None and layout.fields[0].dtype == 'int8':
            got = layout.decode(torch.from_numpy(rows), head).logits
            worst[0] = max(worst[0], worst_error(out.logits, got))
        return rows
    # the last batch is filled up with copies of the last sample
    own = keys[(row + np.arange(len(out.logits))).clip(max=len(keys) - 1)]
    seeds = seeds_of(seed, own, view, DRAWS) >> np.uint64(1)
    return layout.encode(out, seeds=seeds.astype(np.int64))


def _write_shard(where, m, name, n, batches, encode):
    """Write one shard and yield the number of rows of each batch."""
    bs, buf = m.batch_size, np.empty((n, m.layout.bytes), np.uint8)
    for row in range(0, n, bs):
        rows = encode(next(batches), row)
        if len(rows) != bs:
            raise DistillError(
                f'The teacher returned {len(rows)} outputs for {bs} samples: it must return one for '
                'each.'
            )
        buf[row : row + bs] = rows[: n - row]
        yield min(bs, n - row)
    data = memoryview(buf).cast('B')
    where.write(name, data)
    where.write(
        note_of(name),
        json.dumps(dict(name=name, bytes=len(data), checksum=checksum(data))).encode(),
    )


def _finish(where, m, done):
    """Complete the manifest with the checksums of all files."""
    if m.complete:
        return
    shards = list(m.all_shards())
    sums = {
        **notes(where, [s for s in shards if s[2] not in done]),
        **done,
        'keys.bin': checksum(where.read('keys.bin')),
    }
    if m.head_bytes:
        sums['head.bin'] = checksum(where.read('head.bin'))
    if lost := [name for name, _ in m.all_files() if name not in sums]:
        raise DistillError(
            f'{lost[0]} of {where} disappeared while the cache was written: write the cache again.'
        )
    m.shards, m.complete = (
        [dict(name=name, bytes=size, checksum=sums[name]) for name, size in m.all_files()],
        True,
    )
    where.write('manifest.json', m.to_json())
    clear(where, '.json')


def tasks_of(source, view, first, n):
    return view * len(source.keys) + np.arange(first, first + n)


def padded(tasks, bs):
    """Fill up the last batch by repeating the last task. The outputs of the repetitions are
    discarded later.
    """
    return np.concatenate([tasks, np.repeat(tasks[-1:], -len(tasks) % bs)])
