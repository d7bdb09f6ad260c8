"""Dataclasses with the results of a comparison, convertible to JSON and back."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..base.atomic_files import file_errors, write_atomically
from ..base.errors import DistillError

__all__ = [
    'CLASS_MEASURES',
    'Comparison',
    'Cost',
    'Difference',
    'Estimate',
    'JsonReport',
    'Latency',
    'MeasureInfo',
    'ModelResult',
    'ReportData',
    'calibration_error',
    'write_text',
]

CLASS_MEASURES = dict(ap='average precision', iou='IoU', recall='recall')
REPORT_FORMAT = 1  # version of the JSON format


@dataclass
class Estimate:
    """A number and its 95% bootstrap interval, or None if there is nothing to measure."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class MeasureInfo:
    """Name of a measure, and how to format and compare its values.

    Attributes:
        higher: True if higher is better.
        percent: True for a fraction from 0 to 1, shown as a percentage.
    """

    label: str
    higher: bool = True
    percent: bool = False

    def text(self, value, sign=False):
        """Format a value without its unit."""
        if value is None:
            return '–'
        v = 100 * value if self.percent else value
        digits = (2 if 0 < abs(v) < 0.1 else 1) if self.percent else decimals(v)
        return f'{v:{"+" if sign else ""}.{digits}f}'

    @property
    def points(self):
        return ' points' if self.percent else ''

    @property
    def unit(self):
        return '%' if self.percent else ''


def decimals(v):
    """Return the number of decimals needed for about four significant digits."""
    return 2 if abs(v) >= 10 else 3 if abs(v) >= 1 else 4


@dataclass
class Difference(Estimate):
    """The difference between two models on the same samples, with its test.

    Attributes:
        p: Probability of a difference at least as large if both were equally good.
        test: "McNemar's exact test" or 'paired permutation test'.
    """

    p: float | None = None
    test: str = ''

    @property
    def significant(self):
        return self.p is not None and self.p < 0.05


@dataclass
class Comparison:
    """Comparison of two models on the same samples.

    Attributes:
        differences: {measure: model minus the other model}.
        recovered: {measure: fraction of the teacher's lead}, only for measures with a lead.
    """

    model: str
    against: str
    differences: dict[str, Difference] = field(default_factory=dict)
    recovered: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class Latency:
    """Times of one forward pass.

    Attributes:
        batch: Batch size.
        p50: Median, in milliseconds.
    """

    batch: int
    p50: float
    p95: float
    runs: int

    @property
    def per_second(self):
        return 1000 * self.batch / self.p50


@dataclass
class Cost:
    """Cost of a model. Values that can't be counted are None, e.g. in an ONNX file.

    Attributes:
        macs: Multiply-accumulates of matrix products and convolutions, per sample.
        bytes: Size of the model's file, or of its weights.
        memory: Peak bytes during a forward pass of the large batch, including weights.
        latency: Latencies for batch size 1 and for a large batch.
    """

    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    memory: int | None = None
    latency: list[Latency] = field(default_factory=list)


@dataclass
class ModelResult:
    """All measurements of one model.

    Attributes:
        role: 'teacher', 'baseline' or 'student'.
        kind: What it is, e.g. the name of its class or file.
        loss: The task loss.
        metrics: Metrics of the Learner.
        agreement: Agreement with the teacher.
        reliability: (count, confidence, correct) for each bin of confidence.
        classes: 'recall' of each class; for masks also 'iou', for boxes only 'ap'.
        history: {column of the training table: number for each epoch}.
    """

    role: str
    kind: str = ''
    loss: float | None = None
    measures: dict[str, Estimate] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    reliability: dict[str, list] = field(default_factory=dict)
    classes: dict[str, list] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    history: dict[str, list] = field(default_factory=dict)

    @property
    def calibration_error(self):
        """Mean distance between confidence and accuracy over the bins (ECE). None for regression."""
        b = self.reliability
        return calibration_error(b['count'], b['confidence'], b['right']) if b else None


def calibration_error(count, confidence, right) -> float | None:
    """Return the expected calibration error (ECE), or None without predictions.

    Args:
        count: Number of predictions in each bin of confidence.
        confidence: Sum of their confidences.
        right: Number of correct predictions among them.
    """
    if not sum(count):
        return None
    return sum(abs(c - r) for c, r in zip(confidence, right)) / sum(count)


class JsonReport:
    """A dataclass with a field `format` that can be written as JSON and read back."""

    called = 'report'  # name in messages
    inside = {}  # like `INSIDE`, but only for this class

    def to_json(self, path=None) -> str | Path:
        """Convert the report to JSON. Return the path if it is written to a file, else the text.

        Args:
            path: File to write. None to return the text.
        """
        return write_text(
            json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + '\n',
            path,
        )

    @classmethod
    def from_json(cls, source):
        """Read a report written by `to_json`.

        Args:
            source: Path of a file, or the text itself.
        """
        text = (
            source
            if isinstance(source, str) and source.lstrip().startswith('{')
            else read(cls, Path(source))
        )
        try:
            data = json.loads(text)
        except ValueError as e:
            raise DistillError(
                f'This is not JSON: {e}. {cls.__name__}.to_json writes a {cls.called}.'
            ) from e
        if not isinstance(data, dict) or data.get('format') != cls.format:
            raise DistillError(
                f'This JSON is not a {cls.called} of format {cls.format}, which {cls.__name__}.to_json '
                'writes.'
            )
        try:
            return built(cls, data)
        except (TypeError, AttributeError) as e:
            raise DistillError(f'This JSON is not a {cls.called}: {e}') from e


@dataclass
class ReportData(JsonReport):
    """Data of models measured on the same samples, convertible to JSON and back.

    Attributes:
        task: 'softmax', 'sigmoid', 'regression' or 'detection'.
        headline: Main measure, by which the models are compared first.
        n: Number of samples.
        unit: What the samples are: images, texts, rows ...
        info: {measure: `MeasureInfo`}.
        teacher: Name of the teacher.
        baseline: Name of the model that was trained without the teacher.
        classes: Names of the classes.
        counts: Number of samples, or positions, of each class.
        machine: Machine and versions with which the times were measured.
    """

    task: str
    headline: str
    n: int
    unit: str = 'samples'
    title: str = ''
    info: dict[str, MeasureInfo] = field(default_factory=dict)
    models: dict[str, ModelResult] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    teacher: str | None = None
    baseline: str | None = None
    classes: list[str] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    machine: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    format: int = REPORT_FORMAT

    @property
    def students(self):
        return [n for n, m in self.models.items() if m.role != 'teacher']

    def comparison(self, model: str, against: str | None = None) -> Comparison | None:
        """Return the comparison of two models. None if they were not compared.

        Args:
            model: Name of a model.
            against: Name of the model to compare with. None for the baseline.
        """
        against = against or self.baseline
        return next((c for c in self.comparisons if (c.model, c.against) == (model, against)), None)

    @property
    def class_measure(self):
        """Measure of each class: 'ap' for boxes, 'iou' for masks, else 'recall'."""
        has = lambda k: any(k in m.classes for m in self.models.values())
        return next((k for k in CLASS_MEASURES if has(k)), 'recall')

    def class_changes(self) -> list:
        """Return (class, index, baseline value, value of the first student, change) for each class.

        The largest gain comes first. Empty without a baseline.
        """
        model = next((n for n in self.students if n != self.baseline), None)
        if None in (model, self.baseline):
            return []
        a, b = (self.models[n].classes.get(self.class_measure, []) for n in (self.baseline, model))
        rows = [
            (c, i, x, y, y - x)
            for i, (c, x, y) in enumerate(zip(self.classes, a, b))
            if None not in (x, y)
        ]
        return sorted(rows, key=lambda o: -o[-1])


def write_text(text, path):
    """Write a text and return the path. Without a path, return the text."""
    if path is None:
        return text
    path = Path(path)
    with file_errors(f"Can't write {path}"):
        # subtle: a terminal or a pipe can't be replaced by a file
        if path.exists() and not path.is_file():
            path.write_text(text, encoding='utf-8')
        else:
            write_atomically(path, text)
    return path


def read(cls, path):
    if path.is_file():
        return path.read_text(encoding='utf-8')
    raise DistillError(f'There is no file {str(path)!r}. {cls.__name__}.to_json(path) writes one.')


def finite(o):
    """Replace nan and infinity, which JSON does not have, by None."""
    if isinstance(o, float):
        return o if math.isfinite(o) else None
    if isinstance(o, dict):
        return {k: finite(v) for k, v in o.items()}
    return [finite(v) for v in o] if isinstance(o, (list, tuple)) else o


# dataclasses inside a report: {field: (class, type of the container or None)}
INSIDE = dict(
    info=(MeasureInfo, dict),
    models=(ModelResult, dict),
    comparisons=(Comparison, list),
    measures=(Estimate, dict),
    differences=(Difference, dict),
    recovered=(Estimate, dict),
    cost=(Cost, None),
    latency=(Latency, list),
)


def built(cls, data):
    """Build the dataclass `cls` from plain data."""
    names = {f.name for f in fields(cls)}
    if not isinstance(data, dict) or (wrong := set(data) - names):
        what = (
            f'the field(s) {", ".join(sorted(wrong))}'
            if isinstance(data, dict)
            else f'a {type(data).__name__}'
        )
        raise TypeError(f'its {cls.__name__} has {what}')
    known = INSIDE | getattr(cls, 'inside', {})

    def inside(k, v):
        if k not in known:
            return v
        of, box = known[k]
        if box is dict:
            return {n: built(of, o) for n, o in v.items()}
        return [built(of, o) for o in v] if box is list else built(of, v)

    return cls(**{k: inside(k, v) for k, v in data.items()})
