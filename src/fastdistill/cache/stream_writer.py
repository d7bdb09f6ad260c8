"""Write teacher outputs for a stream of samples, with any number of writers on any machines."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..base.outputs import DistillError, DistillWarning, LinearLogits, Outputs, map_tensors
from ..teachers.teacher import Teacher, with_defaults
from .digests import behavior_of, checksum, versions
from .file_store import Folder, open_folder
from .head_file import entries_of_head, read_head
from .json_checks import check_json, json_object, parse_json, shortened, whole_number
from .keys import hash_of, keys_in_stream
from .manifest import MAX_COUNT, PART_NAME, Manifest
from .output_layer import StoredHead, find_output_layer, head_of
from .rounding import Rounding, warn_of_rounding
from .row_layout import Layout, Store
from .store_choice import Choice, HiddenRun, check_kind_of_store, uses_of
from .teacher_description import (
    Source,
    check_alone,
    check_vocab_of_outputs,
    identity_of,
    on_axis,
    outputs_of,
)
from .writer import SHARD_BYTES, check_views, encoded

UNKNOWN = 10**8  # number of samples assumed for a stream of unknown length
NUMBERED = re.compile(r'(.+)-(\d{6,})')


def start_stream(
    path: Path | str,
    teacher: Any,
    example: Any,
    store: Any = 'auto',
    *,
    views: int = 0,
    inputs: str | Callable = 'inputs',
    key: str | Callable = 'key',
    samples: int | None = None,
    recipe: Any = None,
    axis: int = 1,
    device: Any = None,
    seed: int = 0,
    root: str = '',
    vocab: Sequence | None = None,
) -> 'TeacherRows':
    """Start a cache that is written as a stream, and return a function that computes its rows.

    The storage format is chosen here and saved in the folder, so that all writers use the same
    format. If the folder already has such a cache, it must have the same teacher and settings.

    Args:
        path: Folder or URL of the cache.
        teacher: A `Teacher`, or a callable fn(*inputs) -> Outputs or logits. An ensemble of models
            that predict labels or numbers needs `Teacher([...], kind=...)`.
        example: A batch of the stream. For `store='auto'`, use a few hundred samples.
        store: How to store the outputs, see `cache_dataset`.
        views: Number of augmented views of each sample. 0 for a single clean view.
        inputs: Where to find the teacher's inputs in a batch: the name of a column, a tuple of
            names, or fn(batch) -> inputs.
        key: Where to find the names of the samples in a batch: the name of a column, or fn(batch)
            -> list.
        samples: Expected number of samples, used by `store='auto'`. If None, assume a large number.
        recipe: Recipe or term for which `store` is chosen or checked. If None, assume KL at T=1.
        axis: Class axis.
        device: Device to which the inputs are moved.
        seed: Random seed for drawing classes.
        root: Root folder of the samples, if their names are file paths.
        vocab: Class names, in the order of the logits.
    """
    check_views(views)
    teacher = on_axis(teacher, axis)
    where, store, kind = open_folder(path), Store.of(store, axis), getattr(teacher, 'kind', '')
    check_kind_of_store(store, kind or 'softmax')
    options = dict(inputs=inputs, key=key, device=device)
    x = inputs_in(example, inputs, device)
    n = len(keys_in(example, key, root))

    def run(tasks: Any, bs: int, teacher: Any = teacher) -> Iterator[Outputs]:
        yield outputs_of(teacher, map_tensors(x, lambda t: t[torch.as_tensor(tasks)]))

    check_alone(run, n)
    check_vocab_of_outputs(vocab, run, axis, kind)
    uses = None if recipe is None else lambda t: uses_of(recipe)
    choose = Choice(teacher, kind or 'softmax', uses, recipe is not None, np.arange(n))
    # the keys are not known yet, so all are 0
    count = np.broadcast_to(np.uint64(0), (samples or UNKNOWN,))
    source = Source(count, run, n, identity_of(teacher), {}, root, vocab)
    with where.lock():
        store, source, lost, _ = choose(where, store, source, source.first(n), views)
        first = source.first(n)
        layout = Layout.of(first, store)
        if store.kind == 'pca' and n <= cast(int, store.components):
            raise DistillError(
                f'The principal components are computed from example=, which has {n} samples: pass '
                f'more than {store.components}, preferably a few hundred.'
            )
        who = source.teacher | dict(reads=entry_of_inputs(inputs))
        m = Manifest(0, views, seed, layout, 1, 1, who, dict(root=root), parts=[])
        m.vocab, m.versions, m.lost = vocab, versions(), list(lost)
        head = head_of(first.logits, layout)
        m.shards = entries_of_head(head)
        _begin_stream(where, m.as_read(), head)
    return TeacherRows(where, teacher, layer=store.layer, **options)


def _begin_stream(where: Folder, m: Manifest, head: StoredHead | None) -> None:
    """Write the settings that all writers share, or compare them with existing settings."""
    if where.size('manifest.json') is not None:
        old = Manifest.read(where)
        if old.parts is None:
            raise DistillError(f'{where} is a cache of a dataset: choose a different folder.')
        names = 'layout', 'views', 'seed', 'vocab'  # `TeacherRows` compares the teacher
        refuse_others(where, {k: (getattr(old, k), getattr(m, k)) for k in names})
        return
    if head is not None:
        where.write('head.bin', head.to_bytes())
    where.write('manifest.json', m.to_json())


def refuse_others(where: Folder, pairs: Mapping[str, tuple]) -> None:
    """Raise a DistillError if the existing rows in the folder were written with different settings.

    Args:
        where: Folder of the cache.
        pairs: {name of a setting: (value in the folder, current value)}.
    """
    for k, (a, b) in pairs.items():
        if isinstance(a, dict):
            a, b = ({n: v for n, v in o.items() if n != 'name'} for o in (a, b))
        if a != b:
            raise DistillError(
                f'{where} has rows with {k} {shortened(a)}, but it is {shortened(b)} now: all rows of '
                'a cache are written in the same way. Choose a different folder.'
            )


def stream_manifest(where: Folder) -> Manifest:
    """Read the manifest of a stream that `start_stream` created."""
    if where.size('manifest.json') is None or (m := Manifest.read(where)).parts is None:
        raise DistillError(
            f'{where} is not a stream: call start_stream(path, teacher, example) once, before its '
            'writers start.'
        )
    return m


class TeacherRows:
    """Function that runs the teacher on a batch of samples and returns their rows.

    Call it in a loop, in `map` of `datasets` (with batched=True), in `map_batches` of Ray Data, or
    in `mapInPandas` of Spark. A batch is a DataFrame or a dict of lists, arrays or tensors. An
    optional column `view` contains the view of each sample. For an iterator of batches, the result
    is an iterator.

    The result has the same type as the batch, with three columns. `key` is the 64-bit key of a
    sample as a signed integer, `view` is its view, and `row` contains the bytes of the row.

    Args:
        path: Folder or URL of the stream, created by `start_stream`.
        teacher: The teacher that was passed to `start_stream`.
        inputs, key, device: See `start_stream`.
        layer: Name of the output layer, if hidden states are stored. If None, the layer is found
            automatically.
    """

    def __init__(
        self,
        path: Path | str | Folder,
        teacher: Any,
        *,
        inputs: str | Callable = 'inputs',
        key: str | Callable = 'key',
        device: Any = None,
        layer: str | None = None,
    ):
        self.folder = open_folder(path)
        self.manifest = m = stream_manifest(self.folder)
        if isinstance(teacher, Teacher) and m.layout.kind != 'hidden':
            teacher = with_defaults(teacher, axis=m.layout.axis)
        self.teacher, self.inputs, self.key, self.device = teacher, inputs, key, device
        known, now = m.teacher.get('reads'), entry_of_inputs(inputs)
        # subtle: a function may read the same inputs as a column name
        alike = str(known).startswith(FUNCTION) == str(now).startswith(FUNCTION)
        who = identity_of(teacher) | dict(reads=now if alike else known)
        refuse_others(self.folder, dict(teacher=(m.teacher, who)))
        self.layer, self._rounding = layer, Rounding()
        self._states: HiddenRun | None = None
        self._head = read_head(self.folder, m)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_states': None}

    def __call__(self, batch: Any) -> Any:
        if hasattr(batch, '__next__'):
            return map(self, batch)
        keys = self.keys(batch)
        views = np.zeros(len(keys), np.int64)
        if hasattr(batch, 'keys') and 'view' in batch.keys():
            views[:] = np.asarray(batch['view'])
        for view in np.unique(views):
            check_view(self.folder, self.manifest, int(view))
        rows = self.rows(batch, keys, views)
        out = dict(key=keys.view(np.int64), view=views, row=[r.tobytes() for r in rows])
        return type(batch)(out) if hasattr(batch, 'iloc') else out

    def keys(self, batch: Any) -> np.ndarray:
        """Compute the keys of the samples, (B,) uint64."""
        return keys_in(batch, self.key, self.manifest.data.get('root', ''))

    def rows(self, batch: Any, keys: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Run the teacher and return its outputs as rows, (B, bytes) uint8."""
        x, m = inputs_in(batch, self.inputs, self.device), self.manifest
        return encoded(m, self._head, views, self._rounding, keys, self._outputs(x))

    def _outputs(self, x: Any) -> Outputs:
        if self.manifest.layout.kind != 'hidden':
            return outputs_of(self.teacher, x)
        if self._states is None:
            out = outputs_of(self.teacher, x)
            if isinstance(out.logits, LinearLogits):
                return out
            run = lambda teacher: outputs_of(teacher, x)
            found = find_output_layer(self.teacher, run, self.layer)
            self._states = HiddenRun(run, self.teacher, found)
        s = self._states
        return s.layer.outputs(outputs_of(s.teacher, x), bool(s.teacher.runner.half))


def check_view(where: Folder, m: Manifest, view: int) -> None:
    if not 0 <= view < m.stored:
        raise DistillError(
            f'view={view}: {where} has {m.stored} view(s), numbered from 0. start_stream(views=) sets '
            'their number.'
        )


FUNCTION = 'function '


def entry_of_inputs(inputs: Any) -> Any:
    """Return the manifest entry for the argument `inputs`."""
    if callable(inputs):
        return FUNCTION + behavior_of(inputs)
    return list(inputs) if isinstance(inputs, tuple) else inputs


def inputs_in(batch: Any, spec: Any, device: Any = None) -> Any:
    """Return the teacher's inputs from a batch, as tensors."""
    if callable(spec):
        x = spec(batch)
    elif isinstance(spec, tuple):
        x = tuple(as_tensor(column(batch, k)) for k in spec)
    else:
        x = as_tensor(column(batch, spec))
    return x if device is None else map_tensors(x, lambda t: t.to(device))


def column(batch: Any, name: str) -> Any:
    if hasattr(batch, 'keys') and name not in batch.keys():
        raise DistillError(
            f'The batch has no column {name!r}, but {", ".join(map(str, batch.keys()))}. Specify the '
            "columns of the teacher's inputs with inputs=, and of the samples' names with key=."
        )
    return batch[name]


def as_tensor(o: Any) -> Tensor:
    """Convert a column of numbers from Ray, `datasets` or pandas to a tensor."""
    if isinstance(o, Tensor):
        return o
    a = o if isinstance(o, np.ndarray) and o.dtype != object else np.stack([*map(np.asarray, o)])
    t = torch.from_numpy(np.array(a))  # make a copy, since Arrow memory is read-only
    return t.to(torch.get_default_dtype()) if t.dtype == torch.double else t


def keys_in(batch: Any, spec: Any, root: str) -> np.ndarray:
    names = spec(batch) if callable(spec) else column(batch, spec)
    return keys_in_stream(names, root)


class RowWriter:
    """Writes rows computed by `TeacherRows` to a cache, one file for each batch and view.

    Call it with the results of `TeacherRows`, in a loop or in a framework such as Ray Data. The call
    returns the names of the files and the number of rows in each file. A file name depends only on
    the samples in the file, so if a batch is written twice, the second file replaces the first. Use
    large batches, because each batch becomes a file.

    Args:
        path: Folder or URL of the stream, created by `start_stream`.
    """

    def __init__(self, path: Path | str | Folder):
        self.folder = open_folder(path)
        self.manifest = stream_manifest(self.folder)
        if self.manifest.complete:
            raise DistillError(f'{self.folder} is already sealed: rows can no longer be added.')

    def __call__(self, batch: Any) -> Any:
        if hasattr(batch, '__next__'):
            return map(self, batch)
        keys = np.array(batch['key'], np.int64).view(np.uint64)
        views, size, files = np.array(batch['view']), self.manifest.layout.bytes, []
        for key, o in zip(keys, batch['row']):
            if len(o) != size:
                raise DistillError(
                    f'The row with key {key:016x} has {len(o)} bytes instead of {size}.'
                )
        rows = np.frombuffer(b''.join(batch['row']), np.uint8).reshape(len(keys), size)
        for view in np.unique(views):
            on = np.flatnonzero(views == view)
            name = f'{hash_of(keys[on].tobytes()):016x}'
            files.append((self.write(name, keys[on], rows[on], int(view)), len(on)))
        out = dict(file=[name for name, _ in files], rows=[n for _, n in files])
        return type(batch)(out) if hasattr(batch, 'iloc') else out

    def write(self, name: str, keys: np.ndarray, rows: np.ndarray, view: int = 0) -> str:
        """Write a file of rows atomically.

        Args:
            name: Name of the file without its folder. Files with the same samples in different
                views have the same name.
            keys: Keys of the samples, (N,) uint64.
            rows: Rows, (N, bytes) uint8.
            view: View of the samples.

        Returns:
            Path of the file relative to the folder of the cache.
        """
        self.check_place(name, view)
        to, data = f'view{view:03}/{name}.rows', np.ascontiguousarray(rows).data.cast('B')
        self.folder.write(to, data)
        own = np.asarray(keys, '<u8').tobytes() + bytes.fromhex(checksum(data))
        # subtle: the key file is written last, since rows without a key file are ignored
        self.folder.write(keys_file(to), own + bytes.fromhex(checksum(own)))
        return to

    def check_place(self, name: str, view: int) -> None:
        """Raise a DistillError if the folder has no such view, or if the file name is not allowed."""
        check_json('The name of a file', name, PART_NAME)
        check_view(self.folder, self.manifest, view)

    def finished(self, name: str, view: int = 0) -> list:
        """Return the names of the consecutive files NAME-000000, NAME-000001 ... that exist and
        have all of their rows.
        """
        names: list[str] = []
        while True:
            to = f'view{view:03}/{name}-{len(names):06}.rows'
            n = rows_in(self.folder, to)
            if n is None or self.folder.size(to) != n * self.manifest.layout.bytes:
                return names
            names.append(to)


def keys_file(name: str) -> str:
    return name.removesuffix('.rows') + '.keys'


def rows_in(where: Folder, name: str) -> int | None:
    """Return the number of keys of a file of rows, or None if its key file is missing."""
    size = where.size(keys_file(name))
    return None if size is None else (size - 32) // 8


def read_keys(where: Folder, name: str) -> tuple[np.ndarray, str]:
    """Return (keys of the rows in a file, checksum of the file).

    Raises:
        DistillError: If the key file is damaged.
    """
    data = where.read(keys_file(name))
    own = memoryview(data)[:-16]
    if len(data) < 32 or len(data) % 8 or bytes.fromhex(checksum(own)) != data[-16:]:
        raise DistillError(f'{keys_file(name)} is damaged')
    return np.frombuffer(own[:-16], '<u8'), data[-32:-16].hex()


def write_stream(
    batches: Iterable, rows: TeacherRows, name: str, *, view: int = 0, part_bytes: int = SHARD_BYTES
) -> int:
    """Write the rows of one part of the data in order, and return the number of rows.

    If a previous run was interrupted, the teacher runs only on the remaining samples.

    Each writer needs its own part of the data and its own name. The order of the samples within a
    part must not change. In the cache, the parts are sorted by name, and numbers in names are
    compared as numbers.

    Args:
        batches: Iterable of batches.
        rows: Result of `start_stream`, or a `TeacherRows` for the same folder.
        name: Name of this part of the data, such as 'shard-00017'.
        view: View of the samples.
        part_bytes: Approximate size of a file in bytes.
    """
    out, size = RowWriter(rows.folder), max(part_bytes // rows.manifest.layout.bytes, 1)
    out.check_place(f'{name}-{0:06}', view)
    end, parts = f'view{view:03}/{name}.end', out.finished(name, view)
    n = rows_at_end(rows.folder, end)
    # subtle: files may have been lost since the writer was done
    if n is not None and n == sum(rows_in(rows.folder, o) or 0 for o in parts):
        return n
    done = [read_keys(rows.folder, o)[0] for o in parts]
    number, known, at = len(done), np.concatenate([*done, np.empty(0, np.uint64)]), 0
    waiting, kept = [], 0  # `waiting` holds the (keys, rows) that are not written yet
    with rows.teacher if hasattr(rows.teacher, '__enter__') else nullcontext():
        for batch in batches:
            keys = rows.keys(batch)
            skip = min(max(len(known) - at, 0), len(keys))
            if not np.array_equal(keys[:skip], known[at : at + skip]):
                raise DistillError(
                    f'{name} begins with different samples than when its first {len(known)} rows '
                    f'were written (near sample {at}): the order of a stream must not change. Remove '
                    f'{rows.folder}/view{view:03}/{name}-* to write it again.'
                )
            at += len(keys)
            if skip == len(keys):
                continue
            got = rows.rows(batch, keys, np.full(len(keys), view))
            waiting.append((keys[skip:], got[skip:]))
            kept += len(keys) - skip
            while kept >= size:
                (keys, got), waiting = first_rows_of(waiting, size)
                out.write(f'{name}-{number:06}', keys, got, view)
                number, kept = number + 1, kept - size
    if at < len(known):
        raise DistillError(
            f'{name} has only {at} samples, but {len(known)} rows were written before.'
        )
    if kept:
        keys, got = first_rows_of(waiting, kept)[0]
        out.write(f'{name}-{number:06}', keys, got, view)
    rows.folder.write(end, json.dumps(dict(rows=at)).encode())
    warn_of_rounding(rows.manifest.layout, rows._rounding)
    if not at:
        warnings.warn(DistillWarning(f'{name} has no samples.'), stacklevel=2)
    return at


def rows_at_end(where: Folder, name: str) -> int | None:
    """Return the number of rows recorded by a writer that has finished, or None if it has not."""
    if where.size(name) is None:
        return None
    try:
        o = json_object('the file', parse_json(where.read(name)), ('rows',), ())
        return whole_number('rows', o['rows'], 0, MAX_COUNT)
    except DistillError as e:
        raise DistillError(
            f'{name} in {where} is damaged: {e} Remove it, and run its writer again.'
        ) from e


def first_rows_of(waiting: list, n: int) -> tuple:
    """Return ((keys, rows) of the first `n` rows, list with (keys, rows) of the remaining rows)."""
    keys, rows = (np.concatenate(o) for o in zip(*waiting))
    return (keys[:n], rows[:n]), [(keys[n:], rows[n:])] if len(keys) > n else []
