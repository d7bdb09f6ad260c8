"What goes on inside a network: its layers by name, what comes out of them, and which layer is paired with which."
from .names import LayerInfo, LayerTree, resolve, unwrap
from .pairs import Pair, PairTable, pair
from .probe import layers
from .projectors import projector
from .taps import Taps

__all__ = ['LayerInfo', 'LayerTree', 'Pair', 'PairTable', 'Taps', 'layers', 'pair', 'projector', 'resolve', 'unwrap']
