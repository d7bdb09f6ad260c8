"""Function matching (Beyer et al., arXiv:2106.05237): the teacher alone, mixed inputs, a long training. scikit-learn's digits, 1,200 images for training,
597 by other writers for the test. Three seeds.

    python benchmarks/function_matching.py --out benchmarks/results/function_matching.json

Each way trains for 10 and for 100 epochs, one cycle at the same rate: labels alone, with and without MixUp; the default recipe, with and without; the
teacher alone at T=1, with and without (the first is function matching).
"""

import json
from pathlib import Path
import typer
from fastai.vision.all import *
from fastdistill.fastai import *
from pretrain import digits, learner, net, quietly, show


def main(
    out: Path = Path('benchmarks/results/function_matching.json'),
    seeds: int = 3,
    epochs: list[int] = (10, 100),
):
    (train, valid), rows = digits(), []
    test = DataLoader(valid, bs=597)
    ways = {'labels alone': None, 'the default': 'auto', 'the teacher alone': soft_labels(T=1)}
    for seed in range(seeds):
        set_seed(seed, reproducible=True)
        teacher = quietly(learner(train, valid[:10], net(64, 128, 256)), 'fit_one_cycle', 10, 5e-3)
        row = dict(seed=seed, teacher=teacher.validate(dl=test)[1])
        for n in epochs:
            for name, recipe in ways.items():
                for mixed in (False, True):
                    set_seed(seed, reproducible=True)
                    learn, cbs = (
                        learner(train, valid[:10], net(4, 8, 16)),
                        MixUp(1.0) if mixed else None,
                    )
                    if recipe is None:
                        quietly(learn, 'fit_one_cycle', n, 1e-2, cbs=cbs)
                    else:
                        quietly(learn, 'distill', teacher, n, 1e-2, recipe, check=False, cbs=cbs)
                    row[f'{n} epochs, {name}{", mixed" if mixed else ""}'] = learn.validate(
                        dl=test
                    )[1]
        rows.append(row)
        print(row, flush=True)
    out.write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == '__main__':
    typer.run(main)
