"""Is one commit slower than another? Steps of fastai fits and the writing of a cache, timed in turns.

    python benchmarks/between_commits.py 6ca4522 ca807b1

Each commit runs in a process of its own, with one thread. In each round, one process and then the other runs an epoch of each way, and
the order changes from round to round, so that other programs slow down both alike. The ratio, of the second commit to the first, is the
median of the rounds' ratios, of CPU time and of wall time. On a shared machine, trust CPU time. A step without a teacher runs no code of
the package, so its ratio is noise.

Writes results/between_commits.json. The stored run is from a machine with a load of 13 on 2 cores, where a commit timed against itself
(results/between_commits_itself.json, 5 rounds) differs by up to 5% in CPU time. So it shows no difference, but could not show a small one.
results/between_commits_quiet.json has five runs with nothing beside them.
"""

import json, os, subprocess, sys, tempfile, time, warnings
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from statistics import median, quantiles
import torch, typer
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.basics import set_seed
from fastai.layers import ConvLayer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset
from same_results import ROOT, check_package, environment, source

OUT = ROOT / 'benchmarks' / 'results' / 'between_commits.json'
WAYS = 'no teacher', 'kd', 'default', 'kd, cached', 'default, cached', 'writing a cache'
BATCHES, BS, CLASSES = 30, 64, 100
WORK = '--work'  # a process of this script that runs one commit


def clocks():
    return time.process_time(), time.perf_counter()


def net(*widths):
    convs = [ConvLayer(i, o, stride=2) for i, o in zip((3, *widths), widths)]
    return nn.Sequential(
        *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)
    )


class Steps(Callback):
    "CPU and wall time from the first to the last step of training; nothing is validated"

    order = 100

    def before_train(self):
        self.start = clocks()

    def after_train(self):
        self.end = clocks()

    def before_validate(self):
        raise CancelValidException


def ways(folder):
    "{way: fn() -> (start, end) of an epoch or of writing}, by the package that is imported"
    from fastdistill.fastai import KnowledgeDistillation, Teacher, cache_teacher, kd
    from fastdistill.teachers.fast_copy import AS_IT_IS

    set_seed(0)
    n = BATCHES * BS
    data = TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(CLASSES, (n,)))
    dls = DataLoaders.from_dsets(data, data, bs=BS, num_workers=0)
    student, model = net(16, 32, 64), net(32, 64, 128)
    # the model itself, because which copy of it is faster would be measured anew in each process
    as_it_is = dict(run=AS_IT_IS) if 'run' in signature(Teacher).parameters else AS_IT_IS
    teacher = Teacher(model, **as_it_is)
    caches = iter(range(10**6))
    write = lambda: cache_teacher(
        teacher,
        dls,
        Path(folder) / str(next(caches)),
        kind='softmax',
        keys=[*map(str, range(n))],
        check=False,
        progress=False,
    )
    cache, recipe = write(), kd(T=4, alpha=0.9)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat())

    def fit(*cbs):
        steps = Steps()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-4, cbs=[*cbs, steps])
        return steps.start, steps.end

    def timed_write():
        start = clocks()
        write()
        return start, clocks()

    distill = lambda of, *recipe: lambda: fit(KnowledgeDistillation(of, *recipe, check=False))
    runs = fit, distill(teacher, recipe), distill(teacher), distill(cache, recipe), distill(cache)
    return dict(zip(WAYS, (*runs, timed_write)))


def work(source):
    "Answer each line of the input, the name of a way, with its seconds: CPU and wall"
    check_package(source)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    answers, sys.stdout = sys.stdout, sys.stderr  # for what the package prints
    with tempfile.TemporaryDirectory() as folder:
        have = ways(folder)
        for line in sys.stdin:
            start, end = have[line.strip()]()
            print(json.dumps([b - a for a, b in zip(start, end)]), file=answers, flush=True)


def start(source):
    return subprocess.Popen(
        [sys.executable, __file__, WORK, source],
        env=environment(source),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ask(process, way):
    print(way, file=process.stdin, flush=True)
    if not (answer := process.stdout.readline()):
        raise SystemExit(
            f'The process of {process.args[-1]} failed: {" ".join(map(str, process.args))}'
        )
    return json.loads(answer)


def summary(old, new):
    "Of the rounds' (CPU, wall) seconds"
    found = {}
    for k, clock in enumerate(('cpu', 'wall')):
        ratios = [b[k] / a[k] for a, b in zip(old, new)]
        ms = [1000 * median(o[k] for o in side) for side in (old, new)]
        low, _, high = quantiles(ratios, n=4)
        found[clock] = dict(ratio=median(ratios), quartiles=(low, high), ms=ms)
    return found


def main(old: str, new: str, rounds: int = 15, out: Path = OUT):
    if rounds < 5:
        raise typer.BadParameter(f'--rounds {rounds}: at least 5 are needed for a median')
    with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
        sources = [source(c, Path(tmp) / n) for c, n in ((old, 'old'), (new, 'new'))]
        processes = [stack.enter_context(start(folder)) for folder, _ in sources]
        for way in WAYS:
            for p in processes:
                ask(p, way)  # warm-up
        times = {way: ([], []) for way in WAYS}
        for i in range(rounds):
            for way in WAYS:
                for k in (0, 1) if i % 2 else (1, 0):
                    times[way][k].append(ask(processes[k], way))
            print(f'round {i + 1} of {rounds}', end='\r', flush=True)
        for p in processes:
            p.stdin.close()
    found = {way: summary(*t) for way, t in times.items()}
    table = Table('', 'CPU ms', 'ratio', 'quartiles', 'wall ms', 'ratio', 'quartiles')
    names = [name for _, name in sources]
    table.title = f'{names[1]} / {names[0]}; an epoch of {BATCHES} steps, {rounds} rounds'
    for way, f in found.items():
        cells = [
            cell
            for c in (f['cpu'], f['wall'])
            for cell in (
                ' / '.join(f'{ms:.0f}' for ms in c['ms'][::-1]),
                f'{c["ratio"]:.3f}',
                '{:.3f} to {:.3f}'.format(*c['quartiles']),
            )
        ]
        table.add_row(way, *cells)
    Console(width=120).print(table)
    facts = dict(commits=names, rounds=rounds, batches=BATCHES, load=os.getloadavg()[0])
    out.write_text(json.dumps(dict(**facts, torch=torch.__version__, ways=found), indent=1) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == [WORK]:
        work(Path(sys.argv[2]))
    else:
        typer.run(main)
