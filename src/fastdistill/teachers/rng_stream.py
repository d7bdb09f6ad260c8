"The random numbers of a teacher, under their former names."

from ..base.random_state import RandomStream as OwnDraws
from ..base.random_state import global_generators as generators

__all__ = ['OwnDraws', 'generators']
