"""Compute fingerprints of weights, inputs and code."""

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.content import describe_content
from .keys import hash_of


def checksum(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_checksum(
    path: Any, step: int = 2**20, look: Callable[[memoryview], object] | None = None
) -> str:
    """Compute the `checksum` of a file without loading the whole file into memory.

    Args:
        path: Path of the file.
        step: Number of bytes read at once.
        look: fn(bytes), called with each chunk.
    """
    h, part = hashlib.blake2b(digest_size=16), memoryview(bytearray(step))
    with open(path, 'rb') as f:
        while n := f.readinto(part):
            h.update(part[:n])
            if look is not None:
                look(part[:n])
    return h.hexdigest()


def fingerprint(*states: Any) -> str:
    """Hash the names, shapes, types and contents of state dicts, arrays or texts."""
    h = hashlib.blake2b(digest_size=16)
    for o in states:
        _feed(h, o)
    return h.hexdigest()


def _feed(h: Any, o: Any) -> None:
    if isinstance(o, dict):
        for k, v in o.items():
            h.update(f'{k}='.encode())
            _feed(h, v)
    elif isinstance(o, Tensor):
        t = o.detach().cpu().to_dense().contiguous()
        h.update(f'{t.dtype} {tuple(t.shape)} '.encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b'')
    elif isinstance(o, np.ndarray):
        h.update(f'{o.dtype} {o.shape} '.encode())
        if o.dtype.hasobject:  # the bytes of this array are memory addresses
            for v in flat_values(o.ravel().tolist()):
                _feed(h, v)
        else:
            h.update(np.ascontiguousarray(o).tobytes())
    else:
        # hash the type if the repr has a memory address, which differs between processes
        is_address = ' at 0x' in (r := repr(o)) and not isinstance(o, (str, bytes))
        h.update((type(o).__qualname__ if is_address else r).encode())


def flat_values(o: Any) -> list:
    """Return the tensors, arrays and numbers in a nested item."""
    if isinstance(o, dict):
        return [v for k in o for v in flat_values(o[k])]
    if isinstance(o, (tuple, list)):
        return [v for p in o for v in flat_values(p)]
    if hasattr(o, 'tobytes') and hasattr(o, 'mode'):
        return [np.asarray(o)]
    return [o]


def input_digest(item: Any) -> str:
    """Compute the fingerprint of the input in an item of a dataset.

    The input is the first element of a tuple or list, and the whole item otherwise.
    """
    return fingerprint(*flat_values(first_part(item)))


def first_part(o: Any) -> Any:
    return o[0] if isinstance(o, (tuple, list)) else o


def code_of(f: Any) -> str:
    """Return the name of a function or class and a fingerprint of its code."""
    name = getattr(f, '__qualname__', repr(type(f)))
    try:
        return f'{name} {hash_of(inspect.getsource(f).encode()):x}'
    except (TypeError, OSError):
        return name


def behavior_of(f: Any) -> str:
    """Return a fingerprint of what a function does: its code, and the values that it reads from its
    surroundings.
    """
    return fingerprint(describe_content(f))


def versions() -> dict:
    """Return the versions of Python, PyTorch and the libraries that transforms use.

    The numbers in a cache may depend on these versions.
    """
    out = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)
    for name in ('pillow', 'torchvision', 'fastai'):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return out
