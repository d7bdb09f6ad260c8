"""Split the samples into a training and a validation set, and find copies that are in both."""

import os
import warnings
from collections import Counter

import numpy as np
import pandas as pd

from ...base.errors import DistillError, DistillWarning, few_names
from .config import TrainConfig
from .data_files import Samples
from .data_fingerprint import file_hash


def validation_rows(s: Samples, config: TrainConfig) -> np.ndarray:
    """Return a mask of the validation rows. The validation set is defined by the data, or is a
    random fraction of each class. All rows with the same image are in the same set.
    """
    files = image_identities(s)
    if s.valid is not None:
        if both := set(files[s.valid]) & set(files[~s.valid]):
            name = next(x for x, f in zip(s.frame[s.x[0]], files) if f in both)
            raise DistillError(
                f'{len(both)} image(s) are in the training set and in the validation set, e.g. '
                f'{f"{len(name)} bytes" if isinstance(name, bytes) else name}. Remove them from one of '
                'the sets.'
            )
        return s.valid
    try:
        share = float(config.valid)
    except ValueError:
        share = -1
    if not 0 < share < 1:
        raise DistillError(
            f'valid={config.valid!r}: must be a fraction such as 0.2. For a CSV file, it can also be '
            f'another CSV file, or a column that marks the rows. The columns are {few_names(s.frame.columns, 20)}'
        )
    files = content_identities(s) if s.task in ('images', 'masks') else files
    order, rows = np.random.default_rng(config.seed).permutation(len(s)), np.zeros(len(s), bool)
    order = order[~files.duplicated()[order]]  # keep only one row per file
    groups = (
        s.frame[s.y].to_numpy()[order]
        if s.task != 'masks' and s.target == 'classes'
        else np.zeros(len(order))
    )
    for _, at in pd.Series(order).groupby(groups):
        if len(at) > 1:
            rows[at.iloc[: min(max(1, round(share * len(at))), len(at) - 1)]] = True
    return files.isin(files[rows]).to_numpy()


def image_identities(s: Samples) -> pd.Series:
    """Return an identifier for each row. Rows with the same identifier must be in the same set. The
    identifier is the file of an image, or the row number for texts and tables.
    """
    if s.task not in ('images', 'masks'):
        return pd.Series(range(len(s)))
    real = lambda x: x if isinstance(x, bytes) else os.path.realpath(os.path.join(s.folder, str(x)))
    return pd.Series([real(x) for x in s.frame[s.x[0]]])


def content_identities(s: Samples) -> pd.Series:
    """Return an identifier for each row. Images with the same content have the same identifier, and
    so do equal texts.
    """
    if s.task == 'texts':
        return s.frame[s.x[0]].astype(str).reset_index(drop=True)
    files = image_identities(s)
    # `checked_files` reports the files that can't be read
    readable = lambda f: os.path.isfile(f) and os.access(f, os.R_OK)
    sizes = {f: os.path.getsize(f) for f in set(files) if not isinstance(f, bytes) and readable(f)}
    number = Counter(sizes.values())
    hashes = {f: file_hash(f) for f, size in sizes.items() if number[size] > 1}
    return pd.Series([hashes.get(f, f) for f in files])


def warn_of_copies(s: Samples) -> None:
    """Warn about images with the same content, or equal texts, in both sets or in different classes."""
    identity, thing = content_identities(s), 'text' if s.task == 'texts' else 'image'
    checks = [
        (
            pd.Series(s.valid),
            'the training and the validation set',
            'The validation score is too optimistic',
        )
    ]
    if s.task != 'masks' and s.target == 'classes':
        label = s.frame[s.y].reset_index(drop=True)
        checks.append((label, 'different classes', 'At least one of the labels is wrong'))
    for column, where, effect in checks:
        first = column.groupby(identity).transform('first')
        if (rows := np.flatnonzero(column != first)).size:
            same = np.flatnonzero(identity == identity[rows[0]])[0]
            names = s.frame[s.x[0]].iloc[[same, rows[0]]]
            a, b = (f'{len(x)} bytes' if isinstance(x, bytes) else x for x in names)
            if thing == 'text':
                a, b = f'row {same}', f'row {rows[0]} ({a[:60]!r})'
            warnings.warn(
                DistillWarning(
                    f'{len(rows)} {thing}(s) in {where} are copies of the same {thing}, e.g. {a} and {b}. '
                    f'{effect}: remove the copies.'
                )
            )


def check_both_sets(s: Samples) -> None:
    """Check that each class occurs in both the training and the validation set."""
    split = (lambda v: v.split(s.delimiter)) if s.delimiter else (lambda v: [v])
    train, valid = (
        {o for v in s.frame[s.y][rows] for o in split(v) if o} for rows in (~s.valid, s.valid)
    )
    few = lambda names: few_names(sorted(names))
    what = 'label' if s.delimiter else 'class'
    if missing := valid - train:
        raise DistillError(
            f'{len(missing)} {what}(es) of the validation set are not in the training set: '
            f'{few(missing)}. The training set has {few(train)}.'
        )
    if not s.delimiter and (missing := train - valid):
        raise DistillError(
            f'{len(missing)} class(es) are missing from the validation set: {few(missing)}. Each '
            'class needs at least 2 samples, one of them in the validation set.'
        )
