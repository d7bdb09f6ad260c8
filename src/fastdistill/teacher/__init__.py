"A teacher in whatever form people have one."
from .teacher import Teacher

__all__ = ['Teacher']
