"""Compute keys that identify samples.

A key is a 64-bit hash of a path, a number, a text or the content of a sample. The same sample has
the same key on every machine.
"""

from collections.abc import Callable, Sequence, Set
from hashlib import blake2b
from numbers import Integral
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.outputs import DistillError


def hash_of(*parts: bytes) -> int:
    """Compute a 64-bit blake2b hash."""
    h = blake2b(digest_size=8)
    for p in parts:
        h.update(len(p).to_bytes(8, 'little'))
        h.update(p)
    return int.from_bytes(h.digest(), 'little')


def key_of(o: Any, root: str = '') -> int:
    """Compute the key of a sample. Raise a DistillError for types whose content can't be hashed.

    Args:
        o: Name or content of a sample.
        root: Folder to which paths are relative.
    """
    return int.from_bytes(key_bytes(o, root), 'little')


def key_bytes(o: Any, root: str = '') -> bytes:
    """Compute the key of a sample as bytes."""
    # a fast path for strings and integers, since streams compute a key for each sample in each
    # epoch
    if type(o) is str:
        data, before = (relative(o, root) if root or o[:2] == './' else o).encode(), BEFORE_STR
    elif type(o) is int:
        data, before = str(o).encode(), BEFORE_INT
    else:
        return hash_of(*_parts(o, root)).to_bytes(8, 'little')
    return blake2b(before + len(data).to_bytes(8, 'little') + data, digest_size=8).digest()


# what `hash_of` hashes before the length of the second part
BEFORE_STR, BEFORE_INT = ((3).to_bytes(8, 'little') + kind for kind in (b'str', b'int'))


def _parts(o: Any, root: str) -> tuple:
    if isinstance(o, PurePath):
        return b'path', relative(o.as_posix(), root).encode()
    if isinstance(o, str):
        return b'str', relative(o, root).encode()
    if isinstance(o, bytes):
        return b'bytes', o
    if o is None or isinstance(o, (bool, np.bool_)):
        return b'bool', str(o).encode()
    if isinstance(o, (Integral, np.integer)):
        return b'int', str(int(o)).encode()
    if isinstance(o, (float, np.floating)):
        return b'float', repr(float(o)).encode()
    if isinstance(o, Tensor):
        o = as_array(o)
    if isinstance(o, np.ndarray) and o.dtype != object:
        return b'array', f'{o.dtype.str} {o.shape}'.encode(), o.tobytes()
    if isinstance(o, dict):
        return b'dict', *(p for k in sorted(o, key=str) for v in (k, o[k]) for p in _parts(v, root))
    # a PIL image
    if hasattr(o, 'tobytes') and hasattr(o, 'mode'):
        return b'image', f'{o.mode} {o.size}'.encode(), o.tobytes()
    if isinstance(o, (set, frozenset)):
        o = sorted(o, key=lambda v: key_bytes(v, root))  # the order of a set differs by process
    if hasattr(o, '__iter__') and hasattr(o, '__len__'):
        return b'list', str(len(o)).encode(), *(p for v in o for p in _parts(v, root))
    raise DistillError(
        f'A {type(o).__name__} does not identify a sample: pass keys=, a list with one name for each '
        'sample (file names, ids), or a function that returns the name of the sample at a position.'
    )


def as_array(t: Tensor) -> np.ndarray:
    """Convert a tensor on any device to an array. Raise a DistillError for a sparse tensor, or a
    different tensor that NumPy can't represent.
    """
    try:
        t = t.detach().cpu()
        return (t.float() if t.dtype == torch.bfloat16 else t).numpy()  # NumPy has no bfloat16
    except (TypeError, RuntimeError) as e:
        raise DistillError(
            f"A tensor can't be converted to an array ({str(e).splitlines()[0].rstrip('.!')}). If it is "
            'sparse, pass tensor.to_dense().'
        ) from e


def relative(path: str, root: str) -> str:
    path = path.removeprefix('./')
    return (
        path[len(root) :].lstrip('/') if root and path.startswith(root.rstrip('/') + '/') else path
    )


def root_of(path: Any) -> str:
    return '' if path is None else PurePath(path).as_posix() if str(path) not in ('.', '') else ''


def keys_of(items: Any, root: str = '') -> np.ndarray:
    """Compute the keys of the samples in `items`, (N,) uint64."""
    # the items are keys already
    if isinstance(items, np.ndarray) and items.dtype == np.uint64 and items.ndim == 1:
        return items
    digests = (key_bytes(o, root) for o in ordered_names(items))
    return np.fromiter(digests, 'V8', len(items)).view('<u8').astype(np.uint64)


def ordered_names(keys: Any) -> Any:
    """Return the names of samples. Raise a DistillError for a set, which has no order, and for a
    generator, which can be read only once.
    """
    try:
        len(keys)
        missing = 'order' if isinstance(keys, Set) else ''
    except TypeError:
        missing = 'length'
    if missing:
        raise DistillError(
            f'keys= is of type {type(keys).__name__}, which has no {missing}: pass a list with the name of '
            'each sample, in the order of the samples.'
        )
    return keys


def keys_in_stream(names: Any, root: str = '') -> np.ndarray:
    """Compute the keys of samples of a stream, (N,) uint64.

    Tensors and arrays have the same key as equal numbers or lists, since a DataLoader joins the names
    of a batch in one tensor.
    """
    if isinstance(names, np.ndarray) and names.dtype == np.uint64:
        return keys_of(names)
    plain = lambda o: o.tolist() if isinstance(o, (np.ndarray, Tensor)) else o
    names = plain(names)
    return keys_of(names if {*map(type, names)} <= {int, str} else [*map(plain, names)], root)


def look_up(keys: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> tuple:
    """Find keys.

    Args:
        keys: At least one key, (N,).
        order: Positions in `keys`, sorted by their keys, (N,).
        wanted: Keys to find, (M,).

    Returns:
        (position in `keys` of each wanted key, (M,), mask of the wanted keys that were found, (M,)).
    """
    at = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
    return at, keys[at] == wanted


def dataset_keys(
    dataset: Any, keys: Callable | Sequence | None = None, root: Path | str | None = None
) -> np.ndarray:
    """Return the keys of the samples of a plain PyTorch or torchvision dataset.

    Args:
        dataset: A map-style dataset.
        keys: Names of the samples: a list, or a function of the index. If None, derive the keys
            from the file paths or the content of the dataset.
        root: Folder to which paths are relative. If None, use the `root` attribute of the dataset.
    """
    names: Any = [keys(i) for i in range(len(dataset))] if callable(keys) else keys
    root = root_of(folder_of(dataset) if root is None else root)
    names = names_of_samples(dataset) if names is None else ordered_names(names)
    if len(names) != len(dataset):
        raise DistillError(
            f'{len(names)} keys for {len(dataset)} samples: pass one for each sample.'
        )
    return keys_of(names, root)


def folder_of(dataset: Any) -> Any:
    """Return the root folder of a dataset of files, or of the dataset that a subset belongs to."""
    while not hasattr(dataset, 'root') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return getattr(dataset, 'root', None)


def name_of(sample: Any) -> Any:
    """Return the part of a sample that identifies it.

    A pair (path, label) is identified by its path, and any other sample by its whole content.
    """
    pair = (
        isinstance(sample, (tuple, list)) and len(sample) and isinstance(sample[0], (str, PurePath))
    )
    return sample[0] if pair else sample


def names_of_samples(dataset: Any) -> Any:
    """Return the objects that identify the samples of a dataset."""
    if type(dataset).__name__ == 'Subset':
        names = names_of_samples(dataset.dataset)
        return [names[i] for i in dataset.indices]
    # `ImageFolder` of torchvision
    if hasattr(dataset, 'samples'):
        return [name_of(s) for s in dataset.samples]
    # `TensorDataset`: use the content
    if hasattr(dataset, 'tensors'):
        return list(zip(*dataset.tensors))
    # CIFAR, MNIST ... of torchvision: use the content
    if hasattr(dataset, 'data') and hasattr(dataset, 'targets'):
        return dataset.data
    raise DistillError(
        f'The samples of a {type(dataset).__name__} have no known names: pass keys=, a list with one name '
        'for each sample (file names, ids), or a function that returns the name of the sample at a '
        'position. keys=range(len(dataset)) is correct only if the dataset never changes.'
    )
