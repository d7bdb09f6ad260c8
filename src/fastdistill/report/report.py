"`Report`: the data of a comparison, and every way to show them."
from dataclasses import dataclass
from pathlib import Path
from .data import ReportData
from .page import page
from .text import markdown, print_report, show

__all__ = ['Report']


@dataclass
class Report(ReportData):
    """Models measured side by side on the same samples, as plain data: `compare` makes it, `to_json` and `from_json`
    store it, `show`, `to_markdown` and `to_html` show it"""

    def show(
        self,
        console=None # rich's; None: standard output
    ):
        "Verdicts and tables: in a notebook as HTML, else in the terminal"
        show(self, print_report, console)

    def to_markdown(
        self,
        level:int=2 # of the headings
    ) -> str:
        "Verdicts and tables as Markdown, for a model card"
        return markdown(self, level)

    def to_html(
        self,
        path=None, # where to write the page; None: only return it
        figures=None # caption -> a matplotlib figure of your own, such as a gallery, shown at the end
    ) -> str:
        "One page with tables and pictures. It loads nothing, needs no network, and fits phones and dark screens"
        text = page(self, figures)
        if path is not None: Path(path).write_text(text, encoding='utf-8')
        return text

    def _repr_html_(self): return page(self, whole=False)
