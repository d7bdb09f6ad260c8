"Writing a cache shard by shard, each whole or not there: an interrupted run resumes."
import json, re, warnings
from contextlib import closing, nullcontext
from dataclasses import dataclass
import numpy as np
from ..outputs import DistillError, DistillWarning
from ..ranks import on_first, rank, world_size
from .digests import checksum, versions
from .files import changed_text, newer_record, pack_record, record_files, unpack_record
from .folder import open_folder
from .keys import hash_of
from .manifest import Manifest, differences, refuse
from .reader import TeacherCache, damaged
from .records import Layout, Wish
from .source import Source

__all__ = ['Forecast', 'finished', 'write_cache']

SHARD_BYTES = 64*2**20


@dataclass
class Forecast:
    "What a cache will take, known before the teacher runs over the data"
    samples:int
    views:int
    bytes_per_view:int
    bytes:int # of the rows that are not yet there
    free:int|None # on the disk, where that can be told

    def __str__(self):
        disk = '' if self.free is None else f', {self.free/1e9:.2f} GB free'
        return f'{self.samples} samples x {self.views} view(s) x {self.bytes_per_view} bytes = {self.bytes/1e6:.1f} MB{disk}'

    def check(self, where):
        if self.free is not None and self.bytes > self.free:
            raise DistillError(f"{where}: {self}. It will not fit: fewer views, topk=, dtype='int8' or 'float16', size= for maps, "
                               "or another disk.")


def write_cache(
    path, # folder or URL
    source:Source,
    wish:Wish,
    *,
    views:int=1, # augmented views of each sample; 0: the clean one
    seed:int=0, # of the random numbers
    force:bool=False, # write anew over a cache that doesn't fit, instead of refusing
    progress=None, # fn(rows done, rows in all, bytes done), after each batch
    forecast=None, # fn(Forecast), before the teacher runs over the data
    shard_bytes:int=SHARD_BYTES
) -> TeacherCache:
    "Write what is not there yet, and open the cache. Under torch.distributed each rank writes its share of the shards"
    if views < 0 or not len(source.keys): raise DistillError(f"views={views}, {len(source.keys)} samples: there is nothing to write.")
    where = open_folder(path)
    with closing(source.run(tasks_of(source, 0, 0, 1), 1)) as first: layout = Layout.of(next(first), wish)
    with where.lock() if rank() == 0 else nullcontext():
        m = on_first(lambda: _begin(where, source, layout, views, seed, force, shard_bytes))
        todo = [] if m.complete else [s for s in m.all_shards() if not finished(where, s)]
        plan = Forecast(m.count, m.stored, layout.bytes, sum(s[3] for s in todo), where.free())
        if forecast is not None: forecast(plan)
        plan.check(where)
        on_first(lambda: None)      # subtle: no rank may write before all have seen what is missing
        _write_shards(where, source, m, todo[rank()::world_size()], progress)
        on_first(lambda: _finish(where, m))
    return TeacherCache(where)


def _begin(where, source, layout, views, seed, force, shard_bytes):
    "The manifest to go on with: the one that is there, if it is of the same cache"
    rows = max(shard_bytes//layout.bytes//source.bs, 1)*source.bs
    m = Manifest(len(source.keys), views, seed, layout, rows, source.bs, source.teacher,
                 dict(keys=f'{hash_of(source.keys.tobytes()):016x}', root=source.root), source.transforms, source.vocab,
                 source.samples or [], versions())
    m = Manifest.from_json(m.to_json(), where)      # subtle: as it will be read again (no tuples), before anything is removed
    keys = source.keys.astype('<u8').tobytes()
    if where.size('manifest.json') is not None:
        try: old = Manifest.from_json(where.read('manifest.json'), where)
        except DistillError as e:
            if not force: raise
            warnings.warn(DistillWarning(f'{e} It is written anew (force=True).'))
        else:
            if not (found := _changed_files(where, source) + differences(old, m)): return _reopen(where, old, keys)
            refuse(where, found, force, 'It is written anew')
    clear(where)
    clear(where.sub('valid'))       # it would be another teacher's
    where.write('keys.bin', keys)
    if source.files is not None: where.write('files.bin', pack_record(record_files(source.files)))
    where.write('manifest.json', m.to_json())
    return m


def _changed_files(where, source):
    "In words, which of the samples' files changed; where none did, their new times are stored"
    if source.files is None or where.size('files.bin') is None: return []
    record = unpack_record(where.read('files.bin'), len(source.files))
    if record is None: return []
    changed,new = newer_record(record, source.files)
    if len(changed): return [changed_text([str(source.files[i]) for i in changed], len(record))]
    if not np.array_equal(new, record): where.write('files.bin', pack_record(new))
    return []


def _reopen(where, m, keys):
    "Of a finished cache: throw out what is damaged, so that it is made anew"
    clear(where, '.tmp')
    bad = damaged(where, m) if m.complete else []
    if m.complete and not bad: clear(where, '.json')      # of one who was stopped between his last two steps
    # nobody knows yet whether they are whole
    if not m.complete and (where.size('keys.bin') != len(keys) or where.read('keys.bin') != keys): where.write('keys.bin', keys)
    if not bad: return m
    for s in m.shards:
        if s['name'] not in bad and s['name'] != 'keys.bin': where.write(note_of(s['name']), json.dumps(s).encode())
    for n in bad: where.remove(n)
    where.write('keys.bin', keys)
    m.complete,m.shards = False,[]
    where.write('manifest.json', m.to_json())
    return m


CACHE_FILES = re.compile(r'(manifest\.json|keys\.bin|files\.bin|view\d{3,}/\d{6,}\.(bin|json))(\.\d+\.tmp)?')

def clear(where, ending=''):
    "Remove a cache's files, and no others; the manifest first, for without it the rest is nothing"
    for n in sorted(where.names(), key=lambda n: n != 'manifest.json'):
        if CACHE_FILES.fullmatch(n) and n.endswith(ending) and not (ending and n == 'manifest.json'): where.remove(n)


def note_of(name): return name.replace('.bin', '.json')


def finished(where, shard):
    "Is this shard there, and as long as it must be?"
    *_,name,size = shard
    if where.size(name) != size or where.size(note_of(name)) is None: return False
    try: return json.loads(where.read(note_of(name)))['name'] == name
    except (ValueError, KeyError, TypeError): return False


def _write_shards(where, source, m, todo, progress):
    "Run the teacher over the samples of these shards"
    done,total = 0,sum(m.rows_of(i) for _,i,*_ in todo)
    some = max(2**20//m.shard_rows, 1)      # shards that one pass of the DataLoader makes: lists of what to do stay short
    for at in range(0, len(todo), some):
        tasks = [padded(tasks_of(source, v, i*m.shard_rows, m.rows_of(i)), m.batch_size) for v,i,*_ in todo[at:at+some]]
        # subtle: closed by hand, for a traceback would keep it, and with it what it has changed until it ends
        with closing(source.run(np.concatenate(tasks), m.batch_size)) as batches:
            for _,i,name,_ in todo[at:at+some]:
                for rows in _write_shard(where, m, name, m.rows_of(i), batches):
                    done += rows
                    if progress is not None: progress(done, total, done*m.layout.bytes)


def _write_shard(where, m, name, n, batches):
    "Gives the number of rows of each batch"
    bs,buf = m.batch_size,np.empty((n, m.layout.bytes), np.uint8)
    for row in range(0, n, bs):
        rows = m.layout.encode(next(batches))
        if len(rows) != bs: raise DistillError(f"The teacher gave {len(rows)} answers to {bs} samples: one for each is needed.")
        buf[row:row+bs] = rows[:n-row]
        yield min(bs, n-row)
    data = memoryview(buf).cast('B')
    where.write(name, data)
    where.write(note_of(name), json.dumps(dict(name=name, bytes=len(data), checksum=checksum(data))).encode())


def _finish(where, m):
    "Collect the shards' checksums into the manifest: now it is a cache"
    if m.complete: return
    notes = [note_of(name) for *_,name,_ in m.all_shards()]
    keys = where.read('keys.bin')
    m.shards = [dict(name='keys.bin', bytes=len(keys), checksum=checksum(keys)), *(json.loads(where.read(n)) for n in notes)]
    m.complete = True
    where.write('manifest.json', m.to_json())
    for n in notes: where.remove(n)


def tasks_of(source, view, first, n): return view*len(source.keys) + np.arange(first, first+n)


def padded(tasks, bs):
    "Whole batches: the last sample is asked for once more, and its answers are thrown away"
    return np.concatenate([tasks, np.repeat(tasks[-1:], -len(tasks) % bs)])
