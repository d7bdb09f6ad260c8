"""Build the tables of a report as text. The terminal, Markdown and HTML output all use these
tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from .number_format import (
    Cell,
    amount,
    estimate_text,
    p_text,
    percent_text,
    recovered_text,
    three_digits,
)
from .report_data import CLASS_MEASURES, Latency, ReportData
from .verdicts import verdict_of

BUSY = 3  # if p95 exceeds the median by this factor, a report notes that the machine was busy
SHOWN = 10  # maximum number of classes with the largest gains, and with the largest losses


@dataclass
class Sheet:
    """A table. The first cell of each row is the name of the row.

    Attributes:
        name: Short name for links.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list] = field(default_factory=list)
    note: str = ''

    def add(self, name: str, *cells: Any) -> None:
        """Add a row, unless all of its cells are empty."""
        row = [c if isinstance(c, Cell) else Cell(c) for c in cells]
        if any(c.text != '–' for c in row):
            self.rows.append([Cell(name), *row])


def sheets_of(r: ReportData, brief: bool = False) -> list[Sheet]:
    """Return all tables of a report that are not empty.

    Args:
        r: The report.
        brief: True to show only differences in the headline measure.
    """
    sheets = (
        sheet_of_scores(r),
        sheet_of_differences(r, brief),
        sheet_of_seeds(r),
        sheet_of_agreement(r),
        sheet_of_calibration(r),
        sheet_of_classes(r),
        sheet_of_costs(r),
    )
    return [s for s in sheets if s.rows]


def per_model(
    r: ReportData, name: str, title: str, note: str = '', models: Sequence[str] | None = None
) -> Sheet:
    return Sheet(name, title, ['', *(models or r.models)], note=note)


def four_digits(v: float | None) -> str:
    return '–' if v is None else f'{v:#.4g}'


def sheet_of_scores(r: ReportData) -> Sheet:
    """Build the table with measures, task loss and the metrics of the Learners."""
    s = per_model(
        r, 'scores', 'Scores', f'On {r.n:,} {r.unit}. Below a score: its 95% bootstrap interval.'
    )
    for k, info in r.info.items():
        if k in ('nll', 'brier'):
            continue
        s.add(info.label, *(estimate_text(m.measures[k], info) for m in r.models.values()))
    s.add('task loss', *(four_digits(m.loss) for m in r.models.values()))
    for k in dict.fromkeys(k for m in r.models.values() for k in m.metrics):
        if is_repeated(r, k):
            continue
        s.add(f'metric {k}', *(four_digits(m.metrics.get(k)) for m in r.models.values()))
    return s


def is_repeated(r: ReportData, metric: str) -> bool:
    "Return True if this metric of the Learner is also one of the measures."
    if metric not in r.info:
        return False
    pairs: list[Any] = [
        (m.metrics.get(metric), m.measures[metric].value) for m in r.models.values()
    ]
    return all(None not in p and abs(p[0] - p[1]) < 1e-5 for p in pairs)


def sheet_of_differences(r: ReportData, brief: bool) -> Sheet:
    """Build the table with the differences from the baseline and from the teacher, for each model
    and measure.
    """
    head = ['', 'measure', 'difference', 'verdict', 'p', "teacher's lead recovered"]
    s = Sheet(
        'differences',
        'More than chance?',
        head,
        note='Differences on the same samples, with 95% bootstrap intervals. A difference counts as significant '
        'if p is below 0.05.',
    )
    for c in r.comparisons:
        for k, d in c.differences.items():
            if brief and k != r.headline:
                continue
            s.add(
                f'{c.model} – {c.against}',
                r.info[k].label,
                estimate_text(d, r.info[k], True),
                verdict_of(c, r, k),
                Cell(p_text(d.p).removeprefix('p ').removeprefix('= '), d.test),
                recovered_text(c.recovered.get(k)),
            )
    if not any(str(row[-1]) != '–' for row in s.rows):
        s.head, s.rows = s.head[:-1], [row[:-1] for row in s.rows]
    return s


def sheet_of_seeds(r: ReportData) -> Sheet:
    """Build the table with the headline measure of each training run, if there are several seeds."""
    info, names = r.info[r.headline], [*r.seeds.values]
    s = Sheet(
        'seeds',
        f'Seeds: {info.label} of each training run',
        ['', *names, ' – '.join(names[::-1])],
    )
    if len(r.seeds.seeds) < 2:
        return s
    d = r.seeds.difference
    s.note = (
        'With the same seed, both students start with the same weights and see the same batches. '
        f'All other tables are about the students of seed {r.seeds.seeds[0]}.'
    )
    if d.test:
        s.note += f' Mean difference: 95% interval over the seeds, {d.test}, {p_text(d.p)}.'
    shown = lambda v: info.text(v) + info.unit
    for seed, a, b in zip(r.seeds.seeds, *r.seeds.values.values()):
        s.add(f'seed {seed}', shown(a), shown(b), info.text(b - a, True) + info.points)
    means = (shown(fmean(v)) for v in r.seeds.values.values())
    s.add('mean', *means, estimate_text(d, info, True))
    return s


AGREEMENT = [
    ('same', 'the same prediction', percent_text),
    ('in_top5', "teacher's class among its top 5", percent_text),
    ('same_where_right', 'the same, where the teacher is right', percent_text),
    ('same_where_wrong', 'the same, where the teacher errs', percent_text),
    ('right_where_wrong', 'right, where the teacher errs', percent_text),
    ('kl', 'KL(teacher ‖ model), nats', four_digits),
    ('reverse_kl', 'KL(model ‖ teacher), nats', four_digits),
    ('mae', 'mean absolute distance', four_digits),
    ('rmse', 'root of the squared distance', four_digits),
    ('errors_correlation', 'correlation of the errors', four_digits),
]


def sheet_of_agreement(r: ReportData) -> Sheet:
    """Build the table of agreement with the teacher."""
    names = [n for n, m in r.models.items() if m.agreement]
    s = per_model(r, 'agreement', f'Agreement with {r.teacher}', models=names)
    for k, label, text in AGREEMENT:
        s.add(label, *(text(r.models[n].agreement.get(k)) for n in names))
    right = next((r.models[n].agreement.get('teacher_right') for n in names), None)
    if right is not None:
        s.note = f'{r.teacher} is right in {percent_text(right)} of all predictions.'
    return s


def sheet_of_calibration(r: ReportData) -> Sheet:
    "Build the table of calibration."
    s = per_model(
        r,
        'calibration',
        'Calibration',
        'Lower is better. ECE: mean distance between confidence and accuracy over 15 bins of '
        'confidence.',
    )
    if r.task in ('regression', 'detection'):
        return s
    s.add(
        'calibration error (ECE)',
        *(percent_text(m.calibration_error, 2) for m in r.models.values()),
    )
    for k in ('nll', 'brier'):
        s.add(
            r.info[k].label,
            *(estimate_text(m.measures[k], r.info[k]) for m in r.models.values()),
        )
    return s


def sheet_of_classes(r: ReportData) -> Sheet:
    """Build the table of the classes with the largest gains and losses."""
    changes, key = r.class_changes(), r.class_measure
    s = Sheet('classes', 'Classes', [''])
    if not changes:
        return s
    model = next(n for n in r.students if n != r.baseline)
    s.head = ['', 'fraction of the labels', *r.models, f'{model} – {r.baseline}, points']
    shown = changes if len(changes) <= 2 * SHOWN else changes[:SHOWN] + changes[-SHOWN:]
    s.note = (
        f'{CLASS_MEASURES[key][0].upper()}{CLASS_MEASURES[key][1:]} of each class, largest gain first.'
        + (
            ''
            if len(shown) == len(changes)
            else f' {len(changes) - len(shown)} classes in between are left out.'
        )
    )
    total = sum(r.counts) or 1
    for c, i, _, _, change in shown:
        s.add(
            c,
            percent_text(r.counts[i] / total),
            *(percent_text(m.classes[key][i]) for m in r.models.values()),
            f'{100 * change:+.1f}',
        )
    return s


def times(l: Latency | None) -> Cell | str:
    return '–' if l is None else Cell(three_digits(l.p50), f'p95 {three_digits(l.p95)}')


def sheet_of_costs(r: ReportData) -> Sheet:
    """Build the table of parameters, operations, bytes and times."""
    ms, m = r.models.values(), r.machine
    sizes = list(dict.fromkeys(l.batch for o in ms for l in o.cost.latency))
    threads = f'{m.get("threads", "?")} of {m.get("cores", "?")} threads'
    where = f'{m.get("device", "")}, {threads}, PyTorch {m.get("torch", "")}'
    text = (
        f'Measured on {where}. MACs: multiply-accumulates of matrix products and convolutions for '
        'one sample. Size: the file of the model, or else its parameters and buffers. Times: median '
        'after a warm-up, with the models timed alternately.'
    )
    worst = max((l.p95 / l.p50 for o in ms for l in o.cost.latency), default=0)
    if worst > BUSY:
        text += (
            f' A p95 is {three_digits(worst)} times its median: the machine was probably busy. '
            'Measure again while it is idle.'
        )
    s = per_model(r, 'cost', 'Cost', text)
    s.add('parameters', *(amount(o.cost.params) for o in ms))
    s.add('MACs', *(amount(o.cost.macs) for o in ms))
    s.add('size', *(amount(o.cost.bytes, 'B') for o in ms))
    s.add(
        f'peak memory, batch of {max(sizes)}' if sizes else 'peak memory',
        *(amount(o.cost.memory, 'B') for o in ms),
    )
    for n in sizes:
        found = [next((l for l in o.cost.latency if l.batch == n), None) for o in ms]
        s.add(f'ms for a batch of {n}', *map(times, found))
    if sizes:
        found = [next((l for l in o.cost.latency if l.batch == max(sizes)), None) for o in ms]
        s.add('samples per second', *('–' if l is None else f'{l.per_second:,.0f}' for l in found))
    return s
