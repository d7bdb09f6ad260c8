"Models side by side: scores, agreement, calibration, cost, and which differences are more than chance."
from .models import measure_models, roles_of
from .paired_tests import PairedScores, mcnemar

__all__ = ['PairedScores', 'mcnemar', 'measure_models', 'roles_of']
