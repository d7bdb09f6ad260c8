"A teacher in any common form."
from .teacher import Teacher

__all__ = ['Teacher']
