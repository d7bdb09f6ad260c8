"""Group the heads whose teachers share one run of a model."""

from collections.abc import Mapping
from typing import Any

from ..teachers.teacher import same_run, sharing_model


def teacher_groups(heads: Mapping[str, Any]) -> list[dict]:
    """Group the heads that have a teacher. Heads in the same group share one run of a model.

    Args:
        heads: {head name: `Head`}.
    """
    groups: list[dict] = []
    for k, h in heads.items():
        if h.teacher is None:
            continue
        same = (g for g in groups if same_run(next(iter(g.values())).teacher, h.teacher))
        if (group := next(same, None)) is None:
            groups.append(group := {})
        group[k] = h
    return groups


def share_models(heads: Mapping[str, Any]) -> None:
    """Let teachers that share a run also share the faster copy of their model."""
    for group in teacher_groups(heads):
        first, *others = group.values()
        for h in others:
            h.teacher = sharing_model(h.teacher, first.teacher)
