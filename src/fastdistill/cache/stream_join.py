"""Join a stream of samples with the stored teacher outputs."""

from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..base.outputs import DistillError
from .json_checks import shortened
from .keys import keys_in_stream, look_up
from .reader import TeacherCache


class StreamJoin(IterableDataset):
    """A stream of samples, each joined with its row of teacher outputs.

    If the samples come in the order of the cache, rows are read sequentially, and the key of each
    sample is compared. Otherwise, the rows are looked up by key.

    The row becomes an additional entry of a dict, or an additional element of a tuple or list. Any
    other sample becomes a pair (sample, row). `cache.decode(rows)` turns a batch of rows into the
    teacher's `Outputs`.

    Args:
        stream: Iterable of samples, such as an `IterableDataset`, a WebDataset or a
            `datasets.IterableDataset`. With several DataLoader workers, the stream must split the
            samples among the workers.
        cache: A `TeacherCache`, or the folder or URL of a cache.
        key: Where to find the name of a sample: a column, an index in a tuple, or fn(sample).
        view: The view to read: a number, a column, or fn(sample).
        name: Name of the new entry in a dict. The samples must not have an entry with this name.
        at_once: Number of samples that are looked up together.
    """

    def __init__(
        self,
        stream: Any,
        cache: TeacherCache | Path | str,
        key: str | Callable = '__key__',
        *,
        view: int | str | Callable = 0,
        name: str = 'teacher',
        at_once: int = 256,
    ):
        self.stream, self.key, self.view, self.name, self.at_once = stream, key, view, name, at_once
        # a stream of `datasets` knows its columns, or has None
        self._refuse_taken(getattr(stream, 'column_names', None) or ())
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self.cache.check(once=True)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the stream, which may use it for shuffling."""
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator:
        samples, number, at = iter(self.stream), 0, 0
        while part := list(islice(samples, self.at_once)):
            for sample in part:
                self._refuse_taken(sample if isinstance(sample, dict) else ())
            keys = self._keys(part, number)
            where = self._find(keys, at, part, number)
            views: Any = self.view
            if not isinstance(views, int):
                views = np.array([*map(field(views), part)], np.int64)
            rows = self.cache.rows(where, views)
            number, at = number + len(part), int(where[-1]) + 1
            part.reverse()
            # each sample is released, and each tensor is created, only when it is needed, so that
            # memory can be reused
            for row in map(torch.from_numpy, rows):
                sample = part.pop()
                if isinstance(sample, dict):
                    yield {**sample, self.name: row}
                else:
                    yield (*sample, row) if isinstance(sample, (tuple, list)) else (sample, row)

    def _refuse_taken(self, entries: Any) -> None:
        """Raise a DistillError if the samples already have an entry with the name of the new one."""
        if self.name in entries:
            raise DistillError(
                f'The samples already have an entry {self.name!r}, which the stored outputs would '
                'replace: pass StreamJoin(..., name=...) with a new name.'
            )

    def _keys(self, part: Any, number: Any) -> np.ndarray:
        root = self.cache.manifest.data.get('root', '')
        try:
            return keys_in_stream([*map(field(self.key), part)], root)
        except (KeyError, IndexError, TypeError) as e:
            raise DistillError(
                f'One of the samples from number {number} on has no {self.key!r} '
                f'({shortened(repr(part[0]), 100)}): key= must be a column, a position, or fn(sample).'
            ) from e

    def _find(self, keys: Any, at: Any, part: Any, number: Any) -> np.ndarray:
        """Return the positions of samples. Consecutive positions from `at` on are tried first."""
        have = self.cache.keys[at : at + len(keys)]
        if np.array_equal(have, keys):
            return np.arange(at, at + len(keys))
        where, there = look_up(self.cache.keys, self.cache.files.order, keys)
        if len(lost := np.flatnonzero(~there)):
            i = int(lost[0])
            name = shortened(repr(field(self.key)(part[i])), 100)
            raise DistillError(
                f'Sample {number + i} of the stream ({name}) has no row in {self.cache.folder}: this '
                f'is a different dataset, or the rows were written with a different key=.'
            )
        return where


def field(spec: Any) -> Callable:
    """Return a function that reads a part of a sample."""
    return spec if callable(spec) else itemgetter(spec)
