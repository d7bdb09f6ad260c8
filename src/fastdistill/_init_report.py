"The report of a comparison: plain data, and how it is shown."
from .report import Report
from .run_table import print_runs

__all__ = ['Report', 'print_runs']
