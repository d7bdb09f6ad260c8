"""Choose the default recipe. The rule is based on measurements on many tasks (benchmarks/quality)."""

from collections.abc import Callable, Sequence
from math import log, sqrt

import torch
from torch import Tensor, special

from ..base.errors import DistillError, check_choice
from ..base.outputs import as_plain
from ..base.task import Task, facts_of_outputs
from ..losses._base import KINDS
from .recipe_text import Reader
from .term import Recipe

CLASSIC = 'kd(T=4, alpha=.9)'
CLASSIC_ALONE = 'soft_labels(T=4)'  # for batches without labels
EVEN = 0.9  # target entropy of the softened teacher, as a fraction of the maximum entropy
COLDEST, HOTTEST = 1.0, 20.0  # range of temperatures that may be chosen
# maximum number of logits, and of rows, for estimating the temperature
ENOUGH_NUMBERS, ENOUGH_ROWS = 2**22, 4096


class Automatic(Recipe):
    """A recipe chosen by `auto`. `text` is the recipe as code, and `why` is the reason for the
    choice.
    """

    def __init__(self, text: str, why: str, kind: str = 'softmax') -> None:
        super().__init__(Reader(text).recipe())
        self.text, self.why, self.kind = text, why, kind

    def how_to_lower(self, name: str) -> str:
        lower = self.text.replace('grad_ratio=3', 'grad_ratio=1')
        return super().how_to_lower(name) + f', as in {lower!r}' * (lower != self.text)

    def __str__(self) -> str:
        if self.kind == 'regression':
            return f'{self.text} ({self.why})'  # regression has no temperature
        classic = CLASSIC if self.task != 0 else CLASSIC_ALONE
        return f'{self.text} ({self.why}; {classic} is the classic)'


def auto(
    kind: str = 'softmax',
    *,
    classes: int | None = None,
    dense: bool = False,
    labels: bool = True,
    teacher: Tensor | None = None,
    doubt: str | None = None,
) -> Automatic:
    """Return the recipe that `KnowledgeDistillation(teacher)` and `Distiller(student, teacher)` use
    by default.

    In most cases the recipe is the task loss plus one term with a gradient ratio of 3. The term's
    gradient norm at the student's logits is then 3 times that of the task loss. The ratio falls with
    the fraction of the student's squared error that the teacher's predictions can remove (see
    `fade` of `Term`). With more than two classes, T is `softening_temperature(teacher)`, so
    that confident and less confident teachers are softened to the same degree. If `teacher` is not
    given, T is 4. The measurements are in benchmarks/quality, including the tasks where the default
    did not help.

    Args:
        kind: What the model predicts: 'softmax' over classes, 'sigmoid' per label, or 'regression'.
        classes: Number of classes of a softmax, or 1 for a single sigmoid label. None if unknown.
        dense: True if each sample has many predictions, such as pixels or tokens.
        labels: True if the batches have labels.
        teacher: The teacher's logits for some training samples, (..., C). None if unknown.
        doubt: Reason not to trust the teacher, as text, or None. If given, `kd` gets a lower
            weight. Terms with a gradient ratio ignore this argument.
    """
    check_choice('kind', kind, KINDS)
    if not isinstance(teacher, Tensor | None):
        raise DistillError(
            f"teacher={type(teacher).__name__}: must be the teacher's logits for some training "
            'samples, a tensor (..., C). KnowledgeDistillation and Distiller run the teacher '
            'themselves.'
        )
    if not labels:
        return Automatic('soft_labels(T=1)', 'the batches have no labels', kind)
    if kind == 'regression':
        text = 'labels + Term(losses.regression, grad_ratio=3, fade=.2)'
        return Automatic(text, 'numbers', kind)
    # a single sigmoid is equivalent to a softmax over two classes
    one = kind == 'sigmoid' and classes == 1
    if kind == 'sigmoid' and not (dense or one):
        text = 'labels + Term(losses.binary_kl, grad_ratio=3, fade=.2, T=1)'
        return Automatic(text, 'several labels', kind)
    unknown = 'labels' if kind == 'sigmoid' else 'an unknown number of classes'
    why = 'one label' if one else unknown if classes is None else f'{classes} classes'
    if dense:
        why += ' for each of many positions'
    if not takes_dist(classes):
        if doubt is not None:
            alpha = '.1' if kind == 'sigmoid' else '.3'
            return Automatic(f'kd(T=1, alpha={alpha})', doubt, kind)
        return Automatic('kd(T=1, alpha=.5)', why)
    if teacher is None:
        T = 4.0
    else:
        T = float(f'{softening_temperature(teacher):.2g}')
        why += f', T={T:g} softens this teacher'
    return Automatic(f'labels + dist(T={T:g}, beta=2, gamma=2, grad_ratio=3, fade=1)', why)


def takes_dist(classes: int | None) -> bool:
    "Return True if there are enough classes for `dist`, which needs at least three."
    return classes is not None and classes > 2


def softening_temperature(logits: Tensor, even: float = EVEN) -> float:
    """Find the temperature, from 1 to 20, at which the entropy of the teacher's probabilities is
    90% of its maximum, averaged over the samples. The softened probabilities do not depend on the
    scale of the logits.

    Args:
        logits: Logits of a teacher, (..., C).
        even: Target entropy, as a fraction of the maximum entropy.
    """
    logits = logits.detach().reshape(-1, logits.shape[-1])
    rows = min(ENOUGH_NUMBERS // logits.shape[-1] + 1, ENOUGH_ROWS)
    if len(logits) > rows:
        # subtle: choose at random, because every nth pixel may be in the same few columns of each
        # image
        kept = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))[:rows]
        logits = logits[kept.to(logits.device)]
    logits = logits.float()
    low, high = COLDEST, HOTTEST
    for _ in range(20):
        T = sqrt(low * high)
        entropy = special.entr((logits / T).softmax(-1)).sum(-1).mean() / log(logits.shape[-1])
        low, high = (T, high) if entropy < even else (low, T)
    return T


def facts_for_auto(
    shape: Sequence[int], task: Task, ask: Callable, labels: Sequence | bool = ()
) -> dict:
    """Build the arguments of `auto`. The teacher is queried only if the choice depends on its
    outputs.

    Args:
        shape: Shape of the student's logits.
        task: The `Task` that describes the logits.
        ask: fn() -> teacher logits for some training samples, with the same axes as the student's.
            None if the logits are not available.
        labels: Labels of the same samples, used to leave out ignored positions. Labels of a
            different form have no effect.
    """
    facts = facts_of_outputs(shape, task)
    if not takes_dist(facts['classes']) or (t := ask()) is None or t.dim() != len(shape):
        return facts
    t = t.movedim(task.axis, -1)
    # with `classes=`, fewer classes may be compared than the student has
    facts['classes'] = t.shape[-1]
    if not takes_dist(facts['classes']):
        return facts
    y = as_plain(labels[0])[: len(t)] if isinstance(labels, Sequence) and len(labels) == 1 else None
    if task.kind == 'softmax' and isinstance(y, Tensor) and y.shape == t.shape[:-1]:
        counts = (y != task.ignore_index).to(t.device)
        t = t[counts] if counts.any() else t
    return facts | dict(teacher=t)


def for_draws(T: float, labels: bool = True) -> Automatic:
    """Choose a recipe for teacher outputs stored as draws (sampled classes). Draws give unbiased
    gradients only for `kl` at the temperature at which they were sampled.
    """
    why = f'the stored draws are unbiased for kl at T={T:g}'
    exact = f'{T:g}' if float(f'{T:g}') == T else repr(T)
    return Automatic(f'kd(T={exact}, alpha=.5)' if labels else f'soft_labels(T={exact})', why)
