"""Show a progress bar in a terminal or notebook while a cache is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..base.distributed import rank
from ..base.progress_bar import console_for_bars


class ProgressBar:
    """Progress bar with the number of samples, the speed and the megabytes written.

    The bar appears with the first batch.
    """

    def __init__(self, console: Any = None):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.task: Any = None
        self.bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[speed]}'),
            TextColumn('{task.fields[mb]:.1f} MB'),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> 'ProgressBar':
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self.bar.stop()
        self.task = None

    def progress(self, done: int, total: int, n_bytes: int) -> None:
        """Show the number of finished rows and their size.

        Args:
            done, total: Number of rows.
            n_bytes: Size of the finished rows in bytes.
        """
        if self.task is None:
            self.task = self.bar.add_task('teacher', total=total, mb=0.0, speed='')
            self.bar.start()
        speed = self.bar.tasks[self.task].speed
        text = '' if speed is None else f'{speed:,.0f} samples/s'
        self.bar.update(self.task, completed=done, mb=n_bytes / 1e6, speed=text)


@contextmanager
def shown_progress(progress: Any) -> Iterator[Callable | None]:
    """Yield a function to call after each batch, or None if no progress is shown.

    Args:
        progress: True for a progress bar in a terminal or notebook, False or None for no progress,
            or fn(rows done, total rows, bytes done).
    """
    if callable(progress) or not progress or rank():
        yield progress if callable(progress) else None
        return
    if (console := console_for_bars()) is None:
        yield None
    else:
        with ProgressBar(console) as bar:
            yield bar.progress
