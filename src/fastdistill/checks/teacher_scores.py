"""Find out why a teacher's score is low."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn import Module

from ..base.outputs import tensors_in
from ..base.task import Task
from ..teachers.members import modules_of
from ..teachers.teacher import Teacher
from .batch_scores import FEW, LEADS, SLIGHT, Tally, p_above
from .class_order import reordered
from .findings import Finding, count_in_words
from .normalization import renormalized_images, resized_images

KNOWS = 0.005  # maximum p-value for a teacher to count as better than chance
LUCK = 2.576  # minimum number of standard deviations by which its score must exceed chance


def low_score(
    tally: Tally,
    teacher: Teacher,
    task: Task,
    student: Module | None,
    batches: Sequence,
    names: Sequence | None,
    trained: bool,
) -> Iterator[Finding]:
    """Yield the most specific reason for a low score of the teacher, if there is one.

    Args:
        tally: `Tally` of a few validation batches.
        teacher: The teacher.
        task: What the student predicts.
        student: A module. None if unknown.
        batches: (inputs, labels) of some of these batches.
        names: Names of the student's classes. None if unknown.
        trained: False if the teacher seems to be untrained.
    """
    if not tally.n_labels:
        return
    cures: list[tuple[float, Finding]] = []
    # skip untrained teachers, for which an order of classes may fit by chance
    if trained:
        cures += reordered(tally, teacher, names)
        # probabilities of labels are all above 0, so their score says nothing about the images
        if not (tally.between and task.kind == 'sigmoid'):
            cures += renormalized_images(tally, teacher, task, batches)
            cures += resized_images(tally, teacher, task, batches)
    # report only the better fix, since a wrong normalization can look like a wrong class order
    if cures:
        yield max(cures, key=lambda o: o[0])[1]
    else:
        why = [
            *other_tokens(tally, teacher, student, batches),
            *chance(tally),
            *no_better_than_student(tally),
        ]
        yield from why[:1]


def embedding_rows(modules: Iterable[Module]) -> int | None:
    """Return the number of rows of the largest embedding, or None if there are no embeddings."""
    sizes = [
        m.num_embeddings
        for o in modules
        for m in o.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    ]
    return max(sizes, default=None)


def other_tokens(
    tally: Tally, teacher: Teacher, student: Module | None, batches: Sequence
) -> Iterator[Finding]:
    """Yield a finding if the inputs may be token ids of a different tokenizer.

    The ids of a different tokenizer can be valid, but they have a different meaning.
    """
    t = embedding_rows(modules_of(teacher))
    s = None if student is None else embedding_rows([student])
    ids = [o for o in tensors_in(batches[0][0]) if not o.is_floating_point()]
    if None in (t, s) or t == s or not ids or tally.above_constant(least=0.0):
        return
    f = tally.facts()
    yield Finding(
        'warning',
        f"The teacher's embedding has {t} rows, the student's {s}. The teacher's predictions are "
        f'not better than a constant ({f.metric} {f.teacher_score:.3f} and '
        f'{f.constant_score:.3f}, {f.n} items)',
        "Are the inputs token ids of a different tokenizer? Prepare the student's data with the "
        "teacher's tokenizer",
    )


IF_SWAPPED = (
    'Are student and teacher swapped? student.distill(teacher) trains the student. If not: '
)


IF_WEAK = (
    'train the teacher longer or use a larger one, let its influence fade out (grad_ratio with '
    "fade=1; for classes, 'labels + Term(losses.kl, grad_ratio=1, fade=1)')"
    ', or train the student on the labels only'
)


def student_is_better(tally: Tally, **margin: float) -> bool:
    """Return True if the student is already significantly better than the teacher.

    Args:
        tally: Scores of both models.
        **margin: Arguments `least` and `sure` of `Tally.above`.
    """
    student = tally.items('student')
    return len(student) >= FEW and tally.above(student, tally.items('teacher'), **margin)


def no_better_than_student(tally: Tally) -> Iterator[Finding]:
    teacher, student, f = tally.items('teacher'), tally.items('student'), tally.facts()
    if not len(student) or f.n < FEW:
        return
    scores = f'{f.metric} {f.teacher_score:.3f} and {f.student_score:.3f} on {f.items}'
    if student_is_better(tally):
        yield Finding(
            'warning',
            f'The teacher is worse than the student is now: {scores}',
            f'{IF_SWAPPED}is it the right teacher, with all its weights, and does it get its own '
            f'preprocessing? If so: {IF_WEAK}',
        )
    elif not tally.above(teacher, student, least=0.0, sure=LEADS):
        yield Finding(
            'note',
            f'The teacher is not significantly better than the student is now: {scores}',
            f'On more items, it may turn out better. Otherwise, {IF_WEAK}',
        )


def chance(tally: Tally) -> Iterator[Finding]:
    """Yield a finding if the teacher is not better than a constant prediction."""
    # subtle: these tests also work for badly calibrated teachers and rare classes
    if why := dict(softmax=classes_known, sigmoid=labels_known, regression=numbers_known)[
        tally.task.kind
    ](tally):
        way, text = why
        f = tally.facts()
        do = (
            'was it trained for these labels, in this order, and does it get its own preprocessing?'
        )
        if student_is_better(tally, least=0.0, sure=LEADS):
            text = f'{text}. The student has {f.metric} {f.student_score:.3f} before training'
            do = IF_SWAPPED + do
        # subtle: a tiny lead over chance gets a warning. A larger lead that is not significant gets
        # a note
        yield Finding(
            'warning' if way <= SLIGHT else 'note',
            f'The teacher is {"no" if way <= 1e-9 else "hardly"} better than chance: {text}',
            f'{do[0].upper()}{do[1:]} Check with teacher.validate()',
        )


def classes_known(tally: Tally) -> tuple[float, str] | None:
    """Return (lead over chance, text), or None if the teacher's predictions are significantly better
    than chance.

    One test uses the mean recall over classes, which works better for rare classes. The second test
    uses the mean over items, which works better for many classes with few items each. A teacher
    needs to pass only one of the tests.
    """
    there, _, predicted = tally.sums
    have, hit, said = tally.sums[:, there > 0]
    k, n = len(have), there.sum().item()
    if k < 2:
        return None
    recall = (hit / have).mean().item()
    if (lead := recall - 1 / k) > 0:
        items, p = tally.items('teacher'), said / n
        # standard deviation of the mean recall of random predictions. Subtle: an item with many
        # positions has a weight of 1, since its positions are correlated
        sd = (p * (1 - p) / have).sum().sqrt().item() / k
        # expected accuracy of predictions that are unrelated to the labels
        luck = (there * predicted).sum().item() / n**2
        if len(items) < FEW or lead > max(SLIGHT * (1 - 1 / k), LUCK * sd):
            return None
        if items.mean().item() - luck > SLIGHT * (1 - luck) and p_above(items, luck) < KNOWS:
            return None
    return lead / (1 - 1 / k), (
        f'on average it recognizes {recall:.1%} of the samples of a class '
        f'({count_in_words(tally.n_labels, tally.part, "labels")}, {k} classes), and a constant prediction {1 / k:.1%}'
    )


def labels_known(tally: Tally) -> tuple[float, str] | None:
    """Return (difference between the mean probabilities of present and of absent labels, text), or
    None if the first is significantly higher, or if each label is present in all items or in none.
    """
    have = tally.sums[:, (tally.sums[:2] > 0).all(0)]
    if not have.shape[1]:
        return None
    n1, n0, p1, p0, squares = have
    variance = (squares / (n1 + n0) - ((p1 + p0) / (n1 + n0)) ** 2).clamp_min(0)
    lead = (p1 / n1 - p0 / n0).mean().item()
    sd = (variance * (1 / n1 + 1 / n0)).sqrt().mean().item()
    if lead > 0 and (len(tally.items('teacher')) < FEW or lead > LUCK * sd):
        return None
    with_it, without = (p1 / n1).mean().item(), (p0 / n0).mean().item()
    return with_it - without, (
        f'on {count_in_words(tally.n_labels, tally.part)}, the mean probability that it predicts is '
        f'{with_it:.3f} for labels that an item has, and {without:.3f} for labels that it does not have'
    )


def numbers_known(tally: Tally) -> tuple[float, str] | None:
    error, var = tally.sums[0].mean().item() / tally.n_labels, tally.variance()
    few = len(tally.items('teacher')) < FEW and error < var
    if not var or few or tally.above_constant(SLIGHT, KNOWS):
        return None
    return 1 - error / var, (
        f'its squared error on {count_in_words(tally.n_labels, tally.part)} is {error:.4g}, '
        f'and the best constant prediction has an error of {var:.4g}'
    )
