"A student with several heads, each with its own teacher and recipe."

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..base.outputs import DistillError
from ..features.calls import arguments
from ..features.layer_pairs import PairTable, inputs
from ..features.taps import Taps
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe
from .distiller import Distiller

__all__ = ['Heads', 'HeadsDistilled', 'renamed']


@dataclass
class HeadsDistilled:
    """One batch's loss of several heads.

    Attributes:
        heads: Of each head, by name.
        weights: Of each head.
    """

    heads: dict[str, Distilled]
    weights: dict[str, float]

    @property
    def total(self) -> Tensor:
        """What to call `backward` on: the weighted sum of the heads' losses."""
        return sum(self.weights[k] * v.total for k, v in self.heads.items())

    @property
    def parts(self) -> dict:
        """The task loss and each term of each head, detached."""
        task = lambda v: {} if v.task is None else {'task': v.task.detach()}
        return {
            f'{k}.{n}': o for k, v in self.heads.items() for n, o in {**task(v), **v.parts}.items()
        }


class Heads(nn.Module):
    """Several `Distiller`s of one student, which runs once a batch: `Heads(color=Distiller(student,
    teacher, kd(), output='color'), shape=...)`. `heads(x, y_color, y_shape)` is one batch.

    A trainer that computes one task loss of all heads calls `share_task_loss` and then `compute`,
    as it would that of a `Distiller`: outputs of student and teacher are dicts by head.

    Args:
        weights: Name of a head -> weight of its loss; 1 if not given.
        labels: Name of a head -> fn(labels of the batch) -> those of the head, as a tuple; None:
            each head has one, in their order.
        **heads: Each with the output that it compares, in the order of the labels.
    """

    chosen = None  # each head keeps its own

    def __init__(self, weights=None, labels: dict[str, Callable] | None = None, **heads: Distiller):
        super().__init__()
        if len({id(d.student) for d in heads.values()}) != 1:
            raise DistillError(
                'Heads(...) takes Distillers of one student: Heads(color=Distiller(student, teacher1, '
                "output='color'), shape=Distiller(student, teacher2, output='shape'))."
            )
        if unknown := set(weights or {}) - set(heads):
            raise DistillError(
                f'weights= has {", ".join(sorted(unknown))}, the heads are {", ".join(heads)}.'
            )
        self.student = next(iter(heads.values())).student
        self.heads = nn.ModuleDict(heads)
        self.weights = {k: 1.0 for k in heads} | dict(weights or {})
        self.labels = labels or {k: partial(self._labels_in_order, i) for i, k in enumerate(heads)}
        self.recipe = None  # of all heads, if they share one task loss
        self.gradient_shares, self._known_shares = None, []

    def parameters(self, recurse=True):
        """The student's and the projectors', each once."""
        return iter({id(p): p for d in self.heads.values() for p in d.parameters()}.values())

    def _labels_in_order(self, i, targets):
        if targets and len(targets) != len(self.heads):
            raise DistillError(
                f'{len(targets)} labels for {len(self.heads)} heads ({", ".join(self.heads)}): give one '
                'for each, or None.'
            )
        return tuple(y for y in targets[i : i + 1] if y is not None)

    def forward(self, x, *targets, progress: float | None = None) -> HeadsDistilled:
        """Run the student once, and every teacher, and compare them head by head.

        Args:
            x: The inputs, as `Distiller` takes them.
            *targets: The labels of each head, in their order; None: this head has none.
            progress: Share of the training that is done, for schedules.
        """
        own = {k: self.labels[k](targets) for k in self.heads}
        x = inputs(x)
        self.setup(*x)
        args, kwargs = arguments(self.student, x)
        with Taps(self.student, self.student_layers(self.active_terms(progress))) as taps:
            raw = self.student(*args, **kwargs)
            feats = taps.pop()
        each = {k: d.after_student(raw, feats, x, own[k], progress) for k, d in self.heads.items()}
        return HeadsDistilled(each, self.weights)

    # what trainers use of a Distiller

    def share_task_loss(self):
        """Make one recipe of those of all heads. How much the labels count must be the same in all
        of them.
        """
        self.recipe = Recipe(
            *(
                Recipe(*(renamed(t, f'{k}_{t.name}') for t in d.recipe.terms), task=d.recipe.task)
                for k, d in self.heads.items()
            )
        )
        for d in self.heads.values():
            d.take(Recipe(*d.recipe.terms, task=self.recipe.task))

    @property
    def ready(self):
        return all(d.ready for d in self.heads.values())

    def setup(self, *x):
        for d in self.heads.values():
            if not d.ready:
                d.setup(*x)
        return self

    @property
    def pairs(self):
        return PairTable([p for d in self.heads.values() for p in d.pairs or []])

    @property
    def layered(self):
        return [t for t in self.recipe.terms if t.layers is not None]

    @property
    def links(self):
        return nn.ModuleDict({k: d.links for k, d in self.heads.items()})

    @property
    def ratios(self):
        return {k: d.ratios for k, d in self.heads.items() if d.ratios}

    def get_extra_state(self):
        return {k: d.get_extra_state() for k, d in self.heads.items()}

    def set_extra_state(self, state):
        for k, d in self.heads.items():
            d.set_extra_state(state[k])

    def own_parameters(self):
        return [p for d in self.heads.values() for p in d.own_parameters()]

    def active_terms(self, progress: float | None = None) -> dict:
        return {k: d.active_terms(progress) for k, d in self.heads.items()}

    def student_layers(self, terms: dict) -> list:
        return list(
            dict.fromkeys(n for k, d in self.heads.items() for n in d.student_layers(terms[k]))
        )

    def student_outputs(self, raw, feats, x) -> dict:
        return {k: d.student_outputs(raw, feats, x) for k, d in self.heads.items()}

    def teacher_outputs(self, x, progress: float | None = None, samples=None) -> dict | None:
        """Of each head whose teacher has outputs for this batch; None where no term needs any."""
        out = {
            k: d.teacher_outputs(x, progress, samples)
            for k, d in self.heads.items()
            if torch.is_grad_enabled() or d.teacher.has_outputs(samples)
        }
        return out if any(o is not None for o in out.values()) else None

    def compute(
        self, student, teacher, task, targets, *, progress: float | None = None, mixed=None
    ) -> Distilled:
        """The loss of a batch, with the task loss of all heads as `task`."""
        each = {}
        for k, d in self.heads.items():
            if teacher is not None and k not in teacher:
                continue
            labels = self.labels[k]
            each[k] = d.compute(
                student[k],
                teacher and teacher[k],
                task,
                labels(targets),
                progress=progress,
                mixed=None if mixed is None else (labels(mixed[0]), mixed[1]),
            )
        self._take_shares()
        named = lambda o: {
            f'{k}_{n}': v for k, e in each.items() for n, v in getattr(e, o).items() if n != 'task'
        }
        taught = [e.taught for e in each.values() if e.taught is not None]
        weights = next(iter(each.values())).weights
        return Distilled(
            task,
            sum(taught[1:], taught[0]) if taught else None,
            named('parts'),
            {'task': weights['task'], **named('weights')},
        )

    def without_labels(self, student, teacher, *, progress: float | None = None) -> Tensor:
        """The sum of the terms of all heads that read no labels."""
        return sum(
            d.without_labels(student[k], teacher and teacher[k], progress=progress)
            for k, d in self.heads.items()
        )

    def _take_shares(self):
        """Of the gradient at each head, as soon as they are measured."""
        new = [d.gradient_shares for d in self.heads.values()]
        if all(a is b for a, b in zip(new, self._known_shares)) and self._known_shares:
            return
        self._known_shares = new
        name = lambda k, n: f'{k} labels' if n == 'task' else f'{k}_{n}'
        found = {name(k, n): v for k, s in zip(self.heads, new) for n, v in (s or {}).items()}
        if found:
            self.gradient_shares = found


def renamed(term, name, **changes):
    """A copy of a term with another name, and with these attributes."""
    term = copy.copy(term)
    vars(term).update(name=name, **changes)
    return term
