"""Plot a report. Each function returns a figure, or None if the report lacks the data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .plot_style import GREY, PALE, color_of, safe_label, styled_figure
from .report_data import CLASS_MEASURES, MeasureInfo, ReportData

WIDTH = 5.2  # in inches; narrow enough for labels to be readable on a phone
LEAST_IN_BIN = 10  # bins with fewer predictions are left out, because their accuracy is too noisy


def factor(info: MeasureInfo) -> int:
    return 100 if info.percent else 1


def axis_name(info: MeasureInfo) -> str:
    return f'{info.label}{", %" if info.percent else ""}'


def plot_cost(report: ReportData) -> Any:
    """Plot the headline score against the time for one batch. The area of each circle grows with
    the number of parameters.

    Args:
        report: A `Report`.
    """
    info, k = report.info[report.headline], report.headline
    shown = {
        n: m for n, m in report.models.items() if m.cost.latency and m.measures[k].value is not None
    }
    if not shown:
        return None
    with styled_figure(WIDTH, 3.6) as fig:
        ax, most = fig.subplots(), max(m.cost.params or 1 for m in shown.values())
        for n, m in shown.items():
            e: Any = m.measures[k]
            f, x = factor(info), m.cost.latency[0].p50
            color = color_of(report, n)
            if e.low is not None:
                ax.plot([x, x], [f * e.low, f * e.high], color=color, lw=1.5)
            area = 40 + 1500 * (m.cost.params or 0) / most
            ax.scatter([x], [f * e.value], s=area, color=color, alpha=0.85, lw=0)
            ax.annotate(
                safe_label(n),
                (x, f * e.value),
                xytext=(area**0.5 / 2 + 3, 3),
                textcoords='offset points',
                color=color,
                fontweight='bold',
            )
        xs = [m.cost.latency[0].p50 for m in shown.values()]
        ax.set(
            xscale='log',
            xlim=(min(xs) / 1.8, max(xs) * 2.6),
            ylabel=axis_name(info),
            xlabel=f'milliseconds for a batch of {next(iter(shown.values())).cost.latency[0].batch} (median)',
        )
        ax.margins(y=0.25)
        plain_ticks(ax.xaxis)
        ax.set_title('area: number of parameters; bars: 95% intervals', loc='left')
    return fig


def plain_ticks(axis: Any, of_decade: Sequence[int] = (1, 2, 5)) -> None:
    """Use plain numbers such as 0.5 and 20 on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=of_decade))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    axis.set_minor_formatter(NullFormatter())


def plot_recovered(report: ReportData) -> Any:
    """Plot the fraction of the teacher's lead over the baseline that each student recovers, with a
    confidence interval.

    Args:
        report: A `Report`.
    """
    k = report.headline
    shares = {
        c.model: c.recovered.get(k) for c in report.comparisons if c.against == report.baseline
    }
    shown: dict[str, Any] = {
        n: e for n, e in shares.items() if e is not None and e.value is not None
    }
    if not shown:
        return None
    with styled_figure(WIDTH, 1.1 + 0.5 * len(shown)) as fig:
        ax = fig.subplots()
        for x, name in ((0, report.baseline), (100, report.teacher)):
            ax.axvline(x, color=GREY, lw=1, ls=(0, (4, 3)), zorder=0)
            ax.annotate(
                safe_label(name),
                (x, 1),
                xycoords=('data', 'axes fraction'),
                xytext=(0, 3),
                ha='center',
                textcoords='offset points',
                color=GREY,
            )
        for i, (n, e) in enumerate(shown.items()):
            color = color_of(report, n)
            plot_interval(ax, e, 100, i, color)
            ax.annotate(
                f'{100 * e.value:.0f}%',
                (100 * e.value, i),
                xytext=(0, 7),
                ha='center',
                color=color,
                textcoords='offset points',
                fontweight='bold',
            )
        ax.set(
            ylim=(len(shown) - 0.4, -0.7),
            xlabel=f"recovered % of the teacher's lead in {report.info[k].label}",
        )
        ax.set_yticks(range(len(shown)), [safe_label(n) for n in shown])
        ax.spines['left'].set_visible(False)
    return fig


def plot_interval(ax: Any, e: Any, f: float, y: float, color: str) -> None:
    """Plot an estimate times `f`, and its interval, in a row at `y`."""
    if e.low is not None:
        ax.plot([f * e.low, f * e.high], [y, y], color=color, lw=2.5, solid_capstyle='round')
    ax.scatter([f * e.value], [y], s=50, color=color, zorder=3)


def plot_reliability(report: ReportData) -> Any:
    """Plot accuracy against confidence for each model. Well-calibrated probabilities are on the
    diagonal.

    Args:
        report: A `Report`.
    """
    shown = {n: m.reliability for n, m in report.models.items() if m.reliability}
    if not shown:
        return None
    with styled_figure(WIDTH, 3.8) as fig:
        top, low = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 100], [0, 100], color=PALE, lw=1.2, zorder=0)
        for n, b in shown.items():
            color, total = color_of(report, n), sum(b['count'])
            filled = [
                (100 * c / k, 100 * r / k, k)
                for k, c, r in zip(b['count'], b['confidence'], b['right'])
                if k
            ]
            low.plot(
                [x for x, *_ in filled],
                [100 * k / total for *_, k in filled],
                color=color,
                lw=1.6,
                marker='o',
                ms=3,
            )
            enough = [(x, y) for x, y, k in filled if k >= LEAST_IN_BIN]
            top.plot(
                [x for x, _ in enough],
                [y for _, y in enough],
                color=color,
                lw=1.6,
                marker='o',
                ms=4,
                label=safe_label(n),
            )
        words = 'frequency' if report.task == 'sigmoid' else 'accuracy'
        top.set(ylabel=f'{words}, %', ylim=(-2, 102))
        top.set_title(
            f'below the diagonal: overconfident; bins with fewer than {LEAST_IN_BIN} are left out',
            loc='left',
        )
        top.legend()
        low.set(
            xlabel='predicted probability, %', ylabel='share, %', xlim=(-2, 102), ylim=(0, None)
        )
    return fig


def plot_history(report: ReportData) -> Any:
    """Plot the losses of each training run over the epochs, i.e. the task loss and the loss of each
    term.

    Args:
        report: A `Report`.
    """
    shown = {n: h for n, m in report.models.items() if (h := losses_of(m.history))}
    if not shown:
        return None
    with styled_figure(WIDTH, 0.4 + 1.9 * len(shown)) as fig:
        axs = fig.subplots(len(shown), 1, squeeze=False)[:, 0]
        for ax, (n, h) in zip(axs, shown.items()):
            for k, style in zip(h, LINES):
                ax.plot(
                    range(1, len(h[k]) + 1),
                    [float('nan') if v is None else v for v in h[k]],
                    label=safe_label(k),
                    color=color_of(report, n),
                    ls=style,
                    lw=1.6,
                    marker='o' if len(h[k]) == 1 else None,
                )
            ax.set_title(
                safe_label(n),
                loc='left',
                color=color_of(report, n),
                fontweight='bold',
                fontsize=10,
            )
            ax.set_ylabel('loss')
            values = [v for o in h.values() for v in o if v is not None and math.isfinite(v)]
            if values and max(values) > FAR * min(values) > 0:
                ax.set_yscale('log')
                plain_ticks(ax.yaxis, (1, 3))
            else:
                ax.set_ylim(0, None)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(fontsize=8, ncols=2)
        axs[-1].set_xlabel('epoch')
    return fig


# losses are plotted on a logarithmic axis if the largest is more than this many times the smallest
FAR = 10
LINES = '-', '--', ':', '-.', (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1))


def losses_of(history: Mapping[str, list]) -> dict[str, list]:
    return {
        k: v for k, v in history.items() if k.endswith('_loss') and any(o is not None for o in v)
    }


def plot_classes(report: ReportData, most: int = 20) -> Any:
    """Plot how much each class gains or loses from the baseline to the first student.

    Args:
        report: A `Report`.
        most: Maximum number of classes. If there are more classes, only those with the largest
            gains and losses are shown.
    """
    changes = report.class_changes()
    if not changes:
        return None
    shown = changes if len(changes) <= most else changes[: most // 2] + changes[-(most // 2) :]
    with styled_figure(WIDTH, 0.9 + 0.24 * len(shown)) as fig:
        model = next(n for n in report.students if n != report.baseline)
        ax = axes_with_rows(
            fig, [safe_label(c) for c, *_ in shown], f'{CLASS_MEASURES[report.class_measure]}, %'
        )
        for i, (_, _, a, b, change) in enumerate(shown):
            color = color_of(report, model if change >= 0 else report.baseline)
            ax.plot([100 * a, 100 * b], [i, i], color=color, lw=2)
            ax.scatter([100 * a], [i], s=26, color=color_of(report, report.baseline), zorder=3)
            ax.scatter([100 * b], [i], s=26, color=color_of(report, model), zorder=3)
        ax.set_title(f'from {safe_label(report.baseline)} to {safe_label(model)}', loc='left')
    return fig


def axes_with_rows(fig: Any, labels: Sequence[str], xlabel: str) -> Any:
    """Create axes with a labeled row at y = 0, 1, 2, ..., from top to bottom."""
    ax = fig.subplots()
    ax.set_yticks(range(len(labels)), labels)
    ax.set(ylim=(len(labels) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis='y', color=PALE, lw=0.5)
    ax.set_axisbelow(True)
    return ax


def plot_runs(reports: dict) -> Any:
    """Plot the headline measure of the students in all runs, with confidence intervals, in the
    order of the runs.

    The headline measure of the first run is used for all runs.

    Args:
        reports: {run name: report}.
    """
    first = next(iter(reports.values()))
    k, info, f = first.headline, first.info[first.headline], factor(first.info[first.headline])
    rows = [
        (run, n, m, r)
        for run, r in reports.items()
        if k in r.info
        for n, m in r.models.items()
        if m.role != 'teacher' and m.measures[k].value is not None
    ]
    with styled_figure(WIDTH, 0.9 + 0.34 * len(rows)) as fig:
        ax = axes_with_rows(
            fig, [f'{safe_label(run)}: {safe_label(n)}' for run, n, *_ in rows], axis_name(info)
        )
        for i, (_, n, m, r) in enumerate(rows):
            plot_interval(ax, m.measures[k], f, i, color_of(r, n))
    return fig
