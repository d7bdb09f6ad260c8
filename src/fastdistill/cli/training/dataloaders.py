"Build fastai DataLoaders from samples."

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.basics import (
    CategoryBlock,
    ColReader,
    DataBlock,
    DataLoaders,
    IndexSplitter,
    Pipeline,
    RegressionBlock,
    default_device,
    parent_label,
)
from fastai.data.block import MultiCategoryBlock
from fastai.data.transforms import Normalize
from fastai.tabular.core import Categorify, FillMissing, TabularPandas, cont_cat_split
from fastai.text.data import TextDataLoaders
from fastai.vision.augment import Flip, Resize, ResizeMethod, aug_transforms
from fastai.vision.core import imagenet_stats, load_image
from fastai.vision.data import ImageBlock, MaskBlock

from ...base.distributed import world_size
from ...base.errors import DistillError, few_names
from .config import TrainConfig
from .data_files import Samples

TEXT = 'input'  # column of the texts in the table of the DataLoaders
BATCH = dict(images=64, masks=8, texts=64, table=256)


def loaders_of(s: Samples, config: TrainConfig, teacher: Any = None) -> DataLoaders:
    """Build fastai DataLoaders. The batches depend only on the random states of Python, NumPy and
    PyTorch.

    Args:
        s: `Samples` returned by `checked_samples`.
        config: A TrainConfig.
        teacher: An exported Learner whose vocabulary is used for texts and tables, or None.
    """
    n = int((~s.valid).sum())
    options = dict(
        bs=min(config.batch_size or BATCH[s.task], n // world_size()),
        device=device_of(config),
        num_workers=config.workers,
    )
    make = dict(images=image_loaders, masks=mask_loaders, texts=text_loaders, table=table_loaders)[
        s.task
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=FutureWarning)
        return make(s, config, teacher, **options)


def device_of(config: TrainConfig) -> Any:
    if config.device == 'auto':
        return default_device()
    try:
        device = torch.empty(0, device=config.device).device
    # subtle: unknown devices and unavailable devices raise different errors in PyTorch
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise DistillError(f'device={config.device!r}: {str(e).splitlines()[0]}') from e
    if device.type == 'meta':
        raise DistillError(
            "device='meta' stores shapes without values, so nothing can be trained on it: use cpu, cuda "
            'or mps.'
        )
    return device


def label_block(s: Samples) -> Any:
    if s.target == 'numbers':
        return RegressionBlock()
    return (
        MultiCategoryBlock(vocab=s.classes)
        if s.target == 'labels'
        else CategoryBlock(vocab=s.classes)
    )


def image_transforms(s: Samples, config: TrainConfig) -> dict[str, Any]:
    """Return the transforms of items and batches, as arguments of a `DataBlock`."""
    method = ResizeMethod.Squish if s.task == 'masks' else ResizeMethod.Crop
    extra = dict(none=[], flip=[Flip()], full=aug_transforms())[config.augment]
    batch_tfms = [*extra, Normalize.from_stats(*imagenet_stats)]
    return dict(item_tfms=Resize(s.size, method=method), batch_tfms=batch_tfms)


def image_loaders(s: Samples, config: TrainConfig, teacher: Any, **options: Any) -> DataLoaders:
    tfms = image_transforms(s, config)
    x, y = s.x[0], s.y
    splitter = IndexSplitter(np.flatnonzero(s.valid).tolist())
    if s.y == 'y' and not isinstance(s.frame[x].iloc[0], bytes) and folder_names(s):
        # use paths as items, so that the exported Learner can predict from a path
        block = DataBlock(
            (ImageBlock, label_block(s)),
            get_y=parent_label,
            splitter=splitter,
            **tfms,
        )
        return block.dataloaders([*map(Path, s.frame[x])], **options)
    block = DataBlock(
        (ImageBlock, label_block(s)),
        get_x=ColReader(x),
        splitter=splitter,
        get_y=ColReader(y, label_delim=s.delimiter or None),
        **tfms,
    )
    return block.dataloaders(s.frame[[*s.x, s.y]], **options)


def folder_names(s: Samples) -> bool:
    "Return True if the class of each image is the name of its folder."
    return not s.delimiter and all(
        Path(p).parent.name == y for p, y in zip(s.frame[s.x[0]], s.frame[s.y])
    )


def mask_loaders(s: Samples, config: TrainConfig, teacher: Any, **options: Any) -> DataLoaders:
    block = DataBlock(
        (ImageBlock, MaskBlock(codes=s.classes)),
        get_x=ColReader('x'),
        # subtle: keep the mode of the file, because fastai would convert a palette to grey levels
        get_y=Pipeline([ColReader('y'), load_image]),
        splitter=IndexSplitter(np.flatnonzero(s.valid).tolist()),
        **image_transforms(s, config),
    )
    return block.dataloaders(s.frame[[*s.x, s.y]], **options)


def text_loaders(s: Samples, config: TrainConfig, teacher: Any, **options: Any) -> DataLoaders:
    # subtle: rename the columns first, because one of them may be called is_valid
    frame = s.frame[[*s.x, s.y]].rename(columns={s.x[0]: TEXT, s.y: 'label'})
    frame['is_valid'] = s.valid
    vocab = None if teacher is None else known(teacher, 'texts', lambda dls: dls.vocab[0])
    return TextDataLoaders.from_df(
        frame,
        Path(),
        text_col=TEXT,
        label_col='label',
        label_delim=s.delimiter or None,
        y_block=label_block(s),
        valid_col='is_valid',
        text_vocab=vocab,
        **options,
    )


def table_loaders(s: Samples, config: TrainConfig, teacher: Any, **options: Any) -> DataLoaders:
    frame = s.frame.iloc[np.argsort(s.valid, kind='stable')].reset_index(drop=True)
    n = int((~s.valid).sum())
    if teacher is not None:
        to = known(teacher, 'table', lambda dls: dls.train_ds)
        if missing := [
            c for c in (*to.x_names, *to.y_names) if c not in frame and not str(c).endswith('_na')
        ]:
            raise DistillError(
                f"The teacher's table has the column(s) {few_names(missing)}, which are "
                'missing from this data.'
            )
        # subtle: fastai can't read columns whose order in the table is reversed
        names = dict.fromkeys([*to.x_names, *to.y_names, *frame])
        to = to.new(frame[[c for c in names if c in frame]])
        to.process()
        to.split = n
    else:
        numbers, categories = cont_cat_split(frame[s.x])
        splits = [*range(n)], [*range(n, len(frame))]
        procs = [Categorify, FillMissing, Normalize]
        to = TabularPandas(frame, procs, categories, numbers, s.y, label_block(s), splits)
    return to.dataloaders(**options)


def known(teacher: Any, task: str, read: Callable) -> Any:
    """Read a property of the teacher's DataLoaders. Raise a DistillError if the teacher was trained
    on a different task.
    """
    try:
        return read(teacher.dls)
    except (AttributeError, TypeError, IndexError, KeyError) as e:
        raise DistillError(f'The exported teacher was not trained on {task}.') from e
