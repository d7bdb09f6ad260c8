"Compare models: scores, agreement, calibration, cost, paired tests, and reports."

from .calibration import Calibration, fit_temperature
from .feature_plots import attention_map, picture_in, show_features
from .model_comparison import measure_models, roles_of
from .paired_tests import PairedScores, mcnemar
from .report import Report
from .report_plots import (
    plot_classes,
    plot_cost,
    plot_history,
    plot_recovered,
    plot_reliability,
    plot_runs,
)
from .run_table import print_runs

__all__ = [
    'Calibration',
    'PairedScores',
    'Report',
    'attention_map',
    'fit_temperature',
    'mcnemar',
    'measure_models',
    'picture_in',
    'plot_classes',
    'plot_cost',
    'plot_history',
    'plot_recovered',
    'plot_reliability',
    'plot_runs',
    'print_runs',
    'roles_of',
    'show_features',
]
