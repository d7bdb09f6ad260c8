"""The core: the distillation loss of one batch. It works on tensors and has no training loop."""

import json
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from ..base.outputs import DistillError, Outputs, map_tensors
from ..checks.findings import Findings
from ..checks.forward import student_logits
from ..checks.teacher_outputs import BATCHES
from ..features.layer_hooks import Taps, returned_by
from ..features.layer_pairs import PairTable, inputs
from ..features.model_call import arguments
from ..recipes.batch_tensors import inputs_and_labels
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe
from ..teachers.model_loading import holds_weights
from ..teachers.teacher import Teacher
from .dataloader import is_loader, own_generators
from .head import (
    Head,
    HeadOutput,
    SharedOutput,
    options_by_head,
    renamed,
    share_task_loss_again,
)
from .teacher_groups import share_models, teacher_groups

__all__ = ['Distiller']


class Distiller(nn.Module):
    """A student, its teacher and a recipe. `distiller(x, y)` computes the loss of one batch.

    Its parameters are those of the student and the projectors, not of the teacher. Put `with
    distiller.teacher:` around a loop to prepare the teacher once instead of for each batch.
    `state_dict()` holds everything needed to resume training, except the state of the optimizer and
    the random numbers of a teacher that draws some (`mode='train'` or `combine='sample'`).

    A student with several outputs can learn each from its own teacher: `Distiller(student,
    {'color': teacher1, 'shape': teacher2})`. A batch is then `distiller(x, y_color, y_shape)`, and
    each option is either one value for all heads or a dict {head name: value}. The student runs
    once per batch, and so does a teacher used by several heads. `distiller.heads['color']` has the
    attributes of one head, such as `recipe` and `teacher`.

    Args:
        student: Model to train. None if only `compute` is used and no layers are compared.
        teacher: A `Teacher` or anything it accepts: a module, a callable, a file, or a list of
            these. For several heads, a dict {head name: teacher}, with None for a head trained on
            labels only. If a teacher has several outputs, each head gets the one with its name, or
            the one at its position in a tuple.
        recipe: A recipe such as `kd()` or `kd() + at()`, a `Term`, or text such as 'kd(T=2) +
            at()'. None or 'auto' to let `auto` choose one from the outputs of the first batch.
        task_loss: fn(student logits, *targets) -> task loss. None for cross-entropy, binary
            cross-entropy or squared error, depending on `kind`.
        kind: Type of prediction: 'softmax' over classes, 'sigmoid' per label, or 'regression'. None
            to derive it from `task_loss` if that is a PyTorch loss, else 'softmax'.
        axis: Class axis of the logits. None for the axis that `task_loss` uses, else 1.
        ignore_index: Label of positions to ignore. None for the value that `task_loss` uses, else
            -100.
        shift_labels: Whether the labels of a language model are aligned with their tokens, as in
            Hugging Face, and so have to be moved to the positions where they are predicted. True
            moves them for the terms and for the default task loss. None to detect this in the first
            batch, or raise an error if that is impossible.
        output: Which output to distill if there are several, for the student and for a teacher that
            is not a `Teacher` yet: a name, an index, or a function of what the model returned. None
            for the output named 'logits' or 'out', or the first of a tuple. For a head, None
            selects the output with its name, or the one at its position in a tuple.
        labels: For several heads, {head name: fn(labels of the batch) -> tuple of labels of this
            head}. None if each head has one label, in the order of the heads.
        weights: For several heads, {head name: weight of its loss}. The default is 1.
        check: Whether to look for mistakes: parameters shared by both models, and in the first
            batch everything that `Distiller.check` finds.
        example: Batch of inputs used to build projectors before an optimizer asks for their
            parameters.
    """

    head_class = Head

    def __init__(
        self,
        student: nn.Module | None,
        teacher,
        recipe=None,
        *,
        task_loss=None,
        kind: str | dict | None = None,
        axis: int | dict | None = None,
        ignore_index: int | dict | None = None,
        shift_labels: bool | dict | None = None,
        output=None,
        labels: dict | None = None,
        weights: dict | None = None,
        check: bool | dict = True,
        example=None,
    ):
        super().__init__()
        # subtle: the first child, so that the student's parameters come first in Distiller.parameters()
        self.student = student
        self.several = isinstance(teacher, Mapping) and not holds_weights(teacher)
        if not self.several and (labels is not None or weights is not None):
            raise DistillError(
                'labels= and weights= are for several heads: give a dict of teachers, as in '
                "Distiller(student, {'color': teacher1, 'shape': teacher2})."
            )
        teachers = {str(k): t for k, t in teacher.items()} if self.several else {'': teacher}
        if not teachers:
            raise DistillError(
                'The dict of teachers is empty: give one teacher per head, {name: teacher}.'
            )
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
        of_each = {k: options_by_head(o, k, teachers) for k, o in options.items()}
        self.heads = {
            k: self._head(k, t, {n: o[k] for n, o in of_each.items()}, teachers)
            for k, t in teachers.items()
        }
        self.register_links()
        share_models(self.heads)
        if example is not None:
            self.setup(*inputs(example))

    def _head(self, name, teacher, o, teachers):
        labels, weight, output = o.pop('labels'), o.pop('weights'), o['output']
        if not self.several:
            options = dict(labels=tuple, teacher_output=output, **o)
            return self.head_class(name, self.student, teacher, **options)
        at, n = [*teachers].index(name), len(teachers)
        if output is None:
            o['output'] = HeadOutput(name, at, n)
            if sum(same_model(teacher, t) for t in teachers.values()) > 1:
                output = SharedOutput(name, at, n)
                if isinstance(teacher, Teacher):
                    teacher = teacher.with_defaults(output=output)
        return self.head_class(
            name,
            self.student,
            teacher,
            labels=labels or partial(labels_in_order, [*teachers], at),
            weight=1.0 if weight is None else weight,
            teacher_output=output,
            **o,
        )

    # heads

    @property
    def head(self) -> Head:
        """The head of a student with one output."""
        if self.several:
            names = ', '.join(self.heads)
            raise DistillError(
                f'This Distiller has the heads {names}: use the attribute of one of them, as in '
                f'distiller.heads[{next(iter(self.heads))!r}].'
            )
        return self.heads['']

    @property
    def teacher(self) -> Teacher | None:
        """The teacher. For several heads, see `heads`."""
        return self.head.teacher

    @property
    def sources(self) -> list:
        """The teachers to run, one for each group of heads that share a run."""
        return [next(iter(g.values())).teacher for g in teacher_groups(self.heads)]

    def start(self):
        """Prepare the teachers for many batches."""
        for t in self.sources:
            t.start()

    def stop(self):
        """Restore the teachers. May be called at any time, and repeatedly."""
        for t in self.sources:
            t.stop()

    @property
    def recipe(self) -> Recipe:
        """The recipe. For several heads, all terms, with names such as 'color.kd'.

        It has no task weight if the heads give the task loss different weights.
        """
        if not self.several:
            return self.head.recipe
        whole = lambda k, h: [renamed(t, f'{k}.{t.name}') for t in h.recipe.terms]
        task, *others = (h.recipe.task for h in self.heads.values())
        if any(o != task for o in others):
            task = None
        return Recipe(*(t for k, h in self.heads.items() for t in whole(k, h)), task=task)

    def register_links(self):
        """Register the modules of the heads that are trained in addition to the student."""
        links = {k: h.links for k, h in self.heads.items()}
        self.links = nn.ModuleDict(links) if self.several else links['']

    def _scales(self, progress) -> tuple[dict, float]:
        """Return ({head: factor of its terms}, number that the shared task loss is divided by).

        Each head divides its weights by 1 plus its gradient ratios. Heads that share a task loss
        must all divide by the same number, the largest of them.
        """
        lengths = {k: h.ratios.length(h.recipe.weights_at(progress)) for k, h in self.heads.items()}
        longest = max(lengths.values())
        shared = any(h.shares_task for h in self.heads.values())
        own = {k: lengths[k] / longest if shared else 1.0 for k in self.heads}
        return {k: h.weight * own[k] for k, h in self.heads.items()}, longest

    @property
    def pairs(self) -> PairTable | None:
        """The pairs of layers that are compared. None until they are known."""
        if not self.several:
            return self.head.pairs
        return PairTable([p for h in self.heads.values() for p in h.pairs or []])

    @property
    def ratios(self) -> dict:
        """The measured gradients of terms with a gradient ratio."""
        if not self.several:
            return self.head.ratios
        return {f'{k}.{n}': r for k, h in self.heads.items() for n, r in h.ratios.items()}

    @property
    def gradient_shares(self) -> dict | None:
        """{loss: its fraction of the total gradient norm}, where the task loss is named 'task'.

        None until the first training batch.
        """
        each = {k: h.gradient_shares for k, h in self.heads.items()}
        return None if all(s is None for s in each.values()) else self._named(each)

    @property
    def faded(self) -> dict[str, float]:
        """How much is left of the gradient ratio of each term with `fade=True`, from 0 to 1. Reading
        it waits for the GPU.
        """
        return self._named({k: h.faded for k, h in self.heads.items()})

    def _named(self, each: dict) -> dict:
        """Merge the dicts of all heads, with names such as 'color.kd'."""
        if not self.several:
            return each['']
        return {f'{k}.{n}': v for k, o in each.items() for n, v in (o or {}).items()}

    @property
    def ready(self) -> bool:
        """True if all projectors are built."""
        return all(h.ready for h in self.heads.values())

    # checkpoints

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint holds besides weights.

        It is encoded as a uint8 tensor, so that it can be stored wherever weights can.
        """
        state = {k: h.state() for k, h in self.heads.items()}
        state = state if self.several else state['']
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor):
        """Restore the chosen recipe and the measured gradients.

        If a recipe with different terms was already chosen, it is kept.
        """
        state = json.loads(bytes(state.tolist()))
        of_one = set(self.heads[next(iter(self.heads))].state())
        if set(state) != (set(self.heads) if self.several else of_one):
            have = 'one output' if set(state) == of_one else f'the heads {", ".join(state)}'
            mine = f'the heads {", ".join(self.heads)}' if self.several else 'one output'
            raise DistillError(
                f'This state was saved from a Distiller with {have}, but this one has {mine}.'
            )
        for k, h in self.heads.items():
            h.load_state(state[k] if self.several else state)
        share_task_loss_again(self.heads)

    # checks and setup before the first batch

    def parameters(self, recurse=True):
        for h in self.heads.values():
            if not h.ready and any(t.match == 'shape' or t.projector != 'auto' for t in h.layered):
                raise DistillError(
                    'The projectors are not built yet, so an optimizer created now would not train them: '
                    'give the Distiller a batch of inputs, Distiller(..., example=x)'
                )
        return super().parameters(recurse)

    def own_parameters(self):
        return [p for p in self.links.parameters() if p.requires_grad]

    def check(self, x, *targets, n: int = BATCHES) -> Findings | dict[str, Findings]:
        """Find mistakes that training would not report. Return a list of findings, empty if there
        are none.

        With a DataLoader, it reads a few batches and reports the scores of both models and of a
        constant prediction (`.facts`), a teacher that seems untrained or whose classes are in a
        different order, and everything else that `Learner.check_teacher` finds without a Learner.
        If it doubts the teacher, `auto` gives the teacher a small weight. With a single batch, it
        only reports outputs and labels that do not fit together. Neither model is changed.

        Args:
            x: A DataLoader or a list of batches (inputs, labels), preferably from a validation set;
                or the inputs of one batch.
            *targets: The labels, if `x` is the inputs of one batch.
            n: Number of batches to read.

        Returns:
            A `Findings` list. For several heads, a dict {head name: list}.
        """
        if not targets and is_loader(x):
            with own_generators(x):
                return self.check_batches(map(inputs_and_labels, x), n)
        x = inputs(x)
        return self._each_head(
            lambda h: h.check(
                Outputs(student_logits(self.student, x, h.output)),
                h.teacher.probe(*x),
                h.labels(targets),
            )
        )

    def check_batches(self, batches, n: int = BATCHES, *, placed: bool = False, part: str = ''):
        """Run `check` on batches that are already split into inputs and labels.

        Args:
            batches: (inputs, labels) of each batch, with the labels as a tuple.
            n: Number of batches to read.
            placed: Whether the labels are already at the positions where they are predicted.
            part: Name of the dataset for messages: 'validation' or 'training', or '' if unknown.
        """
        device = next((p.device for p in self.student.parameters()), None)
        here = ((inputs(x), y) for x, y in islice(batches, n))
        here = (map_tensors(b, lambda t: t if t.device == device else t.to(device)) for b in here)
        if self.several:
            here = list(here)
        of = lambda h: ((x, h.labels(y)) for x, y in here)
        return self._each_head(lambda h: h.check_batches(of(h), placed, part))

    def _each_head(self, fn):
        """Return {head name: fn(head)} for the heads that have a teacher."""
        if not self.several:
            return fn(self.head)
        return {k: fn(h) for k, h in self.heads.items() if h.teacher is not None}

    def setup(self, *x):
        """Pair layers and build projectors.

        It runs both models once in evaluation mode, without changing them or the random state.
        """
        for h in self.heads.values():
            if not (self.several and h.ready):
                h.setup(x)
        return self

    # computing the loss of a batch

    def active_terms(self, progress: float | None = None) -> list:
        """Return the terms that a batch needs.

        In training, these are the terms with a nonzero weight. Without gradients, as in validation,
        all terms are returned.

        Args:
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
        """
        return [t for h in self.heads.values() for t in h.active_terms(progress)]

    def student_layers(self, terms=None) -> list:
        """Return the student layers that the terms compare.

        Args:
            terms: Terms to consider, as returned by `active_terms`. None for all.
        """
        return list(dict.fromkeys(n for h in self.heads.values() for n in h.layers(0, terms)))

    def teacher_outputs(
        self, x, progress: float | None = None, samples=None
    ) -> Outputs | dict | None:
        """Return the teacher's outputs for a batch, including the layers that the terms compare.

        Args:
            x: Inputs of the batch, as in `forward`.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
            samples: The `BatchSamples` of the batch. None if they are unknown.

        Returns:
            None if no term needs the teacher. For several heads, a dict with the heads that have
            outputs.
        """
        x, terms = inputs(x), {k: h.active_terms(progress) for k, h in self.heads.items()}
        ask = {k: h for k, h in self.heads.items() if terms[k] and h.teacher is not None}
        out = {k: None for k in self.heads if k not in ask}
        if self.several and not torch.is_grad_enabled():
            ask = {k: h for k, h in ask.items() if h.teacher.has_outputs(samples)}
        for group in teacher_groups(ask):
            first = next(iter(group.values())).teacher
            layers = list(dict.fromkeys(n for k, h in group.items() for n in h.layers(1, terms[k])))
            if len(group) == 1:
                outs = [first.outputs(x, samples, layers)]
            else:
                same = [h.teacher for h in group.values()]
                outs = first.outputs_for(same, x, samples, layers)
            out |= dict(zip(group, outs))
        none = len(out) == len(self.heads) and all(o is None for o in out.values())
        return None if none else self._only(out)

    def student_outputs(self, raw, feats: dict, x) -> Outputs | dict[str, Outputs]:
        """Return the student's outputs, with the padding of the batch masked. For several heads, a
        dict.

        Args:
            raw: What the student returned. If it has several outputs, the one selected by `output`
                is used.
            feats: Layer outputs that the taps recorded.
            x: Inputs of the batch, used to find padded positions.
        """
        return self._only({k: h.student_outputs(raw, feats, x) for k, h in self.heads.items()})

    def _only(self, each: dict):
        return each if self.several else each['']

    def _by_head(self, o) -> dict:
        """Undo `_only`: return {head name: outputs}."""
        if self.several:
            return o or {}
        return {'': o}

    @contextmanager
    def reading(self, progress: float | None = None):
        """Context in which a trainer runs the student. It yields a list of what the student
        returned, and the `Taps` on its layers.

        Args:
            progress: Share of the training that is done, for schedules.
        """
        layers = self.student_layers(self.active_terms(progress))
        with returned_by(self.student) as seen, Taps(self.student, layers) as taps:
            yield seen, taps

    def forward(self, x, *targets, progress: float | None = None) -> Distilled:
        """Run student and teacher on a batch and return the loss.

        Args:
            x: The inputs: a tensor, a tuple of several, or a dict, whose items are passed by name
                if the model has arguments with these names.
            *targets: Labels. Not needed if the recipe gives them no weight. For several heads, one
                per head, in their order; None for a head without labels.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.

        Returns:
            A `Distilled`. For several heads, its `task` is the weighted sum of their task losses.
        """
        own = {k: h.labels(targets) for k, h in self.heads.items()}
        x = inputs(x)
        if not self.ready:
            self.setup(*x)
        terms, (args, kwargs) = self.active_terms(progress), arguments(self.student, x)
        with Taps(self.student, self.student_layers(terms)) as taps:
            raw = self.student(*args, **kwargs)
            feats = taps.pop()
        s = self._by_head(self.student_outputs(raw, feats, x))
        for k, h in self.heads.items():
            if h.chooses:
                h.choose(s[k].logits, x, bool(own[k]))
        t = self._by_head(self.teacher_outputs(x, progress))
        each = {k: h.compare(s[k], t.get(k), x, own[k], progress) for k, h in self.heads.items()}
        if not self.several:
            return each['']
        return whole_loss(each, {k: h.weight for k, h in self.heads.items()})

    def compute(
        self,
        student: Outputs | dict[str, Outputs],
        teacher: Outputs | dict[str, Outputs] | None,
        task: Tensor | None = None,
        targets=(),
        *,
        progress: float | None = None,
        mixed=None,
    ) -> Distilled:
        """Return the loss of a batch from outputs that are already computed. Trainers call this.

        For several heads, the outputs are dicts {head name: outputs}.

        Args:
            student: Student outputs for this batch.
            teacher: Teacher outputs for the same batch. None if no term needs them (see
                `teacher_outputs`).
            task: Task loss of the batch. None without labels. For several heads, the total task
                loss, weighted equally in all recipes.
            targets: Labels, for losses that read them.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
            mixed: (second labels, coefficient of the first ones) for a MixUp or CutMix batch.
        """
        students, teachers, each = self._by_head(student), self._by_head(teacher), {}
        for k, h in self.heads.items():
            if self.several and teacher is not None and k not in teacher:
                continue  # a cache may hold only the outputs for the training set
            each[k] = h.compute(
                students[k],
                teachers.get(k),
                task,
                h.labels(targets),
                progress=progress,
                mixed=None if mixed is None else (h.labels(mixed[0]), mixed[1]),
            )
        if not self.several:
            return each['']
        scale, longest = self._scales(progress)
        taught = [scale[k] * e.taught for k, e in each.items() if e.taught is not None and scale[k]]
        weights = {
            k: {n: scale[k] * w for n, w in e.weights.items() if n != 'task'}
            for k, e in each.items()
        }
        task_weight = next(iter(self.heads.values())).recipe.weights_at(progress)['task'] / longest
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            self._named({k: e.parts for k, e in each.items()}),
            {'task': task_weight, **self._named(weights)},
            self._named({k: e.terms for k, e in each.items()}),
        )

    def without_labels(self, student, teacher, *, progress: float | None = None) -> Tensor:
        """Return the weighted sum of the terms that read no labels, for a batch of unlabeled
        inputs.

        Gradient ratios use what was measured on the labeled batches.

        Args:
            student: Student outputs for the unlabeled inputs.
            teacher: Teacher outputs for the same inputs.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
        """
        s, t = self._by_head(student), self._by_head(teacher)
        scale, _ = self._scales(progress)
        values = [
            scale[k] * h.without_labels(s[k], t.get(k), progress=progress)
            for k, h in self.heads.items()
            if h.weight
        ]
        return sum(values[1:], values[0])


def labels_in_order(names, i, targets):
    """Return the labels of head `i` if each head has one label."""
    if targets and len(targets) != len(names):
        raise DistillError(
            f'{len(targets)} labels for {len(names)} heads ({", ".join(names)}): give one '
            'for each, or None.'
        )
    return tuple(y for y in targets[i : i + 1] if y is not None)


def whole_loss(each: dict, weights: dict) -> Distilled:
    """Return the weighted sum of the losses of several heads, each with its own task loss."""
    each = {k: e for k, e in each.items() if weights[k]}
    task = [weights[k] * e.weights['task'] * e.task for k, e in each.items() if e.weights['task']]
    taught = [weights[k] * e.taught for k, e in each.items() if e.taught is not None]
    parts, counted = {}, {'task': 1.0 if task else 0.0}
    for k, e in each.items():
        own = {} if e.task is None else {'task': e.task.detach()}
        parts |= {f'{k}.{n}': v for n, v in {**own, **e.parts}.items()}
        counted |= {f'{k}.{n}': weights[k] * w for n, w in e.weights.items()}
    return Distilled(
        sum(task[1:], task[0]) if task else None,
        sum(taught[1:], taught[0]) if taught else None,
        parts,
        counted,
    )


def same_model(a, b):
    model = lambda o: o.model if isinstance(o, Teacher) and not o.members else o
    return a is not None and model(a) is model(b)
