"`fastdistill demo`: the gain of distillation, measured on real data."

from pathlib import Path
from typing import Annotated

import typer

__all__ = ['demo']


def demo(
    quick: Annotated[
        bool, typer.Option('--quick', help='A few steps, one seed: only to see that it runs.')
    ] = False,
    seeds: Annotated[int, typer.Option(help='Students of each kind.')] = 5,
    out: Annotated[Path, typer.Option(help='Folder for the picture and the numbers.')] = Path(
        'out'
    ),
    data: Annotated[
        str, typer.Option(help='digits (needs no files), cifar10 or camvid.')
    ] = 'digits',
    root: Annotated[
        Path | None, typer.Option(help='Folder of the data, for cifar10 and camvid.')
    ] = None,
):
    """Train a big model, and small ones with and without it as teacher, on real data. Make a table
    and a picture.
    """
    from ..demo import run

    run(data, root, seeds, out, quick)
