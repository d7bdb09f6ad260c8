"`Report`: the data of a comparison, and ways to show it."

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .html_report import html_page
from .report_data import ReportData, write_text
from .text_report import in_brief, markdown, print_report, show


@dataclass(repr=False)
class Report(ReportData):
    """Results of models measured on the same samples, as returned by `compare`. Use `to_json` and
    `from_json` to store a report, and `show`, `to_markdown` and `to_html` to show it.
    """

    def show(self, console: Any = None) -> None:
        """Show verdicts and tables, as HTML in a notebook or as text in a terminal.

        Args:
            console: A Rich console. None for standard output.
        """
        show(self, print_report, console)

    def to_markdown(self, level: int = 2) -> str:
        """Format verdicts and tables as Markdown, e.g. for a model card.

        Args:
            level: Level of the headings.
        """
        return markdown(self, level)

    def to_html(
        self, path: str | Path | None = None, figures: Mapping[str, Any] | None = None
    ) -> str | Path:
        """Format the report as one HTML page with tables and pictures.

        The page is self-contained, needs no network, and works on phones and in dark mode.

        Args:
            path: File to write. None to return the HTML text.
            figures: {caption: matplotlib figure} of your own figures, which are shown at the end.

        Returns:
            The path if a file was written, or else the HTML text.
        """
        return write_text(html_page(self, figures), path)

    def __repr__(self) -> str:
        return in_brief(self)

    def _repr_html_(self) -> str:
        return html_page(self, whole=False)
