"""Losses: pure functions of two tensors, with the student's first. `Loss` turns any of these
functions into a module. The modules `OFD`, `VID` and `SEED` also own a tensor.
"""

from . import decoupled, dense, divergence, feature, relation, response, transformed_teacher
from ._base import Loss, loss
from .decoupled import *
from .dense import *
from .divergence import *
from .feature import *
from .relation import *
from .response import *
from .transformed_teacher import *

__all__ = [
    'Loss',
    'loss',
    *decoupled.__all__,
    *dense.__all__,
    *divergence.__all__,
    *feature.__all__,
    *relation.__all__,
    *response.__all__,
    *transformed_teacher.__all__,
]
# all functions in `__all__` that are decorated with `@loss`
LOSSES = {n: f for n in __all__ if hasattr(f := globals()[n], 'relates')}
