"""Compute measures of quality, such as accuracy, from sums over samples.

With these sums, any subset of samples can be scored without storing the outputs. Bootstrap
intervals and paired tests need such scores.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.task import Task, label_axis
from .report_data import MeasureInfo

BINS = 15  # number of confidence bins, for the calibration error
# with more classes, intersections and unions of masks are not stored for each image
MAX_PER_CLASS = 256
TOP_5_CLASSES = 20  # with this many classes or fewer, top-5 accuracy is not informative
MAX_OUTPUTS = 64  # with more outputs, R2 uses one common mean instead of one mean per output


@dataclass
class Rows:
    """A batch with one row of positions per sample. A position is a pixel, a token, a label, an
    output, or the whole sample.

    Attributes:
        out: Logits of classes (B, P, C), logits of labels (B, P), or predicted numbers (B, P).
        y: Targets, (B, P).
        counts: True for positions that are not ignored, (B, P).
        labels: Number of labels for a sigmoid, or else 1. The labels of each pixel or token are
            adjacent.
        ignored: The class that is ignored. None if the ignored label is not a class.
    """

    out: Tensor
    y: Tensor
    counts: Tensor
    labels: int = 1
    ignored: int | None = None


def rows_of(logits: Tensor, y: Tensor, task: Task) -> Rows:
    """Convert logits and labels of a batch to rows of positions.

    Args:
        logits: Logits of the batch, with classes along the class axis of `task`.
        y: Labels, as returned by `fit_labels`.
        task: What the model predicts.
    """
    o = logits.float() if logits.dtype.itemsize < 4 else logits
    if task.kind == 'softmax':
        o = o.movedim(task.axis, -1)
        o, y = o.reshape(len(o), -1, o.shape[-1]), y.reshape(len(o), -1)
        ignored = task.ignore_index if 0 <= task.ignore_index < o.shape[-1] else None
        return Rows(o, y, y != task.ignore_index, ignored=ignored)
    n = 1
    if task.kind == 'sigmoid' and o.dim() > 1:
        o, y = (v.movedim(label_axis(o.shape, task), -1) for v in (o, y))
        n = o.shape[-1]
    o, y = o.reshape(len(o), -1), y.reshape(len(o), -1).to(o.dtype)
    return Rows(o, y, torch.ones_like(y, dtype=torch.bool), n)


# compute sums for each sample, {name: (B,) or (B, k)}


def scores_of(r: Rows, kind: str, per_class: bool = False) -> dict:
    """Compute the per-sample sums from which all measures and the confidence bins are computed.

    Args:
        r: Rows of a batch.
        kind: Kind of the outputs.
        per_class: If True, also compute the intersection and union of each class.
    """
    return dict(softmax=class_scores, sigmoid=label_scores, regression=number_scores)[kind](
        r, per_class
    )


def class_scores(r: Rows, per_class: bool) -> dict[str, Tensor]:
    lp, y = r.out.log_softmax(-1), r.y.where(r.counts, 0)
    own, p = lp.gather(-1, y[..., None]), lp.exp()
    # subtle: classes with equal logits are ranked by their index, as in argmax
    tied = (lp == own) & (torch.arange(lp.shape[-1], device=lp.device) < y[..., None])
    top, best = p.max(-1)
    right = best == y
    sums = dict(
        right=right,
        nll=-own[..., 0],
        brier=p.pow(2).sum(-1) - 2 * own[..., 0].exp() + 1,
        five=((lp > own) | tied).sum(-1) < 5,
    )
    out = {k: (v.double() * r.counts).sum(1) for k, v in sums.items()} | dict(
        n=r.counts.sum(1).double()
    )
    # use `where`, because the NLL may be infinite at masked positions
    out['nll'] = torch.where(r.counts, -own[..., 0].double(), 0.0).sum(1)
    if per_class:
        out |= {
            k: without(v, r.ignored)
            for k, v in overlaps(best, y, r.counts, r.out.shape[-1]).items()
        }
    if r.out.shape[1:] == (1, 2):
        margin = r.out[:, 0, 1] - r.out[:, 0, 0]
        out |= dict(margin=margin.double(), positive=(y[:, 0] == 1).double() * out['n'])
    of_classes = without(totals(best, y, r.counts, r.out.shape[-1]), r.ignored)
    return out | dict(bins=bins(top, right, r.counts), totals=of_classes)


def without(counts: Tensor, ignored: int | None) -> Tensor:
    """Set the counts of the ignored class to 0. It may be predicted, but is not scored.

    Args:
        counts: Counts of each class, (..., C).
    """
    if ignored is not None:
        counts[..., ignored] = 0
    return counts


def overlaps(best: Tensor, y: Tensor, counts: Tensor, c: int) -> dict[str, Tensor]:
    """Compute the intersection and union of each class for each image."""

    def per_image(classes: Tensor, where: Tensor) -> Tensor:
        at = torch.arange(len(classes), device=classes.device)[:, None] * c + classes
        return at[where].bincount(minlength=len(classes) * c).view(len(classes), c).double()

    both = per_image(y, counts & (best == y))
    there = per_image(y, counts)
    found = per_image(best, counts)
    return dict(both=both, union=there + found - both)


def label_scores(r: Rows, per_class: bool) -> dict[str, Tensor]:
    p, yes = r.out.sigmoid(), r.y > 0.5
    found = r.out > 0
    sums = dict(
        right=found == yes,
        nll=F.binary_cross_entropy_with_logits(r.out, r.y, reduction='none'),
        brier=(p - r.y).pow(2),
        tp=found & yes,
        fp=found & ~yes,
        fn=~found & yes,
    )
    out = {k: v.double().sum(1) for k, v in sums.items()} | dict(n=r.counts.sum(1).double())
    if r.out.shape[1] == 1:
        out |= dict(margin=r.out[:, 0].double(), positive=yes[:, 0].double())
    of_labels = [v.reshape(-1, r.labels).sum(0).double() for v in (found & yes, yes, found)]
    return out | dict(bins=bins(p, yes, r.counts), totals=torch.stack(of_labels))


def number_scores(r: Rows, _: bool) -> dict[str, Tensor]:
    o, y = r.out.double(), r.y.double()
    sums = dict(abs=(o - y).abs(), sq=(o - y).pow(2), y2=y.pow(2))
    means = y if y.shape[1] <= MAX_OUTPUTS else y.sum(1, keepdim=True)
    return {k: v.sum(1) for k, v in sums.items()} | dict(n=r.counts.sum(1).double(), y=means)


def bins(confidence: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Compute the number of predictions, the sum of confidences and the number of correct
    predictions in each confidence bin, (3, BINS).
    """
    at, c = (confidence * BINS).long().clamp(0, BINS - 1)[counts], confidence[counts].double()
    of = lambda w: at.bincount(w, minlength=BINS).double()
    return torch.stack([of(None), of(c), of(right[counts].double())])


def totals(best: Tensor, y: Tensor, counts: Tensor, c: int) -> Tensor:
    """Count the correct, the actual and the predicted positions of each class, (3, C)."""
    y, best = y[counts], best[counts]
    return torch.stack([o.bincount(minlength=c).double() for o in (y[best == y], y, best)])


def auc_sums(margin: np.ndarray, positive: np.ndarray, n: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the per-sample sums for the area under the ROC curve of two classes.

    The area is the mean over positive samples of the fraction of negative samples with a lower
    score. It is also the mean over negative samples of the fraction of positive samples with a
    higher score. If both are used, sums over resampled data vary as much as the area itself
    (DeLong et al., Biometrics 44, 1988).

    Args:
        margin: Score of each sample for the positive class.
        positive: 1 for positive samples, 0 for negative ones.
        n: 0 for samples to ignore, 1 for all others.
    """
    from scipy.stats import rankdata

    yes, no = positive > 0, (n > 0) & (positive == 0)
    wins = np.zeros((2, len(margin)))
    if yes.any() and no.any():
        both = yes | no
        rank = np.zeros(len(margin))
        rank[both] = rankdata(margin[both])
        wins[0, yes] = (rank[yes] - rankdata(margin[yes])) / no.sum()
        wins[1, no] = 1 - (rank[no] - rankdata(margin[no])) / yes.sum()
    area = wins[0].sum() / max(yes.sum(), 1)
    return dict(positive=positive, above=wins[0], below=wins[1], area=area * n)


# compute measures from the sums


@dataclass(frozen=True)
class Measure:
    """A measure of quality that is computed from sums over samples.

    Attributes:
        of: fn({name: sums (R,) or (R, k)}) -> values (R,), for R subsets of the samples.
    """

    name: str
    of: Callable
    info: MeasureInfo


def share(name: str) -> Callable[[Mapping], Any]:
    return lambda s: s[name] / s['n']


def miou(s: Mapping) -> Any:
    """Compute the mean IoU over all classes that are present or predicted, except the ignored one."""
    return np.nanmean(np.where(s['union'] > 0, s['both'] / np.maximum(s['union'], 1), np.nan), -1)


def r2(s: Mapping) -> Any:
    per = s['n'][..., None] / s['y'].shape[-1]  # number of values per mean
    return 1 - s['sq'] / (s['y2'] - (s['y'] ** 2 / per).sum(-1))


def f1(s: Mapping) -> Any:
    return 2 * s['tp'] / (2 * s['tp'] + s['fp'] + s['fn'])


def auc(s: Mapping) -> Any:
    positive, n = s['positive'], s['n']
    return s['above'] / positive + s['below'] / (n - positive) - s['area'] / n


def measure(
    name: str, of: Callable[[Mapping], Any], label: str, higher: bool = True, percent: bool = False
) -> Measure:
    return Measure(name, of, MeasureInfo(label, higher, percent))


NLL = measure('nll', share('nll'), 'NLL', False)
BRIER = measure('brier', share('brier'), 'Brier score', False)
AUC = measure('auc', auc, 'AUC')


def measures_of(kind: str, columns: Container[str], n_classes: int, language: bool) -> list:
    """Return the measures for a kind of outputs. The first one is the default headline.

    Args:
        kind: Kind of the outputs.
        columns: Names of the available sums.
        n_classes: Number of classes.
        language: True for models that predict the next token.
    """
    areas = [AUC] if 'area' in columns else []
    if kind == 'sigmoid':
        return [
            measure('f1', f1, 'F1 (all labels)', percent=True),
            measure('accuracy', share('right'), 'accuracy per label', percent=True),
            *areas,
            NLL,
            BRIER,
        ]
    if kind == 'regression':
        return [
            measure('r2', r2, 'R²'),
            measure('mae', share('abs'), 'mean absolute error', False),
            measure('rmse', lambda s: np.sqrt(share('sq')(s)), 'root of the squared error', False),
        ]
    out = [measure('accuracy', share('right'), 'accuracy', percent=True)]
    if 'union' in columns:
        out.insert(0, measure('miou', miou, 'mean IoU', percent=True))
    if language:
        out.insert(0, measure('perplexity', lambda s: np.exp(share('nll')(s)), 'perplexity', False))
    if n_classes > TOP_5_CLASSES:
        out.append(measure('top5', share('five'), 'top-5 accuracy', percent=True))
    return [*out, *areas, NLL, BRIER]
