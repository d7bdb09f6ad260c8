"""How good must a teacher of several labels be? GoEmotions, teachers that were stopped at different times, one student. Each recipe at its own
best rate, as in the quality benchmark, five seeds; a restart skips what is there.

    python benchmarks/quality/weak_labels.py      # QUALITY_DATA names the folder of the data sets"""

import json, time
from functools import partial
import task_text, torch
from candidates import CANDIDATES
from rule import apart
from run import read, run_cell
from stats import at_best_rate, by_seed, paired
from tasks import HERE, Cell

TEACHERS = (
    (400, 0.01),
    (600, 0.015),
    (600, 0.02),
    (600, 0.03),
    (900, 0.02),
)  # steps and rate of training
RECIPES = 'labels', 'kd(.1)', 'kd(.3)', 'kd(.5)', 'binary(1)x.3', 'binary(1)x1', 'binary(1)x3'


def main(out=HERE.parent / 'results' / 'weak_labels'):
    torch.set_num_threads(1)
    for steps, lr in TEACHERS:
        name = f'goemotions-{steps}-{lr}'
        task_text.TEACHERS[name] = steps, lr
        cell = Cell(
            name,
            'goemotions',
            'labels',
            partial(task_text.data, name),
            task_text.student(12),
            450,
            rates=(0.03, 0.1, 0.3),
            seeds=5,
        )
        run_cell(cell, [CANDIDATES[k] for k in RECIPES], out, time.time() + 1e9)
        valid = cell.data().valid
        best = at_best_rate(read(out / f'{name}.jsonl'), 'labels')
        base = by_seed(best['labels'], 'labels')
        gains = {k: round(paired(by_seed(v, 'labels'), base)[0], 2) for k, v in best.items()}
        print(json.dumps(dict(teacher=name, apart=round(apart(valid.t, valid.y), 3), gains=gains)))


if __name__ == '__main__':
    main()
