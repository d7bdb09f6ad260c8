"A character language model of Shakespeare's plays: one recurrent network teaches a narrower one."

import gzip
from functools import cache
import torch
import torch.nn.functional as F
from torch import nn
from loop import predict
from tasks import ROOT, Cell, Data, Split, fit, kept

LENGTH = 64
CHARS = 300_000, 20_000, 40_000  # of the training part, of the validation and of the test part


class Model(nn.Module):
    "An embedding, a GRU, a linear layer"

    def __init__(self, n_chars, width):
        super().__init__()
        self.chars, self.rnn, self.head = (
            nn.Embedding(n_chars, min(width, 64)),
            nn.GRU(min(width, 64), width, batch_first=True),
            nn.Linear(width, n_chars),
        )

    def forward(self, x):
        return self.head(self.rnn(self.chars(x))[0])


def windows(ids):
    n = (len(ids) - 1) // LENGTH
    return ids[: n * LENGTH].view(n, LENGTH), ids[1 : n * LENGTH + 1].view(n, LENGTH)


def make():
    text = gzip.open(ROOT / 'lm/tinyshakespeare/input.txt.gz', 'rt').read()
    have = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([have[c] for c in text])
    a, b = int(0.9 * len(ids)), int(0.95 * len(ids))
    parts = [windows(o[:n]) for o, n in zip((ids[:a], ids[a:b], ids[b:]), CHARS)]
    torch.manual_seed(0)
    teacher = fit(
        Model(len(have), 160),
        *parts[0],
        900,
        0.006,
        bs=32,
        loss=lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten()),
    )
    return dict(splits=[(x, y, predict(teacher, x).half()) for x, y in parts], n_out=len(have))


@cache
def data():
    d = kept('lm', make)
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def student(d):
    return Model(d.extra['n_out'], 40)


CELLS = [
    Cell(
        'lm_short',
        'lm',
        'tokens',
        data,
        student,
        230,
        bs=32,
        rates=(0.004, 0.012, 0.036),
        axis=2,
        cost=3,
        seeds=3,
    )
]
