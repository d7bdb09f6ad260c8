"""Split a batch into slices of rows, for teachers that need too much memory for a whole batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.outputs import Outputs, as_plain, map_tensors, tensors_in


def in_slices(x: Sequence, kw: Mapping[str, Any], rows: int | None) -> list[tuple]:
    """Split the inputs of a batch into slices of rows.

    Args:
        x, kw: Positional and keyword inputs.
        rows: Maximum number of rows in a slice. None to use all rows at once.
    """
    if rows is None:
        return [(x, kw)]
    n = max((len(t) for t in tensors_in((x, kw)) if t.dim()), default=0)
    if n <= rows:
        return [(x, kw)]
    cut = lambda i: map_tensors(
        (x, kw), lambda t: t[i : i + rows] if t.dim() and len(t) == n else t
    )
    return [cut(i) for i in range(0, n, rows)]


def joined(outs: Sequence[Outputs]) -> Outputs:
    """Concatenate the outputs of the slices of a batch."""
    if len(outs) == 1:
        return outs[0]

    def cat(ts: Sequence[Any]) -> Any:
        return None if ts[0] is None else torch.cat(list(ts))

    feats = {k: cat([o.feats[k] for o in outs]) for k in outs[0].feats}
    return Outputs(
        cat([o.logits for o in outs]), feats, cat([o.mask for o in outs]), outs[0].classes
    )


def plain_output(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Convert an output to a plain tensor that losses can save for their backward pass."""
    t = as_plain(t).detach().to(device, dtype if t.is_floating_point() else None)
    return t.clone() if t.is_inference() else t
