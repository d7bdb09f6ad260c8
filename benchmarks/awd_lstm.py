"""Students of an AWD-LSTM on words of WikiText-2: labels alone, the live teacher, and each way to store its outputs.

    OMP_NUM_THREADS=1 python benchmarks/awd_lstm.py --folder FOLDER      # about 20 minutes of one core; a second run does only what is missing
    OMP_NUM_THREADS=1 python benchmarks/awd_lstm.py --folder FOLDER --memory --out benchmarks/results/awd_lstm_memory.json

Protocol 1, fixed before the first run of a student:

- The text that is trained on is WikiText-2's validation file (213,886 words; the training file was not to be had), as one document. The test is the first 40,000
  words of its test file. The vocabulary is the 5,000 likeliest words of the training text.
- Teacher: fastai's `language_model_learner` with AWD_LSTM, 2 layers, embeddings of 128 numbers, 256 hidden, drop_mult .5, 4 epochs of fit_one_cycle at 1e-2, seed 0.
- Students: the same with 48 and 96 numbers and drop_mult .1; one epoch at 1e-2, 16 x 32 words in a batch; recipe kd(T=1, alpha=.5). Seeds 0, 1, 2: the seed sets the
  weights and the dropout, which are the same for all ways.
- Each training has a process of its own. Its CPU time of a step is the median, its memory the peak of the training minus the memory before the models were made.
- Added afterwards, with `--memory`: the same trainings again, with the peak of the memory that is not pages of a file (`RssAnon`, read every 2 ms). Pages of a cache
  count in the peak above, although the system can take them away at any time. A cache of 29 MB was read whole, so all of it was in that peak.
- Asked: from hidden states in int8, the test loss is within .01 nats and the calibration error (15 bins of the likeliest word's probability) within .005 of the live
  teacher's, with less time and memory per step.
"""

import gzip, json, os, subprocess, sys, tempfile, threading, time, warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
import numpy as np
import torch
import typer
from fastai.text.all import (
    AWD_LSTM,
    Callback,
    DataLoaders,
    LMDataLoader,
    awd_lstm_lm_config,
    language_model_learner,
    set_seed,
)
from fastdistill import kd
from fastdistill.cache import TeacherCache
from fastdistill.fastai import cache_teacher

PROTOCOL = 1
ROOT = Path(os.environ.get('BENCHMARK_DATA', '../shared/data'))
WORDS, TEST, BS, LENGTH = 5000, 40_000, 16, 32
STORES = {
    'hidden, int8': 'hidden',
    'hidden, float16': dict(kind='hidden', dtype='float16'),
    '50 draws': dict(draws=50, T=1.0),
    'top 50, float16': dict(topk=50),
}
WAYS = 'live teacher', 'hidden, int8', 'labels alone', *[k for k in STORES if k != 'hidden, int8']


def text_loaders():
    "Loaders of the text that is trained on and of the test"
    read = lambda part: (
        gzip.open(ROOT / f'lm/wikitext2_valid_test/{part}.txt.gz', 'rt').read().split()
    )
    train, test = read('valid'), read('test')[:TEST]
    vocab = ['xxunk', *(w for w, _ in Counter(train).most_common(WORDS - 1))]
    known = {w: i for i, w in enumerate(vocab)}
    ids = lambda text: torch.tensor([known.get(w, 0) for w in text])
    loader = lambda x, shuffle: LMDataLoader(
        [x], bs=BS, seq_len=LENGTH, num_workers=0, shuffle=shuffle
    )
    dls = DataLoaders(loader(ids(train), True), loader(ids(test), False))
    dls.vocab = vocab
    return dls


def learner(dls, emb, hidden, drop):
    config = {**awd_lstm_lm_config, 'emb_sz': emb, 'n_hid': hidden, 'n_layers': 2}
    return language_model_learner(dls, AWD_LSTM, config=config, pretrained=False, drop_mult=drop)


def teacher_of(dls, folder):
    learn = learner(dls, 128, 256, 0.5)
    learn.model.load_state_dict(torch.load(folder / 'teacher.pt', weights_only=True))
    return learn


class StepTimes(Callback):
    "CPU seconds of each training step, with its batch"

    order = 100

    def before_train(self):
        self.last, self.times = time.process_time(), []

    def after_batch(self):
        if self.training:
            now = time.process_time()
            self.times.append(now - self.last)
            self.last = now


@torch.no_grad()
def scores(learn):
    "Loss, accuracy and calibration error on the test"
    model, found = learn.model.eval(), []
    model.reset()
    for x, y in learn.dls.valid:
        p = model(x)[0].log_softmax(-1).flatten(0, 1)
        y = y.flatten()
        found.append((p.gather(1, y[:, None])[:, 0], *p.max(1), y))
    lp, top, guess, y = map(torch.cat, zip(*found))
    bins = (top.exp() * 15).long().clamp_max(14)
    gap = torch.zeros(15).scatter_add_(0, bins, (guess == y).float() - top.exp())
    row = dict(test_loss=-float(lp.mean()), accuracy=float((guess == y).float().mean()))
    return row | dict(calibration_error=float(gap.abs().sum() / len(y)), test_words=len(y))


def status(name):
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if name in o)
    return int(line.split()[1]) / 1024


@contextmanager
def own_memory(row, every=0.002):
    "`row['peak_own_mb']`: the peak inside the block of the memory without pages of files, above the memory before"
    before, peak, done = status('RssAnon'), 0.0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, status('RssAnon'))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    row |= dict(peak_own_mb=peak - before, own_before_mb=before)


def train_teacher(folder):
    set_seed(0)
    learn, times = learner(text_loaders(), 128, 256, 0.5), StepTimes()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(4, 1e-2, cbs=times)
    torch.save(learn.model.state_dict(), folder / 'teacher.pt')
    return dict(seconds=sum(times.times), **scores(learn))


def write_store(folder, way):
    "Writes a cache; its size, and what its logits lose against those of the hidden states in float16"
    dls, start = text_loaders(), time.process_time()
    cache = cache_teacher(
        teacher_of(dls, folder), dls, folder / way, store=STORES[way], progress=False
    )
    row = dict(seconds=time.process_time() - start, head_bytes=cache.manifest.head_bytes)
    row |= dict(bytes_per_word=cache.manifest.layout.bytes / LENGTH)
    if way == 'hidden, int8':
        some = np.arange(0, len(cache), max(len(cache) // 64, 1))
        exact = TeacherCache(folder / 'hidden, float16').outputs(some).logits.dense()
        error = cache.outputs(some).logits.dense() - exact
        share = (error - error.mean(-1, keepdim=True)).std(-1) / exact.std(-1)
        row['error over spread'] = [float(share.median()), float(share.max())]
    return row


def train_student(folder, way, seed, own):
    dls, row = text_loaders(), {}
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts here
    with own_memory(row) if own else nullcontext():
        teacher = None
        if way == 'live teacher':
            teacher = teacher_of(dls, folder)
        elif way != 'labels alone':
            teacher = TeacherCache(folder / way)
        set_seed(seed)
        learn, times = learner(dls, 48, 96, 0.1), StepTimes()
        with learn.no_bar(), learn.no_logging():
            if teacher is None:
                learn.fit_one_cycle(1, 1e-2, cbs=times)
            else:
                learn.distill(teacher, 1, 1e-2, kd(T=1, alpha=0.5), check=False, cbs=times)
    row |= dict(step_seconds=float(np.median(times.times)), steps=len(times.times))
    row |= dict(quartiles=np.percentile(times.times, [25, 75]).tolist())
    return row | dict(peak_mb=status('VmHWM') - before, before_mb=before) | scores(learn)


def main(
    out: Path = Path('benchmarks/results/awd_lstm.json'),
    folder: Path | None = None,  # keeps the teacher and the caches
    seeds: int = 3,
    memory: bool = False,  # the memory without pages of files, into a file of its own
    part: str = '',
    seed: int = -1,
):
    warnings.simplefilter('ignore')
    if part:
        if part == 'teacher':
            row = train_teacher(folder)
        else:
            row = (
                write_store(folder, part) if seed < 0 else train_student(folder, part, seed, memory)
            )
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = folder or Path(tmp)
        rows = json.loads(out.read_text()) if out.exists() else []
        have = {(r['part'], r['seed']) for r in rows}
        # the live teacher and the states in int8 come first, then one way after the other
        tasks = [('teacher', -1), ('hidden, float16', -1), ('hidden, int8', -1)]
        tasks += [(k, s) for s in range(seeds) for k in WAYS[:2]]
        tasks += [(k, s) for k in WAYS[2:] for s in (-1 if k in STORES else 0, *range(seeds))]
        tasks = list(dict.fromkeys(tasks))
        for k, s in tasks:
            made = folder / ('teacher.pt' if k == 'teacher' else f'{k}/manifest.json')
            if (k, s) in have and (s >= 0 or made.exists()):
                continue
            args = ['--folder', folder, '--part', k, '--seed', s, *['--memory'] * memory]
            done = subprocess.run(
                [sys.executable, __file__, *map(str, args)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            if (k, s) in have:
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            git = ['git', 'rev-parse', '--short', 'HEAD']
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
            rows.append(dict(part=k, seed=s) | row | dict(protocol=PROTOCOL, commit=commit))
            out.write_text(json.dumps(rows, indent=1) + '\n')
            print(rows[-1], flush=True)


if __name__ == '__main__':
    typer.run(main)
