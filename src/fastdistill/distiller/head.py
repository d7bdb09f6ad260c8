"""A head of a `Distiller`: an output of the student with its labels, its teacher and its recipe."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..base.class_mapping import taught_part, taught_task
from ..base.distributed import of_first, rank
from ..base.outputs import (
    DistillError,
    LinearLogits,
    Outputs,
    as_plain,
    check_output,
    tensor_of_numbers,
    warn_of_several,
)
from ..base.random_state import RandomGuard, RandomStream
from ..base.task import Task, labels_loss, task_for
from ..checks.findings import Findings
from ..checks.shared_parameters import none_shared, shared_parameters
from ..checks.stored_outputs import check_stored
from ..checks.task_loss import summed_loss
from ..checks.teacher_outputs import check_batch, check_outputs
from ..features.layer_hooks import Taps, is_output, layer_output
from ..features.layer_pairs import PairTable, check_names, inputs, pair
from ..features.model_call import predicts_next
from ..features.probe import dry_run
from ..features.projectors import Projector
from ..recipes.batch_tensors import both, plain_logits
from ..recipes.default import Automatic, auto, facts_for_auto
from ..recipes.layer_link import Link, own_copy
from ..recipes.recipe_loss import Distilled, RecipeLoss
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..recipes.token_labels import labels_to_shift, next_tokens, padding_mask
from ..teachers.teacher import Teacher, with_defaults


def link_of(term: Any, p: Any, s: dict, t: Outputs, modules: Mapping) -> Link:
    """Build the `Link` for a pair of layers of a term, on the student's device.

    Args:
        term: The term.
        p: The pair.
        s, t: Outputs of the layers of student and teacher.
        modules: {layer name: module} of the teacher.
    """
    a, b = s[p.student], layer_output(t, p.teacher)
    proj = Projector(a.shape, b.shape, kind=term.projector, match=term.match, picture=p.picture)
    proj, loss = proj.to(a.device), own_copy(term.loss)
    if hasattr(loss, 'prepare'):
        layer = modules.get(p.teacher.split('@')[0])
        loss.prepare(proj.eval()(a, b), b, layer=layer, **term.channels(b))
    return Link(loss, (p.student, p.teacher), proj.train()).to(a.device)


class Head(RecipeLoss):
    """An output of the student with its labels, its teacher and its recipe.

    The options that are not listed here are those of `Distiller`.

    Args:
        name: Name used in messages. '' if the student has one output.
        labels: fn(labels of the batch) -> tuple of the labels of this head.
        weight: Weight of the loss of this head.
        teacher_output: Which output of the teacher to distill. Ignored if the teacher is a
            `Teacher` object.
    """

    student: Any  # None if only `compute` is used
    links: Any  # {term: its `Link`s}
    shares_task = False  # True if one task loss is computed for all heads

    def __init__(
        self,
        name: str,
        student: nn.Module | None,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        *,
        labels: Callable,
        weight: float = 1.0,
        task_loss: Callable | None = None,
        kind: str | None = None,
        axis: int | None = None,
        ignore_index: int | None = None,
        shift_labels: bool | None = None,
        output: str | int | Callable | None = None,
        teacher_output: str | int | Callable | None = None,
        check: bool = True,
    ):
        recipe = as_recipe(recipe)
        super().__init__(
            Recipe() if recipe is None else recipe, task_for(task_loss, kind, axis, ignore_index)
        )
        self.name, self.labels, self.weight = name, labels, weight
        self.student, self.task_loss, self.shift_labels = student, task_loss, shift_labels
        self.automatic = recipe is None  # True if `auto` chooses the recipe
        check_output(output)
        self.output = output
        # `found` is the state of `warn_of_several`. `doubt` is the reason to doubt the teacher.
        self.found: dict = {}
        self.doubt = ''
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = teacher_of_task(teacher, self.task, teacher_output)
        self.pairs: PairTable | None = None  # pairs of layers, set by `setup`
        self.unchecked = {'labels', 'outputs'} if check else set()
        if student is not None and self.teacher is not None:
            self.check_names()
            if check:
                Findings(shared_parameters(student, self.teacher)).enforce()

    def take(self, recipe: Recipe) -> None:
        """Use this recipe from now on."""
        self.chosen = None
        if isinstance(recipe, Automatic):
            self.chosen = [recipe.text, recipe.why, recipe.kind]
        if self.shares_task and self.chosen is not None:
            recipe = with_full_task(recipe)
        super().take(recipe)

    def choose_from(
        self, student: Outputs, teacher: Outputs | None, labels: Sequence | bool
    ) -> None:
        """Let `auto` choose a recipe from outputs that are already computed, such as stored outputs.

        A recipe that was given or chosen before is kept.

        Args:
            student: Student outputs for a batch.
            teacher: Teacher outputs for the same batch. None if unknown.
            labels: Labels of the same batch, or whether the batches have labels.
        """
        if not self.waits:
            return
        if teacher is not None:
            self.choose(student.logits, lambda: teacher, labels)
        elif self.teacher is not None and torch.is_grad_enabled():
            raise DistillError(
                f"{self.prefix}there is no recipe yet, and it is chosen from the teacher's outputs, "
                'but got None for this batch. Pass what teacher_outputs() returned.'
            )
        elif self.teacher is None and not self.name:
            raise DistillError(
                'There is no recipe, no teacher and no teacher output for this batch, so there is '
                'nothing to distill. Pass a teacher or a recipe to the Distiller, or the outputs of '
                'the teacher to compute().'
            )

    def choose(self, logits: Any, ask: Callable[[], Outputs], labels: Sequence | bool) -> None:
        """Let `auto` choose a recipe from the outputs of a batch.

        Args:
            logits: Student logits of a batch.
            ask: fn() -> teacher outputs for the same batch.
            labels: Labels of the same batch, or whether the batches have labels.
        """
        ask_logits = lambda: plain_logits(Outputs(logits), ask())[1]
        doubt = 'the teacher is in doubt, see above' if self.doubt else None
        facts = facts_for_auto(logits.shape, self.task, ask_logits, labels)
        chosen = of_first(auto(**facts, labels=bool(labels), doubt=doubt))
        self.take(chosen)
        if rank() == 0:
            print(f'fastdistill: {self.prefix}recipe {chosen}')

    def weights_at(self, progress: float | None, of_heads: bool = False) -> dict:
        """Return {name: weight or gradient ratio} of each loss.

        If the task loss is that of all heads, it contains the weight of this head already, and so
        do gradient ratios, which are relative to it. A head of weight 0 has no terms.
        """
        weights = super().weights_at(progress)
        if not of_heads or self.weight == 1:
            return weights
        kept = {'task', *(self.ratios if self.weight else ())}
        return {k: w if k in kept else self.weight * w for k, w in weights.items()}

    @property
    def chooses(self) -> bool:
        """True if `auto` still has to choose the recipe from the teacher's outputs."""
        return self.waits and self.teacher is not None

    @property
    def waits(self) -> bool:
        """True if `auto` still has to choose the recipe."""
        return self.automatic and self.chosen is None

    @property
    def chosen_text(self) -> str | None:
        """Text of the recipe that `auto` chose. None if `auto` did not choose a recipe."""
        return None if self.chosen is None else self.chosen[0]

    @property
    def prefix(self) -> str:
        """The beginning of messages about this head."""
        return f'{self.name}: ' if self.name else ''

    # checkpoints

    def state(self) -> dict:
        """Return the state that a checkpoint needs in addition to the weights."""
        t = self.teacher
        return dict(
            recipe=self.chosen,
            shares_task=self.shares_task,
            ratios=self.ratios.state_dict(),
            shift_labels=self.shift_labels,
            random=self.random_state(),
            # whether the random state is kept when the teacher starts again
            keeps_random=isinstance(t, Teacher) and (t.runner.started or t.runner.random.keep),
        )

    def random_state(self) -> dict:
        """Return the random state of the teacher. Empty if the teacher uses no random numbers."""
        return self.teacher.runner.random.state_dict() if isinstance(self.teacher, Teacher) else {}

    def load_state(self, state: dict) -> None:
        """Restore the chosen recipe, the measured gradients and the random state of the teacher.

        If a recipe with different terms was already chosen, the current recipe is kept.
        """
        self.shares_task |= state['shares_task']
        if self.automatic and state['recipe'] is not None:
            recipe = Automatic(*state['recipe'])
            names = lambda r: [t.name for t in r.terms]
            if self.waits or names(recipe) == names(self.recipe):
                self.take(recipe)
        self.ratios.load_state_dict(state['ratios'])
        if self.shift_labels is None:
            self.shift_labels = state['shift_labels']
        if isinstance(self.teacher, Teacher) and state['random']:
            keep = state['keeps_random'] and not self.teacher.runner.started
            self.teacher.runner.random = RandomStream(state['random'], keep)

    # checks and setup before the first batch

    @property
    def ready(self) -> bool:
        return len(self.links) == len(self.recipe.terms)

    def check_names(self) -> None:
        """Raise an error if the recipe names layers that the models don't have."""
        for t in self.layered:
            check_names(self.student, self.teacher, t.layers)

    def check(self, student: Outputs, teacher: Outputs | None, targets: Sequence) -> Findings:
        """Report mistakes in the outputs and labels of one batch, such as incompatible shapes."""
        found = Findings()
        if teacher is not None:
            found.add('store', check_stored(self.recipe, teacher, self.task.kind))
        if targets:
            example = student.logits, targets
            found.add('task loss', summed_loss(self.task_loss, self.recipe, lambda: example))
        student, t, targets = plain_logits(student, teacher, targets)
        y = as_plain(targets[0]) if len(targets) and isinstance(targets[0], Tensor) else None
        classes = None if teacher is None else teacher.classes
        s, y = taught_part(student.logits, y, classes, self.task)
        return found.join(check_batch(s, t, y, taught_task(self.task, classes)))

    def check_batches(self, batches: Iterable, placed: bool = False, part: str = '') -> Findings:
        """Find mistakes that training would not report. See `Distiller.check_batches`."""
        found = Findings()
        found.add(
            'parameters',
            shared_parameters(self.student, self.teacher),
            none_shared(self.student, self.teacher),
        )
        found.join(
            check_outputs(
                self.teacher,
                self.task,
                batches,
                self.student,
                recipe=None if self.chooses else self.recipe,
                output=self.output,
                place=None if placed else self.targets_at,
                part=part,
            )
        )
        self.doubt = found.doubt
        return found

    def check_first(self, student: Outputs, teacher: Outputs | None, targets: Sequence) -> None:
        """Raise an error for mistakes in the first batch.

        The teacher's outputs are checked in the first batch for which the teacher runs.
        """
        parts = {'labels'} if teacher is None else {'labels', 'outputs'}
        if not parts & self.unchecked:
            return
        self.unchecked -= parts
        self.check(student, teacher, targets).enforce()

    def setup(self, x: tuple) -> None:
        """Pair student and teacher layers, and build projectors.

        Both models run once in evaluation mode. The models and the random state are not changed.
        """
        cuda = sorted({p.device.index for p in self.student.parameters() if p.is_cuda})
        with RandomGuard(cuda):
            self._link_layers(self.student, self.teacher, x)

    def _link_layers(
        self,
        student: nn.Module,
        teacher: Teacher,
        x: tuple,
        layers_of: Callable = attrgetter('layers'),
    ) -> None:
        """Pair the layers of these models, and build projectors.

        Args:
            student: The student.
            teacher: The teacher.
            x: Inputs of a batch.
            layers_of: fn(term) -> layers of a term in the form that `pair` takes.
        """
        tables = {
            t.name: pair(
                student, teacher, x, layers=layers_of(t), match=t.match, projector=t.projector
            )
            for t in self.layered
        }
        pairs = self.pairs = PairTable(p for ps in tables.values() for p in ps)
        with Taps(student, dict.fromkeys(p.student for p in pairs)) as taps:
            dry_run(student, *x)
            s = taps.pop()
        t = teacher.probe(
            *x, layers=list(dict.fromkeys(p.teacher for p in pairs if not is_output(p.teacher)))
        )
        modules = self.teacher.named_modules()
        for term in self.layered:
            links = (link_of(term, p, s, t, modules) for p in tables[term.name])
            self.links[term.name] = nn.ModuleList(links)

    # computing the loss of a batch

    def layers(self, i: int, terms: Iterable | None = None) -> list:
        """Return the layers that the terms compare.

        Args:
            i: 0 for the student's layers, 1 for the teacher's.
            terms: Terms to consider. None for all terms.
        """
        own = self.recipe.terms
        if terms is not None:
            ids = {id(t) for t in terms}
            own = [t for t in own if id(t) in ids]
        links = (k for t in own if t.name in self.links for k in self.links[t.name] if k.layers)
        return list(dict.fromkeys(k.layers[i] for k in links if not is_output(k.layers[i])))

    def student_outputs(self, raw: Any, feats: dict, x: Any) -> Outputs:
        """Return the student's outputs that this head compares. See `Distiller.student_outputs`."""
        if self.output is None:
            warn_of_several(raw, self.student, 'The student', self.found)
        s = Outputs.of(raw, feats, output=self.output)
        logits: Any = s.logits
        return replace(s, mask=both(s.mask, padding_mask(inputs(x), logits.shape, self.task.axis)))

    def compare(
        self,
        student: Outputs,
        teacher: Outputs | None,
        x: Any,
        targets: Sequence,
        progress: float | None,
    ) -> Distilled:
        """Return the loss of a batch, including the task loss of this head."""
        # check this first: an error of the task loss would not say what to do
        self.check_first(student, teacher, targets)
        if targets and isinstance(student.logits, LinearLogits):
            student = replace(student, logits=student.logits.dense())  # the task loss needs them
        task, targets = self.task_and_targets(x, student.logits, targets)
        return self.compute(student, teacher, task, targets, progress=progress)

    def task_and_targets(
        self, x: Any, logits: Any, targets: Sequence
    ) -> tuple[Tensor | None, Sequence]:
        """Return the task loss and the targets. Targets are moved to the positions where the model
        predicts them.
        """
        if not targets:
            return None, targets
        at = self.targets_at(x, logits, targets)
        if self.task_loss is not None:
            return self.task_loss(logits, *targets), at
        return labels_loss(logits, *at, task=self.task), at

    def targets_at(self, x: Any, logits: Any, targets: Sequence) -> Sequence:
        """Move the targets to the positions where the model predicts them.

        Language models predict the next token at each position. Labels that are aligned with the
        input tokens are moved by one position.
        """
        if self.shift_labels is None and targets:
            self.shift_labels = labels_to_shift(
                x, targets[0], logits.shape, self.task, predicts_next(self.student)
            )
            if self.shift_labels and rank() == 0:
                print(
                    'fastdistill: the labels are the inputs themselves, so each is moved to where it is predicted, '
                    'one position earlier. Pass shift_labels=True to confirm this, or shift_labels=False to leave them'
                )
        if not self.shift_labels:
            return targets
        return next_tokens(targets[0], self.task.ignore_index), *targets[1:]


def teacher_of_task(
    teacher: Any, task: Task, output: str | int | Callable | None = None
) -> Teacher:
    """Return a teacher whose outputs are read as those of the student.

    A `Teacher` keeps the options that it was given. If nothing changes, it is returned itself, since
    it may have been started.

    Args:
        teacher: A `Teacher`, or anything that `Teacher` accepts.
        task: The `Task` that describes the student's logits.
        output: Which output to distill. Ignored for a `Teacher`.
    """
    own = dict(kind=task.kind, axis=task.axis)
    if not isinstance(teacher, Teacher):
        return Teacher(teacher, **own, output=output)
    return with_defaults(teacher, **{k: v for k, v in own.items() if getattr(teacher, k) != v})


@dataclass
class HeadOutput:
    """Selects the output of one head from the outputs that the student returned.

    Attributes:
        name: Name of the head.
        at: Position of the head among all heads.
        n: Number of heads.
    """

    name: str
    at: int
    n: int

    def __call__(self, raw: Any) -> Any:
        if isinstance(raw, Mapping) and self.name in raw:
            return raw[self.name]
        if isinstance(raw, (tuple, list)) and len(raw) == self.n:
            return raw[self.at]
        if isinstance(raw, Tensor) and self.n == 1:
            return raw
        return self.otherwise(raw)

    def otherwise(self, raw: Any) -> Any:
        """Raise an error if the student has no output with the name or position of the head."""
        if isinstance(raw, Mapping):
            have = ', '.join(map(str, raw))
        else:
            have = f'{len(raw)} outputs' if isinstance(raw, (tuple, list)) else 'one tensor'
        raise DistillError(
            f'The Distiller has {self.n} heads, including {self.name!r}, but the student returns {have}: name '
            'the outputs of a dict, or give one teacher for each output of a tuple, in their order. '
            'Pass None for a head without a teacher.'
        )


class SharedOutput(HeadOutput):
    """Selects the output of one head of a teacher. A teacher may have a single output for all
    heads.
    """

    def __call__(self, raw: Any) -> Any:
        if isinstance(raw, list) and len(raw) and not isinstance(raw[0], Tensor):
            rows = tensor_of_numbers(raw)
            if rows is not None and rows.dim() < 3:
                return rows  # the list is a batch, not a list of outputs
        return super().__call__(raw)

    def otherwise(self, raw: Any) -> Any:
        if type(raw) is dict and len(raw) == 1:
            return next(iter(raw.values()))  # an ONNX network
        return raw


def options_by_head(o: Any, option: str, heads: Iterable[str], who: str = 'the heads are') -> dict:
    """Convert an option to a dict {head name: value}. A single value is used for all heads."""
    if not isinstance(o, Mapping):
        return dict.fromkeys(heads, o)
    o = {str(k): v for k, v in o.items()}
    if unknown := set(o) - set(heads):
        raise DistillError(f'{option}= has {", ".join(sorted(unknown))}, {who} {", ".join(heads)}.')
    return {k: o.get(k) for k in heads}


def with_full_task(recipe: Any) -> Recipe:
    """Return a copy of the recipe, scaled so that the task loss has weight 1."""
    w = recipe.task_at(0.0)
    if w in (0.0, 1.0):
        return recipe
    return Recipe(*(renamed(t, t.name, weight=t.weight / w) for t in recipe.terms), task=1.0)


def renamed(term: Any, name: str, **changes: Any) -> Any:
    """Return a copy of a term with a different name and changed attributes."""
    term = copy.copy(term)
    vars(term).update(name=name, **changes)
    return term
