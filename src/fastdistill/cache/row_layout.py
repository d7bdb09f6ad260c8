"""Layout of a row in a cache.

A row contains the teacher's outputs for one view of one sample. All rows have the same number of
bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from itertools import zip_longest
from math import prod
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import DistillError, check_choice, check_whole
from ..base.outputs import TAILS, Draws, LinearLogits, Outputs, TopK, as_dense
from .json_checks import check_json, refuse_entry

DTYPES = 'float32', 'float16', 'int8'
STORE_KINDS = 'auto', 'logits', 'topk', 'hidden', 'draws', 'pca'
POSSIBLE_STORES = (
    "must be 'auto', 'logits', 'topk', 'hidden', 'draws' or 'pca'; 'float32', 'float16' or 'int8' "
    "to store all logits with this dtype; or a dict of options, such as dict(topk=10, dtype='int8'), "
    "dict(size=56), dict(kind='hidden', layer='lm_head'), dict(draws=50, T=1) or "
    'dict(components=64).'
)
MAX_COMPONENTS = 255  # they are computed on at most 256 samples
EXACT = 10  # number of likeliest classes that are stored exactly in addition to the components
# minimum number of classes per principal component. With fewer classes, int8 logits are hardly
# larger than the components
CLASSES_PER_COMPONENT = 3
# limits, so that a damaged manifest can't fill the memory
MAX_BYTES, MAX_VALUES, MAX_FIELDS, MAX_DIMS, MAX_CLASSES = 2**31, 2**33, 1000, 8, 2**24


@dataclass
class Store:
    """Options for storing teacher outputs. `Store.of` converts the argument `store=` to a `Store`.

    Attributes:
        kind: 'logits' stores all logits, 'topk' the most likely classes, 'hidden' the last hidden
            state, 'draws' classes drawn from the teacher's probabilities, and 'pca' the logits
            projected onto their principal components, with the exact logits of the ten most likely
            classes. 'auto' chooses one of these. If None, the kind is inferred from the other
            options.
        dtype: 'float32', 'float16' or 'int8' (with a scale for each row). If None, use 'int8' for
            hidden states and principal components, and 'float16' otherwise.
        topk: Number of classes to store.
        tail: Assumption about the classes that are not stored, see `TopK`.
        axis: Class axis.
        size: Height and width to which maps of logits are reduced. None for no reduction.
        layer: Name of the output layer, whose input is the hidden state. If None, the layer is
            found automatically.
        draws: Number of classes drawn for each position.
        T: Temperature of the probabilities from which classes are drawn.
        components: Number of principal components.
    """

    kind: str | None = None
    dtype: str | None = None
    topk: int | None = None
    tail: str = 'mean'
    axis: int = 1
    size: tuple | None = None
    layer: str | None = None
    draws: int | None = None
    T: float | None = None
    components: int | None = None

    @classmethod
    def of(cls, o: Any = 'auto', axis: int = 1) -> 'Store':
        """Convert the argument `store=` to a `Store`.

        Args:
            o: A kind, a dtype for all logits, a dict of attributes of `Store`, or a `Store`.
            axis: Class axis.
        """
        if isinstance(o, Store):
            return replace(o, axis=axis)
        if isinstance(o, str):
            if o not in (*STORE_KINDS, *DTYPES):
                raise DistillError(f'store={o!r}: {POSSIBLE_STORES}')
            return cls(dtype=o, axis=axis) if o in DTYPES else cls(kind=o, axis=axis)
        own = [f.name for f in dataclass_fields(cls) if f.name != 'axis']
        if not isinstance(o, dict):
            raise DistillError(f'store={o!r}: {POSSIBLE_STORES}')
        if wrong := [k for k in o if k not in own]:
            raise DistillError(f'store={o!r} has an unknown key {wrong[0]!r}: it {POSSIBLE_STORES}')
        return cls(**o, axis=axis)

    def __post_init__(self) -> None:
        given = [n for n in KIND_OF_OPTION if getattr(self, n) is not None]
        own = list(dict.fromkeys(KIND_OF_OPTION[n] for n in given))
        if self.kind is not None:
            check_choice('kind', self.kind, STORE_KINDS)
        if len(own) > 1 or own and self.kind not in (None, *own):
            if {'topk', 'size'} <= {*given}:
                raise DistillError(
                    "size= and topk= can't be combined: maps are stored either at a smaller size or "
                    'with fewer classes.'
                )
            kind = '' if self.kind is None else f'kind={self.kind!r} and '
            raise DistillError(
                f"{kind}{', '.join(given)} can't be combined. store= {POSSIBLE_STORES}"
            )
        self.kind = self.kind or (own[0] if own else 'logits')
        for n, default, most in (
            ('topk', 10, None),
            ('draws', 50, 2**16 - 1),
            ('components', 64, MAX_COMPONENTS),
        ):
            if self.kind == KIND_OF_OPTION[n] and getattr(self, n) is None:
                setattr(self, n, default)
            check_whole(n, getattr(self, n), 1, most, none=True)
        if self.kind == 'draws' and self.T is None:
            self.T = 1.0
        if not (self.T is None or isinstance(self.T, Real) and self.T > 0):
            raise DistillError(f'T={self.T!r}: a temperature must be a number above 0')
        if self.dtype is None:
            self.dtype = 'int8' if self.kind in ('hidden', 'pca') else 'float16'
        check_choice('dtype', self.dtype, DTYPES)
        check_choice('tail', self.tail, TAILS)
        if isinstance(self.size, int):
            self.size = self.size, self.size
        if self.size is None:
            return
        pair = isinstance(self.size, (tuple, list)) and len(self.size) == 2
        if not pair or not all(isinstance(o, Integral) for o in self.size):
            raise DistillError(f'size={self.size!r}: must be a whole number, or (height, width)')
        self.size = tuple(self.size)

    def __str__(self) -> str:
        """Return a short description for tables and messages."""
        if self.kind == 'topk':
            return f'top {self.topk}, {self.dtype}'
        if self.kind == 'draws':
            return f'{self.draws} draws at T={self.T:g}'
        names = dict(logits='logits', hidden='hidden states', auto='auto')
        names['pca'] = f'{self.components} components'
        return f'{names[str(self.kind)]}, {self.dtype}'


# {option: the only kind that has this option}
KIND_OF_OPTION = dict(
    topk='topk', size='logits', layer='hidden', draws='draws', T='draws', components='pca'
)


@dataclass
class Field:
    """A tensor that is stored in each row of a cache.

    Attributes:
        name: Name of the tensor.
        dtype: NumPy name of the data type, which is stored in little-endian order.
        shape: Shape without the batch dimension.
        at: Offset of the tensor in the row, in bytes.
    """

    name: str
    dtype: str
    shape: tuple
    at: int = 0

    def __str__(self) -> str:
        return f'{self.name!r} of {self.dtype} {list(self.shape)} at byte {self.at}'

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, rows: Tensor) -> Tensor:
        # subtle: copy the bytes, since a view with a larger data type needs an aligned offset
        part = rows[:, self.at : self.at + self.bytes].clone(memory_format=torch.contiguous_format)
        # PyTorch has few operations for uint16, so the numbers are read as int16 and then corrected
        t = part.view(TORCH_DTYPES[self.dtype]).reshape(len(rows), *self.shape)
        return t.long() & 0xFFFF if self.dtype == 'uint16' else t


TORCH_DTYPES = dict(
    uint8=torch.uint8,
    int8=torch.int8,
    uint16=torch.int16,
    int32=torch.int32,
    float16=torch.float16,
    float32=torch.float32,
)


class FieldList:
    """Adds fields to a row, one after another.

    Args:
        dtype: 'float32', 'float16' or 'int8', for numbers.
        fields: List to which the fields are added.
    """

    def __init__(self, dtype: str, fields: list[Field]):
        self.dtype, self.fields = dtype, fields

    def add(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        at = self.fields[-1].at + self.fields[-1].bytes if self.fields else 0
        self.fields.append(Field(name, dtype, tuple(shape), at))

    def add_numbers(self, name: str, shape: Sequence[int]) -> None:
        """Add a field of numbers, and their scale if they are stored in int8."""
        self.add(name, self.dtype, shape)
        if self.dtype == 'int8' and name == 'hidden':
            # one scale and offset for each position
            self.add(f'scale:{name}', 'float32', (*shape[:-1], 2))
        # the scale of log-probabilities fits in float16, but other scales may not
        elif self.dtype == 'int8':
            self.add(f'scale:{name}', 'float16' if name == 'values' else 'float32', (2,))


FIELD = dict(
    name=str,
    dtype=tuple(TORCH_DTYPES),
    shape=[range(1, MAX_BYTES + 1), 0, MAX_DIMS],
    at=range(MAX_BYTES + 1),
)
# entries of a layout, for `check_json`
LAYOUT_ENTRIES = {
    'fields': [FIELD, 1, MAX_FIELDS],
    'n': (None, range(1, MAX_CLASSES + 1)),
    'tail': tuple(TAILS),
    'axis': range(-MAX_DIMS, MAX_DIMS + 1),
    'full': (None, [range(1, MAX_BYTES + 1), 2, 2]),
    'head?': (None, dict(bias=bool, cap=(None, float))),
    'draws?': (None, dict(number=range(1, 2**16), T=float)),
}


@dataclass
class Layout:
    """Describes the fields of a row, and converts between rows and `Outputs`.

    Attributes:
        fields: The `Field`s, in the order of their bytes.
        n: Number of classes. None if a row holds the logits of all classes.
        tail: Assumption about the classes that are not stored, see `TopK`.
        axis: Class axis.
        full: Original height and width of logit maps that are stored at a lower resolution.
        head: Description of the stored linear layer that computes the logits from hidden states or
            principal components: a dict with `bias` (True if the layer has a bias) and `cap` (soft
            cap of the logits, or None). None if there is no such layer.
        draws: For draws, a dict with their `number` and temperature `T`.
    """

    fields: list = field(default_factory=list)
    n: int | None = None
    tail: str = 'uniform'
    axis: int = 1
    full: tuple | None = None
    head: dict | None = None
    draws: dict | None = None

    @classmethod
    def of(cls, out: Outputs, store: Store) -> 'Layout':
        """Build the layout for the outputs of a teacher.

        Args:
            out: Outputs of any batch.
            store: How to store the outputs.
        """
        if out.logits is None:
            raise DistillError("The teacher's Outputs have no logits: there is nothing to store.")
        self, t = cls(tail=store.tail, axis=store.axis), cast(Any, out.logits)
        fields = FieldList(str(store.dtype), self.fields)
        if store.kind == 'hidden':
            if not isinstance(t, LinearLogits):
                raise DistillError(
                    "store='hidden' needs the teacher's last hidden state and its output layer, but the "
                    'teacher returned logits. A custom teacher must return Outputs(LinearLogits(...)).'
                )
            self.n, self.axis = t.n, -1
            self.head = dict(bias=t.bias is not None, cap=t.cap)
            fields.add_numbers('hidden', t.hidden.shape[1:])
        if isinstance(t, LinearLogits):
            t = torch.empty(t.shape, device='meta')
        elif isinstance(t, TopK):
            t = torch.empty(*t.ids.shape[:-1], t.n, device='meta').movedim(-1, store.axis)
        if t.dim() < 1:
            raise DistillError(
                f"The teacher's output has shape {tuple(t.shape)}: it needs a batch dimension."
            )
        if store.topk is not None and not (
            -t.dim() <= store.axis < t.dim() and store.axis % t.dim()
        ):
            raise DistillError(
                f"topk={store.topk} along axis {store.axis}: the teacher's output has shape "
                f'{tuple(t.shape)}.'
            )
        if store.size is not None:
            if min(store.size) < 1:
                raise DistillError(f'size={store.size}: must be at least one pixel.')
            if t.dim() != 4:
                raise DistillError(
                    f"size={store.size} needs maps (B, C, H, W), but the teacher's output has "
                    f'shape {tuple(t.shape)}'
                )
            self.full, t = tuple(t.shape[-2:]), t[..., : store.size[0], : store.size[1]]
        if store.kind in ('topk', 'draws'):
            *shape, self.n = t.movedim(store.axis, -1).shape[1:]
            if store.topk is not None and store.topk > self.n:
                raise DistillError(
                    f'topk={store.topk}, but the teacher has {self.n} classes (along axis '
                    f'{store.axis})'
                )
            k = min(cast(int, store.topk or store.draws), self.n)
            fields.add('ids', type_of_ids(self.n), (*shape, k))
            if store.draws is not None:
                self.draws = dict(number=store.draws, T=float(cast(float, store.T)))
                fields.add('counts', 'uint8' if store.draws < 2**8 else 'uint16', (*shape, k))
                fields.add('entropy', 'float32', (*shape, 1))
            else:
                fields.add_numbers('values', (*shape, k))
                if store.tail == 'mean' and k < self.n:
                    fields.add('rest', 'float16', (*shape, 1))
        elif store.kind == 'pca':
            refuse_components(store, t, out.logits)
            self.n, self.head = t.shape[1], dict(bias=True, cap=None)
            k = min(EXACT, self.n)
            fields.add_numbers('codes', (cast(int, store.components),))
            fields.add('ids', type_of_ids(self.n), (k,))
            fields.add_numbers('top', (k,))
        elif store.kind != 'hidden':
            fields.add_numbers('logits', t.shape[1:])
        for name, v in out.feats.items():
            if not isinstance(v, Tensor):
                raise DistillError(
                    f"Layer {name} returns a {type(v).__name__}, which can't be stored: only tensors "
                    'can.'
                )
            fields.add_numbers(f'feats:{name}', v.shape[1:])
        if out.mask is not None:
            fields.add('mask', 'float16', out.mask.shape[1:])
        return self

    @property
    def bytes(self) -> int:
        return self.fields[-1].at + self.fields[-1].bytes if self.fields else 0

    @property
    def kind(self) -> str:
        """Kind of the `Store` that this layout is for."""
        if self.draws is not None:
            return 'draws'
        named = dict(ids='topk', hidden='hidden', codes='pca')
        return named.get(self.fields[0].name, 'logits')

    @property
    def shapes_of_head(self) -> dict[str, tuple]:
        """{name: shape} of the tensors of `StoredHead`, in the order in which they are stored."""
        if self.head is None:
            return {}
        n, d = cast(int, self.n), self.fields[0].shape[-1]
        shapes: dict[str, tuple] = dict(weight=(n, d))
        if self.head['bias']:
            shapes['bias'] = (n,)
        shapes['unit'] = (d,)
        return shapes | dict(center=(d,), basis=(d, d)) if self.basis else shapes

    @property
    def head_bytes(self) -> int:
        """Size of the stored linear layer in bytes, see `StoredHead`. 0 if there is none."""
        return 4 * sum(map(prod, self.shapes_of_head.values()))

    def to_json(self) -> dict:
        return {k: v for k, v in asdict(self).items() if v is not None or k in ('n', 'full')}

    @classmethod
    def from_json(cls, d: Any) -> 'Layout':
        """Read the layout from a manifest.

        Raise a DistillError if a field or an offset differs from the layout that `of` would create.
        """
        check_json('layout', d, LAYOUT_ENTRIES)
        n, full, head, draws = (d.get(k) for k in ('n', 'full', 'head', 'draws'))
        found = [Field(**{**f, 'shape': tuple(f['shape'])}) for f in d['fields']]
        if (size := sum(f.bytes for f in found)) > MAX_BYTES:
            raise DistillError(f'layout.fields take {size} bytes: at most {MAX_BYTES} are allowed.')
        if n is None and (head or draws):
            raise DistillError('layout.head and layout.draws need layout.n.')
        if head and head['cap'] is not None and not head['cap'] > 0:
            refuse_entry('layout.head.cap', head['cap'], 'a positive number or null')
        if draws and not draws['T'] > 0:
            refuse_entry('layout.draws.T', draws['T'], 'a positive number')
        full = None if full is None else tuple(full)
        self = cls.of(*outputs_like(cls(found, n, d['tail'], d['axis'], full, head, draws)))
        for i, (a, b) in enumerate(zip_longest(found, self.fields)):
            if a != b:
                raise DistillError(
                    f'layout.fields[{i}] is {a or "missing"}: with the other entries of layout, it must '
                    f'be {b or "absent"}.'
                )
        return self

    @property
    def basis(self) -> bool:
        """True if hidden states are stored in a different basis, see `StoredHead`."""
        return self.kind == 'hidden' and self.fields[0].dtype == 'int8'

    @property
    def dense(self) -> bool:
        """True if outputs have several positions, as in a map or a sequence."""
        return len(self.fields[0].shape) > 1

    @property
    def layers(self) -> list[str]:
        """Names of the stored layers."""
        return [f.name.removeprefix('feats:') for f in self.fields if f.name.startswith('feats:')]

    def knows_ids(self, rows: np.ndarray) -> bool:
        """Return True if all class indices in the rows are valid.

        On a GPU, an invalid index would crash the process.

        Args:
            rows: Rows, (M, bytes) uint8.
        """
        ids = next((f for f in self.fields if f.name == 'ids'), None)
        if ids is None or not len(rows):
            return True
        numbers = np.ascontiguousarray(rows[:, ids.at : ids.at + ids.bytes])
        return int(numbers.view(ids.dtype.replace('int32', 'uint32')).max()) < cast(int, self.n)

    # encoding

    def encode(self, out: Outputs, head: Any = None, seeds: np.ndarray | None = None) -> np.ndarray:
        """Encode outputs to rows, (B, bytes) uint8.

        Args:
            out: Outputs of a batch of B samples.
            head: `StoredHead` of the cache, for layouts with a `head`.
            seeds: Random seed of each sample, (B,), if classes are drawn.
        """
        parts = self._tensors(out, head, seeds)
        want = {f.name: f.shape for f in self.fields}
        missing, more = sorted(set(want) - set(parts)), sorted(set(parts) - set(want))
        if missing or more:
            what = f'no {", ".join(missing)}' if missing else ', '.join(more)
            raise DistillError(
                f"The teacher's outputs have {what} in this batch, unlike in the first batch: all "
                'rows of a cache must have the same parts.'
            )
        for k, s in want.items():
            if tuple(parts[k].shape[1:]) != s:
                raise DistillError(
                    f'{k} has shape {tuple(parts[k].shape[1:])} in this batch, but {s} in the first '
                    'batch: all rows of a cache must have the same shape. Resize the inputs (or pad '
                    'texts) to one size first.'
                )
        return np.concatenate([as_bytes(parts[f.name], f.dtype) for f in self.fields], 1)

    def _tensors(self, out: Outputs, head: Any, seeds: np.ndarray | None) -> dict:
        """Return {name of a field: tensor}."""
        d: dict[str, Any] = {}
        t: Any = out.logits
        dtypes = {f.name: f.dtype for f in self.fields}
        if isinstance(t, TopK):
            d['ids'] = t.ids
            put_tensor(d, 'values', t.values.float(), dtypes)
        elif self.kind == 'hidden':
            put_tensor(d, 'hidden', head.encode(t.hidden), dtypes)
        else:
            t = as_dense(t).detach().float()
            refuse_without_classes(t, self.axis, out.mask)
            self._put_logits(d, t, head, seeds, dtypes)
        for k, v in out.feats.items():
            put_tensor(d, f'feats:{k}', v.detach().float(), dtypes)
        if out.mask is not None:
            if out.mask.isnan().any():
                raise DistillError("The teacher's mask contains nan: each position needs a number.")
            d['mask'] = out.mask
        return d

    def _put_logits(self, d: dict, t: Tensor, head: Any, seeds: Any, dtypes: dict) -> None:
        if self.kind == 'pca':
            put_tensor(d, 'codes', head.project(t).hidden, dtypes)
            top, d['ids'] = t.topk(min(EXACT, cast(int, self.n)))
            put_tensor(d, 'top', top, dtypes)
            return
        if self.draws is not None:
            d |= draw_classes(t.movedim(self.axis, -1), seeds, **self.draws)
            return
        if self.full is not None:
            if (t == -torch.inf).any():
                raise DistillError(
                    "The teacher's maps have -inf (classes that are masked out), which can't be "
                    'averaged: omit size=.'
                )
            t = F.adaptive_avg_pool2d(t, self.fields[0].shape[-2:])
        if self.n is None:
            put_tensor(d, 'logits', t, dtypes)
            return
        logp = t.movedim(self.axis, -1).log_softmax(-1)
        values, d['ids'] = logp.topk(self.fields[0].shape[-1])
        put_tensor(d, 'values', values, dtypes)
        if 'rest' in dtypes:
            d['rest'] = mean_without(logp, d['ids'])

    # decoding

    def decode(self, rows: Tensor, head: Any = None) -> Outputs:
        """Decode rows to `Outputs` in float32.

        For stored likeliest classes, hidden states and draws, the decoded `logits` are a `TopK`,
        `LinearLogits` and `Draws`.

        Args:
            rows: Rows, (B, bytes) uint8.
            head: `StoredHead` of the cache, for layouts with a `head`.
        """
        got = {f.name: f.read(rows) for f in self.fields}
        full = lambda k: from_int8(got[k], got.get(f'scale:{k}'))
        feats = {f.name[6:]: full(f.name) for f in self.fields if f.name.startswith('feats:')}
        logits: Any
        if self.kind == 'pca':
            # no other class is likelier than those that are stored exactly
            top = full('top')
            logits = head.decode(full('codes')).dense().minimum(top[:, -1:])
            logits = logits.scatter(1, got['ids'].long(), top)
        elif self.head is not None:
            logits = head.decode(full('hidden'))
        elif self.draws is not None:
            counts = got['counts'].float() / self.draws['number']
            T = self.draws['T']
            entropy, n = got['entropy'].squeeze(-1), cast(int, self.n)
            logits = Draws(got['ids'].long(), counts, entropy, n, T, self.axis)
        elif self.n is None:
            logits = full('logits')
        else:
            logits = TopK(
                got['ids'].long(), full('values'), self.n, self.tail, self.axis, got.get('rest')
            )
        if self.full is not None:
            logits = F.interpolate(logits, self.full, mode='bilinear')
        return Outputs(logits, feats, got['mask'].float() if 'mask' in got else None)


def decoded_components(layout: Layout, rows: Tensor, head: Any) -> LinearLogits:
    """Decode only the principal components of rows, without the exact logits."""
    got = {f.name: f.read(rows) for f in layout.fields[:2]}
    return head.decode(from_int8(got['codes'], got.get('scale:codes')))


def type_of_ids(n: int) -> str:
    return 'uint8' if n <= 2**8 else 'uint16' if n <= 2**16 else 'int32'


def outputs_like(layout: Layout) -> tuple[Outputs, Store]:
    """Return empty `Outputs` and a `Store` from which `Layout.of` builds this layout."""
    n, axis, full = cast(Any, layout.n), layout.axis, layout.full
    named = {f.name: f for f in layout.fields}
    common: dict[str, Any] = dict(tail=layout.tail, axis=layout.axis)
    shape, dtype = layout.fields[0].shape, layout.fields[0].dtype
    t: Any
    if layout.head is not None:
        if not shape:
            raise DistillError('layout.head needs hidden states of shape (..., width).')
    if layout.head is not None and layout.kind == 'pca':
        t, store = meta((n,)), Store('pca', dtype, components=shape[-1], **common)
    elif layout.head is not None:
        bias = meta((n,))[0] if layout.head['bias'] else None
        t = LinearLogits(meta(shape), meta((n, shape[-1]))[0], bias, layout.head['cap'])
        store = Store('hidden', dtype, **common)
    elif n is None:
        t, store = meta(shape), Store('logits', dtype, **common)
    else:
        if layout.draws is not None:
            if not shape:
                raise DistillError('layout.draws needs fields of shape (..., k).')
            store = Store('draws', draws=layout.draws['number'], T=layout.draws['T'], **common)
        elif not shape or 'values' not in named:
            raise DistillError(
                f"layout.n is {n}: it needs fields 'ids' and 'values' of shape (..., k)."
            )
        else:
            store = Store('topk', named['values'].dtype, shape[-1], **common)
        t = meta((*shape[:-1], n))
        if not -t.dim() <= axis < t.dim():
            raise DistillError(f'layout.axis is {axis}: the outputs have {t.dim()} dimensions.')
        t = t.movedim(-1, axis)
    if full is not None:
        if n is not None or len(shape) != 3:
            raise DistillError(
                f'layout.full is {[*full]}: this is only for maps (C, H, W) of all classes.'
            )
        t, store.size = meta((shape[0], *full)), shape[1:]
    feats = {k[6:]: meta(f.shape) for k, f in named.items() if k.startswith('feats:')}
    return Outputs(t, feats, meta(named['mask'].shape) if 'mask' in named else None), store


def refuse_components(store: Store, t: Tensor, logits: Any) -> None:
    """Raise a DistillError if principal components can't be used, or would not save space.

    Args:
        store: The storage format.
        t: A tensor with the shape of the logits of all classes.
        logits: The logits of the teacher.
    """
    least = CLASSES_PER_COMPONENT * cast(int, store.components)
    if t.dim() != 2 or store.axis % 2 != 1:
        what = (
            "needs one prediction for each sample, (B, classes), but the teacher's output has shape "
            f'{tuple(t.shape)}'
        )
    elif isinstance(logits, TopK):
        what = 'needs the logits of all classes, but the teacher returns only the likeliest classes'
    elif t.shape[1] < least:
        what = f'needs at least {least} classes to save space, but the teacher has {t.shape[1]}'
    else:
        return
    raise DistillError(
        f"store=dict(components={store.components}) {what}. Use store='int8' instead."
    )


def meta(shape: Sequence[int]) -> Tensor:
    """Create a meta tensor with batch size 1."""
    if prod(shape) > MAX_VALUES:
        raise DistillError(
            f'Outputs of shape {tuple(shape)} are too large: at most {MAX_VALUES} elements are '
            'allowed.'
        )
    return torch.empty(1, *shape, device='meta')


def mean_without(t: Tensor, ids: Tensor) -> Tensor:
    """Compute the mean of the finite values of the classes that are not in `ids`, (..., 1).

    The result is clamped to the range of float16.
    """
    rest = t.scatter(-1, ids, -torch.inf)
    have = rest.isfinite()
    n = have.sum(-1, keepdim=True)
    return torch.where(
        n > 0, rest.where(have, 0).sum(-1, keepdim=True) / n.clamp_min(1), -torch.inf
    ).clamp_min(-65504)


def put_tensor(d: dict, name: str, t: Tensor, dtypes: Any) -> None:
    dtype = dtypes.get(name)
    if t.isnan().any() or (t == torch.inf).any():
        raise DistillError(
            f"The teacher's {name} contain nan or inf. Find the samples that cause it."
        )
    if dtype == 'float16' and (t.isfinite() & (t.abs() > 65504)).any():
        raise DistillError(
            f"The teacher's {name} exceed 65504, the largest float16 number: use dtype='float32'."
        )
    if dtype == 'int8' and name == 'hidden':
        # each position has its own scale
        q, kept = to_int8(t.reshape(-1, t.shape[-1]), dtypes[f'scale:{name}'])
        d[name], d[f'scale:{name}'] = q.view(t.shape), kept.view(*t.shape[:-1], 2)
    elif dtype == 'int8':
        d[name], d[f'scale:{name}'] = to_int8(t, dtypes[f'scale:{name}'])
    else:
        d[name] = t


def refuse_without_classes(t: Tensor, axis: int, mask: Tensor | None) -> None:
    """Raise a DistillError if the logits of all classes at a position are -inf, which gives no
    probabilities. Positions that the mask excludes are ignored.
    """
    lost = (t.amax(axis) if -t.dim() <= axis < t.dim() else t) == -torch.inf
    if mask is not None and mask.shape == lost.shape:
        lost &= mask.to(lost.device) != 0
    if lost.any():
        raise DistillError(
            "The teacher's logits of some samples are -inf for all classes, so they have no "
            'probabilities. Find the samples that cause it.'
        )


def draw_classes(t: Tensor, seeds: np.ndarray, number: int, T: float) -> dict:
    """Draw classes with replacement from softmax(t/T), and count how often each class was drawn.

    Args:
        t: Logits, (B, ..., C).
        seeds: Random seed of each sample, (B,).
        number: Number of draws for each position.
        T: Temperature of the softmax.

    Returns:
        Dict with `ids` and `counts`, (B, ..., k), and the `entropy` of the probabilities, (B, ...,
        1). The most frequent class is first. Unused entries have a count of 0.
    """
    if t.isnan().any() or (t == torch.inf).any():
        raise DistillError(
            "The teacher's logits contain nan or inf. Find the samples that cause it."
        )
    shape, k = t.shape, min(number, t.shape[-1])
    p = (t / T).softmax(-1)
    flat = p.reshape(len(p), -1, shape[-1]).cpu()
    drawn = []
    for row, seed in zip(flat, seeds.tolist()):
        rng = torch.Generator().manual_seed(seed)
        u = torch.rand(len(row), number, generator=rng, dtype=torch.double)
        cdf = row.double().cumsum(-1)
        # subtle: scale by the total, since rounded probabilities do not sum to exactly 1
        ids = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
        drawn.append(ids.clamp_max(shape[-1] - 1))
    ids = torch.stack(drawn).sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    # index of the class among the distinct classes of its position
    run = first.long().cumsum(-1) - 1
    counts = torch.zeros_like(ids).scatter_add_(-1, run, torch.ones_like(ids))
    distinct = torch.zeros_like(ids).scatter_(-1, run, ids)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    distinct = distinct.gather(-1, order)
    out = dict(ids=distinct[..., :k], counts=counts[..., :k])
    out = {name: o.reshape(*shape[:-1], k) for name, o in out.items()}
    return out | dict(entropy=torch.special.entr(p).sum(-1, keepdim=True))


def to_int8(t: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8, with 254 steps between its smallest and largest values.

    Returns:
        (int8 tensor, tensor (B, 2) with the step size and the midpoint of each row).
    """
    if not t.isfinite().all():
        raise DistillError(
            "int8 can't store infinite logits (classes that are masked out): use float16 or float32."
        )
    flat = t.reshape(len(t), -1)
    lo, hi = flat.amin(1), flat.amax(1)
    kept = torch.stack([hi / 254 - lo / 254, hi / 2 + lo / 2], 1).to(TORCH_DTYPES[dtype])
    if not kept.isfinite().all():
        raise DistillError(
            f"int8 can't store logits from {lo.min():g} to {hi.max():g}: use dtype='float32'."
        )
    step, mid = kept.float().unbind(1)
    q = (flat - mid[:, None]) / step.clamp_min(1e-30)[:, None]
    return q.round().clamp(-127, 127).to(torch.int8).view(t.shape), kept


def from_int8(t: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return t.float()
    step, mid = scale.float().unbind(-1)
    shape = *step.shape, *[1] * (t.dim() - step.dim())
    return t.float().mul_(step.view(shape)).add_(mid.view(shape))


def as_bytes(t: Tensor, dtype: str) -> np.ndarray:
    a = t.cpu().numpy().astype(np.dtype(dtype).newbyteorder('<'), copy=False)
    return np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8)
