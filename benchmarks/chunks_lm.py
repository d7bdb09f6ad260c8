"""Two tokenizers: does a language model learn from a teacher that cuts the text into other tokens? Shakespeare's plays, byte-pair vocabularies of 1,000
tokens for the teacher and 300 for the student, which trains on all of the teacher's text or on a tenth of it. Approximate likelihood matching
(arXiv:2503.20083) compares the probabilities of the pieces of text between two places where both have a token boundary. Three seeds, equal steps.

    python benchmarks/chunks_lm.py --root ../shared/data --out benchmarks/results/chunks_lm.json

The score is bits per character of the text behind the training part, in windows of 128 characters.
"""

import gzip, json, time
from itertools import product
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

LENGTH, BOS = 128, 0
CHARS = 500_000, 100_000  # for training, for the test
# (share of the text, steps): a tenth of it is seen 60 times in 300 steps
LENGTHS = (1.0, 300), (0.1, 100), (0.1, 300)


class Model(nn.Module):
    "An embedding, a GRU, a linear layer"

    def __init__(self, n, width):
        super().__init__()
        self.tokens, self.rnn, self.head = (
            nn.Embedding(n, min(width, 64)),
            nn.GRU(min(width, 64), width, batch_first=True),
            nn.Linear(width, n),
        )

    def forward(self, x):
        return self.head(self.rnn(self.tokens(x))[0])


def tokenizer(text, size):
    "Pieces of words, trained on the text; a space belongs to the word after it"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_next')
    tok.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=['[BOS]'],
            initial_alphabet=sorted(set(text)),
            show_progress=False,
        ),
    )
    return tok


def chunks(a, b):
    "Of two lists of offsets in one text: for each token, the number of its chunk. Chunks end where both have a boundary"
    common = sorted({end for _, end in a} & {end for _, end in b})
    return [np.searchsorted(common, [end for _, end in o]).tolist() for o in (a, b)]


class Windows:
    "Windows of the text in both vocabularies: tokens, their chunks (-1 where padded)"

    def __init__(self, text, toks):
        texts = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH + 1, LENGTH)]
        encoded = [t.encode_batch(texts) for t in toks]
        self.ids = [
            pad_sequence([torch.tensor([BOS, *e.ids]) for e in es], True, BOS) for es in encoded
        ]
        found = [chunks(*[e.offsets for e in pair]) for pair in zip(*encoded)]
        self.chunks = [pad_sequence([torch.tensor(f[i]) for f in found], True, -1) for i in (0, 1)]
        self.n = max(int(c.max()) for c in self.chunks) + 1
        self.chars = len(texts) * LENGTH

    def batches(self, share, bs=32):
        "Numbers of windows, again and again, of the first share of them"
        while True:
            for i in torch.randperm(int(share * len(self.ids[0]))).split(bs):
                if len(i) == bs:
                    yield i


def log_probs(model, ids, chunks):
    "(B, L) log-probability of each token but the first; 0 where padded"
    lp = -F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction='none')
    return lp.where(chunks >= 0, 0.0)


def of_chunks(lp, chunks, n):
    "(B, n) log-probability of each chunk: the sum of its tokens'"
    return lp.new_zeros(len(lp), n).scatter_add(1, chunks.clamp_min(0), lp)


def alm(s, t, T, mask):
    "T times the KL of chunk probabilities p^(1/T) as Bernoulli variables, teacher to student, mean over chunks"
    s, t = [(o / T).clamp_max(-1e-6) for o in (s, t)]
    no = lambda o: torch.log(-torch.expm1(o))
    v = t.exp() * (t - s) + no(t).exp() * (no(t) - no(s))
    return T * v[mask].mean()


def fit(model, data, which, steps, lr, way=lambda nll, s, i: nll, share=1.0):
    opt = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
    for i, _ in zip(data.batches(share), range(steps)):
        c = data.chunks[which][i]
        lp = log_probs(model, data.ids[which][i], c)
        way(-lp.sum() / (c >= 0).sum(), of_chunks(lp, c, data.n), i).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
    return model


@torch.no_grad()
def all_chunks(model, data, which):
    parts = range(len(data.ids[which]))
    return torch.cat(
        [
            of_chunks(
                log_probs(model, data.ids[which][i], data.chunks[which][i]),
                data.chunks[which][i],
                data.n,
            )
            for i in torch.tensor(parts).split(256)
        ]
    )


def bits(model, data, which):
    return float(-all_chunks(model, data, which).sum() / data.chars / np.log(2))


def main(
    root: Path = Path('../shared/data'),
    out: Path = Path('benchmarks/results/chunks_lm.json'),
    seeds: int = 3,
    lr: float = 0.03,
    teacher_steps: int = 600,
):
    text = gzip.open(root / 'lm/tinyshakespeare/input.txt.gz', 'rt').read()
    parts = text[: CHARS[0]], text[-CHARS[1] :]
    toks = [tokenizer(parts[0], n) for n in (300, 1000)]
    train, test = [Windows(o, toks) for o in parts]
    torch.manual_seed(0)
    begin = time.perf_counter()
    teacher = fit(Model(1000, 192), train, 1, teacher_steps, 0.006)
    t = all_chunks(teacher, train, 1)
    mask = torch.arange(train.n) <= train.chunks[0].amax(1, keepdim=True)
    per_chunk = (train.chunks[0] >= 0).sum() / mask.sum()
    print(
        f'teacher {bits(teacher, test, 1):.3f}, {time.perf_counter() - begin:.0f} s; tokens a chunk: {per_chunk:.2f} and {(train.chunks[1] >= 0).sum() / mask.sum():.2f}',
        flush=True,
    )
    by_alm = lambda s, i: alm(s, t[i], 100.0, mask[i]) / per_chunk
    ways = {
        'labels': lambda nll, s, i: nll,
        'labels + alm': lambda nll, s, i: nll + by_alm(s, i),
        'alm': lambda nll, s, i: by_alm(s, i),
    }
    rows = []
    for (share, steps), seed, (k, way) in product(LENGTHS, range(seeds), ways.items()):
        torch.manual_seed(seed)
        student = fit(Model(300, 48), train, 0, steps, lr, way, share)
        rows.append(
            dict(text=f'{share:.0%}', steps=steps, way=k, seed=seed, bits=bits(student, test, 0))
        )
        print(rows[-1], f'{time.perf_counter() - begin:.0f} s', flush=True)
    out.write_text(json.dumps(dict(teacher=bits(teacher, test, 1), students=rows), indent=1))
    show(rows)


def show(rows):
    table = Table('text', 'steps', 'bits per character', 'mean', 'std', 'each')
    key = lambda r: (r['text'], str(r['steps']), r['way'])
    for k in dict.fromkeys(map(key, rows)):
        v = np.array([r['bits'] for r in rows if key(r) == k])
        table.add_row(
            *k, f'{v.mean():.3f}', f'{v.std(ddof=1):.3f}', ' '.join(f'{o:.3f}' for o in v)
        )
    Console(width=120).print(table)


if __name__ == '__main__':
    typer.run(main)
