"""How good must a teacher of several labels be? GoEmotions, teachers that were stopped at different times, one student; rates, seeds and
statistics of PROTOCOL.md. A restart skips what is there.

    python benchmarks/quality/weak_labels.py      # QUALITY_DATA names the folder of the data sets"""

import json, math
from functools import partial
import protocol, task_text, torch
from judge import Judged, said
from rule import apart
from run import commit, run_cell
from tasks import HERE, Cell

TEACHERS = (
    (400, 0.01),
    (600, 0.015),
    (600, 0.02),
    (600, 0.03),
    (900, 0.02),
)  # steps and rate of training
RECIPES = 'labels', 'kd(.1)', 'kd(.3)', 'kd(.5)', 'binary(1)x.3', 'binary(1)x1', 'binary(1)x3'


def main(out=HERE.parent / 'results' / 'weak_labels' / f'protocol{protocol.VERSION}'):
    torch.set_num_threads(1)
    code = commit()
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
        )
        run_cell(cell, out, math.inf, RECIPES, code)
        found, valid = Judged(out).cells[name], cell.data().valid
        gains = {k: said(found.gain(k), 'map') for k in RECIPES[1:]}
        print(json.dumps(dict(teacher=name, apart=round(apart(valid.t, valid.y), 3), gains=gains)))


if __name__ == '__main__':
    main()
