"Read and check the data of a run. They must not change until the run ends."

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastai.tabular.core import cont_cat_split

from ...base.errors import DistillError, few_names
from ...teachers.estimator import is_estimator
from .architectures import check_arch
from .config import TrainConfig
from .data_checks import checked_samples
from .data_files import Samples, read_samples
from .data_fingerprint import SPLIT, check_data_unchanged, data_fingerprint, split_table

MAY_KNOW = (
    'The teacher may have been trained on some of these validation samples, which were chosen at random, so '
    'its score may be too high. --valid can specify the samples that it was not trained on.'
)


@dataclass
class RunData:
    """Data of a run.

    Attributes:
        samples: The samples, from `checked_samples`.
        split: Content of split.csv.
        fingerprint: Result of `data_fingerprint`.
        note: Note for the report if the teacher may have been trained on the validation set.
            Otherwise empty.
    """

    samples: Samples
    split: str
    fingerprint: dict
    note: str


def data_of_run(config: TrainConfig, folder: Path, loaded: Any) -> RunData:
    """Read and check the data of a run.

    Args:
        config: Settings of the run.
        folder: Folder of the run.
        loaded: Teacher from `file_teacher`, or None.
    """
    s = read_samples(config)
    if is_estimator(loaded) and s.task not in ('table', 'texts'):
        raise DistillError(
            f'{config.teacher} contains an estimator ({type(loaded).__name__}), which reads the rows of a '
            f'table or texts, but {config.data} contains {s.task}.'
        )
    check_arch(config.arch('student'), s.task)
    if loaded is None:
        check_arch(config.arch('teacher'), s.task)
    checked = checked_samples(s, config)
    split = split_table(checked)
    # the teacher of a previous run was trained on the split in the folder of that run
    known = lambda p: p.is_file() and p.read_text(encoding='utf-8') == split
    files = config.teacher_files.values() if s.valid is None else ()
    note = '' if all(known(p.parent / SPLIT) for p in files) else MAY_KNOW
    fingerprint = data_fingerprint(checked, s.valid, config)
    check_data_unchanged(folder, fingerprint)
    return RunData(checked, split, fingerprint, note)


def samples_in_words(s: Samples) -> str:
    """Describe the samples in one line of text."""
    held = int(s.valid.sum())
    what = {
        'classes': f'{len(s.classes or [])} classes ({few_names(s.classes or [])})',
        'labels': f'{len(s.classes or [])} labels ({few_names(s.classes or [])})',
        'numbers': f'numbers of column {s.y}',
    }[s.target]
    x = f'column {s.x[0]}'
    if s.task == 'table':
        numbers, categories = map(len, cont_cat_split(s.frame[s.x]))
        x = f'{categories} {"category" if categories == 1 else "categories"}'
        x += f', {numbers} {"number" if numbers == 1 else "numbers"}'
    x = f', {s.size[0]} x {s.size[1]} pixels' if s.size else f', {x}'
    if s.ignored is not None:
        name = s.classes[s.ignored] if s.ignored < len(s.classes) else s.ignored
        what += f', {name} ignored (foreground_acc: accuracy of the other pixels)'
    return f'{s.task}{x}, {what}; {len(s) - held:,} samples for training, {held:,} for validation'
