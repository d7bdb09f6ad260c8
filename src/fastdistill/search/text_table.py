"""Show tables of runs and recipes in a terminal or a notebook."""

from typing import Any


class TextTable(list):
    """A list of dicts with the same keys that prints as a table."""

    def __repr__(self) -> str:
        if not self:
            return 'no runs'
        cells = [[*self[0]], *([cell_text(v) for v in row.values()] for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return '\n'.join(
            '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells
        )

    def show(self, caption: str) -> None:
        """Print the table in a terminal or a notebook."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*map(escape, self[0]), caption=escape(caption))
        for row in self:
            table.add_row(*(escape(cell_text(v)) for v in row.values()))
        Console().print(table)


def cell_text(v: Any) -> str:
    if v is None:
        return ''
    return f'{v:.4g}' if isinstance(v, float) else str(v)
