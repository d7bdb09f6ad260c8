"What models of transformers take and predict, and the order of their classes."

import inspect
import re

import torch
from torch import Tensor

from ..base.outputs import DistillError
from ..checks.class_order import map_classes
from ..features.layer_names import unwrap
from ..teachers.teacher import Teacher

__all__ = ['names_taken', 'predicts', 'question_logits', 'teacher_for', 'without_loss']

PROBLEMS = dict(
    regression='regression',
    single_label_classification='softmax',
    multi_label_classification='sigmoid',
)


def names_taken(model) -> set:
    """Names of the arguments of its forward, or of all members of an ensemble.

    Args:
        model: A module, or a `Teacher`
    """
    modules = model.modules if isinstance(model, Teacher) else [model]
    return {n for m in modules for n in inspect.signature(unwrap(m).forward).parameters}


def without_loss(raw):
    """What the student returned, without the loss that stands first in a tuple."""
    return (
        raw[1:]
        if isinstance(raw, tuple) and isinstance(raw[0], Tensor) and not raw[0].dim()
        else raw
    )


def question_logits(out):
    """The logits of where an answer begins and ends: (B, L, 2), classes along axis 1."""
    return torch.stack([out.start_logits, out.end_logits], -1)


def names_by_id(model):
    """Names of the classes by the model's `id2label`; None if they are only numbered."""
    id2label = getattr(getattr(model, 'config', None), 'id2label', None)
    if not id2label or all(re.fullmatch(r'LABEL_\d+', str(v)) for v in id2label.values()):
        return None
    return [str(id2label[k]) for k in sorted(id2label, key=int)]


def predicts(model, labels=None) -> str | None:
    """'softmax', 'sigmoid' or 'regression', by the model's config; None if only labels show it.

    Args:
        labels: Of a batch; None: not known.
    """
    config, name = getattr(model, 'config', None), type(model).__name__
    if (problem := getattr(config, 'problem_type', None)) in PROBLEMS:
        return PROBLEMS[problem]
    if not name.endswith(('SequenceClassification', 'ImageClassification')):
        return 'softmax'
    if config.num_labels == 1:
        return 'regression'
    return None if labels is None else 'sigmoid' if labels.is_floating_point() else 'softmax'


def teacher_for(teacher: Teacher, student, kind: str, axis: int, output) -> Teacher:
    """The teacher with the student's kind of outputs, and its classes in the student's order.

    Args:
        kind: Of the student's outputs.
        output: Which output is distilled.
    """
    new = dict(kind=kind, axis=axis, output=output)
    if kind != 'regression' and output is not question_logits:
        new |= in_order_of(student, teacher)
    return teacher.with_defaults(**new)


def in_order_of(student, teacher):
    """The option `select` that brings the teacher's classes into the student's order; none if this
    is its order.
    """
    if 'select' in teacher.given:
        return {}
    for m in teacher.members:
        refuse_other_order(student, m)
    found = map_classes(names_by_id(student), names_by_id(teacher.module))
    if found is None or found.same:
        return {}
    if found.missing:
        theirs = ', '.join(found.extra[:5]) or 'none'
        raise DistillError(
            "By id2label, the teacher does not have the student's classes "
            f'{", ".join(found.missing[:5])}. Classes that only the teacher has: {theirs}. Give both '
            "models the same names, or name the teacher's class of each of the student's: "
            'Teacher(model, select=[...]).'
        )
    return dict(select=found.order)


def refuse_other_order(student, member):
    if option := in_order_of(student, member):
        raise DistillError(
            f'By id2label, {member.name} of the ensemble has its classes in another order: '
            f"Teacher(model, select={option['select']}) brings them into the student's."
        )
