"""How far should the default's gradient ratio fall with what the teacher can add? The scan behind `fade=1` for classes, and recipes that fade for two classes.

    QUALITY_DATA=FOLDER python benchmarks/quality/fading.py            # what is missing, about an hour on one core, then the tables
    python benchmarks/quality/fading.py --no-run                       # only the tables

A way multiplies the gradient ratio by a function of the gain (see `TeacherGain`). Four seeds (two for the language model), which PROTOCOL.md does not use, at each rate of a cell; a way and the labels alone are compared
at the rates with their best mean on the validation split. These rows chose the default: their differences include that choice, unlike those of the protocol. Rows: results/fading.jsonl."""

import json, subprocess
from collections import defaultdict
from statistics import mean, stdev
import protocol, torch, typer
from fastdistill import Recipe, Term, kd, losses
from fastdistill.recipes.teacher_gain import TeacherGain
from loop import predict, train
from measures import measure, score
from tables import table
from tasks import HERE, cells

ROWS = HERE.parent / 'results' / 'fading.jsonl'
SEEDS = range(300, 304)
FEWER = {'lm_short': 2}
LABELS = 'labels'
WAYS = {  # the factor of the ratio, from the gain
    'gain/.2': lambda g: g / 0.2,
    'gain/.5': lambda g: g / 0.5,
    'gain': lambda g: g,
    'gain^1.5': lambda g: g**1.5,
    'gain^2': lambda g: g**2,
}
RATES = dict.fromkeys(
    'first_ages first_emotions first_questions first_intents first_two_digits first_streets first_photos diabetes occupation_short person_short goemotions_short'.split()
) | dict(
    goemotionsweak_short=None,
    trec_short=(0.03, 0.1),
    trec50_short=(0.03, 0.1),
    trec_long=(0.01, 0.03),
    banking77weak_short=(0.03, 0.1, 0.3),
    banking77_short=(0.03, 0.1),
    age5000=None,
    digits100_short=None,
    banking77weak_long=(0.03, 0.1),
    banking77_long=(0.03, 0.1),
    lm_short=(0.003,),
)
TWO_CLASSES = dict(
    first_income=None,
    sst2_short=(0.03, 0.1),
    cancer=None,
    adult500_short=None,
    polarity_short=(0.03, 0.1),
    adultnets5000=None,
    adult5000_short=None,
)
FOR_TWO = {'kd(1,.5)': kd(1.0, 0.5)} | {
    f'kl({T:g})x{r}, fade {fade:g}': Recipe(Term(losses.kl, grad_ratio=r, fade=fade, T=T))
    for T, r, fade in (
        *((T, r, 1.0) for T, r in ((1.0, 1), (1.0, 3), (2.0, 3), (4.0, 3))),
        *((T, r, 0.2) for T, r in ((1.0, 3), (1.0, 1), (4.0, 3), (4.0, 1))),
    )
}


def ways(cell, data):
    "name -> (recipe, factor of its ratio or None); None for labels alone"
    if cell.name in TWO_CLASSES:
        return {LABELS: (None, None)} | {k: (r, None) for k, r in FOR_TWO.items()}
    default = protocol.library_default(cell, data)
    return {LABELS: (None, None)} | {k: (default, f) for k, f in WAYS.items()}


def run(cell, have, code):
    data, own = cell.data(), TeacherGain.factor
    options = dict(void=cell.void) if cell.output == 'pixels' else {}
    for way, (recipe, factor) in ways(cell, data).items():
        for lr in (RATES | TWO_CLASSES)[cell.name] or cell.rates:
            for seed in SEEDS[: FEWER.get(cell.name)]:
                if (cell.name, way, lr, seed) in have:
                    continue
                if factor is not None:
                    TeacherGain.factor = property(lambda o: factor(o.gain).clamp(0, 1))
                try:
                    student, _ = train(cell, data, recipe, lr, seed)
                finally:
                    TeacherGain.factor = own
                r = dict(cell=cell.name, way=way, lr=lr, seed=seed, commit=code)
                for part in ('valid', 'test'):
                    s = getattr(data, part)
                    found = measure(cell.output, predict(student, s.x), s.y, **options)
                    r[part], r[f'{part}_nll'] = score(cell.output, found), found.get('nll')
                with ROWS.open('a') as f:
                    f.write(json.dumps(r) + '\n')


def show(rows, names):
    by = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for r in rows:
        by[r['cell']][r['way']][r['lr']].append(r)
    best = lambda at: max(at.values(), key=lambda o: mean(r['valid'] for r in o))
    lines = []
    for cell in [n for n in names if n in by]:
        alone = {r['seed']: r['test'] for r in best(by[cell][LABELS])}
        line = [cell, f'{mean(alone.values()):.1f}']
        for way, at in by[cell].items():
            if way != LABELS:
                d = [r['test'] - alone[r['seed']] for r in best(at)]
                line.append(f'{mean(d):+z.2f} ± {stdev(d) / len(d) ** 0.5:.2f}')
        lines.append(line)
    heads = FOR_TWO if names is TWO_CLASSES else WAYS
    return table(['cell', 'labels alone', *heads], lines)


def main(run_missing: bool = typer.Option(True, '--run/--no-run')):
    torch.set_num_threads(1)
    read = lambda: [json.loads(o) for o in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    if run_missing:
        have = {(r['cell'], r['way'], r['lr'], r['seed']) for r in read()}
        git = 'git', '-C', str(HERE), 'rev-parse', '--short=12', 'HEAD'
        code = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        for name in (*RATES, *TWO_CLASSES):
            run(cells()[name], have, code)
    for names in (RATES, TWO_CLASSES):
        print(show(read(), names))


if __name__ == '__main__':
    typer.run(main)
