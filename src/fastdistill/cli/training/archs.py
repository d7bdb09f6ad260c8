"Build Learners for given data from names of architectures."

import re
from functools import partial

import torch
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.layers import ConvLayer, Flatten, LinBnDrop
from fastai.metrics import accuracy, accuracy_multi, foreground_acc, rmse
from fastai.tabular.learner import tabular_learner
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.vision.learner import unet_learner, vision_learner
from torch import nn
from torchvision import models
from torchvision.models import list_models

from ...base.errors import DistillError, close_name
from .config import TRAIN_TASKS

__all__ = ['check_arch', 'learner_of']

WIDEST = 65536
SIZED = re.compile(r'(?:(cnn|bag|awd_lstm)-)?(\d+(?:-\d+)*)')
IGNORED = 'void', 'ignore', 'unlabeled', 'unlabeled'
SIZED_FAMILIES = dict(
    images=['cnn'], masks=[], texts=['bag', 'awd_lstm'], table=['']
)  # that are followed by sizes
ARCHS_IN_WORDS = dict(
    images='a name of torchvision (resnet18, mobilenet_v3_small ...) or timm (resnet10t, vit_tiny_patch16_224 ...), or '
    "'cnn-16-32-64', convolutions with so many channels",
    masks='a name of torchvision, which becomes the encoder of a U-Net: resnet18, resnet34 ...',
    texts="'awd_lstm', 'awd_lstm-100-200-2' (embedding, hidden units, layers), or 'bag-64-32' (the mean of embeddings "
    'of size 64, and a layer of 32)',
    table="sizes of layers, such as '200-100'",
)


def check_arch(arch: str, task: str):
    """Return (family, sizes) of an architecture with sizes, or (name, None) for others. Raise a
    DistillError for an unknown one.

    Args:
        arch: Its name.
        task: One of TRAIN_TASKS.
    """
    wrong = lambda why: DistillError(
        f'No architecture {arch!r} for {task}{why}. Possible: {ARCHS_IN_WORDS[task]}.'
    )
    m = SIZED.fullmatch(arch)
    sizes = [*map(int, m[2].split('-'))] if m and len(arch) < 200 else None
    family = m[1] or '' if sizes else arch
    if sizes is not None:
        if family not in SIZED_FAMILIES[task]:
            raise wrong('')
        if not all(0 < n <= WIDEST for n in sizes):
            raise wrong(f': sizes are from 1 to {WIDEST}')
        if family == 'awd_lstm' and (len(sizes) != 3 or sizes[2] > 16):
            raise wrong('')
        return family, sizes
    if task == 'texts' and arch == 'awd_lstm':
        return family, None
    if task in ('texts', 'table'):
        raise wrong('')
    if arch not in list_models(module=models) and not (task == 'images' and is_timm(arch)):
        raise wrong(close_name(arch, vision_names(task)))
    return family, None


def is_timm(arch):
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(arch)


def vision_names(task):
    """All that exist."""
    names = list_models(module=models)
    if task == 'masks':
        return names
    try:
        import timm
    except ImportError:
        return names
    return [*names, *timm.list_models()]


def learner_of(arch: str, dls, s, config, pretrained: bool = False) -> Learner:
    """Build a Learner with a new model, initialized with PyTorch's random generator.

    Args:
        s: The Samples behind `dls`.
        config: A TrainConfig.
    """
    family, sizes = check_arch(arch, s.task)
    make = dict(zip(TRAIN_TASKS, (image_learner, mask_learner, text_learner, table_learner)))[
        s.task
    ]
    options = dict(metrics=metrics_of_task(s, config))
    try:
        return make(family, sizes, dls, s, config, pretrained, **options)
    except DistillError:
        raise
    # subtle: an architecture may fail in any way for this image size, and so may a download
    except Exception as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        hint = (
            'Its published weights may be unreachable. Without pretrained=True, it is trained '
            'from scratch.'
            if pretrained
            else 'Choose a different architecture, or a different size=.'
        )
        raise DistillError(f"{arch} can't be built for these {s.task} ({reason}). {hint}") from e


def metrics_of_task(s, config):
    if s.task == 'masks':
        i = ignored_class(s, config)
        return [
            partial(accuracy, axis=1) if i is None else partial(foreground_acc, bkg_idx=i, axis=1)
        ]
    return [dict(classes=accuracy, labels=accuracy_multi, numbers=rmse)[s.target]]


def ignored_class(s, config):
    """Return the number of the class of masks that does not count. None if there is none."""
    if config.ignore:
        if config.ignore not in s.classes:
            raise DistillError(
                f'ignore={config.ignore!r}: the classes are {", ".join(s.classes[:30])}'
            )
        return s.classes.index(config.ignore)
    return next((i for i, c in enumerate(s.classes) if c.lower() in IGNORED), None)


def image_learner(family, sizes, dls, s, config, pretrained, **options):
    n = len(s.classes)
    if sizes is not None:
        convs = [ConvLayer(i, o, stride=2) for i, o in zip([3, *sizes], sizes)]
        net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(sizes[-1], n))
        return Learner(dls, net, **options)
    return runs(
        vision_learner(dls, vision_arch(family), n_out=n, pretrained=pretrained, **options), s
    )


def runs(learn, s):
    """Return the Learner if its model takes images of this size. All layers are trained."""
    learn.unfreeze()
    with torch.no_grad():
        learn.model.eval()(torch.zeros(1, 3, *s.size))
    learn.model.train()
    return learn


def vision_arch(name):
    """Return a function of torchvision, or a name of timm."""
    return getattr(models, name) if name in models.list_models(module=models) else name


def mask_learner(family, sizes, dls, s, config, pretrained, **options):
    i = ignored_class(s, config)
    loss = CrossEntropyLossFlat(axis=1, ignore_index=-100 if i is None else i)
    options |= dict(n_out=len(s.classes), pretrained=pretrained, loss_func=loss)
    return runs(unet_learner(dls, vision_arch(family), **options), s)


def text_learner(family, sizes, dls, s, config, pretrained, **options):
    n, words = len(s.classes), len(dls.vocab[0])
    if family == 'bag':
        sizes = [*sizes, n]
        layers = [LinBnDrop(i, o, act=nn.ReLU()) for i, o in zip(sizes, sizes[1:-1])]
        pad = dls.vocab[0].index('xxpad')
        net = nn.Sequential(
            nn.EmbeddingBag(words, sizes[0], padding_idx=pad), *layers, nn.Linear(*sizes[-2:])
        )
        return Learner(dls, net, **options)
    of = dict(zip(('emb_sz', 'n_hid', 'n_layers'), sizes)) if sizes else {}
    options |= dict(config=awd_lstm_clas_config | of, n_out=n, pretrained=pretrained)
    learn = text_classifier_learner(dls, AWD_LSTM, **options)
    learn.unfreeze()
    return learn


def table_learner(family, sizes, dls, s, config, pretrained, **options):
    return tabular_learner(
        dls, sizes, n_out=1 if s.target == 'numbers' else len(s.classes), **options
    )
