"A teacher in any common form."

from .raw_items import with_items
from .teacher import Teacher

__all__ = ['Teacher', 'with_items']
