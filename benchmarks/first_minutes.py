"""What the first commands of the pages reach: `fastdistill train` as in docs/start.md and docs/guides/text.md, with five seeds.

    BENCHMARK_DATA=FOLDER python benchmarks/first_minutes.py            # about half an hour on one core
    BENCHMARK_DATA=FOLDER python benchmarks/first_minutes.py texts

Photos: the first 120 files by name of each class of Imagenette's training part (96 pixels). Scenes: every third file of CamVid's training part until there are 120, and every second one of its
validation part until there are 40. Texts: all questions of TREC's training part without repetitions, a fifth of them for validation; the teacher is a pipeline of words, or of words and their pieces. FOLDER
holds imagenette96, camvid and text/trec. Commands are read from the pages, with `--seeds 5` added, and run with one thread. Each result is results/first_minutes/NAME.json, which a second run replaces.
"""

import json, os, re, resource, shlex, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path
from typing import Annotated
import joblib
import numpy as np
import pandas as pd
import typer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'benchmarks' / 'results' / 'first_minutes'
DATA = Path(os.environ.get('BENCHMARK_DATA', '../shared/data'))
SEEDS = 5


def photos(folder):
    with tarfile.open(DATA / 'imagenette96' / 'train.tar') as t:
        files = {m.name: m for m in t if m.isfile()}
        n = {}
        for name in sorted(files, key=lambda o: Path(o).name):
            kind = Path(name).parent.name
            if n.setdefault(kind, 0) < 120:
                n[kind] += 1
                out = folder / 'your_photos' / kind / Path(name).name
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(t.extractfile(files[name]).read())


def scenes(folder):
    for part, step, n in (('train', 3, 120), ('val', 2, 40)):
        for image in sorted((DATA / 'camvid' / part / 'images').iterdir())[::step][:n]:
            for file in (image, DATA / 'camvid' / part / 'masks' / f'{image.stem}.png'):
                out = folder / 'scenes' / part / file.parent.name / file.name
                out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, out)
    shutil.copyfile(DATA / 'camvid' / 'codes.txt', folder / 'scenes' / 'codes.txt')


def texts(folder, pieces=True):
    df = pd.read_csv(DATA / 'text' / 'trec' / 'train.csv.gz')[['text', 'coarse']]
    df = df.rename(columns=dict(coarse='label')).drop_duplicates('text')
    df['is_valid'] = np.random.default_rng(0).random(len(df)) < 0.2
    train, words = df[~df.is_valid], TfidfVectorizer(ngram_range=(1, 2))
    both = make_union(words, TfidfVectorizer(analyzer='char_wb', ngram_range=(2, 5)))
    pipeline = (
        make_pipeline(both, LogisticRegression(C=20))
        if pieces
        else make_pipeline(TfidfVectorizer(), LogisticRegression())
    )
    joblib.dump(pipeline.fit(train.text, train.label), folder / 'pipeline.joblib')
    df.to_csv(folder / 'mails.csv', index=False)


# name -> (what writes the data, page, beginning of the command)
CASES = {
    'photos': (photos, 'start.md', 'fastdistill train --data your_photos --size'),
    'scenes': (scenes, 'start.md', 'fastdistill train --data scenes'),
    'texts': (
        texts,
        'guides/text.md',
        'fastdistill train --data mails.csv --x text --y label --valid',
    ),
    'texts_words': (
        lambda folder: texts(folder, pieces=False),
        'guides/text.md',
        'fastdistill train --data mails.csv --x text --y label --valid',
    ),
}


def command(page, begins):
    "The command of a page, without its --out"
    (found,) = re.findall(f'{re.escape(begins)}[^`\n]*', (ROOT / 'docs' / page).read_text())
    return f'{re.sub(" --out [^ ]+", "", found)} --seeds {SEEDS} --out run'


def git(*args):
    return subprocess.run(
        ['git', '-C', ROOT, *args], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(name):
    write, *where = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        line = command(*where)
        env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT / 'src'))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        program = [Path(sys.executable).with_name('fastdistill'), *shlex.split(line)[1:]]
        subprocess.run(program, cwd=folder, env=env, check=True)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        report = json.loads((Path(folder) / 'run' / 'report.json').read_text())
        environment = json.loads((Path(folder) / 'run' / 'environment.json').read_text())
    measure = report['headline']
    facts = dict(
        command=line,
        commit=git('rev-parse', '--short=12', 'HEAD')
        + ('+' if git('status', '--porcelain', '-uno', 'src') else ''),
        cpu_seconds=round(seconds),
        measure=measure,
        n=report['n'],
        teacher=report['models']['teacher']['measures'][measure],
        seeds=report['seeds'],
        environment=environment,
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f'{name}.json').write_text(json.dumps(facts, indent=1) + '\n')
    print(name, json.dumps(facts['seeds']))


def main(names: Annotated[list[str] | None, typer.Argument()] = None):
    for name in names or CASES:
        run(name)


if __name__ == '__main__':
    typer.run(main)
