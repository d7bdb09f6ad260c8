"""Train a student repeatedly from its current state, and restore this state afterwards."""

import copy
import random
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from fastai.basics import L, Learner, Recorder, noop

from ..base.model_state import ModelState
from ..base.outputs import DistillError, DistillWarning
from ..base.random_state import guarded_random_state
from ..distiller.loader_batches import restored_loaders
from ..features.layer_names import unwrap
from ..features.probe import run_eagerly
from .callback import KnowledgeDistillation
from .language_model import in_first_order
from .trial_clock import Clock
from .trial_scores import chosen_half

# modules of fastai with callbacks that write files, show something, or stop a fit
LEFT_OUT = 'azureml', 'captum', 'comet', 'neptune', 'progress', 'tensorboard', 'tracker', 'wandb'


def run_trial(
    learn, teacher, score, output, options: dict, recipe, lr, seed, after_epoch, late
) -> torch.Tensor | None:
    """Train the student with a recipe, a learning rate and a seed, and restore it. Return the scores
    of the validation items that are reserved for the final test. None if the training was stopped.

    Args:
        learn: The student.
        teacher: Anything that `distill` accepts.
        score, output, after_epoch, late: As in `Clock`.
        options: Options of `distill`.
    """
    clock = Clock(score, output, after_epoch, late)
    with unchanged(learn, seed), warnings.catch_warnings():
        # warnings about recipes are not useful while they are only being tried
        warnings.simplefilter('ignore', DistillWarning)
        copy_of(learn).distill(
            teacher,
            lr_max=lr,
            recipe=recipe,
            output=None if isinstance(output, Mapping) else output,
            check=False,
            cbs=clock,
            **options,
        )
    return None if clock.over else clock.items[~chosen_half(len(clock.items))]


def copy_of(learn) -> Learner:
    """Return a Learner with the same model and data.

    Callbacks that affect training are copied.
    """
    new = copy.copy(learn)
    frozen = getattr(learn.opt, 'frozen_idx', 0)
    new.cbs, new.metrics, new.opt, new.logger = L(), L(), None, noop
    for cb in learn.cbs:
        vars(new).pop(cb.name, None)
    memo = {id(o): o for o in (learn.model, learn.dls, learn.loss_func, *learn.dls.loaders)} | {
        id(learn): new
    }
    for cb in learn.cbs:
        if not matters(cb):
            continue
        try:
            new.add_cb(Recorder() if type(cb) is Recorder else copy.deepcopy(cb, memo))
        except Exception as e:
            raise DistillError(
                f"The callback {type(cb).__name__} can't be copied ({e}). Search without it: "
                f'with student.removed_cbs(student.{cb.name}): student.distill_find(...)'
            ) from e
    if frozen:
        new.freeze_to(frozen)
    return new


def matters(cb):
    package, _, module = type(cb).__module__.rpartition('.')
    return not (
        package == 'fastai.callback' and module in LEFT_OUT or isinstance(cb, KnowledgeDistillation)
    )


@contextmanager
def repeatable(dls, seed: int):
    """Make a training run depend only on its seed.

    The DataLoaders and all random states are restored at the end.

    Args:
        dls: DataLoaders of the Learner.
        seed: Seed for all random generators during the training.
    """
    with guarded_random_state(), restored_loaders(*dls.loaders, seed=seed), ExitStack() as stack:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        for dl in dls.loaders:
            stack.enter_context(in_first_order(dl))
            if hasattr(dl, 'rng'):
                dl.rng = random.Random(seed)
        yield


@contextmanager
def unchanged(learn, seed: int):
    """Seed all random generators for a training run, and restore everything at the end.

    The student's weights, gradients and modes, its DataLoaders and all random states are restored.
    """
    with repeatable(learn.dls, seed), same_weights(learn.model):
        # subtle: scores are assigned to items by their order
        if hasattr(learn.dls.valid, 'shuffle'):
            learn.dls.valid.shuffle = False
        yield


@contextmanager
def same_weights(model):
    """Clear the gradients for a training run. Restore the model at the end, including its weights."""
    inner = unwrap(model)
    state = ModelState(inner.modules(), weights=True)
    for p in inner.parameters():
        p.grad = None
    try:
        with run_eagerly(model):
            yield
    finally:
        state.restore()
