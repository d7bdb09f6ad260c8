"""The runs of PROTOCOL.md.

    python benchmarks/quality/run.py                                                   # all that is missing, quick cells first
    python benchmarks/quality/run.py --cells sst2_short --recipes 'labels;default' --minutes 5
    python benchmarks/quality/run.py --plan                                            # what is missing, and how long it will take
    python benchmarks/quality/run.py --out FOLDER --recipes 'labels;jsd(4)x3'          # other candidates, into another folder

Each run is one line of JSON in benchmarks/results/quality/protocol2/CELL.jsonl. A restart skips what is there and still counts: a
run with a different recipe, teacher, setup or protocol, or of a library that trains differently, does not. QUALITY_DATA names the folder of the data sets.

The loop is not the library's `Runs`: which run is next follows from the stored lines, and what counts from the plan, so `Runs` would only be wrapped around both."""

import subprocess, time, warnings
from pathlib import Path
import numpy as np
import torch, typer
import protocol
from candidates import CANDIDATES
from fastdistill import DistillWarning
from loop import predict, train
from measures import MAIN, measure, score
from stored import OUT, append, read, read_json, write_json
from tasks import HERE, cells

FOLDER = OUT / f'protocol{protocol.VERSION}'


def commit():
    "Of the code that runs; with a + if files that are in it have changed"
    git = lambda *a: subprocess.run(
        ['git', '-C', str(HERE), *a], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = git('status', '--porcelain', '-uno', '--', ':/src', ':/benchmarks/quality')
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if changed else '')


WORST = dict.fromkeys(('accuracy', 'miou', 'map', 'f1', 'r2'), 0.0) | dict.fromkeys(
    ('nll', 'bits', 'perplexity', 'mae', 'ece'), 1e3
)


def finite(found):
    "A run that diverged counts as the worst"
    return {k: round(v, 6) if abs(v) < 1e6 else WORST[k] for k, v in found.items()}


def one_run(cell, data, recipe, lr, seed):
    "The measures on the validation and the test split, and the seconds"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DistillWarning)
        student, seconds = train(cell, data, recipe, lr, seed)
    options = dict(void=cell.void) if cell.output == 'pixels' else {}
    raw = {
        k: measure(cell.output, predict(student, s.x), s.y, **options)
        for k, s in (('valid', data.valid), ('test', data.test))
    }
    found = {k: finite(v) for k, v in raw.items()}
    diverged = not all(abs(v) < 1e6 for o in raw.values() for v in o.values())
    return dict(found, diverged=diverged, seconds=round(seconds, 2))


def run_cell(cell, out, until, names=(), code=''):
    """All that is left to do in one cell of these recipes, or of all; False when the time is over.

    The plan is stored beside the runs, so that tables know what belongs to it."""
    if cell.sealed and not protocol.FROZEN:
        print(f'{cell.name}: its data are for the frozen default, see PROTOCOL.md')
        return True
    path, data = out / f'{cell.name}.jsonl', cell.data()
    planned, recipes = protocol.plan(cell, data, others(cell, names))
    write_plan(out, cell.name, planned)
    runs = read(path)
    for name in [n for n in recipes if not names or n in names]:
        own = [r for r in runs if protocol.belongs(r, planned, name)]
        valid = lambda r: score(cell.output, r['valid'])
        while (job := protocol.next_run(planned, name, own, valid)) is not None:
            if time.time() > until:
                return False
            lr, seed, role = job
            r = dict(
                protocol=protocol.VERSION,
                cell=cell.name,
                setup=planned['setup'],
                recipe=planned['recipes'][name]['text'],
                lr=lr,
                seed=seed,
                role=role,
                **one_run(cell, data, recipes[name], lr, seed),
                commit=code,
                day=time.strftime('%Y-%m-%d'),
                behavior=planned['recipes'][name]['behavior'],
                teacher=planned['teacher'],
            )
            append(path, r)
            runs.append(r)
            own.append(r)
            print(
                f'{time.strftime("%H:%M:%S")} {cell.name} {name} lr {lr:g} seed {seed} ({role}): {MAIN[cell.output]} valid '
                f'{valid(r):.2f} test {score(cell.output, r["test"]):.2f}, {r["seconds"]:.1f} s',
                flush=True,
            )
    return True


def others(cell, names):
    "Candidates that are named and that the protocol does not have for such a cell"
    return [n for n in names if n in CANDIDATES and n not in protocol.names(cell)]


def check_names(names, chosen, out):
    for name in names:
        if name not in ('labels', 'default', *CANDIDATES):
            raise typer.BadParameter(f'{name!r} is not in CANDIDATES of candidates.py')
        if out == FOLDER and not any(name in protocol.names(c) for c in chosen):
            raise typer.BadParameter(
                f'the protocol does not have {name!r} in these cells. Write it to a folder of its own: --out {FOLDER}_more'
            )


def write_plan(out, name, planned):
    "Candidates that were planned before stay in the plan of the same cell"
    plans = read_json(out / 'plan.json')
    before = plans.get(name, {})
    if all(before.get(k) == v for k, v in planned.items() if k != 'recipes'):
        planned = planned | dict(recipes=before['recipes'] | planned['recipes'])
    write_json(out / 'plan.json', dict(sorted((plans | {name: planned}).items())))


def quick_first(chosen):
    "First tries, then the cells in the order of their cost"
    return sorted(chosen, key=lambda c: (not c.first_try, c.name in protocol.LONG, c.cost))


def main(
    out: Path = FOLDER,
    cell_names: str = typer.Option('', '--cells'),
    recipes: str = '',
    minutes: float = 1e6,
    plan: bool = False,
):
    torch.set_num_threads(1)
    until, have, code = time.time() + 60 * minutes, cells(), commit()
    names, total = [n for n in recipes.split(';') if n], 0.0
    chosen = [have[n] for n in cell_names.split(',')] if cell_names else [*have.values()]
    check_names(names, chosen, out)
    for cell in quick_first(chosen):
        if plan:
            total += estimate(cell, out, names)
            continue
        try:
            if not run_cell(cell, out, until, names, code):
                return
        except (FileNotFoundError, ImportError) as e:
            print(f'{cell.name} was not run: {e}', flush=True)
    if plan:
        print(f'In all about {total / 60:,.0f} CPU minutes')


def estimate(cell, out, names):
    """Print about how many runs of a cell are missing; return their seconds.

    Seconds are those of stored runs of the cell: of this protocol, else of the first one, else a guess."""
    stored = read(out / f'{cell.name}.jsonl')
    planned = read_json(out / 'plan.json').get(cell.name)
    before = stored or read(OUT / f'{cell.name}.jsonl')
    seconds = np.mean([r['seconds'] for r in before]) if before else (1.0, 4.0, 30.0)[cell.cost - 1]
    left = 0
    for name in [n for n in protocol.names(cell) if not names or n in names]:
        if planned and name not in planned['recipes']:
            continue  # it needs more classes
        own = [r for r in stored if planned and protocol.belongs(r, planned, name)]
        done = (
            planned
            and protocol.next_run(planned, name, own, lambda r: score(cell.output, r['valid']))
            is None
        )
        left += (
            0 if done else max(protocol.amount(cell.rates, len(protocol.seeds(cell))) - len(own), 1)
        )
    print(
        f'{cell.name}: about {left} runs of {seconds:.1f} s are missing, {left * seconds / 60:.0f} CPU minutes'
    )
    return left * seconds


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(main)

if __name__ == '__main__':
    app()
