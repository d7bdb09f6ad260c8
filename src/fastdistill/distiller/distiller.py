"""Compute the distillation loss of one batch, without a training loop."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch_samples import BatchSamples
from ..base.outputs import DistillError, LinearLogits, Outputs, map_tensors
from ..checks.findings import Findings
from ..checks.forward import student_logits
from ..checks.teacher_outputs import BATCHES
from ..features.layer_hooks import Taps
from ..features.layer_pairs import PairTable, inputs
from ..features.model_call import arguments
from ..recipes.batch_tensors import inputs_and_labels
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe, Term
from ..teachers.teacher import Teacher, run_once
from .head import Head, renamed
from .head_checks import check_batch_of_head, check_batches_of_head, check_first_batch
from .head_state import encoded_state, load_encoded_state
from .heads import Heads, build_heads
from .loader_batches import is_loader, read_apart, spread_batches
from .recipe_choice import choose
from .weight_changes import WeightChanges


class Distiller(nn.Module):
    """A student, its teacher and a recipe. `distiller(x, y)` computes the loss of one batch.

    This module has the parameters of the student and the projectors, but not the parameters of the
    teacher. Put `with distiller.teacher:` around a training loop to prepare the teacher once
    instead of for each batch. `state_dict()` contains everything needed to resume training except
    for the state of the optimizer, including the random state of a teacher that makes random
    predictions (`mode='train'` or `combine='sample'`).

    If the student has several outputs, each output can have its own teacher: `Distiller(student,
    {'color': teacher1, 'shape': teacher2})`. An output with its labels, teacher and recipe is
    called a head. Compute the loss of a batch with `distiller(x, y_color, y_shape)`. Each
    option is either one value for all heads or a dict {head name: value}. The student runs once per
    batch. A teacher that is used by several heads also runs once per batch.
    `distiller.heads['color']` has the attributes of one head, such as `recipe` and `teacher`.

    Args:
        student: Model to train. The student can be None if only `compute` is used and the recipe
            compares no layers.
        teacher: A `Teacher`, or anything that `Teacher` accepts: a module, a callable, a file, or a
            list of these. For several heads, pass a dict {head name: teacher}. Use None for a head
            that is trained only on labels. If a teacher has several outputs, each head uses the
            output with its name, or the output at its position in a tuple.
        recipe: A recipe such as `kd()` or `kd() + at()`, a `Term`, or text such as 'kd(T=2) +
            at()'. If None or 'auto', `auto` chooses a recipe from the outputs of the first batch.
        task_loss: fn(student logits, *targets) -> task loss. If None, `kind` determines the loss:
            cross-entropy, binary cross-entropy or squared error.
        kind: Type of prediction: 'softmax' over classes, 'sigmoid' per label, or 'regression'. If
            None, the type is derived from `task_loss` if that is a PyTorch loss. Otherwise, it is
            'softmax'.
        axis: Class axis of the logits. If None, use the class axis of `task_loss`, or 1 if
            `task_loss` has none.
        ignore_index: Label of positions to ignore. If None, use the value of `task_loss`, or -100
            if `task_loss` has none.
        shift_labels: Set to True if the labels of a language model are aligned with the input
            tokens, as in Hugging Face. With True, labels are moved to the positions where the model
            predicts them, for the terms and for the default task loss. If None, the alignment of
            the labels is detected in the first batch. If detection is impossible, an error is
            raised.
        output: Which output to distill if a model has several: a name, an index, or a function of
            what the model returned. This option applies to the student, and to a teacher that is
            not a `Teacher` object. If None, use the output named 'logits' or 'out', or the first
            item of a tuple. With several heads, None selects the output with the name of the head,
            or the output at the position of the head.
        labels: For several heads, a dict {head name: fn(labels of the batch) -> tuple of labels of
            this head}. If None, each head has one label, in the order of the heads.
        weights: For several heads, a dict {head name: weight of the head's loss}. The default is 1.
            If a trainer computes one task loss for all heads, these weights multiply only the terms
            with `weight`, because that loss already includes the weights of the heads.
        check: Whether to look for mistakes. If True, parameters that both models share are
            reported, and `Distiller.check` runs on the first batch.
        example: Batch of inputs from which the projectors are built immediately. Pass an example if
            an optimizer is created before the first batch.
    """

    head_class = Head
    student: Any  # an nn.Module. None if only `compute` is used

    def __init__(
        self,
        student: nn.Module | None,
        teacher: Any,
        recipe: Term | Recipe | str | dict | None = None,
        *,
        task_loss: Callable | dict | None = None,
        kind: str | dict | None = None,
        axis: int | dict | None = None,
        ignore_index: int | dict | None = None,
        shift_labels: bool | dict | None = None,
        output: str | int | Callable | dict | None = None,
        labels: dict | None = None,
        weights: dict | None = None,
        check: bool | dict = True,
        example: Any = None,
    ):
        super().__init__()
        # subtle: register the student first, so that its parameters come first in parameters()
        self.student = student
        options = dict(
            recipe=recipe,
            task_loss=task_loss,
            kind=kind,
            axis=axis,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            output=output,
            labels=labels,
            weights=weights,
            check=check,
        )
        self.heads = build_heads(self.head_class, student, teacher, options)
        self.changes = WeightChanges(student, self.heads)
        links = {k: h.links for k, h in self.heads.items()}
        self.links = nn.ModuleDict(links) if self.heads.several else links['']
        if example is not None:
            self.setup(*inputs(example))

    # heads

    @property
    def head(self) -> Head:
        """The only head of a student with one output."""
        if self.heads.several:
            names = ', '.join(self.heads)
            raise DistillError(
                f'This Distiller has the heads {names}: use the attribute of one of them, as in '
                f'distiller.heads[{next(iter(self.heads))!r}].'
            )
        return self.heads['']

    @property
    def teacher(self) -> Teacher | None:
        """The teacher. If there are several heads, use the teachers in `heads`."""
        return self.head.teacher

    def start(self) -> None:
        """Prepare the teachers for many batches.

        If the weights of a model changed after `stop`, for example because different weights were
        loaded, the gradients that were measured before are forgotten.
        """
        self.changes.begin()
        for t in self.heads.sources:
            t.start()

    def stop(self) -> None:
        """Restore the teachers. It is safe to call this at any time, and more than once."""
        self.changes.end()
        for t in self.heads.sources:
            t.stop()

    @property
    def recipe(self) -> Recipe:
        """The recipe. With several heads, the recipe contains the terms of all heads, with names
        such as 'color.kd'.

        The recipe has no task weight if the heads weight the task loss differently.
        """
        if not self.heads.several:
            return self.head.recipe
        terms = [renamed(t, f'{k}.{t.name}') for k, h in self.heads.items() for t in h.recipe.terms]
        task, *others = (h.recipe.task for h in self.heads.values())
        return Recipe(*terms, task=None if any(o != task for o in others) else task)

    @property
    def pairs(self) -> PairTable | None:
        """The pairs of layers that are compared. None before the pairs are known."""
        if not self.heads.several:
            return self.head.pairs
        return PairTable([p for h in self.heads.values() for p in h.pairs or []])

    @property
    def ratios(self) -> dict:
        """The measured gradients of terms with a gradient ratio."""
        return self.heads.flat({k: h.ratios for k, h in self.heads.items()})

    @property
    def gradient_shares(self) -> dict | None:
        """{loss: its fraction of the total gradient norm}, where the task loss is named 'task'.

        None until the first training batch.
        """
        each = {k: h.gradient_shares for k, h in self.heads.items()}
        return None if all(s is None for s in each.values()) else self.heads.flat(each)

    @property
    def faded(self) -> dict[str, float]:
        """{term: fraction of its gradient ratio that is left, from 0 to 1}, for terms with `fade`.

        Reading this property waits for the GPU.
        """
        return self.heads.flat({k: h.faded for k, h in self.heads.items()})

    @property
    def ready(self) -> bool:
        """True if all projectors are built."""
        return all(h.ready for h in self.heads.values())

    # checkpoints

    def get_extra_state(self) -> Tensor:
        """Return the state that a checkpoint needs in addition to the weights."""
        return encoded_state(self.heads)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        load_encoded_state(self.heads, state)
        self.changes.left = None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        new = state_dict.keys() - self.state_dict().keys()
        if not self.ready and any(k.startswith('links.') for k in new):
            raise DistillError(
                'The checkpoint has projectors, but those of this Distiller are not built yet: '
                'give the Distiller a batch of inputs, Distiller(..., example=x)'
            )
        return super().load_state_dict(state_dict, strict, assign)

    # checks and setup before the first batch

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for h in self.heads.values():
            if not h.ready and any(t.match == 'shape' or t.projector != 'auto' for t in h.layered):
                raise DistillError(
                    'The projectors are not built yet, so an optimizer created now would not train them: '
                    'give the Distiller a batch of inputs, Distiller(..., example=x)'
                )
        return super().parameters(recurse)

    def own_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.links.parameters() if p.requires_grad]

    def check(self, x: Any, *targets: Any, n: int = BATCHES) -> Findings | dict[str, Findings]:
        """Find mistakes that training would not report.

        With a DataLoader, the check reads a few batches of random samples (the first batches if
        the dataset can't be indexed). The check compares the scores of both
        models and of a constant prediction (see `.facts` of the result). The check also finds a
        teacher that seems untrained, and a teacher whose classes have a different order. Other
        checks are the same as in `Learner.check_teacher`, except those that need a Learner. If
        there is reason to doubt the teacher, `auto` gives the teacher a small weight.

        With a single batch, the check only reports outputs and labels that do not match. Neither
        model is changed.

        Args:
            x: The inputs of a single batch, or a DataLoader or list of batches (inputs, labels),
                preferably from a validation set.
            *targets: The labels, if `x` is the inputs of a single batch.
            n: Number of batches to read.

        Returns:
            A `Findings` list, which is empty if there are no mistakes. For several heads, a dict
            {head name: list}.
        """
        if not self.heads.several and (self.student is None or self.teacher is None):
            raise DistillError(
                f'check needs both models, but there is no {"student" if self.student is None else "teacher"}. '
                'Check a teacher before its outputs are stored: Distiller(student, teacher).check(loader).'
            )
        if isinstance(x, list) and not x:
            raise DistillError('The list of batches is empty: check needs at least one batch.')
        if not targets and is_loader(x):
            with read_apart(x):
                return self.check_batches(map(inputs_and_labels, spread_batches(x, n)), n)
        x = inputs(x)
        found = {
            k: check_batch_of_head(
                h,
                Outputs(student_logits(self.student, x, h.output)),
                h.teacher.probe(*x),
                h.labels(targets),
            )
            for k, h in self.heads.items()
            if h.teacher is not None
        }
        return self.heads.value(found)

    def check_batches(
        self, batches: Iterable, n: int = BATCHES, *, placed: bool = False, part: str = ''
    ) -> Any:
        """Run `check` on batches that are already split into inputs and labels.

        Args:
            batches: Iterable of (inputs, labels), where the labels are a tuple.
            n: Number of batches to read.
            placed: Whether the labels are already at the positions where the model predicts them.
            part: Name of the dataset for messages: 'validation', 'training', or '' if unknown.
        """
        device = next((p.device for p in self.student.parameters()), None)
        here: Iterable = ((inputs(x), y) for x, y in islice(batches, n))
        here = (map_tensors(b, lambda t: t if t.device == device else t.to(device)) for b in here)
        if self.heads.several:
            here = list(here)
        of = lambda h: ((x, h.labels(y)) for x, y in here)
        found = {
            k: check_batches_of_head(h, of(h), placed, part)
            for k, h in self.heads.items()
            if h.teacher is not None or not self.heads.several
        }
        return self.heads.value(found)

    def setup(self, *x: Any) -> 'Distiller':
        """Pair student and teacher layers, and build projectors.

        Both models run once in evaluation mode. The models and the random state are not changed.
        """
        for h in self.heads.values():
            if not (self.heads.several and h.ready):
                h.setup(x)
        return self

    # computing the loss of a batch

    def active_terms(self, progress: float | None = None) -> list:
        """Return the terms that are needed for a batch.

        During training, only terms with a nonzero weight are returned. If gradients are disabled,
        as in validation, all terms are returned.

        Args:
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
        """
        return [t for h in self.heads.values() for t in h.active_terms(progress)]

    def student_layers(self, terms: Collection | None = None) -> list:
        """Return the student layers that the terms compare.

        Args:
            terms: Terms to consider, as returned by `active_terms`. None for all terms.
        """
        return list(dict.fromkeys(n for h in self.heads.values() for n in h.layers(0, terms)))

    def teacher_outputs(
        self, x: Any, progress: float | None = None, samples: BatchSamples | None = None
    ) -> Outputs | dict | None:
        """Return the teacher's outputs for a batch, including the layers that the terms compare.

        Args:
            x: Inputs of the batch, as in `forward`.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
            samples: The `BatchSamples` of the batch. None if the samples are unknown.

        Returns:
            The outputs, or None if no term needs the teacher. For several heads, a dict {head name:
            outputs} with the heads for which outputs exist.
        """
        self.changes.follow_teachers()
        x, terms = inputs(x), {k: h.active_terms(progress) for k, h in self.heads.items()}
        needed = lambda k, h: h.teacher is not None and (terms[k] or h.chooses)
        ask = Heads((k, h) for k, h in self.heads.items() if needed(k, h))
        out = {k: None for k in self.heads if k not in ask}
        if self.heads.several and not torch.is_grad_enabled():
            ask = Heads((k, h) for k, h in ask.items() if h.teacher.has_outputs(samples))
        for group in ask.teacher_groups():
            first = next(iter(group.values())).teacher
            layers = list(dict.fromkeys(n for k, h in group.items() for n in h.layers(1, terms[k])))
            if len(group) == 1:
                outs = [first.outputs(x, samples, layers)]
            else:
                same = [h.teacher for h in group.values()]
                outs = run_once(same, x, samples, layers)
            out |= dict(zip(group, outs))
        none = len(out) == len(self.heads) and all(o is None for o in out.values())
        return None if none else self.heads.value(out)

    def student_outputs(self, raw: Any, feats: dict, x: Any) -> Outputs | dict[str, Outputs]:
        """Return the student's outputs. Padded positions of the batch are masked.

        Args:
            raw: What the student returned. If there are several outputs, the `output` option
                selects the output to use.
            feats: Layer outputs recorded by the taps.
            x: Inputs of the batch, used to find padded positions.

        Returns:
            The outputs. For several heads, a dict {head name: outputs}.
        """
        each = {k: h.student_outputs(raw, feats, x) for k, h in self.heads.items()}
        return self.heads.value(each)

    def reading(self, progress: float | None = None) -> AbstractContextManager[Taps]:
        """Return a context manager that reads the student's layers while a trainer runs the
        student.

        Args:
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
        """
        return Taps(self.student, self.student_layers(self.active_terms(progress)))

    def forward(self, x: Any, *targets: Any, progress: float | None = None) -> Distilled:
        """Run student and teacher on a batch and return the loss.

        Args:
            x: The inputs: a tensor, a tuple of tensors, or a dict. The items of a dict are passed
                as keyword arguments if the model has arguments with these names.
            *targets: Labels. Labels can be omitted, or None, if the recipe gives the task loss no
                weight. For several heads, pass one label per head, in the order of the heads, or
                None for a head without labels.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.

        Returns:
            A `Distilled`. For several heads, `Distilled.task` is the weighted sum of the task
            losses.
        """
        own = {k: h.labels(targets) for k, h in self.heads.items()}
        x = inputs(x)
        if not self.ready:
            self.setup(*x)
        args, kwargs = arguments(self.student, x)
        with self.reading(progress) as taps:
            raw = self.student(*args, **kwargs)
            feats = taps.pop()
        s = self.heads.by_name(self.student_outputs(raw, feats, x))
        for k, h in self.heads.items():
            if h.waits:
                ask = None if h.teacher is None else partial(h.teacher.probe, *x)
                choose(h, s[k], ask, own[k])
        t = self.heads.by_name(self.teacher_outputs(x, progress))
        each = {}
        for k, h in self.heads.items():
            # check this first: an error of the task loss would not say what to do
            if h.unchecked:
                check_first_batch(h, s[k], t.get(k), own[k])
            if own[k] and isinstance(logits := s[k].logits, LinearLogits):
                s[k] = replace(s[k], logits=logits.dense())  # the task loss needs them
            task, own[k] = h.task_loss(x, s[k].logits, own[k])
            each[k] = h.compute(s[k], t.get(k), task, own[k], progress=progress)
        if not self.heads.several:
            return each['']
        w = {k: h.weight for k, h in self.heads.items() if h.weight}
        each = {k: each[k] for k in w}
        tasks = [w[k] * e.weights['task'] * e.task for k, e in each.items() if e.weights['task']]
        task = sum(tasks[1:], tasks[0]) if tasks else None
        return whole_loss(each, w, task, 1.0 if tasks else 0.0, own_tasks=True)

    def compute(
        self,
        student: Outputs | dict[str, Outputs],
        teacher: Outputs | dict[str, Outputs] | None,
        task: Tensor | None = None,
        targets: Sequence = (),
        *,
        progress: float | None = None,
        mixed: tuple | None = None,
    ) -> Distilled:
        """Return the loss of a batch from outputs that are already computed. Trainers call this
        method.

        For several heads, the outputs are dicts {head name: outputs}.

        Args:
            student: Student outputs for this batch.
            teacher: Teacher outputs for the same batch. None if no term needs the teacher (see
                `teacher_outputs`).
            task: Task loss of the batch. None if the batch has no labels. For several heads, the
                total task loss. The task loss must have the same weight in the recipes of all heads.
            targets: Labels, for losses that use labels.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
            mixed: (second labels, coefficient of the first labels) for a MixUp or CutMix batch.
        """
        heads: dict = self.heads
        students, teachers = self.heads.by_name(student), self.heads.by_name(teacher)
        if self.heads.several and teacher is not None and not torch.is_grad_enabled():
            # a cache may contain only the outputs for the training set
            heads = {k: h for k, h in heads.items() if k in teachers}
        labels = {k: h.labels(targets) for k, h in heads.items()}
        waiting = {k: h for k, h in heads.items() if h.waits}
        for k, h in waiting.items():
            ask = None if (t := teachers.get(k)) is None else lambda t=t: t
            choose(h, students[k], ask, task is not None and (labels[k] or True))
        if self.heads.several and (waiting or not all(h.shares_task for h in self.heads.values())):
            self.heads.share_task_loss()
        for k, h in heads.items():
            if h.unchecked:
                check_first_batch(h, students[k], teachers.get(k), labels[k])
        each = {
            k: h.compute(
                students[k],
                teachers.get(k),
                task,
                labels[k],
                progress=progress,
                mixed=None if mixed is None else (h.labels(mixed[0]), mixed[1]),
                of_heads=self.heads.several,
            )
            for k, h in heads.items()
        }
        if not self.heads.several:
            return each['']
        scale, task_weight = self.heads.scales(progress)
        return whole_loss(each, scale, task, task_weight)

    def without_labels(
        self,
        student: Outputs | dict[str, Outputs],
        teacher: Outputs | dict[str, Outputs] | None,
        *,
        progress: float | None = None,
    ) -> Tensor:
        """Return the weighted sum of the terms that use no labels, for a batch of unlabeled inputs.

        Terms with a gradient ratio use the gradients that were measured on labeled batches.

        Args:
            student: Student outputs for the unlabeled inputs.
            teacher: Teacher outputs for the same inputs.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.

        Raises:
            DistillError: If the recipe needs a labeled batch first, because `auto` chooses it or a
                term has a gradient ratio.
        """
        s, t = self.heads.by_name(student), self.heads.by_name(teacher)
        for k, h in self.heads.items():
            unmeasured = any(r.means is None for r in h.ratios.values())
            if t.get(k) is not None and (h.waits or unmeasured and h.gradient_shares is None):
                raise DistillError(
                    f'{h.prefix}without_labels was called before the first labeled batch, which '
                    'chooses the recipe and measures its gradients. Call the Distiller with a labeled '
                    'batch first, or give a recipe without grad_ratio, such as kd().'
                )
        scale = {k: h.weight for k, h in self.heads.items()}
        if shared := any(h.shares_task for h in self.heads.values()):
            scale, _ = self.heads.scales(progress)
        values = [
            scale[k] * h.without_labels(s[k], t.get(k), progress=progress, of_heads=shared)
            for k, h in self.heads.items()
            if h.weight
        ]
        return sum(values[1:], values[0])


def whole_loss(
    each: Mapping[str, Distilled],
    scale: Mapping[str, float],
    task: Tensor | None,
    task_weight: float,
    own_tasks: bool = False,
) -> Distilled:
    """Return the weighted sum of the losses of several heads.

    Args:
        each: {head name: loss}.
        scale: {head name: weight}.
        task: Task loss of all heads.
        task_weight: Weight of `task`.
        own_tasks: True if `task` is the sum of the task losses of the heads, which are then reported.
    """
    taught = [scale[k] * e.taught for k, e in each.items() if e.taught is not None]
    flat = lambda values: {f'{k}.{n}': v for k, e in each.items() for n, v in values(k, e).items()}
    weights = lambda k, e: {
        n: scale[k] * w for n, w in e.weights.items() if own_tasks or n != 'task'
    }
    return Distilled(
        task,
        sum(taught[1:], taught[0]) if taught else None,
        flat(lambda _, e: e.losses if own_tasks else e.parts),
        {'task': task_weight, **flat(weights)},
        flat(lambda k, e: {n: scale[k] * v for n, v in e.terms.items()}),
    )
