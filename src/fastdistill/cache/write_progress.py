"""Show a progress bar in a terminal or notebook while a cache is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from ..base.progress_bar import progress_bar


@contextmanager
def shown_progress(progress: Any) -> Iterator[Callable]:
    """Yield a function to call after each batch, fn(rows done, total rows, bytes done).

    Args:
        progress: True for a progress bar in a terminal or notebook, False or None for no progress,
            or the function to yield.
    """
    if callable(progress):
        yield progress
        return
    start: tuple[int, float] | None = None  # rows and time after the first batch
    with progress_bar(bool(progress), 'of the samples') as show:

        def update(done: int, total: int, n_bytes: int) -> None:
            nonlocal start
            now = perf_counter()
            rows, time = start = start or (done, now)
            text = f'{done:,} of {total:,}, {n_bytes / 1e6:.1f} MB'
            if done > rows:
                speed = (done - rows) / (now - time)
                text += f', {speed:,.0f} samples/s, {(total - done) / speed:,.0f} s left'
            show(text, done / total)

        yield update
