"The outputs of a model for a batch: logits, features, and a mask of the positions to include."

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import log
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DistillError, DistillWarning, check_choice


def as_plain(x: Any) -> Any:
    """Convert a tensor of a subclass to a plain tensor, because subclasses such as fastai's
    `TensorImage` do not support many losses.
    """
    return x.as_subclass(Tensor) if isinstance(x, Tensor) and type(x) is not Tensor else x


@dataclass
class TopK:
    """Log-probabilities of the `k` most likely of `n` classes. The option `tail` is an assumption
    about the other classes:

    - 'uniform': the remaining probability is divided equally among them;
    - 'bucket': the remaining probability is divided as in the student's prediction;
    - 'zero': they have probability 0;
    - 'mean': all of these classes have the same log-probability, the mean, which is accurate at
      high temperatures.

    Attributes:
        ids: Class indices, (B, ..., k).
        values: Log-probabilities of these classes, (B, ..., k).
        n: Number of classes.
        tail: The assumption about the other classes.
        axis: Class axis of the result of `dense`.
        rest: Mean of the log-probabilities of the other classes, (B, ..., 1). Required for 'mean'.
    """

    ids: Tensor
    values: Tensor
    n: int
    tail: str = 'uniform'
    axis: int = -1
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice('tail', self.tail, TAILS)
        if self.tail == 'mean' and self.rest is None and self.ids.shape[-1] < self.n:
            raise DistillError(
                "tail='mean' needs rest=, the mean log-probability of the classes that are not stored."
            )

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Compute logits of all `n` classes. The logits are log-probabilities, except that with
        'mean' the probabilities sum to less than 1.

        With 'bucket', the KL to the student at T=1 and its gradient are the same as if all other
        classes were merged into one class.

        Args:
            student: Student logits. Required for 'bucket'.
        """
        v, k = self.values.float(), self.ids.shape[-1]
        kept = v.logsumexp(-1, keepdim=True)
        if k == self.n or self.tail == 'zero':
            v, rest = v - kept, v.new_full((), -torch.inf)
        elif self.tail == 'mean':
            rest = as_plain(self.rest).float()
        # subtle: due to rounding errors, the k probabilities may sum to more than 1, but the other
        # classes need a positive probability
        else:
            rest = torch.log(-torch.expm1(kept.clamp(max=-1e-7)))
        out = self._rest(rest, student, v).scatter(-1, self.ids, v)
        return out.movedim(-1, self.axis)

    def _rest(self, rest: Tensor, student: Tensor | None, v: Tensor) -> Tensor:
        """Compute a tensor with all `n` classes that contains the log-probabilities of the classes
        that are not stored.
        """
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
                f"The student's logits have shape {tuple(student.shape)}, but the stored logits "
                f'have {self.n} classes along axis {self.axis}.'
            )
        return rest + s.scatter(-1, self.ids, -torch.inf).log_softmax(-1)

    def reorder(self, order: Tensor) -> 'TopK':
        """Return the same logits with the classes in a different order.

        Args:
            order: For each position in the new order, the index of the stored class, (n,).
        """
        place = order.argsort()  # the inverse permutation
        return replace(self, ids=place.to(self.ids.device)[self.ids])


TAILS = 'mean', 'uniform', 'zero', 'bucket'


@dataclass
class LinearLogits:
    """Logits in factored form, as the last hidden state of a model and its output layer. The logits
    are `hidden @ weight.T + bias`. With a `cap`, the logits are soft-capped as `cap * tanh(logits /
    cap)`. The class axis is the last axis.

    Losses that compare each position separately compute the logits in chunks, so that the logits of
    all positions are never in memory at the same time.

    Attributes:
        hidden: Hidden states, (B, ..., D).
        weight: Weight of the output layer, (C, D).
        bias: Bias of the output layer, (C,), or None.
        cap: Largest absolute value of soft-capped logits. None if logits are not capped.
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
            order: For each position in the new order, the index of the stored class, (n,).
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

    def map_samples(self, fn: Callable) -> 'LinearLogits':
        """Apply `fn` to each tensor whose first dimension is the samples."""
        return replace(self, hidden=fn(self.hidden))


def as_dense(t: Any) -> Any:
    """Compute the logits of `LinearLogits`. Anything else is returned as it is."""
    return t.dense() if isinstance(t, LinearLogits) else t


@dataclass
class Draws:
    """Classes sampled with replacement from a teacher's probabilities softmax(t/T), called draws
    (Sparse Logit Sampling, ACL 2025, arXiv:2503.16870).

    The relative frequencies of the classes are an unbiased estimate of the probabilities. Losses
    that are linear in the teacher's probabilities, and their gradients, are then unbiased too. The
    only such losses are `kl` and `soft_ce` at the temperature of the draws. All other losses would
    be biased, so they raise an error.

    Attributes:
        ids: Class indices, (B, ..., k).
        freqs: Relative frequencies of the classes, (B, ..., k). Unused entries are 0.
        entropy: Entropy of the teacher's probabilities, (B, ...).
        n: Number of classes.
        T: Temperature of the probabilities.
        axis: Class axis of the original logits.
    """

    ids: Tensor
    freqs: Tensor
    entropy: Tensor
    n: int
    T: float = 1.0
    axis: int = -1

    @property
    def shape(self) -> torch.Size:
        """Shape of the original logits."""
        last = torch.empty((*self.ids.shape[:-1], self.n), device='meta')
        return last.movedim(-1, self.axis).shape

    def dim(self) -> int:
        return self.ids.dim()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def dense(self, student: Tensor | None = None) -> Tensor:
        """Raise a DistillError, because logits computed from draws would be biased."""
        raise DistillError(self.refusal('This loss'))

    def refusal(self, name: str, T: float | None = None) -> str:
        """Return an error message that says why a loss can't be computed from draws.

        Args:
            name: Name of the loss in the message.
            T: Temperature of the loss, if it differs from the temperature of the draws. None if the
                loss is not linear in the teacher's probabilities.
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

    def refusal_to_fade(self, name: str) -> str:
        """Return an error message that says why a loss with `fade=` can't be computed from draws."""
        return (
            f'{name} has fade=, which needs the probabilities of all classes, but the cache '
            'contains draws. Use grad_ratio= without fade=, or store the outputs in a different '
            'way (store=).'
        )

    def reorder(self, order: Tensor) -> 'Draws':
        """Return the same draws with the classes in a different order.

        Args:
            order: For each position in the new order, the index of the stored class, (n,).
        """
        place = order.argsort()  # the inverse permutation
        return replace(self, ids=place.to(self.ids.device)[self.ids])

    def map(self, fn: Callable) -> 'Draws':
        """Apply `fn` to each tensor."""
        return replace(self, ids=fn(self.ids), freqs=fn(self.freqs), entropy=fn(self.entropy))

    map_samples = map  # all tensors have samples


@dataclass
class Outputs:
    """Outputs of a model for one batch: logits, features of named layers, and a mask of the
    positions to include.

    Attributes:
        logits: Logits (B, C), (B, C, H, W) or (B, L, V), or any shape for regression. Stored
            outputs may be `TopK`, `LinearLogits` or `Draws` instead.
        feats: {dotted layer name: output of the layer}.
        mask: True, or a positive weight, for positions to include in the loss. Same shape as the
            logits without the class axis.
        classes: For each logit of a teacher, the corresponding class of the student, or a list of
            classes. None if both models have the same classes.
        lost: Measured loss of precision due to storing, as a list of dicts (see
            `fastdistill.cache.store_choice`). None if unknown.
    """

    logits: Tensor | TopK | LinearLogits | Draws | None = None
    feats: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    classes: list | None = None
    lost: list | None = None

    @classmethod
    def of(cls, raw: Any, feats: dict | None = None, output: Any = None) -> 'Outputs':
        """Convert the return value of a model to `Outputs`.

        Args:
            raw: Return value of a model: a tensor, a NumPy array or list of numbers, a tuple whose
                first item is a tensor, or a dict or ModelOutput with `logits`.
            output: Selects the output that contains the logits: a name, an index, or a function of
                `raw`. None for the defaults above.
        """
        if output is not None:
            raw = named_output(raw, output)
        if isinstance(raw, Outputs):
            return raw
        return cls(as_plain(_logits(raw)), feats or {})


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
    if (numbers := tensor_of_numbers(raw)) is not None:
        return numbers.float()
    if raw is None:
        raise DistillError(
            'The model or function returned None instead of its outputs: is a `return` missing?'
        )
    have = f' with the keys {", ".join(map(str, raw))}' if isinstance(raw, dict) else ''
    raise DistillError(
        f'The model returned a {type(raw).__name__}{have}, without logits. It must be a tensor, a '
        "tuple that begins with one, or a dict with 'logits' or 'out'. Name a different output "
        'with output=, or wrap the model in a function that returns one of these.'
    )


def tensor_of_numbers(o: Any) -> Tensor | None:
    """Convert a NumPy array, or a list of numbers, arrays or tensors, to a tensor. Fractional
    numbers become float32.

    Return None for anything else, such as lists of different lengths.
    """
    if not isinstance(o, (np.ndarray, list)) or not len(o):
        return None
    try:
        if all(isinstance(v, Tensor) for v in o):
            return torch.stack([as_plain(v) for v in o])
        a = np.asarray(o)
    except (ValueError, TypeError, RuntimeError):
        return None
    if a.dtype.kind not in 'fiub':
        return None
    return torch.from_numpy(a.astype(np.float32 if a.dtype.kind == 'f' else np.int64))


def parts_of(raw: Any) -> dict:
    """Return a dict with all outputs of a model. Each output is listed by index and, if it has a
    name, by name.
    """
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
    """Raise a DistillError if no outputs can have this class axis. The first batch shows whether a
    model's outputs really have this axis.
    """
    whole = isinstance(axis, Integral) and not isinstance(axis, bool)
    if axis is None or whole and 1 <= abs(axis) <= MAX_AXIS:
        return
    batch = ' (axis 0 is the batch axis)' if whole and axis == 0 else ''
    raise DistillError(
        f'axis={axis!r}: the class axis must be a whole number from 1 to {MAX_AXIS}, or, counted '
        f'from the end, from -1 to -{MAX_AXIS}{batch}'
    )


def named_output(raw: Any, output: Any) -> Any:
    """Return the output selected by a name, an index or a function."""
    if callable(output):
        return output(raw)
    parts = parts_of(raw)
    place = output
    if isinstance(output, int) and output < 0:
        place += sum(isinstance(k, int) for k in parts)
    if place in parts:
        return parts[place]
    one = isinstance(raw, Tensor)
    have = 'one tensor' if one else f'a {type(raw).__name__} with {described(parts)}'
    raise DistillError(
        f'output={output!r}, but the model returned {have}. Pass the name or the index of one of '
        'these, or a function that computes the logits from what the model returned.'
    )


def described(parts: dict) -> str:
    shape = lambda v: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
    return ', '.join(f'{k!r} {shape(v)}' for k, v in parts.items()) or 'nothing in it'


def warn_of_several(raw: Any, model: Any, who: str, found: dict) -> None:
    """Warn once if the model returned several tensors that could be logits. The first of them is
    used.

    Args:
        raw: Return value of the model.
        who: Name of the model in the message.
        found: Dict in which this function records that the check was done.
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
        f'{who} returns several tensors that could be distilled: {several}. The first is used. '
        'Select one with output=, an index or a function of what the model returns: output=0 '
        'confirms the first.',
        DistillWarning,
        stacklevel=4,
    )


def is_fastai_text(model: Any) -> bool:
    """Return True for a recurrent text model of fastai. Such a model returns (logits, raw outputs,
    outputs after dropout).
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
