"`fastdistill find`: the recipe and the learning rate that suit a student, its data and its teacher."
from pathlib import Path
from typing import Annotated
import typer
from .cache import TEACHER
from .objects import learner, load_object, load_teacher

__all__ = ['find']

STUDENT = typer.Argument(help="'file.py:name' of a Learner, or of a function that makes one.")


def find(
    teacher:Annotated[str, TEACHER],
    student:Annotated[str, STUDENT],
    n_epoch:Annotated[int, typer.Option(help='Epochs of the training for which a recipe is needed.', min=1)],
    minutes:Annotated[float, typer.Option(help='The search ends after this time.')]=10,
    rates:Annotated[list[float]|None, typer.Option(help='A learning rate to try; may be given several times.')]=None,
    seeds:Annotated[int, typer.Option(help='Seeds with which the best runs are repeated.')]=5,
    trials:Annotated[int|None, typer.Option(help='End the search after so many runs.')]=None,
    storage:Annotated[str|None, typer.Option(help='File or URL of a database, to resume from.')]=None,
    name:Annotated[str, typer.Option(help='Name of the search in the storage.')]='fastdistill',
    live:Annotated[bool, typer.Option('--live', help='The teacher runs in each trial; layers are compared too.')]=False,
    fine_tune:Annotated[bool, typer.Option('--fine-tune', help='Train with fine_tune.')]=False,
    check:Annotated[bool, typer.Option(help='Look for mistakes first.')]=True,
    recipe:Annotated[list[str]|None, typer.Option(help="In place of the usual ones: 'kd(T=1, alpha=.3)'. May be given "
                                                       'several times.')]=None,
    plot:Annotated[Path|None, typer.Option(help='File for the plot.')]=None
):
    """Try recipes and learning rates on short runs, repeat the best, and print a table.

    Several processes with the same storage search together. After Ctrl-C the best so far is shown; the same command
    with a storage resumes."""
    from .. import fastai  # noqa: F401 (it gives Learner distill_find)
    from ..recipe_text import recipe_from_text
    recipes = {text: recipe_from_text(text) for text in recipe or ()}
    try:
        found = load_object(student, learner).distill_find(
            load_teacher(teacher), n_epoch, minutes, rates=rates or None, seeds=seeds, trials=trials, storage=storage,
            name=name, recipes=recipes or None, live=live, fine_tune=fine_tune, check=check)
    except KeyboardInterrupt: raise typer.Exit(130) from None
    if plot is not None:
        found.plot().savefig(plot)
        typer.echo(f'Plot: {plot}')
