"Compare stored outputs with the current outputs of the teacher."

from dataclasses import dataclass

__all__ = ['Verified']


@dataclass
class Verified:
    """Differences between stored and current outputs of a teacher.

    Attributes:
        worst: Largest difference of a logit, or, with top-k, of a log-probability.
        mean: Mean of the largest differences of the rows.
        share: Largest difference, relative to the largest number of its row (or to 1).
    """

    rows: int
    worst: float
    mean: float
    share: float
    dtype: str

    def __str__(self):
        return (
            f'{self.rows} rows compared: stored logits ({self.dtype}) differ by {self.worst:.2g} at most, '
            f'{self.mean:.2g} on average'
        )
