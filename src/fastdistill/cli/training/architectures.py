"Build Learners from the names of architectures."

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
from fastai.vision.models import xresnet
from torch import nn
from torchvision import models
from torchvision.models import list_models

from ...base.errors import DistillError, close_name
from .config import TRAIN_TASKS, Arch

__all__ = ['check_arch', 'learner_of']

IGNORED = 'void', 'ignore', 'unlabeled', 'unlabelled'
FASTAI_ARCHS = [n for n in xresnet.__all__ if re.fullmatch(r'xresnet\d+', n)]
# {task: {architecture with configurable layers: example of layer sizes}}
LAYERED = dict(
    images=dict(cnn='16,32,64'),
    masks={},
    texts=dict(awd_lstm='100,200,200', embedding_bag='64,32'),
    table=dict(tabular='200,100'),
)
# architectures in LAYERED that have default layers in fastai
HAVE_DEFAULTS = 'awd_lstm', 'tabular'
ARCHS_IN_WORDS = dict(
    images='a name of torchvision (resnet18, mobilenet_v3_small), timm (resnet10t, '
    "vit_tiny_patch16_224) or fastai (xresnet18), or 'cnn' with the channels of its layers",
    masks='a name of torchvision or fastai, which becomes the encoder of a U-Net (resnet18, resnet34)',
    texts="'awd_lstm', or 'embedding_bag' with the sizes of its layers",
    table="'tabular'",
)


def check_arch(arch: Arch, task: str):
    """Raise a DistillError if the architecture does not exist for the task, or can't have these
    layers.

    Args:
        arch: Name and layer sizes of the architecture.
        task: One of TRAIN_TASKS.
    """
    name, layers = arch.name, arch.layers
    if name in LAYERED[task]:
        if layers is None and name not in HAVE_DEFAULTS:
            raise DistillError(
                f'{name} needs the sizes of its layers: {arch.option}={LAYERED[task][name]!r}.'
            )
        if name == 'awd_lstm' and layers is not None and not is_awd_lstm(layers):
            raise DistillError(
                f'{arch.option}={arch.layers_in_words!r}: the layers of awd_lstm are the size of the '
                "embedding and 1 to 16 equal numbers of hidden units, such as '100,200,200'."
            )
        return
    if name not in own_names(task) and not (task == 'images' and is_timm(name)):
        near = close_name(name, [*LAYERED[task], *vision_names(task)])
        with_sizes = re.search(r'(^|[-,])\d', name)  # such as 500-200 or cnn-8-16
        sizes = f" Give the sizes of layers as {arch.option}='16,32'." if with_sizes else ''
        raise DistillError(
            f'No architecture {name!r} for {task}{near}. It must be {ARCHS_IN_WORDS[task]}.{sizes}'
        )
    if layers is not None:
        raise DistillError(
            f'{arch.option}={arch.layers_in_words!r}: the layers of {name} are fixed. They can be '
            f'chosen for {", ".join(n for o in LAYERED.values() for n in o)}.'
        )


def is_awd_lstm(layers):
    """Return True if these layer sizes are valid for an AWD-LSTM, i.e. an embedding size and equal
    hidden sizes.
    """
    return 2 <= len(layers) <= 17 and len(set(layers[1:])) == 1


def is_timm(arch):
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(arch)


def own_names(task):
    """Return the names of torchvision's and fastai's architectures for images or masks. The list is
    empty for other tasks.
    """
    return [*list_models(module=models), *FASTAI_ARCHS] if task in ('images', 'masks') else []


def vision_names(task):
    """Return the names of all architectures for images or masks, including those of timm. The list
    is empty for other tasks.
    """
    names = own_names(task)
    if task != 'images':
        return names
    try:
        import timm
    except ImportError:
        return names
    return [*names, *timm.list_models()]


def learner_of(arch: Arch, dls, s, config, pretrained: bool = False) -> Learner:
    """Build a Learner with a new model. Random weights are drawn from PyTorch's global generator.

    Args:
        arch: An architecture, with the sizes of its layers if they are configurable.
        s: The `Samples` from which `dls` was built.
        config: A TrainConfig.
    """
    check_arch(arch, s.task)
    make = dict(zip(TRAIN_TASKS, (image_learner, mask_learner, text_learner, table_learner)))[
        s.task
    ]
    options = dict(metrics=metrics_of_task(s, config))
    try:
        return make(arch.name, arch.layers, dls, s, config, pretrained, **options)
    except DistillError:
        raise
    # subtle: catch all errors, because an architecture may fail in any way for this image size, and
    # so may a download
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
    """Return the index of the class in masks to ignore. Return None if no class is ignored."""
    if config.ignore:
        if config.ignore not in s.classes:
            raise DistillError(
                f'ignore={config.ignore!r}: the classes are {", ".join(s.classes[:30])}'
            )
        return s.classes.index(config.ignore)
    return next((i for i, c in enumerate(s.classes) if c.lower() in IGNORED), None)


def image_learner(name, layers, dls, s, config, pretrained, **options):
    n = len(s.classes)
    if name == 'cnn':
        convs = [ConvLayer(i, o, stride=2) for i, o in zip([3, *layers], layers)]
        net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(layers[-1], n))
        return Learner(dls, net, **options)
    return runs(
        vision_learner(dls, vision_arch(name), n_out=n, pretrained=pretrained, **options), s
    )


def runs(learn, s):
    """Unfreeze all layers, run the model once to check that it accepts this image size, and return
    the Learner.
    """
    learn.unfreeze()
    with torch.no_grad():
        learn.model.eval()(torch.zeros(1, 3, *s.size))
    learn.model.train()
    return learn


def vision_arch(name):
    """Return the function that builds a model of torchvision or fastai. Return the name of a timm
    model unchanged.
    """
    if name in FASTAI_ARCHS:
        return getattr(xresnet, name)
    return getattr(models, name) if name in models.list_models(module=models) else name


def mask_learner(name, layers, dls, s, config, pretrained, **options):
    i = ignored_class(s, config)
    loss = CrossEntropyLossFlat(axis=1, ignore_index=-100 if i is None else i)
    options |= dict(n_out=len(s.classes), pretrained=pretrained, loss_func=loss)
    return runs(unet_learner(dls, vision_arch(name), **options), s)


def text_learner(name, layers, dls, s, config, pretrained, **options):
    n, words = len(s.classes), len(dls.vocab[0])
    if name == 'embedding_bag':
        sizes = [*layers, n]
        hidden = [LinBnDrop(i, o, act=nn.ReLU()) for i, o in zip(sizes, sizes[1:-1])]
        pad = dls.vocab[0].index('xxpad')
        net = nn.Sequential(
            nn.EmbeddingBag(words, sizes[0], padding_idx=pad), *hidden, nn.Linear(*sizes[-2:])
        )
        return Learner(dls, net, **options)
    of = dict(emb_sz=layers[0], n_hid=layers[1], n_layers=len(layers) - 1) if layers else {}
    options |= dict(config=awd_lstm_clas_config | of, n_out=n, pretrained=pretrained)
    learn = text_classifier_learner(dls, AWD_LSTM, **options)
    learn.unfreeze()
    return learn


def table_learner(name, layers, dls, s, config, pretrained, **options):
    return tabular_learner(
        dls, layers, n_out=1 if s.target == 'numbers' else len(s.classes), **options
    )
