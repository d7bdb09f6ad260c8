"The outputs of a model for a batch: logits, features, and which positions count."

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import log
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .errors import DistillError, DistillWarning

__all__ = [
    'DistillError',
    'DistillWarning',
    'Draws',
    'LinearLogits',
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


def as_plain(x: Any) -> Any:
    """Return a tensor without its subclass, since fastai's `TensorImage` and others do not support
    many losses.
    """
    return x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x


@dataclass
class TopK:
    """Logits of the `k` most likely of `n` classes, with an assumption about the other classes,
    `tail`:

    - 'uniform': the remaining probability is divided equally among them;
    - 'bucket': it is divided as in the student's prediction;
    - 'zero': they have probability 0;
    - 'mean': each has the mean of their log-probabilities, which is accurate at high temperatures.

    Attributes:
        ids: Class numbers, (B, ..., k).
        values: Their log-probabilities, (B, ..., k).
        n: Number of classes.
        tail: The assumption about the other classes.
        axis: Class axis of the result of `dense`.
        rest: Mean of the log-probabilities of the other classes, (B, ..., 1), for 'mean'.
    """

    ids: Tensor
    values: Tensor
    n: int
    tail: str = 'uniform'
    axis: int = -1
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise DistillError(f'tail={self.tail!r}: must be one of {", ".join(map(repr, TAILS))}')
        if self.tail == 'mean' and self.rest is None and self.ids.shape[-1] < self.n:
            raise DistillError(
                "tail='mean' needs rest=, the mean log-probability of the classes that are not stored."
            )

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Compute logits of all `n` classes. They are log-probabilities, except with 'mean', where
        the probabilities sum to less than 1.

        With 'bucket', the KL to the student at T=1 and its gradient are those over k+1 outcomes:
        the k classes and one for all others.

        Args:
            student: The student's logits, needed for 'bucket'.
        """
        v, k = self.values.float(), self.ids.shape[-1]
        kept = v.logsumexp(-1, keepdim=True)
        if k == self.n or self.tail == 'zero':
            v, rest = v - kept, v.new_full((), -torch.inf)
        elif self.tail == 'mean':
            rest = as_plain(self.rest).float()
        # subtle: due to rounding, the k classes may sum to more than 1, but the others must have more than 0
        else:
            rest = torch.log(-torch.expm1(kept.clamp(max=-1e-7)))
        out = self._rest(rest, student, v).scatter(-1, self.ids, v)
        return out.movedim(-1, self.axis)

    def _rest(self, rest: Tensor, student: Tensor | None, v: Tensor) -> Tensor:
        """Compute the log-probabilities of the other classes, for all `n` classes."""
        shape = *v.shape[:-1], self.n
        if self.tail == 'mean':
            return rest.expand(shape)
        if self.tail != 'bucket' or rest.dim() == 0:
            return (rest - log(max(self.n - self.ids.shape[-1], 1))).expand(shape)
        if student is None:
            raise DistillError(
                "tail='bucket' needs the student's logits, as in dense(student): the probability "
                "of the other classes is divided as in the student's prediction."
            )
        s = as_plain(student.detach()).float().movedim(self.axis, -1)
        if s.shape != shape:
            raise DistillError(
                f"The student's logits have shape {tuple(student.shape)}, the stored ones {self.n} "
                f'classes along axis {self.axis}.'
            )
        return rest + s.scatter(-1, self.ids, -torch.inf).log_softmax(-1)

    def reorder(self, order: Tensor) -> 'TopK':
        """Return the same logits with the classes in a different order.

        Args:
            order: Stored class at each position of the new order, (n,).
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return replace(self, ids=place.to(self.ids.device)[self.ids])


TAILS = 'mean', 'uniform', 'zero', 'bucket'


@dataclass
class LinearLogits:
    """Logits as the last hidden state of a model and its output layer: `hidden @ weight.T + bias`,
    soft-capped as `cap * tanh(... / cap)` if there is a `cap`. The class axis is the last one.

    Losses that compare position by position compute them in chunks, so that the logits of all
    positions never exist at once.

    Attributes:
        hidden: Hidden states, (B, ..., D).
        weight: Weight of the output layer, (C, D).
        bias: Bias of the output layer, (C,), or None.
        cap: Largest absolute value of a soft-capped logit, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[1:] != self.hidden.shape[-1:]:
            raise DistillError(
                f'Hidden states of shape {tuple(self.hidden.shape)} do not fit an output layer whose '
                f'weight has shape {tuple(self.weight.shape)}: the last dimension of both must be '
                'equal.'
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise DistillError(
                f'A bias of shape {tuple(self.bias.shape)} does not fit a weight of shape '
                f'{tuple(self.weight.shape)}.'
            )

    @property
    def n(self) -> int:
        """Number of classes."""
        return len(self.weight)

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.n))

    def dim(self) -> int:
        return self.hidden.dim()

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Compute all logits."""
        z = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def reorder(self, order: Tensor) -> 'LinearLogits':
        """Return the same logits with the classes in a different order.

        Args:
            order: Stored class at each position of the new order, (n,).
        """
        order = order.to(self.weight.device)
        bias = None if self.bias is None else self.bias[order]
        return replace(self, weight=self.weight[order], bias=bias)

    def map(self, fn: Callable) -> 'LinearLogits':
        """Apply `fn` to each tensor."""
        return replace(
            self,
            hidden=fn(self.hidden),
            weight=fn(self.weight),
            bias=None if self.bias is None else fn(self.bias),
        )

    def roll(self, shift: int, dim: int = 0) -> 'LinearLogits':
        """Shift the samples (dim=0) or the classes (dim=-1), like `Tensor.roll`."""
        if dim == 0:
            return replace(self, hidden=self.hidden.roll(shift, 0))
        return self.reorder(torch.arange(self.n).roll(shift))


@dataclass
class Draws:
    """Classes drawn with replacement from a teacher's probabilities softmax(t/T) (Sparse Logit
    Sampling, ACL 2025, arXiv:2503.16870).

    Their relative frequencies are an unbiased estimate of the probabilities. So losses that are
    linear in these, `kl` and `soft_ce` at this temperature, are unbiased, and so are their
    gradients. All other losses would be biased and refuse them.

    Attributes:
        ids: Class numbers, (B, ..., k).
        freqs: Their relative frequencies, (B, ..., k). 0 in places that are not used.
        entropy: Entropy of the teacher's probabilities, (B, ...).
        n: Number of classes.
        T: Temperature of the probabilities.
        axis: Class axis of the logits that they stand for.
    """

    ids: Tensor
    freqs: Tensor
    entropy: Tensor
    n: int
    T: float = 1.0
    axis: int = -1

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits that they stand for."""
        return (
            torch.empty((*self.ids.shape[:-1], self.n), device='meta').movedim(-1, self.axis).shape
        )

    def dim(self) -> int:
        return self.ids.dim()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Raise a DistillError, since logits can't be computed from draws without a bias."""
        raise DistillError(self.refusal('This loss'))

    def refusal(self, name: str, T: float | None = None) -> str:
        """Return why a loss can't be computed.

        Args:
            name: Name of the loss in the text.
            T: Its temperature. None if the loss itself does not fit.
        """
        if T is None:
            return (
                f"{name} is not linear in the teacher's probabilities, so its estimate from stored "
                f'draws would be biased. Use kl or soft_ce at T={self.T:g}, e.g. '
                f'kd(T={self.T:g}, alpha=.5), or store the outputs in a different way (store=).'
            )
        return (
            f'The draws were made at T={self.T:g}, but {name} has T={T:g}: they are unbiased only at '
            f'the temperature at which they were drawn. Use T={self.T:g}, or store draws with '
            f"store=dict(kind='draws', T={T:g})."
        )

    def reorder(self, order: Tensor) -> 'Draws':
        """Return the same draws with the classes in a different order.

        Args:
            order: Stored class at each position of the new order, (n,).
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return replace(self, ids=place.to(self.ids.device)[self.ids])

    def map(self, fn: Callable) -> 'Draws':
        """Apply `fn` to each tensor."""
        return replace(self, ids=fn(self.ids), freqs=fn(self.freqs), entropy=fn(self.entropy))

    def roll(self, shift: int, dim: int = 0) -> 'Draws':
        """Shift the samples (dim=0) or the classes (dim=-1), like `Tensor.roll`."""
        if dim == 0:
            return self.map(lambda t: t.roll(shift, 0))
        return replace(self, ids=(self.ids + shift) % self.n)


@dataclass
class Outputs:
    """Outputs of a model for one batch: logits, features of named layers, and which positions
    count.

    Attributes:
        logits: Logits (B, C), (B, C, H, W) or (B, L, V), or any shape for regression. What a cache
            stores instead of them: `TopK`, `LinearLogits` or `Draws`.
        feats: {dotted layer name: output of the layer}.
        mask: True, or a weight, where a position counts. Shape of the logits without the class
            axis.
        classes: For a teacher, the student's class, or list of classes, of each logit. None if the
            classes are the same.
        lost: What storing lost, a list of dicts (see `fastdistill.cache.measure`). None if unknown.
    """

    logits: Tensor | TopK | LinearLogits | Draws | None = None
    feats: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    classes: list | None = None
    lost: list | None = None

    @classmethod
    def of(
        cls, raw: Any, feats: dict | None = None, mask: Tensor | None = None, output: Any = None
    ) -> 'Outputs':
        """Convert what a model returned to `Outputs`.

        Args:
            raw: What a model returned: a tensor, a tuple whose first item is one, or a dict or
                ModelOutput with `logits`.
            output: Output with the logits, as a name, an index, or a function of `raw`. None for
                the defaults above.
        """
        if output is not None:
            raw = named_output(raw, output)
        if isinstance(raw, Outputs):
            return raw
        return cls(as_plain(_logits(raw)), feats or {}, mask)


def _logits(raw: Any) -> Any:
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
        f'The model returned a {type(raw).__name__}{have}, without logits. It must be a tensor, a '
        "tuple that begins with one, or a dict with 'logits' or 'out'. Name a different output "
        'with output=, or wrap the model in a function that returns one of these.'
    )


def parts_of(raw: Any) -> dict:
    """Return {name and index: output} for each output of a model."""
    if isinstance(raw, Tensor):
        return dict.fromkeys((0, 'logits', 'out'), raw)
    if isinstance(raw, (tuple, list)):
        named = dict(zip(getattr(raw, '_fields', ()), raw))
    else:
        named = dict(raw) if isinstance(raw, Mapping) else dict(getattr(raw, '__dict__', {}))
    return {**dict(enumerate(raw if isinstance(raw, (tuple, list)) else named.values())), **named}


def check_output(output: Any) -> None:
    if output is None or isinstance(output, (str, int)) or callable(output):
        return
    raise DistillError(
        f'output={output!r}: must be the name or the index of an output, or a function of what '
        'the model returned'
    )


MAX_AXIS = 8


def check_axis(axis: Any) -> None:
    """Raise a DistillError for a class axis that no outputs can have. The first batch shows whether
    these outputs have it.
    """
    whole = isinstance(axis, Integral) and not isinstance(axis, bool)
    if axis is None or whole and 1 <= abs(axis) <= MAX_AXIS:
        return
    batch = ' (axis 0 is that of the samples)' if whole and axis == 0 else ''
    raise DistillError(
        f'axis={axis!r}: the class axis must be a whole number from 1 to {MAX_AXIS}, or, counted '
        f'from the end, from -1 to -{MAX_AXIS}{batch}'
    )


def named_output(raw: Any, output: Any) -> Any:
    """Return the output selected by a name, an index or a function."""
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
        f'output={output!r}, but the model returned {have}. Pass the name or the index of one of '
        'these, or a function that computes the logits from what the model returned.'
    )


def described(parts: dict) -> str:
    shape = lambda v: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
    return ', '.join(f'{k!r} {shape(v)}' for k, v in parts.items()) or 'nothing in it'


def warn_of_several(raw: Any, model: Any, who: str, found: dict) -> None:
    """Warn once if the model returned several tensors that could be its logits. The first is
    distilled.

    Args:
        raw: What the model returned.
        who: Name of the model in the message.
        found: Dict that stores that this was checked.
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


def warn_of_first(who: str, several: str) -> None:
    warnings.warn(
        f'{who} returns several tensors that could be distilled: {several}. The first is used. Name one with '
        'output=, an index or a function of what the model returns: output=0 confirms the first.',
        DistillWarning,
        stacklevel=4,
    )


def is_fastai_text(model: Any) -> bool:
    """Return True for a recurrent model of fastai, which returns (logits, raw outputs, outputs
    after dropout).
    """
    return any(
        type(m).__module__.startswith('fastai.text.') for m in getattr(model, 'modules', list)()
    )


def tensors_in(o: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists and dicts."""
    if isinstance(o, Tensor):
        yield o
    elif isinstance(o, (tuple, list, Mapping)):
        for v in o.values() if isinstance(o, Mapping) else o:
            yield from tensors_in(v)


def map_tensors(o: Any, fn: Callable) -> Any:
    """Apply `fn` to each tensor in nested tuples, lists and dicts. Other values are unchanged."""
    if isinstance(o, Tensor):
        return fn(o)
    if isinstance(o, Mapping):
        return {k: map_tensors(v, fn) for k, v in o.items()}
    if isinstance(o, tuple) and hasattr(o, '_fields'):
        return type(o)(*(map_tensors(v, fn) for v in o))
    return type(o)(map_tensors(v, fn) for v in o) if type(o) in (tuple, list) else o
