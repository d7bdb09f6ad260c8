"The pairs of models that are timed: a student, its teacher, and data of random numbers that are in memory."

from dataclasses import dataclass
from functools import partial
from typing import Callable
import torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Datasets, set_seed
from fastai.callback.rnn import rnn_cbs
from fastai.tabular.model import TabularModel
from fastai.text.data import LMDataLoader
from fastai.text.models import AWD_LSTM, awd_lstm_lm_config, get_language_model
from fastai.vision.learner import create_body
from fastai.vision.models.unet import DynamicUnet
from fastdistill import DistillError

__all__ = ['PAIRS', 'BenchPair']


@dataclass
class BenchPair:
    "What is timed"

    title: str
    models: Callable  # fn() -> (student, teacher)
    data: Callable  # fn(batches) -> DataLoaders
    axis: int = -1  # of the classes
    callbacks: Callable = list  # that the task itself needs


class PickRow:
    "Picks a row of a tensor that is in memory"

    def __init__(self, of):
        self.of = of

    def __call__(self, i):
        return self.of[i]


def in_memory(
    bs: int,
    inputs,  # tensors with one row for each sample
    target,  # the same
    batches: int,
):
    picks = [[PickRow(o)] for o in (*inputs, target)]
    return Datasets(
        range(len(target)), picks, n_inp=len(inputs), splits=[range(bs * batches), range(bs)]
    ).dataloaders(bs=bs, num_workers=0)


def images(batches, bs, size, classes, dense=False):
    n = bs * batches
    y = torch.randint(classes, (n, size, size) if dense else (n,))
    return in_memory(bs, [torch.randn(n, 3, size, size)], y, batches)


def resnets():
    from torchvision.models import resnet18, resnet50

    return resnet18(num_classes=100), resnet50(num_classes=100)


def unets(size=64):
    from torchvision.models import resnet18, resnet34

    return [
        DynamicUnet(create_body(arch(), cut=-2), 32, (size, size)) for arch in (resnet18, resnet34)
    ]


def vits():
    try:
        import timm
    except ImportError as e:
        raise DistillError("timm is not installed: pip install 'fastdistill[bench]'") from e
    return [
        timm.create_model(f'vit_{size}_patch16_224', num_classes=100, img_size=96)
        for size in ('tiny', 'small')
    ]


VOCABULARY = 30_000


def languages():
    config = lambda hid, emb: {**awd_lstm_lm_config, 'n_hid': hid, 'emb_sz': emb}
    return [
        get_language_model(AWD_LSTM, VOCABULARY, config=config(*o))
        for o in ((400, 200), (1152, 400))
    ]


def texts(batches, bs=16, length=32):
    "A language model's batches"
    make = lambda n: LMDataLoader(
        [torch.randint(VOCABULARY, (n * bs * length + 1,))], bs=bs, seq_len=length, num_workers=0
    )
    return DataLoaders(make(batches), make(1))


def tables():
    return [TabularModel([(100, 20)] * 6, 8, 2, layers) for layers in ([50], [1000, 500])]


def rows(batches, bs=64):
    n = bs * batches
    return in_memory(
        bs, [torch.randint(100, (n, 6)), torch.randn(n, 8)], torch.randint(2, (n,)), batches
    )


def settled(make):
    "Models whose batch-norms have statistics of their own, as trained ones have"
    set_seed(0)
    models = make()
    for m in (
        m for o in models for m in o.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ):
        m.running_mean.normal_(0, 0.1)
        m.running_var.uniform_(0.8, 1.2)
    return models


PAIRS = dict(
    resnet=BenchPair(
        'ResNet-50 -> ResNet-18, 64 images of 64 px',
        partial(settled, resnets),
        partial(images, bs=64, size=64, classes=100),
    ),
    unet=BenchPair(
        'ResNet-34 U-Net -> ResNet-18 U-Net, 8 images of 64 px, 32 classes',
        partial(settled, unets),
        partial(images, bs=8, size=64, classes=32, dense=True),
        axis=1,
    ),
    vit=BenchPair(
        'ViT-S -> ViT-Ti, 32 images of 96 px',
        partial(settled, vits),
        partial(images, bs=32, size=96, classes=100),
    ),
    text=BenchPair(
        'AWD-LSTM language models, 16 x 32 tokens of 30,000',
        partial(settled, languages),
        texts,
        callbacks=rnn_cbs,
    ),
    table=BenchPair('tabular models, 64 rows', partial(settled, tables), rows),
)


def loss_of(pair):
    return CrossEntropyLossFlat(axis=pair.axis)
