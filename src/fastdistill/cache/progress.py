"Progress bar for writing a cache, in a terminal or notebook. Nothing is shown in a file or pipe."

from contextlib import contextmanager
from importlib.util import find_spec

from ..base.distributed import rank

__all__ = ['ProgressBar', 'console_for_bars', 'shown_progress']


def console_for_bars(**options):
    """Return a console of rich if it can show a moving bar, in a terminal or in a notebook with
    ipywidgets; else None.

    Args:
        **options: Options of rich's `Console`.
    """
    from rich.console import Console

    console = Console(**options)
    return (
        console if console.is_terminal or console.is_jupyter and find_spec('ipywidgets') else None
    )


class ProgressBar:
    """Progress bar with samples, speed and megabytes. It appears with the first batch."""

    def __init__(self, console=None):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.task = None
        self.bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[speed]}'),
            TextColumn('{task.fields[mb]:.1f} MB'),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.bar.stop()
        self.task = None

    def progress(
        self,
        done: int,
        total: int,  # rows
        n_bytes: int,  # of the rows that are done
    ):
        if self.task is None:
            self.task = self.bar.add_task('teacher', total=total, mb=0.0, speed='')
            self.bar.start()
        speed = self.bar.tasks[self.task].speed
        self.bar.update(
            self.task,
            completed=done,
            mb=n_bytes / 1e6,
            speed='' if speed is None else f'{speed:,.0f} samples/s',
        )


@contextmanager
def shown_progress(progress):
    """Context that yields the function to call after each batch, or None.

    Args:
        progress: True for a bar in a terminal or notebook, False or None for nothing, or fn(rows
            done, total rows, bytes done).
    """
    if callable(progress) or not progress or rank():
        yield progress if callable(progress) else None
        return
    if (console := console_for_bars()) is None:
        yield None
    else:
        with ProgressBar(console) as bar:
            yield bar.progress
