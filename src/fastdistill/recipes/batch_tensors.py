"""Collect the tensors that terms need from one batch, and find the positions to include in the
loss.

Masks have the shape of the logits without the class axis.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from ..base.class_mapping import grouped, taught_part, taught_task
from ..base.distributed import gather_rows, world_size
from ..base.outputs import (
    DistillError,
    Draws,
    LinearLogits,
    Outputs,
    TopK,
    as_plain,
    map_tensors,
    tensors_in,
)
from ..base.task import Task, fit_labels, shape_of_labels
from .teacher_gain import label_errors


@dataclass
class Batch:
    """Data that terms need to compute their values for one batch. If the teacher has different
    classes, only the classes that the teacher knows are kept.

    Attributes:
        others: Second labels of a mixed batch.
        lam: Weight of the first labels in a batch mixed by MixUp or CutMix. None if the batch is
            not mixed.
    """

    student: Outputs
    teacher: Outputs
    targets: tuple
    others: tuple
    lam: Tensor | None
    task: Task
    progress: float | None

    def __post_init__(self) -> None:
        # {term name: [(student tensor, teacher tensor) for each pair of layers]}
        self.pairs: dict = {}
        if self.teacher is None:
            return
        self.teacher = no_wider(self.teacher, self.student)
        if (known := self.teacher.classes) is None:
            return
        part = lambda y: taught_part(self.student.logits, y, known, self.task)
        self.targets, self.others = [
            (part(y[0])[1], *y[1:]) if len(y) else y for y in (self.targets, self.others)
        ]
        self.student = replace(self.student, logits=part(None)[0])
        self.task = taught_task(self.task, known)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Masks for the first and for the second labels. A position is included if neither the
        masks of the models nor the label exclude it. None means that all positions are included.
        """
        models = both(self.student.mask, self.teacher.mask)
        return [
            both(models, label_mask(y[0] if len(y) else None, self.student.logits, self.task))
            for y in (self.targets, self.others)
        ]

    @cached_property
    def mask(self) -> Tensor | None:
        """Mask for terms that do not use labels. In a mixed batch, the masks of the first and
        second labels are mixed by `lam`.
        """
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
        """Teacher outputs with all logits, for losses that cannot use hidden states."""
        logits: Any = self.teacher.logits
        return replace(self.teacher, logits=logits.dense())

    def teacher_for(self, term: Any) -> Outputs | None:
        """Return the teacher's outputs, converted to a form that the term supports.

        Hidden states are expanded to logits unless the loss supports them. Draws (sampled classes)
        raise an error unless the loss supports them.
        """
        t = self.teacher if self.teacher is None else self.teacher.logits
        if term.layers is not None:
            return self.teacher
        if isinstance(t, Draws) and not term.linear:
            raise DistillError(t.refusal(term.name))
        if isinstance(t, Draws) and term.fade:
            raise DistillError(t.refusal_to_fade(term.name))
        if isinstance(t, LinearLogits):
            return self.teacher if takes_linear(term, t, self.task) else self.dense_teacher
        return self.teacher

    def label_errors(self) -> Tensor | None:
        """Return `label_errors` of both models. Return None if there are no labels, or if they do
        not fit the logits.
        """
        s, t = self.student.logits, self.teacher.logits
        labels: list = [y[0] for y in (self.targets, self.others) if len(y)]
        if not labels or not isinstance(s, Tensor) or not isinstance(t, (Tensor, LinearLogits)):
            return None
        if isinstance(t, Tensor):
            return label_errors(s, t, labels, self.task, lam=self.lam, masks=self.masks)
        # subtle: like the losses, compute the logits of only a few samples at a time
        labels = [y if y.shape == s.shape else fit_labels(y, s.shape, self.task) for y in labels]
        few, n = max(PLAIN * len(s) // s.numel(), 1), len(s)
        total: Any = 0
        for i in range(0, n, few):
            some = lambda o, i=i: o[i : i + few] if o.dim() and len(o) == n else o
            own = map_tensors((s, t.hidden, labels, self.lam, self.masks), some)
            errors = label_errors(
                own[0],
                replace(t, hidden=own[1]).dense(),
                own[2],
                self.task,
                lam=own[3],
                masks=own[4],
            )
            if errors is None:
                return None
            total = total + errors
        return total

    def pairs_of(self, name: str, make: Callable) -> Any:
        """Return the tensors that a term compares. The tensors are computed only once, because each
        call of a projector updates its batch norm statistics.
        """
        if name not in self.pairs:
            self.pairs[name] = make()
        return self.pairs[name]

    def with_teacher(self, name: str, outputs: Callable) -> 'Batch':
        """Return a copy of this batch with different teacher outputs for one term.

        Args:
            outputs: fn(teacher tensors that the term compares) -> tensors to use instead.
        """
        other = copy.copy(self)
        s, t = zip(*self.pairs[name])
        other.pairs = {name: [*zip(s, outputs(t))]}
        return other

    def options(self, term: Any, mask: Tensor | None) -> dict:
        """Return the options of a term, including those that depend on this batch. Only terms on
        logits get `axis` and `mask`.
        """
        context = dict(kind=self.task.kind, ignore_index=self.task.ignore_index)
        # include a sample if any of its positions is included
        if mask is not None and term.samples:
            mask = mask.reshape(len(mask), -1).amax(1)
        if term.layers is None:
            context |= dict(axis=self.task.axis, **({} if mask is None else dict(mask=mask)))
        return term.options_at(self.progress, context)


def takes_linear(term: Any, logits: LinearLogits, task: Task) -> bool:
    """Return True if a term on logits can use hidden states and the output layer."""
    last = task.kind == 'softmax' and task.axis % logits.dim() == logits.dim() - 1
    return last and term.positionwise


def inputs_and_labels(batch: Any) -> tuple[Any, tuple]:
    """Split a batch into inputs and labels. In a tuple or list, the first item is the input and the
    others are labels. In a dict, the keys 'labels' and 'label' contain labels. Any other batch has
    no labels.
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
    """Gather pairs, targets and options from all processes of a distributed run.

    Args:
        term: A term whose loss compares samples with each other.
        pairs: (student tensor, teacher tensor) for each pair of layers.
        targets, options: Targets and options with which the loss is called.
    """
    # subtle: do not gather in validation, which may run in only one process
    if world_size() == 1 or not torch.is_grad_enabled():
        return pairs, targets, options
    if term.layers is None and 'mask' in term.accepts:
        s, mask = pairs[0][0], options.get('mask')
        shape = s.shape[:1] if term.samples else shape_of_labels(s.shape, task.axis)
        # subtle: gather a mask even if this process includes all positions, because another process
        # may not
        mask = s.new_ones(shape) if mask is None else mask.to(s).expand(shape)
        options = {**options, 'mask': gather_rows(mask)}
    return *map_tensors((pairs, targets), gather_rows), options


def blend(first: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Compute lam*first + (1-lam)*other, with one `lam` for all samples or one per sample."""
    lam = lam.to(first)
    lam = lam.reshape(-1, *[1] * (first.dim() - 1)) if lam.numel() > 1 else lam.squeeze()
    return torch.lerp(other, first, lam)


def both(*masks: Tensor | None) -> Tensor | None:
    """Combine masks by multiplication. A mask of None includes every position."""
    given = [m for m in masks if m is not None]
    return reduce(torch.mul, given) if given else None


def label_mask(y: Any, logits: Any, task: Task) -> Tensor | None:
    """Return a mask without ignored labels. Return None if all positions are included.

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
    # subtle: check the values only on a CPU, because on a GPU the check would force a
    # synchronization
    return None if on.is_cpu and not torch.compiler.is_compiling() and on.all() else on


def zero_loss(logits: Tensor) -> Tensor:
    """Return 0 with a gradient of 0 for every parameter behind the logits. DistributedDataParallel
    expects a gradient for each parameter, even if the task loss has weight 0 and the terms compare
    only inner layers.
    """
    return logits.where(logits.new_zeros((), dtype=torch.bool), 0.0).sum()


PLAIN = 2**22  # maximum number of logits to compute from hidden states for a check


def plain_logits(
    student: Outputs, teacher: Outputs | None, targets: Sequence = ()
) -> tuple[Outputs, Tensor | None, Sequence]:
    """Return (student outputs, teacher logits as a tensor or None, targets) for checks that need
    all logits.

    If the teacher's outputs are hidden states, logits are computed only for the first samples, and
    the student outputs and targets are cut to the same samples. If the teacher's outputs are draws
    (sampled classes), the teacher logits are None.
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


def no_wider(teacher: Outputs, student: Outputs) -> Outputs:
    """Convert a teacher's float64 outputs to float32, unless the student's are float64 too.

    Otherwise, the loss would be float64, which fastai's recorder does not accept.
    """
    wide = lambda o: any(t.dtype == torch.float64 for t in tensors_in((o.logits, o.feats)))
    if not wide(teacher) or wide(student):
        return teacher
    narrow = lambda t: t.float() if t.dtype == torch.float64 else t
    return replace(
        teacher,
        logits=map_tensors(teacher.logits, narrow),
        feats=map_tensors(teacher.feats, narrow),
    )


def all_classes(teacher: Outputs | None, student: Outputs) -> Outputs | None:
    """Expand stored outputs that contain only the most likely classes to all classes."""
    if teacher is None or not isinstance(teacher.logits, TopK):
        # hidden states and draws are not expanded, because some losses use them directly
        return teacher
    s: Any = student.logits
    if teacher.classes is not None:
        s = grouped(s, teacher.classes, teacher.logits.axis)
    return replace(teacher, logits=teacher.logits.dense(s))
