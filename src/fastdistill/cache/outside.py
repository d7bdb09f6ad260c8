"A cache of outputs that another program computed: JSON lines, Parquet, Arrow, NumPy, or Python objects."
import importlib, json
from collections.abc import Mapping
from pathlib import Path, PurePath
import numpy as np
import torch
from ..outputs import DistillError, Outputs, TopK
from .digests import file_checksum, fingerprint
from .keys import keys_of
from .progress import shown_progress
from .reader import TeacherCache
from .records import Wish
from .source import Source
from .writer import write_cache

__all__ = ['cache_from']

# name of the value -> does each entry stand at its own token, so that it is predicted one position earlier?
VALUES = dict(logprobs=False, log_probs=False, logits=False, probs=False, top_logprobs=False, prompt_logprobs=True,
              input_top_logprobs=True)
KEYS = 'key','id','custom_id','index','path'


def cache_from(
    outputs, # .jsonl, .parquet, .arrow, .npy or .npz file, a folder of them (such as `Dataset.save_to_disk` of Hugging
    # Face writes), an array (N, ...), a `datasets.Dataset`, or a list of dicts
    path, # folder or URL of the cache
    n:int|None=None, # number of classes, or of tokens in the vocabulary; None: as many as each row has
    *,
    keys=None, # the name of each sample, as the student's data names it: a list, or the column; None: a known column
    root=None, # names are paths of files below this folder
    value:str|None=None, # the column with the outputs; None: a known column, such as 'logprobs'
    given:str|None=None, # what the numbers are: 'logprobs', 'logits' or 'probs'; None: by the column's name
    topk:int|None=None, # likeliest classes to store; None: as many as every position has
    tail:str='uniform', # assumption about the others: 'uniform', 'zero' or 'bucket', see `TopK`
    shift:bool|None=None, # of tokens: entries stand at their own tokens; None: by the column's name (vLLM, SGLang)
    length:int|None=None, # of tokens: positions to store; None: those of the longest row. Others do not count
    dtype:str='float16', # 'float32', 'float16' or 'int8'
    teacher:str|None=None, # name of the teacher; None: of the file
    vocab=None, # class names, in the order of the numbers
    bs:int=64, # rows that are written at once
    force:bool=False, # overwrite a cache that doesn't fit
    progress=True # a bar in terminals and notebooks; False: none; or fn(rows done, rows in all, bytes done)
) -> TeacherCache:
    """Write a cache of outputs that another program computed, and open it. An interrupted run resumes.

    Each row has a name, and one value for each class, or pairs of class and log-probability; of tokens, such a list
    for each position. The answers of vLLM, SGLang and OpenAI's completions are understood"""
    rows,identity = read_rows(outputs)
    if not len(rows): raise DistillError("There are no rows: there is nothing to write.")
    r = Reading(rows, n, value, given, shift, tail)
    names = r.names(keys)
    r.measure(topk, length)
    found = keys_of([PurePath(o) for o in names] if root is not None else names, '' if root is None else str(root))
    if len(set(found.tolist())) < len(found):
        raise DistillError(f"Two of the {len(found)} rows have the same name: keys= must tell the samples apart.")
    def run(tasks, bs):
        for i in range(0, len(tasks), bs): yield r.batch(tasks[i:i+bs])
    who = dict(name=teacher or identity[0], weights=identity[1], outputs=f'{r.value}, {r.given}')
    source = Source(found, run, min(bs, len(rows)), who, {}, '' if root is None else str(root), vocab)
    with shown_progress(progress) as show:
        return write_cache(path, source, Wish(dtype, r.k, tail, -1), views=0, force=force, progress=show)


class Reading:
    "Rows of dicts as `Outputs`"
    def __init__(self, rows, n, value, given, shift, tail):
        self.rows,self.n,self.tail,first = rows,n,tail,rows[0]
        if tail == 'mean':
            raise DistillError("tail='mean' needs the log-probabilities of all classes: possible are 'uniform', 'zero' "
                               "and 'bucket'.")
        self.value = value or next((k for k in VALUES if k in first), None)
        if self.value not in first:
            raise DistillError(f"No column {value or 'logprobs'!r} with outputs; the first row has "
                               f"{', '.join(map(str, first))}. Name it with value=.")
        self.given = given or dict(logits='logits', probs='probs').get(self.value, 'logprobs')
        if self.given not in ('logits', 'probs', 'logprobs'):
            raise DistillError(f"given={given!r}: possible are 'logprobs', 'logits' and 'probs'")
        self.shift = VALUES.get(self.value, False) if shift is None else shift
        self.k = self.length = None

    def names(self, keys):
        if keys is not None and not isinstance(keys, str):
            if len(keys) != len(self.rows):
                raise DistillError(f"{len(keys)} keys for {len(self.rows)} rows: give one for each.")
            return list(keys)
        column = keys or next((k for k in KEYS if k in self.rows[0]), None)
        if column not in self.rows[0]:
            raise DistillError(f"No column {keys or 'key'!r} with the samples' names; the first row has "
                               f"{', '.join(map(str, self.rows[0]))}. Give keys=, a column or a list.")
        return [r[column] for r in self.rows]

    def measure(self, topk, length):
        "The number of classes and of positions that every row has, in one pass"
        counts,longest,whole,self.tokens = set(),0,True,False
        for i in range(len(self.rows)):
            positions = self.positions(i)
            self.tokens = self.tokens or self.in_rows
            whole = whole and all(p is None or isinstance(p, np.ndarray) for p in positions)
            if not (own := {len(p) for p in positions if p is not None}):
                raise DistillError(f"Row {i} has no outputs in {self.value!r}.")
            counts,longest = counts | own,max(longest, len(positions))
        k,self.length = min(counts),length or longest
        self._check_classes(k, max(counts), whole, topk)
        self.n,self.k = self.n or k,topk or k
        if self.k == self.n and not topk: self.k = None     # all of them: no class numbers are stored

    def _check_classes(self, k, most, whole, topk):
        if whole and (k < most or self.n not in (None, k)):
            raise DistillError(f"The positions have {k} to {most} classes, n={self.n}: give class numbers too, in a "
                               "column 'ids'.")
        if not whole and self.n is None:
            raise DistillError("The rows have a few of the classes: give n=, the number of all classes (of tokens: the "
                               "size of the vocabulary).")
        if not whole and self.given == 'logits':
            raise DistillError("Logits of a few classes have no probabilities: give log-probabilities.")
        if topk and topk > k: raise DistillError(f"topk={topk}, but some positions have {k} classes alone.")

    def positions(self, i):
        """The entries of each position of a row: lists of (class, log-probability), or arrays of all classes. None:
        a position without entries"""
        row = self.rows[i]
        o,ids = unwrapped(row[self.value]),row.get('ids', row.get('token_ids'))
        if isinstance(o, Mapping) or not is_nested(o): o,ids,self.in_rows = [o],[ids],False
        # pairs of one position, not a list of positions
        elif ids is None and is_pairs(o): o,ids,self.in_rows = [o],[None],False
        else: self.in_rows = True
        out = [None if p is None else entries(p, None if ids is None else ids[j], i) for j,p in enumerate(o)]
        return out[1:] + [None] if self.shift and self.in_rows else out

    def batch(self, tasks) -> Outputs:
        "The outputs of some rows"
        ids,values,mask = zip(*(self.row(int(i)) for i in tasks))
        ids,values,mask = (torch.from_numpy(np.stack(o)) for o in (ids, values, mask))
        if not self.tokens: ids,values = ids[:, 0],values[:, 0]
        logits = values if self.k is None else TopK(ids, values, self.n, self.tail)
        return Outputs(logits, {}, mask if self.tokens else None)

    def row(self, i):
        k,positions = self.k or self.n,self.positions(i)[:self.length]
        ids,values = np.zeros((self.length, k), np.int64),np.full((self.length, k), -np.log(self.n), np.float32)
        ids[:] = np.arange(k)
        mask = np.zeros(self.length, np.float32)
        for j,p in enumerate(positions):
            if p is None: continue
            ids[j],values[j],mask[j] = *self.best(p, k, i),1
        return ids,values,mask

    def best(self, p, k, i):
        "(numbers, log-probabilities) of the `k` likeliest classes; of all classes in their order"
        c,v = (np.arange(len(p)), np.asarray(p, np.float64)) if isinstance(p, np.ndarray) else map(np.asarray, zip(*p))
        if self.given == 'probs': v = np.log(np.clip(v, 1e-7, None))
        if c.min() < 0 or c.max() >= self.n or len(set(c.tolist())) < len(c):
            raise DistillError(f"Row {i} has the classes {few_of(c)}: they must differ, and be from 0 to {self.n-1}.")
        if self.given == 'logprobs' and np.exp(v.astype(float)).sum() > 1.02:
            raise DistillError(f"Row {i}: the probabilities sum to {np.exp(v.astype(float)).sum():.3g}, so these are "
                               "no log-probabilities. Say given='logits' or given='probs'.")
        order = np.argsort(c) if self.k is None else np.argsort(-v, kind='stable')[:k]
        if self.k is not None and self.given == 'logits': v = v - np.logaddexp.reduce(v)
        return c[order],v[order]


def few_of(c): return ', '.join(map(str, c[:8].tolist())) + (' ...' if len(c) > 8 else '')


def unwrapped(o):
    "The list inside OpenAI's answers"
    while isinstance(o, Mapping) and (k := next((k for k in ('content', 'top_logprobs') if k in o), None)): o = o[k]
    return o


def is_real(o): return isinstance(o, (int, float, np.number)) and not isinstance(o, bool)

def is_nested(o):
    "Is it a list of lists or dicts?"
    if isinstance(o, np.ndarray) and o.dtype != object: return o.ndim > 1
    return any(not is_real(v) for v in o)

def is_pairs(o):
    "Are these the (number, class) pairs or dicts of one position?"
    return all(is_entry(e) for e in o)

def is_entry(e):
    if isinstance(e, Mapping): return 'logprob' in e and 'top_logprobs' not in e
    pair = isinstance(e, (list, tuple)) and 2 <= len(e) <= 3 and isinstance(e[0], float) and isinstance(e[1], int)
    return pair and (len(e) == 2 or e[2] is None or isinstance(e[2], str))


def entries(p, ids, row):
    "The entries of one position: an array of all classes, or a list of (class, number)"
    if ids is not None: return list(zip(map(int, ids), map(float, p)))
    p = unwrapped(p)
    if isinstance(p, Mapping): return [(class_of(k, row), number_of(v)) for k,v in p.items()]
    if all(map(is_real, p)): return np.asarray(p, np.float64)
    if isinstance(p[0], Mapping): return [(class_of(named_class(e), row), float(e['logprob'])) for e in p]
    return [(int(e[1]), float(e[0])) for e in p]        # SGLang: [log-probability, token, text]


def named_class(e): return next((e[k] for k in ('token_id', 'id', 'token') if k in e), None)

def number_of(v): return float(v['logprob'] if isinstance(v, Mapping) else getattr(v, 'logprob', v))


def class_of(k, row):
    text = str(k).removeprefix('token_id:')
    if text.isdigit(): return int(text)
    raise DistillError(f"Row {row} has the class {k!r}, which is no number: ask the server for token ids (vLLM: "
                       "return_tokens_as_token_ids=True), or translate names before.")


# files

def read_rows(o):
    "(sequence of dicts, (name, fingerprint))"
    if isinstance(o, (str, Path)): return read_path(Path(o))
    if hasattr(o, 'column_names'): return of_hub(o)
    if isinstance(o, np.ndarray) or torch.is_tensor(o):
        o = np.asarray(o)
        return Arrays(dict(logprobs=o)),('array', fingerprint(o))
    rows = list(o)
    return rows,('rows', fingerprint(json.dumps(rows, sort_keys=True, default=str)))


def of_hub(o):
    "A `datasets.Dataset` of Hugging Face, in memory or mapped"
    if isinstance(o, Mapping):
        raise DistillError(f"These are several splits ({', '.join(map(str, o))}): give one, as in dataset['train'].")
    if not hasattr(o, '__len__'):
        raise DistillError("A stream of rows has no length: give a Dataset, or list(dataset).")
    rows = o.with_format(None) if hasattr(o, 'with_format') else o      # Python's objects, not tensors
    prints = (fingerprint(json.dumps(rows[i], sort_keys=True, default=str)) for i in range(len(rows)))
    return rows,('dataset', fingerprint(' '.join(prints)))


def read_path(path):
    if not path.exists(): raise DistillError(f"There is no file {str(path)!r}.")
    if (path/'dataset_dict.json').is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DistillError(f"{path} has several splits ({', '.join(splits)}): give one, as {path/splits[0]}.")
    files = sorted(f for f in path.iterdir() if f.suffix in READERS) if path.is_dir() else [path]
    if not files or files[0].suffix not in READERS:
        raise DistillError(f"{path}: possible are files that end in {', '.join(READERS)}, and a folder of them.")
    parts = [READERS[f.suffix](f) for f in files]
    return Joined(parts),(path.name, fingerprint(' '.join(map(file_checksum, files))))


class Joined:
    "The rows of several files"
    def __init__(self, parts): self.parts,self.ends = parts,np.cumsum([len(p) for p in parts])
    def __len__(self): return int(self.ends[-1])
    def __getitem__(self, i):
        k = int(np.searchsorted(self.ends, i, 'right'))
        if k == len(self.parts): raise IndexError(i)
        return self.parts[k][i - (int(self.ends[k-1]) if k else 0)]


class Lines:
    "A file of JSON lines. It keeps where each begins, and reads a line when it is asked for"
    def __init__(self, path):
        self.path,self.at = path,[]
        with open(path, 'rb') as f:
            at = 0
            for line in f:
                if line.strip(): self.at.append(at)
                at += len(line)

    def __len__(self): return len(self.at)

    def __getitem__(self, i):
        with open(self.path, 'rb') as f:
            f.seek(self.at[i])
            line = f.readline()
        try: row = json.loads(line)
        except ValueError as e: raise DistillError(f"{self.path}, line {i+1} is no JSON: {e}") from e
        if isinstance(row, dict): return row
        raise DistillError(f"{self.path}, line {i+1} is a {type(row).__name__}: each line must be an object.")


class Groups:
    "A file of groups of rows, of which one is in memory"
    def __init__(self, sizes): self.ends,self.group,self.rows = np.cumsum(sizes),None,[]

    def __len__(self): return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i):
        g = int(np.searchsorted(self.ends, i, 'right'))
        if g == len(self.ends): raise IndexError(i)
        if g != self.group: self.group,self.rows = g,self.read(g).to_pylist()
        return self.rows[i - (int(self.ends[g-1]) if g else 0)]


def pyarrow_module(name):
    try: return importlib.import_module(f'pyarrow.{name}')
    except ImportError as e:
        raise ImportError("Parquet and Arrow files need pyarrow: pip install 'fastdistill[parquet]'") from e


class Parquet(Groups):
    "A Parquet file"
    def __init__(self, path):
        self.file = pyarrow_module('parquet').ParquetFile(path)
        super().__init__([self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)])

    def read(self, g): return self.file.read_row_group(g)


class Arrow(Groups):
    "A file of Arrow, as `Dataset.save_to_disk` of Hugging Face writes it, mapped into memory"
    def __init__(self, path):
        pa,ipc = pyarrow_module('lib'),pyarrow_module('ipc')
        file = pa.memory_map(str(path))
        try: self.batches = ipc.open_stream(file).read_all().to_batches()
        except pa.ArrowInvalid: self.batches = ipc.open_file(path).read_all().to_batches()       # with an index
        super().__init__([b.num_rows for b in self.batches])

    def read(self, g): return self.batches[g]


class Arrays:
    "NumPy arrays of equal length, by name"
    def __init__(self, arrays): self.arrays = arrays
    def __len__(self): return min(map(len, self.arrays.values()))
    def __getitem__(self, i): return {k: v[i] if v[i].ndim else v[i].item() for k,v in self.arrays.items()}


def arrays_of(path):
    o = np.load(path, mmap_mode='r' if path.suffix == '.npy' else None, allow_pickle=False)
    return Arrays(dict(logprobs=o) if path.suffix == '.npy' else dict(o))


READERS = {'.jsonl': Lines, '.parquet': Parquet, '.arrow': Arrow, '.npy': arrays_of, '.npz': arrays_of}
