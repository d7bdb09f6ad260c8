"""Remember which shards of an unfinished cache are written, and remove files of a cache."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..base.outputs import DistillError
from .file_store import Folder
from .json_checks import check_json, parse_json
from .manifest import CHECKSUM

CACHE_FILES = re.compile(
    r'(manifest\.json|keys\.bin|index\.bin|head\.bin|files\.bin|view\d{3,}/\d{6,}\.(bin|json)'
    r'|view\d{3,}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.(rows|keys|end))(\.\d+\.tmp)?'
)


def clear(where: Folder, ending: str = '', only: Any = None) -> None:
    """Remove only files that belong to a cache.

    The manifest is removed first, since a folder without a manifest is not a cache.
    """
    for n in sorted(where.names(), key=lambda n: n != 'manifest.json'):
        wanted = n.endswith(ending) and (only is None or n in only)
        if wanted and CACHE_FILES.fullmatch(n) and not (ending and n == 'manifest.json'):
            where.remove(n)


def note_of(name: str) -> str:
    return name.replace('.bin', '.json')


def note_checksum(where: Folder, shard: Sequence) -> str | None:
    """Return the checksum of a shard from its '.json' file.

    The result is None if the shard is missing or has the wrong size.
    """
    *_, name, size = shard
    note = note_of(name)
    if where.size(name) != size or not 0 < (where.size(note) or 0) < 1000:
        return None
    try:
        check_json(
            note,
            o := parse_json(where.read(note)),
            dict(name=(name,), checksum=CHECKSUM, bytes=None),
        )
    except DistillError:
        return None
    return o['checksum']


def notes(where: Folder, shards: Iterable[tuple]) -> dict[str, str]:
    """Return {shard: checksum} of the shards that have been written."""
    return {s[2]: o for s in shards if (o := note_checksum(where, s)) is not None}
