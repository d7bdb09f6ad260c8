"""Measure how often a student's predictions agree with those of the teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses import binary_kl, kl, reverse_kl
from .metrics import Rows


class Agreement:
    """Counts of the agreement between a student and a teacher, summed over batches."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.sums: dict[str, float] = {}

    def add(self, s: Rows, t: Rows) -> None:
        """Add a batch.

        Args:
            s: Rows of the student.
            t: Rows of the teacher.
        """
        counts = s.counts
        fn = dict(softmax=compare_classes, sigmoid=compare_labels, regression=compare_numbers)[
            self.kind
        ]
        for k, v in fn(s, t).items():
            self.sums[k] = self.sums.get(k, 0.0) + v[counts].double().sum().item()

    def shares(self) -> dict:
        """Return {name: fraction or mean}. A value is None if there are no positions to compute it
        from.
        """
        n, s = self.sums.get('n', 0.0), self.sums

        def per(k: str, of: float) -> float | None:
            return s[k] / of if of else None

        if self.kind == 'regression':
            return how_far_apart(s, n)
        right, wrong = s.get('right', 0.0), n - s.get('right', 0.0)
        out = dict(same=per('same', n))
        if 'five' in s:
            out['in_top5'] = per('five', n)
        return out | dict(
            kl=per('kl', n),
            reverse_kl=per('reverse', n),
            teacher_right=per('right', n),
            same_where_right=per('same_right', right),
            same_where_wrong=per('same_wrong', wrong),
            right_where_right=per('same_right', right),
            right_where_wrong=per('student_alone', wrong),
        )


def split(a: Tensor, b: Tensor, y: Tensor, one: Tensor) -> dict[str, Tensor]:
    """Compare predictions at all positions, and separately where the teacher is right and where the
    teacher is wrong.
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
    """Return the mean distances between the predictions of both models, and the correlation of
    their errors.
    """
    if not n:
        return {}
    cov, va, vb = (s[i + j] - s[i] * s[j] / n for i, j in ('ab', 'aa', 'bb'))
    return dict(
        mae=s['abs'] / n,
        rmse=(s['sq'] / n) ** 0.5,
        errors_correlation=cov / (va * vb) ** 0.5 if va * vb > 0 else None,
    )
