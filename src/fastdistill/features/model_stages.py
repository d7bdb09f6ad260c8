"Find the layers at which the stages of a network end."

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from ..base.outputs import DistillError
from .layer_names import how_to_name_layers, layer_tree, model_name, named
from .maps_and_tokens import grid
from .probe import Fired, probe, series_layers

CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
PASSIVE = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity, nn.Flatten


def image_size(x: Any) -> tuple:
    """Return the height and width of input images, or the length of an input series, as a tuple.

    The tuple is empty for other inputs.
    """
    xs = x[0].values() if isinstance(x[0], Mapping) else x[:1]
    return next(
        (
            tuple(o.shape[2:])
            for o in xs
            if isinstance(o, Tensor) and o.is_floating_point() and o.dim() > 2
        ),
        (),
    )


def is_picture(x: Any) -> bool:
    return len(image_size(x)) > 1


def batch_size(x: Any) -> int | None:
    xs = x[0].values() if isinstance(x[0], Mapping) else x
    return next((len(o) for o in xs if isinstance(o, Tensor) and o.dim()), None)


@dataclass
class Stage:
    """A layer on the main path of a model, which may be the end of a stage.

    Attributes:
        kind: 'map', 'tokens' or 'vector'.
        shape: Output shape. Maps have their channels first.
        weights: Number of layers with weights inside this layer.
        leaf: True if this layer does not contain other layers.
        turn: Suffix for the layer name that converts the output to `shape`, e.g. '@map'. Empty if
            no conversion is needed.
    """

    name: str
    module: nn.Module
    kind: str
    shape: tuple
    weights: int
    leaf: bool
    turn: str = ''

    @property
    def place(self) -> tuple:
        return self.shape[2:] if self.kind == 'map' else self.shape[1:-1]

    @property
    def deep(self) -> bool:
        return self.weights > 1

    @property
    def dilation(self) -> int:
        return max(
            (max(m.dilation) for m in self.module.modules() if isinstance(m, CONVS)), default=1
        )


def stages(model: Any, x: Any) -> list[Stage]:
    """Return the last layer of each stage of a model, in the order in which they run."""
    path = MainPath(model, x)
    found = ends_of_stages(path.walk(), path.size)
    # in a network with only one resolution, each block is a stage
    if len(found) == 1 and found[0].kind == 'map':
        found = ends_of_stages(path.walk(split_maps=True), path.size)
    if not found:
        raise DistillError(
            f"layers='auto' finds no stages in {model_name(model)}. Name the layers: "
            f"layers={{'student.layer': 'teacher.layer'}}. It has:\n{layer_tree(model).brief()}"
        )
    return found


def embedding(model: Any, x: Any) -> Any:
    """Return the name of the layer whose output is the model's embedding.

    The embedding is the first vector after the last layer that returns a map or tokens. If no
    vector follows, the embedding is the output of that layer, averaged over positions. In a network
    that uses only vectors, the embedding is the output of the last layer before the head.
    """
    units = MainPath(model, x).walk()
    if not units:
        raise DistillError(f'No embedding was found in {model_name(model)}. Name the layer.')
    after = next(
        (i for i, u in reversed([*enumerate(units)]) if u.kind != 'vector'), len(units) - 2
    )
    if after + 1 < len(units):
        vector, *later = units[after + 1 :]
        # subtle: an activation may overwrite the vector in place, e.g. in VGG
        until = takewhile(lambda u: not u.weights, later)
        overwritten = any(getattr(u.module, 'inplace', False) for u in until)
        return f'{vector.name}@pre' if overwritten else vector.name
    return f'{units[after].name}{units[after].turn}@mean'


def has_head(model: Any, x: Any) -> bool:
    """Return True if the model ends in a linear layer that is not part of a block, as classifiers
    do.
    """
    path = MainPath(model, x)
    return path.head != '' and isinstance(path.ran[path.head].module, nn.Linear)


def check_visible(model: Any) -> None:
    """Raise a DistillError if the layers of a teacher can't be read, because it is a function, a
    file or several models.
    """
    if '' not in named(model):
        raise DistillError(
            f"layers='auto' needs one model whose layers can be read, not {model_name(model)}. "
            f'{how_to_name_layers(model)}'
        )


class MainPath:
    """The main path through a model: its layers in the order in which they run.

    A container is treated as one layer unless several stages end inside.
    """

    def __init__(self, model: Any, x: Any) -> None:
        check_visible(model)
        ran = probe(model, *x)
        self.ran, self.when = {f.name: f for f in ran}, {f.name: i for i, f in enumerate(ran)}
        self.first = series_layers(ran)
        self.size = image_size(x)
        # use the batch size that the model got, because a teacher may split the batch into slices
        ran_on = self.ran[''].shape_in if '' in self.ran else None
        self.batch = ran_on[0] if ran_on else batch_size(x)
        self.below: dict[str, list[str]] = {}
        for n in self.ran:
            while n:
                n, child = n.rpartition('.')[0], n
                if child in self.below.setdefault(n, []):
                    break
                self.below[n].append(child)
        self.head = self._head(ran)

    def _head(self, ran: Sequence[Fired]) -> str:
        """Return the name of the last layer with weights, which produces the output. Return '' if
        there is no such layer, or if it is part of a block.

        This last layer and all layers after it are not used as features.
        """
        head = next((f.name for f in reversed(ran) if has_weights(f.module)), '')
        if any(self._blocks(n, maps=True) for n in self.below if n and is_inside(head, n)):
            return ''
        return head

    # convert layers to stages

    def look(self, name: str) -> Stage | None:
        """Return a layer as a `Stage`. Return None if the output is not a floating-point tensor of
        2 to 5 axes with the batch on axis 0.
        """
        f = self.ran.get(name)
        if f is None or not f.floats or not 2 <= len(f.shape) <= 5 or f.shape[0] != self.batch:
            return None
        dims, shape, last = len(f.shape), f.shape, self._channels_last(f, f.shape)
        kind = 'tokens' if dims == 3 and last else 'map'
        if dims == 2 or shape[1:-1] == (1,):
            kind = 'vector'
        turn = '@map' if dims == 4 and last else '@tokens' if dims == 3 and not last else ''
        if turn == '@map':
            shape = (shape[0], shape[3], *shape[1:3])
        weights = sum(map(has_weights, f.module.modules()))
        return Stage(name, f.module, kind, shape, weights, name not in self.below, turn)

    def _channels_last(self, f: Fired, shape: tuple) -> bool:
        """Return True if the channels are on the last axis.

        For images, the axis follows from the ratio of height and width. If that is ambiguous, the
        axis follows from the types of the layers inside.
        """
        if len(shape) == 3:
            return f.module not in self.first
        if len(shape) != 4:
            return False
        have = {type(m) for m in f.module.modules()}
        of = lambda *kinds: any(issubclass(h, kinds) for h in have)
        if len(self.size) > 1:
            like = lambda h, w: abs(h - w * self.size[0] / self.size[1]) <= 1
            first, behind = like(*shape[2:]), like(*shape[1:3])
            if first != behind:
                return behind
        return of(nn.Linear) and not of(*CONVS)

    # find candidates for stages

    def walk(self, split_maps: bool = False) -> list[Stage]:
        """Return the candidates for stages, and the layers between them, in the order in which they
        run.
        """
        found, place = [], ()
        for n in sorted(self._open('', split_maps), key=self.when.__getitem__):
            u = self.look(n)
            if u is None:
                continue
            # skip a map that was pooled to 1 x 1, which is effectively a vector
            if u.kind == 'map' and set(u.place) == {1} and max(place, default=0) > 4:
                continue
            if u.kind == 'map':
                place = u.place
            found.append(u)
        return found

    def _open(self, name: str, split_maps: bool, block: bool = False) -> list[str]:
        """Return the names of the layers on the main path, starting from the container `name`.

        Containers are replaced by the layers inside where necessary. Blocks of a row (`block=True`)
        are not replaced.
        """
        at_head = not name or is_inside(self.head, name)
        if not at_head and self.when.get(name, 0) > self.when[self.head]:
            return []
        u, below = self.look(name), self.below.get(name, [])
        if below and (
            u is None or at_head or (not block and self._row(u, split_maps)) or self._several(u)
        ):
            block = self._blocks(name, split_maps)
            return [o for n in below for o in self._open(n, split_maps, block)]
        return [] if u is None or name == self.head else [name]

    def _row(self, u: Stage, split_maps: bool) -> bool:
        "Return True if the layer contains a row of blocks that are stages."
        if u.kind == 'map' and not split_maps:
            return False
        return any(self._blocks(n, split_maps) for n in [u.name, *self._inside(u.name)])

    def _several(self, u: Stage) -> bool:
        "Return True if more than one stage ends in the layer."
        inside = [
            o for n in self._inside(u.name) if (o := self.look(n)) and o.weights and o.kind == 'map'
        ]
        others = {o.place for o in inside if set(o.place) != {1}} - self._ends(u)
        areas = sorted(map(math.prod, self._ends(u)))
        between = [p for p in others if areas and areas[0] < math.prod(p) < areas[-1]]
        # subtle: one smaller resolution inside may be a side path, e.g. attention to a pooled map.
        # Several smaller resolutions indicate a U-Net.
        return bool(between) or len(others) > 1

    def _ends(self, u: Stage) -> set:
        """Return the resolutions of a layer's input and output. The result is empty if the layer
        does not return a map.
        """
        if u.kind != 'map':
            return set()
        entry = self.ran[u.name].shape_in or ()
        if len(entry) != len(u.shape):
            return {u.place}
        return {u.place, entry[1:3] if u.turn == '@map' else entry[2:]}

    def _blocks(self, name: str, maps: bool) -> bool:
        "Return True if the layer contains a row of blocks of the same class."
        below = [o for n in self.below.get(name, []) if (o := self.look(n)) and o.deep]
        found = {(type(o.module), o.kind, o.place if o.kind == 'tokens' else None) for o in below}
        return len(below) > 1 and len(found) == 1 and (maps or below[0].kind != 'map')

    def _inside(self, name: str) -> Iterator[str]:
        for n in self.below.get(name, []):
            yield n
            yield from self._inside(n)


# find the ends of stages


def ends_of_stages(units: Sequence[Stage], size: tuple) -> list[Stage]:
    """Return the last layer of each stage.

    Args:
        units: Result of `MainPath.walk`.
        size: Result of `image_size` for the inputs.
    """
    groups = groups_of([u for u in units if u.kind != 'vector'], len(size) > 1)
    # if a network has blocks, its single layers are stems or necks and not stages
    if any(u.deep for g in groups for u in g):
        groups = [g for g in groups if any(u.deep for u in g)]
    if not groups:
        groups = groups_of_vectors([u for u in units if u.kind == 'vector'])
    elif len(groups) == 1 and sum(u.deep for u in groups[0]) > 1:
        return [u for u in groups[0] if u.deep]
    if len(groups) > 3 and is_stem(groups[0], units, size):
        groups = groups[1:]
    return [end_of(g) for g in groups]


def groups_of(units: Sequence[Stage], picture: bool) -> list[list[Stage]]:
    """Group consecutive layers with the same resolution and dilation. Groups without weights are
    dropped.
    """
    groups: list[list[Stage]] = []
    place: tuple | None = None
    dilation: int | None = None
    for u in units:
        # the resolution does not depend on the number of class tokens
        tokens = (grid(u.shape[1]) or u.shape)[1:] if picture else ()
        here = u.kind, u.place if u.kind == 'map' else tokens
        if here != place or (u.weights and dilation not in (None, u.dilation)):
            groups.append([])
            place, dilation = here, None
        if u.weights:
            dilation = u.dilation
        groups[-1].append(u)
    return [g for g in groups if any(u.weights for u in g)]


def groups_of_vectors(units: Sequence[Stage]) -> list[list[Stage]]:
    """Build one group for each layer with weights, including the activations after the layer."""
    groups: list[list[Stage]] = []
    for u in units:
        if u.weights:
            groups.append([u])
        elif groups:
            groups[-1].append(u)
    return groups


def is_stem(group: Sequence[Stage], units: Sequence[Stage], size: tuple) -> bool:
    """Return True if this group contains only the first layer, which reduces the resolution of the
    image.
    """
    entry, *more = [u for u in group if u.weights]
    first = next(u for u in units if u.weights)
    smaller = entry.kind == 'map' and max(entry.place) < max(size, default=0)
    return not more and entry is first and smaller


def end_of(group: Sequence[Stage]) -> Stage:
    """Return the last block of a group. If the group has no blocks, return the last activation after
    the last layer with weights.
    """
    blocks = any(u.deep for u in group)
    i = max(i for i, u in enumerate(group) if u.weights and (u.deep or not blocks))
    tail = group[i + 1 :]
    if group[i].leaf:
        tail = [u for u in tail if not isinstance(u.module, PASSIVE)]
    else:
        # after a block, include an activation only if it overwrites the output of the block in place
        tail = [*takewhile(lambda u: getattr(u.module, 'inplace', False), tail)]
    return tail[-1] if tail else group[i]


def is_inside(name: str, above: str) -> bool:
    return f'{name}.'.startswith(f'{above}.')


def has_weights(m: nn.Module) -> int:
    """Return 1 if the layer has its own weight matrices or kernels, 2 if it is an RNN, and 0
    otherwise.

    Weights of embeddings and parameters for single tokens are ignored.
    """
    if isinstance(m, nn.RNNBase):
        return 2
    if isinstance(m, nn.Embedding):
        return 0
    return int(
        any(p is not None and p.dim() > 1 and p.shape[0] > 1 for p in m._parameters.values())
    )
