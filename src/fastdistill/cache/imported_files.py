"""Read rows (dicts) from files, arrays, datasets and lists."""

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from ..base.atomic_files import check_regular_file
from ..base.outputs import DistillError
from .digests import file_checksum, fingerprint
from .file_store import natural_order
from .json_checks import load_json, shortened
from .keys import as_array


def read_rows(o: Any) -> tuple:
    """Return (sequence of dicts, (name, fingerprint)) for any supported input."""
    if isinstance(o, (str, Path)):
        return read_path(Path(o))
    if hasattr(o, 'column_names'):
        return of_hub(o)
    if torch.is_tensor(o):
        o = as_array(o)
    if isinstance(o, np.ndarray):
        arrays = Arrays(dict(logprobs=o))
        # subtle: an array of objects contains their addresses, so their content is hashed
        content = ' '.join(row_texts(arrays)) if o.dtype.hasobject else o
        return arrays, ('array', fingerprint(content))
    if isinstance(o, (Mapping, bytes)) or not isinstance(o, Iterable):
        raise DistillError(
            f'outputs is of type {type(o).__name__}: it must be a file, a folder of files, an array, '
            'a Dataset or a list of dicts.'
        )
    rows = list(o)
    return rows, ('rows', fingerprint(f'[{", ".join(row_texts(rows))}]'))


def row_texts(rows: Any) -> Iterator[str]:
    """Yield each row as text, from which the fingerprint is computed."""

    def plain(o: Any) -> Any:
        o = as_array(o) if torch.is_tensor(o) else o
        return o.tolist() if hasattr(o, 'tolist') else str(o)

    for i in range(len(rows)):
        try:
            yield json.dumps(rows[i], sort_keys=True, default=plain)
        except DistillError as e:
            raise DistillError(f'Row {i}: {e}') from None
        # column names may have different types, or an object may contain itself
        except (TypeError, ValueError, RecursionError) as e:
            raise DistillError(
                f"Row {i} can't be written as JSON ({e}): column names must be strings, and values "
                'must be numbers, strings, or lists and dicts of them.'
            ) from e


def of_hub(o: Any) -> tuple:
    """Read a `datasets.Dataset` of Hugging Face, in memory or memory-mapped."""
    if isinstance(o, Mapping):
        raise DistillError(
            f"There are several splits ({', '.join(map(str, o))}): pass one, e.g. dataset['train']."
        )
    if not hasattr(o, '__len__'):
        raise DistillError('A stream of rows has no length: pass a Dataset, or list(dataset).')
    # return Python objects instead of tensors
    rows = o.with_format(None) if hasattr(o, 'with_format') else o
    return rows, ('dataset', fingerprint(' '.join(map(fingerprint, row_texts(rows)))))


def read_path(path: Path) -> tuple:
    if not path.exists():
        raise DistillError(f'There is no file {str(path)!r}.')
    if (path / 'dataset_dict.json').is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DistillError(
            f'{path} has several splits ({", ".join(splits)}): pass one, e.g. {path / splits[0]}.'
        )
    files = [path]
    if path.is_dir():
        names = sorted((f.name for f in path.iterdir()), key=natural_order)
        files = [path / n for n in names if PurePath(n).suffix in READERS]
    if not files or files[0].suffix not in READERS:
        raise DistillError(
            f'{path}: must be a file that ends in {", ".join(READERS)}, or a folder of such files.'
        )
    for file in files:
        check_regular_file(file)
    return FileRows(files), (path.name, fingerprint(' '.join(map(file_checksum, files))))


@contextmanager
def reading(path: Path, what: str = '') -> Iterator[None]:
    """Convert errors of a file library to a one-line `DistillError` with the path of the file."""
    try:
        yield
    except (DistillError, ImportError):
        raise
    # subtle: for damaged files, the libraries raise many kinds of errors, even KeyError and
    # MemoryError
    except Exception as e:
        reason = shortened(' '.join(f'{type(e).__name__}: {e}'.split()))
        raise DistillError(
            f"{path}{what} can't be read as {path.suffix} ({reason}). The file is damaged or has the "
            'wrong suffix: write or copy it again.'
        ) from e


class FileRows:
    """The rows of several files. They are divided into groups, and only one group is in memory at a
    time. All rows of a JSON lines or NumPy file are one group, which reads them on access.

    Attributes:
        groups: (file, index in the file of the first row, fn() -> sequence of rows) of each group.
    """

    def __init__(self, files: Sequence[Path]):
        self.groups: list[tuple[Path, int, Callable]] = []
        sizes: list[int] = []
        for file in files:
            with reading(file):
                at = 0
                for n, load in READERS[file.suffix](file):
                    self.groups.append((file, at, load))
                    sizes.append(n)
                    at += n
        self.ends = np.cumsum(sizes, dtype=int)
        self.group: int | None = None
        self.rows: Any = []

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, i: int) -> tuple[int, int]:
        """Return (index of the group that contains row `i`, index of the row in that group)."""
        g = int(np.searchsorted(self.ends, i, 'right'))
        if g == len(self.ends):
            raise IndexError(i)
        return g, i - (int(self.ends[g - 1]) if g else 0)

    def place(self, i: int) -> str:
        g, row = self.find(i)
        file, first, load = self.groups[g]
        if file.suffix == '.jsonl':
            return f'{file}, {load().place(row)}'
        return f'{file}, row {first + row}'

    def __getitem__(self, i: int) -> Any:
        g, row = self.find(i)
        file, first, load = self.groups[g]
        with reading(file, f', row {first + row}'):
            if g != self.group:
                self.group, self.rows = g, load()
            return self.rows[row]


class Lines:
    """A file of JSON lines that stores the offset of each line and reads lines on demand."""

    def __init__(self, path: Path):
        self.path, self.at, self.lines = path, [], []
        with open(path, 'rb') as f:
            at = 0
            for n, line in enumerate(f, 1):
                if line.strip():
                    self.at.append(at)
                    self.lines.append(n)
                at += len(line)

    def __len__(self) -> int:
        return len(self.at)

    def place(self, i: int) -> str:
        return f'line {self.lines[i]}'

    def __getitem__(self, i: int) -> dict:
        with open(self.path, 'rb') as f:
            f.seek(self.at[i])
            line = f.readline()
        try:
            row = load_json(line)
        except (ValueError, RecursionError) as e:
            raise DistillError(
                f'{self.path}, {self.place(i)} is not JSON: {shortened(e)}. Each line must be an '
                'object: remove or repair this one.'
            ) from e
        if isinstance(row, dict):
            return row
        raise DistillError(
            f'{self.path}, {self.place(i)} is a {type(row).__name__}: each line must be an object.'
        )


def pyarrow_module(name: str) -> Any:
    try:
        return importlib.import_module(f'pyarrow.{name}')
    except ImportError as e:
        raise ImportError(
            "Parquet and Arrow files need pyarrow: pip install 'fastdistill[parquet]'"
        ) from e


def check_unique(columns: Sequence, path: Path) -> None:
    if repeated := [k for k, n in Counter(columns).items() if n > 1]:
        raise DistillError(f'{path} has the column {repeated[0]!r} twice: rename or remove one.')


def table_rows(load: Callable) -> list[dict]:
    """Load a table of pyarrow, and return its rows."""
    table = load()
    # subtle: without this check, damaged offsets could crash the process
    table.validate(full=True)
    return table.to_pylist()


def parquet_groups(path: Path) -> Iterator[tuple[int, Callable]]:
    """Yield (number of rows, fn() -> rows) of each row group of a Parquet file."""
    parquet = pyarrow_module('parquet')
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    check_unique(file.schema_arrow.names, path)
    for g in range(file.num_row_groups):
        load = partial(table_rows, partial(file.read_row_group, g))
        yield file.metadata.row_group(g).num_rows, load


def arrow_groups(path: Path) -> Iterator[tuple[int, Callable]]:
    """Yield (number of rows, fn() -> rows) of each batch of a memory-mapped Arrow file, as
    `Dataset.save_to_disk` of Hugging Face writes it.
    """
    pa, ipc = pyarrow_module('lib'), pyarrow_module('ipc')
    file = pa.memory_map(str(path))
    try:
        batches = ipc.open_stream(file).read_all().to_batches()
    except pa.ArrowInvalid:
        # the file is not a stream but has the Arrow file format, with an index
        batches = ipc.open_file(path).read_all().to_batches()
    check_unique(batches[0].schema.names if batches else (), path)
    for b in batches:
        yield b.num_rows, partial(table_rows, lambda b=b: b)


class Arrays:
    """A dict of NumPy arrays of equal length."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: Any = 'The array'):
        self.arrays = arrays
        lengths = {v.shape[:1] for v in arrays.values()}
        if len(lengths) != 1 or () in lengths:
            shapes = ', '.join(f'{k} {list(v.shape)}' for k, v in arrays.items())
            raise DistillError(
                f'{name} has the shapes {shapes or "of no array"}: each must have one entry for each '
                'sample.'
            )

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, i: int) -> dict:
        # subtle: an item of an array of objects may be a list or text
        number = lambda o: o.item() if isinstance(o, (np.ndarray, np.generic)) and not o.ndim else o
        return {k: number(v[i]) for k, v in self.arrays.items()}


def arrays_of(path: Path) -> Arrays:
    if path.suffix == '.npz':
        # subtle: NumPy does not close a damaged file that it opened itself
        with open(path, 'rb') as f, np.load(f, allow_pickle=False) as o:
            check_unique(o.files, path)
            return Arrays(dict(o), path)
    o = np.load(path, mmap_mode='r', allow_pickle=False)
    if (size := os.stat(path).st_size) != (need := o.offset + o.nbytes):
        raise DistillError(
            f'{path} has {size} bytes, but its header describes an array of {need} bytes.'
        )
    return Arrays(dict(logprobs=o), path)


def one_group(read: Callable) -> Callable:
    """Return a reader for files whose rows form a single group."""

    def groups(path: Path) -> list[tuple[int, Callable]]:
        rows = read(path)
        return [(len(rows), lambda: rows)]

    return groups


# {suffix: fn(path) -> (number of rows, fn() -> rows) of each group}
READERS: dict[str, Callable] = {
    '.jsonl': one_group(Lines),
    '.parquet': parquet_groups,
    '.arrow': arrow_groups,
    '.npy': one_group(arrays_of),
    '.npz': one_group(arrays_of),
}
