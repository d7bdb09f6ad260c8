"A student with several heads, each with its own teacher and recipe."

from dataclasses import dataclass

from torch import Tensor, nn

from ..base.outputs import DistillError
from ..features.calls import arguments
from ..features.layer_pairs import inputs
from ..features.taps import Taps
from ..recipes.recipe_loss import Distilled
from .distiller import Distiller

__all__ = ['Heads', 'HeadsDistilled']


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

    Args:
        weights: Name of a head -> weight of its loss; 1 if not given.
        **heads: Each with the output that it compares, in the order of the labels.
    """

    def __init__(self, weights=None, **heads: Distiller):
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
        self.heads, self.weights = (
            nn.ModuleDict(heads),
            {k: 1.0 for k in heads} | dict(weights or {}),
        )

    def parameters(self, recurse=True):
        """The student's and the projectors', each once."""
        return iter({id(p): p for d in self.heads.values() for p in d.parameters()}.values())

    def forward(self, x, *targets, progress: float | None = None) -> HeadsDistilled:
        """Run the student once, and every teacher, and compare them head by head.

        Args:
            x: The inputs, as `Distiller` takes them.
            *targets: The labels of each head, in their order; None: this head has none.
            progress: Share of the training that is done, for schedules.
        """
        if targets and len(targets) != len(self.heads):
            raise DistillError(
                f'{len(targets)} labels for {len(self.heads)} heads ({", ".join(self.heads)}): give one '
                'for each, or None.'
            )
        x = inputs(x)
        for d in self.heads.values():
            if not d.ready:
                d.setup(*x)
        layers = dict.fromkeys(
            n for d in self.heads.values() for n in d.student_layers(d.active_terms(progress))
        )
        args, kwargs = arguments(self.student, x)
        with Taps(self.student, list(layers)) as taps:
            raw = self.student(*args, **kwargs)
            feats = taps.pop()
        y = targets or (None,) * len(self.heads)
        each = {
            k: d.after_student(raw, feats, x, () if t is None else (t,), progress)
            for (k, d), t in zip(self.heads.items(), y)
        }
        return HeadsDistilled(each, self.weights)
