"""Columns that distillation adds to the progress table.

The columns show the loss of each term on the validation set, and the task loss on the training set.
"""

import torch
from fastai.basics import Metric, ValueMetric, find_bs, noop

from ..base.distributed import mean_over_ranks


def row_by_column(recorder, epoch: int = -1) -> dict:
    """Return {column of the progress table: number in the given epoch}.

    The number is None for a phase that did not run or was canceled.

    Args:
        recorder: Recorder of fastai.
        epoch: Position of the epoch in the last fit.
    """
    row = recorder.values[epoch]
    names = [n for n in recorder.metric_names if n not in ('epoch', 'time')]
    n_train = 1 if recorder.valid_metrics else len(names)
    if recorder.train_metrics and recorder.valid_metrics:
        n_train = len(names) // 2
    only_valid = len(row) == len(names) - n_train
    # subtle: without metrics, the rows of both phases have the same length
    if only_valid and len(row) == n_train:
        only_valid = row[0] != training_loss(recorder, epoch)
    row = [*[None] * n_train, *row] if only_valid else [*row, *[None] * (len(names) - len(row))]
    return dict(zip(names, row))


def training_loss(recorder, epoch: int) -> float | None:
    """Return the smoothed training loss at the end of an epoch. Return None if there was no
    training batch.
    """
    n = recorder.iters[epoch] if recorder.losses else 0
    return float(recorder.losses[n - 1]) if n else None


def columns_of(recorder) -> dict:
    """Return {column of the progress table: number in each epoch}.

    The dict is empty if there was no training, for example after `validate` or `lr_find`. It is also
    empty if a callback called `validate` or `get_preds` during an epoch, because fastai then mixes the
    numbers of both.
    """
    values = getattr(recorder, 'values', [])
    # subtle: such a row contains the time of the inner call, which fastai otherwise adds later
    if any(isinstance(v, str) for row in values for v in row):
        return {}
    rows = [row_by_column(recorder, i) for i in range(len(values))]
    # `validate` has no training, and `lr_find` cancels each validation
    has = lambda part: any(v is not None for r in rows for k, v in r.items() if k.startswith(part))
    if not has('train_'):
        return {}
    # subtle: without validation metrics, `lr_find` differs from a fit in that it stops in the
    # middle of an epoch
    whole = not recorder.valid_metrics and recorder.iters[-1] == len(recorder.losses)
    return {k: [row[k] for row in rows] for k in rows[0]} if has('valid_') or whole else {}


def column_of(part: str) -> str:
    """Return the column name for a part of the loss, such as 'color_kd_loss' for 'color.kd'."""
    return f'{part.replace(".", "_")}_loss'


class PartMetric(Metric):
    """Mean of one loss over the validation set.

    With the Recorder's option `train_metrics`, there is another column for the training set.

    Args:
        kd: The `KnowledgeDistillation` callback.
        key: Key of the loss in `kd.parts`.
    """

    def __init__(self, kd, key):
        self.kd, self.key = kd, key
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def accumulate(self, learn):
        # subtle: if a callback validates during a fit, there are no losses of these batches
        if (v := self.kd.parts.get(self.key)) is None or learn.lock.locked():
            return
        n = find_bs(learn.yb)
        self.total += learn.to_detach(v) * n
        self.count += n

    @property
    def value(self):
        return self.total / self.count if self.count else None

    @property
    def name(self):
        return column_of(self.key)

    # a Learner that is exported during a fit must load without fastdistill
    def __reduce__(self):
        return ValueMetric, (noop, self.name)


class TaskMetric(PartMetric):
    """Mean of the task loss over the training set, for comparison with `valid_loss`."""

    # subtle: the Recorder computes metrics in validation, where the task loss is `valid_loss`. So
    # the callback computes this mean during training.
    def __init__(self, kd):
        super().__init__(kd, 'task')
        self.start_training()

    def accumulate(self, learn):
        if learn.recorder.train_metrics:
            super().accumulate(learn)

    def start_training(self):
        self.training_sums = self.training_mean = None

    def add_training_batch(self, learn):
        if (v := self.kd.parts.get('task')) is None:
            return
        n = find_bs(learn.yb)
        # subtle: accumulate on the device of the loss, so that no step has to wait for a GPU
        sums = torch.stack([v.float() * n, torch.full_like(v, n, dtype=torch.float)])
        self.training_sums = sums if self.training_sums is None else self.training_sums + sums

    def end_training(self):
        if self.training_sums is None:
            return
        mean_over_ranks([self.training_sums])
        total, count = self.training_sums.tolist()
        self.training_mean = total / count

    @property
    def value(self):
        return super().value if self.count else self.training_mean
