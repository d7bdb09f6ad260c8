"Pictures: features of layers, and the report of a comparison."
from .features import attention_map, show_features
from .report import plot_classes, plot_cost, plot_history, plot_recovered, plot_reliability

__all__ = ['attention_map', 'plot_classes', 'plot_cost', 'plot_history', 'plot_recovered', 'plot_reliability',
           'show_features']
