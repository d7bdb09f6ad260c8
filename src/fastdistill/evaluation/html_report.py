"""Format a report as one self-contained HTML page without scripts. All names are escaped."""

import base64
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import report_plots as plots
from .number_format import shown_text
from .plot_style import on_dark
from .report_data import ReportData
from .report_tables import sheets_of
from .text_report import title_of
from .verdicts import caveat, verdicts

MARKS = {'better': 'good', 'mixed': 'even', 'worse': 'bad', 'not significant': 'even'}
DPI = 72  # SVG units per inch


def finalize(o: Any) -> Any:
    return o if hasattr(o, '__html__') else shown_text(o)


class Picture(NamedTuple):
    """A picture that is embedded in the page as data URIs, one for light and one for dark
    backgrounds.
    """

    title: str
    alt: str
    light: str
    dark: str
    width: int
    height: int


def html_page(r: ReportData, figures: Mapping[str, Any] | None = None, whole: bool = True) -> str:
    """Return the HTML page.

    Args:
        r: The report.
        figures: {caption: your own matplotlib figure}, shown at the end.
        whole: False to leave out the HTML head and the pictures, for use in a notebook.
    """
    sheets = sheets_of(r, brief=not whole)
    drawn = {s.name: pictures(r, s.name) if whole else [] for s in sheets}
    drawn[''] = [own_picture(k, f) for k, f in (figures or {}).items()]
    return rendered(
        'report.html',
        r=r,
        title=title_of(r),
        verdicts=verdicts(r),
        sheets=sheets,
        figures=drawn,
        caveat=caveat(r),
        marks=MARKS,
        whole=whole,
    )


def rendered(name: str, **values: Any) -> str:
    """Render an HTML template from the folder of this module."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
    )
    return env.get_template(name).render(**values)


def last_losses(r: ReportData) -> str:
    last = {
        n: {k: v[-1] for k, v in m.history.items() if k.endswith('_loss') and v[-1] is not None}
        for n, m in r.models.items()
        if m.history
    }
    return 'Last values: ' + '; '.join(
        f'{n}, {", ".join(f"{k} {v:.3g}" for k, v in o.items())}' for n, o in last.items()
    )


# {table of the page: [(picture, caption)]}
PICTURES: dict[str, list[tuple[Callable, str]]] = dict(
    scores=[
        (plots.plot_cost, 'Score against time, size as area'),
        (plots.plot_history, 'Losses during training'),
    ],
    differences=[(plots.plot_recovered, "Fraction of the teacher's lead that was recovered")],
    calibration=[(plots.plot_reliability, 'Reliability: accuracy against confidence')],
    classes=[(plots.plot_classes, 'Gains and losses per class')],
)


def pictures(r: ReportData, name: str) -> list[Picture]:
    """Return the pictures shown next to a table."""
    out = []
    for draw, title in PICTURES.get(name, ()):
        if (fig := draw(r)) is None:
            continue
        text = svg(fig)
        light, dark = (uri('image/svg+xml', o.encode()) for o in (text, on_dark(text)))
        numbers = last_losses(r) if draw is plots.plot_history else 'See the tables for numbers.'
        out.append(Picture(title, f'{title}. {numbers}', light, dark, *pixels(fig)))
    return out


def pixels(fig: Any) -> tuple[int, int]:
    width, height = (round(DPI * o * 1.4) for o in fig.get_size_inches())
    return width, height


def svg(fig: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(fig)  # the layout uses the text sizes of this canvas
    # savefig would draw everything twice, the first time only for the layout
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine(None)
    out = io.StringIO()
    with matplotlib.rc_context({'svg.fonttype': 'path', 'svg.hashsalt': 'fastdistill'}):
        fig.savefig(out, format='svg', metadata={'Date': None, 'Creator': None}, transparent=True)
    # drop comments, in which matplotlib repeats the text of each label
    return re.sub(r'<!--.*?-->', '', out.getvalue(), flags=re.S)


def own_picture(title: str, fig: Any) -> Picture:
    """Convert a figure of the user to a `Picture`. The content of the figure is unknown, so the
    caption is also the alternative text.
    """
    out = io.BytesIO()
    fig.savefig(out, format='png', dpi=110)
    return Picture(title, title, uri('image/png', out.getvalue()), '', *pixels(fig))


def uri(kind: str, data: bytes) -> str:
    return f'data:{kind};base64,{base64.b64encode(data).decode()}'
