"Pictures: features of layers, and the report of a comparison."
from .feature_plots import attention_map, picture_in, show_features
from .report_plots import plot_classes, plot_cost, plot_history, plot_recovered, plot_reliability, plot_runs

__all__ = ['attention_map', 'picture_in', 'plot_classes', 'plot_cost', 'plot_history', 'plot_recovered',
           'plot_reliability', 'plot_runs', 'show_features']
