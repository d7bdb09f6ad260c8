"Small data sets of fastai, students and teachers for tests of stored outputs."

import random
from functools import partial
import numpy as np
import torch
from fastai.basics import Learner, TfmdDL, Transform
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter
from fastai.vision.all import (
    FlipItem,
    Hue,
    ImageBlock,
    Normalize,
    PILImage,
    PILMask,
    RandomErasing,
    RandomResizedCrop,
    Saturation,
    TensorImage,
    aug_transforms,
    imagenet_stats,
)
from torch import nn
from fastdistill.base.task import Task
from fastdistill.fastai.cache_data import cache_teacher as checked_first
from fastdistill.fastai.cache_feed import SampleFeed


cache_teacher = partial(checked_first, check=False)  # teachers that know nothing will do here


N, TRAIN, SIZE = 30, 22, 24


RNG = np.random.default_rng(0)


IMAGES = RNG.integers(0, 255, (N, 34, 30, 3), dtype=np.uint8)


def image(i):
    return PILImage.create(IMAGES[i])


def label(i):
    return 'abc'[i % 3]


def mask(i):
    return PILMask.create(IMAGES[i][..., 0] // 128)


def noise(x: PILImage):
    "A function from elsewhere, which draws from NumPy"
    a = np.asarray(x).astype(int)
    return PILImage.create(
        np.clip(a + np.random.normal(0, 20, a.shape[:2])[..., None], 0, 255).astype(np.uint8)
    )


class Jitter(Transform):
    "Draws from PyTorch and Python, in its own way: nothing is known of it"

    split_idx, order = 0, 50

    def encodes(self, x: TensorImage):
        return x + torch.randn_like(x) * 0.05 + random.random() * 0.1


AUGMENT = dict(
    light=lambda: [
        *aug_transforms(do_flip=False, max_warp=0.0, max_rotate=0.0, max_zoom=1.0),
        Normalize.from_stats(*imagenet_stats),
    ],
    usual=lambda: [
        *aug_transforms(max_rotate=30, max_warp=0.4, max_lighting=0.5, flip_vert=True),
        Normalize.from_stats(*imagenet_stats),
    ],
    colours=lambda: [
        *aug_transforms(xtra_tfms=[Hue(), Saturation()]),
        RandomErasing(p=0.8, max_count=3),
        Normalize.from_stats(*imagenet_stats),
    ],
    smaller=lambda: aug_transforms(
        size=10, max_zoom=1.6, p_affine=0.5
    ),  # fastai reduces a batch by its largest zoom
    cropped=lambda: aug_transforms(size=20, min_scale=0.4),
    together=lambda: aug_transforms(batch=True),
    own=lambda: [Jitter(), *aug_transforms(do_flip=False)],
)


def data(
    block=CategoryBlock,
    get_y=label,
    augment='light',
    bs=8,
    num_workers=0,
    items=range(N),
    item_tfms=None,
    valid=range(TRAIN, N),
    **kwargs,
):
    item_tfms = (
        [RandomResizedCrop(SIZE, min_scale=0.4), FlipItem(), Transform(noise, split_idx=0)]
        if item_tfms is None
        else item_tfms
    )
    return DataBlock(
        (ImageBlock, block),
        get_x=image,
        get_y=get_y,
        splitter=IndexSplitter(valid),
        item_tfms=item_tfms,
        batch_tfms=[] if augment == 'none' else AUGMENT[augment](),
        **kwargs,
    ).dataloaders(list(items), bs=bs, num_workers=num_workers)


class Convs(nn.Module):
    "Classes, or a map of them"

    def __init__(self, c, dense=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.bn, self.b = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, c, 3, padding=1),
        )
        self.dense = dense

    def forward(self, x):
        x = self.b(self.bn(self.a(x)).relu()) * 8
        return x if self.dense else x.mean((2, 3))


def quiet(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 1e-3, **kwargs)
    return learn


def student(dls, c=3, dense=False, **kwargs):
    return Learner(dls, Convs(c, dense, seed=1), **kwargs)


def CROPS():
    return [RandomResizedCrop(SIZE, min_scale=0.4), FlipItem()]


def state_of(learn):
    return [dict(dl.__dict__) for dl in learn.dls.loaders if isinstance(dl, TfmdDL)], list(
        learn.cbs
    )


def feed(source, learn, kind='softmax', axis=1):
    "The batches of a Learner as in a fit from this source"
    return SampleFeed().attach(learn, {'': source}, {'': Task(kind, axis)})
