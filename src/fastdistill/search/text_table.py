"""Show tables of runs and recipes in a terminal or a notebook."""

from typing import Any

from ..base.text_table import text_table
from ..evaluation.number_format import Cell
from ..evaluation.report_tables import Sheet
from ..evaluation.text_report import print_sheet


class TextTable(list):
    """A list of dicts with the same keys that prints as a table."""

    def __repr__(self) -> str:
        rows = ([cell_text(v) for v in row.values()] for row in self)
        return text_table([*self[0]], rows) if self else 'no runs'

    def show(self, caption: str) -> None:
        """Print the table in a terminal or a notebook."""
        from rich.console import Console

        rows: list[list] = [[Cell(cell_text(v)) for v in row.values()] for row in self]
        print_sheet(Sheet('', '', [*self[0]], rows, caption), Console())


def cell_text(v: Any) -> str:
    if v is None:
        return ''
    return f'{v:.4g}' if isinstance(v, float) else str(v)
