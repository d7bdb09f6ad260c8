"""Pair the layers that the terms of a recipe compare, and build their projectors."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from torch import nn

from ..base.outputs import DistillError, Outputs
from ..features.layer_hooks import Taps, is_output, layer_output
from ..features.layer_names import named
from ..features.layer_pairs import PairTable, pair
from ..features.probe import dry_run
from ..features.projectors import Projector
from ..recipes.layer_link import Link, own_copy
from ..teachers.teacher import Teacher


def link_layers(
    student: nn.Module,
    teacher: Teacher,
    x: tuple,
    terms: Iterable,
    layers_of: Callable = attrgetter('layers'),
) -> tuple[PairTable, dict[str, nn.ModuleList]]:
    """Return (pairs of layers, {term name: a `Link` for each of its pairs}).

    Args:
        student: The student.
        teacher: The teacher.
        x: Inputs of a batch.
        terms: Terms that compare layers.
        layers_of: fn(term) -> layers of a term in the form that `pair` takes.
    """
    tables = {
        t: pair(student, teacher, x, layers=layers_of(t), match=t.match, projector=t.projector)
        for t in terms
    }
    pairs = PairTable(p for ps in tables.values() for p in ps)
    own, modules = named(student), teacher.named_modules()
    for p in pairs:
        check_same_tokens(p, own, modules)
    with Taps(student, dict.fromkeys(p.student for p in pairs)) as taps:
        dry_run(student, *x)
        s = taps.pop()
    names = dict.fromkeys(p.teacher for p in pairs if not is_output(p.teacher))
    t = teacher.probe(*x, layers=list(names))
    return pairs, {
        term.name: nn.ModuleList(link_of(term, p, s, t, modules) for p in ps)
        for term, ps in tables.items()
    }


def check_same_tokens(p: Any, student: Mapping, teacher: Mapping) -> None:
    """Raise a DistillError if one of two layers reads a text in longer pieces than the other.

    fastai's classifiers of texts run their RNN on `bptt` tokens at a time, and the output of a layer
    is that for the last of these pieces.

    Args:
        p: The pair of layers.
        student, teacher: {layer name: module} of each model.
    """
    a, b = length_of_pieces(p.student, student), length_of_pieces(p.teacher, teacher)
    if None not in (a, b) and a != b:
        raise DistillError(
            f'The student reads texts in pieces of bptt={a} tokens and the teacher in pieces of '
            f'bptt={b}, so the outputs of {p.student!r} and {p.teacher!r} belong to different tokens. '
            'Use the same seq_len= for both, or set bptt of one to that of the other: '
            'student.model[0].bptt = teacher.model[0].bptt'
        )


def length_of_pieces(layer: str, modules: Mapping) -> int | None:
    """Return `bptt` of the module that contains a layer. None if no module has it."""
    parts = layer.split('@')[0].split('.')
    inside = (modules.get('.'.join(parts[:i])) for i in range(1, len(parts)))
    return next((n for m in inside if isinstance(n := getattr(m, 'bptt', None), int)), None)


def link_of(term: Any, p: Any, s: dict, t: Outputs, modules: Mapping) -> Link:
    """Build the `Link` for a pair of layers of a term, on the student's device.

    Args:
        term: The term.
        p: The pair.
        s, t: Outputs of the layers of student and teacher.
        modules: {layer name: module} of the teacher.
    """
    a, b = s[p.student], layer_output(t, p.teacher)
    proj = Projector(a.shape, b.shape, kind=term.projector, match=term.match, picture=p.picture)
    proj, loss = proj.to(a.device), own_copy(term.loss)
    if hasattr(loss, 'prepare'):
        layer = modules.get(p.teacher.split('@')[0])
        loss.prepare(proj.eval()(a, b), b, layer=layer, **term.channels(b))
    return Link(loss, (p.student, p.teacher), proj.train()).to(a.device)
