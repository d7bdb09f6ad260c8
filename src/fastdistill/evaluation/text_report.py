"Show a report in a terminal and as Markdown."

import re
from collections.abc import Callable
from typing import Any

from .number_format import estimate_text, shown_text
from .report_data import ReportData
from .report_tables import Sheet, sheets_of
from .verdicts import caveat, coverage, verdicts

COLORS_OF_VERDICTS = {
    'better': 'green',
    'mixed': 'yellow',
    'worse': 'red',
    'not significant': 'yellow',
}


def title_of(r: ReportData) -> str:
    """Return the title of a report, or the names of its models if there is no title."""
    *others, last = r.models
    return r.title or (f'{", ".join(others)} and {last}' if others else last)


def escaped(text: str) -> str:
    """Escape markup and control characters of a text for rich."""
    from rich import markup

    return markup.escape(shown_text(text))


def show(o: Any, print_it: Callable[[Any, Any], None], console: Any = None) -> None:
    """Show an object as HTML in a notebook, or as text in a terminal.

    Args:
        o: Object with a method `_repr_html_`.
        print_it: fn(o, console) that prints the object.
        console: A Rich console. None for standard output.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        get_ipython = lambda: None
    if console is None and type(get_ipython()).__name__ == 'ZMQInteractiveShell':
        from IPython.display import HTML, display

        display(HTML(o._repr_html_()))
    else:
        print_it(o, console)


def in_brief(r: ReportData) -> str:
    """Format the verdicts and the headline scores in a few lines, for `print`."""
    info = r.info[r.headline]
    width = max(map(len, r.models))
    rows = []
    for n, m in r.models.items():
        value, between = estimate_text(m.measures[r.headline], info)
        rows.append(f'  {shown_text(n).ljust(width)}  {value}{f" ({between})" if between else ""}')
    return '\n'.join(
        [
            f'{shown_text(title_of(r))}: {info.label} on {r.n:,} {shown_text(r.unit)}',
            *rows,
            *(shown_text(text) for _, text in verdicts(r)),
            shown_text(coverage(r)),
            'report.show() shows all tables, report.to_html(path) writes a page.',
        ]
    )


def print_report(r: ReportData, console: Any = None) -> None:
    """Print verdicts and tables in a terminal.

    Args:
        r: The report.
        console: A Rich console. None for standard output.
    """
    from rich.console import Console

    console = console or Console()
    console.print(f'[bold]{escaped(title_of(r))}[/]', highlight=False)
    for verdict, text in verdicts(r):
        console.print(
            f'[{COLORS_OF_VERDICTS[verdict]}]{verdict}[/] {escaped(text)}', highlight=False
        )
    for s in sheets_of(r, brief=True):
        print_sheet(s, console)
    for text in (*r.notes, caveat(r)):
        console.print(escaped(text), style='dim', highlight=False)


def print_sheet(s: Sheet, console: Any) -> None:
    """Print a table in a terminal."""
    from rich import box
    from rich.table import Table

    t = Table(
        title=escaped(s.title),
        box=box.SIMPLE_HEAD,
        title_justify='left',
        title_style='bold',
        caption=escaped(s.note),
        caption_justify='left',
    )
    for i, h in enumerate(s.head):
        t.add_column(escaped(h), justify='right' if i else 'left')
    for row in s.rows:
        t.add_row(
            *(escaped(c.text) + (f'\n[dim]{escaped(c.small)}[/]' if c.small else '') for c in row)
        )
    console.print(t)


def cell(text: Any) -> str:
    """Escape a text for a cell of a Markdown table. The result is on one line and contains no
    Markdown or HTML syntax.
    """
    return re.sub(r'([\\`*_\[\]<>|&~$#])', r'\\\1', ' '.join(shown_text(str(text)).split()))


def markdown(r: ReportData, level: int = 2) -> str:
    """Format verdicts and tables as Markdown, e.g. for a model card.

    Args:
        r: The report.
        level: Level of the headings.
    """
    mark = '#' * level
    out = [
        f'{mark} {cell(title_of(r))}',
        '',
        *(f'- **{v}**: {cell(text)}' for v, text in verdicts(r)),
    ]
    for s in sheets_of(r):
        line = f'|---|{"---:|" * (len(s.head) - 1)}'
        rows = [f'| {" | ".join(map(cell, row))} |' for row in [s.head, *s.rows]]
        out += ['', f'{mark}# {cell(s.title)}', '', rows[0], line, *rows[1:]]
        if s.note:
            out += ['', cell(s.note)]
    for text in (*r.notes, caveat(r)):
        out += ['', cell(text)]
    return '\n'.join([*out, ''])
