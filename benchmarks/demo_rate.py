"""Choose the learning rates of the demo on validation data, with seeds that the demo does not report.

    python benchmarks/demo_rate.py     # a few minutes; writes results/demo/rates.json

The numbers for training are made of the first 900 digits, those for validation of the next 300. No test digit is used. The rate of
the teacher is the one with the best mean, that of the students the one with the best mean of the students trained alone.
"""

from pathlib import Path
from statistics import mean
import torch
from fastdistill.base.atomic_files import write_json
from fastdistill.cli.demo import WAYS, train
from fastdistill.cli.demo.results import ALONE, machine
from fastdistill.cli.demo.tasks import digits

OUT = Path(__file__).parent / 'results' / 'demo' / 'rates.json'
SEEDS = range(10, 15)  # the demo reports 0 to 4
TEACHER_RATES, STUDENT_RATES = (0.003, 0.01, 0.03, 0.1), (0.03, 0.1, 0.3, 1.0)


def best(scores):
    return max(scores, key=lambda rate: mean(scores[rate]))


def scores_of(task, which, rates, *teaching):
    "{rate: [validation score for each seed]}"
    model, n_epoch = (task.teacher, task.student)[which], task.epochs[which]
    return {
        lr: [train(task, model, n_epoch, lr, s, lambda: None, *teaching).score for s in SEEDS]
        for lr in rates
    }


def main():
    torch.set_num_threads(1)
    task = digits(train=(0, 900), test=(900, 1200))
    found = {'teacher': scores_of(task, 0, TEACHER_RATES)}
    settings = task.epochs[0], best(found['teacher']), SEEDS[0], lambda: None
    teacher = train(task, task.teacher, *settings).learn
    for way, recipe in WAYS.items():
        found[way] = scores_of(task, 1, STUDENT_RATES, teacher, recipe)
        print(way, {lr: f'{100 * mean(o):.1f}' for lr, o in found[way].items()}, flush=True)
    chosen = [best(found['teacher']), best(found[ALONE])]
    write_json(OUT, dict(chosen=chosen, seeds=[*SEEDS], scores=found, machine=machine()))
    print(f'chosen: {chosen[0]:g} for the teacher, {chosen[1]:g} for the students')


if __name__ == '__main__':
    main()
