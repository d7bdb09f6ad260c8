"The report of a comparison: plain data, and how it is shown."
from .data import Comparison, Cost, Difference, Estimate, Latency, MeasureInfo, ModelResult, Report

__all__ = ['Comparison', 'Cost', 'Difference', 'Estimate', 'Latency', 'MeasureInfo', 'ModelResult', 'Report']
