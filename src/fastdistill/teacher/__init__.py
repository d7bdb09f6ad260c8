"A teacher in any form that people have."
from .teacher import Teacher

__all__ = ['Teacher']
