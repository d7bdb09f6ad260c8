"Compute the loss of a recipe from the outputs of student and teacher for one batch."

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.distributed import rank
from ..base.outputs import DistillError, DistillWarning, Outputs, as_plain
from .batch import Batch, all_classes, blend, nothing, of_all_processes
from .gradient_balance import GradientRatios
from .gradient_norms import norms_at_layer, norms_at_logits, swamped
from .link import Link, own_copy

__all__ = ['Distilled', 'RecipeLoss', 'check_kind']


@dataclass
class Distilled:
    """The loss of one batch and its parts.

    Attributes:
        task: The task loss before weighting. None if the batch has no labels.
        taught: Weighted sum of all terms. None if all terms have weight 0.
        parts: {name: value} of each term, before weighting and detached. During training, terms
            with weight 0 are left out.
        weights: {name: weight} of each loss. The task loss is named 'task'. The weight of a term
            with a gradient ratio is a 0-dim tensor. If the gradient ratio of a term was lowered by
            `fade`, the effective weight of the task loss is larger than given here.
        terms: {name: weighted value} of each term, attached to the graph. `taught` is their sum. If
            `fade` lowered the gradient ratio of a term, `taught` also contains an additional
            multiple of the other losses.
    """

    task: Tensor | None
    taught: Tensor | None
    parts: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self):
        """The total loss, on which to call `backward`."""
        # subtle: a task loss with weight 0 is left out, because 0 * nan is nan
        if not self.weights['task']:
            return self.taught
        own = self.weights['task'] * self.task if self.weights['task'] != 1 else self.task
        return own if self.taught is None else own + self.taught

    @property
    def added(self):
        """`total` minus the task loss, for trainers that compute the task loss themselves. None if
        there is nothing to add.
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
    """

    def __init__(self, recipe, task):
        super().__init__()
        # subtle: register the student as the first child, so that its parameters come first in
        # `Distiller.parameters()`
        self.register_module('student', None)
        self.task, self.links = task, nn.ModuleDict()
        self.measures, self.seen = (
            True,
            set(),
            # measures: whether gradient norms are reported; seen: names of the losses in the last
            # report
        )
        # {name: fraction of the sum of all gradient norms}; None until the first training batch
        self.gradient_shares: dict | None = None
        self.take(recipe)

    def take(self, recipe):
        """Replace the recipe. A recipe with terms between layers can be set only before the first
        batch.
        """
        self.recipe, self.ratios = recipe, GradientRatios(recipe)
        self.links.clear()
        for t in recipe.terms:
            check_kind(t, self.task.kind)
            if t.layers is None:
                self.links[t.name] = nn.ModuleList([Link(own_copy(t.loss))])

    @property
    def layered(self):
        return [t for t in self.recipe.terms if t.layers is not None]

    def active_terms(self, progress: float | None = None) -> list:
        """Return the terms to compute for a batch. During training, terms with weight 0 are left
        out. Without gradients, as in validation, all terms are returned.

        Args:
            progress: Progress of the training, from 0 to 1, for schedules.
        """
        return [
            t
            for t in self.recipe.terms
            if not torch.is_grad_enabled() or t.weight_at(progress) != 0
        ]

    def needs_teacher(self, progress: float | None = None) -> bool:
        """Return True if any term needs the teacher's outputs for this batch."""
        return bool(self.active_terms(progress))

    def check_first(self, student, teacher, targets):
        """Raise an error for mistakes that the first batches reveal. Subclasses override this
        method.
        """

    def compute(
        self,
        student: Outputs,
        teacher: Outputs | None,
        task: Tensor | None = None,
        targets=(),
        *,
        progress: float | None = None,
        mixed=None,
    ) -> Distilled:
        """Compute the loss of a batch from the outputs of both models. Trainers call this method
        after the forward passes.

        Args:
            student: Outputs of the student for this batch.
            teacher: Outputs of the teacher for this batch. None if no term needs them (see
                `needs_teacher`).
            task: The task loss of this batch. None if the batch has no labels.
            targets: Labels, for losses that use them.
            progress: Progress of the training, from 0 to 1, for schedules.
            mixed: (second labels, weight of the first labels) for a batch mixed by MixUp, in which
                each sample has two labels.
        """
        task, terms = None if task is None else as_plain(task), self.active_terms(progress)
        weights = self.recipe.weights_at(progress)
        if task is None and weights['task']:
            raise DistillError(
                'This batch has no labels, but the recipe gives the task loss the weight '
                f'{weights["task"]:g}: use alpha=1, or soft_labels(), to train only from the teacher'
            )
        if terms and teacher is None:
            raise DistillError(
                f"{terms[0].name} needs the teacher's outputs for this batch, but got None. "
                'needs_teacher(progress) returns True for batches that need them'
            )
        self.check_first(student, teacher, targets)
        b = Batch(
            student,
            all_classes(teacher, student),
            targets,
            *(mixed or ((), None)),
            self.task,
            progress,
        )
        values = {t.name: self._value(t, b) for t in terms}
        counted = {
            k: v for k, v in dict(task=task, **values).items() if v is not None and weights[k] != 0
        }
        weights, rest = self._measured(counted, weights, student, b)
        terms = {k: weights[k] * v for k, v in counted.items() if k in values}
        taught = [*terms.values(), *([] if rest is None else [rest])]
        if not weights['task'] and student.logits is not None:
            taught.append(nothing(student.logits))
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            {k: v.detach() for k, v in values.items()},
            weights,
            terms,
        )

    def without_labels(
        self, student: Outputs, teacher: Outputs | None, *, progress: float | None = None
    ) -> Tensor:
        """Compute the weighted sum of the terms that do not use labels, for a batch of unlabeled
        inputs. Terms with a gradient ratio use the weight that was measured on labeled batches.

        Args:
            student: Outputs of the student for the unlabeled inputs.
            teacher: Outputs of the teacher for the same inputs.
            progress: Progress of the training, from 0 to 1, for schedules.
        """
        terms = [t for t in self.active_terms(progress) if not t.n_targets]
        if not terms:
            return nothing(student.logits)
        b = Batch(student, all_classes(teacher, student), (), (), None, self.task, progress)
        values = {t.name: self._value(t, b) for t in terms}
        weights = self.ratios.weights(self.recipe.weights_at(progress), values)
        return sum(weights[k] * v for k, v in values.items())

    def _value(self, term, b):
        """Compute the value of a term. For a batch mixed by MixUp, a term that uses labels is
        computed for both labels, and the two values are mixed like the task loss.
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

    def _of_labels(self, term, b, targets, options):
        """Compute the value of a term for one set of labels. Values are summed over the term's
        pairs of layers, as in the papers.
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
            pairs, targets, options = of_all_processes(term, pairs, targets, options, b.task)
        if term.lists:
            return links[0].loss(
                *map(list, zip(*pairs)), *targets, **term.channels(pairs[0][1]), **options
            )
        return sum(
            k.loss(s, t, *targets, **term.channels(t), **options) for k, (s, t) in zip(links, pairs)
        )

    def _measured(self, values, weights, student, b):
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
            base = [fixed[k] * v for k, v in learns.items() if k in fixed]
            rest = faded * sum(base) if base and faded is not None else None
        if self.measures and torch.is_grad_enabled() and not learns.keys() <= self.seen:
            self.seen, self.gradient_shares = (
                learns.keys(),
                self.shares(learns, weights, student.logits),
            )
            if (says := swamped(self.gradient_shares, fixed)) and rank() == 0:
                warnings.warn(says, DistillWarning, stacklevel=4)
        return weights, rest

    @property
    def faded(self) -> dict[str, float]:
        """Current factor of the gradient ratio of each term with `fade=True`, from 0 to 1. Reading
        this property synchronizes with the GPU.
        """
        gains = {k: r.gain for k, r in self.ratios.items() if r.gain is not None}
        return {k: float(g.factor) for k, g in gains.items() if g.batches}

    def _compared(self, name, student):
        """Return the student tensors that a term compares."""
        layers = [k.layers[0] for k in self.links[name] if k.layers]
        return [student.feats[n] for n in dict.fromkeys(layers)] if layers else [student.logits]

    def _apart(self, name, b):
        """Compute the value of a term with the teacher's outputs of different samples."""
        term = next(t for t in self.recipe.terms if t.name == name)
        return self._value(term, b.with_teacher(name, self.ratios[name].of_different_samples))

    def shares(self, values, weights, logits=None) -> dict:
        """Measure the gradient norm of each loss as a fraction of their sum. The norms are measured
        at the logits if all losses depend on them, otherwise at the last student parameter on which
        all losses depend. The result is empty if there is no such parameter. Terms with a gradient
        ratio between layers are left out. The measurement does not change the training.

        Args:
            values: {name: value} of the losses with a nonzero weight. The task loss is named
                'task'.
            weights: {name: weight} of the same losses.
            logits: Student logits. None to measure at the parameters.
        """
        apart = {t.name for t in self.layered if t.has_grad_ratio}
        values = {k: v for k, v in values.items() if k not in apart}
        try:
            norms = norms_at_logits(values, logits)
            if norms is None and self.student is not None:
                norms = norms_at_layer(values, self.student)
        except RuntimeError:
            return {}  # compiled or checkpointed modules may allow only one backward pass
        norms = {k: float(weights[k] * n) for k, n in (norms or {}).items()}
        return {k: n / sum(norms.values()) for k, n in norms.items()}


def check_kind(term, kind):
    """Raise an error if a loss does not fit the kind of output, e.g. a loss over classes for a
    regression model. Losses between features fit any model.
    """
    if term.layers is None and term.kind not in (None, kind):
        says = dict(
            softmax='a softmax over classes', sigmoid='a sigmoid per label', regression='numbers'
        )
        raise DistillError(
            f'{term.name} compares {says[term.kind]}, but this model predicts {says[kind]}. '
            'Use kd(), which takes the loss that fits (binary_kl for labels, regression for numbers), '
            'or your own loss.'
        )
