"""Teacher outputs on disk: run the teacher once, train as many students as you like. See
docs/cache.md for the format.
"""

from .dataset import Replayed, cache_dataset
from .importers import cache_from
from .layout import Layout, Store
from .pack import pack_cache, unpack_cache
from .reader import TeacherCache
from .server import ask_server
from .source import Source
from .writer import Forecast, write_cache

__all__ = [
    'Forecast',
    'Layout',
    'Replayed',
    'Source',
    'TeacherCache',
    'Store',
    'ask_server',
    'cache_dataset',
    'cache_from',
    'pack_cache',
    'unpack_cache',
    'write_cache',
]
