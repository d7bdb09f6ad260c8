"What a cache says about itself: whose outputs, of which samples, through which transforms, and what each file must hold."
import json, warnings
from dataclasses import asdict, dataclass, field
import numpy as np
from ..outputs import DistillError, DistillWarning
from .digests import versions
from .records import Layout

__all__ = ['Manifest', 'differences', 'refuse', 'sample_differences', 'transform_differences']

FORMAT,VERSION = 'fastdistill-cache',1


@dataclass
class Manifest:
    "`manifest.json`; see docs/cache.md for each entry"
    count:int # samples
    views:int # augmented views of each; 0: the one clean view
    seed:int # of all random numbers
    layout:Layout # of a row
    shard_rows:int # rows of a full shard
    batch_size:int # with which the teacher was asked; shards are whole batches
    teacher:dict=field(default_factory=dict) # name, fingerprint of its weights
    data:dict=field(default_factory=dict) # fingerprint of the keys, root of paths
    transforms:dict=field(default_factory=dict) # name -> what it is, for those that replay repeats
    vocab:list|None=None # class names, in the order of the logits
    samples:list=field(default_factory=list) # a few samples' inputs: position, view, digest, and `after` the batch transforms
    versions:dict=field(default_factory=dict)
    shards:list=field(default_factory=list) # name, bytes, checksum of each, once all are there
    complete:bool=False

    @property
    def stored(self): return max(self.views, 1)

    @property
    def per_view(self): return -(-self.count//self.shard_rows)

    def shard(self, view, i): return f'view{view:03}/{i:06}.bin'

    def rows_of(self, i): return min(self.shard_rows, self.count - i*self.shard_rows)

    def all_shards(self):
        "(view, number, name, bytes) of each"
        for v in range(self.stored):
            for i in range(self.per_view): yield v,i,self.shard(v, i),self.rows_of(i)*self.layout.bytes

    @property
    def bytes(self): return self.count*self.stored*self.layout.bytes

    def to_json(self): return json.dumps(dict(format=FORMAT, version=VERSION, **asdict(self)), indent=1, default=as_python).encode()

    @classmethod
    def from_json(cls, text, where):
        try: d = json.loads(text)
        except ValueError as e: raise DistillError(f"{where}/manifest.json is damaged ({e}): write the cache anew.") from e
        if not isinstance(d, dict) or d.pop('format', None) != FORMAT:
            raise DistillError(f"{where}/manifest.json is not a fastdistill cache's.")
        if (v := d.pop('version', None)) != VERSION:
            raise DistillError(f"{where} is a cache of version {v}, this fastdistill reads version {VERSION}: "
                               "install the one that wrote it, or write the cache anew.")
        try: return cls(**{**d, 'layout': Layout.from_json(d['layout'])})
        except (TypeError, KeyError) as e: raise DistillError(f"{where}/manifest.json is damaged ({e!r}): write the cache anew.") from e


def as_python(o):
    "NumPy's numbers and arrays, for JSON"
    if hasattr(o, 'tolist'): return o.tolist()
    raise DistillError(f"A {type(o).__name__} can't be kept in a manifest: use names, numbers, and lists of these.")


def differences(
    a:Manifest, # found
    b:Manifest # wanted
) -> list:
    "In words, what makes two caches different; empty if one can go on with the other"
    out = []
    def differ(what, x, y):
        if x != y: out.append(f'{what}: {short(x)} in the cache, {short(y)} now')
    for k in dict.fromkeys([*a.teacher, *b.teacher]):
        if k != 'name': differ(f'teacher, {k}', a.teacher.get(k), b.teacher.get(k))
    if (a.count, a.data.get('keys')) != (b.count, b.data.get('keys')):
        differ('data (count and fingerprint of the samples\' keys)', (a.count, a.data), (b.count, b.data))
    out += transform_differences(a.transforms, b.transforms)
    for k in ('views', 'seed', 'vocab', 'layout'): differ(k, getattr(a, k), getattr(b, k))
    if not out and len(a.samples) == len(b.samples) and not all(map(alike, a.samples, b.samples)):
        out.append(f'the inputs of some samples{OTHER_INPUT}{other_libraries(a)}')
    return out


def transform_differences(found, now):
    return [f'transform {k}: {short(found.get(k, "none"))} in the cache, {short(now.get(k, "none"))} now'
            for k in dict.fromkeys([*found, *now]) if found.get(k) != now.get(k)]


def sample_differences(
    m:Manifest,
    at, # (N,) position in the cache of each sample of a dataset
    look # fn(number of a sample, view) -> its digest and so on, as in `Manifest.samples`
) -> list:
    "Make the inputs of a few samples as they were made when the cache was written, and say in words what differs"
    for s in m.samples:
        if not len(here := np.flatnonzero(at == s['row'])) or alike(s, {**s, **look(int(here[0]), s['view'])}): continue
        return [f'the input of sample {here[0]}{OTHER_INPUT}{other_libraries(m)}']
    return []


def alike(a, b):
    "Two looks at a sample: the same bytes before, and the same numbers after the batch transforms, as far as devices agree"
    if any(a.get(k) != b.get(k) for k in ('row', 'view', 'digest')): return False
    x,y = [np.asarray(o.get('after', []), float) for o in (a, b)]
    return x.shape == y.shape and np.allclose(x, y, rtol=1e-3, atol=1e-3, equal_nan=True)


OTHER_INPUT = ': the transforms give something else than when the cache was written; a file, a function among them, or a library changed'

def other_libraries(m):
    now = versions()
    other = '; '.join(f'{k} {v} then, {now.get(k)} now' for k,v in m.versions.items() if now.get(k) != v)
    return other and f' ({other})'


def short(o, n=200): return (s if len(s := str(o)) <= n else s[:n] + ' ...')


def refuse(
    where, # the cache
    found:list, # what differs, in words
    force:bool, # warn instead
    then:str='It is used all the same' # what is done about it
):
    if not found: return
    text = f"{where} doesn't fit:\n" + '\n'.join(f'- {o}' for o in found)
    if not force:
        raise DistillError(f"{text}\nUse the data, transforms and teacher that it was written with, write another cache, "
                           "or force=True to override.")
    warnings.warn(DistillWarning(f'{text}\n{then} (force=True).'))
