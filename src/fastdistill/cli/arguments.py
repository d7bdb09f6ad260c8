"""Command-line arguments for models, data and recipes that several commands share. This module does
not import PyTorch.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import DistillError
from .recipe_names import check_recipe_text
from .training.config import exported_student

PICTURES = '.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.pdf', '.svg', '.eps', '.ps'
MODEL = "an exported Learner (.pkl), the folder of a run, or 'file.py:name'"


def in_python(name: str) -> bool:
    return '.py:' in name or name.endswith('.py')


def in_file(name: str) -> tuple[str, str]:
    """Split 'file.py:name' into (file, name). Raise a DistillError if the file does not exist."""
    file, _, attr = name.rpartition(':')
    if not file.endswith('.py') or not attr:
        table = (
            " To score a run's student on the rows of a CSV file, in Python: learn = "
            "load_learner('RUN/student.pkl'); dl = learn.dls.test_dl("
            f"pd.read_csv({name!r}), with_labels=True); compare({{'student': learn}}, dl=dl)"
        )
        raise DistillError(
            f"{name!r}: must be a file and a name in it, such as 'train.py:dls'."
            f'{table if name.endswith(".csv") else ""}'
        )
    if not Path(file).is_file():
        raise DistillError(f'There is no file {file!r}.')
    return file, attr


def python_name(name: str) -> str:
    """Check an argument of the form 'file.py:name'."""
    if name is not None:
        in_file(name)
    return name


def named_model(name: str) -> str:
    """Check an argument that specifies a model. Replace the folder of a run with the exported
    student inside.
    """
    if in_python(name):
        return python_name(name)
    file = exported_student(name)
    if not Path(file).is_file() and not Path(file).is_dir():
        raise DistillError(f'There is no file {file!r}. A model is {MODEL}.')
    return file


def named_models(texts: list[str]) -> list[str]:
    """Check arguments of the form 'teacher=teacher.pkl'."""
    return [f'{name}={named_model(what)}' for name, what in map(split_name, texts)]


def split_name(text: str) -> tuple[str, str]:
    """Split 'teacher=teacher.pkl' into ('teacher', 'teacher.pkl')."""
    name, _, what = text.partition('=')
    if not name or not what:
        raise DistillError(f'{text!r}: must be a name and a model, such as big=teacher.pkl')
    return name, what


def recipe_name(text: str | None) -> str | None:
    """Check a recipe given as text or as 'file.py:name'."""
    if text is not None:
        if in_python(text):
            in_file(text)
        else:
            check_recipe_text(text)
    return text


def recipe_names(texts: list[str] | None) -> list[str]:
    """Check several recipes. Return an empty list for None."""
    # subtle: typer 0.16 takes the length of what the callback of a list returns
    for text in texts or []:
        recipe_name(text)
    return texts or []


def picture_file(path: Path | None) -> Path | None:
    """Check that a picture can be saved as this file."""
    if path is None:
        return None
    if path.suffix and path.suffix.lower() not in PICTURES:
        raise DistillError(f'{str(path)!r}: a picture ends in {", ".join(PICTURES)}.')
    if not path.absolute().parent.is_dir():
        raise DistillError(f'{str(path)!r}: there is no folder {str(path.parent)!r}.')
    return path


def existing_cache(path: str) -> str:
    if '://' not in path and not (Path(path).expanduser() / 'manifest.json').is_file():
        raise DistillError(f'There is no cache at {path} (no manifest.json).')
    return path


StudentArg = Annotated[str, typer.Argument(callback=named_model, help=f'A Learner: {MODEL}.')]
TeacherArg = Annotated[
    str,
    typer.Argument(
        callback=named_model,
        help=f'{MODEL.capitalize()}; or another file that Teacher takes, such as .onnx or .joblib.',
    ),
]
ModelsArg = Annotated[
    list[str],
    typer.Argument(
        callback=named_models,
        metavar='NAME=MODEL ...',
        help=f'teacher=teacher.pkl alone=train.py:alone distilled=runs/a ... A model is {MODEL}, or another file that '
        'Teacher takes.',
    ),
]
DataArg = Annotated[
    str,
    typer.Argument(
        callback=python_name,
        help="'file.py:name' of DataLoaders, or of a function that returns them.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        '--data',
        callback=python_name,
        help="'file.py:name' of DataLoaders; default: from the Learner, or from the run that wrote the model.",
    ),
]
RecipeText = "Such as 'kd(T=4, alpha=.9) + at()', or 'file.py:name'"
CacheArg = Annotated[
    str, typer.Argument(callback=existing_cache, help='Folder of the cache, or its URL.')
]
NoCheck = Annotated[bool, typer.Option('--check/--no-check', help='Check for mistakes first.')]
