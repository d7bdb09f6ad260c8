"""Do two or more commits train the same student, bit for bit?

    QUALITY_DATA=FOLDER python benchmarks/same_results.py 6ca4522 HEAD

Each commit trains with its own `src` and its own `benchmarks/quality/loop.py`, in a process of its own and with one thread: three cells
of the quality benchmark, labels alone and three recipes each, one rate and one seed. All use the same stored teachers. The weights of
the students and their logits for the test set are compared with those of the commit before, by their SHA-256. Instead of a commit, a
folder with a copy of the repository may be given. FOLDER holds text/trec and tabular/adult. Writes results/same_results.json, which is
from

    QUALITY_DATA=FOLDER python benchmarks/same_results.py 6ca4522 8784be8 0d301c1 ca807b1 1f6fb69

Two changes were meant to give other results, and only with a gradient ratio: how it is measured (f4d911b, between the first two: one
run differs), and weights that are divided by 1 plus the gradient ratios (0d301c1).
"""

import hashlib, inspect, json, os, subprocess, sys, tempfile, warnings
from pathlib import Path
import torch, typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'benchmarks' / 'results' / 'same_results.json'
CELLS = 'trec50_short', 'occupation_short', 'digits100_short'
RECIPES = 'labels', 'kd(4,.9)', 'dist(4)', 'dist(4)x3'  # x3: the gradient ratio, else a weight
SEED = 0
TRAIN = '--train'  # one process of this script: all runs of one commit


def git(*args):
    return subprocess.run(['git', '-C', ROOT, *args], capture_output=True, check=True).stdout


def source(commit, folder):
    "(the folder of the source, what it is): `commit` itself if it is a folder, else its files, copied into `folder`"
    if Path(commit).is_dir():
        return Path(commit).resolve(), str(commit)
    folder.mkdir()
    subprocess.run(['tar', '-xC', folder], input=git('archive', commit), check=True)
    return folder, git('rev-parse', '--short=7', f'{commit}^{{commit}}').decode().strip()


def environment(source, **more):
    "Variables of a process that imports the package of `source`, and computes with one thread"
    return {**os.environ, 'PYTHONPATH': str(source / 'src'), 'OMP_NUM_THREADS': '1', **more}


def check_package(source):
    import fastdistill

    if not Path(fastdistill.__file__).is_relative_to(source):
        raise SystemExit(f'{fastdistill.__file__} was imported, which is not in {source}.')


def digest(tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def train_all(source):
    "Train with the code of `source`, and print the results"
    check_package(source)
    sys.path.insert(0, str(source / 'benchmarks' / 'quality'))
    from candidates import CANDIDATES, Candidate
    from fastdistill import dist
    from loop import predict, train
    from tasks import cells

    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    # `train` of older commits takes the candidate, and makes the recipe itself
    makes = 'candidate' in inspect.signature(train).parameters
    weighted = Candidate('dist(4)', lambda: dist(T=4.0, beta=2.0, gamma=2.0))
    found, have, known = {}, cells(), {**CANDIDATES, weighted.name: weighted}
    for name in CELLS:
        cell, data = have[name], have[name].data()
        for recipe in RECIPES:
            c = known[recipe]
            student, _ = train(cell, data, c if makes else c.recipe(), cell.rates[1], SEED)
            logits = predict(student, data.test.x)
            right = (logits.argmax(1) == data.test.y).double().mean().item()
            found[f'{name}, {recipe}'] = dict(
                rate=cell.rates[1],
                accuracy=round(100 * right, 2),
                weights=digest(student.state_dict().values()),
                logits=digest([logits]),
            )
    print(json.dumps(found))


def results_of(source, kept):
    "The results of a process that imports from `source` only"
    return json.loads(
        subprocess.run(
            [sys.executable, __file__, TRAIN, source],
            env=environment(source, QUALITY_KEPT=str(kept)),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )


def main(commits: list[str], out: Path = OUT):
    if len(commits) < 2:
        raise typer.BadParameter(f'{len(commits)} commit: give two or more to compare')
    if 'QUALITY_DATA' not in os.environ:
        raise typer.BadParameter('set QUALITY_DATA to the folder of the data sets')
    with tempfile.TemporaryDirectory() as tmp:
        sources = [source(c, Path(tmp) / str(i)) for i, c in enumerate(commits)]
        found = {name: results_of(folder, Path(tmp) / 'kept') for folder, name in sources}
    names = [*found]
    same = {
        f'{a}, {b}': [k for k in found[a] if found[a][k] == found[b][k]]
        for a, b in zip(names, names[1:])
    }
    table = Table(
        'cell, recipe', *names, title='accuracy; *: not as the commit before, bit for bit'
    )
    for k in found[names[0]]:
        stars = ['', *('' if k in s else '*' for s in same.values())]
        table.add_row(k, *(f'{found[n][k]["accuracy"]:.2f}{s}' for n, s in zip(names, stars)))
    Console(width=100).print(table)
    facts = dict(seed=SEED, torch=torch.__version__, same=same, runs=found)
    out.write_text(json.dumps(facts, indent=1) + '\n')
    for pair, s in same.items():
        print(f'{pair}: {len(s)} of {len(found[names[0]])} runs are the same, bit for bit')


if __name__ == '__main__':
    if sys.argv[1:2] == [TRAIN]:
        train_all(Path(sys.argv[2]))
    else:
        typer.run(main)
