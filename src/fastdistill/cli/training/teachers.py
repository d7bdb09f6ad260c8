"Load the teacher of a run from a file or from weights."

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...base.errors import DistillError
from ...fastai.teachers import PICKLES, exported
from ...teachers.estimator import is_estimator
from ...teachers.teacher import Teacher
from .architectures import FASTAI_ARCHS, is_timm, learner_of, vision_arch
from .config import TrainConfig
from .data_files import Samples
from .dataloaders import TEXT


def file_teacher(path: str) -> Any:
    """Load an exported Learner or an estimator. Return any other path unchanged, because `Teacher`
    can load it.
    """
    file = Path(path)
    return exported(file) if file.suffix in PICKLES else path


def teacher_of_texts(loaded: Any) -> Any:
    """Let an estimator read the texts of a run. Return any other teacher unchanged.

    Args:
        loaded: Result of `file_teacher`.
    """
    return Teacher(loaded, items=itemgetter(TEXT)) if is_estimator(loaded) else loaded


def with_weights(config: TrainConfig, dls: Any, s: Samples) -> Any:
    """Build a Learner, or a model of torchvision or timm, and load weights from a file.

    Args:
        config: A TrainConfig.
        dls: DataLoaders of the run.
        s: The `Samples` from which `dls` was built.
    """
    path = Path(config.teacher_weights)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise DistillError(f'{path} is not a safetensors file: {e}') from e
    learn = learner_of(config.arch('teacher'), dls, s, config)
    have = {k: tuple(v.shape) for k, v in weights.items()}
    wants = lambda model: {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if fits(have, wants(learn.model)):
        learn.model.load_state_dict(weights, strict=False)
        return learn
    if s.task == 'images' and (model := plain_model(config.teacher, len(s.classes))) is not None:
        if fits(have, wants(model)):
            model.load_state_dict(weights, strict=False)
            return model.to(dls.device)
    need = wants(learn.model)
    odd: Any = next((k for k in need if need[k] != have.get(k)), None)
    raise DistillError(
        f'The weights in {path} do not fit {config.arch("teacher")} with {len(s.classes or [0])} '
        f'class(es): {odd} has shape {need.get(odd)}, but {have.get(odd, "is missing")} in the file.'
    )


def fits(have: Mapping, need: Mapping) -> bool:
    return (
        not set(have) - set(need)
        and all(have.get(k, v) == v for k, v in need.items())
        and ({k for k in need if 'num_batches_tracked' not in k} <= set(have))
    )


def plain_model(name: str, classes: Any) -> nn.Module | None:
    """Build a model of torchvision, timm or fastai with its original head instead of the head of
    `vision_learner`. Return None if there is no such model.
    """
    arch = vision_arch(name)
    if callable(arch):
        return arch(**{'n_out' if name in FASTAI_ARCHS else 'num_classes': classes})
    if not is_timm(name):
        return None
    import timm

    return timm.create_model(name, num_classes=classes)
