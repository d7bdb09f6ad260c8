"""Read the batches of language models, whose samples are cut from the concatenated texts.

Each sample continues the text of the sample before it, so a teacher may have a hidden state.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
from fastai.basics import Chunks, L, TfmdDL
from fastai.text.data import LMDataLoader

from ..base.model_state import restored
from ..base.outputs import Draws, LinearLogits, Outputs, TopK, as_plain
from ..base.random_state import RandomGuard
from ..teachers.members import single_teachers


def inner_dl(dl):
    """Return the DataLoader inside fastai's distributed DataLoader. Return other DataLoaders as is."""
    return getattr(dl, 'dl', dl) if isinstance(getattr(dl, 'dl', None), TfmdDL) else dl


def is_stream(dl):
    return isinstance(dl, LMDataLoader)


class Texts:
    """A sequence of texts in a given order. Each text is created when it is read."""

    def __init__(self, order, make):
        self.order, self.make = order, make

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.make(self.order[i])


def in_a_row(dl, order: list, make) -> Chunks:
    """Return the texts as one long sequence, from which pieces can be cut.

    Args:
        dl: DataLoader of a language model.
        order: Order of the texts.
        make: fn(index) -> tokens of a text.
    """
    lens = dl.lens.coll
    return Chunks(Texts(order, make), [lens[i] for i in order])


@contextmanager
def in_first_order(dl):
    """Context manager that temporarily restores the initial order of a language model's texts."""
    dl = inner_dl(dl)
    if not is_stream(dl):
        yield
        return
    with restored(dl.items, dl.lens, only=['idxs']), restored(dl, only=['chunks']):
        # subtle: fastai shuffles texts in place, and the items and their lengths share one list
        dl.items.idxs = dl.lens.idxs = L(sorted(dl.items.idxs))
        dl.make_chunks()
        yield


def share_n_inp(dls):
    """Copy the number of inputs, such as `dls.n_inp = 1`, to each DataLoader of `dls`."""
    with RandomGuard():  # fastai reads a batch to determine the number of inputs
        for dl in dls.loaders if 'n_inp' in vars(dls) else ():
            if hasattr(dl, 'after_batch') and dl.n_inp != dls.n_inp:
                dl._n_inp = dls.n_inp


def inputs_of(b, n_inp) -> tuple:
    return tuple(map(as_plain, b[:n_inp]))


def stream_outputs(teacher, dl, make, tasks: np.ndarray, bs: int):
    """Yield the teacher's `Outputs` for each batch.

    If the teacher has a hidden state, each view is run from its start, even if some of its outputs
    are already stored.

    Args:
        teacher: The teacher.
        dl: DataLoader of a language model.
        make: fn(tasks) -> DataLoader for these tasks.
        tasks: Samples to run, as complete batches. All batches of a view come before those of the
            next view.
        bs: Batch size.
    """
    firsts, n = tasks[::bs].tolist(), dl.n
    runs = [(t, True) for t in firsts]
    if any(t.runner.remembers for t in single_teachers(teacher)):
        runs = list(with_lead_in(firsts, bs, n))
    whole = np.concatenate([np.arange(t, t + min(bs, len(tasks))) for t, _ in runs])
    for (t, wanted), b in zip(runs, make(whole)):
        if t % n == 0:
            teacher.reset()
        out = Outputs.of(teacher(*inputs_of(b, dl.n_inp)))
        if wanted:
            yield of_length(out, dl.seq_len)


def with_lead_in(firsts, bs, n):
    """Yield (index of the first sample of a batch, True if the batch is requested).

    Before a requested batch, all earlier batches of the same view are yielded.
    """
    ready = None
    for t in firsts:
        if t != ready:
            yield from ((o, False) for o in range(t - t % n, t, bs))
        yield t, True
        ready = t + bs if (t + bs) % n else None


def of_length(out: Outputs, n: int) -> Outputs:
    """Pad or cut outputs (B, L, ...) to `n` tokens.

    The last batch of a text is shorter, but all stored rows have the same length.
    """
    length = (out.logits.ids if isinstance(out.logits, TopK) else out.logits).shape[1]
    if length == n:
        return out

    def fit(t):
        if t is None:
            return None
        if isinstance(t, LinearLogits):
            return replace(t, hidden=fit(t.hidden))
        if isinstance(t, Draws):
            return t.map(fit)
        if isinstance(t, TopK):
            return replace(t, ids=fit(t.ids), values=fit(t.values), rest=fit(t.rest))
        if t.shape[1:2] != (length,):
            return t  # this tensor does not have one value per token
        return t[:, :n] if n <= t.shape[1] else F.pad(t, [0] * (2 * t.dim() - 3) + [n - t.shape[1]])

    return replace(
        out,
        logits=fit(out.logits),
        feats={k: fit(v) for k, v in out.feats.items()},
        mask=fit(out.mask),
    )
