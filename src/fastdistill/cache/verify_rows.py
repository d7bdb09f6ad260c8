"""Result of comparing stored outputs with the current outputs of the teacher."""

from dataclasses import dataclass

__all__ = ['Verified']


@dataclass
class Verified:
    """Differences between the stored and the current outputs of a teacher.

    Attributes:
        rows: Number of rows compared.
        worst: Largest difference of a logit. With top-k, largest difference of a log-probability.
        mean: Mean over rows of the largest difference in a row.
        share: Largest difference relative to the largest absolute value in its row, or to 1 if all
            values are smaller.
        dtype: Data type of the stored outputs.
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
