"""Write caches of outputs that a different program computed.

The outputs can be JSON lines, Parquet, Arrow or NumPy files, or Python objects.
"""

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.outputs import DistillError, Outputs, TopK
from .digests import file_checksum, fingerprint
from .file_store import natural_order
from .json_checks import load_json, shortened
from .keys import keys_of, ordered_names
from .other_tools import converted_rows
from .reader import TeacherCache
from .row_layout import COARSE, Store, float16_step
from .teacher_description import Source, check_vocab, is_whole
from .write_progress import shown_progress
from .writer import write_cache

# {name of the column: True if each entry is stored at the position of the token it predicts, and
# False if it is stored one position earlier, as in a student's logits}
VALUES = dict(
    logprobs=False,
    log_probs=False,
    logits=False,
    probs=False,
    top_logprobs=False,
    prompt_logprobs=True,
    input_top_logprobs=True,
)
IDS = 'ids', 'token_ids'
KEYS = 'key', 'id', 'custom_id', 'index', 'path'
# a table of logits in which so many positions sum to 1 or 100 holds probabilities
LIKE_PROBABILITIES = 8
LEAST_LOGPROB = -1000  # vLLM and OpenAI write -9999 for missing values


def cache_from(
    outputs: Any,
    path: Path | str,
    n: int | None = None,
    *,
    keys: Sequence | str | None = None,
    root: Path | str | None = None,
    value: str | None = None,
    given: str | None = None,
    topk: int | None = None,
    tail: str | None = None,
    shift: bool | None = None,
    length: int | None = None,
    dtype: str = 'float16',
    teacher: str | None = None,
    vocab: Sequence | None = None,
    bs: int = 64,
    force: bool = False,
    progress: bool | Callable = True,
    tool: str | None = None,
    config: Any = None,
) -> TeacherCache:
    """Write a cache of outputs that a different program computed, and open the cache.

    If a previous run was interrupted, it is resumed.

    Each row needs the name of a sample and the teacher's outputs. The outputs are one number for
    each class, or pairs of a class and its log-probability. For tokens, a row has such a list for
    each position. Responses of vLLM, SGLang and OpenAI's completions API are supported.

    Args:
        outputs: A .jsonl, .parquet, .arrow, .npy or .npz file, a folder of such files (e.g. written
            by `Dataset.save_to_disk` of Hugging Face), an array (N, ...), a `datasets.Dataset`, or
            a list of dicts.
        path: Folder or URL of the cache.
        n: Number of classes, or size of the vocabulary. If None, use the number of values in each
            row.
        keys: Names of the samples, equal to those of the student's dataset: a list, or the name of
            a column. If None, use a column with a common name, such as 'key' or 'id'.
        root: Root folder of the samples, if their names are file paths.
        value: Column with the outputs. If None, use a column with a common name, such as
            'logprobs'.
        given: Type of the numbers: 'logprobs', 'logits' or 'probs'. If None, infer the type from
            the column name.
        topk: Number of most likely classes to store. If None, store as many classes as every
            position has.
        tail: Assumption about the classes that are not stored: 'uniform', 'zero' or 'bucket', see
            `TopK`. If None, use the assumption of `tool`, or 'uniform' without a tool.
        shift: For tokens, True if each entry is stored at the position of the token it predicts, as
            vLLM and SGLang do. If None, the column name decides.
        length: For tokens, the number of positions to store. If None, use the length of the longest
            row. Missing positions are masked out.
        dtype: 'float32', 'float16' or 'int8'.
        teacher: Name of the teacher. If None, use the name of the file.
        vocab: Class names, in the order of the numbers.
        bs: Number of rows written at once.
        force: If True, overwrite an existing cache that was written from different outputs.
        progress: True for a progress bar in terminals and notebooks, False for none, or fn(rows
            done, total rows, bytes done).
        tool: Tool that wrote the rows in its own format: 'distillkit', 'open-instruct', 'axolotl'
            or 'vllm'. If the rows have no names, each sample is identified by its tokens.
        config: Configuration with which DistillKit or open-instruct compressed the rows, as a dict
            or a file. If None, read compression_config.yaml next to the rows.
    """
    rows, identity = read_rows(outputs)
    if not len(rows):
        raise DistillError(f'There are no rows in {identity[0]}: there is nothing to write.')
    if tool is not None:
        file = outputs if isinstance(outputs, (str, Path)) else None
        rows, of_tool, classes = converted_rows(rows, tool, config, file)
        n, tail = n or classes, tail or of_tool.tail
        shift = of_tool.shift if shift is None else shift
        if keys is None and not any(k in rows[0] for k in KEYS):
            keys = of_tool.keys
    tail = tail or 'uniform'
    r = Reading(rows, n, value, given, shift, tail, dtype)
    found = r.hashed(r.names(keys), root)
    r.measure(topk, length)
    check_vocab(vocab, r.n)

    def run(tasks: Sequence[int], bs: int) -> Iterator[Outputs]:
        for i in range(0, len(tasks), bs):
            yield r.batch(tasks[i : i + bs])

    who = dict(name=teacher or identity[0], weights=identity[1], outputs=f'{r.value}, {r.given}')
    source = Source(
        found, run, min(bs, len(rows)), who, {}, '' if root is None else str(root), vocab
    )
    with shown_progress(progress) as show:
        return write_cache(
            path,
            source,
            Store(dtype=dtype, topk=r.k, tail=tail, axis=-1),
            views=0,
            force=force,
            progress=show,
        )


class Reading:
    """Reader that converts rows (dicts) to `Outputs`. All rows are checked before the cache is
    written.
    """

    def __init__(
        self,
        rows: Any,
        n: int | None,
        value: str | None,
        given: str | None,
        shift: bool | None,
        tail: str,
        dtype: str,
    ):
        self.rows, self.tail, self.dtype = rows, tail, dtype
        self.n: Any = n  # number of classes, known after `measure`
        self.keys: Sequence | None = None
        if tail == 'mean':
            raise DistillError(
                "tail='mean' needs the log-probabilities of all classes: it must be 'uniform', 'zero' "
                "or 'bucket'."
            )
        first = self.columns(0)
        self.value = value or next((k for k in VALUES if k in first), '')
        if self.value not in first:
            raise DistillError(
                f'No column {value or "logprobs"!r} with outputs; the first row '
                f'({self.place(0)}) has {", ".join(map(str, first))}. Name it with value=.'
            )
        self.given = given or dict(logits='logits', probs='probs').get(self.value, 'logprobs')
        if self.given not in ('logits', 'probs', 'logprobs'):
            raise DistillError(f"given={given!r}: it must be 'logprobs', 'logits' or 'probs'.")
        self.shift = VALUES.get(self.value, False) if shift is None else shift
        self.k: int | None = None
        self.length: Any = None

    def place(self, i: int) -> str:
        """Describe a row by its file, number and name."""
        where = self.rows.place(i) if hasattr(self.rows, 'place') else f'Row {i}'
        return where if self.keys is None else f'{where} ({shortened(repr(self.keys[i]), 100)})'

    @contextmanager
    def naming(self, i: int) -> Iterator[None]:
        """Add the file and number of row `i` to the errors raised in this context."""
        try:
            yield
        except DistillError as e:
            raise DistillError(f'{self.place(i)}: {e}') from None

    def columns(self, i: int) -> Mapping:
        row = self.rows[i]
        if isinstance(row, Mapping):
            return row
        raise DistillError(
            f'{self.place(i)} is of type {type(row).__name__}: each row must be a dict with the name '
            'and the outputs of a sample.'
        )

    def names(self, keys: Sequence | str | None) -> list:
        if keys is not None and not isinstance(keys, str):
            if len(keys) != len(self.rows):
                raise DistillError(
                    f'{len(keys)} keys for {len(self.rows)} rows (the first is {self.place(0)}): '
                    'give one for each.'
                )
            return list(ordered_names(keys))
        column = keys or next((k for k in KEYS if k in self.columns(0)), '')
        if column not in self.columns(0):
            raise DistillError(
                f"No column {keys or 'key'!r} with the samples' names; the first row "
                f'({self.place(0)}) has {", ".join(map(str, self.columns(0)))}. Give keys=, a column or '
                'a list.'
            )
        return [self.column(i, column) for i in range(len(self.rows))]

    def column(self, i: int, name: str) -> Any:
        if name in (row := self.columns(i)):
            return row[name]
        raise DistillError(
            f'{self.place(i)} has no {name!r}, unlike the first row. It has '
            f'{", ".join(map(str, row)) or "nothing"}.'
        )

    def hashed(self, names: Sequence, root: Path | str | None) -> np.ndarray:
        """Return the keys of the samples, (N,) uint64. All names must be different."""
        self.keys = names
        seen: dict[int, int] = {}
        for i, name in enumerate(names):
            with self.naming(i):
                key = key_of_name(name, root)
            if seen.setdefault(key, i) != i:
                raise DistillError(
                    f'Two of the {len(names)} rows have the same name: {self.place(seen[key])} '
                    f'and {self.place(i)}. keys= must give each sample a unique name.'
                )
        return np.fromiter(seen, np.uint64, len(seen))

    def measure(self, topk: int | None, length: int | None) -> None:
        """Check all rows in one pass, and find how many classes and positions every row has."""
        for name, o in dict(n=self.n, topk=topk, length=length).items():
            if o is not None and (not is_whole(o) or o < 1):
                raise DistillError(f'{name}={o!r}: it must be a whole number from 1, or None.')
        # {number of classes: row}, of all positions and of those without class numbers
        counts: dict[int, int] = {}
        unnumbered: dict[int, int] = {}
        longest, self.tokens = 0, None
        sums: set[int] = set()
        n_positions = 0
        for i in range(len(self.rows)):
            positions = self.positions(i)
            if self.tokens is None:
                self.tokens = self.in_rows
            if self.tokens != self.in_rows:
                kinds = 'of one position', 'of a list of positions'
                raise DistillError(
                    f'{self.place(i)} has outputs {kinds[self.in_rows]}, but the first row has '
                    f'outputs {kinds[self.tokens]}: all rows must have the same form.'
                )
            with self.naming(i):
                own = {len(v) for _, v in filter(None, positions)}
                if not own:
                    raise DistillError(f'there are no outputs in {self.value!r}.')
                for j, p in enumerate(positions):
                    if p is not None:
                        self.check(p[0], p[1], f'position {j}: ' if self.in_rows else '')
            for c, v in filter(None, positions):
                n_positions += 1
                sums.add(share_of(v))
                counts.setdefault(len(v), i)
                if c is None:
                    unnumbered.setdefault(len(v), i)
            longest = max(longest, len(positions))
        if self.given == 'logits' and n_positions >= LIKE_PROBABILITIES and sums in ({1}, {100}):
            raise DistillError(
                f'{self.value!r} holds {"percentages" if sums == {100} else "probabilities"}, not logits: no '
                f"number is negative, and all positions sum to {sums.pop()}. Pass given='probs', with "
                'numbers from 0 to 1.'
            )
        k, self.length = min(counts), length or longest
        self._check_classes(k, counts, unnumbered, topk)
        self.n, self.k = self.n or k, topk or k
        if self.k == self.n and not topk:
            self.k = None  # all classes are stored in order, so class numbers are not needed

    def _check_classes(self, k: int, counts: Any, unnumbered: Any, topk: int | None) -> None:
        n = self.n or max(unnumbered)
        if wrong := next((o for o in unnumbered if o != n), None):
            other = f'n={n}' if self.n else f'{self.place(unnumbered[n])} has {n}'
            raise DistillError(
                f'{self.place(unnumbered[wrong])} has {wrong} numbers without class numbers, but '
                f'{other}: each position must have one number for each class, or class numbers in '
                "a column 'ids'."
            )
        if topk and topk > k:
            raise DistillError(
                f'topk={topk}, but some positions have only {k} classes, such as one of '
                f'{self.place(counts[k])}.'
            )

    def positions(self, i: int) -> list:
        """Return (classes, numbers) for each position of a row, or None for a position without
        entries.

        `classes` is None if the numbers cover all classes in order.
        """
        value = self.column(i, self.value)
        o = unwrapped(value)
        with self.naming(i):
            columns = self.rows[i]
            ids = next((columns[k] for k in IDS if columns.get(k) is not None), None)
            if not isinstance(o := listed(o), (Mapping, list, np.ndarray)):
                raise DistillError(
                    f'{self.value!r} is {shortened(repr(o), 100)}: it must be a list of numbers, '
                    'a dict of classes and their numbers, or, for tokens, a list of these.'
                )
            # subtle: the items of `content` are positions, and would look like pairs of one position
            if isinstance(value, Mapping) and 'content' in value:
                if lone := [e for e in o if isinstance(e, Mapping) and is_entry(e)]:
                    raise DistillError(
                        f"the position {shortened(repr(lone[0]), 100)} has no 'top_logprobs': ask the "
                        'server for them, such as top_logprobs=20.'
                    )
            # a list of (number, class) pairs is a single position, not a list of positions
            pairs = ids is None and all(map(is_entry, o))
            self.in_rows = not isinstance(o, Mapping) and is_nested(o) and not pairs
            if not self.in_rows:
                return [entries(o, ids)]
            if ids is None:
                ids = [None] * len(o)
            if not isinstance(ids := listed(ids), (list, np.ndarray)) or len(ids) != len(o):
                raise DistillError(
                    f'{len(o)} positions in {self.value!r}, and ids {shortened(repr(ids), 100)}: ids '
                    'must be a list with one list of classes for each position.'
                )
            out = [None if p is None else entries(p, c) for p, c in zip(o, ids)]
            if self.shift and out[0] is not None:
                raise DistillError(
                    f'the first position of {self.value!r} has outputs, but nothing predicts the first '
                    'token: if each entry is stored where the model predicts it, pass shift=False; if a '
                    'null for the first token was removed, put it back.'
                )
        return out[1:] + [None] if self.shift else out

    def check(self, c: Any, v: Any, where: str) -> None:
        """Raise a DistillError unless the numbers are valid logits or (log-)probabilities."""

        def refuse(found: str) -> None:
            raise DistillError(f'{where}{found}')

        if not len(v):
            refuse('there are no classes: use null (None) for a position without outputs.')
        if c is not None:
            if self.n is None:
                raise DistillError(
                    'The rows have only some of the classes: pass n=, the number of all classes '
                    '(for tokens, the size of the vocabulary).'
                )
            if self.given == 'logits':
                raise DistillError(
                    'Logits of only some classes have no probabilities: use log-probabilities.'
                )
            if min(c) < 0 or max(c) >= self.n or len(set(c)) < len(c):
                refuse(f'the classes {few_of(c)} must differ, and be from 0 to {self.n - 1}.')
        if np.isnan(v).any():
            refuse(f'{self.value!r} has NaN: each class needs a number.')
        if self.given == 'probs':
            self._check_probabilities(v, refuse)
        else:
            self._check_logarithms(v, refuse)
        if self.given == 'logits':
            return
        with np.errstate(over='ignore'):
            total = (v if self.given == 'probs' else np.exp(v)).sum()
        # the row has all classes, not only the most likely ones
        every = len(v) == self.n or c is None
        if total <= 1.02 and total >= (0.98 if every else 1e-6):
            return
        other = 'logprobs' if self.given == 'probs' else 'probs'
        rule = 'a few classes must sum to more than 0 and at most 1'
        refuse(
            f'the probabilities sum to {total:.3g} if {self.value!r} holds {self.given}, but '
            f'those of {"all classes must sum to 1" if every else rule}. If it holds something else, '
            f"pass given='logits' or given={other!r}. If the classes are not mutually exclusive, use "
            'their logits.'
        )

    def _check_probabilities(self, v: Any, refuse: Callable) -> None:
        if v.min() < -1e-5 or v.max() > 1.02:  # allow for rounding errors
            refuse(
                f'the probabilities go from {v.min():.3g} to {v.max():.3g}: they must be from 0 '
                f"to 1. If {self.value!r} holds something else, pass given='logits' or "
                "given='logprobs'."
            )

    def _check_logarithms(self, v: Any, refuse: Callable) -> None:
        """Check logits and log-probabilities. Masked classes have -inf."""
        known = v[v != -np.inf]
        if not len(known):
            refuse(f'{self.value!r} has only -inf: at least one class must have a finite number.')
        most = 65504 if self.dtype == 'float16' else 3e38
        if np.abs(known).max() > most:
            refuse(
                f'{self.value!r} has {known[np.abs(known).argmax()]:g}: {self.dtype} holds numbers up to {most:g}. '
                "Use dtype='float32', or -inf for a class that is masked out."
            )
        if self.given == 'logprobs' and known.min() < LEAST_LOGPROB:
            refuse(
                f'{self.value!r} has {known.min():g}, which marks a missing log-probability: '
                f'they must be at least {LEAST_LOGPROB}. Leave the class out of a list of the '
                'most likely classes, or use -inf for probability 0.'
            )
        if self.dtype == 'float16' and (step := float16_step(known.max())) > COARSE:
            refuse(
                f'the largest number of {self.value!r} is {known.max():g}, where float16 holds numbers '
                f"in steps of {step:g}: use dtype='float32', or subtract the largest logit from all."
            )
        if len(known) < len(v) and self.dtype == 'int8':
            refuse(f"{self.value!r} has -inf, which int8 can't hold: use dtype='float16'.")
        low, high = known.min(), known.max()
        if self.dtype == 'int8' and (high - low) / 254 > COARSE:
            refuse(
                f'{self.value!r} goes from {low:g} to {high:g}, which int8 holds in steps of '
                f"{(high - low) / 254:.3g}: use dtype='float16' or 'float32'."
            )

    def batch(self, tasks: Sequence[int]) -> Outputs:
        """Return the outputs of some rows."""
        rows = zip(*(self.row(int(i)) for i in tasks))
        ids, values, mask = (torch.from_numpy(np.stack(o)) for o in rows)
        if not self.tokens:
            ids, values = ids[:, 0], values[:, 0]
        logits = values if self.k is None else TopK(ids, values, self.n, self.tail)
        return Outputs(logits, {}, mask if self.tokens else None)

    def row(self, i: int) -> tuple:
        k, positions = self.k or self.n, self.positions(i)[: self.length]
        ids = np.tile(np.arange(k, dtype=np.int64), (self.length, 1))
        values = np.full(ids.shape, -np.log(self.n), np.float32)
        mask = np.zeros(self.length, np.float32)
        for j, p in enumerate(positions):
            if p is not None:
                ids[j], values[j], mask[j] = *self.best(p[0], p[1], k), 1
        return ids, values, mask

    def best(self, c: Any, v: Any, k: int) -> tuple:
        """Return (class numbers, log-probabilities) of the `k` most likely classes.

        If all classes are stored, they are returned in order.
        """
        c = np.arange(len(v)) if c is None else np.asarray(c)
        if self.given == 'probs':
            v = np.log(np.clip(v, 1e-7, None))
        order = np.argsort(c) if self.k is None else np.argsort(-v, kind='stable')[:k]
        if self.k is not None and self.given == 'logits':
            v = v - np.logaddexp.reduce(v)
        return c[order], v[order]


def share_of(v: np.ndarray) -> int:
    """Return 1 for probabilities, 100 for percentages, and 0 for other numbers."""
    total = v.sum()
    near = [n for n in (1, 100) if abs(total - n) < 0.02 * n]
    return near[0] if near and v.min() >= 0 else 0


def key_of_name(name: Any, root: Any) -> int:
    """Return the key of a sample, computed from its name."""
    odd = name is None or isinstance(name, (bool, Mapping))
    odd = odd or isinstance(name, float) and not isfinite(name)
    if odd or isinstance(name, str) and not name:
        raise DistillError(
            f'its name is {shortened(repr(name), 100)}: it must be a string or a number.'
        )
    try:
        own = name if root is None else PurePath(name)
        return keys_of([own], '' if root is None else str(root)).item()
    # the name may be an invalid string, a number instead of a path, or a list that contains itself
    except (UnicodeError, TypeError, RecursionError) as e:
        raise DistillError(
            f"its name {shortened(ascii(name), 100)} can't be used ({e}): it must be a string"
            f'{", the path of a file" if root is not None else " or a number"}.'
        ) from e


def few_of(c: Any) -> str:
    return ', '.join(map(str, c[:8])) + (' ...' if len(c) > 8 else '')


def unwrapped(o: Any) -> Any:
    """Return the list of entries inside an OpenAI response."""
    while isinstance(o, Mapping) and (
        k := next((k for k in ('content', 'top_logprobs') if k in o), None)
    ):
        o = o[k]
    return o


def listed(o: Any) -> Any:
    """Convert a tuple to a list, and a tensor to an array. A 0-d array becomes a number."""
    if torch.is_tensor(o):
        o = as_array(o)
    if isinstance(o, np.ndarray) and not o.ndim:
        return o.item()
    return list(o) if isinstance(o, tuple) else o


def as_array(t: Tensor) -> np.ndarray:
    """Convert a tensor on any device to an array."""
    t = t.detach().cpu()
    return (t.float() if t.dtype == torch.bfloat16 else t).numpy()  # NumPy has no bfloat16


def is_real(o: Any) -> bool:
    return isinstance(o, (int, float, np.integer, np.floating)) and not isinstance(o, bool)


def is_nested(o: Any) -> bool:
    """Return True for a list of lists or dicts."""
    if isinstance(o, np.ndarray) and o.dtype != object:
        return o.ndim > 1
    if any(isinstance(listed(v), (Mapping, list, np.ndarray)) for v in o):
        return True
    # a list of None is a list of positions without entries
    return len(o) > 0 and all(v is None for v in o)


def is_entry(e: Any) -> bool:
    """Return True for a (number, class) pair, or a dict with a 'logprob'."""
    if isinstance(e, Mapping):
        return 'logprob' in e and 'top_logprobs' not in e
    if not isinstance(e, (list, tuple)) or not 2 <= len(e) <= 3:
        return False
    text = e[2] if len(e) == 3 else None
    return isinstance(e[0], float) and isinstance(e[1], int) and isinstance(text, (str, type(None)))


def entries(p: Any, ids: Any) -> tuple:
    """Return (classes, numbers) of one position.

    `classes` is None if the numbers cover all classes in order.
    """
    p = listed(unwrapped(p))
    if isinstance(p, Mapping) and ids is None:
        return [class_of(k) for k in p], as_numbers([number_of(v) for v in p.values()])
    if not isinstance(p, (list, np.ndarray)):
        raise DistillError(
            f'{shortened(repr(p), 100)} is neither a list of numbers nor a dict of classes and '
            'numbers.'
        )
    if ids is not None:
        if not isinstance(ids := listed(ids), (list, np.ndarray)) or len(ids) != len(p):
            raise DistillError(
                f'{len(p)} numbers and the ids {shortened(repr(ids), 100)}: give one class for each.'
            )
        return [class_of(k) for k in ids], as_numbers(p)
    if isinstance(p, np.ndarray) or not any(isinstance(e, (Mapping, list, tuple)) for e in p):
        return None, as_numbers(p)
    for e in p:
        if not is_entry(e) and not (isinstance(e, (list, tuple)) and len(e) >= 2):
            raise DistillError(
                f"the entry {shortened(repr(e), 100)} must be {{'token': class, 'logprob': number}} or "
                '[number, class, text].'
            )
    # SGLang writes [log-probability, token, text]
    named = lambda e: next((e[k] for k in ('token_id', 'id', 'token') if k in e), None)
    pairs = [(named(e), e['logprob']) if isinstance(e, Mapping) else (e[1], e[0]) for e in p]
    return [class_of(k) for k, _ in pairs], as_numbers([v for _, v in pairs])


def as_numbers(p: Any) -> np.ndarray:
    """Convert numbers to an array, (n,) float64."""
    if isinstance(p, np.ndarray) and p.dtype.kind in 'fiu' and p.ndim == 1:
        with np.errstate(invalid='ignore'):
            return p.astype(np.float64)  # NumPy warns about some NaN bit patterns
    if (odd := next((v for v in p if not is_real(v)), p)) is not p:
        raise DistillError(f'{shortened(repr(odd), 100)} is not a number.')
    try:
        return np.array([float(v) for v in p])
    except OverflowError as e:
        raise DistillError('a whole number with hundreds of digits is too large.') from e


def number_of(v: Any) -> Any:
    return v.get('logprob') if isinstance(v, Mapping) else getattr(v, 'logprob', v)


def class_of(k: Any) -> int:
    text = str(k).removeprefix('token_id:')
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise DistillError(
        f'the class {shortened(repr(k), 100)} is not a whole number from 0: ask the server for token '
        'ids (vLLM: return_tokens_as_token_ids=True), or translate names first.'
    )


# files


def read_rows(o: Any) -> tuple:
    """Return (sequence of dicts, (name, fingerprint)) for any supported input."""
    if isinstance(o, (str, Path)):
        return read_path(Path(o))
    if hasattr(o, 'column_names'):
        return of_hub(o)
    if torch.is_tensor(o):
        o = as_array(o)
    if isinstance(o, np.ndarray):
        return Arrays(dict(logprobs=o)), ('array', fingerprint(o))
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
        # column names may have different types, or an object may contain itself
        except (TypeError, ValueError, RecursionError) as e:
            raise DistillError(
                f"Row {i} can't be written as JSON ({e}): its columns must have text names and "
                'hold numbers, texts, or lists and dicts of these.'
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
            f'{path}: it must be a file that ends in {", ".join(READERS)}, or a folder of them.'
        )
    return Joined(files), (path.name, fingerprint(' '.join(map(file_checksum, files))))


@contextmanager
def reading(path: Path, what: str = '') -> Iterator[None]:
    """Convert errors of a file library to a one-line `DistillError` that names the file."""
    try:
        yield
    except (DistillError, ImportError):
        raise
    # subtle: for damaged files, the libraries raise many kinds of errors, even KeyError and
    # MemoryError
    except Exception as e:
        reason = shortened(' '.join(f'{type(e).__name__}: {e}'.split()))
        raise DistillError(
            f"{path}{what} can't be read as {path.suffix} ({reason}). The file is damaged, or its "
            'name has the wrong ending: write or copy it again.'
        ) from e


def row_in_part(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Return (index of the part that holds row `i`, index of the row in that part).

    Args:
        ends: Number of rows up to the end of each part.
        i: Index of the row.
    """
    k = int(np.searchsorted(ends, i, 'right'))
    if k == len(ends):
        raise IndexError(i)
    return k, i - (int(ends[k - 1]) if k else 0)


class Joined:
    """The rows of several files, concatenated."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.parts: list[Any] = []
        for f in files:
            with reading(f):
                self.parts.append(READERS[f.suffix](f))
        self.ends = np.cumsum([len(p) for p in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, i: int) -> str:
        k, row = row_in_part(self.ends, i)
        part = self.parts[k]
        return f'{self.files[k]}, {part.place(row) if hasattr(part, "place") else f"row {row}"}'

    def __getitem__(self, i: int) -> Any:
        k, row = row_in_part(self.ends, i)
        with reading(self.files[k], f', row {row}'):
            return self.parts[k][row]


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


class Groups:
    """A file of row groups, of which only one is in memory at a time."""

    def __init__(self, sizes: Sequence[int], read: Callable[[int], Any]):
        self.ends, self.read = np.cumsum(sizes), read
        self.group: int | None = None
        self.rows: list[dict] = []

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> Any:
        g, row = row_in_part(self.ends, i)
        if g != self.group:
            group = self.read(g)
            # subtle: without this check, damaged offsets could crash the process
            group.validate(full=True)
            self.group, self.rows = g, group.to_pylist()
        return self.rows[row]


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


class Parquet(Groups):
    """A Parquet file."""

    def __init__(self, path: Path):
        parquet = pyarrow_module('parquet')
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        check_unique(file.schema_arrow.names, path)
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        super().__init__(sizes, file.read_row_group)


class Arrow(Groups):
    """A memory-mapped Arrow file, as written by `Dataset.save_to_disk` of Hugging Face."""

    def __init__(self, path: Path):
        pa, ipc = pyarrow_module('lib'), pyarrow_module('ipc')
        file = pa.memory_map(str(path))
        try:
            batches = ipc.open_stream(file).read_all().to_batches()
        except pa.ArrowInvalid:
            # the file is not a stream but has the Arrow file format, with an index
            batches = ipc.open_file(path).read_all().to_batches()
        check_unique(batches[0].schema.names if batches else (), path)
        super().__init__([b.num_rows for b in batches], batches.__getitem__)


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
        return {k: v[i] if v[i].ndim else v[i].item() for k, v in self.arrays.items()}


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


READERS = {
    '.jsonl': Lines,
    '.parquet': Parquet,
    '.arrow': Arrow,
    '.npy': arrays_of,
    '.npz': arrays_of,
}
