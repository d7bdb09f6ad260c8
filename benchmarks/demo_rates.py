"""The demo's students at several learning rates: does the gain hold where the student alone is at its best?

    python benchmarks/demo_rates.py
"""
import json
from pathlib import Path
from statistics import mean, stdev
import torch, typer
from fastai.basics import noop
from fastdistill.demo import WAYS, train
from fastdistill.demo.tasks import load


def main(rates:list[float]=[.1, .2, .3, .4, .6], seeds:int=5, out:Path=Path('benchmarks/results/demo_rates.json')):
    torch.set_num_threads(1)
    task = load('digits')
    of_teacher,(n_epoch,_,augment) = zip(task.epochs, task.lr, task.augment)
    teacher = train(task, task.teacher, *of_teacher, 0, noop)
    print(f'teacher {100*teacher.score:.1f}', flush=True)
    scores = {}
    for lr in rates:
        scores[lr] = {w: [train(task, task.student, n_epoch, lr, augment, s, noop, teacher.learn, r).score for s in range(seeds)] for w,r in WAYS.items()}
        print(lr, *[f'{w} {100*mean(o):.1f} ± {100*stdev(o):.1f}' for w,o in scores[lr].items()], sep='  ', flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(teacher=teacher.score, scores=scores), indent=1) + '\n')


if __name__ == '__main__': typer.run(main)
