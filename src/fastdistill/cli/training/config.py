"Settings of a run, which can be given as flags or read from a TOML file."

import json
import math
import os
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...base.atomic_files import check_regular_file, write_atomically
from ...base.errors import DistillError, close_name

TRAIN_TASKS = 'images', 'masks', 'texts', 'table'
AUGMENTATIONS = 'flip', 'full', 'none'
WIDEST = 65536  # maximum size of a layer
FILES = '.pkl', '.joblib', '.pt', '.pth', '.pt2', '.onnx', '.safetensors'
LOGGERS = 'csv', 'tensorboard'  # in addition to history.csv, which is always written


@dataclass(frozen=True)
class Arch:
    """An architecture, specified by its name and the sizes of its layers. If `layers` is None, the
    default sizes are used.
    """

    name: str
    layers: list[int] | None = None
    option: str = 'student_layers'  # name of the option with the sizes of the layers, for messages

    @property
    def layers_in_words(self) -> str:
        return ','.join(map(str, self.layers or []))

    def __str__(self) -> str:
        return ' '.join(filter(None, [self.name, self.layers_in_words]))


@dataclass
class TrainConfig:
    """Settings of `fastdistill train`. The command has a flag for each setting, with the text below as
    its help.

    Attributes:
        data: Folder or CSV file.
        teacher: Architecture to train first, a file (Learner .pkl, trees .joblib ...), or the folder
            of a run, whose student becomes the teacher.
        student: Architecture: resnet18, mobilenet_v3_small, cnn, awd_lstm, tabular ...
        teacher_layers: Layer sizes of a cnn, awd_lstm, embedding_bag or tabular teacher, such as
            '64,32'.
        student_layers: Layer sizes of the student, in the same form.
        teacher_weights: A .safetensors file with weights for the teacher's architecture, which is
            then not trained.
        task: images, masks, texts or table. auto infers it from the data.
        recipe: Such as 'kd(T=4, alpha=.9) + at()'.
        epochs: Number of epochs to train each model.
        teacher_epochs: Number of epochs to train the teacher. 0 for the same number as the student.
        lr: Learning rate of the students. auto finds one with short training runs.
        teacher_lr: Learning rate of the teacher, in the same form.
        x: Column with the input. For a table, several columns separated by commas.
        y: Column with the label.
        delimiter: Delimiter between the labels of a sample, if it has several.
        header: Whether the CSV file begins with the names of its columns.
        valid: Validation set: a fraction, a column that marks it, or a CSV file.
        ignore: Class or value of masks to ignore, such as 255. If empty, a class named void, ignore
            or unlabeled is ignored.
        y_range: Lowest and highest number to predict, such as '0,100'. If empty, there are no
            limits.
        size: Size of images: 224, or 72x96 (height, width).
        augment: Augmentation of images: flip, full (also rotation, zoom, lighting) or none.
        batch_size: Batch size. 0 for 64 images or texts, 8 masks, or 256 rows of a table.
        pretrained: Start with published weights, which are downloaded.
        baseline: Also train the student without the teacher.
        check: Check the teacher for mistakes first.
        onnx: Also write the student as ONNX, if it can be exported.
        seed: Seed of all random numbers.
        seeds: Number of seeds to train each student with, to see how the gain varies.
        device: cpu, cuda, cuda:1, mps ...
        workers: Processes that load data.
        log: tensorboard; history.csv is always written.
    """

    data: str
    teacher: str
    student: str
    teacher_layers: str = ''
    student_layers: str = ''
    teacher_weights: str = ''
    task: str = 'auto'
    recipe: str = 'auto'
    epochs: int = 10
    teacher_epochs: int = 0
    lr: float | str = 'auto'
    teacher_lr: float | str = 'auto'
    x: str = ''
    y: str = ''
    delimiter: str = ''
    header: bool = True
    valid: str = '0.2'
    ignore: str = ''
    y_range: str = ''
    size: str = 'auto'
    augment: str = 'flip'
    batch_size: int = 0
    pretrained: bool = False
    baseline: bool = True
    check: bool = True
    onnx: bool = True
    seed: int = 0
    seeds: int = 1
    device: str = 'auto'
    workers: int = 0
    log: str = ''

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, checked_type(f.name, getattr(self, f.name), f.type))
        for k in ('data', 'teacher', 'student'):
            if not getattr(self, k):
                raise DistillError(f"{k}='': the data, a teacher and a student are needed.")
        for k, have in dict(task=('auto', *TRAIN_TASKS), augment=AUGMENTATIONS).items():
            if (v := getattr(self, k)) not in have:
                raise DistillError(
                    f'{k}={v!r}: must be one of {", ".join(have)}{close_name(v, have)}'
                )
        for k, v in dict(
            epochs=1, teacher_epochs=0, batch_size=0, workers=0, seed=0, seeds=1
        ).items():
            if not v <= getattr(self, k) < 2**31:
                raise DistillError(f'{k}={getattr(self, k)}: must be at least {v}')
        if self.seeds > 1 and not self.baseline:
            raise DistillError(
                f'seeds={self.seeds}, baseline=False: several seeds show how much the difference between '
                'the students with and without the teacher varies. Omit one of the two options.'
            )
        for k in ('lr', 'teacher_lr'):
            self.check_rate(k)
        if wrong := [o for o in self.loggers if o not in LOGGERS]:
            raise DistillError(f'log={wrong[0]!r}: must be one of {", ".join(LOGGERS)}')
        self.parts_of_size()
        self.limits()
        self.arch('teacher')
        self.arch('student')

    def arch(self, role: str) -> Arch:
        """Return the architecture of the teacher or the student, with the sizes of its layers.

        Args:
            role: 'teacher' or 'student'.
        """
        option = f'{role}_layers'
        text = getattr(self, option)
        sizes = [o.strip() for o in text.split(',')] if text else []
        if not all(o.isdecimal() and len(o) < 6 and 0 < int(o) <= WIDEST for o in sizes):
            raise DistillError(
                f'{option}={text!r}: must be whole numbers from 1 to {WIDEST}, separated by commas, '
                "such as '64,32'"
            )
        if text and role == 'teacher' and self.teacher_file:
            raise DistillError(
                f'{option}={text!r}: the teacher is a file, so its layers are fixed. Omit this option.'
            )
        return Arch(getattr(self, role), [int(o) for o in sizes] or None, option)

    def check_rate(self, k: str) -> None:
        v = getattr(self, k)
        if v == 'auto':
            return
        try:
            v = float(v)
        except ValueError:
            v = math.nan
        if not 0 < v < 1e6:
            raise DistillError(
                f"{k}={getattr(self, k)!r}: a learning rate must be a number above 0, or 'auto'"
            )
        setattr(self, k, v)

    @property
    def all_seeds(self) -> list[int]:
        """Seeds of the students."""
        return [self.seed + i for i in range(self.seeds)]

    @property
    def loggers(self) -> list[str]:
        return [o.strip() for o in self.log.split(',') if o.strip()]

    @property
    def teacher_file(self) -> bool:
        "True if the teacher is a file instead of an architecture."
        return Path(self.teacher).suffix in FILES or os.sep in self.teacher

    @property
    def teacher_files(self) -> dict[str, Path]:
        "Files of a teacher that is not trained by the run, as {setting: path}."
        files = dict(
            teacher=self.teacher if self.teacher_file else '',
            teacher_weights=self.teacher_weights,
        )
        return {k: Path(v) for k, v in files.items() if v}

    def check_files(self) -> None:
        """Check that all files named in the settings exist."""
        check_data_path(self.data)
        if Path(self.student).suffix in FILES or '.py:' in self.student:
            raise DistillError(
                f'student={self.student!r}: the student of a run is trained from scratch, so this '
                "must be an architecture, such as 'resnet18'."
            )
        if '.py:' in self.teacher:
            raise DistillError(
                f'teacher={self.teacher!r}: the teacher must be a file that can be loaded again when the '
                "run resumes. Write one with learn.export('teacher.pkl')."
            )
        for file in self.teacher_files.values():
            check_regular_file(file)
        if self.teacher_weights and not Path(self.teacher_weights).is_file():
            raise DistillError(f'There is no file {self.teacher_weights!r}.')
        if not self.teacher_file:
            return
        if not Path(self.teacher).is_file():
            raise DistillError(
                f'There is no file {self.teacher!r}. teacher= is a file or an architecture.'
            )
        if Path(self.teacher).suffix == '.safetensors':
            raise DistillError(
                f'{self.teacher} contains weights, but no architecture. Pass both, as in '
                f"teacher='resnet34', teacher_weights={self.teacher!r}."
            )

    def absolute(self) -> 'TrainConfig':
        """Return the settings with absolute paths, so that they do not depend on the current
        folder.
        """
        c = replace(self, teacher=exported_student(self.teacher))
        given = dict(
            data=True,
            teacher=c.teacher_file,
            teacher_weights=c.teacher_weights,
            valid=Path(c.valid).is_file(),
        )
        return replace(
            c, **{k: os.path.abspath(getattr(c, k)) for k, is_path in given.items() if is_path}
        )

    def parts_of_size(self) -> tuple[int, int] | None:
        """Return (height, width), or None if the size is to be determined from the images."""
        if self.size == 'auto':
            return None
        h, _, w = self.size.partition('x')
        if (
            not h.isdecimal()
            or not (w or h).isdecimal()
            or not all(8 <= int(o) <= 8192 for o in (h, w or h))
        ):
            raise DistillError(
                f"size={self.size!r}: must be 'auto', pixels such as 224, or height and width such "
                'as 72x96, from 8 to 8192'
            )
        return int(h), int(w or h)

    def limits(self) -> tuple[float, float] | None:
        """Return the lowest and the highest number that the models predict. Return None if there are
        no limits.
        """
        if not self.y_range:
            return None
        try:
            low, high = map(float, self.y_range.split(','))
        except ValueError:
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            raise DistillError(
                f'y_range={self.y_range!r}: must be the lowest and the highest number, separated by a '
                "comma, such as '0,100'"
            )
        return low, high


def check_data_path(path: str) -> None:
    check_regular_file(path)
    if not Path(path).exists():
        raise DistillError(f'There is no file or folder {str(path)!r}.')


def exported_student(path: str) -> str:
    """If `path` is the folder of a run, return the path of the exported student. Return any other
    path unchanged.

    Args:
        path: Path of a model.
    """
    file = Path(path) / 'student.pkl'
    if file.is_file():
        return str(file)
    if not (Path(path) / 'config.toml').is_file():
        return path
    raise DistillError(
        f'The run in {path} is not finished: it has no student.pkl. Continue it with fastdistill train '
        f'--resume --out {path}'
    )


def checked_type(name: str, v: Any, of: Any) -> Any:
    """Return the value of a setting. Raise a DistillError if the value does not have the type of
    its field. An int is valid for a float.
    """
    if not isinstance(of, type) and isinstance(v, int | float | str) and not isinstance(v, bool):
        return v
    if isinstance(v, str) and of is str:
        # subtle: a command line may contain bytes that are not UTF-8, and a file may contain null
        # bytes, which are not allowed in paths
        try:
            v.encode()
        except UnicodeEncodeError:
            raise DistillError(f'{name}={v!r}: this text is not UTF-8') from None
        if '\0' not in v:
            return v
        raise DistillError(f'{name}={v!r}: this text has a null byte')
    if isinstance(of, type) and type(v) is of:
        return v
    raise DistillError(f'{name}={v!r}: must be of type {getattr(of, "__name__", "number or text")}')


def read_config(path: Path | str) -> dict:
    """Read settings from a TOML file.

    Args:
        path: Path of a TOML file.
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise DistillError(
            f'There is no settings file {str(path)!r}. Each run writes one: config.toml.'
        ) from e
    except UnicodeDecodeError as e:
        raise DistillError(f'{path} is not a text file: {e}') from e
    try:
        got = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise DistillError(f'{path} is not a TOML file: {e}') from e
    if not got:
        raise DistillError(
            f'{path} has no settings: at least data, teacher and student are needed, as in '
            "data = 'photos'."
        )
    have = [f.name for f in fields(TrainConfig)]
    if wrong := [k for k in got if k not in have]:
        raise DistillError(
            f'{path}: there is no setting {wrong[0]!r}{close_name(wrong[0], have)}. It must be one of '
            f'{", ".join(have)}'
        )
    return got


def config_of_run(folder: Path) -> TrainConfig:
    """Return the settings of a run.

    Args:
        folder: Folder of the run.
    """
    path = folder / 'config.toml'
    settings = read_config(path)
    if missing := [
        f.name for f in fields(TrainConfig) if f.default is MISSING and f.name not in settings
    ]:
        raise DistillError(f'{path} has no setting {missing[0]!r}: restore it to use this run.')
    return TrainConfig(**settings)


def write_config(config: TrainConfig, path: Path | str) -> None:
    """Write settings to a TOML file."""
    lines = ['# repeats this run: fastdistill train --config FILE']
    lines += [f'{k} = {toml_value(v)}' for k, v in asdict(config).items()]
    write_atomically(path, '\n'.join(lines) + '\n')


def toml_value(v: Any) -> str:
    # subtle: JSON escapes strings as TOML does, except for one character
    return json.dumps(v, ensure_ascii=False).replace('\x7f', '\\u007f')
