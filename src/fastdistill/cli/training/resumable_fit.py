"""Fit a model with checkpoints after each epoch. A resumed fit gives the same result as an
uninterrupted fit.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.basics import (
    Callback,
    CancelEpochException,
    L,
    get_model,
    one_param,
    to_device,
)

from ...base.distributed import broadcast, on_first, rank, world_size
from ...base.model_state import read_state, write_state
from ...base.outputs import DistillError, as_plain, map_tensors
from ...base.sample_seeds import seeds_of
from ...fastai.compare import history_of
from ...fastai.metrics import row_by_column
from ...fastai.projector_opt import as_builtins

BEFORE_FIT = 2**32  # used instead of the epoch number
DAMAGED = 'Delete it to train this model again.'


def seed_everything(*numbers: Any) -> int:
    """Seed the generators of Python, NumPy and PyTorch with a hash of these numbers. Return the
    seed.
    """
    first, *others = map(int, numbers)
    seed = seeds_of(first, 0, *others)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
    return seed


def seed_epoch(learn: Any, *numbers: Any) -> None:
    """Seed all random generators that an epoch uses, including those of the DataLoaders.

    Args:
        learn: A Learner.
        *numbers: Numbers from which the seed is computed. The last number is the epoch.
    """
    # before the fit, all processes use the same seed, so that they build the same projectors;
    # during the fit, dropout and augmentation must differ between processes
    mine = [rank()] if rank() and numbers[-1] != BEFORE_FIT else []
    seed = seed_everything(*numbers, *mine)
    for i, dl in enumerate(learn.dls.loaders):
        dl.rng = random.Random(seed + i)


class Checkpoints(Callback):
    """Callback that writes a checkpoint after each epoch. A new fit with this callback continues
    after the last epoch in the checkpoint. The random states are not stored, because each epoch
    seeds the generators from `seed` and the epoch number.

    Args:
        file: Path of the checkpoint.
        seed: Numbers from which the seeds are computed.
        kd: The KnowledgeDistillation callback of the fit, or None.
        say: fn(text) that prints a line about each epoch. None to show fastai's progress bar and
            table instead.
    """

    order = 90  # run after all callbacks that change the state of the training

    def __init__(
        self,
        file: Path,
        seed: Sequence[int],
        kd: Any = None,
        say: Callable[[str], Any] | None = print,
    ):
        super().__init__()
        self.file, self.seed, self.kd, self.say = file, seed, kd, say
        self.state = on_first(lambda: read_state(file, DAMAGED) if file.is_file() else None)

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return 0 if self.state is None else self.state['epochs']

    def load_weights(self, learn: Any) -> None:
        try:
            get_model(learn.model).load_state_dict(self.state['model'])
        except RuntimeError as e:
            raise DistillError(
                f'{self.file} has the weights of a different model. {DAMAGED}'
            ) from e

    def before_fit(self) -> None:
        if self.state is None:
            return
        s, r = self.state, self.learn.recorder
        self.load_weights(self.learn)
        self.learn.opt.load_state_dict(to_device(s['opt'], one_param(self.learn.model).device))
        if self.kd is not None:
            self.kd.load_state_dict(s['kd'])
        r.values = L(map(L, s['values']))
        r.iters = s['iters']
        r.losses = s['losses']
        r.lrs = s['lrs']
        r.smooth_loss.count, r.smooth_loss.val = s['smooth']
        self.learn.train_iter = len(r.losses)

    def before_epoch(self) -> None:
        seed_epoch(self.learn, *self.seed, self.epoch)

    def after_epoch(self) -> None:
        # DistributedDataParallel does not synchronize the batch norm statistics of the projectors
        if self.kd is not None:
            broadcast(self.kd.distiller.links.buffers())
        if rank():
            return
        r = self.learn.recorder
        state = dict(
            epochs=self.epoch + 1,
            model=get_model(self.learn.model).state_dict(),
            opt=as_builtins(self.opt.state_dict()),
            kd=None if self.kd is None else self.kd.state_dict(),
            names=[*r.metric_names],
            values=as_builtins(r.values),
            iters=[*r.iters],
            losses=[torch.as_tensor(o) for o in r.losses],
            lrs=as_builtins(r.lrs),
            smooth=(r.smooth_loss.count, r.smooth_loss.val),
        )
        # torch.load(weights_only=True) can't load fastai's tensor classes
        state = map_tensors(state, as_plain)
        write_state(self.file, state)
        if self.say is not None:
            self.say(self.line(r))

    def line(self, r: Any) -> str:
        shown = [f'{k} {v:.4f}' for k, v in row_by_column(r).items() if isinstance(v, float)]
        return f'epoch {self.epoch + 1} of {self.n_epoch}: {", ".join(shown)}, {r.log[-1]}'

    def restore(self, learn: Any) -> None:
        """Restore the state of a Learner after the last epoch, without a fit."""
        self.load_weights(learn)
        r = learn.recorder
        r.metric_names = L(self.state['names'])
        r.values = L(map(L, self.state['values']))
        r.iters = self.state['iters']
        r.losses = self.state['losses']

    # pickle this callback as a plain Callback, so that an exported Learner can be loaded without
    # fastdistill
    def __reduce__(self) -> tuple:
        return Callback, ()


def fit_stage(
    learn: Any,
    n_epoch: int,
    lr: Any,
    checkpoints: Checkpoints,
    cbs: Sequence = (),
    bar: bool = False,
) -> dict:
    """Fit with the 1cycle policy, starting after the last epoch in the checkpoint. Return the
    history of the training.

    Args:
        learn: A Learner.
        n_epoch: Number of epochs.
        lr: Maximum learning rate.
        checkpoints: Callback that reads and writes the checkpoints.
        cbs: Further callbacks.
        bar: True to show fastai's progress bar and table.
    """
    if checkpoints.done >= n_epoch:
        checkpoints.restore(learn)
        return history_of(learn)
    # subtle: seed the generators before the fit too, so that values measured before the first
    # epoch, such as the temperature, are the same in a resumed fit
    seed_epoch(learn, *checkpoints.seed, BEFORE_FIT)
    logger, learn._do_fit = learn.logger, partial(do_epochs, learn, checkpoints.done)
    cbs = [*cbs, *filter(None, [checkpoints.kd]), checkpoints]
    if world_size() > 1:
        from .distributed_fit import ProcessesTrainer  # needs accelerate

        cbs.append(ProcessesTrainer(sync_bn=False, cpu=one_param(learn.model).device.type == 'cpu'))
    if not bar:
        learn.logger = silent
    try:
        with nullcontext() if bar else learn.no_bar():
            learn.fit_one_cycle(n_epoch, lr, cbs=cbs)
    finally:
        learn.logger = logger
        del learn._do_fit
    return history_of(learn)


def silent(_: str) -> None:
    """Print nothing."""


def do_epochs(learn: Any, first: int) -> None:
    """Run the epochs of a fit, starting with epoch `first`. Used instead of `Learner._do_fit`,
    because fastai's SkipToEpoch would also run the events of the skipped epochs.
    """
    for epoch in range(first, learn.n_epoch):
        learn.epoch = epoch
        learn._with_events(learn._do_epoch, 'epoch', CancelEpochException)
