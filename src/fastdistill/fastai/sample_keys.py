"""Compute keys that identify the samples of a DataLoader.

The keys do not depend on the labels, the order of the samples or the location of the folder.
"""

import os
from pathlib import PurePath

import numpy as np
from fastai.basics import L
from fastai.data.transforms import ColReader
from fastai.text.data import SortedDL

from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..base.sample_seeds import seeds_of
from ..cache.keys import hash_of, key_of, keys_of, name_of, ordered_names, root_of
from ..cache.sample_files import files_of
from .language_model import is_stream


def item_keys(dl, keys, root: str) -> np.ndarray:
    """Return the keys of all samples by position in the dataset, (N,) uint64.

    For a language model, the keys also depend on all of its texts.

    Args:
        dl: A DataLoader.
        keys: The argument `keys` of `cache_teacher`: a list, a function of an item, or None.
        root: Folder to which paths are made relative.
    """
    names = keys_of_samples(dl.dataset, keys, root)
    if not is_stream(dl):
        return names
    return seeds_of(
        hash_of(names.tobytes(), np.asarray(dl.lens.coll, np.int64).tobytes()), np.arange(dl.n)
    )


def keys_of_samples(dataset, keys, root):
    items = items_of(dataset)
    if keys is not None:
        if callable(keys) and items is None:
            raise DistillError(
                f'keys= is a function of an item, but a {type(dataset).__name__} does not show its '
                'items: pass a list with one name for each sample.'
            )
        names = [keys(o) for o in each_item(items)] if callable(keys) else ordered_names(keys)
        if len(names) != len(dataset):
            raise DistillError(f'{len(names)} keys for {len(dataset)} samples: give one for each.')
        return keys_of(names, root)
    if items is None:
        raise DistillError(
            f'A {type(dataset).__name__} does not show which samples it contains: pass keys=, one '
            'for each sample.'
        )
    if not hasattr(items, 'columns'):
        return keys_of(items, root)
    if (columns := input_columns(dataset, items)) is not None:
        return keys_of_table(columns)
    # functions of rows may read a row's index label, such as a file name. Index labels that are
    # integers are usually positions, which change when the table is shuffled
    return keys_of_table(items, index=items.index.dtype.kind not in 'iu')


def are_contents(dataset, keys) -> bool:
    """Return True if the keys are computed from everything that the inputs are created from.

    Args:
        dataset: The dataset.
        keys: The argument `keys` of `cache_teacher`.
    """
    items = items_of(dataset)
    table = hasattr(items, 'columns')
    return keys is None and not (table and input_columns(dataset, items) is None)


def content_keys(dataset) -> np.ndarray | None:
    """Return keys of the items themselves, (N,) uint64. None if they do not identify samples."""
    try:
        return keys_of_samples(dataset, None, '')
    except DistillError:
        return None


def items_of(dataset):
    """Return the list or table from which a dataset creates its samples. Return None if unknown."""
    if isinstance(dataset, (list, tuple, L, np.ndarray)):
        return dataset
    return getattr(dataset, 'items', None)


def each_item(items):
    """Return the items one by one, as functions such as `get_x` receive them."""
    return (items.iloc[i] for i in range(len(items))) if hasattr(items, 'iloc') else items


def keys_of_table(table, index: bool = False):
    """Return a key for each row of a table, which is a hash of the row's contents.

    Args:
        table: A DataFrame.
        index: Whether the contents include the index labels.
    """
    import pandas as pd

    try:
        return pd.util.hash_pandas_object(table, index=index).to_numpy(np.uint64)
    except TypeError:  # cells that contain lists can't be hashed
        rows = table.to_numpy()
        return keys_of([*zip(table.index, rows)] if index else rows)


def input_columns(dataset, table):
    """Return the columns of the model's inputs, so that labels and unused columns do not affect the
    keys. Return None if they are unknown, because functions read the rows.
    """
    inputs = getattr(dataset, 'tls', [])[: getattr(dataset, 'n_inp', 1)]
    readers = [tl.tfms.fs[0] if len(tl.tfms.fs) else None for tl in inputs]
    if not all(isinstance(r, ColReader) for r in readers):
        return None
    names = [
        *getattr(dataset, 'cat_names', []),
        *getattr(dataset, 'cont_names', []),
        *(c for r in readers for c in L(r.cols)),
    ]
    if not names:
        return None
    table = table[list(dict.fromkeys(column_name(table, c) for c in names))]
    # the codes of categories depend on which categories the other rows have
    classes = getattr(dataset, 'classes', {}) if hasattr(dataset, 'cat_names') else {}
    return table.apply(
        lambda o: np.array([*map(str, classes[o.name])])[o] if o.name in classes else o
    )


def column_name(table, c):
    return c if c in table.columns else table.columns[c]  # readers also accept column numbers


def key_root(dls) -> str:
    """Return the root folder of relative paths.

    The root is the path of the DataLoaders. If that path is unknown, the root is the common folder
    of all files.
    """
    return root_of(dls.path) or common_folder(o for dl in dls.loaders for o in paths_in(dl))


def paths_in(dl):
    """Return those items that are paths, or tuples that begin with a path.

    A string is a path if a file with this name exists.
    """
    items = items_of(dl.dataset)
    if not isinstance(items, (list, tuple, L)):
        return []
    return [o for o in items if isinstance(o, PurePath)] or (items if files_of(items) else [])


def common_folder(items):
    folders = {PurePath(name_of(o)).parent.as_posix() for o in items}
    return (
        root_of(os.path.commonpath(folders)) if len(set(map(os.path.isabs, folders))) == 1 else ''
    )


def matching_root(cache, dls, dl) -> str:
    """Return the root folder of relative paths with which the cache contains the first sample.

    This root differs from `key_root` if the folder was moved, or if `dls` contains only part of the
    data.
    """
    first, root = next(iter(paths_in(dl)), None), key_root(dls)
    if first is None:
        return root
    common = PurePath(common_folder([first]))
    roots = [root, *map(root_of, (common, *common.parents)), '']
    return next((r for r in roots if (cache.keys == np.uint64(key_of(first, r))).any()), root)


def sample_files(dl, order=None):
    """Return the file of each sample, or a tuple of files if several inputs are files. Return None
    if the samples are not files.

    Args:
        dl: The DataLoader.
        order: Positions in the dataset. If None, the order of the dataset is used.
    """
    inputs = range(0 if is_stream(dl) else getattr(dl.dataset, 'n_inp', 1))
    each = [files for i in inputs if (files := files_of(file_names(dl.dataset, i))) is not None]
    if not each:
        return None
    files = each[0] if len(each) == 1 else list(zip(*each))
    return files if order is None else [files[i] for i in order]


def file_names(dataset, i):
    """Return the file name or other source of input `i` of each sample, according to `get_x` or a
    column reader.

    If the sources of the first input are unknown, return the items themselves.
    """
    items, getter = items_of(dataset), first_transform(dataset, i)
    table = hasattr(items, 'columns')
    if table and isinstance(getter, ColReader):
        return names_in_column(items, getter)
    if not isinstance(items, (list, tuple, L, np.ndarray)) and not table or not len(items):
        return []
    own = [] if table or i else items
    if getter is None or files_of([getter(next(iter(each_item(items))))]) is None:
        return own
    with RandomGuard() as guard:
        names = [getter(o) for o in each_item(items)]
    return own if guard.moved else names  # a randomly chosen file does not identify a sample


def first_transform(dataset, i):
    """Return the transform that creates input `i` of an item, or None."""
    return next((f for tl in getattr(dataset, 'tls', [])[i : i + 1] for f in tl.tfms.fs), None)


def names_in_column(table, reader):
    if len(reader.cols) != 1:
        return []
    return [reader({reader.cols[0]: v}) for v in table[column_name(table, reader.cols[0])]]


def storage_order(dl):
    """Return the order in which samples are stored, as positions in the dataset.

    Texts are sorted by length, so that batches need little padding.
    """
    if isinstance(dl, SortedDL):
        return np.argsort(-np.asarray(dl.res), kind='stable')
    return np.arange(dl.n if is_stream(dl) else len(dl.dataset))
