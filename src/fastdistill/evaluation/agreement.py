"""Measure how often a student's predictions agree with the teacher's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses import binary_kl, kl, reverse_kl
from .metrics import Rows


def agreement_sums(s: Rows, t: Rows, kind: str) -> dict[str, float]:
    """Return the sums over a batch from which `agreement` is computed.

    Args:
        s: Rows of the student.
        t: Rows of the teacher.
        kind: Kind of the outputs.
    """
    compare = dict(softmax=compare_classes, sigmoid=compare_labels, regression=compare_numbers)
    found = compare[kind](s, t)
    return {k: v[s.counts].double().sum().item() for k, v in found.items()}


def agreement(s: Mapping[str, float], kind: str) -> dict[str, float | None]:
    """Return {name: fraction or mean}. A value is None if there are no positions to compute it from.

    Args:
        s: Sums over all batches, empty if there were none.
        kind: Kind of the outputs.
    """
    if not s:
        return {}
    if kind == 'regression':
        return how_far_apart(s, s['n'])
    n, right = s['n'], s['right']
    parts = dict(
        same=('same', n),
        in_top5=('five', n),
        kl=('kl', n),
        reverse_kl=('reverse', n),
        teacher_right=('right', n),
        same_where_right=('same_right', right),
        same_where_wrong=('same_wrong', n - right),
        right_where_right=('same_right', right),
        right_where_wrong=('student_alone', n - right),
    )
    return {k: s[o] / of if of else None for k, (o, of) in parts.items() if o in s}


def split(a: Tensor, b: Tensor, y: Tensor, one: Tensor) -> dict[str, Tensor]:
    """Compare predictions at all positions, and separately at the positions where the teacher is
    right or wrong.
    """
    same, right = a == b, b == y
    return dict(
        n=one,
        same=same,
        right=right,
        same_right=same & right,
        same_wrong=same & ~right,
        student_alone=(a == y) & ~right,
    )


def compare_classes(s: Rows, t: Rows) -> dict[str, Tensor]:
    a, b = s.out.argmax(-1), t.out.argmax(-1)
    options: dict[str, Any] = dict(T=1.0, axis=-1, reduction='none')
    out = split(a, b, s.y, torch.ones_like(a)) | dict(
        kl=kl(s.out, t.out, **options), reverse=reverse_kl(s.out, t.out, **options)
    )
    if s.out.shape[-1] > 5:
        out['five'] = (s.out.topk(5).indices == b[..., None]).any(-1)
    return out


def compare_labels(s: Rows, t: Rows) -> dict[str, Tensor]:
    yes = s.y > 0.5
    divergences = dict(
        kl=binary_kl(s.out, t.out, T=1.0, reduction='none'),
        reverse=binary_kl(t.out, s.out, T=1.0, reduction='none'),
    )
    return split(s.out > 0, t.out > 0, yes, torch.ones_like(yes)) | divergences


def compare_numbers(s: Rows, t: Rows) -> dict[str, Tensor]:
    a, b = (s.out - s.y).double(), (t.out - t.y).double()
    return dict(
        n=torch.ones_like(a),
        abs=(a - b).abs(),
        sq=(a - b).pow(2),
        a=a,
        b=b,
        aa=a * a,
        bb=b * b,
        ab=a * b,
    )


def how_far_apart(s: Mapping[str, float], n: float) -> dict[str, float | None]:
    """Return the mean distances between the predictions of the two models, and the correlation
    between their errors.
    """
    if not n:
        return {}
    cov, va, vb = (s[i + j] - s[i] * s[j] / n for i, j in ('ab', 'aa', 'bb'))
    return dict(
        mae=s['abs'] / n,
        rmse=(s['sq'] / n) ** 0.5,
        errors_correlation=cov / (va * vb) ** 0.5 if va * vb > 0 else None,
    )
