"The loss of a recipe for one batch whose outputs are known."

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
    """One batch's loss and what it is made of.

    Attributes:
        task: The task loss, unweighted; None without labels.
        taught: The weighted sum of all terms; None where none counts.
        parts: Each term's value, unweighted and detached; in training only of the terms that
            count.
        weights: {name: weight of each value}, including 'task'. 0-dim for a term with a gradient
            ratio. The task loss counts more than this if a term faded.
        terms: {name: weighted term}, with its gradient. They make up `taught`, together with what
            the labels get instead of faded terms.
    """

    task: Tensor | None
    taught: Tensor | None
    parts: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self):
        """What to call `backward` on."""
        # subtle: labels of weight 0 take no part at all, since 0*nan is nan
        if not self.weights['task']:
            return self.taught
        own = self.weights['task'] * self.task if self.weights['task'] != 1 else self.task
        return own if self.taught is None else own + self.taught

    @property
    def added(self):
        """What to add to the task loss to get `total`, for trainers that hold that loss
        already; None if that is nothing.
        """
        if self.task is None or self.weights['task'] == 1:
            return self.taught
        rest = (self.weights['task'] - 1) * self.task
        return rest if self.taught is None else rest + self.taught


class RecipeLoss(nn.Module):
    """Computes the loss of a recipe from the outputs of both models. It owns what its terms own:
    projectors, losses with parameters, measured gradients.

    Args:
        task: What the logits are.
    """

    def __init__(self, recipe, task):
        super().__init__()
        # subtle: the first child, so that the student's parameters are the first ones of a Distiller
        self.register_module('student', None)
        self.task, self.links = task, nn.ModuleDict()
        self.measures, self.seen = (
            True,
            set(),
        )  # are gradient shares measured? of which parts they were
        # part -> share, the labels' is 'task'; None until the first training batch
        self.gradient_shares: dict | None = None
        self.take(recipe)

    def take(self, recipe):
        """Use this recipe from now on, of terms on the logits or before any batch."""
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
        """The terms that a batch needs: those with a weight; without gradient, as in validation,
        all of them.

        Args:
            progress: Share of the training that is done, for schedules.
        """
        return [
            t
            for t in self.recipe.terms
            if not torch.is_grad_enabled() or t.weight_at(progress) != 0
        ]

    def check_first(self, student, teacher, targets):
        """Refuse the mistakes that the first batches show."""

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
        """The loss of a batch whose student (and teacher) ran already: what trainers call.

        Args:
            student: Of this batch.
            teacher: Of the same batch; None where no term needs it (see `active_terms`).
            task: The task loss, already computed; None without labels.
            targets: Labels, for the losses that read them.
            progress: Share of the training that is done, for schedules.
            mixed: (other targets, share of the first ones): MixUp's batches have two labels a
                sample.
        """
        task, terms = None if task is None else as_plain(task), self.active_terms(progress)
        weights = self.recipe.weights_at(progress)
        if task is None and weights['task']:
            raise DistillError(
                'This batch has no labels, but the recipe gives their loss the weight '
                f'{weights["task"]:g}: use alpha=1, or soft_labels(), to train from the teacher alone'
            )
        if terms and teacher is None:
            raise DistillError(
                f"{terms[0].name} needs the teacher's outputs for this batch, and got None: "
                'pass what teacher_outputs() returned'
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
        """The weighted sum of the terms that read no labels, for inputs without labels beside the
        batches with labels. Shares of the gradient are those that were measured there.

        Args:
            student: For inputs without labels.
            teacher: For the same.
            progress: Share of the training that is done, for schedules.
        """
        terms = [t for t in self.active_terms(progress) if not t.n_targets]
        if not terms:
            return nothing(student.logits)
        b = Batch(student, all_classes(teacher, student), (), (), None, self.task, progress)
        values = {t.name: self._value(t, b) for t in terms}
        weights = self.ratios.weights(self.recipe.weights_at(progress), values)
        return sum(weights[k] * v for k, v in values.items())

    def _value(self, term, b):
        """A term's value; where it reads labels and the batch has two a sample, mixed as the
        task loss is.
        """
        if b.lam is None or term.n_targets == 0:
            return self._of_labels(term, b, b.targets, b.options(term, b.mask))
        each = b.lam.numel() > 1
        if each and ('reduction' not in term.accepts or term.layers is not None):
            raise DistillError(
                f'{term.name} reads labels, and MixUp gives each sample two of them: a loss of your own '
                "needs the keyword-only option `reduction` ('none': one value per sample) to be mixed. "
                'Or use CutMix, whose share is one for the whole batch.'
            )
        options = [b.options(term, m) | (dict(reduction='none') if each else {}) for m in b.masks]
        first, other = [
            self._of_labels(term, b, y, o) for y, o in zip((b.targets, b.others), options)
        ]
        v = blend(first, other, b.lam)
        if not v.dim():
            return v
        # subtle: per label that counts; a mask that the loss does not take cannot have left out any
        return v.sum() / (
            v.numel()
            if b.mask is None or 'mask' not in options[0]
            else b.mask.sum().clamp_min(1e-6)
        )

    def _of_labels(self, term, b, targets, options):
        """A term's value by one set of labels: summed over its pairs of layers, as the papers do."""
        links, targets = self.links[term.name], targets[: term.n_targets]
        if term.n_targets and len(targets) < term.n_targets:
            raise DistillError(
                f'{term.name} needs {term.n_targets} target(s) beside student and teacher, this batch '
                f'has {len(targets)}'
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
        """Return (weights, rest). The weight of a term with a gradient ratio is the one at which its
        gradient norm has that ratio. The rest is added to the loss: a part of the other losses that
        replaces the gradient of faded terms, or None. Gradient norms are measured for the report at
        the first training batch, and whenever another term gets a weight.
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
        """How much is left of the gradient ratio of each term with `fade=True`, from 0 to 1. Reading
        it waits for the GPU.
        """
        gains = {k: r.gain for k, r in self.ratios.items() if r.gain is not None}
        return {k: float(g.factor) for k, g in gains.items() if g.batches}

    def _compared(self, name, student):
        """What a term compares of the student."""
        layers = [k.layers[0] for k in self.links[name] if k.layers]
        return [student.feats[n] for n in dict.fromkeys(layers)] if layers else [student.logits]

    def _apart(self, name, b):
        """A term's value if each of the teacher's outputs belonged to a different sample."""
        term = next(t for t in self.recipe.terms if t.name == name)
        return self._value(term, b.with_teacher(name, self.ratios[name].of_different_samples))

    def shares(self, values, weights, logits=None) -> dict:
        """Each part's share of the gradient, by name: at the logits if all parts reach them, else
        at the last layer of the student that all reach. Empty if there is no such place. A term
        with a share of its own at its layers is left out. Training is not changed by it.

        Args:
            values: Of what counts in a batch: the task loss ('task') and the terms, by name.
            weights: Of each.
            logits: The student's; None: its parameters are the place to measure at.
        """
        apart = {t.name for t in self.layered if t.has_grad_ratio}
        values = {k: v for k, v in values.items() if k not in apart}
        try:
            norms = norms_at_logits(values, logits)
            if norms is None and self.student is not None:
                norms = norms_at_layer(values, self.student)
        except RuntimeError:
            return {}  # compiled or checkpointed parts may allow one backward pass alone
        norms = {k: float(weights[k] * n) for k, n in (norms or {}).items()}
        return {k: n / sum(norms.values()) for k, n in norms.items()}


def check_kind(term, kind):
    """Refuse a loss over classes for a model that has none, and so on; features may be compared by
    any loss.
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
