"""Check how confident a teacher is: nearly one-hot soft labels, and a teacher that hardly decides."""

from collections.abc import Iterator

from ..base.task import Task
from .batch_scores import Tally
from .findings import Finding

CERTAIN = 0.99  # minimum mean top probability of nearly one-hot soft labels
HESITANT = 0.2  # maximum difference between the accuracy and the mean top probability
NOT_APART = 0.25  # minimum difference between the mean probabilities of present and absent labels
FEWEST = 64  # minimum number of items for these checks


def saturated(train: float | None, valid: float | None, task: Task) -> Iterator[Finding]:
    """Yield a finding if the teacher's soft labels are nearly one-hot.

    Args:
        train, valid: Mean top probability of the teacher on training and validation items. None if
            unknown.
        task: What the student predicts.
    """
    if train is None or train <= CERTAIN or task.kind != 'softmax':
        return
    beside = '' if valid is None else f' (validation: {valid:.3f})'
    yield Finding(
        'note',
        'The teacher is nearly certain on the training items: its mean top probability is '
        f'{train:.3f}{beside}, so its soft labels are nearly one-hot',
        'Use a higher T, stronger augmentation, or items that it was not trained on',
    )


def hesitant(tally: Tally) -> Iterator[Finding]:
    """Yield a finding if the teacher is too uncertain, e.g. because its training was stopped early.

    The soft labels of such a teacher may mislead the student.
    """
    kind, f = tally.task.kind, tally.facts()
    if f.teacher_score is None or f.top_prob_valid is None or f.n < FEWEST:
        return
    if kind == 'softmax' and f.teacher_score - f.top_prob_valid > HESITANT:
        why = (
            f'is right for {f.teacher_score:.1%} of {f.items}, but its mean top '
            f'probability is {f.top_prob_valid:.3f}. It seems to be undertrained'
        )
        do = 'Train it longer, or without label smoothing'
    elif kind == 'sigmoid' and (p := label_probs(tally))[0] - p[1] < NOT_APART:
        why = (
            f'barely separates the labels: on {f.items} its mean probability is '
            f'{p[0]:.3f} for labels that an item has, and {p[1]:.3f} for the others. It is '
            'undertrained, or these labels are hard to predict'
        )
        do = 'Train it longer. If it is already as good as possible for these labels, pass a recipe'
    else:
        return
    yield Finding(
        'note', f'The teacher {why}. Its soft labels may mislead the student', do, doubt=True
    )


def label_probs(tally: Tally) -> tuple[float, float]:
    """Return (mean probability of present labels, mean probability of absent labels)."""
    n_with, n_without, p_with, p_without = tally.sums[:4].sum(1).tolist()
    return p_with / max(n_with, 1), p_without / max(n_without, 1)
