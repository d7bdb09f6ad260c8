"""The quality benchmark: what each recipe is worth, in each cell, at its own best rate.

    python benchmarks/quality/run.py --minutes 60
    python benchmarks/quality/run.py --cells sst2_short,sst2_long --tiers core

First each recipe's rate is chosen on a validation split with one seed, or all seeds of a cell whose split is tiny. Then more seeds run
at that rate. Each run is one line of JSON in benchmarks/results/quality/CELL.jsonl. A restart skips what is there. QUALITY_DATA names the folder of the data sets."""

import json, time, warnings
from pathlib import Path
import torch, typer
from candidates import CANDIDATES
from fastdistill import DistillWarning
from loop import predict, train
from measures import MAIN, measure, score
from stats import best_rate, by_rate
from tasks import HERE, cells

OUT = HERE.parent / 'results' / 'quality'
FURTHER = 2  # rates beyond either end of a cell's grid, where the best one stands at that end


def read(path):
    "The finished runs of a file; a line that an interrupt cut off is none"
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def append(path, run):
    "One whole line in one write, after whatever an interrupt left"
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b'\n'
    with open(path, 'ab', buffering=0) as f:
        f.write((('\n' if cut else '') + json.dumps(run) + '\n').encode())


def next_rate(
    rates,  # of the cell
    tried,  # rate -> validation score of those that ran, the first seed's
):
    "The next rate to try; None once the best one has a worse neighbor on either side, or none is left to try"
    if todo := [r for r in rates if r not in tried]:
        return todo[0]
    best, all_of = max(tried, key=tried.get), sorted(tried)
    factor = rates[1] / rates[0]
    if best == all_of[-1] and len([r for r in all_of if r > max(rates)]) < FURTHER:
        return float(f'{best * factor:.2g}')
    if best == all_of[0] and len([r for r in all_of if r < min(rates)]) < FURTHER:
        return float(f'{best / factor:.2g}')


def one_run(cell, data, candidate, lr, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        student, seconds = train(cell, data, candidate, lr, seed)
    options = dict(void=cell.void) if cell.output == 'pixels' else {}
    found = {
        k: finite(measure(cell.output, predict(student, s.x), s.y, **options))
        for k, s in (('valid', data.valid), ('test', data.test))
    }
    return dict(
        cell=cell.name, recipe=candidate.name, lr=lr, seed=seed, **found, seconds=round(seconds, 2)
    )


WORST = dict.fromkeys(('accuracy', 'miou', 'map', 'f1', 'r2'), 0.0) | dict.fromkeys(
    ('nll', 'bits', 'perplexity', 'mae', 'ece'), 1e3
)


def finite(found):
    "A run that diverged counts as the worst"
    return {k: round(v, 6) if abs(v) < 1e6 else WORST[k] for k, v in found.items()}


def todo(cell, candidate, runs, seeds):
    "(rate, seed) of this candidate's next run; None when it is done"
    own = [r for r in runs if r['recipe'] == candidate.name]
    seeds_at = {lr: {r['seed'] for r in own if r['lr'] == lr} for lr in {r['lr'] for r in own}}
    for lr, have in seeds_at.items():
        if 0 in have and (left := set(range(cell.choosing)) - have):
            return lr, min(left)
    lr = next_rate(cell.rates, by_rate(own, cell.output))
    if lr is not None:
        return lr, 0
    lr = best_rate(own, cell.output)
    left = [s for s in range(seeds) if s not in seeds_at[lr]]
    return (lr, left[0]) if left else None


def classes_of(cell, data):
    return data.train.t.shape[cell.axis if not data.train.views else cell.axis + 1]


def run_cell(cell, candidates, out, until, seeds=None):
    "All that is left to do of these candidates in one cell; False when the time is over"
    path, data = out / f'{cell.name}.jsonl', None
    runs = read(path)
    for c in candidates:
        if cell.output not in c.outputs.split():
            continue
        while (job := todo(cell, c, runs, seeds or cell.seeds)) is not None:
            if time.time() > until:
                return False
            data = data or cell.data()
            if not c.fits(cell, classes_of(cell, data)):
                break
            runs.append(one_run(cell, data, c, *job))
            append(path, runs[-1])
            r = runs[-1]
            print(
                f'{time.strftime("%H:%M:%S")} {cell.name} {c.name} lr {r["lr"]:g} seed {r["seed"]}: {MAIN[cell.output]} valid '
                f'{score(cell.output, r["valid"]):.2f} test {score(cell.output, r["test"]):.2f}, {r["seconds"]:.1f} s',
                flush=True,
            )
    return True


def main(
    out: Path = OUT,
    cell_names: str = typer.Option('', '--cells'),
    tiers: str = 'core,peer,more',
    names: str = typer.Option('', '--candidates'),
    minutes: float = 1e6,
    seeds: int = 0,
    cost: int = 9,
):
    torch.set_num_threads(1)
    until, have = time.time() + 60 * minutes, cells()
    chosen = (
        [have[n] for n in cell_names.split(',')]
        if cell_names
        else [c for c in have.values() if c.cost <= cost]
    )
    for tier in tiers.split(','):
        candidates = [
            c
            for c in CANDIDATES.values()
            if c.tier == tier and (not names or c.name in names.split(';'))
        ]
        for cell in chosen:
            if not run_cell(cell, candidates, out, until, seeds or None):
                return


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(main)

if __name__ == '__main__':
    app()
