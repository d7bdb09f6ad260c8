"""Check a teacher's outputs on a few batches: their shapes, and whether they predict the labels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.class_mapping import taught_part, taught_task
from ..base.outputs import DistillError, map_tensors, tensors_in
from ..base.random_state import guarded_random_state
from ..base.task import Task, fit_labels
from ..teachers.members import known_classes, modules_of, single_teachers
from ..teachers.teacher import Teacher
from .batch_scores import Tally
from .class_order import order_in_words
from .findings import Finding, Findings
from .forward import student_logits, teacher_logits
from .normalization import images_in, normalization_result
from .recipe import check_recipe, recipe_in_words
from .shapes import (
    UnknownId,
    broadcasts,
    checked_ids,
    mismatches,
    shapes_in_words,
    unknown_id,
    unscored,
)
from .teacher_confidence import hesitant, saturated
from .teacher_scores import low_score

BATCHES = 8  # number of validation batches on which the teacher is scored
KEPT = 4  # number of batches kept for running the teacher again


def check_outputs(
    teacher: Teacher,
    task: Task,
    batches: Iterable,
    student: Module | None = None,
    *,
    train: Iterable = (),
    recipe: Any = None,
    names: Sequence | None = None,
    output: Any = None,
    place: Callable | None = None,
    part: str = 'validation',
) -> Findings:
    """Check the teacher's outputs on a few batches.

    The attribute `facts` of the result has the scores of both models and of a constant prediction.

    Args:
        teacher: A `Teacher`.
        task: What the student predicts.
        batches: Batches to score, usually from the validation set. A batch is (inputs, targets),
            where both are tuples.
        student: The student's module. None if unknown.
        train: Augmented training batches, from which only the teacher's probabilities are measured.
        recipe: Recipe or term used for training. None if unknown.
        names: Names of the student's classes. None if unknown.
        output: Which output of the student is distilled, as in `Outputs.of`.
        place: fn(inputs, logits, targets) -> targets aligned with the positions of their
            predictions. None if the targets are already aligned.
        part: Dataset of `batches`, as in `Facts`.
    """
    groups = known_classes(teacher)
    own, task = task, taught_task(task, groups)
    found, tally, t = Findings(), Tally(task, part), None
    kept: list[tuple] = []
    normalization = ''
    with guarded_random_state(), teacher:
        for training, xb, yb in chain(((False, *b) for b in batches), ((True, *b) for b in train)):
            if is_empty(xb):
                continue  # a loader may end with a batch without samples
            first = t is None
            try:
                with checked_ids(teacher):
                    t = teacher_logits(teacher, xb)
            except UnknownId as e:
                return refused('inputs', [unknown_id(e)])
            except TypeError as e:
                have = ', '.join(str(tuple(o.shape)) for o in tensors_in(xb))
                raise DistillError(
                    f'The teacher {teacher.name} cannot be called with the inputs of a batch ({have}): '
                    f'{e}. Pass several inputs as a tuple: ((a, b), labels), or n_inp=2 in fastai. The items '
                    'of a dict are passed by name if the model has arguments with all these names.'
                ) from e
            s = (
                student_logits(student, xb, output)
                if student is not None and (first or not training)
                else None
            )
            if place is not None and not training:
                yb = place(xb, t if s is None else s, yb)
            y = yb[0] if len(yb) and isinstance(yb[0], Tensor) else None
            # the teacher has no classification head, or has different classes
            if first and any_outputs(recipe) and s is not None and s.shape != t.shape:
                return Findings(
                    [*unsteady(teacher, xb, t), *check_recipe(recipe, student, teacher, xb, None)]
                )
            s, y = taught_part(s, y, groups, own)
            if mistakes := refused(
                'shapes', mismatches(None if s is None else s.shape, t.shape, y, task)
            ):
                return mistakes
            if first:
                shapes = shapes_in_words(None if s is None else s.shape, t.shape, y)
                found.add('shapes', unscored(t.shape, y, task), shapes)
                fine = (
                    '' if is_random(teacher) else 'the same in repeated calls with the same batch'
                )
                found.add('steadiness', unsteady(teacher, xb, t), fine)
            if training:
                tally.add_probabilities(t.float(), 'train')
            else:
                tally.add(t, None if y is None else fit_labels(y, t.shape, task), s)
            if not training and len(kept) < KEPT:
                kept.append((xb, yb if y is None else (y, *yb[1:])))
        if t is None:
            nothing = Finding(
                'note',
                'No samples were read, so the teacher was not checked',
                'The dataset is empty, or it is an iterable dataset, which is not read before '
                'training. To check the teacher, call Distiller(student, teacher).check(batches)',
            )
            found.add('score', [nothing])
            return found
        n_classes = t.shape[task.axis] if task.kind == 'softmax' else None
        found.add(
            'recipe', check_recipe(recipe, student, teacher, xb, n_classes), recipe_in_words(recipe)
        )
        norms = len(norms_of(teacher))
        fine = f'{norms} batch norm layer(s), not at their initial values' if norms else ''
        new = found.add('statistics', untrained(teacher), fine)
        kind = 'numbers' if task.kind == 'regression' else 'logits, not probabilities'
        found.add('outputs', probabilities(tally, task), f'finite {kind}')
        if not found.errors:
            why = low_score(tally, teacher, task, student, kept, names, trained=not new)
            low = found.add('score', [replace(f, doubt=True) for f in why])
            if not low and not new:
                found.add('order of classes', (), order_in_words(tally))
                normalization = normalization_result(tally, teacher, kept)
                found.add('normalization', (), normalization)
    found.facts = facts = tally.facts()
    if facts.teacher_score is not None:
        found.none += ' Is this the score that you expect from the teacher?'
    if teacher.input_stats is None and any(images_in(xb) for xb, _ in kept):
        found.none += (
            ' The normalization of the images was not checked. To check it, pass '
            'Teacher(model, images=dict(input_stats=(mean, std))).'
        )
    elif normalization and teacher.stats is None:
        found.none += f' Normalization of the images: {normalization}.'
    if not any(f.doubt for f in found):
        found.add('score', (), facts.scores)
    notes_only = all(f.level == 'note' for f in found)
    sure = saturated(facts.top_prob_train, facts.top_prob_valid, task)
    certain = [*sure, *hesitant(tally)] if notes_only else ()
    found.add('certainty', certain, facts.probabilities)
    return found


def is_empty(xb: Sequence) -> bool:
    """Return True if the inputs of a batch have no samples."""
    sizes = [len(o) for o in tensors_in(xb) if o.dim()]
    return bool(sizes) and not any(sizes)


def refused(about: str, found: Iterable[Finding]) -> Findings:
    """Return findings that end the check early."""
    out = Findings()
    out.add(about, found)
    return out


def any_outputs(recipe: Any) -> bool:
    """Return True if the teacher's outputs need not have the same shape as the student's.

    Recipes that compare only layers, or outputs with different classes, allow this.
    """
    terms = getattr(recipe, 'terms', [recipe])
    return recipe is not None and all(t.layers is not None or t.match != 'shape' for t in terms)


def check_batch(s: Tensor | None, t: Tensor | None, y: Tensor | None, task: Task) -> Findings:
    """Find outputs and labels of a batch that do not fit together, and probabilities instead of
    logits.

    Args:
        s: Outputs of the student. None if unknown.
        t: Outputs of the teacher for all classes. None if unknown.
        y: Labels. None if unknown.
        task: What the student predicts.
    """
    if s is None:
        return Findings()
    # subtle: report only shapes that would broadcast silently. All other shapes are left to the
    # loss, which may compare only some of the classes
    if t is not None and broadcasts(s.shape, t.shape):
        mistakes = Findings(mismatches(s.shape, t.shape, y, task))
    else:
        mistakes = Findings(mismatches(None, s.shape, y, task))
    if mistakes or t is None or not len(t):
        return mistakes
    tally = Tally(task)
    tally.add_probabilities(t.float(), 'train')
    return Findings(probabilities(tally, task))


def unsteady(teacher: Teacher, xb: Sequence, t: Tensor) -> Iterator[Finding]:
    """Yield a finding if outputs change between calls, or depend on other samples in the batch."""
    if is_random(teacher):
        return

    def near(a: Tensor, b: Tensor) -> bool:
        largest = b.nan_to_num(0, 0, 0).abs().max().item()  # logits of masked classes may be -inf
        return a.shape == b.shape and torch.allclose(
            a, b, rtol=0, atol=0.05 * largest, equal_nan=True
        )

    # modules inside a function are not known, so they can't be set to evaluation mode
    function = any(o.module is None and o.path is None for o in single_teachers(teacher))
    parts = list(tensors_in(xb))
    can_cut = (
        function
        and not teacher.needs
        and len(t) > 1
        and parts
        and all(o.dim() and len(o) == len(t) for o in parts)
    )
    if not near(teacher_logits(teacher, xb), t):
        why = 'differ from call to call for the same batch (is dropout on?)'
    elif can_cut and not near(teacher_logits(teacher, map_tensors(xb, lambda o: o[:-1])), t[:-1]):
        why = (
            'for a sample depend on the other samples in its batch (is batch norm in training '
            'mode?)'
        )
    else:
        return
    yield Finding(
        'warning',
        f"The teacher's outputs {why}",
        'Modules are set to evaluation mode automatically. If your teacher is a function, call '
        'eval() on the modules inside it',
    )


def is_random(teacher: Teacher) -> bool:
    """Return True if random outputs are expected."""
    return teacher.mode == 'train' or teacher.combine == 'sample'


def norms_of(teacher: Teacher) -> list[Any]:
    """Return the batch norm layers of a teacher that track running statistics."""
    return [
        m
        for mod in modules_of(teacher)
        for m in mod.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    ]


def untrained(teacher: Teacher) -> Iterator[Finding]:
    norms = norms_of(teacher)
    if norms and all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in norms):
        yield Finding(
            'warning',
            "The teacher's batch norm statistics have their initial values: it seems to be untrained",
            'Load its weights before distilling',
        )


def probabilities(tally: Tally, task: Task) -> Iterator[Finding]:
    """Yield findings for nan or infinite outputs, and for probabilities instead of logits."""
    if not tally.finite:
        yield Finding(
            'error',
            "The teacher's outputs are nan or infinite, and the student's weights would become nan",
            'Are its inputs finite? Does it overflow in half precision?',
        )
    if not tally.between:
        return
    if task.kind == 'softmax' and tally.normed:
        yield Finding(
            'error',
            "The teacher's outputs are probabilities (each row sums to 1). A softmax over them "
            'would be nearly flat',
            "Declare it with Teacher(model, outputs='probs') or TeacherBlock(given='probabilities'), "
            'or return the outputs before the softmax',
        )
    if task.kind == 'sigmoid':
        yield Finding(
            'warning',
            "All of the teacher's outputs are between 0 and 1: they seem to be probabilities",
            "Declare it with Teacher(model, outputs='probs', kind='sigmoid') or "
            "TeacherBlock(given='label_probabilities'), or return the outputs before the sigmoid",
        )
