"The report of a comparison: plain data, and how it is shown."
from .report import Report

__all__ = ['Report']
