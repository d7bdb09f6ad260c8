"""Show a progress bar in a terminal or a notebook. No bar is shown if the output goes to a file or
a pipe.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from .distributed import rank


def console_for_bars(**options: Any) -> Any:
    """Return rich's console if it can show a moving bar, i.e. in a terminal or in a notebook with
    ipywidgets. Otherwise return None.

    Args:
        **options: Options of rich's `Console`.
    """
    from rich.console import Console

    console = Console(**options)
    return (
        console if console.is_terminal or console.is_jupyter and find_spec('ipywidgets') else None
    )


@contextmanager
def progress_bar(shown: bool, unit: str = '') -> Iterator[Callable]:
    """Context manager that yields fn(text, done). The function moves the bar to `done`, from 0 to
    1, and shows the text next to the bar, which appears with the first call. With `done=None`, the
    function prints the text permanently, even if no bar is shown.

    Args:
        shown: False to print nothing. In distributed runs, only the first process prints.
        unit: Text after the percentage, such as 'of the time'.
    """
    shown = shown and rank() == 0
    console = console_for_bars(highlight=False, soft_wrap=True) if shown else None
    if console is None:
        yield lambda text, done: print(f'fastdistill: {text}') if shown and done is None else None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        BarColumn(20),
        TextColumn(f'{{task.percentage:>3.0f}}% {unit}  {{task.description}}'),
        console=console,
    )
    task = bar.add_task('', total=1.0)

    def update(text: str, done: float | None) -> None:
        if done is None:
            console.print(f'fastdistill: {text}', markup=False)
        else:
            bar.start()
            bar.update(task, completed=done, description=escape(text))

    try:
        yield update
    finally:
        bar.stop()
