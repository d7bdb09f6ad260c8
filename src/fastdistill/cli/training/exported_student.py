"Load the exported student of a run together with the data of the run."

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...base.errors import DistillError
from ...fastai.class_names import check_same_data, vocab_of
from .config import TrainConfig, read_config
from .data_checks import checked_samples
from .data_files import read_samples
from .dataloaders import loaders_of
from .teachers import file_teacher

__all__ = ['learner_in_file']


def learner_in_file(path: Path | str, dls: Any = None) -> Any:
    """Load an exported Learner and set its DataLoaders.

    Args:
        path: Path of an exported Learner (.pkl).
        dls: DataLoaders for the Learner. None for those of the run that wrote the file.
    """
    learn = file_teacher(str(path))
    if not hasattr(learn, 'dls'):
        raise DistillError(f'{path} holds a {type(learn).__name__}, not an exported Learner.')
    if dls is not None:
        check_same_data(learn.dls, dls, str(path))
    learn.dls = data_of_run(Path(path), learn) if dls is None else dls
    learn.model.to(learn.dls.device)
    return learn


def data_of_run(path: Path, learn: Any) -> Any:
    settings = path.parent / 'config.toml'
    if not settings.is_file():
        raise DistillError(
            f'{path} is an exported Learner, which holds no data, and it is not in the folder of a run. '
            "Give the data: data='train.py:dls'."
        )
    config = replace(TrainConfig(**read_config(settings)), device='auto')
    s = checked_samples(read_samples(config), config)
    dls = loaders_of(s, config, learn if s.task in ('texts', 'table') else None)
    if (now := vocab_of(dls)) != (own := vocab_of(learn.dls)):
        raise DistillError(
            f'{config.data} changed since {path} was trained: its classes are {first_classes(now)}, but '
            f'the model predicts {first_classes(own)}.'
        )
    return dls


def first_classes(classes: Any) -> str:
    return ', '.join(map(str, (classes or ['none'])[:10]))
