"""Measure how much the numbers of a cache differ from the teacher's, and warn if it is too much."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..base.outputs import DistillWarning, Outputs
from .row_layout import Layout

# maximum step between stored logits. With larger steps, probabilities would be wrong
COARSE = 1.0
SCALES_OF_LOGITS = 'scale:logits', 'scale:values', 'scale:top'
# maximum error of logits computed from hidden states, relative to the range of the logits
INACCURATE = 0.02
# maximum difference of features, relative to their standard deviation
FEATURES_FAR = 0.1


@dataclass
class Rounding:
    """Errors of the stored numbers, which `encoded` updates.

    Attributes:
        worst: If hidden states are stored in int8, the largest error of a logit so far, relative to
            the range of the logits. Otherwise, the largest step between stored numbers.
        features: {layer: root mean square difference of its stored features in the first batch,
            relative to their standard deviation}. None before the first batch.
    """

    worst: float = 0.0
    features: dict[str, float] | None = None


def largest_step(layout: Layout, rows: np.ndarray) -> float:
    """Return the largest step between neighboring numbers in the stored format: in int8, the largest
    step of any row, and in float16, the step at the largest logit of any position. Return 0 for
    float32.
    """
    stored = torch.from_numpy(rows)
    if (logits := layout.fields[0]).name == 'logits' and logits.dtype == 'float16':
        t = logits.read(stored)
        top = t.amax(layout.axis) if -t.dim() <= layout.axis < t.dim() else t
        return float16_step(top.numpy()).max(initial=0).item()
    scales = [f for f in layout.fields if f.name in SCALES_OF_LOGITS]
    return max((f.read(stored)[:, 0].max().item() for f in scales), default=0.0)


def float16_step(values: Any) -> np.ndarray:
    """Return the distance from each value to the next number of float16. 0 for infinite values."""
    return np.nan_to_num(np.spacing(np.abs(np.asarray(values, np.float16))))


def feature_errors(layout: Layout, rows: np.ndarray, head: Any, out: Outputs) -> dict[str, float]:
    """Return `Rounding.features` for a batch."""
    errors: dict[str, float] = {}
    got = layout.decode(torch.from_numpy(rows), head).feats if out.feats else {}
    for k, v in got.items():
        own = out.feats[k].detach().float().cpu()
        spread = float(own.std(correction=0))
        errors[k] = float((v - own).square().mean().sqrt()) / spread if spread > 0 else 0.0
    return errors


def warn_of_rounding(layout: Layout, rounding: Rounding) -> None:
    """Warn if logits in int8 or float16, logits computed from hidden states in int8, or features are
    too inaccurate.

    Args:
        layout: Layout of the rows.
        rounding: What `encoded` updated.
    """
    worst = rounding.worst
    if bad := {k: e for k, e in (rounding.features or {}).items() if e > FEATURES_FAR}:
        far = ', '.join(f'{100 * e:.0f}% ({k})' for k, e in bad.items())
        text = (
            f"Stored features differ from the teacher's by {far} of their standard deviation: they are "
            "very small, or their mean is large compared with their differences. Use store='float32'."
        )
        warnings.warn(DistillWarning(text))
    if layout.kind == 'hidden' and worst > INACCURATE:
        text = (
            f"Logits computed from hidden states in int8 differ from the teacher's by up to "
            f'{100 * worst:.1f}% of their range: a few numbers are much larger than all others. Use '
            "store=dict(kind='hidden', dtype='float16')."
        )
    elif layout.kind != 'hidden' and worst > COARSE and layout.fields[0].dtype == 'float16':
        text = (
            f'float16 stores the outputs of some samples in steps of {worst:.3g}, because all of them '
            'are very high or very low numbers. Smaller differences are lost. Use '
            "dtype='float32', or subtract the largest logit in the teacher, which doesn't change the "
            'probabilities.'
        )
    elif layout.kind != 'hidden' and worst > COARSE:
        text = (
            f'int8 stores the outputs of some samples in steps of {worst:.3g}, because they range from '
            'very low to very high numbers (is a class masked out with a low logit?). Smaller '
            "differences are lost. Use dtype='float16', or 'float32' for numbers beyond 65504."
        )
    else:
        return
    warnings.warn(DistillWarning(text))
