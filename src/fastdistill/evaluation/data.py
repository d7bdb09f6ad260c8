"The report of a comparison as plain data: dataclasses of numbers and texts, to JSON and back."

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..base.errors import DistillError

__all__ = [
    'Comparison',
    'Cost',
    'Difference',
    'Estimate',
    'JsonReport',
    'Latency',
    'MeasureInfo',
    'ModelResult',
    'ReportData',
    'write_text',
]

REPORT_FORMAT = 1  # of the JSON file


@dataclass
class Estimate:
    """A number, and the 95% bootstrap interval around it; None where there is nothing to measure."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class MeasureInfo:
    """What a measure is called, and how its numbers are read.

    Attributes:
        higher: Is more better?
        percent: A share from 0 to 1, shown as percent.
    """

    label: str
    higher: bool = True
    percent: bool = False

    def text(self, value, sign=False):
        """A value as text, without its unit."""
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
    """Digits behind the point that show about four significant ones."""
    return 2 if abs(v) >= 10 else 3 if abs(v) >= 1 else 4


@dataclass
class Difference(Estimate):
    """A difference of two models on the same samples, with its test.

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
    """A model against another one, on the same samples.

    Attributes:
        differences: Measure -> model minus the other.
        recovered: Measure -> share of the teacher's lead; absent: no lead.
    """

    model: str
    against: str
    differences: dict[str, Difference] = field(default_factory=dict)
    recovered: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class Latency:
    """Times of one forward pass.

    Attributes:
        batch: Samples in it.
        p50: Median milliseconds.
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
    """What a model costs; None where it can't be counted, as in an ONNX file.

    Attributes:
        macs: Multiply-accumulates of matrix products and convolutions, for one sample.
        bytes: Of the model's file, or of its weights.
        memory: Peak bytes during a forward pass of the large batch, weights included.
        latency: At batch 1, and at a large batch.
    """

    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    memory: int | None = None
    latency: list[Latency] = field(default_factory=list)


@dataclass
class ModelResult:
    """All that was measured of one model.

    Attributes:
        role: 'teacher', 'baseline' or 'student'.
        kind: Such as the name of its class or file.
        loss: The task's own loss.
        metrics: The Learner's own.
        agreement: With the teacher.
        reliability: For each bin of confidence: count, confidence, right.
        classes: 'recall' and, for masks, 'iou' of each class.
        history: Column of the training's table -> a number for each epoch.
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
        """The mean distance of confidence and accuracy over the bins (ECE); None for numbers."""
        b = self.reliability
        if not b or not sum(b['count']):
            return None
        return sum(abs(c - r) for c, r in zip(b['confidence'], b['right'])) / sum(b['count'])


class JsonReport:
    """A dataclass with a field `format` that is written as JSON, and read again."""

    called = 'report'  # in messages
    inside = {}  # as `INSIDE`, of this class alone

    def to_json(self, path=None) -> str | Path:
        """The report as JSON: the path, if it is written there, else its text.

        Args:
            path: Where to write it; None: return it as text.
        """
        return write_text(
            json.dumps(finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + '\n',
            path,
        )

    @classmethod
    def from_json(cls, source):
        """The report that `to_json` wrote.

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
    """Models measured side by side on the same samples: data only, to JSON and back.

    Attributes:
        task: 'softmax', 'sigmoid' or 'regression'.
        headline: The measure by which the models are compared first.
        n: Samples.
        unit: What they are: images, texts, rows ...
        info: Measure -> its name and direction.
        teacher: Name of the model that is the teacher.
        baseline: Name of the model that was trained without it.
        classes: Names of the classes.
        counts: Samples, or positions, of each class.
        machine: Where the times were measured, and with which versions.
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
        """The comparison of two models; None if they were not compared.

        Args:
            against: None: the baseline.
        """
        against = against or self.baseline
        return next((c for c in self.comparisons if (c.model, c.against) == (model, against)), None)

    @property
    def class_measure(self):
        """What is measured of each class: 'iou' of masks, else 'recall'."""
        return 'iou' if any('iou' in m.classes for m in self.models.values()) else 'recall'

    def class_changes(self) -> list:
        """(class, its number, measure of the baseline, of the first student, change), largest gain
        first. Empty without a baseline.
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
    """Write a text and return the path; without a path, return the text."""
    if path is None:
        return text
    path = Path(path)
    path.write_text(text, encoding='utf-8')
    return path


def read(cls, path):
    if path.is_file():
        return path.read_text(encoding='utf-8')
    raise DistillError(f'There is no file {str(path)!r}. {cls.__name__}.to_json(path) writes one.')


def finite(o):
    """Plain data without nan and infinity, which JSON does not have."""
    if isinstance(o, float):
        return o if math.isfinite(o) else None
    if isinstance(o, dict):
        return {k: finite(v) for k, v in o.items()}
    return [finite(v) for v in o] if isinstance(o, (list, tuple)) else o


# the dataclasses inside a report: field -> (class, is it a dict, a list or the object itself?)
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
    """The dataclass `cls` from plain data."""
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
