"""Language models: samples follow one another, for they are cut from all texts in a row, and a teacher may remember
what came before."""
from dataclasses import replace
import numpy as np
import torch.nn.functional as F
from fastai.basics import Chunks
from fastai.text.data import LMDataLoader
from ..outputs import Outputs, TopK, as_plain

__all__ = ['in_a_row', 'is_stream', 'model_outputs', 'of_length', 'stream_outputs']


def is_stream(dl): return isinstance(dl, LMDataLoader)


class Texts:
    "Texts in an order, each made when it is asked for"
    def __init__(self, order, make): self.order,self.make = order,make
    def __len__(self): return len(self.order)
    def __getitem__(self, i): return self.make(self.order[i])


def in_a_row(
    dl, # a language model's DataLoader
    order:list, # of its texts
    make # fn(number) -> tokens of a text
) -> Chunks:
    "The texts as one, of which pieces can be cut"
    lens = dl.lens.coll
    return Chunks(Texts(order, make), [lens[i] for i in order])


def model_outputs(teacher, b, n_inp) -> Outputs: return Outputs.of(teacher(*map(as_plain, b[:n_inp])))


def stream_outputs(
    teacher, dl,
    make, # fn(tasks) -> DataLoader that goes through them
    tasks:np.ndarray, bs:int # whole batches of them; the tasks of one view after those of another
):
    "`Outputs` of each batch; who remembers must hear a view from its beginning, what is already written too"
    firsts,n = tasks[::bs].tolist(),dl.n
    heard = list(with_lead_in(firsts, bs, n)) if teacher.remembers else [(t, True) for t in firsts]
    whole = np.concatenate([np.arange(t, t+min(bs, len(tasks))) for t,_ in heard])
    for (t,wanted),b in zip(heard, make(whole)):
        if t % n == 0: teacher.reset()
        out = model_outputs(teacher, b, dl.n_inp)
        if wanted: yield of_length(out, dl.seq_len)


def with_lead_in(firsts, bs, n):
    "(first task of a batch, is it wanted?): before each batch, those of its view that come before it"
    ready = None
    for t in firsts:
        if t != ready: yield from ((o, False) for o in range(t - t%n, t, bs))
        yield t,True
        ready = t+bs if (t+bs)%n else None


def of_length(out:Outputs, n:int) -> Outputs:
    "Outputs (B, L, ...) filled up to n places, or cut to them: the last batch of a stream is shorter, rows are not"
    length = (out.logits.ids if isinstance(out.logits, TopK) else out.logits).shape[1]
    def fit(t):
        if isinstance(t, TopK):
            return replace(t, ids=fit(t.ids), values=fit(t.values), rest=None if t.rest is None else fit(t.rest))
        if t.shape[1:2] != (length,): return t      # it has no value for each token
        return t[:, :n] if n <= t.shape[1] else F.pad(t, [0]*(2*t.dim()-3) + [n-t.shape[1]])
    return Outputs(fit(out.logits), {k: fit(v) for k,v in out.feats.items()},
                   None if out.mask is None else fit(out.mask))
