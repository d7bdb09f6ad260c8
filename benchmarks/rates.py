"""Does `fastdistill train --lr auto` find good learning rates? Its rule, and the suggestions of fastai's lr_find, against a grid of rates.

    BENCHMARK_DATA=FOLDER python benchmarks/rates.py            # the trainings that are missing, half an hour on one core, then the tables
    python benchmarks/rates.py --no-run                         # only the tables

Each training is one of `fastdistill train`: its data, its network, labels alone, seed 0. It runs at each rate of a grid, and further while the best rate is at an end of the grid; its score is the accuracy on the
validation set after the last epoch (of the foreground, for masks). Between the rates that ran, the score at a suggested rate is interpolated. `valley` is what `--lr auto` used before, limited to 1e-4 and .03;
`minimum`, `steep` and `slide` are limited to 1e-4 and .3, as the present rule is. FOLDER holds imagenette96, camvid, text/trec, text/banking77 and tabular/adult. Rows: results/rates.jsonl.
"""

import io, json, math, os, subprocess, tarfile, tempfile, warnings
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import torch, typer
from fastai.callback.schedule import minimum, slide, steep, valley
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from fastdistill.cli.training.architectures import learner_of
from fastdistill.cli.training.config import TrainConfig
from fastdistill.cli.training.data_checks import checked_samples
from fastdistill.cli.training.data_files import read_samples
from fastdistill.cli.training.dataloaders import loaders_of
from fastdistill.cli.training.exported_student import FOR_STUDENT
from fastdistill.cli.training.resumable_fit import BEFORE_FIT, seed_epoch, seed_everything
from fastdistill.cli.training.rate_finder import IF_NONE_IS_FOUND, RATES, find_rate

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'benchmarks' / 'results' / 'rates.jsonl'
DATA = Path(os.environ.get('BENCHMARK_DATA', '../shared/data'))
GRID = 3e-4, 1e-3, 3e-3, 1e-2, 3e-2
BEFORE = 'valley'
RULES = {BEFORE: valley, 'minimum': minimum, 'steep': steep, 'slide': slide}
AUTO = '--lr auto'
TABLE = dict(task='table', y='income', valid='v', student='tabular')
TEXT = dict(x='text', y='label', valid='v')
CELLS = {
    'digits, cnn 4,8, 54 steps': dict(data='digits', student_layers='4,8', epochs=3),
    'digits, cnn 4,8, 180 steps': dict(data='digits', student_layers='4,8', epochs=10),
    'digits, cnn 4,8, 720 steps': dict(data='digits', student_layers='4,8', epochs=40),
    'digits, cnn 32,64, 180 steps': dict(data='digits', student_layers='32,64', epochs=10),
    'digits, resnet18': dict(data='digits', student='resnet18', epochs=3),
    'photographs, cnn 16,32,64': dict(
        data='photos', student_layers='16,32,64', epochs=8, size='64'
    ),
    'photographs, xresnet18': dict(data='photos', student='xresnet18', epochs=3, size='24'),
    'photographs, mobilenet_v3_small': dict(
        data='photos', student='mobilenet_v3_small', epochs=4, size='32'
    ),
    'photographs, convnext_atto': dict(data='photos', student='convnext_atto', epochs=3, size='32'),
    'scenes, cnn 8,16,32': dict(data='scenes', student_layers='8,16,32', epochs=8, size='48x64'),
    'scenes, cnn 16,32,64': dict(data='scenes', student_layers='16,32,64', epochs=4, size='48x64'),
    'adult, tabular 50,25': dict(TABLE, data='adult.csv', student_layers='50,25', epochs=5),
    'adult, tabular 200,100': dict(
        TABLE, data='adult.csv', student_layers='200,100', epochs=10, batch_size=64
    ),
    'trec, embedding_bag': dict(
        TEXT, data='trec.csv', student='embedding_bag', student_layers='64,32', epochs=8
    ),
    'trec, awd_lstm': dict(
        TEXT, data='trec.csv', student='awd_lstm', student_layers='50,100,100', epochs=4
    ),
    'banking77, embedding_bag': dict(
        TEXT, data='banking77.csv', student='embedding_bag', student_layers='64,32', epochs=6
    ),
    'banking77, awd_lstm': dict(
        TEXT, data='banking77.csv', student='awd_lstm', student_layers='50,100,100', epochs=4
    ),
}


def write_data(folder):
    x, y = load_digits(return_X_y=True)
    for i, (image, digit) in enumerate(zip(x.reshape(-1, 8, 8), y)):
        out = folder / 'digits' / ('train' if i < 1200 else 'valid') / str(digit)
        out.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype('uint8')).resize((16, 16)).save(out / f'{i}.png')
    for part, n, to in (('train', 150, 'train'), ('val', 60, 'valid')):
        count = {}
        with tarfile.open(DATA / 'imagenette96' / f'{part}.tar') as t:
            for m in filter(tarfile.TarInfo.isfile, t):
                kind = Path(m.name).parent.name
                count[kind] = count.get(kind, 0) + 1
                if count[kind] <= n:
                    out = folder / 'photos' / to / kind
                    out.mkdir(parents=True, exist_ok=True)
                    image = Image.open(io.BytesIO(t.extractfile(m).read())).convert('RGB')
                    image.resize((64, 64)).save(out / f'{Path(m.name).stem}.png')
    for part, n, to in (('train', 240, 'train'), ('val', 60, 'valid')):
        for image in sorted((DATA / 'camvid' / part / 'images').iterdir())[:n]:
            mask = DATA / 'camvid' / part / 'masks' / f'{image.stem}.png'
            for file, how in ((image, Image.BILINEAR), (mask, Image.NEAREST)):
                out = folder / 'scenes' / to / file.parent.name
                out.mkdir(parents=True, exist_ok=True)
                Image.open(file).resize((96, 72), how).save(out / f'{image.stem}.png')
    (folder / 'scenes' / 'codes.txt').write_text((DATA / 'camvid' / 'codes.txt').read_text())
    texts = lambda *path: [pd.read_csv(DATA.joinpath('text', *path, f'{o}.csv.gz')) for o in PARTS]
    train, test = (o[['text', 'coarse']] for o in texts('trec'))
    parts(train.sample(2500, random_state=0), test, 'text label'.split()).to_csv(
        folder / 'trec.csv', index=False
    )
    train, test = texts('banking77')
    parts(
        train.sample(4000, random_state=0), test.sample(1500, random_state=0), 'text label'.split()
    ).to_csv(folder / 'banking77.csv', index=False)
    read = partial(pd.read_csv, header=None, skipinitialspace=True, na_values='?')
    train, test = (read(DATA / 'tabular' / 'adult' / f'adult-{o}.csv.gz') for o in PARTS)
    test[14] = test[14].str.rstrip('.')
    names = 'age work w edu edun mar occ rel race sex gain loss hours country income'.split()
    parts(train.sample(4000, random_state=0), test.sample(6000, random_state=0), names).to_csv(
        folder / 'adult.csv', index=False
    )


PARTS = 'train', 'test'


def parts(train, test, names):
    "Both parts in one table; the second is marked in column v"
    both = pd.concat([o.set_axis(names, axis=1).assign(v=i) for i, o in enumerate((train, test))])
    return both.reset_index(drop=True)


def learners(cell, folder):
    "(TrainConfig, fn() -> a new Learner)"
    given = dict(teacher='resnet18', student='cnn', augment='none') | CELLS[cell]
    if given['student'] != 'cnn' and given.get('task') == 'table':
        given['teacher'] = 'tabular'
    c = TrainConfig(**given | dict(data=str(folder / given['data'])))
    s = checked_samples(read_samples(c), c)
    seed_everything(0, 0)
    dls = loaders_of(s, c)
    if s.task in ('images', 'masks'):  # decode each file once
        for dl in dls.loaders:
            items = [dl.after_item(dl.dataset[i]) for i in range(len(dl.dataset))]
            dl.create_item = items.__getitem__

    def make():
        seed_everything(0, FOR_STUDENT)
        return learner_of(c.arch('student'), dls, s, c)

    return c, make


def score(c, learn, lr):
    "After a training at this rate; 0 if the loss was not finite"
    seed_epoch(learn, 0, FOR_STUDENT, BEFORE_FIT)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(c.epochs, lr)
    _, loss, value = learn.recorder.values[-1]
    return value if math.isfinite(loss) else 0.0


def suggestions(make, folder):
    "rule -> the rate that it suggests"
    found = {AUTO: find_rate(make(), 0, FOR_STUDENT) or IF_NONE_IS_FOUND}
    learn = make()
    learn.path, learn.model_dir = folder, 'models'
    seed_epoch(learn, 0, FOR_STUDENT, BEFORE_FIT)
    with learn.no_bar():
        said = learn.lr_find(show_plot=False, suggest_funcs=[*RULES.values()])
    for name, v in zip(RULES, said):
        high = 0.03 if name == BEFORE else RATES[-1]
        found[name] = min(max(float(v), RATES[0]), high)
    return found


def row(cell, folder):
    c, make = learners(cell, folder)
    scores = {lr: score(c, make(), lr) for lr in GRID}
    while (best := max(scores, key=scores.get)) in (min(scores), max(scores)):
        at = RATES.index(best) + (1 if best == max(scores) else -1)
        if not 0 <= at < len(RATES):
            break
        scores[RATES[at]] = score(c, make(), RATES[at])
    steps = c.epochs * len(make().dls.train)
    return dict(
        cell=cell,
        steps=steps,
        scores={f'{k:g}': round(v, 5) for k, v in sorted(scores.items())},
        found=suggestions(make, folder),
    )


def git(*args):
    return subprocess.run(
        ['git', '-C', ROOT, *args], capture_output=True, text=True, check=True
    ).stdout.strip()


def lost(r, lr):
    "Points by which a rate is worse than the best one"
    rates, scores = zip(*((float(k), 100 * v) for k, v in r['scores'].items()))
    return max(scores) - np.interp(np.log(lr), np.log(rates), scores)


def show(rows):
    table = Table('training', 'steps', 'best', 'score', *RULES, AUTO)
    for r in rows:
        best = max(r['scores'], key=r['scores'].get)
        said = [f'{r["found"][k]:.2g}: -{lost(r, r["found"][k]):.1f}' for k in (*RULES, AUTO)]
        table.add_row(r['cell'], str(r['steps']), best, f'{100 * r["scores"][best]:.1f}', *said)
    rules = {k: [lost(r, r['found'][k]) for r in rows] for k in (*RULES, AUTO)}
    rules |= {f'always {lr:g}': [lost(r, lr) for r in rows] for lr in (3e-3, 1e-2, 3e-2)}
    summary = Table('rule', 'points lost, mean', 'worst')
    for k, v in rules.items():
        summary.add_row(k, f'{np.mean(v):.1f}', f'{max(v):.1f}')
    for t in (table, summary):
        Console(width=200).print(t)


def main(run: bool = True):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    rows = [json.loads(o) for o in OUT.read_text().splitlines()] if OUT.is_file() else []
    left = [c for c in CELLS if c not in {r['cell'] for r in rows}] if run else []
    with tempfile.TemporaryDirectory() as folder:
        if left:
            write_data(Path(folder))
        for cell in left:
            rows.append(
                row(cell, Path(folder)) | dict(commit=git('rev-parse', '--short=12', 'HEAD'))
            )
            with OUT.open('a') as f:
                f.write(json.dumps(rows[-1]) + '\n')
            print(rows[-1], flush=True)
    show(rows)


if __name__ == '__main__':
    typer.run(main)
