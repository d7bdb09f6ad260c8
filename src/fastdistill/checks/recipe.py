"""Check whether the terms of a recipe make sense for two given models.

Some losses need more than two classes, and some layers may be frozen.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from ..base.errors import few_names
from ..features.layer_hooks import Taps
from ..features.layer_pairs import pair
from ..features.probe import untouched
from ..losses import response
from ..teachers.teacher import Teacher
from .findings import Finding
from .forward import run_student


def check_recipe(
    recipe: Any, student: Module | None, teacher: Teacher, x: Sequence, n_classes: int | None
) -> Iterator[Finding]:
    """Find terms that train no parameters, or that are meaningless for these outputs.

    Args:
        recipe: A recipe or a term, or None.
        student: A module. None to skip the checks of layers.
        teacher: The teacher.
        x: Inputs of a batch.
        n_classes: Number of classes of a softmax. None if the outputs are not a softmax.
    """
    for term in terms_of(recipe):
        if term.layers is None and n_classes == 2:
            yield from two_classes(term)
        if term.layers is not None and student is not None:
            yield from frozen_layers(term, student, teacher, x)


def recipe_in_words(recipe: Any) -> str:
    names = ', '.join(t.name for t in terms_of(recipe))
    return f'{names}: meaningful for these outputs, with trainable parameters' if names else ''


def terms_of(recipe: Any) -> list:
    return getattr(recipe, 'terms', [] if recipe is None else [recipe])


def two_classes(term: Any) -> Iterator[Finding]:
    fn = term.loss
    while isinstance(fn, partial):
        fn = fn.func
    fn = getattr(fn, 'fn', fn)  # for a loss class, use its function
    if fn is response.dist and term.options.get('beta', 1.0):
        why = 'the correlation of two probabilities is always 1 or -1, so only their order is compared'
    elif isinstance(fn, response.Standardized):
        why = 'two standardized logits are always the same two numbers, so only their order is compared'
    else:
        return
    yield Finding('error', f'{term.name} is meaningless for 2 classes: {why}', 'Use kd(), or dkd()')


def frozen_layers(term: Any, student: Module, teacher: Teacher, x: Sequence) -> Iterator[Finding]:
    """Yield a finding if a term compares layers that do not depend on trainable parameters."""
    if all(p.requires_grad for p in student.parameters()):
        return
    pairs = pair(
        student, teacher, x, layers=term.layers, match=term.match, projector=term.projector
    )
    with (
        untouched(student),
        torch.enable_grad(),
        Taps(student, dict.fromkeys(p.student for p in pairs)) as taps,
    ):
        run_student(student, x)
        frozen = [n for n, o in taps.pop().items() if not o.requires_grad]
    if frozen:
        yield Finding(
            'note',
            f'{term.name} compares frozen layers of the student ({few_names(frozen, 4)}): no '
            'parameter in or before them is trained, so the term trains at most its projector',
            'unfreeze() the student, or use later layers for the term',
        )
