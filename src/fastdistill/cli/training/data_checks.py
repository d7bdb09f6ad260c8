"Check the samples before training: the labels, the validation set and every file."

import io
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...base.atomic_files import check_regular_file
from ...base.errors import DistillError, DistillWarning, few_names
from ...fastai.class_names import void_class
from ...fastai.compare import shown_bar
from .config import TrainConfig
from .data_files import MANY_NUMBERS, Samples, has_numbers, predicts_numbers
from .validation_split import (
    check_both_sets,
    validation_rows,
    warn_of_copies,
)

NAMED = 5  # maximum number of files or values named in a message
FEW_ODD = 0.1  # maximum fraction of cells that are not numbers in a column that should be numbers


def checked_samples(s: Samples, config: TrainConfig) -> Samples:
    """Check the samples, and determine their classes and validation set. Raise a DistillError if a
    check fails.

    Args:
        s: Samples returned by `read_samples`.
        config: A TrainConfig.
    """
    if s.task != 'masks':
        s = with_target(s, config)
        if config.ignore:
            raise DistillError(
                f'ignore={config.ignore!r}: this is for masks, but {config.data} contains {s.task}.'
            )
    if config.y_range:
        check_range(s, config)
    thing = dict(images='image', texts='text').get(s.task)
    if thing and (n := int(blank_cells(s.frame[s.x[0]]).sum())):
        raise DistillError(
            f'{n} of {len(s)} rows have no {thing} in column {s.x[0]!r}. Remove these rows.'
        )
    s = replace(s, valid=validation_rows(s, config))
    for rows, name in ((~s.valid, 'training'), (s.valid, 'validation')):
        if rows.sum() < 2:
            raise DistillError(f'The {name} set has {rows.sum()} sample(s). At least 2 are needed.')
    if s.task != 'masks' and s.target != 'numbers':
        check_both_sets(s)
    if s.task in ('images', 'masks'):
        s = checked_files(with_paths(s), config)
        warn_of_copies(s)
    if s.task == 'texts':
        warn_of_copies(s)
    if s.task == 'table':
        s = checked_columns(s)
    return s


def with_target(s: Samples, config: TrainConfig) -> Samples:
    """Determine whether one class, several labels or a number is predicted."""
    y = s.frame[s.y]
    if s.delimiter:
        parts = lambda v: filter(None, map(str.strip, v.split(s.delimiter)))
        labels = ['' if missing else str(v) for v, missing in zip(y, y.isna())]
        y = pd.Series([s.delimiter.join(parts(v)) for v in labels], index=y.index)
    missing = y.isna() if s.delimiter else blank_cells(y)
    if missing.any():
        rows = few_names(np.flatnonzero(missing).tolist())
        raise DistillError(
            f'{missing.sum()} of {len(s)} rows have no label in column {s.y!r} (row {rows}, counted from 0). '
            'Remove these rows.'
        )
    if has_numbers(y):
        if s.task == 'table' and predicts_numbers(y, s.task):
            if not np.isfinite(y).all():
                raise DistillError(f'Column {s.y!r} has numbers that are not finite.')
            return replace(s, frame=s.frame.assign(**{s.y: y.astype(np.float32)}), target='numbers')
        if predicts_numbers(y, s.task):
            raise DistillError(
                f'Column {s.y!r} has fractional numbers, but numbers can be predicted only for '
                'tables.'
            )
        y = y.astype(int)
    elif s.task == 'table' and not s.delimiter:
        check_numbers(s.y, y)
    y = y.astype(str).str.strip()
    names = {o for v in y for o in (v.split(s.delimiter) if s.delimiter else [v]) if o}
    target = 'labels' if s.delimiter else 'classes'
    if len(names) < 2:
        raise DistillError(
            f'All samples have one {"label" if s.delimiter else "class"} ({", ".join(names)}): there is '
            'nothing to learn. Is this the right column or folder?'
        )
    return replace(s, frame=s.frame.assign(**{s.y: y}), target=target, classes=sorted(names))


def blank_cells(column: pd.Series) -> pd.Series:
    """Return a mask of the cells that are missing, or that contain only spaces."""
    return column.isna() | column.map(lambda v: isinstance(v, str) and not v.strip())


def check_numbers(name: str, y: pd.Series) -> None:
    """Raise a DistillError if labels look like numbers to predict, except that a few cells are not
    numbers, or that the decimal points are commas.
    """
    y = y.astype(str)
    odd, points = not_numbers(y), y.str.replace(',', '.')
    numbers = pd.to_numeric(points, errors='coerce').dropna()
    if len(not_numbers(points)) > FEW_ODD * len(y) or not predicts_numbers(numbers, 'table'):
        return
    raise DistillError(
        f'{len(odd)} of the {len(y)} labels in column {name!r} are not numbers, such as {odd.iloc[0]!r}, '
        'but the others are numbers to predict. Remove these rows, or write numbers with a decimal point.'
    )


def check_range(s: Samples, config: TrainConfig) -> None:
    """Check that all numbers to predict are in the range that the models can predict."""
    if s.target != 'numbers':
        raise DistillError(
            f'y_range={config.y_range!r}: this is for numbers, but {config.data} has {s.target}.'
        )
    low, high = config.limits() or (-np.inf, np.inf)
    y = s.frame[s.y]
    if y.min() < low or y.max() > high:
        raise DistillError(
            f'y_range={config.y_range!r}, but column {s.y!r} has numbers from {y.min():g} to '
            f'{y.max():g}: give a range that includes them.'
        )


def with_paths(s: Samples) -> Samples:
    """Prepend the folder of the CSV file to the file names in the table."""
    if s.task == 'masks' or isinstance(s.frame[s.x[0]].iloc[0], bytes):
        return s
    return replace(
        s,
        frame=s.frame.assign(**{s.x[0]: [os.path.join(s.folder, str(o)) for o in s.frame[s.x[0]]]}),
    )


def checked_files(s: Samples, config: TrainConfig) -> Samples:
    """Open every image and read every mask, to check that the files are not damaged."""
    sizes, values, bad = set(), set(), []
    masks = s.frame[s.y] if s.task == 'masks' else [None] * len(s)
    with shown_bar(True, len(s), 'check files') as tick:
        for x, y in zip(s.frame[s.x[0]], masks):
            tick()
            try:
                for path in (x, y):
                    if isinstance(path, (str, Path)):
                        check_regular_file(path)
                size = size_of_file(x)
                if y is not None:
                    values |= mask_values(y, size, x)
                sizes.add(size)
            except DistillError:
                raise
            # subtle: catch all errors, because Pillow's plugins raise many kinds of errors for
            # damaged files
            except Exception as e:
                bad.append((x, f'{type(e).__name__}: {e}'))
    if bad:
        name = lambda x: f'{len(x)} bytes' if isinstance(x, bytes) else x
        words = '; '.join(f'{name(x)} ({" ".join(e.split())[:120]})' for x, e in bad[:NAMED])
        raise DistillError(
            f"{len(bad)} of {len(s)} images can't be read: {words}{' ...' if len(bad) > NAMED else ''}. "
            'Repair or remove them.'
        )
    if s.task == 'masks':
        s = with_mask_classes(s, values, config.ignore)
    return replace(s, size=config.parts_of_size() or natural_size(sizes, s.task))


def size_of_file(x: Any) -> tuple[int, int]:
    """Return the (height, width) of an image. Raise an error if the file is incomplete or damaged, or
    has more than 8 bits per pixel.
    """
    from PIL import Image

    opened = lambda: Image.open(io.BytesIO(x) if isinstance(x, bytes) else x)
    with opened() as im:
        im.verify()
    with opened() as im:
        size = im.size[::-1]
        # subtle: the conversion to RGB would clip larger values, and round fractions
        high = np.asarray(im).max() if im.mode[0] in 'IF' else 0
        if high > 255 or im.mode == 'F':
            name = f'An image of {len(x)} bytes' if isinstance(x, bytes) else x
            raise DistillError(
                f'{name} has more than 8 bits per pixel (mode {im.mode} of Pillow, with values up to '
                f'{high:g}), and would be clipped to 255. Convert the images to 8 bits: divide 16-bit '
                'values by 257.'
            )
        # read the complete JPEG file, but decode it at one eighth of its size for speed
        im.draft(im.mode, (1, 1))
        im.load()
    return size


def mask_values(path: Any, size: Any, image: Any) -> set[int]:
    """Return the set of values in a mask. The values of a palette image are its palette indices."""
    from PIL import Image

    with Image.open(path) as im:
        if len(im.getbands()) > 1:
            raise DistillError(
                f'{path} has {len(im.getbands())} channels. A mask must have one channel, with the class '
                'number of each pixel.'
            )
        y = np.asarray(im)  # `mask_loaders` reads masks in the same way
    if y.shape != size:
        raise DistillError(f'{path} has size {y.shape}, but {image} has size {size}.')
    return set(np.unique(y).tolist())


def with_mask_classes(s: Samples, values: set[int], ignore: str) -> Samples:
    """Determine the classes of masks, and the value that losses and metrics ignore.

    Args:
        s: Samples.
        values: Set of all values in the masks.
        ignore: Name or value of the class to ignore, or a value that is not a class. Empty to use a
            class called void, if there is one.
    """
    codes = Path(s.folder) / 'codes.txt'
    ignored = ignored_value(s, values, ignore)
    if not (numbers := values - {ignored}):
        raise DistillError(f'ignore={ignore!r}: the masks contain no other value.')
    if s.classes is None and not {*range(max(numbers))} <= values:
        first = ', '.join(map(str, sorted(numbers)[:NAMED]))
        raise DistillError(
            f'The masks contain the numbers {first} ... {max(numbers)}. Classes must be numbered 0, 1, 2 '
            f'... without gaps, or be named in {codes}, one per line. If {max(numbers)} marks pixels to '
            f'ignore, pass ignore={max(numbers)}.'
        )
    classes = s.classes or [str(i) for i in range(max(numbers) + 1)]
    if max(numbers) >= len(classes):
        raise DistillError(
            f'The masks contain the class number {max(numbers)}, but {codes} lists {len(classes)} classes, '
            f'0 to {len(classes) - 1}. If {max(numbers)} marks pixels to ignore, pass '
            f'ignore={max(numbers)}.'
        )
    if len(numbers) < 2:
        raise DistillError(
            f'All masks contain only one class ({classes[numbers.pop()]}): there is nothing to learn.'
        )
    return replace(s, classes=classes, ignored=ignored)


def ignored_value(s: Samples, values: set[int], ignore: str) -> int | None:
    """Return the value in masks that losses and metrics ignore. Return None if there is none."""
    classes = s.classes or []
    if not ignore:
        return void_class(classes)
    if ignore in classes:
        return classes.index(ignore)
    if ignore.isdecimal() and int(ignore) in values:
        return int(ignore)
    names = f'The classes are {few_names(classes, 30)}. ' if classes else ''
    raise DistillError(
        f'ignore={ignore!r}: must be a class or a value in the masks. {names}The masks contain the values '
        f'{few_names(sorted(values), 30)}.'
    )


def natural_size(sizes: Any, task: str) -> tuple[int, int]:
    """Return the size of the images if all have the same size of at most 256 pixels. Otherwise,
    return 224 x 224 for images, and a size of 256 for the longer side for masks.
    """
    h, w = next(iter(sizes)) if len(sizes) == 1 else (256, 256)
    if len(sizes) == 1 and max(h, w) <= 256:
        return h, w
    if task == 'images':
        return 224, 224
    h, w = (max(32, round(o * 256 / max(h, w) / 32) * 32) for o in (h, w))
    return h, w


def warn_of_categories(name: str, column: pd.Series) -> None:
    """Warn about a column that is read as categories, but seems to contain numbers, or has a
    different value in most rows.
    """
    given = column.dropna().astype(str)
    if not len(given) or has_numbers(column):
        return
    n, odd = given.nunique(), not_numbers(given)
    marks = odd.nunique()  # such as 'unknown' and '-'
    if len(odd) <= FEW_ODD * len(given) or marks < 4 and n - marks > MANY_NUMBERS:
        warnings.warn(
            DistillWarning(
                f'Column {name!r} is read as {n} categories, because {len(odd)} of its {len(given)} cells '
                f'are not numbers, such as {odd.iloc[0]!r}. If they stand for missing values, leave them '
                'empty.'
            )
        )
    elif n > max(MANY_NUMBERS, len(given) / 2):
        warnings.warn(
            DistillWarning(
                f'Column {name!r} is read as categories, but most of its {len(given)} cells differ, such '
                f'as {given.iloc[0]!r} and {given.iloc[1]!r}, so the models learn little from it. Write '
                "numbers and dates as plain numbers (1234.5), or list the other columns: x='COLUMN,COLUMN'."
            )
        )


def not_numbers(column: pd.Series) -> pd.Series:
    """Return the cells of a column of text that are not numbers."""
    return column[pd.to_numeric(column, errors='coerce').isna()]


def checked_columns(s: Samples) -> Samples:
    """Check the columns of a table. Raise a DistillError for empty columns and infinite numbers.
    Fill missing values in columns where only the validation set has them.
    """
    frame = s.frame[[*s.x, s.y]].copy()
    for c in s.x:
        warn_of_categories(c, frame[c])
    if empty := [c for c in s.x if frame[c][~s.valid].isna().all()]:
        raise DistillError(
            f"Column {empty[0]!r} is empty. List the other columns: x='COLUMN,COLUMN'."
        )
    for c in s.x:
        if pd.api.types.is_bool_dtype(frame[c]):
            frame[c] = frame[c].astype(str)
        if not pd.api.types.is_numeric_dtype(frame[c]):
            continue
        gaps = frame[c].isna()
        # subtle: fastai's FillMissing fails for a column with missing values only in the validation
        # set
        if gaps.any() and not gaps[~s.valid].any():
            frame[c] = frame[c].fillna(frame[c][~s.valid].median())
        if gaps[~s.valid].any() and f'{c}_na' in frame:
            raise DistillError(
                f'Column {c!r} has missing values, for which fastai adds a column {f"{c}_na"!r}, but the '
                f'data have a column of this name: rename it.'
            )
        if np.isinf(frame[c]).any():
            raise DistillError(f'Column {c!r} has numbers that are not finite.')
    return replace(s, frame=frame)
