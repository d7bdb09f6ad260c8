"Time the ways on each pair: tables, a plot, a file of numbers."

import gc, json, multiprocessing, os, platform, sys, time, warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
import torch
from rich.console import Console
from rich.table import Table
from fastdistill import DistillError
from fastdistill.evaluation.model_comparison import cpu_name
from .pairs import PAIRS
from .ways import FLOOR, WAYS

__all__ = ['run_bench']


class StepClock:
    "Seconds of each step, of the wall and of this process"

    def __init__(self):
        self.steps = []

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def start(self):
        self.last = self.now()

    def mark(self):
        now = self.now()
        self.steps.append([b - a for a, b in zip(self.last, now)])
        self.last = now


def run_bench(
    pairs=None,  # names; None: all
    ways=None,  # names; None: all
    rounds: int = 5,  # epochs of each way, in turns; the first one does not count
    batches: int = 4,  # of an epoch
    memory: bool = True,  # the peak of each way, in a process of its own
    out='out',  # folder for the numbers and the plot
    console: Console | None = None,
) -> dict:
    "Time each way on each pair; print tables, save the numbers and a plot"
    console, out = console or Console(width=130), Path(out)
    for n in pairs or []:
        if n not in PAIRS:
            raise DistillError(f'There is no pair {n!r}: must be one of {", ".join(PAIRS)}.')
    chosen = [w for w in WAYS if w == FLOOR or not ways or w in ways]
    if wrong := [w for w in ways or [] if w not in WAYS]:
        raise DistillError(f'There is no way {wrong[0]!r}: must be one of {", ".join(WAYS)}.')
    found = dict(machine=machine_facts(), pairs={})
    out.mkdir(parents=True, exist_ok=True)
    for n in pairs or PAIRS:
        ways = time_pair(PAIRS[n], chosen, rounds, batches, memory, console)
        found['pairs'][n] = dict(title=PAIRS[n].title, ways=ways)
        console.print(bench_table(**found['pairs'][n]))
        (out / 'bench.json').write_text(json.dumps(found, indent=1))
    draw(found, out / 'bench.png')
    console.print(f'Numbers: {out / "bench.json"}. Plot: {out / "bench.png"}.', highlight=False)
    return found


def machine_facts():
    "What the numbers depend on"
    out = dict(
        system=platform.platform(),
        processor=cpu_name(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
    for n in ('torch', 'fastai', 'fastdistill', 'torchvision', 'timm', 'fasterai', 'torchdistill'):
        try:
            out[n] = version(n)
        except PackageNotFoundError:
            out[n] = None
    return out


def time_pair(pair, chosen, rounds, batches, memory, console):
    "Way -> its numbers, or the reason why it did not run"
    out, running, clocks = {}, {}, {}
    peaks = {n: peak(pair, n) for n in chosen} if memory and sys.platform == 'linux' else {}
    for n in chosen:
        start, clock = time.perf_counter(), StepClock()
        try:
            with silence():
                running[n] = WAYS[n](pair, batches)
                running[n].run(clock)
        except Exception as e:  # other packages may raise anything
            out[n] = dict(failed=f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:100]}')
            continue
        out[n], clocks[n] = dict(first_epoch=time.perf_counter() - start), StepClock()
    for i in range(rounds):
        console.print(f'{pair.title}: round {i + 1} of {rounds}', end='\r', highlight=False)
        for n, clock in clocks.items():
            gc.collect()
            with silence():
                running[n].run(clock)
    if FLOOR not in clocks:
        raise DistillError(f'{pair.title} does not train: {out[FLOOR]["failed"]}')
    floor = numbers(clocks[FLOOR].steps, batches)
    for n, c in clocks.items():
        mine = numbers(c.steps, batches)
        out[n] |= dict(
            ms=median(mine['wall']),
            cpu_ms=median(mine['cpu']),
            peak=peaks.get(n),
            ratio=median(a / b for a, b in zip(mine['wall'], floor['wall'])),
            cpu_ratio=median(a / b for a, b in zip(mine['cpu'], floor['cpu'])),
        )
    return out


def numbers(steps, batches):
    "Medians of each round in ms, of the wall and of this process"
    rounds = [steps[i : i + batches] for i in range(0, len(steps), batches)]
    return {
        k: [1e3 * median(s[j] for s in r) for r in rounds] for j, k in enumerate(('wall', 'cpu'))
    }


class silence:
    "Without what fastai, PyTorch and we print"

    def __enter__(self):
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter('ignore')
        self.out, sys.stdout = sys.stdout, open(os.devnull, 'w')

    def __exit__(self, *error):
        sys.stdout.close()
        sys.stdout = self.out
        self.catch.__exit__(*error)


def peak(pair, name):
    "Peak resident memory of a few steps in MiB, in a process of its own; None if it failed"
    # subtle: the process is forked before any model is built here
    context = multiprocessing.get_context('fork')
    mine, theirs = context.Pipe(False)
    child = context.Process(target=peak_here, args=(pair, name, theirs))
    child.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return None
    finally:
        child.join()


def peak_here(pair, name, pipe):
    import resource

    with silence():
        run_one = WAYS[name](pair, 2)
        for _ in range(2):
            run_one.run(StepClock())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def bench_table(title, ways):
    out = Table(
        'way',
        'ms a step',
        'over no teacher',
        'CPU ms',
        'over no teacher',
        'peak MiB',
        'first epoch, s',
        title=title,
    )
    for n, v in ways.items():
        if 'failed' in v:
            out.add_row(n, v['failed'])
        else:
            out.add_row(
                n,
                f'{v["ms"]:.3g}',
                f'{v["ratio"]:.3f}',
                f'{v["cpu_ms"]:.3g}',
                f'{v["cpu_ratio"]:.3f}',
                '' if v['peak'] is None else f'{v["peak"]:.0f}',
                f'{v["first_epoch"]:.1f}',
            )
    return out


def draw(found, path):
    "Bars of each way's time over that without a teacher"
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    pairs = found['pairs'].values()
    fig, axes = plt.subplots(len(pairs), figsize=(9, 3.2 * len(pairs)), squeeze=False)
    for ax, p in zip(axes[:, 0], pairs):
        ran = {n: v['cpu_ratio'] for n, v in p['ways'].items() if 'failed' not in v}
        color = lambda n: (
            'tab:gray'
            if n == FLOOR
            else 'tab:blue'
            if n.startswith('fastdistill')
            else 'tab:orange'
        )
        ax.barh([*ran], [*ran.values()], color=[color(n) for n in ran])
        ax.invert_yaxis()
        ax.axvline(1, color='k', lw=0.8)
        ax.set(title=p['title'], xlabel='CPU time of a step over that without a teacher')
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
