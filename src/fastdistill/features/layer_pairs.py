"""Pair student layers with teacher layers, by name or automatically."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..base.outputs import DistillError, Outputs
from ..base.text_table import text_table
from .layer_hooks import Taps, is_output, layer_output
from .layer_names import (
    how_to_name_layers,
    item_key,
    model_name,
    named,
    resolve,
    split_suffixes,
)
from .maps_and_tokens import grid
from .model_stages import check_visible, embedding, has_head, image_size, is_picture, stages
from .probe import Fired, dry_run, probe, series_layers
from .projectors import ProjectorLike, describe_projector

# 'auto', 'last', 'embedding', a layer name that both models have, or pairs of names in any form
# that `pair` accepts
LayersLike = str | Mapping[str, Any] | Sequence[Any]
# If one model has at most this many blocks, all of its blocks are paired.
# If both models have more blocks, four pairs at equal intervals are used.
MAX_BLOCKS = 6


@dataclass
class Pair:
    """A student layer and the teacher layer it learns from.

    Attributes:
        projector: Description of the projector, as text.
        picture: True if tokens are positions in an image. False if tokens are positions in a
            sequence such as text.
    """

    student: str
    s_shape: tuple
    teacher: str
    t_shape: tuple
    projector: str = ''
    picture: bool = True


class PairTable(list):
    """A list of `Pair` that prints as a table."""

    def __str__(self) -> str:
        rows = [
            (p.student, p.s_shape, p.teacher or "'' (its output)", p.t_shape, p.projector)
            for p in self
        ]
        return text_table(('student', 'shape', 'teacher', 'shape', 'projector'), rows)

    __repr__ = __str__


def pair(
    student: nn.Module,
    teacher: Any,
    x_student: Any,
    layers: LayersLike = 'auto',
    *,
    x_teacher: Any = None,
    match: str = 'shape',
    projector: ProjectorLike = 'auto',
) -> PairTable:
    """Find pairs of layers and their shapes. Both models run on the batch once in evaluation mode
    and are not changed.

    'auto' pairs these layers:

    - Convolutional networks and U-Nets: the last layer of each stage. A stage is a group of layers
      with the same resolution. Stages of equal resolution are paired if that pairs the last stages
      of both models. Otherwise, stages are paired by relative depth.
    - A U-Net and a different network: the network's stages and the stages of equal resolution in
      the U-Net's encoder.
    - Transformers, LSTM stacks and MLPs: blocks at equal relative depth. If the shorter model has
      up to 6 blocks, all its blocks are paired. Otherwise, four pairs at equal intervals are used.

    'auto' never pairs the layer that produces the output of a model. 'last' is the last pair of
    'auto'. Names may be globs. A suffix of 'auto' or 'last' is added to all names, e.g.
    'last@mean'. 'last@map' converts tokens to maps and does not change maps.

    'embedding' pairs the inputs of both models' heads. If the teacher has no head, its output is
    used. The name '' refers to the output of a model.

    Args:
        teacher: A module or a `Teacher`.
        x_student: A batch of inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        layers: 'auto', 'last', 'embedding', {'student.layer': 'teacher.layer'} (the value may be a
            list), a list of (student, teacher) names, or names that both models have.
        x_teacher: Inputs of the teacher, if they differ from those of the student.
        match: What the shapes of both features must have in common (see `projectors.Projector`).
            Used only to describe the projector.
        projector: Kind of projector (see `projectors.Projector`). Used only to describe the
            projector.
    """
    x_s, x_t = inputs(x_student), inputs(x_student if x_teacher is None else x_teacher)
    word, *how = _parse_word(checked_layers(layers))
    if word == 'embedding':
        word, how, layers = None, [], _embeddings(student, teacher, x_s, x_t, how)
    if word:
        found = _pairs_proposed(student, teacher, x_s, x_t)[-1 if word == 'last' else 0 :]
        layers = [(_with_suffixes(s, a, how), _with_suffixes(t, b, how)) for s, a, t, b in found]
    if not word or how:
        found = _pairs_asked(student, teacher, x_s, x_t, layers)
    picture = is_picture(x_s) and is_picture(x_t)
    return PairTable(
        Pair(s, a, t, b, describe_projector(a, b, projector, match), picture)
        for s, a, t, b in found
    )


def checked_layers(layers: LayersLike) -> LayersLike:
    """Return `layers`. Raise a DistillError if the value is not valid for any model."""
    word, *_ = _parse_word(layers)
    names: list = [layers] if word else [n for names in _name_pairs(layers) for n in names]
    if not names:
        raise DistillError(
            f'layers={layers!r} does not name any layers: use '
            f"{{'student.layer': 'teacher.layer'}} or 'auto'"
        )
    for n in names:
        split_suffixes(n)
    return layers


def check_names(student: nn.Module, teacher: Any, layers: LayersLike) -> None:
    """Raise a DistillError if these models do not have the layers. The models do not run."""
    if not _parse_word(layers)[0]:
        _names_asked(student, teacher, layers)
        return
    of = ('student', student), ('teacher', teacher)
    for who, model in of[:1] if _parse_word(layers)[0] == 'embedding' else of:
        with in_model(who):
            check_visible(model)


def _parse_word(layers: LayersLike) -> list:
    """Split 'auto', 'last' or 'embedding' into [word, *suffixes]. Return [None] if `layers`
    contains names of layers.
    """
    word, *how = split_suffixes(layers) if isinstance(layers, str) else [None]
    return [word, *how] if word in ('auto', 'last', 'embedding') else [None]


def inputs(x: Any) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


@contextmanager
def in_model(who: str) -> Iterator[None]:
    """Context manager that adds 'student' or 'teacher' to the message of errors raised inside."""
    try:
        yield
    except DistillError as e:
        raise DistillError(f'In the {who}: {e}') from e.__cause__


def _pairs_asked(student: nn.Module, teacher: Any, x_s: Any, x_t: Any, layers: LayersLike) -> list:
    names = _names_asked(student, teacher, layers)
    with in_model('student'):
        a = _layer_shapes(student, x_s, [s for s, _ in names])
    with in_model('teacher'):
        b = _layer_shapes(teacher, x_t, [t for _, t in names])
    for s, t in [] if _has_layers(teacher) else names:
        # without a layer, the channel axis of a tensor with three axes is unknown
        name, shape = b[t]
        if a[s][0] != s and len(shape) == 3 and '@' not in name:
            raise DistillError(
                f"The student's layer {s!r} has its channels first, (B, C, L). The teacher's "
                f'{name!r} of shape {shape} is passed without its layer, so its channel axis is '
                f"unknown. Return it as tokens (B, L, C), under the name '{name}@tokens'."
            )
    return [(*a[s], *b[t]) for s, t in names]


def _names_asked(student: nn.Module, teacher: Any, layers: LayersLike) -> list:
    return [n for s, t in _name_pairs(layers) for n in _matching_names(student, teacher, s, t)]


def _name_pairs(layers: LayersLike) -> list:
    """Return a list of (student pattern, teacher pattern), in the given order."""
    if isinstance(layers, Tensor):
        raise DistillError("layers= got a tensor. Pass the teacher's own inputs as x_teacher=.")
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, Mapping):
        layers = [
            (s, t)
            for s, ts in layers.items()
            for t in (ts if isinstance(ts, (tuple, list)) else [ts])
        ]
    items = [
        (o, o) if isinstance(o, str) else o
        for o in (layers if isinstance(layers, (tuple, list)) else [layers])
    ]
    if wrong := [
        o for o in items if not isinstance(o, (tuple, list)) or [type(n) for n in o] != [str, str]
    ]:
        raise DistillError(
            f"layers={layers!r}: {wrong[0]!r} is not a pair of names. Give {{'student.layer': "
            "'teacher.layer'}, {'student.layer': ['teacher.layer', ...]}, a list of pairs, a list of "
            "names that both models have, 'auto', 'last' and 'embedding'."
        )
    return items


def _matching_names(student: nn.Module, teacher: Any, s: str, t: str) -> list:
    """Pair the student layers that match one glob with the teacher layers that match the other, in
    order.
    """
    with in_model('student'):
        a = resolve(student, s)
    with in_model('teacher'):
        b = resolve(teacher, t) if _has_layers(teacher) else [t]
    if len(a) != len(b):
        raise DistillError(
            f'{s!r} matches {len(a)} layers of the student ({", ".join(a)}), {t!r} matches '
            f'{len(b)} of the teacher ({", ".join(b)}). They are paired in order, so the numbers '
            'must be equal. Name the layers one by one.'
        )
    return [*zip(a, b)]


def _has_layers(model: Any) -> bool:
    return isinstance(model, nn.Module) or bool(named(model))


def _layer_shapes(model: Any, x: Any, names: Iterable[str]) -> dict:
    """Return {given name: (name, shape)}. If the output of a layer is (B, C, L), the suffix @tokens
    is added to the name.
    """
    if not _has_layers(model):
        return _shapes_of_outputs(model, dry_run(model, *x), names)
    with Taps(model, names) as taps:
        ran = probe(model, *x)
        shapes = {n: tuple(y.shape) for n, y in taps.pop().items()}
    final = dict(zip(shapes, _with_tokens(named(model), ran, shapes)))
    if [*final] == [*final.values()]:
        return {n: (n, shape) for n, shape in shapes.items()}
    again = _layer_shapes(model, x, list(final.values()))
    return {n: again[f] for n, f in final.items()}


def names_of_tokens(model: Any, x: Any, names: Iterable[str]) -> list:
    """Add @tokens to the names of layers that return series with channels first, (B, C, L). For
    example, '0' becomes '0@tokens' if '0' is a 1d convolution. `Taps` then reads tokens (B, L, C).

    Args:
        model: A module or a `Teacher`.
        x: A batch of inputs, as a tuple.
        names: Names of layers, with or without suffixes.
    """
    if not _has_layers(model):
        return list(names)
    return [name for name, _ in _layer_shapes(model, x, names).values()]


def _with_tokens(modules: dict, ran: Sequence[Fired], names: Iterable[str]) -> Iterator[str]:
    """Add @tokens to the names of layers whose output is (B, C, L).

    Remove @tokens if the output is already (B, L, D).
    """
    first, fired = series_layers(ran), {f.module: f for f in ran}
    for name in names:
        base, *how = name.split('@')
        f = fired[modules[base]]
        shape = f.shape_in if 'in' in how else f.shape
        if shape is not None and len(shape) == 3:
            # @tokens must come before @map and @mean, which expect tokens
            where = [h for h in how if h in ('in', 'pre') or item_key(h) is not None]
            turns = [h for h in how if h in ('map', 'mean')]
            how = [*where, *(['tokens'] if f.module in first else []), *turns]
        yield '@'.join([base, *how])


def _shapes_of_outputs(model: Any, out: Any, names: Iterable[str]) -> dict:
    """Return the same as `_layer_shapes` for a teacher without readable layers, such as a function,
    whose outputs include features.
    """
    feats = out.feats if isinstance(out, Outputs) else {}
    # the stored features of a 1d convolution '0' are named '0@tokens' (see `names_of_tokens`)
    plain = lambda name: [o for o in name.split('@') if o != 'tokens']
    alike = lambda n: next((k for k in feats if plain(k) == plain(n)), None)
    found: dict[str, Any] = {n: n if n in feats or is_output(n) else alike(n) for n in names}
    if wrong := [n for n, k in found.items() if k is None]:
        raise DistillError(
            f'Its outputs have no layer {wrong[0]!r}. They have: '
            f'{", ".join(feats) or "no layers"}. {getattr(model, "layers_advice", "")}'.strip()
        )
    return {n: (k, tuple(layer_output(Outputs.of(out), k).shape)) for n, k in found.items()}


def _output_shape(model: Any, x: Any) -> tuple:
    return Outputs.of(dry_run(model, *x)).logits.shape  # type: ignore[union-attr]


def _embeddings(student: nn.Module, teacher: Any, x_s: Any, x_t: Any, how: Sequence[str]) -> list:
    """Return a list with one pair: the names of both models' embedding layers."""
    with in_model('student'):
        own, s = embedding(student, x_s), _output_shape(student, x_s)
    with in_model('teacher'):
        t, seen = _output_shape(teacher, x_t), '' in named(teacher)
        if seen and (t == s or has_head(teacher, x_t)):
            other = embedding(teacher, x_t)
        elif t == s:
            raise DistillError(
                f"layers='embedding': the output of {model_name(teacher)} has shape {tuple(t)}, "
                "like the student's, so it seems to be a prediction, and its layers can't be "
                f"read. {how_to_name_layers(teacher)} '' is the teacher's output."
            )
        else:
            other = '' if len(t) == 2 else '@mean'
    return [('@'.join([own, *how]), '@'.join([other, *how]))]


def _pairs_proposed(student: nn.Module, teacher: Any, x_s: Any, x_t: Any) -> list:
    with in_model('student'):
        a = stages(student, x_s)
    with in_model('teacher'):
        b = stages(teacher, x_t)
    if a[0].kind == 'vector' and b[0].kind != 'vector':
        what = 'maps' if b[0].kind == 'map' else b[0].kind
        raise DistillError(
            f"layers='auto' finds vectors in the student but {what} in the teacher, to which "
            "vectors can't be projected. Name the layers: "
            f"layers={{'student.layer': 'teacher.layer'}}."
        )
    pairs = _pair_by_resolution(a, b, image_size(x_s), image_size(x_t)) or pair_by_depth(a, b)
    return [(*_name_and_shape(s, t, x_s), *_name_and_shape(t, s, x_t)) for s, t in pairs]


def _name_and_shape(u: Any, other: nn.Module, x: Any) -> tuple:
    """Return the name and shape of a stage.

    Tokens of a square image are converted to a map if the other model's stage is a map.
    """
    square = is_picture(x) and len(set(image_size(x))) == 1
    g = grid(u.shape[1]) if square and u.kind == 'tokens' and other.kind == 'map' else None
    if g:
        return f'{u.name}@map', (u.shape[0], u.shape[2], *g[1:])
    if u.turn == '@tokens':
        return f'{u.name}@tokens', (u.shape[0], u.shape[2], u.shape[1])
    return u.name + u.turn, u.shape


def _with_suffixes(name: str, shape: Sequence[int], how: Sequence[str]) -> str:
    return '@'.join([name, *(h for h in how if h != 'map' or len(shape) == 3)])


def pair_by_depth(a: list, b: list) -> list:
    """Pair stages at equal relative depth. The last pair consists of the last stages of both
    models.
    """
    n = min(len(a), len(b))
    if n > MAX_BLOCKS and any(len({u.place for u in us}) == 1 for us in (a, b)):
        n = 4
    at = lambda us, k: us[int((k + 1) * len(us) / n + 0.5) - 1]
    return [(at(a, k), at(b, k)) for k in range(n)]


def _pair_by_resolution(a: list, b: list, size_a: tuple, size_b: tuple) -> list | None:
    """Pair stages of equal resolution. Both stages of a pair must be on the way down (where
    resolution decreases), or both on the way up. Return None if resolutions do not match.
    """
    if not size_a or len(size_a) != len(size_b) or any(u.kind != 'map' for u in a + b):
        return None
    down_a, down_b = _going_down(a), _going_down(b)
    shrinks = lambda i, j: [
        (p / n) / (q / m) for n, p, m, q in zip(size_a, a[i].place, size_b, b[j].place)
    ]
    equal = lambda i, j: all(0.8 < r < 1.25 for r in shrinks(i, j))

    def ends(row: list) -> Any:
        return row and row[-1] == (a[-1], b[-1]) and 2 * len(row) >= min(len(a), len(b))

    row = longest_row(a, b, lambda i, j: equal(i, j) and down_a[i] == down_b[j])
    if ends(row) or all(down_a + down_b):
        return row if ends(row) else None
    # One model is a U-Net.
    # If both models end at the same resolution, pair the last stages of both.
    # Otherwise, use the U-Net's way down, or its way up if no stage on the way down matches.
    anywhere = longest_row(a, b, equal)
    return anywhere if ends(anywhere) else row or anywhere or None


def longest_row(a: list, b: list, equal: Callable) -> list:
    """Return the longest sequence of matching pairs that keeps the order of both models.

    If several sequences have this length, return the sequence that ends last.
    """
    best: dict[tuple[int, int], list] = {}
    for i in range(len(a)):
        for j in range(len(b)):
            if equal(i, j):
                best[i, j] = [*best.get((i - 1, j - 1), []), (i, j)]
            else:
                best[i, j] = max(
                    best.get((i - 1, j), []),
                    best.get((i, j - 1), []),
                    key=lambda r: (len(r), r[-1:]),
                )
    return [(a[i], b[j]) for i, j in best[len(a) - 1, len(b) - 1]]


def _going_down(us: list) -> list:
    """Return a list of bools, True for each stage on the way down, where resolution decreases.

    A stage with the same resolution as the previous stage is assumed to have the same direction.
    """
    down = [True]
    for u, before in zip(us[1:], us):
        now, was = math.prod(u.place), math.prod(before.place)
        down.append(now < was or now == was and down[-1])
    return down
