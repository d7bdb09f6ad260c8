"Results of the demo, as text and numbers."

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fastai
import torch
from fastai.basics import Learner, default_device
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ...base.atomic_files import write_json

ALONE = 'student alone'


@dataclass
class Trained:
    """A trained model.

    Attributes:
        out: Logits for the test set.
        score: Accuracy on the test set after the last epoch.
        recipe: The recipe that `auto` chose. Empty if the recipe was not chosen by `auto`.
    """

    learn: Learner
    out: Tensor
    score: float
    recipe: str = ''

    @property
    def model(self) -> nn.Module:
        return self.learn.model


@dataclass
class Results:
    """All results of one run of the demo.

    Attributes:
        n: (number of training samples, number of test samples).
        steps: (training steps of the teacher, training steps of each student).
        teacher: Accuracy of the teacher.
        scores: {way: [accuracy for each seed]}.
        params: {'teacher' or 'student': number of parameters}.
        ms: {'teacher' or 'student': {batch size: median milliseconds of a forward pass}}.
        seconds: Duration of the whole demo.
        recipes: {way: recipe that `auto` chose}.
    """

    data: str
    n: tuple
    steps: tuple
    teacher: float
    scores: dict
    params: dict
    ms: dict
    seconds: float
    machine: dict
    recipes: dict

    @property
    def seeds(self) -> int:
        return len(self.scores[ALONE])

    def gain(self, way: str) -> float:
        """Return the mean score minus the mean score of the students trained alone."""
        return mean(self.scores[way]) - mean(self.scores[ALONE])

    def recovered(self, way: str) -> float | None:
        """Return the gain as a fraction of the teacher's lead over the students trained alone.
        Return None if the teacher has no lead.
        """
        lead = self.teacher - mean(self.scores[ALONE])
        return self.gain(way) / lead if lead > 0 else None

    def better(self, way: str) -> int:
        """Return the number of seeds with a higher score than the student trained alone."""
        return sum(a > b for a, b in zip(self.scores[way], self.scores[ALONE]))

    def save(self, path: Path) -> None:
        taught = {
            way: dict(gain=self.gain(way), recovered=self.recovered(way), better=self.better(way))
            for way in self.scores
            if way != ALONE
        }
        write_json(path, asdict(self) | dict(taught=taught))


def n_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of the packages."""
    return dict(
        device=str(default_device()),
        cpu=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        fastai=fastai.__version__,
    )


def opening(task: Any, seeds: int) -> str:
    return (
        f'[bold]{task.title}[/]: {len(task.train[0]):,} for training, {len(task.test[0]):,} for testing\n\n'
        f'A teacher with {n_params(task.teacher()):,} parameters is trained, then students with '
        f'{n_params(task.student()):,}: alone, distilled with the default recipe, and with only the '
        "teacher's soft labels. All students of a seed have the same initial weights, batches and "
        f'learning rate. Students of each kind: {seeds}; steps: {task.steps[1]:,}.\n'
    )


def percent(xs: Sequence[float]) -> str:
    return f'{100 * mean(xs):.1f}' + (f' ± {100 * stdev(xs):.1f}' if len(xs) > 1 else '')


def results_table(r: Results) -> Table:
    """Build a table with one row per model."""
    t = Table('', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    t.columns[0].no_wrap = True
    columns = (
        'accuracy\n%',
        'beats\nalone',
        'lead re-\ncovered',
        'params',
        *(f'ms\nfor {n}' for n in r.ms['student']),
    )
    for c in columns:
        t.add_column(c, justify='right', no_wrap=True)
    ms = {who: [f'{v:.2f}' for v in o.values()] for who, o in r.ms.items()}
    t.add_row('teacher', percent([r.teacher]), '', '', f'{r.params["teacher"]:,}', *ms['teacher'])
    for way, xs in r.scores.items():
        share = r.recovered(way)
        gained = '-' if share is None else f'{100 * share:.0f}%'
        taught = ('', '') if way == ALONE else (f'{r.better(way)} of {r.seeds}', gained)
        t.add_row(way, percent(xs), *taught, f'{r.params["student"]:,}', *ms['student'])
    return t


def closing(r: Results, picture: Path, numbers: Path) -> str:
    """Return the last lines of the output: the gains, the written files, and what to do next."""
    over = f'mean ± standard deviation over {r.seeds} seeds' if r.seeds > 1 else 'one seed'
    chosen = '\n'.join(f'{way}: {recipe}' for way, recipe in r.recipes.items())
    gains = ', '.join(f'{way} {100 * r.gain(way):+.1f}' for way in r.scores if way != ALONE)
    return (
        f'{chosen}\n\nTest set after the last epoch; students: {over}.\n'
        f'Gain over the student alone, in points: {gains}.\n'
        f'{r.seconds:.0f} s on {r.machine["cores"]} cores. Picture: {picture}\nNumbers: {numbers}\n\n'
        '[bold]Next, with your own data[/]: two Learners with the same classes, one trained, and\n'
        '    from fastdistill.fastai import *; student.distill(teacher, 5, 1e-3)'
    )
