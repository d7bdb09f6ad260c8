"""`fastdistill find`: find a recipe and a learning rate for a student, its data and its teacher."""

import inspect
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ...base.errors import DistillError
from ..arguments import (
    DataOption,
    NoCheck,
    RecipeText,
    StudentArg,
    TeacherArg,
    in_file,
    in_python,
    picture_file,
    recipe_names,
)
from ..named_objects import load_named_learner, load_object, load_recipe, load_teacher, of_run


def find(
    student: StudentArg,
    teacher: TeacherArg,
    n_epoch: Annotated[
        int, typer.Option(help='Number of epochs for which the recipe should be best.', min=1)
    ],
    data: DataOption = None,
    minutes: Annotated[float, typer.Option(help='Time limit of the search.')] = 10,
    rates: Annotated[
        list[float] | None, typer.Option(help='Learning rate to try; may be given several times.')
    ] = None,
    seeds: Annotated[
        int, typer.Option(help='Number of seeds with which the best runs are repeated.')
    ] = 5,
    trials: Annotated[int | None, typer.Option(help='Maximum number of runs.')] = None,
    folder: Annotated[
        Path | None, typer.Option(help='Folder for finished runs, from which the search resumes.')
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            '--live',
            help='Run the teacher in each trial, and also try recipes that compare layers.',
        ),
    ] = False,
    fine_tune: Annotated[bool, typer.Option('--fine-tune', help='Train with fine_tune.')] = False,
    check: NoCheck = True,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            callback=recipe_names,
            help=f'{RecipeText}; replaces the default candidates. May be given several times.',
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=picture_file, help='File for the plot.')
    ] = None,
) -> None:
    """Try recipes and learning rates in short runs, repeat the best, and print a table.

    The student of a run is trained from the beginning, as fastdistill train does. Any other student
    starts with its own weights.

    Several processes can search together if they use the same folder. After Ctrl-C, the best result
    so far is shown. With a folder, the same command resumes the search. The last line of the output
    is a command that trains with the best recipe. Example: fastdistill find train.py:student
    teacher.pkl --n-epoch 5.
    """
    from ... import fastai  # noqa: F401 (this import adds Learner.distill_find)
    from ..training.exported_student import new_student

    recipes = {text: load_recipe(text) for text in recipe or ()}
    if anew := starts_anew(student, data):
        learn = new_student(student)
    else:
        learn = load_named_learner(student, data)
    start = 'from the weights with which fastdistill train begins' if anew else f'from {student}'
    typer.echo(f'Each training run starts {start}.')
    try:
        found = learn.distill_find(
            load_teacher(teacher, learn if of_run(student) and data is None else None),
            n_epoch,
            minutes,
            rates=rates or None,
            seeds=seeds,
            trials=trials,
            folder=folder,
            recipes=recipes or None,
            live=live,
            fine_tune=fine_tune,
            check=check,
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if plot is not None:
        found.plot().savefig(plot)
        typer.echo(f'Plot: {plot}')
    command = training_command(student, teacher, data, n_epoch, fine_tune, found)
    typer.echo(f'To train with it, run:\n{command}')


def starts_anew(student: str, data: str | None) -> bool:
    """Return True for the student of a run, which is trained from the beginning again."""
    return of_run(student) and data is None


def training_command(
    student: str, teacher: str, data: str | None, n_epoch: int, fine_tune: bool, found: Any
) -> str:
    """Return a shell command that trains with the recipe and learning rate that were found."""
    labels_alone = found.winner.name == found.labels
    anew = starts_anew(student, data)
    if (
        anew
        and not (fine_tune or labels_alone or in_python(teacher))
        and is_recipe_text(found.text)
    ):
        return shlex.join(
            [
                'fastdistill',
                'train',
                '--config',
                str(Path(student).parent / 'config.toml'),
                '--teacher',
                teacher,
                '--epochs',
                str(n_epoch),
                '--lr',
                f'{found.lr:.3g}',
                '--recipe',
                found.text,
            ]
        )
    folders: list[str] = []
    lines = [
        'from fastdistill import *',
        'from fastdistill.recipes import *',
        'from fastdistill.fastai import *',
    ]

    def imported(name: str, as_name: str) -> None:
        file, attr = in_file(name)
        folders.append(str(Path(file).parent))
        lines.append(f'from {Path(file).stem} import {attr} as {as_name}')
        if load_object(name, inspect.isroutine):
            lines.append(f'{as_name} = {as_name}()')

    if data is not None:
        imported(data, 'dls')
    if in_python(student):
        imported(student, 'student')
        if data is not None:
            lines.append('student.dls = dls')
    else:
        load = 'new_student' if anew else 'learner_in_file'
        lines += [
            f'from fastdistill.cli.training.exported_student import {load}',
            f'student = {load}({student!r}{"" if data is None else ", dls"})',
        ]
    fit = 'fine_tune' if fine_tune else 'fit_one_cycle'
    if labels_alone:
        lines.append(f'student.{fit}({n_epoch}, {found.lr:.3g})')
    else:
        if in_python(teacher):
            imported(teacher, 'teacher')
        else:
            lines.append(f'teacher = {teacher!r}')
        if in_python(found.text):
            imported(found.text, 'recipe')
        recipe = 'recipe' if in_python(found.text) else found.text
        how = ', fine_tune=True' if fine_tune else ''
        lines.append(f'student.distill(teacher, {n_epoch}, {found.lr:.3g}, {recipe}{how})')
    lines.append("student.save('student')")
    path = (
        ''
        if {*folders} <= {'.'}
        else f'PYTHONPATH={shlex.quote(os.pathsep.join(dict.fromkeys(folders)))} '
    )
    return path + shlex.join(['python', '-c', '; '.join(lines)])


def is_recipe_text(text: str) -> bool:
    try:
        load_recipe(text)
    except DistillError:
        return False
    return not in_python(text)
