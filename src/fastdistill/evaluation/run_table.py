"""Combine several reports into one table with the students of all runs, sorted from best to worst."""

from collections.abc import Mapping
from typing import Any

from .number_format import amount, estimate_text, recovered_text
from .report_data import ReportData
from .report_tables import Sheet
from .text_report import print_sheet
from .verdicts import verdict_of


def sheet_of_runs(k: str, reports: Mapping[str, ReportData]) -> Sheet:
    """Build the table of students from all runs whose headline measure is `k`, best first."""
    info = next(r.info[k] for r in reports.values() if r.headline == k)
    rows: list[Any] = [
        (m.measures[k].value, run, r, n, m)
        for run, r in reports.items()
        if r.headline == k
        for n, m in r.models.items()
        if m.role != 'teacher' and m.measures[k].value is not None
    ]
    s = Sheet(
        'runs',
        f'{info.label} of all students',
        [
            '',
            'student',
            info.label,
            'vs. baseline',
            'verdict',
            "teacher's lead recovered",
            'parameters',
        ],
        note='Verdicts compare models of one run, on the same samples. Runs on different samples '
        'are not comparable.',
    )
    for _, run, r, n, m in sorted(rows, key=lambda o: -o[0] if info.higher else o[0]):
        c = r.comparison(n)
        s.add(
            run,
            n,
            estimate_text(m.measures[k], info),
            '–' if c is None else estimate_text(c.differences[k], info, True),
            '–' if c is None else verdict_of(c, r),
            recovered_text(None if c is None else c.recovered.get(k)),
            amount(m.cost.params),
        )
    return s


def print_runs(reports: dict, console: Any = None) -> None:
    """Print a table for each headline measure in a terminal.

    Args:
        reports: {run name: report}.
        console: A Rich console. None for standard output.
    """
    from rich.console import Console

    for k in dict.fromkeys(r.headline for r in reports.values()):
        print_sheet(sheet_of_runs(k, reports), console or Console())
