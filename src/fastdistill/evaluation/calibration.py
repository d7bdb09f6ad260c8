"""Fit a temperature to a trained model's logits, and fold it into the model's last layer
(Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import DistillError
from ..base.outputs import as_plain
from ..base.task import Task, fit_labels, label_axis, task_for
from ..features.layer_hooks import Taps
from ..teachers import Teacher
from ..teachers.fast_copy import AS_IT_IS
from .metrics import rows_of, scores_of
from .report_data import calibration_error

LOWEST_T, HIGHEST_T = 0.05, 20.0
MOST_LOGITS = 2**23  # approximate maximum number of logits to keep in memory
LARGEST_CHANGE = 1e-3  # maximum error of the folded model's outputs, relative to the largest logit


@dataclass(repr=False)
class Calibration:
    """A fitted temperature and its effect, printed as one line.

    Attributes:
        temperature: Number by which the logits are divided, or one number per label.
        n: Number of predictions on which the temperature was fitted.
        before: `nll`, `ece` and `brier` of these predictions before calibration.
        after: `nll`, `ece` and `brier` after dividing the logits by the temperature.
        layer: Name of the layer into which the temperature was folded. None if it was not folded.
        reason: Reason why the temperature was not folded into a layer.
    """

    temperature: float | list[float]
    n: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    layer: str | None = None
    reason: str = ''

    def __str__(self) -> str:
        T = self.temperature
        value = f'{T:.3g}' if isinstance(T, float) else f'{min(T):.3g} to {max(T):.3g}'
        a, b = self.before, self.after
        where = (
            f'folded into layer {self.layer!r}'
            if self.layer is not None
            else f'not folded into the model: {self.reason}'
        )
        worse = ' (the temperature has the lowest NLL, not the lowest ECE)'
        return (
            f'temperature {value}, fitted on {self.n:,} predictions: '
            f'NLL {a["nll"]:.4g} -> {b["nll"]:.4g}, '
            f'ECE {100 * a["ece"]:.1f}% -> {100 * b["ece"]:.1f}%{worse if b["ece"] > a["ece"] else ""}, '
            f'Brier score {a["brier"]:.4g} -> {b["brier"]:.4g}; {where}'
        )

    __repr__ = __str__


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    kind: str = 'softmax',
    axis: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """Find the temperature T that minimizes the NLL of the logits divided by T.

    Args:
        logits: Logits for samples that were not used for training, with classes or labels along
            `axis`.
        labels: For 'softmax', class indices with the shape of the logits without `axis`. For
            'sigmoid', 0 and 1 with the shape of the logits.
        kind: 'softmax' for one temperature, 'sigmoid' for one per label.
        axis: Axis of classes or labels. For 'sigmoid' and logits of masks, -1 means axis 1.
        ignore_index: Label to ignore.

    Returns:
        The temperature as a scalar tensor, or one per label, (L,), for a sigmoid. The temperature
        is 1 if the best value is outside the range from 0.05 to 20, for example because all
        predictions are correct, or because a label is always or never present.

    Raises:
        DistillError: If the labels do not fit the logits, or if the kind is 'regression'.
    """
    task = task_for(None, kind, axis, ignore_index)
    if task.kind == 'regression':
        raise DistillError(
            "kind='regression': numbers have no temperature. It must be 'softmax' or 'sigmoid'."
        )
    z, y = labeled_positions(logits, labels, task)
    if not len(z):
        raise DistillError('There are no labeled predictions to fit a temperature on.')
    if task.kind == 'softmax':
        from scipy.special import logsumexp

        own = z[np.arange(len(z)), y]
        return torch.tensor(lowest(lambda b: (logsumexp(b * z, 1) - b * own).mean()))
    return torch.tensor([of_label(z[:, i], y[:, i]) for i in range(z.shape[1])])


def calibrate_model(
    model: nn.Module,
    batches: Iterable,
    task: Task,
    *,
    fold: bool = True,
    tick: Callable[[], None] | None = None,
) -> Calibration:
    """Fit a temperature on labeled batches, and fold it into the last linear layer of the model.
    The predicted classes do not change.

    Args:
        model: A trained model. The last layer is changed if `fold` is True.
        batches: Iterable of (inputs, targets), both tuples, with samples that were not used for
            training.
        task: What the model predicts.
        fold: If True, change the model. If False, only measure the effect.
        tick: fn(), called after each batch.
    """
    if task.kind == 'regression':
        raise DistillError('This model predicts numbers, which have no temperature.')
    kept, first = [], None
    with Teacher(model, run=AS_IT_IS) as teacher, torch.no_grad():
        teacher.reset()
        for x, y in batches:
            logits = as_plain(teacher(*x).logits)
            kept.append(thinned(*labeled_positions(logits, y[0] if y else None, task), logits))
            first = x if first is None else first
            if tick is not None:
                tick()
    if first is None:
        raise DistillError(
            'There is no batch to calibrate on: the validation set is empty. An exported Learner '
            'contains no data: pass labeled samples that it was not trained on, e.g. '
            'learn.calibrate(dl=dls.valid).'
        )
    z, y = (torch.from_numpy(np.concatenate(o)) for o in zip(*kept))
    T = fit_temperature(z, y, kind=task.kind)
    out = Calibration(
        T.item() if T.numel() == 1 else T.tolist(),
        len(z),
        measures(z, y, task.kind),
        measures(z / T, y, task.kind),
        reason='fold=False',
    )
    if (T == 1).all():
        out.reason = f'no temperature between {LOWEST_T:g} and {HIGHEST_T:g} minimizes the NLL on these labels.'
    elif fold:
        out.layer, out.reason = fold_temperature(model, T, first, task)
    return out


def labeled_positions(logits: Tensor, labels: Any, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (P, C) and labels, (P,) or (P, C), of all labeled positions, as NumPy arrays."""
    logits = as_plain(logits).detach().cpu().double()
    y = None
    if isinstance(labels, Tensor):
        y = fit_labels(as_plain(labels).detach().cpu(), logits.shape, task)
    if y is None:
        given = f'shape {tuple(labels.shape)}' if isinstance(labels, Tensor) else 'missing'
        raise DistillError(
            f'The labels ({given}) do not fit the logits (shape {tuple(logits.shape)}).'
        )
    rows = rows_of(logits, y, task)
    if task.kind == 'sigmoid':
        z, y = (o.reshape(-1, rows.labels) for o in (rows.out, rows.y))
        return z.numpy(), (y > 0.5).numpy()
    return rows.out[rows.counts].numpy(), rows.y[rows.counts].numpy()


def thinned(z: np.ndarray, y: np.ndarray, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Drop random positions if samples have many of them (such as pixels), so that all batches fit
    into memory.
    """
    most = max(MOST_LOGITS // 64 // z.shape[1], len(logits))
    if len(z) <= most:
        return z, y
    # subtle: every nth pixel may be in the same few columns of each image
    kept = np.random.default_rng(0).choice(len(z), most, replace=False)
    return z[kept], y[kept]


def lowest(nll: Callable[[float], float]) -> float:
    """Return the temperature T in the allowed range that minimizes nll(1/T). Return 1 if the
    minimum is at an end of the range.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda u: nll(exp(-u)),
        bounds=(log(LOWEST_T), log(HIGHEST_T)),
        method='bounded',
        options=dict(xatol=1e-5),
    )
    T = exp(found.x)
    return T if LOWEST_T * 1.01 < T < HIGHEST_T / 1.01 else 1.0


def of_label(z: np.ndarray, y: np.ndarray) -> float:
    """Fit the temperature for one label."""
    if y.all() or not y.any():
        return 1.0
    signed = np.where(y, z, -z)
    return lowest(lambda b: np.logaddexp(0, -b * signed).mean())


def measures(z: Tensor, y: Tensor, kind: str) -> dict[str, Any]:
    """Return NLL, calibration error and Brier score."""
    sums = scores_of(rows_of(z, y, Task(kind)), kind)
    n = float(sums['n'].sum())
    return dict(
        nll=float(sums['nll'].sum()) / n,
        ece=calibration_error(*sums['bins'].tolist()),
        brier=float(sums['brier'].sum()) / n,
    )


# fold the temperature into the last layer


def fold_temperature(
    model: nn.Module, T: Tensor, x: Sequence, task: Task
) -> tuple[str | None, str]:
    """Divide the weight and bias of the model's last layer by T.

    Returns:
        (name of the layer, ''), or (None, reason) if the temperature can't be folded.
    """
    layers = {k: m for k, m in model.named_modules() if is_linear(m)}
    if not layers:
        return None, 'it has no linear layer or 1x1 convolution.'
    with Teacher(model, run=AS_IT_IS) as teacher, torch.no_grad():
        teacher.reset()
        with Taps(model, list(layers)) as taps:
            logits = as_plain(teacher(*x).logits)
            # subtle: read `seen`, because `pop` raises an error for layers that did not run or
            # whose output was overwritten
            seen = {k: o[0] for k, o in taps.seen.items() if isinstance(o, tuple)}
        same = lambda k: torch.equal(as_plain(seen[k]).flatten(), logits.flatten())
        name = next((k for k in reversed(layers) if k in seen and same(k)), None)
        if name is None:
            return None, 'its logits are not the output of a linear layer or 1x1 convolution.'
        if (shared := shared_with(model, layers[name])) is not None:
            return None, f'its last layer {name!r} shares its weight with {shared!r}.'
        T = T.to(logits)
        if T.numel() > 1 and len(layers[name].weight) != len(T):
            return None, f'its last layer {name!r} does not have one row for each label.'
        before = {k: p.clone() for k, p in layers[name].named_parameters()}
        folded = False
        try:
            for p in layers[name].parameters():
                p /= T.view(-1, *[1] * (p.dim() - 1)).to(p)
            teacher.reset()
            at = label_axis(logits.shape, task)
            shape = [-1 if i == at else 1 for i in range(logits.dim())]
            wanted = logits / (T.view(shape) if T.numel() > 1 else T)
            far = (as_plain(teacher(*x).logits) - wanted).abs().max()
            folded = bool(far <= LARGEST_CHANGE * wanted.abs().max())
        finally:
            if not folded:
                for k, p in layers[name].named_parameters():
                    p.copy_(before[k])
    return (
        (name, '') if folded else (None, f'its last layer {name!r} also changes its other outputs.')
    )


def is_linear(m: nn.Module) -> bool:
    """Return True for a linear layer or 1x1 convolution whose weight is a plain parameter."""
    one = isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(m.kernel_size) == {1}
    return (isinstance(m, nn.Linear) or one) and isinstance(
        m._parameters.get('weight'), nn.Parameter
    )


def shared_with(model: nn.Module, layer: nn.Module) -> str | None:
    """Return the name of a parameter outside `layer` that is the layer's weight or bias, or None."""
    own = {id(p) for p in layer.parameters()}
    for prefix, m in model.named_modules():
        if m is not layer:
            for k, p in m.named_parameters(recurse=False):
                if id(p) in own:
                    return f'{prefix}.{k}'.lstrip('.')
    return None
