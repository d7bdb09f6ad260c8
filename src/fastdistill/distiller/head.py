"""A head of a `Distiller`: an output of the student with its labels, its teacher and its recipe."""

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn

from ..base.outputs import Outputs, check_output, warn_of_several
from ..base.random_state import RandomGuard
from ..base.task import Task, task_for
from ..checks.findings import Findings
from ..checks.shared_parameters import shared_parameters
from ..features.layer_hooks import is_output
from ..features.layer_pairs import PairTable, check_names, inputs
from ..features.model_call import predicts_next
from ..recipes.batch_tensors import both
from ..recipes.default import Automatic
from ..recipes.recipe_loss import RecipeLoss
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..recipes.token_labels import padding_mask
from ..teachers.teacher import Teacher, with_defaults
from .layer_links import link_layers
from .task_loss import TaskLoss


class Head(RecipeLoss):
    """An output of the student with its labels, its teacher and its recipe.

    The options that are not listed here are the same as in `Distiller`.

    Args:
        name: Name used in messages. '' if the student has one output.
        labels: fn(labels of the batch) -> tuple of the labels of this head.
        weight: Weight of the loss of this head.
        teacher_output: Which output of the teacher to distill. Ignored if the teacher is a
            `Teacher` object.
    """

    student: Any  # None if only `compute` is used
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
        task = task_for(task_loss, kind, axis, ignore_index)
        super().__init__(Recipe() if recipe is None else recipe, task, weight)
        self.name, self.labels = name, labels
        self.prefix = f'{name}: ' if name else ''  # the beginning of messages about this head
        self.student = student
        self.task_loss = TaskLoss(task, task_loss, shift_labels, predicts_next(student))
        self.automatic = recipe is None  # True if `auto` chooses the recipe
        check_output(output)
        self.output = output
        # `found` is the state of `warn_of_several`. `doubt` is the reason to doubt the teacher.
        self.found: dict = {}
        self.doubt = ''
        self.teacher: Any = (
            None if teacher is None else teacher_of_task(teacher, task, teacher_output)
        )
        self.pairs: PairTable | None = None  # pairs of layers, set by `setup`
        self.unchecked = {'labels', 'outputs'} if check else set()  # for `check_first_batch`
        if student is not None and self.teacher is not None:
            for t in self.layered:
                check_names(student, self.teacher, t.layers)
            if check:
                Findings(shared_parameters(student, self.teacher)).enforce()

    def take(self, recipe: Recipe) -> None:
        """Use this recipe from now on."""
        self.chosen = recipe if isinstance(recipe, Automatic) else None
        super().take(with_full_task(recipe) if self.shares_task and self.chosen else recipe)

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
        return None if self.chosen is None else self.chosen.text

    @property
    def ready(self) -> bool:
        return len(self.links) == len(self.recipe.terms)

    def setup(self, x: tuple) -> None:
        """Pair student and teacher layers, and build projectors.

        Both models run once in evaluation mode. The models and the random state are not changed.
        """
        cuda = sorted({p.device.index for p in self.student.parameters() if p.is_cuda})
        with RandomGuard(cuda):
            self.pairs, links = link_layers(self.student, self.teacher, x, self.layered)
        self.links.update(links)

    # computing the loss of a batch

    def layers(self, i: int, terms: Collection | None = None) -> list:
        """Return the layers that the terms compare.

        Args:
            i: 0 for the student's layers, 1 for the teacher's.
            terms: Terms to consider. None for all terms.
        """
        own = [t for t in self.recipe.terms if terms is None or t in terms]
        links = (k for t in own if t.name in self.links for k in self.links[t.name] if k.layers)
        return list(dict.fromkeys(k.layers[i] for k in links if not is_output(k.layers[i])))

    def student_outputs(self, raw: Any, feats: dict, x: Any) -> Outputs:
        """Return the student's outputs that this head compares. See `Distiller.student_outputs`."""
        if self.output is None:
            warn_of_several(raw, self.student, 'The student', self.found)
        s = Outputs.of(raw, feats, output=self.output)
        logits: Any = s.logits
        return replace(s, mask=both(s.mask, padding_mask(inputs(x), logits.shape, self.task.axis)))


def teacher_of_task(
    teacher: Any, task: Task, output: str | int | Callable | None = None
) -> Teacher:
    """Return a teacher whose outputs are interpreted like those of the student.

    A `Teacher` keeps the options that it was given. If nothing changes, the same object is
    returned, since it may have been started.

    Args:
        teacher: A `Teacher`, or anything that `Teacher` accepts.
        task: The `Task` that describes the student's logits.
        output: Which output to distill. Ignored for a `Teacher`.
    """
    own = dict(kind=task.kind, axis=task.axis)
    if not isinstance(teacher, Teacher):
        return Teacher(teacher, **own, output=output)
    return with_defaults(teacher, **{k: v for k, v in own.items() if getattr(teacher, k) != v})


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
