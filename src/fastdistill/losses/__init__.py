"""Losses: pure functions of two tensors, student first, and their module forms."""

from . import decoupled, dense, divergence, feature, relation, response
from ._base import loss
from .decoupled import *
from .dense import *
from .divergence import *
from .feature import *
from .relation import *
from .response import *

NOT_LOSSES = {
    'loss',
    'ofd_margin',
    'standardize',
    'standardized',
}  # public names that are helpers of losses
__all__ = [
    'loss',
    *decoupled.__all__,
    *dense.__all__,
    *divergence.__all__,
    *feature.__all__,
    *relation.__all__,
    *response.__all__,
]
