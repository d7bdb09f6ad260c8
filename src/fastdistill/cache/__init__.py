"Teacher outputs on disk: run the teacher once, train as many students as you like. See docs/cache.md for the format."
from .plain import cache_dataset
from .reader import TeacherCache
from .records import Layout, Wish
from .writer import Forecast, Source, write_cache

__all__ = ['Forecast', 'Layout', 'Source', 'TeacherCache', 'Wish', 'cache_dataset', 'write_cache']
