"The core: one batch of student, teacher and recipe. It knows tensors and no training loop."

import json
from collections.abc import Mapping
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from ..base.outputs import DistillError, Outputs, map_tensors
from ..checks.findings import Findings
from ..checks.forward import student_logits
from ..checks.outputs import BATCHES
from ..features.calls import arguments
from ..features.layer_pairs import PairTable, inputs
from ..features.taps import Taps
from ..recipes.batch import inputs_and_labels
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe
from ..teachers.forms import holds_weights
from ..teachers.teacher import Teacher, same_run
from .head import Head, HeadOutput, SharedOutput, options_by_head, renamed
from .loader import is_loader, own_generators

__all__ = ['Distiller']

LACKS = (
    'the chosen recipe and the measured gradients, which checkpoints of earlier releases lack. '
    'load_state_dict(state, strict=False) takes the weights alone; the recipe is then chosen, and gradients are '
    'measured, anew'
)


def of_the_only_head(name, doc):
    """A property of a Distiller that is one of its head, if there is one head."""

    def get(self):
        return getattr(self.head, name)

    def set_(self, v):
        setattr(self.head, name, v)

    return property(get, set_, doc=doc)


class Distiller(nn.Module):
    """A student, its teacher, and a recipe: `distiller(x, y)` is one batch. Its parameters are the
    student's and the projectors', never the teacher's. `with distiller.teacher:` around a loop gets
    the teacher ready once, and not for each batch. `state_dict()` holds all that a training needs
    to continue, but for the optimizer's state.

    A student with several outputs may learn each from its own teacher: `Distiller(student,
    {'color': teacher1, 'shape': teacher2})`, where `distiller(x, y_color, y_shape)` is one batch.
    Each option is then one for all heads, or a dict by the name of the head. The student runs once
    per batch, and so does a teacher of several heads. `distiller.heads['color']` has the attributes
    of one head, such as `recipe` and `teacher`.

    Args:
        student: What is trained; None if only `compute` is used, without layers.
        teacher: A `Teacher`, or what it takes: a module, a callable, a file, a list of these. A
            dict: name of a head -> its teacher, or None for labels alone. A teacher of several
            heads gives each the output of its name, or of its place in a tuple.
        recipe: `kd()`, `kd() + at()`, a `Term`, or a text such as 'kd(T=2) + at()'; None or
            'auto': `auto` chooses at the first batch, by the outputs.
        task_loss: fn(student logits, *targets): the task loss; None: cross-entropy,
            binary cross-entropy or squared error.
        kind: What the logits are: 'softmax' over classes, 'sigmoid' per label, or 'regression';
            None: what `task_loss` takes, if that is PyTorch's, else 'softmax'.
        axis: Class axis; None: `task_loss`'s, else 1.
        ignore_index: Positions with this label do not count; None: `task_loss`'s, else -100.
        shift_labels: Labels of a language model stand where their tokens stand (Hugging Face's
            way), and not where they are predicted: True moves them for the terms and for the
            loss that None chooses. None: seen in the first batch, or asked for.
        output: Which of several outputs is distilled, of the student and of a teacher that is
            not yet a `Teacher`: a name, an index, or a function of what the model returned;
            None: the one called 'logits' or 'out', or the first of a tuple. Of a head: the one
            with its name, or with its place in a tuple.
        labels: Of several heads: name -> fn(labels of the batch) -> those of this head, as a
            tuple; None: each head has one label, in the order of the heads.
        weights: Of several heads: name -> weight of its loss; 1 if not given.
        check: Look for mistakes: parameters that both models share, and in the first batch what
            `Distiller.check` finds.
        example: A batch of inputs, to build projectors before an optimizer asks for their
            parameters.
    """

    head_class = Head  # of each comparison

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
        # subtle: the first child, so that the student's parameters are the first ones of a Distiller
        self.student = student
        self.several = isinstance(teacher, Mapping) and not holds_weights(teacher)
        if not self.several and (labels is not None or weights is not None):
            raise DistillError(
                'labels= and weights= are for several heads: give a dict of teachers, as in '
                "Distiller(student, {'color': teacher1, 'shape': teacher2})."
            )
        teachers = {str(k): t for k, t in teacher.items()} if self.several else {'': teacher}
        if not teachers:
            raise DistillError('A dict of teachers without a head.')
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
        self._register_links()
        self.share_models()
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
                f'This Distiller has the heads {names}: ask for those of one, as in '
                f'distiller.heads[{next(iter(self.heads))!r}].'
            )
        return self.heads['']

    teacher = of_the_only_head('teacher', 'The teacher; of several heads, see `heads`.')
    task = of_the_only_head('task', 'What the logits are.')
    output = of_the_only_head('output', 'Which output is distilled.')
    shift_labels = of_the_only_head('shift_labels', 'Are labels moved to where they are predicted?')

    @property
    def sources(self) -> list:
        """What runs: the teacher of each head, but one for those that share a run."""
        return [next(iter(group.values())).teacher for group in self._runs(self.heads)]

    def share_models(self):
        """Let teachers that share a run share the faster copy of their model too."""
        for group in self._runs(self.heads):
            first, *others = group.values()
            for h in others:
                h.teacher = h.teacher.sharing(first.teacher)

    def start(self):
        """Prepare the teachers for many batches."""
        for t in self.sources:
            t.start()

    def stop(self):
        """Restore the teachers; may be called at any time, and twice."""
        for t in self.sources:
            t.stop()

    @property
    def recipe(self) -> Recipe:
        """The recipe; of several heads, that of all, with names such as 'color.kd'. It has no task
        weight if the heads give the task loss different weights.
        """
        if not self.several:
            return self.head.recipe
        whole = lambda k, h: [renamed(t, f'{k}.{t.name}') for t in h.recipe.terms]
        task, *others = (h.recipe.task for h in self.heads.values())
        if any(o != task for o in others):
            task = None
        return Recipe(*(t for k, h in self.heads.items() for t in whole(k, h)), task=task)

    def take(self, recipe):
        """Use this recipe from now on, for a student with one output."""
        self.head.take(recipe)

    def _register_links(self):
        """What the heads train beside the student."""
        links = {k: h.links for k, h in self.heads.items()}
        self.links = nn.ModuleDict(links) if self.several else links['']

    def measured(self) -> dict:
        """Name of a head -> (projectors and losses with parameters, measured gradients)."""
        return {k: (h.links, h.ratios) for k, h in self.heads.items()}

    def use(self, measured: dict):
        """Continue with these.

        Args:
            measured: As from `measured`
        """
        for k, h in self.heads.items():
            h.links, h.ratios = measured[k]
        self._register_links()

    def share_task_loss(self):
        """For trainers that compute one task loss for all heads: its weight must be the same in all
        recipes.
        """
        task = Recipe(*(h.recipe for h in self.heads.values())).task
        for h in self.heads.values():
            h.shares_task, h.recipe = True, Recipe(*h.recipe.terms, task=task)

    def _share_again(self):
        """As `share_task_loss`, if it was called before and a recipe is a new one."""
        if self.several and any(h.shares_task for h in self.heads.values()):
            self.share_task_loss()

    @property
    def pairs(self) -> PairTable | None:
        """What is compared with what, once it is known."""
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
        """Part -> share of the gradient, the labels' is 'task'; None until the first training
        batch.
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
        """Of all heads, with names such as 'color.kd'."""
        if not self.several:
            return each['']
        return {f'{k}.{n}': v for k, o in each.items() for n, v in (o or {}).items()}

    @property
    def measures(self) -> bool:
        """Are shares of the gradient measured?"""
        return all(h.measures for h in self.heads.values())

    @measures.setter
    def measures(self, on):
        for h in self.heads.values():
            h.measures = on

    @property
    def chooses(self) -> bool:
        """Is a recipe still to be chosen?"""
        return any(h.chooses for h in self.heads.values())

    @property
    def chosen(self) -> dict:
        """Name of a head -> the recipe that `auto` chose for it, as text; None: it chose none."""
        return {k: h.chosen and h.chosen[0] for k, h in self.heads.items()}

    @property
    def ready(self) -> bool:
        """Are all projectors built?"""
        return all(h.ready for h in self.heads.values())

    # checkpoints

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds beside weights: as a tensor, so that it can be stored wherever
        weights can.
        """
        state = {k: h.state() for k, h in self.heads.items()}
        state = state if self.several else state['']
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor):
        """Continue with what was chosen and measured. A recipe with different terms that was chosen
        already is kept.
        """
        state = json.loads(bytes(state.tolist()))
        of_one = set(self.heads[next(iter(self.heads))].state())
        if set(state) != (set(self.heads) if self.several else of_one):
            have = 'one output' if set(state) == of_one else f'the heads {", ".join(state)}'
            mine = f'the heads {", ".join(self.heads)}' if self.several else 'one output'
            raise DistillError(f'This state is of a Distiller with {have}; this one has {mine}.')
        for k, h in self.heads.items():
            h.load_state(state[k] if self.several else state)
        self._share_again()

    def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
        if (key := f'{prefix}_extra_state') not in state:
            # subtle: `strict` is True whatever was asked for, and only `missing` depends on it
            if self.ratios or any(h.automatic for h in self.heads.values()):
                missing.append(f'{key}: {LACKS}')
            state = {**state, key: self.get_extra_state()}
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)

    # before the first batch

    def parameters(self, recurse=True):
        for h in self.heads.values():
            if not h.ready and any(t.match == 'shape' or t.projector != 'auto' for t in h.layered):
                raise DistillError(
                    'The projectors are not built yet, and an optimizer made now would not train them: '
                    'give the Distiller a batch of inputs, Distiller(..., example=x)'
                )
        return super().parameters(recurse)

    def own_parameters(self):
        return [p for p in self.links.parameters() if p.requires_grad]

    def check(self, x, *targets, n: int = BATCHES) -> Findings | dict[str, Findings]:
        """What would go wrong in silence: a list of findings, empty if nothing is wrong; of several
        heads, a dict with a list for each.

        Of a DataLoader, a few batches show the scores of both models and of a constant prediction
        (`.facts`), a teacher that seems untrained, or whose classes are in another order, and all
        that `Learner.check_teacher` finds without a Learner. A teacher in doubt gets a small part
        of the recipe that is chosen for you. One batch shows outputs and labels that do not fit.
        Both models stay as they are.

        Args:
            x: A DataLoader, or a list of batches (inputs, labels), best of a validation set; or
                the inputs of one batch.
            *targets: The labels of one batch.
            n: Number of batches to read of a DataLoader.
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
        """As `check`, for batches that are split already.

        Args:
            batches: (inputs, labels) of each, the labels as a tuple.
            n: How many are read.
            placed: Is each label where it is predicted already?
            part: What they are, for messages: 'validation' or 'training'; '' if unknown.
        """
        device = next((p.device for p in self.student.parameters()), None)
        here = ((inputs(x), y) for x, y in islice(batches, n))
        here = (map_tensors(b, lambda t: t if t.device == device else t.to(device)) for b in here)
        if self.several:
            here = list(here)
        of = lambda h: ((x, h.labels(y)) for x, y in here)
        return self._each_head(lambda h: h.check_batches(of(h), placed, part))

    def _each_head(self, fn):
        """fn(head) of each that has a teacher."""
        if not self.several:
            return fn(self.head)
        return {k: fn(h) for k, h in self.heads.items() if h.teacher is not None}

    def check_names(self):
        """Refuse layers that the models don't have, before any batch."""
        for h in self.heads.values():
            h.check_names()

    def setup(self, *x):
        """Pair layers and build projectors, from one evaluation-mode probe that changes nothing,
        the random state included.
        """
        for h in self.heads.values():
            if not (self.several and h.ready):
                h.setup(x)
        return self

    def choose(self, x: tuple, labels: bool):
        """Take the recipe that `auto` chooses, for each head without one.

        Args:
            x: Inputs of a batch.
            labels: Do the batches have labels?
        """
        for h in self.heads.values():
            if h.chooses:
                h.choose(student_logits(self.student, x, h.output), x, labels)
        self._share_again()

    # a batch

    def active_terms(self, progress: float | None = None) -> list:
        """The terms that a batch needs: those with a weight; without gradient, as in validation,
        all of them.

        Args:
            progress: Share of the training that is done, for schedules.
        """
        return [t for h in self.heads.values() for t in h.active_terms(progress)]

    def needs_teacher(self, progress: float | None = None) -> bool:
        """Whether any term needs the teacher's outputs for this batch."""
        return bool(self.active_terms(progress))

    def student_layers(self, terms=None) -> list:
        """The student's layers that the terms compare.

        Args:
            terms: Of these terms, as `active_terms` gives them; None: of all.
        """
        return self._layers(0, terms)

    def teacher_layers(self, terms=None) -> list:
        """The teacher's layers that the terms compare."""
        return self._layers(1, terms)

    def _layers(self, i, terms):
        return list(dict.fromkeys(n for h in self.heads.values() for n in h.layers(i, terms)))

    def teacher_outputs(
        self, x, progress: float | None = None, samples=None
    ) -> Outputs | dict | None:
        """The teacher's outputs for a batch, with the layers that its terms compare; None where no
        term needs them. Of several heads, a dict of those that have outputs.

        Args:
            x: The batch's inputs, as `forward` takes them.
            progress: Share of the training that is done, for schedules.
            samples: The `BatchSamples` of the batch; None: unknown.
        """
        x, terms = inputs(x), {k: h.active_terms(progress) for k, h in self.heads.items()}
        ask = {k: h for k, h in self.heads.items() if terms[k] and h.teacher is not None}
        out = {k: None for k in self.heads if k not in ask}
        if self.several and not torch.is_grad_enabled():
            ask = {k: h for k, h in ask.items() if h.teacher.has_outputs(samples)}
        for group in self._runs(ask):
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

    def _runs(self, heads) -> list[dict]:
        """The heads in groups whose teachers need one run."""
        groups = []
        for k, h in heads.items():
            if h.teacher is None:
                continue
            same = (g for g in groups if same_run(next(iter(g.values())).teacher, h.teacher))
            if (group := next(same, None)) is None:
                groups.append(group := {})
            group[k] = h
        return groups

    def student_outputs(self, raw, feats: dict, x) -> Outputs | dict[str, Outputs]:
        """The student's outputs, of several the one that `output` names, with the padding of the
        batch masked. Of several heads, a dict.

        Args:
            raw: What the student returned.
            feats: What taps read.
            x: The batch's inputs, whose padded positions do not count.
        """
        return self._only({k: h.student_outputs(raw, feats, x) for k, h in self.heads.items()})

    def has_outputs(self, samples) -> bool:
        """Return True if any teacher has outputs for these samples.

        Args:
            samples: The `BatchSamples` of a batch. None if they are unknown.
        """
        teachers = (h.teacher for h in self.heads.values())
        return any(t.has_outputs(samples) for t in teachers if t is not None)

    def outputs_by_head(self, outputs: Outputs | dict | None) -> dict[str, Outputs]:
        """Return {name of the head: outputs}, without heads that have none.

        Args:
            outputs: What `teacher_outputs` or `student_outputs` returned.
        """
        return {k: o for k, o in self._by_head(outputs).items() if o is not None}

    def _only(self, each: dict):
        return each if self.several else each['']

    def _by_head(self, o) -> dict:
        """Outputs by head, as `_only` returned them."""
        if self.several:
            return o or {}
        return {'': o}

    def forward(self, x, *targets, progress: float | None = None) -> Distilled:
        """Run student and teacher on a batch and compare them.

        Args:
            x: The inputs: a tensor, a tuple of several, or a dict (passed by name where the
                model has arguments of these names).
            *targets: Labels; none where the recipe gives them no weight. Those of several heads
                are in the order of the heads; None: this head has none.
            progress: Share of the training that is done, for schedules.

        Returns:
            Of several heads, `task` is the weighted sum of their task losses.
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

    def labels(self, x, logits, targets):
        """The task loss, and the targets each where it is predicted."""
        return self.head.task_and_targets(x, logits, targets)

    def targets_at(self, x, student: Outputs | dict, targets):
        """The targets, each where it is predicted: a language model predicts the next token. Those
        of several heads stay as they are.

        Args:
            x: The batch's inputs.
            student: Outputs as `student_outputs` returns them.
            targets: A tuple.
        """
        if self.several:
            return targets
        return self.head.targets_at(x, student.logits, targets)

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
        """The loss of a batch whose student (and teacher) ran already: what trainers call. Of
        several heads, outputs are dicts.

        Args:
            student: Of this batch.
            teacher: Of the same batch; None where no term needs it (see `needs_teacher`).
            task: The task loss, already computed; None without labels. Of several heads, that of
                all, see `share_task_loss`.
            targets: Labels, for the losses that read them.
            progress: Share of the training that is done, for schedules.
            mixed: (other targets, share of the first ones): MixUp's batches have two labels a
                sample.
        """
        students, teachers, each = self._by_head(student), self._by_head(teacher), {}
        for k, h in self.heads.items():
            if self.several and teacher is not None and k not in teacher:
                continue  # its outputs may be stored only for the training set
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
        scale = {k: h.weight for k, h in self.heads.items()}
        taught = [scale[k] * e.taught for k, e in each.items() if e.taught is not None and scale[k]]
        weights = {
            k: {n: scale[k] * w for n, w in e.weights.items() if n != 'task'}
            for k, e in each.items()
        }
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            self._named({k: e.parts for k, e in each.items()}),
            {'task': next(iter(each.values())).weights['task'], **self._named(weights)},
        )

    def without_labels(self, student, teacher, *, progress: float | None = None) -> Tensor:
        """The weighted sum of the terms that read no labels, for inputs without labels beside the
        batches with labels. Shares of the gradient are those that were measured there.

        Args:
            student: For inputs without labels.
            teacher: For the same.
            progress: Share of the training that is done, for schedules.
        """
        s, t = self._by_head(student), self._by_head(teacher)
        values = [
            h.weight * h.without_labels(s[k], t.get(k), progress=progress)
            for k, h in self.heads.items()
            if h.weight
        ]
        return sum(values[1:], values[0])


def labels_in_order(names, i, targets):
    """The label of a head, if each head has one."""
    if targets and len(targets) != len(names):
        raise DistillError(
            f'{len(targets)} labels for {len(names)} heads ({", ".join(names)}): give one '
            'for each, or None.'
        )
    return tuple(y for y in targets[i : i + 1] if y is not None)


def whole_loss(each: dict, weights: dict) -> Distilled:
    """The weighted sum of the losses of several heads, of which each has its own task loss."""
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
