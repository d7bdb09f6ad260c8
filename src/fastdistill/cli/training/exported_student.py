"Load the exported student of a run together with the data of the run, or build the student again."

import os
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from ...base.errors import DistillError, few_names
from ...fastai.class_names import check_same_data, vocab_of
from ...fastai.raw_items import given_items
from .architectures import learner_of
from .config import TrainConfig, config_of_run
from .data_checks import checked_samples
from .data_files import Samples, read_samples
from .data_fingerprint import SPLIT, split_table
from .dataloaders import TEXT, loaders_of
from .resumable_fit import seed_everything
from .teachers import file_teacher

# numbers for seeding. All students of a run use the same number, so that they have the same initial
# weights and batches
FOR_TEACHER, FOR_STUDENT = 1, 2


def learner_in_file(path: Path | str, dls: Any = None) -> Any:
    """Load an exported Learner and set its DataLoaders.

    Args:
        path: Path of an exported Learner (.pkl).
        dls: DataLoaders for the Learner. None for the DataLoaders of the run that wrote the file.
    """
    learn = file_teacher(str(path))
    if not hasattr(learn, 'dls'):
        raise DistillError(f'{path} contains a {type(learn).__name__}, not an exported Learner.')
    if dls is not None:
        check_same_data(learn.dls, dls, str(path))
    if dls is None:
        s, config, dls = run_of(Path(path), learn)
        check_not_trained_on(Path(path), s, config)
    learn.dls = dls
    learn.model.to(learn.dls.device)
    return learn


def new_student(path: Path | str) -> Any:
    """Build the student of a run again, with the initial weights that `fastdistill train` uses.

    Args:
        path: Path of the exported Learner in the folder of the run.
    """
    s, config, dls = run_of(Path(path), file_teacher(str(path)))
    seed_everything(config.seed, FOR_STUDENT)
    learn = learner_of(config.arch('student'), dls, s, config, config.pretrained)
    if config.lr != 'auto':
        learn.lr = config.lr
    return learn


def run_of(path: Path, learn: Any) -> tuple[Samples, TrainConfig, Any]:
    """Return the samples, settings and DataLoaders of the run that exported a Learner."""
    if not (path.parent / 'config.toml').is_file():
        raise DistillError(
            f'{path} is an exported Learner, which contains no data, and it is not in the folder of a run. '
            "Pass the data: data='train.py:dls'."
        )
    config = replace(config_of_run(path.parent), device='auto')
    s = checked_samples(read_samples(config), config)
    dls = loaders_of(s, config, learn if s.task in ('texts', 'table') else None)
    if (now := vocab_of(dls)) != (own := vocab_of(learn.dls)):
        ours, theirs = (few_names(o or ['none'], 10) for o in (now, own))
        raise DistillError(
            f'{config.data} has changed since {path} was trained: its classes are {ours}, but the model '
            f'predicts {theirs}.'
        )
    return s, config, dls


def check_not_trained_on(path: Path, s: Samples, config: TrainConfig) -> None:
    """Raise a DistillError if validation samples were training samples in the run, which happens if
    the data changed.

    Args:
        path: Path of the exported Learner in the folder of the run.
        s: Samples of the run, as they are now.
        config: Settings of the run.
    """
    if not (path.parent / SPLIT).is_file():
        return
    texts = (path.parent / SPLIT).read_text(encoding='utf-8'), split_table(s)
    then, now = (pd.read_csv(StringIO(o), dtype=str, na_filter=False) for o in texts)
    name = then.columns[0]
    if 'content' in then and {*then['content']} & {*now['content']}:
        name = 'content'  # the rows may have a different order
    names = lambda t, k: {*t[name][t['set'] == k]}
    if name == 'file' and not {*then[name]} & {*now[name]}:  # the data are in a different place
        for t in (then, now):
            t[name] = [os.path.relpath(o, os.path.commonpath([*t[name]])) for o in t[name]]
    held = names(now, 'valid')
    if known := held & names(then, 'train') - names(then, 'valid'):
        rows = now[now[name].isin(known) & (now['set'] == 'valid')]
        first, column = [*rows[now.columns[0]]], now.columns[0]
        raise DistillError(
            f'{config.data} changed since {path} was trained: {len(known):,} of {len(held):,} validation '
            f'samples were training samples of the run ({column} {few_names(first)}), so its score would be '
            "too high. Restore the data, or give samples on which it was not trained: data='train.py:dls'."
        )


def reads_texts(learn: Any) -> bool:
    """Return True if the data of a Learner are the texts of a run."""
    return TEXT in getattr(given_items(learn.dls.valid_ds), 'columns', ())
