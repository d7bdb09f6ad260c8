"""Few labels and many inputs: what the inputs without labels add. scikit-learn's digits: 50 or 200 images with labels, the others of 1,200 without;
597 by other writers for the test. Three seeds.

    python benchmarks/unlabeled.py --out benchmarks/results/unlabelled.json

The teacher was trained on the labels of all 1,200 images. Students learn for 300 steps at the same rate: from labels alone, from the default recipe on
the images with labels, and from the same recipe with the other images beside, from a teacher that runs or from stored outputs.
"""

import json, tempfile
from pathlib import Path
import typer
from fastai.vision.all import *
from fastdistill.fastai import *
from pretrain import digits, learner, net, quietly, show


def main(
    out: Path = Path('benchmarks/results/unlabelled.json'),
    seeds: int = 3,
    labels: list[int] = (50, 200),
    steps: int = 300,
):
    (train, valid), rows = digits(), []
    test = DataLoader(valid, bs=597)
    for seed in range(seeds):
        set_seed(seed, reproducible=True)
        teacher = quietly(learner(train, valid[:10], net(64, 128, 256)), 'fit_one_cycle', 10, 5e-3)
        row, order = dict(seed=seed, teacher=teacher.validate(dl=test)[1]), torch.randperm(1200)
        for n in labels:
            few, more = [train[i] for i in order[:n]], [train[i][0] for i in order[n:]]
            with tempfile.TemporaryDirectory() as folder:
                stored = cache_teacher(
                    teacher,
                    learner(few, valid[:10], teacher.model).dls,
                    folder,
                    store=dict(dtype='float32'),
                    kind='softmax',
                    unlabeled=more,
                    check=False,
                    progress=False,
                )
                ways = {
                    'the default': {},
                    'and inputs without labels': dict(unlabeled=more),
                    'the same, stored': dict(unlabeled=dict(items=more, targets=stored)),
                }
                for name, options in {'labels alone': None, **ways}.items():
                    set_seed(seed, reproducible=True)
                    learn, epochs = learner(few, valid[:10], net(8, 16, 32)), steps * 50 // n
                    if options is None:
                        quietly(learn, 'fit_one_cycle', epochs, 1e-2)
                    else:
                        quietly(learn, 'distill', teacher, epochs, 1e-2, check=False, **options)
                    row[f'{n} labels: {name}'] = learn.validate(dl=test)[1]
        rows.append(row)
        print(row, flush=True)
    out.write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == '__main__':
    typer.run(main)
