"""The tensors that the terms of one batch need, and which positions count.

A mask has the logits' shape without the class axis."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from ..base.class_mapping import grouped, taught_part
from ..base.distributed import gather_rows, world_size
from ..base.outputs import (
    DistillError,
    Draws,
    LinearLogits,
    Outputs,
    TopK,
    as_plain,
    map_tensors,
)
from ..base.task import Task, fit_labels, shape_of_labels
from .teacher_gain import label_errors

__all__ = [
    'Batch',
    'all_classes',
    'blend',
    'both',
    'inputs_and_labels',
    'of_all_processes',
    'plain_logits',
    'zero_loss',
]


@dataclass
class Batch:
    """Everything the terms of one batch need. If the teacher has different classes, only those that
    it knows.

    Attributes:
        others: Second labels of a mixed batch.
        lam: Weight of the first labels. None if the batch is not mixed.
    """

    student: Outputs
    teacher: Outputs
    targets: tuple
    others: tuple
    lam: Tensor | None
    task: Task
    progress: float | None

    def __post_init__(self) -> None:
        self.pairs: dict = {}  # term -> (student's tensor, teacher's tensor) of each of its pairs of layers
        if self.teacher is None or (known := self.teacher.classes) is None:
            return
        part = lambda y: taught_part(self.student.logits, y, known, self.task)
        self.targets, self.others = [
            (part(y[0])[1], *y[1:]) if len(y) else y for y in (self.targets, self.others)
        ]
        self.student = replace(self.student, logits=part(None)[0])

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """One mask each for the first and the second labels: where both models and the label count.
        None for everywhere.
        """
        models = both(self.student.mask, self.teacher.mask)
        return [
            both(models, label_mask(y[0] if len(y) else None, self.student.logits, self.task))
            for y in (self.targets, self.others)
        ]

    @cached_property
    def mask(self) -> Tensor | None:
        """Where a term without labels counts. In a mixed batch, weighted by the labels that count."""
        first, other = self.masks
        if self.lam is None:
            return first
        if first is None and other is None:
            return None
        pairs: Any = (first, other), (other, first)
        first, other = [(torch.ones_like(n) if m is None else m).to(self.lam) for m, n in pairs]
        return blend(first, other, self.lam)

    @cached_property
    def dense_teacher(self) -> Outputs:
        """The teacher's outputs with all logits, for losses that need these."""
        logits: Any = self.teacher.logits
        return replace(self.teacher, logits=logits.dense())

    def teacher_for(self, term: Any) -> Outputs | None:
        """Return the teacher's outputs as a term takes them.

        Hidden states and draws stay as they are for the losses that take them. Draws are refused
        for all others.
        """
        t = self.teacher if self.teacher is None else self.teacher.logits
        if term.layers is not None:
            return self.teacher
        if isinstance(t, Draws) and not term.linear:
            raise DistillError(t.refusal(term.name))
        if isinstance(t, LinearLogits):
            last = self.task.kind == 'softmax' and self.task.axis % t.dim() == t.dim() - 1
            return self.teacher if last and term.positionwise else self.dense_teacher
        return self.teacher

    def label_errors(self) -> Tensor | None:
        """Return `label_errors` of both models. None if there are no labels, or none that fit."""
        labels = [y[0] for y in (self.targets, self.others) if len(y)]
        s, t = self.student.logits, self.teacher.logits
        if not labels or not isinstance(s, Tensor) or not isinstance(t, Tensor):
            return None
        return label_errors(s, t, labels, self.task, lam=self.lam, mask=self.mask)

    def pairs_of(self, name: str, make: Callable) -> Any:
        """Return what a term compares. It is computed only once, since each run of a projector with
        a batch norm changes its statistics.
        """
        if name not in self.pairs:
            self.pairs[name] = make()
        return self.pairs[name]

    def with_teacher(self, name: str, outputs: Callable) -> 'Batch':
        """Return this batch with different outputs of the teacher for one term.

        Args:
            outputs: fn(the teacher's tensors that the term compares) -> those to use instead.
        """
        other = copy.copy(self)
        s, t = zip(*self.pairs[name])
        other.pairs = {name: [*zip(s, outputs(t))]}
        return other

    def options(self, term: Any, mask: Tensor | None) -> dict:
        """Return a term's options, including those that come from this batch. Only terms on logits
        get an axis and a mask.
        """
        context = dict(kind=self.task.kind, ignore_index=self.task.ignore_index)
        # a sample counts if any of its positions does
        if mask is not None and term.samples:
            mask = mask.reshape(len(mask), -1).amax(1)
        if term.layers is None:
            context |= dict(axis=self.task.axis, **({} if mask is None else dict(mask=mask)))
        return term.options_at(self.progress, context)


def inputs_and_labels(batch: Any) -> tuple[Any, tuple]:
    """Split a batch into inputs and labels: the first item of a tuple and the others, or a dict and
    its labels. Other batches have no labels.
    """
    if isinstance(batch, (tuple, list)):
        return batch[0], tuple(batch[1:])
    if not isinstance(batch, Mapping):
        return batch, ()
    names = [k for k in ('labels', 'label') if k in batch]
    return {k: v for k, v in batch.items() if k not in names}, tuple(batch[k] for k in names)


def of_all_processes(
    term: Any, pairs: Sequence, targets: tuple, options: dict, task: Task
) -> tuple:
    """Gather pairs, targets and options over all processes of a distributed run.

    Args:
        term: A term whose loss compares samples with each other.
        pairs: (student tensor, teacher tensor) for each pair of layers.
        targets, options: Targets and options of the loss.
    """
    # subtle: not in validation, which may run in only one process
    if world_size() == 1 or not torch.is_grad_enabled():
        return pairs, targets, options
    if term.layers is None and 'mask' in term.accepts:
        s, mask = pairs[0][0], options.get('mask')
        shape = s.shape[:1] if term.samples else shape_of_labels(s.shape, task.axis)
        # subtle: even if all positions count here, since in a different process some may not
        mask = s.new_ones(shape) if mask is None else mask.to(s).expand(shape)
        options = {**options, 'mask': gather_rows(mask)}
    return *map_tensors((pairs, targets), gather_rows), options


def blend(first: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Compute lam*first + (1-lam)*other, with one lam for all samples or one for each."""
    lam = (
        lam.to(first).reshape(-1, *[1] * (first.dim() - 1))
        if lam.numel() > 1
        else lam.to(first).squeeze()
    )
    return torch.lerp(other, first, lam)


def both(*masks: Tensor | None) -> Tensor | None:
    """Combine masks: True where all of them count. None counts everywhere."""
    given = [m for m in masks if m is not None]
    return reduce(torch.mul, given) if given else None


def label_mask(y: Any, logits: Any, task: Task) -> Tensor | None:
    """Return where a label counts, or None for everywhere.

    Args:
        y: Labels, or None.
        logits: Logits of the same batch. None if only layers are compared.
        task: The `Task` that describes the logits.
    """
    if (
        task.kind != 'softmax'
        or logits is None
        or not isinstance(y, Tensor)
        or y.is_floating_point()
    ):
        return None
    if (y := fit_labels(as_plain(y), logits.shape, task)) is None:
        return None
    on = y != task.ignore_index
    # subtle: the values are checked only on a CPU, since a step would have to wait for a GPU
    return None if on.is_cpu and not torch.compiler.is_compiling() and on.all() else on


def zero_loss(logits: Tensor) -> Tensor:
    """Return 0 with a gradient of 0 for every parameter behind the logits. DistributedDataParallel
    expects a gradient for each parameter, even if the task loss has weight 0 and the terms compare
    only inner layers.
    """
    return logits.where(logits.new_zeros((), dtype=torch.bool), 0.0).sum()


PLAIN = 2**22  # logits that are computed of hidden states for a check


def plain_logits(
    student: Outputs, teacher: Outputs | None, targets: Sequence = ()
) -> tuple[Outputs, Tensor | None, Sequence]:
    """Return (student's outputs, teacher's logits as a tensor or None, targets) for checks that need
    all logits.

    With hidden states, these are of the first samples of the batch. With draws, the teacher's are
    None.
    """
    t: Any = getattr(all_classes(teacher, student), 'logits', None)
    if isinstance(t, Draws):
        return student, None, targets
    if not isinstance(t, LinearLogits):
        return student, t, targets
    k = max(PLAIN // (t.shape.numel() // len(t)), 1)
    few = lambda o: o[:k] if isinstance(o, Tensor) and o.dim() else o
    t = replace(t, hidden=t.hidden[:k]).dense()
    return replace(student, logits=few(student.logits)), t, tuple(map(few, targets))


def all_classes(teacher: Outputs | None, student: Outputs) -> Outputs | None:
    """Expand stored outputs that hold only the most likely classes, since losses need all classes."""
    if teacher is None or not isinstance(teacher.logits, TopK):
        return teacher  # hidden states and draws are left as they are for the losses that take them
    s: Any = student.logits
    if teacher.classes is not None:
        s = grouped(s, teacher.classes, teacher.logits.axis)
    return replace(teacher, logits=teacher.logits.dense(s))
