"Checks of a teacher and a student, with findings and measurements, independent of any framework."

from .findings import Facts, Finding, Findings
from .teacher_outputs import check_outputs

__all__ = ['Facts', 'Finding', 'Findings', 'check_outputs']
