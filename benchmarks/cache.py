"""What a cache of teacher outputs costs: to train from it, to write it, to keep it, to read it. Ratios, all measured in one run.

    python benchmarks/cache.py                      # all of it; --quick only shows that it runs
    python benchmarks/cache.py --only steps         # steps, write, sizes, reads

Ways are timed in turns, an epoch of the one and an epoch of the other, and the median of the rounds' ratios is reported. Pictures
are JPEG files of coloured noise, texts are made of random words; the logits of `sizes` are those of a network that learnt a mixture of
as many classes in 32 dimensions.
"""

import json, multiprocessing, os, resource, subprocess, sys, tempfile, time, warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
import numpy as np
import torch, typer
from fastai.text.all import AWD_LSTM, TextBlock, awd_lstm_clas_config, text_classifier_learner
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    DataBlock,
    FlipItem,
    ImageBlock,
    IndexSplitter,
    MaskBlock,
    Normalize,
    RandomResizedCrop,
    aug_transforms,
    imagenet_stats,
    resnet18,
    resnet34,
    set_seed,
    unet_learner,
    vision_learner,
)
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
import torch.nn.functional as F
from fastdistill import Teacher
from fastdistill.cache import Layout, TeacherCache, Store
from fastdistill.cache.digests import file_checksum
from fastdistill.cache.manifest import Manifest
from fastdistill.fastai import KnowledgeDistillation, cache_teacher
from fastdistill.base.outputs import Outputs, TopK

console = Console(width=130)


# data


def pictures(folder, n, size=96):
    "JPEG files of blurred noise"
    g = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        small = Image.fromarray(g.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f'{i:05}.jpg', quality=90
        )
    return sorted(folder.glob('*.jpg'))


def digit(p):
    return p.stem[-1]


def ground(p):
    m = np.zeros((96, 96), np.uint8)
    m[20:60, 20:60] = int(p.stem[-1]) % 5
    return m


def image_dls(files, size, bs, workers, block=None, get_y=digit):
    data = DataBlock(
        (ImageBlock, block or CategoryBlock),
        get_y=get_y,
        splitter=IndexSplitter(range(bs)),
        item_tfms=[RandomResizedCrop(size, min_scale=0.35), FlipItem()],
        batch_tfms=[*aug_transforms(do_flip=False), Normalize.from_stats(*imagenet_stats)],
    )
    return data.dataloaders(files, bs=bs, num_workers=workers)


WORDS = ['xxunk', 'xxpad', *(f'w{i}' for i in range(2000))]


def sentence(i):
    return list(np.random.default_rng(i).choice(WORDS[2:], 60))


def yes_no(i):
    return 'ny'[i % 2]


def as_is(o):
    return o


def text_dls(n, bs):
    return DataBlock(
        (TextBlock(as_is, vocab=WORDS, seq_len=64), CategoryBlock),
        get_x=sentence,
        get_y=yes_no,
        splitter=IndexSplitter(range(bs)),
    ).dataloaders(list(range(n)), bs=bs, num_workers=0)


def classifier(dls, size):
    config = {**awd_lstm_clas_config, 'n_hid': 200 * size, 'emb_sz': 100 * size, 'n_layers': 2}
    return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, seq_len=64)


# steps: training from the cache over training with no teacher


class Steps(Callback):
    "Seconds, of the clock and of this process, from the end of each training step to the end of the next"

    order = 100

    def before_train(self):
        self.marks = []

    def after_batch(self):
        if self.training:
            self.marks.append((time.perf_counter(), time.process_time()))


def epoch(learn, *cbs, skip):
    "Seconds a step, of the clock and of this process; the first steps, in which workers start, are left out"
    steps = Steps()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=[*cbs, steps])
    a, b, n = steps.marks[skip], steps.marks[-1], len(steps.marks) - 1 - skip
    return np.array([(y - x) / n for x, y in zip(a, b)])


def step_ratio(make, path, rounds, skip):
    """Medians of (seconds alone, another learner alone, one from the cache, ratio of the second and of the third to the first) of a step: of
    the clock and of this process, (5, 2)"""
    make_dls, make_learn, make_teacher = make
    cache = cache_teacher(make_teacher(make_dls()).model, make_dls(), path, views=2, check=False)
    learns, times = [make_learn(make_dls()) for _ in range(3)], []
    for i in range(rounds + 1):
        got = {
            k: epoch(learns[k], *([KnowledgeDistillation(cache)] if k == 2 else []), skip=skip)
            for k in np.roll(range(3), i)
        }
        times.append([got[k] for k in range(3)])
    a, b, c = np.array(times[1:]).swapaxes(0, 1)  # the first round warms up
    return np.median([a, b, c, b / a, c / a], axis=1)


def steps(tmp, quick, rounds):
    n, bs, skip = (96, 16, 1) if quick else (480, 32, 2)
    files = pictures(tmp / 'pictures', n)
    images = lambda w: (
        partial(image_dls, files, 64, bs, w),
        *(partial(vision_learner, arch=a, pretrained=False) for a in (resnet18, resnet34)),
    )
    unet = (
        partial(image_dls, files[: n // 4], 64, bs // 4, 0, MaskBlock(codes=list('abcde')), ground),
        *(partial(unet_learner, arch=a, pretrained=False, n_out=5) for a in (resnet18, resnet34)),
    )
    text = partial(text_dls, n, bs), partial(classifier, size=1), partial(classifier, size=2)
    table = Table(
        'task',
        'no teacher, ms a step',
        'from the cache',
        'ratio',
        'of CPU time',
        'no teacher twice',
        'of CPU time',
        title=f'Step time of training ({rounds} rounds); the last two are how far two equal ones are apart',
    )
    tasks = {
        'images, ResNet-18 at 64 px, 2 workers': images(2),
        'the same, 0 workers': images(0),
        'U-Net, ResNet-18 at 64 px, 0 workers': unet,
        'text, AWD-LSTM, 0 workers': text,
    }
    for name, make in tasks.items():
        (a, _), _, (c, _), noise, ratio = step_ratio(make, tmp / f'steps {name}', rounds, skip)
        table.add_row(
            name, f'{a * 1e3:.0f}', f'{c * 1e3:.0f}', *(f'{o:.3f}' for o in (*ratio, *noise))
        )
        console.print(name, ratio, noise, style='dim', highlight=False)
    console.print(table)


# write: rows a second over those of plain inference


def plain_inference(teacher, dl):
    "Samples a second through the same DataLoader, transforms included, from the first batch to the last"
    with teacher:
        for i, b in enumerate(dl):
            teacher(b[0])
            if i == 0:
                start, n = time.perf_counter(), 0
            else:
                n += len(b[0])
    return n / (time.perf_counter() - start)


def writing(teacher, dls, path):
    "The same of the writer; and the seconds of the whole call that are not of its batches: checks before them, the manifest after"
    marks, start = [], time.perf_counter()
    cache = cache_teacher(
        teacher,
        dls,
        path,
        views=1,
        check=False,
        progress=lambda done, *_: marks.append((time.perf_counter(), done)),
    )
    end = time.perf_counter()
    speed = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
    return speed, end - start - len(cache) / speed


def write(tmp, quick, rounds):
    n, bs = (96, 16) if quick else (960, 32)
    files = pictures(tmp / 'pictures', n)
    table = Table(
        'workers',
        'plain inference',
        'writing',
        'ratio',
        'and once, s',
        title=f'Samples a second, ResNet-34 at 64 px ({rounds} rounds)',
    )
    for workers in (0, 2):
        dls = image_dls(files, 64, bs, workers)
        teacher = Teacher(vision_learner(dls, resnet34, pretrained=False).model)
        rows = []
        for i in range(rounds + 1):
            plain = lambda: plain_inference(teacher, dls.train.new(shuffle=False, drop_last=False))  # noqa: B023
            wrote = lambda: writing(teacher, dls, tmp / f'write {workers} {i}')  # noqa: B023
            if i % 2:
                p, (w, once) = plain(), wrote()
            else:
                (w, once), p = wrote(), plain()
            rows.append((p, w, w / p, once))
        p, w, r, once = [median(o) for o in zip(*rows[1:])]
        table.add_row(str(workers), f'{p:.0f}', f'{w:.0f}', f'{r:.3f}', f'{once:.1f}')
    console.print(table)


# sizes: bytes, and what is lost

FORMATS = {
    'float32': Store(dtype='float32'),
    'float16': Store(dtype='float16'),
    'int8': Store(dtype='int8'),
    'top-10 float16': Store(dtype='float16', topk=10),
    'top-10 int8': Store(dtype='int8', topk=10),
    **{
        f'top-10 int8, {tail}': Store(dtype='int8', topk=10, tail=tail)
        for tail in ('uniform', 'zero', 'bucket')
    },
}


def mixture(classes, n, seed):
    "Points around one centre for each class, so close that neighbours are often mistaken"
    centres = torch.randn(classes, 32, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + 1.1 * torch.randn(n, 32, generator=g), y


def net(hidden, classes):
    return nn.Sequential(nn.Linear(32, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def trained(model, loss, x, n_steps, bs=256, lr=3e-3):
    "fn(student logits, positions) -> loss"
    opt = torch.optim.Adam(model.parameters(), lr)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, n_steps)
    for _ in range(n_steps):
        i = torch.randint(len(x), (bs,))
        loss(model(x[i]), i).backward()
        opt.step()
        sched.step()
        opt.zero_grad()
    return model.eval()


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def kl(full, kept, T=1.0):
    p, q = [(o / T).double().log_softmax(1) for o in (full, kept)]
    return (p.exp() * (p - q)).sum(1).mean().item()


def sizes(tmp, quick, seeds):
    n_steps, seeds = (30, 1) if quick else (1500, min(seeds, 3))
    table = Table(
        'classes',
        'stored as',
        'bytes',
        'KL to full, T=1',
        'T=4',
        'student, T=1',
        'T=4',
        title=f'One view of one sample; accuracy of students of 3,000 samples on 10,000 others: mean and std of {seeds} seeds',
    )
    for classes in (10, 100, 1000):
        (x, y), test = mixture(classes, 3000, 1), mixture(classes, 10000, 2)
        torch.manual_seed(0)
        xs, ys = mixture(classes, 50000, 3)
        teacher = trained(net(512, classes), lambda s, i: F.cross_entropy(s, ys[i]), xs, n_steps)  # noqa: B023
        with torch.no_grad():
            t = teacher(x)
        learn = lambda loss: students(loss, x, test, classes, n_steps, seeds)  # noqa: B023
        table.add_row(str(classes), 'teacher', '', '', '', f'{accuracy(teacher, *test):.4f}')
        table.add_row('', 'labels alone', '', '', '', learn(lambda s, i: F.cross_entropy(s, y[i])))  # noqa: B023
        for name, wish in FORMATS.items():
            if wish.topk and wish.topk >= classes:
                continue
            layout = Layout.of(Outputs(t), wish)
            kept = layout.decode(torch.from_numpy(layout.encode(Outputs(t)))).logits
            # 'bucket' says of the rest what the student says: there is no distribution to compare with
            lost = (
                ['', '']
                if wish.tail == 'bucket'
                else [f'{kl(t, filled(kept), T):.1e}' for T in (1, 4)]
            )
            got = [learn(lambda s, i: softened(s, filled(kept, s, i), T)) for T in (1, 4)]  # noqa: B023
            table.add_row('', name, str(layout.bytes), *lost, *got)
        table.add_section()
    console.print(table)


def filled(o, s=None, i=slice(None)):
    "Logits of all classes"
    if not isinstance(o, TopK):
        return o[i]
    return replace(
        o, ids=o.ids[i], values=o.values[i], rest=None if o.rest is None else o.rest[i]
    ).dense(s)


def softened(s, t, T):
    return T * T * F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction='batchmean')


def students(loss, x, test, classes, n_steps, seeds):
    got = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        got.append(accuracy(trained(net(64, classes), loss, x, n_steps), *test))
    return f'{np.mean(got):.4f}' + (f' ± {np.std(got, ddof=1):.4f}' if seeds > 1 else '')


# reads: ten million rows


def synthetic(path, n):
    "A cache of `n` made-up rows: the top 10 of 1,000 classes in int8"
    layout = Layout.of(Outputs(torch.randn(2, 1000)), Store(dtype='int8', topk=10))
    m = Manifest(n, 1, 0, layout, 2**20, 64)
    (path / 'view000').mkdir(parents=True)
    np.random.default_rng(0).integers(0, 2**63, n, dtype=np.uint64).tofile(path / 'keys.bin')
    block = np.random.default_rng(0).integers(0, 255, (2**20, layout.bytes), dtype=np.uint8)
    block[:, 1:20:2] %= 3  # the ten class numbers stay below 1,000
    for _, _, name, size in m.all_shards():
        block.reshape(-1)[:size].tofile(path / name)
    m.shards = [
        dict(name=name, bytes=size, checksum=file_checksum(path / name))
        for name, size in m.all_files()
    ]
    m.complete = True
    (path / 'manifest.json').write_bytes(m.to_json())
    return m


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20


def opening(path):
    "In a process of its own"
    before, start = resident(), time.perf_counter()
    cache = TeacherCache(path)
    opened, mb = time.perf_counter() - start, resident() - before
    start = time.perf_counter()
    cache.rows([0, len(cache) - 1])
    first, mb2 = time.perf_counter() - start, resident() - before
    print(json.dumps((opened, mb, first, mb2)))


def read(path, bs, seconds, seed, out):
    "Random rows a second, `bs` at a time"
    cache, g, n = TeacherCache(path), np.random.default_rng(seed), 0
    at = g.integers(0, len(cache), (1000, bs))
    get = cache.rows if bs > 1 else lambda a: cache.row(int(a[0]))
    for a in at[:20]:
        get(a)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        get(at[n % 1000])
        n += 1
    out.put(n * bs / (time.perf_counter() - start))


def reading(path, workers, bs, seconds):
    ctx = multiprocessing.get_context('spawn')
    out = ctx.Queue()
    ps = [ctx.Process(target=read, args=(path, bs, seconds, i, out)) for i in range(workers)]
    for p in ps:
        p.start()
    got = [out.get() for _ in ps]
    for p in ps:
        p.join()
    return sum(got)


def reads(tmp, quick, rounds):
    n, seconds = (10**5, 0.5) if quick else (10**7, 5)
    m = synthetic(tmp / 'rows', n)
    got = subprocess.run(
        [sys.executable, __file__, '--opening', str(tmp / 'rows')],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    opened, mb, first, mb2 = json.loads(got)
    table = Table(
        title=f'{n:,} rows of {m.layout.bytes} bytes, {m.bytes / 1e6:.0f} MB in {m.per_view} files',
        show_header=False,
    )
    table.add_row('opening', f'{opened * 1e3:.1f} ms, {mb:.2f} MiB more resident')
    table.add_row('first and last row', f'{first * 1e3:.1f} ms, {mb2:.2f} MiB')
    for bs in (64, 1):
        for workers in (1, 2):
            got = reading(tmp / 'rows', workers, bs, seconds)
            table.add_row(
                f'random rows a second, {f"{bs} at a time" if bs > 1 else "one by one"}, {workers} worker(s)',
                f'{got:,.0f}',
            )
    console.print(table)


PARTS = dict(steps=steps, write=write, sizes=sizes, reads=reads)


def main(
    only: str = '',
    quick: bool = False,
    rounds: int = 7,
    threads: int = 1,
    opening_of: str = typer.Option('', '--opening', hidden=True),
):
    if opening_of:
        return opening(opening_of)
    torch.set_num_threads(threads)
    set_seed(0)
    warnings.simplefilter('ignore')  # fastai's own
    console.print(
        f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {threads} thread(s), torch {torch.__version__}',
        highlight=False,
    )
    for name, part in PARTS.items():
        if not only or name in only.split(','):
            with tempfile.TemporaryDirectory() as tmp:
                part(Path(tmp), quick, 1 if quick else rounds)


if __name__ == '__main__':
    typer.run(main)
