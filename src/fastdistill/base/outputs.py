"What a model returns for a batch: logits, features, and which positions count."

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log
from numbers import Integral

import torch
from torch import Tensor

from .errors import DistillError, DistillWarning

__all__ = [
    'DistillError',
    'DistillWarning',
    'Outputs',
    'TopK',
    'as_plain',
    'check_axis',
    'check_output',
    'map_tensors',
    'tensors_in',
    'warn_of_first',
    'warn_of_several',
]


def as_plain(x):
    """A tensor without its subclass: fastai's `TensorImage` and others refuse many losses."""
    return x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x


@dataclass
class TopK:
    """The logits of a teacher's `k` likeliest of `n` classes, and an assumption about the other
    classes, `tail`:

    - 'uniform': they share the remaining probability equally;
    - 'bucket': they share it as the student's prediction does;
    - 'zero': they have probability 0;
    - 'mean': each has the mean of their log-probabilities, which stays close to the truth at high temperatures.

    Attributes:
        ids: (B, ..., k) class numbers.
        values: (B, ..., k) their log-probabilities.
        n: Number of classes.
        tail: The assumption about the other classes.
        axis: Where `dense` puts the class axis.
        rest: (B, ..., 1) mean of the others' log-probabilities, for 'mean'.
    """

    ids: Tensor
    values: Tensor
    n: int
    tail: str = 'uniform'
    axis: int = -1
    rest: Tensor | None = None

    def __post_init__(self):
        if self.tail not in TAILS:
            raise DistillError(f'tail={self.tail!r}: must be one of {", ".join(map(repr, TAILS))}')
        if self.tail == 'mean' and self.rest is None and self.ids.shape[-1] < self.n:
            raise DistillError(
                "tail='mean' needs rest=, the mean log-probability of the classes that are not stored."
            )

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Logits of all `n` classes. They are log-probabilities, except with 'mean', where the
        probabilities add up to less than 1.

        With 'bucket', the KL to the student at T=1 and its gradient are those over k+1 outcomes:
        the k classes, and all other classes as one.

        Args:
            student: The student's logits, which 'bucket' needs.
        """
        v, k = self.values.float(), self.ids.shape[-1]
        kept = v.logsumexp(-1, keepdim=True)
        if k == self.n or self.tail == 'zero':
            v, rest = v - kept, v.new_full((), -torch.inf)
        elif self.tail == 'mean':
            rest = self.rest.float()
        # subtle: by rounding the k classes may sum to more than 1, but the others must have more than 0
        else:
            rest = torch.log(-torch.expm1(kept.clamp(max=-1e-7)))
        out = self._rest(rest, student, v).scatter(-1, self.ids, v)
        return out.movedim(-1, self.axis)

    def _rest(self, rest, student, v):
        """Log-probabilities of the other classes, for all `n` classes."""
        shape = *v.shape[:-1], self.n
        if self.tail == 'mean':
            return rest.expand(shape)
        if self.tail != 'bucket' or rest.dim() == 0:
            return (rest - log(max(self.n - self.ids.shape[-1], 1))).expand(shape)
        if student is None:
            raise DistillError(
                "tail='bucket' needs the student's logits, as in dense(student): the other classes "
                "share their probability as the student's prediction does."
            )
        s = as_plain(student.detach()).float().movedim(self.axis, -1)
        if s.shape != shape:
            raise DistillError(
                f"The student's logits have shape {tuple(student.shape)}, the stored ones {self.n} "
                f'classes along axis {self.axis}.'
            )
        return rest + s.scatter(-1, self.ids, -torch.inf).log_softmax(-1)

    def reorder(self, order: Tensor) -> 'TopK':
        """The same logits with the classes in another order.

        Args:
            order: (n,) the stored class at each place of the new order.
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return replace(self, ids=place.to(self.ids.device)[self.ids])


TAILS = 'mean', 'uniform', 'zero', 'bucket'


@dataclass
class Outputs:
    """The outputs of a model for one batch: logits, features of named layers, and which positions
    count.

    Attributes:
        logits: (B, C), (B, C, H, W), (B, L, V), or any shape for regression.
        feats: Dotted layer name -> that layer's output.
        mask: Logits' shape without the class axis: True, or a weight, where a position counts.
        classes: Of a teacher: the student's class, or list of classes, of each logit; None: the
            same ones.
    """

    logits: Tensor | TopK | None = None
    feats: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    classes: list | None = None

    @classmethod
    def of(
        cls, raw, feats: dict | None = None, mask: Tensor | None = None, output=None
    ) -> 'Outputs':
        """`raw`, as a model returned it, as `Outputs`.

        Args:
            raw: What a model returned: a tensor, a tuple whose first item is one, a dict or
                ModelOutput with `logits`
            output: The output with the logits: a name, an index, or a function of `raw`; None:
                as above.
        """
        if output is not None:
            raw = named_output(raw, output)
        if isinstance(raw, Outputs):
            return raw
        return cls(as_plain(_logits(raw)), feats or {}, mask)


def _logits(raw):
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, dict) and 'logits' in raw:
        return raw['logits']  # Hugging Face's ModelOutput is a dict
    if hasattr(raw, 'logits'):
        return raw.logits
    if isinstance(raw, dict) and 'out' in raw:
        return raw['out']  # torchvision's segmentation models
    if isinstance(raw, (tuple, list)) and len(raw) and isinstance(raw[0], Tensor):
        return raw[0]  # fastai's RNNs
    have = f' with the keys {", ".join(map(str, raw))}' if isinstance(raw, dict) else ''
    raise DistillError(
        f'The model returned a {type(raw).__name__}{have}, which holds no logits. It must be a '
        "tensor, a tuple that begins with one, or a dict with 'logits' or 'out'. Name another output "
        'with output=, or wrap the model in a function that returns one of these.'
    )


def parts_of(raw):
    """Name and index of each output that the model returned -> the output."""
    if isinstance(raw, Tensor):
        return dict.fromkeys((0, 'logits', 'out'), raw)
    if isinstance(raw, (tuple, list)):
        named = dict(zip(getattr(raw, '_fields', ()), raw))
    else:
        named = dict(raw) if isinstance(raw, Mapping) else dict(getattr(raw, '__dict__', {}))
    return {**dict(enumerate(raw if isinstance(raw, (tuple, list)) else named.values())), **named}


def check_output(output):
    if output is None or isinstance(output, (str, int)) or callable(output):
        return
    raise DistillError(
        f'output={output!r}: must be the name or the index of an output, or a function of what '
        'the model returned'
    )


MAX_AXIS = 8


def check_axis(axis):
    """Refuse a class axis that no outputs have. Whether these outputs have it, the first batch
    shows.
    """
    whole = isinstance(axis, Integral) and not isinstance(axis, bool)
    if axis is None or whole and 1 <= abs(axis) <= MAX_AXIS:
        return
    batch = ' (axis 0 is that of the samples)' if whole and axis == 0 else ''
    raise DistillError(
        f'axis={axis!r}: the class axis is a whole number from 1 to {MAX_AXIS}, or, counted from the '
        f'end, from -1 to -{MAX_AXIS}{batch}'
    )


def named_output(raw, output):
    """The output that a name, an index or a function picks from several."""
    if callable(output):
        return output(raw)
    parts = parts_of(raw)
    place = (
        output + sum(isinstance(k, int) for k in parts)
        if isinstance(output, int) and output < 0
        else output
    )
    if place in parts:
        return parts[place]
    have = (
        'one tensor'
        if isinstance(raw, Tensor)
        else f'a {type(raw).__name__} with {described(parts)}'
    )
    raise DistillError(
        f'output={output!r}, but the model returned {have}. Give the name or the index of one of these, '
        'or a function that computes the logits from what the model returned.'
    )


def described(parts):
    shape = lambda v: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
    return ', '.join(f'{k!r} {shape(v)}' for k, v in parts.items()) or 'nothing in it'


def warn_of_several(raw, model, who: str, found: dict):
    """Warn once if the model returned several tensors that could be its logits. The first is
    distilled.

    Args:
        raw: What the model returned.
        who: The model, in the message.
        found: Remembers that this was checked.
    """
    if not isinstance(raw, (tuple, list)) or not len(raw) or 'several' in found:
        return
    found['several'] = True
    if hasattr(raw, 'logits') or not isinstance(raw[0], Tensor) or is_fastai_text(model):
        return
    tensors = {i: o for i, o in enumerate(raw) if isinstance(o, Tensor)}
    alike = {i: o for i, o in tensors.items() if o.is_floating_point() and o.dim() == raw[0].dim()}
    if len(alike) > 1:
        warn_of_first(who, described(alike))


def warn_of_first(who, several):
    warnings.warn(
        f'{who} returns several tensors that could be distilled: {several}. The first is used. Name one with '
        'output=, an index or a function of what the model returns: output=0 confirms the first.',
        DistillWarning,
        stacklevel=4,
    )


def is_fastai_text(model):
    """Is it a recurrent model of fastai, which returns (logits, raw outputs, outputs after
    dropout)?
    """
    return any(
        type(m).__module__.startswith('fastai.text.') for m in getattr(model, 'modules', list)()
    )


def tensors_in(o):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(o, Tensor):
        yield o
    elif isinstance(o, (tuple, list, Mapping)):
        for v in o.values() if isinstance(o, Mapping) else o:
            yield from tensors_in(v)


def map_tensors(o, fn):
    """Nested tuples, lists and dicts with `fn` applied to each tensor; other values stay."""
    if isinstance(o, Tensor):
        return fn(o)
    if isinstance(o, Mapping):
        return {k: map_tensors(v, fn) for k, v in o.items()}
    if isinstance(o, tuple) and hasattr(o, '_fields'):
        return type(o)(*(map_tensors(v, fn) for v in o))
    return type(o)(map_tensors(v, fn) for v in o) if type(o) in (tuple, list) else o
