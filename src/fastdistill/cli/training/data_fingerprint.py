"""Compute a fingerprint of the data of a run, with a hash of each file or row, and list which
samples are used for training. A resumed run uses the fingerprint to detect changes.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...base.errors import DistillError, few_names
from ...teachers.model_loading import model_files
from .config import TrainConfig
from .data_files import Samples
from .start_or_resume import read_begun

SPLIT = 'split.csv'  # file in the folder of a run that lists which samples were trained on


def data_fingerprint(s: Samples, held: np.ndarray | None, config: TrainConfig) -> dict:
    """Compute a hash of each file or row. The result can be written as JSON.

    Args:
        s: Samples, from `checked_samples`.
        held: Mask of the validation set, if it is defined by the data. None if the validation set
            is chosen at random.
        config: A TrainConfig.
    """
    names = [*s.x, s.y]
    columns = [*(s.frame[c] for c in names), *([] if held is None else [held])]
    rows = zip(*columns)
    facts = dict(
        columns=[*map(str, names), *([] if held is None else ['held'])],
        classes=s.classes,
        teacher={k: file_hash(*model_files(p)) for k, p in config.teacher_files.items()},
    )
    if s.task in ('texts', 'table') or isinstance(s.frame[s.x[0]].iloc[0], bytes):
        return facts | dict(rows=[values_hash(row) for row in rows])
    files: dict[str, str] = {}
    times: Counter = Counter()
    for x, *label in rows:
        name = Path(os.path.relpath(x, s.folder)).as_posix()
        label = [file_hash(label[0]), *label[1:]] if s.task == 'masks' else label
        times[name] += 1  # several rows may have the same file
        row = name if times[name] == 1 else f'{name} (row {times[name]} with this file)'
        files[row] = values_hash([file_hash(x), *label])
    return facts | dict(files=files)


def sample_names(s: Samples) -> dict[str, Any]:
    """Return a column that identifies the samples, as {name: values}. The values are their files, or
    their row numbers in the data.

    Args:
        s: Samples, from `checked_samples`.
    """
    x = s.frame[s.x[0]]
    if s.task in ('texts', 'table') or isinstance(x.iloc[0], bytes):
        return dict(row=range(len(s)))
    return dict(file=[*map(os.path.abspath, x)])


def split_table(s: Samples) -> str:
    """Return the text of a CSV file with one line per sample: its file and label, or its row number
    in the data and a hash of its content, and whether it is in the set 'train' or 'valid'.

    Args:
        s: Samples, from `checked_samples`.
    """
    out = sample_names(s)
    if 'file' in out:
        out['label'] = [*s.frame[s.y]]
    else:
        rows = zip(*(s.frame[c] for c in (*s.x, s.y)))
        out['content'] = [values_hash(row) for row in rows]
    return csv_text(out | dict(set=np.where(s.valid, 'valid', 'train')))


def csv_text(columns: dict[str, Any] | pd.DataFrame) -> str:
    return pd.DataFrame(columns).to_csv(index=False, lineterminator='\n')


def file_hash(*paths: Path | str) -> str:
    h = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(path, 'rb') as f:
            hashlib.file_digest(f, lambda: h)
    return h.hexdigest()


def values_hash(values: Iterable) -> str:
    h = hashlib.blake2b(digest_size=8)
    for v in values:
        h.update(v if isinstance(v, bytes) else repr(v).encode('utf-8', 'surrogatepass') + b'\0')
    return h.hexdigest()


def check_data_unchanged(folder: Path, data: dict) -> None:
    """Raise a DistillError if the data have changed since the run in a folder began.

    Args:
        folder: Folder of the run.
        data: Result of `data_fingerprint`.
    """
    before = read_begun(folder).get('data')
    if before is None or not (changes := data_changes(before, data)):
        return
    raise DistillError(
        f'The data of the run in {folder} changed since it began: {"; ".join(changes)}. Continuing '
        'would train on different samples, and possibly validate on samples that were trained on. '
        'Restore the data to resume, or start a new run with config= and a different out=.'
    )


def data_changes(before: dict, now: dict) -> list:
    """Describe what changed in the data, as a list of texts.

    Args:
        before, now: Results of `data_fingerprint`.
    """
    if before.keys() != now.keys():
        return ['the data have a different form']
    out = [
        f'{k} is a different file'
        for k in before['teacher']
        if before['teacher'][k] != now['teacher'].get(k)
    ]
    if before['columns'] != now['columns']:
        out.append(
            f'the columns were {", ".join(before["columns"])}, and are {", ".join(now["columns"])}'
        )
    kind = 'files' if 'files' in before else 'rows'
    a, b = before[kind], now[kind]
    if kind == 'files':
        where = ''
        found = {
            'added': [n for n in b if n not in a],
            'removed': [n for n in a if n not in b],
            'changed (content or label)': [n for n in b if n in a and a[n] != b[n]],
        }
    else:
        where = ' (counted from 0)'
        found = {'added': rows_beyond(b, a), 'removed': rows_beyond(a, b)}
    for change, names in found.items():
        if names:
            n = f'{len(names):,} {kind.removesuffix("s") if len(names) == 1 else kind}'
            out.append(f'{n} {change}: {few_names(names)}{where}')
    if not out and before['classes'] != now['classes']:
        out.append('the names of the classes')
    if not out and [*a] != [*b]:
        out.append('the order of the samples')
    return out


def rows_beyond(a: Sequence, b: Sequence) -> list[int]:
    """Return the positions of rows in `a` that do not occur in `b`, or that occur less often in `b`."""
    left, out = Counter(b), []
    for i, h in enumerate(a):
        if left[h]:
            left[h] -= 1
        else:
            out.append(i)
    return out
