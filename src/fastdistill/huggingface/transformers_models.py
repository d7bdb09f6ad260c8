"Handle the inputs, the outputs and the class order of transformers models."

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import DistillError, few_names
from ..checks.class_order import map_classes
from ..features.model_call import base_model, predicts_next
from ..recipes.token_labels import next_tokens
from ..teachers.members import modules_of
from ..teachers.teacher import Teacher, with_defaults

PROBLEMS = dict(
    regression='regression',
    single_label_classification='softmax',
    multi_label_classification='sigmoid',
)

ANSWER = 'start_positions', 'end_positions'  # labels of question answering
# end of the class names of models that also predict several labels or numbers
CLASSIFIERS = tuple(f'{o}Classification' for o in ('Sequence', 'Image', 'Video', 'Audio'))


def names_taken(model: Any) -> set:
    """Return the names of the arguments of a model's `forward`. For an ensemble, return the
    argument names of all members.

    Args:
        model: A module or a `Teacher`.
    """
    return {p.name for m in base_models(model) for p in arguments_of(m)}


def takes_any_name(model: Any) -> bool:
    """Return True if a model's `forward` accepts and uses inputs with any name, as wrappers do. Models
    of transformers accept such inputs but ignore them.

    Args:
        model: A module or a `Teacher`.
    """
    own = [m for m in base_models(model) if not type(m).__module__.startswith('transformers.')]
    return any(p.kind is p.VAR_KEYWORD for m in own for p in arguments_of(m))


def base_models(model: Any) -> list:
    return [*map(base_model, modules_of(model) if isinstance(model, Teacher) else [model])]


def arguments_of(model: Any) -> Collection[inspect.Parameter]:
    return inspect.signature(model.forward).parameters.values()


@dataclass
class BatchReader:
    """Reads the inputs and labels in the batches of a Trainer.

    Attributes:
        model: The student.
        teacher: The teacher.
        label_names: Names of the labels in a batch.
        filtered: True if the Trainer removed columns for which the student has no argument.
    """

    model: Any
    teacher: Teacher
    label_names: Sequence[str]
    filtered: bool = True

    @property
    def answers(self) -> bool:
        """True if the labels are the start and the end of an answer."""
        return sorted(self.label_names) == sorted(ANSWER)

    @property
    def axis(self) -> int:
        """The class axis."""
        return 1 if self.answers or architecture(self.model).endswith('Segmentation') else -1

    def labels(self, batch: Mapping) -> dict:
        return {k: batch[k] for k in self.label_names if k in batch}

    def inputs(self, batch: Mapping) -> tuple[dict, dict]:
        """Split a batch into (student inputs and labels, teacher inputs)."""
        student, teacher = names_taken(self.model), names_taken(self.teacher)
        plain = {k: v for k, v in batch.items() if k not in self.label_names}
        plain |= self.decoder_inputs(batch)
        of_student = {k: v for k, v in plain.items() if k in student or k not in teacher}
        if not any(k in student for k in plain) or not self.filtered and takes_any_name(self.model):
            of_student = plain
        of_teacher = {k: v for k, v in plain.items() if k in teacher}
        if not of_teacher or takes_any_name(self.teacher):
            of_teacher = plain
        return of_student | self.labels(batch), of_teacher

    def decoder_inputs(self, batch: Mapping) -> dict:
        """Return the decoder's inputs that an encoder-decoder student computes from the labels, if
        the batch has none. The teacher gets no labels, so it can't compute them.
        """
        given = 'decoder_input_ids' in batch or 'decoder_inputs_embeds' in batch
        if given or 'labels' not in self.labels(batch):
            return {}
        y, config = batch['labels'], cast(Any, getattr(self.model, 'config', None))
        if shift := getattr(self.model, 'prepare_decoder_input_ids_from_labels', None):
            ids = shift(labels=y)
            if (
                architecture(self.model) != 'EncoderDecoderModel'
                or 'decoder_attention_mask' in batch
            ):
                return dict(decoder_input_ids=ids)
            # `forward` of this class makes the mask only if it also makes the ids
            mask = (ids != config.pad_token_id).to(ids.dtype)
            return dict(decoder_input_ids=ids, decoder_attention_mask=mask)
        generates = architecture(self.model).endswith('ForConditionalGeneration')
        if not (generates and getattr(config, 'is_encoder_decoder', False)):
            return {}
        # Whisper and others shift the labels inside of `forward`
        ids = F.pad(y[:, :-1], (1, 0), value=config.decoder_start_token_id)
        return dict(decoder_input_ids=ids.masked_fill(ids == -100, config.pad_token_id))

    def shared_inputs(self, batch: Mapping) -> dict:
        """Return the inputs that both models take. If there are none, return the teacher's."""
        student, teacher = self.inputs(batch)
        return {k: v for k, v in student.items() if k in teacher} or teacher

    def tokens(self, x: Mapping) -> Any:
        """Return the inputs, whose attention mask applies to the logits.

        In an encoder-decoder model, the attention mask of the encoder does not apply to the logits,
        so the result is empty.
        """
        config = getattr(self.model, 'config', None)
        return () if getattr(config, 'is_encoder_decoder', False) else x

    def targets(self, batch: Mapping, logits: Any) -> tuple:
        """Return the labels, with each label at the position that predicts it."""
        y = tuple(self.labels(batch).values())
        if self.answers and y:
            at = torch.stack([batch[k].reshape(-1).clamp_min(0) for k in ANSWER], -1)
            return (at.where(at < logits.shape[1], -100),)
        if y and predicts_next(self.model):
            return next_tokens(y[0], -100), *y[1:]
        return y

    def number_of_labels(self, batch: Mapping) -> Tensor:
        """Return the number of labels that the Trainer counts in this batch."""
        y = batch['labels'][..., 1:] if predicts_next(self.model) else batch['labels']
        return y.ne(-100).sum()

    def inputs_and_labels(self, batch: Mapping) -> tuple[dict, tuple]:
        """Split a batch into (inputs that both models take, labels)."""
        x = self.shared_inputs(batch)
        # start and end logits have the length of the input
        return x, self.targets(batch, next(iter(x.values())))

    def hide_padding(self, x: Mapping, *outputs: Any) -> None:
        """Set the logits of padded tokens to a large negative number, because an answer can't start
        or end there.
        """
        if not self.answers or 'attention_mask' not in x:
            return
        for o in outputs:
            if o is not None:
                o.logits = o.logits.masked_fill(x['attention_mask'][..., None] == 0, -1e4)


def architecture(model: Any) -> str:
    """Return the class name of a model, such as BertForMaskedLM."""
    return type(base_model(model)).__name__


def has_loss(raw: Any) -> bool:
    """Return True if a model returned a loss. In a tuple, the loss is the first item."""
    loss = (
        raw[0] if isinstance(raw, tuple) else raw.get('loss') if isinstance(raw, Mapping) else None
    )
    return isinstance(loss, Tensor) and not loss.dim()


def without_loss(raw: Any) -> Any:
    """Return the student's outputs without the loss, if they are a tuple."""
    return raw[1:] if isinstance(raw, tuple) and has_loss(raw) else raw


def question_logits(out: Any) -> Tensor:
    """Return the logits for the start and the end of an answer, (B, L, 2). The class axis is axis
    1, because each token is a class.
    """
    names = 'start_logits', 'end_logits'
    if isinstance(out, Mapping) and all(k in out for k in names):
        return torch.stack([out[k] for k in names], -1)
    if isinstance(out, tuple) and len(out) > 1 and all(isinstance(o, Tensor) for o in out[:2]):
        return torch.stack(out[:2], -1)
    found = f' with the keys {", ".join(out)}' if isinstance(out, Mapping) else ''
    raise DistillError(
        'The labels are start_positions and end_positions, so both models must return start_logits '
        f'and end_logits, but a model returned a {type(out).__name__}{found}. Use models for '
        'question answering, or name the output to distill with output=.'
    )


def refuse_detector(model: Any) -> None:
    """Raise a DistillError if the model predicts a set of objects."""
    if (name := architecture(model)).endswith('ObjectDetection'):
        raise DistillError(
            f'{name} predicts objects in no fixed order, so the logits of two models cannot be '
            'compared position by position. Compare layers, as in Term(losses.hint, layers=...). If '
            "the queries of both models have the same meaning, pass output='logits'."
        )


def names_by_id(model: Any) -> list[str] | None:
    """Return the class names in the model's `id2label`. Return None if they are the default names
    LABEL_0, LABEL_1, ...
    """
    id2label = getattr(getattr(model, 'config', None), 'id2label', None)
    if not id2label or all(re.fullmatch(r'LABEL_\d+', str(v)) for v in id2label.values()):
        return None
    return [str(id2label[k]) for k in sorted(id2label, key=int)]


def predicts(model: Any, labels: Tensor | None = None) -> str | None:
    """Return the kind of outputs, 'softmax', 'sigmoid' or 'regression', according to the model's
    config.

    Return None if the kind depends on the labels and they are unknown.

    Args:
        model: A transformers model.
        labels: Labels of a batch. None if unknown.
    """
    config: Any = getattr(model, 'config', None)
    name = architecture(model)
    if (problem := getattr(config, 'problem_type', None)) in PROBLEMS:
        return PROBLEMS[problem]
    if not name.endswith(CLASSIFIERS):
        return 'softmax'
    if config.num_labels == 1:
        return 'regression'
    return None if labels is None else 'sigmoid' if labels.is_floating_point() else 'softmax'


def teacher_for(teacher: Teacher, student: Any, kind: str, axis: int, output: Any) -> Teacher:
    """Return the teacher with the student's kind of outputs, and with its classes in the order of
    the student's classes.

    Args:
        teacher: The teacher.
        student: The student, a transformers model.
        kind: Kind of the student's outputs.
        axis: Class axis.
        output: Output to distill, as a name or a function.
    """
    new = dict(kind=kind, axis=axis, output=output)
    if kind != 'regression' and output is not question_logits:
        new |= in_order_of(student, teacher)
    return with_defaults(teacher, **new)


def in_order_of(student: Any, teacher: Any) -> dict[str, Any]:
    """Return the option `select` that puts the teacher's classes into the student's order, as a
    dict. The dict is empty if the order is already the same.
    """
    if 'select' in teacher.given:
        return {}
    for m in teacher.members:
        refuse_other_order(student, m)
    found = map_classes(names_by_id(student), names_by_id(teacher.module))
    if found is None or found.same:
        return {}
    if found.missing:
        theirs = few_names(found.extra) or 'none'
        raise DistillError(
            "According to id2label, the teacher does not have the student's classes "
            f'{few_names(found.missing)}. Classes that only the teacher has: {theirs}. Give '
            "the classes of both models the same names, or list the teacher's class for each student "
            'class: Teacher(model, select=[...]).'
        )
    return dict(select=found.order)


def refuse_other_order(student: Any, member: Any) -> None:
    if option := in_order_of(student, member):
        raise DistillError(
            f'According to id2label, {member.name} in the ensemble has its classes in a different '
            f"order: Teacher(model, select={option['select']}) puts them into the student's order."
        )
