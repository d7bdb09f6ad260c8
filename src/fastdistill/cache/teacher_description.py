"""Describe a teacher and its data for a cache, and check that the outputs can be stored."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ..base.errors import check_whole
from ..base.outputs import DistillError, DistillWarning, Outputs, TopK, as_dense
from ..teachers.image_normalization import image_change
from ..teachers.members import known_classes
from ..teachers.model_loading import model_files
from ..teachers.teacher import Teacher, with_defaults
from .digests import fingerprint


def check_vocab(vocab: Sequence | None, n: int) -> None:
    """Raise a DistillError unless there is one name for each of the `n` classes."""
    if vocab is None:
        return
    if len(vocab) != n:
        raise DistillError(f'vocab= has {len(vocab)} names for {n} classes: pass one for each.')
    if (o := Counter(map(str, vocab)).most_common(1)[0])[1] > 1:
        raise DistillError(
            f'vocab= has the name {o[0]!r} {o[1]} times: each class needs a unique name.'
        )


def check_vocab_of_outputs(vocab: Sequence | None, run: Callable, axis: int, kind: str) -> None:
    """Check the class names of a teacher whose outputs have one logit for each class.

    Args:
        vocab: Class names, or None.
        run: See `Source`.
        axis: Class axis.
        kind: Kind of the outputs. Empty if unknown.
    """
    if vocab is not None and kind in ('', 'softmax'):
        logits = cast(Any, next(run(np.array([0]), 1)).logits)
        if isinstance(logits, TopK):
            check_vocab(vocab, logits.n)
        elif -logits.dim() <= axis < logits.dim():
            check_vocab(vocab, logits.shape[axis])


@dataclass
class Source:
    """A teacher and its data.

    Attributes:
        keys: Keys of the samples in the order of the cache, (N,) uint64.
        run: fn(tasks, bs) -> generator of `Outputs` for batches of `bs` tasks. A task is the
            integer view*N + position of the sample.
        bs: Batch size.
        teacher, transforms, root, vocab, samples, doubt: Entries of the manifest, see `Manifest`.
        files: File path of each sample, or a tuple of paths, in the order of `keys`. None if
            samples are not files.
    """

    keys: np.ndarray
    run: Callable
    bs: int
    teacher: dict
    transforms: dict
    root: str = ''
    vocab: Sequence | None = None
    samples: list | None = None
    files: list | None = None
    doubt: str = ''

    def __post_init__(self) -> None:
        check_whole('bs', self.bs)
        if self.files is not None and len(self.files) != len(self.keys):
            raise DistillError(
                f'{len(self.files)} files for {len(self.keys)} samples: pass one for each.'
            )

    def first(self, n: int, **options: Any) -> Outputs:
        """Return the outputs of the first `n` samples in one batch.

        Args:
            **options: Further arguments of `run`.
        """
        n = min(n, len(self.keys))
        with closing(self.run(np.arange(n), n, **options)) as batches:
            return next(batches)


def spread_positions(n: int, k: int = 4) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(k, n), dtype=int))


@torch.no_grad()
def outputs_of(teacher: Any, x: Any) -> Outputs:
    """Run a teacher, which may be any function, on a batch.

    Args:
        x: A tuple of inputs, or a single input.
    """
    return Outputs.of(teacher(*x) if isinstance(x, tuple) else teacher(x))


def on_axis(teacher: Any, axis: int) -> Any:
    """Return the teacher with this class axis, along which an ensemble averages probabilities.

    Raises:
        DistillError: If the teacher was created with a different class axis.
    """
    if not isinstance(teacher, Teacher) or teacher.axis == axis:
        return teacher
    if 'axis' in teacher.given:
        raise DistillError(
            f'axis={axis}, but the teacher has axis={teacher.axis}: pass axis={teacher.axis} here, too.'
        )
    return with_defaults(teacher, axis=axis)


def check_alone(run: Callable, n: int) -> None:
    """Raise a DistillError if the outputs for a sample depend on the other samples in its batch."""
    tasks = spread_positions(n, 4)
    half = tasks[::2]
    a, b = [as_dense(next(run(t, len(t))).logits) for t in (tasks, half)]
    tol = 1e-3 if a.dtype.itemsize > 2 else 0.03
    a, b = a[::2].float(), b.float()
    # `Layout` raises an error for different shapes (e.g. texts padded to a different length) and
    # nan
    if a.shape != b.shape or not a.isfinite().any():
        return
    if (far := (a - b).abs().nan_to_num().max().item()) > tol * (
        1 + a[a.isfinite()].abs().max().item()
    ):
        raise DistillError(
            f"The teacher's outputs for a sample change by {far:.3g} if other samples are in its "
            'batch: the teacher is in training mode or has a hidden state, or a batch transform '
            "uses the whole batch. Such outputs do not belong to a single sample and can't be "
            'stored. Use a live teacher.'
        )


def check_shared_keys(
    keys: np.ndarray,
    digests: Callable[[np.ndarray], Iterable],
    place: Callable[[int], str] = str,
    most: int | None = None,
) -> None:
    """Raise a DistillError if samples with different inputs have the same key.

    Such samples would share one stored output. Equal inputs may have the same key.

    Args:
        keys: Key of each sample, (N,) uint64.
        digests: fn(positions) -> digest of the input at each of these positions.
        place: fn(position) -> text that identifies the sample.
        most: Maximum number of samples to compare. If None, compare all that share a key.
    """
    order = np.argsort(keys, kind='stable')
    pairs = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    if most is not None and len(pairs):
        pairs = pairs[spread_positions(len(pairs), most)]
    at = np.union1d(pairs, pairs + 1)
    before = None
    for i, digest in zip(order[at].tolist(), digests(order[at])):
        if before is not None and keys[before[0]] == keys[i] and before[1] != digest:
            # inputs that can't be repeated can't be compared
            if next(iter(digests(np.array([i])))) != digest:
                return
            raise DistillError(
                f'Samples {place(before[0])} and {place(i)} have the same key, but different '
                'inputs, so they would share one stored output. Give each sample a unique name '
                'with keys=, such as its whole path.'
            )
        before = i, digest


def distinct_views(views: int, n: int, look: Callable) -> int:
    """Return the number of views to store.

    If all views of a sample are equal, warn and return 1. Otherwise, return the requested number.

    Args:
        views: Requested number of views.
        n: Number of samples.
        look: fn(position, view) -> value to compare, e.g. a digest of the teacher's input.
    """
    if views < 2 or views_differ(views, n, look):
        return views
    warnings.warn(
        DistillWarning(
            f'views={views}, but all views of a sample are the same: there is no random '
            'transform. One view is stored.'
        )
    )
    return 1


def views_differ(views: int, n: int, look: Callable) -> bool:
    """Return True if a sample has different views. The arguments are those of `distinct_views`."""
    # subtle: try many samples, because a transform may change only a few of them
    for i in spread_positions(n, 32).tolist():
        first = look(i, 0)
        if any(look(i, v) != first for v in range(1, min(views, 4))):
            return True
    return False


def unrepeatable(what: str, i: Any) -> str:
    return (
        f'{what} gave two different results for sample {i} with the same random seed: something in them uses '
        "a generator that can't be found (a new one for each sample, or inside a library), the clock or "
        'os.urandom, or counts its calls. Make it use random, numpy.random or torch, or use views=0.'
    )


def identity_of(teacher: Any) -> dict:
    """Return the manifest entry for a teacher: its name, options and fingerprint of the weights."""
    if (known := getattr(teacher, 'written_identity', None)) is not None:
        return known
    weights = fingerprint(*contents_of(teacher))
    return dict(name=name_of_model(teacher), weights=weights, **options_of(teacher))


def contents_of(teacher: Any) -> list:
    """Return what identifies the model, for `fingerprint`: its parameters, its files or its code. For
    an ensemble, return the contents of all members, and the weights of the average.
    """
    if members := getattr(teacher, 'members', None):
        return [o for m in members for o in contents_of(m)] + [str(teacher.weights)]
    if (module := getattr(teacher, 'module', None)) is not None:
        return [module.state_dict()]
    if path := getattr(teacher, 'path', None):
        return [p.read_bytes() for p in model_files(path)]
    fn = getattr(teacher, 'model', teacher)
    if own := getattr(fn, 'identity', None):
        return [own]
    try:
        text = inspect.getsource(fn if inspect.isroutine(fn) else type(fn))
    except (TypeError, OSError):
        text = ''
    warnings.warn(
        DistillWarning(
            f"The weights of {name_of_model(teacher)} can't be read. The teacher is identified only "
            'by its code. If there is a model, pass Teacher(model).'
        )
    )
    return [text]


def name_of_model(teacher: Any) -> str:
    name = getattr(teacher, 'name', None) or getattr(teacher, '__name__', None)
    return name or type(teacher).__name__


def options_of(teacher: Any) -> dict:
    """Return the options of a teacher. For an ensemble, include the options of its members."""
    if getattr(teacher, 'combine', None) == 'sample':
        raise DistillError(
            "combine='sample' draws a teacher for each batch, but a cache has one output for each "
            "sample: use combine='probs'."
        )
    out = {
        k: str(getattr(teacher, k))
        for k in ('layers', 'mode', 'size', 'combine', 'kind', 'axis', 'select')
        if hasattr(teacher, k)
    }
    if (output := getattr(teacher, 'output', None)) is not None:
        out['output'] = str(getattr(output, '__qualname__', output))
    for k in ('inputs', 'items'):
        if (fn := getattr(teacher, k, None)) is not None:
            out[k] = str(getattr(fn, '__qualname__', type(fn)))
    if isinstance(teacher, Teacher):
        # a different precision gives different numbers
        own: dict[str, Any] = dict(
            classes=known_classes(teacher), precision=teacher.runner.half or None
        )
        out |= {k: v for k, v in own.items() if v is not None}
    if getattr(teacher, 'returns', 'logits') != 'logits':
        out['outputs'] = teacher.returns
    if members := getattr(teacher, 'members', None):
        return {**out, 'members': [options_of(m) for m in members]}
    change = image_change(teacher) if isinstance(teacher, Teacher) else ''
    return {**out, 'images': change} if change else out
