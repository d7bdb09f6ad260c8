"""Write caches of outputs that a different program computed.

The outputs can be JSON lines, Parquet, Arrow or NumPy files, or Python objects.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from ..base.errors import check_choice, check_whole
from ..base.outputs import DistillError, Outputs, TopK
from .imported_files import read_rows
from .json_checks import located, shortened
from .keys import as_array, keys_of, ordered_names
from .other_tools import converted_rows
from .reader import TeacherCache
from .rounding import COARSE, float16_step
from .row_layout import Store
from .teacher_description import Source, check_vocab
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
# a table of logits contains probabilities if all of at least this many positions sum to 1 or 100
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
        topk: Number of most likely classes to store. If None, store the number of classes that all
            positions have.
        tail: Assumption about the classes that are not stored: 'uniform', 'zero' or 'bucket', see
            `TopK`. If None, use the assumption of `tool`, or 'uniform' without a tool.
        shift: For tokens, True if each entry is stored at the position of the token it predicts, as
            in vLLM, SGLang, and OpenAI's completions with echo=True. If None, it is detected from
            the column name and the first row.
        length: For tokens, the number of positions to store. If None, use the length of the longest
            row. Missing positions are masked out.
        dtype: 'float32', 'float16' or 'int8'.
        teacher: Name of the teacher. If None, use the name of the file.
        vocab: Class names, in the order of the class numbers.
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
        check_choice('given', given, (None, 'logits', 'probs', 'logprobs'))
        first = self.columns(0)
        self.value = value or next((k for k in VALUES if k in first), '')
        if self.value not in first:
            raise DistillError(
                f'No column {value or given or "logprobs"!r} with outputs; the first row '
                f'({self.place(0)}) has {", ".join(map(str, first))}. Name it with value=.'
            )
        self.given = given or dict(logits='logits', probs='probs').get(self.value, 'logprobs')
        at_token = VALUES.get(self.value, False) or is_echo(self.value, first[self.value])
        self.shift = at_token if shift is None else shift
        self.k: int | None = None
        self.length: Any = None

    def place(self, i: int) -> str:
        """Describe a row by its file, number and name."""
        where = self.rows.place(i) if hasattr(self.rows, 'place') else f'Row {i}'
        return where if self.keys is None else f'{where} ({shortened(repr(self.keys[i]), 100)})'

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
            if len(ordered_names(keys)) != len(self.rows):
                raise DistillError(
                    f'{len(keys)} keys for {len(self.rows)} rows (the first is {self.place(0)}): '
                    'pass one for each row.'
                )
            return list(keys)
        column = keys or next((k for k in KEYS if k in self.columns(0)), '')
        if column not in self.columns(0):
            raise DistillError(
                f"No column {keys or 'key'!r} with the samples' names; the first row "
                f'({self.place(0)}) has {", ".join(map(str, self.columns(0)))}. Pass keys=, a column or '
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
            with located(partial(self.place, i)):
                key = key_of_name(name, root)
            if seen.setdefault(key, i) != i:
                raise DistillError(
                    f'Two of the {len(names)} rows have the same name: {self.place(seen[key])} '
                    f'and {self.place(i)}. keys= must give each sample a unique name.'
                )
        return np.fromiter(seen, np.uint64, len(seen))

    def measure(self, topk: int | None, length: int | None) -> None:
        """Check all rows in one pass, and determine the numbers of classes and positions to store."""
        for name, o in dict(n=self.n, topk=topk, length=length).items():
            check_whole(name, o, none=True)
        # {number of classes: row}, for all positions, and for the positions without class numbers
        counts: dict[int, int] = {}
        unnumbered: dict[int, int] = {}
        longest, self.tokens = 0, None
        check = NumberCheck(self.value, self.given, self.dtype, self.n)
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
            with located(partial(self.place, i)):
                own = {len(v) for _, v in filter(None, positions)}
                if not own:
                    raise DistillError(f'there are no outputs in {self.value!r}.')
                for j, p in enumerate(positions):
                    if p is not None:
                        with located(f'position {j}') if self.in_rows else nullcontext():
                            check(*p)
            for c, v in filter(None, positions):
                n_positions += 1
                sums.add(share_of(v))
                counts.setdefault(len(v), i)
                if c is None:
                    unnumbered.setdefault(len(v), i)
            longest = max(longest, len(positions))
        if self.given == 'logits' and n_positions >= LIKE_PROBABILITIES and sums in ({1}, {100}):
            raise DistillError(
                f'{self.value!r} contains {"percentages" if sums == {100} else "probabilities"}, not logits: no '
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
                f'{self.place(unnumbered[wrong])} has {wrong} values without class numbers, but '
                f'{other}: each position must have one value for each class, or class numbers in '
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
        with located(partial(self.place, i)):
            columns = self.rows[i]
            ids = next((columns[k] for k in IDS if columns.get(k) is not None), None)
            if not isinstance(o := listed(o), (Mapping, list, np.ndarray)):
                raise DistillError(
                    f'{self.value!r} is {shortened(repr(o), 100)}: it must be a list of numbers, '
                    'a dict of classes and their numbers, or, for tokens, a list of these.'
                )
            # subtle: the items of `content` are positions, but look like the entries of one position
            if isinstance(value, Mapping) and 'content' in value:
                if lone := [e for e in o if isinstance(e, Mapping) and is_entry(e)]:
                    raise DistillError(
                        f"the position {shortened(repr(lone[0]), 100)} has no 'top_logprobs': request them "
                        'from the server, e.g. with top_logprobs=20.'
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


@dataclass
class NumberCheck:
    """Checks the numbers of one position.

    Attributes:
        value: Name of the column.
        given: 'logprobs', 'logits' or 'probs'.
        dtype: 'float32', 'float16' or 'int8', in which the numbers will be stored.
        n: Number of classes. None if it is not known.
    """

    value: str
    given: str
    dtype: str
    n: int | None

    def __call__(self, c: Any, v: Any) -> None:
        """Raise a DistillError unless the numbers are valid logits or (log-)probabilities.

        Args:
            c: Class of each number. None if the numbers cover all classes in order.
            v: The numbers.
        """
        if not len(v):
            raise DistillError(
                'there are no classes: use null (None) for a position without outputs.'
            )
        if c is not None:
            self.check_classes(c)
        if np.isnan(v).any():
            raise DistillError(f'{self.value!r} has NaN: each class needs a number.')
        if self.given == 'probs':
            self.check_probabilities(v)
        else:
            self.check_logarithms(v)
        if self.given == 'logits':
            return
        with np.errstate(over='ignore'):
            total = (v if self.given == 'probs' else np.exp(v)).sum()
        # the row has all classes, not only the most likely ones
        every = len(v) == self.n or c is None
        if total <= 1.02 and total >= (0.98 if every else 1e-6):
            return
        other = 'logprobs' if self.given == 'probs' else 'probs'
        most = '1' if every else 'more than 0 and at most 1, because some classes are missing'
        raise DistillError(
            f'if {self.value!r} contains {self.given}, the probabilities sum to {total:.3g}, but '
            f'they must sum to {most}. If it contains something else, '
            f"pass given='logits' or given={other!r}. If the classes are not mutually exclusive, use "
            'their logits.'
        )

    def check_classes(self, c: Any) -> None:
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
            few = ', '.join(map(str, c[:8])) + (' ...' if len(c) > 8 else '')
            raise DistillError(f'the classes {few} must differ, and be from 0 to {self.n - 1}.')

    def check_probabilities(self, v: Any) -> None:
        if v.min() < -1e-5 or v.max() > 1.02:  # allow for rounding errors
            raise DistillError(
                f'the probabilities range from {v.min():.3g} to {v.max():.3g}: they must be from 0 '
                f"to 1. If {self.value!r} contains something else, pass given='logits' or "
                "given='logprobs'."
            )

    def check_logarithms(self, v: Any) -> None:
        """Check logits and log-probabilities. Masked classes have -inf."""
        known = v[v != -np.inf]
        if not len(known):
            raise DistillError(
                f'{self.value!r} has only -inf: at least one class must have a finite number.'
            )
        low, high, largest = known.min(), known.max(), known[np.abs(known).argmax()]
        if abs(largest) > (most := 65504 if self.dtype == 'float16' else 3e38):
            raise DistillError(
                f'{self.value!r} has {largest:g}: {self.dtype} can store numbers up to {most:g}. '
                "Use dtype='float32', or -inf for a class that is masked out."
            )
        if self.given == 'logprobs' and low < LEAST_LOGPROB:
            raise DistillError(
                f'{self.value!r} has {low:g}, which marks a missing log-probability: they must be at '
                f'least {LEAST_LOGPROB}. Leave the class out of a list of the most likely classes, or '
                'use -inf for probability 0.'
            )
        if self.dtype == 'float16' and (step := float16_step(high)) > COARSE:
            raise DistillError(
                f'the largest number in {self.value!r} is {high:g}, where the spacing of float16 is '
                f"{step:g}: use dtype='float32', or subtract the largest logit from all logits."
            )
        if self.dtype != 'int8':
            return
        if len(known) < len(v):
            raise DistillError(
                f"{self.value!r} has -inf, which int8 can't store: use dtype='float16'."
            )
        if (step := (high - low) / 254) > COARSE:
            raise DistillError(
                f'{self.value!r} ranges from {low:g} to {high:g}, which int8 stores in steps of '
                f"{step:.3g}: use dtype='float16' or 'float32'."
            )


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


def unwrapped(o: Any) -> Any:
    """Return the list of entries inside an OpenAI response."""
    while isinstance(o, Mapping) and (
        k := next((k for k in ('content', 'top_logprobs') if k in o), None)
    ):
        o = o[k]
    return o


def is_echo(column: str, value: Any) -> bool:
    """Return True for the answer of OpenAI's completions with echo=True. It has an entry for each token
    of the prompt, which is null for the first token.
    """
    if isinstance(value, Mapping):
        column, value = 'top_logprobs', value.get('top_logprobs')
    return column == 'top_logprobs' and isinstance(value, list) and value[:1] == [None]


def listed(o: Any) -> Any:
    """Convert a tuple to a list, and a tensor to an array. A 0-d array becomes a number."""
    if torch.is_tensor(o):
        o = as_array(o)
    if isinstance(o, np.ndarray) and not o.ndim:
        return o.item()
    return list(o) if isinstance(o, tuple) else o


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
                f'{len(p)} numbers, but the ids {shortened(repr(ids), 100)}: each number needs one class.'
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
    name = lambda e: next((e[k] for k in ('token_id', 'id', 'token') if k in e), None)
    pairs = [(name(e), e['logprob']) if isinstance(e, Mapping) else (e[1], e[0]) for e in p]
    return [class_of(k) for k, _ in pairs], as_numbers([v for _, v in pairs])


def as_numbers(p: Any) -> np.ndarray:
    """Convert numbers to an array, (n,) float64."""
    if np.ma.is_masked(p):
        raise DistillError('some numbers of a masked array are masked: each class needs a number.')
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
        f'the class {shortened(repr(k), 100)} is not a whole number from 0: request token ids from the '
        'server (vLLM: return_tokens_as_token_ids=True), or convert names to numbers first.'
    )
