"""Store teacher outputs on disk: run the teacher once, then train any number of students.

The file format is described in docs/cache.md.
"""

from .cache_importers import cache_from
from .dataset import Replayed, cache_dataset
from .http_teacher import ask_server
from .pack import pack_cache, unpack_cache
from .reader import TeacherCache
from .row_layout import Layout, Store
from .stream_join import StreamJoin
from .stream_sealing import seal_stream
from .stream_writer import RowWriter, TeacherRows, start_stream, write_stream
from .teacher_description import Source
from .writer import Forecast, write_cache

__all__ = [
    'Forecast',
    'Layout',
    'Replayed',
    'RowWriter',
    'Source',
    'Store',
    'StreamJoin',
    'TeacherCache',
    'TeacherRows',
    'ask_server',
    'cache_dataset',
    'cache_from',
    'pack_cache',
    'seal_stream',
    'start_stream',
    'unpack_cache',
    'write_cache',
    'write_stream',
]
