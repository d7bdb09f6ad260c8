"""Write and read `head.bin`, the output layer or the components that the rows of a cache need."""

from ..base.outputs import DistillError
from .digests import checksum
from .file_store import Folder
from .manifest import Manifest
from .output_layer import StoredHead


def entries_of_head(head: StoredHead | None) -> list[dict]:
    """Return the entries of `Manifest.shards` before the rows are written."""
    if head is None:
        return []
    data = head.to_bytes()
    return [dict(name='head.bin', bytes=len(data), checksum=checksum(data))]


def head_is_lost(where: Folder, m: Manifest) -> bool:
    """Return True if `head.bin` is needed, but is missing, has a different size, or was changed."""
    if (where.size('head.bin') if m.head_bytes else 0) != m.head_bytes:
        return True
    return m.head_bytes > 0 and checksum(where.read('head.bin')) != m.checksums.get('head.bin')


def restore_head(where: Folder, m: Manifest, head: StoredHead | None) -> None:
    """Rewrite `head.bin` if it is missing or damaged and `head` is the layer that it contained."""
    if head is not None and head_is_lost(where, m):
        data = head.to_bytes()
        if checksum(data) == m.checksums.get('head.bin'):
            where.write('head.bin', data)


def read_head(where: Folder, m: Manifest) -> StoredHead | None:
    """Read `head.bin`, and compare it with its checksum. Return None if the rows do not need it."""
    if head_is_lost(where, m):
        what = (
            'components' if m.layout.kind == 'pca' else 'output layer of the stored hidden states'
        )
        again = 'write the cache again (force=True)' if m.parts is None else 'start a new stream'
        raise DistillError(
            f'head.bin of {where}, the {what}, is missing or damaged, but the rows are unreadable '
            f'without it: restore it, or {again}.'
        )
    return StoredHead.from_bytes(where.read('head.bin'), m.layout) if m.head_bytes else None
