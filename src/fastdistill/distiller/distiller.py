"The core: one batch of student, teacher and recipe. It knows tensors and no training loop."

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from ..base.class_mapping import taught_part
from ..base.distributed import of_first, rank
from ..base.generators import Generators
from ..base.outputs import (
    DistillError,
    Outputs,
    as_plain,
    check_output,
    map_tensors,
    warn_of_several,
)
from ..base.random_state import RandomGuard
from ..base.task import labels_loss, task_for
from ..checks.findings import Findings
from ..checks.forward import student_logits
from ..checks.outputs import BATCHES, check_batch, check_outputs
from ..checks.shared_parameters import none_shared, shared_parameters
from ..features.calls import arguments, predicts_next
from ..features.layer_pairs import PairTable, check_names, inputs, pair
from ..features.probe import dry_run
from ..features.projectors import projector
from ..features.taps import Taps, is_output, layer_output, returned_by
from ..recipes.batch import (
    all_classes,
    both,
    inputs_and_labels,
    labels_to_shift,
    next_tokens,
    padding_mask,
)
from ..recipes.default import chosen_before, chosen_for
from ..recipes.link import Link, own_copy
from ..recipes.recipe_loss import Distilled, RecipeLoss
from ..recipes.term import Recipe
from ..recipes.text import as_recipe
from ..teachers.teacher import Teacher

__all__ = ['Distiller']

LACKS = (
    'the chosen recipe and the measured gradients, which checkpoints of earlier releases lack. '
    'load_state_dict(state, strict=False) takes the weights alone; the recipe is then chosen, and gradients are '
    'measured, anew'
)


class Distiller(RecipeLoss):
    """A student, its teacher, and a recipe: `distiller(x, y)` is one batch. Its parameters are the
    student's and the projectors', never the teacher's. `with distiller.teacher:` around a loop gets
    the teacher ready once, and not for each batch. `state_dict()` holds all that a training needs
    to continue, but for the optimizer's state.

    Args:
        student: What is trained; None if only `compute` is used, without layers.
        teacher: A `Teacher`, or what it takes: a module, a callable, a file, a list of these.
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
            None: the one called 'logits' or 'out', or the first of a tuple.
        check: Look for mistakes: parameters that both models share, and in the first batch what
            `Distiller.check` finds.
        example: A batch of inputs, to build projectors before an optimizer asks for their
            parameters.
    """

    def __init__(
        self,
        student: nn.Module | None,
        teacher,
        recipe=None,
        *,
        task_loss=None,
        kind: str | None = None,
        axis: int | None = None,
        ignore_index: int | None = None,
        shift_labels: bool | None = None,
        output=None,
        check: bool = True,
        example=None,
    ):
        recipe = as_recipe(recipe)
        super().__init__(
            Recipe() if recipe is None else recipe, task_for(task_loss, kind, axis, ignore_index)
        )
        self.student, self.task_loss, self.shift_labels = student, task_loss, shift_labels
        self.automatic = self.chooses = recipe is None  # is the recipe chosen? is it still to be?
        check_output(output)
        self.output, self.found, self.doubt = (
            output,
            {},
            '',
        )  # what a check found against the teacher
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = Teacher(teacher, kind=self.task.kind, axis=self.task.axis, output=output)
        self.teacher = teacher
        self.pairs: PairTable | None = None  # what is compared with what, once it is known
        self.unchecked = {'labels', 'outputs'} if check else set()
        if student is not None and teacher is not None:
            self.check_names()
            if check:
                Findings(shared_parameters(student, teacher)).enforce()
        if example is not None:
            self.setup(*inputs(example))

    def take(self, recipe):
        super().take(Recipe(recipe))
        self.chooses = False
        self.chosen = (
            [recipe.text, recipe.why, recipe.kind] if hasattr(recipe, 'text') else None
        )  # if `auto` chose it

    def choose(self, logits, x: tuple, labels: bool):
        """Take the recipe that `auto` chooses for such outputs and such a teacher, and batches with
        or without labels.
        """
        ask = lambda: all_classes(self.teacher.probe(*x), Outputs(logits)).logits
        doubt = 'the teacher is in doubt, see above' if self.doubt else None
        chosen = of_first(chosen_for(logits.shape, self.task, ask, labels, doubt))
        self.take(chosen)
        if rank() == 0:
            print(f'fastdistill: recipe {chosen}')

    # checkpoints

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds beside weights: as a tensor, so that it can be stored wherever
        weights can.
        """
        state = dict(
            recipe=self.chosen, ratios=self.ratios.state_dict(), shift_labels=self.shift_labels
        )
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor):
        """Continue with what was chosen and measured. A recipe with different terms that was chosen
        already is kept.
        """
        state = json.loads(bytes(state.tolist()))
        if self.automatic and state['recipe'] is not None:
            recipe = chosen_before(*state['recipe'])
            if self.chooses or [t.name for t in recipe.terms] == [
                t.name for t in self.recipe.terms
            ]:
                self.take(recipe)
        self.ratios.load_state_dict(state['ratios'])
        if self.shift_labels is None:
            self.shift_labels = state['shift_labels']

    def _load_from_state_dict(self, state, prefix, meta, strict, missing, unexpected, errors):
        if (key := f'{prefix}_extra_state') not in state:
            # subtle: `strict` is True whatever was asked for, and only `missing` depends on it
            if self.ratios or self.automatic:
                missing.append(f'{key}: {LACKS}')
            state = {**state, key: self.get_extra_state()}
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)

    @property
    def ready(self):
        return len(self.links) == len(self.recipe.terms)

    def parameters(self, recurse=True):
        if not self.ready and any(
            t.match == 'shape' or t.projector != 'auto' for t in self.layered
        ):
            raise DistillError(
                'The projectors are not built yet, and an optimizer made now would not train them: '
                'give the Distiller a batch of inputs, Distiller(..., example=x)'
            )
        return super().parameters(recurse)

    def check_names(self):
        """Refuse layers that the models don't have, before any batch."""
        for t in self.layered:
            check_names(self.student, self.teacher, t.layers)

    def check(self, x, *targets, n: int = BATCHES) -> Findings:
        """What would go wrong in silence: a list of findings, empty if nothing is wrong.

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
        s, t = student_logits(self.student, x, self.output), self.teacher.probe(*x)
        return self._findings(Outputs(s), t, targets)

    def check_batches(self, batches, n: int = BATCHES, *, placed: bool = False) -> Findings:
        """As `check`, for batches that are split already.

        Args:
            batches: (inputs, labels) of each, the labels as a tuple.
            n: How many are read.
            placed: Is each label where it is predicted already?
        """
        found, device = Findings(), next((p.device for p in self.student.parameters()), None)
        found.add(
            'parameters',
            shared_parameters(self.student, self.teacher),
            none_shared(self.student, self.teacher),
        )
        here = ((inputs(x), y) for x, y in islice(batches, n))
        here = (map_tensors(b, lambda t: t if t.device == device else t.to(device)) for b in here)
        recipe = None if self.chooses else self.recipe
        found.join(
            check_outputs(
                self.teacher,
                self.task,
                here,
                self.student,
                recipe=recipe,
                output=self.output,
                place=None if placed else self.targets_at,
            )
        )
        self.doubt = found.doubt
        return found

    def _findings(self, student, teacher, targets):
        t = None if teacher is None else all_classes(teacher, student).logits
        y = as_plain(targets[0]) if len(targets) and isinstance(targets[0], Tensor) else None
        s, y = taught_part(
            student.logits, y, None if teacher is None else teacher.classes, self.task
        )
        return check_batch(s, t, y, self.task)

    def check_first(self, student, teacher, targets):
        """Refuse the mistakes of the first batch, and of the first batch for which the teacher
        runs.
        """
        parts = {'labels'} if teacher is None else {'labels', 'outputs'}
        if not parts & self.unchecked:
            return
        self.unchecked -= parts
        self._findings(student, teacher, targets).enforce()

    def own_parameters(self):
        return [p for p in self.links.parameters() if p.requires_grad]

    def setup(self, *x):
        """Pair layers and build projectors, from one evaluation-mode probe that changes nothing,
        the random state included.
        """
        student = self.student
        cuda = sorted({p.device.index for p in student.parameters() if p.is_cuda})
        with RandomGuard(cuda):
            tables = {
                t.name: pair(
                    student, self.teacher, x, layers=t.layers, match=t.match, projector=t.projector
                )
                for t in self.layered
            }
            pairs = self.pairs = PairTable(p for ps in tables.values() for p in ps)
            with Taps(student, dict.fromkeys(p.student for p in pairs)) as taps:
                dry_run(student, *x)
                s = taps.pop()
            t = self.teacher.probe(
                *x, layers=list(dict.fromkeys(p.teacher for p in pairs if not is_output(p.teacher)))
            )
            for term in self.layered:
                self.links[term.name] = nn.ModuleList(self._links(term, tables[term.name], s, t))
        return self

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
        links = (
            self.links[t.name]
            for t in (self.recipe.terms if terms is None else terms)
            if t.name in self.links
        )
        return list(
            dict.fromkeys(
                k.layers[i] for ks in links for k in ks if k.layers and not is_output(k.layers[i])
            )
        )

    def teacher_outputs(self, x, progress: float | None = None) -> Outputs | None:
        """The teacher's outputs for a batch, with the layers that its terms compare; None where no
        term needs them.

        Args:
            x: The batch's inputs, as `forward` takes them.
            progress: Share of the training that is done, for schedules.
        """
        terms = self.active_terms(progress)
        return self.teacher.outputs(inputs(x), layers=self.teacher_layers(terms)) if terms else None

    def student_outputs(self, raw, feats: dict, x) -> Outputs:
        """The student's outputs, of several the one that `output` names, with the padding of the
        batch masked.

        Args:
            raw: What the student returned.
            feats: What taps read.
            x: The batch's inputs, whose padded positions do not count.
        """
        if self.output is None:
            warn_of_several(raw, self.student, 'The student', self.found)
        s = Outputs.of(raw, feats, output=self.output)
        return replace(
            s, mask=both(s.mask, padding_mask(inputs(x), s.logits.shape, self.task.axis))
        )

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
        """Run student and teacher on a batch and compare them.

        Args:
            x: The inputs: a tensor, a tuple of several, or a dict (passed by name where the
                model has arguments of these names).
            *targets: Labels; none where the recipe gives them no weight.
            progress: Share of the training that is done, for schedules.
        """
        x = inputs(x)
        if not self.ready:
            self.setup(*x)
        terms, (args, kwargs) = self.active_terms(progress), arguments(self.student, x)
        with Taps(self.student, self.student_layers(terms)) as taps:
            raw = self.student(*args, **kwargs)
            feats = taps.pop()
        return self.after_student(raw, feats, x, targets, progress)

    def after_student(self, raw, feats, x, targets, progress):
        """Ask the teacher and compare, for a batch on which the student ran: `raw` is what it
        returned.
        """
        s = self.student_outputs(raw, feats, x)
        if self.chooses:
            self.choose(s.logits, inputs(x), bool(targets))
        t = self.teacher_outputs(x, progress)
        self.check_first(
            s, t, targets
        )  # before the task loss, whose error would not say what to do
        task, targets = self.labels(x, s.logits, targets)
        return self.compute(s, t, task, targets, progress=progress)

    def labels(self, x, logits, targets):
        """The task loss, and the targets each where it is predicted."""
        if not targets:
            return None, targets
        at = self.targets_at(x, logits, targets)
        if self.task_loss is not None:
            return self.task_loss(logits, *targets), at
        return labels_loss(logits, *at, task=self.task), at

    def targets_at(self, x, logits, targets):
        """The targets, each where it is predicted: a language model predicts the next token."""
        if self.shift_labels is None and targets:
            self.shift_labels = labels_to_shift(
                x, targets[0], logits.shape, self.task, predicts_next(self.student)
            )
            if self.shift_labels and rank() == 0:
                print(
                    'fastdistill: the labels are the inputs themselves, so each is moved to where it is predicted, '
                    'one position earlier. shift_labels=True says so, shift_labels=False leaves them'
                )
        if not self.shift_labels:
            return targets
        return next_tokens(targets[0], self.task.ignore_index), *targets[1:]

    def _links(self, term, pairs, s, t):
        """Of one term: a link for each pair, on the student's device."""
        modules = self.teacher.named_modules()
        for p in pairs:
            a, b = s[p.student], layer_output(t, p.teacher)
            proj = projector(
                a.shape, b.shape, kind=term.projector, match=term.match, picture=p.picture
            ).to(a.device)
            loss = own_copy(term.loss)
            if hasattr(loss, 'prepare'):
                loss.prepare(
                    proj.eval()(a, b),
                    b,
                    layer=modules.get(p.teacher.split('@')[0]),
                    **term.channels(b),
                )
            yield Link(loss, (p.student, p.teacher), proj.train()).to(a.device)


def is_loader(x):
    "Is it many batches, and not the inputs of one?"
    if isinstance(x, (Tensor, Mapping, tuple)) or not hasattr(x, '__iter__'):
        return False
    return not isinstance(x, list) or bool(x) and not isinstance(x[0], Tensor)


def own_generators(loader):
    """Random generators of a DataLoader, which are as before at the end."""
    parts = ('dataset', 'sampler', 'batch_sampler', 'generator')
    return Generators(*(getattr(loader, k, None) for k in parts)).seeded(0)
