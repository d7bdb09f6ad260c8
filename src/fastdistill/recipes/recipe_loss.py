"Compute the loss of a recipe from the outputs of student and teacher for one batch."

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.distributed import rank
from ..base.outputs import (
    DistillError,
    DistillWarning,
    LinearLogits,
    Outputs,
    as_plain,
    tensors_in,
)
from ..base.task import Task
from ..features.layer_names import named
from .batch_tensors import Batch, all_classes, blend, of_all_processes, takes_linear, zero_loss
from .gradient_balance import GradientRatios
from .gradient_norms import part_at
from .gradient_shares import gradient_shares, swamped
from .layer_link import Link, own_copy


@dataclass
class Distilled:
    """The loss of a batch and its parts.

    Attributes:
        task: Task loss, without its weight. None if there are no labels.
        taught: Weighted sum of all terms. None if no term has a nonzero weight.
        parts: {name: value of a term}, unweighted and detached. In training, only terms with a
            nonzero weight are included.
        weights: {name: weight of each value}, including 'task'. A 0-dim tensor for a term with a
            gradient ratio. All weights are divided by 1 plus the sum of the gradient ratios. If a
            term faded, the actual weight of the task loss is larger.
        terms: {name: weighted term}, with its gradient. `taught` is the sum of these terms. If a
            term faded, it also includes the loss to which the gradient ratio was given instead.
    """

    task: Tensor | None
    taught: Tensor | None
    parts: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, Tensor]:
        """{name: value} of the task loss, if there are labels, and of all terms, detached."""
        return self.parts if self.task is None else {'task': self.task.detach(), **self.parts}

    @property
    def total(self) -> Any:
        """The loss to call `backward` on."""
        # subtle: leave out a task loss with weight 0, since 0*nan is nan
        if not self.weights['task']:
            return self.taught
        own: Any = self.task
        if self.weights['task'] != 1:
            own = self.weights['task'] * own
        return own if self.taught is None else own + self.taught

    @property
    def added(self) -> Tensor | None:
        """`total` minus the task loss, for trainers that already have that loss. None if it is
        zero.
        """
        if self.task is None or self.weights['task'] == 1:
            return self.taught
        rest = (self.weights['task'] - 1) * self.task
        return rest if self.taught is None else rest + self.taught


class RecipeLoss(nn.Module):
    """Module that computes the loss of a recipe from the outputs of both models. The module owns
    the projectors, the losses with parameters and the measured gradient norms.

    Args:
        task: The `Task` that describes the logits.
        weight: Weight of this loss if it belongs to one of several heads.
    """

    links: Any  # {term: its `Link`s}

    def __init__(self, recipe: Any, task: Task, weight: float = 1.0) -> None:
        super().__init__()
        # subtle: register the student as the first child, so that its parameters come first in
        # `Distiller.parameters()`
        self.register_module('student', None)
        self.task, self.weight, self.links = task, weight, nn.ModuleDict()
        self.measures = True  # whether gradient norms are measured for the report
        self.seen: set[str] = set()  # losses whose gradient norms were measured
        # {loss: fraction of the gradient}, the task loss is 'task'. None until the first training batch
        self.gradient_shares: dict | None = None
        self.take(recipe)

    def take(self, recipe: Any) -> None:
        """Use this recipe from now on. After the first batch, its terms may only compare logits."""
        self.recipe = recipe
        self.forget()
        self.links.clear()
        for t in recipe.terms:
            check_kind(t, self.task.kind)
            if t.layers is None:
                self.links[t.name] = nn.ModuleList([Link(own_copy(t.loss))])

    def forget(self) -> None:
        """Forget the measured gradients, for a student with different weights."""
        self.ratios = GradientRatios(self.recipe)

    @property
    def layered(self) -> list:
        return [t for t in self.recipe.terms if t.layers is not None]

    def active_terms(self, progress: float | None = None) -> list:
        """Return the terms that a batch needs: those with a nonzero weight, or all of them if
        gradients are off, as in validation.

        Args:
            progress: Fraction of the training that is done, for schedules.
        """
        return [
            t
            for t in self.recipe.terms
            if not torch.is_grad_enabled() or t.weight_at(progress) != 0
        ]

    def compute(
        self,
        student: Outputs,
        teacher: Outputs | None,
        task: Tensor | None = None,
        targets: Sequence = (),
        *,
        progress: float | None = None,
        mixed: tuple | None = None,
        of_heads: bool = False,
    ) -> Distilled:
        """Compute the loss of a batch from the outputs of both models.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs. None if no term needs them (see `active_terms`).
            task: Task loss of the batch. None if there are no labels.
            targets: Labels, for the losses that read them.
            progress: Fraction of the training that is done, for schedules.
            mixed: (second labels, weight of the first labels) of a batch of MixUp or CutMix.
            of_heads: True if `task` is the loss of several heads, and this is one of them.
        """
        task, terms = None if task is None else as_plain(task), self.active_terms(progress)
        weights = self.weights_at(progress, of_heads)
        if task is None and weights['task']:
            raise DistillError(
                'This batch has no labels, but the recipe gives the task loss the weight '
                f'{weights["task"]:g}: use alpha=1, or soft_labels(), to train only from the teacher'
            )
        if task is not None and weights['task'] and task.numel() != 1:
            raise DistillError(
                f'The task loss has the shape {tuple(task.shape)}, but must be one number per batch: '
                "use a mean over the batch, such as reduction='mean'."
            )
        if terms and teacher is None:
            raise DistillError(
                f"{terms[0].name} needs the teacher's outputs for this batch, but got None. "
                'Pass what teacher_outputs() returned.'
            )
        if isinstance(s := student.logits, LinearLogits) and not all(
            takes_linear(t, s, self.task) and not t.has_grad_ratio
            for t in terms
            if t.layers is None
        ):
            student = replace(student, logits=s.dense())
        known: Any = all_classes(teacher, student)
        others, lam = mixed or ((), None)
        b = Batch(student, known, tuple(targets), others, lam, self.task, progress)
        if torch.is_grad_enabled() and isinstance(self.student, nn.Module):
            check_gradients(self.student, terms, self.links, student)
        values = {t.name: self._value(t, b) for t in terms}
        counted = {
            k: v for k, v in dict(task=task, **values).items() if v is not None and weights[k] != 0
        }
        weights, rest = self._measured(counted, weights, student, b, of_heads)
        weighted = {k: weights[k] * v for k, v in counted.items() if k in values}
        taught = [*weighted.values(), *([] if rest is None else [rest])]
        if not weights['task'] and student.logits is not None:
            taught.append(zero_loss(cast(Tensor, student.logits)))
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            {k: v.detach() for k, v in values.items()},
            weights,
            weighted,
        )

    def weights_at(self, progress: float | None, of_heads: bool = False) -> dict[str, Any]:
        """Return {name: weight or gradient ratio} of each loss. The task loss is named 'task'.

        If one task loss is computed for all heads, it already includes the weight of this head. So
        do gradient ratios, which are relative to the task loss. A head with weight 0 has no terms.
        """
        weights = self.recipe.weights_at(progress)
        if not of_heads or self.weight == 1:
            return weights
        kept = {'task', *(self.ratios if self.weight else ())}
        return {k: w if k in kept else self.weight * w for k, w in weights.items()}

    def without_labels(
        self,
        student: Outputs,
        teacher: Outputs | None,
        *,
        progress: float | None = None,
        of_heads: bool = False,
    ) -> Tensor:
        """Compute the weighted sum of the terms that read no labels, for unlabeled inputs used in
        addition to labeled batches. Gradient ratios use the norms that were measured in the labeled
        batches.

        Args:
            student: The student's outputs for the unlabeled inputs.
            teacher: The teacher's outputs for the same inputs.
            progress: Fraction of the training that is done, for schedules.
            of_heads: As in `compute`.
        """
        terms = [t for t in self.active_terms(progress) if not t.n_targets]
        if not terms:
            return zero_loss(cast(Tensor, student.logits))
        known: Any = all_classes(teacher, student)
        b = Batch(student, known, (), (), None, self.task, progress)
        values = {t.name: self._value(t, b) for t in terms}
        weights = self.ratios.weights(self.weights_at(progress, of_heads), values)
        total: Any = sum(weights[k] * v for k, v in values.items())
        return total

    def _value(self, term: Any, b: Batch) -> Tensor:
        """Compute the value of a term. If the term reads labels and each sample has two labels, the
        values for both labels are mixed, as in the task loss.
        """
        if b.lam is None or term.n_targets == 0:
            return self._of_labels(term, b, b.targets, b.options(term, b.mask))
        each = b.lam.numel() > 1
        if each and ('reduction' not in term.accepts or term.layers is not None):
            raise DistillError(
                f'{term.name} reads labels, and MixUp gives each sample two of them. With MixUp, your '
                "own loss needs the keyword-only option `reduction` ('none' returns one value per "
                'sample). CutMix does not need this option, because it mixes all labels of a batch with '
                'the same weight.'
            )
        options = [b.options(term, m) | (dict(reduction='none') if each else {}) for m in b.masks]
        first, other = [
            self._of_labels(term, b, y, o) for y, o in zip((b.targets, b.others), options)
        ]
        v = blend(first, other, b.lam)
        if not v.dim():
            return v
        # subtle: average over the included labels (all labels if the loss has no `mask` option)
        return v.sum() / (
            v.numel()
            if b.mask is None or 'mask' not in options[0]
            else b.mask.sum().clamp_min(1e-6)
        )

    def _of_labels(self, term: Any, b: Batch, targets: Sequence, options: dict[str, Any]) -> Tensor:
        """Compute the value of a term for one set of labels, summed over its pairs of layers as in
        the papers.
        """
        links, targets = self.links[term.name], targets[: term.n_targets]
        if term.n_targets and len(targets) < term.n_targets:
            raise DistillError(
                f'{term.name} needs {term.n_targets} target(s) in addition to the outputs of both '
                f'models, but this batch has {len(targets)}'
            )
        make = lambda: [k.tensors(b.student, b.teacher_for(term)) for k in links]
        pairs = b.pairs_of(term.name, make)
        if term.relates:
            pairs, targets, options = of_all_processes(term, pairs, tuple(targets), options, b.task)
        if term.lists:
            return links[0].loss(
                *map(list, zip(*pairs)), *targets, **term.channels(pairs[0][1]), **options
            )
        total: Any = sum(
            k.loss(s, t, *targets, **term.channels(t), **options) for k, (s, t) in zip(links, pairs)
        )
        return total

    def _measured(
        self,
        values: Mapping[str, Tensor],
        weights: dict[str, Any],
        student: Outputs,
        b: Batch,
        of_heads: bool = False,
    ) -> tuple[dict[str, Any], Any]:
        """Return (weights, rest). For a term with a gradient ratio, the weight is chosen so that
        the term's gradient norm has that ratio. `rest` is a multiple of the other losses that
        replaces the gradient lost to `fade`, or None. The gradient norms for the report are
        measured at the first training batch, and again when a new term becomes active.
        """
        learns = {k: v for k, v in values.items() if v.requires_grad}
        fixed, rest = {k: w for k, w in weights.items() if k not in self.ratios}, None
        if self.ratios:
            self.ratios.measure(
                weights,
                learns,
                lambda k: self._compared(k, student),
                lambda k: self._apart(k, b),
                b.label_errors,
            )
            faded = self.ratios.faded(weights, learns)
            weights = self.ratios.weights(weights, learns)
            base = [k for k in learns if k in fixed]
            if base and faded is not None:
                own = with_own_task(learns, student) if of_heads else learns
                rest = faded * sum(weights[k] * own[k] for k in base)
        if self.measures and torch.is_grad_enabled() and not learns.keys() <= self.seen:
            apart = {t.name for t in self.layered if t.has_grad_ratio}
            here = {k: v for k, v in learns.items() if k not in apart}
            logits: Any = student.logits
            self.seen = set(learns)
            self.gradient_shares = gradient_shares(here, weights, logits, self.student)
            if (says := swamped(self.gradient_shares, fixed)) and rank() == 0:
                warnings.warn(says, DistillWarning, stacklevel=4)
        return weights, rest

    @property
    def faded(self) -> dict[str, float]:
        """Current factor of the gradient ratio of each term with `fade`, from 0 to 1. Reading
        this property synchronizes with the GPU.
        """
        gains = {k: r.gain for k, r in self.ratios.items() if r.gain is not None}
        return {k: float(g.factor) for k, g in gains.items() if g.batches}

    def _compared(self, name: str, student: Outputs) -> list[Tensor]:
        """Return the tensors of the student that a term compares."""
        logits: Any = student.logits
        layers = [k.layers[0] for k in self.links[name] if k.layers]
        return [student.feats[n] for n in dict.fromkeys(layers)] if layers else [logits]

    def _apart(self, name: str, b: Batch) -> Tensor:
        """Compute the value of a term against the teacher's outputs for different samples."""
        term = next(t for t in self.recipe.terms if t.name == name)
        return self._value(term, b.with_teacher(name, self.ratios[name].of_different_samples))


def with_own_task(values: Mapping[str, Tensor], student: Outputs) -> Mapping[str, Any]:
    """Replace the task loss of several heads with the part that reaches the logits of this head, so
    that the labels of other heads do not make up for a term that faded.
    """
    if 'task' not in values:
        return values
    if (own := part_at(values['task'], cast(Tensor, student.logits))) is None:
        raise DistillError(
            "fade= has to raise the weight of this head's labels, but the task loss of all heads "
            'does not depend on the output of this head. Pass recipes without fade=.'
        )
    return {**values, 'task': own}


def check_gradients(student: nn.Module, terms: Sequence, links: Any, outputs: Outputs) -> None:
    """Raise an error if a term compares a trained student layer whose output was computed without
    gradients, so that the term would not train the student.

    A layer is trained if at least one of its parameters requires gradients, or if all parameters of
    the student do. If no output has a gradient, the outputs are not for training, and no error is
    raised.
    """
    logits: Any = outputs.logits
    names = ((t, k.layers[0]) for t in terms for k in links[t.name] if k.layers)
    read = ((t, n, outputs.feats.get(n)) for t, n in names)
    constant = [(t, n) for t, n, x in read if x is not None and not x.requires_grad]
    tensors = [logits.hidden if isinstance(logits, LinearLogits) else logits, outputs.feats]
    if not constant or not any(o.requires_grad for o in tensors_in(tensors)):
        return
    whole = all(p.requires_grad for p in student.parameters())
    modules = named(student)
    for term, n in constant:
        module = modules.get(n.split('@')[0])
        own = module is not None and any(p.requires_grad for p in module.parameters())
        if own or whole:
            raise DistillError(
                f"{term.name} compares the student's layer {n!r}, whose output has no gradient "
                'although its parameters are trained, so the term would not train the student. The '
                'layer ran under torch.no_grad(), as it does inside '
                'torch.utils.checkpoint.checkpoint(..., use_reentrant=True). Use '
                'use_reentrant=False. For Hugging Face models, pass '
                'gradient_checkpointing_kwargs=dict(use_reentrant=False).'
            )


def check_kind(term: Any, kind: str) -> None:
    """Raise an error if a term compares a different kind of logits than the model has. Terms that
    compare layers fit any model.
    """
    if term.layers is None and term.kind not in (None, kind):
        says = dict(
            softmax='a softmax over classes', sigmoid='a sigmoid per label', regression='numbers'
        )
        raise DistillError(
            f'{term.name} compares {says[term.kind]}, but this model predicts {says[kind]}. Use '
            'kd(), which chooses the loss that fits (binary_kl for labels, regression for '
            'numbers), or your own loss.'
        )
