"`Report`: the data of a comparison, and every way to show them."

from dataclasses import dataclass
from pathlib import Path

from .data import ReportData, write_text
from .page import page
from .text import in_brief, markdown, print_report, show

__all__ = ['Report']


@dataclass(repr=False)
class Report(ReportData):
    """Models measured side by side on the same samples, as plain data: `compare` makes it,
    `to_json` and `from_json` store it, `show`, `to_markdown` and `to_html` show it.
    """

    def show(self, console=None):
        """Verdicts and tables: in a notebook as HTML, else in the terminal.

        Args:
            console: Rich's; None: standard output.
        """
        show(self, print_report, console)

    def to_markdown(self, level: int = 2) -> str:
        """Verdicts and tables as Markdown, for a model card.

        Args:
            level: Of the headings.
        """
        return markdown(self, level)

    def to_html(self, path=None, figures=None) -> str | Path:
        """One page with tables and pictures: the path, if it is written there, else its text. It
        loads nothing, needs no network, and fits phones and dark screens.

        Args:
            path: Where to write the page; None: return it as text.
            figures: Caption -> a matplotlib figure of your own, such as a gallery, shown at the
                end.
        """
        return write_text(page(self, figures), path)

    def __repr__(self):
        return in_brief(self)

    def _repr_html_(self):
        return page(self, whole=False)
