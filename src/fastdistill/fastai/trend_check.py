"""Warn during a fit if the student learns to match the teacher at the expense of the labels."""

import warnings

from ..base.distributed import rank
from ..base.outputs import DistillWarning
from .metrics import column_of, columns_of

BEGIN = 1 / 3  # no check before this fraction of the training, because losses may fluctuate
RISE = 1.1  # ratio of the validation loss to its best value that leads to a warning


class TrendCheck:
    """Warns once per fit if the student matches the teacher better, but the labels worse.

    The warning is shown if the task loss on the validation set has risen since its best epoch,
    while the loss of a term has fallen. If the task loss on the training set has fallen too, the
    student learns the labels and overfits, which is not the teacher's fault.
    """

    def __init__(self):
        self.warned = False

    def check(
        self,
        learn,  # at the start of an epoch
        training_progress: float,  # from 0 to 1
        recipe,
    ):
        if self.warned or training_progress < BEGIN or rank() or not hasattr(learn, 'recorder'):
            return
        columns = columns_of(learn.recorder)  # the values of this fit, one per epoch
        valid = columns.get('valid_loss', [])
        if len(valid) < 2 or None in valid or not 0 < min(valid) < valid[-1] / RISE:
            return
        best = valid.index(min(valid))
        task = columns.get(column_of('task'), [])
        if task and None not in task and task[-1] < task[best]:
            return
        # subtle: without labels, terms that compare layers do not train the student's last layers.
        # The task loss is then meaningless.
        for n in [t.name for t in recipe.terms if t.layers is None or recipe.task != 0]:
            term = columns.get(column_of(n))
            if not term or None in term or term[-1] >= term[best]:
                continue
            self.warned = True
            warnings.warn(
                f'The task loss on the validation set rose from {valid[best]:.4g} in epoch {best} '
                f'to {valid[-1]:.4g}, while {n} fell from {term[best]:.4g} to {term[-1]:.4g}: the '
                f'student follows the teacher away from the labels. {recipe.how_to_lower(n)}; '
                'explain(teacher) looks for the reason.',
                DistillWarning,
                stacklevel=2,
            )
            return
