"""Rows of a stream at scale: writers that are killed and restarted, sealing, and the join, in one run.

    python benchmarks/streams.py                                        # 100,000 rows: seconds
    python benchmarks/streams.py --rows 1000000 --out benchmarks/results/streams.json
    python benchmarks/streams.py --rows 1000000 --classes 500           # rows of 1,000 bytes
    python benchmarks/streams.py --rows 100000000 --folder BIG_DISK     # about 6 GB

The rows are synthetic: the teacher's logits are a function of the sample's number, so every row can be verified, and no time goes into a model. Eight writers
(`--writers`) write them with `write_stream`; each is killed at random times (`--kills`), and restarted. Then the folder is sealed in a process of its own, whose
memory is measured, and each sample of a stream gets its row, in the order of the cache and shuffled. Three readers stand for the reader of a training: one that only makes dicts, one
that reads the members of tar files, and one that also decodes them (JPEG, 64 pixels).
"""

import io, json, multiprocessing, os, platform, signal, subprocess, sys, tarfile, tempfile, time
from pathlib import Path
import numpy as np
import torch
import typer
from PIL import Image
from torch.utils.data import IterableDataset
from fastdistill.base.outputs import Outputs
from fastdistill.cache import (
    StreamJoin,
    TeacherCache,
    TeacherRows,
    seal_stream,
    start_stream,
    write_stream,
)
from fastdistill.cache.digests import file_checksum
from fastdistill.cache.keys import keys_of

PROTOCOL = 1
BS = 1000
MB = 2**20


class Numbered:
    "A teacher whose logits tell the number of the sample: its 16 digits, and then numbers that depend on it, below 1,000"

    name, modules = 'numbered', [torch.nn.Identity()]

    def __init__(self, classes):
        self.more = 31 * torch.arange(classes - 16)

    def __call__(self, x):
        digits = x[:, None] // 10 ** torch.arange(16) % 10
        return Outputs(torch.cat([digits, (17 * x[:, None] + self.more) % 1000], 1).float())


def batches(first, last):
    for i in range(first, last, BS):
        ids = np.arange(i, min(i + BS, last))
        yield dict(inputs=torch.from_numpy(ids), key=ids)


def span(k, n, writers):
    return k * n // writers, (k + 1) * n // writers


def write(folder, k, n, writers, part_bytes, classes):
    rows = TeacherRows(folder, Numbered(classes))
    write_stream(batches(*span(k, n, writers)), rows, f'writer-{k:03}', part_bytes=part_bytes)


def written_by_killed(folder, n, writers, kills, part_bytes, classes, rng):
    "Each writer is killed `kills` times after a random time, while others go on; then all write to the end"
    ctx, n_killed, t = multiprocessing.get_context('fork'), 0, time.perf_counter()
    left, running, seconds = {k: kills for k in range(writers)}, {}, 1.0 + n / writers / 2e5
    done = set()
    while len(done) < writers:
        for k in set(range(writers)) - done - set(running):
            p = ctx.Process(target=write, args=(folder, k, n, writers, part_bytes, classes))
            p.start()
            until = time.perf_counter() + rng.random() * seconds if left[k] else float('inf')
            running[k] = p, until
        for k, (p, until) in [*running.items()]:
            if p.exitcode is not None:
                del running[k]
                if p.exitcode == 0:
                    done.add(k)
                elif p.exitcode != -signal.SIGKILL:
                    raise RuntimeError(f'writer {k} ended with {p.exitcode}')
            elif time.perf_counter() > until:
                p.kill()
                p.join()
                left[k] -= 1
                n_killed += 1
        time.sleep(0.005)
    return n_killed, time.perf_counter() - t


def forget(files):
    "Drop files from the page cache, so that they are read from the disk"
    for f in files:
        with open(f, 'rb') as o:
            os.fsync(o.fileno())
            os.posix_fadvise(o.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files, cold):
    if cold:
        forget(files)
    t, part = time.perf_counter(), memoryview(bytearray(MB))
    for f in files:
        with open(f, 'rb') as o:
            while o.readinto(part):
                pass
    return time.perf_counter() - t


def peak_of(fn):
    "(seconds, processor seconds, bytes of memory that a function needs at most beyond what the process has before), in a process of its own"

    def run(to):
        now = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        Path('/proc/self/clear_refs').write_text('5')
        t, busy = time.perf_counter(), time.process_time()
        fn()
        t, busy = time.perf_counter() - t, time.process_time() - busy
        peak = next(o for o in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in o)
        to.send((t, busy, int(peak.split()[1]) * 1024 - now))

    ctx = multiprocessing.get_context('fork')
    mine, to = ctx.Pipe()
    p = ctx.Process(target=run, args=(to,))
    p.start()
    to.close()
    found = mine.recv()
    p.join()
    return found


class Dicts(IterableDataset):
    "The fastest reader: it makes dicts"

    def __init__(self, ids):
        self.ids = ids

    def __iter__(self):
        return (dict(__key__=i) for i in self.ids)


class Tars(IterableDataset):
    "Members of tar files, as WebDataset reads them"

    def __init__(self, files, decode):
        self.files, self.decode = files, decode

    def __iter__(self):
        for f in self.files:
            with tarfile.open(f, 'r|') as tar:
                for member in tar:
                    data = tar.extractfile(member).read()
                    if self.decode:
                        data = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
                    yield dict(__key__=int(member.name.split('.')[0]), jpg=data)


def tars(folder, n, per=2000):
    rng, files = np.random.default_rng(0), []
    pictures = []
    for _ in range(50):
        small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64), 3)
        small.save(o := io.BytesIO(), 'jpeg', quality=85)
        pictures.append(o.getvalue())
    for i in range(0, n, per):
        files.append(folder / f'{i:08}.tar')
        with tarfile.open(files[-1], 'w') as tar:
            for j in range(i, min(i + per, n)):
                info = tarfile.TarInfo(f'{j}.jpg')
                info.size = len(data := pictures[j % len(pictures)])
                tar.addfile(info, io.BytesIO(data))
    return files


def speed(stream):
    "Samples per second of processor time, which other processes on the machine change least"
    t, n = time.process_time(), 0
    for _ in stream:
        n += 1
    return n / (time.process_time() - t)


def share_of_join(make, cache, repeats):
    "Medians of the samples per second of the reader, and with the join, in turns; loss of throughput in %"
    alone, joined = [], []
    for _ in range(repeats):
        alone.append(speed(make()))
        joined.append(speed(StreamJoin(make(), cache)))
    a, b = float(np.median(alone)), float(np.median(joined))
    return dict(reader=round(a), with_join=round(b), loss_percent=round(100 * (1 - b / a), 1))


def verify(cache, n, classes):
    "Every row is that of its sample"
    for i in range(0, n, 10**5):
        ids = np.arange(i, min(i + 10**5, n))
        got = cache.outputs(cache.find(keys_of(ids.tolist()))).logits
        want = Numbered(classes)(torch.from_numpy(ids)).logits
        assert torch.equal(got, want), f'rows from {i} on differ'


def main(
    rows: int = 100_000,
    classes: int = 16,  # a row has twice as many bytes
    writers: int = 8,
    kills: int = 2,
    seed: int = 0,
    part_mb: float = 0,  # size of a file; 0: 16 files for each writer, at most 64 MB
    samples: int = 20_000,  # of the join
    repeats: int = 5,
    folder: Path | None = None,
    out: Path | None = None,
):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        path, n, rng = Path(tmp) / 'rows', rows, np.random.default_rng(seed)
        example = next(batches(0, 64))
        bytes_per_row = start_stream(
            path, Numbered(classes), example, 'float16'
        ).manifest.layout.bytes
        part = int(part_mb * MB) or min(max(n * bytes_per_row // writers // 16, 1000), 64 * MB)
        killed, t = written_by_killed(path, n, writers, kills, part, classes, rng)
        row = dict(rows=n, writers=writers, killed=killed, bytes_per_row=bytes_per_row)
        files = sorted(path.rglob('*.rows')) + sorted(path.rglob('*.keys'))
        row |= dict(files=len(files), seconds_to_write=round(t, 2))
        warm, cold = seconds_to_read(files, False), seconds_to_read(files, True)
        t, busy = time.perf_counter(), time.process_time()
        for f in files:
            file_checksum(f)
        row |= dict(read=round(warm, 3), read_cold=round(cold, 3))
        row |= dict(checksums=round(time.perf_counter() - t, 3))
        row |= dict(checksums_processor=round(time.process_time() - busy, 3))
        forget(files)
        t, busy, peak = peak_of(lambda: seal_stream(path))
        row |= dict(
            seal=round(t, 3), seal_processor=round(busy, 3), seal_over_read_cold=round(t / cold, 2)
        )
        row |= dict(seal_over_read=round(t / warm, 2), memory_mb=round(peak / MB, 1))
        row |= dict(memory_bytes_per_row=round(peak / n, 1))
        cache = TeacherCache(path)
        assert len(cache) == n, 'rows were lost or doubled'
        verify(cache, n, classes)
        row |= dict(lost_or_doubled=0)
        print(json.dumps(row), flush=True)
        m = min(samples, n)
        files = tars(Path(tmp), m)
        order = rng.permutation(n)[:m].tolist()
        row['join'] = {
            'dicts': share_of_join(lambda: Dicts(range(m)), cache, repeats),
            'dicts, shuffled': share_of_join(lambda: Dicts(order), cache, repeats),
            'tar': share_of_join(lambda: Tars(files, False), cache, repeats),
            'tar, JPEG decoded': share_of_join(lambda: Tars(files, True), cache, repeats),
        }
        print(json.dumps(row['join'], indent=1))
    if out is not None:
        commit = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
        )
        row |= dict(protocol=PROTOCOL, commit=commit.stdout.strip(), seed=seed, kills=kills)
        row |= dict(
            machine=f'{platform.machine()}, {os.cpu_count()} cores', command=' '.join(sys.argv)
        )
        have = json.loads(out.read_text()) if out.exists() else []
        have = [
            o
            for o in have
            if (o['rows'], o['bytes_per_row'], o['protocol']) != (n, bytes_per_row, PROTOCOL)
        ] + [row]
        out.write_text(
            json.dumps(sorted(have, key=lambda o: (o['rows'], o['bytes_per_row'])), indent=1) + '\n'
        )


if __name__ == '__main__':
    typer.run(main)
