"""The progress of students that train side by side: one bar, and a table with a row for each
student and epoch.
"""

from fastai.basics import Callback, L
from fastai.callback.progress import master_bar, progress_bar

from .metrics import row_by_column

__all__ = ['ProgressTable']


class TableRows(Callback):
    """Adds a row to the table after each epoch of a student."""

    order = 51  # after the Recorder

    def __init__(self, table, student):
        super().__init__()
        self.table, self.student = table, student

    def after_epoch(self):
        r = self.recorder
        row = {k: v for k, v in row_by_column(r, r.values[-1]).items() if v is not None}
        self.table.add(
            self.student, {'epoch': r.log[0], **row, 'time': r.log[-1] if r.add_time else ''}
        )

    # an exported Learner gets a callback that does nothing, and needs no fastdistill
    def __reduce__(self):
        return Callback, ()


class ProgressTable:
    """One bar for all students; it has fastai's looks in a terminal and in a notebook.

    Args:
        n_epoch: Of the student that trains longest.
    """

    def __init__(self, shown: bool, n_epoch: int):
        self.shown, self.n_epoch, self.callbacks, self.columns, self.bars, self.bar = (
            shown,
            n_epoch,
            [],
            None,
            None,
            None,
        )

    def __enter__(self):
        if self.shown:
            self.bars = master_bar(list(range(self.n_epoch)))
        return self

    def __exit__(self, *_):
        if self.bars is not None:
            self.bars.on_iter_end()
        self.bars = self.bar = None

    def rows_of(self, student: str) -> list:
        """The callbacks that a student needs for its rows.

        Args:
            student: Its name.
        """
        if not self.shown:
            return []
        self.callbacks.append(TableRows(self, student))
        return self.callbacks[-1:]

    def step(self, asked, n: int | None):
        """The next batch, or the end of the phase.

        Args:
            asked: (epoch, index of the DataLoader, number of the batch).
            n: Batches in this phase.
        """
        if not self.shown:
            return
        epoch, index, i = asked
        if i == 0:
            if index == 0:
                self.bars.update(min(epoch, self.n_epoch - 1))
            self.bar = progress_bar(range(n or 0), parent=self.bars, leave=False)
        self.bar.update(i)
        if i == n:
            self.bar.on_iter_end()

    def add(self, student: str, values):
        """A row.

        Args:
            values: Column -> value.
        """
        if self.columns is None:
            names = (
                L(c.recorder.metric_names for c in self.callbacks if hasattr(c.learn, 'recorder'))
                .concat()
                .unique()
            )
            self.columns = [*(n for n in names if n != 'time'), 'time']
            self._write(['student', *self.columns])
        self._write([student, *(values.get(k, '') for k in self.columns)])

    def _write(self, row):
        self.bars.write([f'{o:.6f}' if isinstance(o, float) else str(o) for o in row], table=True)
