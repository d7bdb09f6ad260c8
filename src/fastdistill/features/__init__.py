"""Work with the layers of a network: find them by name, read their outputs, and pair student layers
with teacher layers.
"""

from .layer_hooks import Taps
from .layer_pairs import pair
from .probe import layers

__all__ = ['Taps', 'layers', 'pair']
