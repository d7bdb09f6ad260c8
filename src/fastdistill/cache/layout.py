"One row of a cache: a teacher's outputs for one view of one sample, in a fixed number of bytes."

from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.outputs import TAILS, DistillError, Outputs, TopK
from .entries import json_list, json_object, json_text, whole_number

__all__ = ['Field', 'Layout', 'Wish']

DTYPES = 'float32', 'float16', 'int8'
# limits for a manifest, so that a damaged one can't fill the memory
MAX_BYTES, MAX_VALUES, MAX_FIELDS, MAX_DIMS, MAX_CLASSES = 2**31, 2**33, 1000, 8, 2**24


@dataclass
class Wish:
    """Options for storing outputs.

    Attributes:
        topk: Number of classes to store. None for all.
        tail: What `TopK` assumes of the classes that are not stored.
        axis: Class axis.
        size: Height and width to which maps of logits are reduced. None for no reduction.
    """

    dtype: str = 'float16'
    topk: int | None = None
    tail: str = 'mean'
    axis: int = 1
    size: tuple | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise DistillError(
                f'dtype={self.dtype!r}: must be one of {", ".join(map(repr, DTYPES))}'
            )
        if self.tail not in TAILS:
            raise DistillError(f'tail={self.tail!r}: must be one of {", ".join(map(repr, TAILS))}')
        if self.topk is not None and self.topk < 1:
            raise DistillError(f'topk={self.topk}: must be at least 1, or None for all classes')
        if isinstance(self.size, int):
            self.size = self.size, self.size
        self.size = None if self.size is None else tuple(self.size)


@dataclass
class Field:
    """A tensor in a row: its `name`, `shape` without the batch, `dtype`, and the byte at which it
    begins.

    Attributes:
        dtype: NumPy's name of the type, little-endian.
    """

    name: str
    dtype: str
    shape: tuple
    at: int = 0

    def __str__(self):
        return f'{self.name!r} of {self.dtype} {list(self.shape)} at byte {self.at}'

    @classmethod
    def from_json(cls, name, d):
        d = json_object(name, d, ('name', 'dtype', 'shape', 'at'), ())
        shape = json_list(f'{name}.shape', d['shape'], 0, MAX_DIMS)
        for i, o in enumerate(shape):
            whole_number(f'{name}.shape[{i}]', o, 1, MAX_BYTES)
        dtype = json_text(f'{name}.dtype', d['dtype'], TORCH_DTYPES)
        at = whole_number(f'{name}.at', d['at'], 0, MAX_BYTES)
        return cls(json_text(f'{name}.name', d['name']), dtype, tuple(shape), at)

    @property
    def bytes(self):
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, rows: Tensor):
        # subtle: always a copy, because a view with a larger type can't begin at an odd byte
        part = rows[:, self.at : self.at + self.bytes].clone(memory_format=torch.contiguous_format)
        # PyTorch has few operations for unsigned 16-bit numbers, so they are read as signed and corrected
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


@dataclass
class Layout:
    """The fields of a row. Encodes `Outputs` to rows and decodes rows to `Outputs`.

    Attributes:
        n: Number of all classes, with top-k.
        full: Original height and width of maps of logits that are stored smaller.
    """

    fields: list = field(default_factory=list)
    n: int | None = None
    tail: str = 'uniform'
    axis: int = 1
    full: tuple | None = None

    @classmethod
    def of(cls, out: Outputs, wish: Wish) -> 'Layout':
        """Build the layout for outputs like these.

        Args:
            out: Outputs of any batch.
            wish: How to store them.
        """
        if out.logits is None:
            raise DistillError("The teacher's Outputs have no logits: there is nothing to store.")
        self, t = cls(tail=wish.tail, axis=wish.axis), out.logits
        if isinstance(t, TopK):
            t = meta_like(t, wish.axis)
        if t.dim() < 1:
            raise DistillError(
                f"The teacher's output has shape {tuple(t.shape)}: it needs a batch dimension."
            )
        if wish.topk is not None and not (-t.dim() <= wish.axis < t.dim() and wish.axis % t.dim()):
            raise DistillError(
                f"topk={wish.topk} along axis {wish.axis}: the teacher's output has shape "
                f'{tuple(t.shape)}.'
            )
        if wish.size is not None:
            if wish.topk is not None:
                raise DistillError(
                    "size= and topk= can't be combined: maps are stored either smaller or with "
                    'few classes.'
                )
            if min(wish.size) < 1:
                raise DistillError(f'size={wish.size}: must be at least one pixel.')
            if t.dim() != 4:
                raise DistillError(
                    f"size={wish.size} needs maps (B, C, H, W), but the teacher's output has "
                    f'shape {tuple(t.shape)}'
                )
            self.full, t = tuple(t.shape[-2:]), t[..., : wish.size[0], : wish.size[1]]
        if wish.topk is None:
            self._add('logits', wish.dtype, t.shape[1:])
        else:
            self._add_topk(t.movedim(wish.axis, -1), wish)
        for k, v in out.feats.items():
            if not isinstance(v, Tensor):
                raise DistillError(
                    f"Layer {k} returns a {type(v).__name__} instead of a tensor, which can't be "
                    'stored.'
                )
            self._add(f'feats:{k}', wish.dtype, v.shape[1:])
        if out.mask is not None:
            self._add('mask', 'float16', out.mask.shape[1:])
        return self

    def _add_topk(self, t, wish):
        self.n = t.shape[-1]
        if wish.topk > self.n:
            raise DistillError(
                f'topk={wish.topk}, but the teacher has {self.n} classes (along axis {wish.axis})'
            )
        shape = *t.shape[1:-1], wish.topk
        self._field(
            'ids', 'uint8' if self.n <= 2**8 else 'uint16' if self.n <= 2**16 else 'int32', shape
        )
        self._add('values', wish.dtype, shape)
        if wish.tail == 'mean' and wish.topk < self.n:
            self._field('rest', 'float16', (*shape[:-1], 1))

    def _add(self, name, dtype, shape):
        self._field(name, dtype, tuple(shape))
        # log-probabilities fit into float16, other numbers may be larger
        if dtype == 'int8':
            self._field(f'scale:{name}', 'float16' if name == 'values' else 'float32', (2,))

    def _field(self, name, dtype, shape):
        self.fields.append(Field(name, dtype, tuple(shape), self.bytes))

    @property
    def bytes(self):
        return self.fields[-1].at + self.fields[-1].bytes if self.fields else 0

    def to_json(self):
        return asdict(self)

    @classmethod
    def from_json(cls, d):
        """Read the layout of a manifest. It must equal the one that `of` builds for such outputs,
        including all offsets.
        """
        json_object('layout', d, ('fields', 'n', 'tail', 'axis', 'full'), ())
        n = None if d['n'] is None else whole_number('layout.n', d['n'], 1, MAX_CLASSES)
        full = None if d['full'] is None else json_list('layout.full', d['full'], 2, 2)
        for o in full or ():
            whole_number('layout.full', o, 1, MAX_BYTES)
        tail = json_text('layout.tail', d['tail'], TAILS)
        axis = whole_number('layout.axis', d['axis'], -MAX_DIMS, MAX_DIMS)
        found = json_list('layout.fields', d['fields'], 1, MAX_FIELDS)
        found = [Field.from_json(f'layout.fields[{i}]', f) for i, f in enumerate(found)]
        if (size := sum(f.bytes for f in found)) > MAX_BYTES:
            raise DistillError(f'layout.fields take {size} bytes: at most {MAX_BYTES} are allowed.')
        self = cls.of(*outputs_like(found, n, tail, axis, full))
        for i, (a, b) in enumerate(zip_longest(found, self.fields)):
            if a != b:
                raise DistillError(
                    f'layout.fields[{i}] is {a or "missing"}: with the other entries of layout, it must '
                    f'be {b or "absent"}.'
                )
        return self

    @property
    def dense(self):
        "True if rows hold a map or a sequence, with values for each position of the input."
        f = self.fields[0]
        return len(f.shape) > 1

    @property
    def layers(self):
        """Names of the stored layers."""
        return [f.name.removeprefix('feats:') for f in self.fields if f.name.startswith('feats:')]

    def knows_ids(self, rows) -> bool:
        """Return True if all class numbers are below the number of classes. On a GPU, a larger one
        would end the process.

        Args:
            rows: Rows, (M, bytes) uint8.
        """
        if self.n is None or not len(rows):
            return True
        ids = self.fields[0]
        return (
            int(
                np.ascontiguousarray(rows[:, : ids.bytes])
                .view(ids.dtype.replace('int32', 'uint32'))
                .max()
            )
            < self.n
        )

    # writing

    def encode(self, out: Outputs) -> np.ndarray:
        """(B, bytes) uint8.

        Args:
            out: Outputs of a batch of B samples.
        """
        parts = self._tensors(out)
        want = {f.name: f.shape for f in self.fields}
        if missing := sorted(set(want) - set(parts)):
            raise DistillError(
                f"The teacher's outputs have no {', '.join(missing)} in this batch, unlike in the "
                'first batch: all rows of a cache need the same parts.'
            )
        if more := sorted(set(parts) - set(want)):
            raise DistillError(
                f"The teacher's outputs have {', '.join(more)} in this batch, unlike in the first "
                'batch: all rows of a cache need the same parts.'
            )
        for k, s in want.items():
            if tuple(parts[k].shape[1:]) != s:
                raise DistillError(
                    f'{k} has shape {tuple(parts[k].shape[1:])} in this batch, but {s} in the first '
                    'one: all rows of a cache need the same shape. Resize the inputs (or pad texts) '
                    'to one size first.'
                )
        return np.concatenate([as_bytes(parts[f.name], f.dtype) for f in self.fields], 1)

    def _tensors(self, out):
        d, t = {}, out.logits
        dtypes = {f.name: f.dtype for f in self.fields}
        if isinstance(t, TopK):
            return self._tensors_of_likeliest(out, dtypes)
        t = t.detach().float()
        if self.full is not None:
            t = F.adaptive_avg_pool2d(t, self.fields[0].shape[-2:])
        if self.n is None:
            put_tensor(d, 'logits', t, dtypes)
        else:
            k = self.fields[0].shape[-1]
            logp = t.movedim(self.axis, -1).log_softmax(-1)
            values, d['ids'] = logp.topk(k)
            put_tensor(d, 'values', values, dtypes)
            if 'rest' in dtypes:
                d['rest'] = mean_without(logp, d['ids'])
        for k, v in out.feats.items():
            put_tensor(d, f'feats:{k}', v.detach().float(), dtypes)
        if out.mask is not None:
            d['mask'] = out.mask
        return d

    def _tensors_of_likeliest(self, out, dtypes):
        """Return the tensors of outputs that already hold only the most likely classes."""
        d = dict(ids=out.logits.ids)
        put_tensor(d, 'values', out.logits.values.float(), dtypes)
        if out.mask is not None:
            d['mask'] = out.mask
        return d

    # reading

    def decode(self, rows: Tensor) -> Outputs:
        """Decode rows to `Outputs` in float32. With top-k, `logits` are a `TopK`.

        Args:
            rows: Rows, (B, bytes) uint8.
        """
        got = {f.name: f.read(rows) for f in self.fields}
        full = lambda k: from_int8(got[k], got.get(f'scale:{k}'))
        feats = {f.name[6:]: full(f.name) for f in self.fields if f.name.startswith('feats:')}
        if self.n is None:
            logits = full('logits')
        else:
            logits = TopK(
                got['ids'].long(), full('values'), self.n, self.tail, self.axis, got.get('rest')
            )
        if self.full is not None:
            logits = F.interpolate(logits, self.full, mode='bilinear')
        return Outputs(logits, feats, got['mask'].float() if 'mask' in got else None)


def outputs_like(fields, n, tail, axis, full):
    """Build empty `Outputs`, and the `Wish` that stores them in such fields."""
    shape, named = fields[0].shape, {f.name: f for f in fields}
    if n is None:
        t, wish = meta(shape), Wish(fields[0].dtype, None, tail, axis)
    else:
        if not shape or 'values' not in named:
            raise DistillError(
                f"layout.n is {n}: it needs fields 'ids' and 'values' of shape (..., k)."
            )
        t, wish = meta((*shape[:-1], n)), Wish(named['values'].dtype, shape[-1], tail, axis)
        if not -t.dim() <= axis < t.dim():
            raise DistillError(f'layout.axis is {axis}: the outputs have {t.dim()} dimensions.')
        t = t.movedim(-1, axis)
    if full is not None:
        if n is not None or len(shape) != 3:
            raise DistillError(f'layout.full is {full}: it is for maps (C, H, W) of all classes.')
        t, wish.size = meta((shape[0], *full)), shape[1:]
    feats = {k[6:]: meta(f.shape) for k, f in named.items() if k.startswith('feats:')}
    return Outputs(t, feats, meta(named['mask'].shape) if 'mask' in named else None), wish


def meta_like(t, axis):
    """Create a meta tensor with the shape of the logits of all classes."""
    return torch.empty(*t.ids.shape[:-1], t.n, device='meta').movedim(-1, axis)


def meta(shape):
    """Create a meta tensor for a batch of one."""
    if prod(shape) > MAX_VALUES:
        raise DistillError(
            f'Outputs of shape {tuple(shape)} are too large: at most {MAX_VALUES} elements are '
            'allowed.'
        )
    return torch.empty(1, *shape, device='meta')


def mean_without(t, ids):
    """Compute the mean of the finite values that are not at `ids`, (..., 1), within the range of
    half precision.
    """
    rest = t.scatter(-1, ids, -torch.inf)
    have = rest.isfinite()
    n = have.sum(-1, keepdim=True)
    return torch.where(
        n > 0, rest.where(have, 0).sum(-1, keepdim=True) / n.clamp_min(1), -torch.inf
    ).clamp_min(-65504)


def put_tensor(d, name, t, dtypes):
    dtype = dtypes.get(name)
    if t.isnan().any() or (t == torch.inf).any():
        raise DistillError(
            f"The teacher's {name} contain nan or inf. Find the samples that cause it."
        )
    if dtype == 'float16' and (t.isfinite() & (t.abs() > 65504)).any():
        raise DistillError(
            f"The teacher's {name} exceed 65504, the largest number of float16: use dtype='float32'."
        )
    if dtype == 'int8':
        d[name], d[f'scale:{name}'] = to_int8(t, dtypes[f'scale:{name}'])
    else:
        d[name] = t


def to_int8(t, dtype):
    """Convert to int8 in 254 steps between a row's smallest and largest value. Return (int8 tensor,
    the row's step and middle).
    """
    if not t.isfinite().all():
        raise DistillError(
            "int8 can't hold infinite logits (classes that are masked out): use float16 or float32."
        )
    flat = t.reshape(len(t), -1)
    lo, hi = flat.amin(1), flat.amax(1)
    kept = torch.stack([hi / 254 - lo / 254, hi / 2 + lo / 2], 1).to(TORCH_DTYPES[dtype])
    if not kept.isfinite().all():
        raise DistillError(
            f"int8 can't hold logits from {lo.min():g} to {hi.max():g}: use dtype='float32'."
        )
    step, mid = kept.float().unbind(1)
    q = (flat - mid[:, None]) / step.clamp_min(1e-30)[:, None]
    return q.round().clamp(-127, 127).to(torch.int8).view(t.shape), kept


def from_int8(t, scale):
    if scale is None:
        return t.float()
    step, mid = scale.float().unbind(1)
    shape = -1, *[1] * (t.dim() - 1)
    return t.float() * step.view(shape) + mid.view(shape)


def as_bytes(t, dtype):
    a = t.cpu().numpy().astype(np.dtype(dtype).newbyteorder('<'), copy=False)
    return np.ascontiguousarray(a).reshape(len(a), -1).view(np.uint8)
