"""Distillation with Lightning: a callback for your own `LightningModule`, and a complete module."""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as e:
    raise ImportError(
        "fastdistill.lightning needs lightning: pip install 'fastdistill[lightning]'"
    ) from e
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .base.distributed import average_gradients
from .base.model_state import restored
from .base.outputs import DistillError, DistillWarning, Outputs, tensors_in
from .base.transform_random_state import Generators
from .checks.teacher_outputs import BATCHES
from .distiller.distiller import Distiller
from .distiller.loader_batches import read_apart, spread_batches
from .distiller.trainer_integration import (
    add_parameters,
    check_first,
    complete,
    is_detector,
    load_state,
    needs_example,
    takes_part,
    training_state,
)
from .features.layer_pairs import inputs
from .features.model_call import arguments
from .recipes.batch_tensors import inputs_and_labels
from .recipes.term import Recipe, Term

__all__ = ['DistillCallback', 'DistillModule']


class DistillCallback(Callback):
    """Callback that adds a teacher to a `LightningModule`, as in
    `Trainer(callbacks=DistillCallback(teacher, kd(), student='model'))`.

    The module's `training_step` returns the task loss as usual. The callback adds the distillation
    loss.

    Args:
        teacher: A model, a `Teacher`, or anything that `Teacher` accepts. For a student with
            several heads, a dict {head name: teacher}, as in `Distiller`. A batch then needs one
            label per head.
        recipe: A recipe such as `kd() + at()`, or a `Term`. None to let `auto` choose from the
            student's outputs.
        student: Attribute of the LightningModule that contains the student, e.g. 'model'. None if
            the LightningModule itself is the student.
        split: fn(batch) -> (inputs, labels) of the student. By default, the first item of a tuple
            is the input and the others are labels. In a dict, 'labels' contains the labels.
            Required if the training data are a list or dict of DataLoaders.
        **options: Options of the `Distiller`: kind, axis, ignore_index, shift_labels, output,
            check. With check=False, the models are not scored on a few batches before training,
            either.
    """

    def __init__(
        self,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        *,
        student: str | None = None,
        split: Callable | None = None,
        **options: Any,
    ):
        self.teacher, self.recipe, self.student, self.options = teacher, recipe, student, options
        self.split = split or inputs_and_labels
        self.distiller: Any = None  # built when the fit starts
        self.state: dict | None = None
        self.replaced: dict | None = None
        self.compared_inputs = False

    # before and after a fit

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        # subtle: Lightning moves callbacks that search for a learning rate or a batch size to the
        # front, where they would search without the teacher
        if any(isinstance(c, (LearningRateFinder, BatchSizeFinder)) for c in trainer.callbacks):
            trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, 'fit')
        self.compared_inputs = False
        if not pl_module.automatic_optimization:
            raise DistillError(
                'DistillCallback changes the loss that training_step returns, which manual optimization '
                'does not use. Call a `Distiller` in your training_step instead.'
            )
        self.build(pl_module)
        if trainer.limit_train_batches == 0:
            return
        d = self.distiller
        d.links.to(pl_module.device)
        # subtle: restore the recipe from the checkpoint instead of choosing a new one
        if self.state is not None:
            d.set_extra_state(self.state['distiller'])
        # subtle: Lightning draws a random number in this call, but not again when training starts
        trainer.fit_loop.setup_data()
        split = functools.partial(self._split, trainer)
        if self.options.get('check', True):
            with batches_apart(trainer, pl_module):
                batches = map(split, training_batches(trainer, spread=True))
                check_first(d, batches, part='training')
        if needs_example(d):
            with batches_apart(trainer, pl_module):
                x, y = split(next(training_batches(trainer)))
            complete(d, x, bool(len(y)))
        refuse_finetuning(trainer, d)
        add_parameters(trainer.optimizers[0], d)
        if self.state is not None:
            load_state(d, self.state)
        self.state = None
        d.start()
        self._replace_step(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # subtle: Lightning restores the position in the training data while it sets up the data, but
        # `on_fit_start` already set it up before Lightning read the position from the checkpoint
        if getattr(trainer.fit_loop, '_combined_loader_states_to_load', None):
            trainer.fit_loop._combined_loader = None
            trainer.fit_loop.setup_data()

    def build(self, pl_module: LightningModule) -> None:
        """Build the Distiller for this module, unless it already exists."""
        try:
            student = pl_module if self.student is None else pl_module.get_submodule(self.student)
        except AttributeError as e:
            have = ', '.join(n for n, _ in pl_module.named_children()) or 'none'
            raise DistillError(
                f'student={self.student!r}: {type(pl_module).__name__} has no such module. It has: '
                f'{have}'
            ) from e
        if self.distiller is None or self.distiller.student is not student:
            kind = distiller_class(student)
            self.distiller = kind(student, self.teacher, self.recipe, **self.options)
            if self.distiller.heads.several:
                self.distiller.heads.share_task_loss()

    def _split(self, trainer: Trainer, batch: Any) -> tuple:
        """Split a training batch into (inputs, labels)."""
        loaders = trainer.train_dataloader
        if self.split is inputs_and_labels and isinstance(loaders, (Mapping, list, tuple)):
            of_each = batch if isinstance(batch, Mapping) else dict(enumerate(batch))
            if any(isinstance(o, (Mapping, list, tuple)) for o in of_each.values()):
                first = f'batch[{next(iter(of_each))!r}]'
                raise DistillError(
                    f'The training data are a {type(loaders).__name__} of {len(loaders)} '
                    'DataLoaders, and each batch contains one batch from each of them. Pass '
                    "split=, a function of the batch that returns the student's inputs and a tuple "
                    f'of labels, as in split=lambda batch: ({first}[0], {first}[1:]).'
                )
        return self.split(batch)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, 'fit')

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module and stop the teacher. A second call does nothing."""
        if self.replaced is None:
            return
        vars(pl_module).pop('training_step')
        vars(pl_module).update(self.replaced)
        self.replaced = None
        self.distiller.stop()

    # training step

    def _replace_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the module's training step return the total loss."""
        step = pl_module.training_step

        # subtle: Lightning inspects the argument names of training_step, which `wraps` preserves
        @functools.wraps(step)
        def with_teacher(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._step(
                trainer, pl_module, batch, functools.partial(step, batch, *args, **kwargs)
            )

        self.replaced = {k: v for k, v in vars(pl_module).items() if k == 'training_step'}
        vars(pl_module)['training_step'] = with_teacher

    def _step(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, run: Callable[[], Any]
    ) -> Any:
        d, progress = self.distiller, training_progress(trainer)
        if not takes_part(d, progress):
            return run()
        x, y = self._split(trainer, batch)
        with d.reading(progress) as taps, calls_of(d.student, taps) as calls:
            out = run()
            if out is None:
                return
            call = self._compared(calls, x)
            taps.seen.update(call.seen)
            feats = taps.pop()
        s = d.student_outputs(call.returned, feats, x)
        task = out['loss'] if isinstance(out, Mapping) else out
        y = tuple(y) if d.heads.several else d.head.task_loss.moved(x, s.logits, tuple(y))
        r = d.compute(s, d.teacher_outputs(x, progress), task, y, progress=progress)
        parts = {f'{k}_loss': v for k, v in r.losses.items()}
        n = len(x if is_detector(d.student) else next(tensors_in(x)))
        pl_module.log_dict(parts, batch_size=n)
        return {**out, 'loss': r.total} if isinstance(out, Mapping) else r.total

    def _compared(self, calls: Sequence['StudentCall'], x: Any) -> 'StudentCall':
        """Return the call of the student to compare with the teacher, which is the call that got
        the inputs of the batch.

        Args:
            calls: All calls in the training step.
            x: Inputs of the batch.
        """
        name = type(self.distiller.student).__name__
        if not calls:
            raise DistillError(
                f'training_step did not call the student, {name}. Specify the module that it calls: '
                "DistillCallback(..., student='model')"
            )
        # a call under `no_grad` trains nothing
        calls = [c for c in calls if c.trains] or calls[-1:]
        if is_detector(self.distiller.student) or (len(calls) == 1 and self.compared_inputs):
            return calls[-1]
        given, self.compared_inputs = list(tensors_in(x)), True
        got = [c.number_of(given) for c in calls]
        most = [c for c, n in zip(calls, got) if n == max(got)]
        if len(calls) > 1 and (not max(got) or len(most) > 1 and max(got) < len(given)):
            raise DistillError(
                f'training_step calls the student, {name}, {len(calls)} times, and the inputs of the '
                'batch do not show which call to compare with the teacher: pass split=, a function '
                'of the batch that returns the inputs of that call and the labels. Or call a '
                '`Distiller` in your training_step instead.'
            )
        if not max(got):
            warnings.warn(
                'training_step changes the inputs of the batch before it calls the student, '
                f'{name}, but the teacher gets the unchanged inputs, so its outputs may not '
                'match. Change the inputs before the step, in on_after_batch_transfer.',
                DistillWarning,
                stacklevel=2,
            )
        return most[-1]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.replaced is not None:
            average_gradients(self.distiller.own_parameters())

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {} if self.distiller is None else training_state(self.distiller)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # subtle: a search for a learning rate restores its checkpoint during the fit
        if self.replaced is not None and state:
            load_state(self.distiller, state)
        else:
            self.state = state or None  # empty if saved before the first fit

    # subtle: an averaged copy of the module (`WeightAveraging`) does not need a second teacher
    def __deepcopy__(self, memo: dict) -> 'DistillCallback':
        return self


class DistillModule(LightningModule):
    """LightningModule with a student that learns from a teacher, as in
    `Trainer().fit(DistillModule(student, teacher, kd()), loader)`.

    Checkpoints contain only the student and the state of the `DistillCallback`.

    Args:
        student: The model to train.
        teacher: As in `DistillCallback`.
        recipe: As in `DistillCallback`.
        optimizer: fn(parameters, lr=...) -> optimizer.
        split: As in `DistillCallback`.
        **options: Options of the `Distiller`: task_loss, kind, axis, ignore_index, shift_labels,
            output, check.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        *,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        split: Callable | None = None,
        **options: Any,
    ):
        super().__init__()
        self.student, self.lr, self.optimizer = student, lr, optimizer
        self.callback = DistillCallback(teacher, recipe, student='student', split=split, **options)
        self.callback.build(self)
        if self.callback.distiller.heads.several:
            raise DistillError(
                'DistillModule has one task loss. For several heads, use DistillCallback with your '
                'own module, whose training_step returns the loss of all heads.'
            )

    def forward(self, x: Any) -> Any:
        """Run the student on a batch of inputs."""
        args, kwargs = arguments(self.student, inputs(x))
        return self.student(*args, **kwargs)

    def configure_callbacks(self) -> list[Callback]:
        return [self.callback]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.student.parameters(), lr=self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.labels_loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._log('val_loss', batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._log('test_loss', batch)

    def labels_loss(self, batch: Any) -> Tensor:
        """Return the task loss."""
        x, y = self.callback.split(batch)
        d = self.callback.distiller
        logits: Any = Outputs.of(self(x), output=d.head.output).logits
        # without labels, the task loss is 0 and the student learns only from the teacher
        return d.head.task_loss(x, logits, tuple(y))[0] if len(y) else logits.new_zeros(())

    def _log(self, name: str, batch: Any) -> None:
        _, y = self.callback.split(batch)
        if not len(y):
            return  # without labels, there is no task loss
        self.log(name, self.labels_loss(batch), prog_bar=True, batch_size=len(y[0]))


def distiller_class(student: nn.Module) -> type[Distiller]:
    """Return `DetectionDistiller` for torchvision detectors, and `Distiller` for other students."""
    if not is_detector(student):
        return Distiller
    from .detection.distiller import DetectionDistiller

    return DetectionDistiller


@dataclass
class StudentCall:
    """A call of the student.

    Attributes:
        inputs: Its arguments.
        returned: What it returned.
        seen: Layer outputs that the taps recorded.
    """

    inputs: tuple
    returned: Any
    seen: dict

    @property
    def trains(self) -> bool:
        return any(t.requires_grad for t in tensors_in(self.returned))

    def number_of(self, given: list) -> int:
        """Return how many of these tensors are among the inputs of this call."""
        mine = list(tensors_in(self.inputs))
        return sum(any(is_same(t, o) for o in mine) for t in given)


def is_same(a: Tensor, b: Tensor) -> bool:
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return a is b or alike and torch.equal(a, b)


@contextmanager
def calls_of(student: nn.Module, taps: Any) -> Iterator[list[StudentCall]]:
    """Context manager that yields a list, to which the student's calls are added."""
    calls: list[StudentCall] = []

    def add(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        calls.append(StudentCall((args, kwargs), out, dict(taps.seen)))

    handle = student.register_forward_hook(add, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def batches_apart(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Context manager in which batches can be read without changing the training."""
    # hooks of the module and the data module may change a batch before the training step
    owners = module, getattr(trainer, 'datamodule', None)
    generators = Generators(*owners, outside=[trainer])
    with read_apart(*all_loaders(trainer).flattened), restored(*owners), generators.seeded(0):
        yield


def refuse_finetuning(trainer: Any, d: Distiller) -> None:
    """Raise an error if a callback stores the optimizer's parameters by their names in the module,
    because projectors have no such names.
    """
    names = [type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning)]
    if names and d.own_parameters():
        raise DistillError(
            f"{names[0]} needs all of the optimizer's parameters to belong to the module, but this "
            'recipe adds projectors. Freeze the layers in your module instead: call '
            'requires_grad_(False) before the training and requires_grad_(True) in '
            'on_train_epoch_start, and give the optimizer all parameters. Or use terms without '
            'projectors, such as at().'
        )


def all_loaders(trainer: Trainer) -> CombinedLoader:
    """Return a loader of the batches that `training_step` gets. The training data may be a
    DataLoader, or a list or dict of DataLoaders.
    """
    return CombinedLoader(trainer.train_dataloader, 'min_size')


def training_batches(trainer: Trainer, spread: bool = False) -> Iterator:
    """Yield training batches as `training_step` gets them.

    Args:
        trainer: The Trainer.
        spread: Whether to read batches that represent all samples, for a check. If True, no batches
            are yielded for an iterable dataset, because it may not be possible to read it twice.
    """
    loaders = all_loaders(trainer)
    if spread:
        sets = (getattr(o, 'dataset', None) for o in loaders.flattened)
        if any(isinstance(o, IterableDataset) for o in sets):
            return
        if isinstance(loader := trainer.train_dataloader, DataLoader):
            loaders = CombinedLoader(spread_batches(loader, BATCHES), 'min_size')
    # subtle: `batch_to_device` calls the other hooks that change a batch, but not this one
    hook, data = 'on_before_batch_transfer', getattr(trainer, 'datamodule', None)
    owner = data if is_overridden(hook, data) else trainer.lightning_module
    for batch, *_ in loaders:
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(getattr(owner, hook)(batch, 0))


def training_progress(trainer: Trainer) -> float | None:
    """Return the progress of the training, from 0 to 1, for schedules. Return None if the number of
    steps is unknown.
    """
    steps = trainer.estimated_stepping_batches
    return trainer.global_step / steps if 0 < steps < math.inf else None
