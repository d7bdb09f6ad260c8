"Ask the teacher again: are the stored outputs still its own?"
from dataclasses import dataclass

__all__ = ['Verified']


@dataclass
class Verified:
    "How far stored answers are from the teacher's own"
    rows:int
    worst:float # largest difference of a logit (with top-k: of a log-probability)
    mean:float # of the rows' largest differences
    share:float # the largest difference over the largest number of its row (or over 1)
    dtype:str

    def __str__(self):
        return (f'{self.rows} rows asked again: stored logits ({self.dtype}) differ by {self.worst:.2g} at most, '
                f'{self.mean:.2g} on average')
