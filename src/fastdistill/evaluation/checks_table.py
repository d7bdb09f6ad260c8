"""Show the results of the checks before training as a table. Each row has a mark, a finding, and
advice.
"""

import io
import shutil
from typing import Any

from .html_report import rendered
from .text_report import escaped

# {level: mark}. Rows with other levels are measurements, which have no mark.
LEVEL_MARKS = dict(ok='✓', note='i', warning='!', error='✗')
LEVEL_STYLES = dict(ok='green', note='cyan', warning='yellow', error='red')
LEVEL_CLASSES = dict(ok='good', warning='even', error='bad')  # {level: CSS class}


def print_checks(check: Any, console: Any = None) -> None:
    """Print the table in a terminal.

    Args:
        check: Object with `title`, `verdict` and `rows()`. Each row has `level`, `about`, `what`
            and `do`.
        console: A Rich console. None for standard output.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=escaped(check.title),
        show_header=False,
        box=None,
        title_justify='left',
        title_style='bold',
        padding=(0, 2, 0, 0),
    )
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for r in check.rows():
        color = LEVEL_STYLES.get(r.level, '')
        do = f'\n[dim]→ {escaped(r.do)}[/]' if r.do else ''
        table.add_row(
            f'[{color}]{LEVEL_MARKS[r.level]}[/]' if color else '',
            escaped(r.about),
            escaped(r.what) + do,
        )
    console = console or Console()
    console.print(table, highlight=False)
    console.print(escaped(check.verdict), style='bold', highlight=False)


def checks_as_text(check: Any) -> str:
    """Format the table as text without colors, as wide as the terminal."""
    from rich.console import Console

    out = io.StringIO()
    # subtle: in a notebook, rich would display the table instead of writing it
    print_checks(
        check,
        Console(
            file=out,
            width=shutil.get_terminal_size().columns,
            color_system=None,
            force_jupyter=False,
        ),
    )
    return '\n'.join(line.rstrip() for line in out.getvalue().splitlines())


def html_of_checks(check: Any) -> str:
    """Format the table as HTML for a notebook."""
    return rendered(
        'checks.html',
        title=check.title,
        rows=check.rows(),
        verdict=check.verdict,
        marks=LEVEL_MARKS,
        colors=LEVEL_CLASSES,
    )
