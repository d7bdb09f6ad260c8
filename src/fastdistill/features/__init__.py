"""Layers of a network: names, outputs, and pairs of student and teacher layers."""

from .layer_hooks import Taps
from .layer_names import LayerInfo, LayerTree, resolve, unwrap
from .layer_pairs import Pair, PairTable, pair
from .probe import layers
from .projectors import projector

__all__ = [
    'LayerInfo',
    'LayerTree',
    'Pair',
    'PairTable',
    'Taps',
    'layers',
    'pair',
    'projector',
    'resolve',
    'unwrap',
]
