"""Check a teacher and a student before or after training, independent of any training framework.

The checks return findings and measurements.
"""

from .findings import Facts, Finding, Findings
from .teacher_outputs import check_outputs

__all__ = ['Facts', 'Finding', 'Findings', 'check_outputs']
