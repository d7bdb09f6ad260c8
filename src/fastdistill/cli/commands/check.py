"""`fastdistill check`: find mistakes that would go unnoticed when training with a teacher, and
estimate the cost of training.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..arguments import DataOption, RecipeText, StudentArg, TeacherArg, recipe_name
from ..named_objects import load_named_learner, load_recipe, load_teacher, of_run


def check_command(
    student: StudentArg,
    teacher: TeacherArg,
    data: DataOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            callback=recipe_name, help=f'{RecipeText}; default: chosen to fit the outputs.'
        ),
    ] = None,
    n_epoch: Annotated[
        int, typer.Option(help='Number of epochs for which costs are estimated.', min=1)
    ] = 10,
    n: Annotated[
        int,
        typer.Option(
            help='Validation batches to read; a quarter as many training batches are read.', min=1
        ),
    ] = 8,
    cost: Annotated[bool, typer.Option(help='Measure times and memory.')] = True,
) -> None:
    """Check a teacher for a student before training. Print a table of mistakes, measurements and
    costs.

    The exit code is 1 if a mistake was found that would stop training, and 2 if the check could not
    run. Example: fastdistill check train.py:student teacher.pkl.
    """
    from ...fastai.teachers import PICKLES

    learn = load_named_learner(student, data)
    found = learn.check_teacher(
        load_teacher(teacher, learn if of_run(student) and data is None else None),
        recipe=None if recipe is None else load_recipe(recipe),
        n=n,
        n_epoch=n_epoch if cost else None,
    )
    found.show()
    if Path(teacher).suffix in PICKLES:
        typer.echo(
            'A teacher in a file may have been trained on these validation samples. If so, its score is too '
            'high.'
        )
    if found.errors:
        raise typer.Exit(1)
