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
    out: Annotated[Path, typer.Option(help='Folder for the picture and the numbers.')] = Path(
        'out'
    ),
    data: Annotated[
        str, typer.Option(help='digits (two-digit numbers; needs no files), cifar10 or camvid.')
    ] = 'digits',
    root: Annotated[
        Path | None, typer.Option(help='Folder of the data, for cifar10 and camvid.')
    ] = None,
) -> None:
    """Train a large model on real data, and small models with and without the large model as a
    teacher. Print a table and save a picture.
    """
    from ..demo import run

    run(data, root, seeds, out, quick)
