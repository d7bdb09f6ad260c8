"How far stored outputs differ from those that the teacher predicts now."

from dataclasses import dataclass

__all__ = ['Verified']


@dataclass
class Verified:
    """Differences between the stored outputs of a teacher and its outputs now.

    Attributes:
        worst: Largest difference of a logit (with top-k: of a log-probability).
        mean: Of the rows' largest differences.
        share: The largest difference, divided by the largest number of its row (or by 1).
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
