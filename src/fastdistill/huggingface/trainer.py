"A Hugging Face `Trainer` with a teacher."

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from ..base.distributed import average_gradients, mean_over_ranks
from ..base.model_state import read_state, write_state
from ..base.outputs import DistillError
from ..base.random_state import RandomGuard
from ..distiller.distiller import Distiller
from ..distiller.loader_batches import read_apart
from ..distiller.trainer_integration import (
    add_parameters,
    check_first,
    complete,
    load_state,
    needs_example,
    reset_gradients,
    takes_part,
    training_state,
)
from ..features.layer_hooks import Taps
from ..features.probe import untouched
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe, Term
from ..teachers.teacher import Teacher
from .transformers_models import (
    BatchReader,
    has_loss,
    names_taken,
    predicts,
    question_logits,
    refuse_detector,
    teacher_for,
    without_loss,
)

STATE_FILE = 'distillation.pt'  # name of our file in a checkpoint folder


if TYPE_CHECKING:
    Base: Any = Trainer  # the mixin uses its attributes
else:
    Base = object


class DistillationMixin(Base):
    """Mixin that adds a teacher to your own `Trainer`, as in `class MyTrainer(DistillationMixin,
    Trainer)`.

    The mixin replaces the loss of training batches. The evaluation loss is still the task loss, and
    only the student is saved.

    Args:
        *args: Arguments of the Trainer.
        teacher: A model, a `Teacher`, or a list of models or `Teacher`s (an ensemble).
        recipe: A recipe such as `kd() + at()`, or a `Term`. None to let `auto` choose a recipe for
            the student's kind of outputs.
        kind: 'softmax', 'sigmoid' or 'regression'. None to infer the kind from the student's config
            and the labels.
        axis: Class axis. None for the last axis, or for axis 1 in question answering and
            segmentation.
        output: Output of both models to distill, as a name or a function. None for 'logits'.
        check: If True, check for mistakes before training, on a few batches of the evaluation set
            (or of the training set if there is none) and in the first batch.
        **kwargs: Keyword arguments of the Trainer.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        kind: str | None = None,
        axis: int | None = None,
        output: str | int | Callable | None = None,
        check: bool = True,
        **kwargs: Any,
    ):
        self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
        self.recipe = recipe
        self.asked = dict(kind=kind, axis=axis, output=output, check=check)
        self.part_means = PartMeans()
        self.distiller: Any = None  # built with the optimizer
        self.counts_items: bool | None = None
        self.last_step: int | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise DistillError(
                f'This process has {self.args.n_gpu} GPUs, which the Trainer would use with '
                "DataParallel, but then layers can't be read. Start one process for each GPU with "
                'torchrun or accelerate launch, or select one with CUDA_VISIBLE_DEVICES=0.'
            )

    # setup before the first batch

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer and add the parameters of the projectors."""
        if self.distiller is None or self.distiller.student is not self.model:
            self._build()
        optimizer = super().create_optimizer(*args, **kwargs)
        add_parameters(optimizer, self.distiller)
        self.distiller.start()
        self.last_step, self.part_means = None, PartMeans()
        return optimizer

    def _build(self) -> None:
        """Build the Distiller for this model."""
        asked: dict[str, Any] = self.asked
        kind = asked['kind'] or predicts(self.model)
        batch: Any = None
        if kind is None:
            batch = example_batch(self)
            kind = predicts(
                self.model, next((batch[k] for k in self.label_names if k in batch), None)
            )
        reader = self.reader
        output = question_logits if reader.answers and asked['output'] is None else asked['output']
        task: dict[str, Any] = dict(
            kind=kind or 'softmax', axis=reader.axis if asked['axis'] is None else asked['axis']
        )
        teacher = teacher_for(self.teacher, self.model, **task, output=output)
        ignore = getattr(getattr(self.model, 'config', None), 'semantic_loss_ignore_index', None)
        d = Distiller(
            self.model,
            teacher,
            self.recipe,
            **task,
            ignore_index=ignore,
            output=output,
            check=asked['check'],
        )
        if output is None and (d.head.waits or any(t.layers is None for t in d.recipe.terms)):
            refuse_detector(self.model)
        d.links.to(self.args.device)
        # subtle: skip the check if weights are sharded over processes, because such a model can't
        # run in only one process
        if asked['check'] and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            loader, part = loader_to_check(self)
            with read_apart(loader):
                batches = map(reader.inputs_and_labels, map(self._prepare_inputs, loader))
                check_first(d, batches, placed=True, part=part)
        if needs_example(d):
            batch = example_batch(self) if batch is None else batch
            complete(d, reader.shared_inputs(batch), bool(reader.labels(batch)))
        # subtle: set only now, so that the next training checks again after an error
        self.distiller = d

    @property
    def reader(self) -> BatchReader:
        """Reader of the Trainer's batches."""
        filtered = self.args.remove_unused_columns
        return BatchReader(self.model, self.teacher, self.label_names, filtered)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep dataset columns that only the teacher uses, such as token_type_ids."""
        new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if new:
            self._signature_columns += sorted(
                names_taken(self.teacher) - set(self._signature_columns)
            )

    # training step

    def compute_loss(
        self, model: nn.Module, inputs: Mapping, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the total loss of a training batch, or the task loss of an evaluation batch."""
        reader = self.reader
        x, x_teacher = reader.inputs(inputs)
        progress = self.state.global_step / self.state.max_steps if self.state.max_steps else None
        if not model.training or not takes_part(self.distiller, progress):
            return super().compute_loss(model, x, return_outputs=return_outputs, **kwargs)
        d, scale = self.distiller, self._scale(x, **kwargs)
        with Taps(model, d.student_layers(d.active_terms(progress))) as taps:
            task, raw = self._run(model, x, kwargs, progress)
            s = d.student_outputs(without_loss(raw), taps.pop(), reader.tokens(x))
        with self.accelerator.autocast():
            t = d.teacher_outputs(x_teacher, progress)
        targets = reader.targets(x, s.logits)
        reader.hide_padding(x, s, t)
        r = d.compute(s, t, None if task is None else task / scale, targets, progress=progress)
        self.part_means.add(r)
        return (r.total * scale, raw) if return_outputs else r.total * scale

    def _run(self, model: nn.Module, x: Mapping, options: Mapping, progress: float | None) -> tuple:
        """Return the task loss computed by the Trainer, and the student's outputs. The task loss is
        None if the batch has no labels.
        """
        if self.reader.labels(x) or x.get('return_loss'):
            return super().compute_loss(model, dict(x), return_outputs=True, **options)
        raw = model(**x)
        # subtle: a loss in the outputs shows that one of the inputs is a label
        if self.distiller.recipe.task_at(progress) or self.recipe is None and has_loss(raw):
            raise DistillError(
                f'The batches have no labels: label_names={self.label_names}, but a batch has '
                f'{", ".join(x)}. Specify the labels, as in TrainingArguments(label_names=[...]), or '
                'use alpha=1 or soft_labels() to learn only from the teacher.'
            )
        return None, raw

    def _scale(self, x: Mapping, num_items_in_batch: Any = None) -> Any:
        """Return the factor by which the Trainer scales the mean loss over the labels of this
        batch.

        The Trainer divides the summed loss by `num_items_in_batch`, the number of labels in all
        batches of an optimizer step. Depending on its arguments, the Trainer also averages over
        processes.
        """
        mine = (
            getattr(self, 'model_accepts_loss_kwargs', False)
            or getattr(self, 'compute_loss_func', None) is not None
        )
        if num_items_in_batch is None or not mine:
            return 1
        ranks = (
            self.accelerator.num_processes
            if getattr(self.args, 'average_tokens_across_devices', False)
            else 1
        )
        if not self._counts_items(x):
            return ranks
        return self.reader.number_of_labels(x).clamp_min(1) * ranks / num_items_in_batch

    def _counts_items(self, x: Mapping) -> bool:
        """Return True if the task loss of this model depends on `num_items_in_batch`.

        Some models ignore this argument, so this method tests the model once.
        """
        if self.counts_items is None:
            # subtle: without labels, the loss is 0 for any number
            if not self.reader.number_of_labels(x):
                return True
            tried = []
            with untouched(self.model):
                for n in (torch.tensor(1), torch.tensor(2)):
                    tried.append(super().compute_loss(self.model, dict(x), num_items_in_batch=n))
            self.counts_items = not torch.equal(*tried)
        return self.counts_items

    def prediction_step(
        self, model: nn.Module, inputs: Mapping, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Evaluate the student on a batch, without the columns that only the teacher uses."""
        own = self.reader.inputs(inputs)[0]
        x = {k: v for k, v in inputs.items() if k in own}
        return super().prediction_step(model, x, *args, **kwargs)

    # training loop

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the student (see `Trainer.train`)."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.distiller is not None:
                self.distiller.stop()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # subtle: after an optimizer step, the Trainer resets the gradients of the model but not
        # those of the projectors
        if self.last_step != self.state.global_step:
            reset_gradients(self.distiller)
        self.last_step = self.state.global_step
        loss = super().training_step(*args, **kwargs)
        average_gradients(self.distiller.own_parameters())
        return loss

    def log(self, logs: dict, *args: Any, **kwargs: Any) -> None:
        """Log the values. If they include the training loss, also log the mean of each loss."""
        super().log({**logs, **self.part_means.pop()} if 'loss' in logs else logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_state(os.path.join(output_dir, STATE_FILE), training_state(self.distiller))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else os.path.join(checkpoint, STATE_FILE)
        if file is not None and os.path.isfile(file):
            load_state(self.distiller, read_state(file, 'Resume from an earlier checkpoint.'))


class DistillationTrainer(DistillationMixin, Trainer):
    """`Trainer` with a teacher, as in `DistillationTrainer(model, args, train_dataset=...,
    teacher=..., recipe=kd())`.
    """


class PartMeans:
    """Means of the losses over the training batches since the last log."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple] = {}

    def add(self, r: Distilled) -> None:
        for k, v in r.losses.items():
            total, n = self.sums.get(k, (0.0, 0))
            self.sums[k] = total + v, n + 1

    def pop(self) -> dict[str, float]:
        means = {f'{k}_loss': (v / n).float() for k, (v, n) in self.sums.items()}
        self.sums = {}
        mean_over_ranks(means.values())
        return {k: v.item() for k, v in means.items()}


def loader_to_check(trainer: Any) -> tuple[DataLoader, str]:
    """Return (DataLoader for the check before training, name of the dataset).

    An iterable dataset is not used, because it may not be possible to read it twice. If there is no
    other dataset, the DataLoader is empty.
    """
    valid = trainer.eval_dataset
    if isinstance(valid, dict):
        valid = next(iter(valid.values()))
    data = dict(validation=valid, training=trainer.train_dataset)
    part = next((k for k, v in data.items() if hasattr(v, '__len__') and len(v)), '')
    if not part:
        return DataLoader(cast(Dataset, [])), part
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    order = torch.Generator().manual_seed(0)
    size = trainer.args.eval_batch_size
    loader = DataLoader(data[part], size, shuffle=True, generator=order, collate_fn=collate)
    return loader, part


def example_batch(trainer: Any) -> Any:
    """Return a training batch of a Trainer, without changing any state."""
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    data, size = trainer.train_dataset, trainer.args.train_batch_size
    with RandomGuard():
        loader = (
            trainer.get_train_dataloader()
            if data is None
            else DataLoader(data, size, collate_fn=collate)
        )
    with read_apart(loader):
        return trainer._prepare_inputs(next(iter(loader)))
