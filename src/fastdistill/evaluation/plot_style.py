"""Style of all figures, with colors for light and dark backgrounds, and with labels that matplotlib
does not interpret as math.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from .report_data import ReportData

# colors of the baseline, the distilled student and further students; the teacher has the color of
# the text
COLORS = '#8a93a6', '#e0752d', '#1f7a8c', '#8e5bb5', '#4f9d4a', '#c4496b'


# colors of text, secondary text, lines and background
INK, GREY, PALE, BACKGROUND = '#2b2d33', '#6b7280', '#d9dce3', '#ffffff'
ON_DARK = {INK: '#e6e7ea', GREY: '#9aa1ad', PALE: '#454954', BACKGROUND: '#17181c'}
STYLE: Any = {
    'font.size': 10,
    'text.color': INK,
    'axes.labelcolor': INK,
    'xtick.color': INK,
    'ytick.color': INK,
    'axes.edgecolor': PALE,
    'axes.titlesize': 9,
    'axes.titlecolor': GREY,
    'axes.facecolor': 'none',
    'figure.facecolor': BACKGROUND,
    'legend.frameon': False,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'xtick.major.size': 0,
    'ytick.major.size': 0,
    'svg.fonttype': 'path',
    'svg.hashsalt': 'fastdistill',
}


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Any]:
    """Context manager that yields a new figure, and applies the style to what is drawn inside."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield new_figure(width, height)


def on_dark(svg: str) -> str:
    """Replace the colors of an SVG picture with colors for a dark background.

    Args:
        svg: SVG text of a picture in this style.
    """
    for light, dark in ON_DARK.items():
        svg = svg.replace(light, dark)
    return svg


def new_figure(width: float, height: float) -> Any:
    """Create a figure without pyplot, so that the figure does not stay open and notebooks show it
    only once.
    """
    from matplotlib.figure import Figure

    fig: Any = Figure(figsize=(width, height), layout='constrained')
    # notebooks only know how to show a figure after pyplot has drawn one
    fig._repr_png_ = partial(png, fig)
    return fig


def png(fig: Any) -> bytes:
    out = io.BytesIO()
    fig.savefig(out, format='png')
    return out.getvalue()


def color_of(report: ReportData, name: str | None) -> str:
    """Return the color of a model, which is the same in all pictures of a report."""
    if name == report.teacher:
        return INK
    students = sorted(report.students, key=lambda n: n != report.baseline)
    first = 0 if report.baseline is not None else 1
    return COLORS[(students.index(str(name)) + first) % len(COLORS)]


@cache
def characters() -> frozenset[int]:
    """Return the set of characters that the font can draw."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont('DejaVu Sans')).get_charmap())


def safe_label(text: Any, longest: int = 24) -> str:
    """Prepare a text for use in a picture. The result is on one line, contains no formulas, and has
    only characters that the font can draw.
    """
    line = ' '.join(str(text).split())
    line = ''.join(c if ord(c) in characters() else '□' for c in line)
    if len(line) > longest:
        line = line[: longest - 1] + '…'
    return line.replace('\\', '\\\\').replace('$', r'\$') if '$' in line else line
