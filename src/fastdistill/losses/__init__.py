"Pure functions of two tensors, student first; each has a module form under its paper's capitals."
from . import response
from .response import *

NOT_LOSSES = set() # public names that are helpers of losses
__all__ = [*response.__all__]
