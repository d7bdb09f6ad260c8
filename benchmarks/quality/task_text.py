"Short texts: bags of words. The teacher is two wide nets on words and pairs of words, the student a narrow one on words."

import gzip, re
from collections import Counter
from functools import cache, partial
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from loop import predict
from tasks import ROOT, Cell, Data, Split, fit, kept

LENGTH = 48
# steps and rate of the teacher; the weak ones are stopped while they still are unsure, and are no better than a student
TEACHERS = dict(
    sst2=(450, 0.005),
    banking77=(650, 0.01),
    banking77weak=(650, 0.005),
    trec=(400, 0.005),
    trec50=(500, 0.01),
    polarity=(450, 0.005),
    goemotions=(900, 0.04),
    goemotionsweak=(600, 0.01),
)


def words(text):
    return re.findall(r"[a-z0-9']+|[?!]", text.lower())


def pairs(ws):
    return [*ws, *(f'{a} {b}' for a, b in zip(ws, ws[1:]))]


def vocabulary(lists, least=2):
    "Words that stand in so many texts or more; 0 is none"
    n = Counter(w for ws in lists for w in set(ws))
    return {w: i for i, w in enumerate(sorted(w for w in n if n[w] >= least), 1)}


def ids(lists, vocab, length):
    out = torch.zeros(len(lists), length, dtype=torch.long)
    for row, ws in zip(out, lists):
        known = [vocab[w] for w in ws if w in vocab][:length]
        row[: len(known)] = torch.tensor(known, dtype=torch.long)
    return out


class Bag(nn.Module):
    "Mean of word vectors, ReLU, a linear layer"

    def __init__(self, n_words, width, n_out, p=0.0):
        super().__init__()
        self.words, self.drop, self.head = (
            nn.EmbeddingBag(n_words, width, padding_idx=0),
            nn.Dropout(p),
            nn.Linear(width, n_out),
        )
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.words(x) + self.bias)))


def read(name):
    "Texts and labels of train, valid and test"
    g = torch.Generator().manual_seed(0)
    if name == 'goemotions':
        parts = [
            pd.read_csv(ROOT / f'text/goemotions/{s}.tsv.gz', sep='\t', quoting=3, header=None)
            for s in ('train', 'dev', 'test')
        ]

        def many_hot(d):
            y = torch.zeros(len(d), 28)
            for i, o in enumerate(d[1].astype(str)):
                y[i, [int(k) for k in o.split(',')]] = 1
            return y

        return [(list(d[0].astype(str)), many_hot(d)) for d in parts]
    if name == 'polarity':
        return polarity(g)
    text, label = (
        'text',
        dict(trec='coarse', trec50='fine', sst2='label', banking77='category')[name],
    )
    parts = [
        pd.read_csv(ROOT / f'text/{name.removesuffix("50")}/{s}.csv.gz')
        for s in ('train', *(['dev'] if name == 'sst2' else []), 'test')
    ]
    classes = sorted(parts[0][label].unique())
    parts = [
        (list(d[text].astype(str)), torch.tensor([classes.index(c) for c in d[label]]))
        for d in parts
    ]
    if len(parts) == 3:
        return parts
    order, (x, y) = torch.randperm(len(parts[0][0]), generator=g).tolist(), parts[0]
    n = len(x) // 8
    return [([x[i] for i in rows], y[rows]) for rows in (order[n:], order[:n])] + parts[1:]


def polarity(g):
    "Film reviews, one sentence each; they have no parts of their own"
    both = [
        gzip.open(ROOT / f'text/mr_polarity/{s}.txt.gz', 'rt').read().splitlines()
        for s in ('neg', 'pos')
    ]
    x, y = both[0] + both[1], torch.arange(2).repeat_interleave(torch.tensor([*map(len, both)]))
    rows = torch.randperm(len(x), generator=g)
    return [([x[i] for i in r], y[r]) for r in (rows[3000:], rows[:1000], rows[1000:3000])]


def make(name, width=128):
    splits, (steps, lr) = read(name.removesuffix('weak').split('-')[0]), TEACHERS[name]
    lists = [[words(t) for t in xs] for xs, _ in splits]
    least = 2 if len(lists[0]) < 20_000 else 8
    vocab, wide = vocabulary(lists[0], least), vocabulary(map(pairs, lists[0]), least)
    ys, xs, ws = (
        [y for _, y in splits],
        [ids(o, vocab, LENGTH) for o in lists],
        [ids([*map(pairs, o)], wide, 2 * LENGTH) for o in lists],
    )
    n_out = ys[0].shape[1] if ys[0].dim() == 2 else int(ys[0].max()) + 1
    loss = F.binary_cross_entropy_with_logits if ys[0].dim() == 2 else F.cross_entropy
    logits = [0, 0, 0]
    for seed in range(2):
        torch.manual_seed(seed)
        net = fit(
            Bag(len(wide) + 1, width, n_out, 0.5), ws[0], ys[0], steps, lr, loss=loss, seed=seed
        )
        logits = [a + predict(net, w) / 2 for a, w in zip(logits, ws)]
    return dict(splits=list(zip(xs, ys, logits)), n_words=len(vocab) + 1, n_out=n_out)


@cache
def data(name):
    d = kept(name, partial(make, name))
    return Data(*(Split(*s) for s in d['splits']), extra=d)


def student(width):
    return lambda d: Bag(d.extra['n_words'], width, d.extra['n_out'])


def cell(task, budget, steps, width=12, output='classes', **more):
    return Cell(
        f'{task}_{budget}',
        task.removesuffix('weak'),
        output,
        partial(data, task),
        student(width),
        steps,
        **more,
    )


CELLS = [
    cell('sst2', 'short', 170),
    cell('sst2', 'long', 1040, rates=(0.0009, 0.003, 0.01)),
    cell('banking77', 'short', 220),
    cell('banking77', 'long', 1100),
    cell('banking77', 'wide_short', 220, 64),
    cell('banking77', 'wide_long', 1100, 64),
    cell('banking77weak', 'short', 220),
    cell('banking77weak', 'long', 1100),
    cell('trec', 'short', 120),
    cell('trec', 'long', 600),
    cell('trec50', 'short', 120),
    cell('trec50', 'long', 600),
    cell('polarity', 'short', 190),
    cell('polarity', 'long', 1200, rates=(0.0009, 0.003, 0.01)),
    cell('goemotions', 'short', 450, output='labels', rates=(0.03, 0.1, 0.3)),
    cell('goemotionsweak', 'short', 450, output='labels'),
]
