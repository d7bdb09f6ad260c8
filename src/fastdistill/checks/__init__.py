"""Check a teacher and a student before or after training.

The checks return findings and measurements. They do not depend on a training framework.
"""

from .findings import Facts, Finding, Findings
from .teacher_outputs import check_outputs

__all__ = ['Facts', 'Finding', 'Findings', 'check_outputs']
