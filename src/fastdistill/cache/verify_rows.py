"""Compare stored outputs with the current outputs of the teacher."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..base.outputs import Draws, TopK, as_dense
from .digests import checksum
from .file_store import Folder
from .head_file import head_is_lost, read_head
from .manifest import Manifest
from .row_layout import Layout, decoded_components
from .shard_notes import note_checksum


def row_errors(stored: Any, live: Any) -> tuple[list, list]:
    """Return, for each row, the largest difference between stored and current logits, and the
    largest absolute value of the current logits.

    For top-k, log-probabilities are compared. For draws, which differ from the probabilities by
    chance, only the entropy is compared. The difference from NaN is infinite.

    Args:
        stored: Stored logits in any form.
        live: Current logits of the teacher: (B, ...), `LinearLogits`, or if the likeliest classes
            are stored, `TopK`.
    """
    likeliest = isinstance(live, TopK)
    t = (live.values if likeliest else as_dense(live)).detach().float().cpu()
    if likeliest:
        # subtle: rounding errors may swap classes that are almost equally likely
        same = stored.ids.shape == live.ids.shape and (stored.ids == live.ids.cpu()).float().mean()
        old = stored.values if same > 0.5 else t[..., :0]
    elif isinstance(stored, Draws):
        p = (t.movedim(stored.axis, -1) / stored.T).softmax(-1)
        old, t = stored.entropy, torch.special.entr(p).sum(-1)
    elif isinstance(stored, TopK):
        logp = t.movedim(stored.axis, -1).log_softmax(-1)
        same = stored.ids.shape[:-1] == logp.shape[:-1] and stored.n == logp.shape[-1]
        old, t = stored.values, logp.gather(-1, stored.ids) if same else logp
    else:
        old = as_dense(stored)
    largest = lambda o: o.abs().reshape(len(o), -1).amax(1)
    sizes = largest(t.where(t.isfinite(), 0)).tolist()
    if old.shape != t.shape:
        return [float('inf')] * len(t), sizes
    # subtle: `old != t` ignores equal infinities, whose difference would be nan
    far = (old.cpu() - t).where(old.cpu() != t, 0).nan_to_num(nan=float('inf'))
    return largest(far).tolist(), sizes


def comparable(layout: Layout, rows: np.ndarray, live: Any, head: Any) -> tuple:
    """Return the stored and the current logits of a batch in a form that can be compared.

    Args:
        layout: Layout of the rows.
        rows: Stored rows, (B, bytes) uint8.
        live: Current logits.
        head: `StoredHead` of the cache, for layouts with a `head`.
    """
    stored = torch.from_numpy(rows)
    if layout.kind == 'pca':
        # compare only the components, because rounding errors may change which classes are exact
        return decoded_components(layout, stored, head), head.project(
            as_dense(live).detach().float().cpu()
        )
    return layout.decode(stored, head).logits, live


@dataclass(repr=False)
class Verified:
    """Differences between the stored and the current outputs of a teacher.

    Attributes:
        rows: Number of rows compared.
        worst: Largest difference of a logit. With top-k, largest difference of a log-probability.
        mean: Mean over rows of the largest difference in a row.
        share: Largest difference relative to the largest absolute value in its row, or to 1 if all
            values are smaller.
        dtype: Data type of the stored outputs.
    """

    rows: int
    worst: float
    mean: float
    share: float
    dtype: str

    def __str__(self) -> str:
        return (
            f'{self.rows} rows compared: stored logits ({self.dtype}) differ by at most {self.worst:.2g}, '
            f'and by {self.mean:.2g} on average'
        )

    __repr__ = __str__


# if the outputs for the first samples differ by more than this fraction of the largest output, the
# cache belongs to a different teacher. A different batch size or device, or int8, changes them less
OTHER_OUTPUTS = 0.05


def other_outputs(where: Folder, m: Manifest, first: Any) -> list:
    """Check whether the teacher's outputs for the first samples differ from the stored outputs.

    This detects changes that the description of a teacher does not show, such as a different
    function that prepares its inputs.

    Args:
        where: Folder of the cache.
        m: Manifest of the cache.
        first: Current outputs for the first samples.

    Returns:
        List with a text about the difference, or an empty list.
    """
    name, size = m.shard(0, 0), m.layout.bytes
    known = m.checksums.get(name) or note_checksum(where, next(m.all_shards()))
    if known is None or head_is_lost(where, m):
        return []
    if where.size(name) is None or checksum(data := where.read(name)) != known:
        return []  # the file is missing or damaged, and will be written again
    head = read_head(where, m)
    likeliest = isinstance(first.logits, TopK)
    n = (first.logits.ids if likeliest else first.logits).shape[0]
    rows = np.frombuffer(data, np.uint8)[: n * size].reshape(n, size).copy()
    old, now = comparable(m.layout, rows, first.logits, head)
    # encode the current outputs, too, so that both have the errors of the storage format. This does
    # not work for formats that select classes
    whole = m.layout.n is None or m.head_bytes
    if m.layout.kind != 'pca' and (whole or likeliest):
        now = m.layout.decode(torch.from_numpy(m.layout.encode(first, head)), head).logits
    errors, sizes = row_errors(old, now)
    largest = max(sizes) or 1 if whole else max(*sizes, 1)  # log-probabilities may be almost 0
    if (far := max(errors) / largest) <= OTHER_OUTPUTS:
        return []
    return [
        f"the teacher's outputs for the first samples: they differ by {far:.2g} of the largest output, "
        'so the teacher, or a function that prepares its inputs, has changed'
    ]
