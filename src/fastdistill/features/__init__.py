"""Work with the layers of a network: find them by name, read their outputs, and pair student layers
with teacher layers.
"""

from .layer_hooks import Taps
from .layer_names import LayerInfo, LayerTree, resolve, unwrap
from .layer_pairs import Pair, PairTable, pair
from .probe import layers
from .projectors import Projector

__all__ = [
    'LayerInfo',
    'LayerTree',
    'Pair',
    'PairTable',
    'Projector',
    'Taps',
    'layers',
    'pair',
    'resolve',
    'unwrap',
]
