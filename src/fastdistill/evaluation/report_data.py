"""Dataclasses for the results of a comparison, which can be converted to JSON and back."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Self, cast, get_args, get_origin, get_type_hints

from ..base.atomic_files import file_errors, write_atomically
from ..base.errors import DistillError

CLASS_MEASURES = dict(ap='average precision', iou='IoU', recall='recall')
REPORT_FORMAT = 1  # version of the JSON format


@dataclass
class Estimate:
    """A number and its 95% bootstrap interval. All values are None if there is nothing to measure."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class MeasureInfo:
    """Name of a measure, with information for formatting and comparing its values.

    Attributes:
        higher: True if higher values are better.
        percent: True for a fraction from 0 to 1, shown as a percentage.
    """

    label: str
    higher: bool = True
    percent: bool = False

    def text(self, value: float | None, sign: bool = False) -> str:
        """Format a value without its unit."""
        if value is None:
            return '–'
        v = 100 * value if self.percent else value
        digits = (2 if 0 < abs(v) < 0.1 else 1) if self.percent else decimals(v)
        return f'{v:{"+" if sign else ""}.{digits}f}'

    @property
    def points(self) -> str:
        return ' points' if self.percent else ''

    @property
    def unit(self) -> str:
        return '%' if self.percent else ''


def decimals(v: float) -> int:
    """Return the number of decimals needed for about four significant digits."""
    return 2 if abs(v) >= 10 else 3 if abs(v) >= 1 else 4


@dataclass
class Difference(Estimate):
    """The difference between two models on the same samples, with the result of a significance
    test.

    Attributes:
        p: Probability of a difference at least this large if both models were equally good.
        test: "McNemar's exact test" or 'paired permutation test'.
    """

    p: float | None = None
    test: str = ''

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < 0.05

    def verdict(self, higher: bool) -> str:
        """Return 'better', 'worse' or 'not significant'.

        Args:
            higher: True if higher values are better.
        """
        if not self.significant or not self.value:
            return 'not significant'
        return 'better' if (self.value > 0) == higher else 'worse'


@dataclass
class Comparison:
    """Comparison of two models on the same samples.

    Attributes:
        differences: {measure: value of `model` minus value of `against`}.
        recovered: {measure: fraction of the teacher's lead that the model recovers}. Only measures
            in which the teacher has a significant lead are included.
    """

    model: str
    against: str
    differences: dict[str, Difference] = field(default_factory=dict)
    recovered: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class SeedResults:
    """Scores of two students, each trained with several seeds. Empty if there is only one student.

    Attributes:
        values: {model: headline measure for each seed}. The first model is the baseline. With the
            same seed, both models have the same initial weights and batches.
        difference: Mean difference over the seeds.
    """

    seeds: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    difference: Difference = field(default_factory=Difference)


@dataclass
class Latency:
    """Times of one forward pass.

    Attributes:
        batch: Batch size.
        p50: Median time in milliseconds.
    """

    batch: int
    p50: float
    p95: float
    runs: int

    @property
    def per_second(self) -> float:
        return 1000 * self.batch / self.p50


@dataclass
class Cost:
    """Cost of a model. Values that can't be measured, e.g. for an ONNX file, are None.

    Attributes:
        macs: Multiply-accumulates of matrix products and convolutions, per sample.
        bytes: Size of the model's file, or of its weights.
        memory: Peak memory of a forward pass with the large batch in bytes, including weights.
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
        kind: Kind of model, e.g. the name of its class or file.
        loss: The task loss.
        metrics: {name: value} of the metrics of the Learner.
        agreement: {name: value} of the agreement with the teacher.
        reliability: {'count', 'confidence' or 'right': value for each confidence bin}. 'confidence'
            is the sum of confidences.
        classes: {'recall', 'precision', 'iou' or 'ap': value for each class}. 'iou' is available
            only for masks. For boxes, only 'ap' is available.
        history: {column of the training table: [value after each epoch]}.
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
    def calibration_error(self) -> float | None:
        """Expected calibration error (ECE), i.e. the mean distance between confidence and accuracy
        over the bins. None for regression.
        """
        b = self.reliability
        return calibration_error(b['count'], b['confidence'], b['right']) if b else None


def calibration_error(
    count: Sequence[float], confidence: Sequence[float], right: Sequence[float]
) -> float | None:
    """Compute the expected calibration error (ECE). Return None if there are no predictions.

    Args:
        count: Number of predictions in each bin of confidence.
        confidence: Sum of the confidences in each bin.
        right: Number of correct predictions in each bin.
    """
    if not sum(count):
        return None
    return sum(abs(c - r) for c, r in zip(confidence, right)) / sum(count)


class JsonReport:
    """Base class for dataclasses that can be written as JSON and read back. Subclasses must have a
    field `format`.
    """

    called = 'report'  # name in messages
    format: int

    def to_json(self, path: str | Path | None = None) -> str | Path:
        """Convert the report to JSON. Return the path if a file was written, or else the JSON text.

        Args:
            path: File to write. None to return the JSON text.
        """
        return write_text(
            json.dumps(
                finite(asdict(cast(Any, self))), indent=1, ensure_ascii=False, allow_nan=False
            )
            + '\n',
            path,
        )

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read a report written by `to_json`.

        Args:
            source: Path of a file, or the JSON text itself.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith('{')
        path = None if is_text else Path(source)
        if path is not None and not path.is_file():
            raise DistillError(
                f'There is no file {str(source)!r}. {cls.__name__}.to_json(path) writes one.'
            )
        try:
            data = json.loads(str(source) if path is None else path.read_text(encoding='utf-8'))
        except (ValueError, RecursionError) as e:
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
    """Results of models measured on the same samples, which can be converted to JSON and back.

    Attributes:
        task: 'softmax', 'sigmoid', 'regression' or 'detection'.
        headline: Main measure, on which the verdicts are based.
        n: Number of samples.
        unit: What to call the samples in texts, e.g. images or rows.
        info: {measure: `MeasureInfo`}.
        teacher: Name of the teacher.
        baseline: Name of the model that was trained without the teacher.
        classes: Names of the classes.
        counts: Number of samples, or positions, of each class.
        machine: Machine and package versions with which the times were measured.
        seeds: Scores of the students for each seed, if the report is about training runs. All
            other results are about the students trained with the first seed.
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
    seeds: SeedResults = field(default_factory=SeedResults)
    format: int = REPORT_FORMAT

    @property
    def students(self) -> list[str]:
        return [n for n, m in self.models.items() if m.role != 'teacher']

    def comparison(self, model: str, against: str | None = None) -> Comparison | None:
        """Return the comparison of two models. Return None if they were not compared.

        Args:
            model: Name of a model.
            against: Name of the model to compare with. None for the baseline.
        """
        against = against or self.baseline
        return next((c for c in self.comparisons if (c.model, c.against) == (model, against)), None)

    @property
    def class_measure(self) -> str:
        """Measure used to compare classes: 'ap' for boxes, 'iou' for masks, or else 'recall'."""
        has = lambda k: any(k in m.classes for m in self.models.values())
        return next((k for k in CLASS_MEASURES if has(k)), 'recall')

    def class_changes(self) -> list:
        """Return (class, index, baseline value, value of the first student, change) for each class.

        The list is sorted by change, with the largest gain first. The list is empty if there is no
        baseline.
        """
        model = next((n for n in self.students if n != self.baseline), None)
        if model is None or self.baseline is None:
            return []
        a, b = (self.models[n].classes.get(self.class_measure, []) for n in (self.baseline, model))
        rows = [
            (c, i, x, y, y - x)
            for i, (c, x, y) in enumerate(zip(self.classes, a, b))
            if None not in (x, y)
        ]
        return sorted(rows, key=lambda o: -o[-1])


def write_text(text: str, path: str | Path | None) -> str | Path:
    """Write a text to a file and return the path. If `path` is None, return the text."""
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


def finite(o: Any) -> Any:
    """Replace nan and infinity with None, because JSON does not support them."""
    if isinstance(o, float):
        return o if math.isfinite(o) else None
    if isinstance(o, dict):
        return {k: finite(v) for k, v in o.items()}
    return [finite(v) for v in o] if isinstance(o, (list, tuple)) else o


def built(of: Any, data: Any) -> Any:
    """Build a value of type `of`, which may contain nested dataclasses, from plain data."""
    args = get_args(of)
    if get_origin(of) is dict:
        return {k: built(args[1], v) for k, v in data.items()}
    if get_origin(of) is list:
        return [built(args[0], v) for v in data]
    types = get_type_hints(of) if is_dataclass(of) else None
    if types is None:
        return data
    if not isinstance(data, dict) or (wrong := set(data) - set(types)):
        what = (
            f'has the unknown field(s) {", ".join(sorted(wrong))}'
            if isinstance(data, dict)
            else f'is a {type(data).__name__}'
        )
        raise TypeError(f'its {of.__name__} {what}')
    return of(**{k: built(types[k], v) for k, v in data.items()})
