"""Losses: pure functions of two tensors, student first. `Loss` is the module form of any of them;
`OFD`, `VID` and `SEED` own a tensor.
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
# the loss functions among these names: what is decorated with `@loss`
LOSSES = {n: f for n in __all__ if hasattr(f := globals()[n], 'relates')}
