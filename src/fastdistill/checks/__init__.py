"Findings about a teacher and a student, and measurements, without any framework."

from .findings import Facts, Finding, Findings
from .outputs import check_outputs

__all__ = ['Facts', 'Finding', 'Findings', 'check_outputs']
