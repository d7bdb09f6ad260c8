"`fastdistill demo`: measure the gain of distillation on real data."

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[
        bool,
        typer.Option('--quick', help='Train only a few steps with one seed, to see that it runs.'),
    ] = False,
    seeds: Annotated[int, typer.Option(help='Number of students of each kind.')] = 5,
    out: Annotated[
        Path, typer.Option(file_okay=False, help='Folder for the picture and the numbers.')
    ] = Path('out'),
) -> None:
    """Train a large model on real data, and small models with and without the large model as a
    teacher. Print a table and save a picture.
    """
    from ..demo import run

    run(seeds, out, quick)
