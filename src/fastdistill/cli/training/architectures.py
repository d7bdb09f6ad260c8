"Build Learners from the names of architectures."

import re
import warnings
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.callback.hook import model_sizes
from fastai.layers import ConvLayer, Flatten, LinBnDrop
from fastai.metrics import accuracy, accuracy_multi, foreground_acc, rmse
from fastai.tabular.learner import tabular_learner
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.vision.learner import (
    create_body,
    create_vision_model,
    has_pool_type,
    model_meta,
    vision_learner,
)
from fastai.vision.models import xresnet
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from torchvision import models
from torchvision.models import list_models

from ...base.errors import DistillError, close_name
from .config import Arch, TrainConfig
from .data_files import Samples

FASTAI_ARCHS = [n for n in xresnet.__all__ if re.fullmatch(r'xresnet\d+', n)]
# {task: {architecture with configurable layers: example of layer sizes}}
LAYERED = dict(
    images=dict(cnn='16,32,64'),
    masks=dict(cnn='8,16,32'),
    texts=dict(awd_lstm='100,200,200', embedding_bag='64,32'),
    table=dict(tabular='200,100'),
)
# architectures in LAYERED that have default layers in fastai
HAVE_DEFAULTS = 'awd_lstm', 'tabular'
ARCHS_IN_WORDS = dict(
    images='an architecture of torchvision (resnet18, mobilenet_v3_small), timm (resnet10t, '
    "vit_tiny_patch16_224) or fastai (xresnet18), or 'cnn' with the channels of its layers",
    masks='an architecture of torchvision or fastai, which becomes the encoder of a U-Net (resnet18, '
    "mobilenet_v3_small), or 'cnn' with the channels of its layers",
    texts="'awd_lstm', or 'embedding_bag' with the sizes of its layers",
    table="'tabular'",
)


def check_arch(arch: Arch, task: str) -> None:
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
        if (
            name == 'awd_lstm'
            and layers
            and (len(layers) not in range(2, 18) or {*layers[1:]} != {layers[1]})
        ):
            raise DistillError(
                f'{arch.option}={arch.layers_in_words!r}: for awd_lstm, these must be the size of the '
                "embedding, and 1 to 16 equal numbers of hidden units, such as '100,200,200'."
            )
        return
    if name not in own_names(task) and not (task == 'images' and is_timm(name)):
        names = [*LAYERED[task], *own_names(task)]
        if task == 'images' and find_spec('timm'):
            import timm

            names += timm.list_models()
        near = close_name(name, names)
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


def is_timm(arch: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(arch)


def own_names(task: str) -> list[str]:
    """Return the names of torchvision's and fastai's architectures for images or masks. The list is
    empty for other tasks.
    """
    return [*list_models(module=models), *FASTAI_ARCHS] if task in ('images', 'masks') else []


def learner_of(
    arch: Arch, dls: Any, s: Samples, config: TrainConfig, pretrained: bool = False
) -> Learner:
    """Build a Learner with a new model. Random weights are drawn from PyTorch's global generator.

    Args:
        arch: An architecture, with the sizes of its layers if they are configurable.
        s: The `Samples` from which `dls` was built.
        config: A TrainConfig.
    """
    check_arch(arch, s.task)
    make: Any = dict(
        images=image_learner,
        masks=mask_learner,
        texts=text_learner,
        table=partial(table_learner, y_range=config.limits()),
    )[s.task]
    try:
        return make(arch, dls, s, pretrained, metrics=metrics_of_task(s))
    except DistillError:
        raise
    # subtle: catch all errors, because an architecture may fail in any way for this image size, and
    # so may a download
    except Exception as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        hint = (
            'Its published weights may not be available. Without pretrained=True, it is trained '
            'from scratch.'
            if pretrained
            else 'Choose a different architecture, or a different size=.'
        )
        raise DistillError(f"{arch} can't be built for these {s.task} ({reason}). {hint}") from e


def metrics_of_task(s: Samples) -> list:
    if s.task == 'masks':
        if s.ignored is None:
            return [partial(accuracy, axis=1)]
        return [partial(foreground_acc, bkg_idx=s.ignored, axis=1)]
    return [dict(classes=accuracy, labels=accuracy_multi, numbers=rmse)[s.target]]


def image_learner(arch: Arch, dls: Any, s: Samples, pretrained: bool, **options: Any) -> Learner:
    n = len(s.classes)
    if arch.name == 'cnn':
        layers: Any = arch.layers
        pool = nn.AdaptiveAvgPool2d(1), Flatten()
        net = nn.Sequential(*convs(layers), *pool, nn.Linear(layers[-1], n))
        return Learner(dls, net, **options)
    make = vision_arch(arch.name)
    with warnings.catch_warnings():
        # fastai calls torchvision's functions with deprecated arguments
        warnings.filterwarnings(
            'ignore', "(The parameter 'pretrained'|Arguments other than a weight)"
        )
        if (cut := cut_of(make)) is None:
            learn = vision_learner(dls, make, n_out=n, pretrained=pretrained, **options)
        else:  # `vision_learner` does not use its argument `cut`
            net = create_vision_model(make, n, pretrained=pretrained, cut=cut)
            learn = Learner(dls, net, **options)
            learn.arch = make  # the report shows its name
    return runs(learn, s)


def convs(layers: Any) -> list:
    return [ConvLayer(i, o, stride=2) for i, o in zip([3, *layers], layers)]


def cut_of(arch: Any) -> int | None:
    """Return the number of layers before the classifier of a torchvision model. Return None if
    fastai finds it.
    """
    if isinstance(arch, str) or arch in model_meta:
        return None
    parts = [*arch().children()]
    # subtle: fastai cuts a model at its last pooling layer, which MobileNetV2 does not have, and which
    # is at the beginning of ShuffleNet
    pool = max((i for i, m in enumerate(parts) if has_pool_type(m)), default=-1)
    rest = nn.Sequential(*parts[pool + 1 :])
    return len(parts) - 1 if any(isinstance(m, nn.Conv2d) for m in rest.modules()) else None


def runs(learn: Any, s: Samples) -> Learner:
    """Unfreeze all layers, run the model once to check that it accepts this image size, and return
    the Learner.
    """
    learn.unfreeze()
    with torch.no_grad():
        learn.model.eval()(torch.zeros(1, 3, *s.size))
    learn.model.train()
    return learn


def vision_arch(name: str) -> Any:
    """Return the function that builds a model of torchvision or fastai. Return the name of a timm
    model unchanged.
    """
    if name in FASTAI_ARCHS:
        return getattr(xresnet, name)
    return getattr(models, name) if name in models.list_models(module=models) else name


def mask_learner(arch: Arch, dls: Any, s: Samples, pretrained: bool, **options: Any) -> Learner:
    is_cnn = arch.name == 'cnn'
    encoder = nn.Sequential(*convs(arch.layers)) if is_cnn else encoder_of(arch.name, s, pretrained)
    ignored = -100 if s.ignored is None else s.ignored
    loss = CrossEntropyLossFlat(axis=1, ignore_index=ignored)
    net = DynamicUnet(encoder, len(s.classes), s.size)
    learn = Learner(dls, net, loss_func=loss, **options)
    if not is_cnn:
        learn.arch = vision_arch(arch.name)  # the report shows its name
    return runs(learn, s)


def encoder_of(name: str, s: Samples, pretrained: bool) -> nn.Sequential:
    """Return the layers of a model of torchvision or fastai, up to its last feature map, as an
    nn.Sequential.
    """
    arch = vision_arch(name)
    meta = model_meta.get(arch, {})
    if name in FASTAI_ARCHS:
        model = arch(pretrained=pretrained)
    else:
        model = arch(weights=meta.get('weights', 'DEFAULT') if pretrained else None)
    encoder = unfolded(create_body(model, 3, pretrained, meta.get('cut', cut_of(arch))), s.size)
    maps, (h, w) = model_sizes(encoder, s.size), s.size
    if len({o[2:] for o in maps}) < 2 or any(abs(o[-2] / h - o[-1] / w) > 0.25 for o in maps):
        raise DistillError(f'{name} has no feature maps of several sizes, which a U-Net needs.')
    return encoder


def unfolded(layers: Any, size: tuple[int, int]) -> nn.Sequential:
    """Replace each nn.Sequential that reduces the size of an image several times with its layers.

    fastai's U-Net has skip connections only between the outermost layers.
    """
    widths = [size[1], *(o[-1] for o in model_sizes(layers, size))]
    for i, m in enumerate(layers):
        if type(m).forward is nn.Sequential.forward and widths[i + 1] < widths[i] // 2:
            return unfolded(nn.Sequential(*layers[:i], *m, *layers[i + 1 :]), size)
    return layers


def text_learner(arch: Arch, dls: Any, s: Samples, pretrained: bool, **options: Any) -> Learner:
    layers: Any = arch.layers
    n, words = len(s.classes), len(dls.vocab[0])
    if arch.name == 'embedding_bag':
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


def table_learner(arch: Arch, dls: Any, s: Samples, pretrained: bool, **options: Any) -> Learner:
    n = 1 if s.target == 'numbers' else len(s.classes)
    return tabular_learner(dls, arch.layers, n_out=n, **options)
