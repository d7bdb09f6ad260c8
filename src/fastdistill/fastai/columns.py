"Columns of the progress table: each term's loss on the validation set, and the labels' own loss on the training set."
import torch
from fastai.basics import Metric, ValueMetric, find_bs, noop
from ..ranks import mean_over_ranks

__all__ = ['PartMetric', 'TaskMetric']


class PartMetric(Metric):
    """The mean of one part of the loss over the validation set; over the training set too with the Recorder's
    `train_metrics`"""
    def __init__(
        self, kd, # the callback
        key # of the part in `kd.parts`
    ):
        self.kd,self.key = kd,key
        self.reset()

    def reset(self): self.total,self.count = 0.,0

    def accumulate(self, learn):
        if (v := self.kd.parts.get(self.key)) is None: return
        n = find_bs(learn.yb)
        self.total += learn.to_detach(v)*n
        self.count += n

    @property
    def value(self): return self.total/self.count if self.count else None

    @property
    def name(self): return f'{self.key}_loss'

    # a Learner that is exported during a fit must load without fastdistill
    def __reduce__(self): return ValueMetric, (noop, self.name)


class TaskMetric(PartMetric):
    "The mean of the labels' own loss over the training set, to be compared with `valid_loss`"
    # subtle: the Recorder measures metrics in validation, where this part is `valid_loss`. In training, the callback
    # does it
    def __init__(self, kd):
        super().__init__(kd, 'task')
        self.start_training()

    def accumulate(self, learn):
        if learn.recorder.train_metrics: super().accumulate(learn)

    def start_training(self): self.training_sums = self.training_mean = None

    def add_training_batch(self, learn):
        if (v := self.kd.parts.get('task')) is None: return
        n = find_bs(learn.yb)
        # subtle: on the loss's device, so that no step waits for a GPU
        sums = torch.stack([v.float()*n, torch.full_like(v, n, dtype=torch.float)])
        self.training_sums = sums if self.training_sums is None else self.training_sums + sums

    def end_training(self):
        if self.training_sums is None: return
        mean_over_ranks([self.training_sums])
        total,count = self.training_sums.tolist()
        self.training_mean = total/count

    @property
    def value(self): return super().value if self.count else self.training_mean
